"""What a request is asked with: the ends of its prompt's targets, and a prompt shortened as in training."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.data.templates import MESSAGES
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.prompt_directories import RefusedError
from spt_jax.serving.protocol import ChatRequest, CompletionRequest
from spt_jax.serving.requests import Request
from spt_jax.serving.service import Service
from spt_jax.serving.slots import MAX_ENDS
from spt_jax.serving.worker import Worker
from spt_jax.testing import EOS_ID, PAD_ID
from tests.serving.conftest import alone

TURNS = (
    "{% for m in messages %}{{ m.role + '\n' + m.content + '<pad>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "turn": {"prompt": "<soft>{text}", "chat": True},
    "chat": {"prompt": "<soft>{messages}", "target": ""},
    "plain": {"prompt": "<soft>{text}\n", "truncate": "text"},
}


@pytest.fixture(scope="module")
def service(base, tmp_path_factory):
    """Prompts whose turns end with a token that is neither EOS nor declared by the base."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = TURNS
    base = dataclasses.replace(base, tokenizer=tokenizer)
    bank, folder = PromptBank(base), tmp_path_factory.mktemp("ends")
    for name, options in TEMPLATES.items():
        method = spt_jax.PromptTuning(length=2)
        virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
        template = spt_jax.Template(**{"target": "{label}", "virtual_tokens": 2, **options})
        spt_jax.save_prompt(folder / name, base, method, virtual, template)
        bank.load(name, folder / name)
    engine = Engine(bank, slots=1, context=96)
    return Service(Worker(engine), "tiny", folder)


@pytest.mark.parametrize("model", ["turn", "chat", "tiny"])
def test_a_turn_ends_in_serving_as_in_training(service, model):
    messages = [{"role": "user", "content": "a"}]
    body = ChatRequest.model_validate({"model": model, "messages": messages, "temperature": 0})
    record = service.chat_record(model, body.messages)
    (request,) = service.ask(body, [record], 5)
    assert set(request.sampling.end_ids) == {PAD_ID, EOS_ID}
    assert set(service.worker.engine.submit(request).ends.ids) == {PAD_ID, EOS_ID}
    (plain,) = service.ask(CompletionRequest(model="plain"), [{"text": "a"}], 5)
    assert plain.sampling.end_ids == (EOS_ID,)
    assert (MESSAGES in record) == (model != "turn")


@pytest.mark.parametrize("max_tokens", [1, 30, None])
def test_a_prompt_that_may_be_shortened_leaves_room(service, max_tokens):
    body = CompletionRequest(model="plain", temperature=0)
    (long,) = service.ask(body, [{"text": "word " * 200}], max_tokens)
    wanted = min(max_tokens or spt_jax.SamplingConfig().max_new_tokens, 96 // 2)
    assert 96 - wanted - 5 < len(long.ids) <= 96 - wanted
    (short,) = service.ask(body, [{"text": "word"}], max_tokens)
    np.testing.assert_array_equal(short.ids, service.bank.request_ids("plain", {"text": "word"}))
    with pytest.raises(RefusedError, match="96 positions"):
        service.ask(CompletionRequest(model="turn"), [{"text": "word " * 200}], max_tokens)


@pytest.mark.parametrize("count", [1, MAX_ENDS - 1, 100])
def test_named_ids_end_a_request(server, count):
    """Whether or not one call of the decoder can look for all of them."""
    ids, free = alone(server, "front", "a question", max_new_tokens=12)
    others = [id_ for id_ in range(3, 320) if id_ not in free.ids][: count - 1]
    ends = (*others, free.ids[5])
    engine = Engine(server.service.bank, slots=2)
    sampling = spt_jax.SamplingConfig(max_new_tokens=12, end_ids=ends)
    (found,) = engine.generate([Request(ids, "front", sampling)])
    assert found.ids == free.ids[: free.ids.index(free.ids[5]) + 1] and found.finished == "eos"
