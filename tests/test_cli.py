"""The `actstore` command says what the library says, fits a terminal, and ends as documented."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from rich.cells import cell_len
from typer.testing import CliRunner

import actstore
from actstore.cli import drawing, output
from actstore.cli.app import app
from actstore.overview import Overview, layer_lines, site_lines

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, files_of  # noqa: E402

MODEL = str(ROOT / "examples" / "tiny-llama")
COMMANDS = [one.name for one in app.registered_commands]
ESCAPE = "\x1b"
PARTS = {"self_attn": "attn", "block_sparse_mixture_of_experts": "mlp", "a_long_norm": "a_norm"}
#: What has to be there for those that come later.
ORDER = ("capture", "info", "ls", "tokens", "recover", "compact", "export", "import")


def invoke(*arguments: Any, width: int = 80, given: str | None = None) -> Any:
    """Run a command in this process, in a terminal so wide."""
    environment = {"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(one) for one in arguments], input=given, env=environment)


def found_by(*arguments: Any, code: int = 0) -> Any:
    """Give the JSON document of a command."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def plain(value: Any) -> Any:
    """Give what JSON has of a value: the oracle of ``output.plain``."""

    def default(one: Any) -> Any:
        if dataclasses.is_dataclass(one):
            return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        if hasattr(one, "items"):
            return dict(one)
        return str(one)

    return json.loads(json.dumps(value, default=default))


