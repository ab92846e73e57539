"""ReFT written in torch as hooks on the layers of transformers: the same logits, loss and gradients."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.prompts import RepresentationFinetuning
from spt_jax.prompts.reft import DOWN_UNIT
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.examples import QUICK_COMPILE, VOCAB
from tests.family import moved_params

IDS = np.random.default_rng(0).integers(3, VOCAB, (3, 14))
TARGETS = 5


def hook_of(edits, layer: int):
    """Wu et al. 2024, h + W2^T (W1 h + b), with b in units of the root mean square of h."""

    def hook(module, inputs, output):
        size = output.square().mean(-1, keepdim=True).sqrt()
        read = output @ edits["down"][layer] + size * edits["bias"][layer]
        return output + read @ edits["up"][layer]

    return hook


def logits_of(model, virtual, batch):
    return output_logits(model, virtual, encode_prefix(model, virtual, batch.lead_ids), batch.rows)


def test_logits_loss_and_gradients_are_those_of_torch(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_tiny_checkpoint(tmp_path)
    base, method = load_base(str(folder), dtype="float32"), RepresentationFinetuning(rank=3)
    params = jax.tree.map(lambda a: 3 * a, moved_params(method, base))
    virtual = method.materialize(params, base.model)
    edits = {
        name: torch.tensor(np.asarray(getattr(virtual.edits, name)), requires_grad=True)
        for name in ("down", "bias", "up")
    }
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for i, layer in enumerate(theirs.model.layers):
        layer.register_forward_hook(hook_of(edits, i))
    ids = torch.tensor(IDS)
    scores = torch.log_softmax(theirs(ids).logits[:, -TARGETS - 1 : -1], dim=-1)
    loss = -scores.gather(2, ids[:, -TARGETS:, None]).mean()
    loss.backward()

    predicted = np.arange(IDS.shape[1]) >= IDS.shape[1] - TARGETS
    examples = [Example(row.astype(np.int32), predicted, (), 0, i) for i, row in enumerate(IDS)]
    batch = pack(examples, plan_batches(examples, lead=0, batch_size=len(IDS), packing=False))
    compiled = jax.jit(loss_and_gradient, static_argnums=(0, 1), compiler_options=QUICK_COMPILE)
    ours, gradient, _ = compiled(method, CrossEntropy(), base.model, params, batch)
    logits = jax.nn.log_softmax(jax.jit(logits_of, compiler_options=QUICK_COMPILE)(base.model, virtual, batch))
    order = np.asarray(batch.rows.examples[:, 0])
    np.testing.assert_allclose(logits[:, :TARGETS], scores.detach().numpy()[order], atol=1e-4)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    for name, own in edits.items():
        scale = float(own.grad.abs().max())
        assert scale > 1e-3
        unit = DOWN_UNIT / base.layout.layer_width if name == "down" else 1
        np.testing.assert_allclose(gradient[name] / unit, own.grad.numpy(), atol=1e-5 * scale, err_msg=name)
