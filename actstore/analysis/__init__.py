"""Owns summaries and statistics of datasets that don't fit in memory: xarray -> xarray, pure.

Every function takes a dataset as `actstore.open_dataset` gives it, goes over the rows block by
block within a budget, and gives labelled arrays. Opening is ``dataset.py``'s, figures are
``plots.py``'s.
"""

from __future__ import annotations

from actstore.analysis.rows import layer_change, token_norms, top_activations
from actstore.analysis.saving import save, saved
from actstore.analysis.spectra import covariance, pca
from actstore.analysis.summary import outlier_features, statistics

__all__ = [
    "covariance",
    "layer_change",
    "outlier_features",
    "pca",
    "save",
    "saved",
    "statistics",
    "token_norms",
    "top_activations",
]
