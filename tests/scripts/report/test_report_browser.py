"""The report's page in a real browser: found by role and name, told by mouse and by keyboard, light and dark.

Needs a Chromium on the PATH and `pip install 'dbrx-quant[browser]'`; skipped without them.
"""

import re
import shutil
from dataclasses import replace

import pytest
import report_facts

from dbrx_quant.scripts.report.data import compare, gather
from dbrx_quant.scripts.report.page import render

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH", allow_module_level=True)

KINDS = ("bits", "error", "tokens", "change")

# Contrast of text and ground, and luminance of the ground, of all steps of a kind of map, as painted.
STEPS = """(kind) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((byte) => {
      const c = byte / 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const table = document.createElement("table");
  table.className = `heat ${kind}`;
  const cells = [...Array(21).keys()].map((i) => `<td class="s${i}">0</td>`).join("");
  table.innerHTML = `<tbody><tr><th></th>${cells}</tr></tbody>`;
  document.body.append(table);
  const found = [...table.querySelectorAll("td")].map((cell) => {
    const style = getComputedStyle(cell);
    const [ground, text] = [luminance(style.backgroundColor), luminance(style.color)];
    return [(Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05), ground];
  });
  table.remove();
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The addresses of a page of one report, of one full-size model, of a dense one and of a comparison."""
    folder, measured = tmp_path_factory.mktemp("pages"), report_facts.measurement()
    reports = [gather(report_facts.folder(measured, bpw)) for bpw in (3.0, 2.5, 4.0)]
    bare = replace(
        report_facts.folder(measured), strategy=None, measurement=None, record=None, evaluations=()
    )
    made = {
        "one": reports[0],
        "large": gather(report_facts.folder(report_facts.measurement(blocks=40))),
        "dense": gather(report_facts.folder(report_facts.measurement(blocks=12, experts=0))),
        "bare": gather(bare),
        "several": compare(reports),
    }
    for name, data in made.items():
        (folder / f"{name}.html").write_text(render(data), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in made}


@pytest.fixture
def visit(browser, pages):
    """Opens a page; at the end, nothing may have been complained of or asked of the network."""
    faults, contexts = [], []

    def visit(name, width=1280, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: wanted(request.url) or faults.append(request.url))
        page.goto(pages[name])
        return page

    def wanted(address):
        return address in pages.values() or address.startswith("data:")

    yield visit
    for context in contexts:
        context.close()
    assert faults == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["one", "large", "dense", "bare", "several"])
def test_a_page_opens_without_complaint_and_fits_its_width(name, width, visit):
    page = visit(name, width)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.get_by_role("main").is_visible()
    assert page.get_by_role("heading", level=1).count() == 1


def test_everything_is_found_by_role_and_name(visit):
    page = visit("one")
    assert page.get_by_role("heading", name="dbrx-mini 3.00 bpw").is_visible()
    sections = page.get_by_role("navigation", name="Sections").get_by_role("link")
    for link in sections.all():
        link.click()
        assert page.locator(link.get_attribute("href")).get_by_role("heading", level=2).is_visible()
    for name in ("Where the bits went", "Who saw the calibration text", "What each bit bought"):
        assert page.get_by_role("region", name=name).first.is_visible()
    grid = page.get_by_role("grid", name="w2 bits per weight by block and expert")
    assert grid.get_by_role("columnheader", name="expert 15").count() == 1
    assert grid.get_by_role("rowheader", name="block 5").count() == 1
    assert grid.get_by_role("gridcell").count() == 6 * 16
    chart = page.get_by_role("group", name="KL divergence against bits per weight")
    assert chart.get_by_role("img", name=re.compile("^this checkpoint")).is_visible()
    assert page.get_by_role("img", name=re.compile("^block 3: .* nats")).is_visible()
    assert page.get_by_role("table", name="Evaluations").get_by_role("cell", name="93.00 %").is_visible()


def test_a_cell_is_told_on_hover_and_no_longer_after_it(visit):
    page = visit("one")
    tip = page.get_by_role("tooltip")
    assert tip.count() == 0
    page.get_by_role("grid", name="v1 bits").get_by_role("gridcell").nth(16 + 2).hover()
    assert tip.inner_text().splitlines()[0] == "v1 · block 1, expert 2"
    assert "calibration tokens" in tip.inner_text()
    page.get_by_role("heading", level=1).hover()
    assert tip.count() == 0


