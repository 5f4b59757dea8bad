"""Logs of a model on several processes are united: equal to what one process would have captured.

The logs are built from records here; `tests/capture/test_processes.py` has real processes.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import actstore
from actstore.compaction.logs import opened
from actstore.errors import ActstoreWarning, ConfigError, FormatError
from actstore.packet import Axis
from actstore.parallel import Parallel, Shard
from actstore.stream.reader import open_stream
from actstore.stream.records import Layer

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, random_values

BLOCKS = 3
#: Site -> shape of a row, and the dimension that tensor-parallel processes divide.
SITES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "resid": ((6,), None),
    "up": ((11,), -1),
    "heads": ((7, 4), -2),
    "norm": ((6,), -2),
}


def values_of(site: str, block: int, number: int, replica: int, rows: tuple[int, int]) -> Any:
    seed = sorted(SITES).index(site) + 10 * block + 100 * number + 1000 * replica
    dtype = "bfloat16" if site == "up" else "float32"
    return random_values((*rows, *SITES[site][0]), dtype, seed=seed)


def cut(values: NDArray[Any], dim: int | None, tensor: tuple[int, int], uneven: int) -> Any:
    """Give the part of one process: unequal parts, where the length doesn't divide or is so."""
    if dim is None:
        return values
    return np.split(values, bounds(values.shape[dim], tensor[1], uneven), dim)[tensor[0]]


