"""Mixture-of-experts MLP: all ways to compute it agree with a loop over tokens, on one device and on meshes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from spt_jax.errors import ConfigError
from spt_jax.models.expert_dispatch import choose_dispatch
from spt_jax.models.experts import Experts, route
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.quantized import Int8
from spt_jax.runtime.sharding import MeshConfig, make_mesh, parameter_sharding, row_sharding, row_shards

D, F, E = 16, 12, 8
PLAIN = ExpertsConfig(experts=E, top_k=2, expert_width=F)
FULL = ExpertsConfig(
    experts=E,
    top_k=3,
    expert_width=F,
    shared_width=20,
    shared_gate=True,
    scoring="sigmoid",
    renormalize=True,
    router_bias=True,
    correction=True,
    groups=4,
    top_groups=2,
    group_score="top2_sum",
    scale=1.5,
    bias=True,
    gate="clamped_swiglu",
    gate_limit=1.0,
)
DISPATCHES = ["dense", "blocks", "ragged"]


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def params_of(config, width=D):
    shapes = jax.eval_shape(Experts(config).init, jax.random.key(0), jnp.zeros((1, 1, width)))["params"]
    generator = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():  # so that the arrays may be kept if this is called under jit
        return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape, scale=0.4), jnp.float32), shapes)


def run(config, x, dispatch=None, mesh=None, params=None):
    params = params_of(config) if params is None else params
    return jax.jit(Experts(config, mesh, dispatch).apply)({"params": params}, x)


def gradient(config, x, dispatch=None, mesh=None, params=None):
    """The gradient of a random function of the output."""
    layer = Experts(config, mesh, dispatch)
    params = params_of(config) if params is None else params

    def loss(x, params):
        return jnp.sum(layer.apply({"params": params}, x) * noise(*x.shape, seed=9))

    return jax.jit(jax.grad(loss))(x, params)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_by_one(config, x):
    """A loop over tokens and their experts, in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params_of(config))
    tokens = np.asarray(x, np.float64).reshape(-1, D)
    router, experts = params["router"], params["experts"]
    correction = jnp.asarray(params["correction"], jnp.float32) if config.correction else None
    result = []
    for token in tokens:
        logits = token @ router["kernel"] + router.get("bias", 0)
        weights, ids = route(config, jnp.asarray(logits, jnp.float32)[None], correction)
        out = np.zeros(D)
        for weight, e in zip(np.asarray(weights[0], np.float64), np.asarray(ids[0]), strict=True):
            linear = {
                name: (lambda v, own=own, e=e: v @ own["kernel"][e] + (own["bias"][e] if config.bias else 0))
                for name, own in experts.items()
            }
            gate, up = linear["gate"](token), linear["up"](token)
            if config.gate == "swiglu":
                hidden = gate * sigmoid(gate) * up
            else:
                gate, up = np.minimum(gate, config.gate_limit), np.clip(up, -config.gate_limit, config.gate_limit)
                hidden = gate * sigmoid(config.gate_slope * gate) * (up + 1)
            out += weight * linear["down"](hidden)
        if config.shared_width:
            gate, up, down = (params["shared"][name]["kernel"] for name in ("gate", "up", "down"))
            shared = (token @ gate * sigmoid(token @ gate) * (token @ up)) @ down
            out += sigmoid(token @ params["shared_gate"]["kernel"]) * shared
        result.append(out)
    return np.stack(result).reshape(x.shape)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_outputs_equal_a_loop_over_tokens(config, dispatch):
    x = noise(3, 7, D)
    expected = one_by_one(config, x)
    assert expected.std() > 0.3
    np.testing.assert_allclose(run(config, x, dispatch), expected, atol=1e-5)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_gradient_equals_finite_differences(dispatch):
    """Along random directions; through the weights of the router, too, whose stopped gradient would differ."""
    x = noise(2, 5, D)
    found = np.asarray(gradient(FULL, x, dispatch), np.float64)
    weights = np.asarray(noise(*x.shape, seed=9), np.float64)
    for seed in range(3):
        direction = np.asarray(noise(*x.shape, seed=20 + seed), np.float64)
        ahead, back = (np.sum(one_by_one(FULL, np.asarray(x) + h * direction) * weights) for h in (1e-4, -1e-4))
        assert np.sum(found * direction) == pytest.approx((ahead - back) / 2e-4, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_all_ways_give_the_same(config, tokens):
    """Also where most experts have no token, or one has several blocks."""
    x = noise(1, tokens, D)
    outputs = {dispatch: (run(config, x, dispatch), gradient(config, x, dispatch)) for dispatch in DISPATCHES}
    for found in outputs.values():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, outputs["dense"])


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_no_token_is_dropped(dispatch):
    """All tokens choose the same two experts."""
    bias = jnp.zeros(E).at[jnp.asarray([2, 5])].set(50.0)
    config = dataclasses.replace(PLAIN, router_bias=True)
    params = {**params_of(PLAIN), "router": {**params_of(PLAIN)["router"], "bias": bias}}
    x = noise(2, 200, D)
    alone = jnp.concatenate([run(config, x[:, i : i + 1], dispatch, params=params) for i in (0, 99, 199)], axis=1)
    together = run(config, x, dispatch, params=params)
    assert np.abs(together).min(axis=-1).max() > 0 and np.all(np.abs(together).max(axis=-1) > 0)
    np.testing.assert_allclose(together[:, jnp.asarray([0, 99, 199])], alone, atol=1e-5)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dispatch, dtype):
    """Activations of the dtype, and routing in float32: the experts are those of the rounded input."""
    x = noise(2, 20, D).astype(dtype)
    params = jax.tree.map(lambda a: a.astype(dtype), params_of(FULL))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    found, expected = run(FULL, x, dispatch, params=params), run(FULL, x.astype(jnp.float32), dispatch, params=exact)
    assert found.dtype == dtype and gradient(FULL, x, dispatch, params=params).dtype == dtype
    error = np.abs(np.asarray(found, np.float32) - expected).max()
    assert error < 0.02 * np.abs(expected).max()


