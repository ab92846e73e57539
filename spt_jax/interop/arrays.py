"""Arrays: `.npy` files of google-research/prompt-tuning, and embeddings for requests to vLLM."""

import base64
import io
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import DECODER
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.inference.forward import embed_stream
from spt_jax.models.attention import Stream
from spt_jax.prompts import PromptTuning, VirtualPrompt
from spt_jax.prompts.reading import check_finite, read_npy
from spt_jax.prompts.storage import SavedPrompt
from spt_jax.prompts.virtual import parts_of
from spt_jax.runtime.files import write_bytes
from spt_jax.runtime.remote import local_copy


def import_npy(path: str | Path, base: FrozenBase) -> tuple[PromptTuning, VirtualPrompt]:
    """Reads a `.npy` file with a float array of shape [P, D].

    Args:
      path: the file, or its URL.
      base: the base that the rows were trained on.

    Returns:
      The method and the prompt, as `save_prompt` takes them.

    Raises:
      CheckpointError: it is another kind of file, its width is not the base's, or it has values that are not finite.
    """
    rows = read_npy(local_copy(path))
    width, most = base.layout.width, base.layout.max_positions
    if rows.ndim != 2 or rows.shape[1] != width or not 1 <= rows.shape[0] < most or rows.dtype.kind != "f":
        raise CheckpointError(
            f"{path}: {rows.dtype} {rows.shape}; a prompt for this base is float [P, {width}] with P below {most}"
        )
    with np.errstate(over="ignore"):
        values = np.asarray(rows, np.float32)
    check_finite(values, str(path))
    return PromptTuning(length=rows.shape[0]), VirtualPrompt(tokens=jnp.asarray(values))


def export_npy(path: str | Path, saved: SavedPrompt) -> Path:
    """Writes the token rows [P, D] in the format of google-research/prompt-tuning.

    Args:
      path: the file to write, or its URL.
      saved: the prompt.

    Returns:
      The path.

    Raises:
      ConfigError: the prompt has no token rows, other parts, or rows in the input of a decoder, after `<decoder>`.
      CheckpointError: the file cannot be written.
    """
    path, content = Path(path), io.BytesIO()
    np.save(content, _token_rows(saved), allow_pickle=False)
    try:
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def export_embeddings(saved: SavedPrompt, base: FrozenBase, record: dict[str, str]) -> str:
    """Returns the embeddings [T, D] of a complete request, for `prompt_embeds` of vLLM's completions API.

    Args:
      saved: a prompt of token rows, at any place in its template.
      base: its base.
      record: the fields of the template's prompt.

    Returns:
      A tensor in the format of `torch.save`, base64-encoded, as vLLM reads it.

    Raises:
      ConfigError: the prompt has no token rows, or other parts; the base also needs the ids of the tokens, or is not a
        decoder.
    """
    _token_rows(saved)
    if base.layout.encodes or not base.layout.generates:
        raise ConfigError(f"{base.name} is not a decoder; vLLM's completions API takes embeddings of decoders only")
    if base.config.per_layer is not None:
        raise ConfigError(f"{base.name} has embeddings by layer, which embeddings of its first layer cannot replace")
    encoder = encoder_for(base, saved.template)
    ids = jnp.asarray(encoder.prompt_ids(record))[None]
    stream = Stream(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], jnp.ones_like(ids), jnp.zeros_like(ids))
    embeddings = embed_stream(base.model, saved.virtual, ids, stream)[0]
    return base64.b64encode(torch_file(np.asarray(embeddings, np.float32))).decode()


def torch_file(array: Float[np.ndarray, "T D"]) -> bytes:
    """Returns a float32 matrix in the zip format of `torch.save`, which `torch.load(weights_only=True)` reads.

    The pickle in it is written opcode by opcode: it only calls torch's `_rebuild_tensor_v2` on a single storage.
    """
    rows, columns = array.shape

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(array.size) + b"tQ"
    size, stride = b"(" + integer(rows) + integer(columns) + b"t", b"(" + integer(columns) + integer(1) + b"t"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + integer(0) + size + stride + b"\x89" + hooks + b"t"
    pickle = b"\x80\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", np.ascontiguousarray(array, "<f4").tobytes())
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _token_rows(saved: SavedPrompt) -> Float[np.ndarray, "P D"]:
    virtual = saved.virtual
    if virtual.tokens is None or parts_of(virtual) != ["tokens"] or saved.template.new_tokens:
        name = saved.info["method"]["name"]
        raise ConfigError(f"a {name} prompt does not consist only of token rows, as this format requires")
    if DECODER in saved.template.prompt:
        raise ConfigError(f"the template has {DECODER}, and all rows of this format are in the encoder's input")
    if virtual.pinned:
        raise ConfigError("this prompt was trained with method.pin_prefix, which this format cannot express")
    return np.asarray(virtual.tokens)
