"""Several commands share these options, so that an option has the same name, short name and help text everywhere.

A command uses the types as annotations (`model: Model`), or the functions if it needs another help text
(`report: Annotated[Path, output_option("HTML file to write.")]`). Add `| None` inside of `Annotated` to make an option optional.
A parameter `*, cluster: ClusterOptions` stands for all options of this group (`encoders.command_groups`).
The old spellings of options are in `encoders.command_groups.OLD_SPELLINGS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

if TYPE_CHECKING:
    from encoders.cluster import Cluster
    from encoders.images.opening import ImageLimits

T = TypeVar("T")
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".eps", ".tif", ".tiff")
"""Suffixes of drawings that matplotlib writes."""
MODEL_HELP = "Folder of a saved image-text-to-text model with its processor."
IMAGES_HELP = "Folder that relative image paths of the records start from. Absolute paths must lie in it; / allows all."


def output_option(help: str, *, urls: bool = False) -> Any:
    """Return the option of a file or folder that the command writes. Without `urls`, a URL is refused when the option is parsed."""

    def parsed(text: str | Path) -> Path:  # a default is a path
        from encoders.storage import located
        from encoders.whole_files import local_path

        if not str(text).strip():
            raise typer.BadParameter("expected a path, got an empty text")
        try:
            return located(text) if urls else local_path(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option("--output", "-o", help=help, parser=parsed, metavar="PATH|URL" if urls else "PATH")


def plot_option(help: str) -> Any:
    """Return the option of a picture to draw. Another format is refused when the option is parsed, and not after hours of work."""

    def parsed(text: str) -> Path:
        if Path(text).suffix.lower() not in PICTURES:
            raise typer.BadParameter(f"{text!r}: expected a name that ends in {', '.join(PICTURES)}")
        return Path(text)

    return typer.Option("--plot", help=help, parser=parsed, metavar="PATH")


def images_option(help: str = IMAGES_HELP) -> Any:
    """Return the option of a folder of images."""
    return typer.Option("--images", help=help)


def seed_option(help: str) -> Any:
    """Return the option of a seed for random numbers."""
    return typer.Option("--seed", help=help)


Model = Annotated[Path, typer.Option("--model", help=MODEL_HELP)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files that come with the model. They can do whatever you can.")
]
Models = Annotated[list[Path], typer.Option("--model", help=f"{MODEL_HELP} Can be given several times.")]
Records = Annotated[
    Path, typer.Option("--records", help="Records in LLaVA's form or chat messages: .json, .jsonl or .parquet. Equal ids are numbered.")
]
Images = Annotated[Path, images_option()]
ImageSources = Annotated[
    list[str] | None,
    images_option("Folder, list (.txt), image or .tar, or a pattern of these: 'train-{000..127}.tar'. Can be given several times."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use at most this many records, spread evenly over the file.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
DecodingName = Annotated[
    str | None,
    typer.Option(
        "--decoding", help="NAME[:OPTION=VALUE...]: vcd, icd, m3id, pai, var or lacing, such as vcd:alpha=0.5. Default: plain decoding."
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="Device of torch, such as cuda:1. Default: cuda if there is a GPU, else cpu.")]
DtypeName = Literal["float32", "bfloat16", "float16"]
"""A name of a dtype; `getattr(torch, name)` is the dtype."""


@dataclass(frozen=True)
class EncodingOptions:
    """EncodingOptions are the options of the commands that encode images."""

    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the encoders' input, in pixels. Default: each encoder's own.")] = (
        None
    )
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32
    device: Device = None
    dtype: Annotated[DtypeName | None, typer.Option(help="Precision of the encoders. Default: each encoder's own, float32.")] = None
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode images.")] = 2
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Largest file of an image, in bytes. Default: 256 MiB.")] = None
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest image, in pixels (width times height). Default: 89 million.")] = (
        None
    )

    @property
    def limits(self) -> ImageLimits:
        """Return the limits of images. For an option that is not given, the limit of the environment is taken."""
        from encoders.images.opening import ImageLimits  # slow

        given = {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels}
        return ImageLimits(**{name: value for name, value in given.items() if value is not None})

    def arguments(self, cluster: Cluster | None) -> dict[str, Any]:
        """Return arguments of `encoders.encode_images`. Only the devices of this machine are tried, not the devices of the cluster."""
        import torch  # slow

        device = usable_device(self.device) if cluster is None else self.device
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        given = {"batch_size": self.batch_size, "device": device, "dtype": dtype, "workers": self.workers}
        return given | {"limits": self.limits, "cluster": cluster}


@dataclass(frozen=True)
class ClusterOptions:
    """ClusterOptions are the options of the commands whose work a Ray cluster may do."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Let processes on a Ray cluster do the work; without an address: this machine's cluster, or this machine's GPUs.",
        ),
    ] = None
    gpus_per_actor: Annotated[
        float | None, typer.Option(min=0, help="With --ray: GPUs, or a part of a GPU, of a process. Default: 1 if there are GPUs.")
    ] = None
    actors: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:MAX",
            help="With --ray: number of processes at the beginning, and at most. Default: as many as the cluster has room for.",
        ),
    ] = None

    def cluster(self) -> Cluster | None:
        """Return the cluster, or None without `--ray`.

        Raises:
            ValueError: for the other options without `--ray`, and for numbers that are not MIN:MAX.
        """
        from encoders.cluster import Cluster  # slow

        if self.ray is None:
            if self.gpus_per_actor is not None or self.actors is not None:
                raise ValueError("--gpus-per-actor and --actors go with --ray")
            return None
        if self.actors is None:
            return Cluster(self.ray, self.gpus_per_actor)
        least, _, most = self.actors.partition(":")
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            raise ValueError(f"--actors {self.actors}: expected the numbers MIN:MAX of processes, such as 1:8")
        return Cluster(self.ray, self.gpus_per_actor, int(least), int(most))


def evenly(records: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` records (the option `--limit`), spread evenly over all records."""
    count = len(records) if limit is None else min(limit, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def usable_device(name: str | None) -> str:
    """Return the device of the option `--device`, or the default device for None.

    Raises:
        ValueError: for a device that torch cannot use on this machine.
    """
    import torch  # slow

    default = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        return default
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: torch cannot use it on this machine ({reason}); without --device, {default} is used") from error
    return name
