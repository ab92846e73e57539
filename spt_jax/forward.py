"""The pure functions between a soft prompt and the logits of a batch.

Each takes the frozen parameters as an argument. Bind them outside `jax.jit`, never by a closure inside it: an array
that is closed over becomes a literal of the compiled program.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.base import embed, logits, run_layers
from spt_jax.data.batches import Rows
from spt_jax.models.attention import Prefix, Stream
from spt_jax.models.decoder import Decoder
from spt_jax.models.hf import Params
from spt_jax.prompts.virtual import VirtualPrompt


def embed_stream(
    module: Decoder, frozen: Params, virtual: VirtualPrompt | None, ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Embeddings of a stream of real and virtual ids, in the base's dtype.

    Ids are masked before they index: out of range, `jnp.take` gives NaN and `[]` clamps in silence.
    """
    vocab_size = module.config.vocab_size
    is_virtual = ids >= vocab_size
    real = embed(module, frozen, jnp.where(is_virtual, 0, ids))
    if virtual is None:
        return real
    rows = jnp.take(virtual.tokens, jnp.where(is_virtual, ids - vocab_size, 0), axis=0)
    return jnp.where(is_virtual[..., None], rows.astype(real.dtype), real)


@jax.named_scope("prefix")
def encode_prefix(
    module: Decoder, frozen: Params, virtual: VirtualPrompt | None, lead_ids: Int[Array, " P"]
) -> Prefix | None:
    """Keys and values of the leading ids that all examples share, computed once; None where there are none."""
    if lead_ids.shape[0] == 0:
        return None
    positions = jnp.arange(lead_ids.shape[0], dtype=jnp.int32)
    own = jnp.ones_like(positions)[None]
    x = embed_stream(module, frozen, virtual, lead_ids[None])
    _, (keys, values) = run_layers(
        module, frozen, x, Stream(positions[None], own, jnp.zeros_like(own)), return_keys_values=True
    )
    return Prefix(keys[:, 0].astype(jnp.float32), values[:, 0].astype(jnp.float32), positions)


@jax.named_scope("rows")
def output_logits(
    module: Decoder, frozen: Params, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "B Q V"]:
    """Next-token logits, float32, at the output positions alone."""
    x = embed_stream(module, frozen, virtual, rows.ids)
    hidden, _ = run_layers(module, frozen, x, rows.stream, prefix)
    wanted = jnp.take_along_axis(hidden, rows.outputs[:, :, None], axis=1)
    return logits(module, frozen, wanted)


def target_log_probabilities(all_logits: Float[Array, "B Q V"], rows: Rows) -> Float[Array, "B M"]:
    """Log-probability of every target, 0 for padding."""
    at_output = jnp.take_along_axis(jax.nn.logsumexp(all_logits, axis=-1), rows.target_outputs, axis=1)
    batch = jnp.arange(rows.ids.shape[0])[:, None]
    chosen = all_logits[batch, rows.target_outputs, rows.target_ids]
    return jnp.where(rows.target_weights > 0, chosen - at_output, 0.0)


def group_scores(log_probabilities: Float[Array, "B M"], rows: Rows, choices: int) -> Float[Array, "B E C"]:
    """Summed log-probability of every scored sequence: C = `choices` of each example, 1 for a plain target."""
    examples = rows.labels.shape[1]

    def of_row(values: Float[Array, " M"], groups: Int[Array, " M"]) -> Float[Array, " G"]:
        return jax.ops.segment_sum(values, groups, num_segments=examples * choices)

    return jax.vmap(of_row)(log_probabilities, rows.target_groups).reshape(-1, examples, choices)
