"""A shuffled archive has the log's rows in another order, known, the same for all arrays."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from jsonschema import Draft202012Validator

import actstore
from actstore import analysis
from actstore.archive import grid, shuffling, store
from actstore.archive.root import is_archive, read_attributes
from actstore.compaction import shuffling as scattering
from actstore.errors import ArchiveError, ConfigError
from actstore.stream.reader import StreamReader

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, files_of, random_values

SOURCE = "source_row"


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have many chunks, shards and pieces of little data."""
    monkeypatch.setattr(grid, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(grid, "SHARD_BYTES", 1 << 12)
    monkeypatch.setattr(scattering, "_PIECE", 1 << 11)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def same(found: xr.Dataset, wanted: xr.Dataset) -> None:
    """Compare every value and label, bit for bit, but for ``source_row``."""
    assert {*found.variables} - {*wanted.variables} <= {
        SOURCE,
        "encoder_source_row",
        "decoder_source_row",
    }
    for name, one in wanted.variables.items():
        mine = found.variables[name]
        assert mine.dims == one.dims
        assert mine.dtype == one.dtype
        if one.dtype.kind in "TO":
            assert (mine.values == one.values).all()
        else:
            assert mine.values.tobytes() == one.values.tobytes(), name


def both(log: Path, folder: Path, **options: Any) -> tuple[xr.Dataset, xr.Dataset]:
    """Compact a log in both layouts; open them."""
    actstore.compact(log, folder / "captured.zarr")
    actstore.compact(log, folder / "shuffled.zarr", layout="shuffled", **options)
    return tuple(
        actstore.open_dataset(folder / f"{one}.zarr", chunks=None)
        for one in ("captured", "shuffled")
    )  # type: ignore[return-value]


def odd_log(path: Path) -> Path:
    """Write a log with padding, rows that layers lack, a second call, and large packets."""
    log = LogBuilder(path)
    for block in range(3):
        log.layer(f"model.layers.{block}", "resid", block)
    log.layer("lm_head", "logits")
    log.layer("bits", "bits")
    for number in range(9):
        batch, length = (1, 40) if number == 4 else (2, 3 + number)
        mask = np.arange(length) < np.array([[length], [2]][:batch])
        log.begin(axis(batch, length, mask=mask, start=0), keep=1)
        for block in range(3 - (number % 3 == 1)):
            values = random_values((batch, length, 12), "bfloat16", seed=number * 10 + block)
            log.put(f"model.layers.{block}", values, parts=3 if number == 4 else 1)
        log.put("model.layers.0", random_values((batch, length, 12), "bfloat16"), call=1)
        log.put("lm_head", random_values((batch, 1, 20), "float16", seed=number))
        log.put("bits", random_values((batch, length), "bool", seed=number))
        if number % 2:
            log.commit()
    return log.close()


@pytest.mark.parametrize("made", [odd_log, lambda path: decoder_log(path, steps=30).path])
def test_sorted_by_their_source_rows_are_those_of_the_log(made: Any, tmp_path: Path) -> None:
    captured, shuffled = both(made(tmp_path / "run.stream"), tmp_path, seed=7)
    order = shuffled[SOURCE].values
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(captured.sizes["token"]))
    assert order.tolist() != sorted(order.tolist())
    assert (shuffled.attrs["layout"], shuffled.attrs["shuffle_seed"]) == ("shuffled", 7)
    same(shuffled.sortby(SOURCE), captured)
    same(shuffled, captured.isel(token=order))


@pytest.mark.parametrize("far", [False, True], ids=["folder", "bucket"])
def test_each_block_of_the_log_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: bool
) -> None:
    log = odd_log(tmp_path / "run.stream")
    (tmp_path / "bucket").mkdir()
    out = (tmp_path / "bucket/a.zarr").as_uri() if far else tmp_path / "a.zarr"
    read: Counter[int] = Counter()
    once = StreamReader.read_block

    def counted(self: StreamReader, index: int) -> Any:
        read[index] += 1
        return once(self, index)

    monkeypatch.setattr(grid, "CHUNK_BYTES", 1 << 8)
    monkeypatch.setattr(grid, "SHARD_BYTES", 1 << 9)  # many of a layer
    monkeypatch.setattr(StreamReader, "read_block", counted)
    monkeypatch.setattr("actstore.stream.reader.CACHE_BYTES", 1)
    monkeypatch.setattr(scattering.Gather, "__call__", None)  # what is checked in the end
    monkeypatch.setattr("actstore.compaction.writing._check_arrays", lambda *_: None)
    monkeypatch.setattr(scattering, "_PIECE", 1 << 20)
    actstore.compact(log, out, layout="shuffled", workers=1)
    assert max(read.values()) == 1


