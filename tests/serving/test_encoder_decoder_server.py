"""A server of an encoder-decoder answers as the library does without one, under prompts of all sites."""

import json

import jax
import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

import spt_jax
from spt_jax.bases.base import load_base
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import make_evaluation_set, score
from spt_jax.inference.answers import Generated
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import DeepPrompts, PrefixTuning, PromptTuning
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.serving.server import make_app
from spt_jax.serving.service import Service
from spt_jax.serving.worker import Worker
from spt_jax.testing import tiny_base, write_tiny_checkpoint

CLASSES = {"good": "good", "bad": "a bad one"}
TEXTS = ("a question", "the", "and one more")
PROMPTS = {
    "tokens": (PromptTuning(length=3), "<soft>{text}", {}),
    "sites": (PrefixTuning(length=4), "a word: {text}", {}),
    "pinned": (PrefixTuning(length=4, pin_prefix=True), "{text}", {}),
    "longer": (PrefixTuning(length=7), "{text}", {}),
    "encoder": (PrefixTuning(length=2, sites=("encoder",)), "{text}", {}),
    "cross": (PrefixTuning(length=2, sites=("cross",)), "{text}", {}),
    "self": (PrefixTuning(length=2, sites=("self",)), "{text}", {}),
    "decoder": (PromptTuning(length=2), "{text}<decoder>a word<soft>", {}),
    "inputs": (PromptTuning(length=12), "<soft:3>{text}<decoder><soft:9>", {}),
    "pinned inputs": (PromptTuning(length=5, pin_prefix=True), "<soft:2>{text}<decoder><soft:3>", {}),
    "decided": (PromptTuning(length=5), "<soft:2>{text}<decoder><soft:3>", CLASSES),
    "verdict": (PromptTuning(length=3), "<soft>{text}", CLASSES),
    "head": (DeepPrompts(length=3, classes=2), "{text}", CLASSES),
}
SAMPLINGS = (
    SamplingConfig(max_new_tokens=7),
    SamplingConfig(max_new_tokens=19, temperature=1.3, seed=5),
    SamplingConfig(max_new_tokens=5, temperature=0.7, top_k=20, top_p=0.9, seed=11),
)


def added(bank: PromptBank, folder, names) -> PromptBank:
    """Adds prompts that nobody trained, far enough from their start to change every answer."""
    for number, name in enumerate(names):
        method, prompt, classes = PROMPTS[name]
        params = jax.tree.map(lambda a: a + 0.2, method.init_params(jax.random.key(number), bank.base))
        template = spt_jax.Template(
            prompt=prompt,
            target="{label}",
            virtual_tokens=method.token_count,
            verbalizers=classes,
            head=getattr(method, "head", None) or "language_model",
        )
        virtual = method.materialize(params, bank.base.model)
        spt_jax.save_prompt(folder / name, bank.base, method, virtual, template)
        bank.add(name, spt_jax.load_prompt(folder / name, bank.base))
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> PromptBank:
    base = tiny_base("t5", seed=3)
    return added(
        PromptBank(base), tmp_path_factory.mktemp("prompts"), [name for name in PROMPTS if "pinned" not in name]
    )


@pytest.fixture(scope="module")
def service(bank, tmp_path_factory) -> Service:
    return Service(Worker(Engine(bank, slots=3, context=128), queue=8), "tiny", None)


@pytest.fixture(scope="module")
def http(service):
    with TestClient(make_app(service), base_url="http://localhost") as found:
        service.worker.start()
        yield found


@pytest.fixture(scope="module")
def client(http):
    return openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http)


def alone(bank: PromptBank, name: str | None, text: str, sampling: SamplingConfig):
    ids = bank.request_ids(name, {"text": text})
    return ids, generate(bank.base, [ids], bank.entry(name).virtual, sampling)[0]


def requests_of(bank: PromptBank, names) -> list[Request]:
    cases = [(text, name) for text in TEXTS for name in names]
    chosen = [SAMPLINGS[number % 3] for number in range(len(cases))]
    return [
        Request(bank.request_ids(name, {"text": text}), name, sampling)
        for (text, name), sampling in zip(cases, chosen, strict=True)
    ]


@pytest.mark.parametrize(
    ("slots", "names"),
    [(2, ["tokens", "longer", "decoder", "encoder", "cross", "self", None]), (12, ["sites", "longer", "inputs"])],
)
def test_a_mixture_is_answered_as_each_alone(bank, slots, names):
    """Through two slots, each request starts where another has just ended; with twelve, they start in groups."""
    requests = requests_of(bank, names)
    found = Engine(bank, slots=slots, context=128).generate(requests)
    for ours, request in zip(found, requests, strict=True):
        virtual = bank.entry(request.prompt).virtual
        (theirs,) = generate(bank.base, [request.ids], virtual, request.sampling)
        assert (ours.ids, ours.text, ours.finished) == (theirs.ids, theirs.text, theirs.finished)
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)


def test_each_site_changes_the_answer(bank):
    """Otherwise the test above would pass with prompts that are not applied."""
    found = {
        name: alone(bank, name, "the", SAMPLINGS[0])[1].log_probabilities[0] for name in bank.names if name != "head"
    }
    assert len({round(value, 4) for value in found.values()}) == len(found)


