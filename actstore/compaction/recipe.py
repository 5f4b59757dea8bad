"""Owns what makes the content and the shards of an archive again, in whatever process.

Shards close over open logs and can't travel; a recipe can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actstore.archive.jobs import Job
from actstore.buckets import RemotePath
from actstore.compaction.content import Content, Wanted
from actstore.compaction.logs import opened

__all__ = ["OfLogs", "Recipe"]


class Recipe(Protocol):
    """Makes what an archive will hold. It pickles, and makes the same in every process."""

    @property
    def paths(self) -> tuple[Path | RemotePath, ...]:
        """The logs."""
        ...

    def made(self, tokenizer: Any = None) -> AbstractContextManager[tuple[Content, list[Job]]]:
        """Give the content and the shards to write, as long as the context lasts.

        The shards don't go by the tokenizer, which need not travel.
        """
        ...


@dataclass(frozen=True, slots=True)
class OfLogs:
    """Makes an archive of logs.

    Parameters
    ----------
    paths : tuple of Path or RemotePath
        The logs.
    shapes, dtypes : mapping or None
        As for `compact`.
    precision : str, Precision, mapping or None
        As for `compact`.
    ranks : str
        As for `compact`.
    seed : int or None
        By which rows are shuffled, if they are.
    """

    paths: tuple[Path | RemotePath, ...]
    shapes: Mapping[str, Sequence[int]] | None = None
    dtypes: Mapping[str, str] | None = None
    precision: Wanted = None
    ranks: str = "all"
    seed: int | None = None

    @contextmanager
    def made(self, tokenizer: Any = None) -> Iterator[tuple[Content, list[Job]]]:
        """Open and plan the logs; see `Recipe`."""
        with opened(self.paths, self.shapes, self.dtypes, self.ranks) as reader:
            content = Content.of(reader, tokenizer, self.precision, self.ranks, self.seed)
            yield content, content.jobs(reader)
