"""Owns the bytes of objects in buckets, by their URLs: whatever store that is, and its faults.

The one importer of obstore (``s3://``, ``gs://``, ``az://`` …) and fsspec (any other protocol that
it knows). What the objects are together is for others: an archive, the segments of a log.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, NamedTuple, Protocol, TypeVar

from actstore import files
from actstore.errors import BucketError, ConfigError

__all__ = [
    "Bucket",
    "Listed",
    "RemotePath",
    "is_remote",
    "local",
    "local_target",
    "place_of",
    "remote",
]

T = TypeVar("T")

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
#: What obstore reads and writes; all else is fsspec's.
_OBSTORE: Final = re.compile(r"(s3a?|gs|az|azure|adl|abfss?|https?|file)://")
_KNOWN: Final = ("s3://", "s3a://", "gs://", "az://", "abfs://", "abfss://", "memory://")
#: A single request's body; what is larger goes up in parts of `_PART`.
_ONE_PUT: Final = 16 << 20
_PART: Final = 8 << 20
_TRIES: Final = 4  # of ours, over those that obstore makes
_BACKOFF: Final = 0.2  # seconds, doubled by each try
_CLIENT: Final = {"timeout": "300s", "connect_timeout": "10s"}
_RETRY: Final = {
    "max_retries": 6,
    "backoff": {"init_backoff": 0.1, "max_backoff": 5.0, "base": 2},
    "retry_timeout": 120.0,
}


class Listed(NamedTuple):
    """An object as a listing has it: its name below the bucket's URL, and its bytes."""

    name: str
    size: int


class _Driver(Protocol):
    """What a store has to do; names are relative to its URL."""

    def get(self, name: str, limit: int | None) -> bytes: ...
    def tail(self, name: str, length: int) -> bytes: ...
    def part(self, name: str, offset: int, length: int) -> bytes: ...
    def size(self, name: str) -> int: ...
    def list(self, below: str) -> Iterator[Listed]: ...
    def put(self, name: str, data: Any, *, new: bool) -> str: ...
    def delete(self, name: str) -> None: ...


def is_remote(path: object) -> bool:
    """Whether a path that was given is a URL, a store of obstore, or a `RemotePath`."""
    return isinstance(path, RemotePath) or _url_of(path) is not None or _is_store(path)


def remote(path: Any, options: Mapping[str, Any] | None = None) -> RemotePath | None:
    """Give the place in a bucket that a path is; None where it is a path of this machine.

    Parameters
    ----------
    path : str, store or path
        A URL, such as ``s3://bucket/run.zarr``; or a store of obstore whose root is the place.
    options : mapping, optional
        What obstore's ``from_url`` takes beside the URL (``endpoint``, ``region``,
        ``client_options``, ``retry_config``, ``credential_provider`` …), or fsspec's file system
        of that protocol.

    Raises
    ------
    ConfigError
        What reads such URLs is not installed or doesn't take them; there are options, and no URL;
        or these are no mapping.
    """
    if options is not None and not isinstance(options, Mapping):
        msg = f"storage_options must be a mapping, such as {{'region': '…'}}; got {options!r}"
        raise ConfigError(msg)
    if isinstance(path, RemotePath):
        return path
    if not is_remote(path):
        if options:
            msg = f"storage_options are of a bucket; {path!r} is no URL: leave them out"
            raise ConfigError(msg)
        return None
    url = _url_of(path)
    if url is not None:
        found = Bucket(url, options)
        _ = found.driver  # says at once what is wrong with the URL
        return RemotePath(found)
    return RemotePath(Bucket(str(path), options, path))


def place_of(path: Any, asked: str, options: Mapping[str, Any] | None = None) -> Path | RemotePath:
    """Give where a log or an archive is that is to be read: here, or in a bucket.

    Raises as `remote` does; and `MissingFileError` where there is nothing on this machine.
    """
    far = remote(path, options)
    return files.existing(path, asked) if far is None else far


