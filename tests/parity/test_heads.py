"""Heads over a prefix, against transformers' models for each task with PEFT's prefix."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.prompts import DeepPrompts
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy, SpanCrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.examples import VOCAB, random_examples, same_gradient
from tests.parity.test_peft import P
from tests.parity.test_peft_family import flat_prefix
from tests.parity.versions import heads_raise, older_transformers, peft_marks

pytestmark = [*peft_marks, older_transformers, heads_raise]

CLASSES = 3


@functools.partial(jax.jit, static_argnames=("method", "objective"))
def loss_of(method, objective, model, params, batch):
    return loss_and_gradient(method, objective, model, params, batch)


def plain_model(directory, kind, labels):
    """Our base, and transformers' model of a kind with the same decoder."""
    import transformers

    write_tiny_checkpoint(directory, "llama", seed=11)
    decoder = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(directory)
    config.num_labels = labels
    plain = getattr(transformers, kind)(config)
    getattr(plain, plain.base_model_prefix).load_state_dict(decoder.state_dict())
    return load_base(directory, dtype="float32"), plain


def model_with_head(directory, kind, task, labels, module):
    """PEFT's model for a task, its prefix and head moved away from where they start."""
    base, plain = plain_model(directory, kind, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P))
    model.eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.3 * torch.randn_like(parameter))
    head = {n.rsplit(".", 1)[-1]: p for n, p in model.named_parameters() if f"{module}.modules_to_save" in n}
    return base, model, head


def params_of(model, head, values, config):
    """Our parameters, or their gradients, from PEFT's."""
    prefix = flat_prefix({"embedding.weight": values(model.prompt_encoder["default"].embedding.weight)}, config)
    kernel = values(head["weight"]).T
    bias = values(head["bias"]) if "bias" in head else np.zeros(kernel.shape[1], np.float32)
    return jax.tree.map(jnp.asarray, {**prefix, "head": {"kernel": kernel, "bias": bias}})


def same_in_every_layout(base, method, objective, examples, model, head, loss):
    loss.backward()
    params = params_of(model, head, lambda p: p.detach().numpy(), base.config)
    expected = params_of(model, head, lambda p: p.grad.numpy(), base.config)
    for packing in (False, True):
        batch = pack(examples, plan_batches(examples, lead=2, batch_size=len(examples), packing=packing))
        ours, slope, _ = loss_of(method, objective, base.model, params, batch)
        np.testing.assert_allclose(float(ours), loss.item(), rtol=1e-5)
        same_gradient(slope["head"]["kernel"], expected["head"]["kernel"], 2e-5)
        same_gradient(slope["free"], expected["free"], 2e-5)
        if "bias" in head:
            np.testing.assert_allclose(slope["head"]["bias"], expected["head"]["bias"], atol=2e-5)


def read_examples(classes_of):
    """Seven texts, and what `classes_of` says of the positions of each that a head reads."""
    examples = []
    for e in random_examples("choices", 7):
        ids = e.ids[e.ids < VOCAB]
        reads, classes = classes_of(len(ids), np.random.default_rng(e.index))
        examples.append(Example(ids, np.zeros(len(ids), bool), (), 0, e.index, 0, reads, classes))
    return examples


def test_the_head_reads_the_last_token_of_every_packed_example(tmp_path):
    """PEFT's classifier reads a padding token where rows are padded on the right and the model knows no padding id; one
    sequence at a time it is right, and that is the mean that packed rows have to give."""
    base, model, head = model_with_head(tmp_path, "LlamaForSequenceClassification", "SEQ_CLS", CLASSES, "score")
    examples = read_examples(lambda n, random: (np.asarray([n - 1]), random.integers(CLASSES, size=1)))
    losses = [
        model(input_ids=torch.tensor(e.ids[None].astype(int)), labels=torch.tensor(e.classes)).loss for e in examples
    ]
    method = DeepPrompts(length=P, classes=CLASSES)
    same_in_every_layout(base, method, CrossEntropy(), examples, model, head, torch.stack(losses).mean())


def test_a_tagging_head_reads_the_last_token_of_every_word(tmp_path):
    """PEFT's own loss stumbles over labels here, so it is the mean cross-entropy of its logits at the words' ends."""
    base, model, head = model_with_head(tmp_path, "LlamaForTokenClassification", "TOKEN_CLS", CLASSES, "score")

    def every_third(length, random):
        reads = np.arange(2, length, 3)
        return reads, random.integers(CLASSES, size=len(reads))

    examples = read_examples(every_third)
    logits = [model(input_ids=torch.tensor(e.ids[None].astype(int))).logits[0, e.reads] for e in examples]
    classes = torch.tensor(np.concatenate([e.classes for e in examples]))
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), classes)
    method = DeepPrompts(length=P, classes=CLASSES, head="tagging")
    same_in_every_layout(base, method, CrossEntropy(), examples, model, head, loss)


def test_a_span_head_chooses_among_the_tokens_of_its_text(tmp_path):
    """PEFT's start and end logits, with the softmax over the text that is read, not over the question too."""
    base, model, head = model_with_head(tmp_path, "LlamaForQuestionAnswering", "QUESTION_ANS", 2, "qa_outputs")

    def span(length, random):
        reads = np.arange(3, length)
        start, end = np.sort(random.integers(len(reads), size=2))
        return reads, 1 * (np.arange(len(reads)) == start) + 2 * (np.arange(len(reads)) == end)

    examples = read_examples(span)
    losses = []
    for e in examples:
        output = model(input_ids=torch.tensor(e.ids[None].astype(int)))
        for logits, flag in ((output.start_logits, 1), (output.end_logits, 2)):
            right = torch.tensor(np.flatnonzero(e.classes & flag))
            losses.append(torch.nn.functional.cross_entropy(logits[:, e.reads], right))
    method = DeepPrompts(length=P, head="span")
    same_in_every_layout(base, method, SpanCrossEntropy(), examples, model, head, torch.stack(losses).mean())
