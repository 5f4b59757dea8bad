"""Owns what is finished of an archive that is being made, so that a killed compaction goes on.

The archive is made in a folder that no reader looks at; beside it stands the journal: a line that
says of what, then one for each shard that is written, verified and on the disk. Whoever makes the
archive holds the journal's lock.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from actstore import files
from actstore.archive.jobs import Written
from actstore.archive.zipped import Place
from actstore.errors import ActstoreError, ArchiveError, BucketError

__all__ = ["Journal", "attempts_of", "beside"]


def attempts_of(folder: Path) -> Path:
    """Give where shards lie that other processes write, beside the folder that they are for."""
    return folder.with_name(f"{folder.name.removesuffix('.partial')}.attempts")


def beside(folder: Path) -> Path:
    """Give a folder beside that of an archive that is being made, for what its making needs."""
    return folder.with_name(f"{folder.name}.rows")


class Journal:
    """The folder of an archive that is being made, and what is finished in it.

    A context manager that holds the lock. Where it is left by an error of ours, for what is wrong
    with the log or was written wrong, both are removed. Else, and where it is a bucket that has a
    fault, both stay, for the next who comes
    with the same ``making``, until the archive is finished.

    Parameters
    ----------
    target : Path
        What the archive will be called.
    making : str
        What it is made of, and how: another one begins anew.

    Attributes
    ----------
    folder : Path
        Where the archive is made.
    created : str
        When that began, in UTC.
    done : dict of str to Written
        File of a finished shard, within the folder -> what was written of it.

    Raises
    ------
    ArchiveError
        Another process is making this archive.
    """

    def __init__(self, target: Path, making: str, now: str) -> None:
        self.folder = target.with_name(f".{target.name}.partial")
        self.path = target.with_name(f".{target.name}.journal")
        self.created = now
        self.done: dict[str, Written] = {}
        self._target = target
        self._making = making
        self._descriptor = -1
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._take()
        try:
            self._check_target()
            for left in (attempts_of(self.folder), beside(self.folder)):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            if not self._resume():
                self._begin()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, ActstoreError) and not isinstance(error, BucketError):
                self._discard()
        finally:
            self._close()

    @property
    def place(self) -> Place:
        """Where what was made so far can be read."""
        return self.folder

    def add(self, name: str, written: Written) -> None:
        """Note that a shard is finished: its files are on the disk, under their names."""
        with self._lock:
            self._write({"shard": name, **written.to_json()})
            self.done[name] = written

    def finish(self) -> None:
        """Give the archive its name."""
        files.replace(self.folder, self._target)
        self.path.unlink()

    def _take(self) -> None:
        """Open the journal and take its lock."""
        try:
            self._descriptor = files.take(self.path)
        except files.LockedError as error:
            msg = f"another compaction is making {self._target}; wait for it to end"
            raise ArchiveError(msg) from error

    def _check_target(self) -> None:
        if os.path.lexists(self._target):
            msg = f"{self._target} exists by now, and is not overwritten; give another name"
            raise ArchiveError(msg)

    def _resume(self) -> bool:
        """Read what is finished, and remove all else; False where there is nothing to go on."""
        lines = self.path.read_bytes().split(b"\n")[:-1]  # a line that was cut is none
        try:
            begun, *shards = (json.loads(line) for line in lines)
            if begun["making"] != self._making or not self.folder.is_dir():
                return False
            done = {one["shard"]: Written.parse(one) for one in shards}
        except (ValueError, KeyError, TypeError):
            return False
        self.done = {name: one for name, one in done.items() if self._is_whole(one)}
        kept = self._kept()
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.folder).as_posix() not in kept:
                path.unlink()
        self.created = begun["created"]
        os.ftruncate(self._descriptor, sum(len(line) + 1 for line in lines))
        return True

    def _kept(self) -> set[str]:
        return {file for one in self.done.values() for file in one.files}

    def _is_whole(self, written: Written) -> bool:
        paths = [(self.folder / file, nbytes) for file, nbytes in written.files.items()]
        return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in paths)

    def _begin(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        self._begin_journal()
        files.fsync_folder(self.path.parent)

    def _begin_journal(self) -> None:
        os.ftruncate(self._descriptor, 0)
        self._write(self._head())

    def _head(self) -> dict[str, Any]:
        return {"making": self._making, "created": self.created}

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]
        files.fdatasync(self._descriptor)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
