"""`dataset.actstore` chooses rows and layers as masks over the loaded dataset do, and lazily."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import analysis, plots
from actstore.archive import grid
from actstore.archive.reading import ShardedRows
from actstore.errors import ConfigError
from actstore.stream.reader import StreamReader

sys.path.insert(0, str(Path(__file__).parent / "archive"))
sys.path.insert(0, str(Path(__file__).parent / "capture"))
from logs import LogBuilder, axis, decoder_log, random_values
from tiny_models import build, token_ids

Opener = Callable[[Path], xr.Dataset]

OPENERS: dict[str, Opener] = {
    "auto": actstore.open_dataset,
    "lazy": lambda path: actstore.open_dataset(path, None),
    "few": lambda path: actstore.open_dataset(path, 3),
    "xarray": lambda path: xr.open_dataset(path, engine="actstore"),
}


def padded_log(path: Path) -> Path:
    """Write a log with padding on either side, annotations, steps, aliases and ragged outputs."""
    log = LogBuilder(path)
    texts = {100: "Paris", 101: " Paris", 102: " is", 103: "  Paris", 104: "", 105: "\n"}
    log.texts(texts)
    for block in (0, 2):
        log.layer(f"h.{block}", "resid", block)
        log.layer(f"h.{block}.mlp", "mlp", block)
        log.layer(f"h.{block}.mlp.down", "h.mlp.down", block)
    log.layer("h.2.attn", "attn", 2)
    log.layer("norm", "final_norm")
    log.layer("model", "model")
    log.layer("", "output")
    log.layer("loose", "loose")
    masks = ([[0, 0, 1, 1], [1, 1, 1, 0]], [[1], [1]], [[1, 1], [0, 0]], [[1], [1]])
    for number, mask in enumerate(masks):
        rows = np.array(mask).shape
        labels = {"sample_id": ["s0", "s1"]} if number != 2 else {"score": [0.5, None]}
        log.begin(axis(*rows, start=number, mask=np.array(mask, bool)), annotations=labels)
        for block in (0, 2):
            seed = 100 * number + 10 * block
            mlp = random_values((*rows, 6), "bfloat16", seed=seed)
            log.put(f"h.{block}.mlp.down", mlp, alias_of=log.put(f"h.{block}.mlp", mlp))
            log.put(f"h.{block}", random_values((*rows, 6), "bfloat16", seed=seed + 1))
            if block and number != 1:
                log.put("h.2.attn", random_values((*rows, 6), seed=seed + 2))
        log.put("h.2", random_values((*rows, 6), "bfloat16", seed=seed + 3), call=1)
        normed = random_values((*rows, 6), seed=seed + 4)
        log.put("model", normed, alias_of=log.put("norm", normed))
        log.put("", random_values((*rows, 3), seed=seed + 5))
        log.put("loose", random_values((number, 5), seed=seed + 6))
        if number % 2:
            for item in (0, 1):
                log.token(7 + item, f"tok{item}")
    return log.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    log = padded_log(tmp_path_factory.mktemp("rows") / "run.stream")
    return {"log": log, "archive": actstore.compact(log, log.with_suffix(".zarr")).path}


@pytest.fixture(scope="module")
def whole(places: dict[str, Path]) -> xr.Dataset:
    """Give all that a dataset holds, loaded: what the oracles mask."""
    with actstore.open_dataset(places["log"], None) as opened:
        return opened.load()


@pytest.fixture(params=["log", "archive"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(OPENERS))
def dataset(request: pytest.FixtureRequest, places: dict[str, Path], kind: str) -> Any:
    with OPENERS[request.param](places[kind]) as opened:
        yield opened


def assert_rows(found: xr.Dataset, whole: xr.Dataset, rows: Any, dim: str = "token") -> None:
    """Compare a dataset with rows of the loaded one, down to dtypes, bits and attributes."""
    wanted = whole.isel({dim: np.asarray(rows, np.int64)})
    assert set(found.variables) == set(wanted.variables)
    assert set(found.coords) == set(wanted.coords)
    for name, variable in wanted.variables.items():
        one = found.variables[name]
        assert one.dims == variable.dims, name
        assert one.dtype == variable.dtype, name
        assert one.attrs == variable.attrs, name
        np.testing.assert_array_equal(one.values, variable.values, str(name))


def where(mask: Any) -> Any:
    return np.flatnonzero(np.asarray(mask))


# -- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "texts", "ids"),
    [
        ("Paris", ["Paris", " Paris"], []),
        (" Paris", [" Paris"], []),
        ("  Paris", ["  Paris"], []),
        ("", [""], []),
        ("\n", ["\n"], []),
        ("aris", [], []),
        (101, [], [101]),
        (np.int32(101), [], [101]),
        ([100, "is"], [" is"], [100]),
        (("Paris", "is"), ["Paris", " Paris", " is"], []),
        (np.array([100, 102]), [], [100, 102]),
        (torch.tensor([[100, 102]])[0], [], [100, 102]),
        ([], [], []),
        (-1, [], []),
    ],
)
def test_tokens_are_rows_whose_input_has_that_text_or_id(
    dataset: xr.Dataset, whole: xr.Dataset, wanted: Any, texts: list[str], ids: list[int]
) -> None:
    rows = [
        row
        for row, (text, number) in enumerate(
            zip(whole.token_text.values.tolist(), whole.token_id.values.tolist(), strict=True)
        )
        if text in texts or number in ids
    ]
    assert_rows(dataset.actstore.tokens(wanted), whole, rows)


@pytest.mark.parametrize("wanted", [None, True, 1.5, [None], b"Paris", ["Paris", [1]]])
def test_what_is_no_token_is_refused(dataset: xr.Dataset, wanted: Any) -> None:
    with pytest.raises(ConfigError, match="a token is a text, or an integer"):
        dataset.actstore.tokens(wanted)


@pytest.mark.parametrize(
    ("selection", "steps"),
    [
        (None, [0, 1, 2, 3]),
        (2, [2]),
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [2, 3]),
        ([3, 0], [0, 3]),
        (np.array([1]), [1]),
        (range(2), [0, 1]),
        ([-1, 99], []),
        ([], []),
    ],
)
def test_steps_are_the_rows_that_predicted_them_in_order(
    dataset: xr.Dataset, whole: xr.Dataset, selection: Any, steps: list[int]
) -> None:
    rows = [int(where(whole.step == step)[0]) for step in steps]
    assert_rows(dataset.actstore.steps(selection), whole, rows)


def test_steps_come_in_order_also_where_rows_do_not(whole: xr.Dataset) -> None:
    turned = whole.isel(token=slice(None, None, -1))
    assert turned.actstore.steps().step.values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("selection", ["first", 1.5, [0.5], True])
def test_a_selection_of_steps_that_is_none_is_refused(whole: xr.Dataset, selection: Any) -> None:
    with pytest.raises(ConfigError, match="an integer, a slice or integers"):
        whole.actstore.steps(selection)


def test_last_positions_are_the_last_rows_that_are_no_padding(
    dataset: xr.Dataset, whole: xr.Dataset
) -> None:
    last: dict[tuple[int, int], int] = {}
    for row in where(~whole.is_padding.values).tolist():
        last[int(whole.pass_index[row]), int(whole.batch_item[row])] = row
    assert list(last.values()) == [3, 6, 8, 9, 11, 14, 15]
    assert_rows(dataset.actstore.last_positions(), whole, list(last.values()))


def test_passes_and_steps_of_several_logs_are_told_apart(tmp_path: Path) -> None:
    logs = [decoder_log(tmp_path / f"{run}.stream", steps=1, run=run).path for run in "ab"]
    joined = actstore.compact(logs, tmp_path / "run.zarr").path
    with actstore.open_dataset(joined) as found:
        whole, rows = found.copy().load(), found.actstore
        assert_rows(rows.last_positions(), whole, [4, 9, 10, 11, 16, 21, 22, 23])
        assert_rows(rows.steps(), whole, [4, 9, 10, 11, 16, 21, 22, 23])
        assert_rows(rows.steps(slice(-1, None)), whole, [11, 23])
        assert_rows(rows.sequence(1, 1, run=1), whole, [23])
        assert_rows(rows.where(run=1).actstore.sequence(1, 1), whole, [23])
        assert "run" in rows.table()
        with pytest.raises(ConfigError, match=r"pass 1 is in each of the runs \[0, 1\]"):
            rows.sequence(1)
        with pytest.raises(ConfigError, match="no rows"):
            rows.sequence(1, run=2)


@pytest.mark.parametrize("layout", ["captured", "shuffled"])
def test_a_sequence_of_datasets_that_were_put_together_is_refused(
    tmp_path: Path, layout: str
) -> None:
    found = []
    for number in range(2):
        log = decoder_log(tmp_path / f"{number}.stream", run=str(number)).path
        archive = actstore.compact(log, tmp_path / f"{number}.zarr", layout=layout).path
        found.append(actstore.open_dataset(archive)[["resid"]])
    both = xr.concat(found, "token", data_vars="minimal", coords="minimal", compat="override")
    with pytest.raises(ConfigError, match=r"other rows stand between.*compact\(\["):
        both.actstore.sequence(0, 1)
    xr.testing.assert_equal(
        both.isel(token=slice(found[0].sizes["token"])).actstore.sequence(0, 1).compute(),
        found[0].actstore.sequence(0, 1).compute(),
    )
    for one in found:
        one.close()


def test_a_sequence_is_all_rows_of_one_item_of_one_pass(
    dataset: xr.Dataset, whole: xr.Dataset
) -> None:
    assert_rows(dataset.actstore.sequence(0), whole, range(4))
    assert_rows(dataset.actstore.sequence(2, 1), whole, [12, 13])
    assert_rows(dataset.actstore.sequence(2, 1, run=0), whole, [12, 13])
    with pytest.raises(ConfigError, match="no rows"):
        dataset.actstore.sequence(2, 1, run=1)
    for wrong in ((4, 0), (0, 2), (-1, 0)):
        with pytest.raises(ConfigError, match="passes 0 to 3"):
            dataset.actstore.sequence(*wrong)


def test_padding_is_dropped(dataset: xr.Dataset, whole: xr.Dataset) -> None:
    assert_rows(dataset.actstore.drop_padding(), whole, where(~whole.is_padding.values))


def test_rows_are_chosen_by_any_label(dataset: xr.Dataset, whole: xr.Dataset) -> None:
    sample, score, position = whole.sample_id.values, whole.score.values, whole.position.values
    choose = dataset.actstore.where
    assert_rows(choose(sample_id="s1"), whole, where(sample == "s1"))
    assert_rows(choose(sample_id=["s0", ""]), whole, where((sample == "s0") | (sample == "")))
    assert_rows(choose(sample_id={"s0"}, batch_item=1), whole, [])
    assert_rows(choose({"sample_id": "s1"}, position=2), whole, [6])
    assert_rows(choose(is_padding=True), whole, where(whole.is_padding))
    assert_rows(choose(score=0.5), whole, where(score == 0.5))
    assert_rows(choose(score=np.nan), whole, where(np.isnan(score)))
    assert_rows(choose(position=lambda place: place >= 2), whole, where(position >= 2))
    assert_rows(
        choose(token_text=lambda text: text.str.endswith("Paris"), pass_index=range(1, 4)),
        whole,
        [row for row in range(8, 16) if str(whole.token_text.values[row]).endswith("Paris")],
    )
    assert_rows(choose(), whole, range(16))
    assert_rows(choose(sample_id=1), whole, [])


def test_a_long_column_is_searched_piece_by_piece(
    dataset: xr.Dataset, whole: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.accessor._PIECE", 3)
    mask = whole.token_text.isin(["Paris", " Paris"]) | (whole.token_id == 102)
    assert mask.any()
    assert_rows(dataset.actstore.tokens(["Paris", 102]), whole, where(mask))
    mask = (whole.pass_index == 2) & (whole.batch_item == 1)
    assert_rows(dataset.actstore.sequence(2, 1), whole, where(mask))


def test_any_coordinate_of_the_rows_is_a_label(whole: xr.Dataset) -> None:
    named = whole.assign_coords({"a b": ("token", np.arange(16) % 5)})
    assert_rows(named.actstore.where({"a b": 3}), named, [3, 8, 13])


def test_a_label_that_there_is_not_is_refused_and_those_near_are_named(
    dataset: xr.Dataset,
) -> None:
    with pytest.raises(ConfigError, match=r"no label 'sample_ids' on 'token'; near are 'sample_i"):
        dataset.actstore.where(sample_ids="s0")
    with pytest.raises(ConfigError, match=r"there are 'pass_index', .*…"):
        dataset.actstore.where(layer=0)


@pytest.mark.parametrize("function", [lambda one: True, lambda one: one[:2] > 0, lambda one: one])
def test_a_function_that_gives_no_bool_for_each_row_is_refused(
    whole: xr.Dataset, function: Any
) -> None:
    with pytest.raises(ConfigError, match="must give a bool for each of its 16 values"):
        whole.actstore.where(position=function)


STEPS: dict[str, tuple[Callable[[Any], xr.Dataset], Callable[[xr.Dataset], Any]]] = {
    "tokens": (
        lambda rows: rows.tokens(["Paris", 102, 103]),
        lambda one: where(np.isin(one.token_id, [100, 101, 102, 103])),
    ),
    "padding": (lambda rows: rows.drop_padding(), lambda one: where(~one.is_padding.values)),
    "items": (lambda rows: rows.where(batch_item=1), lambda one: where(one.batch_item == 1)),
    "passes": (
        lambda rows: rows.where(pass_index=lambda index: index > 0),
        lambda one: where(one.pass_index > 0),
    ),
    "steps": (
        lambda rows: rows.steps(),
        lambda one: [row for step in range(4) for row in where(one.step == step)],
    ),
}


@pytest.mark.parametrize("opener", sorted(OPENERS))
@settings(max_examples=30)
@given(names=st.lists(st.sampled_from(sorted(STEPS)), max_size=4), archive=st.booleans())
def test_choices_follow_each_other(
    places: dict[str, Path],
    whole: xr.Dataset,
    opener: str,
    names: list[str],
    archive: bool,
) -> None:
    with OPENERS[opener](places["archive" if archive else "log"]) as found:
        left = np.arange(16)
        for name in names:
            choose, oracle = STEPS[name]
            found = choose(found.actstore)
            left = left[np.asarray(oracle(whole.isel(token=left)), np.int64)]
        assert_rows(found, whole, left)


def test_of_no_rows_none_can_be_chosen(dataset: xr.Dataset, whole: xr.Dataset) -> None:
    none = dataset.actstore.tokens([])
    for choose in (none.actstore.drop_padding, none.actstore.steps, none.actstore.last_positions):
        assert_rows(choose(), whole, [])
    assert_rows(none.actstore.tokens("Paris"), whole, [])
    assert none.actstore.table().shape == (0, 9)
    assert none.actstore.layer("h.2.mlp").shape == (0, 6)
    with pytest.raises(ConfigError, match="no rows at all"):
        none.actstore.sequence(0)


def test_the_table_has_every_label_of_the_rows(dataset: xr.Dataset, whole: xr.Dataset) -> None:
    table = dataset.actstore.table()
    labels = "pass_index batch_item position token_id token_text is_padding step sample_id score"
    assert table.columns.tolist() == labels.split()
    assert table.index.name == "token"
    assert table.index.tolist() == list(range(16))
    for name in table:
        np.testing.assert_array_equal(table[name].tolist(), whole[name].values.tolist())
    assert table.dtypes["token_id"] == np.int64
    assert table.dtypes["is_padding"] == np.bool_
    chosen = table[table.token_id == 101].index
    assert_rows(dataset.isel(token=chosen), whole, where(whole.token_id == 101))


# -- two token axes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the log of an encoder-decoder, whose embedding is called on both sides."""
    log = LogBuilder(tmp_path_factory.mktemp("both") / "run.stream")
    log.layer("shared", "embed")
    for side in ("encoder", "decoder"):
        for block in range(2):
            log.layer(f"{side}.h.{block}", f"{side}_resid", block)
    for number in range(3):
        mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
        log.begin(
            axis(2, 3, name="encoder_token", mask=mask),
            axis(2, 2, name="decoder_token", start=number),
            annotations={"topic": ["a", "b"]},
        )
        for place, (side, length) in enumerate((("encoder", 3), ("decoder", 2))):
            log.put("shared", random_values((2, length, 4), seed=number + length), call=place)
            for block in range(2):
                values = random_values((2, length, 4), seed=100 * number + 10 * place + block)
                log.put(f"{side}.h.{block}", values)
        log.token(5, "e")
    return log.close()


