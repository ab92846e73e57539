"""Text that the model generates."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from spt_jax.data.examples import Example
from spt_jax.data.task import EncodedRecords, Evaluation, Record, RecordEncoder, Scores, Task
from spt_jax.evaluation import metrics
from spt_jax.tasks.verbalizers import Verbalizers


@dataclasses.dataclass(frozen=True)
class Text(Task):
    """Free text, learned token by token. With verbalizers, the task is `Verbalizers`."""

    name: ClassVar[str] = "language_model"
    generates: ClassVar[bool] = True

    def with_classes(self, classes: Mapping[str, str]) -> Task:
        return Verbalizers() if classes else self

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes prompt and target; the target is predicted."""
        prompt, target = encoder.encode_prompt(record, index), encoder.encode_target(record, index)
        predicted = np.arange(len(prompt) + len(target)) >= len(prompt)
        if not prompt:
            predicted[0] = False  # there is no id before the first one to predict it from
        return Example(np.asarray(prompt + target, np.int32), predicted, (), 0, index)

    def evaluate(self, scores: Scores, data: EncodedRecords) -> Evaluation:
        """Computes the loss per token and the perplexity of the targets."""
        values = np.stack(scores)[:, 0]
        tokens: Int[np.ndarray, " N"] = np.asarray([int(example.predicted.sum()) for example in data.examples])
        result = {
            "loss": float(-values.sum() / tokens.sum()),
            "perplexity": metrics.perplexity(values.astype(np.float64), tokens),
            "examples": len(tokens),
        }
        predictions = [
            {"log_probability": round(float(s), 5), "tokens": int(n)} for s, n in zip(values, tokens, strict=True)
        ]
        return Evaluation(result, predictions)
