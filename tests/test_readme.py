"""README.md does what it says: its code runs, and its set-up commands are those that CI runs."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
EXAMPLES = ROOT / "examples"
OLDER_LOGS = ROOT / "schemas" / "vectors" / "legacy"

_SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "
DEMO = f"{_SET_UP}'.[demo]' && .venv/bin/python examples/quickstart.py"
TESTS = f"{_SET_UP}'.[dev]' && .venv/bin/pytest -q -n auto"

#: Languages of blocks that only show something. Any other must be run here, or be added here.
SHOWN = frozenset({"json", "text"})

_BLOCK = re.compile(
    r"^```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of README.md, and the line of the file on which its code begins."""

    language: str
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1)
        for found in _BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def blocks() -> list[Block]:
    return blocks_of(README.read_text(encoding="utf-8"))


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand where a reader of README.md stands, in a folder that may be written to."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    shutil.copytree(OLDER_LOGS, tmp_path / OLDER_LOGS.relative_to(ROOT))
    monkeypatch.chdir(tmp_path)
    commands = tmp_path / ".bin"  # first on the path, so that the command is this checkout's
    commands.mkdir()
    script = commands / "actstore"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m actstore "$@"\n')
    script.chmod(0o755)
    here = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(here))
    old = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{old}" if old else str(ROOT))
    return tmp_path


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Execute a block as the lines of README.md that it is, so that a traceback points there."""
    code = compile("\n" * (block.line - 1) + block.code, str(README), "exec")
    exec(code, namespace)


def run_bash(block: Block) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"README.md:{block.line}\n{block.code}\n{done.stdout}"


def test_a_block_is_found_with_its_language_code_and_line() -> None:
    text = "# T\n\n```python\nx = 1\n```\n\n```bash\na &&\nb\n```\n```text\n```\n"
    assert blocks_of(text) == [
        Block("python", "x = 1\n", 4),
        Block("bash", "a &&\nb\n", 8),
        Block("text", "", 12),
    ]


def test_every_block_of_the_readme_is_run_or_only_shows_something(blocks: list[Block]) -> None:
    unknown = {
        f"README.md:{block.line}: {block.language or 'no language'}"
        for block in blocks
        if block.language not in {"python", "bash", *SHOWN}
    }
    assert not unknown


@pytest.mark.usefixtures("reader_folder")
def test_the_readme_runs_from_top_to_bottom(blocks: list[Block]) -> None:
    assert any(block.language == "python" for block in blocks), "README.md shows no Python"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "bash" and block.code.strip() not in {DEMO, TESTS}:
            run_bash(block)


def test_the_readme_sets_up_with_one_line_for_the_demo_and_one_for_the_tests(
    blocks: list[Block],
) -> None:
    set_up = [block.code for block in blocks if block.language == "bash" and "venv" in block.code]
    assert set_up == [f"{DEMO}\n", f"{TESTS}\n"]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    shown = subprocess.run(
        ["bash", ".ci/run", "--show"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"{TESTS}\n"


@pytest.mark.parametrize(
    ("example", "arguments"), [("quickstart", ["."]), ("train_sae", ["--out", "."])]
)
def test_an_example_leaves_what_is_in_a_folder(
    example: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = EXAMPLES / f"{example}.py"
    (tmp_path / "mine.txt").write_text("kept")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    assert [one.name for one in tmp_path.iterdir()] == ["mine.txt"]
    assert "remove it, or give another" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quickstart_leaves_a_figure_and_an_archive(reader_folder: Path) -> None:
    before = set(reader_folder.rglob("*"))
    subprocess.run(
        [sys.executable, "examples/quickstart.py"], stdin=subprocess.DEVNULL, check=True
    )
    made = {path.suffix: path for path in set(reader_folder.rglob("*")) - before}
    assert made[".png"].stat().st_size > 0
    assert (made[".zarr"] / "zarr.json").is_file()
