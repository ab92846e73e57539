"""What a page of another site can make a browser do to the server: nothing."""

import http.server
import shutil
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

BODY = '{"model": "tiny", "prompt": "the", "max_tokens": 1}'
# What came back, as far as the browser shows it to the page.
ASK = """async ([url, options]) => {
  try {
    const response = await fetch(url, options);
    return [response.type, response.status, await response.text()];
  } catch (error) {
    return ["failed", 0, ""];
  }
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for which evil.test is this machine."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP evil.test 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Another site, on another port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>evil</title><p>evil")

        def log_message(self, *_) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        yield f"http://evil.test:{own.server_port}"
        own.shutdown()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    yield page
    page.close()


def answers(server) -> str:
    return next(line for line in server.service.metrics.text().splitlines() if line.startswith("spt_jax_answers_total"))


def test_a_name_that_resolves_to_this_machine(page: Page, server):
    """DNS rebinding: the page is of the server's own origin as the browser sees it."""
    port, before = server.url.rsplit(":", 1)[1], answers(server)
    found = page.goto(f"http://evil.test:{port}/v1/models")
    assert found is not None and found.status == 403 and "front" not in found.text()
    for path, options in (
        ("/v1/models", {}),
        ("/v1/completions", {"method": "POST", "headers": {"content-type": "application/json"}, "body": BODY}),
    ):
        kind, status, text = page.evaluate(ASK, [path, options])
        assert (kind, status) == ("basic", 403) and "--allowed-hosts" in text
    assert answers(server) == before


@pytest.mark.parametrize("kind", ["text/plain", "application/json", None])
@pytest.mark.parametrize("mode", ["no-cors", "cors"])
def test_requests_of_another_site_s_page(page: Page, server, site: str, mode: str, kind: str | None):
    before = answers(server)
    page.goto(site)
    headers = {} if kind is None else {"content-type": kind}
    # Without a type the body is a blob, which has none.
    body = f"new Blob([{BODY!r}])" if kind is None else repr(BODY)
    ask = ASK.replace("options);", f"{{...options, body: {body}}});")
    found = page.evaluate(ask, [f"{server.url}/v1/completions", {"method": "POST", "mode": mode, "headers": headers}])
    assert found in (["failed", 0, ""], ["opaque", 0, ""]) and answers(server) == before
    assert page.evaluate(ASK, [f"{server.url}/v1/models", {"mode": mode}]) in (["failed", 0, ""], ["opaque", 0, ""])


def test_a_form_of_another_site(page: Page, server, site: str):
    before = answers(server)
    page.goto(site)
    field = BODY[:-1] + ', "user": "'
    with page.expect_navigation() as navigation:
        page.evaluate(
            """([url, name]) => {
              const form = document.createElement("form"), input = document.createElement("input");
              Object.assign(form, { action: url, method: "POST", enctype: "text/plain" });
              Object.assign(input, { name, value: '"}' });
              form.append(input);
              document.body.append(form);
              form.submit();
            }""",
            [f"{server.url}/v1/completions", field],
        )
    assert navigation.value.status == 403 and answers(server) == before


def test_a_frame_of_another_site(page: Page, server, site: str):
    page.goto(site)
    page.evaluate(
        """(url) => new Promise((resolve) => {
          const frame = document.createElement("iframe");
          Object.assign(frame, { src: url, onload: resolve });
          document.body.append(frame);
        })""",
        server.url,
    )
    (frame,) = page.main_frame.child_frames
    assert "playground" not in frame.title()
    assert page.goto(server.url) is not None and "playground" in page.title()  # not in a frame, it is shown
