"""Owns ``import_activations`` and ``save_cache``: what a source is, and a log or archive of it.

What the kinds look like is their modules'; how a log is written, ``log``'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from actstore import codecs, files
from actstore.bridges import activault, caches, folders, saelens, saev, torch_files, vllm
from actstore.bridges.foreign import Foreign, Options, wanted_tokens
from actstore.bridges.log import Content, write_log
from actstore.buckets import local, local_target
from actstore.compaction import compact
from actstore.errors import ConfigError, FormatError

__all__ = ["KINDS", "ImportReport", "Kind", "import_activations", "save_cache"]

_LOG: Final = ".stream"
_ARCHIVE: Final = ".zarr"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of sources: whether a path is one, and what reads it."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Options], Foreign]


#: The kinds, in the order in which they are tried.
KINDS: Final[Mapping[str, Kind]] = {
    "vllm": Kind(vllm.recognises, vllm.read),
    "saelens": Kind(saelens.recognises, saelens.read),
    "activault": Kind(activault.recognises, activault.read),
    "saev": Kind(saev.recognises, saev.read),
    "torch": Kind(torch_files.recognises, torch_files.read),
    "folder": Kind(folders.recognises, folders.read),
}


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import made.

    Attributes
    ----------
    path : Path
        The log or the archive.
    kind : str
        What the source was read as.
    layers : tuple of str
        Its layers.
    passes, rows, packets : int
        How many.
    raw_bytes : int
        Of all values.
    seconds : float
        What it took.
    """

    path: Path
    kind: str
    layers: tuple[str, ...]
    passes: int
    rows: int
    packets: int
    raw_bytes: int
    seconds: float


def import_activations(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    kind: str | None = None,
    layers: Sequence[int] | None = None,
    names: Mapping[str, str] | None = None,
    tokens: Any = None,
    tokenizer: Any = None,
    compression: str = "zstd",
) -> ImportReport:
    """Make a log or an archive of another tool's files.

    Every array becomes packets of its layer, with the values and the dtype that it has; token ids,
    where the source has them, become the rows'. Memory is bounded by some packets, whatever the
    source's size. What it was made from (files, sizes, SHA-256, layout) is in the header, as
    ``imported``. The target appears when it is whole.

    Parameters
    ----------
    source : path
        A file or a folder.
    target : path
        ``name.stream`` is a log, ``name.zarr`` an archive of it; it must not exist.
    kind : str, optional
        ``"vllm"``, ``"saelens"``, ``"activault"``, ``"saev"``, ``"torch"`` or ``"folder"``; found
        by the files if it isn't given.
    layers : sequence of int, optional
        Of vLLM's files, which don't say it: ``eagle_aux_hidden_state_layer_ids``.
    names : mapping, optional
        Layer, as the source calls it -> what it shall be called, such as
        ``"blocks.3.hook_resid_post"``; sites follow from that.
    tokens : array-like of int, optional
        Of ``"folder"`` and ``"torch"``: the token ids, [rows] or [batch, sequence].
    tokenizer : object, optional
        With ``decode([id])``: gives the rows' ``token_text``.
    compression : {"zstd", "lz4", "none"}
        Of the log.

    Returns
    -------
    ImportReport
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured, the source is none that is known, or a package isn't there.
    MissingFileError
        There is no source.
    FormatError
        The source is damaged, or not what it says.
    """
    place = local(source, "import_activations")
    options = Options(layers, wanted_tokens(tokens))
    name = _kind_of(place) if kind is None else kind
    if name not in KINDS:
        msg = f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}"
        raise ConfigError(msg)
    _check_options(name, options)
    path = local_target(target, "import_activations")
    return _make(
        lambda: KINDS[name].read(place, options), name, path, names, tokenizer, compression
    )


def save_cache(
    cache: Any,
    target: str | os.PathLike[str],
    *,
    tokens: Any = None,
    mask: Any = None,
    names: Mapping[str, str] | None = None,
    annotations: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    compression: str = "zstd",
) -> ImportReport:
    """Make a log or an archive of activations that are in memory.

    Parameters
    ----------
    cache : ActivationCache, CacheView or mapping
        TransformerLens' ``ActivationCache``, what nnsight's ``tracer.cache()`` gives (a module
        that is visited several times, in several passes), or layer -> array or tensor; of what a
        module returned, the first tensor. Tensors of the same memory are kept once.
    target : path
        ``name.stream`` is a log, ``name.zarr`` an archive of it; it must not exist.
    tokens : array-like of int, optional
        The ids that the model was fed, [sequence] or [batch, sequence]; of several passes those of
        all of them, one behind the other, or a list with those of each.
    mask : array-like, optional
        Of their shape: what is 0 is padding.
    names : mapping, optional
        Layer, as the cache calls it -> what it shall be called.
    annotations : mapping, optional
        Label -> a value for each batch item.
    tokenizer : object, optional
        With ``decode([id])``: gives the rows' ``token_text``.
    compression : {"zstd", "lz4", "none"}
        Of the log.

    Returns
    -------
    ImportReport
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured, or the cache holds what a log can't.
    """
    kind, read = caches.recognised(cache)
    labels = caches.Told(tokens, mask, dict(annotations or {}))
    path = local_target(target, "save_cache")
    return _make(lambda: read(cache, labels), kind, path, names, tokenizer, compression)


def _make(
    source: Callable[[], Foreign],
    kind: str,
    path: Path,
    names: Mapping[str, str] | None,
    tokenizer: Any,
    compression: str,
) -> ImportReport:
    began = time.monotonic()
    codecs.check_name(compression)
    if path.suffix not in (_LOG, _ARCHIVE):
        msg = f"the target must end with {_LOG} (a log) or {_ARCHIVE} (an archive); got {path}"
        raise ConfigError(msg)
    log = path.with_suffix(_LOG).name
    with files.appearing(path, folder=path.suffix == _ARCHIVE) as made:
        content = write_log(
            source(),
            kind,
            made.with_name(log),
            compression=compression,
            names=names,
            tokenizer=tokenizer,
        )
        if path.suffix == _ARCHIVE:
            made.rmdir()
            compact(made.with_name(log), made)
    return _report(path, kind, content, time.monotonic() - began)


def _report(path: Path, kind: str, content: Content, seconds: float) -> ImportReport:
    return ImportReport(
        path,
        kind,
        content.layers,
        content.passes,
        content.rows,
        content.packets,
        content.raw_bytes,
        seconds,
    )


def _kind_of(place: Path) -> str:
    """Find the kind of a source, by its files."""
    damaged = None
    for name, kind in KINDS.items():
        try:
            if kind.recognises(place):
                return name
        except FormatError as error:
            damaged = damaged or error
    if damaged is not None:
        raise damaged
    msg = (
        f"{place} is none of the kinds that are known by their files: {', '.join(KINDS)}; say "
        "which with kind=, or see actstore.save_cache for what is in memory"
    )
    raise ConfigError(msg)


def _check_options(kind: str, options: Options) -> None:
    if options.layers is not None:
        whole = all(isinstance(one, int | np.integer) for one in options.layers)
        if kind != "vllm" or not whole:
            msg = f"layers are the integer ids of vLLM's files; the source is of kind {kind!r}"
            raise ConfigError(msg)
    if options.tokens is not None and kind not in ("folder", "torch"):
        msg = f"tokens are told for 'folder' and 'torch'; {kind!r} has its own or none"
        raise ConfigError(msg)
