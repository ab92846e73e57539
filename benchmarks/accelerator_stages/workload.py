"""The measured workload: a model shape with random weights, the same in every framework, and texts of random ids.

Each weight is a hash of its index in its tensor, computed on the device in integers, so no checkpoint is written and
JAX and torch have the same bits.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

WEIGHT_DEVIATION = 0.02
PROMPT_DEVIATION = 0.3
FIRST_ID = 3  # ids below are control tokens
_STEP = np.float32(WEIGHT_DEVIATION * math.sqrt(12) / 2**16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A Llama shape, its precision, and the texts.

    Attributes:
      model: fields of transformers' LlamaConfig.
      dtype: of weights and activations.
      mean_length: average number of real tokens of a text; lengths are log-normal, like GSM8K's approximately.
      target_share: the share of a text's tokens that are predicted.
      prompt: virtual tokens of prompt tuning.
      prefix: positions of prefix tuning.
    """

    model: Mapping[str, Any]
    dtype: str
    mean_length: int = 210
    target_share: float = 0.55
    prompt: int = 200
    prefix: int = 50


LLAMA_3B = Workload(
    model={
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    dtype="bfloat16",
)
TINY = Workload(
    model={
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    dtype="float32",
    mean_length=12,
    prompt=6,
    prefix=4,
)


def workload(tiny: bool) -> Workload:
    return TINY if tiny else LLAMA_3B


def llama_config(of: Workload) -> Any:
    """Returns a transformers config object."""
    import transformers

    return transformers.LlamaConfig(**of.model, architectures=["LlamaForCausalLM"], dtype=of.dtype)


def tensor_seed(key: str) -> int:
    """Returns the seed of a tensor from its name in a checkpoint."""
    return zlib.crc32(key.encode())


def weight_values(places: Any, seed: Any, integer: Callable[[int], Any] = int) -> Any:
    """Returns the weights at flat indices of a tensor: integers, uniform in [0, 2^16).

    Args:
      places: flat indices; unsigned 32-bit integers, or 64-bit integers whose products wrap.
      seed: of the tensor.
      integer: creates a constant of the type of `places`.
    """
    mask, first, second = (integer(number) for number in (0xFFFFFFFF, 0x7FEB352D, 0x846CA68B))

    def mix(x: Any) -> Any:  # the integer hash "lowbias32", https://nullprogram.com/blog/2018/07/31/
        x = (x ^ (x >> 16)) * first & mask
        x = (x ^ (x >> 15)) * second & mask
        return x ^ (x >> 16)

    return mix(mix(places) ^ seed) >> 16


def random_base(of: Workload, *, remat: Any = "dots", attention: Any = "xla", tokenizer: Any = None) -> Any:
    """Returns a frozen base of the shape on the default device. A tiny tokenizer stands in for a missing one."""
    import json

    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    from spt_jax.bases.base import DTYPES, Fingerprint, FrozenBase, tokenizer_hash
    from spt_jax.bases.checkpoint import parameter_shapes
    from spt_jax.bases.config import decoder_config
    from spt_jax.bases.places import origins
    from spt_jax.models.decoder import Decoder
    from spt_jax.models.decoder_model import DecoderModel
    from spt_jax.models.kernels import check_kernel
    from spt_jax.runtime.sharding import make_mesh, replicated
    from spt_jax.testing import tiny_tokenizer

    config, mesh, dtype = decoder_config(llama_config(of)), make_mesh(), DTYPES[of.dtype]
    check_kernel(attention, config, dtype, mesh)
    shapes = traverse_util.flatten_dict(parameter_shapes(config))
    table = origins(config)

    def leaf(path: tuple[str, ...], shape: tuple[int, ...], first: Any) -> Any:
        (origin,) = table[path]
        assert origin.take is None
        if path[-1] == "scale":
            return jnp.ones(shape, dtype)
        layers = range(config.layers) if "{i}" in origin.key else [0]
        seeds = jnp.asarray([tensor_seed(origin.key.format(i=i)) for i in layers], jnp.uint32)
        rows, columns = shape[-2:]
        row, column = (jax.lax.broadcasted_iota(jnp.uint32, (rows, columns), axis) for axis in (0, 1))
        places = column * np.uint32(rows) + row if origin.transpose else row * np.uint32(columns) + column
        places = places + first
        numbers = weight_values(places[None], seeds[:, None, None], np.uint32).astype(jnp.int32) - 2**15
        return (numbers.astype(jnp.float32) * _STEP).astype(dtype).reshape(shape)

    def make(first: Any) -> Any:
        return traverse_util.unflatten_dict({path: leaf(path, own.shape, first) for path, own in shapes.items()})

    # The first index is an argument, so that XLA cannot fold the weights into constants at compile time.
    params = jax.block_until_ready(jax.jit(make, out_shardings=replicated(mesh))(np.uint32(0)))
    sizes = json.loads(json.dumps(dataclasses.asdict(config)))
    return FrozenBase(
        name="random",
        revision=None,
        model=DecoderModel(params, Decoder(config, remat=remat, mesh=mesh, attention=attention)),
        tokenizer=tokenizer or tiny_tokenizer(),
        end_ids=(),
        fingerprint=Fingerprint(sizes, "random", "" if tokenizer is None else tokenizer_hash(tokenizer)),
    )


def fill_torch_model(model: Any) -> None:
    """Fills a transformers model with the weights of `random_base` in place, on the device of its parameters."""
    import torch

    part = 2**24
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), part):
                stop = min(start + part, flat.numel())
                places = torch.arange(start, stop, dtype=torch.int64, device=flat.device)
                numbers = (weight_values(places, tensor_seed(name)) - 2**15).to(torch.float32)
                flat[start:stop] = (numbers * float(_STEP)).to(flat.dtype)


