"""The tracker, the token table, the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import capturing, framework, quiet
from refeed import Model, run
from tiny_models import sequential

from actstore.capture import tokens as tokens_module
from actstore.errors import ActstoreError, ActstoreWarning, CaptureError, ConfigError
from actstore.stream.reader import open_stream

TOKEN_KEYS = [
    "token_index",
    "token_id",
    "token_text",
    "step",
    "position",
    "pass_index",
    "time",
]


def _sidecar(log: Path, ending: str = "_tokens.json") -> dict[str, Any]:
    return json.loads(log.with_name(log.name + ending).read_text())


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with quiet():
        yield


# -- the table ----------------------------------------------------------------------------------


def test_the_token_table_is_as_documented(log: Path) -> None:
    tokens = run(log, 3)
    table = _sidecar(log)
    assert list(table)[:3] == ["total_tokens", "tokens", "capture_duration_seconds"]
    assert table["total_tokens"] == 3
    assert table["tokens"] == tokens
    assert table["capture_duration_seconds"] > 0
    for number, token in enumerate(table["tokens"]):
        assert list(token) == TOKEN_KEYS
        assert token["token_index"] == token["step"] == token["pass_index"] == number
        assert token["token_text"] == f"<{token['token_id']}>"
        assert token["position"] is None


def test_the_log_holds_the_same_tokens_as_the_table(log: Path) -> None:
    tokens = run(log, 3)
    with open_stream(log) as reader:
        found = [(one.step, one.token_id, one.token_text, one.time) for one in reader.tokens]
    names = ("step", "token_id", "token_text", "time")
    assert found == [tuple(one[name] for name in names) for one in tokens]


def test_without_tracking_nothing_is_yielded_and_no_table_written(log: Path) -> None:
    model = sequential()
    with capturing(model, log) as tracker:
        assert tracker is None
        model(torch.ones(1, 8))
    assert [one.name for one in log.parent.iterdir()] == [log.name]


def test_a_position_becomes_the_token_index(log: Path) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True) as tracker:
        model(torch.ones(1, 8))
        tracker.record_token(5, "five", position=17)
        tracker.record_token(6, "six")
        tracker.record_token(7, "seven", position=0)
    assert [one["token_index"] for one in _sidecar(log)["tokens"]] == [17, 1, 0]
    with open_stream(log) as reader:
        assert [one.position for one in reader.tokens] == [17, None, 0]


@pytest.mark.parametrize(
    ("token_id", "wanted"),
    [
        (5, 5),
        (np.int64(5), 5),
        (np.uint16(5), 5),
        (torch.tensor(5), 5),
        (-1, -1),
        ((1 << 63) - 1, (1 << 63) - 1),
    ],
)
def test_whatever_stands_for_an_int_is_a_token_id(token_id: Any, wanted: int, log: Path) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True) as tracker:
        model(torch.ones(1, 8))
        tracker.record_token(token_id, "")
    assert _sidecar(log)["tokens"][0]["token_id"] == wanted


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5.0, "five"), "token_id"),
        (("5", "five"), "token_id"),
        ((None, "five"), "token_id"),
        ((1 << 63, "five"), "token_id"),
        ((5, None), "token_text"),
        ((5, b"five"), "token_text"),
        ((5, 5), "token_text"),
        ((5, "five", "3"), "position"),
        ((5, "five", 1.5), "position"),
        ((5, "five", -(1 << 63)), "position"),
    ],
)
def test_a_wrong_token_is_refused_and_not_recorded(
    arguments: tuple[Any, ...], named: str, log: Path
) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True) as tracker:
        model(torch.ones(1, 8))
        with pytest.raises(ConfigError, match=f"record_token wants {named}"):
            tracker.record_token(*arguments)
        tracker.record_token(1, "one")
    assert [one["token_id"] for one in _sidecar(log)["tokens"]] == [1]


@pytest.mark.parametrize("text", ["", "\0", "\ud83d", "é\n\u2028", "a" * 100_000])
def test_any_text_is_kept_everywhere(text: str, log: Path) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True, checkpoint_interval_tokens=1) as tracker:
        model(torch.ones(1, 8))
        tracker.record_token(1, text)
        assert _sidecar(log, ".ckpt.json")["tokens"][0]["token_text"] == text
    assert _sidecar(log)["tokens"][0]["token_text"] == text
    with open_stream(log) as reader:
        assert reader.tokens[0].token_text == text


def test_a_token_has_the_pass_before_it_and_none_before_the_first(log: Path) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True) as tracker:
        tracker.record_token(1, "before")
        model(torch.ones(1, 8))
        model(torch.ones(1, 8))
        tracker.record_token(2, "after two")
        tracker.record_token(3, "at once")
    assert [one["pass_index"] for one in tracker.tokens] == [-1, 1, 1]


def test_recording_after_the_end_is_refused(log: Path) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True) as tracker:
        model(torch.ones(1, 8))
    with pytest.raises(CaptureError, match="ended"):
        tracker.record_token(1, "late")
    assert tracker.tokens == []


def test_files_stay_beside_the_log_if_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    model = sequential()
    options = {"checkpoint_path": "check.json", "checkpoint_interval_tokens": 1}
    with capturing(model, Path("gen.stream"), track_per_token=True, **options) as tracker:
        model(torch.ones(1, 8))
        os.chdir("there")
        tracker.record_token(1, "one")
        assert (tmp_path / "check.json").exists()
    assert {one.name for one in tmp_path.iterdir()} == {
        "gen.stream",
        "gen.stream_tokens.json",
        "there",
    }
    assert not list((tmp_path / "there").iterdir())


# -- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_is_written_every_so_many_tokens_and_removed_at_the_end(log: Path) -> None:
    counts = []

    def said(line: str) -> None:
        if line.startswith("recorded"):
            path = log.with_name("gen.stream.ckpt.json")
            counts.append(_sidecar(log, ".ckpt.json")["total_tokens"] if path.exists() else 0)

    run(log, 8, interval=3, said=said)
    assert counts == [0, 0, 3, 3, 3, 6, 6, 6]
    assert sorted(one.name for one in log.parent.iterdir()) == [
        "gen.stream",
        "gen.stream_tokens.json",
    ]


def test_the_checkpoint_is_as_documented(log: Path) -> None:
    found: dict[str, Any] = {}
    tokens: list[Any] = []

    def said(line: str) -> None:
        if line == "recorded 4":
            found.update(_sidecar(log, ".ckpt.json"))

    tokens = run(log, 5, interval=2, said=said)
    assert list(found) == [
        "version",
        "total_tokens",
        "last_checkpoint_time",
        "metadata",
        "tokens",
    ]
    assert (found["version"], found["total_tokens"]) == (1, 4)
    assert found["tokens"] == tokens[:4]
    assert list(found["metadata"]) == ["start_time", "resume_count", "updated_at"]
    assert found["metadata"]["resume_count"] == 0
    assert found["metadata"]["start_time"] <= tokens[0]["time"] <= found["last_checkpoint_time"]
    assert datetime.fromisoformat(found["metadata"]["updated_at"]).tzinfo is not None


def test_a_checkpoint_path_of_ones_own_is_used(log: Path) -> None:
    own = log.with_name("own.json")
    model = sequential()
    with capturing(
        model,
        log,
        track_per_token=True,
        checkpoint_interval_tokens=1,
        checkpoint_path=str(own),
    ) as tracker:
        model(torch.ones(1, 8))
        tracker.record_token(1, "one")
        assert json.loads(own.read_text())["total_tokens"] == 1
        assert not log.with_name("gen.stream.ckpt.json").exists()
    assert not own.exists()


def test_the_log_is_on_the_disk_before_the_checkpoint_says_so(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int, int]] = []

    def note(what: str) -> None:
        with open_stream(log) as reader:
            events.append((what, len(reader.tokens), reader.packet_count))

    fdatasync, write = os.fdatasync, tokens_module.files.atomic_write
    watching = [False]

    def synced(descriptor: int) -> None:
        fdatasync(descriptor)
        if watching[0]:
            note("log")

    def written(path: Path, data: bytes) -> None:
        if path.name.endswith(".ckpt.json"):
            note(f"checkpoint of {json.loads(data)['total_tokens']}")
        write(path, data)

    monkeypatch.setattr(os, "fdatasync", synced)
    monkeypatch.setattr(tokens_module.files, "atomic_write", written)

    def said(line: str) -> None:
        watching[0] = line == "recording"
        if line == "recorded 2":
            events.append(("returned", 2, 0))

    run(log, 3, interval=2, said=said)
    packets = events[0][2]
    assert packets == 2 * (1 + 3 * 3 + 1 + 1)
    assert events == [("log", 2, packets), ("checkpoint of 2", 2, packets), ("returned", 2, 0)]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_keeps_the_checkpoint_and_brings_it_up_to_date(
    error: BaseException, log: Path
) -> None:
    def said(line: str) -> None:
        if line == "recorded 5":
            raise error

    with pytest.raises(type(error)) as caught:
        run(log, 8, interval=4, said=said)
    assert caught.value is error
    assert _sidecar(log, ".ckpt.json")["total_tokens"] == 5
    assert _sidecar(log)["total_tokens"] == 5


def _fail_to_write(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    write = tokens_module.files.atomic_write

    def written(path: Path, data: bytes) -> None:
        if path.name.endswith(ending):
            raise OSError(28, "no space left")
        write(path, data)

    monkeypatch.setattr(tokens_module.files, "atomic_write", written)


@pytest.mark.parametrize("ending", [".ckpt.json", "_tokens.json"])
def test_a_file_beside_the_log_that_can_not_be_written_is_a_capture_error(
    ending: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_to_write(monkeypatch, ending)
    model = Model()
    with pytest.raises(CaptureError, match=f"{ending}.*no space left"):
        run(log, 3, interval=2, model=model)
    with open_stream(log) as reader:
        assert reader.complete
        assert len(reader.tokens) >= 2


def test_a_file_that_can_not_be_written_does_not_hide_the_error_of_the_run(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_to_write(monkeypatch, "_tokens.json")

    def said(line: str) -> None:
        if line == "recorded 1":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run(log, 3, said=said)
    assert "no space left" in "".join(caught.value.__notes__)


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_interval_tokens": 3},
        {"checkpoint_path": "c.json"},
        {"resume_from_checkpoint": True},
        {"checkpoint_interval_tokens": 3, "resume_from_checkpoint": True},
    ],
)
def test_checkpoints_without_tracking_are_a_value_error(
    options: dict[str, Any], log: Path
) -> None:
    one = framework()
    one.instrument_model(sequential())
    with (
        pytest.raises(ValueError, match=f"{next(iter(options))}.*track_per_token=True"),
        one.capture_activations(log, **options),
    ):
        pass
    assert not log.exists()


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "3", float("nan")])
def test_an_interval_that_is_no_positive_int_is_refused(interval: Any, log: Path) -> None:
    one = framework()
    one.instrument_model(sequential())
    options = {"track_per_token": True, "checkpoint_interval_tokens": interval}
    with (
        pytest.raises(ConfigError, match="checkpoint_interval_tokens must be a positive int"),
        one.capture_activations(log, **options),
    ):
        pass
    assert not log.exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda log: log.parent / "missing" / "c.json", "there is no folder"),
        (lambda log: log.parent, "is a directory"),
        (lambda log: log, "is the log"),
        (lambda log: log.with_name("gen.stream_tokens.json"), "its token table"),
        (lambda log: log.parent / "." / "gen.stream", "is the log"),
        (lambda _: 5, "must be a str"),
        (lambda _: b"c.json", "must be a str"),
    ],
)
def test_an_impossible_checkpoint_path_is_refused_before_anything_is_touched(
    make: Callable[[Path], Any], said: str, log: Path
) -> None:
    one = framework()
    one.instrument_model(sequential())
    options = {"track_per_token": True, "checkpoint_path": make(log)}
    with (
        pytest.raises(ConfigError, match=f"checkpoint_path.*{said}"),
        one.capture_activations(log, **options),
    ):
        pass
    assert not list(log.parent.iterdir())


def test_a_file_that_is_no_checkpoint_is_never_overwritten(log: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text('{"my": "data"}')
    with (
        pytest.raises(ActstoreError, match=r"notes\.json is no checkpoint"),
        capturing(sequential(), log, track_per_token=True, checkpoint_path=notes),
    ):
        pass
    assert notes.read_text() == '{"my": "data"}'


def test_a_checkpoint_of_another_run_is_moved_aside(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"version": 1, "total_tokens": 0, "tokens": []}')
    model = sequential()
    with (
        pytest.warns(ActstoreWarning, match="files of a log that is gone"),
        capturing(model, log, track_per_token=True, checkpoint_path=other),
    ):
        model(torch.ones(1, 8))
    assert (tmp_path / "other.1.json").read_text() == (
        '{"version": 1, "total_tokens": 0, "tokens": []}'
    )
    assert not other.exists()
