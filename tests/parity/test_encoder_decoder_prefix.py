"""Prefixes at the three attention sites of T5, against transformers' model with keys and values put before its own."""

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
SITES = {"encoder": ("encoder", 0, "SelfAttention"), "self": ("decoder", 0, "SelfAttention")}
SITES["cross"] = ("decoder", 1, "EncDecAttention")


def random_prefix(base, sites):
    """Keys and values [L, P, K, H] of some sites."""
    rng = np.random.default_rng(5)
    groups = base.layout.attention_groups

    def array(group):
        return rng.normal(0, 0.5, (len(group.layers), P, group.kv_heads, group.key_size)).astype(np.float32)

    return {site: KeysValues(array(groups[site]), array(groups[site])) for site in sites}


def put_before(monkeypatch, model, prefix):
    """Makes transformers' attention see the keys and values; returns them as tensors with gradients."""
    from transformers.models.t5 import modeling_t5

    tensors, by_module = {}, {}
    for site, pair in prefix.items():
        side, place, name = SITES[site]
        tensors[site] = [torch.tensor(np.asarray(a), requires_grad=True) for a in (pair.keys, pair.values)]
        for layer, block in enumerate(getattr(model, side).block):
            keys, values = (a[layer].transpose(0, 1)[None] for a in tensors[site])
            by_module[getattr(block.layer[place], name)] = keys, values, site, getattr(model, side).block[0]
    plain = modeling_t5.eager_attention_forward

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, position_bias=None, **kwargs):
        if module in by_module:
            keys, values, site, first = by_module[module]
            key, value = (torch.cat([own, a], 2) for own, a in ((keys, key), (values, value)))
            count = query.shape[2]
            if mask is not None:
                mask = torch.cat([mask.new_zeros((*mask.shape[:2], mask.shape[2], P)), mask], -1)
            before = position_bias.new_zeros((1, query.shape[1], count, P))
            if site != "cross":
                owner = first.layer[0].SelfAttention
                apart = torch.arange(P)[None] - P - torch.arange(count)[:, None]
                buckets = owner._relative_position_bucket(apart, site == "encoder", 8, 16)
                before = owner.relative_attention_bias(buckets).permute(2, 0, 1)[None]
            position_bias = torch.cat([before, position_bias], -1)
        return plain(module, query, key, value, mask, scaling, dropout, position_bias, **kwargs)

    monkeypatch.setattr(modeling_t5, "eager_attention_forward", attention)
    return tensors


@pytest.mark.parametrize("sites", [("encoder",), ("self",), ("cross",), ("encoder", "self", "cross")], ids="+".join)
def test_loss_and_gradient_of_prefixes(sites, tmp_path, monkeypatch):
    """Each site alone, the others without a prefix, and all three; rows of several examples."""
    base, model = load_both(tmp_path, "t5")
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
        found = model(input_ids=torch.tensor(ids[None]).long(), labels=torch.tensor(target[None]).long())
        total = total + found.loss * len(target)
    theirs = total / sum(len(target) for _, target in pairs)
    theirs.backward()
    np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-5)
    for site in sites:
        for own, tensor in zip((gradient[site].keys, gradient[site].values), tensors[site], strict=True):
            same_gradient(own, tensor.grad)


def test_generation_after_prefixes(tmp_path, monkeypatch):
    """Greedy ids are the likeliest ones under transformers' logits of all ids so far."""
    base, model = load_both(tmp_path, "t5")
    prefix = random_prefix(base, SITES)
    prompts = [words(11, 1), words(5, 2)]
    ids = [np.concatenate([prompt, [START]]).astype(np.int32) for prompt in prompts]
    virtual = VirtualPrompt(prefix=VirtualPrefix(prefix))
    answers = generate(base, ids, virtual, SamplingConfig(max_new_tokens=8))
    put_before(monkeypatch, model, prefix)
    for prompt, ours in zip(prompts, answers, strict=True):
        inputs = torch.tensor([[START, *ours.ids[:-1]]]).long()
        with torch.no_grad():
            found = model(input_ids=torch.tensor(prompt[None]).long(), decoder_input_ids=inputs, use_cache=False)
        assert list(ours.ids) == found.logits[0].argmax(-1).tolist()
