"""Owns batches as trainers of others take them: what SAELens calls a data provider."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch

from actstore.errors import ConfigError
from actstore.training.batches import Batches

__all__ = ["DataProvider", "sae_lens_provider"]


class DataProvider(Iterator[Any]):
    """An endless iterator over batches, which knows where it is.

    Parameters
    ----------
    batches : Batches
        Read epoch after epoch.
    names : sequence of str, optional
        What each layer is called, where batches are given as a dict of layers.
    """

    def __init__(self, batches: Batches, names: tuple[str, ...] = ()) -> None:
        self._batches = batches
        self._names = names
        self._running = batches.forever()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Give [batch, features], or such by the names of layers."""
        batch = next(self._running)
        if not self._names:
            return batch
        if not isinstance(batch, torch.Tensor):
            msg = "batches with labels are no layers"
            raise ConfigError(msg)
        return dict(zip(self._names, batch.unbind(1), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Give where this is."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        self._running = iter(())
        self._batches.load_state_dict(state)
        self._running = self._batches.forever()


def sae_lens_provider(
    batches: Batches, *, hook_names: Mapping[str, str] | None = None
) -> DataProvider:
    """Give batches as SAELens' trainers take their ``data_provider``, in place of a model's.

    Parameters
    ----------
    batches : Batches
        Of floats, without labels. Of one layer for ``SAETrainer``. Of several, or a site,
        each is a dict of layers, as ``MultiSAETrainer`` takes them. Its ``batch_size`` is the
        trainer's ``train_batch_size_samples``.
    hook_names : mapping, optional
        Of several layers: what each is called in the dict; its own name if it isn't there.

    Returns
    -------
    DataProvider
        An iterator without an end: epoch after epoch.

    Raises
    ------
    ConfigError
        The batches have labels, or are no vectors of floats.
    """
    if not isinstance(batches, Batches):
        msg = f"sae_lens_provider takes Batches; got {batches!r:.200}"
        raise ConfigError(msg)
    several = batches.shape != batches.row_shape
    if batches.labels or not batches.dtype.is_floating_point or len(batches.row_shape) != 1:
        msg = (
            "SAELens trains on vectors of floats without labels; got rows of shape "
            f"{batches.row_shape}, {batches.dtype}, with labels {batches.labels!r}"
        )
        raise ConfigError(msg)
    named = hook_names or {}
    return DataProvider(
        batches, tuple(named.get(one, one) for one in batches.layers) if several else ()
    )
