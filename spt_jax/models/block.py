"""One layer of a decoder: attention and MLP with norms and residual connections."""

import functools
import operator

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from spt_jax.models.config import DecoderConfig
from spt_jax.models.convolution import TokenConvolution
from spt_jax.models.delta_net import GatedDeltaNet
from spt_jax.models.edits import edited
from spt_jax.models.experts import Experts
from spt_jax.models.kernels import Kernel
from spt_jax.models.latent_attention import LatentAttention
from spt_jax.models.layers import Mlp, Norm, scaled
from spt_jax.models.mamba import Mamba2
from spt_jax.models.memory import KeysValues, State
from spt_jax.models.per_layer import PerLayerInput
from spt_jax.models.self_attention import Attention, LayerInputs, SharedInputs, of_row, unless_last
from spt_jax.runtime.sharding import ROWS, constrain


class Block(nn.Module):
    """Attention and MLP, each with norms and a residual connection."""

    config: DecoderConfig
    mesh: Mesh | None
    kernel: Kernel

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs
    ) -> tuple[Float[Array, "B T D"], tuple[KeysValues | State, ...]]:
        config = self.config
        x = given = constrain(self.mesh, x, ROWS, "sequence")
        normed = self.norm("attention_norm", x, ("before", "around")) if config.attention_norm else x
        attended, own = self.mixed(normed, layer, shared)

        def mlp(module: nn.Module, x: Array) -> Array:
            if config.experts is not None:
                return self.scaled("mlp", Experts(config.experts, self.mesh, name="mlp")(x))
            return self.scaled("mlp", Mlp(config, name="mlp")(x))

        if config.parallel:
            of_mlp = normed if config.shared_norm else self.norm("mlp_norm", x, ("before", "around"))
            x = x + self.scaled("attention", attended) + unless_last(self, layer, mlp, of_mlp)
            return self.edited(self.layer_scaled(x), layer, shared), own

        x = self.norm("attention_sum_norm", x + self.scaled("attention", attended), ("sum",))

        def normed_mlp(module: nn.Module, x: Array) -> Array:
            normed = self.norm("mlp_norm", x, ("before", "around"))
            if config.experts is not None and config.experts_beside_mlp:
                dense = Norm(config, name="dense_out_norm")(Mlp(config, name="mlp")(normed))
                return self.scaled("mlp", dense + self.mixture(x))
            return mlp(module, normed)

        x = self.norm("mlp_sum_norm", x + unless_last(self, layer, normed_mlp, x), ("sum",))
        x = self.convolved(self.layer_scaled(self.with_per_layer(x, layer)), given, shared)
        return self.edited(x, layer, shared), own

    def mixed(
        self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs
    ) -> tuple[Float[Array, "B T D"], tuple[KeysValues | State, ...]]:
        """Returns the output of attention and of the recurrent part, and what they remember, in this order."""
        config, found = self.config, []
        if config.attends:
            kind = Attention if config.latent is None else LatentAttention
            found.append(kind(config, self.mesh, self.kernel, name="attention")(x, layer, shared))
        if config.recurrent is not None:
            state, order = layer.state, shared.order
            assert order is not None
            if state is None:
                state = State({name: jnp.zeros(shape) for name, shape in config.recurrent.state_shapes})
            if config.delta_net is not None:
                found.append(GatedDeltaNet(config.delta_net, name="delta_net")(x, order, state))
            if config.mamba is not None:
                found.append(Mamba2(config.mamba, name="mamba")(x, order, state))
        outputs, own = zip(*found, strict=True)
        return functools.reduce(operator.add, outputs), own if config.kv_source is None else ()

    def norm(self, name: str, x: Float[Array, "B T D"], places: tuple[str, ...]) -> Float[Array, "B T D"]:
        """Normalizes x if the config's norms are at one of these places."""
        return Norm(self.config, name=name)(x) if self.config.norm_place in places else x

    def scaled(self, part: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output of attention or MLP as it is added to the residual."""
        x = self.norm(f"{part}_out_norm", x, ("after", "around"))
        return scaled(x, self.config.residual_scale)

    def mixture(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output of the experts beside the MLP, whose router reads x as it is."""
        assert self.config.experts is not None
        normed = Norm(self.config, name="mixture_norm")(x)
        out = Experts(self.config.experts, self.mesh, name="mixture")(normed, x)
        return Norm(self.config, name="mixture_out_norm")(out)

    def with_per_layer(self, x: Float[Array, "B T D"], layer: LayerInputs) -> Float[Array, "B T D"]:
        """Adds what the layer computes from its own embeddings of the tokens, in families that have some."""
        y = layer.by_layer
        if y is None:
            return x

        def added(module: nn.Module, x: Array) -> Array:
            return x + PerLayerInput(self.config, name="per_layer")(x, y)

        return unless_last(self, layer, added, x)

    def convolved(
        self, x: Float[Array, "B T D"], given: Float[Array, "B T D"], shared: SharedInputs
    ) -> Float[Array, "B T D"]:
        """Adds the convolution of the layer's input to its output and normalizes the sum, in layers that have one."""
        own = self.config.convolution
        if own is None:
            return x
        convolved = TokenConvolution(own, name="convolution")(given, shared.stream.segments)
        return Norm(self.config, name="convolution_norm")(x + convolved)

    def edited(self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs) -> Float[Array, "B T D"]:
        """Edits the output of the layer as the prompt says."""
        edits = of_row(shared.stream.prompt_index, layer.edits)
        return x if edits is None else edited(x, edits)

    def layer_scaled(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Multiplies the output of a layer by its number, in families that have one."""
        if not self.config.layer_scale:
            return x
        scale = self.param("scale", nn.initializers.ones, (1,))
        return x * scale.astype(x.dtype).reshape(1, 1, 1)
