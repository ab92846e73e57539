"""PEFT's prompts of encoder-decoders, both ways, and what it gets wrong with them."""

import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.inference.forward import target_scores
from spt_jax.interop import export_peft, import_peft
from spt_jax.prompts import PrefixTuning, VirtualPrompt
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.prompts.virtual import VirtualPrefix
from spt_jax.testing import tiny_base
from tests.encoder_decoders import rows_of, text, words
from tests.parity.test_encoder_decoder_prefix import random_prefix
from tests.parity.test_encoder_decoders import load_both, torch_model
from tests.parity.versions import peft_marks

pytestmark = peft_marks

P = 4


def loss_in_peft(model, prompt, target) -> "torch.Tensor":
    tensors = (torch.tensor(ids[None]).long() for ids in (prompt, target))
    ids, labels = tensors
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss


@jax.jit
def our_loss(model, virtual, rows):
    found = target_scores(model, virtual, None, rows).log_probabilities[:, :, 0]
    return -(found * rows.target_weights).sum() / rows.target_weights.sum()


@pytest.fixture(scope="module", params=["t5", "bart", "t5gemma"])
def trained(request, tmp_path_factory):
    """Our base, a prompt that PEFT trained a step and saved, its loss after that, and the gradient of all its rows."""
    folder = tmp_path_factory.mktemp("peft")
    base, plain = load_both(folder, request.param)
    prompt, target = words(9, 1), words(5, 2)
    # PEFT does not find these in the configs of T5Gemma's sides.
    sizes = {"num_layers": 2, "num_attention_heads": 4, "token_dim": 32} if base.family == "t5gemma" else {}
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain, config).eval()
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    loss_in_peft(model, prompt, target).backward()
    rows.data -= 0.1 * rows.grad
    with torch.no_grad():
        loss = loss_in_peft(model, prompt, target).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "theirs")
    return folder, base, (prompt, target), loss, rows.grad.numpy().copy()


def test_half_of_the_rows_of_peft_get_no_gradient(trained):
    gradient = trained[-1]
    assert gradient.shape[0] == 2 * P and np.abs(gradient[:P]).max() > 1e-3
    assert not gradient[P:].any()


def test_files_go_both_ways(trained):
    """Imported, the loss is PEFT's; exported again, PEFT's loss is the same."""
    folder, base, (prompt, target), expected, _ = trained
    method, virtual = import_peft(folder / "theirs", base)
    assert virtual.tokens.shape == (P, base.layout.width)
    virtual_ids = base.layout.vocab_size + np.arange(P, dtype=np.int32)
    rows = rows_of([text(np.concatenate([virtual_ids, prompt]), target)], packing=False)
    assert float(our_loss(base.model, virtual, rows)) == pytest.approx(expected, rel=1e-5)
    template = Template(prompt="<soft>{text}", target="{label}", virtual_tokens=P)
    saved = load_prompt(save_prompt(folder / "ours", base, method, virtual, template), base)
    export_peft(folder / "again", saved, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(torch_model(folder / "model", base.family), folder / "again").eval()
    with torch.no_grad():
        assert loss_in_peft(loaded, prompt, target).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_refused(trained, tmp_path):
    folder, base, *_ = trained
    source = folder / "theirs"
    with pytest.raises(CheckpointError, match="the prompt is for an encoder-decoder model"):
        import_peft(source, tiny_base("llama"))
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "CARTRIDGE"}))
    safetensors.numpy.save_file(
        {"prompt_embeddings": np.zeros((P, 8), np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"of the prompts of an encoder-decoder, such as .*can be imported"):
        import_peft(tmp_path, base)
    virtual = VirtualPrompt(prefix=VirtualPrefix(random_prefix(base, ("encoder",))))
    template = Template(prompt="{text}", target="{label}")
    method = PrefixTuning(length=P, sites=("encoder",))
    saved = load_prompt(save_prompt(tmp_path / "ours", base, method, virtual, template), base)
    with pytest.raises(ConfigError, match=r"only token rows and prefixes with method\.sites=self can be exported"):
        export_peft(tmp_path / "out", saved, base)
