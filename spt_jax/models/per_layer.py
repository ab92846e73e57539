"""Embeddings by layer: each layer has an embedding of each token of its own (Gemma 4 E2B and E4B)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from spt_jax.models.config import DecoderConfig
from spt_jax.models.layers import ACTIVATIONS, Linear, Norm, table_param, take_rows


class PerLayerEmbedding(nn.Module):
    """The embeddings of tokens for all layers: from a table by id, and from the input of the first layer.

    Its parameters: `embedding` [V, L d], `projection/kernel` [D, L d] and `norm/scale` [d], for d
    `config.per_layer.width`.

    Attributes:
      config: of the decoder.
      mesh: the devices that the table is split over.
    """

    config: DecoderConfig
    mesh: Mesh | None

    @nn.compact
    @jax.named_scope("per_layer_embedding")
    def __call__(self, x: Float[Array, "B T D"], ids: Int[Array, "B T"]) -> Float[Array, "L B T d"]:
        config, sizes = self.config, self.config.per_layer
        assert sizes is not None
        shape = (*x.shape[:2], config.layers, sizes.width)
        columns = config.layers * sizes.width
        table = table_param(self, "embedding", (sizes.vocab_size, columns))
        rows = take_rows(self.mesh, table, jnp.where(ids < config.vocab_size, ids, sizes.virtual_id)).astype(x.dtype)
        projected = Linear(columns, name="projection")(x) * jnp.asarray(config.width**-0.5, x.dtype)
        projected = Norm(config, name="norm")(projected.reshape(shape))
        both = projected + rows.reshape(shape) * jnp.asarray(sizes.width**0.5, x.dtype)
        return jnp.moveaxis(both * jnp.asarray(2**-0.5, x.dtype), 2, 0)


class PerLayerInput(nn.Module):
    """norm(down(act(gate(x)) * y)) for the layer's embeddings y of the tokens."""

    config: DecoderConfig

    @nn.compact
    @jax.named_scope("per_layer")
    def __call__(self, x: Float[Array, "B T D"], y: Float[Array, "B T d"]) -> Float[Array, "B T D"]:
        config = self.config
        hidden = ACTIVATIONS[config.activation](Linear(y.shape[-1], name="gate")(x)) * y
        return Norm(config, name="norm")(Linear(config.width, name="down")(hidden))
