"""Pairs of texts: hidden states, losses and gradients with the second token type, against transformers."""

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
from spt_jax.errors import ConfigError
from spt_jax.interop import export_peft
from spt_jax.prompts import PromptTuning
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import VerbalizerCrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.data.test_pairs import word_pieces

pytestmark = pytest.mark.parity

P, CLASSES = 2, {"yes": "the", "no": "a"}
TEMPLATE = Template(prompt="<soft>{a}<sep>{b}<mask>", target="{label}", verbalizers=CLASSES, virtual_tokens=P)
RECORDS = [
    {"a": "the question", "b": "is it", "label": "yes"},
    {"a": "who", "b": "what of it", "label": "no"},
    {"a": "a world of the", "b": "b", "label": "no"},
]


@pytest.mark.parametrize("family", ["bert", "electra", "albert"])
def test_loss_and_gradient_of_pairs(family, tmp_path):
    """Packed rows against one text at a time, at a mask of the second text, after virtual tokens of the first type."""
    import transformers

    overrides = {"architectures": ["ElectraForMaskedLM"]} if family == "electra" else {}
    directory = write_tiny_checkpoint(tmp_path / "base", family, **overrides)
    model = transformers.AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = word_pieces(tmp_path)
    base = dataclasses.replace(load_base(directory, dtype="float32"), tokenizer=tokenizer)
    examples = encoder_for(base, TEMPLATE).encode_all(RECORDS)
    method = PromptTuning(length=P)
    rows = 0.3 * np.random.default_rng(0).standard_normal((P, base.layout.width)).astype(np.float32)
    plan = plan_batches(examples, lead=0, batch_size=len(examples))
    batch = place_batch(pack(examples, plan), base.mesh)
    assert batch.rows.ids.shape[0] == 1
    objective = VerbalizerCrossEntropy(choices=plan.choices)
    loss, gradient, _ = jax.jit(loss_and_gradient, static_argnums=(0, 1))(
        method, objective, base.model, {"tokens": jnp.asarray(rows)}, batch
    )

    theirs = torch.tensor(rows, requires_grad=True)
    table = model.get_input_embeddings().weight
    verbalizers = tokenizer.convert_tokens_to_ids(list(CLASSES.values()))
    losses = []
    for record, example in zip(RECORDS, examples, strict=True):
        pair = tokenizer(record["a"], record["b"] + "[MASK]")
        plain = np.delete(example.ids, [1, 2])
        assert plain.tolist() == pair["input_ids"]
        ids, types = (torch.tensor([pair[name]]) for name in ("input_ids", "token_type_ids"))
        embeds = table[ids]
        embeds = torch.cat([embeds[:, :1], theirs[None], embeds[:, 1:]], dim=1)
        types = torch.cat([types[:, :1], torch.zeros(1, P, dtype=torch.long), types[:, 1:]], dim=1)
        logits = model(inputs_embeds=embeds, token_type_ids=types).logits[0, example.answer_at]
        label = torch.tensor([list(CLASSES).index(record["label"])])
        losses.append(torch.nn.functional.cross_entropy(logits[verbalizers][None], label))
    total = torch.stack(losses).mean()
    total.backward()
    np.testing.assert_allclose(float(loss), total.item(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient["tokens"]), theirs.grad.numpy(), atol=1e-5, rtol=1e-4)
    without = [dataclasses.replace(example, second_at=None) for example in examples]
    other = place_batch(pack(without, plan_batches(without, lead=0, batch_size=3)), base.mesh)
    wrong, *_ = loss_and_gradient(method, objective, base.model, {"tokens": jnp.asarray(rows)}, other)
    assert abs(float(wrong) - total.item()) > 1e-4


def test_a_pair_is_not_exported_where_there_are_types(tmp_path):
    base = load_base(write_tiny_checkpoint(tmp_path / "base", "bert"), dtype="float32")
    base = dataclasses.replace(base, tokenizer=word_pieces(tmp_path))
    template = dataclasses.replace(TEMPLATE, prompt="<soft:2><bos>{a}<sep>{b}", head="classification")
    method = PromptTuning(length=P)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    save_prompt(tmp_path / "ours", base, method, virtual, template)
    with pytest.raises(ConfigError, match="PEFT gives all tokens after its prompts the first token type"):
        export_peft(tmp_path / "theirs", load_prompt(tmp_path / "ours", base), base)
