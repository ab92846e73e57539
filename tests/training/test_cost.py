"""The formula for a step's operations, against those of the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.program import count
from spt_jax.data.batches import Batch, Rows
from spt_jax.models.attention import Stream
from spt_jax.models.config import decoder_config
from spt_jax.models.decoder import Decoder
from spt_jax.models.hf import parameter_shapes
from spt_jax.prompts import PrefixTuning, PromptTuning
from spt_jax.testing import tiny_config
from spt_jax.training.cost import step_flops, step_shape
from spt_jax.training.step import Objective, TrainState, train_step
from tests.examples import QUICK_COMPILE

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 1000}


def batch_of(rows: int, length: int, outputs: int, lead: int) -> Batch:
    """The shapes of a batch."""

    def array(width: int, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, width), dtype)

    tokens, of_outputs, examples = array(length), array(outputs), array(4)
    stream = Stream(tokens, tokens, tokens)
    weights = array(outputs, jnp.float32)
    rows_ = Rows(
        tokens, stream, *[of_outputs] * 3, weights, of_outputs, examples, array(4, jnp.float32), examples
    )
    return Batch(jax.ShapeDtypeStruct((lead,), jnp.int32), rows_)


def compiled(config, method, params, batch, **options):
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    step = jax.jit(train_step, static_argnums=(0, 1, 2, 3), compiler_options=QUICK_COMPILE)
    module = Decoder(config, remat="none")
    return step.lower(module, method, Objective(**options), optimizer, parameter_shapes(config), state, batch).compile()


@pytest.mark.parametrize(("length", "microbatches"), [(20, 1), (100, 4), (200, 16), (200, 1), (20, 16)])
def test_a_steps_operations(length, microbatches):
    """Two layers, so that the last one's branch runs in half of them, as the count has it."""
    config = decoder_config(tiny_config("llama", **SIZES))
    method = PromptTuning(length=length)
    batch = batch_of(16, 48, 5, lead=length)
    params = {"tokens": jax.ShapeDtypeStruct((length, config.width), jnp.float32)}
    work = count(compiled(config, method, params, batch, microbatches=microbatches).as_text())
    expected = step_flops(config, step_shape(batch))
    assert work.flops == pytest.approx(expected.total, rel=1e-3)


def test_a_prefix_is_seen_but_not_computed():
    config = decoder_config(tiny_config("llama", **SIZES))
    method = PrefixTuning(length=30)
    shape = (2, config.layers, 30, config.kv_heads, config.head_size)
    params = {"free": jax.ShapeDtypeStruct(shape, jnp.float32), "scale": jax.ShapeDtypeStruct((), jnp.float32)}
    batch = batch_of(8, 48, 5, lead=10)
    work = count(compiled(config, method, params, batch).as_text())
    expected = step_flops(config, step_shape(batch, prefix=30))
    assert work.flops == pytest.approx(expected.total, rel=1e-3)
