"""Gated DeltaNet equals the torch modules of Qwen3.5 and Qwen3-Next in transformers: outputs, states and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.models.attention import Stream
from spt_jax.models.delta_net import GatedDeltaNet
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.memory import State
from spt_jax.models.recurrence import by_chunks, token_order

pytestmark = pytest.mark.parity

CONFIG = DeltaNetConfig(key_heads=2, value_heads=4, key_size=6, value_size=5)
WIDTH, ROWS = 16, 3
PARTS = ("query", "key", "value")


def torch_config():
    from transformers import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=CONFIG.key_heads,
        linear_num_value_heads=CONFIG.value_heads,
        linear_key_head_dim=CONFIG.key_size,
        linear_value_head_dim=CONFIG.value_size,
        linear_conv_kernel_dim=CONFIG.convolution_width,
        rms_norm_eps=CONFIG.norm_epsilon,
    )


def torch_layer(seed: int = 0):
    """The torch layer with random weights; some heads forget within a few tokens and others after hundreds."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    layer = Qwen3_5GatedDeltaNet(torch_config(), layer_idx=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator) + (name == "norm.weight"))
        layer.A_log.copy_(torch.linspace(-4, 1.5, CONFIG.value_heads))
    return layer.eval()


def params_of(layer) -> dict:
    """The same weights as parameters of `GatedDeltaNet`."""
    weights = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    ends = np.cumsum([CONFIG.key_width, CONFIG.key_width])
    maps = dict(zip(PARTS, np.split(weights["in_proj_qkv.weight"], ends), strict=True))
    maps |= {
        ours: weights[f"in_proj_{theirs}.weight"] for ours, theirs in {"gate": "z", "decay": "a", "beta": "b"}.items()
    }
    maps["output"] = weights["out_proj.weight"]
    kernels = np.split(weights["conv1d.weight"][:, 0], ends)
    params = {
        **{name: {"kernel": weight.T} for name, weight in maps.items()},
        **{f"{name}_convolution": kernel.T for name, kernel in zip(PARTS, kernels, strict=True)},
        "norm": {"scale": weights["norm.weight"]},
        "a_log": weights["A_log"],
        "dt_bias": weights["dt_bias"],
    }
    return jax.tree.map(jnp.asarray, params)


def zeros() -> State:
    return State({name: jnp.zeros(shape) for name, shape in CONFIG.state_shapes})


def stream_of(segments, start: int = 0) -> Stream:
    segments = jnp.asarray(segments, jnp.int32)
    positions = segments * (start - 1 + jnp.cumsum(segments, axis=1))
    return Stream(positions, segments, jnp.zeros_like(segments))


def hidden(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, length, WIDTH)).astype(np.float32)


@jax.jit
def run(params: dict, x, stream: Stream, state: State):
    order = token_order(stream, CONFIG.convolution_width - 1)
    return GatedDeltaNet(CONFIG).apply({"params": params}, jnp.asarray(x), order, state)


def same(ours, theirs, tolerance: float = 1e-5) -> None:
    """Equal relative to the largest number."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    largest = np.abs(theirs).max()
    assert largest > 0.1
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=tolerance * largest, rtol=0)


def same_state(state: State, cache) -> None:
    remembered = CONFIG.convolution_width - 1
    same(state.arrays["convolution"], cache.get_conv_state(0).mT[:, -remembered:])
    same(state.arrays["recurrent"], cache.get_recurrent_state(0))


@pytest.mark.parametrize("length", [1, 2, 40, 200])
def test_whole_rows(length):
    """torch solves chunks of 64 tokens and passes a state between them."""
    layer, x = torch_layer(), hidden(length)
    y, _ = run(params_of(layer), x, stream_of(np.ones((ROWS, length))), zeros())
    same(y, layer(torch.tensor(x)))


def test_rows_padded_on_either_side():
    layer, x, length = torch_layer(), hidden(21), 21
    real = np.asarray([[i >= 6 for i in range(length)], [True] * length, [i < 17 for i in range(length)]])
    y, _ = run(params_of(layer), x, stream_of(real), zeros())
    theirs = layer(torch.tensor(x), attention_mask=torch.tensor(real))
    same(np.asarray(y)[real], theirs.detach().numpy()[real])


@pytest.mark.parametrize("lengths", [(9, 5, 30), (9, 1, 1, 1), (2, 1, 1), (70, 1, 3)], ids=str)
def test_rows_in_parts(lengths):
    """The state after each part equals transformers' cache; a part of one token takes its recurrent rule."""
    from transformers import DynamicCache

    layer = torch_layer()
    params, cache, state, start = params_of(layer), DynamicCache(config=torch_config()), zeros(), 0
    for number, length in enumerate(lengths):
        x = hidden(length, seed=number)
        y, state = run(params, x, stream_of(np.ones((ROWS, length)), start), state)
        same(y, layer(torch.tensor(x), cache=cache))
        same_state(state, cache)
        start += length


