"""Owns writing a shard of an archive's values: what of its rows is stored, in which files.

At full precision it is one file; of codes there are one for the scales, and one for the chunks
that can't be codes. Where rows come from is for the caller: a log, or an archive that grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import codecs, files
from actstore.archive import shards
from actstore.archive.grid import Shard
from actstore.archive.precision import EXACT, SCALE, Codes, Errors, Precision

__all__ = ["Job", "Read", "Written", "write"]

#: Gives rows, or elements, from the first to before the last.
Read = Callable[[int, int], NDArray[Any]]

#: Chunks that rounding holds besides: in float64, and what it compares.
_ROUNDING: Final = 12


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One shard to write: of which array, what reads its rows, and whose bytes they are.

    ``place`` is its place on ``layer``, where the array has that; ``dtype`` and ``fill`` are those
    of the rows; ``owners`` has the raw bytes that each module has in it; ``link`` is a file that
    is this shard already; ``precision`` is how much of the rows is kept, if not all; ``beside`` is
    the memory that reading its rows takes.
    """

    name: str
    place: tuple[int, ...]
    row_shape: tuple[int, ...]
    dtype: np.dtype
    shard: Shard
    fill: Any
    owners: Mapping[str, int]
    read: Read
    link: Path | None = None
    precision: Precision | None = None
    beside: int = 0

    @property
    def file(self) -> str:
        """Its file, within the archive."""
        return self.file_of(self.name, self.row_shape)

    def file_of(self, name: str, row_shape: tuple[int, ...]) -> str:
        """Give the file of the same rows of another array."""
        place = (*self.place, self.shard.number, *(0,) * len(row_shape))
        return shards.shard_path(Path(), name, place).as_posix()

    @property
    def raw_bytes(self) -> int:
        """Bytes of its rows that are there, in the model's dtype."""
        return sum(self.owners.values())

    @property
    def memory(self) -> int:
        """Bytes that writing it takes, at most."""
        chunks, kind = self.shard.present.size, self.dtype
        if self.precision is not None:
            chunks, kind = chunks + _ROUNDING, self.precision.decoded_dtype(kind)
        return shards.memory_of(chunks, self.chunk_bytes(kind)) + self.beside

    def chunk_bytes(self, dtype: np.dtype) -> int:
        """Give the bytes of one of its chunks, in a dtype."""
        return self.shard.chunk_rows * math.prod(self.row_shape) * dtype.itemsize

    def chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Read its chunks that hold anything, one after the other: their numbers and rows."""
        for number in np.flatnonzero(self.shard.present).tolist():
            yield number, self.chunk(number)

    def chunk(self, number: int) -> NDArray[Any]:
        """Read the rows of a chunk."""
        shard = self.shard
        first = shard.first + number * shard.chunk_rows
        return self.read(first, min(first + shard.chunk_rows, shard.last))

    def stored(self, number: int) -> dict[str, NDArray[Any]]:
        """Give what is stored of a chunk: of which arrays, what rows."""
        rows, precision = self.chunk(number), self.precision
        if precision is None:
            return {self.name: rows}
        if not precision.coded:
            return {self.name: precision.rounded(rows)[0]}
        found = precision.quantised(rows)
        codes = found or Codes.none(rows.shape, precision.code_dtype)
        parts: dict[str, NDArray[Any]] = {self.name: codes.codes}
        if precision.scaled:
            parts[f"{self.name}{SCALE}"] = codes.scale
        if found is None:
            parts[f"{self.name}{EXACT}"] = rows.astype(precision.decoded_dtype(rows.dtype))
        return parts


@dataclass(frozen=True, slots=True)
class Written:
    """What was written of a shard.

    Attributes
    ----------
    files : mapping of str to int
        Its files within the archive, and their bytes.
    errors : Errors or None
        How far off its values are; None at full precision.
    exact : tuple of int
        The chunks that have no codes.
    """

    files: Mapping[str, int]
    errors: Errors | None = None
    exact: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON has it."""
        return asdict(self)

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Written:
        """Read what `to_json` gave."""
        errors = None if said["errors"] is None else Errors(**said["errors"])
        return cls(dict(said["files"]), errors, tuple(said["exact"]))


