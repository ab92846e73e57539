"""PEFT's token classifiers and question answerers on encoders: files both ways, and what PEFT gets wrong."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.interop import export_peft, import_peft
from spt_jax.prompts import DeepPrompts
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import tiny_base
from tests.parity.test_encoder_prompts import TEXT, P, both, hidden_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

# The class of transformers, the name of the task, and what its template needs.
TASKS = {
    "TOKEN_CLS": (
        "AutoModelForTokenClassification",
        {"head": "tagging", "target": "{tags}", "verbalizers": {"O": "O", "B": "B"}},
    ),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", {"head": "span", "target": "{answer}"}),
}


def with_head(tmp_path, family, task, config):
    """The base, and PEFT's model of it with a random prompt and head."""
    base, model = both(tmp_path, family, TASKS[task][0])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier.", "qa_outputs.")):
            torch.nn.init.normal_(parameter)
    # PEFT does not find the sizes of DistilBERT, and takes the width of hidden states for that of ALBERT's embeddings.
    sizes = {"token_dim": base.layout.width, "num_layers": 2, "num_attention_heads": 4}
    theirs = peft.get_peft_model(model, config(task_type=task, num_virtual_tokens=P, **sizes)).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data.normal_(std=0.5)
    return base, theirs


def logits_of_peft(model, base, **labels):
    """The logits [T, C] of all tokens, virtual ones first, and the loss if there are labels."""
    ids = torch.tensor([base.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), **labels)
    logits = found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], dim=-1)
    return logits[0].numpy(), found.get("loss")


@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        ("bert", "TOKEN_CLS", peft.PromptTuningConfig),
        ("bert", "QUESTION_ANS", peft.PromptEncoderConfig),
        ("roberta", "TOKEN_CLS", peft.PromptEncoderConfig),
        ("xlm-roberta", "QUESTION_ANS", peft.PromptTuningConfig),
        ("distilbert", "TOKEN_CLS", peft.PromptTuningConfig),
        ("distilbert", "QUESTION_ANS", peft.PromptTuningConfig),
        ("electra", "QUESTION_ANS", peft.PromptTuningConfig),
        ("albert", "TOKEN_CLS", peft.PromptTuningConfig),
        ("deberta-v2", "QUESTION_ANS", peft.PromptTuningConfig),
        ("deberta-v2", "TOKEN_CLS", peft.PromptTuningConfig),
    ],
)
def test_files_go_both_ways(family, task, config, tmp_path):
    """The logits of all tokens equal PEFT's, and an exported prompt gives PEFT the same ones."""
    base, theirs = with_head(tmp_path, family, task, config)
    expected, _ = logits_of_peft(theirs, base)
    theirs.save_pretrained(tmp_path / "peft")
    method, virtual = import_peft(tmp_path / "peft", base)
    assert method.head == TASKS[task][1]["head"] and virtual.head is not None
    ours = hidden_of(base, method, virtual) @ np.asarray(virtual.head.kernel) + np.asarray(virtual.head.bias)
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    template = Template(prompt="<soft><bos>{text}", reads="text", virtual_tokens=P, **TASKS[task][1])
    save_prompt(tmp_path / "ours", base, method, virtual, template)
    export_peft(tmp_path / "exported", load_prompt(tmp_path / "ours", base), base)
    again = peft.PeftModel.from_pretrained(both(tmp_path, family, TASKS[task][0])[1], tmp_path / "exported").eval()
    np.testing.assert_allclose(logits_of_peft(again, base)[0], expected, atol=1e-5)


def test_labels_of_tokens_stop_peft(tmp_path):
    """PEFT gives the virtual tokens no labels, so that it cannot train a token classifier with token rows."""
    base, theirs = with_head(tmp_path, "bert", "TOKEN_CLS", peft.PromptTuningConfig)
    labels = torch.zeros(1, len(base.tokenizer(TEXT)["input_ids"]), dtype=torch.long)
    with pytest.raises(ValueError, match="batch_size"):
        logits_of_peft(theirs, base, labels=labels)


def test_positions_of_answers_are_not_moved_in_peft(tmp_path):
    """Its loss takes position i of the text as token i after the virtual ones were put before: P tokens too early."""
    base, theirs = with_head(tmp_path, "bert", "QUESTION_ANS", peft.PromptTuningConfig)
    at = torch.tensor([P + 1])
    logits, loss = logits_of_peft(theirs, base, start_positions=at, end_positions=at)
    scores = torch.log_softmax(torch.tensor(logits), dim=0)
    early, own = (-scores[place].mean() for place in (P + 1, P + 1 + P))
    torch.testing.assert_close(loss, early)
    assert abs(loss - own) > 0.01


@pytest.mark.parametrize("task", TASKS)
def test_prefixes_with_a_head_stop_peft(task, tmp_path):
    """So that none is exchanged."""
    base, theirs = with_head(tmp_path, "bert", task, peft.PrefixTuningConfig)
    with pytest.raises(ValueError, match="does not support past key values"):
        logits_of_peft(theirs, base)
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(ConfigError, match="encoders with a head take no prefix"):
        import_peft(tmp_path / "peft", base)


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("modernbert", "span", "in modernbert, transformers has other layers before the head"),
        ("bert", "span", "encoders with a head take no prefix"),
        ("bert", "classification", "classifiers of encoders have other layers before the head"),
    ],
)
def test_what_is_not_exported(family, head, message, tmp_path):
    base = tiny_base(family)
    options = {"head": head, "target": "{answer}", "reads": "text"}
    if head == "classification":
        options |= {"verbalizers": {"a": "a", "b": "b"}, "reads": None}
    method = DeepPrompts(length=2, head=head, classes=2 if head == "classification" else None)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    save_prompt(tmp_path / "ours", base, method, virtual, Template(prompt="{text}", **options))
    with pytest.raises(ConfigError, match=message):
        export_peft(tmp_path / "exported", load_prompt(tmp_path / "ours", base), base)
