"""The frozen base: module, weights on their devices, tokenizer and identity."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spt_jax.bases.checkpoint import parameter_shapes, read_params
from spt_jax.bases.config import hf_config, model_config
from spt_jax.bases.encoder_decoders import check_options, completed
from spt_jax.bases.ends import declared_ends
from spt_jax.bases.files import CONFIG_BYTES, checkpoint_files, config_file, gguf_source, model_directory, read_json
from spt_jax.bases.fingerprint import Fingerprint, fingerprint_of
from spt_jax.bases.gguf import gguf_directory
from spt_jax.bases.gguf_parts import part_names
from spt_jax.bases.meshes import check_mesh, leaf_sharding
from spt_jax.bases.pooling import POOLING_FILE, stored_pooling
from spt_jax.bases.quantized_files import FileQuantization, file_quantization
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.bases.tokenizer import read_tokenizer as tokenizer_of
from spt_jax.errors import CheckpointError, ConfigError, SptError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.decoder import Decoder
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.encoder_decoder import EncoderDecoder
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.encoder_decoder_model import EncoderDecoderModel
from spt_jax.models.kernels import Kernel, KernelChoice, check_kernel, choose_kernel
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model, Params
from spt_jax.models.model_config import ModelConfig
from spt_jax.models.quantized import KERNEL_ARRAYS, quantizations
from spt_jax.models.stacks import Remat
from spt_jax.runtime import measure
from spt_jax.runtime.files import nearest_path
from spt_jax.runtime.remote import local_copy, url_of
from spt_jax.runtime.sharding import make_mesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# What is downloaded of a base.
FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    POOLING_FILE,
)
STARTER = Path(__file__).parents[1] / "assets" / "starter"


@dataclasses.dataclass(frozen=True)
class FrozenBase:
    """What `load_base` and `from_flax` return. Only `model` holds arrays; pass it to compiled functions as an argument.

    Attributes:
      name: the path or hub id that it was loaded from, or "starter"; the name given to `from_flax`.
      revision: the branch, tag or commit on the hub; None for the default or a local directory.
      model: architecture and weights.
      tokenizer: the fast tokenizer of transformers.
      end_ids: every id that the model's files declare to end an answer.
      fingerprint: what identifies the base in saved prompts.
      attention_note: why `load_base` chose the attention kernel; empty if the caller chose it.
      files_note: how the files hold the weights, and how they are kept; empty for plain files.
    """

    name: str
    revision: str | None
    model: Model
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    fingerprint: Fingerprint
    attention_note: str = ""
    files_note: str = ""

    def __repr__(self) -> str:
        devices = f"{self.mesh.size} x {self.mesh.devices.flat[0].platform}"
        sizes = f"{self.parameter_count:,} parameters, {self.dtype}, {devices}"
        return f"FrozenBase({self.name!r}, {self.family}, {sizes})"

    @property
    def family(self) -> str:
        """The family of the architecture, such as "llama"; "flax" for a base of `from_flax`."""
        return self.fingerprint.config["family"]

    @property
    def is_decoder(self) -> bool:
        """Whether the base is from `load_base`, with one side, which is this library's decoder."""
        return isinstance(self.model, DecoderModel)

    @property
    def decoder(self) -> DecoderModel:
        """The model with its architecture, of a base from `load_base`.

        Raises:
          ConfigError: the base is from `from_flax`, or an encoder-decoder.
        """
        if isinstance(self.model, EncoderDecoderModel):
            raise ConfigError(f"{self.name} is an encoder-decoder ({self.family}), which this does not support")
        if not isinstance(self.model, DecoderModel):
            raise ConfigError(
                f"{self.name} is a model given to from_flax, and this needs a base of load_base, whose layers are known"
            )
        return self.model

    @property
    def config(self) -> DecoderConfig:
        """Sizes and options of the architecture, of a base with a decoder; `layout` is for every base.

        Raises:
          ConfigError: the base is from `from_flax`, or an encoder-decoder.
        """
        return self.decoder.config

    @property
    def remat(self) -> Remat:
        """What the backward pass recomputes; "none" for a base from `from_flax`, whose functions decide it."""
        return self.model.module.remat if isinstance(self.model, DecoderModel | EncoderDecoderModel) else "none"

    def with_remat(self, remat: Remat | Literal["auto"]) -> "FrozenBase":
        """Returns the base with another rematerialization.

        Args:
          remat: what the backward pass recomputes. "auto" leaves the base as it is, as does any for one of `from_flax`.
        """
        if remat == "auto" or not isinstance(self.model, DecoderModel | EncoderDecoderModel):
            return self
        return dataclasses.replace(self, model=self.model.with_options(remat=remat))

    @property
    def attention(self) -> Kernel:
        """The attention kernel."""
        return self.decoder.module.attention if self.is_decoder else "xla"

    @property
    def layout(self) -> Layout:
        """What prompts, storage and serving depend on."""
        return self.model.layout

    @property
    def params(self) -> Params:
        """The frozen arrays."""
        return self.model.params

    @property
    def mesh(self) -> Mesh:
        """The mesh of the weights, which also splits the activations."""
        assert self.model.mesh is not None
        return self.model.mesh

    @property
    def dtype(self) -> jnp.dtype:
        """The precision that the base runs in."""
        return self.model.dtype

    @property
    def parameter_count(self) -> int:
        """The number of frozen parameters."""
        # The arrays of a quantized base are not its parameters.
        model = self.model
        own = isinstance(model, DecoderModel | EncoderDecoderModel)
        return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model.config) if own else self.params))


