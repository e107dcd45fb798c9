"""build_encoder builds an encoder by name: a preset or a registered factory by its exact key, any other encoder as "backend:model"."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from encoders.names import near_names
from encoders.presets import PRESETS, Preset

if TYPE_CHECKING:  # otherwise names and presets would need torch
    from encoders.base import Encoder

Factory = Callable[..., "Encoder"]

# A backend is imported when its first encoder is built, because the imports take seconds.
BACKENDS = {
    "open_clip": "encoders.backends.open_clip",
    "timm": "encoders.backends.timm",
    "hf": "encoders.backends.hf",
    "torch_hub": "encoders.backends.torch_hub",
    "package": "encoders.backends.package",
}

# Other packages name their factories under this group of entry points.
ENTRY_POINTS = "mof.encoders"


def register_encoder(key: str) -> Callable[[Factory], Factory]:
    """Return a decorator that makes a factory available as `build_encoder(key)`.

    The factory is called with the keywords of `build_encoder` (image_size, layer, norm, pretrained, trainable, weights)
    and returns an `Encoder`. An installed package needs no decorator: an entry point of the group "mof.encoders" names
    its factory, `key = "package.module:factory"`, which is imported when the encoder is first built.

    Raises:
        ValueError: for a key that is taken, or that looks like "backend:model".
    """
    if not key or key.partition(":")[0] in BACKENDS:
        raise ValueError(f"{key!r} cannot be the key of an encoder: it is empty or names a backend")

    def add(factory: Factory) -> Factory:
        if key in _factories():
            raise ValueError(f"an encoder named {key!r} is registered already")
        _FACTORIES[key] = factory
        return factory

    return add


def available_encoders() -> list[str]:
    """Return the keys that `build_encoder` knows besides "backend:model", sorted."""
    return sorted(_factories())


def build_encoder(
    name: str,
    *,
    image_size: int | None = None,
    layer: int | Sequence[int] | None = None,
    norm: bool | None = None,
    pretrained: bool = True,
    trainable: bool = False,
    weights: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Encoder:
    """Return the encoder with this name. It is frozen and in eval mode unless `trainable` is True.

    Args:
        name: a key of `available_encoders`, or "open_clip:model/tag", "timm:model.tag", "hf:hub-id-or-folder",
            "torch_hub:dinov2_vitl14". A file may follow instead of a tag: "open_clip:ViT-B-32//path/to/weights.safetensors",
            "timm:model//path/to/it.pt".
        image_size: side of the square input in pixels. The default is the preset's size, else the model's own.
        layer: the block whose output the encoder returns: -1 is the last block, -2 the block before it (see `Encoder`). The
            channels of several layers, as in [-2, -5], stand side by side. The default is the preset's layer, else -2 for
            transformers with a text tower (LLaVA) and -1 for all other models (MMVP's DINOv2).
        norm: apply the final norm to this output. The default is the preset's choice, else False.
        pretrained: False gives random weights: no weight file is read (not even `weights`), nothing is downloaded.
        trainable: record gradients, and follow the parent's train() and eval().
        weights: a local file (.safetensors, or .pt read with weights_only=True) in place of the weights that `name` means.
        mean, std: statistics for the normalisation, in place of the encoder's own. The released MoF models need them, because
            their DINOv2 was trained with pixels normalised for CLIP.
        config: the architecture, in place of the architecture of `name`. A checkpoint that holds the weights then needs no
            other file. For hf it is {"model": ..., "processor": ...}, the contents of config.json and
            preprocessor_config.json; for torch_hub it holds the arguments of `DinoV2`.

    Raises:
        ValueError: for an unknown name (the message lists similar names), an impossible layer or size, or weights that are
            missing or do not fit.
    """
    options: dict[str, Any] = {
        "image_size": image_size,
        "layer": layer,
        "norm": norm,
        "pretrained": pretrained,
        "trainable": trainable,
        "weights": None if weights is None else os.path.abspath(weights),
    }
    import torch  # slow

    if pretrained and torch.empty(0).device.type == "meta":
        raise ValueError(
            f"{name}: weights cannot be loaded onto the meta device; build it with pretrained=False, or under torch.device('cpu')"
        )
    if config is not None:
        if name.partition(":")[0] not in ("hf", "torch_hub"):
            raise ValueError(f"{name} takes no config: only encoders of hf and torch_hub do")
        options["config"] = config
    factory = _factories().get(name)
    encoder = build_from_backend(name, **options) if factory is None else factory(**options)
    encoder.name, encoder.weights, encoder.config = name, options["weights"], None if config is None else dict(config)
    given = {"mean": mean, "std": std}
    statistics: dict[str, Any] = {key: tuple(map(float, value)) for key, value in given.items() if value is not None}
    encoder.preprocessing = replace(encoder.preprocessing, **statistics)
    return encoder


def build_from_backend(name: str, **options: Any) -> Encoder:
    """Return the encoder of "backend:model". The caller gives all keywords of `build_encoder`."""
    import torch  # slow

    image_size = options.pop("image_size")
    backend, colon, model = name.partition(":")
    if not (colon and model and backend in BACKENDS):
        known = available_encoders()
        raise ValueError(
            f"unknown encoder {name!r}.{near_names(name, known)} `mof encode --list` or available_encoders() lists the {len(known)} known "
            f"names; or give backend:model with a backend of {', '.join(BACKENDS)}"
        )
    with torch.device("cpu"):  # modules that make tensors when they are imported fail on the meta device
        module = importlib.import_module(BACKENDS[backend])
    encoder: Encoder = module.build(model, **options)
    encoder.name = name
    if image_size is not None:
        encoder.set_image_size(image_size)
    return encoder


def _build_preset(preset: Preset, **options: Any) -> Encoder:
    """Build the preset's encoder. An option that is None has the preset's value."""
    defaults = {name: getattr(preset, name) for name in ("image_size", "layer", "norm", "weights")}
    encoder = build_from_backend(preset.model, **{key: defaults.get(key) if value is None else value for key, value in options.items()})
    encoder.flexible = encoder.flexible and not preset.fixed
    return encoder


_FACTORIES: dict[str, Factory] = {name: functools.partial(_build_preset, preset) for name, preset in PRESETS.items()}


def _factories() -> dict[str, Factory]:
    _add_entry_points()
    return _FACTORIES


@functools.cache
def _add_entry_points() -> None:
    """Make the encoders of other packages known by name, without importing them. A key that is taken is left out with a warning."""
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in _FACTORIES or point.name.partition(":")[0] in BACKENDS:
            warnings.warn(f"the encoder {point.name!r} of {_origin(point)} is left out: that name is taken", stacklevel=2)
        else:
            _FACTORIES[point.name] = functools.partial(_build_from_package, point)


def _build_from_package(point: EntryPoint, **options: Any) -> Encoder:
    """Import the factory that an entry point names and call it."""
    import torch  # slow

    try:
        with torch.device("cpu"):  # see build_from_backend
            factory = point.load()
    except Exception as error:  # the modules of other packages may raise errors of any kind
        raise ValueError(f"the encoder {point.name!r} of {_origin(point)} cannot be imported: {error}") from error
    return factory(**options)


def _origin(point: EntryPoint) -> str:
    package = f"the package {point.dist.name}" if point.dist else "an unknown package"
    return f"{package} (entry point {point.value})"
