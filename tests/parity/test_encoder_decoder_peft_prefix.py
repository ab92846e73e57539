"""PEFT's prefixes of encoder-decoders: which layers get which keys and values, and files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix, target_scores
from spt_jax.interop import export_peft, import_peft
from spt_jax.interop.peft_decoder_prefixes import check_family
from spt_jax.interop.peft_export import peft_note
from spt_jax.prompts import PrefixTuning, VirtualPrompt
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.prompts.virtual import VirtualPrefix
from spt_jax.testing import tiny_base
from tests.encoder_decoders import rows_of, text, words
from tests.parity.test_encoder_decoder_peft import loss_in_peft
from tests.parity.test_encoder_decoder_prefix import random_prefix
from tests.parity.test_encoder_decoders import load_both, torch_model
from tests.parity.versions import peft_marks

pytestmark = [*peft_marks, pytest.mark.filterwarnings("ignore")]

P = 4
PROMPT, TARGET = words(9, 1), words(5, 2)
TEMPLATE = Template(prompt="{text}", target="{label}")
# The tiny model has 4 heads of size 4, which is not width / heads, as PEFT supposes.
SIZES = {"token_dim": 16, "num_attention_heads": 4}


def prefix_in_peft(tmp_path, layers, encoder_layers):
    """The base, and PEFT's model of it with a random prefix."""
    base, plain = load_both(tmp_path, "t5", num_decoder_layers=layers, num_layers=encoder_layers)
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **SIZES)
    model = peft.get_peft_model(plain, config).eval()
    torch.manual_seed(0)
    model.prompt_encoder["default"].embedding.weight.data.normal_(std=0.5)
    return base, model


@jax.jit
def our_loss(model, virtual, rows):
    prefix = encode_prefix(model, virtual, jnp.zeros(0, jnp.int32))
    found = target_scores(model, virtual, prefix, rows).log_probabilities[:, :, 0]
    return -(found * rows.target_weights).sum() / rows.target_weights.sum()


def loss_here(base, virtual):
    return float(our_loss(base.model, virtual, rows_of([text(PROMPT, TARGET)], packing=False)))


def loss_there(model):
    with torch.no_grad():
        return loss_in_peft(model, PROMPT, TARGET).item()


@pytest.mark.parametrize(("layers", "encoder_layers"), [(2, 2), (3, 3), (2, 3)])
def test_files_go_both_ways(layers, encoder_layers, tmp_path):
    """Imported, the loss is PEFT's; exported again, it is the same in PEFT."""
    base, model = prefix_in_peft(tmp_path, layers, encoder_layers)
    expected = loss_there(model)
    model.save_pretrained(tmp_path / "theirs")
    method, virtual = import_peft(tmp_path / "theirs", base)
    assert method.sites == ("self",) and virtual.prefix.memory["self"].keys.shape == (layers, P, 4, 4)
    assert loss_here(base, virtual) == pytest.approx(expected, rel=1e-5)
    saved = load_prompt(save_prompt(tmp_path / "ours", base, method, virtual, TEMPLATE), base)
    if (layers, encoder_layers) == (2, 3):  # of 3 stored layers, PEFT uses the first and the last
        with pytest.raises(ConfigError, match="layers 1 apart of a decoder with 2 layers the same keys and values"):
            export_peft(tmp_path / "again", saved, base)
        return
    export_peft(tmp_path / "again", saved, base)
    again = peft.PeftModel.from_pretrained(torch_model(tmp_path / "model", "t5"), tmp_path / "again").eval()
    assert loss_there(again) == pytest.approx(expected, rel=1e-5)


def test_peft_uses_half_of_the_layers_of_a_prefix(tmp_path):
    """With an even number of layers, half of the parameters get no gradient; none act on encoder or cross-attention."""
    _, model = prefix_in_peft(tmp_path, 2, 2)
    loss_in_peft(model, PROMPT, TARGET).backward()
    gradient = model.prompt_encoder["default"].embedding.weight.grad.reshape(P, 2, -1)
    assert gradient[:, 0].abs().max() > 1e-4 and not gradient[:, 1].any()
    cache = model.get_prompt(1)
    np.testing.assert_array_equal(*(cache.self_attention_cache.layers[n].keys.detach().numpy() for n in range(2)))
    assert len(cache.cross_attention_cache) == 0


def test_what_is_refused_says_why(tmp_path):
    base, model = prefix_in_peft(tmp_path, 2, 2)
    virtual = VirtualPrompt(prefix=VirtualPrefix(random_prefix(base, ("self",))))
    method = PrefixTuning(length=P, sites=("self",))
    saved = load_prompt(save_prompt(tmp_path / "ours", base, method, virtual, TEMPLATE), base)
    with pytest.raises(ConfigError, match="layers 1 apart of a decoder with 2 layers the same keys and values"):
        export_peft(tmp_path / "out", saved, base)
    assert "cannot be exported to PEFT: PEFT gives layers 1 apart" in peft_note(base, method, TEMPLATE)
    with pytest.raises(ConfigError, match="may give its tokens other positions"):
        check_family(tiny_base("bart"))
    model.peft_config["default"].num_transformer_submodules = 1
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="num_transformer_submodules is 1; a prefix of an encoder-decoder has 2"):
        import_peft(tmp_path / "theirs", base)
