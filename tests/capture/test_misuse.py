"""Whatever is given, the error is ours and says what to do; the hooks are gone in the end."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import capturing, framework, hooks_of, quiet, read
from tiny_models import Each, sequential

import actstore
from actstore.capture.hooks import Hooks
from actstore.config import HookConfig, HookGranularity
from actstore.errors import ActstoreError, ActstoreWarning, CaptureError, ConfigError
from actstore.stream.reader import open_stream
from actstore.stream.writer import StreamWriter


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def _capture_nothing(model: Any, path: Any, **options: Any) -> None:
    one = framework()
    one.instrument_model(model)
    with one.capture_activations(path, **options):
        pytest.fail("the capture began")


# -- the output path ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "missing" / "gen.stream", "there is no folder.*create it"),
        (lambda folder: folder, "is a directory; give the name of a file"),
        (lambda _: "", "is a directory"),
        (lambda folder: folder / "text.txt", "no .stream log, and is not overwritten"),
        (lambda folder: folder / "text.txt" / "gen.stream", "there is no folder"),
        (lambda folder: folder / "pipe", "no plain file"),
        (lambda _: "/dev/null", "no plain file"),
        (lambda folder: folder / ("x" * 300), "can't be a file.*give another path"),
        (lambda folder: f"{folder}/a\0b", "null"),
        (lambda _: None, "must be a str or a path"),
        (lambda _: 5, "must be a str or a path"),
        (lambda _: b"gen.stream", "must be a str or a path"),
        (lambda _: ["gen.stream"], "must be a str or a path"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_an_impossible_output_path_is_refused_and_nothing_touched(
    make: Callable[[Path], Any], said: str, resume: bool, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("mine, and of more than eight bytes")
    os.mkfifo(tmp_path / "pipe")
    model = sequential()
    with pytest.raises(ConfigError, match=said):
        _capture_nothing(
            model, make(tmp_path), track_per_token=True, resume_from_checkpoint=resume
        )
    assert not hooks_of(model)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["pipe", "text.txt"]
    assert (tmp_path / "text.txt").read_text() == "mine, and of more than eight bytes"


@pytest.mark.parametrize("name", ["gen", "gen.tar.stream", ".stream", "a b%s{}é.stream", "x.zarr"])
def test_any_name_of_a_file_will_do(name: str, tmp_path: Path) -> None:
    model = sequential()
    for _ in range(2):
        path = tmp_path / name
        if path.exists():
            with pytest.warns(ActstoreWarning, match="held a log"), capturing(model, path):
                model(torch.ones(1, 8))
        else:
            with capturing(model, path, track_per_token=True):
                model(torch.ones(1, 8))
        assert len(read(path)) == 7
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_to_a_log_is_moved_aside_not_the_log(tmp_path: Path) -> None:
    model = sequential()
    with capturing(model, tmp_path / "real.stream"):
        model(torch.ones(1, 8))
    before = (tmp_path / "real.stream").read_bytes()
    (tmp_path / "link.stream").symlink_to("real.stream")
    with (
        pytest.warns(ActstoreWarning, match="held a log"),
        capturing(model, tmp_path / "link.stream"),
    ):
        model(torch.ones(2, 8))
    assert (tmp_path / "real.stream").read_bytes() == before
    assert (tmp_path / "link.1.stream").is_symlink()
    assert not (tmp_path / "link.stream").is_symlink()


def test_a_log_of_another_version_is_moved_aside_and_never_overwritten(log: Path) -> None:
    model = sequential()
    with capturing(model, log):
        model(torch.ones(1, 8))
    data = bytearray(log.read_bytes())
    data[7] = 77
    log.write_bytes(data)
    with pytest.raises(ActstoreError, match="version 77"):
        _capture_nothing(model, log, track_per_token=True, resume_from_checkpoint=True)
    assert log.read_bytes() == data
    with pytest.warns(ActstoreWarning, match="held a log"), capturing(model, log):
        model(torch.ones(1, 8))
    assert log.with_name("gen.1.stream").read_bytes() == data


# -- models -------------------------------------------------------------------------------------


def test_a_capture_without_a_model_is_refused(log: Path) -> None:
    with (
        pytest.raises(CaptureError, match=r"call instrument_model\(model\) first"),
        framework().capture_activations(log),
    ):
        pass
    assert not log.exists()


@pytest.mark.parametrize("model", [None, torch.nn.Linear, lambda x: x, "model", torch.ones(1)])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"wants a torch\.nn\.Module"):
        framework().instrument_model(model)


@pytest.mark.parametrize("hooks", [{"sampling_rate": 0.1}, "mlp", HookConfig])
def test_hooks_that_are_no_hook_config_are_refused(hooks: Any) -> None:
    with pytest.raises(ConfigError, match="HookConfig"):
        framework().instrument_model(sequential(), hooks)


def test_a_hook_config_of_another_granularity_is_refused() -> None:
    hooks = HookConfig(granularity=HookGranularity.MLP_ONLY)
    with pytest.raises(ConfigError, match=r"MLP_ONLY.*FULL_TENSOR"):
        framework().instrument_model(sequential(), hooks)


def test_a_hook_config_of_the_same_granularity_is_fine(log: Path) -> None:
    model = sequential()
    hooks = HookConfig(granularity=HookGranularity.FULL_TENSOR)
    with capturing(model, log, hooks=hooks):
        model(torch.ones(1, 8))
    assert len(read(log)) == 7


@pytest.mark.parametrize("name", ["", 5, b"a"])
def test_a_model_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="name"):
        framework().instrument_model(sequential(), name=name)


def test_two_models_of_one_name_are_refused(log: Path) -> None:
    one, first, second = framework(), sequential(), sequential()
    one.instrument_model(first, name="a")
    with pytest.raises(ConfigError, match="'a'"):
        one.instrument_model(second, name="a")
    one.instrument_model(first, name="a")
    one.instrument_model(first, name="model0")
    one.instrument_model(second)
    with one.capture_activations(log):
        first(torch.ones(1, 8))
        second(torch.ones(1, 8))
    with open_stream(log) as reader:
        assert len(reader.layers) == 14


def test_a_model_that_is_loaded_again_takes_the_place_of_the_one_that_is_gone(log: Path) -> None:
    one, model = framework(), sequential()
    for number in range(2):
        one.instrument_model(model)
        with one.capture_activations(log.with_name(f"{number}.stream")):
            model(torch.ones(1, 8))
        before = weakref.ref(model)
        model.itself = [model]  # as parts of models hold each other
        model = sequential()
    one.instrument_model(model)
    assert before() is None
    with one.capture_activations(log):
        model(torch.ones(1, 8))
    assert [each.layer for each in read(log)] == ["0", "1", "2", "3", "4", "5", ""]


def test_an_earlier_model_that_still_exists_is_named_with_what_to_do(log: Path) -> None:
    one, first, second = framework(), sequential(), sequential()
    one.instrument_model(first)
    one.instrument_model(second)
    with (
        pytest.warns(ActstoreWarning, match="no layer of 'model0', a Sequential, fired.*del"),
        one.capture_activations(log),
    ):
        second(torch.ones(1, 8))
    assert read(log)[0].layer == "model1.0"
    del first
    one.instrument_model(second)
    with one.capture_activations(log.with_name("other.stream")):
        second(torch.ones(1, 8))
    assert read(log.with_name("other.stream"))[0].layer == "0"


def test_a_framework_travels_with_its_models(log: Path) -> None:
    one, first, second = framework(), sequential(), sequential()
    one.instrument_model(first, name="a")
    one.instrument_model(second, name="b")
    other, *models = pickle.loads(pickle.dumps([one, first, second]))
    with other.capture_activations(log):
        for model in models:
            model(torch.ones(1, 8))
    assert {each.layer[0] for each in read(log)} == {"a", "b"}


def test_instrumenting_a_model_again_replaces_what_was_said(log: Path) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model, HookConfig(target_layers=["0"]))
    one.instrument_model(model, HookConfig(target_layers=["5"]))
    with one.capture_activations(log):
        model(torch.ones(1, 8))
    assert [each.layer for each in read(log)] == ["5"]


# -- one capture at a time ----------------------------------------------------------------------


def test_captures_do_not_nest(log: Path) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model)
    with one.capture_activations(log):
        with (
            pytest.raises(CaptureError, match="end it before"),
            one.capture_activations(log.with_name("other.stream")),
        ):
            pass
        with pytest.raises(CaptureError, match="before it begins"):
            one.instrument_model(sequential())
        model(torch.ones(1, 8))
    assert len(read(log)) == 7
    assert not log.with_name("other.stream").exists()
    with one.capture_activations(log.with_name("other.stream")):
        model(torch.ones(1, 8))


def test_a_model_is_captured_by_one_framework_at_a_time(log: Path) -> None:
    model, other = sequential(), log.with_name("other.stream")
    with capturing(model, log):
        with pytest.raises(CaptureError, match="already running"), capturing(model, other):
            pass
        with pytest.raises(CaptureError, match="already running"), capturing(model[0], other):
            pass
        model(torch.ones(1, 8))
    assert not other.exists()
    assert len(read(log)) == 7
    with capturing(model, other):
        model(torch.ones(1, 8))
    assert len(read(other)) == 7


def test_two_models_are_captured_at_once_into_two_logs(log: Path) -> None:
    first, second, other = sequential(), sequential(), log.with_name("other.stream")
    with capturing(first, log), capturing(second, other):
        first(torch.ones(1, 8))
        second(torch.ones(2, 8))
    assert [one.shape[0] for one in (*read(log), *read(other))] == [1] * 7 + [2] * 7


@pytest.mark.parametrize("resume", [False, True])
def test_a_log_has_one_writer_in_a_process(resume: bool, log: Path) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True):
        model(torch.ones(1, 8))
        with pytest.raises(
            ConfigError, match=r"gen\.stream is being written.*another output_path"
        ):
            _capture_nothing(
                sequential(), log, track_per_token=True, resume_from_checkpoint=resume
            )
        model(torch.ones(1, 8))
    assert len(read(log)) == 14


@pytest.mark.parametrize("resume", [False, True])
def test_a_log_has_one_writer_among_processes(resume: bool, log: Path) -> None:
    code = (
        "import sys, torch\n"
        "from actstore.config import *\n"
        "from actstore.errors import ConfigError\n"
        "from actstore.framework import InstrumentationFramework\n"
        "one = InstrumentationFramework(InstrumentationConfig(HookGranularity.FULL_TENSOR))\n"
        "one.instrument_model(torch.nn.Linear(2, 2))\n"
        "try:\n"
        f"    with one.capture_activations(sys.argv[1], True, None, None, {resume}): pass\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    root = str(Path(actstore.__file__).parents[1])
    model = sequential()
    with capturing(model, log):
        model(torch.ones(1, 8))
        done = subprocess.run(
            [sys.executable, "-c", code, str(log)],
            check=True,
            capture_output=True,
            text=True,
            cwd=root,
        )
        model(torch.ones(1, 8))
    assert "gen.stream is being written by another capture" in done.stdout
    assert len(read(log)) == 14


# -- failures -----------------------------------------------------------------------------------


def _failing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the disk be full after so many groups."""
    append, count = StreamWriter.append, [0]

    def failing(self: StreamWriter, *how: Any) -> None:
        count[0] += 1
        if count[0] > after:
            raise OSError(errno.ENOSPC, "no space left on device")
        append(self, *how)

    monkeypatch.setattr(StreamWriter, "append", failing)