def local(path: Any, asked: str) -> Path:
    """Give the path of a log or an archive that is on this machine.

    Raises
    ------
    ConfigError
        It is no path, or a URL.
    MissingFileError
        There is nothing.
    """
    _check_local(path, asked, "copy it to a disk of this machine first")
    return files.existing(path, asked)


def local_target(path: Any, asked: str) -> Path:
    """Give the path of what is to be made on this machine.

    Raises
    ------
    ConfigError
        It is no path, or a URL.
    """
    _check_local(path, asked, "give a path of this machine, and copy what is made")
    return files.path_of(path)


def _check_local(path: object, asked: str, instead: str) -> None:
    if is_remote(path):
        msg = f"{asked} takes no URLs; got {_url_of(path) or path}: {instead}"
        raise ConfigError(msg)


def _url_of(path: object) -> str | None:
    """Give the URL that a path is, also one that went through a `Path`, which has lost a slash."""
    if isinstance(path, str):
        return path if _URL.match(path) else None
    if isinstance(path, Path):
        scheme, colon, rest = str(path).partition(":/")
        if colon and rest and f"{scheme}://" in _KNOWN and not Path(f"{scheme}:").exists():
            return f"{scheme}://{rest.lstrip('/')}"
    return None


def _is_store(path: object) -> bool:
    return type(path).__module__.partition(".")[0] == "obstore"


