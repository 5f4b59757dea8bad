"""The same activations as each tool keeps them: bytes, time to write, to a layer, to 1,000 tokens.

Run by ``.venv/bin/python tests/benchmarks/shelf.py``; about five minutes, of which capturing with
llm-instrumentation needs ``tests/benchmarks/peers.py --install --peers llm-instrumentation``, and
the lines of Arrow and Parquet ``pyarrow`` and ``datasets``. What is missing is named.

What is kept is what the six blocks of `examples/tiny-llama` return in bfloat16 on 65,536 tokens
of documentation. It is in memory before; the time to write ends when all is durable. A tool that
captures is given a model whose blocks return these values. Reading begins with opening, in a
process that has read before, the files in the page cache, and gives an array in memory: all
tokens of block 3, or 1,000 of its tokens, chosen at random and sorted. Medians of ``ROUNDS``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import trained
from machine import machine
from numpy.typing import NDArray
from peer_captures import LLMInstrumentation
from peer_process import durable
from replay import Replay

import actstore

ROUNDS = 3
LAYERS = [f"model.layers.{number}" for number in range(6)]
LAYER, NUMBER = "model.layers.3", 3
TOKENS, CHOSEN = 65_536, 1000
Values = Mapping[str, torch.Tensor]


class Kept:
    """One way to keep the values of layers, and to read them again; this one is torch.save."""

    name: ClassVar[str] = "`torch.save`"
    holds: ClassVar[str] = "bfloat16"
    readers: ClassVar[str] = "torch (pickle)"
    needs: ClassVar[str] = "torch"

    def write(self, values: Values, folder: Path) -> None:
        """Write values into an empty folder."""
        torch.save(dict(values), folder / "run.pt")

    def layer(self, folder: Path) -> Any:
        """Read a layer."""
        return torch.load(folder / "run.pt", mmap=True)[LAYER].clone()

    def tokens(self, folder: Path, rows: NDArray[np.int64]) -> Any:
        """Read rows of a layer."""
        return torch.load(folder / "run.pt", mmap=True)[LAYER][torch.from_numpy(rows)]


class Safetensors(Kept):
    """safetensors, a tensor a layer."""

    name = "safetensors"
    readers = "safetensors (torch, JAX, …)"
    needs = "safetensors"

    def write(self, values: Values, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(values), folder / "run.safetensors")

    def layer(self, folder: Path) -> Any:
        return self._open(folder)[:].clone()

    def tokens(self, folder: Path, rows: NDArray[np.int64]) -> Any:
        return self._open(folder)[:][torch.from_numpy(rows)]

    def _open(self, folder: Path) -> Any:
        from safetensors import safe_open

        return safe_open(folder / "run.safetensors", "pt").get_slice(LAYER)


class Arrow(Kept):
    """Hugging Face datasets, one of each layer, a row a sequence: as SAELens caches."""

    name = "Arrow, as SAELens caches"
    holds = "float32"
    readers = "datasets, pyarrow, …"
    needs = "datasets"

    def write(self, values: Values, folder: Path) -> None:
        from datasets import Array2D, Dataset, Features, disable_progress_bars

        disable_progress_bars()
        for layer, rows in values.items():
            shape = (trained.LENGTH, rows.shape[1])
            features = Features({layer: Array2D(shape, "float32")})
            sequences = rows.float().numpy().reshape(-1, *shape)
            Dataset.from_dict({layer: sequences}, features).save_to_disk(folder / layer)

    def layer(self, folder: Path) -> Any:
        found = self._open(folder)[:][LAYER]
        return found.reshape(-1, found.shape[2])

    def tokens(self, folder: Path, rows: NDArray[np.int64]) -> Any:
        sequence, place = np.divmod(rows, trained.LENGTH)
        wanted, back = np.unique(sequence, return_inverse=True)
        return self._open(folder)[wanted][LAYER][back, place]

    def _open(self, folder: Path) -> Any:
        from datasets import load_from_disk

        return load_from_disk(folder / LAYER).with_format("numpy")


class Parquet(Kept):
    """Parquet at its best: zstd of the bytes of the values, split into streams."""

    name = "Parquet, zstd, byte-stream-split"
    holds = "float32"
    readers = "pyarrow, DuckDB, polars, Spark, …"
    needs = "pyarrow"

    def write(self, values: Values, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            layer: pa.FixedSizeListArray.from_arrays(rows.float().numpy().ravel(), rows.shape[1])
            for layer, rows in values.items()
        }
        pq.write_table(
            pa.table(columns),
            folder / "run.parquet",
            row_group_size=8192,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=True,
        )

    def layer(self, folder: Path) -> Any:
        import pyarrow.parquet as pq

        column = pq.read_table(folder / "run.parquet", columns=[LAYER]).column(0)
        flat = column.combine_chunks().flatten().to_numpy()
        return flat.reshape(len(column), -1)

    def tokens(self, folder: Path, rows: NDArray[np.int64]) -> Any:
        return self.layer(folder)[rows]


class HDF5(Kept):
    """HDF5 with gzip and shuffle, chunks of 1,024 tokens."""

    name = "HDF5, shuffle, gzip 1"
    holds = "float32"
    readers = "h5py, netCDF tools, MATLAB, R, …"
    needs = "h5py"

    def write(self, values: Values, folder: Path) -> None:
        import h5py

        with h5py.File(folder / "run.h5", "w") as file:
            for layer, rows in values.items():
                file.create_dataset(
                    layer,
                    data=rows.float().numpy(),
                    chunks=(1024, rows.shape[1]),
                    compression="gzip",
                    compression_opts=1,
                    shuffle=True,
                )

    def layer(self, folder: Path) -> Any:
        import h5py

        with h5py.File(folder / "run.h5") as file:
            return file[LAYER][:]

    def tokens(self, folder: Path, rows: NDArray[np.int64]) -> Any:
        import h5py

        with h5py.File(folder / "run.h5") as file:
            return file[LAYER][rows]


class Stream(Kept):
    """llm-instrumentation, in an environment of its own; it has no reader."""

    name = "llm-instrumentation 1.3.1"
    holds = "float16, rounded"
    readers = "nothing but its own counts; actstore"
    needs = "lz4"
    python: ClassVar[Path] = Path.home() / ".cache/actstore-peers/llm-instrumentation/bin/python"
    seconds: float = 0.0

    def write(self, values: Values, folder: Path) -> None:
        from safetensors.torch import save_file

        given, script = folder / "given", Path(__file__).with_name("replay.py")
        save_file({layer: rows.float() for layer, rows in values.items()}, given)
        command = [self.python, script, given, folder / "run.stream"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        given.unlink()
        self.seconds = float(said.split()[-1])

    def layer(self, folder: Path) -> Any:
        found = LLMInstrumentation.read(folder, LAYER)
        return found.reshape(TOKENS, -1)

    def tokens(self, folder: Path, rows: NDArray[np.int64]) -> Any:
        return self.layer(folder)[torch.from_numpy(rows)]


class Log(Kept):
    """actstore's log."""

    name = 'actstore log, `"zstd"`'
    readers = "actstore; its blocks any Blosc"
    needs = "actstore"
    opened: ClassVar[str] = "run.stream"

    def write(self, values: Values, folder: Path) -> None:
        config = actstore.InstrumentationConfig(
            actstore.HookGranularity.FULL_TENSOR, "zstd", target_throughput_gbps=1e-6
        )
        framework = actstore.InstrumentationFramework(config)
        model = Replay(values)
        names = [f"blocks.{number}" for number in range(len(values))]
        framework.instrument_model(model, actstore.HookConfig(target_layers=names))
        with framework.capture_activations(str(folder / "run.stream")):
            model.run()

    def layer(self, folder: Path) -> Any:
        return self._open(folder).values

    def tokens(self, folder: Path, rows: NDArray[np.int64]) -> Any:
        return self._open(folder)[rows].values

    def _open(self, folder: Path) -> Any:
        return actstore.open_dataset(folder / self.opened, chunks=None)[f"blocks.{NUMBER}"]


