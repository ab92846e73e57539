"""Describes saved prompts: method, nearest vocabulary tokens, drift from the start, similarity to other prompts."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError, SptError
from spt_jax.evaluation.attribution import Received
from spt_jax.evaluation.metrics import Difference
from spt_jax.models import memory
from spt_jax.models.model import Model
from spt_jax.prompts.storage import SavedPrompt
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.sharding import to_host


def nearest_tokens(
    rows: Float[np.ndarray, "P D"], table: Float[np.ndarray, "V D"], count: int
) -> list[list[tuple[int, float]]]:
    """Returns for each row the ids whose embeddings have the highest cosine with it, and these cosines."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    cosines = unit(rows) @ unit(table).T
    best = np.argsort(-cosines, axis=1)[:, :count]
    return [[(int(i), float(cosines[row, i])) for i in ids] for row, ids in enumerate(best)]


NEAREST = 5  # vocabulary entries per virtual token in the results of runs
VOCABULARY_PART = 8192  # tokens that are compared at once, which limits the memory needed


@jax.jit
def _cosines(model: Model, rows: Float[Array, "P D"], ids: Int[Array, " N"]) -> Float[Array, "P N"]:
    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return unit(rows) @ unit(model.embed(ids[None])[0]).T


def nearest_words(base: FrozenBase, virtual: VirtualPrompt, count: int) -> list[list[tuple[str, float]]]:
    """Returns for each virtual token the vocabulary entries with the highest cosines, and these cosines.

    The vocabulary is compared in parts, on the devices. In a run of several processes, all of them must call this.

    Args:
      base: the frozen base.
      virtual: the prompt.
      count: how many entries to return for each row.

    Returns:
      An empty list if the prompt has no virtual tokens, or those of several tasks.
    """
    if virtual.tokens is None or virtual.tokens.ndim != 2:
        return []
    size = min(len(base.tokenizer), base.layout.vocab_size)
    parts = []
    for first in range(0, size, VOCABULARY_PART):
        ids = np.minimum(np.arange(first, first + VOCABULARY_PART), size - 1)
        parts.append(to_host(_cosines(base.model, virtual.tokens, ids))[:, : size - first])
    cosines = np.concatenate(parts, axis=1)
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return [
        [(base.tokenizer.convert_ids_to_tokens(int(i)), float(cosines[row, i])) for i in ids]
        for row, ids in enumerate(best)
    ]


def _parts(virtual: VirtualPrompt) -> str:
    tokens, shift, prefix, gated, head = virtual.tokens, virtual.shift, virtual.prefix, virtual.gated, virtual.head
    parts = []
    if tokens is not None:
        parts.append(f"{tokens.shape[0]} virtual tokens of width {tokens.shape[1]}")
    if shift is not None:
        norm = float(np.linalg.norm(np.asarray(shift), axis=1).mean())
        parts.append(f"an update of the real tokens' embeddings at the first {len(shift)} positions, norm {norm:.3g}")
    if virtual.replaced is not None:
        parts.append(f"input embeddings of {len(virtual.replaced.rows)} tokens of the vocabulary")
    if prefix is not None:
        layers = sum(len(own.keys) for own in memory.keys_values(prefix.memory))
        recurrent = sum(len(jax.tree.leaves(own)[0]) for own in memory.states(prefix.memory))
        if layers:
            parts.append(f"keys and values of {layers} layers at {virtual.prefix_length} positions")
        if recurrent:
            parts.append(f"initial states of {recurrent} recurrent layers")
    if gated is not None:
        length = memory.length(gated.memory)
        parts.append(f"{length} gated keys and values in the last {len(gated.gates)} layers")
    if virtual.linear is not None:
        maps = virtual.linear.maps.values()
        norm = np.sqrt(sum(float(np.square(np.asarray(own, np.float64)).sum()) for own in maps))
        parts.append(f"maps of the queries of {sum(map(len, maps))} layers, norm {norm:.3g}")
    if virtual.edits is not None:
        layers, _, rank = virtual.edits.down.shape
        parts.append(f"edits of rank {rank} of the hidden states after {layers} layers")
    if virtual.instance is not None:
        hidden = virtual.instance.rows["inner"]["bias"].shape[0]
        parts.append(f"factors of these tokens for each input, from networks of width {hidden}")
    if head is not None:
        parts.append(f"a head for {head.kernel.shape[1]} classes")
    return ", ".join(parts) + ("; sliding windows do not hide it" if virtual.pinned else "")


