"""A step's loss and gradient of distillation, against torch with its own Kullback-Leibler divergence."""

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
from spt_jax.training.objectives import Distillation, prepare_examples
from spt_jax.training.step import loss_and_gradient
from tests.examples import HEAD, VIRTUAL, VOCAB, random_examples, same_gradient

TEXT = "good and nice, bad and bad\n"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our base, torch's model of the same checkpoint, the rows of a prompt, and the file of a text."""
    directory = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(directory, "llama", seed=11)
    base = load_base(directory, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    start = np.random.default_rng(7).normal(0, 0.3, (VIRTUAL, base.config.width)).astype(np.float32)
    (directory / "text.txt").write_text(TEXT)
    return base, model.eval(), start, directory / "text.txt"


def torch_logits(model, examples, rows=None, text=()):
    """Logits [N, V] that predict the targets; without `rows`, after the text and without virtual tokens."""
    table = model.get_input_embeddings().weight.detach()
    table = table if rows is None else torch.cat([table[:VOCAB], rows])
    found = []
    for example in examples:
        ids = example.ids if rows is not None else np.concatenate([text, example.ids[example.ids < VOCAB][1:]])
        places = len(ids) - len(example.ids) + np.flatnonzero(example.predicted)
        found.append(model(inputs_embeds=table[torch.tensor(ids.astype(np.int64))][None]).logits[0, places - 1])
    return torch.cat(found)


@functools.partial(jax.jit, static_argnums=0)
def ours(objective, model, params, batch):
    return loss_and_gradient(PromptTuning(length=VIRTUAL), objective, model, params, batch)[:2]


@pytest.mark.parametrize(("k", "temperature"), [(VOCAB, 1.0), (VOCAB, 2.0), (6, 1.0), (0, 2.0)])
def test_loss_and_gradient_are_those_of_torch(both, k, temperature):
    base, model, start, file = both
    examples, rows = random_examples("spans", 5), torch.tensor(start, requires_grad=True)
    text = np.asarray(base.tokenizer(TEXT)["input_ids"])
    with torch.no_grad():
        teacher = (torch_logits(model, examples, text=text) / temperature).log_softmax(-1)
    student = (torch_logits(model, examples, rows) / temperature).log_softmax(-1)
    if 0 < k < VOCAB:
        top = teacher.topk(k).indices
        teacher, student = (
            torch.cat([own.gather(1, top), (1 - own.gather(1, top).exp().sum(1, keepdim=True)).log()], dim=1)
            for own in (teacher, student)
        )
    loss = temperature**2 * torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    loss.backward()
    objective = Distillation(text=str(file), top_k=k, temperature=temperature)
    prepared = prepare_examples(objective, base, examples)
    batch = pack(prepared, plan_batches(prepared, lead=len(HEAD), batch_size=len(prepared)))
    found, gradient = ours(objective, base.model, {"tokens": jax.numpy.asarray(start)}, batch)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    same_gradient(gradient["tokens"], rows.grad.numpy())
