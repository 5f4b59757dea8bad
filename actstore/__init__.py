"""actstore: capture, archive, analyse and share language-model activations.

Owns the public names, and the submodules ``analysis``, ``errors``, ``plots`` and ``training``,
each loaded when it is first asked for: importing actstore imports neither torch nor zarr nor
xarray.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actstore import analysis as analysis
    from actstore import errors as errors
    from actstore import plots as plots
    from actstore import training as training
    from actstore.appending import append as append
    from actstore.archive.precision import Precision as Precision
    from actstore.bridges.exporting import export_rows as export_rows
    from actstore.bridges.importing import import_activations as import_activations
    from actstore.bridges.importing import save_cache as save_cache
    from actstore.capture.preview import describe as describe
    from actstore.capture.preview import estimate as estimate
    from actstore.capture.preview import suggest_config as suggest_config
    from actstore.choosing import choose_precision as choose_precision
    from actstore.compaction import compact as compact
    from actstore.compaction import discard as discard
    from actstore.config import HookConfig as HookConfig
    from actstore.config import HookGranularity as HookGranularity
    from actstore.config import InstrumentationConfig as InstrumentationConfig
    from actstore.dataset import open_dataset as open_dataset
    from actstore.enriching import add_coordinates as add_coordinates
    from actstore.enriching import remove_added as remove_added
    from actstore.errors import ActstoreError as ActstoreError
    from actstore.exporting import export as export
    from actstore.framework import InstrumentationFramework as InstrumentationFramework
    from actstore.framework import (
        analyze_activations_with_tokens as analyze_activations_with_tokens,
    )
    from actstore.grouping import group_statistics as group_statistics
    from actstore.importing import import_archive as import_archive
    from actstore.packets import packet_table as packet_table
    from actstore.parallel import Parallel as Parallel
    from actstore.reporting.page import explore as explore
    from actstore.reporting.page import report as report
    from actstore.sharing import About as About
    from actstore.sharing import Privacy as Privacy
    from actstore.sharing import share as share
    from actstore.sharing import what_leaves as what_leaves
    from actstore.stream.reader import open_stream as open_stream
    from actstore.stream.recover import recover as recover
    from actstore.stream.uploading import upload as upload
    from actstore.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "About": "actstore.sharing",
    "ActstoreError": "actstore.errors",
    "HookConfig": "actstore.config",
    "HookGranularity": "actstore.config",
    "InstrumentationConfig": "actstore.config",
    "InstrumentationFramework": "actstore.framework",
    "Parallel": "actstore.parallel",
    "Precision": "actstore.archive.precision",
    "Privacy": "actstore.sharing",
    "add_coordinates": "actstore.enriching",
    "analyze_activations_with_tokens": "actstore.framework",
    "append": "actstore.appending",
    "choose_precision": "actstore.choosing",
    "compact": "actstore.compaction",
    "describe": "actstore.capture.preview",
    "discard": "actstore.compaction",
    "estimate": "actstore.capture.preview",
    "explore": "actstore.reporting.page",
    "export": "actstore.exporting",
    "export_rows": "actstore.bridges.exporting",
    "group_statistics": "actstore.grouping",
    "import_activations": "actstore.bridges.importing",
    "import_archive": "actstore.importing",
    "open_dataset": "actstore.dataset",
    "open_stream": "actstore.stream.reader",
    "packet_table": "actstore.packets",
    "recover": "actstore.stream.recover",
    "remove_added": "actstore.enriching",
    "report": "actstore.reporting.page",
    "save_cache": "actstore.bridges.importing",
    "share": "actstore.sharing",
    "suggest_config": "actstore.capture.preview",
    "upload": "actstore.stream.uploading",
    "verify": "actstore.verification",
    "what_leaves": "actstore.sharing",
}

_SUBMODULES = {"analysis", "errors", "plots", "training"}

__all__ = [
    "About",
    "ActstoreError",
    "HookConfig",
    "HookGranularity",
    "InstrumentationConfig",
    "InstrumentationFramework",
    "Parallel",
    "Precision",
    "Privacy",
    "add_coordinates",
    "analyze_activations_with_tokens",
    "append",
    "choose_precision",
    "compact",
    "describe",
    "discard",
    "estimate",
    "explore",
    "export",
    "export_rows",
    "group_statistics",
    "import_activations",
    "import_archive",
    "open_dataset",
    "open_stream",
    "packet_table",
    "recover",
    "remove_added",
    "report",
    "save_cache",
    "share",
    "suggest_config",
    "upload",
    "verify",
    "what_leaves",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module, or a public submodule, once."""
    if name in _SUBMODULES:
        return import_module(f"actstore.{name}")
    home = _HOMES.get(name)
    if home is None:
        msg = f"module 'actstore' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


if "xarray" in sys.modules:  # else what opens datasets brings it
    import_module("actstore.accessor")
