"""Prefix tuning: keys and values of every layer at P positions before the input (Li & Liang 2021, arXiv 2101.00190)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.attention import Stream
from spt_jax.models.layout import SELF, Group, Layout
from spt_jax.models.memory import KeysValues, Memory, State
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import Initializer, initialize
from spt_jax.prompts.method import DEFAULT_LENGTH, Method, PromptParams
from spt_jax.prompts.virtual import VirtualPrefix, VirtualPrompt

# The learning rate for encoders: of 0.05, 0.1 and 0.2, the best on the validation records of TREC with all-MiniLM-L6.
ENCODER_RATE = 0.1
# The number of layers up to which learning rates hold: those of all-MiniLM-L6.
RATED_LAYERS = 6

# Keys and values as they are trained, see `_packed`.
Packed = Float[Array, "2 L P K H"] | Mapping[str, Mapping[str, Float[Array, "L P K H"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Keys and values of every layer before the input.

    Attributes:
      name: the method.
      length: number of positions P; default 20.
      start: initial keys and values. tokens: those that the base computes for the rows of `init`; with init.name=text
        this is a cartridge (Eyuboglu et al. 2025, arXiv 2506.06266), with init.name=prompt the keys and values of a
        saved prompt. random: normal, with their mean and standard deviation. zero: zeros.
      init: initializer of the rows for start=tokens and start=random.
      reparameterization: flat trains keys and values directly; mlp trains a two-layer network (tanh) over P embeddings,
        as in the paper, whose outputs are added to the initial keys and values; it is dropped when the prompt is saved.
      hidden: width of that network.
      sink: number of first positions that are not trained. With start=tokens and sink > 0, the first is BOS if the base
        has one, because models use it as an attention sink.
      states: also train the states of the recurrent layers before the first token, which are zeros otherwise (S0
        tuning, arXiv 2604.01168; the method `state_tuning` trains only these). They start from zeros, or from those of
        the prompt that `init` names.
      sites: the attention layers that get keys and values, for an encoder-decoder: encoder for the encoder's
        self-attention, self for the decoder's, and cross for cross-attention; default all three. Each has its own.
      pin_prefix: in layers with a sliding window, every token attends to all keys and values of the prefix, however far
        back they are. By default the window hides them, as it hides tokens.
    """

    # In units of the values of the base, whose deviations are 0.4 and 1.3 in the two bases used to choose it.
    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.2, "schedule": "linear"}

    name: Literal["prefix_tuning"] = "prefix_tuning"
    length: int | None = None
    start: Literal["tokens", "random", "zero"] = "tokens"
    init: Initializer = dataclasses.field(default_factory=Initializer)
    reparameterization: Literal["flat", "mlp"] = "flat"
    hidden: int = 512
    sink: int = 0
    states: bool = False
    sites: tuple[Literal["encoder", "self", "cross"], ...] = ()
    pin_prefix: bool = False

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ConfigError(f"method.length is {self.length}; a prefix has at least 1 position")
        if self.hidden < 1:
            raise ConfigError(f"method.hidden is {self.hidden}; the network has at least 1 unit")
        if not 0 <= self.sink < self.prefix_length:
            raise ConfigError(
                f"method.sink is {self.sink}; it must be in 0 to {self.prefix_length - 1}: the others are trained"
            )
        if len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"method.sites names a site twice: {', '.join(self.sites)}")

    def recipe_for(self, layout: Layout) -> Mapping[str, Any]:
        """Returns the rate for the kind and the depth of a base.

        Each step changes the keys and values of every layer, and the changes add up along the depth: beyond
        `RATED_LAYERS`, the rate is divided by the number of layers. The standard rate is too high for 30 layers: with
        SmolLM2-135M, deep prompts then stay below the frozen base.
        """
        layers = sum(len(group.layers) for group in self._groups(layout).values())
        rate = self.recipe["learning_rate"] if layout.generates else ENCODER_RATE
        return {**self.recipe, "learning_rate": rate * min(1.0, RATED_LAYERS / max(layers, 1))}

    @property
    def pins(self) -> bool:
        return self.pin_prefix

    @property
    def prefix_length(self) -> int:
        """Number of positions of the prefix, before the first token."""
        return self.length or DEFAULT_LENGTH

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns `free` keys and values with their `scale` and the `sink`, or `start` and the `network`; float32.

        With the option `states` there are also `states`, by the name of the group and of the array, in units of
        `scale` if there is one.

        Keys and values are in the form of `_packed`. `free` is in units of `scale`, the standard deviation of all
        values, so that a learning rate has the same effect for every base.
        """
        start_key, network_key = jax.random.split(key)
        states = self._start_states(base)
        start = self._start(start_key, base)
        free = jax.tree.map(lambda a: a[..., self.sink :, :, :], start)
        if self.reparameterization == "flat":
            usual = start if self.start != "zero" else dataclasses.replace(self, start="tokens")._start(start_key, base)
            scale = _deviation(_unpacked(usual))
            sink = {"sink": jax.tree.map(lambda a: a[..., : self.sink, :, :], start)} if self.sink else {}
            states = jax.tree.map(lambda a: a / scale, states)
            return {"free": jax.tree.map(lambda a: a / scale, free), "scale": scale} | sink | states
        return {"start": start, "network": _init_network(network_key, self.hidden, free)} | states

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns keys and values at every position; those of the network are added to the initial ones."""
        del model
        if self.reparameterization == "flat":
            parts = [params["sink"]] if self.sink else []
            free = jax.tree.map(lambda a: a * params["scale"], params["free"])
            both = jax.tree.map(lambda *own: jnp.concatenate(own, axis=-3), *parts, free)
        else:
            change = _apply_network(params["network"])
            both = jax.tree.map(lambda a, own: a.at[..., self.sink :, :, :].add(own), params["start"], change)
        scale = params["scale"] if self.reparameterization == "flat" else 1.0
        states = jax.tree.map(lambda a: a * scale, params["states"]) if self.states else {}
        whole = _unpacked(both), {name: State(arrays) for name, arrays in states.items()}
        return VirtualPrompt(prefix=VirtualPrefix({**whole[0], **whole[1]}), pinned=self.pins)

    def spec(self, layout: Layout) -> VirtualPrompt:
        prefix = memory.spec(self._groups(layout), self.prefix_length)
        states = memory.state_spec(layout.state_groups) if self.states else {}
        return VirtualPrompt(prefix=VirtualPrefix({**prefix, **states}), pinned=self.pins)

    def check_base(self, base: FrozenBase) -> None:
        super().check_base(base)
        if self.sites and not base.layout.encodes:
            raise ConfigError(
                f"method.sites is {', '.join(self.sites)}, and {base.name} is no encoder-decoder; leave it out"
            )

    def _groups(self, layout: Layout) -> dict[str, Group]:
        """Returns the groups of layers that get keys and values."""
        groups = layout.attention_groups.items()
        return {name: group for name, group in groups if not self.sites or group.site in self.sites}

    def trainable(self, params: PromptParams) -> dict[str, Any]:
        """The sink, the scale and the initial keys and values of the network are not trained."""
        return {
            name: jax.tree.map(lambda _, name=name: name not in ("sink", "scale", "start"), part)
            for name, part in params.items()
        }

    def _start(self, key: Key[Array, ""], base: FrozenBase) -> Packed:
        length = self.prefix_length
        if self.start == "zero":
            spec = memory.spec(self._groups(base.layout), length)
            return _packed(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), spec))
        saved = self._saved(base)
        if saved is not None:
            return saved
        row_key, noise_key = jax.random.split(key)
        rows = initialize(self.init, row_key, base, length)
        bos = base.tokenizer.bos_token_id
        ids = np.full(length, base.layout.vocab_size, np.int32)
        if self.sink and bos is not None and self.start == "tokens":
            ids[0] = bos
            rows = rows.at[0].set(base.model.embed(jnp.asarray([bos]))[0].astype(jnp.float32))
        found, groups = memory_of_rows(base.model, rows, jnp.asarray(ids)), self._groups(base.layout)
        both = _packed({name: own for name, own in found.items() if name in groups or isinstance(own, State)})
        if self.start == "tokens":
            return both
        leaves, structure = jax.tree.flatten(both)
        keys = [noise_key] if len(leaves) == 1 else list(jax.random.split(noise_key, len(leaves)))
        return jax.tree.unflatten(structure, map(_noise_like, keys, leaves))

    def _start_states(self, base: FrozenBase) -> dict[str, Any]:
        """Returns the parameter `states`, not divided by the scale; nothing without that option."""
        if not self.states:
            return {}
        if not base.layout.state_groups:
            raise ConfigError(f"method.states is True, but no layer of {base.name} is recurrent; set it to False")
        return {"states": start_states(self._saved_memory(base), base.layout)}

    def _saved(self, base: FrozenBase) -> Packed | None:
        """Returns keys and values of the saved prompt that `init` names, or None if it has no prefix."""
        found = self._saved_memory(base)
        return _packed(found) if found else None

    def _saved_memory(self, base: FrozenBase) -> Memory:
        """Returns the prefix of the saved prompt that `init` names, or nothing if it has none."""
        if self.init.name != "prompt":
            return {}
        from spt_jax.prompts.storage import load_prompt

        virtual = load_prompt(self.init.path, base).virtual
        if virtual.prefix is None:
            return {}
        if virtual.prefix_length != self.prefix_length:
            raise ConfigError(
                f"{self.init.path}: a prefix of {virtual.prefix_length} positions; method.length is"
                f" {self.prefix_length}"
            )
        return virtual.prefix.memory


