"""New tokens: names in a template with trained rows, beside the tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop.peft_export import export_peft
from spt_jax.prompts import TrainedTokens
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.serving.bank import hold
from spt_jax.testing import tiny_base

NAMES = ("<ask>", "<ask2>")
FIELDS = {"prompt": "Say <ask2>: {text} <ask>{text}<ask2>", "target": " {label}", "new_tokens": NAMES}


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def method(base):
    return TrainedTokens(new_tokens=NAMES).bind(base.tokenizer)


def test_a_name_is_one_token_in_the_template_and_text_in_records(base):
    encoder, size = encoder_for(base, Template(**FIELDS)), base.layout.vocab_size
    ids = encoder.prompt_ids({"text": "the <ask>"}).tolist()
    assert [id_ for id_ in ids if id_ >= size] == [size + 1, size, size + 1]

    def plain(text):
        return base.tokenizer(text, add_special_tokens=False)["input_ids"]

    front = [base.tokenizer.bos_token_id, *plain("Say "), size + 1, *plain(": the <ask> "), size]
    assert ids == [*front, *plain("the <ask>"), size + 1]
    bare = encoder_for(base, Template(**FIELDS).bare()).prompt_ids({"text": "the <ask>"})
    assert bare.max() < size and len(bare) > len(ids), "without the prompt the names are text"
    assert encoder.fixed_lead().tolist() == front[:-2][: len(encoder.fixed_lead())]


@pytest.mark.parametrize("start", ["pieces", "mean"])
def test_rows_start_at_means(base, start):
    method = TrainedTokens(tokens=("a",), new_tokens=NAMES, new_start=start).bind(base.tokenizer)
    params, table = method.init_params(jax.random.key(0), base), base.model.embedding_table()
    for row, name in zip(params["new"], NAMES, strict=True):
        own = base.tokenizer(name, add_special_tokens=False)["input_ids"] if start == "pieces" else slice(None)
        np.testing.assert_allclose(row, table[own].mean(axis=0), atol=1e-6)
    virtual = method.materialize(params, base.model)
    assert virtual.tokens.shape == (2, 32) and virtual.replaced.rows.shape == (1, 32)
    assert jax.tree.map(jnp.shape, method.spec(base.layout)) == jax.tree.map(jnp.shape, virtual)


def test_a_new_token_with_the_row_of_a_real_one_is_that_token(base, method):
    """Training, generation and serving then see the token of the vocabulary."""
    tokens = [99, 40]
    virtual = method.materialize({"new": base.model.embed(jnp.asarray(tokens))}, base.model)
    ids = encoder_for(base, Template(**FIELDS)).prompt_ids({"text": "the"})
    real = np.where(ids >= base.layout.vocab_size, np.take(tokens, np.maximum(ids - base.layout.vocab_size, 0)), ids)
    sampling = SamplingConfig(max_new_tokens=6)
    found, expected = generate(base, [ids], virtual, sampling)[0], generate(base, [real], None, sampling)[0]
    assert found.ids == expected.ids
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, atol=1e-4)


def test_a_prompt_trains_and_is_a_small_file(base, method, tmp_path):
    records = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(("the", "of a", "is it", "42"))]
    fields = {name: value for name, value in FIELDS.items() if name != "new_tokens"}
    result = spt_jax.fit(base, method, Template(**fields), records, steps=3, batch_size=4, progress=False)
    assert result.trainable_parameters == 64 and result.history[-1]["loss"] < result.history[0]["loss"]
    folder = result.prompt.save(tmp_path / "prompt")
    saved = load_prompt(folder, base)
    assert saved.template.new_tokens == NAMES == saved.method.new_tokens
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4000
    sampling = SamplingConfig(max_new_tokens=4)
    again = spt_jax.load_prompt(folder, base).generate(["of"], sampling)
    assert again == result.prompt.generate(["of"], sampling)
    with pytest.raises(ConfigError, match="new tokens in its template"):
        export_peft(tmp_path / "peft", saved, base)
    lead = encoder_for(base, saved.template).fixed_lead()
    held = hold(base, saved.virtual, lead, 2)
    assert held.generates and held.virtual.tokens is not None, "rows stay for names after the lead"
    with pytest.raises(CheckpointError, match="not those of the method"):
        save_prompt(tmp_path / "other", base, method, saved.virtual, Template(**{**FIELDS, "new_tokens": NAMES[::-1]}))
    with pytest.raises(ConfigError, match=r"template.new_tokens is .* but the method has"):
        spt_jax.fit(base, TrainedTokens(ids=(3,)), Template(**FIELDS), records, steps=1, progress=False)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"new_tokens": (" ",)}, "text other than blanks"),
        ({"new_tokens": ("<soft>",)}, "no {, } or <soft>"),
        ({"new_tokens": ("<other>",)}, "does not have the new token '<other>'"),
        ({"chat": True}, "a chat template would change"),
        ({"target": "<ask>{label}"}, "cannot generate the new token '<ask>'"),
    ],
)
def test_templates_that_are_refused(fields, problem):
    with pytest.raises(ConfigError, match=problem):
        Template(**{**FIELDS, **fields})


def test_tokens_of_the_vocabulary_are_not_new(base):
    with pytest.raises(ConfigError, match=r"'a' is a token of this base; name it in method.tokens"):
        TrainedTokens(new_tokens=("a",)).bind(base.tokenizer)
    with pytest.raises(ConfigError, match="more than once"):
        TrainedTokens(new_tokens=("<ask>", "<ask>"))
    with pytest.raises(ConfigError, match=r"one of method.new_tokens"):
        TrainedTokens(tokens=("<ask>",)).bind(base.tokenizer)
