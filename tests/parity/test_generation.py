"""Greedy ids equal those of transformers' own `generate` on the same checkpoint, with and without a soft prompt."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import VirtualPrompt
from spt_jax.testing import EOS_ID, write_tiny_checkpoint

pytestmark = pytest.mark.parity

NEW, VIRTUAL, VOCAB = 20, 4, 320


def torch_model(directory):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_ids(model, **inputs) -> list[int]:
    """New ids of one prompt, EOS included; for `inputs_embeds`, transformers returns the new ids alone."""
    with torch.no_grad():
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=EOS_ID, use_cache=True
        )
    return out[0, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt"])
def test_greedy_ids(family, tmp_path):
    """Four prompts in one batch: text alone, then with virtual tokens in front and, in two of them, amid the text."""
    directory = write_tiny_checkpoint(tmp_path, family, seed=7)
    base, model = load_base(directory, dtype="float32"), torch_model(directory)
    random = np.random.default_rng(0)
    tokens = random.normal(size=(VIRTUAL, base.config.width)).astype(np.float32)
    texts = [random.integers(3, VOCAB, length) for length in (1, 5, 11, 17)]
    sampling = SamplingConfig(max_new_tokens=NEW)
    front = np.asarray([1, VOCAB, VOCAB + 1])
    tuned = [
        np.concatenate([front, text, [VOCAB + 2 + i % 2, 9][: 2 * (i > 1)]]).astype(int) for i, text in enumerate(texts)
    ]

    plain = generate(base, [np.append(1, text) for text in texts], sampling=sampling)
    soft = generate(base, tuned, VirtualPrompt(jnp.asarray(tokens)), sampling)

    table = torch.cat([model.get_input_embeddings().weight.detach(), torch.tensor(tokens)])
    for text, ids, without, with_prompt in zip(texts, tuned, plain, soft, strict=True):
        inputs = torch.tensor(np.append(1, text)[None])
        assert without.ids == torch_ids(model, input_ids=inputs, attention_mask=torch.ones_like(inputs))
        embedded = table[torch.tensor(ids)][None]
        expected = torch_ids(
            model, inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long)
        )
        assert with_prompt.ids == expected
    assert len({tuple(answer.ids) for answer in plain + soft}) == 8
