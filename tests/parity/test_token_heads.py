"""Heads over virtual tokens: PEFT's files both ways for decoders, and PEFT's logits."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import output_logits
from spt_jax.interop import export_peft, import_peft
from spt_jax.prompts import PromptTuning, PTuning
from spt_jax.prompts.storage import load_prompt, save_prompt
from tests.parity.test_heads import plain_model
from tests.parity.versions import peft_marks

pytestmark = [*peft_marks, pytest.mark.filterwarnings("ignore")]

P, CLASSES = 3, {"a": "A", "b": "B", "c": "C"}
TEXT = "the question is it"
TASKS = {
    "SEQ_CLS": ("LlamaForSequenceClassification", "classification", 3, None),
    "TOKEN_CLS": ("LlamaForTokenClassification", "tagging", 3, "text"),
    "QUESTION_ANS": ("LlamaForQuestionAnswering", "span", 2, "text"),
}
CONFIGS = {"PROMPT_TUNING": peft.PromptTuningConfig, "P_TUNING": peft.PromptEncoderConfig}


def template_of(head, reads):
    names = {} if head == "span" else {"verbalizers": CLASSES}
    prompt = "<soft><bos>{text}"
    return Template(prompt=prompt, target="{label}", virtual_tokens=P, head=head, reads=reads, **names)


def ours(base, virtual, ids, reads):
    """The head's logits at some positions of a text after the virtual tokens."""
    whole = np.concatenate([base.layout.vocab_size + np.arange(P), ids]).astype(np.int32)
    example = Example(
        whole, np.zeros(len(whole), bool), (), 0, 0, reads=P + reads, classes=np.zeros(len(reads), np.int32)
    )
    rows = pack([example], plan_batches([example], lead=0, batch_size=1)).rows
    return np.asarray(jax.jit(output_logits)(base.model, virtual, None, rows))[0, : len(reads)]


def theirs(model, ids, reads, head):
    """PEFT's logits there. It puts those of the virtual tokens before a text's."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor(ids[None]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    if head == "classification":
        return output.logits.numpy()
    if head == "tagging":
        return output.logits[0, P + reads].numpy()
    return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)[P + reads].numpy()


@pytest.mark.parametrize(
    ("task", "kind"),
    [("SEQ_CLS", "PROMPT_TUNING"), ("SEQ_CLS", "P_TUNING"), ("TOKEN_CLS", "P_TUNING"), ("QUESTION_ANS", "P_TUNING")],
)
def test_heads_over_token_rows_go_both_ways(task, kind, tmp_path):
    architecture, head, count, field = TASKS[task]
    base, plain = plain_model(tmp_path / "base", architecture, count)
    model = peft.get_peft_model(plain, CONFIGS[kind](task_type=task, num_virtual_tokens=P)).eval()
    torch.manual_seed(0)
    for parameter in filter(lambda own: own.requires_grad, model.parameters()):
        parameter.data.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "peft")
    method, virtual = import_peft(tmp_path / "peft", base)
    assert isinstance(method, PromptTuning) and method.head == head
    ids = np.asarray(base.tokenizer(TEXT)["input_ids"])
    reads = np.arange(len(ids)) if field else np.asarray([len(ids) - 1])
    expected = theirs(model, ids, reads, head)
    np.testing.assert_allclose(ours(base, virtual, ids, reads), expected, atol=1e-4)

    saved = save_prompt(tmp_path / "ours", base, method, virtual, template_of(head, field))
    export_peft(tmp_path / "again", load_prompt(saved, base), base)
    again = peft.PeftModel.from_pretrained(plain_model(tmp_path / "base2", architecture, count)[1], tmp_path / "again")
    np.testing.assert_allclose(theirs(again.eval(), ids, reads, head), expected, atol=1e-5)


def test_a_bias_that_peft_does_not_have(tmp_path):
    base, _ = plain_model(tmp_path / "base", "LlamaForSequenceClassification", 3)
    method = PTuning(length=P, head="classification", classes=3)
    params = jax.tree.map(lambda a: a + 0.1, method.init_params(jax.random.key(0), base))
    template = template_of("classification", None)
    saved = save_prompt(tmp_path / "ours", base, method, method.materialize(params, base.model), template)
    with pytest.raises(ConfigError, match=r"heads without a bias; train with --method\.no-head-bias"):
        export_peft(tmp_path / "out", load_prompt(saved, base), base)
    example = encoder_for(base, template).encode({"text": TEXT, "label": "b"}, 0)
    assert example.reads.tolist() == [len(example.ids) - 1]