def start_states(found: Memory, layout: Layout) -> dict[str, Any]:
    """Returns the states before the first token by group and name: those found, otherwise zeros."""
    whole = memory.of_all_layers(found, layout)
    return {name: own.arrays for name, own in whole.items() if isinstance(own, State)}


@jax.jit
def memory_of_rows(model: Model, rows: Float[Array, "P D"], ids: Int[Array, " P"] | None = None) -> Memory:
    """Returns what all layers remember of embeddings at the start of a sequence, float32.

    Args:
      model: the base.
      rows: the embeddings.
      ids: their ids, from V on for those that are not embeddings of tokens; None if none is.
    """
    ids = jnp.full(rows.shape[:1], model.layout.vocab_size) if ids is None else ids
    positions = jnp.arange(rows.shape[0], dtype=jnp.int32)[None]
    stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions), ids=ids[None])
    x = rows[None].astype(model.dtype)
    if model.layout.encodes:
        return _memory_of_both_sides(model, x, stream)
    _, found = model.run(x, stream, return_memory=True, return_hidden=False)
    assert found is not None
    return jax.tree.map(lambda a: a[:, 0].astype(jnp.float32), found)


def _memory_of_both_sides(model: Model, x: Float[Array, "1 P D"], stream: Stream) -> Memory:
    """Returns what both sides of an encoder-decoder remember of embeddings that each of them reads."""
    length = x.shape[1]
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), stream)
    twice = dataclasses.replace(twice, decoder=length + stream.positions)
    _, found = model.run(jnp.concatenate([x, x], axis=1), twice, return_memory=True, return_hidden=False)
    assert found is not None
    return jax.tree.map(lambda a: a[:, 0, :length].astype(jnp.float32), found)


