"""The served page in a real browser: it asks for what it shows, and says when it can't."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
import chromium
from chromium import Chromium
from logs import LogBuilder, axis
from servers import Server, served
from test_in_chromium import CONTRAST, FOCUSED, STATE, assert_legible

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.found() is None, reason="there is no Chromium"),
]

LAYERS, WIDTH = 6, 64
TEXTS = [
    " the",
    "漢字",
    "カナ",
    " 한국어",
    "🙂",
    "👩‍🚀",
    "שלום",
    "مرحبا",
    "e\u0301",
    "\n",
    "</script>",
    "x" * 40,
]
#: Nothing is asked for, and the strip and the charts are drawn.
IDLE = """(() => document.getElementById("explore").getAttribute("aria-busy") === "false"
  && document.getElementById("strip").getAttribute("aria-busy") === "false"
  && document.querySelectorAll("#charts svg").length > 0
  && document.getElementById("asking").textContent === ""
  && document.getElementById("failed").hidden)()"""
VALUES = "document.getElementById('detail').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Values [layers, sequences × tokens, width]: three texts of 900, 30 and 30 tokens."""
    scale = np.arange(1, LAYERS + 1)[:, None, None]
    random = np.random.default_rng(0)
    return (random.normal(size=(LAYERS, 960, WIDTH)) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("served")
    log = LogBuilder(place / "run.stream")
    for block in range(LAYERS):
        log.layer(f"model.layers.{block}", "resid", block)
        log.layer(f"model.layers.{block}.mlp", "mlp", block)
    log.texts({100 + one: TEXTS[one % len(TEXTS)] for one in range(900)})
    for items, tokens, first in ((1, 900, 0), (2, 30, 900)):
        log.begin(axis(items, tokens))
        for block in range(LAYERS):
            values = rows[block, first : first + items * tokens].reshape(items, tokens, WIDTH)
            log.put(f"model.layers.{block}", values)
            log.put(f"model.layers.{block}.mlp", 2 * values)
    log.close()
    archive = actstore.compact(log.path, place / "run.zarr").path
    with served(archive) as found:
        yield found


def told(browser: Chromium) -> Any:
    browser.wait(IDLE)
    return browser.run(STATE)


def change(browser: Chromium, name: str, value: Any) -> None:
    browser.run(
        f"(() => {{ const one = document.getElementById({name!r}); one.value = {value!r};"
        "one.dispatchEvent(new Event('change')); })()"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_is_read_and_says_nothing_to_the_console(
    browser: Chromium, server: Server, width: int, dark: bool
) -> None:
    browser.open(server.url, width=width, dark=dark)
    found = told(browser)
    assert len(set(found["colours"])) > 10
    assert len(found["colours"]) == 400
    assert browser.run("document.documentElement.scrollWidth") <= width
    change(browser, "by", "any")
    told(browser)
    assert_legible(browser, f"served-{width}-{'dark' if dark else 'light'}.png")


@pytest.mark.parametrize("width", [1280, 400])
def test_slider_variables_and_features_recolour_the_strip_from_the_server(
    browser: Chromium, server: Server, rows: np.ndarray, width: int
) -> None:
    browser.open(server.url, width=width)
    before = told(browser)
    assert before["layer"] == "3"
    assert f"{np.linalg.norm(rows[3, 0]):.4g}" in before["detail"]
    browser.run("document.getElementById('layer').focus()")
    browser.press("ArrowRight")
    after = told(browser)
    assert after["layer"] == "4"
    assert after["colours"] != before["colours"]
    assert f"{np.linalg.norm(rows[4, 0]):.4g}" in after["detail"]
    assert all(one.startswith("Layer 4:") for one in after["now"])
    for feature in (0, 41, 63):
        change(browser, "by", "any")
        change(browser, "number", feature)
        found = told(browser)
        assert f"feature {feature}, layer 4" in found["detail"]
        value = f"{rows[4, 0, feature]:.4g}".replace("-", "−")
        assert found["detail"].endswith(value)
    change(browser, "by", "0")
    top = int(np.argmax(rows[4, :400].std(axis=0)))
    assert f"feature {top}, layer 4" in told(browser)["detail"]
    change(browser, "variable", "1")
    change(browser, "by", "norm")
    assert f"{2 * np.linalg.norm(rows[4, 0]):.4g}"[:4] in told(browser)["detail"]
    assert not browser.errors


def test_every_sequence_and_all_of_its_tokens_are_reached(
    browser: Chromium, server: Server, rows: np.ndarray
) -> None:
    browser.open(server.url, width=1280)
    told(browser)
    is_ = "document.getElementById('sequence-is').textContent"
    assert browser.run(is_) == "900 tokens, batch item 0, pass 0"
    browser.run("document.getElementById('from-on').focus()")
    browser.run("document.activeElement.click()")
    assert "position400" in told(browser)["detail"]
    assert f"{np.linalg.norm(rows[3, 400]):.4g}" in browser.run(VALUES)
    change(browser, "from", 899)
    found = told(browser)
    assert len(found["colours"]) == 1
    assert f"{np.linalg.norm(rows[3, 899]):.4g}" in found["detail"]
    browser.run("document.getElementById('sequence-on').click()")
    found = told(browser)
    assert browser.run(is_) == "30 tokens, batch item 0, pass 1"
    assert len(found["colours"]) == 30
    change(browser, "sequence", 2)
    assert f"{np.linalg.norm(rows[3, 930]):.4g}" in told(browser)["detail"]
    assert browser.run("document.getElementById('sequence-on').disabled")
    change(browser, "sequence", 99999)
    assert browser.run(is_) == "30 tokens, batch item 1, pass 1"
    assert not browser.errors


def test_the_map_fills_with_the_norms_of_all_layers(browser: Chromium, server: Server) -> None:
    browser.open(server.url, width=1280)
    told(browser)
    colours = browser.run(
        """(() => {
          const map = document.getElementById("map"), {width, height} = map;
          const all = map.getContext("2d").getImageData(0, 0, width, height).data;
          return [5.5, 4.5, 3.5, 2.5, 1.5, 0.5].map((row) => {
            const at = 4 * Math.round(row * height / 6) * width;
            return all.slice(at, at + 4 * width).reduce((sum, one) => sum + one, 0);
          });
        })()"""
    )
    assert colours == sorted(colours)  # norms grow with the layer, and cividis gets lighter
    assert len(set(colours)) == LAYERS
    assert not browser.errors


@pytest.mark.parametrize("width", [1280, 400])
def test_the_tab_key_reaches_everything_and_the_focus_is_seen(
    browser: Chromium, server: Server, width: int
) -> None:
    browser.open(server.url, width=width)
    told(browser)
    change(browser, "by", "any")
    told(browser)
    reached = """[...document.querySelectorAll(
        "a[href],select,input,button,summary,[tabindex='0']")]
        .filter((one) => one.checkVisibility() && !one.disabled"""
    names = []
    for _ in range(browser.run(f"{reached}).length") + 3):
        browser.press("Tab")
        one = browser.run(
            f"""(() => {{
              const one = document.activeElement;
              if (one === document.body) return null;
              one.dataset.seen = "1";
              return [{FOCUSED}, getComputedStyle(one).outlineStyle];
            }})()"""
        )
        if one is None:
            break
        assert one[1] != "none", one
        names.append(one[0])
    assert not browser.run(f"{reached} && !one.dataset.seen).map((one) => one.outerHTML)")
    for name in ("sequence", "sequence-on", "from", "from-on", "number", "by", "layer", "option"):
        assert name in names, name
    labels = browser.run(
        """[...document.querySelectorAll("input,select,button")]
        .filter((one) => !(one.labels && one.labels.length) && !one.getAttribute("aria-label")
          && !one.textContent.trim()).map((one) => one.outerHTML)"""
    )
    assert not labels
    assert not browser.errors


def test_what_cant_be_had_is_said_and_asked_for_again(
    browser: Chromium, tmp_path: Path, rows: np.ndarray
) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    for block in range(LAYERS):
        log.layer(f"model.layers.{block}", "resid", block)
    log.begin(axis(1, 30))
    for block in range(LAYERS):
        log.put(f"model.layers.{block}", rows[block, :30][np.newaxis])
    log.close()
    archive = actstore.compact(log.path, tmp_path / "run.zarr").path
    with served(archive) as mine:
        browser.open(mine.url, width=1280)
        told(browser)
        kept = {one: one.read_bytes() for one in archive.rglob("c/**/*") if one.is_file()}
        for one, held in kept.items():
            one.write_bytes(held[: len(held) // 2])
        change(browser, "by", "any")
        change(browser, "number", 5)
        browser.wait("!document.getElementById('failed').hidden")
        why = browser.run("document.getElementById('failed-why').textContent")
        assert "actstore verify" in why
        assert str(tmp_path) not in why
        assert browser.run("document.getElementById('failed').getAttribute('role')") == "alert"
        assert browser.run(CONTRAST)[0] >= 4.5
        for one, held in kept.items():
            one.write_bytes(held)
        browser.run("document.getElementById('again').click()")
        assert "feature 5, layer 3" in told(browser)["detail"]
        mine.end()
        change(browser, "number", 6)
        browser.wait("!document.getElementById('failed').hidden")
        why = browser.run("document.getElementById('failed-why').textContent")
        assert "is actstore serve still running?" in why