def bounds(length: int, count: int, uneven: int) -> list[int]:
    inner = [min(length, (number * length) // count + uneven) for number in range(1, count)]
    return sorted(inner)


def write(
    path: Path,
    parallel: Parallel | None,
    *,
    replica: int = 0,
    passes: int = 3,
    uneven: int = 0,
    finish: bool = True,
    tokens: bool = True,
    given: bool = True,
    batch: int = 2,
) -> Path:
    """Write the log of one process, or of the whole model."""
    mesh = parallel or Parallel()
    log = LogBuilder(path, run=path.stem, parallel=parallel)
    place, stages = mesh.pipeline
    blocks = [one for one in range(BLOCKS) if one * stages // BLOCKS == place]
    divided = mesh.tensor[1] > 1
    if place == 0:
        log.layer("embed", "embed", kind="Embedding")
    for block in blocks:
        for site, (shape, dim) in SITES.items():
            shard = Shard(dim) if divided and dim is not None else None
            if shard and dim == -1:
                ends = [0, *bounds(shape[-1], mesh.tensor[1], uneven)]
                shard = Shard(-1, ends[mesh.tensor[0]], shape[-1])
            log.layer(f"layers.{block}.{site}", site, block, shard=shard)
        log.layer(f"layers.{block}", "block", block)
    log.layer("stat", shard=Shard(-1) if divided else None)
    log.layer("", "output", kind="Model")
    log.texts({100: "a"} if place == 0 and given else {})
    for number in range(passes):
        sequence = 5 if number == 0 else 2
        start = 0 if number == 0 else 3 + 2 * number
        fed = axis(batch, sequence, start=start)
        if place or not given:  # of hidden states alone
            shape, places = (batch, sequence), np.tile(np.arange(sequence), (batch, 1))
            fed = Axis("token", *shape, np.full(shape, -1), places, np.ones(shape, np.bool_))
        labels = {"topic": ["x", "y"][:batch]} if place == 0 else None
        log.begin(fed, annotations=labels)
        if place == 0:
            log.put("embed", random_values((batch, sequence, 6), seed=number + 50 * replica))
        last = 0
        for block in blocks:
            for site, (_, dim) in SITES.items():
                whole = values_of(site, block, number, replica, (batch, sequence))
                parts = 2 if site == "resid" and number == 0 else 1
                last = log.put(f"layers.{block}.{site}", cut(whole, dim, mesh.tensor, uneven),
                               parts=parts)  # fmt: skip
                if site == "resid":
                    resid = last
            log.put(f"layers.{block}", values_of("resid", block, number, replica,
                                                 (batch, sequence)), alias_of=resid)  # fmt: skip
        if place == stages - 1:
            stat = random_values((13,), seed=number + 7 * replica)
            log.put("stat", cut(stat, -1, mesh.tensor, uneven))
        root = values_of("resid", blocks[-1], number, replica, (batch, sequence))
        log.put("", root, alias_of=resid)
        if tokens and place == stages - 1:
            log.token(100 + number, f"t{number}")
        log.commit()
    return log.close(finish=finish)


def logs_of(folder: Path, sizes: tuple[int, int, int], **how: Any) -> list[Path]:
    """Write the logs of a mesh."""
    paths = []
    for places in np.ndindex(*sizes):
        pairs = zip(places, sizes, strict=True)
        data, pipeline, tensor = ((int(place), size) for place, size in pairs)
        parallel = Parallel(data, pipeline, tensor, run_id="r")
        name = f"d{places[0]}p{places[1]}t{places[2]}.stream"
        paths.append(write(folder / name, parallel, replica=places[0], **how))
    return paths


def oracle_of(folder: Path, replicas: int, **how: Any) -> list[Path]:
    return [write(folder / f"whole{n}.stream", None, replica=n, **how) for n in range(replicas)]


def assert_same(found: Path, wanted: Path) -> None:
    with (
        xr.open_zarr(found, chunks=None) as mine,
        xr.open_zarr(wanted, chunks=None) as theirs,
    ):
        assert set(mine.variables) == set(theirs.variables)
        for name in theirs.variables:
            a, b = mine[name], theirs[name]
            assert a.dims == b.dims, name
            if a.dtype.kind == "T":
                assert a.values.tolist() == b.values.tolist(), name
            else:
                assert a.dtype == b.dtype, name
                assert a.values.tobytes() == b.values.tobytes(), name
        assert mine.attrs["aliases"] == theirs.attrs["aliases"]
        assert mine.attrs["rows"] == theirs.attrs["rows"]


@settings(
    deadline=None,
    max_examples=10,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    uneven=st.integers(0, 2),
    order=st.randoms(use_true_random=False),
)
def test_any_mesh_is_united_to_what_one_process_would_have(
    tmp_path_factory: pytest.TempPathFactory, sizes: Any, uneven: int, order: Any
) -> None:
    folder = tmp_path_factory.mktemp("mesh")
    logs = logs_of(folder, sizes, uneven=uneven)
    order.shuffle(logs)
    found = actstore.compact(logs, folder / "found.zarr")
    wanted = actstore.compact(oracle_of(folder, sizes[0]), folder / "wanted.zarr")
    assert_same(found.path, wanted.path)
    assert found.rows == wanted.rows
    assert found.aliases == wanted.aliases
    assert actstore.verify(found.path, against=logs).ok


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give the logs of 1 × 2 × 2 processes."""
    return logs_of(tmp_path_factory.mktemp("mesh"), (1, 2, 2))


def test_united_rows_are_shuffled_as_any(mesh: list[Path], tmp_path: Path) -> None:
    captured = actstore.compact(mesh, tmp_path / "captured.zarr").path
    shuffled = actstore.compact(mesh, tmp_path / "shuffled.zarr", layout="shuffled").path
    with actstore.open_dataset(captured) as wanted, actstore.open_dataset(shuffled) as found:
        assert not np.array_equal(found.source_row, np.arange(found.sizes["token"]))
        again = found.sortby("source_row").drop_vars("source_row")
        xr.testing.assert_equal(again.compute(), wanted.compute())


def refused(logs: Sequence[Path], *told: str, ranks: str = "all") -> None:
    with pytest.raises(ConfigError) as error, opened(logs, None, None, ranks):
        pass
    for text in told:
        assert text in str(error.value)


def test_a_missing_rank_is_named(mesh: list[Path]) -> None:
    refused(mesh[:1] + mesh[2:], "missing: pipeline 0 of 2, tensor 1 of 2", "ranks='given'")
    refused(mesh[:1], "there are 1 logs", "pipeline 1 of 2, tensor 0 of 2")
    refused(mesh[:3], "pipeline 1 of 2, tensor 1 of 2", ranks="common")


def test_of_given_ranks_what_lacks_a_part_is_kept_apart(mesh: list[Path], tmp_path: Path) -> None:
    wanted = actstore.compact(oracle_of(tmp_path, 1), tmp_path / "wanted.zarr").path
    logs = [mesh[1], *mesh[2:]]
    with pytest.warns(ActstoreWarning, match="kept apart"):
        found = actstore.compact(logs, tmp_path / "found.zarr", ranks="given").path
    with xr.open_zarr(found, chunks=None) as mine, xr.open_zarr(wanted, chunks=None) as theirs:
        np.testing.assert_array_equal(mine["resid"].values, theirs["resid"].values)
        np.testing.assert_array_equal(mine["up"].sel(layer=2).values, theirs["up"].values[2])
        apart = next(name for name in mine.variables if "up" in str(name) and "tensor1" in name)
        np.testing.assert_array_equal(
            mine[apart].sel(layer=0).values, theirs["up"].values[0, :, 5:]
        )
        assert mine["token_id"].values.tolist() == theirs["token_id"].values.tolist()
    with pytest.warns(ActstoreWarning, match="kept apart"):
        assert actstore.verify(found, against=logs).ok


def test_a_rank_given_twice_is_refused(mesh: list[Path], tmp_path: Path) -> None:
    again = write(
        tmp_path / "again.stream", Parallel((0, 1), (0, 2), (1, 2), run_id="r"), passes=2
    )
    refused([*mesh, again], "given twice", "again.stream with 2 passes", "with 3 passes")
    refused([*mesh, mesh[0]], "same run")


def test_meshes_that_differ_are_refused(mesh: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.stream", Parallel((0, 2), (0, 2), (0, 2), run_id="r"))
    refused([*mesh, other], "data 1 × pipeline 2 × tensor 2", "data 2 × pipeline 2 × tensor 2")


def test_two_runs_of_a_mesh_are_two_runs(mesh: list[Path], tmp_path: Path) -> None:
    more = [
        write(tmp_path / f"x{t}.stream", Parallel(tensor=(t, 2), run_id="x"), replica=1)
        for t in range(2)
    ]
    alone = write(tmp_path / "alone.stream", None, replica=2)
    found = actstore.compact([*mesh, alone, *more], tmp_path / "found.zarr").path
    wholes = oracle_of(tmp_path, 3)
    wanted = actstore.compact([wholes[0], wholes[2], wholes[1]], tmp_path / "wanted.zarr").path
    assert_same(found, wanted)
    with actstore.open_dataset(found) as dataset:
        assert len(dataset.attrs["runs"]) == 3
        assert len(dataset.attrs["provenance"]["logs"]) == 7


@pytest.mark.parametrize("finish", [True, False])
def test_unequal_progress_is_named_and_what_all_have_is_kept(
    tmp_path: Path, mesh: list[Path], finish: bool
) -> None:
    short = write(
        tmp_path / "short.stream",
        Parallel((0, 1), (1, 2), (0, 2), run_id="r"),
        passes=2,
        finish=finish,
    )
    logs = [*mesh[:2], short, mesh[3]]
    refused(logs, "short.stream (pipeline 1 of 2, tensor 0 of 2) has 2", "of the 3 that", "common")
    found = actstore.compact(logs, tmp_path / "found.zarr", ranks="common").path
    wanted = actstore.compact(oracle_of(tmp_path, 1, passes=2), tmp_path / "wanted.zarr").path
    assert_same(found, wanted)
    assert actstore.verify(found, against=logs).ok


def test_a_pass_that_a_killed_rank_did_not_end_is_no_common_one(tmp_path: Path) -> None:
    cut_off = LogBuilder(
        tmp_path / "killed.stream", run="k", parallel=Parallel(tensor=(1, 2), run_id="r")
    )
    cut_off.layer("layers.0.up", "up", 0, shard=Shard(-1))
    rows = (2, 5)
    whole = values_of("up", 0, 0, 0, rows)
    cut_off.begin(axis(*rows))
    cut_off.put("layers.0.up", whole[..., 5:])
    cut_off.commit()
    cut_off.begin(axis(2, 2, start=5), aborted=True)
    killed = cut_off.close(finish=False)
    first = LogBuilder(
        tmp_path / "a.stream", run="a", parallel=Parallel(tensor=(0, 2), run_id="r")
    )
    first.layer("layers.0.up", "up", 0, shard=Shard(-1))
    for number in range(2):
        size = (2, 5 if number == 0 else 2)
        first.begin(axis(*size, start=5 * number))
        first.put("layers.0.up", values_of("up", 0, number, 0, size)[..., :5])
    given_logs = [first.close(), killed]
    refused(given_logs, "fired in pass 1 (call 0), but not in", "killed.stream")
    with opened(given_logs, None, None, "common") as reader:
        assert len(reader.passes) == 1


def one_of(folder: Path, tensor: int, fired: Sequence[int], topic: str = "x", **mesh: Any) -> Path:
    """Write a log of three passes, of which a layer that all have whole fired in some."""
    parallel = Parallel(tensor=(tensor, 2), run_id="r", **mesh)
    name = f"{parallel.pipeline[0]}{tensor}"
    log = LogBuilder(folder / f"{name}.stream", run=name, parallel=parallel)
    log.layer("h")
    for number in range(3):
        log.begin(axis(1, 2), aborted=number not in fired, annotations={"topic": [topic]})
        if number in fired:
            log.put("h", np.full((1, 2, 4), number, np.float32))
    return log.close()


@pytest.mark.parametrize(("more", "fewer"), [((0, 1, 2), (0, 1)), ((0, 1, 2), (1, 2))])
def test_a_rank_that_lacks_packets_of_a_layer_that_all_have_whole_is_named(
    tmp_path: Path, more: Sequence[int], fewer: Sequence[int]
) -> None:
    lacking = next(iter({*more} - {*fewer}))
    logs = [one_of(tmp_path, 0, fewer), one_of(tmp_path, 1, more)]
    for given_logs in (logs, logs[::-1]):
        refused(given_logs, f"'h' fired in pass {lacking} (call 0), but not in", "00.stream")
    with opened(logs, None, None, "given") as reader:
        kept = [one for one in fewer if one < len(reader.passes)]
        assert reader.table.pass_index.tolist() == kept


def test_a_stage_that_lacks_packets_of_a_layer_that_all_have_is_named(tmp_path: Path) -> None:
    logs = [
        one_of(tmp_path, tensor, (0, 1) if (stage, tensor) == (1, 1) else (0, 1, 2),
               pipeline=(stage, 2))
        for stage in range(2) for tensor in range(2)
    ]  # fmt: skip
    refused(logs, "'h' fired in pass 2 (call 0), but not in", "11.stream")


def test_annotations_that_disagree_are_refused(tmp_path: Path) -> None:
    logs = [one_of(tmp_path, place, (0, 1, 2), topic) for place, topic in enumerate("xy")]
    refused(logs, "pass 0 of", "annotated with other 'topic'", "00.stream", "01.stream")


def test_passes_that_disagree_are_refused(tmp_path: Path, mesh: list[Path]) -> None:
    place = Parallel((0, 1), (0, 2), (1, 2), run_id="r")
    wide = write(tmp_path / "wide.stream", place, batch=1)
    refused([mesh[0], wide, *mesh[2:]], "pass 0 of", "2 × 5 rows in one, 1 × 5 in the other")
    fed = LogBuilder(tmp_path / "fed.stream", run="fed", parallel=place)
    for number in range(3):
        other = axis(2, 5 if number == 0 else 2)
        fed.begin(replace(other, token_ids=other.token_ids + 1))
    refused([mesh[0], fed.close(), *mesh[2:]], "were fed other tokens")


def test_recorded_tokens_that_disagree_are_refused(tmp_path: Path, mesh: list[Path]) -> None:
    place = Parallel((0, 1), (1, 2), (1, 2), run_id="r")
    log = LogBuilder(tmp_path / "told.stream", run="told", parallel=place)
    for number in range(3):
        log.begin(axis(2, 5 if number == 0 else 2))
        log.token(100 + number if number < 2 else 7, "x")
    refused([*mesh[:3], log.close()], "recorded different tokens from step 2 on")


def test_tokens_come_from_whoever_was_fed_or_told_them(tmp_path: Path) -> None:
    logs = [
        write(
            tmp_path / "a.stream", Parallel(tensor=(0, 2), run_id="r"), given=False, tokens=False
        ),
        write(tmp_path / "b.stream", Parallel(tensor=(1, 2), run_id="r")),
    ]
    found = actstore.compact(logs, tmp_path / "found.zarr").path
    assert_same(found, actstore.compact(oracle_of(tmp_path, 1), tmp_path / "wanted.zarr").path)


def pair(
    folder: Path,
    first: NDArray[Any],
    second: NDArray[Any],
    shards: Sequence[Shard | None] = (None, None),
    *,
    site: str = "act",
    **how: Any,
) -> list[Path]:
    """Write two tensor-parallel logs of one layer."""
    paths = []
    for place, (values, shard) in enumerate(zip((first, second), shards, strict=True)):
        parallel = Parallel(tensor=(place, 2), run_id="r")
        log = LogBuilder(folder / f"t{place}.stream", run=str(place), parallel=parallel)
        log.layer("act", site, shard=shard)
        if how.get("width"):
            log.features(how["width"], range(values.shape[-1]))
        log.begin(axis(1, 3))
        log.put("act", values, **how)
        paths.append(log.close())
    return paths


def test_what_differs_without_a_word_is_kept_apart_and_told(tmp_path: Path) -> None:
    a, b = random_values((1, 3, 4), seed=1), random_values((1, 3, 4), seed=2)
    with pytest.warns(ActstoreWarning, match="'act'.*sharded"):
        found = actstore.compact(pair(tmp_path, a, b), tmp_path / "found.zarr").path
    with xr.open_zarr(found, chunks=None) as dataset:
        names = sorted(str(name) for name in dataset.data_vars)
        assert len(names) == 2
        for name, values in zip(names, (a, b), strict=True):
            assert dataset[name].values.tobytes() == values[0].tobytes()


@pytest.mark.parametrize("shards", [(None, None), (Shard(-1), Shard(-1))])
def test_what_differs_between_stages_and_tensor_ranks_is_kept_apart_and_whole(
    tmp_path: Path, shards: Sequence[Shard | None]
) -> None:
    logs, wanted = [], []
    for stage, tensor in np.ndindex(2, 2):
        parallel = Parallel(pipeline=(stage, 2), tensor=(tensor, 2), run_id="r")
        path = tmp_path / f"{stage}{tensor}.stream"
        log = LogBuilder(path, run=path.stem, parallel=parallel)
        log.layer("act", shard=shards[tensor])
        log.begin(axis(1, 3))
        wanted.append(random_values((1, 3, 4), seed=2 * stage + tensor))
        log.put("act", wanted[-1])
        logs.append(log.close())
    names = [f"act@tensor{tensor}@pipeline{stage}" for stage in range(2) for tensor in range(2)]
    if shards[0] is not None:
        names = ["act@pipeline0", "act@pipeline1"]
        wanted = [np.concatenate(wanted[:2], -1), np.concatenate(wanted[2:], -1)]
    with (
        pytest.warns(ActstoreWarning, match=f"as layers .*'{names[-1]}'"),
        opened(logs, None, None) as reader,
    ):
        assert sorted(reader.layers) == sorted(names)
        for name, values in zip(names, wanted, strict=True):
            (row,) = np.flatnonzero(reader.table.layer == reader.layers[name].id).tolist()
            assert reader.piece(row, 0, values.nbytes).tobytes() == values.tobytes()
    with pytest.warns(ActstoreWarning, match="kept apart"):
        found = actstore.compact(logs, tmp_path / "found.zarr").path
    with xr.open_zarr(found, chunks=None) as dataset:
        held = sorted(dataset[name].values.tobytes() for name in dataset.data_vars)
        assert held == sorted(one.tobytes() for one in wanted)


def test_a_layer_that_has_the_name_of_one_kept_apart_is_refused(tmp_path: Path) -> None:
    paths = []
    for place in range(2):
        parallel = Parallel(tensor=(place, 2), run_id="r")
        log = LogBuilder(tmp_path / f"{place}.stream", run=str(place), parallel=parallel)
        log.begin(axis(1, 3))
        for name in ("act", "act@tensor1"):
            log.layer(name)
            log.put(name, random_values((1, 3, 4), seed=place if name == "act" else 7))
        paths.append(log.close())
    with pytest.warns(ActstoreWarning, match="kept apart"):
        refused(paths, "layer 'act' of", "layer 'act@tensor1' of", "would both be named")


def test_partial_sums_are_kept_apart(tmp_path: Path) -> None:
    a, b = random_values((1, 3, 4), seed=1), random_values((1, 3, 4), seed=2)
    partial = Shard(partial=True)
    with pytest.warns(ActstoreWarning, match="summands"):
        found = actstore.compact(pair(tmp_path, a, b, (partial, partial)), tmp_path / "f.zarr")
    assert len(found.variables) == 2


def test_parts_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    def two(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return folder

    a, b = np.ones((1, 3, 4), np.float32), np.ones((1, 2, 4), np.float32)
    refused(pair(two("rows"), a, b, (Shard(-1), Shard(-1))), "don't fit", "(1, 3, 4), (1, 2, 4)")
    halves = Shard(-1, 0, 8), Shard(-1, 4, 9)
    refused(pair(two("size"), a, a, halves), "it says itself that it is at 4 of 9")
    refused(pair(two("dims"), a, a, (Shard(-1), Shard(-2))), "divide layer 'act' differently")
    refused(pair(two("kind"), a, a.astype(np.float16), (Shard(-1), Shard(-1))), "float32, float16")
    refused(pair(two("sampled"), a, a, (Shard(-1), Shard(-1)), width=40), "sampled", "FULL_TENSOR")


def test_parts_are_in_the_order_of_their_offsets(tmp_path: Path) -> None:
    a, b = random_values((1, 3, 2), seed=1), random_values((1, 3, 4), seed=2)
    logs = pair(tmp_path, a, b, (Shard(-1, 4, 6), Shard(-1, 0, 6)))
    with opened(logs, None, None) as reader:
        found = reader.piece(0, 0, 3 * 6 * 4).view(np.float32).reshape(1, 3, 6)
        assert found.tobytes() == np.concatenate([b, a], -1).tobytes()
        some = reader.piece(0, 20, 44).tobytes()
        assert some == np.concatenate([b, a], -1).tobytes()[20:44]


def test_blocks_of_two_stages_by_one_name_are_refused(tmp_path: Path) -> None:
    paths = []
    for place in range(2):
        parallel = Parallel(pipeline=(place, 2), run_id="r")
        log = LogBuilder(tmp_path / f"{place}.stream", run=str(place), parallel=parallel)
        log.layer("layers.0", "resid", 0, kind="Block")
        log.begin(axis(1, 3))
        log.put("layers.0", random_values((1, 3, 4), seed=place))
        paths.append(log.close())
    refused(paths, "'layers.0'", "first_block")


def test_a_placeholder_gives_way_to_the_block_itself(tmp_path: Path) -> None:
    paths, kept = [], random_values((1, 3, 4), seed=5)
    for place in range(2):
        parallel = Parallel(pipeline=(place, 2), run_id="r")
        log = LogBuilder(tmp_path / f"{place}.stream", run=str(place), parallel=parallel)
        log.layer("layers.1", "resid", 1, kind="Block" if place else "Identity")
        log.begin(axis(1, 3))
        log.put("layers.1", kept if place else random_values((1, 3, 4), seed=1))
        paths.append(log.close())
    with opened(paths, None, None) as reader:
        assert reader.piece(0, 0, 48).tobytes() == kept.tobytes()


def test_parts_of_nobody_knows_what_are_refused(tmp_path: Path) -> None:
    logs = []
    for number in range(2):
        log = LogBuilder(tmp_path / f"{number}.stream", run=str(number))
        log.layer("act", shard=Shard(-1))
        log.begin(axis(1, 3))
        log.put("act", random_values((1, 3, 4), seed=number))
        logs.append(log.close())
    refused(logs, "'act'", "doesn't say among which")
    with opened(logs[:1], None, None) as alone, opened(logs, None, None, "given") as both:
        assert (len(alone.passes), len(both.passes)) == (1, 2)


def test_logs_that_say_nothing_are_runs(tmp_path: Path) -> None:
    logs = oracle_of(tmp_path, 2)
    with warnings.catch_warnings(), opened(logs, None, None) as reader:
        assert len(reader.passes) == 6
    with pytest.raises(ConfigError, match="ranks must be one of"), opened(logs, None, None, "x"):
        pass


def test_a_header_that_says_nonsense_is_refused(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "a.stream")
    log.close()
    data = (tmp_path / "a.stream").read_bytes()
    assert data
    for said in (7, {}, {"run": None, "data": [1, 1]}, {"run": 3, "data": [0, 1]}, {"run": ""}):
        if said == {}:
            assert Parallel.of({"parallel": said}) == Parallel()
            continue
        with pytest.raises(FormatError, match="parallel"):
            Parallel.of({"parallel": said})
    for said in (7, {"dim": 0}, {"dim": -1, "offset": 1}, {"dim": -1, "offset": -1, "size": 2}):
        with pytest.raises(FormatError, match="shard"):
            Shard.of(said)


@given(
    st.one_of(
        st.just(Shard(partial=True)),
        st.builds(Shard, st.integers(-64, -1)),
        st.builds(Shard, st.integers(-64, -1), st.integers(0, 99), st.integers(0, 99)),
    )
)
def test_a_layer_keeps_its_shard(shard: Shard) -> None:
    from actstore.packet import LayerInfo

    layer = Layer(LayerInfo(3, "a", "b", 1, "Linear", shard))
    assert Layer.decode(layer.encode()) == layer


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"data": (2, 2)}, "place < size"),
        ({"tensor": 3}, "wants"),
        ({"pipeline": (0, True)}, "wants"),
        ({"sharded": {"a": "b"}}, "sharded"),
        ({"sharded": ["a"]}, "sharded"),
        ({"run_id": ""}, "run_id"),
        ({"first_block": -1}, "first_block"),
    ],
)
def test_parallel_refuses_what_it_can_not_mean(how: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Parallel(**how)


def test_a_mesh_beyond_all_measure_is_refused_at_once(tmp_path: Path) -> None:
    vast = Parallel((0, 1 << 20), (0, 1 << 20), (0, 1 << 20), run_id="r")
    log = write(tmp_path / "a.stream", vast)
    refused(
        [log], "missing: data 0 of 1048576, pipeline 0 of 1048576, tensor 1 of 1048576", "more"
    )


def test_the_command_unites_and_says_where_a_log_stands(mesh: list[Path], tmp_path: Path) -> None:
    def actstore_(*given: object, code: int = 0) -> str:
        command = [sys.executable, "-m", "actstore", *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "pipeline 0 of 2, tensor 1 of 2" in " ".join(actstore_("info", mesh[1]).split())
    target = tmp_path / "a.zarr"
    short = write(tmp_path / "s.stream", Parallel((0, 1), (1, 2), (1, 2), run_id="r"), passes=2)
    logs = [*mesh[:3], short]
    assert "passes" in actstore_("compact", *logs, target, code=3)
    actstore_("compact", *logs, target, "--ranks", "common")
    wanted = actstore.compact(oracle_of(tmp_path, 1, passes=2), tmp_path / "wanted.zarr").path
    assert_same(target, wanted)


def test_a_log_of_the_vectors_says_its_part() -> None:
    vectors = Path(__file__).parents[1] / "schemas" / "vectors" / "good"
    with open_stream(vectors / "one-of-several.stream") as reader:
        assert Parallel.of(reader.header) == Parallel(tensor=(1, 2), run_id="a run")
        assert reader.layers["layer"].shard == Shard(-1, 3, 5)


def test_a_log_says_where_it_stands(mesh: list[Path]) -> None:
    with open_stream(mesh[1]) as reader:
        assert Parallel.of(reader.header) == Parallel((0, 1), (0, 2), (1, 2), run_id="r")
        assert str(Parallel.of(reader.header)) == "pipeline 0 of 2, tensor 1 of 2"