def test_blocks_ignore_what_overflows():
    """A padded or foreign row that overflows leaves outputs and gradients of the others finite."""
    x = noise(1, 9, D).at[0, 4].set(6e4).astype(jnp.float16)
    params = jax.tree.map(lambda a: a.astype(jnp.float16), params_of(PLAIN))
    kept = jnp.asarray([i for i in range(9) if i != 4])
    found = run(PLAIN, x, "blocks", params=params)
    assert not np.isfinite(found[0, 4]).all()
    np.testing.assert_allclose(found[:, kept], run(PLAIN, x[:, kept], "blocks", params=params), atol=2e-2)


# How the experts are split: by expert, by their width of 12, or not at all.
MESHES = [
    ({"tensor": 8}, 8),
    ({"fsdp": 4, "tensor": 2}, 8),
    ({"data": 2, "sequence": 2, "tensor": 2}, 8),
    ({"fsdp": 2, "tensor": 4}, 6),
    ({"data": 2, "tensor": 3}, 8),
    ({"tensor": 8}, 5),
    ({"data": 8}, 8),
]


def placed(mesh, params):
    """The parameters of one layer, split as those of a stack are."""

    def place(path, leaf):
        names = ["layers", "mlp", *(key.key for key in path)]
        spec = parameter_sharding(mesh, names, (1, *leaf.shape)).spec
        return jax.device_put(leaf, NamedSharding(mesh, type(spec)(*spec[1:])))

    return jax.tree_util.tree_map_with_path(place, params)


