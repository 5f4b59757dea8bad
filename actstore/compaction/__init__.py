"""Owns making an archive from logs: a pure plan, shards by an executor, verification, the rename.

What the plan is, is ``archive.layout``'s; reading rows, ``stream.rows``'s; what of an archive is
finished, ``archive.journal``'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actstore import files, markup
from actstore.archive import shards, uploads
from actstore.buckets import RemotePath, remote
from actstore.compaction.content import Content, Wanted
from actstore.compaction.executing import SENT_GB, Threads, check_workers, fitting
from actstore.compaction.logs import Pathlike, opened, path_of, paths_of
from actstore.compaction.writing import Progress, write_archive
from actstore.errors import ConfigError
from actstore.stream import segments

__all__ = ["CompactionReport", "Pathlike", "Progress", "compact", "discard"]

_WORKERS: Final = 2
_MEMORY_GB: Final = 1.0


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What a compaction made.

    Attributes
    ----------
    path : Path or RemotePath
        The archive.
    rows : mapping of str to int
        Rows of each token axis.
    variables : tuple of str
        The arrays of values, ragged ones included.
    aliases : mapping of str to str
        Sites that are not written, and those that hold their values.
    raw_bytes, stored_bytes : int
        Of the values in the model's dtype, aliases not counted, and of the shards' files.
    shards_verified, chunks_verified : int
        Shards whose chunks were decoded by stock Blosc and compared with the log, and whose files
        were read back and compared; and the inner chunks in them.
    shards_resumed : int
        Of these the shards that an earlier compaction, which was cut short, had finished.
    seconds : float
        What it took.
    """

    path: Path | RemotePath
    rows: Mapping[str, int]
    variables: tuple[str, ...]
    aliases: Mapping[str, str]
    raw_bytes: int
    stored_bytes: int
    shards_verified: int
    chunks_verified: int
    shards_resumed: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Raw bytes over stored bytes."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def _repr_html_(self) -> str:
        """Give what a notebook shows."""
        return markup.facts(
            f"archive {self.path.name}",
            [
                *((f"rows of {dim}", count) for dim, count in self.rows.items()),
                ("variables", self.variables),
                ("captured", markup.bytes_of(self.raw_bytes)),
                ("stored", markup.bytes_of(self.stored_bytes)),
                ("times smaller", self.ratio),
                ("shards verified", self.shards_verified),
                ("chunks verified", self.chunks_verified),
                ("shards of an earlier run", self.shards_resumed),
                ("seconds", self.seconds),
            ],
        )


def compact(  # noqa: PLR0913 - each is its own choice, by name
    streams: Pathlike | Sequence[Pathlike],
    out: Pathlike,
    *,
    profile: str = "balanced",
    precision: Wanted = None,
    tokenizer: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    workers: int = _WORKERS,
    max_memory_gb: float = _MEMORY_GB,
    remove_logs: bool = False,
    progress: Progress | None = None,
    storage_options: Mapping[str, Any] | None = None,
    spool: Pathlike | None = None,
) -> CompactionReport:
    """Compact logs into a Zarr v3 archive, verified before it appears.

    What is finished of an archive is kept in a hidden folder beside it until the archive is whole:
    the same call after a kill, an interrupt or a full disk goes on where that one was.

    Parameters
    ----------
    streams : path or sequence of paths
        The log, or several of them (the ranks of a run, or different runs of a model). Rows are
        in the order of the logs as they are given here, then pass, batch item, position; with
        several, the coordinate ``run`` has the number of the log.
    out : path
        The archive, a folder that must not exist, or the URL of one in a bucket
        (``s3://bucket/run.zarr``); by custom ``name.zarr``. It is uploaded shard by shard, and is
        an archive with the last object, its root's metadata.
    profile : {"balanced", "fast", "dense", "none"}
        Of the archive's chunks, always lossless: small at little cost; LZ4; the smallest, which
        takes about three times as long to encode, and no longer to read; raw.
    precision : str, Precision, or mapping, optional
        How much of the floats is kept: all where nothing is said. Of all of them, or a mapping
        from names of variables or sites, globs among them, of which the first that matches
        counts. Ragged arrays, integers and complex numbers are always kept whole. Promised of
        every chunk, and checked while it is written; one that would break it is kept whole:

        ``"relative=e"``
            Each value is within e times itself: bit-rounding.
        ``"bfloat16"``, ``"float16"``
            Each value is the nearest of that dtype; none overflows.
        ``"nmse=e"``
            The squared error is at most e times the values' squares: codes with a step for each
            row. Small features beside large ones may become 0.
        ``"mse=e"``
            The mean squared error is at most e: codes with one step.
        ``"int8"``
            Each value is within 1/252 of the largest of its row: 255 codes a row.

        The first three are plain floats in the archive; xarray decodes ``mse``, and
        `open_dataset`, or ``dataset.actstore.decode()`` of what others opened, all of them.
    tokenizer : object, optional
        With ``decode([id])``: gives the rows' ``token_text``.
    shapes, dtypes : mapping, optional
        Of a log of ``llm-instrumentation``, which holds none: as for `open_stream`.
    workers : int
        Threads, at most; each holds an encoded shard of about 64 MiB.
    max_memory_gb : float
        GB of memory, over what the process had: fewer threads work where it allows no more.
    remove_logs : bool
        Remove the logs when the archive is whole, verified and on the disk.
    progress : callable, optional
        Called with the bytes that are done and those that there are.
    storage_options : mapping, optional
        Of a bucket that ``streams`` or ``out`` are in, as for `open_dataset`.
    spool : path, optional
        Of an archive in a bucket the folder for the few shards that wait for their upload, and
        for the notes by which the same call goes on after a kill: by default that of the log, or
        the working directory where the log is in a bucket, too.

    Returns
    -------
    CompactionReport
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured; logs say different things of one layer; or a single row
        needs more memory.
    ArchiveError
        ``out`` exists, can't be written, or what was written doesn't read back as the log has
        it.
    BucketError
        A bucket doesn't answer; what is uploaded is kept there, for the same call to go on.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_stream`.
    """
    began = time.monotonic()
    paths, target = paths_of(streams, storage_options), path_of(out, storage_options)
    shards.check_profile(profile)
    check_workers(workers)
    waiting = uploads.spool_of(spool, paths[0])
    if isinstance(target, RemotePath):
        uploads.check_new(target, waiting)
    else:
        files.check_new(target)
    with opened(paths, shapes, dtypes) as reader:
        content = Content.of(reader, tokenizer, precision)
        mine = content.jobs(reader)
        sent = SENT_GB if isinstance(target, RemotePath) else 0.0
        threads = Threads(fitting(mine, workers, max_memory_gb - sent))
        made = write_archive(content, mine, target, profile, threads, progress, waiting)
    if remove_logs:
        for path in paths:
            if isinstance(path, RemotePath):
                segments.remove(path.bucket)
            else:
                path.unlink()
    return CompactionReport(path=target, seconds=time.monotonic() - began, **made)


def discard(url: str, *, storage_options: Mapping[str, Any] | None = None) -> int:
    """Remove what a compaction into a bucket left that will not go on.

    Parameters
    ----------
    url : str
        Of the archive that was to be.
    storage_options : mapping, optional
        As for `open_dataset`.

    Returns
    -------
    int
        How many objects were removed.

    Raises
    ------
    ConfigError
        It is no URL.
    ArchiveError
        There is a whole archive, or nothing of one; nothing is removed.
    """
    where = remote(url, storage_options)
    if where is None:
        msg = f"discard wants the URL of an archive in a bucket; got {url!r}"
        raise ConfigError(msg)
    return uploads.discard(where)
