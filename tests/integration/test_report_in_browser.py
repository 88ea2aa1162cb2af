"""The report in a real browser: no console line, every figure visible, nothing wider than a phone, fit for print."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nostalgia.analysis.report import write_report
from tests.unit.analysis.folders import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# What a reader sees of each figure: its size on the page, and whether its picture was decoded.
FIGURES = """() => [...document.querySelectorAll('img')].map(i => ({
    name: i.closest('figure').id, width: i.getBoundingClientRect().width, height: i.getBoundingClientRect().height,
    natural: i.naturalWidth, alt: i.alt, frame: i.parentElement.getBoundingClientRect().width }))"""
# Elements that reach beyond the window, apart from what is scrolled within a frame of its own.
TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter(e =>
    !e.closest('.plot, .scroll, pre') && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll('body *')].filter(e => e.childNodes.length &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e =>
    parseFloat(getComputedStyle(e).fontSize)))"""
CONTRAST = """() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const back = e => { while (e && /rgba\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(e).backgroundColor))
        e = e.parentElement; return getComputedStyle(e || document.body).backgroundColor; };
    return Math.min(...[...document.querySelectorAll('h1, h2, h3, p, a, td, th, dt, dd, code, figcaption')].map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05); })); }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(NAMES)})")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run with long and hostile names, and of two methods side by side."""
    folder = tmp_path_factory.mktemp("reports")
    tasks = ["task1_a_data_set_with_a_very_long_name_indeed", "<script>alert(1)</script>", "task3_mnist"]
    classes = [[f"class_number_{i}_of_many" for i in range(40)], ["<script>alert(2)</script>"], ["c" * 90]]
    one = write_run(folder / ("a_folder_with_a_long_name_" * 4), tasks=tasks, classes=classes)
    other = write_run(folder / "other", method="finetune", tasks=tasks, classes=classes, shift=0.2)
    return {"one": write_report([one]), "two": write_report([one, other], folder / "two.html")}


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """A page and the list its console lines, errors, dialogues and requests elsewhere go to."""
    page = browser.new_page(**options)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    return page, said


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_figure_is_visible_and_nothing_overflows(
    browser: Any, reports: dict[str, Path], which: str, window: dict[str, int]
) -> None:
    page, said = opened(browser, reports[which], viewport=window)
    assert said == []
    shown = page.evaluate(FIGURES)
    assert len(shown) == (13 if which == "one" else 5)
    for figure in shown:
        assert figure["natural"] > 0, figure
        assert figure["width"] >= 300, figure
        assert figure["height"] >= 120, figure
        assert figure["frame"] <= window["width"], figure
        assert figure["alt"], figure
    assert page.evaluate("document.documentElement.scrollWidth") <= window["width"]
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate(SMALLEST) >= 11
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, reports: dict[str, Path], scheme: str) -> None:
    page, _ = opened(browser, reports["one"], color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(21, 21, 21)") == (scheme == "dark")
    assert page.evaluate(CONTRAST) >= 4.5
    page.close()


def test_paper_shows_what_the_screen_does(browser: Any, reports: dict[str, Path]) -> None:
    """On paper nothing can be scrolled: figures and tables must fit an A4 page's width."""
    page, _ = opened(browser, reports["one"], viewport={"width": 688, "height": 1000}, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    outside = "e => e.getBoundingClientRect().right > innerWidth + 0.5"
    assert (
        page.evaluate(f"[...document.querySelectorAll('img, td, pre')].filter({outside}).map(e => e.outerHTML)") == []
    )
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
