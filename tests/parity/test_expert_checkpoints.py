"""Files and sizes of families with experts: as transformers saves them, and as its models count them."""

import pytest

torch = pytest.importorskip("torch")

import jax
import transformers

from spt_jax.bases.base import load_base
from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.config import decoder_config
from spt_jax.bases.families import FAMILIES
from spt_jax.bases.families.experts import WithExperts
from spt_jax.testing import write_tiny_checkpoint

pytestmark = pytest.mark.parity

WITH_EXPERTS = [name for name, family in FAMILIES.items() if isinstance(family, WithExperts)]


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_what_transformers_saves_is_the_same_base(family, tmp_path):
    """Tensors of experts have the names of the files on the hub there, too; and config.json is transformers' own."""
    directory = write_tiny_checkpoint(tmp_path / "ours", family, seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_base(tmp_path / name, dtype="float32").fingerprint for name in ("ours", "theirs"))
    assert (theirs.config, theirs.weights) == (ours.config, ours.weights)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_parameters_of_the_default_config(family):
    """Defaults of transformers are those of a released model or near them, but for a field that it leaves open."""
    absent = {"glm4_moe": {"head_dim": 128}, "deepseek_v2": {"num_experts_per_tok": 6}}
    hf = transformers.AutoConfig.for_model(family, **absent.get(family, {}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    shapes = jax.tree.leaves(parameter_shapes(decoder_config(hf)))
    # The correction of the experts' scores is a buffer there.
    buffers = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert sum(leaf.size for leaf in shapes) == sum(p.numel() for p in model.parameters()) + buffers
