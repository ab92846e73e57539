"""Prefix tuning: keys and values of every layer at P positions before the input (Li & Liang 2021, arXiv 2101.00190)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.attention import Stream
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import Initializer, initialize
from spt_jax.prompts.method import DEFAULT_LENGTH, Method, PromptParams
from spt_jax.prompts.virtual import KeysValues, VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """The hyper-parameters of prefix tuning.

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

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ConfigError(f"method.length is {self.length}; a prefix has at least 1 position")
        if self.hidden < 1:
            raise ConfigError(f"method.hidden is {self.hidden}; the network has at least 1 unit")
        if not 0 <= self.sink < self.prefix_length:
            raise ConfigError(
                f"method.sink is {self.sink}; it must be in 0 to {self.prefix_length - 1}: the others are trained"
            )

    @property
    def prefix_length(self) -> int:
        """Number of positions of the prefix, before the first token."""
        return self.length or DEFAULT_LENGTH

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns `free` keys and values with their `scale` and the `sink`, or `start` and the `network`; float32.

        Arrays of keys and values are [2, L, P, K, H]: keys, then values. `free` is in units of `scale`, the standard
        deviation of all values, so that a learning rate has the same effect for every base.
        """
        start_key, network_key = jax.random.split(key)
        start = self._start(start_key, base)
        fixed, free = start[:, :, : self.sink], start[:, :, self.sink :]
        if self.reparameterization == "flat":
            usual = start if self.start != "zero" else dataclasses.replace(self, start="tokens")._start(start_key, base)
            scale = usual[1].std()
            return {"free": free / scale, "scale": scale} | ({"sink": fixed} if self.sink else {})
        return {"start": start, "network": _init_network(network_key, self.hidden, free.shape)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns keys and values at every position; those of the network are added to the initial ones."""
        del model
        if self.reparameterization == "flat":
            parts = [params["sink"]] if self.sink else []
            both = jnp.concatenate([*parts, params["free"] * params["scale"]], axis=2)
        else:
            change = _apply_network(params["network"])
            both = params["start"].at[:, :, self.sink :].add(change)
        return VirtualPrompt(prefix=KeysValues(both[0], both[1]))

    def trainable(self, params: PromptParams) -> dict[str, Any]:
        """The sink, the scale and the initial keys and values of the network are not trained."""
        return {
            name: jax.tree.map(lambda _, name=name: name not in ("sink", "scale", "start"), part)
            for name, part in params.items()
        }

    def _start(self, key: Key[Array, ""], base: FrozenBase) -> Float[Array, "2 L P K H"]:
        config, length = base.config, self.prefix_length
        if self.start == "zero":
            return jnp.zeros((2, config.layers, length, config.kv_heads, config.head_size))
        saved = self._saved(base)
        if saved is not None:
            return saved
        row_key, noise_key = jax.random.split(key)
        rows = initialize(self.init, row_key, base, length)
        bos = base.tokenizer.bos_token_id
        if self.sink and bos is not None and self.start == "tokens":
            rows = rows.at[0].set(base.model.embed(jnp.asarray([bos]))[0].astype(jnp.float32))
        both = keys_and_values(base, rows)
        if self.start == "tokens":
            return both
        noise = jax.random.normal(noise_key, both.shape)
        return both.mean(2, keepdims=True) + noise * both.std(2, keepdims=True)

    def _saved(self, base: FrozenBase) -> Float[Array, "2 L P K H"] | None:
        """Returns keys and values of the saved prompt that `init` names, or None if it has no prefix."""
        if self.init.name != "prompt":
            return None
        from spt_jax.prompts.storage import load_prompt

        prefix = load_prompt(self.init.path, base).virtual.prefix
        if prefix is None:
            return None
        if prefix.keys.shape[1] != self.prefix_length:
            raise ConfigError(
                f"{self.init.path}: a prefix of {prefix.keys.shape[1]} positions; method.length is {self.prefix_length}"
            )
        return jnp.stack([prefix.keys, prefix.values])


@jax.jit
def _keys_and_values(model: Model, rows: Float[Array, "P D"]) -> Float[Array, "2 L P K H"]:
    positions = jnp.arange(rows.shape[0], dtype=jnp.int32)[None]
    stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
    x = rows[None].astype(model.dtype)
    _, both = model.run(x, stream, return_keys_values=True, return_hidden=False)
    return jnp.stack(both)[:, :, 0].astype(jnp.float32)


def keys_and_values(base: FrozenBase, rows: Float[Array, "P D"]) -> Float[Array, "2 L P K H"]:
    """Returns keys (after RoPE) and values of every layer for embeddings at the start of a sequence, float32."""
    return _keys_and_values(base.model, rows)


def _init_network(key: Key[Array, ""], hidden: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns embeddings [P, K*H], and a network with an output kernel of 0, so that it adds nothing at the start."""
    both, layers, length, heads, size = shape
    embedding_key, kernel_key = jax.random.split(key)
    return {
        "embedding": jax.random.normal(embedding_key, (length, heads * size)),
        "inner": {
            "kernel": jax.nn.initializers.lecun_normal()(kernel_key, (heads * size, hidden)),
            "bias": jnp.zeros(hidden),
        },
        "outer": {
            "kernel": jnp.zeros((hidden, layers, both, heads, size)),
            "bias": jnp.zeros((layers, both, heads, size)),
        },
    }


def _apply_network(network: Mapping[str, Any]) -> Float[Array, "2 L P K H"]:
    inner, outer = network["inner"], network["outer"]
    hidden = jnp.tanh(network["embedding"] @ inner["kernel"] + inner["bias"][None])
    change = jnp.einsum("pe,elbkh->blpkh", hidden, outer["kernel"])
    return change + outer["bias"].swapaxes(0, 1)[:, :, None]