def deep_log(path: Path) -> Path:
    """Write a log of 200 layers with long names."""
    log, numbers = LogBuilder(path), np.random.default_rng(0)
    for block in range(50):
        head = f"language_model.model.decoder.layers.{block}"
        for part, site in PARTS.items():
            log.layer(f"{head}.{part}", site, block)
        log.layer(head, "resid", block)
    for number in range(3):
        log.begin(axis(2, 3, start=3 * number), annotations={"sample_id": ["first", "second"]})
        log.texts({100 + index: f" token {index}" for index in range(6)})
        for block in range(50):
            head = f"language_model.model.decoder.layers.{block}"
            for part in (*(f".{one}" for one in PARTS), ""):
                log.put(f"{head}{part}", numbers.normal(size=(2, 3, 32)).astype(bfloat16))
        log.token(100, "a very long text of a token, which no column of a table can hold whole")
        log.commit()
    return log.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of logs, whole, torn and damaged, and of archives."""
    folder = tmp_path_factory.mktemp("files")
    deep_log(folder / "deep.stream")
    decoder_log(folder / "run.stream")
    decoder_log(folder / "later.stream", run="00000000-0000-4000-8000-000000000001")
    decoder_log(folder / "torn.stream", finish=False)
    data = bytearray((folder / "run.stream").read_bytes())
    for place in (len(data) // 3, len(data) // 2):
        data[place] ^= 1
    (folder / "damaged.stream").write_bytes(data)
    actstore.compact(folder / "run.stream", folder / "run.zarr")
    actstore.compact(folder / "deep.stream", folder / "deep.zarr", precision={"resid": "int8"})
    actstore.export(folder / "run.zarr", folder / "run.h5")
    actstore.compact(folder / "run.stream", folder / "damaged.zarr")
    shard = max((folder / "damaged.zarr" / "resid").rglob("c/*/*/*"), key=os.path.getsize)
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    return folder


# -- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.stream", "deep.stream", "torn.stream", "deep.zarr"])
def test_info_says_what_analysing_says(files: Path, name: str) -> None:
    path = files / name
    said = found_by("info", path)
    framework = actstore.InstrumentationFramework(
        actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
    )
    wanted = framework.analyze_activations(path)
    assert said["kind"] == ("archive" if path.is_dir() else "log")
    assert said["layers"] == len(wanted["per_layer"])
    for mine, theirs in (
        ("packets", "packets"),
        ("raw_bytes", "total_raw_bytes"),
        ("stored_bytes", "total_compressed_bytes"),
        ("ratio", "compression_ratio"),
        ("passes", "passes"),
        ("tokens", "tokens"),
        ("dtypes", "dtypes"),
        ("complete", "complete"),
        ("compression", "compression"),
    ):
        assert said[mine] == wanted[theirs]
    with actstore.open_dataset(path) as dataset:
        assert said["rows"] == dataset.attrs["rows"]
        assert said["runs"] == plain(dataset.attrs["runs"])


def test_info_says_what_is_given_up_of_an_archive_and_the_errors(files: Path) -> None:
    assert found_by("info", files / "deep.zarr")["precision"] == {"resid": "int8"}
    shown = invoke("info", files / "deep.zarr").stdout
    worst = max(
        one["errors"]["nmse"]
        for one in Overview.of(files / "deep.zarr").per_layer.values()
        if "errors" in one
    )
    assert "int8: resid" in shown
    assert f"{worst:.1e}" in shown


def test_info_tells_of_a_damaged_log_and_one_that_was_not_closed(files: Path) -> None:
    assert found_by("info", files / "damaged.stream")["damage"]
    assert "not closed cleanly" in invoke("info", files / "torn.stream").stdout


def test_info_tells_that_a_log_is_being_written(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("a")
    log.begin(axis(1, 2))
    log.put("a", np.ones((1, 2, 3), np.float32))
    log.commit()
    assert found_by("info", tmp_path / "run.stream")["writing"]
    assert "being written" in invoke("info", tmp_path / "run.stream").stdout
    log.close()
    assert not found_by("info", tmp_path / "run.stream")["writing"]


def test_ls_lists_each_layer_with_its_bytes(files: Path) -> None:
    with actstore.open_stream(files / "deep.stream") as reader:
        wanted = {
            name: sum(packet.values.nbytes for packet in reader.packets(name))
            for name in reader.layers
        }
    lines = found_by("ls", files / "deep.stream", "--all")["layers"]
    assert {one["name"]: one["raw_bytes"] for one in lines} == wanted
    assert {one["packets"] for one in lines} == {3}
    assert {one["shape"] for one in lines} == {"2×3×32"}


def test_ls_puts_the_blocks_of_a_site_together(files: Path) -> None:
    head = "language_model.model.decoder.layers.{0..49}"
    lines = found_by("ls", files / "deep.stream")["layers"]
    assert [(one["name"], one["layers"], one["site"]) for one in lines] == [
        *((f"{head}.{part}", 50, site) for part, site in PARTS.items()),
        (head, 50, "resid"),
    ]
    assert sum(one["bytes"] for one in lines) == Overview.of(files / "deep.stream").stored_bytes


def test_ls_takes_globs_and_sorts(files: Path) -> None:
    found = found_by("ls", files / "run.stream", "--layers", "resid", "--layers", "*.mlp", "--all")
    assert {one["site"] for one in found["layers"]} == {"resid", "mlp"}
    found = found_by("ls", files / "run.stream", "--all", "--sort", "bytes")
    sizes = [one["bytes"] for one in found["layers"]]
    assert sizes == sorted(sizes, reverse=True)
    assert "no layer or site matches 'nothing'" in invoke(
        "ls", files / "run.stream", "--layers", "nothing"
    ).stderr  # fmt: skip


def test_layers_whose_blocks_have_other_numbers_before_them_are_one_site() -> None:
    def said(block: int, **more: Any) -> dict[str, Any]:
        counts = {"count": 1, "bytes": 10, "raw_bytes": 20, "aliases": 0}
        return {"site": "mlp", "block": block, "dtypes": ["float32"], "shapes": [[1, 2]],
                **counts, **more}  # fmt: skip

    layers = {f"tower.0.layers.{block}.mlp": said(block) for block in (0, 1, 2, 5, 7)}
    layers["tower.0.layers.3.mlp"] = said(3, shapes=[[1, 2], [1, 3]])
    lines = site_lines(layer_lines(layers))
    assert [(one.name, one.layers, one.shape) for one in lines] == [
        ("tower.0.layers.{0,1,…,7}.mlp", 5, "1×2"),
        ("tower.0.layers.3.mlp", 1, "1×*"),
    ]


@pytest.mark.parametrize("name", ["run.stream", "run.zarr"])
def test_tokens_are_the_rows_labels(files: Path, name: str) -> None:
    with actstore.open_dataset(files / name) as dataset:
        table = dataset.actstore.table().rename_axis(index="row").reset_index()
    said = found_by("tokens", files / name, "--limit", 0)
    assert said["total"] == len(table)
    assert said["rows"] == plain(table.to_dict("records"))
    few = found_by("tokens", files / name, "--limit", 3)
    assert few["rows"] == said["rows"][:3]
    assert "and 15 more" in invoke("tokens", files / name, "--limit", 3).stdout


def test_tokens_finds_a_text_and_the_place_of_its_rows(files: Path) -> None:
    said = found_by("tokens", files / "deep.stream", "--find", "token 2")
    assert {one["token_text"] for one in said["rows"]} == {" token 2"}
    whole = found_by("tokens", files / "deep.stream", "--limit", 0)["rows"]
    assert said["rows"] == [one for one in whole if one["token_text"] == " token 2"]


def test_generated_tokens_are_those_that_were_recorded(files: Path) -> None:
    said = found_by("tokens", files / "run.stream", "--generated")
    with actstore.open_stream(files / "run.stream") as reader:
        wanted = [(one.step, one.token_id, one.token_text) for one in reader.tokens]
    assert [(one["step"], one["token_id"], one["token_text"]) for one in said["rows"]] == wanted


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("run.stream", 0),
        ("run.zarr", 0),
        ("torn.stream", 1),
        ("damaged.stream", 1),
        ("damaged.zarr", 1),
    ],
)
def test_verify_names_what_is_damaged(files: Path, name: str, code: int) -> None:
    said = found_by("verify", files / name, code=code)
    report = actstore.verify(files / name)
    assert said == {"ok": report.ok, **plain(report)}
    shown = invoke("verify", files / name, width=200)
    assert shown.exit_code == code
    assert all(one.where in shown.stdout for one in report.damage)


def test_verify_compares_with_logs(files: Path) -> None:
    path = files / "run.zarr"
    assert found_by("verify", path, "--against", files / "run.stream")["ok"]
    assert not found_by("verify", path, "--against", files / "later.stream", code=0)["damage"]
    assert found_by("verify", path, "--against", files / "deep.stream", code=1)["damage"]


@pytest.mark.parametrize(("name", "code"), [("damaged.stream", 1), ("torn.stream", 0)])
def test_recover_makes_a_whole_log_and_says_what_is_lost(
    files: Path, tmp_path: Path, name: str, code: int
) -> None:
    said = found_by("recover", files / name, tmp_path / "mine.stream", code=code)
    report = actstore.recover(files / name, tmp_path / "theirs.stream")
    wanted = plain(report) | {"recovered": str(tmp_path / "mine.stream"), "whole": report.whole}
    assert said == wanted
    packets = []
    for path in (tmp_path / "mine.stream", tmp_path / "theirs.stream"):
        with actstore.open_stream(path) as reader:
            packets.append([(one.seq, one.layer, one.values.tobytes())
                            for one in reader.packets()])  # fmt: skip
    assert packets[0] == packets[1]


# -- what is made -------------------------------------------------------------------------------


def test_compact_makes_the_archive_that_the_library_makes(files: Path, tmp_path: Path) -> None:
    logs = [files / "run.stream", files / "later.stream"]
    said = found_by(
        "compact", *logs, tmp_path / "mine.zarr", "--profile", "dense",
        "--precision", "bfloat16", "--precision", "resid=nmse=2e-4", "--workers", 1,
    )  # fmt: skip
    report = actstore.compact(
        logs,
        tmp_path / "theirs.zarr",
        profile="dense",
        precision={"resid": "nmse=2e-4", "*": "bfloat16"},
    )
    assert said["stored_bytes"] == report.stored_bytes
    assert said["rows"] == report.rows
    with (
        actstore.open_dataset(tmp_path / "mine.zarr") as mine,
        actstore.open_dataset(tmp_path / "theirs.zarr") as theirs,
    ):
        assert mine.attrs["precision"] == theirs.attrs["precision"]
        assert mine.load().drop_attrs().identical(theirs.load().drop_attrs())


def test_append_brings_a_log_into_an_archive(files: Path, tmp_path: Path) -> None:
    archive = tmp_path / "run.zarr"
    shutil.copytree(files / "run.zarr", archive)
    before = found_by("info", archive)["rows"]["token"]
    said = found_by("append", files / "later.stream", archive)
    assert said["rows"]["token"] == 2 * before
    logs = [files / "run.stream", files / "later.stream"]
    assert actstore.verify(archive, against=logs).ok


def test_removed_logs_are_gone_only_when_their_archive_is_there(
    files: Path, tmp_path: Path
) -> None:
    log = tmp_path / "run.stream"
    shutil.copy(files / "run.stream", log)
    (tmp_path / "there.zarr").mkdir()
    assert invoke("compact", log, tmp_path / "there.zarr", "--remove-logs").exit_code == 3
    assert log.exists()
    assert invoke("compact", log, tmp_path / "new.zarr", "--remove-logs").exit_code == 0
    assert not log.exists()
    assert actstore.verify(tmp_path / "new.zarr").ok


def captured(log: Path) -> dict[Any, list[int]]:
    """Give the token ids of each text of a log."""
    found: dict[Any, list[int]] = {}
    with actstore.open_stream(log) as reader:
        for info in reader.passes:
            ((token),) = (info.axes[0],)
            for item, name in enumerate(info.annotations["sample_id"]):
                assert name not in found
                found[name] = token.token_ids[item][token.mask[item]].tolist()
    return found


def test_capture_reads_texts_with_their_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lines = [{"text": "The elements of a set", "id": "a"}, {"text": "A list", "id": "b"}]
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    log, archive = tmp_path / "run.stream", tmp_path / "run.zarr"
    said = found_by(
        "capture", MODEL, log, "--jsonl", source, "--id-field", "id", "--batch-size", 2,
        "--granularity", "mlp_only", "--dtype", "float32", "--max-length", 4,
        "--compact", archive, "--precision", "bfloat16",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert captured(log) == {
        one["id"]: tokenizer(one["text"]).input_ids[:4] for one in lines
    }  # fmt: skip
    assert (said["samples"], said["truncated"]) == (2, 1)
    assert said["tokens"] == sum(map(len, captured(log).values()))
    with actstore.open_dataset(archive) as dataset:
        assert set(dataset.data_vars) == {"mlp"}
        assert dataset.mlp.attrs["source_dtype"] == "float32"
        assert dataset.attrs["precision"] == {"mlp": "bfloat16"}
        assert set(dataset.sample_id.values.tolist()) == {"a", "b"}


def test_captured_values_are_those_of_the_model(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["The elements of a set", "A list"]
    log = tmp_path / "run.stream"
    done = invoke("capture", MODEL, log, "--text", "-", "--layers", "model.layers.*.mlp", "-q",
                  given="\n".join(texts))  # fmt: skip
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
    wanted: list[np.ndarray] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(
            lambda _module, _args, out: wanted.append(out.view(torch.uint8).numpy().copy())
        )
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"), use_cache=False)
    with actstore.open_stream(log) as reader:
        found = [packet.values.view(np.uint8) for packet in reader.packets()]
    assert len(found) == len(wanted)
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))


def test_generated_tokens_are_those_that_the_model_generates(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log = tmp_path / "gen.stream"
    said = found_by("capture", MODEL, log, "--prompt", "A set of", "--prompt", "The list",
                    "--generate", 5, "--granularity", "mlp_only")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
    wanted: list[int] = []
    for text in ("A set of", "The list"):
        inputs = tokenizer(text, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        wanted += out[0, inputs.input_ids.shape[1] :].tolist()
    with actstore.open_stream(log) as reader:
        assert [one.token_id for one in reader.tokens] == wanted
    assert said["generated"] == len(wanted)
    with actstore.open_dataset(log) as dataset:
        assert dataset.sample_id.values.tolist() == sorted(dataset.sample_id.values.tolist())
        assert int((dataset.step >= 0).sum()) == len(wanted)
    again = found_by("capture", MODEL, log, "--prompt", "A set of", "--prompt", "The list",
                     "--generate", 5, "--granularity", "mlp_only", "--resume")  # fmt: skip
    assert (again["skipped"], again["generated"]) == (2, 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an encoder and an encoder-decoder, whose weights are random."""
    import torch
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=2048, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=1,
    )  # fmt: skip
    models = {"bert": BertModel(bert), "t5": T5ForConditionalGeneration(t5)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / name)
    return folder