@dataclasses.dataclass(frozen=True)
class Row:
    """A virtual token compared to the vocabulary and to its initial value.

    Attributes:
      norm: its norm, in units of the vocabulary's median norm.
      drift: its distance from its initial value, in the same units; None if that value is unknown.
      start_cosine: its cosine with its initial value; None if that value is unknown.
      nearest: the tokens with the highest cosines, and these cosines.
    """

    norm: float
    drift: float | None
    start_cosine: float | None
    nearest: list[tuple[str, float]]


def compared_rows(saved: SavedPrompt, start: VirtualPrompt | None, base: FrozenBase, nearest: int) -> list[Row]:
    """Compares each virtual token of a prompt to the vocabulary, and to its initial value if `start` is given.

    Args:
      saved: the prompt.
      start: the prompt before training; None if unknown.
      base: the base that it was trained on.
      nearest: how many nearest tokens to list.

    Returns:
      One `Row` per virtual token; an empty list if the prompt has none.
    """
    if saved.virtual.tokens is None:
        return []
    rows, table = np.asarray(saved.virtual.tokens), base.model.embedding_table()
    unit = float(np.median(np.linalg.norm(table, axis=1)))
    near = nearest_tokens(rows, table[: len(base.tokenizer)], nearest)
    found = []
    for number, row in enumerate(rows):
        drift = cosine = None
        if start is not None:
            initial = np.asarray(start.tokens)[number]
            drift = float(np.linalg.norm(row - initial)) / unit
            cosine = float(row @ initial / max(np.linalg.norm(row) * np.linalg.norm(initial), 1e-12))
        words = [(base.tokenizer.convert_ids_to_tokens(i), cos) for i, cos in near[number]]
        found.append(Row(float(np.linalg.norm(row)) / unit, drift, cosine, words))
    return found


def layer_drift(saved: SavedPrompt, start: VirtualPrompt | None) -> list[tuple[float, float]]:
    """Returns how far the keys and the values of each layer moved in training, relative to their initial norm.

    The list is empty if the prompt has no keys and values, or if their initial values are unknown or 0.
    """
    if start is None or start.prefix is None or saved.virtual.prefix is None:
        return []
    if not saved.virtual.prefix_length:
        return []
    now, then = (memory.by_layer(prefix.memory, saved.layout) for prefix in (saved.virtual.prefix, start.prefix))
    if any(np.linalg.norm(array) == 0 for own in then for array in (own.keys, own.values)):
        return []

    def share(one: Array, other: Array) -> float:
        return float(np.linalg.norm(np.asarray(one) - np.asarray(other)) / np.linalg.norm(other))

    return [(share(a.keys, b.keys), share(a.values, b.values)) for a, b in zip(now, then, strict=True)]


def started_from(saved: SavedPrompt, base: FrozenBase) -> VirtualPrompt | None:
    """Recreates the prompt before training from its method and seed; returns None if that is not possible."""
    seed = (saved.info.get("extra") or {}).get("seed")
    if seed is None:
        return None
    try:
        params = saved.method.init_params(jax.random.key(seed), base)
    except SptError:  # the file with its initial rows no longer exists, or these were given in memory
        return None
    return saved.method.materialize(params, base.model)