def _packed(whole: Memory) -> Packed:
    """Returns keys and values in the form in which they are trained.

    For a base with one group "self" this is a single array [2, L, P, K, H] of keys, then values; otherwise, or if a key
    and a value differ in size, it is a dict of "keys" and "values" for each group.
    """
    pairs = {name: own for name, own in whole.items() if isinstance(own, KeysValues)}
    if list(pairs) == [SELF] and pairs[SELF].keys.shape == pairs[SELF].values.shape:
        return jnp.stack([pairs[SELF].keys, pairs[SELF].values])
    return {name: {"keys": own.keys, "values": own.values} for name, own in pairs.items()}


def _unpacked(packed: Packed) -> Memory:
    """The inverse of `_packed`."""
    if isinstance(packed, Mapping):
        return {name: KeysValues(**own) for name, own in packed.items()}
    return {SELF: KeysValues(packed[0], packed[1])}


def _deviation(whole: Memory) -> Float[Array, ""]:
    """Returns the standard deviation of all values."""
    values = [own.values for own in memory.keys_values(whole)]
    return (values[0] if len(values) == 1 else jnp.concatenate([own.ravel() for own in values])).std()


def _noise_like(key: Key[Array, ""], both: Float[Array, "*L P K H"]) -> Float[Array, "*L P K H"]:
    """Returns normal noise with the means and deviations over the positions."""
    noise = jax.random.normal(key, both.shape)
    return both.mean(-3, keepdims=True) + noise * both.std(-3, keepdims=True)


def _init_network(key: Key[Array, ""], hidden: int, free: Packed) -> dict[str, Any]:
    """Returns embeddings [P, K*H], and a network with an output kernel of 0, so that it adds nothing at the start.

    Its outputs are [L, 2, K, H] at each position for a single array, else [L, K, H] for each array.
    """
    length, heads, size = jax.tree.leaves(free)[0].shape[-3:]
    embedding_key, kernel_key = jax.random.split(key)
    return {
        "embedding": jax.random.normal(embedding_key, (length, heads * size)),
        "inner": {
            "kernel": jax.nn.initializers.lecun_normal()(kernel_key, (heads * size, hidden)),
            "bias": jnp.zeros(hidden),
        },
        "outer": {
            "kernel": jax.tree.map(lambda a: jnp.zeros((hidden, *_output_shape(a))), free),
            "bias": jax.tree.map(lambda a: jnp.zeros(_output_shape(a)), free),
        },
    }


def _output_shape(free: Float[Array, "*N P K H"]) -> tuple[int, ...]:
    return (*free.shape[-4::-1], *free.shape[-2:])


def _apply_network(network: Mapping[str, Any]) -> Packed:
    inner, outer = network["inner"], network["outer"]
    hidden = jnp.tanh(network["embedding"] @ inner["kernel"] + inner["bias"][None])

    def of_array(kernel: Array, bias: Array) -> Float[Array, "*N P K H"]:
        if kernel.ndim == 5:
            change, bias = jnp.einsum("pe,elbkh->blpkh", hidden, kernel), bias.swapaxes(0, 1)
        else:
            change = jnp.einsum("pe,elkh->lpkh", hidden, kernel)
        return change + bias[..., None, :, :]

    return jax.tree.map(of_array, outer["kernel"], outer["bias"])