def test_neither_workers_nor_memory_change_a_byte(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=40, width=32).path
    found = []
    for number, options in enumerate(({"workers": 1}, {"workers": 3}, {"max_memory_gb": 0.1})):
        out = tmp_path / f"{number}.zarr"
        actstore.compact(log, out, layout="shuffled", seed=1, **options)
        found.append(files_of(out))
    assert found[0] == found[1] == found[2]
    actstore.compact(log, tmp_path / "other.zarr", layout="shuffled", seed=2)
    assert files_of(tmp_path / "other.zarr") != found[0]
    assert not [one.name for one in tmp_path.iterdir() if one.name.startswith(".")]


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=some.integers(0, 300), seed=some.integers(0, 2**63 - 1))
def test_an_order_is_a_permutation_that_a_seed_gives_again(rows: int, seed: int) -> None:
    found = shuffling.Shuffle.drawn({"token": rows}, seed)
    found.check({"token": rows})
    again = shuffling.Shuffle.drawn({"token": rows}, seed)
    assert found.orders["token"].tolist() == again.orders["token"].tolist()
    broken = found.orders["token"].copy()
    broken[:1] += 1
    if rows:
        with pytest.raises(ArchiveError, match="no permutation"):
            shuffling.Shuffle(seed, {"token": broken}).check({"token": rows})


@pytest.mark.parametrize("order", [[0, 1 << 45], [0, -1], [0.0, 1.0], [[0, 1]], [0, 1, 2]])
def test_what_is_no_order_of_the_rows_is_refused_before_memory_is_taken(order: list[Any]) -> None:
    with pytest.raises(ArchiveError, match="no permutation of the 2 rows"):
        shuffling.Shuffle(0, {"token": np.array(order)}).check({"token": 2})


def test_the_order_of_a_seed_never_changes() -> None:
    found = shuffling.Shuffle.drawn({"encoder_token": 8, "decoder_token": 8}, 3).orders
    assert {dim: one.tolist() for dim, one in found.items()} == {
        "encoder_token": [0, 4, 7, 1, 5, 6, 3, 2],
        "decoder_token": [0, 6, 2, 1, 3, 7, 4, 5],
    }  # fmt: skip


@pytest.mark.parametrize("precision", [None, "nmse=1e-3", "bfloat16"])
def test_verify_compares_with_the_logs_and_finds_what_differs(
    tmp_path: Path, precision: str | None
) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=20, width=32).path
    out = tmp_path / "a.zarr"
    actstore.compact(log, out, layout="shuffled", precision=precision)
    assert actstore.verify(out).ok
    assert actstore.verify(out, against=log).ok
    one = next(path for path in sorted((out / "resid" / "c").rglob("*")) if path.is_file())
    data = bytearray(one.read_bytes())
    data[30] ^= 4
    one.write_bytes(data)
    assert any("resid" in where.where for where in actstore.verify(out, against=log).damage)


def test_verify_finds_an_order_that_is_none(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=20).path
    out = tmp_path / "a.zarr"
    actstore.compact(log, out, layout="shuffled")
    order = store.read_part(out, SOURCE, (slice(None),))
    for wrong in (order[1], 1 << 45):
        order[0] = wrong
        store.write_part(out, SOURCE, (slice(None),), order)
        found = actstore.verify(out, against=log).damage
        (damage,) = [one for one in found if one.where == SOURCE]
        assert "no permutation" in damage.reason
    order = store.read_part(out, SOURCE, (slice(None),))
    order[:] = np.arange(order.size)  # a permutation, of other rows
    store.write_part(out, SOURCE, (slice(None),), order)
    found = {one.where.split("/")[0] for one in actstore.verify(out, against=log).damage}
    assert {"resid", "token_id", "position"} <= found


def test_several_logs_are_shuffled_together(tmp_path: Path) -> None:
    logs = [
        decoder_log(
            tmp_path / f"{one}.stream", steps=9, run=f"0000000{one}-0000-4000-8000-000000000000"
        ).path
        for one in (1, 2)
    ]
    actstore.compact(logs, tmp_path / "c.zarr")
    actstore.compact(logs, tmp_path / "s.zarr", layout="shuffled")
    captured, shuffled = (
        actstore.open_dataset(tmp_path / one, chunks=None) for one in ("c.zarr", "s.zarr")
    )
    same(shuffled.sortby(SOURCE), captured)
    assert len(set(shuffled.run.values[:9].tolist())) == 2
    assert actstore.verify(tmp_path / "s.zarr", against=logs).ok
    for one in (0, 1):
        mine, theirs = (each.actstore.sequence(3, 1, run=one) for each in (shuffled, captured))
        same(mine, theirs)


