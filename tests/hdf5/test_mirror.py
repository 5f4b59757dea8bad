"""What an archive's metadata becomes in HDF5: dimensions by scope, attributes, escaped text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import ArchiveError, FormatError
from actstore.hdf5 import mirror


def said(shape: list[int], dims: list[str], **others: Any) -> dict[str, Any]:
    return {
        "node_type": "array",
        "shape": shape,
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4] * len(shape)}},
        "codecs": [{"name": "bytes"}],
        "fill_value": "NaN",
        "dimension_names": dims,
        "attributes": {},
    } | others


def arrays(**given: dict[str, Any]) -> dict[str, mirror.Array]:
    nodes = {name.replace("__", "/"): one for name, one in given.items()}
    return mirror.arrays({"consolidated_metadata": {"metadata": nodes}})


def test_a_dimension_is_of_the_nearest_group_that_has_it_with_that_length() -> None:
    found = arrays(
        layer=said([3], ["layer"]),
        resid=said([3, 9], ["layer", "token"]),
        tokens__time=said([5], ["recorded"]),
        passes__index=said([4], ["token"]),
        statistics__mean=said([3], ["layer"]),
        statistics__deep__mean=said([3, 9, 2], ["layer", "token", "bin"]),
    )
    assert mirror.dimensions(found) == {
        "layer": (3, True),
        "token": (9, False),
        "tokens/recorded": (5, False),
        "passes/token": (4, False),
        "statistics/deep/bin": (2, False),
    }


def test_a_scalar_has_no_names_of_dimensions_as_zarr_writes_it() -> None:
    scalar = said([], [])
    del scalar["dimension_names"]
    found = arrays(statistics__summary__norm=scalar)
    assert found["statistics/summary/norm"].dims == ()


@pytest.mark.parametrize(
    "given",
    [
        {"layer": said([3, 2], ["layer", "token"])},
        {"layer": said([3], ["other"]), "resid": said([3], ["layer"])},
        {"one": said([3], ["x"]), "other": said([4], ["x"])},
        {"one": said([3, 4], ["x", "x"])},
    ],
)
def test_a_name_of_two_things_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ArchiveError, match="scale"):
        mirror.dimensions(arrays(**given))


def test_attributes_are_what_netcdf_has_types_for_and_json_else() -> None:
    found = mirror.attributes_of(
        {
            "text": "é",
            "empty": "",
            "nul": "a\0b",
            "whole": 3,
            "large": 1 << 70,
            "real": 0.5,
            "flag": True,
            "nothing": None,
            "names": ["a", "日本", ""],
            "wholes": [1, 2],
            "reals": [0.5, -1.0],
            "mixed": [1, "a"],
            "none": [],
            "many": ["a"] * 5000,
            "table": {"a": [1]},
            "CLASS": "taken",
        }
    )
    wanted = {
        "text": "é",
        "empty": "",
        "nul": '"a\\u0000b"',
        "whole": 3,
        "large": str(1 << 70),
        "real": 0.5,
        "flag": "true",
        "nothing": "null",
        "names": ["a", "日本", ""],
        "wholes": [1, 2],
        "reals": [0.5, -1.0],
        "mixed": '[1, "a"]',
        "none": "[]",
        "table": '{"a": [1]}',
    }
    assert found.pop("many").startswith('["a", "a"')
    assert {name: np.asarray(one).tolist() for name, one in found.items()} == wanted
    assert found["whole"].dtype == np.int64
    assert found["reals"].dtype == np.float64


def test_bools_fills_and_codes_have_the_attributes_that_xarray_reads() -> None:
    sharded = {
        "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [4]}}],
    }
    found = arrays(
        flag=said([3], ["token"], data_type="bool", fill_value=False),
        value=said([3], ["token"], **sharded),
        code=said([3], ["token"], data_type="uint16", fill_value=0, **sharded)
        | {"attributes": {"_FillValue": 65535, "scale_factor": 0.25, "add_offset": -1.0}},
    )
    made = {name: mirror.attributes_of(one.attributes, one) for name, one in found.items()}
    assert made["flag"] == {"dtype": "bool"}
    assert found["flag"].stored == np.int8
    assert math.isnan(made["value"]["_FillValue"])
    assert made["value"]["_FillValue"].dtype == np.float32
    assert made["code"]["_FillValue"] == 65535
    assert made["code"]["_FillValue"].dtype == np.uint16


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\\0"))))
def test_text_with_nul_is_escaped_and_comes_back(texts: list[str]) -> None:
    written = mirror.escaped(texts)
    assert not any("\0" in one for one in written)
    assert mirror.unescaped(written) == texts


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-1]},
        {"shape": [3, 4]},
        {"shape": "3"},
        {"shape": [1 << 70]},
        {"shape": [True]},
        {"data_type": "float128"},
        {"data_type": "O"},
        {"data_type": {"name": "numpy.datetime64"}},
        {"data_type": 3},
        {"fill_value": "x"},
        {"fill_value": {}},
        {"data_type": "int8", "fill_value": 1 << 70},
        {"dimension_names": None},
        {"dimension_names": ["a/b"]},
        {"dimension_names": [""]},
        {"dimension_names": [".."]},
        {"codecs": []},
        {"codecs": [{"name": "sharding_indexed"}]},
        {"chunk_grid": {"configuration": {"chunk_shape": [0]}}},
        {"attributes": []},
    ],
)
def test_metadata_that_describe_no_array_of_an_archive_are_refused(change: Any) -> None:
    with pytest.raises(FormatError, match="'x'"):
        arrays(x=said([3], ["token"]) | change)


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/..", "./a", "_actstore/a", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="can't be in it"):
        arrays(**{name: said([3], ["token"])})
