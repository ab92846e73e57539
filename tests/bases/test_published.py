"""Decoders of the sizes of released models: how many parameters they have, and how a mesh splits them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from spt_jax.bases.families import FAMILIES
from spt_jax.runtime.sharding import AXES, sharded_shapes
from tests.bases.published import PUBLISHED, shapes_of

MESH = AbstractMesh((4, 1, 2, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
LARGE = 1 << 20
# The axis that "tensor" splits: outputs of the maps into heads and hidden units, inputs of the maps out of them.
COLUMNS = (
    r"(^output|(attention|delta_net|mamba)/(query|key|value|gate|beta|decay|step|key_up|value_up)/kernel"
    r"|(mlp|shared)/(up|gate)/kernel|per_layer/(gate|projection)/kernel|tap_\d/kernel)$"
)
ROWS = (
    r"(^embedding|(attention|delta_net|mamba)/output/kernel"
    r"|(mlp|shared)/down/kernel|per_layer/(embedding|down/kernel))$"
)
EXPERTS = r"experts/(up|gate|down)/(kernel|bias)$"
# Large leaves that every device along "tensor" holds whole, and the most that they are of all parameters.
WHOLE = {
    r"^positions$": 0.015,  # Each device adds the rows of its own tokens.
    r"attention/(latent|query_latent|rotated_key)/kernel$": 0.003,  # All heads read the same latents.
    r"^head_map/kernel$": 0.01,  # A norm over all columns follows.
    r"router/kernel$": 0.001,  # Every device needs the scores of all experts, to choose the best.
}


def test_every_family_has_a_released_model():
    assert {one.family for one in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_released_models(name):
    one = PUBLISHED[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(name))) == one.parameters - one.unread


@pytest.mark.parametrize("name", [name for name, one in PUBLISHED.items() if one.active is not None])
def test_parameters_that_a_token_is_multiplied_with(name):
    one = PUBLISHED[name]
    config = one.config()
    outputs = config.vocab_size * config.width
    billions = [(config.matmul_parameters + matrices * outputs) / 1e9 for matrices in (1, 2)]
    # Some cards count the embedding, and some do not.
    assert any(abs(count - (one.active or 0)) < 0.06 for count in billions)


def split_axis(path: str, ndim: int) -> int | None:
    """Returns the axis of a large leaf that is split, by its place in the layer; None for those in WHOLE."""
    if any(re.search(pattern, path) for pattern in WHOLE):
        return None
    if re.search(EXPERTS, path):
        return 1
    assert bool(re.search(COLUMNS, path)) != bool(re.search(ROWS, path)), f"is {path} split by rows or columns?"
    return ndim - 1 if re.search(COLUMNS, path) else ndim - 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_leaves_are_split_over_tensor(name):
    """An odd vocabulary is not split, because the logits would be sums over all devices of "tensor"."""
    leaves = jax.tree_util.tree_leaves_with_path(sharded_shapes(MESH, shapes_of(name), jnp.bfloat16))
    for keys, leaf in leaves:
        path = "/".join(key.key for key in keys)
        if leaf.size < LARGE:
            continue
        axis, shard = split_axis(path, leaf.ndim), list(leaf.shape)
        if axis is not None and leaf.shape[axis] % 2 == 0:
            shard[axis] //= 2
        elif axis is not None:
            assert path in ("embedding", "output")
        assert leaf.sharding.shard_shape(leaf.shape) == tuple(shard), path


@pytest.mark.parametrize("name", PUBLISHED)
def test_leaves_that_are_not_split_are_small(name):
    shapes = jax.tree_util.tree_leaves_with_path(shapes_of(name))
    for pattern, most in WHOLE.items():
        own = [leaf.size for keys, leaf in shapes if re.search(pattern, "/".join(key.key for key in keys))]
        assert sum(own) <= most * PUBLISHED[name].parameters, pattern
