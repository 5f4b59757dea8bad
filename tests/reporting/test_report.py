"""A page says what a run holds, is never too large, and lets nothing of the data act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import ConfigError, FormatError, MissingFileError
from actstore.markup import escape, facts, table
from actstore.reporting import page as pages
from actstore.reporting.values import Limits, described

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis
from runs import HOSTILE, compacted, odd_datasets, odd_logs, run_log

LIMITS = Limits(400, None, 1.0)


def data_in(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "src"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Tags:
    found = Tags()
    found.feed(html)
    return found


# -- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["log", "archive"])
def test_norms_distributions_and_cosines_are_those_of_the_values(
    tmp_path: Path, kind: str
) -> None:
    log, held = run_log(tmp_path / "run.stream")
    path = log if kind == "log" else compacted(log)
    said = data_in(actstore.report(path, tmp_path / "run.html").read_text())
    one = next(one for one in said["variables"] if one["name"] == "resid")
    norms = np.linalg.norm(held.astype(np.float64), axis=2)
    np.testing.assert_allclose(one["norms"], norms, rtol=1e-3)
    np.testing.assert_allclose(one["norm"], norms.mean(1), rtol=1e-3)
    np.testing.assert_allclose(one["norm_max"], norms.max(1), rtol=1e-3)
    wanted = np.quantile(held.reshape(len(held), -1), said["probabilities"], axis=1).T
    np.testing.assert_allclose(one["quantiles"], wanted, rtol=1e-3, atol=1e-4)
    turned = [
        np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
        for a, b in zip(held[1:], held[:-1], strict=True)
    ]
    assert one["cosine"][0] is None
    np.testing.assert_allclose(one["cosine"][1:], turned, rtol=1e-2, atol=1e-4)
    for layer, tops in enumerate(one["features"]):
        order = np.argsort(-held[layer].std(0), kind="stable")[: len(tops)]
        assert [top["feature"] for top in tops] == order.tolist()
        for top in tops:
            np.testing.assert_allclose(
                top["values"], held[layer][:, top["feature"]], rtol=1e-3, atol=1e-6
            )


def test_the_strip_goes_through_the_passes_of_a_generation(tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "run.stream", rows=20, generated=5)
    with actstore.open_dataset(log) as dataset:
        strip = described(dataset, LIMITS)["strips"]["token"]
        assert strip["position"] == list(range(25))
        assert strip["token_id"] == list(range(100, 125))
        assert strip["pass_index"] == [0] * 20 + [1, 2, 3, 4, 5]
        assert strip["labels"]["topic"] == ["<b>sets</b>"] * 25
        late = described(dataset, Limits(400, (2, 0), 1.0))["strips"]["token"]
        assert late["position"] == [21, 22, 23, 24]
        few = described(dataset, Limits(7, None, 1.0))
        assert few["strips"]["token"]["position"] == list(range(7))
        assert any("25 tokens, the first 7" in note for note in few["notes"])
        with pytest.raises(ConfigError, match="no rows of pass 9"):
            described(dataset, Limits(400, (9, 0), 1.0))


def test_padding_and_missing_rows_are_in_no_statistic() -> None:
    values = np.ones((2, 6, 3), np.float32)
    values[:, 4:] = 100.0
    values[1, 0] = 50.0
    labels = {
        "pass_index": ("token", np.zeros(6, np.int64)),
        "batch_item": ("token", np.zeros(6, np.int64)),
        "position": ("token", np.arange(6)),
        "is_padding": ("token", np.array([False] * 4 + [True] * 2)),
    }
    present = np.ones((2, 6), np.bool_)
    present[1, 0] = False
    dataset = xr.Dataset(
        {
            "resid": (("layer", "token", "feature"), values),
            "resid_present": (("layer", "token"), present),
        },
        labels,
    )
    (one,) = described(dataset, LIMITS)["variables"]
    assert one["quantiles"] == [[1.0] * 7] * 2
    assert one["norms"][1][0] is None
    assert one["norms"][0] == pytest.approx([3**0.5] * 4, rel=1e-3)


def test_each_token_axis_has_a_strip_of_its_own(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "both.stream")
    for name in ("encoder_resid", "decoder_resid"):
        log.layer(name, name)
    log.begin(axis(1, 4, name="encoder_token"), axis(1, 3, name="decoder_token"))
    values = {"encoder_resid": np.ones((1, 4, 2), np.float32), "decoder_resid": np.eye(3)[None]}
    for name, one in values.items():
        log.put(name, one.astype(np.float32))
    log.begin(axis(1, 1, name="decoder_token", start=3))
    log.put("decoder_resid", np.full((1, 1, 3), 2, np.float32))
    said = data_in(actstore.report(log.close(), tmp_path / "a.html").read_text())
    strips = {name: one["position"] for name, one in said["strips"].items()}
    assert strips == {"encoder_token": [0, 1, 2, 3], "decoder_token": [0, 1, 2, 3]}
    norms = {one["name"]: one["norms"] for one in said["variables"]}
    assert norms["encoder_resid"] == [[1.414] * 4]
    assert norms["decoder_resid"] == [[1.0, 1.0, 1.0, 3.464]]
    page = actstore.report(log.path, tmp_path / "b.html", sequence=(1, 0))
    assert data_in(page.read_text())["strips"]["encoder_token"]["count"] == 0


def test_an_archive_of_several_logs_has_a_sequence_of_one(tmp_path: Path) -> None:
    logs = [
        run_log(tmp_path / f"{name}.stream", rows=rows, generated=0, run=name)[0]
        for name, rows in [("a", 5), ("b", 8)]
    ]
    actstore.compact(logs, tmp_path / "both.zarr")
    text = actstore.report(tmp_path / "both.zarr", tmp_path / "a.html").read_text()
    strip = data_in(text)["strips"]["token"]
    assert strip["row"] == list(range(5, 13))
    assert strip["labels"]["run"] == [1] * 8
    assert "Capture 2" in text


@pytest.mark.parametrize(
    ("ending", "opening"),
    [
        (".h5", "engine=&quot;h5netcdf&quot;"),
        (".zarr.zip", "zarr.storage.ZipStore(&quot;run.zarr.zip&quot;"),
    ],
)
def test_files_of_an_archive_have_its_page(tmp_path: Path, ending: str, opening: str) -> None:
    archive = compacted(run_log(tmp_path / "run.stream")[0])
    actstore.export(archive, tmp_path / f"run{ending}")
    text = actstore.report(tmp_path / f"run{ending}", tmp_path / "a.html").read_text()
    assert "✓ Intact" in text
    assert opening in text
    of_archive = data_in(actstore.report(archive, tmp_path / "b.html").read_text())
    assert data_in(text) == of_archive


def test_nans_that_signal_and_infinities_are_counted(tmp_path: Path) -> None:
    bits = np.full((1, 4, 2), 0x7FA00000, np.uint32)
    bits[0, 2:] = 0x7F800000
    bits[0, 0] = 0
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("m", "resid")
    log.begin(axis(1, 4))
    log.put("m", bits.view(np.float32))
    page = actstore.report(log.close(), tmp_path / "a.html")
    (one,) = data_in(page.read_text())["variables"]
    assert one["nonfinite"] == [6]
    assert one["quantiles"] == [[0.0] * 7]
    assert one["norms"] == [[0.0, None, None, None]]


def test_a_row_too_wide_for_the_memory_has_norms_and_no_features(tmp_path: Path) -> None:
    log, held = run_log(tmp_path / "run.stream", width=64)
    page = actstore.report(log, tmp_path / "a.html", max_memory_gb=2e-5)
    text = page.read_text()
    one = data_in(text)["variables"][0]
    np.testing.assert_allclose(one["norms"], np.linalg.norm(held, axis=2), rtol=1e-3)
    assert not any(one["features"])
    assert "a row is too wide" in text


def test_health_sizes_and_the_meter_are_on_the_page(tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "run.stream")
    text = actstore.report(log, tmp_path / "a.html").read_text()
    assert "✓ Intact" in text
    assert "Every checksum is right" in text
    wide, _ = run_log(tmp_path / "wide.stream", width=128, rows=200)
    small = compacted(wide, "nmse=2e-4")
    text = actstore.report(small, tmp_path / "b.html").read_text()
    assert "What precision was given up" in text
    assert "nmse=0.0002" in text
    assert "xr.open_zarr(&quot;wide.zarr&quot;)" in text
    torn, _ = run_log(tmp_path / "torn.stream", finish=False)
    text = actstore.report(torn, tmp_path / "c.html").read_text()
    assert "◐ Unfinished" in text
    assert data_in(text)["variables"][0]["norms"]


def test_a_damaged_log_and_a_damaged_archive_have_pages_that_say_so(tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "run.stream", rows=64, width=64, generated=0)
    archive = compacted(log)
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    text = actstore.report(log, tmp_path / "a.html").read_text()
    assert "✕ Damaged" in text
    assert "actstore.recover(&quot;run.stream&quot;)" in text
    shard = max((one for one in archive.rglob("c/**/*") if one.is_file()),
                key=lambda one: one.stat().st_size)  # fmt: skip
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 255
    shard.write_bytes(data)
    assert "✕ Damaged" in actstore.report(archive, tmp_path / "b.html").read_text()
    assert (
        "Not verified" in actstore.report(archive, tmp_path / "b.html", verify=False).read_text()
    )


def test_what_is_no_run_is_refused_and_no_run_is_written_over(tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "run.stream")
    with pytest.raises(MissingFileError):
        actstore.report(tmp_path / "none", tmp_path / "a.html")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(FormatError):
        actstore.report(tmp_path / "x.txt", tmp_path / "a.html")
    for target in (log, tmp_path, tmp_path / "no" / "a.html", 3):
        with pytest.raises(ConfigError):
            actstore.report(log, target)  # type: ignore[arg-type]
    for wrong in ({"max_tokens": 0}, {"sequence": (0,)}, {"max_memory_gb": 0}):
        with pytest.raises(ConfigError):
            actstore.report(log, tmp_path / "a.html", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "a.html").exists()


# -- hostile data ---------------------------------------------------------------------------------


def test_no_text_of_the_data_is_markup(tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "</title><script>alert(1)<".replace("/", "_"), texts=HOSTILE)
    plain, _ = run_log(tmp_path / "plain.stream", texts=["a"])
    text = actstore.report(log, tmp_path / "a.html").read_text()
    found = parsed(text)
    wanted = parsed(actstore.report(plain, tmp_path / "b.html").read_text())
    assert found.tags == wanted.tags
    assert not found.handlers
    inside = text.partition('id="data">')[2].partition("</script>")[0]
    assert not set(inside) & set("<>&\u2028\u2029")
    texts = data_in(text)["strips"]["token"]["token_text"]
    assert texts[1] == HOSTILE[1]
    assert texts[8] == "{{DATA}}"
    assert len(texts[17]) == 120


def test_the_policy_names_the_hashes_of_what_is_in_the_page(tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "run.stream")
    text = actstore.report(log, tmp_path / "a.html").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[-1]
        told = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{rule} 'sha256-{told}'" in policy
    assert not re.search(r"\b(https?:)?//(?!www\.w3\.org)[a-z]+\.", text.partition("<style>")[2])


def test_tables_for_notebooks_escape_everything() -> None:
    bad = "</td><script>alert('1')</script>\""
    for html in (facts(bad, [(bad, bad)]), table(bad, [bad], [(bad, [bad])])):
        assert "<script" not in html
        assert escape(bad) in html


def test_notebooks_show_readers_reports_and_pages(tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "run.stream")
    made = actstore.compact(log, tmp_path / "run.zarr")
    with actstore.open_stream(log) as reader:
        for shown in (reader, actstore.verify(log), made):
            tags = parsed(shown._repr_html_()).tags
            assert tags[:2] == ["table", "caption"]
    with actstore.open_dataset(made.path) as dataset:
        page = dataset.actstore.explore(max_tokens=5)
        assert data_in(page.html)["strips"]["token"]["count"] == 5
        inline = parsed(page._repr_html_())
        assert inline.tags == ["iframe"]
        rows = dataset.actstore.where(position=[3, 4])
        assert data_in(rows.actstore.explore().html)["strips"]["token"]["position"] == [3, 4]
        with pytest.raises(ConfigError):
            actstore.explore(dataset.resid)  # type: ignore[arg-type]


# -- size -----------------------------------------------------------------------------------------


def test_a_large_run_is_cut_to_stay_small_and_says_what_was(tmp_path: Path) -> None:
    rows, layers = 500, 96
    random = np.random.default_rng(0)
    labels = {
        "pass_index": ("token", np.zeros(rows, np.int64)),
        "batch_item": ("token", np.zeros(rows, np.int64)),
        "position": ("token", np.arange(rows)),
        "token_text": ("token", np.array(["</script>" * 60] * rows, object)),
    } | {f"label{n}": ("token", np.array(["é" * 999] * rows, object)) for n in range(20)}
    variables = {
        f"site{n}": (("layer", "token", "feature"),
                     random.normal(size=(layers, rows, 12)).astype(np.float32))
        for n in range(20)
    }  # fmt: skip
    dataset = xr.Dataset(variables, labels)
    target = actstore.report(dataset, tmp_path / "a.html")
    assert target.stat().st_size < 5_000_000
    text = target.read_text()
    assert "variables are not in the strip" in text
    assert "20 labels, 12 are shown" in text
    assert len(data_in(text)["variables"][0]["norms"][0]) == 400


def test_a_page_that_is_too_large_loses_features_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = run_log(tmp_path / "run.stream", rows=200, layers=8)
    whole = actstore.report(log, tmp_path / "a.html").stat().st_size
    monkeypatch.setattr(pages, "LIMIT_BYTES", whole - 50_000)
    text = actstore.report(log, tmp_path / "b.html").read_text()
    assert len(text.encode()) < whole - 50_000
    said = {one["name"]: one for one in data_in(text)["variables"]}
    assert said["resid"]["features"]
    assert not said["mlp"]["features"]
    assert said["mlp"]["norms"]
    assert "mlp: its features are left out" in text


def test_of_many_rows_a_bounded_sample_is_read() -> None:
    rows = 300_000
    values = np.zeros((1, 256), np.float32)
    wide = np.broadcast_to(values, (2, rows, 256))
    labels = {
        "pass_index": ("token", np.arange(rows) // 100),
        "batch_item": ("token", np.zeros(rows, np.int64)),
        "position": ("token", np.arange(rows) % 100),
    }
    dataset = xr.Dataset({"resid": (("layer", "token", "feature"), wide)}, labels)
    said = described(dataset, LIMITS)
    sample = said["variables"][0]["sample"]
    assert sample["of"] == rows
    assert 1_000 < sample["rows"] <= 1 << 14
    assert said["strips"]["token"]["count"] == 100


def test_of_many_values_no_feature_counts_more_than_another() -> None:
    values = np.zeros((12_000, 64), np.float32)
    values[:, 1] = 1.0
    labels = {"pass_index": ("token", np.arange(12_000))}
    dataset = xr.Dataset({"resid": (("token", "feature"), values)}, labels)
    (one,) = described(dataset, LIMITS)["variables"]
    assert one["sample"]["rows"] == 12_000
    assert one["zeros"][0] == pytest.approx(63 / 64, rel=1e-3)
    assert one["mean"][0] == pytest.approx(1 / 64, rel=1e-3)


# -- odd runs -------------------------------------------------------------------------------------


@given(odd_datasets())
@settings(max_examples=60)
def test_odd_datasets_have_pages(dataset: xr.Dataset) -> None:
    found = actstore.explore(dataset)
    data_in(found.html)
    assert len(found.html.encode()) < 5_000_000
    for layer in range(dataset.sizes["layer"]):
        data_in(actstore.explore(dataset.isel(layer=layer)).html)


@given(st.data())
@settings(max_examples=30)
def test_odd_logs_and_their_archives_have_pages(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        log = data.draw(odd_logs(place))
        archive = compacted(log)
        for source in (log, archive):
            text = actstore.report(source, place / "page.html").read_text()
            assert "Damaged" not in text
            data_in(text)
