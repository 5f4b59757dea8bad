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
from actstore.archive.shuffling import check_layout
from actstore.arguments import check_callable, check_memory, check_tokenizer
from actstore.buckets import RemotePath, remote
from actstore.clusters import check_client
from actstore.compaction import removing
from actstore.compaction.cluster import chosen
from actstore.compaction.content import Wanted
from actstore.compaction.executing import SENT_BYTES, workers_of
from actstore.compaction.logs import Pathlike, path_of, paths_of
from actstore.compaction.recipe import OfLogs
from actstore.compaction.writing import Progress, write_archive
from actstore.errors import ConfigError

__all__ = ["CompactionReport", "Pathlike", "Progress", "compact", "discard"]

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
    layout: str = "captured",
    seed: int = 0,
    tokenizer: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    workers: int | None = None,
    max_memory_gb: float = _MEMORY_GB,
    client: Any = None,
    remove_logs: bool = False,
    progress: Progress | None = None,
    ranks: str = "all",
    storage_options: Mapping[str, Any] | None = None,
    spool: Pathlike | None = None,
) -> CompactionReport:
    """Compact logs into a Zarr v3 archive, verified before it appears.

    What is finished of an archive is kept in a hidden folder beside it until the archive is whole:
    the same call after a kill, an interrupt or a full disk goes on where that one was.

    Parameters
    ----------
    streams : path or sequence of paths
        The log, or several of them (the ranks of a run, or different runs of a model). Logs whose
        HEADERs say that they are of one run on a mesh are united: layers of a pipeline's stages
        stand side by side, divided outputs are put together, the others are taken from the lowest
        rank, and each data-parallel replica has its rows. Rows are in the order of the runs as
        they are given here, then replica, pass, batch item, position; with several of these, the
        coordinate ``run`` has their number. Logs that say nothing of a mesh are runs each.
    out : path
        The archive, a folder that must not exist, or the URL of one in a bucket
        (``s3://bucket/run.zarr``), below which nothing may be; by custom ``name.zarr``. It is
        uploaded shard by shard, and is an archive with the last object, its root's metadata.
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
    layout : {"captured", "shuffled"}
        The order of the rows: the logs', or one drawn at random, the same for all arrays, as
        training wants it. Each row knows by ``source_row`` which it was as captured:
        ``dataset.sortby("source_row")`` is that order. Sequences are still found; logs can't be
        appended. Beside the archive a file of the size of a layer is needed meanwhile, or of some
        that are small.
    seed : int
        By which a shuffled order is drawn.
    tokenizer : object, optional
        With ``decode([id])``: gives the rows' ``token_text``.
    shapes, dtypes : mapping, optional
        Of a log of ``llm-instrumentation``, which holds none: as for `open_stream`.
    workers : int, optional
        Threads, at most; by default as many as the process has cores. Each holds an encoded shard
        of about 64 MiB. On a cluster, workers have
        as many as they were started with.
    max_memory_gb : float
        GB of memory, over what the process had, beside the tables of the logs and the labels of
        the rows (about 130 bytes a row): fewer threads work where it allows no more. On a cluster
        that of each worker, which its own limit may make less.
    client : distributed.Client, optional
        Of a dask cluster, whose workers write the shards, to the same bytes: logs and archive
        must be on a file system that all of them see by the same paths. A worker that dies
        changes nothing; when there has been none for a minute, an `ArchiveError` says so, and
        the same call goes on.
    remove_logs : bool
        Remove the logs when the archive is whole, verified and on the disk, and the token tables
        and checkpoints beside them that say no more than they do. Logs that are being written, or
        are in a bucket and not whole, are refused.
    progress : callable, optional
        Called with the bytes that are done and those that there are.
    ranks : {"all", "common", "given"}
        Of a run on a mesh: refuse it where a rank is missing, or has fewer passes than the
        others; keep the passes and packets that all have; or that too, of the ranks that are
        given: divided outputs that lack a part are then kept apart, as ``site@tensor0``.
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
        An argument can't be honoured; a log is to be removed that is being written; logs say
        different things of one layer; a rank is missing, given twice, or disagrees with the
        others; or a single row needs more memory.
    ArchiveError
        ``out`` exists, can't be written, was discarded meanwhile, or what was written doesn't
        read back as the log has it. Or a log that was to be removed was written meanwhile: then
        ``out`` is whole, and no log is removed.
    BucketError
        A bucket doesn't answer; what is uploaded is kept there, for the same call to go on.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_stream`.
    """
    began = time.monotonic()
    paths, target = paths_of(streams, "compact", storage_options), path_of(out, storage_options)
    shards.check_profile(profile)
    drawn = check_layout(layout, seed)
    threads = workers_of(workers)
    check_memory(max_memory_gb)
    check_tokenizer(tokenizer)
    check_callable("progress", progress)
    check_client(client)
    waiting = uploads.spool_of(spool, paths[0])
    if isinstance(target, RemotePath):
        uploads.check_new(target, waiting)
    else:
        files.check_new(target)
    recipe = OfLogs(
        tuple(path.absolute() for path in paths), shapes, dtypes, precision, ranks, drawn
    )
    states = removing.states_of(recipe.paths) if remove_logs else {}
    sent = SENT_BYTES if isinstance(target, RemotePath) else 0
    with recipe.made(tokenizer) as (content, mine):
        executor = chosen(client, recipe, content, mine, threads, max_memory_gb, sent)
        made = write_archive(content, mine, target, profile, executor, progress, waiting)
    removing.remove(states, target)
    return CompactionReport(path=target, seconds=time.monotonic() - began, **made)


def discard(url: str, *, storage_options: Mapping[str, Any] | None = None) -> int:
    """Remove what a compaction into a bucket left that will not go on: all below its URL.

    Nothing else was there when it began; what was put there since goes, too.

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
