"""A log and its archive are the same lazy dataset; nothing is read before it is asked for."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actstore
from actstore import dataset as datasets
from actstore.archive import grid
from actstore.archive.reading import ShardedRows
from actstore.errors import (
    ConfigError,
    FormatError,
    MissingFileError,
    StreamCorruptError,
    UnsupportedVersionError,
)
from actstore.stream.reader import StreamReader

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, random_values

Build = Callable[[LogBuilder], Any]
V = random_values


def everything(log: LogBuilder) -> None:
    """Fire all that a dataset has a rule for."""
    log.features(64, [3, 8])
    log.texts({100: "a", 101: "é"})
    for name, site, block in (
        *(("h.0", "resid", 0), ("h.2", "resid", 2), ("h.2.mlp", "mlp", 2)),
        *(("norm", "final_norm", -1), ("model", "model", -1), ("head", "logits", -1)),
        *(("loose", "loose", -1), ("heads", "heads", -1), ("flags", "flags", -1)),
        *(("part", "part", -1), ("kept", "kept", -1), ("", "output", -1)),
    ):
        log.layer(name, site, block)
    for number in range(3):
        batch, sequence = (2, 4) if number == 0 else (2, 1)
        labels: dict[str, Any] = {"topic": ["x", "y"]} if number else {"score": [0.5, None]}
        mask = [[False, True, True, True], [True] * 4] if number == 0 else None
        log.begin(axis(batch, sequence, mask=mask), annotations=labels, keep=1)
        rows = (batch, sequence)
        log.put("h.0", V((*rows, 6), "bfloat16", seed=number))
        if number != 1:
            log.put("h.2.mlp", V((*rows, 6), "bfloat16", seed=number + 10), parts=2)
        log.put("h.2", V((*rows, 6), "bfloat16", seed=number + 20))
        log.put("h.2", V((*rows, 6), "bfloat16", seed=number + 30), call=1)
        normed = V((*rows, 6), "float16", seed=number + 40)
        log.put("model", normed, alias_of=log.put("norm", normed))
        head = V((batch, 1, 9), seed=number + 50)
        log.put("", head, alias_of=log.put("head", head))
        log.put("loose", V((number, 3), "int8", seed=number + 60))
        log.put("loose", V((3,), "float8_e4m3fn", seed=number + 70), call=1)
        log.put("heads", V((*rows, 2, 3), "complex64", seed=number + 80))
        log.put("flags", V(rows, "bool", seed=number + 90))
        if number == 2:
            log.put("part", V(rows, "int64", seed=number + 95))
        log.put("kept", V((*rows, 2), seed=number + 98), width=64)
        log.token(number, f"t{number}")
        if number == 1:
            log.commit()


@pytest.fixture
def log(tmp_path: Path) -> LogBuilder:
    built = LogBuilder(tmp_path / "run.stream")
    everything(built)
    built.close()
    return built


@pytest.fixture
def archive(log: LogBuilder) -> Path:
    return actstore.compact(log.path, log.path.with_suffix(".zarr")).path


@pytest.fixture(params=["log", "archive", "h5", "zarr.zip"])
def place(request: pytest.FixtureRequest, log: LogBuilder, archive: Path) -> Path:
    if request.param in ("log", "archive"):
        return log.path if request.param == "log" else archive
    return actstore.export(archive, log.path.with_suffix(f".{request.param}")).path


def assert_same(one: xr.Dataset, other: xr.Dataset) -> None:
    """Compare two datasets down to dtypes and bits, and what is said of each variable."""
    xr.testing.assert_equal(one.compute(), other.compute())
    assert set(one.coords) == set(other.coords)
    assert dict(one.sizes) == dict(other.sizes)
    for name, variable in one.variables.items():
        assert variable.dims == other.variables[name].dims
        assert variable.dtype == other.variables[name].dtype, name
        assert dict(variable.attrs) == dict(other.variables[name].attrs), name
        if variable.dtype.kind in "fc":
            assert variable.values.tobytes() == other.variables[name].values.tobytes(), name


@pytest.mark.parametrize("chunks", ["auto", None])
def test_what_was_closed_is_read_as_before_or_says_so(place: Path, chunks: Any) -> None:
    with actstore.open_dataset(place, chunks) as dataset:
        wanted = dataset.mlp.values
    with actstore.open_dataset(place, chunks) as dataset:
        found = dataset.mlp, dataset.flags
    if place.suffix in (".stream", ".h5"):
        for one in found:
            with pytest.raises(ConfigError, match="was closed; read it inside the with"):
                _ = one.values
    else:
        np.testing.assert_array_equal(found[0].values, wanted)


def test_a_reader_that_was_closed_says_so(log: LogBuilder) -> None:
    with actstore.open_stream(log.path) as reader:
        packets = reader.packets()
        next(packets)
    for ask in (lambda: next(packets), lambda: reader.values(0), lambda: reader.passes):
        with pytest.raises(ConfigError, match="was closed"):
            ask()


# -- the same dataset ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", ["auto", None, {}, {"token": 3}])
def test_log_archive_and_plain_xarray_are_the_same_dataset(
    log: LogBuilder, archive: Path, chunks: Any
) -> None:
    with (
        actstore.open_dataset(log.path, chunks) as one,
        actstore.open_dataset(archive, chunks) as other,
        xr.open_zarr(archive) as plain,
    ):
        assert_same(one, other)
        assert_same(one, plain)
        assert one.attrs["aliases"] == plain.attrs["aliases"]
        assert one.attrs["runs"] == plain.attrs["runs"]
        assert {"resid", "resid_call1", "heads", "loose_values", "part_present"} <= set(one)


@pytest.mark.parametrize("chunks", ["auto", None, {}, {"token": 3}])
def test_every_container_is_the_same_dataset_as_the_archive(
    place: Path, archive: Path, chunks: Any
) -> None:
    with (
        actstore.open_dataset(place, chunks) as one,
        actstore.open_dataset(archive, chunks) as other,
    ):
        assert_same(one, other)
        if place.suffix != ".stream":
            assert one.attrs == other.attrs
            for name in one.variables:
                assert one.variables[name].chunks == other.variables[name].chunks, name


def test_the_values_are_those_that_were_fired(log: LogBuilder, place: Path) -> None:
    def rows(layer: str, call: int = 0) -> Any:
        mine = [one for one in log.fired if one.layer == layer and one.call == call]
        return np.concatenate([one.values.reshape(-1, *one.values.shape[2:]) for one in mine])

    with actstore.open_dataset(place) as found:
        np.testing.assert_array_equal(found.final_norm.values, rows("norm"))
        np.testing.assert_array_equal(found.heads.values, rows("heads"))
        np.testing.assert_array_equal(found.flags.values, rows("flags"))
        np.testing.assert_array_equal(found.resid.sel(layer=0).values, rows("h.0").astype("f4"))
        second = rows("h.2", 1).astype("f4")
        np.testing.assert_array_equal(found.resid_call1.sel(layer=2).values, second)
        np.testing.assert_array_equal(found.kept_feature.values, [3, 8])
        np.testing.assert_array_equal(
            found.logits.values[[3, 7, 8, 9, 10, 11]], rows("head")[:, :]
        )
        assert np.isnan(found.logits.values[[0, 1, 2, 4, 5, 6]]).all()
        assert found.loose_values.attrs["source_dtype"] == "int8"
        assert found.loose_float8_e4m3fn_values.dtype == np.float32


def test_every_row_knows_its_token_and_labels(place: Path) -> None:
    with actstore.open_dataset(place) as found:
        assert found.token_id.values.tolist() == [*range(100, 108), 100, 101, 100, 101]
        assert found.token_text.values.tolist()[:3] == ["a", "é", ""]
        assert found.is_padding.values.tolist() == [True] + [False] * 11
        assert found.step.values.tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, 1, -1, 2, -1]
        assert found.topic.values.tolist() == [""] * 8 + ["x", "y"] * 2
        assert found.score.values[:4].tolist() == [0.5] * 4
        assert np.isnan(found.score.values[4:]).all()
        assert found.layer.values.tolist() == [0, 2]
        paris = found.resid.where(found.token_text == "é", drop=True)
        assert paris.sizes["token"] == 3


def test_labels_of_rows_have_no_index_and_layer_has_one(place: Path) -> None:
    with actstore.open_dataset(place) as found:
        assert set(found.indexes) == {"layer", "kept_feature"}
        assert {"token_id", "position", "batch_item", "pass_index", "step"} <= set(found.coords)


# -- lazy ---------------------------------------------------------------------------------------


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the blocks of a log as they are read."""
    seen: list[int] = []
    honest = StreamReader.block

    def block(self: StreamReader, index: int) -> Any:
        seen.append(index)
        return honest(self, index)

    monkeypatch.setattr(StreamReader, "block", block)
    return seen


