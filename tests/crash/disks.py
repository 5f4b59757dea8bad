"""Records the calls of a capture that reach the disk, and replays them onto one that loses power.

What was not synced is there, dropped, cut, torn by sectors (as zeros or as what stood there
before), or out of order; names too.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

__all__ = ["Call", "Disk", "Journal", "replayed", "writes"]

SECTOR = 512


# -- recording ----------------------------------------------------------------------------------


class Call(NamedTuple):
    """A system call that reaches the disk, or what the program was told when it returned."""

    kind: str  # create, write, truncate, sync, rename, unlink, names, said
    file: int = -1  # its content may outlive its name
    name: str = ""
    offset: int = 0  # of a write; the length of a truncation
    data: bytes = b""


class Journal:
    """Records the calls on the files of one folder, while the context is open.

    What is written through buffered files (`atomic_write`, `keep_cut`) is seen at their fsync,
    which is where it may become durable.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self._folder = folder
        self._patch = patch
        self._seen: dict[int, int] = {}  # file -> bytes that are in the journal
        self._files: dict[int, int] = {}  # inode -> file; inodes are used again
        self.before = {one.name: one.read_bytes() for one in folder.iterdir()}
        self.start = Disk()
        for name, data in self.before.items():
            file = self._new((folder / name).stat().st_ino, len(data))
            self.start.files[file] = File(data)
            self.start.names[name] = file

    def __enter__(self) -> Self:
        for name in ("open", "writev", "fdatasync", "fsync", "ftruncate", "truncate"):
            self._patch.setattr(os, name, self._recorded(name))
        for name in ("rename", "replace", "unlink"):
            self._patch.setattr(os, name, self._recorded(name))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def said(self, line: str) -> None:
        """Note what the program was told."""
        self.calls.append(Call("said", name=line))

    def _recorded(self, name: str) -> Callable[..., Any]:
        real, note = getattr(os, name), getattr(self, f"_{name}")

        def call(*args: Any, **options: Any) -> Any:
            return note(real, *args, **options)

        return call

    def _mine(self, descriptor: int) -> bool:
        found = os.fstat(descriptor)
        return stat.S_ISREG(found.st_mode) and self._path(descriptor).parent == self._folder

    def _path(self, descriptor: int) -> Path:
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    def _new(self, inode: int, size: int = 0) -> int:
        file = self._files[inode] = len(self._seen)
        self._seen[file] = size
        return file

    def _create(self, descriptor: int) -> int:
        inode = os.fstat(descriptor).st_ino
        if inode not in self._files:
            self.calls.append(Call("create", self._new(inode), self._path(descriptor).name))
        return self._files[inode]

    def _gone(self, path: Any) -> None:
        """Forget the inode of a name that is removed or replaced."""
        if Path(path).exists():
            self._files.pop(Path(path).stat().st_ino, None)

    def _open(self, real: Callable[..., int], path: Any, *args: Any, **options: Any) -> int:
        descriptor = real(path, *args, **options)
        if self._mine(descriptor):
            self._create(descriptor)
        return descriptor

    def _writev(self, real: Callable[..., int], descriptor: int, buffers: Any) -> int:
        if not self._mine(descriptor):
            return real(descriptor, buffers)
        offset = os.fstat(descriptor).st_size
        data = b"".join(bytes(one) for one in buffers)
        file = self._create(descriptor)
        self.calls.append(Call("write", file, offset=offset, data=data))
        written = real(descriptor, buffers)
        assert written == len(data)
        self._seen[file] = offset + written
        return written

    def _fdatasync(self, real: Callable[..., None], descriptor: int) -> None:
        real(descriptor)
        if self._mine(descriptor):
            self.calls.append(Call("sync", self._create(descriptor)))

    def _fsync(self, real: Callable[..., None], descriptor: int) -> None:
        real(descriptor)
        if self._path(descriptor) == self._folder:
            self.calls.append(Call("names"))
        elif self._mine(descriptor):
            file = self._create(descriptor)
            data = self._path(descriptor).read_bytes()
            new = data[self._seen[file] :]
            self.calls.append(Call("write", file, offset=self._seen[file], data=new))
            self._seen[file] = len(data)
            self.calls.append(Call("sync", file))

    def _ftruncate(self, real: Callable[..., None], descriptor: int, length: int) -> None:
        self.calls.append(Call("truncate", self._create(descriptor), offset=length))
        real(descriptor, length)

    def _truncate(self, real: Callable[..., None], path: Any, length: int) -> None:
        self.calls.append(Call("truncate", self._files[Path(path).stat().st_ino], offset=length))
        real(path, length)

    def _rename(self, real: Callable[..., None], source: Any, target: Any) -> None:
        names = f"{Path(source).name}/{Path(target).name}"
        call = Call("rename", self._files[Path(source).stat().st_ino], names)
        self._gone(target)
        real(source, target)
        self.calls.append(call)

    _replace = _rename

    def _unlink(self, real: Callable[..., None], path: Any, **options: Any) -> None:
        if Path(path).parent == self._folder:
            self._gone(path)
        real(path, **options)
        if Path(path).parent == self._folder:
            self.calls.append(Call("unlink", name=Path(path).name))