def test_an_encoder_is_captured_too(others: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.stream"
    texts = "A set of\nThe elements of a set are many and the list of them is long, and longer"
    done = invoke("capture", others / "bert", log, "--text", "-", "--batch-size", 2, "-q",
                  "--granularity", "mlp_only", given=texts)  # fmt: skip
    assert done.exit_code == 0, done.output
    lengths = [len(one) for one in captured(log).values()]
    assert lengths[0] < lengths[1] == 16
    with actstore.open_dataset(log) as dataset:
        assert dataset.mlp.shape == (2, 32, 32)
        assert int((~dataset.is_padding).sum()) == sum(lengths)


def test_an_encoder_decoder_generates_and_goes_on(others: Path, tmp_path: Path) -> None:
    log, whole = tmp_path / "gen.stream", tmp_path / "whole.stream"
    how = ("--prompt", "A set of", "--prompt", "B", "--granularity", "mlp_only", "--generate")
    found_by("capture", others / "t5", log, *how, 3)
    said = found_by("capture", others / "t5", log, *how, 6, "--resume")
    assert said["generated"] == 6
    said = invoke("capture", others / "t5", whole, *how, 6)
    assert "labels" not in said.output
    with actstore.open_stream(whole) as reader:  # the encoder's passes, too
        labels = [one.annotations["sample_id"] for one in reader.passes]
    assert labels == [[1]] * 7 + [[2]] * 7
    tokens: list[dict[Any, list[int]]] = []
    for path in (log, whole):
        rows = found_by("tokens", path, "--dim", "decoder_token", "--limit", 0)["rows"]
        found: dict[Any, list[int]] = {}
        for row in rows:
            found.setdefault(row["decoder_sample_id"], []).append(row["decoder_step"])
        tokens.append({name: [one for one in steps if one >= 0] for name, steps in found.items()})
    assert {name: len(steps) for name, steps in tokens[0].items()} == {1: 6, 2: 6}
    assert {name: len(steps) for name, steps in tokens[1].items()} == {1: 6, 2: 6}
    shown = invoke("tokens", log, "--dim", "decoder_token")
    assert not too_wide(shown.stdout)
    assert "sample_id" in shown.stdout
    assert invoke("tokens", log).exit_code == 3
    assert "encoder-decoder" in invoke("capture", others / "t5", log, "--prompt", "a").stderr


def test_bench_measures_and_leaves_nothing(tmp_path: Path) -> None:
    said = found_by("bench", "--megabytes", 8, "--folder", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all(value > 0 for value in said.values())


def test_stats_put_the_features_of_a_layer_together(files: Path) -> None:
    path = files / "deep.zarr"
    said = found_by("stats", path, "--variable", "resid", "--variable", "mlp", "--each")
    with actstore.open_dataset(path, chunks=None) as dataset:
        for one in said["statistics"]:
            values = dataset[one["variable"]].sel(layer=one["block"]).values.astype(np.float64)
            wanted = {
                "count": values.size,
                "nonfinite": 0,
                "mean": values.mean(),
                "std": values.std(),
                "rms": np.sqrt(np.square(values).mean()),
                "minimum": values.min(),
                "maximum": values.max(),
                "zeros": (values == 0).mean(),
                "row_norm": np.linalg.norm(values, axis=-1).mean(),
            }
            assert {name: one[name] for name in wanted} == pytest.approx(
                wanted, rel=1e-5, abs=1e-6
            )
        (whole,) = found_by("stats", path, "--variable", "resid")["statistics"]
        values = dataset.resid.values.astype(np.float64)
        assert whole["std"] == pytest.approx(values.std())
        assert whole["count"] == values.size
    assert len(said["statistics"]) == 100
    assert "no variable 'odd'" in invoke("stats", path, "--variable", "odd").stderr


def test_stats_count_what_is_not_finite(files: Path) -> None:
    shown = invoke("stats", files / "run.stream")
    assert shown.exit_code == 0, shown.output
    said = {one["variable"]: one for one in found_by("stats", files / "run.stream")["statistics"]}
    with actstore.open_dataset(files / "run.stream", chunks=None) as dataset:
        for name, one in said.items():
            assert one["nonfinite"] == int((~np.isfinite(dataset[name].values)).sum())


def test_report_writes_the_page_that_the_library_writes(files: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = invoke("report", files / "run.zarr", "-o", target, "--sequence", "0", "0", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"path": str(target), "bytes": target.stat().st_size}
    wanted = actstore.report(files / "run.zarr", tmp_path / "own.html", sequence=(0, 0))
    lines = [re.sub(r" on 20[\d-]+T[\d:]+ UTC", "", one.read_text()) for one in (target, wanted)]
    assert lines[0] == lines[1]
    assert invoke("report", files / "run.zarr", "-o", files / "run.stream").exit_code == 3


@pytest.mark.parametrize("ending", [".h5", ".zarr.zip"])
def test_an_archive_is_exported_and_imported_the_same(
    files: Path, tmp_path: Path, ending: str
) -> None:
    one, again = tmp_path / f"one{ending}", tmp_path / "again.zarr"
    made = found_by("export", files / "run.zarr", one)
    assert made["stored_bytes"] == one.stat().st_size
    assert found_by("verify", one)["ok"]
    whole, file = found_by("info", files / "run.zarr"), found_by("info", one)
    assert whole["kind"] == "archive"
    ways = ("path", "kind", "file_bytes")
    assert {**file, **{name: whole[name] for name in ways}} == whole
    assert file["file_bytes"] == one.stat().st_size
    assert found_by("ls", one)["layers"] == found_by("ls", files / "run.zarr")["layers"]
    found_by("import", one, again)
    assert files_of(again) == files_of(files / "run.zarr")


@pytest.mark.parametrize("ending", [".safetensors", ".parquet", ""])
def test_rows_are_exported_as_other_tools_have_them(
    files: Path, tmp_path: Path, ending: str
) -> None:
    layer = "model.layers.1.mlp"
    how = ("--layers", layer, "--name", f"{layer}=mine")
    how += () if ending else ("--context-size", "1")
    mine, theirs = tmp_path / f"mine{ending}", tmp_path / f"theirs{ending}"
    said = found_by("export", files / "run.stream", mine, *how)
    size = None if ending else 1
    report = actstore.export_rows(
        files / "run.stream", theirs, layers=[layer], names={layer: "mine"}, context_size=size
    )
    assert said["rows"] == report.rows
    assert said["layers"] == report.layers
    if ending == ".safetensors":
        assert mine.read_bytes() == theirs.read_bytes()
        found_by("import", mine, tmp_path / "again.stream", "--name", "mine=blocks.1.hook_mlp_out")
        with (
            actstore.open_dataset(tmp_path / "again.stream") as again,
            actstore.open_dataset(files / "run.stream") as dataset,
        ):
            wanted = dataset.actstore.layer(layer).values
            assert np.array_equal(again.mlp.values.ravel(), wanted.ravel(), equal_nan=True)


def test_share_makes_a_folder_and_says_what_leaves(files: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    privacy = actstore.Privacy(hash_text="secret", drop_labels=["topic"])
    wanted = plain(actstore.what_leaves(files / "run.zarr", privacy=privacy))
    how = ("--hash-text", key, "--drop-label", "topic")
    said = found_by("share", files / "run.zarr", tmp_path / "none", "--list", *how)
    assert said["leaving"] == wanted
    assert not (tmp_path / "none").exists()
    sent = tmp_path / "sent"
    found_by("share", files / "run.zarr", sent, *how, "--licence", "CC0-1.0", "--creator", "Ada")
    assert "topic" not in actstore.open_dataset(sent / "run.zarr").coords
    card = (sent / "README.md").read_text()
    assert "CC0-1.0" in card
    assert "Ada" in card
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=sent, check=True)


# -- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("info", "nothing"), 3, "nothing at nothing"),
        (("info", ROOT / "README.md"), 3, "README.md"),
        (("verify", ROOT / "tests"), 3, "no archive"),
        (("export", "nothing", "out.odd"), 3, ".zarr.zip"),
        (("export", "nothing", "out.h5", "--layers", "a"), 3, "layers"),
        (("export", "nothing", "out.parquet", "--compression", "gzip"), 3, ".h5"),
        (("import", "nothing.h5", "out.zarr"), 3, "nothing.h5"),
        (("import", "nothing", "out.zarr", "--name", "a"), 3, "LAYER=NAME"),
        (("info",), 2, "PATH"),
        (("nothing",), 2, "nothing"),
        (("compact", "one"), 2, "LOG"),
        (("compact", "nothing", "out.zarr", "--profile", "odd"), 2, "balanced"),
        (("compact", "nothing", "out.zarr", "--precision", "odd=1"), 3, "precision"),
        (("capture", MODEL, "out.stream"), 2, "--prompt"),
        (("capture", MODEL, "out.stream", "--prompt", "a", "--rows", "odd"), 2, "--rows"),
        (("capture", MODEL, "out.stream", "--prompt", "a", "--precision", "int8"), 2, "--compact"),
        (("capture", "no/model", "out.stream", "--prompt", "a"), 3, "no/model"),
        (("capture", MODEL, "out.stream", "--prompt", "a", "--layers", "x"), 3, "'x'"),
        (("capture", MODEL, "out.stream", "--prompt", " "), 3, "no texts"),
        (("capture", MODEL, "out.stream", "--prompt", "a", "--generate", 2, "--batch-size", 2), 3,
         "one by one"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong_with_their_exit_code_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, code: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments, width=200)
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert "Traceback" not in done.output
    assert not done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_a_document_too_and_debug_shows_where() -> None:
    said = found_by("info", "nothing", code=3)
    assert said["type"] == "MissingFileError"
    assert "nothing at nothing" in said["error"]
    assert "Traceback" in invoke("info", "nothing", "--debug").stderr


def test_a_fault_of_ours_is_no_damage_and_shows_where(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actstore, "verify", lambda *_, **__: 1 / 0)
    done = invoke("verify", files / "run.stream")
    assert done.exit_code == 3
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"text": 3}', "wanted 'text', a str"),
        ("[1]", "wanted a JSON object"),
        ("{", "it is no JSON"),
        ('{"text": "a", "id": 1}\n{"text": "b", "id": 1}', "ids must differ"),
        ('{"text": "a", "id": 1}\n{"text": "b", "id": "1"}', "all texts or all integers"),
        ('{"text": "a", "id": true}', "wanted 'id'"),
    ],
)
def test_lines_that_are_no_texts_are_refused(tmp_path: Path, lines: str, told: str) -> None:
    done = invoke("capture", MODEL, tmp_path / "out.stream", "--jsonl", "-", "--id-field", "id",
                  given=lines, width=200)  # fmt: skip
    assert done.exit_code == 3
    assert told in done.stderr


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }


