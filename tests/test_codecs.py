"""Whatever a codec encodes, stock numcodecs decodes; what is no encoding is refused."""

from __future__ import annotations

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numcodecs
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore import codecs, dtypes
from actstore.errors import FormatError

Bytes = NDArray[np.uint8]

HEADER = struct.Struct("<BBBBIII")  # of a Blosc frame, from its specification
SHUFFLED, COPIED = 1, 2
ITEMSIZES = (1, 2, 4, 8, 16)
COUNTS = (0, 1, 3, 127, 128, 129, 1000)
BLOSC = codecs.CODECS[1]


def noise(size: int) -> Bytes:
    """Give bytes that nothing compresses."""
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def values(size: int) -> Bytes:
    """Give the bytes of float32 as activations are: the exponents repeat, the rest doesn't."""
    normal = np.random.default_rng(size).standard_normal(size // 4 + 1).astype(np.float32)
    return np.ascontiguousarray(normal.view(np.uint8)[:size])


def zeros(size: int) -> Bytes:
    return np.zeros(size, np.uint8)


def stock(codec: int, encoded: Any) -> bytes:
    """Decode as one who has numcodecs and the codec's configuration, and no actstore."""
    config = codecs.CODECS[codec]
    if config is None:
        return bytes(encoded)
    return bytes(numcodecs.get_codec(dict(config)).decode(bytes(encoded)))


def from_planes(frame: bytes) -> bytes:
    """Decode a frame of byte planes with zstandard and struct alone."""
    version, _, flags, itemsize, nbytes, blocksize, length = HEADER.unpack_from(frame)
    assert (version, flags >> 5, blocksize, length) == (2, 4, nbytes, len(frame))
    if flags & COPIED:
        return frame[HEADER.size :]
    assert flags & SHUFFLED
    (at,) = struct.unpack_from("<i", frame, HEADER.size)
    planes = []
    for _ in range(itemsize):
        (size,) = struct.unpack_from("<i", frame, at)
        packed, at = frame[at + 4 : at + 4 + size], at + 4 + size
        whole = size * itemsize == nbytes
        planes.append(packed if whole else zstandard.ZstdDecompressor().decompress(packed))
    assert at == len(frame)
    return bytes(np.array([np.frombuffer(plane, np.uint8) for plane in planes]).T.tobytes())


def check(codec: int, data: Bytes, itemsize: int) -> int:
    """Compare both ways of decoding with what went in; give the codec that was used."""
    before = data.tobytes()
    used, encoded = codecs.encode(codec, data, itemsize)
    assert data.tobytes() == before
    assert used in (0, codec)
    assert len(encoded) < data.nbytes if used else encoded is data
    assert stock(used, encoded) == before
    found = codecs.decode(codecs.CODECS[used], bytes(encoded), data.nbytes)
    assert (found.dtype, found.shape) == (np.uint8, (data.nbytes,))
    assert found.tobytes() == before
    return used


# -- what is encoded ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", codecs.NAMES)
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("make", [noise, values, zeros])
def test_stock_numcodecs_gives_back_any_number_of_elements(
    name: str, itemsize: int, make: Any
) -> None:
    codec = codecs.NAMES[name]
    used = {count: check(codec, make(count * itemsize), itemsize) for count in COUNTS}
    assert used[0] == 0
    if make is noise:
        assert set(used.values()) == {0}
    elif make is zeros:
        assert used[1000] == codec


@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.parametrize("itemsize", [2, 4, 8, 16, 3, 300])
@pytest.mark.parametrize("extra", [-1, 1])
def test_bytes_that_are_no_whole_elements_come_back(codec: int, itemsize: int, extra: int) -> None:
    assert check(codec, zeros(1000 * itemsize + extra), itemsize) == codec
    check(codec, noise(1000 * itemsize + extra), itemsize)


@pytest.mark.parametrize("kind", dtypes.BY_CODE.values(), ids=lambda kind: kind.name)
def test_values_of_every_dtype_come_back_from_every_codec(kind: dtypes.DType) -> None:
    normal = np.abs(np.random.default_rng(1).standard_normal(4096)) * 4
    data = normal.astype(kind.numpy).view(np.uint8)
    for codec in codecs.CODECS:
        assert check(codec, data, kind.itemsize) == codec


@given(st.binary(max_size=3000), st.sampled_from([*ITEMSIZES, 5, 255]), st.integers(1, 40))
def test_any_bytes_come_back(data: bytes, itemsize: int, times: int) -> None:
    repeated = np.frombuffer(data * times, np.uint8)
    for codec in codecs.CODECS:
        check(codec, repeated, itemsize)


def test_only_the_named_codecs_are_in_a_log_and_each_is_a_stock_one() -> None:
    assert {codecs.NAMES[name] for name in ("none", "lz4", "zstd")} == set(codecs.CODECS)
    for name, number in codecs.NAMES.items():
        config = codecs.CODECS[number]
        assert (config is None) == (name == "none")
        if config is not None:
            assert numcodecs.get_codec(dict(config)).get_config() == config
            assert config["cname"] == name


# -- planes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [*ITEMSIZES, 3])
@pytest.mark.parametrize("count", [128, 129, 5000])
@pytest.mark.parametrize("make", [noise, values, zeros])
def test_a_frame_of_planes_is_one_zstd_frame_for_each_byte_of_an_element(
    itemsize: int, count: int, make: Any
) -> None:
    data = make(count * itemsize)
    frame = codecs.plane_split(data, itemsize)
    assert frame[3] == itemsize
    assert len(frame) <= data.nbytes + HEADER.size
    assert from_planes(frame) == data.tobytes()
    assert numcodecs.blosc.decompress(frame) == data.tobytes()


def test_a_plane_that_does_not_shrink_stands_as_it_is() -> None:
    data = np.zeros((4096, 2), np.uint8)
    data[:, 0] = noise(4096)
    frame = codecs.plane_split(data.reshape(-1), 2)
    assert struct.pack("<i", 4096) + data[:, 0].tobytes() in frame
    assert from_planes(frame) == numcodecs.blosc.decompress(frame) == data.tobytes()


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_what_does_not_shrink_is_copied_behind_the_header(itemsize: int) -> None:
    data = noise(4096 * itemsize)
    frame = codecs.plane_split(data, itemsize)
    assert frame[2] & COPIED
    assert frame[HEADER.size :] == data.tobytes()
    assert numcodecs.blosc.decompress(frame) == data.tobytes()


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("constant", [0, 0x7F])
@pytest.mark.parametrize("last", [False, True])
def test_a_plane_of_one_value_costs_a_few_bytes_and_one_that_differs_at_the_end_is_none(
    itemsize: int, constant: int, last: bool
) -> None:
    data = noise(5000 * itemsize).reshape(-1, itemsize)
    data[:, 0] = constant
    if last:
        data[-1, 0] ^= 0x80
    frame = codecs.plane_split(data.reshape(-1), itemsize)
    assert from_planes(frame) == numcodecs.blosc.decompress(frame) == data.tobytes()
    assert len(frame) < 5000 * (itemsize - 1) + 100


def test_bfloat16_in_float32_takes_no_more_than_bfloat16() -> None:
    narrow = values(1 << 20).reshape(-1, 4)[:, 2:].copy()
    wide = np.zeros((len(narrow), 4), np.uint8)
    wide[:, 2:] = narrow
    as_two, as_four = (codecs.plane_split(one.reshape(-1), one.shape[1]) for one in (narrow, wide))
    assert len(as_four) < len(as_two) + 100
    assert numcodecs.blosc.decompress(as_four) == wide.tobytes()


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_rows_that_repeat_are_found_where_they_are_looked_for(itemsize: int) -> None:
    """As those of an embedding do; only a search sees it, for their bytes are noise."""
    rows = noise(64 * 1024).reshape(64, 1024)
    data = rows[np.random.default_rng(0).integers(0, 64, 512)].reshape(-1)
    out = np.empty(data.nbytes + codecs.FRAME_BYTES, np.uint8)
    found = out[: codecs.plane_split_into(out, data, itemsize, repeats=True)].tobytes()
    assert from_planes(found) == numcodecs.blosc.decompress(found) == data.tobytes()
    assert len(found) < data.nbytes / 2
    assert len(found) < len(codecs.plane_split(data, itemsize)) / 1.5


def test_planes_of_activations_are_denser_than_any_stock_setting_of_zstd() -> None:
    normal = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    data = (normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)  # bfloat16
    _, encoded = codecs.encode(2, data, 2)
    for level in (1, 5, 9):
        for shuffle in (0, 1, 2):
            assert len(encoded) < len(numcodecs.blosc.compress(data, b"zstd", level, shuffle, 0))


def test_threads_that_encode_at_once_do_not_mix_their_planes() -> None:
    data = [values(1 << 18) + np.uint8(number) for number in range(8)]
    wanted = [codecs.plane_split(one, 4) for one in data]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(codecs.plane_split, data, [4] * 8)) == wanted


