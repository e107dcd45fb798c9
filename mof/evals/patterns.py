"""The nine visual patterns of MMVP and MMVP-VLM, and how encoders and models go together along them (arXiv 2401.06209, section 3)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from mof.evals.intervals import Z

PATTERNS: dict[str, tuple[str, str]] = {
    "Orientation": ("Orientation and Direction", "od"),
    "Presence": ("Presence of Specific Features", "pf"),
    "State": ("State and Condition", "sc"),
    "Quantity": ("Quantity and Count", "qc"),
    "Spatial": ("Positional and Relational Context", "pr"),
    "Color": ("Color and Appearance", "ca"),
    "Structural Character": ("Structural Characteristics", "sh"),
    "Text": ("Texts", "tx"),
    "Camera Perspective": ("Viewpoint and Perspective", "vp"),
}
"""`Type` as MMVP-VLM spells it, in the paper's order: (the paper's name, the code in copies of MMVP with a column Category)."""


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


_TYPES = {_plain(name): type for type, names in PATTERNS.items() for name in (type, *names)}


def pattern_type(name: str) -> str:
    """A pattern by any of its names, as `Type` spells it; a name that is none of them stays as it is."""
    return _TYPES.get(_plain(name), name)


def by_type(shares: Mapping[str, float]) -> dict[str, float]:
    """The same shares under `Type`'s names.

    Raises:
        ValueError: when two of the names are of one pattern.
    """
    renamed = {pattern_type(name): share for name, share in shares.items()}
    if len(renamed) < len(shares):
        raise ValueError(f"two of these are names of the same pattern: {', '.join(shares)}")
    return renamed


LEAST_PATTERNS = 4  # below it, the interval is undefined


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of two sets of shares by pattern."""

    patterns: list[str]
    """The patterns that both have."""
    r: float | None
    """None where it is undefined; `undefined` says why."""
    interval: tuple[float, float] | None = None
    """95 %, by Fisher's transformation: wide, with nine patterns."""
    undefined: str = ""


def correlate(encoder: Mapping[str, float], model: Mapping[str, float]) -> Correlation:
    """Shares of right pairs by pattern, of an encoder on MMVP-VLM and of a model on MMVP. Patterns may have any of their names."""
    first, second = by_type(encoder), by_type(model)
    common = [pattern for pattern in first if pattern in second]
    if len(common) < LEAST_PATTERNS:
        return Correlation(common, None, undefined=f"{len(common)} patterns in common; {LEAST_PATTERNS} are the least")
    xs, ys = [first[pattern] for pattern in common], [second[pattern] for pattern in common]
    if constant := [name for name, values in (("encoder", xs), ("model", ys)) if math.isclose(min(values), max(values), abs_tol=1e-9)]:
        return Correlation(common, None, undefined=f"the {' and the '.join(constant)} scored the same on every pattern")
    r = max(-1.0, min(1.0, statistics.correlation(xs, ys)))
    if abs(r) > 1 - 1e-12:
        return Correlation(common, r, (r, r))
    z, reach = math.atanh(r), Z / math.sqrt(len(common) - 3)
    return Correlation(common, r, (math.tanh(z - reach), math.tanh(z + reach)))
