"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from spt_jax.models.latent_config import LatentConfig
from spt_jax.models.layers import Linear, Norm, dense, kernel_param
from spt_jax.models.memory import KeysValues
from spt_jax.models.quantized import KernelArray
from spt_jax.models.rope import rotate
from spt_jax.models.self_attention import Attention, LayerInputs, SharedInputs


class Kernel(nn.Module):
    """The kernel [D, features] of a linear layer that is not applied to activations as it is stored."""

    features: int

    @nn.compact
    def __call__(self, rows: int) -> Array | KernelArray:
        return kernel_param(self, (rows, self.features))


class LatentAttention(Attention):
    """Attention whose keys and values are linear maps of one latent per token, which all heads share.

    The layer remembers a key [R + r], the normalized latent and the rotated part, and a value [R], the latent, both of
    one head. The maps from the latent to the keys are applied to the queries instead, and those to the values to the
    output of attention (the paper's "absorption"), so that nothing is computed per head and remembered token.
    """

    @property
    def latent(self) -> LatentConfig:
        assert self.config.latent is not None
        return self.config.latent

    @nn.compact
    def remembered(self, x: Float[Array, "B T D"]) -> KeysValues:
        """Returns latents, with the part of the key that RoPE rotates not yet rotated."""
        latent, plain = self.keys_values(x)
        return KeysValues(latent, plain)

    def keys_values(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 Hv"]]:
        compressed = self.normed("latent", Linear(self.latent.rank, self.config.qkv_bias, name="latent")(x))
        shared = Linear(self.latent.rotated_size, self.config.qkv_bias, name="rotated_key")(x)
        return jnp.concatenate([compressed, shared], axis=-1)[:, :, None], compressed[:, :, None]

    def placed_keys(
        self, keys: Float[Array, "B T 1 H"], layer: LayerInputs, shared: SharedInputs
    ) -> Float[Array, "B T 1 H"]:
        return self.rotated(keys, self.latent.rank, shared)

    def queries(self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs) -> Float[Array, "B T N H"]:
        config, latent = self.config, self.latent
        if latent.query_rank is not None:
            x = self.normed("query_latent", Linear(latent.query_rank, config.qkv_bias, name="query_latent")(x))
        size = latent.plain_size + latent.rotated_size
        queries = Linear(config.heads * size, name="query")(x).reshape(*x.shape[:2], config.heads, size)
        queries = self.rotated(queries, latent.plain_size, shared)
        up = self.kernel_of("key_up", latent.plain_size).astype(x.dtype)
        absorbed = jnp.einsum("btnh,rnh->btnr", queries[..., : latent.plain_size], up)
        return jnp.concatenate([absorbed, queries[..., latent.plain_size :]], axis=-1)

    def output(self, out: Float[Array, "B T N R"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config, up = self.config, self.kernel_of("value_up", self.latent.value_size).astype(out.dtype)
        values = jnp.einsum("btnr,rnv->btnv", out, up)
        return Linear(config.width, config.output_bias, name="output")(values.reshape(*values.shape[:2], -1))

    def rotated(self, x: Float[Array, "B T N H"], plain: int, shared: SharedInputs) -> Float[Array, "B T N H"]:
        """Rotates what follows the first `plain` numbers of each head."""
        rope = self.config.rope
        assert rope is not None and shared.cos_sin is not None
        turned = rotate(x[..., plain:], shared.cos_sin, interleaved=rope.interleaved)
        return jnp.concatenate([x[..., :plain], turned], axis=-1)

    def normed(self, name: str, x: Float[Array, "B T R"]) -> Float[Array, "B T R"]:
        """Normalizes a latent."""
        config = dataclasses.replace(self.config, norm_epsilon=self.latent.norm_epsilon)
        return Norm(config, name=f"{name}_norm")(x)

    def kernel_of(self, name: str, size: int) -> Float[Array, "R N H"]:
        """Returns the map from the latent to a part of each head."""
        kernel = Kernel(self.config.heads * size, name=name)(self.latent.rank)
        return dense(kernel).reshape(self.latent.rank, self.config.heads, size)
