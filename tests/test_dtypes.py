"""The dtypes are those of the specification, and each value of each is presented exactly."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import actstore
from actstore import dtypes
from actstore.errors import FormatError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis

SPECIFICATION = Path(__file__).parents[1] / "schemas" / "stream.md"
NARROW = ["bfloat16", *(name for name in dtypes.BY_NAME if name.startswith("float8"))]


def specified() -> dict[int, str]:
    """Give the table of codes and names of schemas/stream.md."""
    text = SPECIFICATION.read_text()
    (rows,) = re.findall(r"\| code \| dtype \|.*?\n\|[-| ]+\n(.*?)\n\n", text, re.DOTALL)
    return {int(code): name for code, name in re.findall(r"\| (\d+) \| (\w+) ", rows)}


def by_hand(name: str, bits: int) -> float:
    """Give what a narrow float's bits stand for, from the definition of its format."""
    if name == "float8_e8m0fnu":
        return math.nan if bits == 0xFF else 2.0 ** (bits - 127)
    exponents, mantissas = (8, 7) if name == "bfloat16" else map(int, re.findall(r"\d", name)[1:3])
    magnitude = bits & ((1 << (exponents + mantissas)) - 1)
    negative = bits != magnitude
    exponent, mantissa = magnitude >> mantissas, magnitude & ((1 << mantissas) - 1)
    bias = (1 << (exponents - 1)) - 1
    if name.endswith("fnuz"):  # no infinities, no negative zero, whose bits are the one NaN
        bias += 1
        if negative and magnitude == 0:
            return math.nan
    elif name.endswith("fn"):  # no infinities
        if magnitude == (1 << (exponents + mantissas)) - 1:
            return math.nan
    elif exponent == (1 << exponents) - 1:
        return math.nan if mantissa else math.copysign(math.inf, -negative or 1)
    scaled = mantissa + ((1 << mantissas) if exponent else 0)
    value = math.ldexp(scaled, max(exponent, 1) - bias - mantissas)
    return -value if negative else value


# -- names and codes ----------------------------------------------------------------------------


def test_codes_and_names_are_those_of_the_specification() -> None:
    wanted = specified()
    assert len(wanted) == 20
    assert {code: kind.name for code, kind in dtypes.BY_CODE.items()} == wanted
    assert {kind.code: name for name, kind in dtypes.BY_NAME.items()} == wanted


@pytest.mark.parametrize(("code", "name"), specified().items())
def test_a_code_a_name_and_a_numpy_dtype_stand_for_each_other(code: int, name: str) -> None:
    kind = dtypes.from_code(code)
    assert dtypes.from_name(name) is kind
    assert (kind.code, kind.name, kind.numpy.name) == (code, name, name)
    own = getattr(ml_dtypes, name, None)
    assert kind.numpy == np.dtype(own or name)
    assert kind.array == np.dtype("float32" if own else name)
    assert dtypes.array_dtype(kind.numpy) == kind.array


@pytest.mark.parametrize("name", specified().values())
def test_a_dtype_is_torchs_of_that_name_and_size(name: str) -> None:
    torch = pytest.importorskip("torch")
    kind = dtypes.from_name(name)
    assert getattr(torch, name).itemsize == kind.itemsize == kind.numpy.itemsize


@pytest.mark.parametrize("code", [0, 21, 255, -1])
def test_an_unknown_code_is_refused_naming_it_and_those_there_are(code: int) -> None:
    with pytest.raises(FormatError, match=rf"dtype code {code} is unknown; known are 1 to 20"):
        dtypes.from_code(code)


@pytest.mark.parametrize("name", ["", "float", "half", "Float32", "float8", "float128", "object"])
def test_an_unknown_name_is_refused_naming_it_and_those_there_are(name: str) -> None:
    with pytest.raises(FormatError, match=rf"'{name}' can't be kept.*bool.*bfloat16"):
        dtypes.from_name(name)


@pytest.mark.parametrize("dtype", ["U3", "O", "M8[s]", "i4,f4", ml_dtypes.int4])
def test_a_numpy_dtype_that_no_log_holds_is_refused(dtype: Any) -> None:
    with pytest.raises(FormatError, match=re.escape(np.dtype(dtype).name)):
        dtypes.array_dtype(np.dtype(dtype))


# -- values -------------------------------------------------------------------------------------


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def every(name: str) -> np.ndarray:
    """Give every value of a narrow dtype, in the order of its bits."""
    size = dtypes.from_name(name).itemsize
    return np.arange(1 << 8 * size, dtype=f"<u{size}").view(getattr(ml_dtypes, name))


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_every_bit_pattern_of_a_narrow_float_is_read_and_presented_exactly(
    name: str, codec: str, tmp_path: Path
) -> None:
    values = every(name)
    numbers = [by_hand(name, bits) for bits in range(values.size)]
    wanted = np.array(numbers, np.float32)
    assert all(map(same, wanted.tolist(), numbers)), "float32 holds each of them"
    log = LogBuilder(tmp_path / "run.stream", compression=codec)
    log.layer("x")
    log.begin(axis(1, 4))
    log.put("x", values.reshape(1, 4, -1))
    with actstore.open_stream(log.close()) as reader:
        (packet,) = reader.packets()
    assert packet.values.dtype == values.dtype
    assert packet.values.tobytes() == values.tobytes()
    with actstore.open_dataset(log.path) as dataset:
        found = dataset["x"].values.reshape(-1)
    assert found.dtype == np.float32
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    number = ~np.isnan(wanted)  # compared by bits: -0.0 isn't 0.0
    assert np.array_equal(found[number].view("<u4"), wanted[number].view("<u4"))
    if name == "bfloat16":  # a NaN too keeps all of its bits
        bits = np.arange(1 << 16, dtype=np.uint32) << 16
        assert np.array_equal(found.view(np.uint32), bits)


@pytest.mark.parametrize("name", [name for name in dtypes.BY_NAME if name not in NARROW])
def test_values_of_numpys_own_dtypes_are_presented_as_they_are(name: str, tmp_path: Path) -> None:
    kind = np.dtype(name)
    noise = np.random.default_rng(0).integers(0, 256, 4 * 6 * kind.itemsize, np.uint8)
    values = (noise % 2 if name == "bool" else noise).view(kind).reshape(1, 4, 6)
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("x")
    log.begin(axis(1, 4))
    log.put("x", values)
    with actstore.open_dataset(log.close()) as dataset:
        found = dataset["x"]
        assert (found.dtype, found.shape) == (kind, (4, 6))
        assert found.values.tobytes() == values.tobytes()
