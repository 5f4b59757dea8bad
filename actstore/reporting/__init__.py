"""Owns the page of a run: one HTML file that needs no network, of a log, an archive or a dataset.

``data`` says what is on it, ``values`` reads what it shows of the activations, ``page`` writes it;
``serving`` serves it, with what ``answers`` reads when it is asked for.
"""

from __future__ import annotations

from actstore.reporting.page import Page, explore, report

__all__ = ["Page", "explore", "report"]
