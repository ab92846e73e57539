"""What a saved prompt is, in words."""

import numpy as np
from jaxtyping import Float

from spt_jax.base import FrozenBase, embedding_table
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


def describe_prompt(saved: SavedPrompt, base: FrozenBase | None, nearest: int) -> str:
    """Method, base, template and training facts; with the base, each row's norm and nearest vocabulary."""
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
    if base is None or saved.virtual.tokens is None:
        return "\n".join(lines)
    tokens = np.asarray(saved.virtual.tokens)
    table = embedding_table(base)
    norm = float(np.median(np.linalg.norm(table, axis=1)))
    lines.append(
        f"row norms in units of the vocabulary's median norm ({norm:.3f}), and nearest tokens with their cosines:"
    )
    for row, near in enumerate(nearest_tokens(tokens, table[: len(base.tokenizer)], nearest)):
        words = "  ".join(f"{base.tokenizer.convert_ids_to_tokens(i)!r} {cosine:.2f}" for i, cosine in near)
        lines.append(f"  {row:3d}  {np.linalg.norm(tokens[row]) / norm:6.2f}  {words}")
    return "\n".join(lines)
