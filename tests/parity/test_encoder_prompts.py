"""Encoders under prompts of PEFT: hidden states, gradients, files both ways, and where PEFT reads the wrong token."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix, run_stream
from spt_jax.interop import export_peft, import_peft
from spt_jax.interop.peft import default_template
from spt_jax.models.attention import Stream
from spt_jax.prompts import DeepPrompts, PromptTuning
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

P = 3
TEXT = "the question is it"
FAMILIES = ("bert", "roberta", "modernbert", "deberta-v2")


def both(tmp_path, family, architecture="AutoModel"):
    """The base, and transformers' model of the same files."""
    import transformers

    directory = write_tiny_checkpoint(tmp_path / "base", family)
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32).eval()
    return load_base(directory, dtype="float32"), model


def with_prompt(model, kind, task="FEATURE_EXTRACTION"):
    """The model with a random prompt of PEFT."""
    options = {"task_type": task, "num_virtual_tokens": P}
    config = peft.PrefixTuningConfig(**options) if kind == "prefix" else peft.PromptTuningConfig(**options)
    torch.manual_seed(0)
    found = peft.get_peft_model(model, config).eval()
    for parameter in found.prompt_encoder.parameters():
        parameter.data.normal_(std=0.5)
    return found


def hidden_of_peft(model, base, text=TEXT):
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0].numpy()


