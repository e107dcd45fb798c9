"""What a training run is made of, as dataclasses that a YAML file fills (`recipes/configs/`)."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from encoders import build_encoder
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
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0) or self.batch_size < 1:
            raise ValueError(f"a stage needs a learning_rate > 0 and a batch_size >= 1, got {self}")
        if not (0 < self.epochs < math.inf or self.max_steps > 0):
            raise ValueError(f"a stage needs epochs > 0 or max_steps > 0, got {self}")
        if not (0 <= self.warmup_ratio <= 1 and self.weight_decay >= 0):
            raise ValueError(f"a stage needs a warmup_ratio in [0, 1] and a weight_decay >= 0, got {self}")
        if self.per_device_batch_size is not None and self.per_device_batch_size < 1:
            raise ValueError(f"per_device_batch_size should be at least 1, got {self.per_device_batch_size}")

    def split(self, devices: int) -> tuple[int, int]:
        """(records per forward pass on each device, accumulated passes) whose product over all devices is `batch_size`.

        More devices than the batch fills at `per_device_batch_size` lower the records per pass.

        Raises:
            ValueError: for a batch_size that cannot be split evenly; naming the numbers.
        """
        share = self.batch_size // max(devices, 1)
        records = share if self.per_device_batch_size is None else min(self.per_device_batch_size, share)
        if devices < 1 or not records or self.batch_size % (records * devices):
            raise ValueError(
                f"a batch of {self.batch_size} records cannot be split evenly over {devices} devices at "
                f"{self.per_device_batch_size or 'any number of'} records per forward pass; "
                "change batch_size, per_device_batch_size or the number of devices"
            )
        return records, self.batch_size // (records * devices)

    def steps(self, records: int) -> int:
        """Optimizer steps over so many records: the last batch of an epoch may be smaller."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * math.ceil(records / self.batch_size))


@dataclass
class Scenes:
    """How much of the miniature world to draw, in place of files (`mof.miniature.write_dataset`)."""

    align: int
    finetune: int
    pairs: int
    """Held-out pairs per pattern."""


@dataclass
class Data:
    """LLaVA-format records. Paths are relative to the run's data folder."""

    align: list[str] = field(default_factory=list)
    """Record files of stage 1 (captions)."""
    finetune: list[str] = field(default_factory=list)
    """Record files of stage 2 (the instruction mix)."""
    captions: list[str] = field(default_factory=list)
    """Data-mix option: caption records (ShareGPT4V's form) that replace the detailed descriptions of `finetune`, one for
    one: `study.data_mix.with_captions`. Empty leaves the mix as it is."""
    scenes: Scenes | None = None
    """Draw the miniature world into the run's folder first; all paths are then relative to that."""
    image_folders: list[str] = field(default_factory=lambda: ["."])
    """Where the records' images are looked for, in this order."""
    held_out: float = 0.0
    """Share of the images of `align` that no training sees; their captions measure the aligned model."""
    align_records: int | None = None
    """Expected number of stage 1 records, for planning without the files."""
    finetune_records: int | None = None
    """The same of stage 2."""
    text_records: int = 0
    """How many of `finetune_records` have no image: VIG keeps these whole, whatever `keep` says. For planning."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out should be a share in [0, 1), got {self.held_out}")
        counts = {"align_records": self.align_records, "finetune_records": self.finetune_records}
        if wrong := {name: count for name, count in counts.items() if count is not None and count < 1}:
            raise ValueError(f"numbers of records should be at least 1, got {wrong}")
        if not 0 <= self.text_records <= (self.text_records if self.finetune_records is None else self.finetune_records):
            raise ValueError(f"text_records should be in 0..finetune_records ({self.finetune_records}), got {self.text_records}")


@dataclass
class Setting:
    """A model, its data and its two stages of training."""

    name: str
    encoders: dict[str, dict[str, Any]]
    """In the order of fusion: name -> the keywords of `encoders.build_encoder` (without `pretrained`)."""
    llm: str
    """"mini-lm", a hub id, a local folder, or "gguf:FOLDER/FILE"."""
    align: Stage
    """Stage 1: only the adapters train, on captions."""
    finetune: Stage
    """Stage 2: adapters and language model train, on the instruction mix."""
    llm_config: dict[str, Any] | None = None
    """The language model's architecture ("model_type" and the keywords of its transformers config), for planning where
    `llm` cannot be reached. Training reads the model's own."""
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
    workers: int = 4
    """Processes per device that read records while it computes."""
    strict: bool = False
    """End at the first image that cannot be used; otherwise its record is logged, counted and left out."""

    def __post_init__(self) -> None:
        if not self.encoders or self.fusion not in FUSIONS or not 0 <= self.keep <= 1:
            raise ValueError(
                f"a setting needs at least one encoder, a fusion of {', '.join(FUSIONS)} and keep in [0, 1]; got encoders "
                f"{list(self.encoders)}, fusion {self.fusion!r}, keep {self.keep}"
            )
        if nameless := [key for key, spec in self.encoders.items() if not isinstance(spec, dict) or "name" not in spec]:
            raise ValueError(f"encoders {nameless} should each be the keywords of build_encoder, such as {{name: mini-clip}}")
        keywords = inspect.signature(build_encoder).parameters.keys() - {"pretrained"}  # frozen random features are no use
        if odd := {key: sorted(spec.keys() - keywords) for key, spec in self.encoders.items() if spec.keys() - keywords}:
            raise ValueError(f"encoders: unknown keywords {odd}; there are {', '.join(sorted(keywords))}")
        for field_name, pair in (("pool", self.pool), ("grid", self.grid)):
            if pair is not None and (len(pair) != 2 or min(pair) < 1):
                raise ValueError(f"{field_name} should be two numbers (rows, columns) of at least 1, got {pair}")
        if self.score_batch_size < 1 or self.max_length < 1:
            raise ValueError(f"score_batch_size and max_length should be at least 1, got {self.score_batch_size}, {self.max_length}")
        if self.llm_config is not None and "model_type" not in self.llm_config:
            raise ValueError(f"llm_config should name its model_type, such as llama; got {self.llm_config}")


def read_setting(path: str | Path, **overrides: Any) -> Setting:
    """The setting of a YAML file. `overrides` replace top-level fields.

    Raises:
        ValueError: for a file that is no YAML mapping, for unknown, missing or ill-typed fields, and for values that the
            dataclasses refuse; naming the file and the field.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return _fill(Setting, values | overrides if isinstance(values, dict) else values, str(path))


def _fill(kind: Any, values: Any, where: str) -> Any:
    """The dataclass `kind` from a mapping, with the dataclasses inside it."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} should hold the fields of a {kind.__name__}, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in values if name not in fields)
    missing = [
        name
        for name, one in fields.items()
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; {kind.__name__} has {', '.join(fields)}")
    filled = {}
    for name, value in values.items():
        inner = [hint for hint in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(hint)]
        if inner and not (value is None and _fits(value, hints[name])):
            value = _fill(inner[0], value, f"{where}, {name}")
        elif not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} should be {_spelled(hints[name])}, got {value!r}{_exponent_hint(value)}")
        filled[name] = value
    try:
        return kind(**filled)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of this annotation. Whole numbers count as floats, true and false not as numbers."""
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _exponent_hint(value: Any) -> str:
    """YAML reads 1e-3 as text: its floats need a dot."""
    try:
        return f"; YAML reads this as text, write {float(value):.1e}" if isinstance(value, str) else ""
    except ValueError:
        return ""
