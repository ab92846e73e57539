"""Prompts asked together answer as each does alone, and what the ensemble says follows from their answers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.ensemble import evaluate_ensemble, score_together
from spt_jax.errors import ConfigError
from spt_jax.evaluation import score
from spt_jax.prompts import LlamaAdapter, PrefixTuning, PromptTuning
from spt_jax.testing import tiny_base, write_tiny_checkpoint

VERBALIZERS = {"good": "H", "bad": "L e", "so": " N"}
RECORDS = [{"text": f"word {i} " + "and " * (i % 4), "label": list(VERBALIZERS)[i % 3]} for i in range(13)]
METHODS = [PromptTuning(length=3), PromptTuning(length=7), PrefixTuning(length=4), LlamaAdapter(length=2, layers=2)]


def members(base):
    """Prompts of several methods and lengths, each with its own set."""
    prompts, sets = [], []
    for seed, method in enumerate(METHODS):
        params = method.init_params(jax.random.key(seed), base)
        params = jax.tree.map(lambda a: a + 0.3, params)
        prompts.append(method.materialize(base.module, base.params, params))
        prompt = "<soft>{text}\n" if method.token_count else "{text}\n"
        template = spt_jax.Template(
            prompt=prompt, target="{label}", virtual_tokens=method.token_count, verbalizers=VERBALIZERS
        )
        encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 100)
        sets.append(spt_jax.make_evaluation_set(base, encoder, RECORDS))
    return prompts, sets


def test_together_they_score_as_alone():
    base = tiny_base()
    prompts, sets = members(base)
    together = score_together(base, sets, prompts)
    assert together.shape == (4, 13, 3)
    for own, data, prompt in zip(together, sets, prompts, strict=True):
        np.testing.assert_allclose(own, score(base, data, prompt), atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_mean_and_vote():
    base = tiny_base()
    prompts, sets = members(base)
    scores = score_together(base, sets, prompts).astype(np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    labels = [example.label for example in sets[0].examples]
    mean = np.log(shares).mean(0).argmax(-1)
    assert evaluate_ensemble(base, sets, prompts).metrics["accuracy"] == pytest.approx((mean == labels).mean())
    predictions = evaluate_ensemble(base, sets, prompts, "vote").predictions
    for n, prediction in enumerate(predictions):
        votes = np.bincount(scores[:, n].argmax(-1), minlength=3)
        best = np.flatnonzero(votes == votes.max())
        winner = best[np.log(shares).mean(0)[n, best].argmax()]
        assert prediction["prediction"] == list(VERBALIZERS)[winner]


def test_what_is_no_ensemble_is_refused():
    base = tiny_base()
    prompts, sets = members(base)
    fewer = dataclasses.replace(sets[1], examples=sets[1].examples[:5])
    with pytest.raises(ConfigError, match="the same records and classes"):
        score_together(base, [sets[0], fewer], prompts[:2])
    with pytest.raises(ConfigError, match="votes on classes"):
        evaluate_ensemble(base, [], [])


def test_the_command(tmp_path, capsys):
    write_tiny_checkpoint(tmp_path / "model", "llama")
    base = spt_jax.load_base(tmp_path / "model")
    template = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", virtual_tokens=3, verbalizers=VERBALIZERS)
    for name in "abc":
        tokens = jnp.asarray(np.random.default_rng(ord(name)).normal(size=(3, 32)), jnp.float32)
        spt_jax.save_prompt(tmp_path / name, base, METHODS[0], spt_jax.VirtualPrompt(tokens=tokens), template)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    words = ["evaluate", "--prompt", str(tmp_path / "a"), "--data", str(tmp_path / "test.jsonl")]
    words += ["--others", str(tmp_path / "b"), str(tmp_path / "c"), "--combine", "vote"]
    assert main([*words, "--output", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results) == {"soft_prompt", str(tmp_path / "b"), str(tmp_path / "c"), "vote of 3 prompts", "no_prompt"}
    assert "vote of 3 prompts" in capsys.readouterr().out