def write(job: Job, folder: Path, profile: str) -> Written:
    """Write a shard, compare what it decodes to with its rows, and its files with what they are.

    Raises
    ------
    shards.MismatchError
        They differ.
    """
    if job.link is not None:
        return Written({job.file: files.link_or_copy(job.link, folder / job.file)})
    if job.precision is None:
        return Written({job.file: _write_rows(job, folder, job.file, job.chunks(), profile)})
    return (_write_codes if job.precision.coded else _write_rounded)(
        job, job.precision, folder, profile
    )


def _write_rounded(job: Job, precision: Precision, folder: Path, profile: str) -> Written:
    found = [Errors()]

    def chunks() -> Iterator[tuple[int, NDArray[Any]]]:
        for number, rows in job.chunks():
            rounded, errors = precision.rounded(rows)
            found.append(errors)
            yield number, rounded

    nbytes = _write_rows(job, folder, job.file, chunks(), profile)
    return Written({job.file: nbytes}, sum(found, Errors()))


def _write_codes(job: Job, precision: Precision, folder: Path, profile: str) -> Written:
    shard = job.shard
    scales = np.full(shard.chunk_rows * shard.present.size, np.nan, np.float32)
    found: list[Errors] = []
    exact: list[int] = []

    def chunks() -> Iterator[tuple[int, NDArray[Any]]]:
        for number, rows in job.chunks():
            codes = precision.quantised(rows)
            if codes is None:
                exact.append(number)
                found.append(precision.checked(rows, rows).kept())
                yield number, Codes.none(rows.shape, precision.code_dtype).codes
            else:
                first = number * shard.chunk_rows
                scales[first : first + len(rows)] = codes.scale
                found.append(codes.errors)
                yield number, codes.codes

    written = {
        job.file: _write_rows(job, folder, job.file, chunks(), profile, precision.code_dtype)
    }
    if precision.scaled:
        file = job.file_of(f"{job.name}{SCALE}", ())
        rows = [(0, scales)]
        written[file] = _put(
            folder / file, rows, scales.size, 1, 1, np.nan, scales.nbytes, profile
        )
    if exact:
        file, kind = (
            job.file_of(f"{job.name}{EXACT}", job.row_shape),
            precision.decoded_dtype(job.dtype),
        )
        mine = ((number, job.chunk(number).astype(kind)) for number in exact)
        written[file] = _write_rows(job, folder, file, mine, profile, kind)
    return Written(written, sum(found, Errors()), tuple(exact))


def _write_rows(
    job: Job,
    folder: Path,
    file: str,
    chunks: Iterable[tuple[int, NDArray[Any]]],
    profile: str,
    dtype: np.dtype | None = None,
) -> int:
    """Write chunks that are cut as the job's are, perhaps of another dtype."""
    shard = job.shard
    fill = job.fill if dtype is None else np.nan if dtype.kind == "f" else 0
    return _put(
        folder / file,
        chunks,
        shard.chunk_rows,
        shard.present.size,
        int(shard.present.sum()),
        fill,
        job.chunk_bytes(dtype or job.dtype),
        profile,
    )


def _put(
    path: Path,
    chunks: Iterable[tuple[int, NDArray[Any]]],
    chunk_rows: int,
    count: int,
    most: int,
    fill: Any,
    chunk_bytes: int,
    profile: str,
) -> int:
    memory = codecs.scratch("shard", shards.room(chunk_bytes, most, count))
    encoded = shards.encode_shard(chunks, chunk_rows, count, fill, profile, memory)
    return shards.write_shard(path, encoded)
