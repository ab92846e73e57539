"""The page at / in a browser: what it shows is what the server's API answers, and nothing of it becomes markup."""

import json
import re
import shlex
import time
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.pages import CHROMIUM, faint_texts, focused, sideways

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

BARE, WRITTEN = "tiny, no prompt", "tiny, with a hand-written prompt"
TEXT = "Hello world"
PATHS = {"/", "/v1/models", "/v1/completions", "/v1/classify", "/healthz"}
MARKUP = '<img src=x onerror="window.broken = true">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server) -> Iterator[Page]:
    """The page, whose console stays empty and which talks to nobody but its server."""
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    expect(column(page, 2)).to_be_visible()
    yield page
    page.close()
    assert {url.removeprefix(server.url) for url in asked} <= PATHS
    # The browser itself reports an answer with an error's status.
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


def column(page: Page, number: int) -> Locator:
    return page.get_by_role("region", name=f"Column {number}")


def choose(page: Page, *labels: str) -> None:
    for number, label in enumerate(labels, 1):
        column(page, number).get_by_label("Model").select_option(label=label)


def write(page: Page, label: str, text: str) -> None:
    page.get_by_label(label, exact=True).fill(text)


def finish(page: Page, *, tokens: int = 12) -> None:
    """Presses the button and waits for all columns."""
    write(page, "Max tokens", str(tokens))
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_role("button", name="Answer")).to_be_enabled()


def shown(page: Page, number: int) -> str:
    return column(page, number).locator(".answer").text_content() or ""


def note(page: Page, number: int) -> str:
    return column(page, number).get_by_role("status").text_content() or ""


