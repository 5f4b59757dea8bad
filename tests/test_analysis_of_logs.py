"""``analyze_activations``: counts and bytes are exact, and tokens have true boundaries."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import ActstoreError, FormatError, MissingFileError, StreamCorruptError
from actstore.framework import InstrumentationFramework, analyze_activations_with_tokens
from actstore.stream.reader import open_stream

torch = pytest.importorskip("torch")

CODECS = ["none", "lz4", "zstd"]


def _model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(50, 64),
        torch.nn.Linear(64, 300),
        torch.nn.ReLU(),
        torch.nn.Identity(),
        torch.nn.Linear(300, 7),
    )


def _framework(codec: str = "lz4", **how: Any) -> InstrumentationFramework:
    granularity = how.pop("granularity", HookGranularity.FULL_TENSOR)
    return InstrumentationFramework(InstrumentationConfig(granularity, codec, **how))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Give the path of a log that is not there yet."""
    return tmp_path / "gen.stream"


def _generated(log: Path, codec: str = "lz4", **how: Any) -> InstrumentationFramework:
    """Capture: one pass for the first token, two for the second, none for the third, one more."""
    framework, model = _framework(codec, **how), _model()
    framework.instrument_model(model, HookConfig(sampling_rate=0.3))
    with framework.capture_activations(log, track_per_token=True) as tracker:
        for length in (5, 1, 2):
            model(torch.arange(length)[None])
            if length != 1:
                tracker.record_token(length, f"of {length}")
        tracker.record_token(9, "at once", position=77)
        model(torch.arange(3)[None])
    return framework


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "granularity", [HookGranularity.FULL_TENSOR, HookGranularity.SAMPLED_SLICES]
)
def test_sums_over_layers_and_tokens_are_exact(
    codec: str, granularity: HookGranularity, log: Path
) -> None:
    framework = _generated(log, codec, granularity=granularity)
    found = analyze_activations_with_tokens(log, framework)
    layers = found["per_layer"].values()
    assert sum(one["bytes"] for one in layers) == found["total_compressed_bytes"]
    assert sum(one["raw_bytes"] for one in layers) == found["total_raw_bytes"]
    assert sum(one["count"] for one in layers) == found["packets"]
    with open_stream(log) as reader:
        rest = reader.table.pass_index > max(one.pass_index for one in reader.tokens)
        after = int(reader.table.encoded[rest].sum())
        payload = sum(place.entry.payload_length for place in reader.table.blocks)
    assert rest.any()
    assert sum(one["bytes"] for one in found["per_token"]) + after == payload
    assert payload == found["total_compressed_bytes"]


def test_counts_and_raw_bytes_are_those_of_the_packets(log: Path) -> None:
    framework = _generated(log, "zstd")
    found = framework.analyze_activations(str(log))
    counts, raw, shapes = Counter[str](), Counter[str](), {}
    with open_stream(log) as reader:
        for packet in reader.packets():
            counts[packet.layer] += 1
            raw[packet.layer] += packet.values.nbytes
            shapes.setdefault(packet.layer, set()).add(packet.shape)
    assert {name: one["count"] for name, one in found["per_layer"].items()} == counts
    for name, one in found["per_layer"].items():
        alias = name in ("", "3")
        assert one["raw_bytes"] == (0 if alias else raw[name])
        assert one["aliases"] == (counts[name] if alias else 0)
        assert {tuple(shape) for shape in one["shapes"]} == shapes[name]
        assert one["dtypes"] == ["float32"]
    assert found["packets"] == counts.total()
    assert found["passes"] == 4
    assert found["tokens"] == 3
    assert found["dtypes"] == ["float32"]
    assert found["compression"] == "zstd"
    assert found["stream_path"] == str(log)
    assert found["complete"] is True
    assert found["file_bytes"] == log.stat().st_size
    ratio = found["total_raw_bytes"] / found["total_compressed_bytes"]
    assert found["compression_ratio"] == ratio
    json.dumps(found)


