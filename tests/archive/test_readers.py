"""Stock readers, in processes that have no actstore, read our frames, shards and archives exactly.

``readers.py`` is what runs there. What is compared are digests: of the values before they were
encoded, and of what was read.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readers
from logs import LogBuilder, axis, encode_rows, random_values
from numpy.typing import NDArray

from actstore import codecs, dtypes
from actstore.archive import shards
from actstore.archive.shards import shard_path
from actstore.archive.store import ArchiveWriter
from actstore.compaction import compact

#: A newer Python with the latest zarr and xarray in it: see CONTRIBUTING.md.
NEWER = Path(
    os.environ.get("ACTSTORE_NEWER_PYTHON", Path.home() / ".cache/actstore-readers/bin/python")
)
READERS = [
    *(
        pytest.param(
            sys.executable,
            name,
            id=name,
            marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"),
        )
        for name in readers.ARRAY_READERS
    ),
    *(
        pytest.param(
            str(NEWER),
            name,
            id=f"newer {name}",
            marks=pytest.mark.skipif(not NEWER.exists(), reason="no newer Python is set up"),
        )
        for name in ("zarr", "xarray")
    ),
]
FRAME_READERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name != "hand" and find_spec(name) is None, reason=f"{name} is not installed"
        ),
    )
    for name in readers.FRAME_READERS
]
#: Shape, rows of an inner chunk, rows of a shard: one element, odd lengths, a chunk of 1 MiB.
SHAPES = {
    "one": ((1, 1), 1, 1),
    "flat": ((777,), 256, 512),
    "odd": ((37, 13), 8, 16),
    "deep": ((300, 3, 5), 128, 256),
    "large": ((520, 512), 256, 512),
}


def read_elsewhere(python: str, reader: str, folder: Path) -> dict[str, Any]:
    """Read a folder in another process; it fails where actstore can be imported."""
    script = Path(readers.__file__)
    done = subprocess.run(
        [python, "-W", "error", "-W", "ignore::DeprecationWarning", script, reader, folder],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath, "HOME": str(Path.home())},
        cwd=script.parent,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def kinds(size: int, itemsize: int) -> dict[str, NDArray[np.uint8]]:
    """Give bytes of ``size`` elements: noise, one value, and planes of all kinds beside others."""
    noise = np.random.default_rng(size).integers(0, 256, size * itemsize, np.uint8)
    mixed = noise.reshape(size, itemsize).copy()
    mixed[:, ::2] &= 3
    if itemsize > 2:
        mixed[:, 1] = 7
    return {"noise": noise, "constant": np.full_like(noise, 5), "mixed": mixed.reshape(-1)}


# -- frames -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Give a folder of frames of byte planes, and the digests of what is in them."""
    folder, wanted = tmp_path_factory.mktemp("frames"), {}
    for itemsize in (1, 2, 4, 8, 16):
        for size in (128, 129, 1001, (1 << 17) + 1):
            for kind, data in kinds(size, itemsize).items():
                for repeats in (False, True):
                    name = f"{kind} {itemsize} {size} {repeats}"
                    out = np.empty(data.nbytes + codecs.FRAME_BYTES, np.uint8)
                    length = codecs.plane_split_into(out, data, itemsize, repeats=repeats)
                    (folder / f"{name}.frame").write_bytes(out[:length])
                    wanted[name] = hashlib.sha256(data).hexdigest()
    return folder, wanted


@pytest.mark.parametrize("reader", FRAME_READERS)
def test_a_stock_decoder_reads_every_frame(
    frames: tuple[Path, dict[str, str]], reader: str
) -> None:
    folder, wanted = frames
    assert read_elsewhere(sys.executable, reader, folder) == wanted


@pytest.mark.parametrize("reader", ["numcodecs", FRAME_READERS[1]])
def test_a_stock_decoder_reads_frames_too_short_for_planes(tmp_path: Path, reader: Any) -> None:
    wanted = {}
    for itemsize in (1, 2, 4, 8, 16):
        for size in (1, 2, 127):
            for kind, data in kinds(size, itemsize).items():
                name = f"{kind} {itemsize} {size}"
                (tmp_path / f"{name}.frame").write_bytes(codecs.plane_split(data, itemsize))
                wanted[name] = hashlib.sha256(data).hexdigest()
    assert read_elsewhere(sys.executable, reader, tmp_path) == wanted


# -- shards -------------------------------------------------------------------------------------


