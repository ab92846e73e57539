"""Prefixes at the three attention sites, against transformers' models with keys and values put before their own."""

import collections
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.inference.forward import encode_prefix, target_scores
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.memory import KeysValues
from spt_jax.prompts.virtual import VirtualPrefix, VirtualPrompt
from tests.encoder_decoders import START, rows_of, text, words
from tests.examples import same_gradient
from tests.parity.test_encoder_decoders import load_both

pytestmark = pytest.mark.parity

P = 4
SITES = ("encoder", "self", "cross")


def attention_of(model, site, layer):
    """The attention module of a site in transformers' T5, BART or T5Gemma."""
    side = model.get_decoder() if site in ("self", "cross") else model.get_encoder()
    side = getattr(side, "text_model", side)
    if hasattr(side, "block"):
        part = side.block[layer].layer[1 if site == "cross" else 0]
        return part.EncDecAttention if site == "cross" else part.SelfAttention
    own = side.layers[layer]
    if site == "cross" and model.config.model_type != "t5gemma2":  # It has one module for both sites of the decoder.
        return own.cross_attn if hasattr(own, "cross_attn") else own.encoder_attn
    return own.self_attn


def random_prefix(base, sites):
    """Keys and values [L, P, K, H] of some sites."""
    rng = np.random.default_rng(5)
    groups = base.layout.attention_groups

    def array(group):
        return rng.normal(0, 0.5, (len(group.layers), P, group.kv_heads, group.key_size)).astype(np.float32)

    return {site: KeysValues(array(groups[site]), array(groups[site])) for site in sites}


def places_after_prefix(model, prompt, target):
    """Positions after the prefix, for models with RoPE."""
    if not hasattr(model.get_decoder(), "rotary_emb"):
        return {}
    ids, decoder_ids = (P + torch.arange(len(one))[None] for one in (prompt, target))
    return {"position_ids": ids, "decoder_position_ids": decoder_ids}


def put_before(monkeypatch, model, prefix):
    """Makes transformers' attention see the keys and values; returns them as tensors with gradients."""
    modeling = importlib.import_module(type(model).__module__)
    tensors, by_module = {}, collections.defaultdict(list)
    for site, pair in prefix.items():
        tensors[site] = [torch.tensor(np.asarray(a), requires_grad=True) for a in (pair.keys, pair.values)]
        first = attention_of(model, site, 0)
        for layer in range(len(pair.keys)):
            keys, values = (a[layer].transpose(0, 1)[None] for a in tensors[site])
            by_module[attention_of(model, site, layer)].append((keys, values, site, first))
    plain = modeling.eager_attention_forward

    def reach(module, site):
        """How many positions before a token its sliding window contains; None for all."""
        window = None if site == "cross" else getattr(module, "sliding_window", None)
        if window is None or site == "self":
            return window and window - 1
        return (window + 1) // 2 - 1 if model.config.model_type == "t5gemma2" else window

    def attention(module, query, key, value, mask, position_bias=None, **kwargs):
        for keys, values, site, first in by_module[module]:
            key, value = (torch.cat([own, a], 2) for own, a in ((keys, key), (values, value)))
            count, before = query.shape[2], reach(module, site)
            apart = torch.arange(count)[:, None] + P - torch.arange(P)[None]
            if mask is None and before is not None:
                mask = query.new_zeros((1, 1, count, key.shape[2] - P))
            if mask is not None:
                seen = torch.where(apart <= (P + count if before is None else before), 0.0, -torch.inf)
                mask = torch.cat([seen.expand(*mask.shape[:2], count, P), mask], -1)
            if position_bias is not None:
                own_bias = position_bias.new_zeros((1, query.shape[1], count, P))
                if site != "cross":
                    buckets = first._relative_position_bucket(-apart, site == "encoder", 8, 16)
                    own_bias = first.relative_attention_bias(buckets).permute(2, 0, 1)[None]
                position_bias = torch.cat([own_bias, position_bias], -1)
        biased = {} if position_bias is None else {"position_bias": position_bias}
        return plain(module, query, key, value, mask, **biased, **kwargs)

    for side in (model.get_encoder(), model.get_decoder()):
        if hasattr(side, "embed_positions"):  # The prefix takes the first positions.
            table = side.embed_positions.weight
            table.data = torch.roll(table.data, -P, 0)
    monkeypatch.setattr(modeling, "eager_attention_forward", attention)
    return tensors


@pytest.mark.parametrize(
    ("variant", "sites"),
    [
        *(("t5", sites) for sites in (("encoder",), ("self",), ("cross",), SITES)),
        ("bart", SITES),
        ("mbart", ("self",)),
        ("t5gemma", SITES),
        ("t5gemma2", SITES),
    ],
)
def test_loss_and_gradient_of_prefixes(variant, sites, tmp_path, monkeypatch):
    """Each site alone, the others without a prefix, and all three; rows of several examples."""
    base, model = load_both(tmp_path, variant)
    prefix = random_prefix(base, sites)
    pairs = [(words(20, 1), words(6, 2)), (words(5, 3), words(3, 4)), (words(11, 5), words(9, 6))]
    rows = rows_of([text(*pair, index) for index, pair in enumerate(pairs)], packing=True)

    @jax.jit
    def loss(model, memory, rows):
        virtual = VirtualPrompt(prefix=VirtualPrefix(memory))
        found = target_scores(model, virtual, encode_prefix(model, virtual, jnp.zeros(0, jnp.int32)), rows)
        return -(found.log_probabilities[:, :, 0] * rows.target_weights).sum() / rows.target_weights.sum()

    ours, gradient = jax.value_and_grad(loss, argnums=1)(base.model, prefix, rows)
    tensors = put_before(monkeypatch, model, prefix)
    total = torch.zeros(())
    for ids, target in pairs:
        inputs = torch.tensor([[START, *target[:-1]]]).long()
        labels = torch.tensor(target[None]).long()
        places = places_after_prefix(model, ids, target)
        found = model(input_ids=torch.tensor(ids[None]).long(), decoder_input_ids=inputs, labels=labels, **places)
        total = total + found.loss * len(target)
    theirs = total / sum(len(target) for _, target in pairs)
    theirs.backward()
    np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-5)
    for site in sites:
        for own, tensor in zip((gradient[site].keys, gradient[site].values), tensors[site], strict=True):
            same_gradient(own, tensor.grad)


@pytest.mark.parametrize("variant", ["t5", "bart", "t5gemma", "t5gemma2"])
def test_generation_after_prefixes(variant, tmp_path, monkeypatch):
    """Greedy ids are the likeliest ones under transformers' logits of all ids so far."""
    base, model = load_both(tmp_path, variant)
    prefix = random_prefix(base, SITES)
    prompts = [words(11, 1), words(5, 2)]
    ids = [np.concatenate([prompt, [START]]).astype(np.int32) for prompt in prompts]
    virtual = VirtualPrompt(prefix=VirtualPrefix(prefix))
    answers = generate(base, ids, virtual, SamplingConfig(max_new_tokens=8))
    put_before(monkeypatch, model, prefix)
    for prompt, ours in zip(prompts, answers, strict=True):
        inputs = torch.tensor([[START, *ours.ids[:-1]]]).long()
        places = places_after_prefix(model, prompt, ours.ids)
        with torch.no_grad():
            found = model(torch.tensor(prompt[None]).long(), decoder_input_ids=inputs, use_cache=False, **places)
        assert list(ours.ids) == found.logits[0].argmax(-1).tolist()
