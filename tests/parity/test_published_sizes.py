"""The numbers of parameters of released models are those of transformers' models, which are made without memory."""

import re

import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.config import hf_config
from spt_jax.bases.families import ENCODER_DECODERS, FAMILIES
from tests.bases.published import PUBLISHED
from tests.bases.published_encoder_decoders import PUBLISHED as BOTH_SIDES
from tests.parity.test_decoders import OTHER_PARTS

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    import transformers

    one = PUBLISHED[name]
    architecture = getattr(transformers, FAMILIES[one.family].architecture)
    config = hf_config(one.config_json())
    with torch.device("meta"):
        model = architecture(config)
    model.tie_weights()
    stored = model.state_dict()
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name in stored]
    counted = [*model.named_parameters(), *buffers]
    assert sum(tensor.numel() for name, tensor in counted if not re.search(OTHER_PARTS, name)) == one.parameters


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_parameters_of_encoder_decoders(name):
    import transformers

    family, fields, parameters, _ = BOTH_SIDES[name]
    with torch.device("meta"):
        model = getattr(transformers, ENCODER_DECODERS[family].architecture)(
            hf_config({"model_type": family, **fields})
        )
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} if family != "t5gemma" else set()
    copies |= {"decoder.embed_tokens.eoi_embedding"}
    if fields.get("tie_word_embeddings") is not False:
        copies |= {"lm_head.weight", "lm_head.out_proj.weight"}
    stored = model.state_dict().items()
    stored = [(name, tensor) for name, tensor in stored if not re.search(OTHER_PARTS, name)]
    assert sum(tensor.numel() for name, tensor in stored if name.removeprefix("model.") not in copies) == parameters
