"""mini-dino is trained by self-distillation on pictures alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import encoders.miniature  # noqa: F401  registers mof_mini_vit
from mof.miniature.training.fitting import Log, fit, save_half
from mof.miniature.training.pictures import BURST, burst_pool, light, normalised, view

BURSTS = 16  # bursts in a batch


class DinoNet(nn.Module):
    """DinoNet is a vision transformer with heads for the class token and for patches, as in DINOv2, and for the mean of the patches."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(192))
        mlps = {name: nn.Sequential(nn.Linear(192, 512), nn.GELU(), nn.Linear(512, 128)) for name in ("image", "patch")}
        self.heads = nn.ModuleDict({"mean": nn.Linear(192, 128), **mlps})

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return unit vectors of each picture [B, C] and its patches [B, 25, C]; the blocks do not see patches under `mask` [B, 25]."""
        with torch.autocast("cpu", torch.bfloat16):
            x = self.vit.patch_embed(pixels)  # [B, 25, 192]
            if mask is not None:
                x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
            x = self.vit.norm(self.vit.blocks(self.vit._pos_embed(x)))  # [B, 26, 192]
            token, patches = x[:, 0], x[:, 1:]
            given = {"image": token, "mean": patches.mean(dim=1), "patch": patches}
            seen = {name: self.heads[name](y) for name, y in given.items()}
        return {name: F.normalize(y.float(), dim=-1) for name, y in seen.items()}


def dino_loss(student: DinoNet, teacher: DinoNet, here: Tensor, there: Tensor) -> dict[str, Tensor]:
    """Return the losses of a student that sees a part and must recognise the teacher's vector of the same picture or patch.

    The student looks for a picture in the whole batch, and for a patch among the patches at its place in the burst. The pictures of a
    burst differ in a single field, so the background does not help. (With DINO's own clustering of a whole batch, this network learned
    almost only backgrounds.)

    Args:
        here, there: the same bursts [N, BURST, 3, 40, 40], as the student and as the teacher see them.
    """
    with torch.no_grad():
        target = teacher(normalised(light(there.flatten(0, 1))))
        target["patch"] = teacher(normalised(light(here.flatten(0, 1))))["patch"]
    hidden = torch.rand(target["patch"].shape[:2]) < 0.2
    seen = student(normalised(light(here.flatten(0, 1))), hidden)
    itself = torch.arange(len(hidden))
    losses = {name: F.cross_entropy(seen[name] @ target[name].T / 0.1, itself) for name in ("image", "mean")}
    bursts, bursts_seen = (x["patch"].unflatten(0, (-1, BURST)) for x in (seen, target))
    scores = torch.einsum("nilc,njlc->nlij", bursts, bursts_seen) / 0.1  # [N, 25, BURST, BURST]
    same = torch.arange(BURST).repeat(scores[..., 0, 0].numel())
    return losses | {"patch": F.cross_entropy(scores.reshape(-1, BURST), same)}


def distil(vit: nn.Module, bursts: Tensor, steps: int, losses: tuple[str, ...], log: Log) -> nn.Module:
    """Train a student to agree with the moving average of itself, the teacher, and return the teacher.

    Args:
        bursts: [N, D, BURST, 3, 40, 40] in D drawings; the student sees the first, the teacher the last.
        losses: the names of the losses of `dino_loss` that count.
    """
    student = DinoNet(vit).requires_grad_(True)
    teacher = copy.deepcopy(student).requires_grad_(False)

    def draw_losses() -> dict[str, Tensor]:
        seen = bursts[torch.randint(len(bursts), (BURSTS,))]
        here = view(seen[:, 0].flatten(1, 2), 0.6)  # all pictures of a burst share a crop
        there = here if seen.shape[1] == 1 else view(seen[:, -1].flatten(1, 2), 0.6)
        drawn = dino_loss(student, teacher, *(x.unflatten(1, (BURST, 3)) for x in (here, there)))
        return {name: drawn[name] for name in losses}

    def follow(step: int) -> None:
        momentum = 1 - 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.lerp_(new.detach(), 1 - momentum)

    fit(student, draw_losses, steps=steps, rate=1e-3, decay=0.04, log=log, largest_gradient=3.0, after_step=follow)
    return teacher.vit


def train_dino(out: Path, scale: float) -> None:
    """Train mini-dino in two phases, on pictures alone, and write it to `out`/mini-dino.

    In the first phase, the teacher sees the student's pictures in other light, so that mini-dino learns to tell every picture from all
    others, also by its background. In the second phase, the teacher sees the same scenes drawn again, like a camera a while later, so
    that only the scene is the same. Then the mean of the patch tokens is compared as well, through a linear map, so that the patches
    themselves hold the scene.
    """
    torch.manual_seed(0)
    folder = out / "mini-dino"
    folder.mkdir(exist_ok=True)
    first, second = int(3800 * scale), int(2000 * scale)
    log = Log(folder, first + second, BURSTS * BURST)
    vit = timm.create_model("mof_mini_vit", num_classes=0)
    vit = distil(vit, burst_pool(int(15_000 * scale), drawings=1, seed=2), first, ("image", "patch"), log)
    vit = distil(vit, burst_pool(int(12_000 * scale), drawings=2, seed=3), second, ("image", "mean", "patch"), log)
    save_half(vit, folder / "model.safetensors")
