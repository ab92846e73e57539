"""Transfer of trained prompts to other tasks and bases."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.prompts.virtual import VirtualPrompt, parts_of


def token_rows(virtual: VirtualPrompt) -> Float[Array, "P D"]:
    """Returns the token rows of a prompt.

    Args:
      virtual: the prompt.

    Returns:
      The rows.

    Raises:
      ConfigError: it has none, or has other parts too.
    """
    if virtual.tokens is None or parts_of(virtual) != ["tokens"]:
        raise ConfigError("this needs prompts that have only token rows")
    return virtual.tokens


def similarity(one: VirtualPrompt, other: VirtualPrompt) -> float:
    """Returns the cosine of the mean token rows of two prompts of one base, as a measure of task similarity.

    This is the first measure of SPoT (Vu et al. 2022, arXiv 2110.07904): compare a prompt that was trained briefly on
    the new task with source prompts, and start from the most similar one.

    Args:
      one: a prompt of token rows.
      other: another one, of any length.

    Returns:
      The cosine, in [-1, 1].

    Raises:
      ConfigError: as in `token_rows`.
    """
    a, b = (np.asarray(token_rows(prompt), np.float64).mean(0) for prompt in (one, other))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def ranked_sources(target: VirtualPrompt, bank: Mapping[str, VirtualPrompt]) -> list[tuple[str, float]]:
    """Returns the prompts of a bank with their similarity to the target, highest first.

    Args:
      target: a prompt of the new task.
      bank: prompts of the same base, by name.

    Returns:
      The names and similarities.

    Raises:
      ConfigError: as in `token_rows`.
    """
    similarities = [(name, similarity(target, prompt)) for name, prompt in bank.items()]
    return sorted(similarities, key=lambda pair: -pair[1])


def _common_pin(prompts: Sequence[VirtualPrompt]) -> bool:
    pins = {prompt.pinned for prompt in prompts}
    if len(pins) > 1:
        raise ConfigError("some of these prompts were trained with method.pin_prefix and others were not")
    return pins == {True}


def average(prompts: Sequence[VirtualPrompt]) -> VirtualPrompt:
    """Returns the mean token rows of prompts of equal length.

    Args:
      prompts: prompts of token rows of one base.

    Returns:
      A prompt of the same shape.

    Raises:
      ConfigError: there are no prompts, or their shapes or `pinned` differ.
    """
    shapes = {token_rows(prompt).shape for prompt in prompts}
    if len(shapes) != 1:
        raise ConfigError(f"prompts to average must have one shape; these have {sorted(shapes) or 'none'}")
    rows = jnp.mean(jnp.stack([token_rows(prompt) for prompt in prompts]), axis=0)
    return VirtualPrompt(tokens=rows, pinned=_common_pin(prompts))


def concatenate(prompts: Sequence[VirtualPrompt]) -> VirtualPrompt:
    """Concatenates the token rows of prompts.

    Args:
      prompts: prompts of token rows of one base.

    Returns:
      A prompt whose length is the sum of theirs.

    Raises:
      ConfigError: there are no prompts, or their widths or `pinned` differ.
    """
    widths = {token_rows(prompt).shape[1] for prompt in prompts}
    if len(widths) != 1:
        raise ConfigError(f"prompts to concatenate must have one width; these have {sorted(widths) or 'none'}")
    rows = jnp.concatenate([token_rows(prompt) for prompt in prompts])
    return VirtualPrompt(tokens=rows, pinned=_common_pin(prompts))


def recycle(virtual: VirtualPrompt, source: FrozenBase, target: FrozenBase, *, top_k: int = 5000) -> VirtualPrompt:
    """Maps a prompt of one base to another base, as a start for training there.

    This is the linear vocabulary-to-vocabulary recycler of Lester et al. 2022 (arXiv 2208.05577): a matrix is fitted by
    least squares to map the source embeddings of shared tokens to their target embeddings, and applied to the rows.

    Args:
      virtual: prompt of the source base; only token rows.
      source: the base of the prompt.
      target: the base to map it to.
      top_k: number of shared tokens to fit on: those with the smallest ids, which are the most common, without special
        tokens.

    Returns:
      The mapped token rows.

    Raises:
      ConfigError: the bases share fewer tokens than the source is wide, which does not determine the matrix.
    """
    rows = np.asarray(token_rows(virtual), np.float32)
    source_ids, target_ids = (
        {token: id_ for token, id_ in base.tokenizer.get_vocab().items() if id_ < base.layout.vocab_size}
        for base in (source, target)
    )
    by_id, special = sorted(source_ids.items(), key=lambda pair: pair[1]), set(source.tokenizer.all_special_tokens)
    shared = [(id_, target_ids[token]) for token, id_ in by_id if token in target_ids and token not in special][:top_k]
    if len(shared) < source.layout.width:
        raise ConfigError(
            f"{source.name} and {target.name} share {len(shared)} tokens; a map of width {source.layout.width} needs at"
            " least as many"
        )
    from_ids, to_ids = np.asarray(shared).T
    tables = (base.model.embedding_table() for base in (source, target))
    source_rows, target_rows = (table[ids] for table, ids in zip(tables, (from_ids, to_ids), strict=True))
    matrix = np.linalg.lstsq(source_rows, target_rows, rcond=None)[0]
    return VirtualPrompt(tokens=jnp.asarray(rows @ matrix), pinned=virtual.pinned)
