"""In a real browser: nothing fails, controls work, keys reach everything, texts can be read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import actstore

sys.path.insert(0, str(Path(__file__).parent))
import chromium
from chromium import Chromium
from runs import compacted, run_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.found() is None, reason="there is no Chromium"),
]

#: The contrast of each text with what is behind it; the least, and what has it.
CONTRAST = """(() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length > 3 ? found : [...found, 1];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((one) => one / 255)
      .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const stack = [];
    for (let one = element; one; one = one.parentElement) {
      stack.push(parse(getComputedStyle(one).backgroundColor));
    }
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  for (const one of document.querySelectorAll("details")) one.open = true;
  let worst = [99, ""], count = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility()) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ground = behind(element);
    const ink = element.namespaceURI.includes("svg") ? style.fill : style.color;
    const [a, b] = [light(over(parse(ink), ground)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    count += 1;
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 200)];
  }
  return [...worst, count];
})()"""

#: What has the focus, by a short name.
FOCUSED = """(() => {
  const one = document.activeElement;
  return one.id || one.getAttribute("role") || one.tagName;
})()"""

STATE = """(() => ({
  colours: [...document.querySelectorAll("#strip [role=option]")]
    .map((one) => one.style.background),
  layer: document.getElementById("layer-name").textContent,
  said: document.getElementById("layer").getAttribute("aria-valuetext"),
  now: [...document.querySelectorAll("#charts .now")].map((one) => one.textContent),
  detail: document.getElementById("detail").textContent,
  selected: [...document.querySelectorAll("#strip [role=option]")]
    .findIndex((one) => one.getAttribute("aria-selected") === "true"),
  tip: document.getElementById("tip").hidden ? null : document.getElementById("tip").textContent,
  by: document.getElementById("by").value,
}))()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page")
    log, _ = run_log(place / "run.stream", width=128, rows=160, layers=5)
    found = actstore.report(compacted(log, "nmse=2e-4"), place / "run.html")
    if kept := os.environ.get("ACTSTORE_SCREENSHOTS"):
        (Path(kept) / "hostile.html").write_bytes(found.read_bytes())
    return found


