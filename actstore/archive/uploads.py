"""Owns an archive that is being made in a bucket: what of it is there, and when it becomes one.

Shards go up as they are written, then all else; the root's metadata is the last object, and makes
it an archive. The journal is on this machine, in the folder that what waits for its upload is in.
Nothing else is below the URL when it is claimed: so all that is there later is the claimant's.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from actstore import files
from actstore.archive.jobs import Written
from actstore.archive.journal import Journal
from actstore.buckets import RemotePath
from actstore.errors import ArchiveError, BucketError, ConfigError

__all__ = ["CLAIM", "Uploads", "check_new", "discard", "spool_of"]

#: The object that keeps other compactions away while an archive is being made.
CLAIM: Final = ".making.json"
_ROOT: Final = "zarr.json"
_JSON_LIMIT: Final = 1 << 20
_AT_ONCE: Final = 8  # small objects


class Uploads(Journal):
    """An archive that is being made in a bucket, and what is finished of it; see `Journal`.

    Parameters
    ----------
    target : RemotePath
        The archive.
    making : str
        What it is made of, and how.
    now : str
        When that began, in UTC.
    spool : Path
        The folder for the journal, and for what isn't uploaded yet.

    Raises
    ------
    ArchiveError
        There is an archive, or another machine is making one, or there are other objects.
    BucketError
        The bucket doesn't answer.
    """

    def __init__(self, target: RemotePath, making: str, now: str, spool: Path) -> None:
        mark = hashlib.sha256(str(target).encode()).hexdigest()[:12]
        super().__init__(spool / f"{target.name}.{mark}", making, now)
        self.target = target
        self._owner = uuid.uuid4().hex
        self._there: dict[str, int] = {}
        self._sent: set[str] = set()

    def send(self, written: Written) -> None:
        """Upload a shard's files, and have them here no longer."""
        for name in written.files:
            self._send(name)
            (self.folder / name).unlink()

    @property
    def place(self) -> RemotePath:
        """Where what was made so far can be read: with what is here uploaded first."""
        self._check_claim()
        inside = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        names = [one.as_posix() for one in sorted(inside) if (self.folder / one).is_file()]
        missing = [name for name in names if name != _ROOT and name not in self._sent]
        with ThreadPoolExecutor(_AT_ONCE, "actstore-upload") as pool:
            for _ in pool.map(self._send, missing):
                pass
        self._sent.update(missing)  # they stay: the root's metadata is made of them
        return self.target

    def finish(self) -> None:
        """Upload what is here, the root's metadata last: then it is an archive."""
        bucket, place = self.target.bucket, self.place
        self._check_claim()
        try:
            bucket.put(self._name(_ROOT), (self.folder / _ROOT).read_bytes(), new=True)
        except FileExistsError:
            msg = f"{place} is an archive by now, and is not overwritten; give another URL"
            raise ArchiveError(msg) from None
        bucket.delete(self._name(CLAIM))
        self._forget()

    def _check_claim(self) -> None:
        """Refuse to go on where another may begin."""
        if self._claimed_by() != self._owner:
            msg = (
                f"{self.target} is no longer this compaction's: actstore.discard was called "
                "meanwhile; what was uploaded since is left there, and is no archive: give "
                "another URL"
            )
            raise ArchiveError(msg)

    def _name(self, name: str) -> str:
        return (self.target / name).inside

    def _send(self, name: str) -> None:
        self.target.bucket.put(self._name(name), (self.folder / name).read_bytes())

    def _check_target(self) -> None:
        if (self.target / _ROOT).exists():
            if self._claimed_by() == self._begun().get("owner", ""):  # killed at its very end
                self.target.bucket.delete(self._name(CLAIM))
            self._forget()
            msg = f"{self.target} is an archive by now, and is not overwritten; give another URL"
            raise ArchiveError(msg)

    def _begun(self) -> Mapping[str, Any]:
        """Give the journal's first line; nothing where it has none."""
        try:
            said = json.loads(self.path.read_bytes().split(b"\n")[0])
        except ValueError:
            return {}
        return said if isinstance(said, dict) else {}

    def _head(self) -> dict[str, Any]:
        return {**super()._head(), "owner": self._owner}

    def _resume(self) -> bool:
        self._owner = str(self._begun().get("owner", self._owner))
        self._there = {one.name: one.size for one in self.target.listed()}
        if CLAIM not in self._there or not super()._resume():
            return False
        self._claim()
        return True

    def _is_whole(self, written: Written) -> bool:
        return all(self._there.get(file) == nbytes for file, nbytes in written.files.items())

    def _kept(self) -> set[str]:
        """Give what may stay in the folder: nothing, for what is finished is in the bucket."""
        return set()

    def _begin(self) -> None:
        super()._begin()
        ours = self._claimed_by() == self._owner
        self._claim()
        there = [one.name for one in self.target.listed() if one.name != CLAIM]
        if there and not ours:
            self.target.bucket.delete(self._name(CLAIM))
            self._forget()
            raise _taken(self.target, there)
        for name in there:  # of an earlier compaction from here, of something else
            self.target.bucket.delete(self._name(name))

    def _claim(self) -> None:
        """Keep others away, or find that others do."""
        said = {"owner": self._owner, "host": socket.gethostname(), "created": self.created}
        try:
            self.target.bucket.put(self._name(CLAIM), json.dumps(said).encode(), new=True)
        except FileExistsError:
            other = self._claimed()
            if other.get("owner") != self._owner:
                self._forget()
                msg = (
                    f"{self.target} is being made since {other.get('created')} by another "
                    f"compaction, on {other.get('host')}, or by one that was begun with another "
                    "spool folder: wait for it, or go on there; if it is gone for good, "
                    "actstore.discard(url) removes what it left"
                )
                raise ArchiveError(msg) from None

    def _claimed(self) -> Mapping[str, Any]:
        """Give what the claim says; nothing where there is none, or it is none of ours."""
        try:
            said = json.loads((self.target / CLAIM).read_bytes(_JSON_LIMIT))
        except (FileNotFoundError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def _claimed_by(self) -> str | None:
        return self._claimed().get("owner")

    def _discard(self) -> None:
        """Remove all that was made; what can't be is the next one's to remove."""
        try:
            if self._claimed_by() == self._owner:
                if (self.target / _ROOT).exists():
                    self.target.bucket.delete(self._name(CLAIM))
                else:
                    _remove(self.target)
        except BucketError as error:
            self._making = f"nothing, for {error}"
            self._begin_journal()
        else:
            self._forget()

    def _forget(self) -> None:
        """Have nothing of it on this machine."""
        super()._discard()


def check_new(target: RemotePath, spool: Path | None = None) -> None:
    """Refuse a URL that has an archive or, unless one is being made, anything at all.

    What a compaction left that was killed at its end is tidied.

    Raises
    ------
    ArchiveError
        It has.
    """
    if (target / _ROOT).exists():
        left = None if spool is None else Uploads(target, "", "", spool)
        if left is not None and left.path.exists():
            with left:  # which finds the archive, and says so
                pass
        raise _is_archive(target)
    there = [one.name for one in target.listed()]
    if there and CLAIM not in there:
        raise _taken(target, there)


def _is_archive(target: RemotePath) -> ArchiveError:
    msg = f"{target} is an archive, and is not overwritten; give another URL, or remove it"
    return ArchiveError(msg)


def _taken(target: RemotePath, there: Sequence[str]) -> ArchiveError:
    msg = (
        f"an archive wants a URL below which there is nothing; below {target} there are "
        f"{len(there)} objects, such as {there[0]}, which are not overwritten: give another URL"
    )
    return ArchiveError(msg)


def discard(target: RemotePath) -> int:
    """Remove what a compaction left that will not go on; give how many objects that were.

    Raises
    ------
    ArchiveError
        It is a whole archive, or nothing of one.
    """
    if (target / _ROOT).exists():
        raise _is_archive(target)
    if not (target / CLAIM).exists():
        msg = f"no compaction left anything at {target}: there is no {CLAIM}; nothing was removed"
        raise ArchiveError(msg)
    return _remove(target)


def _remove(target: RemotePath) -> int:
    """Remove all objects of what is no archive, what claims it last."""
    names = sorted((one.name for one in target.listed()), key=lambda name: name == CLAIM)
    for name in names:
        target.bucket.delete((target / name).inside)
    return len(names)


def spool_of(given: str | os.PathLike[str] | None, beside: object) -> Path:
    """Give the folder for what waits: as given, else a log's own, else the working directory.

    Raises
    ------
    ConfigError
        There is no such folder.
    """
    folder = files.path_of(given) if given is not None else Path()
    if given is None and isinstance(beside, Path):
        folder = beside.absolute().parent
    if not folder.is_dir():
        msg = f"spool must be a folder that is there; got {str(folder)!r}: create it"
        raise ConfigError(msg)
    return folder.absolute()
