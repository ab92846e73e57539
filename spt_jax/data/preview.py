"""A preview of the training data: a few examples as tokens, their lengths, and how well they pack into batches."""

from collections.abc import Sequence

import numpy as np

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.batches import BatchPlan, pack
from spt_jax.data.examples import Example


def show_example(example: Example, tokenizer: Tokenizer, vocab_size: int) -> str:
    """Formats an example as one line, followed by one line per choice.

    Tokens are separated by `|`. Virtual tokens are shown as <soft 0>, and tokens to predict in [[ ]]. For a task head,
    the class follows each token that the head reads.
    """
    words = []
    for token, predicted in zip(example.ids.tolist(), example.predicted.tolist(), strict=True):
        word = f"<soft {token - vocab_size}>" if token >= vocab_size else _word(tokenizer, token)
        words.append(f"[[{word}]]" if predicted else word)
    if example.reads is not None and example.classes is not None:
        for position, number in zip(example.reads.tolist(), example.classes.tolist(), strict=True):
            words[position] += f" [[class {number}]]"
    line = "|".join(words)
    for number, choice in enumerate(example.choices):
        mark = "  (the label)" if number == example.label else ""
        line += f"\n    [[{'|'.join(_word(tokenizer, token) for token in choice.tolist())}]]{mark}"
    return line


def _word(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.convert_ids_to_tokens(token).replace("\n", "\\n")


def describe(
    examples: Sequence[Example], plan: BatchPlan, batch_size: int, tokenizer: Tokenizer, vocab_size: int
) -> str:
    """Describes the first three examples, the lengths of all examples, and the rows that batches are packed into."""
    lines = [f"example {example.index + 1}: {show_example(example, tokenizer, vocab_size)}" for example in examples[:3]]
    lengths = np.asarray([example.length for example in examples])
    quantiles = ", ".join(f"{name} {int(np.quantile(lengths, q))}" for name, q in (("median", 0.5), ("90 %", 0.9)))
    lines.append(f"{len(examples)} examples, tokens: shortest {lengths.min()}, {quantiles}, longest {lengths.max()}")
    lines.append(f"leading tokens that all examples share, computed once per step: {plan.lead_ids.shape[-1]}")
    chunks = [examples[i : i + batch_size] for i in range(0, min(len(examples), 50 * batch_size), batch_size)]
    batches = [pack(chunk, plan).rows for chunk in chunks]
    used = sum(int((rows.stream.segments > 0).sum()) for rows in batches)
    capacity = sum(rows.ids.size for rows in batches)
    rows = sorted({rows.ids.shape[0] for rows in batches})
    lines.append(
        f"batches of {batch_size} examples in {rows} rows of {plan.length} tokens; packing rate {used / capacity:.0%}"
    )
    return "\n".join(lines)
