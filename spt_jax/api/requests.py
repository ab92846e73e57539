"""Encodes requests in few shapes, so that the next ones use the same compiled programs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import bucket, multiples, plan_batches, round_up
from spt_jax.data.encoder import Encoder
from spt_jax.evaluation.evaluate import EvaluationConfig, EvaluationSet

LENGTH = 32  # lengths are this number of tokens times a power of 2


def request_set(base: FrozenBase, encoder: Encoder, records: Sequence[Mapping[str, Any]]) -> EvaluationSet:
    """Encodes records with targets, one in each row. Numbers of rows, tokens and targets are rounded up.

    Args:
      base: the frozen base.
      encoder: how records are encoded.
      records: the records, at least one.

    Raises:
      DataError: a record lacks a field or is too long.
    """
    config, shapes = EvaluationConfig(), multiples(base.mesh)
    examples = encoder.encode_all(records)
    # The lead of all requests of the template, even if these share more.
    lead = min(len(encoder.fixed_lead()), encoder.head_length(examples))
    plan = plan_batches(examples, lead=lead, batch_size=config.batch_size, packing=False, **shapes)
    least = round_up(LENGTH, shapes["length_multiple"])
    plan = dataclasses.replace(
        plan,
        length=bucket(plan.length, least),
        outputs=bucket(plan.outputs, shapes["length_multiple"]),
        targets=bucket(plan.targets, 1),
        row_buckets=(bucket(min(len(records), config.batch_size), shapes["multiple"]),),
    )
    return EvaluationSet(encoder, records, examples, plan, config)
