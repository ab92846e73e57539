"""What a saved prompt is: its method, its rows beside the vocabulary, how far training took it, how like others."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from spt_jax.bases.base import FrozenBase, embedding_table
from spt_jax.errors import ConfigError, SptError
from spt_jax.evaluation.attribution import Received
from spt_jax.evaluation.metrics import Difference
from spt_jax.prompts.storage import SavedPrompt
from spt_jax.prompts.virtual import VirtualPrompt


def nearest_tokens(
    rows: Float[np.ndarray, "P D"], table: Float[np.ndarray, "V D"], count: int
) -> list[list[tuple[int, float]]]:
    """For every row, the ids whose embeddings have the highest cosine with it, and those cosines."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    cosines = unit(rows) @ unit(table).T
    best = np.argsort(-cosines, axis=1)[:, :count]
    return [[(int(i), float(cosines[row, i])) for i in ids] for row, ids in enumerate(best)]


def _parts(virtual: VirtualPrompt) -> str:
    tokens, prefix, gated, head = virtual.tokens, virtual.prefix, virtual.gated, virtual.head
    parts = []
    if tokens is not None:
        parts.append(f"{tokens.shape[0]} virtual tokens of width {tokens.shape[1]}")
    if prefix is not None:
        parts.append(f"keys and values of {prefix.keys.shape[0]} layers at {prefix.keys.shape[1]} positions")
    if gated is not None:
        parts.append(f"{gated.keys.shape[1]} gated keys and values in the last {gated.keys.shape[0]} layers")
    if head is not None:
        parts.append(f"a head for {head.kernel.shape[1]} classes")
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Row:
    """A virtual token beside the vocabulary.

    norm: in units of the vocabulary's median norm.
    drift: how far it is from where it started, in the same units; None where its start is not known.
    start_cosine: its cosine with where it started.
    nearest: the tokens of the highest cosines, and these.
    """

    norm: float
    drift: float | None
    start_cosine: float | None
    nearest: list[tuple[str, float]]


def compared_rows(saved: SavedPrompt, start: VirtualPrompt | None, base: FrozenBase, nearest: int) -> list[Row]:
    """Every virtual token of a prompt that has some, beside what it started from, where that is known."""
    if saved.virtual.tokens is None:
        return []
    rows, table = np.asarray(saved.virtual.tokens), embedding_table(base)
    unit = float(np.median(np.linalg.norm(table, axis=1)))
    near = nearest_tokens(rows, table[: len(base.tokenizer)], nearest)
    found = []
    for number, row in enumerate(rows):
        drift = cosine = None
        if start is not None:
            own = np.asarray(start.tokens)[number]
            drift = float(np.linalg.norm(row - own)) / unit
            cosine = float(row @ own / max(np.linalg.norm(row) * np.linalg.norm(own), 1e-12))
        words = [(base.tokenizer.convert_ids_to_tokens(i), cos) for i, cos in near[number]]
        found.append(Row(float(np.linalg.norm(row)) / unit, drift, cosine, words))
    return found


def layer_drift(saved: SavedPrompt, start: VirtualPrompt | None) -> list[tuple[float, float]]:
    """Of a prompt of keys and values, how far each layer's moved from their start, as a share of the start's norm.

    Nothing where the start is not known, or is 0.
    """
    if start is None or start.prefix is None or saved.virtual.prefix is None:
        return []
    pairs = [
        (np.asarray(getattr(saved.virtual.prefix, name)), np.asarray(getattr(start.prefix, name)))
        for name in ("keys", "values")
    ]
    if any(np.linalg.norm(then) == 0 for _, start_of_all in pairs for then in start_of_all):
        return []
    shares = [
        [float(np.linalg.norm(now - then) / np.linalg.norm(then)) for now, then in zip(*pair, strict=True)]
        for pair in pairs
    ]
    return list(zip(*shares, strict=True))


