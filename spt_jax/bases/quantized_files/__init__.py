"""Checkpoints whose files hold quantized weights: one file per format, by the `quant_method` of config.json."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from spt_jax.bases.quantized_files.awq import Awq
from spt_jax.bases.quantized_files.bitsandbytes import BitsAndBytes
from spt_jax.bases.quantized_files.compressed_tensors import CompressedTensors
from spt_jax.bases.quantized_files.fp8 import Fp8
from spt_jax.bases.quantized_files.gptq import Gptq
from spt_jax.bases.quantized_files.mxfp4 import Mxfp4
from spt_jax.bases.quantized_files.stored import PackedWeight, StoredTensors
from spt_jax.errors import ConfigError

# Names of the field with the modules that are not quantized.
_PLAIN = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore")


@runtime_checkable
class FileFormat(Protocol):
    """How files of one `quant_method` store weights. To add one, write a class in a file here and register it.

    Attributes:
      quant_method: its name in config.json.
      suffixes: what the names of its tensors end with that no plain checkpoint has.
    """

    quant_method: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "FileFormat":
        """Reads a `quantization_config`.

        Args:
          fields: of it.

        Raises:
          ConfigError: for an option that is not supported.
        """
        ...

    def __str__(self) -> str:
        """Returns the format in words, for notes and errors."""
        ...

    def weights(self, stored: StoredTensors) -> dict[str, PackedWeight]:
        """Returns the quantized weights by their names in unquantized checkpoints.

        Args:
          stored: the tensors of the files; only small ones, such as indices, are read.

        Raises:
          CheckpointError: parts of a weight are missing, or their types, shapes or indices are wrong.
        """
        ...


FORMATS: Mapping[str, type[FileFormat]] = {
    kind.quant_method: kind for kind in (Awq, BitsAndBytes, CompressedTensors, Fp8, Gptq, Mxfp4)
}


@dataclasses.dataclass(frozen=True)
class FileQuantization:
    """What a `quantization_config` says.

    Attributes:
      how: the format.
      plain: names of modules, or ends of them, that are not quantized.
    """

    how: FileFormat
    plain: tuple[str, ...] = ()


def file_quantization(fields: object) -> FileQuantization | None:
    """Reads the `quantization_config` of a config.json.

    Args:
      fields: its value; None if there is none.

    Raises:
      ConfigError: the method or an option of it is not supported.
    """
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise ConfigError(f"'quantization_config' is {fields!r:.60}; it must be an object")
    method = fields.get("quant_method")
    if method is None and ("load_in_4bit" in fields or "load_in_8bit" in fields):
        method = BitsAndBytes.quant_method  # Older versions of transformers did not write it.
    if not isinstance(method, str) or method not in FORMATS:
        raise ConfigError(
            f"quantized checkpoints of the method {method!r:.60} are not supported; supported are"
            f" {', '.join(FORMATS)}. Use the model's unquantized checkpoint"
        )
    try:
        how = FORMATS[method].from_config(fields)
    except ConfigError as error:
        raise ConfigError(f"quantization_config ({method}): {error}") from error
    plain = next((fields[name] for name in _PLAIN if fields.get(name) is not None), [])
    if not isinstance(plain, list) or not all(isinstance(name, str) for name in plain):
        raise ConfigError(f"quantization_config ({method}): the modules to leave out must be a list of names")
    return FileQuantization(how, tuple(plain))


def methods_of(names: Iterable[str]) -> list[str]:
    """Returns the methods whose checkpoints have tensors of such names, those of the most of them first."""
    counts = {method: sum(name.endswith(kind.suffixes) for name in names) for method, kind in FORMATS.items()}
    return sorted((method for method, count in counts.items() if count), key=lambda method: -counts[method])
