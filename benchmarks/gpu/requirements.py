"""Whether the packages are there that this library needs: a machine with a GPU often brings its own, older ones."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def required() -> list[str]:
    """Return the required packages of this library with their oldest versions, as pyproject.toml lists them."""
    return list(tomllib.loads(PROJECT.read_text())["project"]["dependencies"])


def refuse_missing(requirements: Sequence[str]) -> None:
    """End the program with a line that names the packages that are missing, if a package is missing."""
    if missing := [requirement.name for requirement in map(Requirement, requirements) if _installed(requirement) is None]:
        raise SystemExit(f"not measured, because packages are missing: pip install {' '.join(missing)}")


def too_old(requirements: Sequence[str]) -> list[str]:
    """Return the installed packages that are older than needed: "transformers 5.17.0 (needs >=5.23)"."""
    versions = [(requirement, _installed(requirement)) for requirement in map(Requirement, requirements)]
    return [
        f"{requirement.name} {installed} (needs {requirement.specifier})"
        for requirement, installed in versions
        if installed is not None and not requirement.specifier.contains(installed, prereleases=True)
    ]


def _installed(requirement: Requirement) -> str | None:
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return None