@pytest.mark.parametrize("opener", sorted(OPENERS))
def test_of_two_token_axes_one_is_chosen(both: Path, opener: str) -> None:
    with OPENERS[opener](both) as found:
        whole = found.copy().load()
        rows, enc, dec = found.actstore, "encoder_token", "decoder_token"
        assert_rows(rows.drop_padding(dim=enc), whole, where(~whole.encoder_is_padding), enc)
        assert_rows(rows.last_positions(dim=enc), whole, [2, 3, 8, 9, 14, 15], enc)
        assert_rows(rows.steps(dim=dec), whole, [1, 5, 9], dec)
        assert_rows(rows.steps(dim=enc), whole, [], enc)
        assert_rows(rows.sequence(1, 1, dim=dec), whole, [6, 7], dec)
        assert_rows(rows.tokens(101, dim=enc), whole, where(whole.encoder_token_id == 101), enc)
        assert_rows(
            rows.where(position=1, dim=dec), whole, where(whole.decoder_position == 1), dec
        )
        chosen = rows.where(encoder_topic="a", decoder_topic="b")
        assert_rows(
            chosen,
            whole.isel(encoder_token=where(whole.encoder_topic == "a")),
            where(whole.decoder_topic == "b"),
            dec,
        )
        assert next(iter(rows.table(dim=dec))) == "decoder_pass_index"