def started(*arguments: Any, code: str = "") -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    run = f"{code}\nimport sys\nfrom actstore.cli import main\nsys.argv[0] = 'actstore'\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", run, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def interrupted(process: subprocess.Popen[str], begun: Callable[[], bool]) -> str:
    """Send Ctrl-C when something has begun; give what was said."""
    until = time.monotonic() + 120
    while not begun():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=120)
    assert process.returncode == 130, (said, told)
    assert not said
    assert "Traceback" not in told
    return told


def packets_in(log: Path) -> int:
    """Count what a log that is being written holds."""
    try:
        with actstore.open_stream(log, errors="skip") as reader:
            return int(reader.packet_count)
    except (OSError, actstore.ActstoreError):
        return 0


def test_ctrl_c_ends_a_prefill_after_its_pass_and_resume_captures_the_rest(
    tmp_path: Path,
) -> None:
    source, log = tmp_path / "texts.txt", tmp_path / "run.stream"
    texts = [f"The number {number} is an element of the set" for number in range(3000)]
    source.write_text("\n".join(texts))
    how = ("capture", MODEL, log, "--text", source, "--granularity", "mlp_only")
    told = interrupted(started(*how), lambda: packets_in(log) > 0)
    assert "--resume" in told
    with actstore.open_stream(log) as reader:
        assert reader.complete
        assert not any(one.aborted for one in reader.passes)
        assert reader.summary["ended_by"] == "KeyboardInterrupt"
    first = captured(log)
    assert 0 < len(first) < len(texts)
    source.write_text("\n".join(texts[: len(first) + 20]))
    said = found_by(*how, "--resume", "--batch-size", 8, "--compact", tmp_path / "run.zarr")
    assert (said["skipped"], said["samples"]) == (len(first), 20)
    rest = captured(tmp_path / "run.1.stream")
    assert sorted([*first, *rest]) == list(range(1, len(first) + 21))
    assert actstore.verify(
        tmp_path / "run.zarr", against=[log, tmp_path / "run.1.stream"]
    ).ok  # fmt: skip
    nothing = found_by(*how, "--resume")
    assert (nothing["samples"], nothing["skipped"]) == (0, len(first) + 20)
    source.write_text("\n".join(["Another text", *texts[1:]]))
    assert "other tokens" in invoke(*how, "--resume", width=200).stderr


