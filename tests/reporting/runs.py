"""Builds datasets and logs that pages are made of: ordinary ones, hostile ones, and odd ones."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from hypothesis import strategies as st

import actstore
from actstore.packet import Axis

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder

__all__ = ["HOSTILE", "odd_datasets", "odd_logs", "run_log"]

#: Texts that would do something if they weren't only text, and some of other scripts.
HOSTILE = [
    "<s>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u2028\u2029",
    " 学习",
    "العربية",
    "שלום",
    "\u202eevil",
    "{{DATA}}",
    "&lt;b&gt;",
    "\"'><svg onload=alert(1)>",
    "\n\n",
    "\t",
    "",
    "\x00\x07",
    "e\u0301 🙂",
    "`${alert(1)}`",
    "x" * 500,
]


def run_log(
    path: Path,
    *,
    layers: int = 4,
    rows: int = 24,
    generated: int = 4,
    width: int = 16,
    texts: list[str] | None = None,
    finish: bool = True,
    dtype: Any = np.float32,
    run: str = "00000000-0000-4000-8000-000000000000",
) -> tuple[Path, np.ndarray]:
    """Write a log of a prompt and some generated tokens; give what ``resid`` holds."""
    texts = texts or HOSTILE
    log = LogBuilder(path, run=run)
    names = [f"model.layers.{block}" for block in range(layers)]
    for block, name in enumerate(names):
        log.layer(name, "resid", block)
        log.layer(f"{name}.mlp", "mlp", block)
    log.texts({100 + place: texts[place % len(texts)] for place in range(rows + generated)})
    random = np.random.default_rng(0)
    held = np.zeros((layers, rows + generated, width), dtype)
    for first, count in [(0, rows), *((rows + step, 1) for step in range(generated))]:
        ids = np.arange(first, first + count, dtype=np.int64)[np.newaxis]
        axis = Axis("token", 1, count, ids + 100, ids, np.ones((1, count), np.bool_), flat=False)
        log.begin(axis, annotations={"topic": ["<b>sets</b>"], "score": [0.5]})
        for block, name in enumerate(names):
            values = random.normal(size=(1, count, width)).astype(dtype) * (block + 1)
            held[block, first : first + count] = values[0]
            log.put(name, values)
            log.put(f"{name}.mlp", values * dtype(2))
        log.token(100 + (first + count) % max(rows + generated, 1), "t")
    return log.close(finish=finish), held


_NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45, np.nan, np.inf, -np.inf, 0.1, 1e20]
)


@st.composite
def odd_datasets(draw: st.DrawFn) -> xr.Dataset:
    """Give datasets that are odd: no tokens, one layer, NaNs, no features, strange names."""
    rows, layers, width = draw(st.integers(0, 5)), draw(st.integers(0, 3)), draw(st.integers(0, 4))
    seed = draw(st.integers(0, 1 << 16))
    random = np.random.default_rng(seed)
    pool = np.array(draw(st.lists(_NUMBERS, min_size=1, max_size=6)))
    kind = draw(st.sampled_from(["f4", "f2", "f8", "i8", "c8", "?"]))
    variables: dict[str, Any] = {}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stacked = random.choice(pool, (layers, rows, width)).astype(kind)
        flat = random.choice(pool, (rows, width)).astype(kind)
    name = draw(st.sampled_from(["resid", "a.b", "</script>", "été", "logits"]))
    variables[name] = (("layer", "token", "feature"), stacked)
    if draw(st.booleans()):
        about = draw(st.sampled_from([{}, {"site": "<b>", "modules": ["m"], "precision": "?"}]))
        variables["embed"] = (("token", "width"), flat, about)
    if draw(st.booleans()):
        variables[f"{name}_present"] = (("layer", "token"), random.random((layers, rows)) > 0.5)
    if draw(st.booleans()):
        variables["scalars"] = (("token",), random.choice(pool, rows))
    coords: dict[str, Any] = {}
    if draw(st.booleans()):
        coords["layer"] = draw(
            st.sampled_from([list(range(layers)), [f"l{one}" for one in range(layers)]])
        )
    if draw(st.booleans()):
        text = draw(st.text(max_size=5))
        coords |= {
            "pass_index": ("token", random.integers(0, 2, rows)),
            "batch_item": ("token", random.integers(0, 2, rows)),
            "position": ("token", random.integers(-1, 4, rows)),
            "token_id": ("token", random.integers(-1, 9, rows)),
            "token_text": ("token", np.array([text] * rows, object)),
            "step": ("token", random.integers(-1, 3, rows)),
            "is_padding": ("token", random.random(rows) > draw(st.sampled_from([0.0, 0.5, 1.0]))),
            "odd": ("token", random.choice(pool, rows)),
        }
    attributes = draw(
        st.sampled_from(
            [{}, {"runs": [{}]}, {"runs": []}, {"runs": ["x", {"models": [{}]}], "aliases": {}}]
        )
    )
    return xr.Dataset(variables, coords, attributes)


@st.composite
def odd_logs(draw: st.DrawFn, place: Path) -> Path:
    """Write a log, or an archive of it, that is odd; give its path."""
    path = place / "odd.stream"
    log = LogBuilder(path, capture={"x": None} if draw(st.booleans()) else None)
    layers, width = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    passes, rows = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    kind = draw(st.sampled_from([np.float32, np.float16, np.float64, np.int32]))
    pool = np.array(draw(st.lists(_NUMBERS, min_size=1, max_size=4)))
    for block in range(layers):
        log.layer(f"m.{block}", "resid", block if draw(st.booleans()) else -1)
    texts = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=4), max_size=4))
    log.texts(dict(enumerate(texts)))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    for _ in range(passes):
        ids = np.arange(rows, dtype=np.int64)[np.newaxis]
        mask = random.random((1, rows)) > draw(st.sampled_from([0.0, 0.5, 1.0]))
        axes = (Axis("token", 1, rows, ids, ids, mask, flat=False),) if draw(st.booleans()) else ()
        log.begin(*axes)
        for block in range(layers):
            if draw(st.booleans()):
                with np.errstate(all="ignore"):
                    values = np.nan_to_num(random.choice(pool, (1, rows, width)))
                    values = values if kind is np.int32 else random.choice(pool, values.shape)
                    values = values.clip(-9, 9) if kind is np.int32 else values
                    log.put(f"m.{block}", values.astype(kind))
    log.close(finish=draw(st.booleans()))
    return path


def compacted(log: Path, precision: str | None = None) -> Path:
    """Make an archive of a log."""
    return actstore.compact(log, log.with_suffix(".zarr"), precision=precision).path