# -- what is refused ----------------------------------------------------------------------------


def frames() -> list[Any]:
    """Give a frame of each form, and the number of bytes in it."""
    forms = {
        "lz4": codecs.encode(1, values(40_000), 4)[1],
        "planes": codecs.plane_split(values(4000), 4),
        "copied": codecs.plane_split(noise(4000), 4),
        "short": codecs.plane_split(zeros(400), 16),
    }
    sizes = {"lz4": 40_000, "short": 400}
    return [
        pytest.param(bytes(frame), sizes.get(name, 4000), id=name) for name, frame in forms.items()
    ]


@pytest.mark.parametrize(("frame", "size"), frames())
def test_a_frame_that_is_cut_or_too_long_is_refused(frame: bytes, size: int) -> None:
    assert codecs.decode(BLOSC, frame, size).nbytes == size
    for length in {*range(40), *range(40, len(frame), 97), len(frame) - 1}:
        with pytest.raises(FormatError, match=str(length)):
            codecs.decode(BLOSC, frame[:length], size)
    with pytest.raises(FormatError):
        codecs.decode(BLOSC, frame + b"\0", size)


@pytest.mark.parametrize(("frame", "size"), frames())
def test_a_frame_cut_where_its_header_agrees_is_refused(frame: bytes, size: int) -> None:
    for length in (HEADER.size, HEADER.size + 4, len(frame) // 2, len(frame) - 1):
        fields = HEADER.unpack_from(frame)
        cut = HEADER.pack(*fields[:-1], length) + frame[HEADER.size : length]
        with pytest.raises(FormatError, match=r"does not decode"):
            codecs.decode(BLOSC, cut, size)


@pytest.mark.parametrize("size", [0, 1, 3999, 4001, 1 << 24, 1 << 40])
def test_a_length_other_than_the_frames_is_refused_before_memory_is_taken(size: int) -> None:
    frame = codecs.plane_split(values(4000), 4)
    fields = HEADER.unpack_from(frame)
    huge = HEADER.pack(*fields[:4], 0xFFFF_FFFF, *fields[5:]) + frame[HEADER.size :]
    tracemalloc.start()
    try:
        for one in (frame, huge):
            with pytest.raises(FormatError, match=rf"of {size}$"):
                codecs.decode(BLOSC, one, size)
        with pytest.raises(FormatError, match=f"raw block of {size} bytes has 4000"):
            codecs.decode(None, bytes(4000), size)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("frame", "size"), frames())
