"""An archive or a log becomes one file that everyone opens, and the same archive again."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
from zarr.storage import ZipStore

import actstore
from actstore import (
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    dtypes,
    exporting,
    plots,
)
from actstore.archive import grid, store
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.root import read_attributes
from actstore.errors import ArchiveError, ConfigError, FormatError, MissingFileError
from actstore.hdf5 import chunks, writing

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, files_of, random_values

Build = Callable[[LogBuilder], Any]
KINDS = sorted(dtypes.BY_NAME)
TEXTS = ["", "é", "日本語", "\u200b", "a\0b", "\\0", "\\", "😀", " x\n"]
SUFFIXES = ["h5", "zarr.zip"]


def every_dtype(log: LogBuilder) -> None:
    """Fire every dtype of the formats, in rows with holes."""
    for name in KINDS:
        log.layer(f"x.{name}", name, -1)
        log.layer(f"h.0.{name}", f"{name} of blocks", 0)
        log.layer(f"h.2.{name}", f"{name} of blocks", 2)
    for number in range(4):
        log.begin(axis(2, 3))
        for place, name in enumerate(KINDS):
            seed = 100 * number + place
            if number != 2:
                log.put(f"x.{name}", random_values((2, 3, 5), name, seed=seed))
            if number in (0, 3):
                log.put(f"h.0.{name}", random_values((2, 3), name, seed=seed + 1))
            log.put(f"h.2.{name}", random_values((2, 3), name, seed=seed + 2))


def texts(log: LogBuilder) -> None:
    """Fire for tokens whose texts are anything."""
    log.texts({100 + index: text for index, text in enumerate(TEXTS)})
    log.layer("h.0", "resid", 0)
    log.begin(axis(1, len(TEXTS)), annotations={"日本": ["a\0\\"]})
    log.put("h.0", random_values((1, len(TEXTS), 4)))
    for index, text in enumerate(TEXTS):
        log.token(index, text)


def ragged(log: LogBuilder) -> None:
    """Fire what doesn't align, and nothing but empty rows."""
    log.layer("loose", "loose", -1)
    log.layer("loose.3", "others", 3)
    log.layer("empty", "empty", -1)
    for number in range(3):
        log.begin(axis(1, 2))
        log.put("loose", random_values((number, 3), "int8", seed=number))
        log.put("loose.3", random_values((7,), "float16", seed=number))
        log.put("empty", random_values((0,), "float32"))


def two_stacks(log: LogBuilder) -> None:
    """Fire an encoder and a decoder, an alias, and kept features."""
    log.features(32, [3, 8])
    for stack in ("encoder", "decoder"):
        for block in range(2):
            log.layer(f"{stack}.{block}.mlp", f"{stack}_mlp", block)
        log.layer(f"{stack}.norm", f"{stack}_final_norm", -1)
        log.layer(f"{stack}.alias", f"{stack}_alias", -1)
    log.layer("kept", "decoder_kept", -1)
    for number in range(2):
        mask = [[True] * 3, [False, True, True]]
        log.begin(axis(2, 3, name="encoder_token", mask=mask), axis(2, 2, name="decoder_token"))
        for stack, sequence in (("encoder", 3), ("decoder", 2)):
            for block in range(2):
                values = random_values((2, sequence, 6), "bfloat16", seed=block + number)
                log.put(f"{stack}.{block}.mlp", values)
            normed = random_values((2, sequence, 6), seed=9)
            log.put(f"{stack}.alias", normed, alias_of=log.put(f"{stack}.norm", normed))
        log.put("kept", random_values((2, 2, 2), seed=number), width=32)


def nothing(log: LogBuilder) -> None:
    """Fire nothing."""
    log.layer("h.0", "resid", 0)


BUILDS: dict[str, Build] = {
    "every dtype": every_dtype,
    "texts": texts,
    "ragged": ragged,
    "two stacks": two_stacks,
    "nothing": nothing,
}