def test_a_map_is_one_stop_of_tab_and_arrows_walk_in_it(visit):
    page = visit("one")
    tip = page.get_by_role("tooltip")
    page.get_by_role("radio", name="Bits per weight").focus()
    seen = []
    for _ in range(3):
        page.keyboard.press("Tab")
        seen.append(tip.inner_text().splitlines()[0])
    assert seen == [f"{kind} · block 0, expert 0" for kind in ("w1", "v1", "w2")]
    for key, place in (
        ("ArrowDown", "block 1, expert 0"),
        ("ArrowRight", "block 1, expert 1"),
        ("End", "block 1, expert 15"),
        ("ArrowRight", "block 1, expert 15"),
        ("Control+Home", "block 0, expert 0"),
        ("ArrowUp", "block 0, expert 0"),
        ("Control+End", "block 5, expert 15"),
    ):
        page.keyboard.press(key)
        assert tip.inner_text().splitlines()[0] == f"w2 · {place}"
        focused = page.locator(":focus")
        assert focused.get_attribute("aria-describedby") == "tip"
        box, around = tip.bounding_box(), focused.bounding_box()
        assert 0 <= box["x"] <= 1280 - box["width"]
        assert box["y"] + box["height"] <= around["y"] or around["y"] + around["height"] <= box["y"]
    page.keyboard.press("Escape")
    assert tip.count() == 0
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert tip.inner_text().splitlines()[0] == "w2 · block 5, expert 15"  # it remembers where one was


def test_marks_of_charts_are_reached_by_keyboard(visit):
    page = visit("one")
    page.get_by_role("img", name=re.compile("^this checkpoint")).focus()
    tip = page.get_by_role("tooltip")
    assert "predicted" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "measured on wiki.txt" in tip.inner_text()
    page.get_by_role("img", name=re.compile("^block 0: ")).focus()
    page.keyboard.press("End")
    assert tip.inner_text().startswith("head: ")


def test_errors_take_the_place_of_bits(visit):
    page = visit("one")
    bits, errors = (page.get_by_role("grid", name=f"w1 {what}") for what in ("bits", "relative error"))
    assert bits.is_visible()
    assert not errors.is_visible()
    page.get_by_role("radio", name="Bits per weight").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="Relative error").is_checked()
    assert errors.is_visible()
    assert not bits.is_visible()
    errors.get_by_role("gridcell").first.hover()
    assert "relative error" in page.get_by_role("tooltip").inner_text()


def test_tables_lie_behind_the_charts(visit):
    page = visit("one")
    table = page.get_by_role("table", name="Predicted KL by block, nats")
    assert not table.is_visible()
    page.locator("#blocks summary").focus()
    page.keyboard.press("Enter")
    assert table.get_by_role("row", name=re.compile("^block 5")).is_visible()


def test_a_touch_tells_too(visit):
    page = visit("large", 390, has_touch=True, is_mobile=True)
    page.get_by_role("grid", name="w1 bits").get_by_role("gridcell").nth(37).tap()
    assert page.get_by_role("tooltip").inner_text().splitlines()[0] == "w1 · block 2, expert 5"


def test_differences_are_told(visit):
    page = visit("several")
    page.get_by_role("grid", name="w1 difference").nth(1).get_by_role("gridcell").nth(20).hover()
    said = page.get_by_role("tooltip").inner_text()
    assert re.search(r"w1 · block 1, expert 4\n[\d.]+ → [\d.]+ bits \(\+?[-\d.]+\)", said)
    assert (
        page.get_by_role("table", name="The checkpoints side by side").get_by_role("columnheader").count()
        == 4
    )


def test_the_system_chooses_light_or_dark_and_the_button_the_other(visit):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (visit("one", scheme=scheme) for scheme in ("light", "dark"))
    colours = [page.evaluate(ground) for page in (light, dark)]
    assert colours[0] != colours[1]
    button = light.get_by_role("button", name="Theme: auto")
    button.click()
    assert light.evaluate(ground) == colours[0]
    light.get_by_role("button", name="Theme: light").press("Enter")
    assert light.get_by_role("button", name="Theme: dark").is_visible()
    assert light.evaluate(ground) == colours[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_and_told_apart_without_hue(scheme, visit):
    page = visit("one", scheme=scheme)
    for kind in KINDS:
        contrasts, grounds = zip(*page.evaluate(STEPS, kind), strict=True)
        assert min(contrasts) >= 4.5, (kind, contrasts)
        if kind != "change":  # which runs from the middle outwards
            rising = list(grounds) == sorted(grounds)
            assert rising or list(grounds) == sorted(grounds, reverse=True), (kind, grounds)


def test_the_page_says_everything_without_script(visit):
    page = visit("one", java_script_enabled=False)
    assert page.get_by_role("grid", name="w1 bits").get_by_role("gridcell").first.inner_text()
    page.get_by_text("Relative error", exact=True).click()
    assert page.get_by_role("grid", name="w1 relative error").is_visible()
    assert page.get_by_role("button").count() == 0
