"""What a family of bases is: how its config and its tensors' names map to a `DecoderConfig` and our parameters."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig, Stack, periods
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig

OUTPUT_KEY = "lm_head.weight"
OUTPUT_BIAS_KEY = "lm_head.bias"
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """The indices from `start` up to `stop` along one axis of an array.

    Attributes:
      axis: the axis.
      start: the first index.
      stop: the index after the last.
    """

    axis: int
    start: int
    stop: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """Returns a view of this part.

        Args:
          array: the array.
        """
        return array[(slice(None),) * (self.axis % array.ndim) + (slice(self.start, self.stop),)]


@dataclasses.dataclass(frozen=True)
class Origin:
    """The stored tensor of a parameter, or of a part of one.

    A parameter with a leading layer axis has one tensor per layer, and one with a layer and an expert axis has one per
    layer and expert, if `{i}` and `{e}` occur in the key. A parameter that is joined from several tensors has several
    origins, each with a different `into`. A tensor that is split into several parameters is the origin of each of them,
    with a different `take`.

    Attributes:
      key: name of the tensor, with `{i}` for the layer and `{e}` for the expert.
      transpose: whether the last two axes are exchanged: Hugging Face's Linear stores [out, in], ours is [in, out].
      take: the part of the tensor that the parameter takes.
      view: the shape in which `take` sees the tensor, such as [heads, 3, size, width] for queries, keys and values
        that are interleaved by head; it needs `shape`.
      shape: the shape of the tensor; None if it follows from the parameters that it fills.
      into: the part of the parameter, of one layer and expert, that the tensor fills.
      layers: the layers, in the order of the layer axis; None for all layers of the model. Without `{i}` in the key,
        these layers share the tensor.
      experts: number of experts, if `{e}` is in the key.
    """

    key: str
    transpose: bool = False
    take: Part | None = None
    view: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    into: Part | None = None
    layers: tuple[int, ...] | None = None
    experts: int = 0

    def taken(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a view of the part of a stored tensor that the parameter takes.

        Args:
          tensor: the stored tensor.
        """
        viewed = tensor if self.view is None else tensor.reshape(self.view)
        return viewed if self.take is None else self.take.of(viewed)

    def filled(self, leaf: np.ndarray) -> np.ndarray:
        """Returns a view of the part of a parameter that the tensor fills, with its axes in their stored order.

        Args:
          leaf: the parameter.
        """
        part = leaf if self.into is None else self.into.of(leaf)
        return part.swapaxes(-1, -2) if self.transpose else part


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

        Returns:
          The config of the decoder.

        Raises:
          ConfigError: for an option that the decoder does not have.
        """
        ...

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        """Returns where each parameter of `Decoder(config)` is stored, by its path, such as "layers/mlp/up/kernel".

        `by_stack` gives the paths of layers that are not all of one kind.

        Args:
          config: the result of `config`.
        """
        ...

    def tiny(self) -> Mapping[str, Any]:
        """Fields of the transformers config of a model with about 30,000 parameters that uses every feature.

        Returns:
          The fields, by name.
        """
        ...


@runtime_checkable
class EncoderDecoderFamily(Protocol):
    """One architecture with an encoder and a decoder; see `Family`."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]

    def config(self, hf: Any, max_length: int | None) -> EncoderDecoderConfig:
        """Reads a transformers config object.

        Args:
          hf: the config, of this model type.
          max_length: the longest sequence of the run.

        Returns:
          The config.

        Raises:
          ConfigError: for an option that `EncoderDecoder` does not have.
        """
        ...

    def stored(self, config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
        """Returns the config with what only the tensors in the files tell.

        Args:
          config: the result of `config`.
          names: the names of all stored tensors.

        Returns:
          The config.

        Raises:
          ConfigError: the files hold a part that `EncoderDecoder` does not have.
        """
        ...

    def origins(self, config: EncoderDecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        """Returns where each parameter of `EncoderDecoder(config)` is stored, by its path.

        Args:
          config: the result of `config`.
        """
        ...

    def canonical(self, name: str, config: EncoderDecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None for a tensor that is left out on purpose.

        Args:
          name: the stored name.
          config: the result of `config`.
        """
        ...

    def tiny(self) -> Mapping[str, Any]:
        """Fields of the transformers config of a tiny model.

        Returns:
          The fields, by name.
        """
        ...


@runtime_checkable
class RenamedFamily(Protocol):
    """A family whose files have other names than its table, or tensors of parts that the decoder does not have."""

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None for a tensor that is left out on purpose."""
        ...


def with_prefix(name: str, prefix: str) -> str:
    """Returns the name of a tensor with the prefix, which checkpoints saved from `AutoModel` lack."""
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def without_layer(layer: int, name: str) -> str | None:
    """Returns the name of a tensor, or None if it is of this layer: one that predicts the token after the next."""
    return None if name.startswith(f"model.layers.{layer}.") else name


@runtime_checkable
class SeveralTables(Protocol):
    """A family whose files hold some parameters in other tensors than those of its table."""

    def alternatives(self, config: DecoderConfig) -> Iterable[Mapping[str, Origin | tuple[Origin, ...]]]:
        """Returns the tables of such files, as `Family.origins` does."""
        ...


def by_stack(
    config: DecoderConfig, of_layer: Callable[[DecoderConfig], Mapping[str, Origin | tuple[Origin, ...]]]
) -> dict[str, tuple[Origin, ...]]:
    """Returns where the parameters of all layers are stored.

    Args:
      config: of the decoder.
      of_layer: returns, for the config of one layer, where its parameters are stored, by their paths in the layer, such
        as "mlp/up/kernel".
    """

    def placed(origin: Origin, stack: Stack) -> Origin:
        return dataclasses.replace(origin, layers=stack.layers) if config.variants else origin

    table = {}
    for stack in (stack for period in periods(config) for stack in period.stacks):
        for path, origins in of_layer(stack.config).items():
            several = origins if isinstance(origins, tuple) else (origins,)
            table[f"{stack.path}/{path}"] = tuple(placed(origin, stack) for origin in several)
    return table


def projections(table: Iterable[tuple[str, str, bool]], layer: str) -> dict[str, Origin]:
    """Returns the origins of linear layers whose weights are stored as [out, in].

    Args:
      table: path in the layer, name of the module, and whether it has a bias.
      layer: what the names start with.
    """
    found = {}
    for ours, theirs, bias in table:
        found[f"{ours}/kernel"] = Origin(f"{layer}{theirs}.weight", transpose=True)
        if bias:
            found[f"{ours}/bias"] = Origin(f"{layer}{theirs}.bias")
    return found


def joined_projection(parts: Iterable[tuple[str, int]], module: str, bias: bool) -> dict[str, Origin]:
    """Returns the origins of linear layers whose weights are stored one after another in one of [out, in].

    Args:
      parts: path in the layer and output size of each, in their stored order.
      module: name of the module that holds them.
      bias: whether they have a bias.
    """
    found, start = {}, 0
    for ours, size in parts:
        part = Part(0, start, start + size)
        found[f"{ours}/kernel"] = Origin(f"{module}.weight", transpose=True, take=part)
        if bias:
            found[f"{ours}/bias"] = Origin(f"{module}.bias", take=part)
        start += size
    return found


def activation(name: str) -> Activation:
    """Our name of an activation function of transformers.

    Raises:
      ConfigError: the decoder does not have it.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