@pytest.fixture(params=[*BUILDS, "several logs", "small chunks"])
def archive(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    if request.param == "small chunks":
        monkeypatch.setattr(grid, "CHUNK_BYTES", 256)
        monkeypatch.setattr(grid, "SHARD_BYTES", 1024)
        log = decoder_log(tmp_path / "run.stream", steps=40).path
        return actstore.compact(log, tmp_path / "run.zarr", profile="fast").path
    if request.param == "several logs":
        logs = [decoder_log(tmp_path / f"{run}.stream", run=f"run {run}").path for run in range(2)]
        return actstore.compact(logs, tmp_path / "run.zarr", profile="none").path
    log_of = LogBuilder(tmp_path / "run.stream")
    BUILDS[request.param](log_of)
    return actstore.compact(log_of.close(), tmp_path / "run.zarr").path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    log = decoder_log(tmp_path / "run.stream").path
    return actstore.compact(log, tmp_path / "run.zarr").path


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- what is in it ------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none", "zip"])
def test_export_and_import_give_the_same_archive_to_the_last_byte(
    archive: Path, tmp_path: Path, compression: str
) -> None:
    zipped = compression == "zip"
    target = tmp_path / ("run.zarr.zip" if zipped else "run.h5")
    report = actstore.export(archive, target, compression=None if zipped else compression)
    assert report.path == target
    assert report.stored_bytes == target.stat().st_size
    found = actstore.verify(target)
    assert found.ok, found.damage
    assert found.checked["arrays"] == report.arrays
    made = actstore.import_archive(target, tmp_path / "made.zarr")
    assert files_of(made.path) == files_of(archive)
    assert actstore.verify(made.path).ok
    assert made.arrays == report.arrays
    assert not {name for name in left_in(tmp_path) if name.startswith(".")}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_it_opens_as_the_dataset_of_the_archive(
    archive: Path, tmp_path: Path, suffix: str
) -> None:
    target = actstore.export(archive, tmp_path / f"run.{suffix}").path
    with actstore.open_dataset(target) as one, actstore.open_dataset(archive) as other:
        xr.testing.assert_identical(one.compute(), other.compute())
        for name, variable in other.variables.items():
            mine = one.variables[name]
            assert (mine.dtype, mine.chunks) == (variable.dtype, variable.chunks), name
            if variable.dtype.kind in "fc":
                assert mine.values.tobytes() == variable.values.tobytes(), name


def test_xarray_reads_the_file_by_h5netcdf(archive: Path, tmp_path: Path) -> None:
    target = actstore.export(archive, tmp_path / "run.h5").path
    with (
        xr.open_dataset(target, engine="h5netcdf") as one,
        xr.open_zarr(archive, chunks=None) as other,
    ):
        assert set(one.variables) == set(other.variables)
        assert set(one.coords) == set(other.coords)
        assert dict(one.sizes) == dict(other.sizes)
        for name, wanted in other.variables.items():
            found = one.variables[name]
            assert found.dims == wanted.dims, name
            if wanted.dtype.kind in "fc":
                assert found.values.tobytes() == wanted.values.tobytes(), name
            elif wanted.dtype == STRING:
                assert not [
                    (mine, its)
                    for mine, its in zip(found.values, wanted.values, strict=True)
                    if mine != its and "nul_escape" not in found.attrs
                ]
            else:
                assert found.dtype == wanted.dtype, name
                np.testing.assert_array_equal(found.values, wanted.values)
        assert one.attrs["format"] == "actstore"
        assert json.loads(one.attrs["rows"]) == other.attrs["rows"]
        assert json.loads(one.attrs["runs"]) == other.attrs["runs"]
    for group in ("tokens", "passes", "text"):
        with (
            xr.open_dataset(target, engine="h5netcdf", group=group) as one,
            xr.open_zarr(archive, group=group, consolidated=False, chunks=None) as other,
        ):
            assert dict(one.sizes) == dict(other.sizes)
            assert set(one.variables) == set(other.variables)


def test_h5py_alone_reads_it(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    texts(log)
    target = actstore.export(log.close(), tmp_path / "run.h5").path
    with h5py.File(target) as file:
        np.testing.assert_array_equal(file["resid"][0], log.fired[0].values[0])
        assert [one[0].name for one in file["resid"].dims] == ["/layer", "/token", "/feature"]
        assert file["resid"].chunks == (1, len(TEXTS), 4)
        assert (file["resid"].compression, file["resid"].shuffle) == ("gzip", True)
        assert file["resid"].fletcher32
        assert np.isnan(file["resid"].fillvalue)
        written = [one.decode() for one in file["token_text"][:]]
        assert written == [one.replace("\\", "\\\\").replace("\0", "\\0") for one in TEXTS]
        data, ends = file["text/token_text_bytes"][:], file["text/token_text_offsets"][:]
        exact = [data[one:end].tobytes().decode() for one, end in itertools.pairwise(ends)]
        assert exact == TEXTS


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed")
def test_h5dump_reads_it(archive: Path, tmp_path: Path) -> None:
    target = actstore.export(archive, tmp_path / "run.h5").path
    subprocess.run(["h5dump", target], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.skipif(find_spec("netCDF4") is None, reason="netCDF4 is not installed")
def test_netcdf4_reads_it(plain: Path, tmp_path: Path) -> None:
    target = actstore.export(plain, tmp_path / "run.h5").path
    code = (
        "import sys, xarray as xr\n"
        "with xr.open_dataset(sys.argv[1], engine='netcdf4') as one, "
        "xr.open_dataset(sys.argv[1], engine='h5netcdf') as other:\n"
        "    xr.testing.assert_equal(one.load(), other.load())"
    )
    subprocess.run([sys.executable, "-c", code, target], check=True)


def test_rows_that_are_not_there_are_chunks_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 128)
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h.0", "resid", 0)
    log.layer("h.1", "resid", 1)
    for number in range(8):
        log.begin(axis(1, 4))
        log.put("h.0", random_values((1, 4, 8), seed=number))
        if number == 5:
            log.put("h.1", random_values((1, 4, 8), seed=number + 9))
    target = actstore.export(log.close(), tmp_path / "run.h5").path
    with h5py.File(target) as file:
        assert file["resid"].shape == (2, 32, 8)
        assert file["resid"].id.get_num_chunks() == 8 + 1
        assert np.isnan(file["resid"][1, :20]).all()
        assert not file["resid_present"][1, :20].any()
        np.testing.assert_array_equal(file["resid"][1, 20:24], log.fired[6].values[0])
    assert actstore.verify(target).ok
    with h5py.File(target, "r+") as file:  # presence says that there are more
        file["resid_present"][1, 8] = 1
    report = actstore.verify(target)
    assert {one.where for one in report.damage} == {"resid, chunk (1, 2, 0)"}


def test_attributes_of_codes_groups_in_groups_and_any_small_array_are_mirrored(
    plain: Path, tmp_path: Path
) -> None:
    """What later archives have: scaled integers, companions, statistics."""
    folder = plain.with_name("more.zarr")
    shutil.copytree(plain, folder)
    (folder / "zarr.json").unlink()
    rows = read_attributes(plain)["rows"]
    said = {"scale_factor": 0.25, "add_offset": -1.0, "_FillValue": 255}
    for name, attributes in (("codes", said), ("statistics/mlp/mean", {"unit": ["a"]})):
        dims = ("layer", "token") if name == "codes" else ("layer", "bin")
        values = np.arange(3 * (rows["token"] if name == "codes" else 4), dtype=np.uint8)
        values = values.reshape(3, -1)
        group, _, stem = name.rpartition("/")
        (folder / group).mkdir(parents=True, exist_ok=True)
        store.ArchiveWriter(folder).add_small(Coordinate(stem, dims, values), group)
        place = folder / name / "zarr.json"
        changed = json.loads(place.read_text()) | {"attributes": attributes}
        place.write_text(json.dumps(changed, indent=2))
    for name in ("statistics", "statistics/mlp"):
        store.write_metadata(folder, name, {"zarr_format": 3, "node_type": "group"})
    for group in ("text", "tokens", "passes"):
        (folder / group / "zarr.json").unlink()
    attributes = dict(read_attributes(plain))
    attributes.pop("metadata_crc32c")
    store.ArchiveWriter(folder).finish(attributes)
    target = actstore.export(folder, tmp_path / "more.h5").path
    assert actstore.verify(target).ok
    with h5py.File(target) as file:
        assert dict(file["codes"].attrs)["scale_factor"] == 0.25
        assert [one[0].name for one in file["statistics/mlp/mean"].dims] == [
            "/layer",
            "/statistics/mlp/bin",
        ]
    with (
        actstore.open_dataset(target, None) as one,
        actstore.open_dataset(folder, None) as other,
    ):
        xr.testing.assert_identical(one.load(), other.load())
    with xr.open_dataset(target, engine="h5netcdf", group="statistics/mlp") as found:
        assert found["mean"].dims == ("layer", "bin")
    made = actstore.import_archive(target, tmp_path / "made.zarr").path
    assert files_of(made) == files_of(folder)


# -- reading little -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_choice_of_rows_reads_its_own_chunks_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    from actstore.archive.reading import ShardedRows
    from actstore.hdf5.reading import Hdf5Rows

    monkeypatch.setattr(grid, "CHUNK_BYTES", 128)
    monkeypatch.setattr(grid, "SHARD_BYTES", 512)
    log = decoder_log(tmp_path / "run.stream", steps=40).path
    archive = actstore.compact(log, tmp_path / "run.zarr").path
    target = actstore.export(archive, tmp_path / f"run.{suffix}").path
    kind = Hdf5Rows if suffix == "h5" else ShardedRows
    read: list[tuple[int, ...]] = []
    honest = kind._encoded

    def counted(self: Any, *place: int) -> Any:
        read.append(place)
        return honest(self, *place)

    with (
        actstore.open_dataset(target, None) as found,
        actstore.open_dataset(archive) as other,
    ):
        wanted = other.resid.isel(layer=1, token=[3, 50, 51]).values
        monkeypatch.setattr(kind, "_encoded", counted)
        chosen = found.resid.isel(layer=1, token=[3, 50, 51])
        assert not read
        np.testing.assert_array_equal(chosen.values, wanted)
    assert set(read) == {(1, 0), (1, 12)}


# -- files appear whole -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_log_is_exported_by_way_of_an_archive_that_is_removed(
    tmp_path: Path, suffix: str
) -> None:
    log = decoder_log(tmp_path / "run.stream").path
    target = actstore.export(log, tmp_path / f"run.{suffix}").path
    assert left_in(tmp_path) == {"run.stream", target.name}
    with actstore.open_dataset(target) as one, actstore.open_dataset(log) as other:
        xr.testing.assert_equal(one.compute(), other.compute())


def test_a_zipped_archive_becomes_hdf5_too(plain: Path, tmp_path: Path) -> None:
    zipped = actstore.export(plain, tmp_path / "run.zarr.zip").path
    one = actstore.export(zipped, tmp_path / "one.h5").path
    other = actstore.export(plain, tmp_path / "other.h5").path
    with actstore.open_dataset(one) as mine, actstore.open_dataset(other) as its:
        xr.testing.assert_identical(mine.compute(), its.compute())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("source", ["run.stream", "run.zarr"])
def test_nothing_is_left_where_an_export_fails(
    plain: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, source: str
) -> None:
    def fails(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.files, "fsync_file", fails)
    with pytest.raises(ArchiveError, match="No space left"):
        actstore.export(plain.with_name(source), plain.with_name(f"out.{suffix}"))
    assert left_in(plain.parent) == {"run.stream", "run.zarr"}


def test_a_chunk_that_reads_back_wrong_is_told(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = chunks.encode

    def wrong(data: Any, *given: Any, **others: Any) -> bytes:
        return honest(np.roll(data, 1), *given, **others)

    monkeypatch.setattr(writing.coded, "encode", wrong)
    with pytest.raises(ArchiveError, match="doesn't read back"):
        actstore.export(plain, plain.with_name("out.h5"))
    assert left_in(plain.parent) == {"run.stream", "run.zarr"}


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_archive_is_not_exported(plain: Path, suffix: str, gone: bool) -> None:
    shard = plain / "resid" / "c" / "1" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.unlink() if gone else shard.write_bytes(data)
    with pytest.raises(ArchiveError, match="resid"):
        actstore.export(plain, plain.with_name(f"out.{suffix}"))
    assert left_in(plain.parent) == {"run.stream", "run.zarr"}


CHILD = """
import sys
import actstore
from actstore import (
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    plots,
)
print("begin", flush=True)
actstore.export(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_export_leaves_no_target_and_the_next_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 1 << 12)
    log = decoder_log(tmp_path / "run.stream", steps=1500, width=96).path
    archive = actstore.compact(log, tmp_path / "run.zarr").path
    began = time.monotonic()
    wanted = actstore.export(archive, tmp_path / f"whole.{suffix}").path
    took = time.monotonic() - began
    killed = 0
    for number, share in enumerate((0.3, 0.6, 0.9)):
        target = tmp_path / f"{number}.{suffix}"
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(archive), str(target)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(share * took)
        child.kill()
        child.communicate()
        if not target.exists():
            killed += 1
            actstore.export(archive, target)
        assert actstore.verify(target).ok
        if suffix == "zarr.zip":
            assert target.read_bytes() == wanted.read_bytes()
    assert killed
    assert not {name for name in left_in(tmp_path) if name.startswith(".")}


def test_another_export_of_the_same_target_waits_for_no_one(plain: Path) -> None:
    target = plain.with_name("out.h5")
    with exporting._partial(target) as partial:
        with pytest.raises(ArchiveError, match="another export is making"):
            actstore.export(plain, target)
        partial.write_bytes(b"mine")
    assert target.read_bytes() == b"mine"
    with pytest.raises(ArchiveError, match="exists"):
        actstore.export(plain, target)
    assert target.read_bytes() == b"mine"


# -- memory and progress ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give an archive of 192 MB of noise, in chunks of 1 MiB."""
    folder = tmp_path_factory.mktemp("large")
    log = LogBuilder(folder / "run.stream", compression="none")
    for block in range(3):
        log.layer(f"h.{block}", "resid", block)
    for number in range(16):
        log.begin(axis(1, 1024))
        for block in range(3):
            log.put(f"h.{block}", random_values((1, 1024, 1024), seed=number), parts=4)
        log.commit()
    yield actstore.compact(log.close(), folder / "run.zarr", profile="none").path
    shutil.rmtree(folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_stays_within_the_budget(large: Path, tmp_path: Path, suffix: str) -> None:
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    report = actstore.export(
        large,
        tmp_path / f"run.{suffix}",
        max_memory_gb=0.1,
        progress=lambda done, total: seen.append((done, total)),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.raw_bytes > 192e6
    assert peak < 0.1e9
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    tracemalloc.start()
    actstore.import_archive(report.path, tmp_path / "made.zarr", max_memory_gb=0.3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3e9
    assert files_of(tmp_path / "made.zarr") == files_of(large)


def test_a_budget_that_no_chunk_fits_into_is_refused_and_what_is_asked_for_does(
    large: Path, tmp_path: Path
) -> None:
    def asked(call: Callable[[float], Any], given: float) -> float:
        with pytest.raises(ConfigError, match=f"max_memory_gb is {given}: give that much") as told:
            call(given)
        number = re.search(r"needs ([\d.]+) GB", str(told.value))
        assert number
        return float(number[1])

    def export(gigabytes: float) -> Any:
        return actstore.export(large, tmp_path / "run.h5", max_memory_gb=gigabytes)

    def back(gigabytes: float) -> Any:
        return actstore.import_archive(
            tmp_path / "run.h5", tmp_path / "made.zarr", max_memory_gb=gigabytes
        )

    export(asked(export, 0.07))
    enough = asked(back, 0.1)
    assert left_in(tmp_path) == {"run.h5"}
    back(enough)


# -- what can't be exported ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "error", "match"),
    [
        ("out.zarr", {}, ConfigError, r"ends in \.h5, \.hdf5, \.zarr\.zip"),
        ("out.zip", {}, ConfigError, "ends in"),
        ("out.h5", {"compression": "lzf"}, ConfigError, "compression must be one of"),
        ("out.zarr.zip", {"compression": "gzip"}, ConfigError, r"compression is for \.h5"),
        ("nowhere/out.h5", {}, ConfigError, "no folder"),
        ("run.zarr", {}, ConfigError, "ends in"),
    ],
)
def test_arguments_that_cant_be_honoured_are_refused(
    plain: Path, target: str, options: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        actstore.export(plain, plain.parent / target, **options)
    assert left_in(plain.parent) == {"run.stream", "run.zarr"}


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_no_path_is_refused(plain: Path, given: Any) -> None:
    for work in (actstore.export, actstore.import_archive):
        with pytest.raises(ConfigError, match="path"):
            work(given, plain.with_name("out.h5"))
        with pytest.raises(ConfigError, match="path"):
            work(plain, given)


def test_only_an_archive_or_a_log_is_exported(plain: Path) -> None:
    folder = plain.parent
    file = actstore.export(plain, folder / "run.h5").path
    (folder / "notes.txt").write_text("notes")
    for source in (file, folder / "notes.txt"):
        with pytest.raises(FormatError, match="wanted an archive's folder or a"):
            actstore.export(source, folder / "out.zarr.zip")
    with pytest.raises(FormatError):
        actstore.export(folder, folder / "out.h5")
    with pytest.raises(MissingFileError):
        actstore.export(folder / "gone.zarr", folder / "out.h5")


@pytest.mark.parametrize("work", ["open_dataset", "verify", "import_archive", "export"])
def test_without_h5py_the_error_says_what_to_install(plain: Path, work: str) -> None:
    file = actstore.export(plain, plain.with_name("run.h5")).path
    given = {"import_archive": [file, "made.zarr"], "export": [plain, "out.h5"]}.get(work, [file])
    code = (
        "import sys, importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'h5py' else real(name, *a)\n"
        "import actstore\n"
        "try:\n"
        f"    actstore.{work}(*sys.argv[1:])\n"
        "except actstore.ActstoreError as error:\n"
        "    assert 'actstore[hdf5]' in str(error), error\n"
        "    print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        capture_output=True, text=True, check=True, cwd=plain.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )  # fmt: skip
    assert done.stdout == "ConfigError\n"


@pytest.mark.parametrize("end", ["h5", "zarr.zip"])
def test_a_file_of_an_archive_is_analysed_as_the_archive(
    plain: Path, tmp_path: Path, end: str
) -> None:
    config = InstrumentationConfig(HookGranularity.FULL_TENSOR)
    framework = InstrumentationFramework(config)
    wanted = framework.analyze_activations(plain)
    file = actstore.export(plain, tmp_path / f"run.{end}").path
    for found in (
        framework.analyze_activations(file),
        actstore.analyze_activations_with_tokens(file, framework),
    ):
        assert found == wanted | {"stream_path": str(file)}
    assert plots.run_rates(file).axes


def test_every_container_opens_as_a_tree_without_actstore(plain: Path, tmp_path: Path) -> None:
    with xr.open_zarr(plain, group="tokens", chunks=None) as tokens:
        assert dict(tokens.sizes) == {"recorded": len(tokens.step)} != {"recorded": 0}
    actstore.export(plain, tmp_path / "run.h5")
    actstore.export(plain, tmp_path / "run.zarr.zip")
    for source, engine in (
        (plain, "zarr"),
        (ZipStore(tmp_path / "run.zarr.zip", mode="r"), "zarr"),
        (tmp_path / "run.h5", "h5netcdf"),
    ):
        with xr.open_datatree(source, engine=engine) as tree, xr.open_zarr(plain) as root:
            assert tree.to_dataset(inherit=False).equals(root)
            assert {"/tokens", "/passes", "/text"} <= set(tree.groups)
            assert tree["tokens"].to_dataset(inherit=False).equals(tokens)


def test_an_archive_whose_table_of_tokens_has_the_rows_dimension_is_read(
    plain: Path, tmp_path: Path
) -> None:
    """It was so before: no reader goes by the name."""
    old = tmp_path / "old.zarr"
    shutil.copytree(plain, old)
    for path in (old / "tokens").glob("*/zarr.json"):
        path.write_bytes(path.read_bytes().replace(b'"recorded"', b'"token"'))
    writer = store.ArchiveWriter(old)
    writer.write_root(read_attributes(old), writer.nodes("."))
    assert actstore.verify(old, against=tmp_path / "run.stream").ok
    file = actstore.export(old, tmp_path / "old.h5").path
    assert actstore.verify(file).ok
    assert files_of(actstore.import_archive(file, tmp_path / "again.zarr").path) == files_of(old)
    with actstore.open_dataset(old) as found, actstore.open_dataset(plain) as wanted:
        assert found.equals(wanted)
    later = decoder_log(tmp_path / "later.stream", run="later").path
    actstore.append(later, old)
    with xr.open_zarr(old, group="tokens") as tokens:
        assert "recorded" in tokens.sizes
    assert actstore.verify(old, against=[tmp_path / "run.stream", later]).ok
