"""Weights are split as the rules say, and every mesh computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from spt_jax.errors import ConfigError
from spt_jax.runtime.sharding import (
    AXES,
    MeshConfig,
    check_divides,
    make_mesh,
    parameter_sharding,
    replicated,
    row_sharding,
    row_shards,
)
from spt_jax.testing import tiny_base
from tests.golden.cases import A4B
from tests.layouts import Run, lay_out

MESHES = {
    "llama": [{"data": 4}, {"fsdp": 4}, {"tensor": 4}, {"data": 2, "tensor": 2}, {"sequence": 4}],
    "gpt2": [{"fsdp": 2, "tensor": 2, "sequence": 2}],
    "deepseek_v3": [{"fsdp": 2, "sequence": 4}],
}


def sharded_logits(family, axes, seed=7):
    """Logits [4, 20, V] of four rows that are split over data and fsdp."""
    mesh = make_mesh(MeshConfig(**axes))
    base = tiny_base(family, seed=seed, mesh=mesh, **({} if family == "gpt2" else {"num_key_value_heads": 4}))
    generator = np.random.default_rng(0)
    runs = [Run(i, 0, generator.integers(3, 320, 20 - i).astype(np.int32)) for i in range(4)]
    ids, stream = lay_out(runs, 20)

    def forward(model, ids, stream):
        hidden, _ = model.run(model.embed(ids), stream)
        return model.logits(hidden)

    with jax.set_mesh(mesh):
        ids, stream = jax.device_put((jnp.asarray(ids), stream), row_sharding(mesh))
        out = jax.jit(forward)(base.model, ids, stream)
    return np.asarray(out)


@pytest.mark.parametrize("family", MESHES)
def test_every_mesh_gives_the_same_logits(family):
    expected = sharded_logits(family, {})
    for axes in MESHES[family]:
        np.testing.assert_allclose(sharded_logits(family, axes), expected, atol=1e-5, err_msg=str(axes))


def shard_shapes(base):
    """Path -> the shape of what one device holds."""
    leaves = jax.tree_util.tree_leaves_with_path(base.params)
    return {"/".join(key.key for key in path): leaf.addressable_shards[0].data.shape for path, leaf in leaves}


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"data": 4}, {"embedding": (320, 32), "layers/mlp/up/kernel": (3, 32, 64)}),
        (
            {"fsdp": 4},
            {
                "embedding": (80, 32),
                "output": (32, 80),
                "layers/attention/query/kernel": (3, 8, 32),
                "layers/attention/output/kernel": (3, 32, 8),
                "layers/mlp/down/kernel": (3, 64, 8),
                "layers/mlp_norm/scale": (3, 32),
            },
        ),
        (
            {"tensor": 4},
            {
                "embedding": (80, 32),
                "output": (32, 80),
                "layers/attention/key/kernel": (3, 32, 8),
                "layers/attention/key/bias": (3, 8),
                "layers/attention/output/kernel": (3, 8, 32),
                "layers/attention/output/bias": (3, 32),
                "layers/mlp/gate/kernel": (3, 32, 16),
                "layers/mlp/down/kernel": (3, 16, 32),
                "final_norm/scale": (32,),
            },
        ),
        ({"fsdp": 2, "tensor": 2}, {"embedding": (80, 32), "layers/mlp/down/kernel": (3, 32, 16)}),
    ],
    ids=["data", "fsdp", "tensor", "both"],
)
def test_a_device_holds_its_part_of_the_weights(axes, expected):
    mesh = make_mesh(MeshConfig(**axes))
    shapes = shard_shapes(tiny_base(mesh=mesh, num_key_value_heads=4, attention_bias=True))
    assert {path: shapes[path] for path in expected} == expected


def test_parts_hold_the_right_values():
    whole = tiny_base(num_key_value_heads=4)
    split = tiny_base(num_key_value_heads=4, mesh=make_mesh(MeshConfig(fsdp=2, tensor=4)))
    jax.tree.map(np.testing.assert_array_equal, whole.params, split.params)
    assert whole.fingerprint == split.fingerprint


def test_an_axis_that_does_not_divide_a_dimension_is_left_out():
    """A vocabulary of 321 is not split over four devices, or by its columns; the rest is."""
    shapes = shard_shapes(tiny_base(mesh=make_mesh(MeshConfig(tensor=4)), num_key_value_heads=4, vocab_size=321))
    assert shapes["embedding"] == (321, 32)
    assert shapes["layers/mlp/up/kernel"] == (3, 32, 16)
    assert shard_shapes(tiny_base(mesh=make_mesh(MeshConfig(fsdp=4)), vocab_size=321))["embedding"] == (321, 8)


def test_a_leaf_that_no_rule_names():
    with pytest.raises(ValueError, match="no sharding rule matches the leaf layers/mixer/kernel"):
        parameter_sharding(make_mesh(), ("layers", "mixer", "kernel"), (3, 32, 4))


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_all_axes_are_auto(axes):
    """An explicit axis would make shardings a part of types, which the models do not write."""
    mesh = make_mesh(MeshConfig(**axes))
    assert set(mesh.axis_types) == {AxisType.Auto} and mesh.axis_names == AXES
    assert tiny_base(mesh=mesh, num_key_value_heads=4).params["embedding"].sharding.mesh.axis_types == mesh.axis_types


def test_row_shards_and_shardings():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert row_shards(mesh) == 4
    rows = jax.device_put(jnp.zeros((8, 3)), row_sharding(mesh))
    assert rows.addressable_shards[0].data.shape == (2, 3)
    assert jax.device_put(jnp.zeros((8, 3)), replicated(mesh)).addressable_shards[0].data.shape == (8, 3)


def test_heads_that_the_tensor_axis_does_not_divide():
    with pytest.raises(ConfigError, match=r"mesh\.tensor=4 does not divide 2 key/value heads; 2 works"):
        tiny_base(mesh=make_mesh(MeshConfig(tensor=4)))
    with pytest.raises(ConfigError, match=r"mesh\.tensor=3 does not divide 4 heads; 2 works"):
        check_divides(make_mesh(MeshConfig(tensor=3)), {"heads": 4})


def test_an_mlp_beside_experts_is_split_too():
    with pytest.raises(ConfigError, match=r"mesh\.tensor=2 does not divide 15 MLP columns"):
        tiny_base("gemma4_text", mesh=make_mesh(MeshConfig(tensor=2)), **A4B | {"intermediate_size": 15})


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match=r"needs 16 devices; there are 8"):
        make_mesh(MeshConfig(data=4, tensor=4))


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "sequence"])
@pytest.mark.parametrize("size", [0, -2])
def test_axes_have_at_least_one_device(axis, size):
    with pytest.raises(ConfigError, match=rf"mesh\.{axis} is {size}"):
        MeshConfig(**{axis: size})


def test_an_axis_takes_the_rest_of_the_devices():
    assert dict(make_mesh(MeshConfig(tensor=2, data=-1)).shape) == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert make_mesh(MeshConfig(fsdp=-1), jax.devices()[:3]).shape["fsdp"] == 3
    with pytest.raises(ConfigError, match=r"mesh\.data and mesh\.fsdp are -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match=r"have 3 devices, which does not divide the 8 available; 2 works"):
        make_mesh(MeshConfig(data=-1, tensor=3))
