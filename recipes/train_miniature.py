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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import encoders.miniature  # noqa: F401  registers mof_mini_vit
from mof.chat_templates import VICUNA
from mof.miniature.language import DESCRIBE, description, dialogue, facts, web_caption
from mof.miniature.scenes import SIZE, Scene, render, sample_burst, sample_scene


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
        log(loss=loss)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
    save_half(model, folder / "open_clip_model.safetensors")


# --- mini-dino
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


def distil(vit: nn.Module, bursts: Tensor, steps: int, losses: tuple[str, ...], log: "Log") -> nn.Module:
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


# --- mini-lm
def talk(scene: Scene, rng: np.random.Generator, *, describe: bool) -> list[dict[str, str]]:
    """A description that was asked for, or questions and answers, as chat messages."""
    turns = [(DESCRIBE, description(scene, rng))] if describe else dialogue(scene, rng)
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def soft_tokens(scene: Scene, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The scene's facts as 20 to 50 soft tokens: how much of each word of the vocabulary every one of them holds, [K, V].

    A fact is in few of them or in many, weak or strong, but always somewhere: like what an image tells.
    """
    words = tokenizer([f" {fact}" for fact in facts(scene)], add_special_tokens=False)["input_ids"]
    count, known = int(rng.integers(20, 51)), len(words)
    held = (rng.random((count, known)) < rng.uniform(0.05, 0.5, known)) * rng.uniform(0.5, 1.5, known)
    held[rng.integers(count, size=known), np.arange(known)] = 1
    weights = torch.zeros(count, len(tokenizer))
    for column, ids in enumerate(words):
        weights[:, ids] = torch.tensor(held[:, column : column + 1] / len(ids), dtype=torch.float32)
    return weights


def train_lm(out: Path, scale: float) -> None:
    """Next-word training on the assistant's words; no picture is ever shown.

    A quarter of the talks have nothing before them: what the model can say there is what is usual, its habits. Before the others
    stands the scene in soft tokens, sums of word embeddings with noise, where an image will stand later. A large language model
    comes with the ability to read what stands between words; this one is too small to get it from text.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    folder = out / "mini-lm"
    save_tokenizer(folder, None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    batch, steps = 32, int(700 * scale)
    optimizer, log = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.98)), Log(folder, steps, batch)
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 2e-3))
        talks, told = [], []
        for i in range(batch):
            scene = sample_scene(rng, habit_share=0.7 if i % 4 == 0 else 0.3)
            talks.append(talk(scene, rng, describe=i % 3 == 0))
            if i % 4 != 0:
                told.append(soft_tokens(scene, rng, tokenizer))
                talks[-1][0]["content"] = f"{'<image>' * len(told[-1])}\n{talks[-1][0]['content']}"
        inputs = tokenizer.apply_chat_template(
            talks, return_dict=True, return_tensors="pt", padding=True, return_assistant_tokens_mask=True
        )
        said = torch.as_tensor(inputs.pop("assistant_masks")) == 1
        labels = inputs["input_ids"].masked_fill(~said, -100)
        embeddings = told_embeddings(model, inputs.pop("input_ids"), told, tokenizer, noise=1.5)
        loss = model(inputs_embeds=embeddings, labels=labels, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log(loss=loss)
    model.half().save_pretrained(folder)


def told_embeddings(
    model: PreTrainedModel, ids: Tensor, told: list[Tensor], tokenizer: PreTrainedTokenizerBase, noise: float = 0.0
) -> Tensor:
    """The embeddings of ids [B, L], with the soft tokens (in order, each [K, V]) at the image tokens.

    Args:
        noise: up to so many standard deviations of the embeddings are added to the soft tokens of each scene.
    """
    table = model.get_input_embeddings().weight  # [>= V, D]
    spread = table.detach().std()
    soft = [x @ table[: x.shape[1]] for x in told]
    soft = [x + torch.randn_like(x) * torch.rand(()) * noise * spread for x in soft]
    places = ids == tokenizer.convert_tokens_to_ids("<image>")
    embeddings = table[ids]
    return embeddings.masked_scatter(places[..., None], torch.cat(soft)) if soft else embeddings


# --- shared
def save_tokenizer(folder: Path, template: str | None) -> None:
    """A byte-level BPE of 512 entries at most. `</s>` has the highest id: open_clip's CLIP pools the text there."""
    rng = np.random.default_rng(0)
    talks = [talk(sample_scene(rng, habit_share=0.7), rng, describe=i % 3 == 0) for i in range(3000)]
    corpus = [" ".join(turn["content"] for turn in one) + " USER: ASSISTANT:" for one in talks]
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
        self.done = 0

    def __call__(self, **losses: Tensor) -> None:
        self.done += 1
        if self.done % 100 == 0 or self.done == self.steps:
            each = (time.monotonic() - self.start) / self.done
            shown = "  ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
            left = each * (self.steps - self.done) / 60
            print(
                f"{self.folder.name} {self.done}/{self.steps}  {shown}  {self.batch / each:.0f} samples/s  {left:.1f} min left", flush=True
            )
            if self.done == self.steps:
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