@pytest.mark.parametrize("chunks", ["auto", None])
def test_opening_a_log_reads_no_block_and_selecting_only_its_own(
    tmp_path: Path, blocks_read: list[int], chunks: Any
) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=4)
    with actstore.open_dataset(log.path, chunks) as found:
        found = found.resid.sel(layer=1).isel(token=slice(10, 12))
        repr(found)
        assert blocks_read == []
        found.load() if chunks is None else None
    if chunks is None:
        with StreamReader(log.path) as reader:
            of_layer = reader.layer("model.layers.1").id
            owners = [reader.table.blocks[index].block.layer for index in blocks_read]
        assert owners == [of_layer]


def test_opening_an_archive_reads_no_chunk_of_values(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    honest = zarr.storage.LocalStore.get

    async def get(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        read.append(key)
        return await honest(self, key, *args, **kwargs)

    chunks: list[Any] = []
    encoded = ShardedRows._encoded

    def counted(self: ShardedRows, *place: int) -> Any:
        chunks.append(place)
        return encoded(self, *place)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get)
    monkeypatch.setattr(ShardedRows, "_encoded", counted)
    with actstore.open_dataset(archive) as found:
        repr(found)
        metadata = [key for key in read if key.endswith("zarr.json")]
        assert metadata == ["zarr.json"], "the root describes all that is in it"
        assert {key.split("/")[0] for key in read} <= {"zarr.json", "layer", "kept_feature"}
        assert not chunks
        assert found.heads.compute().size
    assert chunks


def test_auto_chunks_are_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 256)
    monkeypatch.setattr(grid, "SHARD_BYTES", 512)
    log = decoder_log(tmp_path / "run.stream", steps=40)
    compacted = actstore.compact(log.path, tmp_path / "run.zarr").path
    for path in (log.path, compacted):
        with actstore.open_dataset(path) as found:
            assert found.resid.chunks == ((1, 1, 1), (16,) * 5 + (10,), (8,))
            assert isinstance(found.resid.data, dask.array.Array)
            assert found.token_id.chunks is None
    with (
        actstore.open_dataset(log.path) as one,
        xr.open_zarr(compacted) as other,
        dask.config.set(scheduler="threads"),
    ):
        xr.testing.assert_equal(one.compute(), other.compute())


