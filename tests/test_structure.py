"""The shape of the whole: no circles of imports, and packages that load nothing before it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside of functions count, and so do imports by name (`import_module("x.y")`); imports for type checkers do not."""
    graph = grimp.build_graph("encoders", "mof", "vig", "study", exclude_type_checking_imports=True, cache_dir=None)
    for module, named in imports_by_name():
        if named in graph.modules:
            graph.add_import(importer=module, imported=named)
    needed = {module: graph.find_upstream_modules(module) for module in graph.modules}
    circles = {
        tuple(sorted({module} | {other for other in others if module in needed[other]}))
        for module, others in needed.items()
        if any(module in needed[other] for other in others)
    }
    assert len(graph.modules) > 100 and not circles, "\n".join(" <-> ".join(circle) for circle in sorted(circles))


def imports_by_name() -> Iterator[tuple[str, str]]:
    """Pairs of (module, the name that it gives to `import_module`)."""
    for folder, packages in ((ROOT, ("encoders", "mof", "vig")), (ROOT / "recipes", ("study",))):
        for path in (path for package in packages for path in (folder / package).rglob("*.py")):
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args)
            for call in calls:
                name, argument = ast.unparse(call.func).rpartition(".")[2], call.args[0]
                if name == "import_module" and isinstance(argument, ast.Constant):
                    yield ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"), argument.value


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh process has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return set(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_packages_loads_no_torch() -> None:
    loaded = loaded_by("import encoders, mof, vig")
    assert {"encoders", "mof", "vig"} <= loaded
    assert not loaded & {"torch", "transformers", "timm", "open_clip", "pyarrow", "PIL", "numpy"}


def test_selection_and_report_load_no_torch() -> None:
    """It would take seconds and 0.7 GB, and they calculate with NumPy and Arrow."""
    loaded = loaded_by("import vig.cli.select, vig.cli.report")
    assert "vig.selection.thresholds" in loaded and not loaded & {"torch", "transformers", "matplotlib"}
