"""These functions read weight files safely and load them strictly. Their errors name the missing file and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session
from safetensors.torch import load_file
from torch import Tensor, nn


class WeightsError(ValueError):
    """A WeightsError says that weights are missing, unreadable, or made for another architecture."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a torch file, which is read with weights_only=True (no code of it runs).

    A checkpoint of training code may hold mappings of tensors: those under a name of `WRAPPERS` are returned, or else all of them, with
    their name as a prefix.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}; expected a .safetensors or .pt file")
    with refuse_misfit(path):
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        if not isinstance(state, Mapping):
            raise ValueError(f"expected a mapping of names to tensors, got a {type(state).__name__}")
        while wrappers := [name for name in WRAPPERS if isinstance(state.get(name), Mapping)]:
            state = state[wrappers[0]]
        return dict(_tensors(state))


def _tensors(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")


WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which the checkpoints of training code hold the weights, beside the optimiser's state."""


def without_prefix(state: Mapping[str, Tensor], wanted: Iterable[str], source: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a state under the names that a network has, where the state has a prefix before them, such as "module.clip.".

    The tensors of other networks in the state, which have other prefixes, are left out with a warning.

    Args:
        wanted: the network's own names.

    Raises:
        WeightsError: if several prefixes fit, as for a network and its moving average.
    """
    names = list(wanted)
    anchor = max(names, key=len)  # the longest name is in no other network
    prefixes = [name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")]
    if not prefixes or "" in prefixes:
        return dict(state)
    if len(prefixes) > 1:
        raise WeightsError(f"{source} holds this network {len(prefixes)} times, under {', '.join(prefixes)}: save the one you mean")
    own = {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}
    if others := [name for name in state if not name.startswith(prefixes[0])]:
        warnings.warn(f"{source}: {len(others)} tensors outside of {prefixes[0]!r}, such as {others[0]}, are left out", stacklevel=2)
    return own


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `model`.

    Raises:
        WeightsError: for a missing, unexpected or misshapen key; the message names all of them.
    """
    with refuse_misfit(source):
        model.load_state_dict(state, strict=True)


@contextmanager
def refuse_misfit(source: str | Path) -> Iterator[None]:
    """Turn any error of reading or loading a weight file into a WeightsError that names the file.

    torch's own error lists each missing, unexpected and misshapen key. Errors of unpickling, zip archives and headers
    share no base class, so all are caught.
    """
    try:
        yield
    except Exception as error:
        raise WeightsError(f"the weights of {source} cannot be loaded: {str(error) or type(error).__name__}") from error


def warn_of_activation(source: str | Path, quickgelu: str, tagged: str) -> None:
    """Warn that a weight file does not name its activation, although its architecture exists with GELU and with QuickGELU.

    Args:
        quickgelu: the name of the architecture with QuickGELU.
        tagged: the form of a model's name with the tag of its weights.
    """
    warnings.warn(
        f"{source} does not say which activation its weights were trained with; GELU is used. Weights of OpenAI, DFN and MetaCLIP need "
        f"QuickGELU, or every feature is wrong: name the model {quickgelu}. To confirm GELU, name the weights' tag: {tagged}",
        stacklevel=2,
    )


INSTEAD_OF_WEIGHTS = "give a local file with weights=PATH; pretrained=False builds random weights"
INSTEAD_OF_TOKENIZER = "name a local folder that holds it too, as the folder of open_clip:local-dir:FOLDER or hf:FOLDER"
INSTEAD_OF_FOLDER = "name a local folder that exists: hf:FOLDER"


@contextmanager
def explain_download(what: str, *, otherwise: str = INSTEAD_OF_WEIGHTS) -> Iterator[None]:
    """Turn any error of a failed download of `what` into a WeightsError that says how to supply the file.

    Args:
        otherwise: advice for a user without a network.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"cannot get {what}: {str(error).rstrip('.')}. Without a network, put it into the cache by downloading it once with one, or "
            f"{otherwise}"
        ) from error


def hub_answers() -> bool:
    """Return whether the hub can be reached within seconds. Its client would try every file for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the hub's client may use any HTTP library, whose errors share no class
        return False
    return True


def cached_instead(repository: str) -> Path | None:
    """Return the cached folder of a repository if the hub does not answer. Return None if files can be requested as usual.

    Raises:
        FileNotFoundError: if the hub does not answer and nothing is cached.
    """
    if constants.HF_HUB_OFFLINE or hub_answers():  # offline, the hub's client looks into the cache alone
        return None
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except OSError as error:
        raise FileNotFoundError(f"the hub does not answer, and nothing of {repository} is in its cache") from error


def first_file(folder: Path, *names: str) -> str:
    """Return the path of the first of these files that is in the folder.

    Raises:
        FileNotFoundError: if the folder has no such file.
    """
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")
