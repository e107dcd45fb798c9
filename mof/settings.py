"""What a training run is made of, as dataclasses that a YAML file fills (`recipes/configs/`)."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mof.adapter import FUSIONS


@dataclass
class Stage:
    """One stage of training, in the words of `transformers.TrainingArguments`."""

    learning_rate: float
    """Peak of the cosine schedule."""
    batch_size: int
    """Records per optimizer step, over all devices and accumulation steps."""
    epochs: float = 1.0
    max_steps: int = -1
    """Optimizer steps; overrides epochs when positive."""
    per_device_batch_size: int | None = None
    """Records per forward pass; the rest of batch_size is accumulated. None: batch_size over the devices."""
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.batch_size < 1 or (self.epochs <= 0 and self.max_steps < 1):
            raise ValueError(f"a stage needs learning_rate > 0, batch_size >= 1, and epochs or max_steps > 0, got {self}")


@dataclass
class Data:
    """LLaVA-format records. Paths are relative to the run's data folder."""

    align: list[str] = field(default_factory=list)
    """Record files of stage 1 (captions)."""
    finetune: list[str] = field(default_factory=list)
    """Record files of stage 2 (the instruction mix)."""
    captions: list[str] = field(default_factory=list)
    """Data-mix option: caption records that replace the instruction mix's detailed descriptions (ShareGPT4V's form)."""
    image_folders: list[str] = field(default_factory=lambda: ["."])
    """Where the records' images are looked for, in this order."""
    held_out: float = 0.0
    """Share of the images of `align` that no training sees; their captions measure the aligned model."""
    align_records: int | None = None
    """Expected number of stage 1 records, for planning without the files."""
    finetune_records: int | None = None


@dataclass
class Setting:
    """A model, its data and its two stages of training."""

    name: str
    encoders: dict[str, dict[str, Any]]
    """In the order of fusion: name -> the keywords of `encoders.build_encoder`."""
    llm: str
    """"mini-lm", a hub id, a local folder, or "gguf:FOLDER/FILE"."""
    align: Stage
    finetune: Stage
    data: Data = field(default_factory=Data)
    fusion: str = "interleaved"
    pool: list[int] = field(default_factory=lambda: [1, 1])
    """Token budget: average over this many (rows, columns) of patches."""
    grid: list[int] | None = None
    """The common grid (rows, columns); None is the first encoder's."""
    keep: float = 0.7
    """Share of the samples that VIG selects."""
    null: str = "blur"
    """VIG's picture without information."""
    score_batch_size: int = 16
    max_length: int = 2048
    bf16: bool = False

    def __post_init__(self) -> None:
        if not self.encoders or self.fusion not in FUSIONS or not 0 <= self.keep <= 1:
            raise ValueError(
                f"a setting needs at least one encoder, a fusion of {', '.join(FUSIONS)} and keep in [0, 1]; got encoders "
                f"{list(self.encoders)}, fusion {self.fusion!r}, keep {self.keep}"
            )


def read_setting(path: str | Path, **overrides: Any) -> Setting:
    """The setting of a YAML file. `overrides` replace top-level fields.

    Raises:
        ValueError: for unknown or missing fields, naming them and the file.
    """
    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold the fields of a setting but {type(values).__name__}")
    return _fill(Setting, values | overrides, str(path))


def _fill(kind: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    missing = [
        name
        for name, one in fields.items()
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; {kind.__name__} has {', '.join(fields)}")
    filled = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _fill(hints[name], value, f"{where}, {name}")  # type: ignore[arg-type]
        elif value is not None and not isinstance(value, _plain(hints[name])):
            raise ValueError(f"{where}: {name} should be {hints[name]}, got {value!r}")
        filled[name] = value
    return kind(**filled)


def _plain(hint: Any) -> tuple[type, ...]:
    """The classes that a YAML value for this annotation may have; whole numbers count as floats."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(option) or option for option in options)
    return (*plain, int) if float in plain else plain
