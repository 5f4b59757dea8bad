"""The rules of the house that no linter sees."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import actstore

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "actstore"
MODULES = sorted(PACKAGE.rglob("*.py"))

TOP_LEVEL = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "actstore",
    "constraints.txt",
    "examples",
    "pyproject.toml",
    "schemas",
    "tests",
}

#: What only the machine that a change was written on has. Written so as not to match itself.
_ELSEWHERE = re.compile(rb"/wor[k]/|\bfar[m]", re.IGNORECASE)

#: A vocabulary holds whatever words its text held.
_VOCABULARIES = "examples/tiny-llama/"


@cache
def tracked_files() -> tuple[str, ...]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of tracked files")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return tuple(listed.stdout.rstrip("\0").split("\0"))


def imported_by(module: str) -> set[str]:
    """Give the top-level packages loaded in a fresh interpreter that imports ``module``."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_top_level_holds_only_what_the_design_names() -> None:
    top = {name.partition("/")[0] for name in tracked_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_bytes()))


def test_no_submodule_has_the_name_of_something_public() -> None:
    submodules = {path.stem for path in PACKAGE.iterdir()}
    assert submodules.isdisjoint(actstore.__all__)


def test_the_version_is_a_literal_and_types_are_shipped() -> None:
    assert f'\n__version__ = "{actstore.__version__}"\n' in (PACKAGE / "__init__.py").read_text()
    assert (PACKAGE / "py.typed").is_file()


def test_importing_actstore_imports_no_torch_no_zarr_and_no_xarray() -> None:
    assert imported_by("actstore").isdisjoint({"torch", "zarr", "xarray"})


@pytest.mark.parametrize(
    "module", ["bridges.exporting", "bridges.importing", "framework", "stream.reader"]
)
def test_torch_is_not_imported_before_a_model_is_instrumented(module: str) -> None:
    assert "torch" not in imported_by(f"actstore.{module}")


def test_no_tracked_file_names_the_machine_it_was_written_on() -> None:
    named = {
        name
        for name in tracked_files()
        if not name.startswith(_VOCABULARIES)
        and (path := ROOT / name).is_file()
        and _ELSEWHERE.search(path.read_bytes())
    }
    assert not named


SCRIPTS = sorted(
    path for name in ("acceptance", "benchmarks") for path in (ROOT / "tests" / name).glob("*.py")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_scripts_that_no_test_runs_import_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "actstore":
            module = importlib.import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
