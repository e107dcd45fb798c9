"""The documentation: every code block of its pages runs, and the site builds without a warning and needs no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.code_blocks import ROOT, blocks, run

import mof

DOCS = ROOT / "docs"
FIRST = DOCS / "start" / "first-model.md"  # makes the folders data and model, which the other pages use
PAGES = [ROOT / "CONTRIBUTING.md", *(page for page in sorted(DOCS.rglob("*.md")) if page != FIRST and blocks(page))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the blocks of the page "First own model" have run."""
    path = tmp_path_factory.mktemp("docs")
    (path / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        run_page(FIRST, path, patch)
    return path


def run_page(page: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        run(block, names, patch)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, folder, monkeypatch)


class Fetched(HTMLParser):
    """Collects the addresses that a browser fetches when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        linked = tag == "link" and set((values.get("rel") or "").split()) & {"stylesheet", "icon", "preconnect", "preload"}
        address = values.get("href") if linked else values.get("src")
        self.addresses += [address] if address else []


@pytest.mark.slow
def test_site_builds_and_fetches_nothing_from_other_hosts(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason='the site needs the extra docs: pip install "mof-vig[docs]"')
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    foreign = {}
    for name, text in pages.items():
        parser = Fetched()
        parser.feed(text)
        foreign[name] = [address for address in parser.addresses if re.match(r"(https?:)?//", address)]
    assert len(pages) > 20 and not {name: addresses for name, addresses in foreign.items() if addresses}
    for result in (DOCS / "results").glob("*.md"):
        name = "results/index.html" if result.stem == "index" else f"results/{result.stem}/index.html"
        assert name in pages
    assert "--batch-tokens" in pages["reference/commands/index.html"]
    assert 'id="encoders.build_encoder"' in pages["reference/encoders/index.html"]


def test_reference_lists_every_public_name() -> None:
    for stub in ("encoders/__init__.pyi", "mof/__init__.pyi", "mof/data/__init__.pyi", "vig/__init__.pyi", "vig/decoding/__init__.pyi"):
        package = Path(stub).parent.as_posix().replace("/", ".")
        text = (DOCS / "reference" / f"{package.split('.')[0]}.md").read_text()
        names = re.findall(r'^    "(\w+)",$', (ROOT / stub).read_text(), re.MULTILINE)
        missing = [name for name in names if f"::: {package}.{name}\n" not in text]
        assert not missing, f"docs/reference has no entry for {missing} of {package}"


def test_install_page_lists_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `([a-z0-9]+)` \|", (DOCS / "start" / "install.md").read_text(), re.MULTILINE)) == set(extras)


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mof.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mof.__version__
    assert f"\n## {mof.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_forms_and_workflows_of_github_are_yaml() -> None:
    files = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")}
    assert files.keys() == {"bug.yml", "feature.yml", "config.yml", "ci.yml"}
    for form in ("bug.yml", "feature.yml"):
        assert all(part["attributes"]["label"].endswith("?") or part["attributes"]["label"] == "Versions" for part in files[form]["body"])
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    jobs = files["ci.yml"]["jobs"]
    versions = ["3.11", *jobs["newest"]["strategy"]["matrix"]["python"]]  # .ci/run and .ci/oldest take 3.11
    assert versions == re.findall(r"Python :: (3\.\d+)", " ".join(classifiers))
