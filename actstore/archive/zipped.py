"""Owns an archive in one file: a zip whose members are stored as they are, read in place.

A member of such a zip is a range of bytes of the file, and so is a shard. What reads an archive's
folder reads this as well, by `ZipPath`, which has what it needs of a `Path`. The directory of a
zip comes from elsewhere: it is checked before it is believed, and anything is refused that is
compressed, encrypted, a link, twice there, overlapping, or outside.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any, Final, NamedTuple

from actstore.buckets import RemotePath
from actstore.errors import FormatError

__all__ = [
    "Place",
    "ZipPath",
    "is_zip",
    "member_names",
    "pack",
    "read_at",
    "size_of",
    "unexpected",
]

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR: Final = struct.Struct("<4sIQI")
_FIELD: Final = struct.Struct("<2H")
_UTF8: Final = 1 << 11
_ZIP64, _FULL16, _FULL32 = 1, 0xFFFF, 0xFFFFFFFF
_MOST_DIRECTORY: Final = 1 << 28
_PIECE: Final = 1 << 20
_ROOT: Final = "zarr.json"


class _Member(NamedTuple):
    """A member of a zip: where its local header begins, its bytes, and where it must end."""

    name: str
    header: int
    size: int
    crc: int
    limit: int


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip does that holds anything."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


# -- the directory ------------------------------------------------------------------------------


def _refused(path: Path, why: str) -> FormatError:
    msg = f"{path} is no zipped archive that can be read in place, or be unpacked safely: {why}"
    return FormatError(msg)


def _directory(path: Path) -> dict[str, _Member]:
    """Read and check the directory of a zip: its members by name, in the order of the file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start, length, count = _find_directory(file, size, path)
        file.seek(start)
        data = file.read(length)
    found: dict[str, tuple[int, int, int]] = {}
    at = 0
    while at < len(data):
        try:
            name, at, member = _parse(data, at)
        except (struct.error, ValueError) as error:
            raise _refused(path, f"entry {len(found)} of its directory: {error}") from error
        if name in found:
            raise _refused(path, f"{name!r} is there twice")
        found[name] = member
    if len(found) != count:
        raise _refused(path, f"its directory has {len(found)} entries, and says {count}")
    return _laid_out(path, found, start)


def _find_directory(file: IO[bytes], size: int, path: Path) -> tuple[int, int, int]:
    """Give where the directory begins, its bytes and the number of its entries."""
    place = size - _END.size
    file.seek(max(place - _LOCATOR.size - _END64.size, 0))
    tail = file.read(_LOCATOR.size + _END64.size + _END.size)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise _refused(path, "it doesn't end with the end record of a zip without a comment")
    _, disk, disk_of, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\x06\x07" and len(tail) == _LOCATOR.size + _END64.size + _END.size:
        place -= _LOCATOR.size + _END64.size
        _, disk, at, _ = _LOCATOR.unpack(locator)
        mark, *_, disk_of, _, here, count, length, start = _END64.unpack(tail[: _END64.size])
        if mark != b"PK\x06\x06" or at != place:
            raise _refused(path, "its zip64 record is not where it says")
    if disk or disk_of or here != count or comment or start + length != place:
        raise _refused(path, "its end record doesn't fit the file")
    if length > _MOST_DIRECTORY:
        raise _refused(path, f"its directory has {length} bytes, over {_MOST_DIRECTORY}")
    return start, length, count


def _parse(data: bytes, at: int) -> tuple[str, int, tuple[int, int, int]]:
    """Parse an entry: its name, where the next begins, and where, how long and what it is."""
    mark, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, outer, header = (
        _CENTRAL.unpack_from(data, at)
    )
    if mark != b"PK\x01\x02":
        msg = "it is none"
        raise ValueError(msg)
    at += _CENTRAL.size
    name_end = at + lengths[0]
    extra_end = name_end + lengths[1]
    end = extra_end + lengths[2]
    if end > len(data):
        msg = "it goes on behind the directory"
        raise ValueError(msg)
    name = data[at:name_end].decode("utf-8" if flags & _UTF8 else "ascii")
    size, packed, header = _wide(data[name_end:extra_end], size, packed, header)
    if flags & ~_UTF8 or method or packed != size:
        msg = f"{name!r} is compressed, encrypted or streamed; wanted it stored as it is"
        raise ValueError(msg)
    kind = stat.S_IFMT(outer >> 16)
    if kind not in (0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG):
        msg = f"{name!r} is a link or another special file"
        raise ValueError(msg)
    if not _is_inside(name) or (name.endswith("/") and size):
        msg = f"{name!r} is no name of a file inside the archive"
        raise ValueError(msg)
    return name, end, (header, size, crc)


