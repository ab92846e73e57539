"""What a distillation saves and keeps of its text, as a table and a sentence."""

from collections.abc import Mapping
from typing import Any

from spt_jax.reports.contents import Table, number
from spt_jax.reports.report import ROWS


def distillation_table(distillation: Mapping[str, Any] | None, scores: Mapping[str, Any]) -> Table | None:
    """Returns a table of the text, the soft prompt and the bare base.

    Args:
      distillation: that entry of `results.json`; None if the run has no text.
      scores: the metrics of each way of asking on one split, by its name.
    """
    if not distillation:
        return None
    seconds = distillation.get("first_token_seconds") or {}
    sizes = {"with_text": "text", "soft_prompt": "prompt", "no_prompt": None}
    rows = []
    for name, size in sizes.items():
        own = scores.get(name) or {}
        same = {"agreement": 1.0, "kl_to_text": 0.0} if name == "with_text" else own
        rows.append(
            [
                ROWS[name],
                *(number(distillation[f"{size}_{unit}"] if size else 0, ",d") for unit in ("tokens", "bytes")),
                number(1000 * seconds[name], ".1f") if name in seconds else "-",
                *(number(same[column]) if column in same else "-" for column in ("agreement", "kl_to_text")),
            ]
        )
    return Table(
        "Distillation of the text", ["", "tokens", "bytes", "first token, ms", "agreement", "kl to text"], rows
    )


def savings_sentence(distillation: Mapping[str, Any]) -> str:
    """Returns a sentence on what a request saves.

    Args:
      distillation: that entry of `results.json`.
    """
    tokens = distillation["text_tokens"] - distillation["prompt_tokens"]
    size = distillation["text_bytes"] - distillation["prompt_bytes"]
    seconds = distillation.get("first_token_seconds") or {}
    faster = ""
    if "with_text" in seconds:
        faster = f"; its first token takes {seconds['soft_prompt'] / seconds['with_text']:.2f} of the time"
        faster += f", and {seconds['soft_prompt'] / seconds['no_prompt']:.2f} of that without the text"
    return (
        f"a request with the soft prompt has {tokens:,} tokens less than one with the text, whose keys and values take"
        f" {size:,} bytes in float32{faster}"
    )