def started_from(saved: SavedPrompt, base: FrozenBase) -> VirtualPrompt | None:
    """The prompt as training began it, made again from its method and seed; None where they do not tell."""
    seed = (saved.info.get("extra") or {}).get("seed")
    if seed is None:
        return None
    try:
        params = saved.method.init_params(jax.random.key(seed), base)
    except SptError:  # the file that it started from is gone, or it started from rows in memory
        return None
    return saved.method.materialize(base.module, base.params, params)


def similarity_map(prompts: Sequence[VirtualPrompt]) -> Float[np.ndarray, "S S"]:
    """Cosines between prompts of one kind: of mean token rows, or of mean keys and values of all layers.

    Between token rows it is SPoT's measure (Vu et al. 2022, arXiv 2110.07904).

    Raises:
      ConfigError: the prompts are of several kinds or sizes, or have neither rows nor keys and values.
    """

    def summary(virtual: VirtualPrompt) -> np.ndarray:
        if virtual.tokens is not None:
            return np.asarray(virtual.tokens, np.float64).mean(axis=0)
        if virtual.prefix is not None:
            both = np.stack([np.asarray(virtual.prefix.keys), np.asarray(virtual.prefix.values)])
            return both.astype(np.float64).mean(axis=2).ravel()
        raise ConfigError("a map of similarities needs prompts of token rows, or of keys and values")

    summaries = [summary(virtual) for virtual in prompts]
    if len({(own.shape, prompt.tokens is None) for own, prompt in zip(summaries, prompts, strict=True)}) > 1:
        raise ConfigError("a map of similarities needs prompts of one kind, for one base")
    units = np.stack([own / max(np.linalg.norm(own), 1e-12) for own in summaries])
    return units @ units.T


def describe_prompt(saved: SavedPrompt) -> str:
    """Method, base, template and training facts: what the files say."""
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
    """Each virtual token's norm, drift and nearest vocabulary."""
    lines = [
        "norm and drift in units of the vocabulary's median norm; cosines behind the tokens:",
        "       norm  drift  nearest tokens",
    ]
    for number, row in enumerate(rows):
        words = "  ".join(f"{token!r} {cosine:.2f}" for token, cosine in row.nearest)
        drift = "-" if row.drift is None else f"{row.drift:.2f}"
        lines.append(f"  {number:3d}  {row.norm:6.2f} {drift:>6}  {words}")
    return "\n".join(lines)


def drift_lines(drifts: Sequence[tuple[float, float]]) -> str:
    """How far the keys and values of each layer moved."""
    return "\n".join(
        f"  layer {number:3d}: keys moved by {keys:.2f} of their norm, values by {values:.2f}"
        for number, (keys, values) in enumerate(drifts)
    )


def ablation_lines(measure: str, lost: Sequence[Difference]) -> str:
    """What is lost without each position, and whose interval leaves out 0."""
    lines = [
        f"{measure.replace('_', ' ')} lost without each position, with its 95 % interval; * where that leaves out 0, as"
        " chance alone does for one position in 20:"
    ]
    for number, own in enumerate(lost):
        low, high = own.interval.low, own.interval.high
        mark = "" if low <= 0 <= high else "  *"
        lines.append(f"  {number:3d}  {own.interval.value:+.4f} [{low:+.4f}, {high:+.4f}]{mark}")
    return "\n".join(lines)


def attention_lines(received: Received) -> str:
    """Attention of the last token to the whole prompt, layer by layer."""
    lines = [f"attention of the last token to the prompt; even attention would be {received.even:.2f}:"]
    lines += [f"  layer {number:3d}  {share:.2f}" for number, share in enumerate(received.by_position.sum(axis=1))]
    return "\n".join(lines)


def similarity_lines(names: Sequence[str], cosines: Float[np.ndarray, "S S"]) -> str:
    """Cosines between prompts, a line each."""
    lines = ["cosines between prompts:"]
    for name, row in zip(names, cosines, strict=True):
        lines.append("  " + " ".join(f"{cosine:6.3f}" for cosine in row) + f"  {name}")
    return "\n".join(lines)