def test_of_two_token_axes_none_is_guessed(both: Path) -> None:
    with actstore.open_dataset(both) as found:
        rows = found.actstore
        for choose in (
            lambda: rows.tokens("e"),
            lambda: rows.steps(),
            lambda: rows.last_positions(),
            lambda: rows.sequence(0),
            lambda: rows.drop_padding(),
            lambda: rows.table(),
            lambda: rows.where(topic="a"),
            lambda: rows.steps(dim="token"),
            lambda: rows.where(topic="a", dim="layer"),
        ):
            with pytest.raises(ConfigError, match="'encoder_token', 'decoder_token'"):
                choose()
        with pytest.raises(ConfigError, match="no label 'decoder_topic' on 'encoder_token'"):
            rows.where(decoder_topic="a", dim="encoder_token")
        with pytest.raises(ConfigError, match="rows on 'encoder_token', 'decoder_token'"):
            rows.layer("shared")
        with pytest.raises(ConfigError, match=r"no layer 'decoder\.h\.1'"):
            rows.layer("decoder.h.1", dim="encoder_token")
        assert rows.layer("decoder.h.1").dims == ("decoder_token", "feature")
        for dim in ("encoder_token", "decoder_token"):
            assert rows.layer("shared", dim=dim).dims[0] == dim
            assert rows.layer("hook_embed", dim=dim).equals(rows.layer("shared", dim=dim))


