"""The JSON Schemas: what captures and archives write is valid, and what is wrong is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

import actstore
from actstore import dtypes
from actstore.archive import shards
from actstore.archive.adding import add_arrays
from actstore.archive.coordinates import Coordinate
from actstore.compaction import compact
from actstore.config import HookConfig, HookGranularity
from actstore.stream.reader import open_stream

sys.path.insert(0, str(Path(__file__).parent / "capture"))
sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log
from oracle import capturing, framework, quiet
from refeed import run
from tiny_models import build, sequential, token_ids

FILES = sorted((Path(__file__).parents[1] / "schemas").glob("*.schema.json"))
SCHEMAS = {path.name.removesuffix(".schema.json"): json.loads(path.read_bytes()) for path in FILES}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Give the path of a log that is not there yet."""
    return tmp_path / "gen.stream"


def check(name: str, found: Any, part: str | None = None) -> None:
    """Validate against a schema, or a part of one."""
    schema = SCHEMAS[name]
    if part is not None:
        schema = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}
    Draft202012Validator(schema).validate(found)


def table(log: Path) -> dict[str, Any]:
    return json.loads(log.with_name(f"{log.name}_tokens.json").read_bytes())


def checkpoint(log: Path) -> dict[str, Any]:
    return json.loads(log.with_name(f"{log.name}.ckpt.json").read_bytes())


def header(log: Path) -> dict[str, Any]:
    with open_stream(log) as reader:
        return dict(reader.header)


