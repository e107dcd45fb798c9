"""MMVP and MMVP-VLM have nine visual patterns, over which encoders and models are correlated (arXiv 2401.06209, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    """Return the pattern with this name, as `Type` spells it; an unknown name is returned unchanged."""
    return _TYPES.get(_plain(name), name)


def by_type(shares: Mapping[str, float]) -> dict[str, float]:
    """Rename the shares as `Type` spells their patterns.

    Raises:
        ValueError: if two names mean the same pattern.
    """
    renamed = {pattern_type(name): share for name, share in shares.items()}
    if len(renamed) < len(shares):
        raise ValueError(f"two of these are names of the same pattern: {', '.join(shares)}")
    return renamed


LEAST_PATTERNS = 4  # below it, the interval is undefined


@dataclass(frozen=True)
class Correlation:
    """Correlation holds Pearson's r between two sets of shares by pattern."""

    patterns: list[str]
    """The patterns that both sets have."""
    r: float | None
    """None if it is undefined; `undefined` says why."""
    interval: tuple[float, float] | None = None
    """The 95 % interval by Fisher's transformation. It is wide, with nine patterns."""
    undefined: str = ""


def correlate(encoder: Mapping[str, float], model: Mapping[str, float]) -> Correlation:
    """Correlate the shares of right pairs of an encoder on MMVP-VLM and of a model on MMVP, by pattern under any of its names."""
    from scipy.stats import pearsonr  # slow to import, and most users of this module only want the names

    first, second = by_type(encoder), by_type(model)
    common = [pattern for pattern in first if pattern in second]
    if len(common) < LEAST_PATTERNS:
        return Correlation(common, None, undefined=f"{len(common)} patterns in common; {LEAST_PATTERNS} are the least")
    xs, ys = [first[pattern] for pattern in common], [second[pattern] for pattern in common]
    if constant := [name for name, values in (("encoder", xs), ("model", ys)) if math.isclose(min(values), max(values), abs_tol=1e-9)]:
        return Correlation(common, None, undefined=f"the {' and the '.join(constant)} scored the same on every pattern")
    result = pearsonr(xs, ys)
    interval = result.confidence_interval(0.95)
    return Correlation(common, float(result.statistic), (float(interval.low), float(interval.high)))