class Archive(Log):
    """actstore's archive, made of the log, which is then removed."""

    holds = "bfloat16 as float32"
    readers = "xarray, zarr, tensorstore, zarrs"
    opened = "run.zarr"

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.name = f"actstore archive, `{profile}`"  # type: ignore[misc]

    def write(self, values: Values, folder: Path) -> None:
        super().write(values, folder)
        actstore.compact(folder / "run.stream", folder / "run.zarr", profile=self.profile)
        (folder / "run.stream").unlink()


WAYS: tuple[Kept, ...] = (
    Kept(),
    Safetensors(),
    Arrow(),
    Parquet(),
    HDF5(),
    Stream(),
    Log(),
    *(Archive(profile) for profile in ("fast", "balanced", "dense")),
)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Give the median of the seconds that reading takes, and what was read."""
    found, seconds = work(), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - began)
    return median(seconds), found


def as_float(values: Any) -> NDArray[np.float32]:
    """Give values as float32."""
    if isinstance(values, torch.Tensor):
        return values.float().numpy()
    return np.asarray(values, np.float32)


def missing(way: Kept) -> str:
    """Say what a way needs and is not there, or nothing."""
    if find_spec(way.needs) is None:
        return f"{way.needs} is not installed"
    if isinstance(way, Stream) and not way.python.exists():
        return "not installed: see peers.py --install"
    return ""


def row(way: Kept, values: Values, rows: NDArray[np.int64], folder: Path) -> str:
    """Measure a way; give its line of the table."""
    seconds = []
    for number in range(ROUNDS):
        place = folder / f"{number}"
        place.mkdir(parents=True)
        began = time.perf_counter()
        way.write(values, place)
        size = durable(place)
        took = time.perf_counter() - began
        seconds.append(way.seconds if isinstance(way, Stream) else took)
    to_layer, layer = timed(lambda: way.layer(place))
    to_tokens, tokens = timed(lambda: way.tokens(place, rows))
    wanted = as_float(values[LAYER])
    exact = np.array_equal(as_float(layer), wanted)
    assert exact or "rounded" in way.holds, f"{way.name} is not exact"
    assert np.array_equal(as_float(tokens), as_float(layer)[rows]), way.name
    return (
        f"| {way.name} | {way.holds} | {size / 1e6:.1f} | {median(seconds):.2f} | "
        f"{1e3 * to_layer:.0f} | {1e3 * to_tokens:.0f} | {way.readers} |"
    )


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="*", default=[""], help="parts of their names")
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args(argv)
    print(table(given.ways, given.folder))


def table(ways: Sequence[str] = ("",), within: Path = Path()) -> str:
    """Give the table of those ways whose names have one of these parts."""
    found = trained.modules(torch.bfloat16, TOKENS, LAYERS)
    values = {
        layer: torch.from_numpy(one.view(np.int16)).view(torch.bfloat16)
        for layer, one in found.items()
    }
    rows = np.sort(np.random.default_rng(0).choice(TOKENS, CHOSEN, replace=False))
    lines = [
        f"{machine()}\n",
        "| kept as | holds | MB | write, s | one layer, ms | 1,000 tokens, ms | readable by |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        if not any(part in way.name for part in ways):
            continue
        if reason := missing(way):
            lines.append(f"| {way.name} | {reason} | | | | | |")
            continue
        with tempfile.TemporaryDirectory(dir=within.resolve()) as folder:
            lines.append(row(way, values, rows, Path(folder)))
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
