"""GGUF files as transformers itself reads them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

from gguf import GGMLQuantizationType

from spt_jax.bases.base import load_base
from tests.bases.gguf_files import write_gguf
from tests.layouts import row_logits

pytestmark = pytest.mark.parity


# transformers does not read Gemma 1 and, of the others, not what has these values by default.
DEFAULTS = {
    "gemma2": {
        "head_dim": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_logits_and_tokens_are_those_of_transformers(architecture, tmp_path):
    import transformers

    _, file = write_gguf(tmp_path, architecture, GGMLQuantizationType.Q8_0, **DEFAULTS[architecture])
    base = load_base(file, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in ("hello w", "Ünï 漢字", "</s>a  b\n"):
        assert base.tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    ids = np.arange(3, 43)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(row_logits(base, ids), theirs, atol=1e-4, rtol=0)