def similarity_map(prompts: Sequence[VirtualPrompt]) -> Float[np.ndarray, "S S"]:
    """Returns cosines between prompts of one kind: of mean token rows, of mean keys and values, or of initial states.

    For token rows, this is the measure of SPoT (Vu et al. 2022, arXiv 2110.07904).

    Raises:
      ConfigError: the prompts differ in kind or size, or have neither token rows nor keys and values.
    """

    def summary(virtual: VirtualPrompt) -> np.ndarray:
        if virtual.tokens is not None:
            return np.asarray(virtual.tokens, np.float64).mean(axis=0)
        if virtual.prefix is not None:
            leaves = jax.tree.leaves(memory.keys_values(virtual.prefix.memory))
            means = [np.asarray(leaf, np.float64).mean(axis=-3).ravel() for leaf in leaves]
            return np.concatenate(means or [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(virtual.prefix)])
        raise ConfigError("a similarity map needs prompts of token rows, or of keys and values")

    summaries = [summary(virtual) for virtual in prompts]
    if len({(own.shape, prompt.tokens is None) for own, prompt in zip(summaries, prompts, strict=True)}) > 1:
        raise ConfigError("a similarity map needs prompts of one kind, for one base")
    units = np.stack([own / max(np.linalg.norm(own), 1e-12) for own in summaries])
    return units @ units.T


def describe_prompt(saved: SavedPrompt) -> str:
    """Describes a saved prompt from its files: method, base, template and facts about its training."""
    info = saved.info
    lines = [
        f"method        {info['method']['name']}: {_parts(saved.virtual)}",
        f"base          {info['base']['id']}" + (f" at {info['base']['revision']}" if info["base"]["revision"] else ""),
        f"prompt        {saved.template.prompt!r}",
        f"target        {saved.template.target!r}",
    ]
    if saved.template.verbalizers:
        lines.append(f"verbalizers   {dict(saved.template.verbalizers)}")
    extra = info.get("extra") or {}
    validation = extra.get("validation") or {}
    if "step" in extra:
        lines.append(f"trained       {extra['step']} steps")
    for name in ("accuracy", "perplexity", "loss"):
        if name in validation:
            lines.append(f"validation    {name} {validation[name]:.4f}")
            break
    lines.append("versions      " + ", ".join(f"{name} {version}" for name, version in info["versions"].items()))
    return "\n".join(lines)


def row_lines(rows: Sequence[Row]) -> str:
    """Formats each virtual token's norm, drift and nearest tokens."""
    lines = [
        "norm and drift in units of the vocabulary's median norm; cosines after the tokens:",
        "       norm  drift  nearest tokens",
    ]
    for number, row in enumerate(rows):
        words = "  ".join(f"{token!r} {cosine:.2f}" for token, cosine in row.nearest)
        drift = "-" if row.drift is None else f"{row.drift:.2f}"
        lines.append(f"  {number:3d}  {row.norm:6.2f} {drift:>6}  {words}")
    return "\n".join(lines)


def drift_lines(drifts: Sequence[tuple[float, float]]) -> str:
    """Formats how far the keys and values of each layer moved."""
    return "\n".join(
        f"  layer {number:3d}: keys moved by {keys:.2f} of their norm, values by {values:.2f}"
        for number, (keys, values) in enumerate(drifts)
    )


def ablation_lines(measure: str, lost: Sequence[Difference]) -> str:
    """Formats what is lost without each position, and marks intervals that exclude 0."""
    lines = [
        f"{measure.replace('_', ' ')} lost without each position, with its 95 % interval; * if the interval excludes 0"
        " (by chance, 1 position in 20 does):"
    ]
    for number, own in enumerate(lost):
        low, high = own.interval.low, own.interval.high
        mark = "" if low <= 0 <= high else "  *"
        lines.append(f"  {number:3d}  {own.interval.value:+.4f} [{low:+.4f}, {high:+.4f}]{mark}")
    return "\n".join(lines)


def attention_lines(received: Received) -> str:
    """Formats the attention of the last token to the whole prompt, layer by layer."""
    lines = [f"attention of the last token to the prompt; uniform attention would be {received.even:.2f}:"]
    lines += [f"  layer {number:3d}  {share:.2f}" for number, share in enumerate(received.by_position.sum(axis=1))]
    return "\n".join(lines)


def similarity_lines(names: Sequence[str], cosines: Float[np.ndarray, "S S"]) -> str:
    """Formats cosines between prompts, one line per prompt."""
    lines = ["cosines between prompts:"]
    for name, row in zip(names, cosines, strict=True):
        lines.append("  " + " ".join(f"{cosine:6.3f}" for cosine in row) + f"  {name}")
    return "\n".join(lines)