def write(writer: ArchiveWriter, name: str, rows: NDArray[Any], shape: str, profile: str) -> None:
    """Write an array as compaction does."""
    _, chunk, shard = SHAPES[shape]
    row = rows.shape[1:]
    writer.add_array(
        name,
        tuple(f"{shape}{number}" for number in range(rows.ndim)),
        rows.shape,
        rows.dtype,
        chunks=(chunk, *row),
        shards=(shard, *row),
        profile=profile,
        attributes={},
    )
    for number, first in enumerate(range(0, len(rows), shard)):
        mine = rows[first : first + shard]
        present = np.arange(shard // chunk) * chunk < len(mine)
        encoded = encode_rows(mine, chunk, present, 0, profile)
        shards.write_shard(shard_path(writer.folder, name, (number, *(0,) * len(row))), encoded)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Give an archive of arrays of every dtype, shape and profile, and what must be read."""
    folder, wanted = tmp_path_factory.mktemp("arrays") / "a.zarr", {}
    folder.mkdir()
    writer = ArchiveWriter(folder)
    natives = sorted({kind.array.name for kind in dtypes.BY_CODE.values()})
    for dtype in natives:
        for shape, (lengths, _, _) in SHAPES.items():
            for profile in shards.PROFILES:
                name = f"{dtype}-{shape}-{profile}"
                rows = random_values(lengths, dtype, seed=len(wanted))
                if profile != "none" and rows.dtype.itemsize > 1:  # planes that shrink
                    rows.reshape(-1).view(np.uint8)[rows.dtype.itemsize - 1 :: rows.itemsize] &= 3
                write(writer, name, rows, shape, profile)
                wanted[name] = readers.told(rows, rows[readers.middle(rows.shape)])
    writer.finish({})
    return folder, wanted


@pytest.mark.parametrize(("python", "reader"), READERS)
def test_a_stock_reader_reads_every_dtype_shape_and_profile(
    arrays: tuple[Path, dict[str, Any]], python: str, reader: str
) -> None:
    folder, wanted = arrays
    found = read_elsewhere(python, reader, folder)
    assert {name: found[name] for name in wanted} == wanted


# -- archives -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=shards.PROFILES)
def archive(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, NDArray[Any]]]:
    """Give an archive made of a log, and the values of its arrays, from the packets."""
    folder = tmp_path_factory.mktemp("archive")
    log = LogBuilder(folder / "run.stream")
    names = [kind.name for kind in dtypes.BY_CODE.values() if not kind.name.startswith("float8")]
    for name in names:
        log.layer(name)
        log.layer(f"h.{name}", f"block_{name}", 0)
        log.layer(f"loose.{name}", f"loose_{name}")
    for number in range(3):
        log.begin(axis(2, 150))
        for place, name in enumerate(names):
            seed = 100 * number + place
            log.put(name, random_values((2, 150, 40), name, seed=seed))
            log.put(f"h.{name}", random_values((2, 150, 3, 5), name, seed=seed + 50))
            log.put(f"loose.{name}", random_values((7, 11), name, seed=seed + 70))
        log.commit()
    compact(log.close(), folder / "run.zarr", profile=request.param)
    wanted: dict[str, NDArray[Any]] = {}
    for name in names:
        mine = {
            layer: np.concatenate([one.values for one in log.fired if one.layer == layer])
            for layer in (name, f"h.{name}", f"loose.{name}")
        }
        if name == "bfloat16":  # the upper half of a float32
            for layer, values in mine.items():
                wide = np.zeros((*values.shape, 2), np.uint16)
                wide[..., 1] = values.view(np.uint16)
                mine[layer] = wide.view(np.float32)[..., 0]
        wanted[name] = mine[name].reshape(-1, 40)
        wanted[f"block_{name}"] = mine[f"h.{name}"].reshape(1, -1, 3, 5)
        wanted[f"loose_{name}_values"] = mine[f"loose.{name}"].reshape(-1)
    return folder / "run.zarr", wanted


@pytest.mark.parametrize(("python", "reader"), READERS)
def test_a_stock_reader_finds_in_an_archive_what_was_captured(
    archive: tuple[Path, dict[str, NDArray[Any]]], python: str, reader: str
) -> None:
    folder, wanted = archive
    found = read_elsewhere(python, reader, folder)
    for name, values in wanted.items():
        assert found[name] == readers.told(values, values[readers.middle(values.shape)]), name
