"""What follows a remembered text has the log-probabilities that it has after the text itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import ConfigError, DataError
from spt_jax.interop import export_peft, import_peft
from spt_jax.models.attention import Stream
from spt_jax.prompts.initializers import Initializer
from spt_jax.testing import tiny_base
from tests.examples import QUICK_COMPILE

TEXT = "The question is a text of the world, and the answer is positive.\n"
ASKED = "Question: wor"
ANSWER = " the label"
# Layers with sliding windows, absolute positions, some recurrent layers, and only these.
FAMILIES = ("llama", "gemma2", "gpt2", "hybrid", "recurrent")
LAYERS = {"hybrid": ["linear_attention", "full_attention"], "recurrent": ["linear_attention"] * 2}


@functools.cache
def base_of(family: str):
    if family in LAYERS:
        return tiny_base("qwen3_5_text", num_hidden_layers=2, layer_types=LAYERS[family])
    return tiny_base(family)


@functools.cache
def prompt_of(family: str = "llama"):
    return spt_jax.remember(base_of(family), TEXT, progress=False)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def log_probabilities(model, ids):
    places = jnp.arange(ids.shape[0], dtype=jnp.int32)[None]
    stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places), ids=ids[None])
    hidden, _ = model.run(model.embed(ids[None]), stream)
    return jax.nn.log_softmax(model.logits(hidden)[0])


def expected(base, text: str) -> float:
    """The log-probability of the answer in one pass over all ids, without a prefix."""
    tokenizer = base.tokenizer
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = np.asarray(tokenizer(text + ASKED)["input_ids"] + answer)
    found = np.asarray(log_probabilities(base.model, ids))
    at = np.arange(len(ids) - len(answer), len(ids))
    return float(found[at - 1, ids[at]].sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_after_the_text(family):
    base, prompt = base_of(family), prompt_of(family)
    found = prompt.score([ASKED], [ANSWER])[0][ANSWER]
    assert found == pytest.approx(expected(base, TEXT), abs=1e-4)
    assert abs(found - expected(base, "")) > 1e-2, "the text matters"
    assert prompt.method.name == ("state_tuning" if family == "recurrent" else "prefix_tuning")


def test_a_saved_prompt_says_what_it_remembers(tmp_path):
    prompt = prompt_of()
    again = spt_jax.load_prompt(prompt.save(tmp_path / "text"), base_of("llama"))
    assert again.template == prompt.template and again.method == prompt.method
    jax.tree.map(np.testing.assert_array_equal, again.virtual, prompt.virtual)
    facts = again.info["extra"]["remembered"]
    assert facts["tokens"] == again.virtual.prefix_length and facts["characters"] == len(TEXT)
    assert not facts["chat_system"] and "date" in again.info["extra"]


def test_a_method_without_a_prefix_continues_nothing():
    records = [{"text": ASKED, "target": ANSWER}]
    template = dataclasses.replace(prompt_of().template, prompt="<soft>{text}")
    with pytest.raises(ConfigError, match=r"data.continues needs a prefix"):
        spt_jax.fit(base_of("llama"), spt_jax.PromptTuning(length=2), template, records, steps=1, progress=False)


@pytest.mark.parametrize("method", [spt_jax.PrefixTuning, spt_jax.DeepPrompts])
def test_training_starts_from_a_remembered_text(method, tmp_path):
    """The first loss is that after the text itself."""
    base, prompt = base_of("llama"), prompt_of()
    prompt.save(tmp_path / "text")
    start = Initializer(name="prompt", path=str(tmp_path / "text"))
    options = {"head": "language_model"} if method is spt_jax.DeepPrompts else {}
    tuned = method(length=prompt.method.length, init=start, **options)
    records = [{"text": ASKED, "target": ANSWER}]
    found = spt_jax.fit(base, tuned, prompt.template, records, steps=1, batch_size=1, progress=False)
    tokens = len(base.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]) + 1
    assert found.history[0]["loss"] == pytest.approx(-expected(base, TEXT) / tokens, abs=1e-5)
    assert found.prompt.template.continues


def test_recurrent_states_start_a_training(tmp_path):
    prompt = prompt_of("hybrid")
    prompt.save(tmp_path / "text")
    init = Initializer(name="prompt", path=str(tmp_path / "text"))
    tuned = spt_jax.PrefixTuning(length=prompt.method.length, init=init, states=True)
    params = tuned.init_params(jax.random.key(0), base_of("hybrid"))
    virtual = tuned.materialize(params, base_of("hybrid").model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), virtual.prefix, prompt.virtual.prefix)


def test_a_prompt_comes_back_from_peft(tmp_path):
    base, prompt = base_of("llama"), prompt_of()
    method, virtual = import_peft(export_peft(tmp_path / "peft", prompt, base), base)
    assert method.prefix_length == prompt.method.length
    jax.tree.map(np.testing.assert_array_equal, virtual, prompt.virtual)


def test_what_cannot_be_remembered_is_refused():
    base = base_of("llama")
    with pytest.raises(DataError, match="the text is empty"):
        spt_jax.remember(base, " \n")
    with pytest.raises(DataError, match=r"tokens and tiny-llama has \d+ positions"):
        spt_jax.remember(base, "0" * base.layout.max_positions)
    with pytest.raises(ConfigError, match="no chat template"):
        spt_jax.remember(base, TEXT, chat_system=True)
    with pytest.raises(ConfigError, match="leave it out"):
        spt_jax.remember(base, TEXT, chat_system=True, control_tokens=True)
    functions = {
        "embed": lambda params, ids: jax.nn.one_hot(ids, 8),
        "hidden": lambda params, x: x,
        "logits": lambda params, x: x @ jnp.ones((8, base.layout.vocab_size)),
    }
    facts = {"tokenizer": base.tokenizer, "max_positions": 64, "name": "mine", "masked": False}
    with pytest.raises(ConfigError, match="mine takes input embeddings only"):
        spt_jax.remember(spt_jax.from_flax(base.params, **functions, **facts), TEXT)
