"""A step's loss and gradient of GRPO, Dr. GRPO and DAPO, against torch with the losses as the papers write them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.evaluation.bare import bare_examples, bare_plan, token_log_probabilities
from spt_jax.prompts import PromptTuning
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import Grpo
from spt_jax.training.objectives.grpo import group_extra
from spt_jax.training.step import loss_and_gradient
from tests.examples import HEAD, VIRTUAL, VOCAB, same_gradient
from tests.groups import GROUP, paper_loss, random_groups

LONGEST = 5
REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [0.25, 0.25, 0.25], [2.0, -1.0, 0.0]]
OPTIONS = {"group_size": GROUP, "max_new_tokens": LONGEST}
CASES = {
    "grpo": Grpo(**OPTIONS, beta=0.3),
    "dr_grpo": Grpo(**OPTIONS, beta=0.0, normalize_by_std=False, length_normalization="constant"),
    "dapo": Grpo(**OPTIONS, beta=0.0, clip_high=0.28, length_normalization="token", drop_equal_groups=True),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our base, torch's model of the same checkpoint, and the rows of a prompt."""
    directory = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(directory, "llama", seed=11)
    base = load_base(directory, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return base, model.eval(), np.random.default_rng(7).normal(0, 0.3, (VIRTUAL, base.config.width)).astype(np.float32)


def torch_tokens(model, groups, rows):
    """Log-probabilities of each token of each answer; without `rows`, of the base without a prompt."""
    table = model.get_input_embeddings().weight.detach()
    table = table if rows is None else torch.cat([table[:VOCAB], rows])
    found = []
    for group in groups:
        prompt = group.ids[group.ids < VOCAB] if rows is None else group.ids
        found.append([])
        for answer in group.choices:
            ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))
            logits = model(inputs_embeds=table[ids][None]).logits[0, len(prompt) - 1 : -1]
            found[-1].append(logits.log_softmax(-1)[torch.arange(len(answer)), ids[len(prompt) :]])
    return found


@functools.partial(jax.jit, static_argnums=0)
def ours(objective, model, params, batch):
    return loss_and_gradient(PromptTuning(length=VIRTUAL), objective, model, params, batch)[:2]


def padded(values):
    return np.stack([np.pad(np.asarray(one), (0, LONGEST - len(one))) for one in values])


@pytest.mark.parametrize("variant", CASES)
def test_loss_and_gradient_are_those_of_torch(both, variant):
    base, model, start = both
    objective, groups = CASES[variant], random_groups(len(REWARDS), LONGEST)
    rows, random = torch.tensor(start, requires_grad=True), np.random.default_rng(2)
    with torch.no_grad():
        reference = torch_tokens(model, groups, None)
        # Ratios on both sides of the clipping range.
        old = [
            [one + torch.tensor(random.normal(0, 0.4, len(one)).astype(np.float32)) for one in group]
            for group in torch_tokens(model, groups, rows)
        ]
    clip = objective.clip_low, objective.clip_high
    loss = paper_loss(
        variant, REWARDS, torch_tokens(model, groups, rows), old, reference, objective.beta, clip, LONGEST
    )
    loss.backward()

    bare = bare_examples(base, groups)
    mine = token_log_probabilities(base, bare, bare_plan(base, bare, len(groups), packing=True))
    for own, theirs in zip(mine, reference, strict=True):
        np.testing.assert_allclose(padded(own), padded(theirs), rtol=1e-4, atol=1e-5)
    advantages, weights = objective.advantages(np.asarray(REWARDS))
    examples = [
        dataclasses.replace(
            group,
            extra=group_extra(
                advantages[number],
                weights[number],
                np.asarray([len(answer) for answer in group.choices]),
                padded(old[number]),
                padded(mine[number]),
            ),
        )
        for number, group in enumerate(groups)
    ]
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=len(examples)))
    found, gradient = ours(objective, base.model, {"tokens": jax.numpy.asarray(start)}, batch)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5, atol=1e-6)
    same_gradient(gradient["tokens"], rows.grad.numpy())
