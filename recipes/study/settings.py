"""The settings of a training run are dataclasses, which pydantic fills from a YAML file (`recipes/configs/`) and checks."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, to_json

from encoders import build_encoder
from encoders.names import near_names
from mof.adapter import FUSIONS
from mof.miniature.noise import draw_kind
from vig.nulls import NULL_NAMES

EXACT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
RowsAndColumns = tuple[Count, Count]


@dataclass(config=EXACT)
class Stage:
    """Stage holds the options of a stage of training, in the words of `transformers.TrainingArguments`."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak of the cosine schedule."""
    batch_size: Count
    """Records per optimizer step, over all devices and accumulation steps."""
    epochs: float = 1.0
    max_steps: int = -1
    """Optimizer steps; overrides epochs when positive."""
    per_device_batch_size: Count | None = None
    """Records per forward pass; the rest of batch_size is accumulated. None: batch_size over the devices."""
    warmup_ratio: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_checkpointing: bool = False
    lora: Count | None = None
    """Rank of adapters beside the matrices of the language model. In stage 2 only these train; with None everything trains."""
    load_in_4bit: bool = False
    """Hold the language model in 4 bits while `lora` trains (QLoRA)."""

    def __post_init__(self) -> None:
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError("expected epochs > 0 or max_steps > 0")
        if self.load_in_4bit and self.lora is None:
            raise ValueError("load_in_4bit needs lora, the rank of the adapters that train")

    def split(self, devices: int) -> tuple[int, int]:
        """Return (records per forward pass on each device, accumulated passes). Their product over all devices is `batch_size`.

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
        """Return the optimizer steps over this many records. The last batch of an epoch may be smaller."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * math.ceil(records / self.batch_size))