def test_without_a_codec_encoded_bytes_are_the_raw_ones(log: Path) -> None:
    found = _generated(log, "none").analyze_activations(log)
    assert found["total_compressed_bytes"] == found["total_raw_bytes"]
    assert found["compression_ratio"] == 1.0
    for one in found["per_layer"].values():
        assert one["bytes"] == one["raw_bytes"]


def test_tokens_have_the_passes_since_the_one_before(log: Path) -> None:
    framework = _generated(log, "none")
    found = analyze_activations_with_tokens(log, framework)
    per_token = found["per_token"]
    assert [one["passes"] for one in per_token] == [[0], [1, 2], []]
    assert [one["token_index"] for one in per_token] == [0, 1, 77]
    assert [one["token_text"] for one in per_token] == ["of 5", "of 2", "at once"]
    assert [one["packets"] for one in per_token] == [6, 12, 0]
    bytes_of_a_row = 4 * (64 + 300 + 300 + 7)
    assert [one["raw_bytes"] for one in per_token] == [5 * bytes_of_a_row, 3 * bytes_of_a_row, 0]
    assert [one["bytes"] for one in per_token] == [one["raw_bytes"] for one in per_token]
    assert found["packets_per_token"] == 24 / 3
    assert found["bytes_per_token"] == found["total_compressed_bytes"] / 3


def test_analysis_holds_all_that_the_simpler_one_does(log: Path) -> None:
    framework = _generated(log)
    plain = framework.analyze_activations(log)
    full = analyze_activations_with_tokens(log, framework)
    assert {name: full[name] for name in plain} == plain
    assert set(full) - set(plain) == {
        "token_metadata",
        "packets_per_token",
        "bytes_per_token",
        "per_token",
    }


@pytest.mark.parametrize("name", ["gen.stream_tokens.json", "gen_tokens.json"])
def test_the_token_table_beside_the_log_is_found_by_either_name(name: str, log: Path) -> None:
    framework = _generated(log)
    table = json.loads(log.with_name("gen.stream_tokens.json").read_text())
    log.with_name("gen.stream_tokens.json").unlink()
    table["mark"] = name
    log.with_name(name).write_text(json.dumps(table))
    assert analyze_activations_with_tokens(log, framework)["token_metadata"] == table


def test_the_documented_name_comes_before_the_older_one(log: Path) -> None:
    framework = _generated(log)
    table = json.loads(log.with_name("gen.stream_tokens.json").read_text())
    log.with_name("gen_tokens.json").write_text(json.dumps(table | {"tokens": []}))
    found = analyze_activations_with_tokens(log, framework)
    assert len(found["token_metadata"]["tokens"]) == 3


def test_without_a_table_the_log_alone_is_enough(log: Path) -> None:
    framework = _generated(log)
    sidecar = log.with_name("gen.stream_tokens.json")
    table = json.loads(sidecar.read_text())
    with_table = analyze_activations_with_tokens(log, framework)
    sidecar.unlink()
    found = analyze_activations_with_tokens(log, framework)
    assert found["token_metadata"]["tokens"] == table["tokens"]
    assert found["token_metadata"]["total_tokens"] == 3
    assert found["per_token"] == with_table["per_token"]


def test_a_log_without_tokens_has_no_token_keys(log: Path) -> None:
    framework, model = _framework(), _model()
    framework.instrument_model(model)
    with framework.capture_activations(log):
        model(torch.ones(1, 2, dtype=torch.long))
    assert analyze_activations_with_tokens(log, framework) == framework.analyze_activations(log)


