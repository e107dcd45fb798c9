"""mini-dino: self-distillation on pictures alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import encoders.miniature  # noqa: F401  registers mof_mini_vit
from mof.miniature.scenes import SIZE, render, sample_burst
from mof.miniature.training.pictures import light, normalised, view
from mof.miniature.training.steps import Log, cosine, parameter_groups, save_half, set_rate

BURST = 4  # pictures in a burst
BURSTS = 16  # in a batch


class DinoNet(nn.Module):
    """A vision transformer with heads for the class token and for patches, as in DINOv2, and one for the mean of the patches."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(192))
        mlps = {name: nn.Sequential(nn.Linear(192, 512), nn.GELU(), nn.Linear(512, 128)) for name in ("image", "patch")}
        self.heads = nn.ModuleDict({"mean": nn.Linear(192, 128), **mlps})

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Unit vectors of each picture [B, C] and its patches [B, 25, C]; patches under `mask` [B, 25] are hidden from the blocks."""
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
    """The student, which sees a part, finds what the teacher saw of the same picture, and of the same patch.

    Args:
        here, there: the same bursts [N, BURST, 3, 40, 40], to the student and to the teacher.

    A picture is looked for among the batch, a patch among the patches at its place in the burst: the pictures of a burst share
    everything but one thing, so that the background does not help. (DINO's clustering of a whole batch found little but
    backgrounds here.)
    """
    with torch.no_grad():
        target = teacher(normalised(light(there.flatten(0, 1))))
        target["patch"] = teacher(normalised(light(here.flatten(0, 1))))["patch"]
    hidden = torch.rand(target["patch"].shape[:2]) < 0.2
    found = student(normalised(light(here.flatten(0, 1))), hidden)
    itself = torch.arange(len(hidden))
    losses = {name: F.cross_entropy(found[name] @ target[name].T / 0.1, itself) for name in ("image", "mean")}
    bursts, bursts_seen = (x["patch"].unflatten(0, (-1, BURST)) for x in (found, target))
    scores = torch.einsum("nilc,njlc->nlij", bursts, bursts_seen) / 0.1  # [N, 25, BURST, BURST]
    same = torch.arange(BURST).repeat(scores[..., 0, 0].numel())
    return losses | {"patch": F.cross_entropy(scores.reshape(-1, BURST), same)}


def distil(vit: nn.Module, bursts: Tensor, steps: int, losses: tuple[str, ...], log: Log) -> nn.Module:
    """Self-distillation: a student learns to agree with the moving average of itself, which is returned.

    Args:
        bursts: [N, D, BURST, 3, 40, 40] in D drawings; the student sees the first, the teacher the last.
        losses: which of `dino_loss` count.
    """
    student = DinoNet(vit).requires_grad_(True)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.04), betas=(0.9, 0.98))
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 1e-3))
        seen = bursts[torch.randint(len(bursts), (BURSTS,))]
        here = view(seen[:, 0].flatten(1, 2), 0.6)  # one crop for a burst
        there = here if seen.shape[1] == 1 else view(seen[:, -1].flatten(1, 2), 0.6)
        loss = dino_loss(student, teacher, *(x.unflatten(1, (BURST, 3)) for x in (here, there)))
        optimizer.zero_grad()
        sum(loss[name] for name in losses).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        momentum = 1 - 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.lerp_(new.detach(), 1 - momentum)
        log(**{name: loss[name] for name in losses})
    return teacher.vit


def train_dino(out: Path, scale: float) -> None:
    """Two phases, on pictures alone.

    First the teacher sees what the student sees, in other light: every picture becomes something of its own, background and all.
    Then the teacher sees the same scenes drawn again, as a camera sees them a while later: what stays is the scene. There the mean
    of the patch tokens is compared as well, through a linear map, so that the patches themselves hold it for whoever reads them.
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


def burst_pool(count: int, drawings: int, seed: int) -> Tensor:
    """Bursts in one or more drawings, uint8 [count, drawings, BURST, 3, 40, 40].

    The pictures of a burst share background and place, and differ in one thing; the drawings differ in all else.
    """
    rng = np.random.default_rng(seed)
    pool = torch.empty(count, drawings, BURST, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in track(range(count), "drawing bursts"):
        scenes = sample_burst(rng, BURST)
        for drawing in range(drawings):
            again = rng.integers(2**31)
            pictures = np.stack([np.asarray(render(scene, np.random.default_rng(again))) for scene in scenes])
            pool[i, drawing] = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return pool
