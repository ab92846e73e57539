"""Classifies records in one pass: the log-probability of each verbalizer, or of each class of a head."""

import contextlib
import dataclasses
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spt_jax.data.batches import bucket, multiples, pack, place_batch, plan_batches, round_up
from spt_jax.data.examples import Example
from spt_jax.data.task import task_of
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import row_scores
from spt_jax.inference.generation import BUCKET
from spt_jax.runtime.sharding import to_host
from spt_jax.serving.bank import DevicePrompt, Entry, PromptBank, overflow
from spt_jax.serving.compilations import Compilations

_row_scores = jax.jit(row_scores, static_argnames="choices")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Records that were tokenized for a prompt.

    Attributes:
      name: the prompt's name.
      entry: the prompt at the time the records were read.
      held: its arrays on the device at that time.
      examples: the encoded records, each with an arbitrary label.
    """

    name: str
    entry: Entry
    held: DevicePrompt
    examples: Sequence[Example]


class Classifier:
    """Scores records under a bank's prompts, one call at a time. All methods are thread-safe."""

    def __init__(self, bank: PromptBank, compilations: Compilations | None = None):
        """Creates a classifier for a bank; `compilations` counts its compilations."""
        self._bank = bank
        self._lock = threading.Lock()
        self._compilations = compilations or Compilations()
        self._compiled: set[Hashable] = set()

    def read(self, name: str, records: Sequence[Mapping[str, Any]]) -> Asked:
        """Tokenizes records.

        Raises:
          ConfigError: no such prompt, its template does not classify whole records, or a record is too long.
          DataError: a record lacks a field.
        """
        entry, held = self._bank.take(name)
        if not entry.classifies:
            raise ConfigError(f"prompt {name!r} does not classify whole texts")
        asked = [entry.encoder.with_any_label(record) for record in records]
        if entry.template.truncate is None:
            self._check_lengths(held, [entry.encoder.prompt_ids(record) for record in records])
        return Asked(name, entry, held, entry.encoder.encode_all(asked))

    def score(self, asked: Asked, first: int = 0, last: int | None = None) -> list[dict[str, float]]:
        """Returns the log-probability of each class for each record, from a head or summed over a verbalizer's tokens.

        Each record's ids run once, after the keys and values that the prompt's requests share.

        Args:
          asked: the records.
          first: the index of the first record to score.
          last: the index after the last record to score; None for all.

        Raises:
          ConfigError: values overflow the base's dtype.
        """
        base, held, template = self._bank.base, asked.held, asked.entry.template
        examples = asked.examples[first:last]
        shapes = multiples(base.mesh)
        plan = plan_batches(examples, lead=len(held.lead), batch_size=len(examples), packing=False, **shapes)
        plan = dataclasses.replace(
            plan,
            length=bucket(plan.length, round_up(BUCKET, shapes["length_multiple"])),
            row_buckets=(bucket(len(examples), shapes["multiple"]),),
        )
        batch = pack(examples, plan)
        # `held.virtual` has no keys and values, which are in `held.prefix`, and so does not count their positions.
        stream = batch.rows.stream
        stream = dataclasses.replace(stream, positions=stream.positions + held.start - len(held.lead))
        batch = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, stream=stream))
        rows = place_batch(batch, base.mesh).rows
        inputs = plan.choices, held.virtual, held.prefix, rows
        leaves, structure = jax.tree.flatten(inputs)
        key = plan.choices, structure, tuple(np.shape(leaf) for leaf in leaves)
        with contextlib.nullcontext() if key in self._compiled else self._compilations.running(), self._lock:
            values = to_host(_row_scores(base.model, *inputs))
        self._compiled.add(key)
        order = np.argsort([int(number) for number in batch.rows.examples[:, 0] if number >= 0])
        scores = values[: len(examples), 0][order]
        if not np.isfinite(scores).all():
            raise overflow(base, asked.name)
        scores = task_of(template).class_scores(scores)
        return [dict(zip(template.verbalizers, map(float, row), strict=True)) for row in scores]

    def _check_lengths(self, held: DevicePrompt, prompts: Sequence[np.ndarray]) -> None:
        limit = self._bank.base.layout.max_positions
        for ids in prompts:
            total = held.start - len(held.lead) + len(ids)
            if total > limit:
                raise ConfigError(f"the prompt has {total} tokens, but the base has {limit} positions")
