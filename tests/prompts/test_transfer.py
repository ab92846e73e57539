"""Prompts that start from prompts: closed forms."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.errors import ConfigError
from spt_jax.prompts import PrefixTuning, PromptTuning, VirtualPrompt
from spt_jax.prompts.transfer import average, concatenate, ranked_sources, recycle, similarity
from spt_jax.testing import tiny_base, write_tiny_checkpoint


def prompt(seed: int, length: int = 4, width: int = 32) -> VirtualPrompt:
    return VirtualPrompt(tokens=jnp.asarray(np.random.default_rng(seed).normal(size=(length, width)), jnp.float32))


def test_similarity_is_the_cosine_of_the_means():
    ours, theirs = prompt(0), prompt(1, length=7)
    a, b = np.asarray(ours.tokens).mean(0), np.asarray(theirs.tokens).mean(0)
    assert similarity(ours, theirs) == pytest.approx(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    near = VirtualPrompt(tokens=ours.tokens + 0.1 * prompt(2).tokens)
    bank = {"far": theirs, "near": near, "opposite": VirtualPrompt(tokens=-ours.tokens)}
    ranked = ranked_sources(ours, bank)
    assert ranked[0][0] == "near" and ranked[-1] == ("opposite", pytest.approx(-1.0))


def test_average_and_concatenation():
    prompts = [prompt(i) for i in range(3)]
    np.testing.assert_allclose(average(prompts).tokens, sum(p.tokens for p in prompts) / 3, rtol=1e-5)
    np.testing.assert_array_equal(concatenate(prompts).tokens[4:8], prompts[1].tokens)
    with pytest.raises(ConfigError, match=r"one shape; these have \[\(4, 32\), \(5, 32\)\]"):
        average([prompt(0), prompt(1, length=5)])
    with pytest.raises(ConfigError, match="none"):
        average([])
    with pytest.raises(ConfigError, match=r"one width; these have \[16, 32\]"):
        concatenate([prompt(0), prompt(0, width=16)])
    base, method = tiny_base(), PrefixTuning(length=2)
    prefix = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    with pytest.raises(ConfigError, match="only token rows"):
        average([prefix])


def test_recycling_finds_the_linear_map_between_two_tables():
    """The target's table is the source's times a matrix: so must be the prompt."""
    source = tiny_base()
    matrix = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    table = jnp.asarray(np.asarray(source.params["embedding"]) @ matrix)
    model = dataclasses.replace(source.model, params={**source.params, "embedding": table})
    target = dataclasses.replace(source, model=model)
    moved = recycle(prompt(0), source, target)
    np.testing.assert_allclose(moved.tokens, np.asarray(prompt(0).tokens) @ matrix, atol=1e-3)
    with pytest.raises(ConfigError, match="share 10 tokens; a map of width 32"):
        recycle(prompt(0), source, target, top_k=10)


def test_the_command_proposes_the_nearest_source(tmp_path, capsys):
    write_tiny_checkpoint(tmp_path / "model", "llama")
    base = spt_jax.load_base(tmp_path / "model")
    template = spt_jax.Template(prompt="<soft>{a}", target="{b}", virtual_tokens=4)
    near = VirtualPrompt(tokens=prompt(0).tokens + 0.05)
    for name, virtual in {"new": prompt(0), "bank/far": prompt(1), "bank/near": near}.items():
        spt_jax.save_prompt(tmp_path / name, base, PromptTuning(length=4), virtual, template)
    (tmp_path / "bank" / "notes.txt").write_text(json.dumps({}))
    assert main(["similar", "--prompt", str(tmp_path / "new"), "--bank", str(tmp_path / "bank")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [str(tmp_path / "bank" / name) for name in ("near", "far")]
    assert float(lines[0].split()[0]) == pytest.approx(similarity(prompt(0), near), abs=1e-3)
    assert main(["similar", "--prompt", str(tmp_path / "new"), "--bank", str(tmp_path / "model")]) == 1
    assert "there are no saved prompts" in capsys.readouterr().err