def prompt_rows(count: int, width: int) -> np.ndarray:
    """Returns the initial rows of a prompt, float32 [count, width]."""
    return np.float32(PROMPT_DEVIATION) * np.random.default_rng(7).standard_normal((count, width)).astype(np.float32)


def prefix_arrays(of: Workload, layers: int, heads: int, size: int) -> np.ndarray:
    """Returns initial keys and values, float32 [2, L, P, K, H]."""
    shape = (2, layers, of.prefix, heads, size)
    return np.float32(PROMPT_DEVIATION) * np.random.default_rng(8).standard_normal(shape).astype(np.float32)


def texts(of: Workload, count: int) -> list[np.ndarray]:
    """Returns texts of random ids. A longer list starts with the same texts."""
    random, spread = np.random.default_rng(0), 0.4
    vocabulary, mean = of.model["vocab_size"], math.log(of.mean_length) - spread**2 / 2
    found = []
    for _ in range(count):
        length = int(np.clip(round(random.lognormal(mean, spread)), 6, 3 * of.mean_length))
        found.append(random.integers(FIRST_ID, vocabulary, length).astype(np.int32))
    return found


def predicted(of: Workload, text: np.ndarray) -> np.ndarray:
    """Returns a mask of the predicted tokens of a text: its last ones."""
    return np.arange(len(text)) >= len(text) - round(of.target_share * len(text))


def examples(of: Workload, count: int, *, virtual: int) -> list[Any]:
    """Returns examples of the texts after `virtual` virtual tokens."""
    from spt_jax.data.examples import Example

    virtual_ids = of.model["vocab_size"] + np.arange(virtual, dtype=np.int32)
    return [
        Example(
            np.concatenate([virtual_ids, text]).astype(np.int32),
            np.concatenate([np.zeros(virtual, bool), predicted(of, text)]),
            (),
            0,
            index,
        )
        for index, text in enumerate(texts(of, count))
    ]


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Returns consecutive full batches; the remaining items are dropped."""
    return [items[start : start + size] for start in range(0, len(items) - size + 1, size)]
