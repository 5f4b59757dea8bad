"""Figures show what NumPy computes of the same rows, and their tokens, and say what they lack."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from ml_dtypes import bfloat16
from typer.testing import CliRunner

import actstore
from actstore import plots
from actstore.errors import ConfigError
from actstore.plots import text
from actstore.plots.attending import _PANELS as HEAD_PANELS
from actstore.plots.chosen import chosen_rows, sampled
from actstore.plots.paths import components, progression

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis

WORDS = [
    "<s>",
    "The",
    " price",
    " is",
    " $5",
    "$x^2_",
    "\n",
    "\t",
    " wörd",
    "漢字",
    " שלום",
    "مرحبا",
]

Draw = Callable[[xr.Dataset], Figure]
OF_A_DATASET: dict[str, Draw] = {
    "norm_map": plots.norm_map,
    "layer_change": plots.layer_change,
    "outliers": plots.outliers,
    "distributions": plots.distributions,
    "feature_on_text": lambda rows: plots.feature_on_text(rows, "resid", 3, layer=0),
    "trajectory": plots.trajectory,
    "layer_correlation": plots.layer_correlation,
    "token_progression": plots.token_progression,
}


def rows_of(values: Any, words: list[str] | None = None, **labels: Any) -> xr.Dataset:
    """Give a dataset as a log of one pass has it: [layers, rows, features]."""
    values = np.asarray(values, np.float32)
    layers, count, _ = values.shape
    words = words or WORDS
    texts = [words[one % len(words)] for one in range(count)]
    columns = {
        "pass_index": np.zeros(count, np.int64),
        "batch_item": np.zeros(count, np.int64),
        "position": np.arange(count),
        "token_id": np.arange(count) + 100,
        "token_text": np.array(texts, object),
        "is_padding": np.zeros(count, np.bool_),
    } | labels
    return xr.Dataset(
        {"resid": (("layer", "token", "feature"), values)},
        {"layer": np.arange(layers), **{name: ("token", one) for name, one in columns.items()}},
    )


def normal(layers: int = 4, rows: int = 12, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(layers, rows, width)).astype(np.float32)


def image_of(figure: Figure) -> np.ndarray:
    """Put the panels of a map together again."""
    parts = [
        np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes if axes.images
    ]
    return np.concatenate(parts, axis=1)


def tokens_of(figure: Figure) -> list[str]:
    return [
        one.get_text() for axes in figure.axes if axes.images for one in axes.get_xticklabels()
    ]


def texts_of(figure: Figure) -> str:
    return " | ".join(
        one.get_text()
        for one in figure.findobj(mpl.text.Text)
        if one.get_text() and one.get_visible()
    )


def written(figure: Figure, path: Path) -> Path:
    for name in ("figure.png", "figure.pdf", "figure.svg"):
        figure.savefig(path / name)
    return path / "figure.svg"


# -- what is shown ------------------------------------------------------------------------------


def test_a_norm_map_shows_the_norms_of_each_layer_and_token() -> None:
    values = normal(rows=150)
    figure = plots.norm_map(rows_of(values))
    np.testing.assert_allclose(image_of(figure), np.linalg.norm(values, axis=2), rtol=1e-6)
    assert tokens_of(figure) == [text.label(WORDS[one % 12], 100 + one) for one in range(150)]
    assert "rows 0–149 of 150" in texts_of(figure)
    assert "log" not in texts_of(figure)


def test_a_map_of_very_unequal_norms_is_logarithmic_and_0_is_less_than_all() -> None:
    values = normal()
    values[:, 0] *= 1000
    values[2, 5] = 0
    figure = plots.norm_map(rows_of(values))
    norms = np.linalg.norm(values, axis=2)
    expected = np.maximum(norms, norms[norms > 0].min())
    np.testing.assert_allclose(image_of(figure), expected, rtol=1e-6)
    assert "log" in texts_of(figure)
    assert "no value" not in texts_of(figure)


def test_layer_change_shows_1_less_the_cosine() -> None:
    values = normal().astype(np.float64)
    figure = plots.layer_change(rows_of(values))
    dot = (values[1:] * values[:-1]).sum(axis=2)
    lengths = np.linalg.norm(values[1:], axis=2) * np.linalg.norm(values[:-1], axis=2)
    np.testing.assert_allclose(image_of(figure), 1 - dot / lengths, atol=1e-6)
    names = [one.get_text() for one in figure.axes[0].get_yticklabels()]
    assert names == ["0→1", "1→2", "2→3"]


def test_outliers_are_told_by_their_ratio_to_the_median() -> None:
    values = normal(rows=400, width=64)
    values[1:, :, 11] *= 50
    figure = plots.outliers(rows_of(values))
    rms = np.sqrt((values.astype(np.float64) ** 2).mean(axis=1))
    ratio = rms / np.median(rms, axis=1, keepdims=True)
    shown = [int(one.get_text()) for one in figure.axes[0].get_xticklabels()]
    assert shown[0] == 11
    assert len(shown) == 40
    np.testing.assert_allclose(image_of(figure), ratio[:, shown], rtol=1e-5)
    counts = [bar.get_width() for bar in figure.axes[1].patches]
    assert counts == (ratio > 6).sum(axis=1).tolist() == [0, 1, 1, 1]
    marks = [line.get_xdata().tolist() for line in figure.axes[0].lines]
    assert [one for one in marks if len(one) == 1 and one[0] == 0][:3] == [[0], [0], [0]]


def test_distributions_are_the_quantiles_of_each_layer() -> None:
    values = normal(rows=2000) * np.array([1, 2, 3, 4])[:, None, None]
    figure = plots.distributions(rows_of(values))
    axes = figure.axes[0]
    bars = sorted((bar.get_x(), bar.get_height(), bar.get_y()) for bar in axes.patches)
    flat = values.reshape(4, -1)
    low, high = np.quantile(flat, [0.01, 0.99], axis=1, method="inverted_cdf")
    widest = [max(bars[3 * one : 3 * one + 3], key=lambda bar: bar[1]) for one in range(4)]
    np.testing.assert_allclose([bar[2] for bar in widest], low, rtol=2**-7)
    np.testing.assert_allclose([bar[1] + bar[2] for bar in widest], high, rtol=2**-7)
    extremes = next(line for line in axes.lines if line.get_marker() == "x").get_ydata()
    np.testing.assert_allclose(extremes, [*flat.min(axis=1), *flat.max(axis=1)], rtol=1e-6)


def test_a_feature_colours_each_token_by_its_value_and_underlines_what_is_below_0() -> None:
    values = normal()
    figure = plots.feature_on_text(rows_of(values), "resid", 3, layer=2)
    mine = values[2, :, 3]
    axes, bar = figure.axes
    assert [one.get_text() for one in axes.texts] == text.labels(WORDS, range(100, 112))
    most = np.abs(mine).max()
    colors = mpl.colormaps["RdBu_r"]((mine + most) / (2 * most))
    faces = [one.get_facecolor() for one in axes.patches]
    np.testing.assert_allclose(faces, colors, atol=1 / 255)
    assert len(axes.lines) == (mine < 0).sum()
    assert bar.get_ylim() == pytest.approx((-most, most))


def test_a_feature_that_is_never_below_0_goes_from_0_on() -> None:
    figure = plots.feature_on_text(rows_of(np.abs(normal())), "resid", 3, layer=2)
    assert figure.axes[1].get_ylim()[0] == 0
    assert not figure.axes[0].lines


def test_a_feature_of_a_sampled_capture_is_found_by_its_label() -> None:
    dataset = rows_of(normal()).assign_coords(feature=[3, 8, 11, 20, 31, 77])
    figure = plots.feature_on_text(dataset, "resid", 20, layer=1)
    most = np.abs(dataset.resid.values[1, :, 3]).max()
    assert figure.axes[1].get_ylim()[1] == pytest.approx(most)
    with pytest.raises(ConfigError, match="features from 3 to 77; got 4"):
        plots.feature_on_text(dataset, "resid", 4, layer=1)


def test_a_trajectory_shows_the_first_two_principal_components() -> None:
    values = normal(rows=40).astype(np.float64)
    figure = plots.trajectory(rows_of(values), layer=1)
    shown = np.asarray(figure.axes[0].collections[0].get_offsets())
    apart = values[1] - values[1].mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov(apart.T, bias=True))
    for place, column in ((0, -1), (1, -2)):
        vector = vectors[:, column]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        np.testing.assert_allclose(shown[:, place], apart @ vector, atol=1e-5)
    assert f"PC 1 ({variances[-1] / variances.sum():.0%})" in texts_of(figure)


def test_components_of_rows_that_are_none_or_alike_are_0() -> None:
    assert np.isnan(components(np.full((3, 4), np.nan))[0]).all()
    points, shares = components(np.ones((5, 4)))
    assert not points.any()
    assert not shares.any()
    assert not components(np.ones((1, 4)))[0].any()


def test_a_progression_shows_norms_and_the_cosine_with_the_row_before() -> None:
    values = normal(layers=3)
    figure = plots.token_progression(rows_of(values))
    upper, lower = figure.axes
    for place in range(3):
        np.testing.assert_allclose(
            upper.lines[place].get_ydata(), np.linalg.norm(values[place], axis=1), rtol=1e-6
        )
        before, after = values[place, :-1].astype(np.float64), values[place, 1:]
        cosine = (before * after).sum(axis=1)
        cosine /= np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        np.testing.assert_allclose(lower.lines[place].get_ydata()[1:], 1 - cosine, atol=1e-6)
    assert np.isnan(progression(np.zeros((2, 3)))[1]).all()


def test_a_progression_breaks_where_a_sequence_ends() -> None:
    labels = {"batch_item": np.repeat([0, 1], 6), "position": np.tile(np.arange(6), 2)}
    figure = plots.token_progression(rows_of(normal(), **labels), rows=slice(None))
    (upper, lower), count = figure.axes, 12
    assert np.isnan(upper.lines[0].get_ydata()[6])
    assert upper.lines[0].get_ydata().size == count + 1
    assert np.isnan(lower.lines[0].get_ydata()[[0, 6, 7]]).all()


def test_layers_are_correlated_as_numpy_says() -> None:
    values = normal(rows=300)
    values[1] = values[0] * 2 + 5
    values[3, 7] = np.nan
    figure = plots.layer_correlation(rows_of(values))
    whole = np.delete(values.astype(np.float64), 7, axis=1)
    apart = (whole - whole.mean(axis=1, keepdims=True)).reshape(4, -1)
    np.testing.assert_allclose(image_of(figure), np.corrcoef(apart), atol=1e-6)
    assert "299 in every layer" in texts_of(figure)
    assert "1.00" in texts_of(figure)


def attention_log(path: Path) -> np.ndarray:
    """Write a log of a pass of 5 tokens and of one more, with weights [2 items, 3 heads, …]."""
    log, numbers = LogBuilder(path), np.random.default_rng(1)
    for block in range(2):
        log.layer(f"model.layers.{block}", "resid", block)
        log.layer(f"model.layers.{block}.self_attn#weights", "attn_weights", block)
    log.texts({100 + one: f" w{one}" for one in range(10)})
    weights = np.tril(numbers.random((2, 2, 3, 5, 5))).astype(np.float32)
    for number, (start, count) in enumerate(((0, 5), (5, 1))):
        log.begin(axis(2, count, start=start))
        for block in range(2):
            log.put(f"model.layers.{block}", normal(2, count, 4).astype(bfloat16))
            mine = weights[block] if not number else numbers.random((2, 3, 1, 6), np.float32)
            log.put(f"model.layers.{block}.self_attn#weights", mine)
        log.commit()
    log.close()
    return weights


def test_attention_shows_the_weights_of_each_head_and_their_tokens(tmp_path: Path) -> None:
    weights = attention_log(tmp_path / "run.stream")
    with actstore.open_dataset(tmp_path / "run.stream") as dataset:
        heads = plots.attention(dataset, layer=1, item=1)
        mean = plots.attention(dataset, item=0)
        one = plots.attention(dataset, layer=0, head=2)
        last = plots.attention(dataset, layer=0, pass_index=1)
    written(last, tmp_path)
    later = np.triu(np.ones((5, 5), np.bool_), 1)
    for figure, expected in ((heads, weights[1, 1]), (mean, weights[:, 0].mean(axis=1)),
                             (one, weights[0, 0, 2:])):  # fmt: skip
        panels = [axes for axes in figure.axes if axes.images]
        assert len(panels) == len(expected)
        for axes, values in zip(panels, expected, strict=True):
            shown = axes.images[0].get_array()
            assert (shown.mask == later).all()
            np.testing.assert_allclose(shown.filled(0), values, rtol=1e-6)
        assert tokens_of(figure)[:5] == ["␣w5", "␣w6", "␣w7", "␣w8", "␣w9"] or figure is not heads
    assert tokens_of(last) == ["␣w0", "␣w1", "␣w2", "␣w3", "␣w4", "␣w0"]
    assert image_of(last).shape == (3, 6)
    assert HEAD_PANELS >= 3


def test_attention_that_is_not_there_says_how_to_capture_it(tmp_path: Path) -> None:
    attention_log(tmp_path / "run.stream")
    with pytest.raises(ConfigError, match=r"attention_weights=True.*eager"):
        plots.attention(rows_of(normal()))
    with actstore.open_dataset(tmp_path / "run.stream") as dataset:
        for told, said in (
            ({"layer": 7}, r"layers \[0, 1\]"),
            ({"pass_index": 9}, "passes 0 to 1"),
            ({"item": 2}, "item must be from 0 to 1"),
            ({"head": 3}, "head must be from 0 to 2"),
            ({"variable": "resid"}, "ragged variables are 'attn_weights'"),
        ):
            with pytest.raises(ConfigError, match=said):
                plots.attention(dataset, **told)


def test_the_bars_of_a_run_are_its_bytes(tmp_path: Path) -> None:
    attention_log(tmp_path / "run.stream")
    framework = actstore.InstrumentationFramework(
        actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
    )
    found = framework.analyze_activations(tmp_path / "run.stream")
    for figure in (plots.run_rates(tmp_path / "run.stream"), plots.run_rates(found)):
        bars = [bar.get_width() for bar in figure.axes[0].patches]
        layers = found["per_layer"].values()
        assert bars[: len(layers)] == pytest.approx([one["raw_bytes"] for one in layers])
        assert bars[len(layers) :] == pytest.approx([one["bytes"] for one in layers])
        names = [one.get_text() for one in figure.axes[0].get_yticklabels()]
        assert names == list(found["per_layer"])
        assert "not told" in texts_of(figure)  # this log was closed without rates
    actstore.compact(tmp_path / "run.stream", tmp_path / "run.zarr")
    assert plots.run_rates(tmp_path / "run.zarr").axes[0].patches


def test_many_layers_of_a_run_are_put_together_by_site_and_rates_are_told() -> None:
    layers = {
        f"model.layers.{one}.mlp": {"site": "mlp", "raw_bytes": 2_000_000, "bytes": 1_000_000}
        for one in range(80)
    }
    summary = {"peak_gbps": 2.5, "target_throughput_gbps": 1.0, "waited_by_cause": {"disk": 0.5}}
    figure = plots.run_rates(
        {"per_layer": layers, "summary": summary, "sustained_gbps": 1.5, "duration_seconds": 3.0}
    )
    assert [bar.get_width() for bar in figure.axes[0].patches] == [160, 80]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [1.5, 2.5, 1.0]
    assert [bar.get_width() for bar in figure.axes[2].patches] == [3.0, 0.5]
    assert "2.00×" in texts_of(figure)
    with pytest.raises(ConfigError, match="per_layer"):
        plots.run_rates({"packets": 3})


# -- which rows ---------------------------------------------------------------------------------


def test_the_first_sequence_goes_on_through_the_passes_of_a_generation() -> None:
    labels = {
        "pass_index": np.r_[np.zeros(8, np.int64), 1, 1, 2, 2],
        "batch_item": np.r_[0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1],
        "position": np.r_[0, 1, 2, 3, 0, 1, 2, 3, 4, 4, 5, 5],
    }
    shown = chosen_rows(rows_of(normal(), **labels), "resid")
    assert shown.dataset.token_id.values.tolist() == [100, 101, 102, 103, 108, 110]
    assert shown.generated == 4
    assert shown.about == "6 rows of 12, passes 0–2, item 0"
    other = chosen_rows(rows_of(normal(), **labels), "resid", None, 0, 1)
    assert other.dataset.token_id.values.tolist() == [104, 105, 106, 107]


def test_each_token_axis_of_an_encoder_decoder_has_figures(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    for stack in ("encoder", "decoder"):
        log.layer(f"{stack}.block.0", f"{stack}_resid", 0)
        log.layer(f"{stack}.block.1", f"{stack}_resid", 1)
    log.texts({100 + one: f" w{one}" for one in range(5)})
    log.begin(axis(1, 5, name="encoder_token"), axis(1, 3, name="decoder_token"))
    for stack, count in (("encoder", 5), ("decoder", 3)):
        for block in range(2):
            log.put(f"{stack}.block.{block}", normal(1, count, 4).astype(bfloat16))
    log.close()
    with actstore.open_dataset(tmp_path / "run.stream") as dataset:
        for stack, count in (("encoder", 5), ("decoder", 3)):
            figure = plots.norm_map(dataset, f"{stack}_resid")
            assert tokens_of(figure) == [f"␣w{one}" for one in range(count)]
            assert plots.trajectory(dataset, f"{stack}_resid", layer=1).axes


def test_padding_is_left_out_and_rows_can_be_told() -> None:
    dataset = rows_of(normal(), is_padding=np.arange(12) < 3)
    assert chosen_rows(dataset, "resid").count == 9
    assert chosen_rows(dataset, "resid", slice(2, 5)).dataset.token_id.values.tolist() == [
        102,
        103,
        104,
    ]
    with pytest.raises(ConfigError, match="rows must be a slice"):
        chosen_rows(dataset, "resid", [1, 2])
    with pytest.raises(ConfigError, match="passes 0 to 0"):
        plots.norm_map(dataset, pass_index=3)


def test_rows_that_were_chosen_are_all_shown() -> None:
    dataset = rows_of(normal(rows=60)).actstore.tokens("price")
    figure = plots.norm_map(dataset)
    assert tokens_of(figure) == ["␣price"] * 5


def test_of_more_than_200_tokens_the_first_are_shown_and_it_says_so() -> None:
    figure = plots.norm_map(rows_of(normal(rows=1000)))
    assert image_of(figure).shape == (4, 200)
    assert "the first 200 of 1,000 chosen" in texts_of(figure)
    assert (
        image_of(plots.norm_map(rows_of(normal(rows=1000)), rows=slice(300, 900))).shape[1] == 400
    )


def test_a_sample_is_spread_evenly_and_told() -> None:
    dataset = rows_of(normal(layers=2, rows=10_000, width=2))
    found, about = sampled(dataset, "resid", 1000)
    assert about == "1,000 of 10,000 rows, spread evenly"
    places = found.position.values
    assert len(set(places.tolist())) == 1000
    assert np.histogram(places, 10, (0, 10_000))[0].min() >= 50
    assert sampled(dataset, "resid", None)[1] == "all 10,000 rows"
    assert "1,000 of 10,000" in texts_of(plots.distributions(dataset, sample=1000))
    with pytest.raises(ConfigError, match="sample must be"):
        plots.distributions(dataset, sample=0)


def test_a_log_and_its_archive_give_the_same_figure(tmp_path: Path) -> None:
    attention_log(tmp_path / "run.stream")
    actstore.compact(tmp_path / "run.stream", tmp_path / "run.zarr")
    images = []
    for name in ("run.stream", "run.zarr"):
        for chunks in ("auto", None):
            with actstore.open_dataset(tmp_path / name, chunks) as dataset:
                images.append(image_of(plots.norm_map(dataset)))
    assert images[0].shape == (2, 6)
    for image in images[1:]:
        assert (image == images[0]).all()


# -- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (" the", "␣the"),
        ("\n", "⏎"),
        ("\t\t", "⇥⇥"),
        ("$x$", "$x$"),
        ("שלום", "שלום"),
        (" عالم", "␣عالم"),
        ("\u200f", "U+200F"),
        ("\x00", "U+0000"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("a_very_long_token", "a_very_long…"),
        ("", "#7"),
        ("\U000e0041", "U+E0041"),
        ("�", "�"),
    ],
)
def test_a_token_is_written_on_one_line_with_its_white_space_seen(given: str, shown: str) -> None:
    assert text.label(given, 7) == shown


def test_what_no_font_has_is_written_as_its_number_or_the_tokens_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "covered", lambda: frozenset(map(ord, "abc…␣")))
    assert text.label("漢", 7) == "U+6F22"
    assert text.label("漢字", 7) == "#7"
    assert text.label("漢字漢", -1) == "U+6F22…"
    assert text.label("a漢b", 7) == "aU+6F22b"
    monkeypatch.setattr(text, "covered", lambda: frozenset(map(ord, "漢字")))
    assert text.label("漢字", 7) == "漢字"


def test_fonts_that_were_installed_later_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from matplotlib import font_manager

    manager = font_manager.fontManager
    place = font_manager.findfont("DejaVu Serif", fallback_to_default=False)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    others = [one for one in manager.ttflist if one.name == "DejaVu Sans"]
    monkeypatch.setattr(manager, "ttflist", others)
    monkeypatch.setattr(text, "_FAMILIES", ("DejaVu Sans", "DejaVu Serif"))
    later = [str(tmp_path / "broken.ttf"), str(place)]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: later)
    assert text.families.__wrapped__() == ("DejaVu Sans", "DejaVu Serif")


def test_every_letter_of_a_label_has_a_glyph() -> None:
    scripts = "Ünï Привет ΑΒΓ שלום مرحبا ไทย हिन्दी 漢字 한국 日本 🙂 ∑"
    for letter in text.label(scripts, -1, most=1000):
        assert ord(letter) in text.covered()


def test_a_label_is_cut_at_a_whole_letter() -> None:
    marks = "e\u0301" * 20
    found = text.label(marks, 1, most=10)
    assert found.endswith("e\u0301…")
    assert len(found) <= 10


@pytest.mark.parametrize("name", OF_A_DATASET)
def test_all_scripts_are_drawn_without_a_warning_and_stay_text(name: str, tmp_path: Path) -> None:
    words = [*WORDS, "ไทย", "हिन्दी", "🙂", "\u202e", "", "\r\n", "\u0301", "'\"<&>", "\x1b[0m"]
    figure = OF_A_DATASET[name](rows_of(normal(rows=len(words)), words))
    svg = ET.fromstring(written(figure, tmp_path).read_text(encoding="utf-8"))
    said = {one.text for one in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert any("of 21" in str(one) or "all 21" in str(one) for one in said)
    if name == "norm_map":
        assert set(text.labels(words[:5], range(100, 105))) <= said
        assert "␣שלום" in said
    assert not any(unicodedata.category(letter) == "Cc" for one in said for letter in one or "")


def test_nothing_is_smaller_than_6_points_and_nothing_is_cut(tmp_path: Path) -> None:
    dataset = rows_of(normal(layers=40, rows=200))
    for name, draw in OF_A_DATASET.items():
        figure = draw(dataset)
        figure.draw_without_rendering()
        frame = figure.bbox
        for one in figure.findobj(mpl.text.Text):
            if not one.get_text() or not one.get_visible():
                continue
            assert one.get_fontsize() >= 6, name
            box = one.get_window_extent()
            shown = one.axes is None or one.axes.get_window_extent().overlaps(box)
            if shown:
                assert box.x0 > frame.x0 - 2, (name, one.get_text())
                assert box.x1 < frame.x1 + 2, (name, one.get_text())


# -- odd inputs ---------------------------------------------------------------------------------


def odd_inputs() -> dict[str, xr.Dataset]:
    gaps = normal()
    gaps[1, 3:5], gaps[2, 7, 0] = np.nan, np.inf
    bare = rows_of(normal()).drop_vars(["token_text", "token_id"])
    present = np.ones((4, 12), np.bool_)
    present[2, 3:] = False
    return {
        "nan": rows_of(gaps),
        "all nan": rows_of(np.full((3, 5, 4), np.nan)),
        "one token": rows_of(normal(rows=1)),
        "one feature": rows_of(normal(width=4)),
        "one layer": rows_of(normal(layers=1)),
        "no rows": rows_of(np.zeros((3, 0, 4))),
        "constant": rows_of(np.full((3, 5, 4), 2.5)),
        "zeros": rows_of(np.zeros((3, 5, 4))),
        "no text": bare,
        "padding": rows_of(normal(), is_padding=np.ones(12, np.bool_)),
        "missing": rows_of(normal()).assign(resid_present=(("layer", "token"), present)),
        "huge": rows_of(normal() * 1e37),
        "no layers' labels": rows_of(normal()).drop_vars("layer"),
    }


@pytest.mark.parametrize("which", odd_inputs())
@pytest.mark.parametrize("name", OF_A_DATASET)
def test_odd_inputs_give_a_figure(name: str, which: str, tmp_path: Path) -> None:
    dataset = odd_inputs()[which]
    if which == "one layer" and name in ("layer_change", "layer_correlation"):
        with pytest.raises(ConfigError, match="no two layers"):
            OF_A_DATASET[name](dataset)
        return
    figure = OF_A_DATASET[name](dataset)
    assert texts_of(figure)
    figure.savefig(tmp_path / "figure.png")


def test_what_has_no_value_is_hatched_and_told() -> None:
    figure = plots.norm_map(odd_inputs()["missing"])
    assert np.isnan(image_of(figure)[2, 3:]).all()
    assert np.isnan(image_of(figure)).sum() == 9
    assert "hatched: no value" in texts_of(figure)
    assert figure.axes[0].patch.get_hatch()


@pytest.mark.parametrize("name", ["norm_map", "distributions", "trajectory", "outliers"])
def test_a_variable_that_is_not_there_is_told_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'mlp' is no variable.*\['resid'\]"):
        getattr(plots, name)(rows_of(normal()), "mlp")


def test_options_that_make_no_sense_are_refused() -> None:
    dataset = rows_of(normal())
    for draw, said in (
        (lambda: plots.norm_map(dataset, width=0), "width must be inches"),
        (lambda: plots.feature_on_text(dataset, "resid", 3), "say which with layer="),
        (lambda: plots.trajectory(dataset, layer=9), "layers"),
        (lambda: plots.norm_map("run.stream"), "xarray.Dataset"),
        (lambda: plots.run_rates(3), "wants the path"),
    ):
        with pytest.raises(ConfigError, match=said):
            draw()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.plots.style.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'actstore\[plot\]'"):
        plots.norm_map(rows_of(normal()))


# -- what it leaves alone -----------------------------------------------------------------------


def test_settings_are_as_before_and_a_figure_keeps_to_its_own(tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 30, "image.cmap": "jet", "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        figure = plots.norm_map(rows_of(normal()))
        saved = written(figure, tmp_path)
        assert dict(mpl.rcParams) == before
    assert "␣price" in saved.read_text(encoding="utf-8")
    assert {one.get_fontsize() for one in figure.axes[0].get_xticklabels()} == {6}
    assert b"/Type3" not in (tmp_path / "figure.pdf").read_bytes()


def test_a_figure_can_be_pickled_and_shows_itself_in_a_notebook() -> None:
    figure = pickle.loads(pickle.dumps(plots.norm_map(rows_of(normal()))))
    assert tokens_of(figure)[:2] == ["<s>", "The"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_pyplot_is_never_imported() -> None:
    code = (
        "import sys, io, numpy as np, xarray as xr\n"
        "from actstore import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "rows = {one: ('token', [0, 0]) for one in ('pass_index', 'batch_item', 'token_id')}\n"
        "values = {'resid': (('layer', 'token', 'feature'), np.ones((2, 2, 3)))}\n"
        "rows['position'] = 'token', [0, 1]\n"
        "plots.norm_map(xr.Dataset(values, rows)).savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_colours_grow_lighter_evenly_so_that_they_read_in_grey() -> None:
    from actstore.plots.style import COLORS, SEQUENTIAL

    ramp = mpl.colormaps[SEQUENTIAL](np.linspace(0, 1, 64))[:, :3]
    grey = ramp @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(grey) > 0).all()
    assert len(set(COLORS)) == len(COLORS)


# -- the command --------------------------------------------------------------------------------


def invoke(*arguments: Any) -> Any:
    from actstore.cli.app import app

    environment = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["plot", *map(str, arguments)], env=environment)


@pytest.mark.parametrize(
    "kind",
    [
        *("norms", "change", "outliers", "distributions", "feature", "trajectory", "attention"),
        *("correlation", "progression", "rates"),
    ],
)
def test_the_command_writes_each_kind(kind: str, tmp_path: Path) -> None:
    attention_log(tmp_path / "run.stream")
    more = ["--feature", 2, "--layer", 1] if kind == "feature" else ["--width", 3.4]
    done = invoke(kind, tmp_path / "run.stream", "-o", tmp_path / "out.svg", *more, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "path": str(tmp_path / "run.stream"),
        "kind": kind,
        "figure": str(tmp_path / "out.svg"),
    }
    ET.parse(tmp_path / "out.svg")


def test_the_command_chooses_rows_and_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    attention_log(tmp_path / "run.stream")
    log, out = tmp_path / "run.stream", tmp_path / "out.svg"
    assert invoke("norms", log, "-o", out, "--rows", "-3:").exit_code == 0
    assert "rows 9–11 of 12" in out.read_text(encoding="utf-8")
    for arguments, said in (
        (("norms", log, "-o", tmp_path / "out.txt"), "written as .pdf, .png, .svg"),
        (("norms", log, "-o", out, "--rows", "3"), "--rows takes a slice"),
        (("norms", log, "-o", out, "--feature", "3"), "norms takes no --feature"),
        (("rates", log, "-o", out, "--pass", "0"), "rates takes no --pass"),
        (("feature", log, "-o", out), "say which feature"),
        (("norms", log, "-o", out, "--variable", "mlp"), "no variable"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 3
        assert said in done.stderr