def answered(base, folder, name) -> Generated:
    """Checks that a server answers as the library does, and returns the answer."""
    bank = added(PromptBank(base), folder, [name])
    sampling = SamplingConfig(max_new_tokens=20)
    request = Request(bank.request_ids(name, {"text": TEXTS[2]}), name, sampling, alternatives=3)
    (ours,) = Engine(bank, slots=1, context=96).generate([request])
    _, theirs = alone(bank, name, TEXTS[2], sampling)
    assert ours.ids == theirs.ids
    np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)
    return ours


def test_layers_with_biases_of_their_own(tmp_path):
    answered(tiny_base("umt5", seed=3), tmp_path, "sites")


def test_learned_positions_and_a_forced_token(tmp_path):
    """Each new token has the position after the last; the first is forced, so that it is certain and has no others."""
    write_tiny_checkpoint(tmp_path / "base", "bart", seed=3)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"forced_bos_token_id": 17}))
    answered(load_base(str(tmp_path / "base"), dtype="float32"), tmp_path, "inputs")
    found = answered(load_base(str(tmp_path / "base"), dtype="float32"), tmp_path, "sites")
    assert found.ids[0] == 17 and found.alternatives[0] == {17: 0.0} and len(found.alternatives[1]) == 3


@pytest.mark.parametrize(
    ("family", "name"), [("t5gemma", "pinned"), ("t5gemma2", "pinned"), ("t5gemma", "pinned inputs")]
)
def test_a_pinned_prompt_is_seen_from_beyond_the_window(tmp_path, family, name):
    answered(tiny_base(family, seed=3), tmp_path, name)


def test_ids_without_the_decoder_s_first_are_refused(bank):
    with pytest.raises(ConfigError, match="lacks id 0, with which the decoder of tiny-t5 starts"):
        Engine(bank, slots=1, context=96).submit(Request(np.asarray([4, 5], np.int32)))
    with pytest.raises(ConfigError, match="the last 3 of the ids begin with the decoder's start token, 0, but 1 of"):
        Engine(bank, slots=1, context=96).submit(Request(np.asarray([4, 0, 7, 8], np.int32)))
    with pytest.raises(ConfigError, match="nothing precedes id 0"):
        generate(bank.base, [np.asarray([0, 7], np.int32)])


@pytest.mark.parametrize("name", ["tiny", "tokens", "sites"])
def test_a_completion_is_what_the_library_answers(bank, client, name):
    prompt = None if name == "tiny" else name
    for text in TEXTS[:2]:
        ids, expected = alone(bank, prompt, text, SamplingConfig(max_new_tokens=6))
        options = {"model": name, "max_tokens": 6, "temperature": 0, "logprobs": 2}
        ours = client.completions.create(**options, prompt=text)
        (choice,) = ours.choices
        assert choice.text == expected.text and ours.usage.prompt_tokens == len(ids)
        np.testing.assert_allclose(choice.logprobs.token_logprobs, expected.log_probabilities, atol=1e-4)
        assert [max(top.values()) for top in choice.logprobs.top_logprobs] == choice.logprobs.token_logprobs
        parts = list(client.completions.create(**options, prompt=text, stream=True))
        assert "".join(part.choices[0].text for part in parts) == choice.text
        streamed = [value for part in parts for value in part.choices[0].logprobs.token_logprobs]
        assert streamed == choice.logprobs.token_logprobs
        given = bank.base.tokenizer(text, add_special_tokens=False)["input_ids"]
        if name != "sites":  # its template has words right before the text
            assert client.completions.create(**options, prompt=given).choices[0].text == choice.text


@pytest.mark.parametrize("name", ["tiny", "sites"])
def test_a_chat_of_one_user_turn_is_its_text(bank, client, name):
    _, expected = alone(bank, None if name == "tiny" else name, "the", SamplingConfig(max_new_tokens=5))
    turns = [{"role": "user", "content": "the"}]
    ours = client.chat.completions.create(model=name, messages=turns, temperature=0, max_tokens=5)
    assert ours.choices[0].message.content == expected.text
    with pytest.raises(openai.UnprocessableEntityError, match="takes a single user turn"):
        client.chat.completions.create(model=name, messages=[{"role": "system", "content": "brief"}, *turns])


def test_what_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="predicts no token of a prompt"):
        client.completions.create(model="tiny", prompt="the", echo=True, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="'tiny' has 128 positions"):
        client.completions.create(model="tiny", prompt="the", max_tokens=200)
    with pytest.raises(openai.BadRequestError, match="the base has"):
        client.completions.create(model="tiny", prompt=[4, 100000], max_tokens=2)


@pytest.mark.parametrize("name", ["verdict", "decided", "head"])
def test_classes_are_those_of_the_evaluation(bank, http, name):
    entry = bank.entry(name)
    asked = [entry.encoder.with_any_label({"text": text}) for text in TEXTS]
    data = make_evaluation_set(bank.base, entry.encoder, asked)
    expected = score(bank.base, data, jax.tree.map(np.asarray, entry.virtual))
    body = http.post("/v1/classify", json={"model": name, "input": list(TEXTS)}).json()
    for own, row in zip(body["data"], expected, strict=True):
        np.testing.assert_allclose([own["log_probabilities"][label] for label in CLASSES], row, atol=1e-4)
        assert own["label"] == list(CLASSES)[int(row.argmax())]
