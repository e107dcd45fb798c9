"""Test suites of other projects, out of the source distribution of the version that is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
import unittest.mock
from pathlib import Path
from typing import Any

import pytest


def load_suite(distribution: str, module: str, absent: dict[str, dict[str, Any]]) -> types.ModuleType:
    """Return a test module of a distribution.

    Args:
        absent: module -> name -> stand-in, for names that the suite imports and that its distribution or this machine may lack.
    """
    folder = _fetch(distribution)
    package = types.ModuleType(f"{distribution}_suite")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    for name, members in absent.items():
        _stand_in(f"{package.__name__}{name}" if name.startswith(".") else name, members)
    with unittest.mock.patch.object(pytest.mark, "_config", None):  # our --strict-markers does not know theirs
        return importlib.import_module(f"{package.__name__}.{module}")


def _fetch(distribution: str) -> Path:
    """Return the folder of a distribution's tests; the calling test is skipped where it cannot be had."""
    version = importlib.metadata.version(distribution)
    folder = Path(tempfile.gettempdir()) / "peer-suites" / f"{distribution}-{version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as downloads:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
            done = subprocess.run([*command, "-d", downloads, f"{distribution}=={version}"], capture_output=True, text=True, check=False)
            archives = list(Path(downloads).glob("*.tar.gz"))
            if done.returncode or not archives:
                pytest.skip(f"the source distribution of {distribution} {version} cannot be downloaded: {done.stderr[-300:]}")
            with tarfile.open(archives[0]) as archive:
                archive.extractall(folder.parent, filter="data")
    if not (folder / "tests").is_dir():
        pytest.skip(f"the source distribution of {distribution} {version} has no tests")
    return folder / "tests"


def _stand_in(name: str, members: dict[str, Any]) -> None:
    """Make a module of these members where there is no module of this name."""
    try:
        importlib.import_module(name)
    except ImportError:
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules:
            _stand_in(parent, {})
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module


def run_suite(mixin: type, members: dict[str, Any], skipped: dict[str, str]) -> None:
    """Run all tests of a mixin. Those of `skipped` (name -> reason) are left out, which must be tests that it has.

    The beginning of a name stands for all tests that begin so, when it ends with `*`.
    """
    names = [name for name in dir(mixin) if name.startswith("test_")]
    left_out: dict[str, Any] = {}
    for pattern, reason in skipped.items():
        matching = [name for name in names if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))]
        assert matching, f"{mixin.__name__} has no test {pattern}"
        left_out |= {name: unittest.skip(reason)(lambda self: None) for name in matching}
    case = type(f"MoF{mixin.__name__}", (mixin, unittest.TestCase), {**members, **left_out, "__module__": mixin.__module__})
    log = io.StringIO()
    result = unittest.TextTestRunner(log, verbosity=0).run(unittest.defaultTestLoader.loadTestsFromTestCase(case))
    failed = [*result.failures, *result.errors]
    print(f"{mixin.__name__}: {result.testsRun} run, {len(failed)} failed, {len(result.skipped)} skipped ({len(left_out)} by us)")
    assert not failed, "\n\n".join(f"{test}\n{trace[-1500:]}" for test, trace in failed)
