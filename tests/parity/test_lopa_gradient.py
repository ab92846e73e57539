"""LoPA written in torch from the paper, in front of a model of transformers: the same loss and gradient."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.prompts import LowRankPromptAdaptation
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.examples import QUICK_COMPILE, VOCAB
from tests.family import moved_params

LENGTH, RANK, TARGETS = 3, 2, 4
INPUTS = [np.random.default_rng(seed).integers(3, VOCAB, 5 + 3 * seed + TARGETS) for seed in range(3)]


def network(layers, x):
    hidden = torch.tanh(x @ layers["inner"]["kernel"] + layers["inner"]["bias"])
    return hidden @ layers["outer"]["kernel"] + layers["outer"]["bias"]


def loss_of_torch(model, params, inputs):
    """The virtual tokens Z * sigmoid(U V^T) before each input; the networks do not read its last token."""
    total, table = 0.0, model.get_input_embeddings().weight
    for row in inputs:
        ids = torch.tensor(row)
        mean = table[ids[: -TARGETS - 1]].mean(0)
        read = mean / mean.square().mean().sqrt()
        left, right = network(params["rows"], read).view(LENGTH, RANK), network(params["columns"], read).view(-1, RANK)
        prompt = params["tokens"] * torch.sigmoid(left @ right.T)
        logits = model(inputs_embeds=torch.cat([prompt, table[ids]])[None]).logits[0, -TARGETS - 1 : -1]
        total = total - torch.log_softmax(logits, dim=-1).gather(1, ids[-TARGETS:, None]).sum()
    return total / (TARGETS * len(inputs))


def test_loss_and_gradient_are_those_of_torch(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_tiny_checkpoint(tmp_path)
    base = load_base(str(folder), dtype="float32")
    method = LowRankPromptAdaptation(length=LENGTH, rank=RANK, hidden=8)
    params = moved_params(method, base)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    copied = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), params)
    loss = loss_of_torch(theirs, copied, INPUTS)
    loss.backward()

    prompt = VOCAB + np.arange(LENGTH)
    examples = []
    for index, row in enumerate(INPUTS):
        ids = np.concatenate([prompt, row]).astype(np.int32)
        example = Example(ids, np.arange(len(ids)) >= len(ids) - TARGETS, (), 0, index)
        examples.append(example.reading(causal=True))
    batch = pack(examples, plan_batches(examples, lead=0, batch_size=len(INPUTS)))
    assert len(batch.rows.ids) == 1, "all examples share a row"
    compiled = jax.jit(loss_and_gradient, static_argnums=(0, 1), compiler_options=QUICK_COMPILE)
    ours, gradient, _ = compiled(method, CrossEntropy(), base.model, params, batch)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    slopes = jax.tree.map(lambda leaf: leaf.grad.numpy(), copied)
    largest = max(float(np.abs(slope).max()) for slope in jax.tree.leaves(slopes))
    assert all(np.abs(slope).max() > 1e-5 for slope in jax.tree.leaves(slopes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), dict(gradient), slopes)
