"""Classes of records in one pass: the log-probability of every verbalizer, or of every class of a head."""

import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spt_jax.data.batches import bucket, multiples, pack, place_batch, plan_batches, round_up
from spt_jax.errors import ConfigError
from spt_jax.evaluation import log_softmax, row_scores
from spt_jax.generation import BUCKET
from spt_jax.serving.bank import Held, PromptBank, overflow
from spt_jax.sharding import to_host

_row_scores = functools.partial(jax.jit, static_argnums=(0, 1))(row_scores)


class Classifier:
    """Scores a bank's prompts, one call after another. Any thread may call it."""

    def __init__(self, bank: PromptBank):
        self._bank = bank
        self._lock = threading.Lock()

    def classify(self, name: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """The log-probability of every class of every record: summed over a verbalizer's tokens, or a head's.

        Each record's own ids run once, behind the keys and values that its prompt's requests share.

        Raises:
          ConfigError: no such prompt, its template has no classes for whole records, a record is too long, or its
            numbers overflow.
          DataError: a record lacks a field.
        """
        bank, base = self._bank, self._bank.base
        entry, held = bank.take(name)
        template = entry.template
        if not entry.classifies:
            raise ConfigError(f"prompt {name!r} tells no classes of whole texts apart")
        asked = [entry.encoder.with_any_label(record) for record in records]
        if template.truncate is None:
            self._check_lengths(held, [entry.encoder.prompt_ids(record) for record in records])
        examples = entry.encoder.encode_all(asked)
        shapes = multiples(base.mesh)
        plan = plan_batches(examples, lead=len(held.lead), batch_size=len(examples), packing=False, **shapes)
        plan = dataclasses.replace(
            plan,
            length=bucket(plan.length, round_up(BUCKET, shapes["length_multiple"])),
            row_buckets=(bucket(len(examples), shapes["multiple"]),),
        )
        batch = pack(examples, plan)
        rows = place_batch(batch, base.mesh).rows
        with self._lock:
            values = to_host(_row_scores(base.module, plan.choices, base.params, held.virtual, held.prefix, rows))
        order = np.argsort([int(number) for number in batch.rows.examples[:, 0] if number >= 0])
        scores = values[: len(examples), 0][order]
        if not np.isfinite(scores).all():
            raise overflow(base, name)
        if template.head == "classification":
            scores = log_softmax(scores)
        return [dict(zip(template.verbalizers, map(float, row), strict=True)) for row in scores]

    def _check_lengths(self, held: Held, prompts: Sequence[np.ndarray]) -> None:
        limit = self._bank.base.config.max_positions
        for ids in prompts:
            total = held.start - len(held.lead) + len(ids)
            if total > limit:
                raise ConfigError(f"{total} tokens of the prompt; the base has {limit} positions")
