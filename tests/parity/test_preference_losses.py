"""A step's loss and gradient of every objective of pairs, against torch with the losses as the papers write them."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.prompts import PromptTuning
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import OBJECTIVES, prepare_examples
from spt_jax.training.step import loss_and_gradient
from tests.examples import HEAD, VIRTUAL, VOCAB, same_gradient
from tests.pairs import paper_loss, random_pairs

CASES = [
    ("dpo", {"beta": 0.3}),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("ipo", {"beta": 0.2}),
    ("simpo", {"beta": 2.0, "gamma": 0.5}),
    ("orpo", {"strength": 0.4}),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our base, torch's model of the same checkpoint, and the rows of a prompt."""
    directory = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(directory, "llama", seed=11)
    base = load_base(directory, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return base, model.eval(), np.random.default_rng(7).normal(0, 0.3, (VIRTUAL, base.config.width)).astype(np.float32)


def torch_scores(model, pairs, rows):
    """Log-probabilities [N, 2] of the answers, one sequence at a time; without `rows`, of the base without a prompt."""
    table = model.get_input_embeddings().weight.detach()
    table = table if rows is None else torch.cat([table[:VOCAB], rows])
    values = []
    for pair in pairs:
        prompt = pair.ids[pair.ids < VOCAB] if rows is None else pair.ids
        for answer in pair.choices:
            ids = torch.tensor(np.concatenate([prompt, answer]).astype(np.int64))
            logits = model(inputs_embeds=table[ids][None]).logits[0, len(prompt) - 1 : -1]
            values.append(logits.log_softmax(-1)[torch.arange(len(answer)), ids[len(prompt) :]].sum())
    return torch.stack(values).reshape(-1, 2)


@functools.partial(jax.jit, static_argnums=0)
def ours(objective, model, params, batch):
    return loss_and_gradient(PromptTuning(length=VIRTUAL), objective, model, params, batch)[:2]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_loss_and_gradient_are_those_of_torch(both, name, options):
    base, model, start = both
    pairs = random_pairs(6)
    rows = torch.tensor(start, requires_grad=True)
    with torch.no_grad():
        reference = torch_scores(model, pairs, None)
    values = torch_scores(model, pairs, rows)
    lengths = torch.tensor([[len(answer) for answer in pair.choices] for pair in pairs])
    loss = paper_loss(name, options, values, lengths, reference, torch).mean()
    loss.backward()
    objective = OBJECTIVES[name](**options)
    examples = prepare_examples(objective, base, pairs)
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=len(examples)))
    found, gradient = ours(objective, base.model, {"tokens": jax.numpy.asarray(start)}, batch)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    same_gradient(gradient["tokens"], rows.grad.numpy())
