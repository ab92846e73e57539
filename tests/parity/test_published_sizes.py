"""The numbers of parameters of released models are those of transformers' models, which are made without memory."""

import re

import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.config import hf_config
from spt_jax.bases.families import FAMILIES
from tests.bases.published import PUBLISHED
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