def assert_legible(browser: Chromium, name: str) -> None:
    """Check every text's contrast, and the console; keep a screenshot where that is wanted."""
    if kept := os.environ.get("ACTSTORE_SCREENSHOTS"):
        browser.screenshot(Path(kept) / name)
    ratio, what, count = browser.run(CONTRAST)
    assert ratio >= 4.5, what
    assert count > 200
    assert not browser.errors


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_is_read_and_says_nothing_to_the_console(
    browser: Chromium, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('h1').length") == 1
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3')].map((one) => one.tagName)")
    assert levels == ["H1"] + ["H2"] * (len(levels) - 1)
    assert_legible(browser, f"page-{width}-{'dark' if dark else 'light'}.png")


@pytest.mark.parametrize("width", [1280, 400])
def test_slider_strip_and_choices_change_what_is_shown(
    browser: Chromium, page: Path, width: int
) -> None:
    browser.open(page, width=width)
    before = browser.run(STATE)
    assert before["layer"] == "2"
    assert len(set(before["colours"])) > 10
    browser.run("document.getElementById('layer').focus()")
    browser.press("ArrowRight")
    after = browser.run(STATE)
    assert after["layer"] == "3"
    assert after["said"] == "layer 3, model.layers.3"
    assert after["colours"] != before["colours"]
    assert all(one.startswith("Layer 3:") for one in after["now"])
    assert after["now"] != before["now"]
    assert after["detail"] != before["detail"]
    browser.run(
        "document.getElementById('by').value = '0';"
        "document.getElementById('by').dispatchEvent(new Event('change'))"
    )
    feature = browser.run(STATE)
    assert feature["colours"] != after["colours"]
    assert "feature " in feature["detail"]
    browser.run(
        "document.getElementById('variable').value = '1';"
        "document.getElementById('variable').dispatchEvent(new Event('change'))"
    )
    other = browser.run(STATE)
    assert other["colours"] != feature["colours"]
    assert other["layer"] == "3"
    assert other["by"] == "0"
    assert not browser.errors


def test_tokens_tell_of_themselves_when_pointed_at_and_by_keys(
    browser: Chromium, page: Path
) -> None:
    browser.open(page, width=1280)
    box = browser.run(
        "(({x, y}) => [x + 3, y + 3])(document.querySelectorAll('#strip [role=option]')[3]"
        ".getBoundingClientRect())"
    )
    browser.point(*box)
    tip = browser.run(STATE)["tip"]
    assert "position 3" in tip
    assert "topic <b>sets</b>" in tip
    browser.press("Escape")
    assert browser.run(STATE)["tip"] is None
    browser.run("document.querySelector('#strip [tabindex=\"0\"]').focus()")
    for key, place in [("ArrowRight", 1), ("End", 163), ("ArrowLeft", 162), ("Home", 0)]:
        browser.press(key)
        found = browser.run(STATE)
        assert found["selected"] == place
        assert f"position {place} " in found["tip"]
        assert f"position{place}" in found["detail"]
        assert browser.run("document.activeElement.getAttribute('aria-selected')") == "true"
    browser.press("ArrowDown")
    assert browser.run(STATE)["selected"] > 0
    browser.press("ArrowUp")
    assert browser.run(STATE)["selected"] >= 0
    assert not browser.errors


def test_hostile_texts_are_texts(browser: Chromium, page: Path) -> None:
    browser.open(page, width=1280)
    texts = browser.run(
        "[...document.querySelectorAll('#strip [role=option]')].map((one) => one.textContent)"
    )
    assert texts[1] == "</script><img·src=x·onerror=alert(1)>"
    assert texts[3] == "⟨2028⟩⟨2029⟩"
    assert texts[7] == "⟨202E⟩evil"
    assert texts[11] == "⏎⏎"
    assert texts[13] == "#113"
    assert browser.run("document.images.length") == 0
    assert browser.run("document.scripts.length") == 2
    browser.run("document.body.append(Object.assign(document.createElement('script'), "
                "{textContent: 'window.ran = 1'}))")  # fmt: skip
    assert browser.run("window.ran") is None  # since the policy lets only the page's own run
    assert any("Content Security Policy" in one for one in browser.errors)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_tab_key_reaches_everything_and_the_focus_is_seen(
    browser: Chromium, page: Path, width: int
) -> None:
    browser.open(page, width=width)
    wanted = browser.run(
        """[...document.querySelectorAll("a[href],select,input,button,summary,[tabindex='0']")]
        .filter((one) => one.checkVisibility() && !one.disabled).length"""
    )
    seen: list[Any] = []
    for _ in range(wanted + 3):
        browser.press("Tab")
        told = browser.run(
            f"""(() => {{
              const one = document.activeElement;
              if (one === document.body) return null;
              one.dataset.seen = "1";
              return [{FOCUSED}, getComputedStyle(one).outlineStyle];
            }})()"""
        )
        if told is None:
            break
        seen.append(told)
    missed = browser.run(
        """[...document.querySelectorAll("a[href],select,input,button,summary,[tabindex='0']")]
        .filter((one) => one.checkVisibility() && !one.disabled && !one.dataset.seen)
        .map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert not missed
    names = [name for name, _ in seen]
    for name in ("variable", "layer", "by", "scale", "option", "map", "slider", "code", "copy"):
        assert name in names, name
    assert all(outline != "none" for _, outline in seen)
    browser.run("document.getElementById('map').focus()")
    before = browser.run(STATE)
    browser.press("ArrowUp")
    browser.press("ArrowRight")
    after = browser.run(STATE)
    assert after["layer"] == "3"
    assert after["selected"] == before["selected"] + 1
    browser.run("document.querySelector('#charts svg').focus()")
    browser.press("Home")
    assert browser.run(STATE)["layer"] == "0"
    assert not browser.errors


@pytest.mark.parametrize("width", [1280, 400])
def test_runs_with_little_in_them_have_pages_without_errors(
    browser: Chromium, tmp_path: Path, width: int
) -> None:
    logs = {
        "no rows": {"rows": 0, "generated": 0},
        "one layer": {"layers": 1},
        "one token": {"rows": 1, "generated": 0},
        "no layers": {"layers": 0},
        "no width": {"width": 0},
    }
    for name, options in logs.items():
        log, _ = run_log(tmp_path / f"{name}.stream", **options)
        found = actstore.report(log, tmp_path / "page.html")
        browser.open(found, width=width)
        assert browser.run("document.documentElement.scrollWidth") <= width, name
        assert browser.run(CONTRAST)[0] >= 4.5, name
        assert not browser.errors, name


def test_a_notebook_shows_the_page_in_a_frame(browser: Chromium, tmp_path: Path) -> None:
    log, _ = run_log(tmp_path / "run.stream")
    with actstore.open_dataset(log) as dataset:
        inline = dataset.actstore.explore()._repr_html_()
    book = tmp_path / "book.html"
    book.write_text(f"<!doctype html><meta charset=utf-8><body>{inline}", encoding="utf-8")
    browser.open(book, width=1280)
    assert browser.run("document.querySelector('iframe').getBoundingClientRect().width") > 1000
    assert not browser.errors