def default_dtype(device: Any) -> str:
    """float32 on CPU, bfloat16 on accelerators that compute in it, float16 on those that do not, such as a T4."""
    if device.platform == "cpu":
        return "float32"
    return "bfloat16" if measure.computes_in_bfloat16(device) else "float16"


def describe_base(base: FrozenBase) -> str:
    """Two lines that a run prints at its start: size, precision and devices; which attention, and why.

    A third says how the files hold the weights if they are quantized.
    """
    device = base.mesh.devices.flat[0]
    lacks = base.dtype == jnp.float16 and device.platform != "cpu" and not measure.computes_in_bfloat16(device)
    why = f" ({device.device_kind} does not compute in bfloat16)" if lacks else ""
    return (
        f"{base.name}: {base.parameter_count:,} frozen parameters in {base.dtype}{why} on {base.mesh.size} x"
        f" {measure.device_name(device)}\nattention: {base.attention}{base.attention_note}"
        + (f"\nfiles: {base.files_note}" if base.files_note else "")
    )


def load_base(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    max_length: int | None = None,
    remat: Remat = "dots",
    attention: KernelChoice = "auto",
    quantize: str | None = None,
) -> FrozenBase:
    """Loads a decoder or an encoder-decoder, its tokenizer and its identity; needs no torch.

    Args:
      path_or_hub_id: a directory in Hugging Face format, a URL of one, a hub id, a GGUF file (on the hub,
        "owner/name:file.gguf"), or "starter" for the model that ships here. Quantized weights are dequantized.
      revision: branch, tag or commit on the hub.
      dtype: "float32", "bfloat16" or "float16"; default float32 on CPU, bfloat16 on accelerators that compute in it,
        and float16 on those that do not, such as a T4.
      mesh: where the weights go; default one device.
      max_length: the longest sequence of the run, which fixes the frequencies of `dynamic` RoPE.
      remat: what the backward pass recomputes: "none", "dots" (everything except the results of linear maps) or "full"
        (whole layers: the least memory, about a third more work).
      attention: "xla" runs anywhere; "cudnn" (NVIDIA GPUs) and "splash" (TPUs) are fused; "auto" is the fused kernel
        of the device if it supports the model, otherwise "xla".
      quantize: how the matrices are stored, by a name of `spt_jax.models.quantized.KERNEL_ARRAYS`: "int8" or "fp8" with
        a scale per output channel, "int4" with a scale and an offset per 128 rows and channel, "nf4" with a scale per
        64 rows and channel; with each of these, embeddings and the output matrix are int8 with a scale per token.
        "keep": the matrices of a GGUF file or a quantized checkpoint as they are. All sums stay in `dtype`.

    On an accelerator, XLA's persistent compilation cache is turned on, unless its directory is already set.

    Returns:
      The base, with its weights on the devices of the mesh.

    Raises:
      ConfigError: unsupported architecture, option, dtype or mesh.
      CheckpointError: files missing or damaged; tensors missing, unknown, duplicate, misshapen or not finite.
    """
    measure.keep_compiled_programs()
    mesh = mesh or make_mesh()
    dtype = dtype or default_dtype(mesh.devices.flat[0])
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    directory = local_directory(str(path_or_hub_id), revision)
    config, tokenizer = read_config(directory, max_length), _read_tokenizer(directory)
    quantization = read_file_quantization(directory)
    if isinstance(config, EncoderDecoderConfig):
        check_options(config, mesh, attention, quantize)
        config = completed(config, directory, quantization)
        kernel, note = "xla", ""
    else:
        kernel, note = _kernel(attention, config, DTYPES[dtype], mesh)
    shapes = parameter_shapes(config)
    if quantize is not None and quantize not in quantizations():
        raise ConfigError(f"quantize {quantize!r} is not supported; known: {', '.join(quantizations())}")
    with ThreadPoolExecutor(1) as background:
        hashed = background.submit(tokenizer_hash, tokenizer)
        params, digest = read_params(
            directory,
            config,
            DTYPES[dtype],
            partial(leaf_sharding, mesh, shapes),
            quantize=None if quantize is None else KERNEL_ARRAYS.get(quantize, "keep"),
            quantization=quantization,
        )
    model: Model
    if isinstance(config, EncoderDecoderConfig):
        model = EncoderDecoderModel(params, EncoderDecoder(config, remat=remat, mesh=mesh))
    else:
        model = DecoderModel(params, Decoder(config, remat=remat, mesh=mesh, attention=kernel))
    return FrozenBase(
        name=str(path_or_hub_id),
        revision=revision,
        model=model,
        tokenizer=tokenizer,
        end_ids=declared_ends(directory, tokenizer, config.vocab_size),
        fingerprint=fingerprint_of(config, digest, hashed.result(), None if quantize == "keep" else quantize),
        attention_note=note,
        files_note="" if quantization is None else f"{quantization.how}; kept {_kept_as(quantize, dtype)}",
    )