def test_ctrl_c_ends_a_generation_after_its_token_and_resume_goes_on_to_the_same(
    tmp_path: Path,
) -> None:
    log, whole = tmp_path / "gen.stream", tmp_path / "whole.stream"
    how = ("--prompt", "The", "--prompt", "A set", "--generate", 60, "--granularity", "mlp_only",
           "--dtype", "float32", "--checkpoint-tokens", 4)  # fmt: skip
    checkpoint = tmp_path / "gen.stream.ckpt.json"
    interrupted(started("capture", MODEL, log, *how), checkpoint.exists)
    with actstore.open_stream(log) as reader:
        assert reader.complete
        assert not any(one.aborted for one in reader.passes)
        before = [one.token_id for one in reader.tokens]
    said = found_by("capture", MODEL, log, *how, "--resume")
    assert said["generated"] + len(before) == 120
    assert not checkpoint.exists()
    found_by("capture", MODEL, whole, *how)
    tokens = []
    for path in (log, whole):
        with actstore.open_stream(path) as reader:
            tokens.append([one.token_id for one in reader.tokens])
    assert tokens[0][: len(before)] == before
    assert tokens[0] == tokens[1]


_SMALL_SHARDS = (
    "from actstore.archive import grid\ngrid.CHUNK_BYTES, grid.SHARD_BYTES = 1 << 10, 1 << 11"
)


