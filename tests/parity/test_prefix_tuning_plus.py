"""Prefix-Tuning+ written in torch as an attention function of transformers: the same logits, loss and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.prompts import PrefixTuningPlus
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.examples import QUICK_COMPILE, VOCAB
from tests.family import moved_params

IDS = np.random.default_rng(0).integers(3, VOCAB, (3, 14))
TARGETS = 5


@pytest.fixture
def with_maps():
    """Registers eager attention of Llama plus elu(q) M, with the maps [L, K, H, Hv] of the returned list."""
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    found: list = []

    def attend(module, query, key, value, mask, **options):
        out, weights = eager_attention_forward(module, query, key, value, mask, **options)
        maps = found[0][module.layer_idx].repeat_interleave(module.num_key_value_groups, dim=0)
        term = torch.nn.functional.elu(query) @ maps[None]  # [B, N, T, H] and [1, N, H, Hv]
        return out + term.transpose(1, 2), weights

    interface = AttentionInterface()
    interface.register("prefix_tuning_plus", attend)
    return found


def logits_of(model, virtual, batch):
    return output_logits(model, virtual, encode_prefix(model, virtual, batch.lead_ids), batch.rows)


def test_logits_loss_and_gradient_are_those_of_torch(tmp_path, with_maps):
    from transformers import AutoModelForCausalLM

    folder = write_tiny_checkpoint(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    base, method = load_base(str(folder), dtype="float32"), PrefixTuningPlus()
    params = jax.tree.map(lambda a: 3 * a, moved_params(method, base))
    virtual = method.materialize(params, base.model)
    maps = torch.tensor(np.asarray(virtual.linear.maps["self"]), requires_grad=True)
    with_maps.append(maps)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="prefix_tuning_plus"
    ).requires_grad_(False)
    ids = torch.tensor(IDS)
    mask = torch.full((IDS.shape[1],) * 2, -torch.inf).triu(1)[None, None]  # theirs has none for an unknown attention
    scores = torch.log_softmax(theirs(ids, attention_mask=mask).logits[:, -TARGETS - 1 : -1], dim=-1)
    loss = -scores.gather(2, ids[:, -TARGETS:, None]).mean()
    (slope,) = torch.autograd.grad(loss, maps)

    predicted = np.arange(IDS.shape[1]) >= IDS.shape[1] - TARGETS
    examples = [Example(row.astype(np.int32), predicted, (), 0, i) for i, row in enumerate(IDS)]
    batch = pack(examples, plan_batches(examples, lead=0, batch_size=len(IDS), packing=False))
    compiled = jax.jit(loss_and_gradient, static_argnums=(0, 1), compiler_options=QUICK_COMPILE)
    ours, gradient, _ = compiled(method, CrossEntropy(), base.model, params, batch)
    logits = jax.nn.log_softmax(jax.jit(logits_of, compiler_options=QUICK_COMPILE)(base.model, virtual, batch))
    order = np.asarray(batch.rows.examples[:, 0])
    np.testing.assert_allclose(logits[:, :TARGETS], scores.detach().numpy()[order], atol=1e-4)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    scale = jnp.asarray(params["scale"]["self"])
    np.testing.assert_allclose(gradient["maps"]["self"] / scale, slope.numpy(), atol=1e-5 * float(slope.abs().max()))
    assert float(slope.abs().max()) > 1e-3
