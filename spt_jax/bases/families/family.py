"""What a family of bases is: how its config and its tensors' names map to a `DecoderConfig` and our parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig

OUTPUT_KEY = "lm_head.weight"
Activation = Literal["silu", "gelu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a leaf (of one layer, where `{i}` stands in the key) is stored in a checkpoint.

    Attributes:
      key: name of the tensor.
      transpose: Hugging Face's Linear stores [out, in], ours is [in, out].
      columns: start and end of our part of the last axis, in a tensor that several leaves share.
    """

    key: str
    transpose: bool = False
    columns: tuple[int, int] | None = None


@runtime_checkable
class Family(Protocol):
    """One architecture. To add one, write a class like `Llama` in a file here and register it in `families`.

    Attributes:
      model_type: `model_type` in `config.json`.
      architecture: name of transformers' causal language model.
      prefix: what the names of all tensors but the output matrix start with; files saved without the head lack it.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        """Reads a transformers config object.

        Args:
          hf: the config, of this model type.
          max_length: the longest sequence of the run; only `dynamic` RoPE depends on it.

        Raises:
          ConfigError: for an option that the decoder does not have.
        """
        ...

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        """Where each leaf of `Decoder(config)` is stored, by its path, such as "layers/mlp/up/kernel"."""
        ...

    def tiny(self) -> Mapping[str, Any]:
        """Fields of the transformers config of a model with about 30,000 parameters that uses every feature."""
        ...


def activation(name: str) -> Activation:
    """Our name of an activation function of transformers.

    Raises:
      ConfigError: the decoder does not have it.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