def _wide(extra: bytes, *given: int) -> list[int]:
    """Give size, packed size and place, those that don't fit 32 bits from the extra field."""
    at, wide = 0, b""
    while at + _FIELD.size <= len(extra):
        kind, length = _FIELD.unpack_from(extra, at)
        at += _FIELD.size
        if kind == _ZIP64:
            wide = extra[at : at + length]
        at += length
    found, place = [], 0
    for one in given:
        if one == _FULL32 and wide:
            found.append(struct.unpack_from("<Q", wide, place)[0])
            place += 8
        else:
            found.append(one)
    return found


def _is_inside(name: str) -> bool:
    parts = name.removesuffix("/").split("/")
    return "\\" not in name and "\0" not in name and {"", ".", ".."}.isdisjoint(parts)


def _laid_out(
    path: Path, found: Mapping[str, tuple[int, int, int]], end: int
) -> dict[str, _Member]:
    """Check that members lie one behind the other; folders are no members."""
    order = sorted(found, key=lambda name: found[name][0])
    limits = [found[name][0] for name in order[1:]] + [end]
    members = {}
    for name, limit in zip(order, limits, strict=True):
        header, size, crc = found[name]
        if header + _LOCAL.size + len(name.encode()) + size > limit:
            raise _refused(path, f"{name!r} overlaps with what is behind it")
        if not name.endswith("/"):
            members[name] = _Member(name, header, size, crc, limit)
    return members


@lru_cache(maxsize=8)
def _members(path: Path, _size: int, _mtime: int) -> Mapping[str, _Member]:
    return MappingProxyType(_directory(path))


# -- places in it -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ZipPath:
    """A place in a zipped archive, with what its readers need of a `Path`.

    Attributes
    ----------
    file : Path
        The zip.
    inside : str
        The place within; empty: the root.
    """

    file: Path
    inside: str = ""

    def __truediv__(self, other: str) -> ZipPath:
        return self.joinpath(other)

    def __str__(self) -> str:
        return f"{self.file}/{self.inside}" if self.inside else str(self.file)

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.inside).name

    @property
    def parent(self) -> ZipPath:
        """What it is in."""
        return ZipPath(self.file, str(PurePosixPath(self.inside).parent).removeprefix("."))

    @property
    def members(self) -> Mapping[str, _Member]:
        """All files in the zip.

        Raises
        ------
        FormatError
            The zip isn't of the form that is read in place.
        """
        said = self.file.stat()
        return _members(self.file, said.st_size, said.st_mtime_ns)

    def joinpath(self, *others: str) -> ZipPath:
        """Give a place below."""
        return ZipPath(self.file, "/".join([*([self.inside] if self.inside else []), *others]))

    def absolute(self) -> ZipPath:
        """Give the same place, whatever folder is worked in."""
        return ZipPath(self.file.absolute(), self.inside)

    def exists(self) -> bool:
        """Whether there is a file here."""
        return self.inside in self.members

    def is_file(self) -> bool:
        """Whether there is a file here."""
        return self.exists()

    def stat(self) -> os.stat_result:
        """Give the file's size, as a `Path` would."""
        return os.stat_result((0, 0, 0, 0, 0, 0, self._member().size, 0, 0, 0))

    def open(self, mode: str = "rb", buffering: int = 0) -> _Range:  # noqa: ARG002 - a Path's
        """Open the file here for reading; nothing is buffered."""
        member = self._member()
        file = self.file.open("rb", buffering=0)
        try:
            return _Range(file, self._begin(file, member), member.size)
        except BaseException:
            file.close()
            raise

    def read_bytes(self) -> bytes:
        """Read the file here."""
        with self.open() as file:
            return file.read(self._member().size)

    def is_intact(self) -> bool:
        """Whether the file here matches its CRC-32."""
        crc = 0
        with self.open() as file:
            while piece := file.read(_PIECE):
                crc = zlib.crc32(piece, crc)
        return crc == self._member().crc

    def _member(self) -> _Member:
        try:
            return self.members[self.inside]
        except KeyError:
            raise FileNotFoundError(str(self)) from None

    def _begin(self, file: IO[bytes], member: _Member) -> int:
        """Give where a member's bytes begin, of its local header, which must say the same."""
        file.seek(member.header)
        name = member.name.encode()
        data = file.read(_LOCAL.size + len(name))
        if len(data) == _LOCAL.size + len(name):
            mark, _, flags, method, *_, length, extra = _LOCAL.unpack_from(data)
            begin = member.header + _LOCAL.size + length + extra
            same = mark == b"PK\x03\x04" and not method and not flags & ~_UTF8
            same = same and data[_LOCAL.size :] == name and length == len(name)
            if same and begin + member.size <= member.limit:
                return int(begin)
        raise _refused(self.file, f"{member.name!r} is another where it begins")


