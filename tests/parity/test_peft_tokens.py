"""Prompts of PEFT read the ids of `tokenizer(text)`: imported, served and exported, for every method and tokenizer."""

import dataclasses
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.interop import export_peft, export_peft_tasks, import_peft
from spt_jax.interop.peft import default_template
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.serving.bank import PromptBank
from spt_jax.testing import write_tiny_checkpoint
from tests.parity.test_peft_family import COMMON, P, pytestmark  # noqa: F401
from tests.parity.test_peft_files import load_in_peft, logits_of

# Whether a dummy space is put before the first word and whether BOS is: as Llama 2, Llama 3, GPT-2, and neither.
TOKENIZERS = {
    "sentencepiece": {"tokenizer": "sentencepiece"},
    "byte": {"tokenizer": "byte"},
    "byte without BOS": {"tokenizer": "byte", "add_bos": False},
    "sentencepiece without BOS": {"tokenizer": "sentencepiece", "add_bos": False},
}
TASK = 1
METHODS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(**COMMON),
    "p-tuning": lambda: peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=24),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[17, 40, 41, 18, 50, 51], cpt_mask=[1] * P, cpt_tokens_type_mask=[1] * P
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(**COMMON, num_tasks=2, num_ranks=2),
    "prefix": lambda: peft.PrefixTuningConfig(**COMMON),
    "cartridge": lambda: peft.CartridgeConfig(**COMMON, num_frozen_tokens=1),
    "adapter": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=2),
}
TEXTS = ("Hello world", "the question: is it good?")


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def base(request, tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("base"), vocab_size=384, **TOKENIZERS[request.param])
    return load_base(folder, dtype="float32")


def plain_model(base):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float32)


def peft_model(base, method: str):
    """With parameters that hide nothing behind zeros."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain_model(base), METHODS[method]()).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def peft_logits(model, base, method: str) -> np.ndarray:
    """Of the token after each text, as users of PEFT tokenize it."""
    task = {"task_ids": torch.tensor([TASK])} if method == "multitask" else {}
    with torch.no_grad():
        texts = [base.tokenizer(text, return_tensors="pt") for text in TEXTS]
        return np.stack([model(**ids, **task).logits[0, -1].numpy() for ids in texts])


def our_logits(base, virtual, encoder: Encoder) -> np.ndarray:
    examples = []
    for number, text in enumerate(TEXTS):
        ids = np.append(encoder.prompt_ids({"text": text}), 0).astype(np.int32)
        examples.append(Example(ids, np.arange(len(ids)) == len(ids) - 1, (), 0, number))
    batch = pack(examples, plan_batches(examples, lead=0, batch_size=2, packing=False))
    logits = np.asarray(logits_of(base.model, virtual, batch))
    return logits[np.argsort(batch.rows.examples[:, 0]), 0]


@pytest.mark.parametrize("method", list(METHODS))
def test_text_has_the_ids_that_peft_has(method, base, tmp_path):
    model = peft_model(base, method)
    expected = peft_logits(model, base, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs")

    ours, virtual = import_peft(tmp_path / "theirs", base, task=TASK if method == "multitask" else None)
    template = Template(prompt=default_template(base, ours), target="{target}", virtual_tokens=ours.token_count)
    encoder = Encoder(template, base.tokenizer, base.config.vocab_size, base.config.max_positions)
    for text in TEXTS:
        real = [id_ for id_ in encoder.prompt_ids({"text": text}).tolist() if id_ < base.config.vocab_size]
        assert real == base.tokenizer(text)["input_ids"]
    np.testing.assert_allclose(our_logits(base, virtual, encoder), expected, atol=1e-4)

    if method != "multitask":  # whose task a directory does not name
        bank = PromptBank(base)
        bank.load("theirs", tmp_path / "theirs")
        served = bank.entry("theirs")
        np.testing.assert_allclose(our_logits(base, served.virtual, served.encoder), expected, atol=1e-4)

    saved = load_prompt(save_prompt(tmp_path / "ours", base, ours, virtual, template), base)
    if method == "multitask":
        export_peft_tasks(tmp_path / "again", [saved] * (TASK + 1), base)
    else:
        export_peft(tmp_path / "again", saved, base)
    again = load_in_peft(tmp_path / "again", plain_model(base))
    np.testing.assert_allclose(peft_logits(again, base, method), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "prompt"),
    [
        ("prompt tuning", "<bos><soft>{text}"),
        ("prompt tuning", "{text}<soft>"),
        ("prompt tuning", "<soft>{text}<bos>"),
        ("prefix", "{text}<bos>"),
        ("prefix", "A <bos>{text}"),
    ],
)
def test_what_peft_would_read_otherwise_is_not_exported(method, prompt, base, tmp_path):
    model = peft_model(base, method)
    model.save_pretrained(tmp_path / "theirs")
    ours, virtual = import_peft(tmp_path / "theirs", base)
    template = Template(prompt=prompt, target="{target}", virtual_tokens=ours.token_count)
    saved = load_prompt(save_prompt(tmp_path / "ours", base, ours, virtual, template), base)
    with pytest.raises(ConfigError, match=r"PEFT puts .* train with a prompt that begins with"):
        export_peft(tmp_path / "again", saved, base)


def test_a_chat_is_exported_where_the_prompt_comes_first(base, tmp_path):
    tokenizer = type(base.tokenizer)(
        tokenizer_object=base.tokenizer.backend_tokenizer, bos_token=None, eos_token=base.tokenizer.eos_token
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    base = dataclasses.replace(base, tokenizer=tokenizer)
    peft_model(base, "prompt tuning").save_pretrained(tmp_path / "theirs")
    ours, virtual = import_peft(tmp_path / "theirs", base)
    conversation = Template(prompt="<soft>{messages}", virtual_tokens=P)
    turn = Template(prompt="<soft>{text}", target="{target}", virtual_tokens=P, chat=True)
    first, inside = (
        load_prompt(save_prompt(tmp_path / "ours", base, ours, virtual, template), base)
        for template in (conversation, turn)
    )
    export_peft(tmp_path / "again", first, base)
    with pytest.raises(ConfigError, match="they are inside the chat template"):
        export_peft(tmp_path / "other", inside, base)