def test_two_axes_have_orders_of_their_own(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("encoder.block.0", "encoder_resid", 0)
    log.layer("decoder.block.0", "decoder_resid", 0)
    for number in range(6):
        log.begin(axis(2, 5, name="encoder_token"), axis(2, 4, name="decoder_token"))
        log.put("encoder.block.0", random_values((2, 5, 8), seed=number))
        log.put("decoder.block.0", random_values((2, 4, 8), seed=90 + number))
        log.commit()
    captured, shuffled = both(log.close(), tmp_path)
    same(shuffled.sortby("encoder_source_row").sortby("decoder_source_row"), captured)
    found = shuffled.actstore.sequence(2, 1, dim="decoder_token").decoder_resid
    wanted = captured.actstore.sequence(2, 1, dim="decoder_token").decoder_resid
    assert found.values.tobytes() == wanted.values.tobytes()


def test_sequences_and_last_rows_are_found_in_their_order(tmp_path: Path) -> None:
    captured, shuffled = both(odd_log(tmp_path / "run.stream"), tmp_path)
    for number in range(9):
        same(shuffled.actstore.sequence(number), captured.actstore.sequence(number))
    same(shuffled.actstore.last_positions(), captured.actstore.last_positions())
    tokens = decoder_log(tmp_path / "b.stream", steps=12).path
    (tmp_path / "b").mkdir()
    captured, shuffled = both(tokens, tmp_path / "b")
    same(shuffled.actstore.steps(), captured.actstore.steps())
    same(shuffled.actstore.steps(slice(-3, None)), captured.actstore.steps(slice(-3, None)))


def test_contexts_of_top_rows_are_their_neighbours_as_captured(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("model.norm", "final_norm")
    values = np.random.default_rng(0).normal(size=(8, 2, 9, 4)).astype(np.float32)
    for number in range(8):
        log.texts({100 + one: f"<{one}>" for one in range(18)})
        log.begin(axis(2, 9))
        log.put("model.norm", values[number])
        log.commit()
    captured, shuffled = both(log.close(), tmp_path)
    one, two = (
        analysis.top_activations(each, "final_norm", range(4), k=5, context=3)
        for each in (captured, shuffled)
    )
    for name in ("value", "context_text", "context_id", "position", "pass_index", "batch_item"):
        assert (one[name].values == two[name].values).all(), name


def test_statistics_are_those_of_the_captured_rows(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("model.norm", "final_norm")
    for number in range(8):
        log.begin(axis(2, 9))
        values = np.random.default_rng(number).normal(size=(2, 9, 4)).astype(np.float32)
        log.put("model.norm", values)
        log.commit()
    captured, shuffled = both(log.close(), tmp_path)
    one, two = (
        analysis.token_norms(each, "final_norm").compute() for each in (captured, shuffled)
    )
    same(two.sortby(SOURCE), one)


def test_a_log_is_not_appended(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=9).path
    later = decoder_log(tmp_path / "later.stream", run="00000001-0000-4000-8000-000000000000").path
    actstore.compact(log, tmp_path / "a.zarr", layout="shuffled")
    before = files_of(tmp_path / "a.zarr")
    with pytest.raises(ArchiveError, match="shuffled"):
        actstore.append(later, tmp_path / "a.zarr")
    assert files_of(tmp_path / "a.zarr") == before


@pytest.mark.parametrize("suffix", [".zarr.zip", ".h5"])
def test_exported_and_imported_it_is_the_same_archive(tmp_path: Path, suffix: str) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=9).path
    actstore.compact(log, tmp_path / "a.zarr", layout="shuffled", seed=4)
    actstore.export(tmp_path / "a.zarr", tmp_path / f"a{suffix}")
    actstore.import_archive(tmp_path / f"a{suffix}", tmp_path / "again.zarr")
    wanted = actstore.open_dataset(tmp_path / "a.zarr", chunks=None)
    for path in (tmp_path / f"a{suffix}", tmp_path / "again.zarr"):
        found = actstore.open_dataset(path, chunks=None)
        same(found, wanted)
        assert found.attrs["layout"] == "shuffled"
        same(found.actstore.sequence(0, 1), wanted.actstore.sequence(0, 1))
    assert actstore.verify(tmp_path / "again.zarr", against=log).ok


def test_it_is_shared_with_its_order(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=9).path
    actstore.compact(log, tmp_path / "a.zarr", layout="shuffled")
    actstore.share(tmp_path / "a.zarr", tmp_path / "shared")
    shared = next(one for one in (tmp_path / "shared").iterdir() if is_archive(one))
    same(
        actstore.open_dataset(shared, chunks=None),
        actstore.open_dataset(tmp_path / "a.zarr", chunks=None),
    )


def test_what_the_root_says_is_in_the_schema(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream").path
    actstore.compact(log, tmp_path / "a.zarr", layout="shuffled", seed=9)
    said = read_attributes(tmp_path / "a.zarr")
    schema = json.loads(
        (Path(__file__).parents[1] / "schemas" / "archive.schema.json").read_bytes()
    )
    validator = Draft202012Validator(schema)
    validator.validate(said)
    for wrong in ({"layout": "sorted"}, {"shuffle_seed": -1}):
        assert not validator.is_valid(said | wrong)
    del said["shuffle_seed"]
    assert not validator.is_valid(said)


def test_an_annotation_of_that_name_has_another(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("model.norm", "final_norm")
    for number in range(4):
        log.begin(axis(1, 4), annotations={SOURCE: [number]})
        log.put("model.norm", random_values((1, 4, 4), seed=number))
    captured, shuffled = both(log.close(), tmp_path)
    assert SOURCE not in captured
    assert (
        shuffled.annotation_source_row.values.tolist() == (shuffled[SOURCE].values // 4).tolist()
    )


@pytest.mark.parametrize(
    "wrong", [{"layout": "sorted"}, {"seed": -1}, {"seed": True}, {"seed": 1.5}]
)
def test_other_layouts_and_seeds_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    log = decoder_log(tmp_path / "run.stream").path
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        actstore.compact(log, tmp_path / "a.zarr", **wrong)
    assert not (tmp_path / "a.zarr").exists()


def test_a_disk_that_is_full_while_rows_are_scattered_leaves_no_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=20).path

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scattering.os, "pwrite", full)
        with pytest.raises(ArchiveError, match="No space left"):
            actstore.compact(log, tmp_path / "a.zarr", layout="shuffled")
    assert not list(tmp_path.glob(".*.rows"))
    actstore.compact(log, tmp_path / "a.zarr", layout="shuffled")
    assert actstore.verify(tmp_path / "a.zarr", against=log).ok
    assert not [one.name for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_figures_show_the_same_sequences(tmp_path: Path) -> None:
    from actstore.plots.chosen import chosen_rows

    captured, shuffled = both(decoder_log(tmp_path / "run.stream", steps=30).path, tmp_path)
    for options in ({}, {"pass_index": 0, "item": 1}, {"item": 0}):
        mine, theirs = (chosen_rows(one, "resid", **options) for one in (shuffled, captured))
        same(mine.dataset, theirs.dataset)
        assert mine.ends.tolist() == theirs.ends.tolist()
        assert (mine.texts, mine.generated) == (theirs.texts, theirs.generated)


def test_a_page_shows_the_same_sequence(tmp_path: Path) -> None:
    from actstore.accessor import token_axes
    from actstore.reporting.values import Found, Limits, _sequence

    captured, shuffled = both(decoder_log(tmp_path / "run.stream", steps=30).path, tmp_path)
    for sequence in (None, (0, 1), (5, 0)):
        found = []
        for one in (captured, shuffled):
            axis_ = token_axes(one)["token"]
            rows = _sequence(axis_, Limits(20, sequence, 1.0), Found())
            found.append(one.isel(token=rows))
        same(found[1], found[0])
        assert found[0].sizes["token"] > 1
    assert "html" in actstore.explore(shuffled).html


def test_sequences_are_exported_only_in_their_order(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("model.layers.0", "resid", 0)
    for number in range(8):
        log.begin(axis(2, 5))
        log.put("model.layers.0", random_values((2, 5, 4), seed=number))
    captured, shuffled = both(log.close(), tmp_path)
    with pytest.raises(ConfigError, match="shuffled"):
        actstore.export_rows(shuffled, tmp_path / "cache", format="saelens")
    actstore.export_rows(shuffled.sortby(SOURCE), tmp_path / "sorted", format="saelens")
    actstore.export_rows(captured, tmp_path / "captured", format="saelens")
    names = [one.name for one in (tmp_path / "captured").glob("*.arrow")]
    assert names
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("sorted", "captured"))
        assert one == two
    rows = actstore.export_rows(shuffled, tmp_path / "rows", format="saelens", context_size=1)
    assert rows.rows == 80


def test_what_a_killed_shuffling_left_is_removed_by_any_later_compaction(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream").path
    left = tmp_path / ".a.zarr.partial.rows"
    for layout in ("captured", "shuffled"):
        left.mkdir()
        (left / "0").write_bytes(b"rows")
        actstore.compact(log, tmp_path / "a.zarr", layout=layout)
        assert not left.exists()
        (tmp_path / "a.zarr").rename(tmp_path / layout)