def test_a_dataset_without_tokens_says_so() -> None:
    other = xr.Dataset({"a": ("x", [1, 2])})
    for choose in (other.actstore.steps, lambda: other.actstore.where(a=1)):
        with pytest.raises(ConfigError, match=r"no token axis.*'x'"):
            choose()


# -- layers -------------------------------------------------------------------------------------


def fired(path: Path, name: str, call: int = 0) -> Any:
    """Give the packets of a layer as rows: by the reader of logs."""
    with actstore.open_stream(path) as reader:
        packets = [one for one in reader.packets(name) if one.call == call]
        return np.concatenate(
            [one.values.reshape(-1, one.shape[-1]).astype(np.float32) for one in packets]
        )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("h.2.mlp", "h.2.mlp"),
        ("h.2", "h.2"),
        ("blocks.2.hook_mlp_out", "h.2.mlp"),
        ("blocks.0.hook_resid_post", "h.0"),
        ("ln_final.hook_normalized", "norm"),
        ("norm", "norm"),
        ("final_norm", "norm"),
        ("model", "norm"),
        ("h.2.mlp.down", "h.2.mlp"),
        ("", ""),
        ("output", ""),
    ],
)
def test_a_layer_is_what_it_returned(
    dataset: xr.Dataset, places: dict[str, Path], name: str, layer: str
) -> None:
    found = dataset.actstore.layer(name)
    assert isinstance(found, xr.DataArray)
    assert found.dims[0] == "token"
    assert "layer" not in found.dims
    assert found.attrs["modules"] == [layer]
    np.testing.assert_array_equal(found.values, fired(places["log"], layer))
    assert found.token_text.values.tolist()[1] == " Paris"
    if layer.startswith("h."):
        assert int(found.layer) == int(layer.split(".")[1])
        assert str(found.module.values) == f"h.{int(found.layer)}"


