"""Part 5, the archive: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/05_archive.py`` on a machine that does nothing else;
about ten minutes. What `tests/benchmarks/shelf.py` needs is named there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / "tests" / one) for one in ("acceptance", "archive", "benchmarks")),
]

import density
import numpy as np
import shelf
import torch
import trained
import zarr
from logs import LogBuilder, axis, random_values
from numcodecs import blosc
from report import run

import actstore
from actstore import dtypes
from actstore.archive.shards import PROFILES

STOCK = "Blosc zstd 1, shuffle, blocksize = chunk"
TOKENS = 32_768


def is_exact() -> str:
    """Compact random bits of every dtype, dense and ragged; compare what zarr-python reads."""
    compared = 0
    for profile in PROFILES:
        with tempfile.TemporaryDirectory() as folder:
            log = LogBuilder(Path(folder, "run.stream"))
            for name in dtypes.BY_NAME:
                log.layer(name)
                log.layer(f"loose.{name}", f"loose_{name}")
            for number in range(3):
                log.begin(axis(2, 500))
                for name in dtypes.BY_NAME:
                    log.put(name, random_values((2, 500, 40), name, seed=number))
                    log.put(f"loose.{name}", random_values((7, 11), name, seed=number))
                log.commit()
            archive = Path(folder, "run.zarr")
            actstore.compact(log.close(), archive, profile=profile)
            for name, kind in dtypes.BY_NAME.items():
                for layer, array in ((name, name), (f"loose.{name}", f"loose_{name}_values")):
                    parts = [one.values.ravel() for one in log.fired if one.layer == layer]
                    wanted = np.concatenate(parts)
                    found = np.asarray(zarr.open_array(archive / array, mode="r")[...]).ravel()
                    if name == "bfloat16":
                        found, low = found.view(np.uint16)[1::2], found.view(np.uint16)[::2]
                        assert not low.any()
                    elif name.startswith("float8"):  # a NaN's bits may differ, no value may
                        assert np.array_equal(found, wanted.astype(np.float32), equal_nan=True)
                        found = wanted
                    assert found.tobytes() == wanted.tobytes(), (profile, array)
                    compared += wanted.nbytes
                assert kind.array == zarr.open_array(archive / name, mode="r").dtype
    return (
        f"{len(dtypes.BY_NAME)} dtypes × {len(PROFILES)} profiles, {compared / 1e6:.0f} MB equal"
    )


def is_dense_and_fast() -> str:
    """Hold bfloat16 hidden states of MiniLM against their entropy, and against stock Blosc."""
    blosc.use_threads = False
    data = density.Data("bfloat16", list(trained.hidden_states(torch.bfloat16, TOKENS).values()))
    codecs = density.all_codecs()
    found = density.measure(data, {name: codecs[name] for name in ("`balanced`", STOCK)})
    ratio, speed, _ = found["`balanced`"]
    bound = density.bounds(data)["symbol"]
    said = (
        f"{ratio:.3f} of {bound:.3f} ({ratio / bound:.1%}); encodes at {speed:.2f} GB/s, "
        f"{speed / found[STOCK][1]:.2f} × stock Blosc zstd, whose ratio is {found[STOCK][0]:.3f}"
    )
    assert ratio >= 0.95 * bound, said
    assert speed >= 2 * found[STOCK][1], said
    return said


def dense_is_shown() -> str:
    """Show what `dense` gains and costs, on MiniLM and on all modules of the shipped model."""
    blosc.use_threads = False
    codecs, said = density.all_codecs(), []
    for name, data in density.datasets(TOKENS // 8, (torch.bfloat16,)):
        found = density.measure(data, {one: codecs[one] for one in ("`balanced`", "`dense`")})
        (ratio, to, back), (denser, slower, again) = found.values()
        assert denser >= ratio, name
        said.append(
            f"{name} {denser / ratio - 1:+.2%} ({ratio:.3f} to {denser:.3f}), encode "
            f"{slower / to:.2f} ×, decode {again / back:.2f} ×"
        )
    return "; ".join(said)


def stands_beside_the_others() -> str:
    """Print the table of the same activations as each tool keeps them."""
    found = shelf.table()
    print(found)
    assert "not installed" not in found, "the table has lines without figures"
    return f"{len(shelf.WAYS)} ways, each read back and compared: the table above"


if __name__ == "__main__":
    sys.exit(
        run(
            "Part 5: the archive",
            {
                "Bit-exact for every dtype, in every profile": is_exact,
                "bf16 within 5 % of its 16-bit symbol entropy in balanced, encode ≥ 2 × stock "
                "Blosc zstd with blocksize = chunk (MiniLM)": is_dense_and_fast,
                "What dense gains and costs (against balanced)": dense_is_shown,
                "Side by side: bytes, write, a layer, 1,000 tokens": stands_beside_the_others,
            },
        )
    )
