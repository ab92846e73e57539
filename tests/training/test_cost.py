"""The formula for a step's operations, against those of the compiled program."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.program import count
from spt_jax.data.batches import Batch, Rows
from spt_jax.models.attention import Stream
from spt_jax.models.config import decoder_config
from spt_jax.models.decoder import Decoder
from spt_jax.models.hf import parameter_shapes
from spt_jax.prompts import PrefixTuning, PromptTuning
from spt_jax.sharding import MeshConfig, make_mesh, parameter_sharding, replicated, row_sharding
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
    rows_ = Rows(tokens, stream, *[of_outputs] * 3, weights, of_outputs, examples, array(4, jnp.float32), examples)
    return Batch(jax.ShapeDtypeStruct((lead,), jnp.int32), rows_)


def compiled(config, method, params, batch, frozen=None, mesh=None, **options):
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    step = jax.jit(train_step, static_argnums=(0, 1, 2, 3), compiler_options=QUICK_COMPILE)
    module = Decoder(config, remat="none", mesh=mesh)
    frozen = parameter_shapes(config) if frozen is None else frozen
    return step.lower(module, method, Objective(**options), optimizer, frozen, state, batch).compile()


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


def on_mesh(**axes: int):
    """A step on a mesh: what one device does, the bytes of weights that it holds, and the expected operations."""
    mesh = make_mesh(MeshConfig(**axes))
    config = decoder_config(tiny_config("llama", **SIZES, num_attention_heads=4, num_key_value_heads=4))

    def place(sharding_of):
        return lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(path, leaf))

    def of_weight(path, leaf):
        return parameter_sharding(mesh, [key.key for key in path], leaf.shape)

    frozen = jax.tree_util.tree_map_with_path(place(of_weight), parameter_shapes(config))
    batch = batch_of(16, 48, 5, lead=20)
    rows = jax.tree_util.tree_map_with_path(place(lambda *_: row_sharding(mesh)), batch.rows)
    batch = Batch(jax.ShapeDtypeStruct((20,), jnp.int32, sharding=replicated(mesh)), rows)
    params = {"tokens": jax.ShapeDtypeStruct((20, config.width), jnp.float32, sharding=replicated(mesh))}
    program = compiled(config, PromptTuning(length=20), params, batch, frozen=frozen, mesh=mesh)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(frozen))
    everything = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    return count(program.as_text()), held / everything, step_flops(config, step_shape(batch)), frozen


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 4}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_each_device_does_its_part(axes):
    """Rows are split; leading tokens are not, except by heads and columns; weights lie on one device each."""
    work, held, flops, frozen = on_mesh(**axes)
    rows = axes.get("data", 1) * axes.get("fsdp", 1)
    tensor = axes.get("tensor", 1)
    assert work.flops == pytest.approx(((flops.total - flops.lead) / rows + flops.lead) / tensor, rel=0.1)
    assert held == pytest.approx(1 / (axes.get("fsdp", 1) * tensor), rel=0.1)
    kernels = [leaf for leaf in jax.tree.leaves(frozen["layers"]) if leaf.ndim == 3]
    stacked = min(leaf.size * leaf.dtype.itemsize for leaf in kernels)
    gathers = [one for one in work.collectives if one.kind == "all-gather"]
    assert all(one.loops for one in gathers if one.result_bytes >= stacked)
