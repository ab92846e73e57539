"""The identity of a base, by which a saved prompt recognizes it."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from spt_jax.errors import differing_fields
from spt_jax.models.config import DecoderConfig
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.model_config import ModelConfig

# How a fingerprint names its facts. A reader translates lower numbers and refuses higher ones.
FINGERPRINT_VERSION = 2
# The "family" in the fingerprints of models from `from_flax`, whose facts are their name and sizes.
FOREIGN = "flax"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What makes two bases the same function. Neither the dtype nor the path is part of it.

    Attributes:
      config: sizes and options by their names in the model's config. An option that is absent has its default, so that
        an option added to the library leaves earlier fingerprints valid; so the default of an option never changes.
      weights: SHA-256 of the tensors as stored, hexadecimal.
      tokenizer: SHA-256 of the tokenizer, hexadecimal.
      version: of the names in `config`. Version 0.1 of the library did not write it.
      quantize: the representation of the kernels, by its name in `KERNEL_ARRAYS`; None for floats, and in fingerprints
        that were written before this was recorded.
    """

    config: Mapping[str, Any]
    weights: str
    tokenizer: str
    version: int = 1
    quantize: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the fields for a file. `quantize` is left out if it is None: earlier versions do not know it."""
        fields = dataclasses.asdict(self)
        return fields if self.quantize else {name: value for name, value in fields.items() if name != "quantize"}

    def differences(self, other: "Fingerprint") -> list[str]:
        """Sentences that name each field that differs."""
        configs = [one.current.config for one in (self, other)]
        kind = self.kind
        if kind is other.kind:
            configs = configs if kind is None else [_facts(kind, config) for config in configs]
        else:
            # Each kind has options that mean nothing for the other.
            shared = set.intersection(*map(set, configs))
            configs = [{name: value for name, value in config.items() if name in shared} for config in configs]
        there, here = (
            {**config, "weights": one.weights[:16], "tokenizer": one.tokenizer[:16], "quantize": one.quantize}
            for config, one in zip(configs, (self, other), strict=True)
        )
        return [f"{name} is {value!r} here, {old!r} there" for name, old, value in differing_fields(there, here)]

    @property
    def is_foreign(self) -> bool:
        """Whether the base is a model from `from_flax`."""
        return self.config.get("family") == FOREIGN

    @property
    def kind(self) -> type[DecoderConfig] | type[EncoderDecoderConfig] | None:
        """The class of the config whose facts these are; None for a model from `from_flax`."""
        if self.is_foreign:
            return None
        return EncoderDecoderConfig if "encoder_layers" in self.config else DecoderConfig

    @property
    def current(self) -> "Fingerprint":
        """The same facts by their names in the current version."""
        if self.version == FINGERPRINT_VERSION:
            return self
        config = dict(self.config)
        if config.get("norm") == "rms_around":
            config |= {"norm": "rms", "norm_place": "around", "norm_offset": 1.0}
        if isinstance(config.get("qk_norm"), bool):
            config["qk_norm"] = "head" if config["qk_norm"] else "none"
        return dataclasses.replace(self, config=config, version=FINGERPRINT_VERSION)


def fingerprint_of(config: ModelConfig, weights: str, tokenizer: str, quantize: str | None = None) -> Fingerprint:
    """Returns the identity of a base, from its config, hashes of its weights and tokenizer, and its quantization."""
    facts = json.loads(json.dumps(dataclasses.asdict(config)))
    return Fingerprint(facts, weights, tokenizer, FINGERPRINT_VERSION, quantize)


def accepting_floats(trained: Fingerprint, base: Fingerprint) -> Fingerprint:
    """Returns the fingerprint of a prompt as a base compares it.

    A prompt that was trained on float kernels, or before quantization was recorded, can be used on quantized ones of
    the same base; one that was trained on quantized kernels is for those only.

    Args:
      trained: that of the base that the prompt was trained on.
      base: that of the base that it is used with.
    """
    return dataclasses.replace(trained, quantize=base.quantize) if trained.quantize is None else trained


def quantization_note(trained: Fingerprint, base: Fingerprint) -> str | None:
    """Returns a note if a prompt that was not trained on quantized kernels is used on some, given both fingerprints."""
    if base.quantize is None or trained.quantize is not None:
        return None
    return f"trained on a base that is not recorded as quantized, and used with {base.quantize} kernels"


def _facts(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config as JSON values, those that are absent at their defaults, also in configs inside it."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    facts = json.loads(json.dumps({**defaults, **fields}))
    hints = typing.get_type_hints(kind)
    return {name: _value(hints.get(name), value) for name, value in facts.items()}


def _value(hint: Any, value: Any) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [option for option in options if dataclasses.is_dataclass(option)]
        return _value(kinds[0], value) if kinds else value
    if origin is tuple and isinstance(value, list):
        return [_value(options[0], item) for item in value]
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _facts(typing.cast(type, hint), value)
    return value
