"""Lowers a training step of given sizes without allocating arrays, to compile it ahead of time and count its work."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spt_jax.bases.checkpoint import parameter_shapes, quantizable
from spt_jax.data.batches import Batch, Rows
from spt_jax.models.attention import Stream
from spt_jax.models.config import DecoderConfig
from spt_jax.models.decoder import Decoder, decoder_layout
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.encoder_decoder import EncoderDecoder
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.encoder_decoder_model import EncoderDecoderModel
from spt_jax.models.kernels import Kernel
from spt_jax.models.model import Model, Params
from spt_jax.models.model_config import ModelConfig
from spt_jax.models.quantized import KERNEL_ARRAYS, KernelArray
from spt_jax.models.quantized.kernel_array import encoded_shapes
from spt_jax.models.stacks import Remat
from spt_jax.prompts import Method, PrefixTuning, PromptTuning, RepresentationFinetuning
from spt_jax.runtime.sharding import make_mesh, replicated, row_sharding, sharded_shapes
from spt_jax.training.cost import StepShape
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import TrainState, train_step

Shape = jax.ShapeDtypeStruct


def batch_shapes(shape: StepShape, mesh: Mesh) -> Batch:
    """Returns the shapes of a batch of one prompt with as many targets as outputs."""

    def array(width: int, dtype: Any = jnp.int32) -> Any:
        return Shape((shape.rows, width), dtype, sharding=row_sharding(mesh))

    tokens, outputs, examples = array(shape.length), array(shape.outputs), array(4)
    rows = Rows(
        ids=tokens,
        stream=Stream(tokens, tokens, tokens, decoder=array(shape.decoder) if shape.decoder else None),
        outputs=outputs,
        target_outputs=outputs,
        target_ids=outputs,
        target_weights=array(shape.outputs, jnp.float32),
        target_groups=outputs,
        labels=examples,
        example_weights=array(4, jnp.float32),
        examples=examples,
    )
    lead: Any = Shape((shape.lead,), jnp.int32, sharding=replicated(mesh))
    return Batch(lead, rows)


def lower_step(
    config: ModelConfig,
    shape: StepShape,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    attention: Kernel = "xla",
    microbatches: int = 1,
    compiler_options: Any = None,
    quantize: str | None = None,
) -> Any:
    """Lowers a step with Adam: prefix tuning if the shape has a prefix, ReFT if it has edits, else prompt tuning.

    The virtual tokens are the leading ids; without any, there is one, which may be in the rows.

    `quantize` is as for `load_base`.
    """
    mesh = mesh or make_mesh()
    method: Method = PromptTuning(length=shape.lead or 1)
    own: dict[str, Shape] = {"tokens": Shape((shape.lead or 1, config.width), jnp.float32)}
    if shape.prefix:
        assert isinstance(config, DecoderConfig)
        method = PrefixTuning(length=shape.prefix)
        free = Shape((2, config.layers, shape.prefix, config.kv_heads, config.head_size), jnp.float32)
        own = {"free": free, "scale": Shape((), jnp.float32)}
    if shape.edit_rank:
        assert isinstance(config, DecoderConfig)
        method = RepresentationFinetuning(rank=shape.edit_rank)
        spec = method.spec(decoder_layout(config)).edits
        assert spec is not None
        own = {"down": spec.down, "bias": spec.bias, "up": spec.up}
    optimizer = optax.adam(0.1)
    state = TrainState(Shape((), jnp.int32), own, jax.eval_shape(optimizer.init, own))  # type: ignore[arg-type]
    state = jax.tree.map(lambda leaf: Shape(leaf.shape, leaf.dtype, sharding=replicated(mesh)), state)
    step = jax.jit(
        train_step,
        static_argnames=("method", "objective", "optimizer", "microbatches"),
        donate_argnames="state",
        out_shardings=replicated(mesh),
        compiler_options=compiler_options,
    )
    params, batch = sharded_shapes(mesh, parameter_shapes(config), dtype), batch_shapes(shape, mesh)
    if quantize is not None:
        params = _quantized(params, KERNEL_ARRAYS[quantize])
    if isinstance(config, EncoderDecoderConfig):
        model: Model = EncoderDecoderModel(params, EncoderDecoder(config, remat=remat, mesh=mesh))
    else:
        model = DecoderModel(params, Decoder(config, remat=remat, mesh=mesh, attention=attention))
    return step.lower(method, CrossEntropy(), optimizer, model, state, batch, microbatches)


def _quantized(params: Params, kind: type[KernelArray]) -> Params:
    """Returns the shapes of the parameters with those kernels quantized that `load_base` quantizes."""

    def of_leaf(path: Any, leaf: Shape) -> Any:
        if not quantizable(tuple(key.key for key in path)):
            return leaf
        # A dataclass checks that its fields are arrays, so that shapes go in as leaves of its structure.
        shapes = encoded_shapes(kind, leaf.shape, leaf.sharding)
        arrays = {name: jnp.zeros((1,) * len(own.shape), own.dtype) for name, own in shapes.items()}
        return jax.tree.unflatten(jax.tree.structure(kind(**arrays)), list(shapes.values()))

    return jax.tree_util.tree_map_with_path(of_leaf, params)
