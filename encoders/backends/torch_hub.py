"""This backend builds DINOv2 with the weight names and the interpolation of torch.hub's `facebookresearch/dinov2`.

timm and transformers have the same model with other weight names, and interpolate positions in other ways (timm with antialiasing,
transformers without torch.hub's offset). So at sizes other than 518 pixels their features differ from torch.hub's features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.base import Encoder
from encoders.names import near_names
from encoders.weight_files import WeightsError, explain_download, load_strict, read_state, without_prefix

# Shapes: B, S, h, w, D as in base.py; n = side of the grid of the position table.

_SIZES = {"dinov2_vits14": (384, 12, 6), "dinov2_vitb14": (768, 12, 12), "dinov2_vitl14": (1024, 24, 16)}
MODELS = {
    name: {"width": width, "depth": depth, "heads": heads, "patch_size": 14, "image_size": 518}
    for name, (width, depth, heads) in _SIZES.items()
}
"""Name in torch.hub -> arguments of `DinoV2`."""

URL = "https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
HEAD_WIDTH = 64  # the width of a head in every published DINOv2
OFFSET = 0.1  # torch.hub's DINOv2 adds this to the number of patches before it divides


class DinoV2(nn.Module):
    """DinoV2 is the network of DINOv2, made of timm's blocks. All its weights have the same names as torch.hub's."""

    def __init__(self, width: int, depth: int, heads: int, patch_size: int, image_size: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.side = image_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # used in pre-training only; kept so that an export has all weights
        self.patch_embed = PatchEmbed(None, patch_size, 3, width)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, init_values=1.0, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return layer -> class token and patches [B, 1 + h*w, D] after this number of blocks, not normed, for x [B, 3, S, S]."""
        side = x.shape[-1] // self.patch_embed.patch_size[0]
        x = self.patch_embed(x)  # [B, h*w, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(side)  # [B, 1 + h*w, D]
        after = {0: x}
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            after[number] = x = block(x)  # [B, 1 + h*w, D]
        return {layer: after[layer] for layer in layers}

    def positions(self, side: int) -> Tensor:
        """Return positions [1, 1 + side*side, D], scaled by (side + OFFSET) / n without antialiasing, as in torch.hub."""
        if side == self.side:
            return self.pos_embed
        table = self.pos_embed.float()  # [1, 1 + n*n, D]
        maps = table[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # [1, D, n, n]
        maps = F.interpolate(maps, scale_factor=(side + OFFSET) / self.side, mode="bicubic")  # [1, D, side, side]
        rows = maps.flatten(2).transpose(1, 2)  # [1, side*side, D]
        return torch.cat([table[:, :1], rows], dim=1).to(self.pos_embed.dtype)  # [1, 1 + side*side, D]


class TorchHubEncoder(Encoder):
    """TorchHubEncoder is the DINOv2 of torch.hub. `embed_image` returns its normalised class token."""

    prefix_tokens = 1
    flexible = True

    def __init__(self, tower: DinoV2, facts: Mapping[str, int], **options: Any) -> None:
        sizes: dict[str, Any] = {key: facts[key] for key in ("width", "depth", "patch_size", "image_size")}
        statistics = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        super().__init__(tower, **sizes, **statistics, embed_dim=facts["width"], **options)

    def patch_tokens(self, x: Tensor) -> Tensor:
        return self._patches(self.tower(x, self.layers))  # [B, h*w, D]

    def image_embedding(self, x: Tensor) -> Tensor:
        return self._class_token(self.tower(x, [len(self.tower.blocks)]))  # [B, D]

    def embedding_and_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        after = self.tower(x, [*self.layers, len(self.tower.blocks)])  # [B, 1 + h*w, D] each
        return self._class_token(after), self._patches(after)

    def _patches(self, after: Mapping[int, Tensor]) -> Tensor:
        norm = self.tower.norm if self.norm else nn.Identity()
        return torch.cat([norm(after[layer])[:, 1:] for layer in self.layers], dim=-1)  # [B, h*w, D]

    def _class_token(self, after: Mapping[int, Tensor]) -> Tensor:
        return self.tower.norm(after[len(self.tower.blocks)][:, 0])  # [B, D]


def build(model: str, *, pretrained: bool, weights: str | None, config: Mapping[str, int] | None = None, **options: Any) -> TorchHubEncoder:
    """Return the encoder with the sizes of a name in `MODELS`, or with the sizes in `config`."""
    if config is None and model not in MODELS:
        raise ValueError(f"torch.hub has no DINOv2 {model!r} here.{near_names(model, MODELS)} Known: {', '.join(MODELS)}")
    facts = MODELS[model] if config is None else dict(config)
    tower = DinoV2(**facts)
    if pretrained:
        state = without_prefix(read_state(weights), tower.state_dict(), weights) if weights else _download(model)
        load_strict(tower, state, weights or model)
    return TorchHubEncoder(tower, facts, **options)


def _download(model: str) -> dict[str, Tensor]:
    """Return the weights from torch.hub's cache, or from the address that torch.hub uses."""
    url = URL.format(name=model)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    with explain_download(f"{url} (cached as {file})"):
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)


def sizes_of(state: Mapping[str, Tensor], source: object) -> dict[str, int]:
    """Return the `config` for `build`, read from the shapes of torch.hub's weights.

    Raises:
        WeightsError: if the weights are not DINOv2's, or the number of heads cannot be computed from their width.
    """
    try:
        width, patch_size = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    except KeyError as error:
        raise WeightsError(f"{source} has no {error}: expected the weights of torch.hub's DINOv2, such as dinov2_vitl14") from error
    if width % HEAD_WIDTH:
        raise WeightsError(
            f"{source} is {width} wide, no multiple of DINOv2's {HEAD_WIDTH} per head, so its heads cannot be counted: give the encoder, "
            "build_encoder('torch_hub:name', config={width, depth, heads, patch_size, image_size}, pretrained=False)"
        )
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    return {"width": width, "depth": depth, "heads": width // HEAD_WIDTH, "patch_size": patch_size, "image_size": side * patch_size}
