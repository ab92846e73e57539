"""The parts that reports of all kinds have."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spt_jax.evaluation.metrics import SHARES
from spt_jax.evaluation.predictions import Prediction, read_predictions
from spt_jax.reports.contents import Figure, interval_text, number, p_value

T = TypeVar("T")


def measure_of(scores: Mapping[str, Any]) -> str:
    """Returns the measure that is shown of a result: win rate, accuracy, exact match, perplexity or loss."""
    return next((name for name in (*SHARES, "perplexity") if name in scores), "loss")


def words(measure: str) -> str:
    """Returns a measure's name as words."""
    return measure.replace("_", " ")


def written_figures(other: Mapping[str, Any], measure: str, against: Mapping[str, Any] | None) -> list[Figure]:
    """Returns the score of the written prompt, and how far the soft prompt is ahead of it."""
    figures = [Figure("written prompt", number(other.get(measure)), interval_text(other.get(f"{measure}_interval")))]
    if against:
        figures.append(Figure("difference", number(against["ahead"], "+.3f"), interval_text(against["ahead_interval"])))
    return figures


def difference_sentence(against: Mapping[str, Any] | None) -> str:
    """Returns a sentence on the difference between the soft and the written prompt."""
    if not against:
        return ""
    tests = [("McNemar", against.get("p_mcnemar")), ("paired bootstrap", against.get("p_bootstrap"))]
    p = ", ".join(f"{name} p = {p_value(value)}" for name, value in tests if value is not None)
    side, measure = "ahead of" if against["ahead"] >= 0 else "behind", words(against["measure"])
    return (
        f"The soft prompt is {side} the best written prompt by {abs(against['ahead']):.3f} in {measure}"
        f" (95\u00a0% interval of the difference {interval_text(against['ahead_interval'])}; {p})."
    )


def parameters_note(results: Mapping[str, Any]) -> str:
    """Returns the number of trained parameters as words."""
    count = results.get("trainable_parameters")
    return "" if count is None else f"{count:,} trained parameters"


def shared_parts(config: Mapping[str, Any], results: Mapping[str, Any], written: Sequence[str]) -> dict[str, Any]:
    """Returns the parts that all reports have."""
    data, base, method = (config.get(name) or {} for name in ("data", "base", "method"))
    versions = results.get("versions") or {}
    prompt = [("template", data.get("prompt") or ""), ("target", data.get("target") or "")]
    verbalizers = data.get("verbalizers") or {}
    prompt += (
        [("classes", ", ".join(f"{name} = {text!r}" for name, text in verbalizers.items()))] if verbalizers else []
    )
    prompt += [("best written prompt", text) for text in written]
    inputs = results.get("data") or (config.get("inputs") or {}).get("data") or {}
    environment = [
        ("date", results.get("date")),
        ("git commit", results.get("git_commit")),
        ("base", base.get("path")),
        ("base parameters", results.get("base_parameters") and f"{results['base_parameters']:,}"),
        ("base dtype", results.get("base_dtype") or base.get("dtype")),
        ("method", method.get("name")),
        ("device", results.get("device")),
        ("training", results.get("train_seconds") and f"{results['train_seconds']:,.1f} s"),
        ("tokens per second", results.get("tokens_per_second") and f"{results['tokens_per_second']:,.0f}"),
        ("peak memory", results.get("peak_memory_bytes") and f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("data, with digests", "\n".join(f"{source} {', '.join(own)}" for source, own in inputs.items())),
    ]
    tokens = [
        [(str(word), number(cosine, ".2f")) for word, cosine in row] for row in results.get("nearest_tokens") or []
    ]
    return {
        "tokens": tokens,
        "prompt": [(name, text) for name, text in prompt if text],
        "environment": [(name, str(value)) for name, value in environment if value],
        "command": results.get("command") or "",
        "settings": json.dumps(config, indent=2, ensure_ascii=False),
    }


def predictions_by(path: Path, by: str) -> Mapping[str, Sequence[Prediction]]:
    """Returns the predictions of a file as `read_predictions` does; none if it does not exist."""
    return read_predictions(path, by) if path.exists() else {}


def present(parts: Sequence[T | None]) -> list[T]:
    """Returns the parts that are not None."""
    return [part for part in parts if part is not None]