#: Where an archive, or something in it, is.
Place = Path | ZipPath | RemotePath


def size_of(place: Place) -> int:
    """Give the bytes of all files of an archive, or of the one that it is."""
    if isinstance(place, ZipPath):
        return sum(one.size for one in place.members.values())
    if isinstance(place, RemotePath):
        return sum(one.size for one in place.listed())
    below = place.rglob("*") if place.is_dir() else [place]
    return sum(one.stat().st_size for one in below if one.is_file())


def read_at(file: Any, length: int, offset: int) -> bytes:
    """Read bytes of what a `Place` opened, unbuffered, at an offset; fewer where it ends."""
    begin = 0
    if isinstance(file, _Range):
        begin, length = file.begin, max(min(length, file.size - offset), 0)
    return os.pread(file.fileno(), length, begin + offset)


class _Range(io.RawIOBase):
    """Some of the bytes of a file, as a file."""

    def __init__(self, file: Any, begin: int, size: int) -> None:
        self.begin, self.size = begin, size
        self._file, self._at = file, 0

    def fileno(self) -> int:
        return int(self._file.fileno())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(self.size - self._at, 0)]
        count = os.preadv(self.fileno(), [wanted], self.begin + self._at) if wanted else 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


# -- the whole of it ----------------------------------------------------------------------------


def member_names(folder: Path) -> list[str]:
    """Give the files of an archive in the order that a zip has them: first all metadata."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(names, key=lambda name: (name != _ROOT, not name.endswith(_ROOT), name))


def pack(folder: Path, file: Any, done: Callable[[int], None]) -> None:
    """Write an archive's files into a zip, as they are.

    Parameters
    ----------
    folder : Path
        The archive.
    file : binary file
        The zip; empty.
    done : callable
        Called with the bytes of each file.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as made:
        for name in member_names(folder):
            place = folder / name
            info = zipfile.ZipInfo(name)  # of no time of its own: equal archives are equal zips
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = place.stat().st_size
            with place.open("rb") as source, made.open(info, "w") as target:
                shutil.copyfileobj(source, target, _PIECE)
            done(info.file_size)


def unexpected(root: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[str]:
    """Give the members that an archive of this root metadata doesn't have."""
    below: Mapping[str, Mapping[str, Any]] = root["consolidated_metadata"]["metadata"]
    for name in names:
        node, _, rest = name.rpartition("/c")
        place = rest.removeprefix("/").split("/") if rest else []
        of_array = node in below and below[node]["node_type"] == "array"
        is_chunk = of_array and all(one.isascii() and one.isdecimal() for one in place)
        is_node = name == _ROOT or (
            name.endswith(f"/{_ROOT}") and name.removesuffix(f"/{_ROOT}") in below
        )
        if not is_chunk and not is_node:
            yield name
