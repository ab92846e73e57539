"""Prompts asked together answer as each does alone, and what the ensemble says follows from their answers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.errors import ConfigError
from spt_jax.evaluation.ensembles import evaluate_ensemble, score_together
from spt_jax.evaluation.evaluate import score
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
        prompts.append(method.materialize(params, base.model))
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
    assert [own.shape for own in together] == [(13, 3)] * 4
    for own, data, prompt in zip(together, sets, prompts, strict=True):
        np.testing.assert_allclose(own, score(base, data, prompt), atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_sets_of_unequal_records_and_classes():
    base = tiny_base()
    prompts, sets = members(base)
    template = dataclasses.replace(sets[1].encoder.template, verbalizers={"good": "H", "bad": "L e"})
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 100)
    fewer = spt_jax.make_evaluation_set(base, encoder, [r for r in RECORDS if r["label"] != "so"][:5])
    together = score_together(base, [sets[0], fewer], prompts[:2])
    assert [own.shape for own in together] == [(13, 3), (5, 2)]
    for own, data, prompt in zip(together, [sets[0], fewer], prompts, strict=False):
        np.testing.assert_allclose(own, score(base, data, prompt), atol=1e-4)


def test_mean_and_vote():
    base = tiny_base()
    prompts, sets = members(base)
    scores = np.stack(score_together(base, sets, prompts)).astype(np.float64)
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
        evaluate_ensemble(base, [sets[0], fewer], prompts[:2])
    reading = dataclasses.replace(sets[0].encoder.template, head="tagging", reads="text")
    encoder = spt_jax.Encoder(reading, base.tokenizer, base.config.vocab_size, 100)
    with pytest.raises(ConfigError, match="one prompt at a time"):
        score_together(base, [dataclasses.replace(sets[0], encoder=encoder)], prompts[:1])
    with pytest.raises(ConfigError, match="2 sets for 1 prompts"):
        score_together(base, sets[:2], prompts[:1])
    with pytest.raises(ConfigError, match="votes on classes"):
        evaluate_ensemble(base, [], [])


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """model/, prompts a, b and c of a task and speak of another, and records that name one each."""
    folder = tmp_path_factory.mktemp("bank")
    write_tiny_checkpoint(folder / "model", "llama")
    base = spt_jax.load_base(folder / "model")
    template = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", virtual_tokens=3, verbalizers=VERBALIZERS)
    speak = spt_jax.Template(prompt="Say: {text}<soft>", target="{label}", virtual_tokens=3)
    for name in ("a", "b", "c", "speak", "tell"):
        tokens = jnp.asarray(np.random.default_rng(ord(name[0])).normal(size=(3, 32)), jnp.float32)
        own = template if len(name) == 1 else speak
        spt_jax.save_prompt(folder / "bank" / name, base, METHODS[0], spt_jax.VirtualPrompt(tokens=tokens), own)
    lines = [{**record, "which": "abc"[n % 3]} for n, record in enumerate(RECORDS)]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_command(bank, tmp_path, capsys):
    names = [str(bank / "bank" / name) for name in "abc"]
    words = ["evaluate", "--prompt", names[0], "--data", str(bank / "test.jsonl")]
    words += ["--others", *names[1:], "--combine", "vote"]
    assert main([*words, "--output", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results) == {"soft_prompt", *names[1:], "vote of 3 prompts", "no_prompt"}
    assert "vote of 3 prompts" in capsys.readouterr().out


def test_records_that_name_their_prompts(bank, tmp_path, capsys):
    """By name in one call, as each prompt's own records alone."""
    words = ["evaluate", "--prompt", str(bank / "bank"), "--data", str(bank / "test.jsonl"), "--by", "which"]
    assert main([*words, "--output", str(tmp_path / "all.json")]) == 0
    together = json.loads((tmp_path / "all.json").read_text())
    lines = (bank / "test.jsonl").read_text().splitlines()
    for name in "abc":
        (tmp_path / "own.jsonl").write_text("\n".join(line for line in lines if f'"which": "{name}"' in line))
        alone = ["evaluate", "--prompt", str(bank / "bank" / name), "--data", str(tmp_path / "own.jsonl")]
        assert main([*alone, "--output", str(tmp_path / "own.json")]) == 0
        expected = json.loads((tmp_path / "own.json").read_text())["soft_prompt"]
        assert together[name]["examples"] == expected["examples"]
        assert together[name]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    capsys.readouterr()
    assert main([*words[:-1], "label"]) == 1
    assert "there is no prompt 'good'; known: a, b, c" in capsys.readouterr().err
    assert main([*words[:-1], "witch"]) == 1
    assert "did you mean 'which'" in capsys.readouterr().err
    assert main([*words, "--others", "x"]) == 2
    assert main(["evaluate", "--prompt", str(bank), "--data", str(bank / "test.jsonl"), "--by", "which"]) == 1


@pytest.mark.parametrize("names", [("a", "b", "a"), ("tell", "speak", "tell")])
def test_texts_under_prompts_of_their_own(bank, capsys, names):
    texts = ["the word", "a question of the world", "and so on"]
    few = ["--max-new-tokens", "4"]
    alone = []
    for text, name in zip(texts, names, strict=True):
        assert main(["generate", "--prompt", str(bank / "bank" / name), text, *few]) == 0
        alone.append(capsys.readouterr().out)
    words = ["generate", "--prompt", str(bank / "bank"), *texts, *few, "--names"]
    assert main([*words, *names]) == 0
    assert capsys.readouterr().out == "".join(alone)
    assert main([*words, *names[:2]]) == 2
    assert "2 names for 3 texts" in capsys.readouterr().err
    assert main([*words, "a", "speak", "a"]) == 2
    assert "run them separately" in capsys.readouterr().err
    assert main([*words, "a", "d", "a"]) == 1
    assert "there is no prompt 'd'" in capsys.readouterr().err
