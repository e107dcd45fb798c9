"""Encoders of other installed packages, found through entry points of real distributions on sys.path."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from encoders import available_encoders, build_encoder, registry

MODULE = """
    from torch import nn
    from encoders import Encoder

    class Squares(Encoder):
        def patch_tokens(self, x):
            return self.tower(x).flatten(2).transpose(1, 2)

        def image_embedding(self, x):
            raise AssertionError

    def build(*, layer, norm, trainable, **_):
        sizes = {"width": 4, "depth": 1, "patch_size": 8, "image_size": 16}
        return Squares(nn.Conv2d(3, 4, 8, 8), **sizes, mean=(0.5,) * 3, std=(0.5,) * 3, trainable=trainable)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a distribution with a module and its entry points on sys.path."""
    available_encoders()
    own = dict(registry._FACTORIES)
    monkeypatch.setattr(registry, "_FACTORIES", own)
    monkeypatch.syspath_prepend(tmp_path)

    def make(package: str, module: str, points: dict[str, str]) -> None:
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(module))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "\n".join(f"{key} = {value}" for key, value in points.items())
        (info / "entry_points.txt").write_text(f"[mof.encoders]\n{lines}\n")
        registry._add_entry_points.cache_clear()

    yield make
    registry._add_entry_points.cache_clear()


def test_an_encoder_of_another_package_is_known_by_name_and_imported_when_built(install: Callable[..., None]) -> None:
    install("squares_package", MODULE, {"squares": "squares_package:build"})
    assert "squares" in available_encoders() and "squares_package" not in sys.modules
    encoder = build_encoder("squares")
    assert encoder(torch.rand(1, 3, 16, 16)).tokens.shape == (1, 4, 4)
    assert encoder.spec["name"] == "squares" and build_encoder(**encoder.spec).grid == (2, 2)
    with pytest.raises(ValueError, match="Did you mean.*squares"):
        build_encoder("sqares")


@pytest.mark.parametrize(
    ("module", "value", "reason"),
    [("import a_module_that_is_not_there", "broken:build", "a_module_that_is_not_there"), ("x = 1", "broken:build", "build")],
)
def test_a_broken_package_is_named_and_breaks_no_other(module: str, value: str, reason: str, install: Callable[..., None]) -> None:
    package = f"broken_{len(module)}"
    install(package, module, {"broken": value.replace("broken", package)})
    install("healthy_package", MODULE, {"healthy": "healthy_package:build"})
    assert {"broken", "healthy"} <= set(available_encoders())
    assert build_encoder("healthy").grid == (2, 2)
    with pytest.raises(ValueError, match=f"'broken' of the package {package}.*{package}:build.*{reason}"):
        build_encoder("broken")


@pytest.mark.parametrize("key", ["clip-vit-l14", "timm:mine"])
def test_a_name_that_is_taken_stays_whose_it_was(key: str, install: Callable[..., None]) -> None:
    install("greedy_package", MODULE, {key: "greedy_package:build"})
    registry._FACTORIES["clip-vit-l14"] = first = registry._FACTORIES["clip-vit-l14"]
    with pytest.warns(UserWarning, match=f"{key}.*greedy_package.*taken"):
        available_encoders()
    assert registry._FACTORIES["clip-vit-l14"] is first


def test_a_broken_package_does_not_break_the_printed_table(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mof.cli.encoder_table as encoder_table

    install("absent_package", "import nothing_of_that_name", {"absent": "absent_package:build"})
    install("fine_package", MODULE, {"fine": "fine_package:build"})
    monkeypatch.setattr(encoder_table, "available_encoders", lambda: [name for name in available_encoders() if name in ("absent", "fine")])
    encoder_table.print_encoders()
    output = " ".join(capsys.readouterr().out.split())
    assert "cannot be built" in output and "nothing_of_that_name" in output
    assert "fine 4 8 16 4 0.0 no see its package" in output
