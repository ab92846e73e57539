"""An encoder-decoder with its weights, as the rest of the library uses it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.errors import ConfigError
from spt_jax.models.attention import Cache, GatedPrefix, LinearMemory, Prefix, Stream
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.encoder_decoder import EncoderDecoder, encoder_decoder_layout
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.layers import scaled
from spt_jax.models.layout import Layout
from spt_jax.models.linen_model import LinenModel, host_table
from spt_jax.models.memory import Memory
from spt_jax.models.model import Params, TargetScores
from spt_jax.models.output_matrix import target_scores
from spt_jax.runtime.sharding import to_host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel(LinenModel):
    """Implements `Model`. The rows' `Stream.decoder` tells which of their tokens the decoder reads.

    Attributes:
      params: the parameters of `module`.
      module: the architecture, its mesh and rematerialization.
    """

    params: Params
    module: EncoderDecoder = dataclasses.field(metadata={"static": True})

    @property
    def config(self) -> EncoderDecoderConfig:
        return self.module.config

    @property
    def layout(self) -> Layout:
        return encoder_decoder_layout(self.config)

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        return self._apply(ids, method=EncoderDecoder.embed)

    def run(
        self,
        x: Float[Array, "B T D"],
        stream: Stream,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        gated: GatedPrefix | None = None,
        linear: LinearMemory | None = None,
        edits: HiddenEdits | None = None,
        *,
        return_memory: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T D"] | None, Memory | None]:
        if linear is not None:
            raise ConfigError("an encoder-decoder has no maps outside the softmax; use another method")
        if edits is not None:
            raise ConfigError("an encoder-decoder has no edits of hidden states; use another method")
        options = {"return_memory": return_memory, "return_hidden": return_hidden}
        return self._apply(x, stream, prefix, cache, gated, **options)

    def attention_weights(
        self, x: Float[Array, "B T D"], stream: Stream, prefix: Prefix | None
    ) -> Float[Array, "L B T S"]:
        raise ConfigError("attention weights of an encoder-decoder are not supported")

    def embedding_table(self) -> Float[np.ndarray, "V D"]:
        table = host_table(self.params["embedding"]) * np.float32(self.config.embedding_scale or 1.0)
        if self.config.own_row_id is not None:
            table[self.config.own_row_id] = to_host(self.params["own_row"]).astype(np.float32)
        return table

    def gated_memory(self, rows: Float[Array, "G P D"]) -> Memory:
        raise ConfigError("an encoder-decoder has no gated keys and values; use another method")

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return self._apply(hidden, method=EncoderDecoder.logits)

    @jax.named_scope("logits")
    def scores(self, states: Float[Array, "B Q D"], at: Int[Array, "B M"], ids: Int[Array, "B M K"]) -> TargetScores:
        states = scaled(states, self.config.output_scale)
        options = {"cap": self.config.logit_cap, "bias": self._logit_bias()}
        return target_scores(states, at, ids, self.output_matrix, self._output_rows, **options)

    def _stored_output(self) -> tuple[Any, bool]:
        if self.config.tied and self.config.decoder_embedding:
            return self.params["decoder"]["embedding"], True
        return super()._stored_output()