# -- the disk -----------------------------------------------------------------------------------


@dataclass
class File:
    """What is durable of a file, and the calls that are not."""

    durable: bytes = b""
    pending: list[Call] = field(default_factory=list)

    def content(self, keep: str, rng: random.Random, cut: int | None = None) -> bytes:
        """Give what is there after the power cut; of the last write, only ``cut`` bytes came."""
        calls = list(self.pending)
        if cut is not None and calls:
            calls[-1] = calls[-1]._replace(data=calls[-1].data[:cut])
        if keep == "dropped":
            return self.durable
        if keep == "torn" and rng.random() < 0.3:  # and the size may be behind, too
            calls = calls[: rng.randrange(len(calls) + 1)]
        data = bytearray(self.durable)
        lost: list[tuple[int, int]] = []
        for number, call in enumerate(calls):
            if call.kind == "truncate":
                if keep in ("kept", "zeros") or rng.random() < 0.5:
                    del data[call.offset :]
                continue
            end = call.offset + len(call.data)
            data[len(data) :] = bytes(max(call.offset - len(data), 0))
            data[call.offset : end] = call.data
            if keep == "zeros" or (keep == "reordered" and self._late(number, len(calls), rng)):
                lost.append((call.offset, end))
            elif keep == "torn":
                lost += [one for one in _sectors(call.offset, end) if rng.random() < 0.4]
        filler = rng.randbytes if rng.random() < 0.2 else bytes
        for begin, end in lost:
            data[begin:end] = filler(end - begin)
        return bytes(data)

    def _late(self, number: int, count: int, rng: random.Random) -> bool:
        """Whether a write had not come, though one behind it may have."""
        return number < count - 1 and rng.random() < 0.6


def _sectors(begin: int, end: int) -> Iterator[tuple[int, int]]:
    while begin < end:
        following = min(end, (begin // SECTOR + 1) * SECTOR)
        yield begin, following
        begin = following


@dataclass
class Disk:
    """A folder: durable names, the calls on them that are not, and its files."""

    names: dict[str, int] = field(default_factory=dict)
    pending: list[Call] = field(default_factory=list)
    files: dict[int, File] = field(default_factory=dict)

    def copy(self) -> Disk:
        files = {key: File(one.durable, list(one.pending)) for key, one in self.files.items()}
        return Disk(dict(self.names), list(self.pending), files)

    def apply(self, call: Call) -> None:
        match call.kind:
            case "create":
                self.files[call.file] = File()
                self.pending.append(call)
            case "rename" | "unlink":
                self.pending.append(call)
            case "names":
                self.names, self.pending = self.named(len(self.pending)), []
            case "write" | "truncate":
                self.files[call.file].pending.append(call)
            case "sync":
                one = self.files[call.file]
                one.durable, one.pending = one.content("kept", random.Random()), []

    def named(self, count: int) -> dict[str, int]:
        """Give the names when so many of the pending calls have come."""
        names = dict(self.names)
        for call in self.pending[:count]:
            if call.kind == "create":
                names[call.name] = call.file
            elif call.kind == "unlink":
                names.pop(call.name, None)
            else:
                source, target = call.name.split("/")
                names.pop(source, None)
                names[target] = call.file
        return names

    def lose_power(
        self, folder: Path, keep: str, rng: random.Random, cut: tuple[int, int] | None = None
    ) -> None:
        """Leave in a folder what a power cut leaves; ``cut``: of a file's last write, so much."""
        came = {"dropped": 0, "kept": len(self.pending)}.get(keep)
        names = self.named(rng.randint(0, len(self.pending)) if came is None else came)
        for name, inode in names.items():
            bytes_of_last = cut[1] if cut and cut[0] == inode else None
            (folder / name).write_bytes(self.files[inode].content(keep, rng, bytes_of_last))


def replayed(journal: Journal) -> Iterator[tuple[int, Disk]]:
    """Yield the disk before every call, and at the end."""
    disk = journal.start.copy()
    for number, call in enumerate(journal.calls):
        yield number, disk
        disk.apply(call)
    yield len(journal.calls), disk


def writes(journal: Journal) -> Iterator[tuple[int, Disk, int]]:
    """Yield each write that is under way: its number, the disk with it, and its length."""
    for number, disk in replayed(journal):
        if number == len(journal.calls):
            return
        call = journal.calls[number]
        if call.kind == "write" and call.data:
            under_way = disk.copy()
            under_way.apply(call)
            yield number, under_way, len(call.data)
