"""From prompts that exist to prompts for other tasks and bases."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase, embedding_table
from spt_jax.errors import ConfigError
from spt_jax.prompts.virtual import VirtualPrompt


def token_rows(virtual: VirtualPrompt) -> Float[Array, "P D"]:
    """The token rows of a prompt.

    Raises:
      ConfigError: it has none, or is more than them.
    """
    others = (virtual.shift, virtual.prefix, virtual.gated, virtual.head)
    if virtual.tokens is None or any(part is not None for part in others):
        raise ConfigError("this needs prompts of token rows alone")
    return virtual.tokens


def similarity(one: VirtualPrompt, other: VirtualPrompt) -> float:
    """Cosine of the mean token rows of two prompts of one base: SPoT's first measure of how near their tasks are.

    Vu et al. 2022 (arXiv 2110.07904): a prompt trained for a short while on the new task says which
    source to start from.
    """
    a, b = (np.asarray(token_rows(prompt), np.float64).mean(0) for prompt in (one, other))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def ranked_sources(target: VirtualPrompt, bank: Mapping[str, VirtualPrompt]) -> list[tuple[str, float]]:
    """The prompts of a bank by their similarity to the target's, highest first."""
    similarities = [(name, similarity(target, prompt)) for name, prompt in bank.items()]
    return sorted(similarities, key=lambda pair: -pair[1])


def average(prompts: Sequence[VirtualPrompt]) -> VirtualPrompt:
    """Mean token rows of prompts of one length.

    Raises:
      ConfigError: no prompts, or unequal shapes.
    """
    shapes = {token_rows(prompt).shape for prompt in prompts}
    if len(shapes) != 1:
        raise ConfigError(f"prompts to average have one shape; these have {sorted(shapes) or 'none'}")
    return VirtualPrompt(tokens=jnp.mean(jnp.stack([token_rows(prompt) for prompt in prompts]), axis=0))


def concatenate(prompts: Sequence[VirtualPrompt]) -> VirtualPrompt:
    """All token rows, one prompt's behind the other's.

    Raises:
      ConfigError: no prompts, or unequal widths.
    """
    widths = {token_rows(prompt).shape[1] for prompt in prompts}
    if len(widths) != 1:
        raise ConfigError(f"prompts to concatenate have one width; these have {sorted(widths) or 'none'}")
    return VirtualPrompt(tokens=jnp.concatenate([token_rows(prompt) for prompt in prompts]))


def recycle(virtual: VirtualPrompt, source: FrozenBase, target: FrozenBase, *, top_k: int = 5000) -> VirtualPrompt:
    """A prompt of one base as a start for another, through a linear map between their vocabularies.

    Lester et al. 2022 (arXiv 2208.05577), the linear vocabulary-to-vocabulary recycler: on the embeddings of the tokens
    that both tokenizers have, a matrix is fitted by least squares that takes one table to the other, and applied to the
    rows.

    Args:
      virtual: token rows of the source base.
      source, target: the two bases.
      top_k: fit on so many of the first shared ids, which are the most common; control tokens are left out.

    Raises:
      ConfigError: they share fewer tokens than the source's width, which would not determine the matrix.
    """
    rows = np.asarray(token_rows(virtual), np.float32)
    ours, theirs = (
        {token: id_ for token, id_ in base.tokenizer.get_vocab().items() if id_ < base.config.vocab_size}
        for base in (source, target)
    )
    common, control = sorted(ours.items(), key=lambda pair: pair[1]), set(source.tokenizer.all_special_tokens)
    shared = [(id_, theirs[token]) for token, id_ in common if token in theirs and token not in control][:top_k]
    if len(shared) < source.config.width:
        raise ConfigError(
            f"{source.name} and {target.name} share {len(shared)} tokens; a map of width {source.config.width} needs at"
            " least as many"
        )
    from_ids, to_ids = np.asarray(shared).T
    tables = map(embedding_table, (source, target))
    source_rows, target_rows = (table[ids] for table, ids in zip(tables, (from_ids, to_ids), strict=True))
    matrix = np.linalg.lstsq(source_rows, target_rows, rcond=None)[0]
    return VirtualPrompt(tokens=jnp.asarray(rows @ matrix))
