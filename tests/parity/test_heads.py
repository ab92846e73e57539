"""A classification head over a prefix, against transformers' sequence classifier with PEFT's prefix."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import Example
from spt_jax.prompts import DeepPrompts
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.step import Objective, loss_and_gradient
from tests.examples import VOCAB, random_examples, same_gradient
from tests.parity.test_peft import P
from tests.parity.test_peft_family import flat_prefix, pytestmark  # noqa: F401

CLASSES = 3


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_of(module, method, frozen, params, batch):
    return loss_and_gradient(module, method, Objective(), frozen, params, batch)


def test_the_head_reads_the_last_token_of_every_packed_example(tmp_path):
    """PEFT's classifier reads a padding token where rows are padded on the right and the model knows no padding id; one
    sequence at a time it is right, and that is the mean that packed rows have to give."""
    import transformers

    write_tiny_checkpoint(tmp_path, "llama", seed=11)
    base = load_base(tmp_path, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForSequenceClassification.from_pretrained(
            tmp_path, num_labels=CLASSES, dtype=torch.float32
        )
        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
        model = peft.get_peft_model(model, config)
    model.eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.3 * torch.randn_like(parameter))
    score = next(p for n, p in model.named_parameters() if "score.modules_to_save" in n)

    examples = []
    for e in random_examples("choices", 7):
        ids = e.ids[e.ids < VOCAB]
        reads, classes = np.asarray([len(ids) - 1]), np.asarray([e.index % CLASSES])
        examples.append(Example(ids, np.zeros(len(ids), bool), (), e.index % CLASSES, e.index, 0, reads, classes))
    losses = []
    for e in examples:
        output = model(input_ids=torch.tensor(e.ids[None].astype(int)), labels=torch.tensor([e.label]))
        losses.append(output.loss)
    torch.stack(losses).mean().backward()

    method = DeepPrompts(length=P, classes=CLASSES)
    named = {"embedding.weight": model.prompt_encoder["default"].embedding.weight}
    params = flat_prefix({n: p.detach().numpy() for n, p in named.items()}, base.config)
    head = {"kernel": score.detach().numpy().T, "bias": np.zeros(CLASSES, np.float32)}
    params = jax.tree.map(jnp.asarray, {**params, "head": head})
    for packing in (False, True):
        batch = pack(examples, plan_batches(examples, lead=2, batch_size=7, packing=packing))
        loss, slope, _ = loss_of(base.module, method, base.params, params, batch)
        np.testing.assert_allclose(float(loss), torch.stack(losses).mean().item(), rtol=1e-5)
        same_gradient(slope["head"]["kernel"], score.grad.numpy().T, 2e-5)
        theirs = flat_prefix({n: p.grad.numpy() for n, p in named.items()}, base.config)["free"]
        same_gradient(slope["free"], theirs, 2e-5)