def test_a_layer_of_chosen_rows(dataset: xr.Dataset, places: dict[str, Path]) -> None:
    found = dataset.actstore.sequence(2, 1).actstore.layer("blocks.0.hook_mlp_out")
    np.testing.assert_array_equal(found.values, fired(places["log"], "h.0.mlp")[12:14])


def test_a_layer_is_found_after_layers_were_chosen(
    dataset: xr.Dataset, places: dict[str, Path]
) -> None:
    wanted = fired(places["log"], "h.2.mlp")
    for chosen in (
        dataset.sel(layer=2),
        dataset.sel(layer=[2]),
        dataset.isel(layer=[1, 0]),
        dataset.isel(layer=slice(None, None, -1)),
    ):
        for name in ("h.2.mlp", "blocks.2.hook_mlp_out", "h.2.mlp.down"):
            np.testing.assert_array_equal(chosen.actstore.layer(name).values, wanted)
    for chosen in (dataset.sel(layer=0), dataset.sel(layer=2, drop=True)):
        assert "h.2.mlp" not in chosen.actstore.layers
        for name in ("h.2.mlp", "blocks.2.hook_mlp_out", "h.2.mlp.down"):
            with pytest.raises(ConfigError, match="no layer"):
                chosen.actstore.layer(name)


def test_layers_lists_those_that_have_rows(dataset: xr.Dataset) -> None:
    assert dataset.actstore.layers == {
        "h.0": "resid",
        "h.2": "resid",
        "h.0.mlp": "mlp",
        "h.2.mlp": "mlp",
        "h.2.attn": "attn",
        "norm": "final_norm",
        "": "output",
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h.2.mpl", r"no layer 'h.2.mpl'; near are 'h.2.mlp'"),
        ("h.0.attn", "near are 'h.2.attn'"),
        ("blocks.0.hook_attn_out", "no layer"),
        ("blocks.1.hook_mlp_out", r"actstore\.layers has all 7"),
        ("blocks.2.hook_resid_pre", "no layer"),
        ("resid", "no layer"),
        ("h.1.mlp.down", "no layer"),
        ("h.*.mlp", "one layer"),
        ("blocks.*.hook_mlp_out", "one layer"),
        ("loose", "no rows of a token axis.*'loose_values'.*loose_offset"),
    ],
)
def test_a_layer_that_there_is_not_is_refused_and_those_near_are_named(
    dataset: xr.Dataset, name: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        dataset.actstore.layer(name)


@pytest.mark.filterwarnings("ignore:.*never fired:actstore.errors.ActstoreWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_every_layer_of_a_model_is_what_it_returned(tmp_path: Path, name: str) -> None:
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, compression_algorithm="zstd"
    )
    framework = actstore.InstrumentationFramework(config)
    ids = token_ids(2, 5)
    fed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fed["attention_mask"][1, :2] = 0
    framework.instrument_model(build(name))
    with torch.no_grad(), framework.capture_activations(str(tmp_path / "run.stream")):
        build(name).generate(**fed, max_new_tokens=3, do_sample=False, pad_token_id=0)
    compacted = actstore.compact(tmp_path / "run.stream", tmp_path / "run.zarr").path
    with (
        actstore.open_stream(tmp_path / "run.stream") as reader,
        actstore.open_dataset(compacted) as found,
    ):
        aliases, checked = found.attrs["aliases"], 0
        for info in reader.layers.values():
            kept = info.name in found.actstore.layers
            if not kept and not (info.site in aliases and "." in info.site):
                continue
            parts = []
            for dim in found.attrs["rows"]:
                with suppress(ConfigError):
                    values = found.actstore.layer(info.name, dim=dim).values
                    missing = np.isnan(values).all(axis=tuple(range(1, values.ndim)))
                    parts.append(values[~missing].ravel())
            packets = [p.values.ravel() for p in reader.packets(info.name) if p.call == 0]
            np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(packets))
            checked += 1
        assert checked > 20


