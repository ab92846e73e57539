"""Reports in a browser: silent, alone, readable on a phone, in the dark, on paper and without a mouse."""

from collections.abc import Iterator

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, sync_playwright

from spt_jax.reports.html import write_report
from tests.pages import CHROMIUM, faint_texts, focused, sideways
from tests.reports.workdirs import WRITERS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=WRITERS)
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(WRITERS[request.param](tmp_path_factory.mktemp("reports") / "a run")).as_uri()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The report, whose console stays empty and which asks for nothing but itself."""
    page = browser.new_page(viewport={"width": 360, "height": 740})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert not said and {url for url in asked if not url.startswith("data:")} == {address}


def test_it_is_readable_at_every_width_and_in_the_dark(page: Page):
    shades = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (360, 1200):
            page.set_viewport_size({"width": width, "height": 740})
            assert sideways(page) == 0
            assert faint_texts(page) == []
        shades.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(shades) == 2
    sizes = "texts => texts.map(text => text.getBoundingClientRect().height)"
    page.set_viewport_size({"width": 360, "height": 740})
    assert all(height > 8 for height in page.locator("svg text").evaluate_all(sizes))
    assert page.locator("img").count() == 0 and page.evaluate("window.broken") is None


def test_the_keyboard_reaches_what_scrolls_and_what_opens(page: Page):
    regions = page.get_by_role("region").evaluate_all("own => own.map(one => one.getAttribute('aria-label'))")
    assert focused(page, len(regions) + 1) == [*regions, "config.json"]
    assert not page.locator("details pre").is_visible()
    page.keyboard.press("Enter")
    assert page.locator("details pre").is_visible()
    page.locator("table").last.scroll_into_view_if_needed()
    page.get_by_role("region").first.focus()
    before = page.evaluate("document.activeElement.scrollLeft")
    for _ in range(100):  # `wait_for_function` compiles text while it polls, which the page's policy forbids
        page.keyboard.press("ArrowRight")
        if page.evaluate("document.activeElement.scrollLeft") > before:
            return
        page.wait_for_timeout(50)
    pytest.fail("the arrow keys do not scroll the table")


def test_on_paper_nothing_is_dark_or_cut_off(page: Page):
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 1000, "height": 740})
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 31, 33)"
    regions = page.get_by_role("region")
    assert set(regions.evaluate_all("own => own.map(one => getComputedStyle(one).overflowX)")) <= {"visible"}
    assert page.pdf()[:5] == b"%PDF-"
