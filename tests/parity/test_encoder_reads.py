"""Tagging and span heads on encoders: losses and gradients of transformers' models, with virtual tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import Template
from spt_jax.prompts import PromptTuning
from spt_jax.prompts.virtual import Head
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy, SpanCrossEntropy
from spt_jax.training.step import loss_and_gradient

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

P = 3
FAMILIES = ("bert", "deberta-v2")
CLASSES = {"O": "O", "B": "B", "I": "I"}
RECORDS = [
    {"words": "Bob was in the question", "tags": "B O O B I", "q": "Who is it", "answer": "Bob"},
    {"words": "is Hello", "tags": "O B", "q": "What", "answer": "Hello"},
    {"words": "the answers of Ann, and Bob", "tags": "O I O B O B", "q": "Whose answers", "answer": "Ann, and Bob"},
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithHead(PromptTuning):
    """Prompt tuning whose parameters hold the kernel and the bias of a head, too."""

    def materialize(self, params, model):
        rows = {name: leaf for name, leaf in params.items() if name != "head"}
        return dataclasses.replace(super().materialize(rows, model), head=Head(**params["head"]))


def both(tmp_path, family, kind, labels):
    """The base, and transformers' model of the same files with a random head, and the parameters of that head."""
    import transformers

    directory = write_tiny_checkpoint(tmp_path / "base", family, seed=2)
    model = getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32, num_labels=labels).eval()
    module = model.classifier if kind.endswith("TokenClassification") else model.qa_outputs
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_()
    return load_base(directory, dtype="float32"), model, module


def inputs_of(model, rows, examples):
    """The embeddings of examples with virtual tokens, padded, and their attention mask."""
    table = torch.cat([model.get_input_embeddings().weight, rows])
    longest = max(len(example.ids) for example in examples)
    embeds, masks = [], []
    for example in examples:
        own = table[torch.tensor(np.asarray(example.ids, np.int64))]
        embeds.append(torch.nn.functional.pad(own, (0, 0, 0, longest - len(own))))
        masks.append((torch.arange(longest) < len(own)).long())
    return {"inputs_embeds": torch.stack(embeds), "attention_mask": torch.stack(masks)}


def compare(base, module, template, objective, loss_of):
    """Compares the loss and the gradients of rows and head with those of torch, packed and not."""
    examples = encoder_for(base, template).encode_all(RECORDS)
    method = WithHead(length=P)
    tokens = jax.tree.map(lambda a: 3 * a, method.init_params(jax.random.key(0), base))
    head = {"kernel": module.weight.detach().numpy().T, "bias": module.bias.detach().numpy()}
    params = {**tokens, "head": jax.tree.map(jnp.asarray, head)}
    (rows,) = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in jax.tree.leaves(tokens)]
    total = loss_of(rows, examples)
    total.backward()
    expected = [module.weight.grad.numpy().T, module.bias.grad.numpy(), rows.grad.numpy()]
    for packing in (False, True):
        plan = plan_batches(examples, lead=0, batch_size=len(examples), packing=packing)
        batch = place_batch(pack(examples, plan), base.mesh)
        loss, gradient, _ = loss_and_gradient(method, objective, base.model, params, batch)
        np.testing.assert_allclose(float(loss), total.item(), rtol=1e-5)
        (of_rows,) = jax.tree.leaves({name: leaf for name, leaf in gradient.items() if name != "head"})
        ours = [gradient["head"]["kernel"], gradient["head"]["bias"], of_rows]
        assert np.abs(expected[0]).max() > 1e-3 and np.abs(expected[2]).max() > 1e-3
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one), other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_of_the_first_token_of_each_word(family, tmp_path):
    """The mean over the words of all examples, as in transformers' loss with labels at these tokens alone."""
    base, model, module = both(tmp_path, family, "AutoModelForTokenClassification", len(CLASSES))
    template = Template(
        prompt="<soft>{words}", target="{tags}", virtual_tokens=P, verbalizers=CLASSES, head="tagging", reads="words"
    )

    def loss_of(rows, examples):
        inputs = inputs_of(model, rows, examples)
        labels = torch.full(inputs["attention_mask"].shape, -100)
        for number, record in enumerate(RECORDS):
            text, tags = record["words"], record["tags"].split()
            offsets = base.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            starts = [0, *(i + 1 for i, character in enumerate(text) if character == " ")]
            for start, tag in zip(starts, tags, strict=True):
                token = next(i for i, (first, last) in enumerate(offsets) if first <= start < last)
                labels[number, token + P] = list(CLASSES).index(tag)  # Virtual tokens follow the opening token.
        return model(**inputs, labels=labels).loss

    compare(base, module, template, CrossEntropy(), loss_of)


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_the_text_that_is_read(family, tmp_path):
    """The mean of both cross-entropies over the tokens of the field; transformers' are over all, padding among them."""
    base, model, module = both(tmp_path, family, "AutoModelForQuestionAnswering", 2)
    template = Template(prompt="{q}?<soft>{words}", target="{answer}", virtual_tokens=P, head="span", reads="words")

    def loss_of(rows, examples):
        output = model(**inputs_of(model, rows, examples))
        losses = []
        for number, (example, record) in enumerate(zip(examples, RECORDS, strict=True)):
            offsets = base.tokenizer(record["words"], return_offsets_mapping=True, add_special_tokens=False)
            places = offsets["offset_mapping"]
            start = record["words"].index(record["answer"])
            end = start + len(record["answer"]) - 1
            first = len(example.ids) - 1 - len(places)  # The field is last, before the closing token.
            for logits, at in ((output.start_logits, start), (output.end_logits, end)):
                token = next(i for i, (low, high) in enumerate(places) if low <= at < high)
                own = logits[number, first : first + len(places)]
                losses.append(torch.nn.functional.cross_entropy(own[None], torch.tensor([token])))
        return torch.stack(losses).mean()

    compare(base, module, template, SpanCrossEntropy(), loss_of)
