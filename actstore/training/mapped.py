"""Owns rows as a map-style dataset: each by its number, for samplers of others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from actstore.training.batches import Batch, kind_of
from actstore.training.selection import Choice, Selection

__all__ = ["RowDataset"]


class RowDataset(Dataset[Batch]):
    """The rows of a layer, or of several, of a log or an archive, each by its number.

    For samplers that choose rows one by one; a chunk is decoded for each row that is read alone.
    `Batches` reads whole chunks, and is many times faster where all rows are read. With a
    `DataLoader`, rows of a batch that are in one chunk are read together.

    Parameters
    ----------
    path, layers, dtype, labels, rows, padding, dim, storage_options
        As for `Batches`; of ``rows``, whatever their order, the first is 0 in the order of the
        axis.

    Raises
    ------
    ConfigError, MissingFileError, FormatError, StreamCorruptError, BucketError
        As for `Batches`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: str | Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        labels: Sequence[str] = (),
        rows: Any = None,
        padding: bool = False,
        dim: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        choice = Choice.of(
            path, layers, labels, rows, padding=padding, dim=dim, storage_options=storage_options
        )
        self._selection = Selection(choice)
        self._kind = kind_of(self._selection.dtype, dtype)

    def __len__(self) -> int:
        """How many rows there are."""
        return self._selection.count

    def __getitem__(self, index: int) -> Batch:
        """Read a row: a tensor of its shape, or a dict with its labels."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """Read rows, in the order given; those of one chunk together."""
        selection, wanted = self._selection, np.asarray(indices, np.int64)
        if wanted.size and not -selection.count <= wanted.min() <= wanted.max() < selection.count:
            msg = f"there are {selection.count} rows; got {wanted.min()} to {wanted.max()}"
            raise IndexError(msg)
        rows = wanted % selection.count
        rows = rows if selection.kept is None else selection.kept[rows]
        parts = [
            torch.from_numpy(selection.read(place, rows)) for place in range(len(selection.names))
        ]
        several = selection.shape != selection.row_shape
        values = torch.stack(parts, 1) if several else parts[0]
        values = values.to(self._kind)
        if not selection.labels:
            return list(values.unbind())
        labels = {name: torch.from_numpy(one[rows]) for name, one in selection.labels.items()}
        return [
            {"values": one, **{name: column[place] for name, column in labels.items()}}
            for place, one in enumerate(values.unbind())
        ]

    def close(self) -> None:
        """Close the log or the archive; leaving the context does so, too."""
        self._selection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