def test_without_dask_a_dataset_is_lazy_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with actstore.open_dataset(place) as found:
        assert found.resid.chunks is None
        assert not found.resid.variable._in_memory
        assert found.resid.isel(layer=0, token=0).values.shape == (6,)


def keys_of(length: int) -> st.SearchStrategy[Any]:
    inside = st.integers(-length, length - 1)
    bound = st.none() | st.integers(-length - 2, length + 2)
    steps = st.none() | st.integers(-3, 3).filter(bool)
    # an empty slice that goes down is an IndexError in xarray itself, whatever the backend
    slices = st.builds(slice, bound, bound, steps).filter(
        lambda one: (one.step or 1) > 0 or range(*one.indices(length))
    )
    return inside | slices | st.lists(inside, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["stream", "zarr", "h5", "zarr.zip"]))
def test_any_index_of_a_dataset_is_the_same_index_of_its_values(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    opened, whole = _opened(tmp_path_factory)
    one = opened[kind]
    names = ["resid", "heads", "flags", "part", "loose_values", "mlp", "token_text", "mlp_present"]
    name = data.draw(st.sampled_from(names))
    keys = {dim: data.draw(keys_of(size)) for dim, size in whole[name].sizes.items()}
    some = data.draw(st.sets(st.sampled_from(sorted(keys))))
    index = {dim: key for dim, key in keys.items() if dim in some}
    found, wanted = one[name].isel(index), whole[name].isel(index)
    xr.testing.assert_identical(found.drop_vars(found.coords), wanted.drop_vars(wanted.coords))


_open: list[tuple[dict[str, xr.Dataset], xr.Dataset]] = []


def _opened(factory: pytest.TempPathFactory) -> tuple[dict[str, xr.Dataset], xr.Dataset]:
    """Give lazy datasets of a log in every container, and its values; always the same ones."""
    if not _open:
        built = LogBuilder(factory.mktemp("indexed") / "run.stream")
        everything(built)
        places = {"stream": built.close()}
        places["zarr"] = actstore.compact(built.path, built.path.with_suffix(".zarr")).path
        for kind in ("h5", "zarr.zip"):
            target = built.path.with_suffix(f".{kind}")
            places[kind] = actstore.export(places["zarr"], target).path
        lazy = {kind: actstore.open_dataset(path, None) for kind, path in places.items()}
        _open.append((lazy, lazy["stream"].copy().compute()))
    return _open[0]


def test_threads_read_one_log_at_once(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=30)
    with actstore.open_dataset(log.path, None) as found:
        whole = found.compute()
        barrier = threading.Barrier(4)

        def read(block: int) -> bool:
            barrier.wait()
            one = found.resid.sel(layer=block % 3)
            return one.equals(whole.resid.sel(layer=block % 3))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(4)))