@pytest.mark.parametrize(("axes", "experts"), MESHES, ids=str)
def test_every_mesh_gives_the_same(axes, experts):
    config = dataclasses.replace(FULL, experts=experts, groups=1, top_groups=1)
    mesh = make_mesh(MeshConfig(**axes))
    x = noise(4, 6, D)
    expected = run(config, x, "blocks"), gradient(config, x, "blocks")
    with jax.set_mesh(mesh):
        params = placed(mesh, params_of(config))
        rows = jax.device_put(x, row_sharding(mesh)) if len(x) % row_shards(mesh) == 0 else x
        for dispatch in ("dense", "blocks"):
            found = run(config, rows, dispatch, mesh, params), gradient(config, rows, dispatch, mesh, params)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_ragged_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = noise(4, 6, D)
    expected = run(FULL, x, "dense"), gradient(FULL, x, "dense")
    with jax.set_mesh(mesh):
        params = placed(mesh, params_of(FULL))
        found = run(FULL, x, "ragged", mesh, params), gradient(FULL, x, "ragged", mesh, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_kernels_stay_where_they_are():
    """With experts split over devices, no device gathers the kernels of all experts."""
    mesh = make_mesh(MeshConfig(tensor=8))
    config = dataclasses.replace(PLAIN, expert_width=64)
    with jax.set_mesh(mesh):
        params = placed(mesh, params_of(config))
        assert params["experts"]["up"]["kernel"].addressable_shards[0].data.shape == (1, D, 64)
        layer = Experts(config, mesh, "blocks")
        text = jax.jit(layer.apply).lower({"params": params}, noise(4, 6, D)).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and f"f32[{E},{D},64]" not in text


@pytest.mark.parametrize(
    ("axes", "shapes"),
    [
        ({"tensor": 4, "fsdp": 2}, ((3, 2, D // 2, F), (3, 2, F, D // 2), (3, 2, F), (3, 2, D))),
        ({"tensor": 3}, ((3, E, D, F // 3), (3, E, F // 3, D), (3, E, F // 3), (3, E, D))),
    ],
    ids=str,
)
def test_a_device_holds_its_part_of_the_experts(axes, shapes):
    mesh = make_mesh(MeshConfig(**axes))
    leaves = {
        ("up", "kernel"): (3, E, D, F),
        ("down", "kernel"): (3, E, F, D),
        ("gate", "bias"): (3, E, F),
        ("down", "bias"): (3, E, D),
    }
    found = [
        parameter_sharding(mesh, ["layers", "mlp", "experts", *path], shape).shard_shape(shape)
        for path, shape in leaves.items()
    ]
    assert tuple(found) == shapes
    for path in (["router", "kernel"], ["router", "bias"], ["correction"], ["shared_gate", "kernel"]):
        assert parameter_sharding(mesh, ["layers", "mlp", *path], (3, 24)).is_fully_replicated


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_vectorized(dispatch):
    """As the members of a population are: each with other tokens."""
    x = noise(3, 2, 5, D)
    found = jax.jit(jax.vmap(lambda x: gradient(FULL, x, dispatch)))(x)
    expected = jnp.stack([gradient(FULL, own, dispatch) for own in x])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_vectorized_on_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = noise(3, 2, 5, D)
    with jax.set_mesh(mesh):
        params = placed(mesh, params_of(FULL))
        found = jax.jit(jax.vmap(lambda x: gradient(FULL, x, "blocks", mesh, params)))(x)
    np.testing.assert_allclose(found, jnp.stack([gradient(FULL, own, "dense") for own in x]), atol=2e-5)


@pytest.mark.parametrize("dispatch", ["blocks", "ragged"])
def test_vectorized_over_weights(dispatch):
    x = noise(2, 5, D)
    params = [jax.tree.map(lambda a, i=i: a * (1 + 0.1 * i), params_of(FULL)) for i in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    found = jax.jit(jax.vmap(lambda params: gradient(FULL, x, dispatch, params=params)))(stacked)
    expected = jnp.stack([gradient(FULL, x, dispatch, params=own) for own in params])
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_in_a_scan_over_layers_with_remat(dispatch):
    layers, x = 3, noise(2, 5, D)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + 0.05 * Experts(FULL, dispatch=dispatch, name="mlp")(x), None

    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = nn.remat(Block, prevent_cse=False, policy=policy)
    scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers)()
    own = [jax.tree.map(lambda a, i=i: a * (1 + 0.1 * i), params_of(FULL)) for i in range(layers)]
    stacked = {"mlp": jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)}

    def scanned(x):
        return jnp.sum(scan.apply({"params": stacked}, x, None)[0] * noise(*x.shape, seed=9))

    def unrolled(x):
        for params in own:
            x = x + 0.05 * Experts(FULL, dispatch="dense").apply({"params": params}, x)
        return jnp.sum(x * noise(*x.shape, seed=9))

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), jax.jit(jax.grad(unrolled))(x), atol=2e-5)


@pytest.mark.parametrize("axes", [None, {"tensor": 4}, {"tensor": 3}], ids=str)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_int8_kernels(dispatch, axes):
    """As dense kernels of the same numbers; split by expert and, by 3 devices, by width."""

    def quantized(leaf):
        scale = jnp.abs(leaf).max(axis=1) / 127
        return Int8(jnp.rint(leaf / scale[:, None]).astype(jnp.int8), scale)

    params = params_of(FULL)
    kernels = {name: {**own, "kernel": quantized(own["kernel"])} for name, own in params["experts"].items()}
    plain = {name: {**own, "kernel": own["kernel"].dense()} for name, own in kernels.items()}
    mesh = None if axes is None else make_mesh(MeshConfig(**axes))
    x = noise(2, 6, D)
    for function in (run, gradient):
        found = function(FULL, x, dispatch, mesh, {**params, "experts": kernels})
        expected = function(FULL, x, "dense", None, {**params, "experts": plain})
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_kernels_get_no_gradient(dispatch):
    def loss(experts):
        params = {**params_of(PLAIN), "experts": experts}
        return jnp.sum(Experts(PLAIN, dispatch=dispatch).apply({"params": params}, noise(1, 5, D)))

    for leaf in jax.tree.leaves(jax.grad(loss)(params_of(PLAIN)["experts"])):
        np.testing.assert_array_equal(leaf, 0)


def test_dispatch_by_number_of_experts_dtype_and_platform():
    many, few = PLAIN, dataclasses.replace(PLAIN, experts=4)
    cases = {
        ("blocks", many): [("float32", "cpu"), ("bfloat16", "gpu")],
        ("ragged", many): [("bfloat16", "tpu"), ("float16", "tpu")],
        ("dense", few): [("float32", "cpu"), ("bfloat16", "gpu"), ("bfloat16", "tpu")],
        ("blocks", few): [("float16", "gpu")],
    }
    for (expected, config), places in cases.items():
        assert {choose_dispatch(config, jnp.dtype(dtype), platform) for dtype, platform in places} == {expected}


def test_parameters_that_a_token_is_multiplied_with():
    shapes = jax.tree_util.tree_leaves_with_path(params_of(FULL))
    kernels = {jax.tree_util.keystr(path): leaf.size for path, leaf in shapes if path[-1].key == "kernel"}
    own = sum(size * FULL.top_k // E if "experts" in path else size for path, size in kernels.items())
    assert FULL.matmul_parameters(D) == own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k is 9, but there are only 8 experts"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"shared_gate": True}, "shared_gate needs a shared MLP"),
        ({"shared_width": -1}, "shared_width is -1"),
        ({"scoring": "softmax_of_chosen", "renormalize": True}, "add up to 1 already"),
        ({"renormalize_epsilon": 1e-20}, "no effect unless renormalize"),
        ({"renormalize": True, "renormalize_epsilon": -1.0}, "finite number of at least 0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"groups": 3}, "8 experts cannot be divided into 3 equal groups"),
        ({"groups": 2, "top_groups": 3}, "top_groups is 3, but there are only 2 groups"),
        ({"groups": 8, "top_groups": 1}, "1 of 8 groups have only 1 experts"),
        ({"groups": 8, "top_groups": 4, "group_score": "top2_sum"}, "needs at least 2 experts per group"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(PLAIN, **fields)
