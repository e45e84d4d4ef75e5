"""The page in headless Chromium, as people meet it: phone, desktop, dark, printed, by keyboard.

Needs Chromium and `pip install '.[browser]'`; `.ci/run` has both.
"""

import os
import re
import shutil

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install '.[browser]'"
)
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="no axe-playwright-python"
)

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no {NAMES[0]} here")

VIEWS = {
    "phone": {"viewport": {"width": 360, "height": 740}},
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "no script": {"viewport": {"width": 800, "height": 900}, "java_script_enabled": False},
}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root, as CI does.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(comparison, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    comparison.save_html(path, command="lowbit report", inputs="x" * 300)
    return path


@pytest.fixture
def visit(browser, path):
    """Opens the page in one of the views: (page, what it asked for, what it complained of)."""
    contexts = []

    def opened(view):
        contexts.append(browser.new_context(**VIEWS[view]))
        page = contexts[-1].new_page()
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page, requests, complaints

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("view", VIEWS)
def test_no_request_and_no_complaint(visit, view, path):
    page, requests, complaints = visit(view)
    for summary in page.locator("summary").all():
        if not summary.evaluate("e => e.parentElement.open") if view != "no script" else False:
            summary.click()
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert complaints == []


@pytest.mark.parametrize("view", ["phone", "desktop"])
def test_nothing_is_wider_than_the_screen_but_tables_in_their_scrollers(visit, view):
    page, _, _ = visit(view)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    width = VIEWS[view]["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll('body *')]
           .filter(e => !e.closest('.scroller') || e.matches('.scroller'))
           .filter(e => !e.closest('.skip') && e.getClientRects().length)
           .filter(e => e.getBoundingClientRect().right > width + 0.5)
           .map(e => e.outerHTML.slice(0, 120))""",
        width,
    )
    assert outside == []


@pytest.mark.parametrize("view", ["phone", "desktop", "dark"])
def test_accessibility_by_axe(visit, view):
    """Names, roles, landmarks, heading order, contrast: every rule of axe-core."""
    page, _, _ = visit(view)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], [node["html"][:150] for node in v["nodes"][:3]]) for v in found] == []


def test_the_keyboard_reaches_everything_in_order(visit):
    page, _, _ = visit("desktop")
    reachable = page.evaluate(
        """() => {
             const all = [...document.querySelectorAll('a[href], summary, [tabindex="0"]')];
             const seen = all.filter(e => e.checkVisibility({contentVisibilityAuto: true}));
             seen.forEach((e, i) => e.dataset.order = i);
             return seen.length;
           }"""
    )
    order = []
    for _ in range(reachable):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.dataset.order"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", order[-1]
    assert order == [str(i) for i in range(reachable)]


def test_the_keyboard_opens_a_layer_and_skips_to_the_content(visit):
    page, _, _ = visit("desktop")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    layer = page.locator("#histograms summary").first
    layer.focus()
    page.keyboard.press("Enter")
    assert page.locator("#histograms details").first.locator("svg").first.is_visible()


def test_all_details_work_without_script(visit):
    page, _, _ = visit("no script")
    picture = page.locator("#histograms details svg").first
    assert not picture.is_visible()
    page.locator("#histograms summary").first.click()
    assert picture.is_visible()


def test_colours_follow_the_reader(visit):
    colours = set()
    for view in ("desktop", "dark"):
        page, _, _ = visit(view)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_on_paper(visit):
    """What is open is printed, and the machine, in the colours for light, within the page."""
    page, _, _ = visit("dark")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 690, "height": 1000})  # A4 less its margins
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 690
    assert not page.locator("nav").is_visible()
    assert not page.locator("#histograms details").first.is_visible()
    page.evaluate("document.querySelector('#histograms details').open = true")
    assert page.locator("#histograms details svg").first.is_visible()
    machine = page.locator("details.printed")
    assert machine.get_attribute("open") is None
    assert machine.locator("pre").evaluate("e => e.getBoundingClientRect().height") > 50
    pdf = page.pdf(format="A4", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
