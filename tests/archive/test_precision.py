"""Precision: what is promised of values holds for every array there is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numcodecs.bitround import BitRound
from numpy.typing import NDArray

import actstore
from actstore.archive.precision import Codes, Errors, Precision, decoded
from actstore.errors import ConfigError

FLOATS = ("float16", "float32", "float64")
PLAIN = ("relative=0.3", "relative=0.01", "relative=1e-6", "float16", "bfloat16")
CODED = ("int8", "mse=1e-3", "mse=100.0", "nmse=2e-4", "nmse=0.3", "nmse=1e-12")
ROWS = ("normal", "outlier", "constant", "half_steps", "denormal", "zeros", "spread", "bits")


def rows_of(kind: str, dtype: str = "float32", shape: tuple[int, int] = (40, 96)) -> NDArray[Any]:
    """Give rows that are made to break something."""
    generator = np.random.default_rng(5)
    if kind == "bits":  # NaNs that signal among them
        size = np.dtype(dtype).itemsize
        return np.frombuffer(generator.bytes(shape[0] * shape[1] * size), dtype).reshape(shape)
    rows = generator.standard_normal(shape)
    if kind == "outlier":
        rows[7, 3] = 1e4
    elif kind == "constant":
        rows[:] = 0.1
    elif kind == "half_steps":  # as far from even codes as can be
        rows = np.where(rows > 0, 1, -1) * Precision("mse", 1e-3).step
    elif kind == "denormal":
        rows *= float(np.finfo(dtype).smallest_normal) / 4
    elif kind == "zeros":
        rows[:] = -0.0
    elif kind == "spread":
        rows *= np.exp2(generator.integers(-12, 12, shape))
    return rows.astype(dtype)


def breaks(precision: Precision, rows: NDArray[Any], found: NDArray[Any]) -> bool:
    """Whether the promise of a chunk is broken, by exact arithmetic that isn't the code's."""
    with np.errstate(invalid="ignore"):
        wide, values = rows.astype(np.longdouble), found.astype(np.longdouble)
    finite = np.isfinite(wide)
    if not np.array_equal(finite, np.isfinite(values)):
        return True
    off, size = np.abs(values[finite] - wide[finite]), np.abs(wide[finite])
    bound = np.longdouble(precision.bound or 0)
    with np.errstate(under="ignore"):  # of mean squares, a rounding more than the code's own
        match precision.method:
            case "relative":
                return bool((off > bound * size).any())
            case "float16":
                return bool((off > np.maximum(size / 2**11, np.exp2(-25.0))).any())
            case "bfloat16":
                return bool((off > np.maximum(size / 2**8, np.exp2(np.longdouble(-134)))).any())
            case "int8":
                limit = np.abs(wide).max(1, initial=0, keepdims=True) / 252
                return bool((np.abs(values - wide) > limit).any())
            case "mse":
                return bool((off**2).sum() > bound * off.size * (1 + 1e-12))
            case "nmse":
                return bool((off**2).sum() > bound * (size**2).sum() * (1 + 1e-12))
    raise AssertionError


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def check(precision: Precision, rows: NDArray[Any]) -> bool:
    """Hold what becomes of rows to the promise; give whether they were kept whole."""
    with np.errstate(under="ignore"):
        if not precision.coded:
            found, errors = precision.rounded(rows)
            assert found.dtype == rows.dtype
            assert same_bits(found[~np.isfinite(rows)], rows[~np.isfinite(rows)])
        else:
            codes = precision.quantised(rows)
            if codes is None:
                return True
            assert codes.codes.dtype == precision.code_dtype
            found = decoded(codes.codes, codes.scale, precision.decoded_dtype(rows.dtype))
            errors = codes.errors
            gone = np.isnan(rows).all(1)
            assert not codes.codes[gone].any()
            assert codes.codes[~gone].all()
    assert not breaks(precision, rows, found)
    finite = np.isfinite(rows)
    off = np.abs(found[finite].astype(np.float64) - rows[finite].astype(np.float64))
    assert errors.elements == finite.sum()
    assert errors.largest == off.max(initial=0)
    assert np.isclose(errors.absolute_error, off.sum())
    return errors.lossless > 0


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("given_as", [*PLAIN, *CODED])
def test_the_promise_holds(given_as: str, dtype: str, kind: str) -> None:
    precision = Precision.parse(given_as)
    if precision.applies(np.dtype(dtype), (96,)):
        check(precision, rows_of(kind, dtype))


@pytest.mark.parametrize("given_as", [*PLAIN, *CODED])
@given(data=st.data())
def test_the_promise_holds_for_any_floats(given_as: str, data: st.DataObject) -> None:
    precision = Precision.parse(given_as)
    dtype = np.dtype(data.draw(st.sampled_from(FLOATS)))
    shape = data.draw(st.tuples(st.integers(0, 6), st.just(33)))
    elements = arrays.from_dtype(dtype) | arrays.from_dtype(dtype, min_value=-8, max_value=8)
    rows = data.draw(arrays.arrays(dtype, shape, elements=elements, fill=elements))
    if precision.applies(dtype, shape[1:]):
        check(precision, rows)


@pytest.mark.parametrize("kind", ROWS)
def test_a_squared_error_is_kept_by_codes_whatever_the_values(kind: str) -> None:
    for given_as in ("mse=1e-3", "nmse=2e-4"):
        precision = Precision.parse(given_as)
        rows = rows_of(kind)
        out_of_range = given_as == "mse=1e-3" and kind in ("outlier", "spread")
        out_of_range |= kind == "bits"
        too_small = given_as == "nmse=2e-4" and kind == "denormal"
        assert (precision.quantised(rows) is None) == (out_of_range or too_small)


@pytest.mark.parametrize("kept", range(1, 23))
def test_bit_rounding_is_numcodecs_own(kept: int) -> None:
    rows = rows_of("spread")
    found, errors = Precision("relative", 2.0 ** -(kept + 1)).rounded(rows)
    wanted = BitRound(kept).decode(BitRound(kept).encode(rows.copy()))
    assert same_bits(found, np.asarray(wanted).view("f4").reshape(rows.shape))
    assert errors.lossless == 0
    assert errors.nmse < 4.0 ** -(kept + 1)


def test_numbers_that_rounding_would_break_stay_while_their_neighbours_are_rounded() -> None:
    odd = [np.nan, np.inf, -np.inf, np.finfo("f4").max, 1e-45, -2e-40, 0.0, -0.0]
    rows = np.array([[*odd, 1.1]], np.float32)
    found, _ = Precision.parse("relative=0.1").rounded(rows)
    assert same_bits(found[0, :8], rows[0, :8])
    assert found[0, 8] == np.float32(1.125)


def test_a_chunk_that_float16_can_not_hold_is_whole() -> None:
    rows = rows_of("normal")
    rows[0, 0] = 65520.0
    found, errors = Precision("float16").rounded(rows)
    assert found is rows
    assert errors.lossless == rows.size
    assert Precision("bfloat16").rounded(rows)[1].lossless == 0


def test_bfloat16_is_ml_dtypes_own() -> None:
    rows = rows_of("spread")
    assert same_bits(
        Precision("bfloat16").rounded(rows)[0], rows.astype(ml_dtypes.bfloat16).astype("f4")
    )


@pytest.mark.parametrize("given_as", ["nmse=2e-4", "int8", "mse=1e-3"])
def test_rows_of_nan_alone_have_no_code_and_one_nan_keeps_a_chunk(given_as: str) -> None:
    precision = Precision.parse(given_as)
    rows = rows_of("normal")
    rows[[3, 9]] = np.nan
    codes = precision.quantised(rows)
    assert codes is not None
    found = decoded(codes.codes, codes.scale, "f4")
    assert np.isnan(found[[3, 9]]).all()
    assert np.isfinite(np.delete(found, [3, 9], 0)).all()
    for odd in (np.nan, np.inf):
        rows[5, 5] = odd
        assert precision.quantised(rows) is None


def test_the_step_of_a_row_is_its_own() -> None:
    rows = rows_of("normal") * np.logspace(-6, 6, 40, dtype="f4")[:, np.newaxis]
    codes = Precision.parse("nmse=2e-4").quantised(rows)
    assert codes is not None
    off = decoded(codes.codes, codes.scale, "f4") - rows
    assert ((off**2).mean(1) / (rows**2).mean(1) < 4e-4).all()
    assert not np.any(codes.scale.view(np.uint32) & 0xFFFF)


def test_values_of_codes_are_their_distance_from_the_middle_times_the_scale() -> None:
    codes = np.array([[32896, 32895, 65535], [0, 0, 0], [1, 32896, 32898]], np.uint16)
    found = decoded(codes, np.array([0.5, np.nan, 2], np.float32), np.float64)
    wanted = [[0, -0.5, 16319.5], [np.nan] * 3, [-65790, 0, 4]]
    assert np.array_equal(found, wanted, equal_nan=True)
    small = decoded(np.array([[128, 1, 255]], np.uint8), np.array([3], np.float32), np.float32)
    assert small.tolist() == [[0, -381, 381]]


def test_errors_add_up_as_if_of_one() -> None:
    rows = rows_of("spread")
    precision = Precision.parse("nmse=0.01")
    found = precision.quantised(rows)
    assert found is not None
    values = decoded(found.codes, found.scale, "f4")
    whole, parts = precision.checked(rows, values), Errors()
    for at in range(0, 40, 7):
        parts += precision.checked(rows[at : at + 7], values[at : at + 7])
    assert whole.said() == pytest.approx(parts.said())
    off = values.astype("f8") - rows
    assert whole.mse == pytest.approx((off**2).mean())
    assert whole.nmse == pytest.approx((off**2).sum() / (rows.astype("f8") ** 2).sum())
    assert whole.said()["mean_error"] == pytest.approx(np.abs(off).mean())


def test_what_a_precision_applies_to() -> None:
    single = np.dtype("f4")
    assert Precision("int8").applies(single, (4, 8))
    assert not Precision("int8").applies(single, (31,))  # a scale would cost more than it saves
    assert Precision("mse", 0.1).applies(single, ())
    assert not Precision("float16").applies(np.dtype("f2"), (64,))
    for other in ("i4", "u1", "?", "c8"):
        assert not Precision("bfloat16").applies(np.dtype(other), (64,))
    assert Precision("int8").decoded_dtype(np.dtype("f2")) == single
    assert Precision("bfloat16").decoded_dtype(np.dtype("f2")) == np.dtype("f2")


@pytest.mark.parametrize("given_as", [*PLAIN, *CODED])
def test_a_precision_is_read_as_it_is_written(given_as: str) -> None:
    precision = Precision.parse(given_as)
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse(precision) is precision
    assert actstore.Precision is Precision


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("int4", "precision must be one of relative=…, float16, .*; got 'int4'"),
        ("relative", "takes a bound over 0 and under 1"),
        ("relative=0", "takes a bound over 0 and under 1"),
        ("nmse=1.0", "got 1.0"),
        ("nmse=nan", "got nan"),
        ("mse=1e-80", "over 1e-60"),
        ("mse=much", "the bound of precision 'mse=much' is no number"),
        ("int8=3", "'int8' takes no bound; got 3.0"),
        (8, "a precision is a str such as 'relative=0.01', or a Precision; got 8"),
    ],
)
def test_what_is_no_precision_is_refused_by_name(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Precision.parse(wrong)


def test_rows_without_codes_decode_to_nan() -> None:
    none = Codes.none((3, 4), np.dtype("u1"))
    assert np.isnan(decoded(none.codes, none.scale, "f4")).all()
    assert none.errors == Errors()
