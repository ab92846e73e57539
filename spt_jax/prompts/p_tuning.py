"""P-tuning: virtual tokens computed by a trained prompt encoder (Liu et al. 2021, arXiv 2103.10385)."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import TokenMethod
from spt_jax.prompts.networks import init_linear, init_lstm, linear, lstm
from spt_jax.prompts.task_head import HeadMethod
from spt_jax.prompts.virtual import VirtualPrompt

LSTM_LAYERS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(HeadMethod, TokenMethod):
    """Virtual tokens that a small network computes.

    The prompt has a head if the task has one.

    Attributes:
      name: the method.
      encoder: lstm is a two-layer bidirectional LSTM followed by two linear layers, as in the paper; mlp is three
        linear layers with ReLU. The encoder and its P input embeddings are trained, and dropped when the prompt is
        saved.
      hidden: width of the encoder; default the width of the base.
      init: rows that the outputs of the encoder match at the start, in their mean (set by its last bias) and standard
        deviation (set by its last kernel).
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.003, "schedule": "linear"}

    name: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int | None = None

    def __post_init__(self) -> None:
        TokenMethod.__post_init__(self)
        HeadMethod.__post_init__(self)
        if self.init.name in ("prompt", "file", "array"):
            raise ConfigError(
                f"method.init.name={self.init.name}: an encoder cannot start at given rows; continue from them"
                " with prompt_tuning"
            )
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"method.hidden is {self.hidden}; the encoder has at least 1 unit")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns embeddings [P, D], the layers of the encoder, and the head; float32.

        Raises:
          ConfigError: the number of classes is unknown.
        """
        row_key, embedding_key, *keys = jax.random.split(key, 9)
        width, hidden = base.layout.width, self.hidden or base.layout.width
        if self.encoder == "mlp":
            sizes = (width, hidden, hidden, width)
            params: dict[str, Any] = {}
        else:
            sizes = (2 * hidden, 2 * hidden, width)
            inputs = [width] + [2 * hidden] * (LSTM_LAYERS - 1)
            params = {
                f"lstm_{i}": {
                    "forward": init_lstm(keys[2 * i], size, hidden),
                    "backward": init_lstm(keys[2 * i + 1], size, hidden),
                }
                for i, size in enumerate(inputs)
            }
        for i, (inner, outer) in enumerate(itertools.pairwise(sizes)):
            params[f"linear_{i}"] = init_linear(keys[4 + i], inner, outer)
        params["embedding"] = jax.random.normal(embedding_key, (self.token_count, width))
        rows = initialize(self.init, row_key, base, self.token_count)
        last = params[f"linear_{len(sizes) - 2}"]
        scale = rows.std() / jnp.maximum(_encode(params).std(), 1e-6)
        last["kernel"] = last["kernel"] * scale
        last["bias"] = rows.mean(0) - _encode(params).mean(0)
        return {**params, **self.init_head(base)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the outputs of the encoder as virtual tokens, and the head."""
        del model
        return self.with_head(VirtualPrompt(tokens=_encode(params), pinned=self.pins), params)


def _encode(params: Mapping[str, Any]) -> Float[Array, "P D"]:
    x = params["embedding"]
    for i in range(LSTM_LAYERS):
        layer = params.get(f"lstm_{i}")
        if layer is not None:
            x = jnp.concatenate([lstm(layer["forward"], x), lstm(layer["backward"], x, reverse=True)], axis=-1)
    count = sum(name.startswith("linear_") for name in params)
    for i in range(count):
        x = linear(params[f"linear_{i}"], x if i == 0 else jax.nn.relu(x))
    return x
