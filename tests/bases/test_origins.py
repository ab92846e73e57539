"""Parameters that are parts of stored tensors, joined from several, or stacked by layer and expert, against numpy."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from spt_jax.bases import checkpoint
from spt_jax.bases.checkpoint_writing import write_checkpoint
from spt_jax.bases.config import decoder_config
from spt_jax.bases.families import FAMILIES, Origin, Part
from spt_jax.bases.families.llama import Llama
from spt_jax.bases.places import places, stored_shape
from spt_jax.errors import CheckpointError
from spt_jax.testing import random_params, tiny_config

WIDTH, HEADS, SIZE, MLP, LAYERS, EXPERTS = 6, 3, 4, 5, 3, 2
LAYER = "model.layers.{i}."
# Queries, keys and values interleaved by head; gate and up in one tensor; down in two; layers of two kinds.
SHAPES = {
    "layers/query/kernel": (LAYERS, WIDTH, HEADS * SIZE),
    "layers/key/kernel": (LAYERS, WIDTH, HEADS * SIZE),
    "layers/value/kernel": (LAYERS, WIDTH, HEADS * SIZE),
    "dense/gate/kernel": (1, WIDTH, MLP),
    "dense/up/kernel": (1, WIDTH, MLP),
    "layers/down/kernel": (LAYERS, MLP, WIDTH),
    "experts/up/kernel": (2, EXPERTS, WIDTH, MLP),
    "embedding": (7, WIDTH),
}
VIEW = (HEADS, 3, SIZE, WIDTH)
ORIGINS = {
    **{
        f"layers/{name}/kernel": Origin(
            LAYER + "qkv.weight",
            transpose=True,
            view=VIEW,
            take=Part(1, at, at + 1),
            shape=(HEADS * 3 * SIZE, WIDTH),
        )
        for at, name in enumerate(("query", "key", "value"))
    },
    "dense/gate/kernel": Origin(LAYER + "gate_up.weight", transpose=True, take=Part(0, 0, MLP), layers=(1,)),
    "dense/up/kernel": Origin(LAYER + "gate_up.weight", transpose=True, take=Part(0, MLP, 2 * MLP), layers=(1,)),
    "layers/down/kernel": (
        Origin(LAYER + "down_a.weight", into=Part(0, 0, 2)),
        Origin(LAYER + "down_b.weight", into=Part(0, 2, MLP)),
    ),
    "experts/up/kernel": Origin(LAYER + "experts.{e}.up.weight", transpose=True, layers=(0, 2), experts=EXPERTS),
    "embedding": Origin("model.embed.weight"),
}


class Fused(Llama):
    def origins(self, config):
        return ORIGINS


@pytest.fixture
def config(monkeypatch):
    config = dataclasses.replace(decoder_config(tiny_config("llama")), layers=LAYERS, tied=True)
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    monkeypatch.setitem(FAMILIES, "llama", Fused())
    monkeypatch.setattr(checkpoint, "parameter_shapes", lambda _: traverse_util.unflatten_dict(shapes, sep="/"))
    return config


@pytest.fixture
def stored(tmp_path):
    """A checkpoint as another library would write it."""
    draw = np.random.default_rng(0).standard_normal
    tensors = {"model.embed.weight": draw(SHAPES["embedding"])}
    for i in range(LAYERS):
        layer = LAYER.format(i=i)
        tensors |= {layer + "qkv.weight": draw((HEADS * 3 * SIZE, WIDTH))}
        tensors |= {layer + "down_a.weight": draw((2, WIDTH)), layer + "down_b.weight": draw((MLP - 2, WIDTH))}
        if i == 1:
            tensors[layer + "gate_up.weight"] = draw((2 * MLP, WIDTH))
        else:
            tensors |= {f"{layer}experts.{e}.up.weight": draw((MLP, WIDTH)) for e in range(EXPERTS)}
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def read(directory, config):
    params, _ = checkpoint.read_params(
        directory, config, np.float32, lambda path: SingleDeviceSharding(jax.devices()[0])
    )
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def test_every_parameter_has_its_part(config, stored, tmp_path):
    params = read(tmp_path, config)
    for i in range(LAYERS):
        layer = LAYER.format(i=i)
        by_head = stored[layer + "qkv.weight"].reshape(HEADS, 3, SIZE, WIDTH)
        for at, name in enumerate(("query", "key", "value")):
            expected = np.concatenate([by_head[head, at] for head in range(HEADS)]).T
            np.testing.assert_array_equal(params[f"layers/{name}/kernel"][i], expected)
        joined = np.concatenate([stored[layer + "down_a.weight"], stored[layer + "down_b.weight"]])
        np.testing.assert_array_equal(params["layers/down/kernel"][i], joined)
    gate, up = np.split(stored["model.layers.1.gate_up.weight"], 2)
    np.testing.assert_array_equal(params["dense/gate/kernel"][0], gate.T)
    np.testing.assert_array_equal(params["dense/up/kernel"][0], up.T)
    for at, i in enumerate((0, 2)):
        for e in range(EXPERTS):
            expected = stored[f"model.layers.{i}.experts.{e}.up.weight"].T
            np.testing.assert_array_equal(params["experts/up/kernel"][at, e], expected)


def test_what_is_written_is_read(config, tmp_path):
    draw = np.random.default_rng(1).standard_normal
    leaves = {path: draw(shape).astype(np.float32) for path, shape in SHAPES.items()}
    write_checkpoint(tmp_path, config, traverse_util.unflatten_dict(leaves, sep="/"), np.float32)
    found = read(tmp_path, config)
    assert found.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found[path], leaf)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.qkv.weight"].shape == (HEADS * 3 * SIZE, WIDTH)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.2.qkv.weight", (WIDTH, HEADS * 3 * SIZE)),
        ("model.layers.1.gate_up.weight", (2 * MLP + 1, WIDTH)),
        ("model.layers.0.down_b.weight", (MLP - 1, WIDTH)),
        ("model.layers.0.experts.1.up.weight", (WIDTH, MLP)),
    ],
)
def test_a_tensor_of_another_shape_is_named(config, stored, tmp_path, name, shape):
    stored[name] = np.zeros(shape, np.float32)
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}.* has shape"):
        read(tmp_path, config)


# Leading rows of stored tensors that no parameter has.
UNUSED_ROWS = {
    "model.decoder.embed_positions.weight": 2,
    "roberta.embeddings.position_embeddings.weight": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_origins_cover_every_tensor_and_parameter(family):
    """Each element of a stored tensor fills one element of one parameter, and none is left over."""
    config = decoder_config(tiny_config(family))
    leaves = traverse_util.flatten_dict(random_params(config))
    counts = {path: np.zeros(leaf.shape, int) for path, leaf in leaves.items()}
    for key, fills in places(config).items():
        taken = np.zeros(stored_shape(fills, leaves), int)
        for place in fills:
            place.origin.taken(taken)[...] += 1
            place.stored(counts[place.path])[...] += 1
        unused = UNUSED_ROWS.get(key, 0)
        shared = family == "albert" and ".albert_layers." in key
        assert (taken[unused:] == (config.layers if shared else 1)).all()
        assert not taken[:unused].any()
    for path, count in counts.items():
        assert (count == 1).all(), path