def measured(page: Page, number: int) -> dict[str, str]:
    names, values = (column(page, number).locator(tag).all_text_contents() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def completion(server, **body):
    answer = server.post("/v1/completions", {"temperature": 0, "logprobs": 0, **body}).json()
    return answer["choices"][0], answer["usage"]


def fake(page: Page, path: str, *pieces: dict, kind: str = "application/json") -> None:
    """Answers in the server's place, with JSON or a stream of it."""
    stream = kind == "text/event-stream"
    body = "".join(f"data: {json.dumps(piece)}\n\n" if stream else json.dumps(piece) for piece in pieces)
    page.route(f"**{path}", lambda route: route.fulfill(status=200, content_type=kind, body=body))


def chunk(tokens: list[str], logprobs: list[float]) -> dict:
    return {"choices": [{"text": "".join(tokens), "logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]}


def test_models_are_listed(page: Page, server):
    names = [model["id"] for model in server.get("/v1/models").json()["data"]]
    assert names[0] == "tiny" and {"front", "pair", "verdict"} < set(names)
    assert column(page, 1).locator("option").all_text_contents() == [BARE, WRITTEN, *names[1:]]
    chosen = [column(page, number).locator("option:checked").text_content() for number in (1, 2)]
    assert chosen == [BARE, names[1]]


def test_it_is_readable_at_every_width_and_in_the_dark(page: Page):
    """Before and after answers, and with the settings folded on a phone."""
    choose(page, BARE, "verdict")
    write(page, "Text", TEXT)
    finish(page)
    column(page, 1).get_by_text("Probabilities").click()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (360, 1200):
            page.set_viewport_size({"width": width, "height": 740})
            expect(page.get_by_label("Temperature")).to_be_visible(visible=width > 480)
            assert sideways(page) == 0
            assert faint_texts(page) == []


def test_the_keyboard_suffices(page: Page, server):
    page.set_viewport_size({"width": 360, "height": 740})
    choose(page, BARE, "verdict")
    page.get_by_label("Text", exact=True).focus()
    reached = focused(page, 10)
    assert reached[3:5] == ["Settings", "Answer"] and reached[6] == reached[8] == "Copy as curl"
    page.get_by_label("Text", exact=True).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_by_label("Text", exact=True).input_value() == reached[0] != ""
    page.get_by_text("Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Temperature")).to_be_visible()


def test_template_and_classes_are_shown_before_an_answer(page: Page, server):
    choose(page, BARE, "verdict")
    found = server.get("/v1/models/verdict").json()
    assert measured(page, 2)["Template"] == found["template"] == "<soft>{text}\n"
    assert measured(page, 2)["Classes"] == ", ".join(found["classes"])
    assert "Template" not in measured(page, 1)


def test_examples_of_prompts_fill_in_the_fields(page: Page):
    shared = {"virtual_tokens": 3, "bytes": 3, "generates": True, "template": "", "classes": []}
    base = {"id": "tiny", "kind": "base", "fields": ["text"], "examples": [], **shared}
    pair = {"id": "pair", "kind": "prompt", "fields": ["question", "answer"], **shared}
    pair["examples"] = [{"question": MARKUP, "answer": "yes"}]
    fake(page, "/v1/models", {"data": [base, pair]})
    page.reload()
    page.get_by_role("button", name=MARKUP).click()
    assert page.get_by_label("question").input_value() == MARKUP and page.get_by_label("answer").input_value() == "yes"


def test_it_says_that_the_server_compiles(page: Page, server, monkeypatch):
    choose(page, BARE, "front")
    write(page, "Text", TEXT)
    with server.service.worker.compilations.running(), monkeypatch.context() as patch:
        step = server.service.worker.engine.step
        patch.setattr(server.service.worker.engine, "step", lambda: time.sleep(0.05))
        page.get_by_role("button", name="Answer").click()
        for number in (1, 2):
            expect(column(page, number).get_by_role("status")).to_have_text("compiling…")
        patch.setattr(server.service.worker.engine, "step", step)
    expect(page.get_by_role("button", name="Answer")).to_be_enabled()
    assert note(page, 1).startswith("Ended")


def test_a_request_can_be_copied_as_curl(page: Page, server):
    choose(page, BARE, "verdict")
    write(page, "Text", 'it\'s "so" $HOME')
    finish(page)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()); }")
    bodies = []
    for number in (1, 2):
        column(page, number).get_by_role("button", name="Copy as curl").click()
        expect(column(page, number).locator(".curl pre")).to_be_visible()
        program, url, *options = shlex.split(column(page, number).locator(".curl pre").text_content() or "")
        assert program == "curl" and options[:3] == ["-H", "content-type: application/json", "-d"]
        bodies.append(server.post(url.removeprefix(server.url), json.loads(options[3])).json())
    assert bodies[0]["choices"][0]["text"] == shown(page, 1)
    assert bodies[1]["data"][0]["label"] == column(page, 2).locator(".label").first.text_content()


def test_answers_are_the_api_s(page: Page, server):
    choose(page, BARE, "front")
    write(page, "Text", TEXT)
    finish(page)
    for number, model in enumerate(("tiny", "front"), 1):
        choice, _ = completion(server, model=model, prompt=TEXT, max_tokens=12)
        assert shown(page, number) == choice["text"] != ""
        column(page, number).get_by_text("Probabilities").click()
        tokens, probabilities = (column(page, number).locator(f"td:nth-child({i})").all_text_contents() for i in (1, 2))
        assert [json.loads(token) for token in tokens] == choice["logprobs"]["tokens"]
        expected = np.exp(choice["logprobs"]["token_logprobs"])
        np.testing.assert_allclose([float(text) for text in probabilities], expected, rtol=6e-3)
        found = measured(page, number)
        assert re.fullmatch(r"\d+ ms", found["First token"]) and re.fullmatch(r"\d+ tokens/s", found["Speed"])
    prompt = server.get("/v1/models/front").json()
    assert measured(page, 2)["Prompt"] == f"{prompt['bytes']:,} bytes, {prompt['virtual_tokens']} virtual tokens"


def test_tokens_are_shaded_and_parts_of_a_character_share_a_span(page: Page):
    parts = ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    tokens = (["a", parts[0]], [-0.1, -0.2]), ([parts[1]], [-0.3]), ([parts[2], " b"], [-0.4, -3.5]), ([""], [-1.0])
    fake(page, "/v1/completions", *[chunk(*own) for own in tokens], kind="text/event-stream")
    choose(page, BARE, "verdict")
    finish(page)
    spans = column(page, 1).locator(".token")
    assert spans.all_text_contents() == ["a", "\u20ac", " b"]
    titles = spans.evaluate_all("spans => spans.map(span => span.title)")
    assert titles == ["probability 0.905", "probability 0.819 \u00d7 0.741 \u00d7 0.670", "probability 0.0302"]
    weights = spans.evaluate_all("spans => spans.map(span => Number(span.style.getPropertyValue('--p')))")
    np.testing.assert_allclose(weights, np.exp([-0.1, -0.9, -3.5]))
    assert len(set(spans.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)"))) == 3
    assert "ended before" in note(page, 1)


def test_hand_written_prompts_and_a_third_column(page: Page, server):
    page.get_by_label("Columns").select_option("3")
    choose(page, BARE, WRITTEN, WRITTEN)
    for number, prompt in {2: "A question: ", 3: "Question: {text}\nlabel"}.items():
        column(page, number).get_by_role("textbox", name="Prompt").fill(prompt)
    write(page, "Text", TEXT)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status").filter(has_text="Ended")).to_have_count(3)
    expect(page.get_by_role("button", name="Answer")).to_be_enabled()
    _, bare = completion(server, model="tiny", prompt=TEXT, max_tokens=1)
    for number, whole in {2: f"A question: {TEXT}", 3: f"Question: {TEXT}\nlabel"}.items():
        choice, usage = completion(server, model="tiny", prompt=whole, max_tokens=48)
        assert shown(page, number) == choice["text"]
        more = usage["prompt_tokens"] - bare["prompt_tokens"]
        assert measured(page, number)["Prompt"] == f"{len(whole) - len(TEXT)} bytes, {more} tokens"


def test_several_fields_get_an_input_each(page: Page, server):
    choose(page, BARE, "pair")
    fields = {"question": "who is it", "answer": "a cat"}
    for name, value in {**fields, "Text": TEXT}.items():
        write(page, name, value)
    finish(page)
    assert shown(page, 1) == completion(server, model="tiny", prompt=TEXT, max_tokens=12)[0]["text"]
    assert shown(page, 2) == completion(server, model="pair", fields=fields, max_tokens=12)[0]["text"]


def test_a_sampled_answer_is_that_of_its_seed(page: Page, server):
    choose(page, BARE, "front")
    for label, value in {"Text": TEXT, "Temperature": "1.5", "Seed": "7"}.items():
        write(page, label, value)
    finish(page)
    asked = {"model": "front", "prompt": TEXT, "max_tokens": 12}
    choice, _ = completion(server, **asked, temperature=1.5, seed=7)
    assert shown(page, 2) == choice["text"] != completion(server, **asked)[0]["text"]


def test_classes_are_shown_as_shares(page: Page, server):
    choose(page, BARE, "verdict")
    write(page, "Text", TEXT)
    finish(page)
    (found,) = server.post("/v1/classify", {"model": "verdict", "input": TEXT}).json()["data"]
    labels, numbers = (column(page, 2).locator(part).all_text_contents() for part in (".label", ".number"))
    assert labels[0] == found["label"] and set(labels) == set(found["log_probabilities"])
    weights = np.exp([found["log_probabilities"][label] for label in labels])
    shares = [float(number) for number in numbers]
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=6e-4)
    bars = (
        column(page, 2)
        .locator(".bar")
        .evaluate_all(
            "bars => bars.map(bar => bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"
        )
    )
    np.testing.assert_allclose(bars, shares, atol=0.02)


def test_nothing_becomes_markup(page: Page):
    """Neither a model's name, its fields and classes, nor a token or an error."""
    shared = {"virtual_tokens": 3, "bytes": 3, "generates": True}
    base = {"id": MARKUP, "kind": "base", "fields": ["text"], "classes": [], **shared}
    topics = {"id": "topics", "kind": "prompt", "fields": [MARKUP, "hint"], "classes": [MARKUP, "other"], **shared}
    fake(page, "/v1/models", {"data": [base, topics]})
    error = {"error": {"message": MARKUP}}
    fake(page, "/v1/completions", chunk([MARKUP], [0.0]), error, kind="text/event-stream")
    fake(page, "/v1/classify", {"data": [{"label": MARKUP, "log_probabilities": {MARKUP: -1.0, "other": -2.0}}]})
    page.reload()
    for label in ("Text", MARKUP):
        write(page, label, MARKUP)
    finish(page)
    assert column(page, 1).locator("option:checked").text_content() == f"{MARKUP}, no prompt"
    assert shown(page, 1) == note(page, 1) == MARKUP
    assert column(page, 2).locator(".label").first.text_content() == MARKUP
    assert page.locator("img").count() == 0 and page.evaluate("window.broken") is None


def test_errors_are_shown_in_full(page: Page, server):
    choose(page, BARE, "verdict")
    long = "word " * 300
    write(page, "Text", long)
    finish(page)
    for number, path, body in (
        (1, "/v1/completions", {"model": "tiny", "prompt": long, "max_tokens": 12}),
        (2, "/v1/classify", {"model": "verdict", "input": long}),
    ):
        assert note(page, number) == server.post(path, body).json()["error"]["message"] and shown(page, number) == ""


def test_stop_ends_the_streams(page: Page, server, monkeypatch):
    """The page keeps what has come, and the engine goes on with nothing."""
    engine = server.service.worker.engine
    step, steps = engine.step, []

    def slow() -> None:
        time.sleep(0.1)
        steps.append(step())

    choose(page, BARE, "front")
    write(page, "Text", TEXT)
    write(page, "Max tokens", "100")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", slow)
        page.get_by_role("button", name="Answer").click()
        for number in (1, 2):
            expect(column(page, number).locator(".token").first).to_be_attached()
        assert not engine.idle
        page.get_by_role("button", name="Stop").click()
        before = len(steps)
        expect(page.get_by_role("button", name="Answer")).to_be_enabled()
        server.wait(lambda engine: engine.idle)
        assert len(steps) < before + 8  # the answers would take three times as many
    for number, model in enumerate(("tiny", "front"), 1):
        assert note(page, number) == "Stopped."
        whole = completion(server, model=model, prompt=TEXT, max_tokens=100)[0]["text"]
        assert whole.startswith(shown(page, number)) and len(shown(page, number)) < len(whole)