def test_ctrl_c_leaves_no_half_archive_and_the_same_command_goes_on(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=400, width=64, vocab=64).path
    out, journal = tmp_path / "run.zarr", tmp_path / ".run.zarr.journal"

    def begun() -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") > 3

    told = interrupted(started("compact", log, out, code=_SMALL_SHARDS), begun)
    assert "goes on" in told
    assert not out.exists()
    process = started("compact", log, out, "--json", code=_SMALL_SHARDS)
    said, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert json.loads(said)["shards_resumed"] > 2
    assert {one.name for one in tmp_path.iterdir()} == {"run.stream", "run.zarr"}
    assert actstore.verify(out, against=log).ok


# -- how it looks -------------------------------------------------------------------------------

SCREENS = [
    ("info", "deep.stream"),
    ("info", "deep.zarr"),
    ("info", "damaged.stream"),
    ("ls", "deep.stream"),
    ("ls", "deep.stream", "--all"),
    ("ls", "deep.zarr", "--sort", "ratio"),
    ("ls", "run.stream"),
    ("tokens", "deep.stream"),
    ("tokens", "deep.stream", "--generated"),
    ("verify", "deep.stream"),
    ("verify", "damaged.stream"),
    ("verify", "damaged.zarr"),
    ("recover", "damaged.stream", "recovered.stream"),
    ("compact", "deep.stream", "compacted.zarr"),
    ("append", "later.stream", "run.zarr"),
    ("export", "deep.zarr", "made.h5"),
    ("import", "run.h5", "made.zarr"),
    ("share", "deep.zarr", "sent"),
    ("share", "deep.zarr", "none", "--list"),
    ("stats", "deep.zarr"),
    ("stats", "run.zarr", "--each"),
    ("report", "deep.zarr"),
    ("bench", "--megabytes", "8"),
]


