"""Rows go to other tools with their labels, and those tools read the values that the log has.

The oracle is what was put into the log. SAELens itself reads an exported folder where it is
installed (``test_saelens_reads_it``: SAELens 6.54.12, by hand); here Hugging Face datasets does,
as SAELens would.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis, decoder_log, random_values

FILES = Path(__file__).parent / "files"


@pytest.fixture
def log(tmp_path: Path) -> LogBuilder:
    return decoder_log(tmp_path / "a.stream")


def rows_of(log: LogBuilder, layer: str) -> NDArray[Any]:
    """Give all rows of a layer, [rows, width], in the order of a dataset."""
    fired = [one.values for one in log.fired if one.layer == layer]
    return np.concatenate([one.reshape(-1, one.shape[-1]) for one in fired])


def widened(values: NDArray[Any]) -> NDArray[Any]:
    """Give bfloat16 as float32, by its bits."""
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(params=["log", "archive"])
def source(request: pytest.FixtureRequest, log: LogBuilder, tmp_path: Path) -> Path:
    if request.param == "log":
        return log.path
    return actstore.compact(log.path, tmp_path / "a.zarr").path


def test_parquet_has_a_column_for_each_label_and_layer(
    source: Path, log: LogBuilder, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    made = actstore.export_rows(source, tmp_path / "rows.parquet")
    table = parquet.read_table(made.path)
    assert made.rows == table.num_rows == 18
    with actstore.open_dataset(source, chunks=None) as dataset:
        labels = dataset.actstore.table()
        assert set(made.layers) == set(dataset.actstore.layers)
    for label in labels:
        assert table[label].to_pylist() == labels[label].tolist(), label
    for layer in made.layers:
        wanted = widened(rows_of(log, layer))
        column = table[layer].combine_chunks()
        assert column.type.list_size == wanted.shape[1]
        assert np.asarray(column.flatten()).tobytes() == wanted.tobytes(), layer
    group = parquet.ParquetFile(made.path).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    for column in columns:
        assert column.compression == "ZSTD"
        values = column.path_in_schema.endswith(".list.element")
        assert ("BYTE_STREAM_SPLIT" in column.encodings) == values


def test_parquet_is_written_in_row_groups_within_the_memory(
    log: LogBuilder, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    made = actstore.export_rows(log.path, tmp_path / "rows.parquet", max_memory_gb=1e-6)
    file = parquet.ParquetFile(made.path)
    assert file.num_row_groups > 3
    found = np.asarray(file.read()["lm_head"].combine_chunks().flatten())
    assert found.tobytes() == widened(rows_of(log, "lm_head")).tobytes()


def test_safetensors_hold_the_dtype_of_the_model_exactly(
    source: Path, log: LogBuilder, tmp_path: Path
) -> None:
    library = pytest.importorskip("safetensors")
    made = actstore.export_rows(source, tmp_path / "rows.safetensors", max_memory_gb=1e-6)
    with library.safe_open(made.path, "numpy") as file:
        for layer in made.layers:
            wanted = rows_of(log, layer)
            found = file.get_tensor(layer)
            assert found.dtype == wanted.dtype == ml_dtypes.bfloat16
            assert found.tobytes() == wanted.tobytes(), layer
        with actstore.open_dataset(source, chunks=None) as dataset:
            assert file.get_tensor("token_id").tolist() == dataset.token_id.values.tolist()
            assert file.get_tensor("step").tolist() == dataset.step.values.tolist()
            texts = dataset.token_text.values.tolist()
        raw = file.get_tensor("token_text_bytes").tobytes()
        offsets = file.get_tensor("token_text_offsets").tolist()
        found = [raw[start:end].decode() for start, end in pairwise(offsets)]
        assert found == texts
        said = json.loads(file.metadata()["actstore.layers"])
        assert said["model.layers.1"]["source_dtype"] == "bfloat16"


def test_labels_are_read_some_at_a_time(
    log: LogBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    whole = actstore.export_rows(log.path, tmp_path / "whole.safetensors").path
    monkeypatch.setattr("actstore.bridges.exporting._MOST_ROWS", 5)
    pieces = actstore.export_rows(log.path, tmp_path / "pieces.safetensors").path
    assert pieces.read_bytes() == whole.read_bytes()


def test_torch_reads_the_safetensors(log: LogBuilder, tmp_path: Path) -> None:
    torch, library = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    made = actstore.export_rows(log.path, tmp_path / "rows.safetensors", layers="model.norm")
    found = library.load_file(made.path)
    assert found["model.norm"].dtype == torch.bfloat16
    raw = found["model.norm"].view(torch.uint8).numpy().tobytes()
    assert raw == rows_of(log, "model.norm").tobytes()


def test_safetensors_that_were_exported_are_imported_again(
    log: LogBuilder, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    file = actstore.export_rows(log.path, tmp_path / "rows.safetensors").path
    made = actstore.import_activations(file, tmp_path / "again.stream")
    with (
        actstore.open_dataset(log.path, chunks=None) as first,
        actstore.open_dataset(made.path, chunks=None) as again,
    ):
        for name in ("resid", "mlp", "logits", "embed", "final_norm"):
            assert again[name].values.tobytes() == first[name].values.tobytes()
            assert again[name].attrs["source_dtype"] == "bfloat16"
        for name in ("token_id", "position", "is_padding"):
            assert again[name].values.tolist() == first[name].values.tolist()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "float64", "int16", "bool"])
def test_other_dtypes_stay_what_they_are_in_safetensors(dtype: str, tmp_path: Path) -> None:
    torch, library = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    log = LogBuilder(tmp_path / "a.stream")
    log.layer("model.layers.0.mlp", "mlp", 0)
    log.begin(axis(2, 3))
    # as many values as there are; of NaNs there is more than one, and float32 holds one of them
    values = random_values((2, 3, 4), dtype)
    values[np.isnan(values.astype("f8"))] = 0
    log.put("model.layers.0.mlp", values)
    made = actstore.export_rows(log.close(), tmp_path / "rows.safetensors")
    found = library.load_file(made.path)["model.layers.0.mlp"]
    assert str(found.dtype) == f"torch.{dtype}"
    assert found.view(torch.uint8).numpy().tobytes() == values.tobytes()


def partial_log(path: Path) -> LogBuilder:
    """Write a log of two passes, of which one layer has the second alone."""
    log = LogBuilder(path)
    log.layer("model.layers.0", "resid", 0)
    log.layer("model.layers.1", "resid", 1)
    for number in range(2):
        mask = [[False, True, True], [True, True, True]]
        log.begin(axis(2, 3, mask=mask))
        log.put("model.layers.0", np.full((2, 3, 4), number + 1.0, "f4"))
        if number:
            log.put("model.layers.1", np.full((2, 3, 4), 7.0, "f4"))
    log.close()
    return log


def test_rows_that_a_layer_does_not_have_are_told(tmp_path: Path) -> None:
    parquet, library = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("safetensors")
    log = partial_log(tmp_path / "a.stream").path
    for source in (log, actstore.compact(log, tmp_path / "a.zarr").path):
        rows = actstore.export_rows(source, tmp_path / f"{source.name}.parquet").path
        column = parquet.read_table(rows)["model.layers.1"]
        assert column.to_pylist() == [None] * 6 + [[7.0] * 4] * 6
        rows = actstore.export_rows(source, tmp_path / f"{source.name}.safetensors").path
        with library.safe_open(rows, "numpy") as file:
            assert file.get_tensor("model.layers.1.present").tolist() == [False] * 6 + [True] * 6
            assert np.isnan(file.get_tensor("model.layers.1")[:6]).all()
            assert "model.layers.0.present" not in file.keys()  # noqa: SIM118 - no mapping


# -- SAELens ------------------------------------------------------------------------------------


def test_a_folder_has_the_files_and_the_schema_of_saelens(tmp_path: Path) -> None:
    """Import what SAELens cached, export it, and compare with what SAELens cached."""
    arrow = pytest.importorskip("pyarrow")
    made = actstore.import_activations(FILES / "saelens", tmp_path / "a.stream")
    folder = actstore.export_rows(made.path, tmp_path / "cached").path
    name = "data-00000-of-00001.arrow"
    assert sorted(one.name for one in folder.iterdir()) == [
        name,
        "dataset_info.json",
        "state.json",
    ]
    theirs = FILES / "saelens"
    for one in ("dataset_info.json", "state.json"):
        mine, other = (json.loads((place / one).read_text()) for place in (folder, theirs))
        assert mine.keys() == other.keys()
    info = json.loads((folder / "dataset_info.json").read_text())["features"]
    assert info["blocks.1.hook_resid_pre"] == {
        "shape": [6, 8],
        "dtype": "float32",
        "_type": "Array2D",
    }
    schema = arrow.ipc.open_stream(folder / name).schema
    wanted = arrow.ipc.open_stream(theirs / "data-00000-of-00002.arrow").schema
    assert schema.equals(wanted)
    for one in schema.names:
        assert schema.field(one).metadata == wanted.field(one).metadata


def test_datasets_reads_the_sequences(source: Path, log: LogBuilder, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    layers = ["model.layers.1", "model.layers.2.mlp", "lm_head"]
    made = actstore.export_rows(
        source, tmp_path / "cached", layers=layers, context_size=2, names={"lm_head": "logits"}
    )
    assert made.layers == {
        "model.layers.1": "blocks.1.hook_resid_post",
        "model.layers.2.mlp": "blocks.2.hook_mlp_out",
        "lm_head": "logits",
    }
    # of two prompts of five tokens two contexts each; decoded tokens are sequences of one
    assert (made.rows, made.left_out) == (8, 10)
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    for layer, hook in made.layers.items():
        found = datasets.load_from_disk(str(made.path / hook)).with_format("numpy")
        wanted = widened(rows_of(log, layer))[kept]
        values = np.asarray(found[:][hook])
        assert values.shape == (4, 2, wanted.shape[1])
        assert values.astype("f4").tobytes() == wanted.tobytes()
        assert np.asarray(found[:]["token_ids"]).ravel().tolist() == [100 + one for one in kept]


def test_saelens_reads_it(log: LogBuilder, tmp_path: Path) -> None:
    store = pytest.importorskip("sae_lens.training.activations_store")
    torch = pytest.importorskip("torch")
    made = actstore.export_rows(
        log.path, tmp_path / "cached", layers="model.layers.1", context_size=5
    )
    reader = store.ActivationsStore(
        model=mock.Mock(),
        dataset=None,
        streaming=False,
        hook_name=made.layers["model.layers.1"],
        hook_head_index=None,
        context_size=5,
        d_in=8,
        n_batches_in_buffer=2,
        total_training_tokens=100,
        store_batch_size_prompts=2,
        train_batch_size_tokens=4,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(made.path),
    )
    values, ids = reader.get_raw_llm_batch()
    assert values.numpy().tobytes() == widened(rows_of(log, "model.layers.1"))[:10].tobytes()
    assert ids.tolist() == [*range(100, 110)]


def test_padding_and_missing_rows_are_no_context(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    log = partial_log(tmp_path / "a.stream").path
    made = actstore.export_rows(log, tmp_path / "one", layers="model.layers.1", context_size=2)
    assert (made.rows, made.left_out) == (4, 8)
    again = actstore.import_activations(made.path, tmp_path / "again.stream")
    with actstore.open_dataset(again.path, chunks=None) as found:
        assert found.token_id.values.tolist() == [101, 102, 103, 104]
        assert (found.resid.values == 7).all()
    with pytest.raises(ConfigError, match="2, 3 rows"):
        actstore.export_rows(log, tmp_path / "two", layers="model.layers.0")
    with pytest.raises(ConfigError, match="no sequence has 4 rows"):
        actstore.export_rows(log, tmp_path / "two", layers="model.layers.0", context_size=4)


def test_of_two_token_axes_one_is_exported(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    log = LogBuilder(tmp_path / "a.stream")
    log.layer("encoder.block.0", "encoder_resid", 0)
    log.layer("decoder.block.0", "decoder_resid", 0)
    log.begin(axis(2, 4, name="encoder_token"), axis(2, 3, name="decoder_token"))
    log.put("encoder.block.0", random_values((2, 4, 8), seed=1))
    log.put("decoder.block.0", random_values((2, 3, 8), seed=2))
    log.layer("shared", "embed")  # has rows on both
    log.put("shared", random_values((2, 4, 8), seed=3))
    log.put("shared", random_values((2, 3, 8), seed=4), call=1)
    log.close()
    rows = tmp_path / "rows.parquet"
    with pytest.raises(ConfigError, match="dim must be"):
        actstore.export_rows(log.path, rows)
    made = actstore.export_rows(log.path, rows, dim="decoder_token")
    assert set(made.layers) == {"decoder.block.0", "shared"}
    table = parquet.read_table(rows)
    for layer in made.layers:
        found = np.asarray(table[layer].combine_chunks().flatten())
        assert found.tobytes() == rows_of(log, layer)[-6:].tobytes(), layer
    cached = actstore.export_rows(
        log.path, tmp_path / "cached", dim="encoder_token", layers="encoder.block.0"
    )
    again = actstore.import_activations(cached.path, tmp_path / "again.stream")
    with actstore.open_dataset(again.path, chunks=None) as dataset:
        assert dataset.token_id.values.tolist() == [*range(100, 108)]


# -- what is asked for --------------------------------------------------------------------------


def test_rows_that_were_chosen_are_exported(source: Path, log: LogBuilder, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with actstore.open_dataset(source) as dataset:
        rows = dataset.actstore.sequence(pass_index=0, item=1)
        made = actstore.export_rows(
            rows, tmp_path / "rows.parquet", layers=["blocks.1.hook_resid_post", "lm_head"]
        )
    table = parquet.read_table(made.path)
    found = np.asarray(table["model.layers.1"].combine_chunks().flatten())
    assert found.tobytes() == widened(rows_of(log, "model.layers.1"))[5:10].tobytes()
    assert table["batch_item"].to_pylist() == [1] * 5


def test_what_was_made_at_a_precision_is_not_called_exact(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors")
    log = LogBuilder(tmp_path / "a.stream")
    log.layer("model.layers.0", "resid", 0)
    log.begin(axis(1, 64))
    values = np.random.default_rng(0).normal(size=(1, 64, 128)).astype(ml_dtypes.bfloat16)
    log.put("model.layers.0", values)
    small = actstore.compact(log.close(), tmp_path / "a.zarr", precision="nmse=1e-3").path
    made = actstore.export_rows(small, tmp_path / "rows.safetensors")
    with actstore.open_dataset(small, chunks=None) as dataset:
        wanted = dataset.resid.values
    with library.safe_open(made.path, "numpy") as file:
        found = file.get_tensor("model.layers.0")
    assert found.dtype == np.float32
    assert found.tobytes() == wanted.tobytes()


def test_values_that_were_computed_with_are_not_called_exact(
    log: LogBuilder, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    with actstore.open_dataset(log.path, chunks=None) as dataset:
        changed = dataset.assign(
            resid=(dataset.resid.fillna(0) * 1.01).assign_attrs(dataset.resid.attrs)
        )
        with pytest.raises(ConfigError, match="source_dtype"):
            actstore.export_rows(changed, tmp_path / "rows.safetensors", layers="model.layers.1")


def test_what_can_not_be_honoured_is_refused_and_nothing_is_left(
    log: LogBuilder, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    before = sorted(path.name for path in tmp_path.iterdir())
    rows = tmp_path / "rows.parquet"
    for target, options, said in (
        (tmp_path / "rows.csv", {}, "must end with"),
        (rows, {"format": "csv"}, "must end with"),
        (rows, {"layers": "model.layers.9"}, "no layer"),
        (rows, {"layers": []}, "no layer"),
        (rows, {"names": {"model.layers.9": "x"}}, "'model.layers.9'"),
        (rows, {"names": {"lm_head": "step"}}, "'step'"),
        (rows, {"context_size": 2}, "context_size"),
        (rows, {"dim": "feature"}, "dim must be"),
        (tmp_path / "none" / "rows.parquet", {}, "no folder"),
        (tmp_path / "a.stream", {"format": "parquet"}, "exists"),
        (tmp_path / "cached", {"context_size": 0}, "context_size"),
        (tmp_path / "cached", {"context_size": 2, "names": {"lm_head": "a/b"}}, "name a folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            actstore.export_rows(log.path, target, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "missing"), [("a.parquet", "pyarrow"), ("a.safetensors", "safetensors")]
)
def test_a_package_that_is_not_there_is_named(
    name: str, missing: str, log: LogBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=f"pip install 'actstore\\[.*{missing[-5:]}|arrow"):
        actstore.export_rows(log.path, tmp_path / name)