@dataclass(config=EXACT)
class Scenes:
    """Scenes says how many scenes of the miniature world are drawn in place of files (`mof.miniature.write_dataset`)."""

    align: CountOrZero
    finetune: CountOrZero
    pairs: CountOrZero
    """Held-out pairs per pattern."""
    noise: dict[str, Share] = field(default_factory=dict)
    """Kind of noise (`mof.miniature.noise`) -> the share of the stage 2 records with a picture that have this noise."""
    seed: CountOrZero = 0
    """Seed of the scenes, the noise and the held-out pairs. The study of noise takes the next seed, to look at other pairs."""

    def __post_init__(self) -> None:
        draw_kind(self.noise, np.random.default_rng())  # refuses unknown kinds and too large shares

    def twentieth(self) -> Scenes:
        """Return a twentieth of the scenes, to see that everything works."""
        return dataclasses.replace(self, align=self.align // 20, finetune=self.finetune // 20, pairs=self.pairs // 20)


@dataclass(config=EXACT)
class Data:
    """Data says where the records lie, in LLaVA's format. Paths are relative to the run's data folder."""

    align: list[str] = field(default_factory=list)
    """Record files of stage 1 (captions)."""
    finetune: list[str] = field(default_factory=list)
    """Record files of stage 2 (the instruction mix)."""
    captions: list[str] = field(default_factory=list)
    """Caption records (ShareGPT4V's form) that replace the detailed descriptions of `finetune`, each description by a caption:
    `study.data_mix.with_captions`. Empty leaves the mix as it is."""
    scenes: Scenes | None = None
    """The miniature world is drawn into the run's folder first; all paths are then relative to that."""
    image_folders: list[str] = field(default_factory=lambda: ["."])
    """Folders in which the records' images are looked for, in this order."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images of `align` that no training sees; their captions measure the aligned model."""
    align_records: Count | None = None
    """Expected number of stage 1 records, for planning without the files."""
    finetune_records: Count | None = None
    """Expected number of stage 2 records."""
    text_records: CountOrZero = 0
    """Number of `finetune_records` without an image, for planning: VIG keeps all of them, whatever `keep` says."""

    def __post_init__(self) -> None:
        if self.finetune_records is not None and self.text_records > self.finetune_records:
            raise ValueError("expected text_records of at most finetune_records")


def _check_encoder(options: dict[str, Any]) -> dict[str, Any]:
    keywords = inspect.signature(build_encoder).parameters.keys() - {"pretrained"}  # frozen random features are useless
    if "name" not in options:
        raise ValueError("expected the keywords of build_encoder, such as {name: mini-clip}")
    for unknown in options.keys() - keywords:
        near = near_names(unknown, keywords)
        raise ValueError(f"unknown keyword {unknown!r}.{near} There are {', '.join(sorted(keywords))}")
    return options


def _check_architecture(config: dict[str, Any]) -> dict[str, Any]:
    if "model_type" not in config:
        raise ValueError("expected a model_type, such as llama, and the keywords of its config")
    return config


EncoderOptions = Annotated[dict[str, Any], AfterValidator(_check_encoder)]
Architecture = Annotated[dict[str, Any], AfterValidator(_check_architecture)]


@dataclass(config=EXACT)
class Setting:
    """Setting holds a model, its data and its two stages of training."""

    name: str
    encoders: Annotated[dict[str, EncoderOptions], Field(min_length=1)]
    """Name -> the keywords of `encoders.build_encoder` (without `pretrained`), in the order of fusion."""
    llm: str
    """"mini-lm", a hub id, a local folder, or "gguf:FOLDER/FILE"."""
    align: Stage
    """Stage 1: only the adapters train, on captions."""
    finetune: Stage
    """Stage 2: adapters and language model train, on the instruction mix."""
    llm_config: Architecture | None = None
    """The language model's architecture ("model_type" and the keywords of its transformers config), for planning where
    `llm` cannot be reached. Training reads the model's own."""
    data: Data = field(default_factory=Data)
    fusion: Literal[tuple(FUSIONS)] = "interleaved"
    pool: RowsAndColumns = (1, 1)
    """Token budget: this many (rows, columns) of patches are averaged."""
    grid: RowsAndColumns | None = None
    """The common grid (rows, columns); None is the first encoder's."""
    unshuffle: bool = False
    """Put the channels of pooled patches side by side instead of averaging them."""
    weigh_layers: bool = False
    """Add the layers of an encoder that gives several (`layer: [-2, -5]`) with learnt weights, instead of joining their channels."""
    max_tiles: Count = 1
    """Tiles of an image with more pixels than the encoders' input, beside its thumbnail; 1 makes no tiles."""
    keep: Share = 0.7
    """Share of the samples that VIG selects."""
    heed_warning: bool = False
    """Train on whole samples where the selection warns that many tokens that the image helped would get no loss. False: the paper's rule."""
    null: Literal[NULL_NAMES] = "blur"
    """VIG's image without information."""
    score_batch_size: Count = 16
    max_length: Count = 2048
    bf16: bool = False
    workers: CountOrZero = 4
    """Processes per device that read records while the device computes."""
    strict: bool = False
    """End at the first image that cannot be used; otherwise its record is logged, counted and left out."""

    def __post_init__(self) -> None:
        if self.align.lora:
            raise ValueError("lora is for finetune: in align, the adapters between encoders and language model train, and nothing else")

    @property
    def mixer_options(self) -> dict[str, Any]:
        """Return the options of `mof.adapter.build_mixer` that hold for every fusion."""
        return {"pool": self.pool, "grid": self.grid, "unshuffle": self.unshuffle, "weigh_layers": self.weigh_layers}

    @property
    def selected_records(self) -> int | None:
        """Return the number of `finetune_records` that VIG selects: its share of those with an image, and all without an image."""
        data = self.data
        if data.finetune_records is None:
            return None
        # Rounded before ceil: 0.7 of 10 records are 7, not 7.000000000000001.
        return math.ceil(round(self.keep * (data.finetune_records - data.text_records), 6)) + data.text_records

    @property
    def stages(self) -> dict[str, Stage]:
        return {"align": self.align, "finetune": self.finetune}


def identity(setting: Setting) -> dict[str, Any]:
    """Return the fields in which a run must agree with the run that it resumes. `strict` may change."""
    return {name: value for name, value in dataclasses.asdict(setting).items() if name != "strict"}


def renewed(stored: Any) -> Any:
    """Return the `identity` that an earlier version stored, with later fields at their defaults.

    So the default of a later field must do the same as runs without the field. A setting that this version does not take is returned
    as it is.
    """
    try:
        return identity(TypeAdapter(Setting).validate_json(to_json(stored)))
    except ValidationError:
        return stored


def read_setting(path: str | Path) -> Setting:
    """Return the setting of a YAML file.

    Raises:
        ValueError: for a file that is no YAML mapping, for unknown, missing or ill-typed fields, and for values that the
            dataclasses refuse; naming the file, the field and the value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if isinstance(values, dict):  # YAML reads the key of `null: drop` as None
        values = {"null" if name is None else name: value for name, value in values.items()}
    try:
        # Strict about types as JSON has them: a mapping fills a dataclass, but a text is no number.
        return TypeAdapter(Setting).validate_json(to_json(values, inf_nan_mode="constants"))
    except ValidationError as error:
        problems = [_problem(details) for details in error.errors()]
        raise ValueError(f"{path} holds no valid setting:\n  " + "\n  ".join(problems)) from error


def _problem(error: ErrorDetails) -> str:
    """Return a line that names the field, the value and what is expected."""
    place, given = ".".join(map(str, error["loc"])) or "the file", error["input"]
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "unexpected_keyword_argument":
        *parents, name = error["loc"]
        kind = {"align": Stage, "finetune": Stage, "data": Data, "scenes": Scenes}.get(str(parents[-1]) if parents else "", Setting)
        fields = [field.name for field in dataclasses.fields(kind)]
        return f"{place}: unknown field.{near_names(str(name), fields)} A {kind.__name__} has {', '.join(fields)}"
    hint = " (YAML reads 1e-3 as text; write 1.0e-3)" if error["type"] == "float_type" and isinstance(given, str) else ""
    return f"{place}: {error['msg'].removeprefix('Value error, ')}, got {given!r}{hint}"