def _kept_as(quantize: str | None, dtype: str) -> str:
    """Returns the end of the line of how a checkpoint's quantized weights are kept."""
    return "packed" if quantize == "keep" else f"in {quantize or dtype}"


def _kernel(attention: KernelChoice, config: DecoderConfig, dtype: Any, mesh: Mesh) -> tuple[Kernel, str]:
    """Checks the mesh, and returns the attention kernel of a decoder and why it was chosen."""
    check_mesh(mesh, config)
    if attention == "auto":
        return choose_kernel(config, dtype, mesh)
    check_kernel(attention, config, dtype, mesh)
    return attention, ""


def lasting_name(path_or_hub_id: str) -> str:
    """Returns the name of a base for a file: an absolute path instead of a relative one, otherwise the same name."""
    if path_or_hub_id == "starter" or url_of(path_or_hub_id):
        return path_or_hub_id
    path = Path(path_or_hub_id).expanduser()
    return str(path.resolve()) if path.exists() else path_or_hub_id


def _is_path(path_or_hub_id: str) -> bool:
    """Returns whether a base's name is a local path."""
    path = Path(path_or_hub_id).expanduser()
    if url_of(path_or_hub_id) or path_or_hub_id == "starter":
        return False
    if path.exists() or path_or_hub_id.startswith((".", "/", "~")):
        return True
    if path.suffix == ".gguf":
        return ":" not in path_or_hub_id
    return path_or_hub_id.count("/") > 1


