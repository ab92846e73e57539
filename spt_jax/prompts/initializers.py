"""Initializers for the rows of a soft prompt. `spt_jax.init` is this module.

Results depend on the initializer as much as on the method, so all common ones are provided.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.data.tokenization import check_ids, tokenization_of
from spt_jax.errors import ConfigError
from spt_jax.prompts.reading import read_npy
from spt_jax.runtime.remote import local_copy
from spt_jax.runtime.reprs import short_repr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initializer:
    """An initializer for P rows of width D. Create it with the functions of this module, or by its fields (CLI).

    Attributes:
      name: vocabulary (sampled tokens), normal (matched to the embedding table), uniform, text, labels, file (.npy) or
        prompt (a saved prompt).
      top_k: for vocabulary, sample from the first top_k ids, which are the most common (Lester et al. use 5,000).
      scale: for uniform, half the width of the interval around 0.
      text: for text, the text.
      labels: for labels, the class labels; default the verbalizers.
      path: for file and prompt, the path, a URL, or for prompt the hub id.
      rows: for array, the rows; only in Python.
    """

    name: Literal["vocabulary", "normal", "uniform", "text", "labels", "file", "prompt", "array"] = "vocabulary"
    top_k: int = 5000
    scale: float = 0.5
    text: str = ""
    labels: tuple[str, ...] = ()
    path: str = ""
    rows: Annotated[Any, tyro.conf.Suppress] = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if self.name == "text" and not self.text.strip():
            raise ConfigError("init.name=text needs init.text")
        if self.name in ("file", "prompt") and not self.path:
            raise ConfigError(f"init.name={self.name} needs init.path")
        if self.name == "array" and self.rows is None:
            raise ConfigError("init.name=array works only in Python, as spt_jax.init.array(rows); use init.name=file")
        if self.top_k < 1 or self.scale <= 0:
            raise ConfigError("init.top_k and init.scale must be positive")


def vocabulary(top_k: int = 5000) -> Initializer:
    """Embeddings of distinct tokens, sampled from the `top_k` most common without special tokens.

    Args:
      top_k: the number of most common tokens to sample from.

    Returns:
      The initializer.
    """
    return Initializer(name="vocabulary", top_k=top_k)


def normal() -> Initializer:
    """Normal, with the mean and standard deviation of each column of the embedding table.

    Returns:
      The initializer.
    """
    return Initializer(name="normal")


def uniform(scale: float = 0.5) -> Initializer:
    """Uniform in [-scale, scale] (Lester et al. use 0.5).

    Args:
      scale: half the width of the interval.

    Returns:
      The initializer.
    """
    return Initializer(name="uniform", scale=scale)


def text(string: str) -> Initializer:
    """Embeddings of the tokens of a text without special tokens, tiled or trimmed to P.

    Args:
      string: the text.

    Returns:
      The initializer.

    Raises:
      ConfigError: the text is empty.
    """
    return Initializer(name="text", text=string)


def labels(strings: Sequence[str]) -> Initializer:
    """The mean embedding of the tokens of each class label; further rows as by `vocabulary`.

    Args:
      strings: the class labels.

    Returns:
      The initializer.
    """
    return Initializer(name="labels", labels=tuple(strings))


def file(path: str | Path) -> Initializer:
    """A .npy file of shape [P, D], as written by google-research/prompt-tuning.

    Args:
      path: the file, or its URL.

    Returns:
      The initializer.
    """
    return Initializer(name="file", path=str(path))


def array(rows: Any) -> Initializer:
    """An array [P, D].

    Args:
      rows: the rows, of any float dtype.

    Returns:
      The initializer.
    """
    return Initializer(name="array", rows=rows)


def prompt(directory: str | Path) -> Initializer:
    """The virtual tokens of a saved prompt (a directory, URL or hub id) of the same frozen base and length.

    A task head starts at zeros in any case, since the classes may be others.

    Args:
      directory: where the prompt is.

    Returns:
      The initializer.
    """
    return Initializer(name="prompt", path=str(directory))


def initialize(init: Initializer, key: Key[Array, ""], base: FrozenBase, length: int) -> Float[Array, "P D"]:
    """Returns P = `length` rows, float32.

    Args:
      init: the initializer.
      key: a typed PRNG key.
      base: the frozen base.
      length: the number of rows.

    Returns:
      The rows, on the devices of the base.

    Raises:
      ConfigError: the initializer cannot provide `length` rows of this width.
      CheckpointError: its file cannot be read, or its prompt is for another base.
    """
    shape = (length, base.layout.width)
    table = base.model.embedding_table()
    match init.name:
        case "uniform":
            return jax.random.uniform(key, shape, jnp.float32, -init.scale, init.scale)
        case "normal":
            noise = np.asarray(jax.random.normal(key, shape, jnp.float32))
            return jnp.asarray(table.mean(0, keepdims=True) + noise * table.std(0, keepdims=True))
        case "vocabulary":
            return jnp.asarray(table[_sample_ids(key, base, init.top_k, length)])
        case "text":
            return jnp.asarray(table[np.resize(_text_ids(base, init.text), length)])
        case "labels":
            return jnp.asarray(_label_rows(init, key, base, table, length))
        case "array":
            return _checked(np.asarray(init.rows), shape, "the array")
        case "file":
            return _checked(read_npy(local_copy(init.path)), shape, init.path)
        case "prompt":
            from spt_jax.prompts.storage import load_prompt

            virtual = load_prompt(init.path, base).virtual
            if virtual.tokens is None or virtual.instance is not None:
                raise ConfigError(f"{init.path}: this prompt has no virtual tokens of its own to start from")
            return _checked(np.asarray(virtual.tokens), shape, init.path)


def _text_ids(base: FrozenBase, string: str) -> np.ndarray:
    ids = tokenization_of(base.tokenizer).continuation(string)
    check_ids(base.tokenizer, ids, base.layout.vocab_size)
    return np.asarray(ids)


def _sample_ids(key: Key[Array, ""], base: FrozenBase, top_k: int, count: int) -> np.ndarray:
    candidates = np.setdiff1d(
        np.arange(min(top_k, len(base.tokenizer), base.layout.vocab_size)), base.tokenizer.all_special_ids
    )
    if len(candidates) < count:
        raise ConfigError(f"init.top_k={top_k} leaves {len(candidates)} tokens to sample {count} distinct ones from")
    return np.asarray(jax.random.choice(key, candidates, (count,), replace=False))


def _label_rows(init: Initializer, key: Key[Array, ""], base: FrozenBase, table: np.ndarray, length: int) -> np.ndarray:
    if not init.labels:
        raise ConfigError("init.name=labels needs init.labels, or data.verbalizers as the default")
    means = [table[_text_ids(base, label)].mean(0) for label in init.labels[:length]]
    missing = length - len(means)
    return np.concatenate([np.stack(means), table[_sample_ids(key, base, init.top_k, missing)]])


def _checked(rows: np.ndarray, shape: tuple[int, int], origin: str) -> Float[Array, "P D"]:
    if rows.shape != shape:
        raise ConfigError(f"{origin} has shape {rows.shape}; the prompt needs {shape} (virtual tokens, width)")
    if rows.dtype.kind != "f":
        raise ConfigError(f"{origin} holds {rows.dtype}; the prompt needs floating-point numbers")
    with np.errstate(over="ignore"):
        values = np.asarray(rows, np.float32)
    if not np.isfinite(values).all():
        raise ConfigError(f"{origin} must hold finite float32 numbers")
    return jnp.asarray(values)
