"""A contrast is a formula of the logits with the images, l, and the logits with the null images, l'."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from vig.decoding.method import Decoding
from vig.decoding.null_chats import Chat, null_chat
from vig.nulls import ATTENTION, NULL_NAMES


def plausible(scores: Tensor, logits: Tensor, beta: float) -> Tensor:
    """Return the scores [R, V], with -inf for tokens whose probability by `logits` [R, V] is below beta times the highest."""
    if beta == 0:
        return scores
    return scores.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(beta), -math.inf)


@dataclass(frozen=True, kw_only=True)
class Contrast(Decoding):
    """A contrast is a method with a second branch, which sees null images."""

    plain: ClassVar[tuple[str, float]] = ("null", math.nan)
    """The option that measures the strength, and its value for plain decoding."""
    null: str = "drop"
    """The name of the null image (`vig.nulls`); "shuffle", which needs other records, and "attention" are refused."""
    seed: int = 0
    """The seed of the null images, together with the image's pixels."""

    def __post_init__(self) -> None:
        known = [name for name in NULL_NAMES if name not in ("shuffle", ATTENTION)]
        if self.null not in known:
            raise ValueError(f"{self.name}: unknown null image {self.null!r}; expected one of {', '.join(known)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"{self.name}: {field.name} should be a finite number from 0 on, got {value}")

    @property
    def contrasts(self) -> bool:
        option, value = self.plain
        return bool(getattr(self, option) != value)

    def null_chat(self, chat: Chat) -> Chat:
        """Return the conversation of the null branch. ImageError for an image that cannot be read."""
        return null_chat(chat, self.null, self.seed)


@dataclass(frozen=True, kw_only=True)
class VCD(Contrast):
    """VCD (arXiv 2311.16922) takes the logits (1 + alpha) l - alpha l', among tokens with p >= beta max p.

    The published null image is "diffusion".
    """

    name: ClassVar[str] = "vcd"
    plain: ClassVar[tuple[str, float]] = ("alpha", 0.0)
    alpha: float = 1.0
    beta: float = 0.1
    null: str = "diffusion"

    def combine(self, logits: Tensor, null_logits: Tensor, step: int) -> Tensor:
        return plausible((1 + self.alpha) * logits - self.alpha * null_logits, logits, self.beta)


@dataclass(frozen=True, kw_only=True)
class ICD(VCD):
    """ICD (arXiv 2403.18715) is VCD with a disturbing instruction in place of the null image."""

    name: ClassVar[str] = "icd"
    null: str = "same"
    instruction: str = "You are a confused object detector."

    def null_chat(self, chat: Chat) -> Chat:
        return null_chat(chat, self.null, self.seed, self.instruction)


@dataclass(frozen=True, kw_only=True)
class M3ID(Contrast):
    """M3ID (arXiv 2403.14003): l + (e^(decay t) - 1) (l - l') for the t-th token, where max p is below `threshold`."""

    name: ClassVar[str] = "m3id"
    plain: ClassVar[tuple[str, float]] = ("decay", 0.0)
    decay: float = 0.02
    threshold: float = 0.4
    null: str = "drop"

    def combine(self, logits: Tensor, null_logits: Tensor, step: int) -> Tensor:
        unsure = logits.softmax(dim=-1).amax(dim=-1, keepdim=True) < self.threshold  # [R, 1]
        return (logits + math.expm1(self.decay * step) * (logits - null_logits)).where(unsure, logits)


@dataclass(frozen=True, kw_only=True)
class LACING(Contrast):
    """LACING's guidance (arXiv 2411.14279): l' + scale (l - l'). Scale 1 is plain decoding.

    The null image should be the null image that the model saw in training, beside its images.
    """

    name: ClassVar[str] = "lacing"
    plain: ClassVar[tuple[str, float]] = ("scale", 1.0)
    scale: float = 1.5
    null: str = "zero"

    def combine(self, logits: Tensor, null_logits: Tensor, step: int) -> Tensor:
        return null_logits + self.scale * (logits - null_logits)