# -- lazy ---------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Give what is read of an archive's arrays: the file, and where in it; None if it is whole."""
    seen: list[tuple[str, Any]] = []
    get, encoded = zarr.storage.LocalStore.get, ShardedRows._encoded

    async def get_seen(self: Any, key: str, prototype: Any, byte_range: Any = None) -> Any:
        seen.append((key, None if byte_range is None else getattr(byte_range, "start", "index")))
        return await get(self, key, prototype, byte_range)

    def encoded_seen(self: ShardedRows, layer: int, chunk: int) -> Any:
        path = self._path(layer, chunk // self._per_shard)
        seen.append((str(path).partition(".zarr/")[2], chunk))
        return encoded(self, layer, chunk)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get_seen)
    monkeypatch.setattr(ShardedRows, "_encoded", encoded_seen)
    return seen


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an archive of 2,400 rows, two in a chunk, and eight chunks in a shard."""
    folder = tmp_path_factory.mktemp("sharded")
    log = decoder_log(folder / "run.stream", prompt=(4, 600), steps=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "CHUNK_BYTES", 2 * 8 * 4)
        patch.setattr(grid, "SHARD_BYTES", 8 * 2 * 8 * 4)
        return actstore.compact(log.path, folder / "run.zarr").path


def chunks_read(read: list[tuple[str, Any]], name: str) -> list[tuple[str, int]]:
    """Give the inner chunks of an array that were read: by ranges, or with their whole shard."""
    found = []
    for key, start in read:
        if key.startswith(f"{name}/") and start != "index":
            found += [(key, start)] if start is not None else [(key, -at) for at in range(8)]
    return found


OPEN_ARCHIVES: dict[str, Opener] = {
    "auto": actstore.open_dataset,
    "lazy": lambda path: actstore.open_dataset(path, None),
    "chunked": lambda path: actstore.open_dataset(path, {"token": 1024}),
    "xarray": lambda path: xr.open_dataset(path, engine="actstore"),
    "zarr": xr.open_zarr,
}


@pytest.mark.parametrize("opener", sorted(OPEN_ARCHIVES))
@pytest.mark.parametrize("count", [7, 1000])
def test_random_tokens_of_a_layer_read_only_the_chunks_that_they_are_in(
    sharded: Path, read: list[tuple[str, Any]], opener: str, count: int
) -> None:
    rows = np.sort(np.random.default_rng(count).choice(2400, count, replace=False))
    with OPEN_ARCHIVES[opener](sharded) as found:
        wanted = found.mlp[1].values[rows]
        layer = found.actstore.tokens(100 + rows).actstore.layer("model.layers.1.mlp")
        repr(layer)
        read.clear()
        np.testing.assert_array_equal(layer.values, wanted)
    assert all(key.startswith("mlp/c/1/") for key, _ in read)
    chunks = chunks_read(read, "mlp")
    assert len(set(chunks)) == len(np.unique(rows // 2))
    assert len(chunks) <= count  # one may be read again by the next task of dask


@pytest.mark.parametrize("chunks", ["auto", None])
def test_choosing_rows_reads_the_labels_that_it_goes_by_and_no_value(
    sharded: Path, read: list[tuple[str, Any]], chunks: Any
) -> None:
    for choose, labels in (
        (lambda rows: rows.tokens(101), {"token_id"}),
        (lambda rows: rows.tokens("<1>"), {"token_text"}),
        (lambda rows: rows.steps(), {"step"}),
        (lambda rows: rows.last_positions(), {"is_padding", "pass_index", "batch_item"}),
        (lambda rows: rows.sequence(0, 1), {"pass_index", "batch_item"}),
        (lambda rows: rows.drop_padding(), {"is_padding"}),
        (lambda rows: rows.where(topic="item 1"), {"topic"}),
        (lambda rows: rows.layer("model.layers.1.mlp"), set()),
        (lambda rows: rows.layers, set()),
    ):
        with actstore.open_dataset(sharded, chunks) as found:
            read.clear()
            repr(choose(found.actstore))
            assert {key.split("/")[0] for key, _ in read} <= labels
    with actstore.open_dataset(sharded, chunks) as found:
        values = {str(name) for name in found.data_vars}
        read.clear()
        assert found.actstore.table().shape == (2400, 8)
        assert read
        assert values.isdisjoint(key.split("/")[0] for key, _ in read)


def test_rows_are_picked_lazily_with_dask_as_long_as_variables_are_as_they_were_opened(
    sharded: Path, read: list[tuple[str, Any]]
) -> None:
    with actstore.open_dataset(sharded) as found:
        for opened in (
            found.copy(),
            found[["mlp"]],
            found.drop_vars("resid"),
            found.assign_attrs(note="mine"),
            found.assign(turned=-found.mlp),
            found.assign_coords(number=("token", np.arange(2400))),
            found.actstore.drop_padding().actstore.where(pass_index=range(5)),
        ):
            chosen = opened.actstore.tokens(["<30>", "<250>"])
            assert chosen.mlp.chunks is not None
            read.clear()
            assert chosen.mlp.sel(layer=2).values.shape == (chosen.sizes["token"], 8)
            assert len(chunks_read(read, "mlp")) == 2
            assert chosen.mlp.encoding["chunks"] == found.mlp.encoding["chunks"]


def test_rows_of_what_was_changed_are_changed(sharded: Path) -> None:
    with actstore.open_dataset(sharded) as found:
        found.mlp[{"token": slice(0, 4)}] = 7.0
        chosen = found.actstore.sequence(0)
        assert np.all(chosen.mlp.values[:, :4] == 7.0)
        assert not np.all(chosen.resid.values[:, :4] == 7.0)
        turned = found.assign(resid=-found.mlp).actstore.sequence(0)
        assert np.all(turned.resid.values[:, :4] == -7.0)


@pytest.mark.parametrize("chunks", ["auto", None])
def test_chosen_rows_of_a_log_read_only_their_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: Any
) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=40)
    blocks: list[int] = []
    honest = StreamReader.read_block

    def read_block(self: StreamReader, index: int) -> Any:
        blocks.append(index)
        return honest(self, index)

    monkeypatch.setattr(StreamReader, "read_block", read_block)
    with actstore.open_dataset(log.path, chunks) as found:
        chosen = found.actstore.where(pass_index=[3, 17, 30])
        one = chosen.actstore.layer("model.layers.1")
        repr(one)
        assert blocks == []
        assert one.values.shape == (6, 8)
    with StreamReader(log.path) as reader:
        layer = reader.layer("model.layers.1").id
        assert [reader.table.blocks[index].block.layer for index in blocks] == [layer] * 3


@pytest.mark.parametrize(
    "opened",
    [
        "import xarray as xr, actstore; found = xr.open_zarr(path)",
        "import actstore.accessor, xarray as xr; found = xr.open_zarr(path)",
        "import actstore, xarray as xr; actstore.open_dataset; found = xr.open_zarr(path)",
        "import xarray as xr; found = xr.open_dataset(path, engine='actstore')",
        "import actstore; found = actstore.open_dataset(path)",
    ],
)
def test_the_accessor_comes_with_what_opens_datasets(places: dict[str, Path], opened: str) -> None:
    code = (
        f"import sys; path = sys.argv[1]; {opened}\n"
        "print(found.actstore.drop_padding().sizes['token'], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, places["archive"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "11 False\n", done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [("a.zarr", "'a.zarr'"), (None, "NoneType"), (xr.DataArray([1.0]), "DataArray"), ({}, "dict")],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda given: actstore.choose_precision(given, nmse=1e-3),
        lambda given: actstore.group_statistics(given, "mlp", by="token_text"),
        lambda given: actstore.explore(given),
        lambda given: analysis.statistics(given),
        lambda given: plots.norm_map(given),
        lambda given: plots.attention(given),
    ],
)
def test_what_is_no_dataset_is_refused_wherever_one_is_wanted(
    call: Any, given: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"wanted an xarray.Dataset, .*; got {said}"):
        call(given)
