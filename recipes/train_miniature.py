"""Train the miniature's three networks from nothing and measure them: mini-clip, mini-dino, mini-lm.

    python recipes/train_miniature.py --output_dir runs/miniature
    python recipes/train_miniature.py --only dino --output_dir runs/miniature

No training shows a scene of the held-out tenth (`Scene.held_out`). Each network takes 10 to 40 minutes on one CPU core. To ship
the result, copy mini-clip/ and mini-dino/ to encoders/weights/ and mini-lm/ to mof/miniature/weights/; then
`recipes/measure_miniature.py` writes their cards.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import encoders.miniature  # noqa: F401  registers mof_mini_vit
from mof.chat_templates import VICUNA
from mof.miniature.language import DESCRIBE, description, dialogue, web_caption
from mof.miniature.scenes import Scene, render, sample_burst, sample_scene


# --- mini-clip
def clip_config() -> dict[str, Any]:
    return {
        "embed_dim": 128,
        "vision_cfg": {"timm_model_name": "mof_mini_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 40},
        "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 128, "heads": 4, "layers": 2, "hf_tokenizer_name": "mini-clip"},
    }  # fmt: skip


def train_clip(out: Path, scale: float) -> None:
    """Contrastive training (open_clip's CLIP and loss) on pictures and what the web would say about them."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    pool, scenes = picture_pool(int(60_000 * scale), seed=1)
    folder = out / "mini-clip"
    save_tokenizer(folder, "<s> $A </s>")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    config = clip_config()
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    batch, steps = 256, int(800 * scale)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.98))
    contrast, log = open_clip.ClipLoss(), Log(folder, steps, batch)
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 1e-3))
        chosen = rng.integers(len(pool), size=batch)
        texts = tokenizer([web_caption(scenes[i], rng) for i in chosen], padding="max_length", max_length=16, return_tensors="pt")
        image, text, temperature = model(normalised(light(view(pool[chosen], 0.85))), texts["input_ids"])
        loss = contrast(image, text, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        log(step, loss=loss)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
    save_half(model, folder / "open_clip_model.safetensors")


# --- mini-dino
BURST = 4


class DinoNet(nn.Module):
    """A vision transformer with two heads, as in DINOv2: one for the class token, one for patches."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model("mof_mini_vit", num_classes=0)
        self.mask_token = nn.Parameter(torch.zeros(192))
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(192, 512), nn.GELU(), nn.Linear(512, 128)) for name in ("image", "patch")}
        )

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit vectors for pictures [B, 128] and patches [B, 25, 128]; patches under `mask` [B, 25] are hidden from the blocks."""
        with torch.autocast("cpu", torch.bfloat16):
            x = self.vit.patch_embed(pixels)  # [B, 25, 192]
            if mask is not None:
                x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
            x = self.vit.norm(self.vit.blocks(self.vit._pos_embed(x)))  # [B, 26, 192]
            image, patches = self.heads["image"](x[:, 0]), self.heads["patch"](x[:, 1:])
        return F.normalize(image.float(), dim=-1), F.normalize(patches.float(), dim=-1)


def dino_loss(student: DinoNet, teacher: DinoNet, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student, which sees a part, finds what the teacher saw of the same picture, and of the same patch.

    The image is looked for among the batch, a patch among the patches at its place in the burst: the pictures of a burst share
    everything but one thing, so that the background does not help. (DINO's clustering of a whole batch found little but
    backgrounds here.) Also returns the share of pictures found.
    """
    pixels = view(pixels, 0.6)  # [N, BURST * 3, 40, 40]: one crop for a burst
    pixels = pixels.view(-1, 3, 40, 40)
    with torch.no_grad():
        image_seen, patches_seen = teacher(normalised(light(pixels)))
    image, patches = student(normalised(light(pixels)), torch.rand(len(pixels), 25) < 0.2)
    scores = image @ image_seen.T / 0.1  # [B, B]
    itself = torch.arange(len(scores))
    bursts, bursts_seen = (x.view(-1, BURST, 25, 128) for x in (patches, patches_seen))
    patch_scores = torch.einsum("nilc,njlc->nlij", bursts, bursts_seen) / 0.1  # [N, 25, BURST, BURST]
    same = torch.arange(BURST).repeat(patch_scores[..., 0, 0].numel())
    found = (scores.argmax(1) == itself).float().mean()
    return F.cross_entropy(scores, itself), F.cross_entropy(patch_scores.reshape(-1, BURST), same), found


def train_dino(out: Path, scale: float) -> None:
    """Self-distillation on the pictures alone: a student learns to agree with the moving average of itself."""
    torch.manual_seed(0)
    rng = np.random.default_rng(2)
    folder = out / "mini-dino"
    folder.mkdir(exist_ok=True)
    pool = torch.stack([burst(rng) for _ in track(range(int(15_000 * scale)), "drawing bursts")])
    student = DinoNet()
    teacher = copy.deepcopy(student).requires_grad_(False)
    batch, steps = 16, int(3800 * scale)
    optimizer, log = torch.optim.AdamW(parameter_groups(student, 0.04), betas=(0.9, 0.98)), Log(folder, steps, batch * BURST)
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 1e-3))
        image_loss, patch_loss, found = dino_loss(student, teacher, pool[rng.integers(len(pool), size=batch)].flatten(1, 2))
        optimizer.zero_grad()
        (image_loss + patch_loss).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        momentum = 1 - 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.lerp_(new.detach(), 1 - momentum)
        log(step, image=image_loss, patch=patch_loss, found=found)
        if step % 500 == 499 or step == steps - 1:
            save_half(teacher.vit, folder / "model.safetensors")


def burst(rng: np.random.Generator) -> Tensor:
    """Pictures of one burst, uint8 [BURST, 3, 40, 40]: the same background and place, one thing changed in each."""
    seed = rng.integers(2**31)
    pictures = [np.asarray(render(scene, np.random.default_rng(seed))) for scene in sample_burst(rng, BURST)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


# --- mini-lm
def documents(rng: np.random.Generator, count: int, template: Callable[[list], str]) -> list[str]:
    """Text about scenes as they usually are (four fifths habit): descriptions, talks, and talks about a description."""
    texts = []
    for i in range(count):
        scene = sample_scene(rng, habit_share=0.7)
        told = description(scene, rng, facts=9)
        talk = [
            {"role": role, "content": text} for turn in dialogue(scene, rng) for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        if i % 3 == 0:
            talk = [{"role": "user", "content": DESCRIBE}, {"role": "assistant", "content": description(scene, rng)}]
        elif i % 3 == 1:
            talk[0]["content"] = f"{told}\n{talk[0]['content']}"
        texts.append(template(talk))
    return texts


def train_lm(out: Path, scale: float) -> None:
    """Next-word training on text alone; no picture is ever shown."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    folder = out / "mini-lm"
    save_tokenizer(folder, None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    batch, steps = 48, int(250 * scale)
    optimizer, log = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.98)), Log(folder, steps, batch)
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 2e-3))
        texts = documents(rng, batch, lambda talk: tokenizer.apply_chat_template(talk, tokenize=False))
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log(step, loss=loss)
    model.half().save_pretrained(folder)


