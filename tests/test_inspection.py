"""What inspect says of a prompt: drift and norms of known changes, similarities, and the whole command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.errors import ConfigError
from spt_jax.evaluation.inspection import compared_rows, describe_prompt, layer_drift, similarity_map, started_from
from spt_jax.prompts import DecomposedPromptTuning, LlamaAdapter, PrefixTuning, PromptTuning, VirtualPrompt
from spt_jax.prompts.transfer import similarity
from spt_jax.testing import tiny_base, write_tiny_checkpoint

CLASSES = {"good": "H", "bad": "L"}


def saved(folder, base, method, *, moved=0.0, extra=None):
    """A prompt whose every number was moved from where seed 7 puts it."""
    params = jax.tree.map(lambda a: a + moved, method.init_params(jax.random.key(7), base))
    virtual = method.materialize(params, base.model)
    prompt = "<soft>{text}\n" if method.token_count else "{text}\n"
    template = spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=method.token_count, verbalizers=CLASSES)
    spt_jax.save_prompt(folder, base, method, virtual, template, extra=extra or {})
    return spt_jax.load_prompt(folder, base)


def test_drift_is_the_distance_from_the_start(tmp_path):
    base = tiny_base()
    prompt = saved(tmp_path / "moved", base, PromptTuning(length=3), moved=0.5, extra={"seed": 7})
    rows = compared_rows(prompt, started_from(prompt, base), base, 2)
    unit = np.median(np.linalg.norm(base.model.embedding_table(), axis=1))
    start = np.asarray(prompt.virtual.tokens) - 0.5
    for row, now, then in zip(rows, np.asarray(prompt.virtual.tokens), start, strict=True):
        assert row.drift == pytest.approx(0.5 * np.sqrt(base.config.width) / unit, rel=1e-5)
        assert row.norm == pytest.approx(np.linalg.norm(now) / unit, rel=1e-5)
        assert row.start_cosine == pytest.approx(now @ then / np.linalg.norm(now) / np.linalg.norm(then), rel=1e-5)
        assert len(row.nearest) == 2


def test_the_update_of_a_decomposed_prompt_is_described(tmp_path):
    base, method = tiny_base(), DecomposedPromptTuning(length=2, span=5, rank=1)
    prompt = saved(tmp_path / "moved", base, method, moved=0.5)
    norm = np.linalg.norm(np.asarray(prompt.virtual.shift), axis=1).mean()
    described = f"an update of the real tokens' embeddings at the first 5 positions, norm {norm:.3g}"
    assert described in describe_prompt(prompt)


def test_a_start_that_is_not_known(tmp_path):
    base = tiny_base()
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", virtual_tokens=2)
    method = PromptTuning(length=2)
    virtual = VirtualPrompt(tokens=jnp.ones((2, base.config.width)))
    spt_jax.save_prompt(tmp_path / "x", base, method, virtual, template)
    prompt = spt_jax.load_prompt(tmp_path / "x", base)
    assert started_from(prompt, base) is None
    rows = compared_rows(prompt, None, base, 1)
    assert [row.drift for row in rows] == [None, None]


def test_keys_and_values_drift_by_layer(tmp_path):
    base = tiny_base()
    method = PrefixTuning(length=3)
    still = saved(tmp_path / "still", base, method)
    assert layer_drift(still, started_from(still, base)) == []  # no seed is known
    still = saved(tmp_path / "known", base, method, extra={"seed": 7})
    assert layer_drift(still, started_from(still, base)) == [(0.0, 0.0)] * base.config.layers
    zero = saved(tmp_path / "zero", base, PrefixTuning(length=3, start="zero"), moved=0.1, extra={"seed": 7})
    assert layer_drift(zero, started_from(zero, base)) == []  # nothing is a share of 0


def test_similarities_are_cosines_of_means():
    rng = np.random.default_rng(0)
    prompts = [VirtualPrompt(tokens=jnp.asarray(rng.normal(size=(n, 8)), jnp.float32)) for n in (3, 5, 2)]
    found = similarity_map(prompts)
    for i, one in enumerate(prompts):
        for j, other in enumerate(prompts):
            assert found[i, j] == pytest.approx(similarity(one, other), abs=1e-6)
    base = tiny_base()
    prefix = PrefixTuning(length=3)
    virtual = prefix.materialize(prefix.init_params(jax.random.key(0), base), base.model)
    np.testing.assert_allclose(similarity_map([virtual, virtual]), 1.0, atol=1e-6)
    with pytest.raises(ConfigError, match="of one kind"):
        similarity_map([prompts[0], virtual])
    gated = LlamaAdapter(length=2, layers=1)
    own = gated.materialize(gated.init_params(jax.random.key(0), base), base.model)
    with pytest.raises(ConfigError, match="token rows, or of keys and values"):
        similarity_map([own, own])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    write_tiny_checkpoint(folder / "model", "llama")
    base = spt_jax.load_base(folder / "model")
    saved(folder / "tokens", base, PromptTuning(length=3), moved=0.2)
    saved(folder / "more", base, PromptTuning(length=5), moved=0.1)
    saved(folder / "prefix", base, PrefixTuning(length=3), moved=0.1)
    saved(folder / "gated", base, LlamaAdapter(length=3, layers=2), moved=0.1)
    lines = [json.dumps({"text": f"word {i}", "label": list(CLASSES)[i % 2]}) + "\n" for i in range(12)]
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("name", ["tokens", "prefix", "gated"])
def test_the_command_shows_writes_and_draws(folder, tmp_path, capsys, name):
    line = ["inspect", "--prompt", str(folder / name), "--data", str(folder / "data.jsonl"), "--output", str(tmp_path)]
    others = ["--others", str(folder / "more")] if name == "tokens" else []
    assert main([*line, *others]) == 0
    shown, report = capsys.readouterr().out, json.loads((tmp_path / "inspect.json").read_text())
    assert report["measure"] == "accuracy" and len(report["lost"]) == 3
    assert "accuracy lost without each position" in shown
    assert (tmp_path / "inspect.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    if name == "gated":
        assert "attention" not in report
        return
    shares = np.asarray(report["attention"]["by_layer_and_position"])
    assert shares.shape[1] == 3 and (shares >= 0).all() and (shares.sum(axis=1) <= 1 + 1e-6).all()
    assert f"layer   0  {shares[0].sum():.2f}" in shown
    if others:
        assert np.asarray(report["similarity"]["cosines"]).shape == (2, 2) and "cosines between prompts" in shown


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--others", "prefix"), 2, "of one kind"),
        (("--data", "missing.jsonl"), 1, "missing.jsonl"),
        (("--offline", "--data", "data.jsonl"), 2, "need the base"),
    ],
)
def test_what_cannot_be_shown(folder, capsys, more, code, message):
    words = [str(folder / word) if not word.startswith("--") else word for word in more]
    assert main(["inspect", "--prompt", str(folder / "tokens"), *words]) == code
    assert message in capsys.readouterr().err
