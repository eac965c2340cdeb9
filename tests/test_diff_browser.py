"""The page in a real browser, opened from disk without a network."""

from __future__ import annotations

import copy
import operator
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph

import re2fx
from re2fx.capture import capture
from re2fx.diff import diff, history
from tests.models import Net
from tests.test_diff import passed

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium as the system has it."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages the tests open."""
    path = tmp_path_factory.mktemp("pages")
    model = Net(depth=12)
    rev = re2fx.transform(model)
    assert isinstance(rev, re2fx.RewiredModule)
    captured = capture(model).train
    steps = history(
        passed(rev, ("captured", captured), ("normal", captured), ("rewired", rev.graph))
    )
    diff(model, rev).to_html(path / "net.html", steps)
    before = large(2000)
    diff(before, edited(before)).to_html(path / "large.html")
    return path


@pytest.fixture
def open_page(browser: Any, folder: Path) -> Iterator[Any]:
    """Opens a page at a width; scripts must not fail and nothing may be loaded."""
    contexts = []
    problems: list[str] = []

    def check(url: str) -> None:
        if not url.startswith("file:"):
            problems.append(url)

    def open_at(name: str, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10 * SECONDS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda asked: check(asked.url))
        page.goto((folder / name).as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert problems == []


def large(blocks: int) -> Graph:
    """Ten stages of blocks, five nodes each."""
    graph = Graph()
    value = graph.placeholder("x")
    for number in range(blocks):
        path = f"stages.{number * 10 // blocks}.blocks.{number % (blocks // 10)}"
        branch = value
        made = []
        for target in (torch.relu, torch.neg, torch.tanh, torch.exp):
            branch = graph.call_function(target, (branch,))
            made.append(branch)
        value = graph.call_function(operator.add, (value, branch))
        for node in (*made, value):
            node.meta["nn_module_stack"] = {path: (path, "Block")}
            node.meta["source_line"] = ("net.py", 12, "forward", "return x + f(x)")
    graph.output(value)
    return graph


def edited(graph: Graph) -> Graph:
    """Every fiftieth block changed, in such a way that no two neighbours are alike."""
    after = copy.deepcopy(graph)
    for number, node in enumerate(node for node in list(after.nodes) if node.target is torch.tanh):
        if number % 50 == 7:
            node.target = torch.sigmoid
        elif number % 50 == 30:
            node.replace_all_uses_with(node.args[0])
            after.erase_node(node)
    return after


def lines(page: Any) -> int:
    """How many lines the page has, in view or not."""
    return int(page.get_attribute("#rows", "aria-rowcount"))


def settles(page: Any, wanted: Callable[[int], bool]) -> bool:
    """Whether the number of lines becomes what is wanted; the page draws when it has time."""
    for _ in range(200):
        if wanted(lines(page)):
            return True
        page.wait_for_timeout(25)
    return False


def here(page: Any) -> str:
    """Text of the current line."""
    return str(page.inner_text("#rows .here"))


def count(page: Any) -> str:
    """What the search says."""
    return str(page.inner_text("#count"))


def test_modules_fold_and_unfold(open_page: Any) -> None:
    page = open_page("net.html")
    before = lines(page)
    block = page.locator(".row.section", has_text="blocks.0").first
    assert block.get_attribute("aria-expanded") == "true"
    block.click()
    assert settles(page, lambda number: number < before)
    page.locator(".row.section", has_text="blocks.0").first.click()
    assert settles(page, lambda number: number == before)
    # The middle blocks are rewired alike and stand as one entry.
    alike = page.locator(".row.section.alike").first
    alike.scroll_into_view_if_needed()
    assert "identical" in alike.inner_text()
    tree = page.locator("#tree .branch", has_text="..").first
    assert "\N{MULTIPLICATION SIGN} 11" in tree.inner_text()


def test_unchanged_runs_are_folded_until_opened(open_page: Any) -> None:
    page = open_page("large.html")
    before = lines(page)
    assert before < 5000
    quiet = page.locator(".row.section[aria-expanded=false]").first
    quiet.click()
    assert settles(page, lambda number: number > before)


def test_search_steps_through_hits(open_page: Any) -> None:
    page = open_page("net.html")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.type("outer = self.outer")
    assert count(page) == "1 of 12"
    page.keyboard.press("Enter")
    assert count(page) == "2 of 12"
    assert "outer = self.outer" in here(page)
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    page.keyboard.press("n")
    page.keyboard.press("N")
    assert count(page) == "3 of 12"
    page.keyboard.press("Escape")
    assert count(page) == ""
    page.fill("#query", "no such node")
    assert count(page) == "none"


def test_keys_step_through_changes(open_page: Any) -> None:
    page = open_page("net.html")
    seen = []
    for _ in range(6):
        page.keyboard.press("j")
        seen.append(here(page))
        assert page.get_attribute("#rows .here", "data-status") != "kept"
    assert len(set(seen)) == 6
    page.keyboard.press("k")
    assert here(page) == seen[4]
    before = lines(page)
    page.keyboard.press("f")
    assert settles(page, lambda number: number < before)
    assert page.get_attribute("#rows .here", "aria-expanded") == "false"
    page.keyboard.press("f")
    assert settles(page, lambda number: number == before)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.id") == "rows"
    assert page.get_attribute("#rows", "aria-activedescendant")


def test_every_change_has_a_mark_that_is_no_colour(open_page: Any) -> None:
    page = open_page("net.html")
    page.keyboard.press("j")
    for status, mark in (("added", "+"), ("rewired", "↷")):
        row = page.locator(f".row[data-status={status}]").first
        assert mark in row.inner_text()


def test_hovering_shows_source_inputs_and_users(open_page: Any) -> None:
    page = open_page("net.html")
    row = page.locator(".row[data-status=rewired]", has_text="add = ").first
    row.hover()
    detail = page.inner_text("#detail")
    assert "models.py:" in detail
    assert "return x + self.outer" in detail
    assert "inputs" in detail
    assert "users" in detail
    assert page.locator(".cell.input").count() >= 2
    assert page.locator(".cell.user").count() >= 1
    page.locator("#detail .links button").first.click()
    assert page.inner_text("#detail h2") in here(page)


def test_themes(open_page: Any) -> None:
    def background(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    light, dark = open_page("net.html"), open_page("net.html", scheme="dark")
    colours = background(light), background(dark)
    assert colours == ("rgb(255, 255, 255)", "rgb(13, 17, 23)")
    dark.click("#theme")
    assert background(dark) == colours[0]
    dark.keyboard.press("t")
    assert background(dark) == colours[1]


CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *:not(script, style)")].filter((node) =>
    node.checkVisibility() && [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim())
    && !node.closest("svg"));
  return texts.map((node) => {
    const pair = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    pair.sort((a, b) => b - a);
    return [(pair[0] + 0.05) / (pair[1] + 0.05), node.outerHTML.slice(0, 90)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page: Any, scheme: str) -> None:
    page = open_page("net.html", scheme=scheme)
    page.keyboard.press("j")
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_width(open_page: Any, width: int) -> None:
    page = open_page("net.html", width)
    page.keyboard.press("j")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.getElementById('scroll').scrollWidth") <= width
    rows = page.locator("#rows .row[data-row]")
    assert rows.count() > 5
    sides = rows.first.locator(".cell").count()
    assert sides == (1 if width == 390 else 2)
    assert page.locator("#modules").is_visible() == (width == 390)
    if width == 390:
        page.click("#modules")
        page.locator("#tree .branch").first.click()
        assert not page.locator("#tree").is_visible()
        assert page.locator("#rows .here").is_visible()


def test_chains_are_drawn_and_open_up(open_page: Any) -> None:
    page = open_page("net.html")
    drawing = page.locator(".drawing svg").first
    assert drawing.locator(".rail").count() == 2
    assert drawing.locator("[aria-label^=Branch]").count() == 5
    assert "7 more" in drawing.text_content()
    assert "readout" in drawing.text_content()
    drawing.locator("[aria-label='Show 7 more branches']").press("Enter")
    assert page.locator(".drawing svg [aria-label^=Branch]").count() == 12
    page.locator("[aria-label^='Branch 3']").click()
    assert "add" in here(page)


def test_steps_are_chosen(open_page: Any) -> None:
    page = open_page("net.html")
    everything = lines(page)
    page.click("[role=tab] >> nth=1")
    assert page.get_attribute("[role=tab] >> nth=1", "aria-selected") == "true"
    assert "0 added" in page.inner_text("#summary")
    assert not page.locator("#wiring").is_visible()
    page.click("[role=tab] >> nth=2")
    assert settles(page, lambda number: number == everything)
    assert page.locator("#wiring").is_visible()


def test_ten_thousand_nodes_are_usable(open_page: Any) -> None:
    page = open_page("large.html")
    assert int(page.get_attribute("html", "data-ready")) < 3 * SECONDS
    assert page.locator("#rows .row").count() < 120
    before = page.evaluate("performance.now()")
    page.fill("#query", "tanh")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.locator("#rows .here").count() >= 1
    assert page.evaluate("performance.now()") - before < 3 * SECONDS
    for _ in range(3):
        page.mouse.move(700, 400)
        page.mouse.wheel(0, 4000)
    page.wait_for_function("document.querySelectorAll('#rows .row').length > 10")


def test_printing_shows_every_line(open_page: Any) -> None:
    page = open_page("net.html")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#rows .row").count() == lines(page)
    assert not page.locator("#detail").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