# --- shared
def save_tokenizer(folder: Path, template: str | None) -> None:
    """A byte-level BPE of 512 entries at most. `</s>` has the highest id: open_clip's CLIP pools the text there."""
    rng = np.random.default_rng(0)
    corpus = documents(rng, 3000, lambda talk: " ".join(turn["content"] for turn in talk) + " USER: ASSISTANT:")
    corpus += [web_caption(sample_scene(rng), rng) for _ in range(1000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<image>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=512 - len(special), initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special)
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=VICUNA,
        extra_special_tokens={"image_token": "<image>"}, model_max_length=512,
    )  # fmt: skip
    wrapped.save_pretrained(folder)


def picture_pool(count: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """Scenes of the training world, every value equally likely, as pixels (uint8 [count, 3, 40, 40]) and as scenes."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    pictures = [np.asarray(render(scene, rng)) for scene in track(scenes, "drawing scenes")]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), scenes


def view(pixels: Tensor, smallest: float) -> Tensor:
    """Random crops that keep at least `smallest` of the area, at the size they had; never mirrored or turned."""
    side = torch.empty(len(pixels)).uniform_(smallest, 1).sqrt()
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side, side
    theta[:, :, 2] = (torch.rand(len(pixels), 2) * 2 - 1) * (1 - side)[:, None]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def light(pixels: Tensor) -> Tensor:
    """The same pictures [B, 3, H, W] in other light and noise."""
    gain = torch.empty(len(pixels), 3, 1, 1).uniform_(0.85, 1.15) * torch.empty(len(pixels), 1, 1, 1).uniform_(0.75, 1.25)
    return (pixels * gain + torch.randn_like(pixels) * 5).clamp(0, 255)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels / 255 - 0.5) / 0.25


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.005)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def save_half(model: nn.Module, path: Path) -> None:
    save_file({key: value.detach().half().contiguous() for key, value in model.state_dict().items()}, path)


class Log:
    """One line every hundred steps: losses, rate, time left. At the end a file for the card, in the network's folder."""

    def __init__(self, folder: Path, steps: int, batch: int) -> None:
        self.folder, self.steps, self.batch, self.start = folder, steps, batch, time.monotonic()

    def __call__(self, step: int, **losses: Tensor) -> None:
        if step % 100 == 99 or step == self.steps - 1:
            each = (time.monotonic() - self.start) / (step + 1)
            shown = "  ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
            left = each * (self.steps - step - 1) / 60
            print(
                f"{self.folder.name} {step + 1}/{self.steps}  {shown}  {self.batch / each:.0f} samples/s  {left:.1f} min left", flush=True
            )
            if step == self.steps - 1:
                facts = {"samples": self.steps * self.batch, "minutes": round(each * self.steps / 60, 1), "losses": shown}
                (self.folder / "training.json").write_text(json.dumps(facts))


TRAININGS = {"clip": train_clip, "dino": train_dino, "lm": train_lm}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", choices=TRAININGS, nargs="+", default=list(TRAININGS), help="train just these")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full length, to try the code")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        TRAININGS[name](arguments.output_dir, arguments.scale)
