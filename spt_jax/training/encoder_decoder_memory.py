"""Estimates the memory of a training step of an encoder-decoder by formula."""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from spt_jax.models import memory
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.encoder_decoder import encoder_decoder_layout
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.encoder_decoder_model import EncoderDecoderModel
from spt_jax.models.model import Model, Params
from spt_jax.models.stacks import Remat
from spt_jax.runtime.sharding import row_shards
from spt_jax.training.cost import StepMemory, StepShape, outputs_of, step_memory, weight_and_logit_bytes

# How many arrays of the size of the MLP's hidden layer are kept for the backward pass of an activation function: for
# relu only which numbers are positive. Measured with XLA on CPU, as are the factors below.
_KEPT_BY_ACTIVATION = {"relu": 0.25, "relu2": 1.25, "silu": 2.0, "gelu": 3.75, "gelu_tanh": 5.0}


def step_memory_of(model: Model) -> Callable[..., StepMemory] | None:
    """Returns the function that estimates the memory of a model's step; None for a model whose layers are not known.

    Args:
      model: the model.

    Returns:
      `step_memory` or `encoder_decoder_memory`, with the config as its first argument.
    """
    if isinstance(model, DecoderModel):
        return functools.partial(step_memory, model.config)
    if isinstance(model, EncoderDecoderModel):
        return functools.partial(encoder_decoder_memory, model.config)
    return None


def encoder_decoder_memory(
    config: EncoderDecoderConfig,
    shape: StepShape,
    *,
    remat: Remat,
    itemsize: int,
    mesh: Mesh,
    microbatches: int = 1,
    quantize: str | None = None,
    params: Params | None = None,
) -> StepMemory:
    """Estimates the peak memory of a step of an encoder-decoder, as `step_memory` does for a decoder.

    The encoder runs on all tokens of the rows, those of the decoder among them, whose results are not used.

    Args:
      config: the base's config.
      shape: the sizes of the whole batch.
      remat: what the backward pass recomputes.
      itemsize: bytes per number in the base's dtype.
      mesh: the mesh of the base.
      microbatches: the number of parts that a batch is split into.
      quantize: the representation of the kernels, by its name in `KERNEL_ARRAYS`; None for floats.
      params: the parameters of the base, if it is loaded: what they take is counted, whatever `quantize` says.
    """
    tensor = mesh.shape["tensor"]
    queries = config.heads * config.head_size
    pairs = 2 * (config.kv_heads or config.heads) * config.head_size
    attention = config.width * (2 * queries + pairs)
    mlp = (3 if config.gated_mlp else 2) * config.width * config.mlp_width
    largest_layer = attention + mlp if config.merged else 2 * attention + mlp
    weights, logits = weight_and_logit_bytes(
        config, shape, largest_layer, itemsize, mesh, microbatches, quantize, params
    )
    rows = math.ceil(shape.rows / (row_shards(mesh) * microbatches))
    encoder, decoder = rows * shape.length, rows * shape.decoder
    scores = _score_bytes(config, rows, shape, tensor)
    kept = _kept_bytes(config, remat, encoder, decoder, scores, itemsize, tensor)
    hidden = itemsize * (encoder + decoder) * config.mlp_width / tensor
    # The backward pass of a layer has a slice of its weights, and holds most in its attention or in its MLP.
    in_mlp = _hidden_layers(config, remat) * hidden + logits
    in_attention = 4 * scores[0] + 3 * (scores[1] + scores[2])
    layer = itemsize * largest_layer / tensor + max(in_attention, in_mlp)
    groups = encoder_decoder_layout(config).attention_groups
    prefix = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(memory.spec(groups, shape.prefix)))
    return StepMemory(
        weights=weights,
        kept=math.ceil(kept),
        layer=math.ceil(layer),
        logits=3 * itemsize * outputs_of(shape, mesh, microbatches) * config.width,
        prefix=3 * 4 * shape.prompts * prefix // tensor,
    )


def _hidden_layers(config: EncoderDecoderConfig, remat: Remat) -> float:
    """Returns how many arrays of the size of an MLP's hidden layer its backward pass has, beside the kept ones."""
    if config.activation == "relu":
        return 2.5 if config.gated_mlp else 2.0
    if remat == "full":
        return 4.5 if config.gated_mlp else 5.5
    return 3.0 if config.gated_mlp else 2.5


def _score_bytes(config: EncoderDecoderConfig, rows: int, shape: StepShape, tensor: int) -> tuple[float, float, float]:
    """Returns the bytes of the float32 scores of the encoder, of the decoder's self- and of cross-attention."""
    encoder, decoder, prefix = shape.length, shape.decoder, shape.prefix
    each = 4 * rows * config.heads / tensor
    return (
        each * encoder * (encoder + prefix),
        each * decoder * (decoder + prefix),
        each * decoder * (encoder + prefix),
    )


def _kept_bytes(
    config: EncoderDecoderConfig,
    remat: Remat,
    encoder: int,
    decoder: int,
    scores: tuple[float, float, float],
    itemsize: int,
    tensor: int,
) -> float:
    """Returns the bytes that all layers save for the backward pass.

    Those are the inputs of layers, and what is not rematerialized of the outputs of linear maps: queries, keys and
    values, of which cross-attention has those of the encoder's tokens, outputs of attention, and hidden layers of MLPs.
    Of the output of an MLP, only a norm after it needs the numbers.
    """
    width, sides = config.width, ((encoder, config.encoder_layers), (decoder, config.decoder_layers))
    if remat == "full":
        return float(itemsize) * width * sum(tokens * layers for tokens, layers in sides)
    pairs = 2 * (config.kv_heads or config.heads) * config.head_size / tensor
    queries = config.heads * config.head_size / tensor
    hidden = (2 if config.gated_mlp else 1) * config.mlp_width / tensor
    kept_scores = 0.0
    if remat == "none":
        hidden = (_KEPT_BY_ACTIVATION[config.activation] + (2 if config.gated_mlp else 0)) * config.mlp_width / tensor
        kept_scores = 1.15 * (config.encoder_layers * scores[0] + config.decoder_layers * (scores[1] + scores[2]))
    # Norms keep their inputs, where these are not rematerialized.
    norms = 3 if remat == "none" else 0 if config.norm_place == "before" else 1
    each = (2 + norms) * width + queries + pairs + hidden
    crossed = 0 if config.merged else decoder * (width + queries)
    numbers = config.encoder_layers * encoder * each
    numbers += config.decoder_layers * (decoder * each + crossed + encoder * pairs)
    return itemsize * numbers + kept_scores