def local_directory(path_or_hub_id: str, revision: str | None) -> Path:
    """The directory of a base's files: the given one, the starter's, one made of a GGUF file's metadata, or a download.

    Raises:
      ConfigError: the package for the scheme of a URL is not installed; the message names the extra.
      RemoteError: the file system of a URL cannot be reached, or has no such directory.
      CheckpointError: there is no such directory, it is a file, or the hub does not have it.
    """
    if path_or_hub_id == "starter":
        return STARTER
    url = url_of(path_or_hub_id)
    if url and not url.startswith("hf://"):
        if url.endswith(".gguf"):
            return gguf_directory(local_copy(url))
        return model_directory(local_copy(url, FILES))
    path = Path(path_or_hub_id).expanduser()
    if _is_path(path_or_hub_id):
        if path.suffix != ".gguf":
            return model_directory(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file{nearest_path(path)}")
        return gguf_directory(path)
    path_or_hub_id = url.removeprefix("hf://") if url else path_or_hub_id
    import huggingface_hub

    try:
        if path_or_hub_id.endswith(".gguf"):
            name, _, file = path_or_hub_id.rpartition(":")
            folder, _, own = file.rpartition("/")
            parts = [f"{folder}/{part}" if folder else part for part in part_names(own)]
            first, *_ = [huggingface_hub.hf_hub_download(name, part, revision=revision) for part in parts]
            return gguf_directory(Path(first))
        return Path(huggingface_hub.snapshot_download(path_or_hub_id, revision=revision, allow_patterns=list(FILES)))
    except SptError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path_or_hub_id!r} is not a directory here, and the hub did not return it"
            f" ({type(error).__name__}: {error}){nearest_path(path)}"
        ) from error


def check_base(path_or_hub_id: str, revision: str | None = None) -> None:
    """Checks that a local base exists, has files of weights and is of a supported architecture; reads no weights.

    Nothing is checked of a base on the hub or at a URL, which `load_base` downloads.

    Args:
      path_or_hub_id: as in `load_base`.
      revision: as in `load_base`.

    Raises:
      CheckpointError: a file is missing or unreadable.
      ConfigError: the architecture, or an option or size of it, is not supported.
    """
    if path_or_hub_id == "starter" or _is_path(path_or_hub_id):
        directory = local_directory(path_or_hub_id, revision)
        checkpoint_files(directory)
        read_config(directory)


def read_config(directory: Path, max_length: int | None = None) -> ModelConfig:
    """The model's shape from `config.json`; the pooling of an encoder also from a file of Sentence Transformers.

    Raises:
      CheckpointError: the file is missing or unreadable.
      ConfigError: the architecture, or an option or size of it, is not supported.
    """
    file = config_file(directory)
    with _naming(file):
        config = model_config(hf_config(read_json(file, CONFIG_BYTES)), max_length=max_length)
    if isinstance(config, EncoderDecoderConfig) or config.causal:
        return config
    pooling = stored_pooling(directory)
    return config if pooling is None else dataclasses.replace(config, pooling=pooling)


def read_file_quantization(directory: Path) -> FileQuantization | None:
    """How the files of a base are quantized, by `config.json`; None if they are not.

    Raises:
      CheckpointError: the file is missing or unreadable.
      ConfigError: the method, or an option of it, is not supported.
    """
    file = config_file(directory)
    with _naming(file):
        return file_quantization(read_json(file, CONFIG_BYTES).get("quantization_config"))


def read_tokenizer(path_or_hub_id: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a base, without its weights.

    Raises:
      CheckpointError: it is missing, damaged or not a fast one.
      ConfigError: the architecture is not supported.
    """
    return _read_tokenizer(local_directory(str(path_or_hub_id), revision))


def _read_tokenizer(directory: Path) -> Tokenizer:
    file = config_file(directory)
    with _naming(file):
        hf = hf_config(read_json(file, CONFIG_BYTES))
    return tokenizer_of(directory, hf)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong in it; of a file that was made of a GGUF file, that one's."""
    file = gguf_source(file.parent) or file
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises anything for fields of another type
        raise CheckpointError(f"{file}: {type(error).__name__}: {str(error)[:500]}") from error


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's own JSON, without the truncation and padding that callers set."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