def test_a_full_disk_surfaces_at_the_end_of_the_with(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(monkeypatch, after=1)
    model = sequential()
    with (
        pytest.raises(CaptureError, match=r"gen\.stream failed: .*no space left") as caught,
        capturing(model, log),
    ):
        model(torch.ones(1, 8))
    assert isinstance(caught.value.__cause__, OSError)
    assert not hooks_of(model)
    with open_stream(log) as reader:
        assert not reader.complete


def test_a_full_disk_surfaces_from_a_checkpoint_and_then_from_the_next_hook(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(monkeypatch, after=2)
    model = sequential()
    raised = []
    with (
        pytest.raises(CaptureError, match="no space left"),
        capturing(model, log, track_per_token=True, checkpoint_interval_tokens=1) as tracker,
    ):
        model(torch.ones(1, 8))
        tracker.record_token(1, "one")
        model(torch.ones(1, 8))
        for work in (
            lambda: tracker.record_token(2, "two"),
            lambda: model(torch.ones(1, 8)),
            lambda: tracker.record_token(3, "three"),
        ):
            with pytest.raises(CaptureError, match="no space left") as caught:
                work()
            raised.append(caught.value)
    assert len(raised) == 3
    assert not hooks_of(model)
    with open_stream(log) as reader:
        assert [one.token_id for one in reader.tokens] == [1]
        assert reader.packet_count == 7


def test_a_full_disk_does_not_hide_the_error_of_the_model(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(monkeypatch, after=1)
    model = sequential()
    with pytest.raises(ZeroDivisionError) as caught, capturing(model, log):
        model(torch.ones(1, 8))
        raise ZeroDivisionError
    assert "no space left" in "".join(caught.value.__notes__)
    assert not hooks_of(model)


def test_a_log_that_can_not_be_closed_is_a_capture_error(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "disk on fire")

    monkeypatch.setattr(StreamWriter, "finish", failing)
    model = sequential()
    with pytest.raises(CaptureError, match="disk on fire"), capturing(model, log):
        model(torch.ones(1, 8))
    with open_stream(log) as reader:
        assert (reader.complete, reader.packet_count) == (False, 7)


def test_a_log_that_can_not_be_begun_leaves_no_hooks_and_no_lock(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sequential()
    with monkeypatch.context() as patch:
        _failing(patch, after=0)
        with pytest.raises(CaptureError, match=r"gen\.stream can't begin: .*no space left"):
            _capture_nothing(model, log)
    assert not hooks_of(model)
    log.unlink()
    with capturing(model, log):
        model(torch.ones(1, 8))
    assert len(read(log)) == 7


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_whatever_ends_the_with_the_hooks_are_gone_and_the_log_is_whole(
    error: BaseException, log: Path
) -> None:
    model = sequential()
    wanted = model(torch.ones(1, 8))
    with pytest.raises(type(error)), capturing(model, log):
        model(torch.ones(1, 8))
        assert hooks_of(model)
        raise error
    assert not hooks_of(model)
    assert torch.equal(model(torch.ones(1, 8)), wanted)
    assert len(read(log)) == 7
    with open_stream(log) as reader:
        assert reader.summary["ended_by"] == type(error).__name__


def test_an_interrupt_while_the_log_is_closed_lets_the_writer_end_first(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its next write goes to whatever file has the number of the log's descriptor by then."""
    left, was_left, writev = threading.Event(), [], os.writev

    def writing(descriptor: int, buffers: Any) -> int:
        for one in threading.enumerate():
            if one.name == "actstore-encode":
                one.join()  # so that the writer is what the end of the capture waits for
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        was_left.append(left.wait(0.5))  # what holds, holds for ever; half a second finds it out
        return writev(descriptor, buffers)

    def handler(*_: object) -> None:
        raise ZeroDivisionError

    before, model = signal.signal(signal.SIGALRM, handler), sequential()
    try:
        with pytest.raises(ZeroDivisionError), capturing(model, log):
            model(torch.ones(1, 8))
            monkeypatch.setattr(os, "writev", writing)
        left.set()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert was_left == [False]
    with open_stream(log) as reader:
        assert (reader.packet_count, reader.complete) == (7, False)


def test_an_interrupt_while_hooks_are_taken_away_is_not_hidden(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, honest = sequential(), Hooks._remove

    def interrupted(self: Hooks) -> None:
        monkeypatch.setattr(Hooks, "_remove", honest)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capturing(model, log):
        model[0](torch.ones(1, 8))  # opens a pass that nothing closes
        monkeypatch.setattr(Hooks, "_remove", interrupted)
    assert not hooks_of(model)
    with open_stream(log) as reader:
        assert reader.packet_count == 1


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _seen(*_: Any) -> None:
    """Be a hook that can be pickled."""


@pytest.mark.parametrize(
    "how", [copy.deepcopy, _saved, lambda one: pickle.loads(pickle.dumps(one))]
)
@pytest.mark.parametrize("stop", [False, True])
def test_a_copy_of_a_model_that_is_captured_is_a_model_without_hooks_of_ours(
    how: Callable[[Any], Any], stop: bool, log: Path
) -> None:
    model = sequential()
    handle = model[0].register_forward_hook(_seen)
    hooks = HookConfig(stop_after_last_layer=stop, target_layers=["0", "1"])
    wanted = model(torch.ones(1, 8))
    with capturing(model, log, hooks=hooks):
        model(torch.ones(1, 8))
        other, part = how(model), how(model[0])
        assert torch.equal(other(torch.ones(1, 8)), wanted)
        assert part(torch.ones(1, 8)).shape == (1, 16)
        with torch.no_grad():
            other[0].weight.zero_()
        assert not torch.equal(other(torch.ones(1, 8)), wanted)  # its own forward, not ours
        model(torch.ones(1, 8))
    assert [one.layer for one in read(log)] == ["0", "1"] * 2
    assert hooks_of(other) == hooks_of(model) == ["0"]
    assert list(part._forward_hooks.values()) == [_seen]
    assert {"forward", "__reduce_ex__"}.isdisjoint({*vars(other), *vars(other[0]), *vars(model)})
    handle.remove()


def test_hooks_of_others_stay_where_they_are(log: Path) -> None:
    model, seen = sequential(), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    with capturing(model, log):
        model(torch.ones(1, 8))
    model(torch.ones(1, 8))
    assert len(seen) == 2
    assert list(model[0]._forward_hooks) == [handle.id]


def test_a_hook_that_replaces_an_output_is_seen(log: Path) -> None:
    model = Each(one=lambda x: x, two=lambda x: x)
    model.get_submodule("one").register_forward_hook(lambda *_: torch.full((2,), 7.0))
    with capturing(model, log):
        model(torch.ones(1))
    assert read(log)[0].values.tolist() == [7.0, 7.0]


def test_a_capture_in_which_nothing_fires_is_warned_of(log: Path) -> None:
    one = framework()
    one.instrument_model(sequential())
    with pytest.warns(ActstoreWarning, match="no layer fired"), one.capture_activations(log):
        pass
    assert read(log) == []
    assert one.summary["packets"] == 0


def test_the_summary_counts_what_the_log_holds(log: Path) -> None:
    one, model = framework(), sequential()
    one.instrument_model(model)
    assert dict(one.summary) == {}
    with one.capture_activations(log, track_per_token=True) as tracker:
        model(torch.ones(2, 8))
        tracker.record_token(1, "one")
        model(torch.ones(2, 8))
    found = one.analyze_activations(log)
    assert one.summary["packets"] == found["packets"] == 14
    assert one.summary["passes"] == found["passes"] == 2
    assert one.summary["tokens"] == found["tokens"] == 1
    assert one.summary["raw_bytes"] == found["total_raw_bytes"]
    assert one.summary["encoded_bytes"] == found["total_compressed_bytes"]
    assert found["summary"] == dict(one.summary)
