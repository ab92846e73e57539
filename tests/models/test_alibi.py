"""The ALiBi bias, in float32 and rounded as Falcon's is."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from spt_jax.bases.config import decoder_config
from spt_jax.models.attention import alibi_slopes
from spt_jax.models.block import Attention
from spt_jax.testing import tiny_config

FALCON = {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}
POSITIONS = np.asarray([[0, 1, 2, 129, 255], [256, 257, 1001, 2047, 4095]], np.int32)


def bias_of(config) -> np.ndarray:
    return np.asarray(jax.jit(Attention(config, None, "xla").bias)(jnp.asarray(POSITIONS)))[:, :, 0]


@pytest.mark.parametrize(("heads", "slopes"), [(4, [2**-2, 2**-4, 2**-6, 2**-8]), (3, [2**-4, 2**-8, 2**-2])])
def test_slopes_of_the_paper(heads, slopes):
    np.testing.assert_array_equal(alibi_slopes(heads), slopes)


def test_bloom_adds_slopes_times_positions():
    config = decoder_config(tiny_config("bloom", hidden_size=32, n_head=16))
    expected = alibi_slopes(16)[None, :, None] * POSITIONS[:, None].astype(np.float32)
    np.testing.assert_allclose(bias_of(config), expected, rtol=1e-6)


def test_falcon_rounds_to_bfloat16_and_scales_with_the_scores():
    config = decoder_config(tiny_config("falcon", num_attention_heads=16, num_kv_heads=16, **FALCON))
    slopes, positions = (x.astype(ml_dtypes.bfloat16) for x in (alibi_slopes(16), POSITIONS))
    rounded = (slopes[None, :, None] * positions[:, None]).astype(np.float32)
    exact = alibi_slopes(16)[None, :, None] * POSITIONS[:, None]
    assert 1e-3 < np.abs(rounded / np.maximum(exact, 1) - exact / np.maximum(exact, 1)).max() < 2**-6
    np.testing.assert_allclose(bias_of(config), rounded * 2**-0.5, rtol=1e-6)