# -- closing ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("chunks", [None, "auto"])
def test_a_dataset_travels_to_another_process(place: Path, chunks: Any) -> None:
    here = actstore.open_dataset(place, chunks=chunks)
    assert_same(pickle.loads(pickle.dumps(here)).load(), here.load())


def test_dask_computes_over_a_log_in_processes(place: Path) -> None:
    with actstore.open_dataset(place) as lazy:
        name = next(name for name, one in lazy.data_vars.items() if one.chunks and one.size)
        code = (
            "import sys, actstore, dask\n"
            "if __name__ == '__main__':\n"
            "    dask.config.set(num_workers=1)\n"
            "    with actstore.open_dataset(sys.argv[1]) as found:\n"
            "        print(float(found[sys.argv[2]].sum().compute(scheduler='processes')))\n"
        )
        script = place.with_name("sum.py")
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, script, place, name], capture_output=True, text=True, check=True
        )
        assert float(done.stdout) == pytest.approx(float(lazy[name].sum()), nan_ok=True)


@pytest.mark.parametrize("chunks", ["auto", None, {}, {"token": 2}])
def test_closing_a_dataset_closes_its_log(
    log: LogBuilder, monkeypatch: pytest.MonkeyPatch, chunks: Any
) -> None:
    closed: list[Path] = []
    honest = StreamReader.close

    def close(self: StreamReader) -> None:
        closed.append(self.path)
        honest(self)

    monkeypatch.setattr(StreamReader, "close", close)
    found = actstore.open_dataset(log.path, chunks)
    assert closed == []
    found.close()
    assert closed == [log.path]
    found.close()


def test_a_dataset_that_is_dropped_leaves_no_file_open(place: Path) -> None:
    actstore.open_dataset(place)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        actstore.open_dataset(place)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


# -- what is no dataset -------------------------------------------------------------------------


def test_nothing_there_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"gone\.stream"):
        actstore.open_dataset(tmp_path / "gone.stream")


@pytest.mark.parametrize("name", ["notes.txt", "run.stream", "run.zarr.zip", "run.h5"])
def test_a_file_that_is_no_log_is_refused_and_all_formats_are_named(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"nothing of the kind")
    wanted = r"neither a \.stream log nor an archive: a Zarr folder, \.zarr\.zip or \.h5"
    with pytest.raises(FormatError, match=wanted):
        actstore.open_dataset(path)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"attributes": 3}',
        b'{"attributes": {"format": "other", "format_version": 0}}',
        b"[" * 100_000,
    ],
)
def test_a_folder_that_is_no_archive_is_refused_and_both_formats_are_named(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "zarr.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"\.stream log") as caught:
        actstore.open_dataset(tmp_path)
    assert "archive" in str(caught.value)


def test_a_foreign_zarr_store_is_refused(tmp_path: Path) -> None:
    xr.Dataset({"a": ("x", [1, 2])}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    with pytest.raises(FormatError, match="archive"):
        actstore.open_dataset(tmp_path / "other.zarr")


def test_another_version_is_refused_by_name(archive: Path) -> None:
    root = archive / "zarr.json"
    text = root.read_text()
    root.write_text(text.replace('"format_version": 0', '"format_version": 7'))
    with pytest.raises(UnsupportedVersionError, match="version 7"):
        actstore.open_dataset(archive)


def test_a_damaged_log_is_refused_when_opened_or_when_its_block_is_read(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", compression="none")
    data = bytearray(log.path.read_bytes())
    values = next(one for one in log.fired if one.layer == "model.layers.1").values
    data[data.index(values.tobytes())] ^= 1
    log.path.write_bytes(data)
    with actstore.open_dataset(log.path) as found:
        assert found.resid.sel(layer=0).compute().size
        with pytest.raises(StreamCorruptError):
            found.resid.sel(layer=1).compute()
    data[len(data) // 2 :] = data[len(data) // 2 + 7 :]
    log.path.write_bytes(data)
    with pytest.raises(StreamCorruptError):
        actstore.open_dataset(log.path)


@pytest.mark.parametrize("path", [None, 3, object()])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ConfigError, match="path"):
        actstore.open_dataset(path)
