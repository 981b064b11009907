"""The report as a reader meets it: headless Chromium opens it in a wide window and in a narrow one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ooc_moe.metrics.log import MetricsWriter
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report import summary
from ooc_moe.report.charts import CHARTS
from ooc_moe.report.report import write_report
from tests.ooc_moe.report.browser import CHROMIUM, Tab, headless_chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium); .ci/run installs it")

# What lies beyond the window, or is wider than the box that holds it, outside of what was made to scroll.
OVERFLOWING = """
[...document.querySelectorAll("body *")]
  .filter(element => !element.closest("table, figure"))
  .filter(element => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
                     || (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display === "block"
                         && getComputedStyle(element).overflowX === "visible"))
  .map(element => element.outerHTML.slice(0, 80))
"""
SCROLLED = (
    '[...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText.slice(0, 80))'
)
PICTURES = "[...document.images].map(image => [image.alt, image.naturalWidth, image.clientWidth])"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with headless_chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(finished_run: Path) -> Path:
    return write_report(finished_run)


@pytest.fixture(scope="module")
def long_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of twelve games with long names, each evaluated after each."""
    run_dir = tmp_path_factory.mktemp("long") / ("a-run-with-a-name-that-is-as-long-as-the-names-of-runs-may-be-" + "x" * 40)
    games = [f"pixel/a-game-with-a-long-name@{number}" for number in range(12)]
    writer = MetricsWriter(run_dir, tensorboard=False)
    for phase, game in enumerate(games):
        where = {"step": phase + 1, "update": phase + 1, "game": game}
        writer.log("switch", **{**where, "step": phase}, phase=phase, **{"from": None, "to": game})
        writer.log("update", **where, reward_per_step=0.1, usage={"0": {str(phase): 1}}, cache={"accesses": 10, "hits": 9})
        for known in games[: phase + 1]:
            writer.log("evaluation", **where, phase=phase, evaluated=known, returns=[1.0, 2.0], return_mean=1.5, random_mean=0.0)
    return write_report(run_dir)


@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_without_a_complaint_and_asks_nobody_for_anything(tab: Tab, report: Path, width: int) -> None:
    tab.open(report, width=width)
    assert tab.complaints == []
    assert tab.requests[0] == report.resolve().as_uri()
    assert all(address.startswith("data:image/png") for address in tab.requests[1:])


def test_every_picture_is_loaded_and_as_wide_as_the_text(tab: Tab, report: Path) -> None:
    tab.open(report, width=1280)
    pictures = tab.run(PICTURES)
    assert [title for title, _, _ in pictures] == [chart.title for chart in CHARTS]
    assert all(natural >= shown > 850 for _, natural, shown in pictures)


def test_what_a_reader_looks_for_is_rendered(tab: Tab, report: Path, finished_run: Path) -> None:
    tab.open(report, width=1280)
    text, record = tab.run("document.body.innerText"), RunRecord.read(finished_run)
    for table in summary.tables(record):
        assert table.title in text
        assert table.note in text
        for row in table.rows:
            assert "\t".join(row) in text
    for wanted in (record.name, summary.headline(record), *(chart.reading for chart in CHARTS), *dict(summary.facts(record)).values()):
        assert wanted in text


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["report", "long_report"])
def test_nothing_is_wider_than_the_window(tab: Tab, request: pytest.FixtureRequest, which: str, width: int) -> None:
    tab.open(request.getfixturevalue(which), width=width)
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run(OVERFLOWING) == []
    if width == 1280:
        assert tab.run(SCROLLED) == []  # In a narrow window tables and pictures may scroll in their boxes.


def test_the_screenshot_shows_the_whole_page(tab: Tab, report: Path, tmp_path: Path) -> None:
    tab.open(report, width=1280)
    tab.screenshot(tmp_path / "report.png")
    screenshot = Image.open(tmp_path / "report.png")
    assert screenshot.size == (1280, tab.run("document.documentElement.scrollHeight"))
    # Every stretch of 1000 pixels has something written or drawn on it.
    rows = np.asarray(screenshot.convert("L"))
    assert all(rows[start : start + 1000].std() > 5 for start in range(0, len(rows), 1000))


def test_faults_of_a_page_would_be_seen(tab: Tab, tmp_path: Path) -> None:
    page = tmp_path / "faulty.html"
    page.write_text(
        '<body><div id="wide" style="width: 2000px">wide</div><img alt="broken" src="data:image/png;base64,AAAA">'
        '<div class="scroll" style="overflow-x: auto; width: 200px"><div style="width: 300px">cut off</div></div>'
        '<img src="http://127.0.0.1:9/elsewhere.png"><script>console.error("said"); missing()</script>'
    )
    tab.open(page, width=1280)
    said = str(tab.complaints)
    assert "'said'" in said
    assert "missing is not defined" in said
    assert "http://127.0.0.1:9/elsewhere.png" in tab.requests
    assert ["broken", 0] in [picture[:2] for picture in tab.run(PICTURES)]
    assert tab.run(SCROLLED) == ["cut off"]
    assert any('id="wide"' in element for element in tab.run(OVERFLOWING))
