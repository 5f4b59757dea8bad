"""HDF5 files that come from anyone: what isn't as `export` writes it is refused, and costs little.

Each case is a good file with one thing changed, by h5py alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import h5py
import numpy as np
import pytest

import actstore
from actstore.errors import ActstoreError, FormatError, UnsupportedVersionError
from actstore.hdf5.chunks import fletcher32

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import decoder_log

Change = Callable[[Any], Any]
METADATA = "_actstore/zarr.json"
FILTERS: dict[str, Any] = {
    "shuffle": True, "compression": "gzip", "compression_opts": 1, "fletcher32": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    log = decoder_log(folder / "run.stream", steps=6).path
    return actstore.export(log, folder / "good.h5").path


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(good, tmp_path / "run.h5"))


def again(file: Any, name: str, **others: Any) -> Any:
    """Make a dataset anew, with other options."""
    old = file[name]
    given: dict[str, Any] = {"shape": old.shape, "dtype": old.dtype, "chunks": old.chunks}
    given |= {"fillvalue": old.fillvalue} | FILTERS | others
    if given["chunks"] is None:
        given = {key: one for key, one in given.items() if key not in (*FILTERS, "chunks")}
    del file[name]
    return file.create_dataset(name, **given)


def rewrite(file: Any, change: Callable[[Any], Any]) -> None:
    """Change the metadata, whose checksum is right again."""
    root = json.loads(bytes(file[METADATA][...]))
    change(root)
    root["attributes"]["metadata_crc32c"] = "00000000"
    data = json.dumps(root, indent=2).encode()
    data = data.replace(b"00000000", f"{crc32c.crc32c(data):08x}".encode(), 1)
    del file[METADATA]
    file.create_dataset(METADATA, data=np.frombuffer(data, np.uint8))


def node(root: Any, name: str) -> Any:
    return root["consolidated_metadata"]["metadata"][name]


def external_link(file: Any) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["resid"] = np.zeros(file["resid"].shape, "f4")
    del file["resid"]
    file["resid"] = h5py.ExternalLink("other.h5", "/resid")


def soft_link(file: Any) -> None:
    del file["resid"]
    file["resid"] = h5py.SoftLink("/mlp")


def linked_group(file: Any) -> None:
    file.move("tokens", "elsewhere")
    file["tokens"] = h5py.SoftLink("/elsewhere")


def linked_metadata(file: Any) -> None:
    file.move(METADATA, "elsewhere")
    file[METADATA] = h5py.SoftLink("/elsewhere")


def virtual(file: Any) -> None:
    shape = file["resid"].shape
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("/etc/hostname", "x", shape, "f4")
    del file["resid"]
    file.create_virtual_dataset("resid", layout)


def raw_elsewhere(file: Any) -> None:
    size = file["resid"].nbytes
    again(file, "resid", chunks=None, external=[("/etc/hostname", 0, size)])


def metadata_elsewhere(file: Any) -> None:
    del file[METADATA]
    file.create_dataset(METADATA, (100,), "u1", external=[("/etc/hostname", 0, 100)])


def huge_metadata(file: Any) -> None:
    del file[METADATA]
    file.create_dataset(METADATA, (1 << 40,), "u1")


def zipped_metadata(file: Any) -> None:
    data = file[METADATA][...]
    del file[METADATA]
    file.create_dataset(METADATA, data=data, compression="gzip")


def absurd_shape(file: Any) -> None:
    shape = (3, 1 << 50, 8)
    again(file, "resid", shape=shape)

    def change(root: Any) -> None:
        node(root, "resid")["shape"] = list(shape)
        root["attributes"]["rows"]["token"] = 1 << 50

    rewrite(file, change)


def absurd_labels(file: Any) -> None:
    again(file, "layer", shape=(1 << 40,), chunks=(1 << 20,))

    def change(root: Any) -> None:
        node(root, "layer")["shape"] = [1 << 40]
        node(root, "layer")["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 20]

    rewrite(file, change)


def absurd_chunk(file: Any) -> None:
    again(file, "resid", shape=(3, 1 << 34, 8), chunks=(1, 1 << 26, 8))

    def change(root: Any) -> None:
        said = node(root, "resid")
        said["shape"] = [3, 1 << 34, 8]
        said["codecs"][0]["configuration"]["chunk_shape"] = [1, 1 << 26, 8]
        said["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1 << 26, 8]

    rewrite(file, change)


def absurd_shard(file: Any) -> None:
    def change(root: Any) -> None:
        said = node(root, "resid")
        inner = said["codecs"][0]["configuration"]["chunk_shape"]
        said["chunk_grid"]["configuration"]["chunk_shape"] = [1, inner[1] << 40, 8]

    rewrite(file, change)


def bomb(file: Any) -> None:
    body = zlib.compress(bytes(1 << 28), 9)
    chunk = body + struct.pack("<I", fletcher32(body))
    file["resid"].id.write_direct_chunk((1, 0, 0), chunk)


def long_chunk(file: Any) -> None:
    body = np.random.default_rng(0).bytes(1 << 22)
    chunk = body + struct.pack("<I", fletcher32(body))
    file["resid"].id.write_direct_chunk((1, 0, 0), chunk)


def skipped_filters(file: Any) -> None:
    raw = np.zeros(file["resid"].chunks, "f4").tobytes()
    file["resid"].id.write_direct_chunk((1, 0, 0), raw, filter_mask=7)


def damaged_chunk(file: Any) -> None:
    _, data = file["resid"].id.read_direct_chunk((1, 0, 0))
    file["resid"].id.write_direct_chunk((1, 0, 0), data[:20] + bytes([data[20] ^ 1]) + data[21:])


def missing_label(file: Any) -> None:
    again(file, "token_id")


def other_text(file: Any) -> None:
    file["token_text"][1] = "another"


def other_unicode(file: Any) -> None:
    kept = dict(file["token_text"].attrs.items())
    made = again(file, "token_text", chunks=None, fillvalue=None)
    made[...] = np.array([b"\xff\xfe"] * made.shape[0], object)
    made.attrs["crc32c"] = kept["crc32c"]


def fixed_text(file: Any) -> None:
    again(file, "token_text", chunks=None, dtype="S100", fillvalue=None)


def other_heap(file: Any) -> None:
    """Let a string be where there is no heap."""
    place = file["token_text"].id.get_offset()
    file.flush()
    patch(Path(file.filename), place + 4, struct.pack("<Q", place))


def endless_heap(file: Any) -> None:
    """Let an object of the heap of strings have no length: HDF5 goes round it for ever."""
    place = file["token_text"].id.get_offset()
    file.flush()
    path = Path(file.filename)
    heap = struct.unpack_from("<Q", path.read_bytes(), place + 4)[0]
    patch(path, heap + 16, bytes(16 * 20))


def long_strings(file: Any) -> None:
    place = file["token_text"].id.get_offset()
    file.flush()
    patch(Path(file.filename), place, b"\xff" * 4)


def patch(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(data)


def endless_attribute(file: Any) -> None:
    """Let an attribute be a string in a heap, which must not be read."""
    del file.attrs["profile"]
    file.attrs["profile"] = "balanced" * 50


def with_root(**attributes: Any) -> Change:
    return lambda file: rewrite(file, lambda root: root["attributes"].update(attributes))


#: What is changed -> how; all of it is refused or told, and none of it read.
HOSTILE: dict[str, Change] = {
    "external link": external_link,
    "soft link": soft_link,
    "linked group": linked_group,
    "linked metadata": linked_metadata,
    "virtual": virtual,
    "raw elsewhere": raw_elsewhere,
    "metadata elsewhere": metadata_elsewhere,
    "huge metadata": huge_metadata,
    "zipped metadata": zipped_metadata,
    "no metadata": lambda file: file.pop(METADATA),
    "metadata no json": lambda file: file[METADATA].write_direct(
        np.full(file[METADATA].shape, ord("["), np.uint8)
    ),
    "absurd shape": absurd_shape,
    "absurd labels": absurd_labels,
    "absurd chunk": absurd_chunk,
    "absurd shard": absurd_shard,
    "bomb": bomb,
    "long chunk": long_chunk,
    "skipped filters": skipped_filters,
    "damaged chunk": damaged_chunk,
    "missing label": missing_label,
    "other text": other_text,
    "no unicode": other_unicode,
    "fixed text": fixed_text,
    "other heap": other_heap,
    "endless heap": endless_heap,
    "long strings": long_strings,
    "contiguous": lambda file: again(file, "resid", chunks=None),
    "other filters": lambda file: again(file, "resid", compression="lzf", compression_opts=None),
    "more filters": lambda file: again(file, "layer", scaleoffset=3, fletcher32=False),
    "no checksum": lambda file: again(file, "resid", fletcher32=False),
    "other dtype": lambda file: again(file, "resid", dtype="f8"),
    "other order": lambda file: again(file, "resid", dtype=">f4"),
    "opaque": lambda file: again(file, "resid", dtype="V4", fillvalue=None),
    "references": lambda file: again(file, "resid", dtype=h5py.ref_dtype, fillvalue=None),
    "other shape": lambda file: again(file, "resid", shape=(3, 23, 8)),
    "other chunks": lambda file: again(file, "resid", chunks=(1, 2, 8)),
    "group for array": lambda file: (file.pop("resid"), file.create_group("resid")),
    "later version": with_root(format_version=7),
    "other format": with_root(format="other"),
    "a name outside": lambda file: rewrite(
        file,
        lambda root: root["consolidated_metadata"]["metadata"].update(
            {"../evil": node(root, "layer")}
        ),
    ),
    "no nodes": lambda file: rewrite(file, lambda root: root.pop("consolidated_metadata")),
}


def tried(work: Callable[[], Any]) -> Any:
    """Give what something returns, or the error of ours that it raises; no other may be."""
    try:
        return work()
    except ActstoreError as error:
        return error


def loaded(path: Path) -> Any:
    with actstore.open_dataset(path, None) as found:
        return found[["layer", "resid", "token_text", "token_id"]].isel(token=slice(4)).load()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_takes_no_memory(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        HOSTILE[name](file)
    target = path.with_name("made.zarr")
    tracemalloc.start()
    report = tried(lambda: actstore.verify(path))
    read = tried(lambda: loaded(path))
    made = tried(lambda: actstore.import_archive(path, target))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert isinstance(report, ActstoreError) or not report.ok
    assert isinstance(made, ActstoreError)
    others = {"linked group", "absurd shape", "absurd shard"}  # not of what is read here
    assert isinstance(read, ActstoreError) or name in others
    left = {one.name for one in path.parent.iterdir()} - {"other.h5"}
    assert left == {"run.h5"}, "nothing is left of the import"


def test_the_good_file_is_good(path: Path) -> None:
    assert actstore.verify(path).ok
    assert loaded(path).resid.size


def test_another_version_is_refused_by_name(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        with_root(format_version=7)(file)
    for work in (actstore.open_dataset, actstore.verify):
        with pytest.raises(UnsupportedVersionError, match="version 7"):
            work(path)


def test_an_hdf5_file_of_others_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["resid"] = np.zeros(3)
    for work in (actstore.open_dataset, actstore.verify):
        with pytest.raises(FormatError, match=r"a\.h5 is no HDF5 file that actstore wrote"):
            work(tmp_path / "a.h5")


def test_what_hdf5_was_written_behind_a_block_is_refused(path: Path, good: Path) -> None:
    path.write_bytes(bytes(512) + good.read_bytes())
    assert h5py.is_hdf5(path)
    with pytest.raises(FormatError):
        actstore.open_dataset(path)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda file: file.__setitem__("more", np.zeros(3)), "more"),
        (lambda file: file.__setitem__("loop", file["/"]), "loop"),
        (lambda file: file.__setitem__("out", h5py.ExternalLink("a.h5", "/")), "out"),
        (lambda file: file.attrs.__setitem__("more", 1), ""),
        (lambda file: file.attrs.__delitem__("profile"), ""),
        (endless_attribute, ""),
        (lambda file: file["resid"].attrs.__setitem__("site", "mlp"), "resid"),
        (lambda file: file["resid"].dims[2].detach_scale(file["feature"]), "feature"),
        (lambda file: file.__delitem__("text"), "text"),
    ],
)
def test_verification_names_what_else_differs(path: Path, change: Change, where: str) -> None:
    with h5py.File(path, "r+") as file:
        change(file)
    report = actstore.verify(path)
    assert not report.ok
    assert where in {one.where for one in report.damage}


def flipped(data: bytes, generator: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 8))):
        place = generator.randrange(len(found))
        if generator.random() < 0.7:
            found[place] ^= 1 << generator.randrange(8)
        else:
            found[place : place + 8] = generator.choice((b"\xff" * 8, bytes(8)))
    return bytes(found)


SWEEP = """
import faulthandler, sys, random, pathlib
sys.path[:0] = [sys.argv[4]]
from test_hostile_hdf5 import tried, loaded, flipped, actstore, ActstoreError
good, first, last = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data, place = good.read_bytes(), good.with_name(f"flipped-{first}.h5")
wanted = loaded(good)
for number in range(first, last):
    faulthandler.dump_traceback_later(60, exit=True)  # where HDF5 goes round for ever
    place.write_bytes(flipped(data, random.Random(number)))
    report, read = tried(lambda: actstore.verify(place)), tried(lambda: loaded(place))
    if not isinstance(report, ActstoreError) and report.ok:
        assert not isinstance(read, ActstoreError) and read.equals(wanted), number
"""


def sweep(good: Path, first: int, last: int) -> None:
    """Flip bits in another process, which a crash of HDF5 would end."""
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", SWEEP, good, str(first), str(last), Path(__file__).parent],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )


def test_flipped_bits_are_found_or_change_nothing(good: Path) -> None:
    sweep(good, 0, 60)


@pytest.mark.slow
def test_flipped_bits_are_found_or_change_nothing_thousands_of_times(good: Path) -> None:
    sweep(good, 60, 3000)
