"""Prefixes one after the other: values stay, keys are those at the later positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.errors import ConfigError
from spt_jax.models.attention import Stream
from spt_jax.models.layout import SELF
from spt_jax.prompts.composition import composed
from spt_jax.prompts.initializers import Initializer
from spt_jax.prompts.prefix_tuning import memory_of_rows
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from tests.examples import QUICK_COMPILE

FIRST, SECOND = "The question is a text of the world.\n", "and the answer is positive:\n"
SAMPLING = spt_jax.SamplingConfig(max_new_tokens=8)


@functools.cache
def base_of(family: str, **fields):
    return tiny_base(family, **fields)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def memory_from(model, ids, first):
    """What all layers remember of a sequence that begins at a position, computed there."""
    places = (first + jnp.arange(ids.shape[0]))[None]
    stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places), ids=ids[None])
    _, found = model.run(model.embed(ids[None]), stream, return_memory=True, return_hidden=False)
    return jax.tree.map(lambda array: array[:, 0].astype(jnp.float32), found)


# RoPE, one of its own in layers with windows, on a part of the head, with latents, not in all layers; ALiBi.
@pytest.mark.parametrize(
    ("family", "skip"),
    [("llama", 0), ("gemma3_text", 2), ("gpt_neox", 2), ("deepseek_v3", 1), ("smollm3", 1), ("bloom", 2)],
)
def test_each_part_is_what_it_is_at_its_positions(family, skip):
    base, ids = base_of(family), jnp.arange(5, 16)
    first, second = ids[:4], ids[3:]
    parts = [memory_of_rows(base.model, base.model.embed(part), part) for part in (first, second)]
    found = composed(base, parts, skip)
    for name in parts[0]:
        shifted = memory_from(base.model, second, 4 - skip)[name]
        expected = [np.concatenate([getattr(parts[0][name], kind), getattr(shifted, kind)[:, skip:]], axis=1)
                    for kind in ("keys", "values")]  # fmt: skip
        np.testing.assert_allclose(found[name].keys, expected[0], atol=1e-4)
        np.testing.assert_allclose(found[name].values, expected[1], atol=1e-4)
        assert np.abs(np.asarray(found[name].keys)).max() > 1e-2


def remembered(base, *texts):
    return [spt_jax.remember(base, text, progress=False) for text in texts]


def greedy(base, text: str) -> str:
    return spt_jax.generate(base, [text], None, SAMPLING)[0].text


def test_with_one_layer_the_parts_are_the_joint_text(tmp_path):
    """Keys and values of the only layer do not depend on attention. BOS of the second text is left out."""
    base = base_of("llama", num_hidden_layers=1)
    both = spt_jax.compose(remembered(base, FIRST, SECOND), skip=1)
    assert both.generate(["Hello"], SAMPLING) == [greedy(base, FIRST + SECOND + "Hello")]
    asked = both.score(["Hello"], [" the label"])[0]
    joint = remembered(base, FIRST + SECOND)[0]
    assert asked[" the label"] == pytest.approx(joint.score(["Hello"], [" the label"])[0][" the label"], abs=1e-4)
    again = spt_jax.load_prompt(both.save(tmp_path / "both"), base)
    assert again.generate(["Hello"], SAMPLING) == both.generate(["Hello"], SAMPLING)


def test_with_two_layers_the_second_part_has_not_seen_the_first():
    base = base_of("llama")
    both, joint = spt_jax.compose(remembered(base, FIRST, SECOND), skip=1), remembered(base, FIRST + SECOND)[0]
    own, whole = (prompt.virtual.prefix.memory[SELF].values for prompt in (both, joint))
    count = whole.shape[1] - 1
    np.testing.assert_allclose(own[0, :count], whole[0, :count], atol=1e-4)
    assert np.abs(own[1, -2] - whole[1, -2]).max() > 1e-2


def test_three_prompts_by_command_and_training_from_them(tmp_path, capsys):
    write_tiny_checkpoint(tmp_path / "model", "llama")
    base = spt_jax.load_base(tmp_path / "model")
    for name, text in (("a", FIRST), ("b", SECOND), ("c", FIRST)):
        spt_jax.remember(base, text, progress=False).save(tmp_path / name)
    folders = [str(tmp_path / name) for name in "abc"]
    words = ["--prompt", folders[0], "--others", *folders[1:], "--output", str(tmp_path / "all")]
    assert main(["compose", *words]) == 0
    found = spt_jax.load_prompt(tmp_path / "all", base)
    positions = found.info["extra"]["composed"]["positions"]
    assert sum(positions) == found.virtual.prefix_length == found.method.length
    assert " + ".join(map(str, positions)) + " positions" in capsys.readouterr().out
    prompts = [spt_jax.load_prompt(folder, base) for folder in folders]
    nested = spt_jax.compose([prompts[0], spt_jax.compose(prompts[1:])])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), nested.virtual, found.virtual)
    tuned = spt_jax.PrefixTuning(length=sum(positions), init=Initializer(name="prompt", path=str(tmp_path / "all")))
    records = [{"text": "Hello", "target": " the label"}]
    trained = spt_jax.fit(base, tuned, found.template, records, steps=1, batch_size=1, progress=False)
    tokens = len(base.tokenizer(" the label", add_special_tokens=False)["input_ids"]) + 1
    expected = -found.score(["Hello"], [" the label"])[0][" the label"] / tokens
    assert trained.history[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "learned positions"), ("falcon_h1", "recurrent layers"), ("hunyuan_v1_dense", "normalizes keys after")],
)
def test_a_base_whose_keys_cannot_be_moved_is_refused(family, reason):
    prompts = remembered(base_of(family), FIRST, SECOND)
    with pytest.raises(ConfigError, match=reason):
        spt_jax.compose(prompts)


def test_what_cannot_be_composed_is_refused():
    base = base_of("llama")
    prompts = remembered(base, FIRST, SECOND)
    with pytest.raises(ConfigError, match="give at least two"):
        spt_jax.compose(prompts[:1])
    with pytest.raises(ConfigError, match=r"skip is 50, and prefix 2 has \d+ positions"):
        spt_jax.compose(prompts, skip=50)
    with pytest.raises(ConfigError, match=r"skip is -1"):
        spt_jax.compose(prompts, skip=-1)
    with pytest.raises(ConfigError, match=r"have \d+ positions together and tiny-llama has 128"):
        spt_jax.compose(prompts * 4)
    with pytest.raises(ConfigError, match="prompt 2 was made for another base"):
        spt_jax.compose([prompts[0], *remembered(base_of("llama", num_hidden_layers=1), FIRST)])
    method = spt_jax.PromptTuning(length=2)
    template, records = (
        spt_jax.Template(prompt="<soft>{text}", target="{target}", virtual_tokens=2),
        [{"text": "Hello", "target": "the"}],
    )
    rows = spt_jax.fit(base, method, template, records, steps=1, batch_size=1, progress=False).prompt
    with pytest.raises(ConfigError, match=r"prompt 1 \(prompt_tuning\) has tokens"):
        spt_jax.compose([rows, prompts[0]])
    method = spt_jax.PrefixTuning(length=2)
    template = spt_jax.Template(prompt="{text} is", target="{target}")
    prefix = spt_jax.fit(base, method, template, records, steps=1, batch_size=1, progress=False).prompt
    with pytest.raises(ConfigError, match="prompt 1 was trained with another template"):
        spt_jax.compose([prefix, prompts[0]])
    after = spt_jax.compose([prompts[0], prefix])
    assert after.template == prefix.template and len(after.generate(["Hello"], SAMPLING)) == 1
