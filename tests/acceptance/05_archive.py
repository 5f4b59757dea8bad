"""Part 5, the archive: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/05_archive.py`` on a machine that does nothing else;
about ten minutes. What `tests/benchmarks/shelf.py` needs is named there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / "tests" / one) for one in ("acceptance", "archive", "benchmarks", "crash")),
]

import compaction
import density
import numpy as np
import opening
import shelf
import torch
import trained
import xarray as xr
import zarr
from logs import LogBuilder, axis, random_values
from numcodecs import blosc
from report import run
from test_killed_compaction import kill_and_resume

import actstore
from actstore import dtypes
from actstore.archive.reading import ShardedRows
from actstore.archive.shards import PROFILES

STOCK = "Blosc zstd 1, shuffle, blocksize = chunk"
TOKENS = 32_768
PASSES, ROUNDS, KILLS, OVER = 256, 3, 30, 200_000_000


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


@cache
def measured() -> tuple[dict[str, list[float]], int, int]:
    """Measure compaction, once: the seconds, the bytes of the log, the memory over the budget."""
    with tempfile.TemporaryDirectory(dir=Path()) as name:
        folder = Path(name)
        log = compaction.make_log(folder / "run.stream", PASSES)
        nbytes = PASSES * compaction.PASS_BYTES
        found = compaction.measure(log, folder, ROUNDS)
        over = compaction.peak(log, folder / "b.zarr", nbytes / 10e9) - nbytes // 10
    print(compaction.table(found, nbytes))
    return found, nbytes, over


def compacts_near_the_floor() -> str:
    """Hold compaction against the sum of what must be done, and two writers of the same rows."""
    found, nbytes, _ = measured()
    took = {name: median(seconds) for name, seconds in found.items()}
    ratios = {name: took[name] / took["compact"] for name in ("floor", "zarr", "tensorstore")}
    said = (
        f"{nbytes / 1e9 / took['compact']:.2f} GB/s, {ratios['floor']:.2f} × the floor, "
        f"{ratios['zarr']:.2f} × zarr-python, {ratios['tensorstore']:.2f} × tensorstore"
    )
    assert ratios["floor"] >= 0.7, said
    assert min(ratios["zarr"], ratios["tensorstore"]) > 1, said
    return said


def stays_in_its_budget() -> str:
    """Compact a log ten times the budget in a process of its own."""
    _, nbytes, over = measured()
    said = f"a log of {nbytes / 1e6:.0f} MB, a budget of {nbytes / 1e7:.0f}: {over / 1e6:+.0f} MB"
    assert over <= OVER, said
    return said


def goes_on_after_kills() -> str:
    """Kill compactions at random points; resume each, and compare every byte."""
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        killed, resumed = kill_and_resume(Path(folder), KILLS)
    return f"{killed} of {KILLS} killed before their end; {resumed} finished shards not redone"


def reads_ahead_of_zarr() -> str:
    """Read a whole layer by us and by zarr-python."""
    found, nbytes, _ = measured()
    layer, by_zarr = median(found["layer"]), median(found["layer by zarr"])
    said = (
        f"{nbytes / 1e9 / compaction.LAYERS / layer:.2f} GB/s of bfloat16, "
        f"{by_zarr / layer:.2f} × zarr-python"
    )
    assert by_zarr >= 1.5 * layer, said
    return said


def gathers_few_chunks() -> str:
    """Count the chunks that 1,000 random tokens of a layer read."""
    seen: list[tuple[int, int]] = []
    honest = ShardedRows._encoded

    def counting(self: ShardedRows, layer: int, chunk: int) -> object:
        seen.append((layer, chunk))
        return honest(self, layer, chunk)

    with tempfile.TemporaryDirectory(dir=Path()) as name:
        log = compaction.make_log(Path(name, "run.stream"), 32)
        archive = actstore.compact(log, Path(name, "a.zarr")).path
        ShardedRows._encoded = counting  # type: ignore[method-assign, assignment]
        try:
            with actstore.open_dataset(archive) as dataset:
                rows = np.random.default_rng(0).choice(dataset.sizes["token"], 1000, replace=False)
                number = xr.DataArray(np.arange(dataset.sizes["token"]), dims="token")
                chosen = dataset.assign_coords(number=number).actstore.where(number=rows)
                assert chosen.actstore.layer("model.layers.3").values.shape[0] == 1000
        finally:
            ShardedRows._encoded = honest  # type: ignore[method-assign]
    said = f"{len(seen)} chunks read, {len(set(seen))} different"
    assert len(seen) <= 1000, said
    return said


def opens_at_once() -> str:
    """Open an archive of a million rows and 64 layers."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    with tempfile.TemporaryDirectory(dir=Path()) as name:
        archive = Path(name).absolute() / "a.zarr"
        opening.write(archive, 20)
        seconds, files, *_ = opening.measure(archive, "auto", opened).split(" | ")
    said = f"20 sites with dask: {1e3 * float(seconds):.0f} ms, {files} files read"
    assert float(seconds) < 0.5, said
    return said


if __name__ == "__main__":
    sys.exit(
        run(
            "Part 5: the archive",
            {
                "Bit-exact for every dtype, in every profile": is_exact,
                "bf16 within 5 % of its 16-bit symbol entropy in balanced, encode ≥ 2 × stock "
                "Blosc zstd with blocksize = chunk (MiniLM)": is_dense_and_fast,
                "What dense gains and costs (against balanced)": dense_is_shown,
                "Compaction ≥ 0.7 × floor, ahead of zarr-python and tensorstore": (
                    compacts_near_the_floor
                ),
                "RSS ≤ budget + 200 MB, for a log ten times the budget": stays_in_its_budget,
                f"Killed at {KILLS} random points, resumed, byte-identical": goes_on_after_kills,
                "Whole-layer read ≥ 1.5 × zarr-python": reads_ahead_of_zarr,
                "1,000 random tokens of a layer read at most 1,000 chunks": gathers_few_chunks,
                "A million rows × 64 layers open in under 0.5 s": opens_at_once,
                "Side by side: bytes, write, a layer, 1,000 tokens": stands_beside_the_others,
            },
        )
    )
