"""Evaluations of the base without a soft prompt, which are computed once per base and data and then kept on disk."""

import dataclasses
import hashlib
import json

import jax

from spt_jax.bases.base import FrozenBase
from spt_jax.data.digests import is_ours, records_digest
from spt_jax.data.examples import digest
from spt_jax.data.task import Evaluation
from spt_jax.evaluation.evaluate import EvaluationSet, evaluate
from spt_jax.runtime import measure
from spt_jax.runtime.disk_cache import cache_key, read_entry, write_entry
from spt_jax.runtime.extras import installed

KIND = "evaluations"


def evaluate_without_prompt(base: FrozenBase, data: EvaluationSet, *, generated: bool = True) -> Evaluation:
    """Returns `evaluate(base, data, None)`, from the user's cache folder if it was computed before.

    What is kept depends on the base's weights, tokenizer and precision, the records, the template, the shapes of
    batches, the options, the device, and the versions of this package and of those that results depend on. Nothing is
    read or written in a run of several processes, with a base from `from_flax` or a task that is not of this package,
    with reward functions or an objective that compares answers, or if records hold something else than JSON values.

    Args:
      base: the frozen base.
      data: the set.
      generated: whether to generate answers.

    Returns:
      The metrics, and a prediction for each record.

    Raises:
      ConfigError: the task needs a soft prompt.
    """
    records, judged = records_digest(data.records), data.judge is not None or data.criterion is not None
    unknown = records is None or judged or not is_ours(data.encoder.template)
    if jax.process_count() > 1 or not base.is_decoder or unknown:
        return evaluate(base, data, None, generated=generated)
    key = cache_key({**_facts(base, data, generated), "records": records})
    found = _read(key)
    if found is None:
        found = evaluate(base, data, None, generated=generated)
        write_entry(KIND, key, json.dumps(dataclasses.asdict(found)).encode())
    return found


def _read(key: str) -> Evaluation | None:
    content = read_entry(KIND, key)
    try:
        return None if content is None else Evaluation(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _facts(base: FrozenBase, data: EvaluationSet, generated: bool) -> dict[str, object]:
    """Returns all that an evaluation depends on beside the records."""
    encoder, plan = data.encoder, data.plan
    ids = [*data.prompts, *(own for own in (data.text, data.text_scores) if own is not None), plan.lead_ids]
    return {
        "base": base.fingerprint.as_json(),
        "end_ids": [list(base.end_ids), list(encoder.end_ids)],
        "encoder": encoder.facts,
        "dtype": str(base.dtype),
        "attention": base.decoder.module.attention,
        "mesh": dict(base.mesh.shape),
        "device": measure.device_name(base.mesh.devices.flat[0]),
        "config": dataclasses.asdict(data.config),
        "generated": generated,
        "examples": digest(data.examples),
        "text_examples": None if data.text_examples is None else digest(data.text_examples),
        "ids": [hashlib.sha256(own.tobytes()).hexdigest() for own in ids],
        "rows": [plan.length, plan.outputs, plan.targets, plan.examples, plan.row_buckets, plan.multiple],
        "extras": [installed(module) for module in ("sacrebleu", "rouge_score")],
        "versions": measure.versions(),
    }