def test_a_frame_with_any_flipped_bit_is_refused_or_decodes_to_as_many_bytes(
    frame: bytes, size: int
) -> None:
    """Whether they are the right ones is for the record's checksum to say."""
    refused = set()
    for bit in range(8 * min(len(frame), 600)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert codecs.decode(BLOSC, bytes(flipped), size).nbytes == size
        except FormatError:
            refused.add(bit // 8)
    assert refused >= {0, *range(4, 8), *range(12, 16)}  # version, both lengths


def test_a_raw_block_is_a_read_only_view_of_what_was_read() -> None:
    encoded = bytes(noise(1000))
    found = codecs.decode(None, encoded, 1000)
    assert found.tobytes() == encoded
    assert np.shares_memory(found, np.frombuffer(encoded, np.uint8))
    assert not found.flags.writeable


@pytest.mark.parametrize("config", [{"id": "zlib"}, {"id": "pickle"}, {"id": "Blosc"}, {}])
def test_a_codec_that_is_not_on_the_list_is_never_run(config: dict[str, Any]) -> None:
    frame = codecs.plane_split(values(4000), 4)
    for work in (
        lambda: codecs.check_config(config),
        lambda: codecs.decode(config, frame, 4000),
    ):
        with pytest.raises(FormatError, match="is not allowed; wanted null or id 'blosc'"):
            work()
