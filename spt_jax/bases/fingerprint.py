"""The identity of a base, by which a saved prompt recognizes it."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from spt_jax.errors import differing_fields
from spt_jax.models.config import DecoderConfig

# How a fingerprint names its facts. A reader translates lower numbers and refuses higher ones.
FINGERPRINT_VERSION = 2
# The "family" in the fingerprints of models from `from_flax`, whose facts are their name and sizes.
FOREIGN = "flax"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What makes two bases the same function. Neither precision nor path is part of it.

    Attributes:
      config: sizes and options by their names in `DecoderConfig`. An option that is absent has its default, so that an
        option added to the library leaves earlier fingerprints valid; the default of an option therefore never changes.
      weights: SHA-256 of the tensors as stored, hexadecimal.
      tokenizer: SHA-256 of the tokenizer, hexadecimal.
      version: of the names in `config`. Version 0.1 of the library did not write it.
    """

    config: Mapping[str, Any]
    weights: str
    tokenizer: str
    version: int = 1

    def differences(self, other: "Fingerprint") -> list[str]:
        """Sentences that name each field that differs."""
        configs = [one.current.config for one in (self, other)]
        if not self.is_foreign and not other.is_foreign:
            configs = [_facts(DecoderConfig, config) for config in configs]
        elif self.is_foreign != other.is_foreign:
            # A decoder has dozens of options that mean nothing for the other.
            shared = set.intersection(*map(set, configs))
            configs = [{name: value for name, value in config.items() if name in shared} for config in configs]
        there, here = (
            {**config, "weights": one.weights[:16], "tokenizer": one.tokenizer[:16]}
            for config, one in zip(configs, (self, other), strict=True)
        )
        return [f"{name} is {value!r} here, {old!r} there" for name, old, value in differing_fields(there, here)]

    @property
    def is_foreign(self) -> bool:
        """Whether the base is a model from `from_flax`."""
        return self.config.get("family") == FOREIGN

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


def fingerprint_of(config: DecoderConfig, weights: str, tokenizer: str) -> Fingerprint:
    """Returns the identity of a base, from its config and the hashes of its weights and tokenizer."""
    return Fingerprint(json.loads(json.dumps(dataclasses.asdict(config))), weights, tokenizer, FINGERPRINT_VERSION)


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
