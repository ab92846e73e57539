"""Virtual tokens of Gemma 4 E2B are what the vectors of an image are to transformers, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.inference.forward import encode_prefix, run_stream
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.testing import write_tiny_checkpoint
from tests.golden.cases import CASES, token_ids
from tests.layouts import Run, lay_out
from tests.parity.test_decoders import torch_model

pytestmark = pytest.mark.parity
(CASE,) = (case for case in CASES if case.name == "gemma4 E2B")
IMAGE, PROMPT = 319, 5


@pytest.mark.parametrize("shared", [True, False])
def test_a_prompt_is_an_image(shared, tmp_path):
    """Five trained rows before and between the tokens of an example; those before it as a shared context, or inline."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    directory = write_tiny_checkpoint(tmp_path, CASE.family, seed=CASE.seed, **CASE.overrides, image_token_id=IMAGE)
    base, model = load_base(directory, dtype="float32"), torch_model(directory)
    text = token_ids(CASE)[:30]
    text = np.where(text == IMAGE, 7, text)
    rows = np.random.default_rng(0).normal(size=(PROMPT, 32)).astype(np.float32)
    virtual = 320 + np.arange(PROMPT, dtype=np.int32)
    ids = np.concatenate([virtual[:3], text[:12], virtual[3:], text[12:]])
    lead = 3 if shared else 0

    def loss(tokens):
        prompt = VirtualPrompt(tokens=tokens)
        prefix = encode_prefix(base.model, prompt, jnp.asarray(ids[:lead]))
        place, stream = lay_out([Run(0, 0, ids[lead:], ids[:lead])], len(ids) - lead)
        hidden, _ = run_stream(base.model, prompt, jnp.asarray(place), stream, prefix)
        logits = base.model.logits(hidden)[0, 3 - lead :]
        scores = jax.nn.log_softmax(logits[:11])
        return -jnp.take_along_axis(scores, jnp.asarray(text[1:12])[:, None], axis=1).sum(), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(rows))

    theirs = torch.tensor(rows, requires_grad=True)
    given = torch.tensor(np.where(ids >= 320, IMAGE, ids)[None].astype(np.int64))
    image = BaseModelOutputWithPooling(pooler_output=(theirs,))
    found = model(input_ids=given, mm_encoder_outputs={"image": image}, use_cache=False).logits[0, 3:]
    np.testing.assert_allclose(logits, found.detach().numpy(), atol=1e-4, rtol=0)
    targets = torch.tensor(text[1:12].astype(np.int64))[:, None]
    expected = -found[:11].log_softmax(-1).gather(-1, targets).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    scale = theirs.grad.abs().max().item()
    assert scale > 1e-2
    np.testing.assert_allclose(np.asarray(gradient) / scale, theirs.grad.numpy() / scale, atol=1e-5)