def nodes(archive: Path) -> dict[str, dict[str, Any]]:
    """Give the attributes of every array of an archive."""
    found = json.loads((archive / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]
    return {
        name: node["attributes"] for name, node in found.items() if node["node_type"] == "array"
    }


def attributes(archive: Path) -> dict[str, Any]:
    return json.loads((archive / "zarr.json").read_bytes())["attributes"]


# -- the schemas --------------------------------------------------------------------------------


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Give every schema in a schema that names members."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield schema
        for one in schema.values():
            yield from objects(one)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_a_schema_that_requires_only_what_it_describes(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    for one in objects(SCHEMAS[name]):
        assert set(one.get("required", ())) <= one["properties"].keys()


def test_each_schema_has_an_id_of_its_own() -> None:
    assert SCHEMAS.keys() == {"archive", "checkpoint", "header", "segments", "tokens"}
    assert len({one["$id"] for one in SCHEMAS.values()}) == len(SCHEMAS)


def test_a_token_is_the_same_in_the_table_and_in_the_checkpoint() -> None:
    assert SCHEMAS["tokens"]["$defs"] == SCHEMAS["checkpoint"]["$defs"]


def test_the_dtypes_of_an_archive_are_those_of_the_log() -> None:
    assert set(SCHEMAS["archive"]["$defs"]["dtype"]["enum"]) == dtypes.BY_NAME.keys()


@pytest.mark.parametrize(
    ("schema", "promised"),
    [
        (SCHEMAS["tokens"], {"total_tokens", "tokens", "capture_duration_seconds"}),
        (SCHEMAS["tokens"]["$defs"]["token"], {"token_index", "token_id", "token_text"}),
        (
            SCHEMAS["checkpoint"],
            {"version", "total_tokens", "last_checkpoint_time", "metadata", "tokens"},
        ),
        (
            SCHEMAS["checkpoint"]["properties"]["metadata"],
            {"start_time", "resume_count", "updated_at"},
        ),
        (
            SCHEMAS["archive"]["properties"]["analysis"],
            {"packets", "total_compressed_bytes", "per_layer"},
        ),
    ],
    ids=["tokens", "token", "checkpoint", "metadata", "analysis"],
)
def test_what_the_documentation_promises_by_name_is_required(
    schema: dict[str, Any], promised: set[str]
) -> None:
    assert promised <= set(schema["required"])


# -- beside a log -------------------------------------------------------------------------------


def test_the_files_of_a_run_are_valid_while_it_runs_when_it_raised_and_when_resumed(
    log: Path,
) -> None:
    counts = []

    def said(line: str) -> None:
        if line == "recorded 3":
            check("checkpoint", checkpoint(log))
            counts.append(checkpoint(log)["total_tokens"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(log, 6, interval=2, said=said)
    counts += [checkpoint(log)["total_tokens"], table(log)["total_tokens"]]
    check("checkpoint", checkpoint(log))
    check("tokens", table(log))
    run(log, 6, interval=2, resume=True, said=lambda _: check("checkpoint", checkpoint(log)))
    check("tokens", table(log))
    check("header", header(log))
    assert counts == [2, 3, 3]
    assert (table(log)["total_tokens"], table(log)["resume_count"]) == (6, 1)


@pytest.mark.parametrize(
    "token",
    [
        (0, ""),
        (5, "né\n\u2028😀"),
        (5, "\ud83d"),
        (-1, "no id", 0),
        ((1 << 63) - 1, "the greatest", (1 << 63) - 1),
        (1 - (1 << 63), "the least", 1 - (1 << 63)),
    ],
)
def test_any_token_that_can_be_recorded_is_valid(token: tuple[Any, ...], log: Path) -> None:
    model = sequential()
    with capturing(model, log, track_per_token=True, checkpoint_interval_tokens=1) as tracker:
        tracker.record_token(*token)
        check("checkpoint", checkpoint(log))
        model(torch.ones(1, 8))
    check("tokens", table(log))
    assert [one["token_id"] for one in table(log)["tokens"]] == [token[0]]


def test_files_of_a_run_without_tokens_are_valid(log: Path) -> None:
    model = sequential()
    options = {"track_per_token": True, "checkpoint_interval_tokens": 1}
    with pytest.raises(ZeroDivisionError), capturing(model, log, **options):
        raise ZeroDivisionError
    check("checkpoint", checkpoint(log))
    check("tokens", table(log))
    assert table(log)["tokens"] == checkpoint(log)["tokens"] == []


# -- the HEADER ---------------------------------------------------------------------------------

NOTHING_FIRED = pytest.mark.filterwarnings("ignore:.*no layer fired")


def _is_mlp(name: str) -> bool:
    return "mlp" in name


@NOTHING_FIRED
@pytest.mark.parametrize(
    ("model", "granularity", "codec", "hooks"),
    [
        ("llama", HookGranularity.FULL_TENSOR, "lz4", None),
        ("gpt2", HookGranularity.ATTENTION_ONLY, "zstd", None),
        ("mixtral", HookGranularity.MLP_ONLY, "none", None),
        ("bert", HookGranularity.SAMPLED_SLICES, "lz4", HookConfig(sampling_rate=1)),
        ("t5", HookGranularity.FULL_TENSOR, "lz4", HookConfig(target_layers=["*encoder*"])),
        ("falcon", HookGranularity.FULL_TENSOR, "lz4", HookConfig(target_layers=_is_mlp)),
        ("", HookGranularity.FULL_TENSOR, "lz4", None),
    ],
)
def test_the_header_of_a_captured_log_is_valid(
    model: str, granularity: HookGranularity, codec: str, hooks: HookConfig | None, log: Path
) -> None:
    built = build(model, torch.bfloat16) if model else sequential()
    with capturing(built, log, granularity, codec, hooks):
        pass
    found = header(log)
    check("header", found)
    assert (found["models"][0]["config"] is None) == (not model)
    assert found["capture"]["granularity"] == granularity.name


@NOTHING_FIRED
def test_the_header_of_a_log_of_two_models_on_the_second_of_two_processes_is_valid(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one, first = framework(max_memory_gb=1), sequential()
    one.instrument_model(first, name="first")
    one.instrument_model(torch.nn.Identity())
    with one.capture_activations(log):
        pass
    found = header(log)
    check("header", found)
    assert (found["rank"], found["world_size"]) == (1, 2)
    assert "parallel" not in found
    assert [model["dtypes"] for model in found["models"]] == [{"float32": 244}, {}]


@NOTHING_FIRED
def test_the_header_of_a_log_of_one_process_of_several_is_valid(log: Path) -> None:
    one = framework(max_memory_gb=1)
    one.instrument_model(sequential(), parallel=actstore.Parallel(tensor=(1, 2), run_id="a run"))
    with one.capture_activations(log):
        pass
    found = header(log)
    check("header", found)
    place = {"run": "a run", "data": [0, 1], "pipeline": [0, 1], "tensor": [1, 2]}
    assert found["parallel"] == place


# -- archives -----------------------------------------------------------------------------------


def assert_valid(archive: Path) -> set[str]:
    """Validate all attributes of an archive; give which kinds of arrays it has."""
    check("archive", attributes(archive))
    kinds = set()
    for name, said in nodes(archive).items():
        kind = "" if not said else "ragged" if name.endswith("_values") else "values"
        if kind:
            check("archive", said, kind)
        kinds.add(kind)
    return kinds


def test_an_archive_that_something_was_added_to_is_valid(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream").path
    archive = compact(log, tmp_path / "run.zarr").path
    count = attributes(archive)["rows"]["token"]
    add_arrays(archive, [Coordinate("mine", ("token",), np.zeros(count))])
    add_arrays(archive, [Coordinate("mean", ("any",), np.zeros(3))], group="statistics/resid")
    assert attributes(archive)["added"].keys() == {"mine", "statistics/resid"}
    assert_valid(archive)


@pytest.mark.parametrize("profile", shards.PROFILES)
def test_an_archive_of_a_captured_log_is_valid(profile: str, log: Path, tmp_path: Path) -> None:
    model = build("llama", torch.bfloat16)
    with capturing(model, log, track_per_token=True) as tracker, torch.no_grad():
        model(token_ids())
        tracker.record_token(3, "\ud83d")
    compact(log, tmp_path / "run.zarr", profile=profile)
    assert assert_valid(tmp_path / "run.zarr") == {"values", "ragged", ""}
    check("header", attributes(tmp_path / "run.zarr")["runs"][0])


def test_an_archive_of_a_sampled_capture_is_valid(log: Path, tmp_path: Path) -> None:
    model = build("llama")
    with capturing(model, log, HookGranularity.SAMPLED_SLICES), torch.no_grad():
        model(token_ids())
    compact(log, tmp_path / "run.zarr")
    assert "ragged" in assert_valid(tmp_path / "run.zarr")
    assert any("features" in one for one in nodes(tmp_path / "run.zarr").values())


def test_archives_of_logs_that_lack_something_are_valid(tmp_path: Path) -> None:
    empty = LogBuilder(tmp_path / "empty.stream")
    empty.close()
    unclosed = LogBuilder(tmp_path / "unclosed.stream")
    unclosed.layer("odd name", block=3)
    unclosed.begin(axis(1, 2))
    unclosed.put("odd name", np.ones((1, 2, 3), np.complex64))
    unclosed.close(finish=False)
    whole = decoder_log(tmp_path / "whole.stream")
    for one in (empty, unclosed, whole):
        compact(one.path, tmp_path / f"{one.path.stem}.zarr")
        assert_valid(tmp_path / f"{one.path.stem}.zarr")
    assert attributes(tmp_path / "unclosed.zarr")["analysis"]["duration_seconds"] is None


# -- what is wrong ------------------------------------------------------------------------------

TOKEN = {
    "token_index": 7,
    "token_id": 5,
    "token_text": "five",
    "step": 0,
    "position": 7,
    "pass_index": 0,
    "time": 1.5,
}
GOOD: dict[str, dict[str, Any]] = {
    "tokens": {
        "total_tokens": 1,
        "tokens": [TOKEN],
        "capture_duration_seconds": 0.5,
        "resume_count": 0,
    },
    "checkpoint": {
        "version": 1,
        "total_tokens": 1,
        "last_checkpoint_time": 2.0,
        "metadata": {
            "start_time": 1.0,
            "resume_count": 0,
            "updated_at": "2026-01-01T00:00:00+00:00",
        },
        "tokens": [TOKEN],
    },
    "header": {
        "run_id": "00000000-0000-4000-8000-000000000000",
        "writer": {"name": "actstore", "version": "0"},
        "created": "2026-01-01T00:00:00.000+00:00",
        "models": [
            {
                "name": "model0",
                "class": "Model",
                "config": None,
                "parameters": 4,
                "dtypes": {"float32": 4},
                "target_layers": None,
                "inputs": False,
                "attention_weights": False,
            }
        ],
        "capture": {
            "granularity": "FULL_TENSOR",
            "compression": "lz4",
            "sampling_rate": 0.1,
            "sampling_seed": 0,
            "outputs": "first",
            "rows": None,
            "target_throughput_gbps": 1.0,
            "max_memory_gb": None,
            "track_per_token": False,
        },
        "rank": 0,
        "world_size": 1,
        "codecs": {"0": None, "1": {"id": "blosc", "cname": "lz4"}},
    },
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give a good document of each schema."""
    folder = tmp_path_factory.mktemp("good")
    compact(decoder_log(folder / "run.stream").path, folder / "run.zarr")
    return GOOD | {"archive": attributes(folder / "run.zarr")}


CREATED = "2026-01-02T03:04:05+00:00"
WRITER = {"name": "actstore", "version": "0.1.0"}


def broken(name: str, path: str, value: Any, keyword: str) -> Any:
    """Give a case: the member that is given another value, and the rule which that breaks."""
    return pytest.param(name, path, value, keyword, id=f"{name} {path} {value!r:.20}")


GONE = object()


@pytest.mark.parametrize(
    ("name", "path", "value", "keyword"),
    [
        broken("tokens", "total_tokens", -1, "minimum"),
        broken("tokens", "total_tokens", True, "type"),
        broken("tokens", "capture_duration_seconds", None, "type"),
        broken("tokens", "tokens", {}, "type"),
        broken("tokens", "total", 1, "additionalProperties"),
        broken("tokens", "resume_count", GONE, "required"),
        broken("tokens", "tokens 0 token_text", None, "type"),
        broken("tokens", "tokens 0 token_id", "5", "type"),
        broken("tokens", "tokens 0 token_id", 1 << 63, "maximum"),
        broken("tokens", "tokens 0 token_id", -(1 << 63) - 1, "minimum"),
        broken("tokens", "tokens 0 position", -(1 << 63), "anyOf"),
        broken("tokens", "tokens 0 token_index", 1.5, "type"),
        broken("tokens", "tokens 0 step", -1, "minimum"),
        broken("tokens", "tokens 0 pass_index", -2, "minimum"),
        broken("tokens", "tokens 0 time", "now", "type"),
        broken("tokens", "tokens 0 text", "", "additionalProperties"),
        broken("tokens", "tokens 0 token_index", GONE, "required"),
        broken("checkpoint", "version", 2, "const"),
        broken("checkpoint", "tokens", GONE, "required"),
        broken("checkpoint", "last_checkpoint_time", "2026-01-01", "type"),
        broken("checkpoint", "metadata", None, "type"),
        broken("checkpoint", "metadata resume_count", -1, "minimum"),
        broken("checkpoint", "metadata updated_at", "2026-01-01 00:00:00", "pattern"),
        broken("checkpoint", "metadata start_time", GONE, "required"),
        broken("checkpoint", "tokens 0 token_text", None, "type"),
        broken("header", "run_id", "vector", "pattern"),
        broken("header", "created", "2026-01-01T00:00:00.000+02:00", "pattern"),
        broken("header", "models", [], "minItems"),
        broken("header", "models 0 config", [], "type"),
        broken("header", "models 0 dtypes float32", -1, "minimum"),
        broken("header", "capture", GONE, "required"),
        broken("header", "capture granularity", "full_tensor", "enum"),
        broken("header", "capture compression", "gzip", "enum"),
        broken("header", "capture sampling_rate", 0, "exclusiveMinimum"),
        broken("header", "capture sampling_rate", 1.1, "maximum"),
        broken("header", "models 0 target_layers", [], "minItems"),
        broken("header", "capture track_per_token", 1, "type"),
        broken("header", "world_size", 0, "minimum"),
        broken("header", "codecs 1 id", "pickle", "const"),
        broken("header", "codecs 1 id", GONE, "required"),
        broken("header", "codecs one", None, "pattern"),
        broken("header", "codecs 2", "blosc", "type"),
        broken("archive", "metadata_crc32c", "0000000G", "pattern"),
        broken("archive", "format", "zarr", "const"),
        broken("archive", "format_version", 1, "const"),
        broken("archive", "coordinates", ["step"], "type"),
        broken("archive", "rows token", -1, "minimum"),
        broken("archive", "profile", "zstd", "enum"),
        broken("archive", "analysis", GONE, "required"),
        broken("archive", "analysis dtypes 0", "float", "enum"),
        broken("archive", "analysis complete", None, "type"),
        broken("archive", "analysis duration_seconds", -1, "minimum"),
        broken("archive", "analysis per_layer model.norm count", 0, "minimum"),
        broken("archive", "analysis per_layer model.norm shapes", [], "minItems"),
        broken("archive", "analysis per_layer model.norm block", -2, "minimum"),
        broken("archive", "added", {}, "minProperties"),
        broken(
            "archive", "added", {"tables/mean": {"created": CREATED, "writer": WRITER}}, "pattern"
        ),
        broken("archive", "added", {"mine": {"created": CREATED}}, "required"),
        broken("archive", "provenance logs", [], "minItems"),
        broken("archive", "provenance logs 0 name", "folder/run.stream", "pattern"),
    ],
)
def test_a_broken_document_is_refused_for_what_is_broken(
    name: str, path: str, value: Any, keyword: str, good: dict[str, Any]
) -> None:
    check(name, good[name])
    document = deepcopy(good[name])
    *folders, last = path.split(" ")
    place = document
    for one in folders:
        place = place[int(one) if isinstance(place, list) else one]
    if value is GONE:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    (error,) = Draft202012Validator(SCHEMAS[name]).iter_errors(document)
    assert error.validator == keyword


@pytest.mark.parametrize("path", ["", "writer", "models 0", "capture"])
def test_a_header_may_hold_members_that_no_one_knows(path: str) -> None:
    document = deepcopy(GOOD["header"])
    place = document
    for one in path.split():
        place = place[int(one) if isinstance(place, list) else one]
    place["colour"] = "blue"
    check("header", document)


@pytest.mark.parametrize(
    ("kind", "said", "keyword"),
    [
        ("values", {"source_dtype": "float"}, "enum"),
        ("values", {"modules": {"0": "a"}}, "type"),
        ("values", {"modules": []}, "minItems"),
        ("values", {"modules": [None]}, "type"),
        ("ragged", {"modules": ["a"]}, "type"),
        ("ragged", {"modules": {"-2": "a"}}, "pattern"),
        ("ragged", {"features": {"8": [1, 1]}}, "uniqueItems"),
        ("ragged", {"features": {"8": [-1]}}, "minimum"),
    ],
)
def test_broken_attributes_of_an_array_are_refused(
    kind: str, said: dict[str, Any], keyword: str
) -> None:
    modules: Any = ["a"] if kind == "values" else {"-1": "a"}
    whole = {"site": "resid", "source_dtype": "bfloat16", "modules": modules}
    check("archive", whole, kind)
    schema = {"$ref": f"#/$defs/{kind}", "$defs": SCHEMAS["archive"]["$defs"]}
    (error,) = Draft202012Validator(schema).iter_errors(whole | said)
    assert error.validator == keyword
