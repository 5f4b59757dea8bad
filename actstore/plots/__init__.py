"""Owns figures, fit for a paper: matplotlib's, of datasets and of what `actstore.analysis` finds.

Every function takes a dataset as `actstore.open_dataset` gives it, or chosen from that, and gives
a `matplotlib.figure.Figure` without pyplot. How the figures look is ``style.py``'s, how tokens are
written ``text.py``'s, which rows are shown ``chosen.py``'s.
"""

from __future__ import annotations

from actstore.plots.attending import attention
from actstore.plots.features import distributions, feature_on_text, outliers
from actstore.plots.maps import layer_change, layer_correlation, norm_map
from actstore.plots.paths import token_progression, trajectory
from actstore.plots.rates import run_rates

__all__ = [
    "attention",
    "distributions",
    "feature_on_text",
    "layer_change",
    "layer_correlation",
    "norm_map",
    "outliers",
    "run_rates",
    "token_progression",
    "trajectory",
]