def too_wide(text: str, width: int = 80) -> list[str]:
    return [line for line in text.splitlines() if cell_len(line) > width]


@pytest.mark.parametrize("arguments", SCREENS, ids=" ".join)
def test_screens_fit_and_no_number_is_cut(
    files: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    place = tmp_path_factory.getbasetemp() / "screens"
    if not place.exists():
        shutil.copytree(files, place)
    monkeypatch.chdir(place)
    done = invoke(*arguments)
    assert done.stdout, done.output
    assert not too_wide(done.stdout)
    assert ESCAPE not in done.output
    if arguments[0] != "share":  # whose examples are texts, of ids too
        numbers = re.sub(r"'[^']*'|,…,|…}", "", done.stdout)
        assert not re.search(r"\d…|…\d+(\s|$)", numbers)


def test_every_layer_of_two_hundred_is_told_from_the_others(files: Path) -> None:
    shown = invoke("ls", files / "deep.stream", "--all").stdout.splitlines()[1:201]
    assert len(set(shown)) == 200


def test_in_a_pipe_nothing_is_folded(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "actstore", "ls", str(files / "deep.stream"), "--all"],
        capture_output=True, text=True, check=True,
        env={name: one for name, one in environment().items() if name != "COLUMNS"},
    )  # fmt: skip
    assert "…" not in process.stdout
    assert "language_model.model.decoder.layers.49.block_sparse_mixture_of_experts" in (
        process.stdout
    )
    assert not process.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_has_examples(name: str) -> None:
    done = invoke(name, "--help")
    assert done.exit_code == 0
    assert not too_wide(done.stdout)
    assert f"$ actstore {name} " in done.stdout


