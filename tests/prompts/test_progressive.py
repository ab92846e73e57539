"""Progressive prompts: task after task, each prompt frozen for the next."""

import dataclasses

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.evaluation.inspection import started_from
from spt_jax.prompts import PrefixTuning, ProgressivePrompts, PromptTuning, VirtualPrompt
from spt_jax.prompts.storage import load_prompt, read_prompt, save_prompt
from spt_jax.testing import tiny_base

TEMPLATE = Template(prompt="<soft>{text}\n", target=" {label}", verbalizers={"a": "good", "b": "bad"})
RECORDS = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(("the", "of a", "is it", "Hello", "42", "no"))]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def rows(count: int, seed: int = 0) -> VirtualPrompt:
    return VirtualPrompt(tokens=jax.random.normal(jax.random.key(seed), (count, 32)))


def saved(folder, base, virtual: VirtualPrompt, method=None):
    method = method or PromptTuning(length=len(virtual.tokens))
    prompt = "<soft>{text}" if method.token_count else "{text}"
    return str(
        save_prompt(
            folder, base, method, virtual, Template(prompt=prompt, virtual_tokens=method.token_count, target="a")
        )
    )


def test_three_tasks_in_a_row(base, tmp_path):
    """Each prompt ends with the one before, bit for bit, and holds all that its predictions need."""
    folder, before = "", np.zeros((0, 32), np.float32)
    for task, new in enumerate((3, 2, 2)):
        method = ProgressivePrompts(previous=folder, length=len(before) + new)
        template = dataclasses.replace(TEMPLATE, truncate="text")
        result = spt_jax.fit(base, method, template, RECORDS, steps=2, batch_size=6, progress=False)
        result.prompt.save(tmp_path / str(task))
        folder = str(tmp_path / str(task))
        found = load_prompt(folder, base)
        assert found.method.name == "prompt_tuning" and found.method.token_count == len(before) + new
        np.testing.assert_array_equal(found.virtual.tokens[new:], before)
        assert result.trainable_parameters == new * 32
        before = np.asarray(found.virtual.tokens)
    assert read_prompt(tmp_path / "0").template.virtual_tokens == 3
    assert started_from(read_prompt(folder), base) is None


def test_the_first_task_is_prompt_tuning(base):
    key, init = jax.random.key(3), spt_jax.init.normal()
    ours, theirs = (kind(length=4, init=init).init_params(key, base) for kind in (ProgressivePrompts, PromptTuning))
    np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
    assert ours.keys() == theirs.keys()


def test_what_an_earlier_prompt_must_be(base, tmp_path):
    folder = saved(tmp_path / "rows", base, rows(4))
    method = ProgressivePrompts(previous=folder)
    with pytest.raises(ConfigError, match=r"use method.bind\(base.tokenizer\)"):
        method.init_params(jax.random.key(0), base)
    bound = method.bind(base.tokenizer)
    assert bound.kept == 4 and bound.token_count == 24 and not bound.needs_tokenizer
    with pytest.raises(ConfigError, match=r"length is 4, of which 4 virtual tokens .* at least 5"):
        ProgressivePrompts(previous=folder, length=4).bind(base.tokenizer)
    with pytest.raises(ConfigError, match="set it likewise"):
        dataclasses.replace(bound, pin_prefix=True).init_params(jax.random.key(0), base)
    saved(tmp_path / "rows", base, rows(5))
    with pytest.raises(ConfigError, match="has 5 virtual tokens, and method"):
        bound.init_params(jax.random.key(0), base)
    prefix = PrefixTuning(length=2)
    virtual = prefix.materialize(prefix.init_params(jax.random.key(0), base), base.model)
    keys = saved(tmp_path / "keys", base, virtual, prefix)
    with pytest.raises(ConfigError, match=r"method.previous is .*keys: this needs prompts that have only token rows"):
        ProgressivePrompts(previous=keys).bind(base.tokenizer)
    with pytest.raises(CheckpointError, match="missing"):
        ProgressivePrompts(previous=str(tmp_path / "missing")).bind(base.tokenizer)
    other = tiny_base(vocab_size=300)
    with pytest.raises(CheckpointError, match="trained on another base"):
        ProgressivePrompts(previous=folder, kept=5).init_params(jax.random.key(0), other)
    for wrong in ({"kept": 3}, {"previous": folder, "kept": 0}):
        with pytest.raises(ConfigError, match=r"method\.kept is"):
            ProgressivePrompts(**wrong)