class Bucket:
    """What lies below a URL.

    Parameters
    ----------
    url : str
        Where; without a slash at its end.
    options : mapping, optional
        As `remote` takes them.
    store : object, optional
        A store of obstore whose root it is.

    Attributes
    ----------
    url : str
        As given.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, store: Any = None
    ) -> None:
        self.url = url.rstrip("/")
        self._options = dict(options or {})
        self._store = store
        self._kept: dict[str, bytes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Open it again in another process, once for all that is in it."""
        if self._store is not None:
            return type(self), (self.url, self._options, self._store)
        return _again, (self.url, tuple(sorted(self._options.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bucket) and self._reached() == other._reached()

    def __hash__(self) -> int:
        return hash(self.url)

    def _reached(self) -> tuple[Any, ...]:
        """Give what tells a bucket from others: of one URL there is one behind each endpoint."""
        return self.url, self._options, self._store

    def another(self, url: str) -> Bucket:
        """Give what lies below another URL, reached in the same way."""
        if self._store is not None:
            msg = f"{self.url} is a store of obstore, beside which nothing can be put: give a URL"
            raise ConfigError(msg)
        return Bucket(url, self._options)

    @cached_property
    def driver(self) -> _Driver:
        """What does the requests."""
        if self._store is None and not _OBSTORE.match(self.url):
            return _Fsspec(self.url, self._options)
        return _Obstore(self.url, self._options, self._store)

    def get(self, name: str, *, limit: int | None = None) -> bytes:
        """Read an object, in one request.

        Raises
        ------
        FileNotFoundError
            There is none.
        ValueError
            It has more bytes than ``limit``.
        BucketError
            The store doesn't give it, however often it is asked.
        """
        return self._tried("read", name, lambda: self.driver.get(name, limit))

    def tail(self, name: str, length: int) -> bytes:
        """Read the last bytes of an object, or all of it; raises as `get` does."""
        return self._tried("read", name, lambda: self.driver.tail(name, length))

    def part(self, name: str, offset: int, length: int) -> bytes:
        """Read bytes of an object, fewer where it ends; raises as `get` does."""
        return self._tried("read", name, lambda: self.driver.part(name, offset, length))

    def size(self, name: str) -> int:
        """Give the bytes of an object; raises as `get` does."""
        return self._tried("find", name, lambda: self.driver.size(name))

    def list(self, below: str = "") -> list[Listed]:
        """Give what is there, below a name; in the order of the names."""
        return self._tried("list", below, lambda: sorted(self.driver.list(below)))

    def put(self, name: str, data: Any, *, new: bool = False) -> None:
        """Write an object, whole or not at all, and make sure that the store has these bytes.

        Parameters
        ----------
        name : str
            Its name.
        data : buffer
            Its bytes.
        new : bool
            It must not be there yet, unless with the same bytes: a try before may have succeeded
            though its answer was lost.

        Raises
        ------
        FileExistsError
            ``new``, and another object has the name.
        BucketError
            The store doesn't take it, or gives other bytes back.
        """

        def once() -> None:
            try:
                tag = self.driver.put(name, data, new=new)
            except FileExistsError:
                if not self._has(name, data):
                    raise
                return
            # MD5s are what S3 calls an object; elsewhere, or encrypted, it is read back
            if not _is_tag(tag, data) and not self._has(name, data):
                if new:  # this very call made it
                    self.driver.delete(name)
                msg = "what is read back are other bytes"
                raise OSError(msg)

        self._tried("write", name, once)

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._tried("remove", name, lambda: self.driver.delete(name))

    def keep(self, name: str, limit: int) -> bytes:
        """Read an object once, and have it from then on."""
        if name not in self._kept:
            self._kept[name] = self.get(name, limit=limit)
        return self._kept[name]

    def _has(self, name: str, data: Any) -> bool:
        try:
            return self.driver.get(name, None) == bytes(data)
        except FileNotFoundError as error:  # another was being written at the same time
            msg = "it is not there"
            raise OSError(msg) from error

    def _tried(self, verb: str, name: str, request: Callable[[], T]) -> T:
        """Do a request, again after a while where the store or the way there has a fault."""
        for count in range(_TRIES):
            try:
                return request()
            except (FileExistsError, ValueError):
                raise
            except Exception as error:
                missing = isinstance(error, FileNotFoundError)
                if missing and verb in ("read", "find"):
                    raise
                if missing or _is_final(error) or count == _TRIES - 1:
                    place = f"{self.url}/{name}" if name else self.url
                    msg = (
                        f"could not {verb} {place}: {_told(error)}; asked {count + 1} times: see "
                        "that the bucket is reachable and its credentials are right, and do it "
                        "again to go on"
                    )
                    raise BucketError(msg) from error
            time.sleep(_BACKOFF * 2**count * (0.5 + random.random()))
        raise AssertionError  # the last try returns or raises


@lru_cache(maxsize=16)
def _reopened(url: str, _key: str, options: _Options) -> Bucket:
    return Bucket(url, dict(options.items))


@dataclass(frozen=True, slots=True, eq=False)
class _Options:
    items: tuple[tuple[str, Any], ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Options)  # their key tells them apart

    def __hash__(self) -> int:
        return 0


def _again(url: str, items: tuple[tuple[str, Any], ...]) -> Bucket:
    return _reopened(url, json.dumps(items, default=repr), _Options(items))


def _is_final(error: Exception) -> bool:
    """Whether asking again is of no use."""
    kinds = {one.__name__ for one in type(error).__mro__}
    return not kinds.isdisjoint(
        {"PermissionDeniedError", "UnauthenticatedError", "PermissionError", "NotSupportedError"}
    ) or "NoSuchBucket" in str(error)


def _told(error: Exception) -> str:
    """Give the first line of what a store says; some of them say a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


def _is_tag(tag: str, data: Any) -> bool:
    """Whether a tag is what S3 calls an object of these bytes: an MD5, or that of its parts'."""
    view = memoryview(data).cast("B")
    found = hashlib.md5(usedforsecurity=False)
    if "-" not in tag:
        found.update(view)
        return tag == found.hexdigest()
    starts = range(0, len(view), _PART)
    for at in starts:
        found.update(hashlib.md5(view[at : at + _PART], usedforsecurity=False).digest())
    return tag == f"{found.hexdigest()}-{len(starts)}"


# -- stores -------------------------------------------------------------------------------------


class _Obstore:
    """A store of obstore."""

    def __init__(self, url: str, options: Mapping[str, Any], store: Any) -> None:
        if find_spec("obstore") is None:
            msg = f"{url} needs obstore: pip install 'actstore[remote]'"
            raise ConfigError(msg)
        import obstore

        self._obstore = obstore
        if store is None:
            from obstore.store import from_url

            given = {
                **options,
                "client_options": _client() | dict(options.get("client_options") or {}),
                "retry_config": _retry(options.get("retry_config")),
            }
            if url.startswith("file:"):
                given = {"mkdir": True}
            try:
                store = from_url(url, **given)
            except Exception as error:
                msg = f"{url} with storage_options {sorted(options)} is no store: {_told(error)}"
                raise ConfigError(msg) from error
        self._store = store

    def get(self, name: str, limit: int | None) -> bytes:
        found = self._obstore.get(self._store, name)
        if limit is not None and found.meta["size"] > limit:
            msg = f"{name} has {found.meta['size']} bytes, over {limit}"
            raise ValueError(msg)
        data = bytes(found.bytes())
        if len(data) != found.meta["size"]:
            msg = f"{len(data)} bytes came of {found.meta['size']}"
            raise OSError(msg)
        return data

    def tail(self, name: str, length: int) -> bytes:
        try:
            found = self._obstore.get(self._store, name, options={"range": {"suffix": length}})
        except self._obstore.exceptions.NotSupportedError:  # by Azure
            size = self.size(name)
            start = max(size - length, 0)
            return self.part(name, start, size - start)
        start, end = found.range
        data = bytes(found.bytes())
        if len(data) != end - start:
            msg = f"{len(data)} bytes came of {end - start}"
            raise OSError(msg)
        return data

    def part(self, name: str, offset: int, length: int) -> bytes:
        wanted: Any = {"range": (offset, offset + length)}
        found = self._obstore.get(self._store, name, options=wanted)
        start, end = found.range
        data = bytes(found.bytes())
        if start != offset or len(data) != end - start:
            msg = f"{len(data)} bytes from {start} came of {length} from {offset}"
            raise OSError(msg)
        return data

    def size(self, name: str) -> int:
        return int(self._obstore.head(self._store, name)["size"])

    def list(self, below: str) -> Iterator[Listed]:
        for some in self._obstore.list(self._store, below or None):
            for one in some:
                yield Listed(one["path"], int(one["size"]))

    def put(self, name: str, data: Any, *, new: bool) -> str:
        size, exceptions = memoryview(data).nbytes, self._obstore.exceptions
        try:
            made = self._obstore.put(
                self._store,
                name,
                data,
                use_multipart=not new and size > _ONE_PUT,
                chunk_size=_PART,
                max_concurrency=4,
                mode="create" if new else "overwrite",
            )
        except exceptions.AlreadyExistsError as error:
            raise FileExistsError(name) from error
        return str(made["e_tag"]).strip('"')

    def delete(self, name: str) -> None:
        try:
            self._obstore.delete(self._store, name)
        except FileNotFoundError:
            return


def _client() -> dict[str, Any]:
    """Give how long is waited; and what obstore asks the environment for only without that."""
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    return {**_CLIENT, **({"allow_http": True} if allowed else {})}


def _retry(given: Mapping[str, Any] | None) -> dict[str, Any]:
    from datetime import timedelta

    if given is not None:
        return dict(given)
    backoff: Any = _RETRY["backoff"]
    return {
        "max_retries": _RETRY["max_retries"],
        "retry_timeout": timedelta(seconds=float(str(_RETRY["retry_timeout"]))),
        "backoff": {
            "init_backoff": timedelta(seconds=backoff["init_backoff"]),
            "max_backoff": timedelta(seconds=backoff["max_backoff"]),
            "base": backoff["base"],
        },
    }


class _Fsspec:
    """A file system of fsspec."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        if find_spec("fsspec") is None:
            msg = f"{url} needs fsspec: pip install 'actstore[remote]'"
            raise ConfigError(msg)
        from fsspec.core import url_to_fs

        try:
            self._fs, root = url_to_fs(url, **options)
        except (ValueError, TypeError, ImportError) as error:
            msg = f"{url} with storage_options {sorted(options)} is no store: {_told(error)}"
            raise ConfigError(msg) from error
        self._root = str(root).rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def get(self, name: str, limit: int | None) -> bytes:
        if limit is not None and self.size(name) > limit:
            msg = f"{name} has over {limit} bytes"
            raise ValueError(msg)
        return bytes(self._fs.cat_file(self._at(name)))

    def tail(self, name: str, length: int) -> bytes:
        return bytes(self._fs.cat_file(self._at(name), start=-min(length, self.size(name))))

    def part(self, name: str, offset: int, length: int) -> bytes:
        return bytes(self._fs.cat_file(self._at(name), start=offset, end=offset + length))

    def size(self, name: str) -> int:
        return int(self._fs.size(self._at(name)))

    def list(self, below: str) -> Iterator[Listed]:
        found = self._fs.find(self._at(below).rstrip("/"), detail=True)
        for path, one in found.items():
            yield Listed(str(path).removeprefix(f"{self._root}/"), int(one["size"]))

    def put(self, name: str, data: Any, *, new: bool) -> str:
        place = self._at(name)
        self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(place, bytes(data), mode="create" if new else "overwrite")
        return ""

    def delete(self, name: str) -> None:
        if self._fs.exists(self._at(name)):
            self._fs.rm_file(self._at(name))


# -- places in one ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A place in a bucket, with what readers of an archive need of a `Path`.

    Attributes
    ----------
    bucket : Bucket
        What lies below the URL of an archive, or of a log.
    inside : str
        The place below; empty: the URL itself.
    data : bytes or None
        What is there, where it was read already.
    """

    bucket: Bucket
    inside: str = ""
    data: bytes | None = None

    def __truediv__(self, other: str) -> RemotePath:
        return self.joinpath(other)

    def __str__(self) -> str:
        return f"{self.bucket.url}/{self.inside}" if self.inside else self.bucket.url

    def __fspath__(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.inside or self.bucket.url).name

    @property
    def stem(self) -> str:
        """The last part, without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """What it is in."""
        return RemotePath(self.bucket, str(PurePosixPath(self.inside).parent).removeprefix("."))

    def joinpath(self, *others: str) -> RemotePath:
        """Give a place below."""
        below = [*([self.inside] if self.inside else []), *others]
        return RemotePath(self.bucket, "/".join(below))

    def listed(self) -> list[Listed]:
        """Give the objects below, by their names from here on, in the order of these."""
        inside = f"{self.inside}/" if self.inside else ""
        found = self.bucket.list(self.inside)
        return [one._replace(name=one.name.removeprefix(inside)) for one in found]

    def resolve(self) -> RemotePath:
        """Give itself."""
        return self

    def absolute(self) -> RemotePath:
        """Give the same place."""
        return self

    def beside(self, end: str) -> RemotePath:
        """Give the object whose URL is this one's, with something behind it."""
        folder, _, name = str(self).rpartition("/")
        return RemotePath(self.bucket.another(folder), name + end)

    def put(self, data: bytes) -> None:
        """Write the object here, in place of what there is."""
        self.bucket.put(self.inside, data)

    def fetched(self) -> RemotePath:
        """Give the same place, with what is there, read in one request.

        Raises
        ------
        FileNotFoundError
            Nothing is there.
        """
        return RemotePath(self.bucket, self.inside, self.read_bytes())

    def exists(self) -> bool:
        """Whether there is an object here."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Whether there is an object here."""
        return self.exists()

    def is_dir(self) -> bool:
        """Whether it is a folder: a bucket has none."""
        return False

    def stat(self) -> os.stat_result:
        """Give the object's size, as a `Path` would."""
        size = self.bucket.size(self.inside) if self.data is None else len(self.data)
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def open(self, mode: str = "rb", buffering: int = -1) -> IO[bytes]:  # noqa: ARG002 - a Path's
        """Read the object here, in one request, as a file in memory."""
        return io.BytesIO(self.read_bytes())

    def read_bytes(self, limit: int | None = None) -> bytes:
        """Read the object here, if it has no more bytes than ``limit``."""
        return self.bucket.get(self.inside, limit=limit) if self.data is None else self.data
