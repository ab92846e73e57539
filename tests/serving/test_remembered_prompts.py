"""A request under a remembered text is answered like one that has the text in it."""

import pytest

import spt_jax
from tests.serving.conftest import serving

TEXT = "The question is a text of the world.\nAnswer wor"
SYSTEM = "Answer the question in the world.\n"


@pytest.fixture(scope="module")
def remembered(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remembered")
    text = spt_jax.remember(base, TEXT, progress=False)
    text.save(folder / "text")
    spt_jax.compose([text, text], skip=1).save(folder / "twice")
    spt_jax.remember(base, SYSTEM, chat_system=True, progress=False).save(folder / "system")
    with serving(base, folder) as server:
        yield server


def answer(server, path: str, **body):
    response = server.post(path, {"temperature": 0, "max_tokens": 12, **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("question", ["ld and text", " the label", "\n"])
def test_a_completion_continues_the_text(remembered, question):
    whole = answer(remembered, "/v1/completions", model="tiny", prompt=TEXT + question, logprobs=0)
    own = answer(remembered, "/v1/completions", model="text", prompt=question, logprobs=0)
    assert own["choices"][0]["text"] == whole["choices"][0]["text"]
    found, expected = (one["choices"][0]["logprobs"]["token_logprobs"] for one in (own, whole))
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_chat_continues_the_system_turn(remembered):
    chats = (
        [{"role": "user", "content": "the question"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "and the text"},
        ],
    )
    path = "/v1/chat/completions"
    for chat in chats:
        own = answer(remembered, path, model="system", messages=chat)
        whole = answer(remembered, path, model="tiny", messages=[{"role": "system", "content": SYSTEM}, *chat])
        without = answer(remembered, path, model="tiny", messages=chat)
        texts = [found["choices"][0]["message"]["content"] for found in (own, whole, without)]
        assert texts[0] == texts[1] != texts[2]


def test_composed_texts_are_served(remembered, base):
    """The answer is that of the prompt without a server."""
    text = spt_jax.remember(base, TEXT, progress=False)
    expected = spt_jax.compose([text, text], skip=1).generate(["ld and"], max_new_tokens=12)
    own = answer(remembered, "/v1/completions", model="twice", prompt="ld and")
    assert [own["choices"][0]["text"]] == expected


def test_a_second_system_turn_is_refused(remembered):
    messages = [{"role": "system", "content": "No."}, {"role": "user", "content": "a"}]
    response = remembered.post("/v1/chat/completions", {"model": "system", "messages": messages})
    assert response.status_code == 400 and "holds one already" in response.json()["error"]["message"]
