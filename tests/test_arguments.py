"""Numbers, tokenizers and callables that are none are refused by name, before anything is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore.errors import ConfigError
from actstore.reporting.values import Limits

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import decoder_log

NO_MEMORY = ("1", float("nan"), float("inf"), 0, -1, True, None)
NO_COUNT = ("1", 1.0, 0, True)
NO_CALLABLE = (3, "print")
NO_TOKENIZER = ("gpt2", 3)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_log(tmp_path_factory.mktemp("run") / "run.stream", steps=1).path


@pytest.fixture(scope="module")
def archive(log: Path) -> Path:
    return actstore.compact(log, log.with_name("run.zarr")).path  # type: ignore[return-value] # it is here


@pytest.fixture(scope="module")
def zipped(archive: Path) -> Path:
    return actstore.export(archive, archive.with_name("run.zarr.zip")).path


def refuses(name: str, values: tuple[Any, ...], call: Callable[..., Any], *given: Any) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name} must be .*; got {value!r}$"):
            call(*given, **{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_memory_gb", NO_MEMORY),
        ("workers", NO_COUNT),
        ("progress", NO_CALLABLE),
        ("tokenizer", NO_TOKENIZER),
    ],
)
def test_what_makes_archives_refuses_it(
    name: str, values: tuple[Any, ...], log: Path, archive: Path
) -> None:
    before = sorted(log.parent.iterdir())
    refuses(name, values, actstore.compact, log, log.with_name("out.zarr"))
    refuses(name, values, actstore.append, log, archive)
    assert sorted(log.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "values"), [("max_memory_gb", NO_MEMORY), ("progress", NO_CALLABLE)]
)
def test_what_makes_other_files_refuses_it(
    name: str, values: tuple[Any, ...], archive: Path, zipped: Path, tmp_path: Path
) -> None:
    refuses(name, values, actstore.export, archive, tmp_path / "run.h5")
    refuses(name, values, actstore.import_archive, zipped, tmp_path / "run.zarr")
    refuses(name, values, actstore.share, archive, tmp_path / "shared")
    if name == "max_memory_gb":
        refuses(name, values, actstore.export_rows, archive, tmp_path / "run.parquet")
    assert list(tmp_path.iterdir()) == []


def test_what_reads_refuses_it(log: Path, archive: Path) -> None:
    refuses("progress", NO_CALLABLE, actstore.verify, log)
    refuses("progress", NO_CALLABLE, actstore.recover, log)
    with actstore.open_dataset(archive, chunks=None) as dataset:
        for name, values in (("max_memory_gb", NO_MEMORY), ("workers", NO_COUNT)):
            refuses(name, values, actstore.analysis.statistics, dataset)
            refuses(name, values, actstore.group_statistics, dataset.resid, "step")
    for value in NO_MEMORY:
        with pytest.raises(ConfigError, match=r"^max_memory_gb must be"):
            Limits(10, None, value)
