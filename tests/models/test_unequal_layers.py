"""Layers of unequal kind: one scan per repeating sequence gives what the layers give one after another."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.errors import ConfigError
from spt_jax.models.attention import GatedPrefix, Prefix, Stream
from spt_jax.models.block import Block
from spt_jax.models.config import DecoderConfig, group_names, layer_configs, periods
from spt_jax.models.decoder import Decoder, _layer_inputs, _shared_inputs, decoder_layout
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.layout import Group, StateGroup
from spt_jax.models.mamba_config import MambaConfig
from spt_jax.models.memory import KeysValues
from spt_jax.models.per_layer_config import PerLayerConfig
from spt_jax.models.rope import RopeConfig
from spt_jax.models.variant import Variant
from spt_jax.testing import check_model

PLAIN = DecoderConfig(
    family="test", vocab_size=50, width=16, layers=9, heads=4, kv_heads=2, head_size=4, mlp_width=24,
    max_positions=64, tied=True, rope=RopeConfig(), local_rope=RopeConfig(theta=100.0), window=5,
    window_layers=(1, 2, 4, 5, 7),
)  # fmt: skip
WIDE = Variant(name="wide", layers=(0, 3, 6, 8), kv_heads=1, head_size=8, rope=RopeConfig(fraction=0.5))
CONFIG = dataclasses.replace(PLAIN, variants=(WIDE, Variant(name="first", layers=(0,), mlp_width=40)))


def model_of(config: DecoderConfig) -> DecoderModel:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32) / 4 + (leaf.shape[-1:] == (1,))),
        parameter_shapes(config),
    )
    return DecoderModel(params, Decoder(config, remat="none"))


DELTA = DeltaNetConfig(key_heads=2, value_heads=4, key_size=4, value_size=6)
EXPERTS = ExpertsConfig(experts=6, top_k=2, expert_width=8, shared_width=8, shared_gate=True, renormalize=True)
MIXED = dataclasses.replace(
    PLAIN, layers=3, window=0, window_layers=(), local_rope=None, attention_gate=True, sinks=True,
    variants=(
        Variant(name="linear", layers=(0, 2), delta_net=DELTA),
        Variant(name="sparse", layers=(1,), experts=EXPERTS),
    ),
)  # fmt: skip

MAMBA = MambaConfig(heads=4, groups=2, head_size=6, state_size=5)
BESIDE = dataclasses.replace(MAMBA, beside_attention=True, head_size=3)
# Mamba-2 beside attention, in its place, and beside attention of another shape.
BOTH = dataclasses.replace(
    PLAIN, layers=5, window=0, window_layers=(), local_rope=None, mamba=BESIDE, attention_input_scale=0.7,
    attention_output_scale=1.4, key_scale=0.8, mlp_gate_scale=1.2, mlp_output_scale=0.6,
    variants=(
        Variant(name="replaced", layers=(1,), mamba=MAMBA),
        Variant(name="wide", layers=(3,), kv_heads=1, head_size=8, mamba=dataclasses.replace(BESIDE, state_size=7)),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", [("a", 4)]),
        ("baaaa", [("b", 1), ("a", 4)]),
        ("aaabaaab", [("aaab", 2)]),
        ("aaabaaabaa", [("aaab", 2), ("a", 2)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
    ],
)
def test_layers_are_split_into_the_longest_repetitions(kinds, expected):
    variants = tuple(
        Variant(name=name, layers=tuple(i for i, kind in enumerate(kinds) if kind == name), mlp_width=ord(name))
        for name in sorted(set(kinds))
    )
    config = dataclasses.replace(PLAIN, layers=len(kinds), window_layers=(), local_rope=None, variants=variants)
    found = [
        ("".join(kinds[one.layers[0]] * one.run for one in period.stacks), period.repeats) for period in periods(config)
    ]
    assert found == expected
    assert all(
        kinds[i] == kinds[one.layers[0]] for period in periods(config) for one in period.stacks for i in one.layers
    )
    assert sorted(i for period in periods(config) for one in period.stacks for i in one.layers) == [*range(len(kinds))]


def test_groups_have_layers_of_one_size():
    groups = decoder_layout(CONFIG).attention_groups
    assert {name: (group.layers, group.kv_heads, group.key_size) for name, group in groups.items()} == {
        "self": ((1, 2, 4, 5, 7), 2, 4),
        "wide": ((0, 3, 6, 8), 1, 8),
    }
    assert group_names(PLAIN) == (("self",),) * 9


def one_after_another(model: DecoderModel, x, stream: Stream, prefix: Prefix) -> jax.Array:
    """The layers in a loop, each with its own slice of the parameters and of the prefix."""
    config, layout = model.config, decoder_layout(model.config)
    for i in range(config.layers):
        ((stack, at),) = (
            (stack, stack.layers.index(i)) for period in periods(config) for stack in period.stacks if i in stack.layers
        )
        params = model.params
        for key in stack.path.split("/"):
            params = params[key]
        own = layer_configs(config)[i]
        single = dataclasses.replace(stack, layers=(i,), run=1, config=own)
        (group,) = stack.groups
        place = layout.attention_groups[group].layers.index(i)
        pair = jax.tree.map(lambda a, place=place: a[place], prefix.memory[group])
        windowed = dataclasses.replace(single, config=stack.config)
        shared = _shared_inputs(windowed, stream, prefix, None, {}, ring=False)
        flags = jax.tree.map(lambda a: a[0], _layer_inputs(config, windowed, True, None, None))
        block = Block(stack.config, None, "xla")
        x, _ = block.apply(
            {"params": jax.tree.map(lambda a, at=at: a[at], params)},
            x,
            dataclasses.replace(flags, prefix=pair),
            shared,
        )
    return x


def test_a_scan_over_the_pattern_is_the_layers_one_after_another():
    model = model_of(CONFIG)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 11, 16)).astype(np.float32))
    place = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (2, 11))
    stream = Stream(place + 3, jnp.ones_like(place), jnp.zeros_like(place))
    memory = {
        name: KeysValues(
            *(
                jnp.asarray(rng.normal(size=(len(group.layers), 3, group.kv_heads, size)).astype(np.float32))
                for size in (group.key_size, group.value_size)
            )
        )
        for name, group in decoder_layout(CONFIG).attention_groups.items()
    }
    prefix = Prefix(memory, jnp.arange(3))
    found, _ = model.run(x, stream, prefix)
    expected = model.module.apply(
        {"params": model.params}, one_after_another(model, x, stream, prefix), method=Decoder.leave
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", [CONFIG, MIXED, BOTH])
def test_the_rules_of_a_model_hold(config):
    check_model(model_of(config))


def test_recurrent_layers_are_a_group_of_states():
    groups = decoder_layout(MIXED).groups
    assert groups == {
        "linear": StateGroup((0, 2), DELTA.state_shapes),
        "self": Group((1,), 2, 4, 4),
    }


def test_a_layer_with_attention_and_a_state_is_in_two_groups():
    assert decoder_layout(BOTH).groups == {
        "self": Group((0, 2, 4), 2, 4, 4),
        "recurrent": StateGroup((0, 2, 4), BESIDE.state_shapes),
        "replaced": StateGroup((1,), MAMBA.state_shapes),
        "wide": Group((3,), 1, 8, 8),
        "wide_recurrent": StateGroup((3,), (("convolution", (3, 12 + 28)), ("recurrent", (4, 3, 7)))),
    }
    assert decoder_layout(BOTH).attention_layers == [0, 2, 3, 4]


def test_options_that_exclude_each_other():
    for changes, message in [
        ({"delta_net": DELTA}, "cannot have both Gated DeltaNet and Mamba-2"),
        ({"experts": EXPERTS}, "experts have no scales"),
        ({"key_scale": 0.0}, "key_scale is 0.0; it must be a finite number above 0"),
        ({"variants": (Variant(name="recurrent", layers=(1,), mlp_width=8),)}, "'recurrent' is taken"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(BOTH, **changes)


def test_a_gated_prefix_reaches_the_last_layers_of_each_group():
    model = model_of(CONFIG)
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 16)).astype(np.float32))
    memory = model.gated_memory(rows)
    assert {name: own.keys.shape for name, own in memory.items()} == {"self": (1, 2, 2, 4), "wide": (2, 2, 1, 8)}
    place = jnp.arange(5, dtype=jnp.int32)[None]
    x, stream = model.embed(place), Stream(place, jnp.ones_like(place), jnp.zeros_like(place))
    bare, closed, opened = (
        model.run(x, stream, gated=None if gates is None else GatedPrefix(memory, jnp.asarray(gates)))[0]
        for gates in (None, [0.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    )
    np.testing.assert_array_equal(bare, closed)
    assert np.abs(np.asarray(opened - bare)).max() > 1e-3
    # The gate of layer 7 does not change what layers up to 6 compute: the keys of layer 7 stay the same.
    _, before = model.run(x, stream, return_memory=True)
    _, after = model.run(x, stream, gated=GatedPrefix(memory, jnp.asarray([0.0, 1.0, 0.0])), return_memory=True)
    np.testing.assert_array_equal(before["self"].keys[-1], after["self"].keys[-1])
    assert np.abs(np.asarray(before["wide"].keys[-1] - after["wide"].keys[-1])).max() > 1e-4


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="more than the 9 layers"):
        dataclasses.replace(CONFIG, variants=(Variant(name="far", layers=(9,)),))
    with pytest.raises(ConfigError, match="heads of size 3 cannot be rotated"):
        dataclasses.replace(CONFIG, variants=(Variant(name="odd", layers=(1,), head_size=3),))
    with pytest.raises(ConfigError, match="names a layer twice"):
        dataclasses.replace(CONFIG, variants=(Variant(name="twice", layers=(1, 1)),))
    with pytest.raises(ConfigError, match=r"names of their own.*'wide' is taken"):
        dataclasses.replace(CONFIG, variants=(WIDE, WIDE))
    with pytest.raises(ConfigError, match="'self' is taken"):
        dataclasses.replace(CONFIG, variants=(Variant(name="self", layers=(1,)),))


@pytest.mark.parametrize("layers", [10_000, 65_536])
def test_layers_without_a_pattern_are_refused_soon(layers):
    some = tuple(np.flatnonzero(np.random.default_rng(0).random(layers) < 0.5).tolist())
    start = time.monotonic()
    with pytest.raises(ConfigError, match="repeat too little"):
        dataclasses.replace(PLAIN, layers=layers, variants=(Variant(name="some", layers=some, mlp_width=8),))
    assert time.monotonic() - start < 20


def test_many_layers_with_a_pattern_are_read_soon():
    start = time.monotonic()
    variants = tuple(Variant(name=f"{i}", layers=tuple(range(i, 65_536, 50)), mlp_width=8 + i) for i in range(50))
    config = dataclasses.replace(PLAIN, layers=65_536, variants=variants)
    assert [len(period.stacks) for period in periods(config)] == [50, *[1] * 36]
    assert decoder_layout(config).attention_groups["self"].layers == tuple(range(65_536))
    assert time.monotonic() - start < 10


READING = dataclasses.replace(
    PLAIN,
    layers=8,
    window_layers=(0, 2, 4, 6),
    variants=(
        Variant(name="wide", layers=(1, 3, 5, 7), kv_heads=1, head_size=8),
        Variant(name="reads_2", layers=(4, 6), kv_source=2, mlp_width=40),
        Variant(name="reads_3", layers=(5, 7), kv_source=3),
    ),
    per_layer=PerLayerConfig(width=6, vocab_size=52, virtual_id=7),
)


def test_layers_that_read_the_keys_and_values_of_others_keep_the_rules():
    assert [(len(period.stacks), period.repeats) for period in periods(READING)] == [(2, 2), (2, 2)]
    groups = decoder_layout(READING).attention_groups
    assert {name: group.layers for name, group in groups.items()} == {"self": (0, 2), "wide": (1, 3)}
    assert group_names(READING) == (("self",), ("wide",), ("self",), ("wide",), (), (), (), ())
    check_model(model_of(READING))


def test_memory_needs_only_the_layers_that_have_some():
    """So that context that is shared runs through half of these layers."""
    model = model_of(READING)
    params = {**model.params, "layers_4": jax.tree.map(lambda a: a * jnp.nan, model.params["layers_4"])}
    place = jnp.arange(5, dtype=jnp.int32)[None]
    x, stream = model.embed(place), Stream(place, jnp.ones_like(place), jnp.zeros_like(place), ids=place)
    _, expected = model.run(x, stream, return_memory=True)
    hidden, found = DecoderModel(params, model.module).run(x, stream, return_memory=True, return_hidden=False)
    assert hidden is None
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_virtual_tokens_take_a_row_of_their_own_of_the_embeddings_by_layer():
    model = model_of(READING)
    place = jnp.arange(5, dtype=jnp.int32)[None]

    def hidden(ids):
        ids = jnp.asarray(ids, jnp.int32)[None]
        stream = Stream(place, jnp.ones_like(place), jnp.zeros_like(place), ids=ids)
        return np.asarray(model.run(model.embed(place), stream)[0])

    np.testing.assert_array_equal(hidden([50, 60, 2, 3, 4]), hidden([7, 7, 2, 3, 4]))
    assert np.abs(hidden([50, 60, 2, 3, 4]) - hidden([0, 1, 2, 3, 4])).max() > 1e-2
    with pytest.raises(ValueError, match=r"Stream\.ids"):
        model.run(model.embed(place), Stream(place, jnp.ones_like(place), jnp.zeros_like(place)))


def test_sources_that_have_no_keys_are_refused():
    for layers, source in [((4,), 4), ((4,), 6), ((0,), 1), ((4,), 1)]:
        with pytest.raises(ConfigError, match=f"cannot read the keys and values of layer {source}"):
            dataclasses.replace(
                READING,
                variants=(
                    Variant(name="wide", layers=(1, 3, 5, 7), kv_heads=1, head_size=8),
                    Variant(name="reads", layers=layers, kv_source=source),
                ),
            )