def test_the_help_says_the_exit_codes_and_how_to_complete() -> None:
    said = " ".join(invoke("--help").stdout.split())
    for code in ("0 done", "1 something is damaged", "2 wrong usage", "3 an error", "130"):
        assert code in said
    assert "--install-completion" in said
    assert actstore.__version__ in invoke("--version").stdout


def examples_of(name: str) -> list[str]:
    lines = invoke(name, "--help").stdout.splitlines()
    return [line.strip()[2:] for line in lines if line.strip().startswith("$ actstore ")]


def test_the_examples_of_the_help_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    assert set(ORDER) <= set(COMMANDS)
    others = [one for one in COMMANDS if one not in (*ORDER, "serve")]  # which doesn't end
    for name in (*ORDER, *others):
        if name == "append":
            invoke("capture", MODEL, "later.stream", "--prompt", "Later on")
        for line in examples_of(name):
            done = invoke(*shlex.split(line)[1:])
            assert done.exit_code == 0, f"{line}\n{done.output}"
            assert done.stdout, line


def test_progress_tells_rate_and_time_left_of_what_takes_over_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.Output().progress("compact run.zarr") as progress:
        progress(0, 4_000_000_000)
        now = 0.9
        progress(500_000_000, 4_000_000_000)
        assert not capsys.readouterr().err
        now = 10.0
        progress(1_000_000_000, 4_000_000_000)
        assert capsys.readouterr().err == "compact run.zarr   25%  100 MB/s  30 s left\n"
        now = 11.0
        progress(2_000_000_000, 4_000_000_000)
        assert not capsys.readouterr().err
    with output.Output(quiet=True).progress("compact run.zarr") as progress:
        progress(0, 4)
        now = 100.0
        progress(1, 4)
        assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (5e11, "500 GB"),
        (1.5e18, "1500 PB"),
    ],
)
def test_sizes_have_three_digits(value: float, text: str) -> None:
    assert drawing.size(value) == text


@pytest.mark.parametrize("width", range(1, 14))
def test_a_folded_name_keeps_both_ends_and_the_width(width: int) -> None:
    for text in ("model.layers.3", "模型.层.三.注意力"):
        found = drawing.fold(text, width)
        assert cell_len(found) <= width
        head, gap, tail = found.partition("…")
        assert text.startswith(head)
        assert text.endswith(tail) if gap else found == text


def test_plain_is_json_for_every_reader() -> None:
    value = {"a": (np.float32(1.5), np.int64(3), math.nan, math.inf), "b": Path("x"), 3: {True}}
    assert json.dumps(output.plain(value), allow_nan=False) == (
        '{"a": [1.5, 3, null, null], "b": "x", "3": [true]}'
    )


# -- what it needs ------------------------------------------------------------------------------


@pytest.fixture
def loaded(files: Path) -> Callable[..., set[str]]:
    """Give what tells which packages a command loads."""

    def run(*arguments: Any) -> set[str]:
        code = (
            "import sys\nfrom actstore.cli import main\nsys.argv[0] = 'actstore'\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True, text=True, check=True, env=environment(),
        )  # fmt: skip
        return set(done.stderr.split())

    return run


def test_help_and_info_load_little(files: Path, loaded: Callable[..., set[str]]) -> None:
    heavy = {"torch", "transformers", "zarr", "xarray", "pandas", "dask", "h5py"}
    assert loaded("--help").isdisjoint({*heavy, "numpy"})
    assert loaded("info", files / "run.stream").isdisjoint(heavy)
    assert loaded("info", files / "run.zarr").isdisjoint(heavy)
    assert loaded("ls", files / "run.zarr").isdisjoint(heavy)
    assert "torch" not in loaded("compact", files / "run.stream", files / "light.zarr")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_what_the_command_wants_it_says_what_to_install(missing: str) -> None:
    code = (
        "import importlib.util as util, sys\nfind = util.find_spec\n"
        f"util.find_spec = lambda name: None if name == {missing!r} else find(name)\n"
        "from actstore.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr == (
        f"the actstore command wants {missing}: pip install 'actstore[cli]'\n"
    )  # fmt: skip


def test_python_m_actstore_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "actstore", "--version"],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    assert done.stdout == f"actstore {actstore.__version__}\n"


def test_the_package_installs_it_as_the_command_actstore() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said["scripts"] == {"actstore": "actstore.cli:main"}
    assert {"typer", "rich"} <= {re.split(r"\W", one)[0] for one in
                                 said["optional-dependencies"]["cli"]}  # fmt: skip


def test_completion_is_offered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from actstore.cli import main; main()"],
        capture_output=True, text=True, check=False,
        env={**environment(), "_ACTSTORE_COMPLETE": "complete_bash", "COMP_WORDS": "actstore ve",
             "COMP_CWORD": "1"},
    )  # fmt: skip
    assert "verify" in done.stdout
