"""A decoder or an encoder with its weights, as the rest of the library uses it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.models.attention import Cache, GatedPrefix, LinearMemory, Prefix, Stream
from spt_jax.models.config import DecoderConfig, layer_configs, periods
from spt_jax.models.decoder import Decoder, decoder_layout
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.latent_attention import LatentAttention
from spt_jax.models.layers import dense
from spt_jax.models.layout import Layout, only_layers
from spt_jax.models.linen_model import LinenModel, host_table
from spt_jax.models.memory import KeysValues, Memory
from spt_jax.models.model import Params, TargetScores
from spt_jax.models.output_matrix import target_scores
from spt_jax.models.quantized import KernelArray
from spt_jax.models.self_attention import ATTENTION, Attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderModel(LinenModel):
    """Implements `Model`.

    Attributes:
      params: the parameters of `module`.
      module: the architecture, its mesh, rematerialization and attention kernel.
    """

    params: Params
    module: Decoder = dataclasses.field(metadata={"static": True})

    @property
    def config(self) -> DecoderConfig:
        return self.module.config

    @property
    def layout(self) -> Layout:
        return decoder_layout(self.config)

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        return self._apply(ids, method=Decoder.embed)

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
    ) -> tuple[Float[Array, "B T _"] | None, Memory | None]:
        options = {"return_memory": return_memory, "return_hidden": return_hidden}
        return self._apply(x, stream, prefix, cache, gated, linear, edits, **options)

    def attention_weights(
        self, x: Float[Array, "B T D"], stream: Stream, prefix: Prefix | None
    ) -> Float[Array, "L B T S"]:
        return self._attention("weights", x, stream, prefix)

    def queries(self, x: Float[Array, "B T D"], stream: Stream, prefix: Prefix | None) -> Float[Array, "L B T N H"]:
        """Returns the queries (after RoPE) of each layer with attention, float32. Takes the args of `run`."""
        return self._attention("queries", x, stream, prefix)

    def _attention(self, name: str, x: Float[Array, "B T D"], stream: Stream, prefix: Prefix | None) -> Array:
        _, kept = self._apply(x, stream, prefix, mutable=[ATTENTION])
        places = self._places()
        layers = [i for i, config in enumerate(layer_configs(self.config)) if config.attends]
        return jnp.stack([kept[ATTENTION][places[i][0]][name][places[i][1]] for i in layers])

    def embedding_table(self) -> Float[np.ndarray, "V D"]:
        table, scale = host_table(self.params["embedding"]), self.config.embedding_scale
        return table * np.float32(scale) if scale else table

    def gated_memory(self, rows: Float[Array, "G P D"]) -> Memory:
        layout, places, configs = self.layout, self._places(), layer_configs(self.config)

        def of_layer(i: int, x: Float[Array, "P D"]) -> KeysValues:
            path, at = places[i]
            own = _at(self.params, f"{path}/attention", at)
            params = jax.tree.map(dense, own, is_leaf=lambda leaf: isinstance(leaf, KernelArray))
            kind: Any = Attention if configs[i].latent is None else LatentAttention
            return kind(configs[i], None, "xla").apply({"params": params}, x[None], method=kind.remembered)

        layers = layout.attention_layers[-rows.shape[0] :]
        by_layer = {i: jax.tree.map(lambda a: a[0], of_layer(i, x)) for i, x in zip(layers, rows, strict=True)}
        return {
            name: jax.tree.map(lambda *arrays: jnp.stack(arrays), *(by_layer[i] for i in group.layers))
            for name, group in only_layers(layout.attention_groups, layers).items()
        }

    def _places(self) -> dict[int, tuple[str, int]]:
        """Returns the path of the stack of each layer, and the layer's index along the leading axis."""
        stacks = [stack for period in periods(self.config) for stack in period.stacks]
        return {layer: (stack.path, at) for stack in stacks for at, layer in enumerate(stack.layers)}

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return self._apply(hidden, method=Decoder.logits)

    @jax.named_scope("logits")
    def scores(self, states: Float[Array, "B Q D"], at: Int[Array, "B M"], ids: Int[Array, "B M K"]) -> TargetScores:
        config = self.config
        states = self._apply(states, method=Decoder.before_output)
        if config.logit_scale is not None:
            states = states * jnp.asarray(config.logit_scale, states.dtype)
        options = {"cap": config.logit_cap, "bias": self._logit_bias()}
        return target_scores(states, at, ids, self.output_matrix, self._output_rows, **options)


def _at(tree: Mapping[str, Any], path: str, index: int) -> Any:
    """Returns what a nested mapping holds at a path, at an index of the leading axis of its arrays."""
    for key in path.split("/"):
        tree = tree[key]
    return jax.tree.map(lambda a: a[index], tree)
