"""Owns rows as training takes them: batches of tensors, and what feeds them to trainers of others.

Needs torch (``pip install actstore[torch]``); nothing else of actstore that reads does.
"""

from __future__ import annotations

from actstore.errors import ConfigError

try:
    import torch  # noqa: F401 - what all modules below need
except ModuleNotFoundError as error:
    raise ConfigError("actstore.training needs torch: pip install actstore[torch]") from error

from actstore.training.batches import Batch, Batches
from actstore.training.mapped import RowDataset
from actstore.training.providing import DataProvider, sae_lens_provider

__all__ = ["Batch", "Batches", "DataProvider", "RowDataset", "sae_lens_provider"]
