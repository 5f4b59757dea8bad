"""How small the activations of trained models become, losslessly, and how fast.

Run by ``.venv/bin/python tests/benchmarks/density.py``; about ten minutes. Prints one table: a
line a codec, and the bounds; a column a set of data: the hidden states of MiniLM, and what every
module of `examples/tiny-llama` returns, on documentation text.

A cell is the ratio, and in parentheses the speed to encode and to decode, GB/s of source bytes on
one thread: medians of ``ROUNDS``, the codecs taking turns, of chunks as the archive has them
(1 MiB). The profiles of actstore and stock Blosc encode what an archive stores, float32 for
bfloat16; all others the model's own bytes. Not installed by ``.[dev]``: ``zipnn`` and
``pcodec``; without them their lines are left out.

The bounds are zeroth-order entropies, Miller–Madow corrected, added up over layers: of the
elements ("symbol"; of 16 bits only, for no two float32 are alike), of each byte plane by itself,
and of that given the feature. Codecs that find repeats or adapt from chunk to chunk may pass them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import trained
import zstandard
from machine import machine
from numcodecs import blosc
from numpy.typing import NDArray

from actstore import dtypes
from actstore.archive import grid, shards
from actstore.stream.rows import widen

Bytes = NDArray[np.uint8]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDS = 3


@dataclass(frozen=True)
class Layer:
    """Rows, and the chunks that an archive cuts them into."""

    rows: NDArray[Any]
    chunk_rows: int

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.rows.itemsize

    @property
    def chunks(self) -> list[Bytes]:
        """The bytes of each chunk."""
        return list(
            self.rows.reshape(-1).view(np.uint8).reshape(len(self.rows) // self.chunk_rows, -1)
        )


@dataclass(frozen=True)
class Codec:
    """Encodes the chunks of a layer, given its dtype, and decodes what it made of one.

    ``stored`` says that it is given the values of an archive, not the model's own.
    """

    encode: Callable[[Layer, str], list[Any]]
    decode: Callable[[Any], Any]
    stored: bool = False


def by_chunk(encode: Callable[[Bytes, int], Any], decode: Callable[[Any], Any]) -> Codec:
    """Give a codec that is given one chunk after the other, and the size of its elements."""
    return Codec(lambda layer, _dtype: [encode(one, layer.size) for one in layer.chunks], decode)


def by_profile(name: str) -> Codec:
    """Give what a profile makes of a layer."""
    out = np.empty(64 << 20, np.uint8)

    def encode(layer: Layer, _dtype: str) -> list[Any]:
        mine, made, end = shards.applied(name, layer.rows), [], 0
        for one in layer.chunks:
            start, end = end, end + shards.encode_chunk(out[end:], one, layer.size, mine)
            made.append(out[start:end])
        return made

    return Codec(encode, blosc.decompress, stored=True)


def by_blosc(cname: str, level: int, shuffle: int, *, whole: bool) -> Codec:
    """Give stock Blosc, with blocks as large as the chunk, or as it chooses."""

    def encode(data: Bytes, size: int) -> Any:
        block = data.nbytes if whole else 0
        return blosc.compress(data, cname.encode(), level, shuffle, block, size)

    return replace(by_chunk(encode, blosc.decompress), stored=True)


def by_zstd(level: int) -> Codec:
    """Give plain zstd."""
    compressor, back = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()
    return by_chunk(lambda data, _size: compressor.compress(data), back.decompress)


def by_blosc2() -> Codec:
    """Give blosc2 with the settings that were densest: zstd 1, shuffle, a block a chunk."""
    import blosc2

    def encode(data: Bytes, size: int) -> Any:
        return blosc2.compress2(
            data,
            codec=blosc2.Codec.ZSTD,
            clevel=1,
            typesize=size,
            blocksize=data.nbytes,
            splitmode=blosc2.SplitMode.ALWAYS_SPLIT,
            filters=[blosc2.Filter.SHUFFLE],
            filters_meta=[0],
            nthreads=1,
        )

    return by_chunk(encode, partial(blosc2.decompress2, nthreads=1))


def by_zipnn() -> Codec:
    """Give zipnn; it writes into what it is given, so that it is given a copy."""
    from zipnn import ZipNN

    coders: dict[str, Any] = {}

    def encode(layer: Layer, dtype: str) -> list[Any]:
        coder = coders.setdefault(dtype, ZipNN(bytearray_dtype=dtype, threads=1))
        return [(coder, coder.compress(bytearray(one))) for one in layer.chunks]

    return Codec(encode, lambda made: made[0].decompress(made[1]))


def by_pcodec() -> Codec:
    """Give pcodec at its defaults; bfloat16 as integers."""
    from pcodec import ChunkConfig, standalone

    def encode(layer: Layer, dtype: str) -> list[Any]:
        kind = "uint16" if dtype == "bfloat16" else dtype
        return [standalone.simple_compress(one.view(kind), ChunkConfig()) for one in layer.chunks]

    return Codec(encode, standalone.simple_decompress)


def all_codecs() -> dict[str, Codec]:
    """Give what is installed."""
    found = {
        "raw (a copy)": by_chunk(lambda data, _size: data.copy(), np.copy),
        "`fast`": by_profile("fast"),
        "`balanced`": by_profile("balanced"),
        "`dense`": by_profile("dense"),
        "Blosc zstd 1, shuffle, blocksize = chunk": by_blosc("zstd", 1, 1, whole=True),
        "Blosc zstd 1, shuffle": by_blosc("zstd", 1, 1, whole=False),
        "Blosc zstd 5, bitshuffle": by_blosc("zstd", 5, 2, whole=False),
        "zstd 1": by_zstd(1),
        "zstd 9": by_zstd(9),
    }
    others = {"blosc2": by_blosc2, "zipnn": by_zipnn, "pcodec": by_pcodec}
    return found | {name: make() for name, make in others.items() if find_spec(name)}


def size_of(made: Any) -> int:
    """Give the bytes of what a codec made."""
    return len(made[1]) if isinstance(made, tuple) else len(made)


@dataclass(frozen=True)
class Data:
    """Layers of a dtype: what the model returned, and the chunks an archive cuts it into."""

    dtype: str
    layers: Sequence[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes, in the model's dtype."""
        return sum(one.nbytes for one in self.layers)

    def cut(self, *, stored: bool) -> list[Layer]:
        """Give the whole chunks of each layer: as they are stored, or as they were."""
        kind, found = dtypes.from_name(self.dtype), []
        for one in self.layers:
            rows = grid.chunk_rows(len(one), one.shape[1] * kind.array.itemsize)
            whole = one[: len(one) // rows * rows]
            found.append(Layer(widen(whole, kind) if stored else whole, rows))
        return found


def measure(data: Data, table: dict[str, Codec]) -> dict[str, tuple[float, float, float]]:
    """Give each codec's ratio, and its speeds to encode and to decode; check that it is exact."""
    layers = {stored: data.cut(stored=stored) for stored in (False, True)}
    source = sum(one.rows.nbytes for one in layers[False])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    sizes: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, codec in table.items():
            to = back = nbytes = 0.0
            for layer in layers[codec.stored]:
                started = time.perf_counter()
                made = codec.encode(layer, data.dtype)
                middle = time.perf_counter()
                found = [codec.decode(one) for one in made]
                back += time.perf_counter() - middle
                to += middle - started
                nbytes += sum(map(size_of, made))
                assert b"".join(map(bytes, found)) == layer.rows.tobytes(), name
            times[name].append((to, back))
            sizes[name] = int(nbytes)
    return {
        name: (
            source / sizes[name],
            source / 1e9 / median(one for one, _ in found),
            source / 1e9 / median(one for _, one in found),
        )
        for name, found in times.items()
    }


def entropy(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give bits a symbol, Miller–Madow corrected, of counts along the last axis."""
    total = counts.sum(-1, keepdims=True)
    share = counts / total
    plain = -(share * np.log2(np.where(counts > 0, share, 1))).sum(-1)
    corrected: NDArray[np.float64] = plain + ((counts > 0).sum(-1) - 1) / (
        2 * np.log(2) * total[..., 0]
    )
    return corrected


def bounds(data: Data) -> dict[str, float]:
    """Give the ratios that entropies allow."""
    bits = {"symbol": 0.0, "byte plane": 0.0, "byte plane, given the feature": 0.0}
    size = data.layers[0].itemsize
    for layer in data.layers:
        rows, width = layer.shape
        planes = np.moveaxis(layer.view(np.uint8).reshape(rows, width, size), 2, 0)
        if size == 2:
            symbols = np.bincount(layer.reshape(-1).view(np.uint16), minlength=1 << 16)
            bits["symbol"] += layer.size * float(entropy(symbols))
        for plane in planes:
            keys = plane.astype(np.int64) + 256 * np.arange(width)
            counts = np.bincount(keys.reshape(-1), minlength=256 * width).reshape(width, 256)
            whole = min(float(entropy(counts.sum(0))), 8)
            given = np.minimum(entropy(counts), 8)
            bits["byte plane"] += layer.size * whole
            bits["byte plane, given the feature"] += rows * float(given.sum())
    return {name: 8 * data.nbytes / one if one else 0 for name, one in bits.items()}


def datasets(tokens: int, kinds: Sequence[torch.dtype] = DTYPES) -> Iterator[tuple[str, Data]]:
    """Give the columns of the table."""
    for dtype in kinds:
        name = str(dtype)[6:]
        states = trained.hidden_states(dtype, 4 * tokens)
        yield f"MiniLM {name}", Data(name, list(states.values()))
        yield f"tiny-llama {name}", Data(name, list(trained.modules(dtype, tokens).values()))


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="through the Llama")
    given = parser.parse_args(argv)
    blosc.use_threads = False
    torch.set_num_threads(1)
    table = all_codecs()
    cells: dict[str, list[str]] = {}
    heads = []
    for name, data in datasets(given.tokens):
        print(f"{name}: {data.nbytes / 1e6:.0f} MB", file=sys.stderr, flush=True)
        heads.append(name)
        for bound, ratio in bounds(data).items():
            cells.setdefault(f"bound: {bound}", []).append(f"{ratio:.3f}" if ratio else "–")
        for codec, (ratio, to, back) in measure(data, table).items():
            cells.setdefault(codec, []).append(f"{ratio:.3f} ({to:.2f} / {back:.2f})")
    print(f"{machine()}; one thread\n")
    print(f"| | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
    for name, mine in cells.items():
        print(f"| {name} | {' | '.join(mine)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
