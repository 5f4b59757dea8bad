"""A resumed run equals one that was never interrupted; what can't be resumed is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import capturing, quiet
from refeed import Model, run
from tiny_models import sequential

from actstore.capture import stage
from actstore.config import HookConfig, HookGranularity
from actstore.errors import ActstoreError, ActstoreWarning, ConfigError, StreamCorruptError
from actstore.stream.reader import open_stream

STEPS = 9


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def contents(log: Path) -> dict[str, Any]:
    """Give all that a run's log says, but for times."""
    with open_stream(log) as reader:
        return {
            "packets": [
                (one.seq, one.layer, one.pass_index, one.call, one.shape, one.values.tobytes())
                for one in reader.packets()
            ],
            "passes": [
                (
                    one.index,
                    one.entry,
                    one.aborted,
                    [
                        (a.token_ids.tolist(), a.positions.tolist(), a.mask.tolist())
                        for a in one.axes
                    ],
                )
                for one in reader.passes
            ],
            "tokens": [
                (one.step, one.token_id, one.token_text, one.position, one.pass_index)
                for one in reader.tokens
            ],
            "layers": {name: (one.site, one.block) for name, one in reader.layers.items()},
            "features": {width: kept.tolist() for width, kept in reader.features.items()},
        }


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the log of a run that was not interrupted."""
    log = tmp_path_factory.mktemp("whole") / "gen.stream"
    torch.set_num_threads(1)
    with quiet():
        run(log, STEPS)
    return log


class StopError(Exception):
    """Ends a run where a test wants it to end."""


def stopped(log: Path, at: str, steps: int = STEPS, **how: Any) -> None:
    """Run until a line is said."""

    def said(line: str) -> None:
        if line == at:
            raise StopError

    with pytest.raises(StopError):
        run(log, steps, said=said, **how)


def _checkpoint(log: Path) -> Path:
    return log.with_name(log.name + ".ckpt.json")


def _assert_resumed(log: Path, whole: Path, **how: Any) -> None:
    tokens = run(log, STEPS, resume=True, **how)
    found, wanted = contents(log), contents(whole)
    assert found == wanted
    assert [one["token_id"] for one in tokens] == [one[1] for one in wanted["tokens"]]
    table = json.loads(log.with_name(log.name + "_tokens.json").read_text())
    assert table["tokens"] == tokens
    assert table["total_tokens"] == STEPS
    assert not _checkpoint(log).exists()
    with open_stream(log) as reader:
        assert reader.complete


# -- what is there ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at", ["forward", "block 1", "recording", "recorded 1", "recorded 5", "recorded 8"]
)
def test_a_run_that_raised_resumes_to_the_same_log(at: str, log: Path, whole: Path) -> None:
    stopped(log, at)
    _assert_resumed(log, whole)


def test_a_run_is_resumed_as_often_as_it_takes(log: Path, whole: Path) -> None:
    for count in (2, 3, 5, 8):
        stopped(log, f"recorded {count}", resume=count > 2)
        state = json.loads(_checkpoint(log).read_text())
        assert state["metadata"]["resume_count"] == (2, 3, 5, 8).index(count)
        assert state["total_tokens"] == count
    _assert_resumed(log, whole)


def test_a_finished_log_is_gone_on_with(log: Path, whole: Path) -> None:
    run(log, 5)
    assert not _checkpoint(log).exists()
    _assert_resumed(log, whole)


def test_a_finished_log_may_be_resumed_for_nothing(log: Path, whole: Path) -> None:
    run(log, STEPS)
    _assert_resumed(log, whole)


def test_with_neither_log_nor_checkpoint_a_run_begins(log: Path, whole: Path) -> None:
    _assert_resumed(log, whole)


def test_an_empty_file_is_no_run_yet(log: Path, whole: Path) -> None:
    log.touch()
    _assert_resumed(log, whole)


def test_only_a_log_is_enough(log: Path, whole: Path) -> None:
    stopped(log, "recorded 5")
    _checkpoint(log).unlink()
    log.with_name("gen.stream_tokens.json").unlink()
    _assert_resumed(log, whole)


def test_only_a_checkpoint_gives_its_tokens_and_a_warning(log: Path, whole: Path) -> None:
    stopped(log, "recorded 4")
    log.unlink()
    with pytest.warns(
        ActstoreWarning, match=r"has 4 tokens, but there is no log at .*gen\.stream"
    ):
        tokens = run(log, STEPS, resume=True)
    wanted = contents(whole)
    assert [one["token_id"] for one in tokens] == [one[1] for one in wanted["tokens"]]
    assert [one["step"] for one in tokens] == list(range(STEPS))
    with open_stream(log) as reader:
        assert [one.token_id for one in reader.tokens] == [one["token_id"] for one in tokens]
        assert [one.pass_index for one in reader.tokens] == [-1] * 4 + list(range(5))
        wanted_values = [one[-1] for one in wanted["packets"] if one[2] >= 4]
        assert [one.values.tobytes() for one in reader.packets()] == wanted_values


def test_the_tokens_of_a_lost_log_survive_another_kill(log: Path) -> None:
    stopped(log, "recorded 4")
    log.unlink()
    with pytest.warns(ActstoreWarning, match="no log"):
        stopped(log, "recorded 6", resume=True, interval=None)
    _checkpoint(log).unlink()
    tokens = run(log, STEPS, resume=True)
    assert [one["step"] for one in tokens] == list(range(STEPS))


def test_an_older_checkpoint_is_outdone_by_the_log(log: Path, whole: Path) -> None:
    stopped(log, "recorded 4")
    old = _checkpoint(log).read_bytes()
    stopped(log, "recorded 7", resume=True)
    _checkpoint(log).write_bytes(old)
    _assert_resumed(log, whole)


def test_a_newer_checkpoint_is_outdone_by_the_log_with_a_warning(log: Path, whole: Path) -> None:
    stopped(log, "recorded 4")
    shutil.copy(log, log.with_name("old"))
    stopped(log, "recorded 7", resume=True)
    shutil.move(log.with_name("old"), log)
    with pytest.warns(ActstoreWarning, match="has 7 tokens.*the log is what counts"):
        _assert_resumed(log, whole)


def test_a_token_table_from_before_a_resume_is_not_taken_for_the_runs(log: Path) -> None:
    from oracle import framework

    from actstore.framework import analyze_activations_with_tokens

    run(log, 3)
    table = log.with_name("gen.stream_tokens.json")
    old = table.read_bytes()
    stopped(log, "recorded 5", resume=True)
    table.write_bytes(old)
    found = analyze_activations_with_tokens(log, framework())
    assert found["token_metadata"]["total_tokens"] == found["tokens"] == 5
    assert len(found["token_metadata"]["tokens"]) == len(found["per_token"]) == 5


# -- torn logs ----------------------------------------------------------------------------------


def _lengths(whole: Path) -> list[int]:
    with open_stream(whole) as reader:
        ends = [group.end for group in reader.scan.groups]
        first = reader.scan.groups[0]
    size = whole.stat().st_size
    chosen = random.Random(0).sample(range(first.end, size), 25)
    near = [end + by for end in ends for by in (-1, 0, 1)]
    return sorted({*near, *chosen, first.offset, first.offset + 45, 8, 9, 100, size - 1} - {size})


def test_a_log_cut_anywhere_resumes_to_the_same_log(tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    for length in _lengths(whole):
        log = tmp_path / f"{length}.stream"
        log.write_bytes(data[:length])
        _assert_resumed(log, whole)


def test_what_is_cut_away_is_kept_beside_the_log(log: Path, whole: Path) -> None:
    data = whole.read_bytes()
    with open_stream(whole) as reader:
        last = max(group.end for group in reader.scan.groups[:-1] if group.commit.step_boundary)
    log.write_bytes(data[: last + 1000])
    _assert_resumed(log, whole)
    (kept,) = [one for one in log.parent.iterdir() if ".cut" in one.name]
    assert kept.read_bytes() == data[last : last + 1000]


def test_a_log_that_ends_at_a_whole_step_leaves_nothing_beside_it(log: Path, whole: Path) -> None:
    stopped(log, "recorded 4")
    _assert_resumed(log, whole)
    assert not [one for one in log.parent.iterdir() if ".cut" in one.name]


@pytest.mark.parametrize("closed", [True, False])
def test_a_log_whose_frames_are_damaged_is_refused_and_left_as_it_is(
    closed: bool, log: Path, whole: Path
) -> None:
    data = bytearray(whole.read_bytes())
    with open_stream(whole) as reader:
        groups = reader.scan.groups
    data[groups[1].offset + 45] ^= 1
    log.write_bytes(data if closed else data[: groups[-2].end])
    before = log.read_bytes()
    with pytest.raises(StreamCorruptError, match=r"gen\.stream is damaged at byte \d+"):
        run(log, STEPS, resume=True)
    assert log.read_bytes() == before


def test_a_log_with_a_damaged_payload_can_be_gone_on_with_and_says_so_when_read(
    log: Path, whole: Path
) -> None:
    data = bytearray(whole.read_bytes())
    with open_stream(whole) as reader:
        place = reader.table.blocks[5].entry
    data[place.payload_offset] ^= 1
    log.write_bytes(data)
    run(log, STEPS + 1, resume=True)
    with open_stream(log) as reader, pytest.raises(StreamCorruptError) as caught:
        list(reader.packets())
    assert caught.value.offset == place.offset
    with open_stream(log, errors="skip") as reader:
        kept = len(list(reader.packets()))
        assert 0 < kept < reader.packet_count


def test_a_log_that_a_power_cut_tore_is_resumed_before_the_damage_with_a_warning(
    log: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "FLUSH_SECONDS", 0.0)  # a group a token, and no sync but the first
    run(log, STEPS, interval=None)
    with open_stream(log) as reader:
        groups = reader.scan.groups
        struck = reader.table.blocks[-30].entry
    before = max(one.end for one in groups if one.end <= struck.offset)
    data = bytearray(log.read_bytes()[: groups[-1].end])
    data[struck.payload_offset : struck.end] = bytes(struck.payload_length)
    log.write_bytes(data)
    with pytest.warns(ActstoreWarning, match=rf"damaged from byte {struck.offset} on, as a power"):
        _assert_resumed(log, whole, interval=None)
    (kept,) = [one for one in log.parent.iterdir() if ".cut" in one.name]
    assert kept.read_bytes() == data[before:]


# -- another run --------------------------------------------------------------------------------


def _other_class() -> Model:
    class Other(Model):
        pass

    return Other()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"model": Model(blocks=2)}, "parameters"),
        ({"model": _other_class()}, "class: the log has 'Model', this capture 'Other'"),
        ({"granularity": HookGranularity.MLP_ONLY}, "granularity.*FULL_TENSOR.*MLP_ONLY"),
        ({"hooks": HookConfig(sampling_seed=1)}, "sampling_seed: the log has 0"),
        ({"hooks": HookConfig(sampling_rate=0.2)}, "sampling_rate"),
        ({"hooks": HookConfig(target_layers=["*mlp"])}, "target_layers"),
    ],
)
def test_another_run_is_refused_and_the_log_left_as_it_is(
    how: dict[str, Any], said: str, log: Path, whole: Path
) -> None:
    stopped(log, "recorded 5")
    before = log.read_bytes()
    with pytest.raises(ConfigError, match=rf"gen\.stream can't be resumed.*{said}"):
        run(log, STEPS, resume=True, **how)
    assert log.read_bytes() == before
    _assert_resumed(log, whole)


def test_another_config_of_a_hugging_face_model_is_refused(log: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(theta: float) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            rms_norm_eps=theta,
        )
        return LlamaForCausalLM(config).eval()

    options = {"track_per_token": True, "resume_from_checkpoint": True}
    for theta in (1e-5, 1e-5):
        with capturing(one := model(theta), log, **options), torch.no_grad():
            one(torch.tensor([[1, 2]]))
    with (
        pytest.raises(ConfigError, match="config rms_norm_eps: the log has 1e-05"),
        capturing(model(1e-6), log, **options),
    ):
        pass


def test_a_log_without_tracking_is_not_resumed(log: Path) -> None:
    model = sequential()
    with capturing(model, log):
        model(torch.ones(1, 8))
    options = {"track_per_token": True, "resume_from_checkpoint": True}
    with (
        pytest.raises(ConfigError, match=r"gen\.stream was captured without track_per_token"),
        capturing(model, log, **options),
    ):
        pass


def test_another_codec_goes_on_in_the_same_log(log: Path, whole: Path) -> None:
    stopped(log, "recorded 3", codec="none")
    stopped(log, "recorded 6", codec="lz4", resume=True)
    _assert_resumed(log, whole, codec="zstd")


def test_a_sampled_run_goes_on_with_the_same_features(log: Path) -> None:
    how = {
        "granularity": HookGranularity.SAMPLED_SLICES,
        "hooks": HookConfig(sampling_rate=0.25, sampling_seed=9),
    }
    reference = log.with_name("reference.stream")
    run(reference, STEPS, **how)
    stopped(log, "recorded 4", **how)
    _assert_resumed(log, reference, **how)
    assert contents(log)["features"]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "null",
            '{"version": 2}',
            '{"version": 1}',
            '{"version": 1, "tokens": 3}',
        ),
        '{"version": 1, "tokens": {"a": 1}}',
        '{"version": 1, "tokens": [], "metadata": {"resume_count": -5}}',
        '{"version": 1, "tokens": [], "metadata": {"resume_count": Infinity}}',
        '{"version": 1, "tokens": [], "metadata": {"start_time": NaN}}',
        '{"version": 1, "tokens": [{"token_index": 0, "token_id": 1e999, "token_text": ""}]}',
        '{"version": 1, "tokens": [{"token_index": 0, "token_id": 1e30, "token_text": ""}]}',
    ],
)
def test_a_checkpoint_that_is_none_is_refused_by_name(text: str, log: Path, whole: Path) -> None:
    stopped(log, "recorded 5")
    before = log.read_bytes()
    _checkpoint(log).write_text(text)
    with pytest.raises(ActstoreError, match=r"gen\.stream\.ckpt\.json"):
        run(log, STEPS, resume=True)
    assert log.read_bytes() == before
    _checkpoint(log).unlink()
    _assert_resumed(log, whole)


def test_resumes_are_counted_also_after_clean_ends(log: Path) -> None:
    counts = []
    for steps in (2, 4, 6):
        run(log, steps, resume=steps > 2)
        counts.append(json.loads(Path(f"{log}_tokens.json").read_text())["resume_count"])
    assert counts == [0, 1, 2]


# -- not resumed --------------------------------------------------------------------------------


def test_a_finished_log_is_moved_aside_with_its_files(log: Path, whole: Path) -> None:
    run(log, 2)
    first = log.read_bytes()
    with pytest.warns(ActstoreWarning, match=r"gen\.stream held a log.*gen\.1\.stream"):
        stopped(log, "recorded 5")
    with pytest.warns(ActstoreWarning, match=r"gen\.2\.stream"):
        run(log, STEPS)
    assert log.with_name("gen.1.stream").read_bytes() == first
    assert {one.name for one in log.parent.iterdir()} == {
        "gen.stream",
        "gen.stream_tokens.json",
        "gen.1.stream",
        "gen.1.stream_tokens.json",
        "gen.2.stream",
        "gen.2.stream_tokens.json",
        "gen.2.stream.ckpt.json",
    }
    assert contents(log) == contents(whole)
    assert len(contents(log.with_name("gen.2.stream"))["tokens"]) == 5


def test_a_log_moved_aside_can_be_resumed_there(log: Path, whole: Path) -> None:
    stopped(log, "recorded 5")
    with pytest.warns(ActstoreWarning, match="held a log"):
        run(log, 1)
    _assert_resumed(log.with_name("gen.1.stream"), whole)


def test_values_read_while_the_run_goes_on_are_those_of_the_end(log: Path) -> None:
    seen: list[np.ndarray] = []

    def said(line: str) -> None:
        if line == "recorded 4":
            with open_stream(log) as reader:
                assert not reader.complete
                seen.extend(one.values for one in reader.packets())

    run(log, STEPS, interval=4, said=said)
    with open_stream(log) as reader:
        assert len(seen) == 4 * 12
        for early, late in zip(seen, reader.packets(), strict=False):
            assert early.tobytes() == late.values.tobytes()