def test_a_tracked_log_without_packets_or_tokens_divides_by_nothing(log: Path) -> None:
    framework = _framework()
    framework.instrument_model(_model())
    with (
        pytest.warns(UserWarning, match="no layer fired"),
        framework.capture_activations(log, track_per_token=True),
    ):
        pass
    found = analyze_activations_with_tokens(log, framework)
    assert found["token_metadata"]["total_tokens"] == 0
    assert found["per_token"] == []
    assert found["packets"] == found["total_compressed_bytes"] == 0
    assert found["compression_ratio"] == 1.0
    assert found["per_layer"] == {}


def test_the_run_s_own_figures_are_those_of_its_end(log: Path) -> None:
    framework = _generated(log)
    found = framework.analyze_activations(log)
    for name in ("duration_seconds", "sustained_gbps", "waited_seconds"):
        assert found[name] == framework.summary[name]


def test_a_log_that_was_not_closed_is_analysed_as_far_as_it_goes(log: Path) -> None:
    framework = _generated(log)
    whole = framework.analyze_activations(log)
    with open_stream(log) as reader:
        end = reader.scan.groups[-1].end
    log.write_bytes(log.read_bytes()[:end])
    found = framework.analyze_activations(log)
    assert found["complete"] is False
    assert found["duration_seconds"] is found["sustained_gbps"] is found["waited_seconds"] is None
    for name in ("packets", "per_layer", "total_compressed_bytes", "passes", "tokens"):
        assert found[name] == whole[name]


def test_a_pass_that_was_aborted_counts_for_the_token_after_it(log: Path) -> None:
    framework, model = _framework("none"), _model()
    framework.instrument_model(model)
    with framework.capture_activations(log, track_per_token=True) as tracker:
        with pytest.raises(IndexError):
            model(torch.tensor([[51]]))
        model(torch.tensor([[1]]))
        tracker.record_token(1, "one")
    (token,) = analyze_activations_with_tokens(log, framework)["per_token"]
    assert token["passes"] == [0, 1]
    assert token["packets"] == 6


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda folder: folder / "missing.stream", MissingFileError),
        (lambda folder: folder / "text.txt", FormatError),
        (lambda folder: folder / "empty.stream", FormatError),
        (lambda folder: folder, ActstoreError),
        (lambda _: None, ActstoreError),
    ],
)
def test_what_is_no_log_is_refused_by_name(make: Any, error: type, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("not a log, whatever else")
    (tmp_path / "empty.stream").touch()
    path = make(tmp_path)
    with pytest.raises(error) as caught:
        _framework().analyze_activations(path)
    assert str(path) in str(caught.value)
    with pytest.raises(error):
        analyze_activations_with_tokens(path, _framework())


def test_a_damaged_log_is_an_error_with_the_place(log: Path) -> None:
    framework = _generated(log)
    with open_stream(log) as reader:
        place = reader.scan.groups[-1].entries[0].offset
        end = reader.scan.groups[-1].end
    data = bytearray(log.read_bytes()[:end])
    data[place + 41] ^= 1
    log.write_bytes(data)
    with pytest.raises(StreamCorruptError) as caught:
        framework.analyze_activations(log)
    assert caught.value.offset == place


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"tokens": 3, "total_tokens": 1}',
        '{"tokens": [], "total_tokens": 3}',
        "\0",
    ],
)
def test_a_token_table_that_is_none_or_another_run_s_is_not_believed(text: str, log: Path) -> None:
    framework = _generated(log)
    wanted = analyze_activations_with_tokens(log, framework)["token_metadata"]
    log.with_name("gen.stream_tokens.json").write_text(text)
    found = analyze_activations_with_tokens(log, framework)["token_metadata"]
    assert found["tokens"] == wanted["tokens"]
    assert found["total_tokens"] == wanted["total_tokens"]


def test_a_log_without_tracking_takes_no_tokens_from_a_table_that_lies_there(log: Path) -> None:
    framework = _generated(log)
    sidecar = log.with_name("gen.stream_tokens.json")
    before = sidecar.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with framework.capture_activations(log):
            pass
    sidecar.write_bytes(before)
    assert "token_metadata" not in analyze_activations_with_tokens(log, framework)