def hidden_of(base, method, virtual, text=TEXT):
    """The hidden states of a text behind a prompt, in the order of PEFT's tokens."""
    template = Template(
        prompt=default_template(base, method), target="{y}", virtual_tokens=method.token_count,
        verbalizers={"a": "a", "b": "b"}, head="classification",
    )  # fmt: skip
    ids = jnp.asarray(encoder_for(base, template).prompt_ids({"text": text}))[None]
    places, ones = virtual.first_position + jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)
    prefix = encode_prefix(base.model, virtual, jnp.zeros(0, jnp.int32))
    return np.asarray(run_stream(base.model, virtual, ids, Stream(places, ones, 0 * ones), prefix)[0][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_token_rows_of_peft(family, tmp_path):
    """The hidden states of all tokens equal PEFT's, and an exported prompt gives PEFT the same ones."""
    base, model = both(tmp_path, family)
    theirs = with_prompt(model, "tokens")
    theirs.save_pretrained(tmp_path / "peft")
    method, virtual = import_peft(tmp_path / "peft", base)
    expected = hidden_of_peft(theirs, base)
    np.testing.assert_allclose(hidden_of(base, method, virtual), expected, atol=1e-4)

    template = Template(
        prompt=default_template(base, method), target="{label}", virtual_tokens=P, verbalizers={"a": " the", "b": "b"},
        head="classification",
    )  # fmt: skip
    save_prompt(tmp_path / "ours", base, method, virtual, template)
    export_peft(tmp_path / "exported", load_prompt(tmp_path / "ours", base), base)
    again = peft.PeftModel.from_pretrained(both(tmp_path, family)[1], tmp_path / "exported").eval()
    np.testing.assert_allclose(hidden_of_peft(again, base), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_prefixes_of_peft(family, tmp_path):
    """Positions of tokens are counted from the end of the prefix."""
    base, model = both(tmp_path, family)
    theirs = with_prompt(model, "prefix")
    theirs.save_pretrained(tmp_path / "peft")
    method, virtual = import_peft(tmp_path / "peft", base)
    np.testing.assert_allclose(hidden_of(base, method, virtual), hidden_of_peft(theirs, base), atol=1e-4)


def test_peft_pools_a_virtual_token(tmp_path):
    """A head over [CLS], which follows the virtual tokens, gives other logits than PEFT."""
    base, model = both(tmp_path, "bert", "AutoModelForSequenceClassification")
    torch.nn.init.normal_(model.classifier.weight)
    theirs = with_prompt(model, "tokens", "SEQ_CLS")
    ids = torch.tensor([base.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        rows = theirs.get_prompt(1)
        inner = theirs.base_model
        embeds = torch.cat([rows, inner.bert.embeddings.word_embeddings(ids)], dim=1)
        states = inner.bert(inputs_embeds=embeds)[0][0]
        found = [inner.classifier(torch.tanh(inner.bert.pooler.dense(states[at]))) for at in (0, P)]
    torch.testing.assert_close(logits, found[0])
    assert (logits - found[1]).abs().max() > 0.01
    template = Template(
        prompt="<soft><bos>{text}", target="{label}", virtual_tokens=P, verbalizers={"a": "a", "b": "b"},
        head="classification",
    )  # fmt: skip
    example = encoder_for(base, template).encode({"text": TEXT, "label": "a"}, 0)
    assert example.reads.tolist() == [P] and example.ids[P] == base.tokenizer(TEXT)["input_ids"][0]


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
def test_loss_and_gradient_of_a_head(family, pooling, tmp_path):
    """Those of torch for rows among the embeddings and a linear head, with padding on torch's side."""
    base, model = both(tmp_path, family)
    config = dataclasses.replace(base.config, pooling=pooling)
    module = base.model.module.clone(config=config)
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, module=module))
    records = [{"text": TEXT, "label": "a"}, {"text": "no", "label": "b"}, {"text": "what is the answer", "label": "b"}]
    template = Template(
        prompt="<soft>{text}",
        target="{label}",
        virtual_tokens=P,
        verbalizers={"a": "a", "b": "b"},
        head="classification",
    )
    examples = encoder_for(base, template).encode_all(records)
    rng = np.random.default_rng(0)
    kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 2), 2))
    method = PromptTuning(length=P, head="classification", classes=2)
    params = method.init_params(jax.random.key(0), base)
    params = {**params, "head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    batch = place_batch(pack(examples, plan_batches(examples, lead=0, batch_size=len(examples))), base.mesh)
    loss, gradient, _ = loss_and_gradient(method, CrossEntropy(), base.model, params, batch)

    # The kernel is in units of 32 / D, and D is 32.
    rows, *head = (torch.tensor(np.asarray(a), requires_grad=True) for a in (params["tokens"], kernel, bias))
    table = model.get_input_embeddings().weight
    longest = max(len(example.ids) for example in examples)
    losses = []
    for example in examples:
        whole = torch.cat([table, rows])[torch.tensor(example.ids.astype(np.int64))]
        embeds = torch.nn.functional.pad(whole, (0, 0, 0, longest - len(whole)))[None]
        mask = (torch.arange(longest) < len(whole)).long()[None]
        states = model(inputs_embeds=embeds, attention_mask=mask)[0][0, : len(whole)]
        state = states[torch.tensor(example.ids < 320)].mean(0) if pooling == "mean" else states[0]
        losses.append(
            torch.nn.functional.cross_entropy((state @ head[0] + head[1])[None], torch.tensor([example.label]))
        )
    total = torch.stack(losses).mean()
    total.backward()
    np.testing.assert_allclose(float(loss), float(total), rtol=1e-5)
    ours = gradient["tokens"], gradient["head"]["kernel"], gradient["head"]["bias"]
    for own, other in zip(ours, (rows, *head), strict=True):
        np.testing.assert_allclose(np.asarray(own), other.grad.numpy(), atol=1e-5, rtol=1e-5)


def test_heads_of_classifiers_are_not_exchanged(tmp_path):
    base, _ = both(tmp_path, "bert")
    template = Template(prompt="{text}", target="{label}", verbalizers={"a": "a", "b": "b"}, head="classification")
    method = DeepPrompts(length=2, classes=2, head_bias=False)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    save_prompt(tmp_path / "ours", base, method, virtual, template)
    with pytest.raises(ConfigError, match="classifiers of encoders have other layers before the head"):
        export_peft(tmp_path / "exported", load_prompt(tmp_path / "ours", base), base)
    config = {"peft_type": "PREFIX_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 2}
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="task_type is SEQ_CLS"):
        import_peft(tmp_path / "peft", base)