@pytest.mark.parametrize("rule", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_both_rules(rule, monkeypatch):
    """For a whole row, either rule of transformers gives the same."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    layer, x = torch_layer(), hidden(40)
    y, _ = run(params_of(layer), x, stream_of(np.ones((ROWS, 40))), zeros())
    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", getattr(qwen, rule))
    monkeypatch.setattr(layer, "torch_chunk_gated_delta_rule", getattr(qwen, rule), raising=False)
    same(y, layer(torch.tensor(x)))


def test_gradients_of_hidden_states():
    layer, x = torch_layer(), hidden(40)
    params, stream = params_of(layer), stream_of(np.ones((ROWS, 40)))
    cotangent = hidden(40, seed=2)
    ours = jax.grad(lambda x: jnp.sum(run(params, x, stream, zeros())[0] * cotangent))(jnp.asarray(x))
    theirs = torch.tensor(x, requires_grad=True)
    (layer(theirs) * torch.tensor(cotangent)).sum().backward()
    same(ours, theirs.grad)


def test_gradients_of_the_initial_state():
    """The recurrent array against transformers' rule; the convolution has no state with gradients there."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    from spt_jax.models.delta_net import DeltaInputs, delta_rule

    generator = np.random.default_rng(0)
    heads, repeats, length, key_size, value_size = 2, 2, 30, 6, 5

    def draw(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    queries, keys = draw(ROWS, heads, length, key_size), draw(ROWS, heads, length, key_size)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values, initial = draw(ROWS, heads, repeats, length, value_size), draw(ROWS, heads, repeats, key_size, value_size)
    decays, betas = -np.exp(draw(ROWS, heads, repeats, length)), 1 / (1 + np.exp(draw(ROWS, heads, repeats, length)))
    cotangents = draw(*values.shape), draw(*initial.shape)
    order = token_order(stream_of(np.ones((ROWS, length))), 1)

    def ours(initial):
        tokens_after_heads = ((queries, 2), (keys, 2), (values, 3), (decays, 3), (betas, 3))
        inputs = DeltaInputs(*(jnp.moveaxis(jnp.asarray(array), axis, 1) for array, axis in tokens_after_heads))
        outputs, final = by_chunks(delta_rule, inputs, initial, order, 16)
        return jnp.sum(jnp.moveaxis(outputs, 1, 3) * cotangents[0]) + jnp.sum(final * cotangents[1])

    def by_head(array, *sizes):
        return torch.tensor(array.reshape(ROWS, -1, length, *sizes)).transpose(1, 2)

    state = torch.tensor(initial.reshape(ROWS, -1, key_size, value_size), requires_grad=True)
    scaled = by_head(queries * key_size**0.5, key_size)
    outputs, final = torch_recurrent_gated_delta_rule(
        scaled,
        by_head(keys, key_size),
        by_head(values, value_size),
        by_head(decays),
        by_head(betas),
        initial_state=state,
        output_final_state=True,
    )
    (
        (outputs * by_head(cotangents[0], value_size)).sum()
        + (final * torch.tensor(cotangents[1]).reshape(final.shape)).sum()
    ).backward()
    same(jax.grad(ours)(jnp.asarray(initial)), state.grad.numpy().reshape(initial.shape))
