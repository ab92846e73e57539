"""Packs examples into rows of static shape, and places batches on devices.

A batch always has `batch_size` examples, packed or not, so packing never changes what a step learns from. A row holds
several examples, which cannot attend to each other. The number of rows is one of a few buckets, so a step is traced
once per bucket.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped

from spt_jax.data.examples import Example, empty_extra
from spt_jax.data.row_space import Slots, slots
from spt_jax.errors import DataError
from spt_jax.models.attention import Stream
from spt_jax.runtime.sharding import ROWS, replicated, row_sharding, row_shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B packed rows of T tokens, without the leading tokens that all examples share.

    Attributes:
      ids: the token ids.
      stream: the positions and segments of the tokens.
      outputs: the Q positions of a row at which a distribution of tokens or classes is needed (padded with 0). T plus a
        position stands for the mean of the hidden states of the real tokens of its segment.
      target_outputs, target_ids, target_weights, target_groups: for each of M target tokens or classes, the index of
        the output that predicts it, its id, its weight (0 for padding) and its group. A group is one scored sequence,
        which is an example's target or one of its choices, numbered example in row * choices + choice.
      labels, example_weights, examples: for each of a row's E examples, its correct choice, its weight (0 for padding)
        and its record number (-1 for padding).
      extra: for each example, what `Objective.prepare` returned, in arrays [B, E, ...] padded with 0; or None.
    """

    ids: Int[Array, "B T"]
    stream: Stream
    outputs: Int[Array, "B Q"]
    target_outputs: Int[Array, "B M"]
    target_ids: Int[Array, "B M"]
    target_weights: Float[Array, "B M"]
    target_groups: Int[Array, "B M"]
    labels: Int[Array, "B E"]
    example_weights: Float[Array, "B E"]
    examples: Int[Array, "B E"]
    extra: PyTree[Shaped[Array, "B E ..."]] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The input of a step: the leading ids that all examples share, and the rows that continue them.

    Attributes:
      lead_ids: the leading ids. If rows have different prompts (`Stream.prompt_index`), there are leading ids for each
        of the S prompts, padded on the right.
      rows: the rows.
      lead_length: how many leading ids of each prompt are real; None if none are padding.
    """

    lead_ids: Int[Array, "*S P"]
    rows: Rows
    lead_length: Int[Array, "*S"] | None = None


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Static shapes for a set of examples.

    Attributes:
      lead_ids: the leading ids that all examples share [P], or that the examples of each of S prompts share [S, P].
      lead_length: in the latter case, how many of them are real [S]; None if all examples have one prompt.
      length, outputs, targets, examples: the sizes T, Q, M and E of each row.
      choices: the maximum number of scored sequences per example; 1 without verbalizers.
      row_buckets: the numbers of rows B to choose from, ascending.
      multiple: B is a multiple of this: row shards times microbatches.
      decoder: the number U of a row's tokens that the decoder of an encoder-decoder reads; 0 for other bases.
      types: whether tokens have types.
      inputs: whether virtual tokens depend on the tokens of the input, `Stream.inputs`.
    """

    lead_ids: Any
    lead_length: Any
    length: int
    outputs: int
    targets: int
    examples: int
    choices: int
    row_buckets: tuple[int, ...]
    multiple: int
    decoder: int = 0
    types: bool = False
    inputs: bool = False

    def lead(self, example: Example) -> int:
        """Returns how many of an example's ids are leading ids."""
        return len(self.lead_ids) if self.lead_length is None else int(self.lead_length[example.prompt])

    def rows_for(self, needed: int) -> int:
        """Returns the smallest bucket of at least `needed` rows; if none is large enough, the next multiple."""
        for bucket in self.row_buckets:
            if bucket >= needed:
                return bucket
        return round_up(needed, self.multiple)


def plan_batches(
    examples: Sequence[Example],
    *,
    lead: int | Sequence[int],
    batch_size: int,
    packing: bool = True,
    multiple: int = 1,
    length_multiple: int = 1,
    max_length: int | None = None,
) -> BatchPlan:
    """Chooses shapes with little padding for these examples.

    A row is long enough for the longest example and, with packing, for four of average length, so that little of a row
    is padding. The numbers of rows are quantiles of what consecutive batches need, so that only two or three programs
    are compiled.

    Args:
      examples: all examples that will be batched.
      lead: the number of leading ids that all examples share; a list with one number per prompt if there are several.
      batch_size: examples per batch.
      packing: whether examples share rows; otherwise each has a separate row.
      multiple: row shards times microbatches.
      length_multiple: the number of devices along a row; tokens and outputs are a multiple of it.
      max_length: the number of the model's positions; rows need not be longer.

    Returns:
      The shapes.

    Raises:
      DataError: an example has nothing to predict, or no token before its first target.
    """
    lead_ids, lead_length = _leads(examples, lead)
    needs = [slots(example, lead if isinstance(lead, int) else lead[example.prompt]) for example in examples]
    longest = max(need.tokens for need in needs)
    mean = sum(need.tokens for need in needs) / len(needs)
    length = max(longest, round(4 * mean)) if packing else longest
    step = 16 if length <= 256 else 64
    length = round_up(length, step)
    if max_length is not None:
        length = max(longest, min(length, max_length))
    length = round_up(length, length_multiple)
    plan = BatchPlan(
        lead_ids=lead_ids,
        lead_length=lead_length,
        length=length,
        outputs=length,
        targets=10**9,
        examples=10**9 if packing else 1,
        choices=max(1, *(len(example.choices) for example in examples)),
        row_buckets=(),
        multiple=multiple,
        decoder=10**9,
        types=any(example.second_at is not None for example in examples),
        inputs=any(example.input_end is not None for example in examples),
    )
    chunks = [needs[i : i + batch_size] for i in range(0, len(needs), batch_size)]
    packed = [assign_rows(chunk, plan) for chunk in chunks]
    filled = [[chunk[i] for i in row] for chunk, rows in zip(chunks, packed, strict=True) for row in rows]
    counts = [len(rows) for rows in packed]
    return dataclasses.replace(
        plan,
        outputs=round_up(max(sum(need.outputs for need in row) for row in filled), length_multiple),
        targets=max(sum(need.targets for need in row) for row in filled),
        examples=max(map(len, filled)),
        decoder=max(sum(need.decoder for need in row) for row in filled),
        row_buckets=tuple(
            sorted(
                {
                    round_up(math.ceil(np.quantile(counts, q)), multiple)
                    for q in ((0.5, 0.9, 1.0) if packing else (1.0,))
                }
            )
        ),
    )


def _leads(examples: Sequence[Example], lead: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the leading ids and, for several prompts, how many each has; a prompt without examples has none."""
    if isinstance(lead, int):
        return examples[0].ids[:lead], None
    firsts = {example.prompt: example.ids for example in reversed(examples)}
    lengths = [length if prompt in firsts else 0 for prompt, length in enumerate(lead)]
    ids = np.zeros((len(lead), max(lengths)), np.int32)
    for prompt, length in enumerate(lengths):
        ids[prompt, :length] = firsts[prompt][:length] if length else 0
    return ids, np.asarray(lengths, np.int32)


def shared_length(sequences: Sequence[Int[np.ndarray, " _"]], most: int) -> int:
    """Returns how many leading ids all sequences share, of the first `most`, which every sequence has."""
    first = sequences[0][: max(most, 0)]
    differs = np.any([ids[: len(first)] != first for ids in sequences], axis=0)
    return int(np.argmax(differs)) if differs.any() else len(first)


def round_up(number: int, multiple: int) -> int:
    """Rounds a number up to the next multiple."""
    return -(-number // multiple) * multiple


def bucket(number: int, least: int) -> int:
    """Rounds a number up to `least` times a power of 2."""
    return least * 2 ** ((number - 1) // least).bit_length()


def assign_rows(needs: Sequence[Slots], plan: BatchPlan) -> list[list[int]]:
    """Assigns examples to rows by first-fit decreasing. Each example must fit in an empty row.

    Only examples with the same prompt share a row.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = []
    limits = (plan.length, plan.outputs, plan.targets, plan.examples, plan.decoder)
    for i in sorted(range(len(needs)), key=lambda i: (-needs[i].tokens, i)):
        need = (needs[i].tokens, needs[i].outputs, needs[i].targets, 1, needs[i].decoder)
        for row, free in zip(rows, room, strict=True):
            alike = needs[row[0]].prompt == needs[i].prompt
            if alike and all(n <= f for n, f in zip(need, free, strict=True)):
                row.append(i)
                free[:] = [f - n for n, f in zip(need, free, strict=True)]
                break
        else:
            rows.append([i])
            room.append([limit - n for n, limit in zip(need, limits, strict=True)])
    return rows


def pack(examples: Sequence[Example], plan: BatchPlan, class_weights: Sequence[float] | None = None) -> Batch:
    """Packs examples into rows of numpy arrays.

    Args:
      examples: the examples of one batch.
      plan: the shapes.
      class_weights: a weight per class. It multiplies all weights of an example of that class; for a task head, the
        weight of each position of that class.

    Returns:
      The batch, on the host.

    Raises:
      DataError: an example does not fit in a row of the plan, or has nothing to predict.
    """
    needs = [slots(example, plan.lead(example)) for example in examples]
    for example, need in zip(examples, needs, strict=True):
        limits = (need.outputs, plan.outputs), (need.targets, plan.targets), (need.decoder, plan.decoder)
        if need.tokens > plan.length or any(one > most for one, most in limits):
            decoder = f", {need.decoder} and {plan.decoder} of them for the decoder" if need.decoder else ""
            raise DataError(
                f"record {example.index + 1}: {need.tokens} tokens and {need.targets} targets; rows were planned for"
                f" {plan.length} and {plan.targets}{decoder}; include this example when planning the batches"
            )
    assigned = assign_rows(needs, plan)
    count = plan.rows_for(len(assigned))

    def zeros(width: int, dtype: Any = np.int32) -> Any:
        return np.zeros((count, width), dtype)

    prompt_index: Any = None if plan.lead_length is None else np.zeros(count, np.int32)
    rows = Rows(
        ids=zeros(plan.length),
        stream=Stream(
            zeros(plan.length),
            zeros(plan.length),
            zeros(plan.length),
            prompt_index,
            decoder=zeros(plan.decoder) + np.int32(plan.length) if plan.decoder else None,
            types=zeros(plan.length) if plan.types else None,
            inputs=zeros(plan.length, bool) if plan.inputs else None,
        ),
        outputs=zeros(plan.outputs),
        target_outputs=zeros(plan.targets),
        target_ids=zeros(plan.targets),
        target_weights=zeros(plan.targets, np.float32),
        target_groups=zeros(plan.targets),
        labels=zeros(plan.examples),
        example_weights=zeros(plan.examples, np.float32),
        examples=zeros(plan.examples) - 1,
        extra=empty_extra(examples, count, plan.examples),
    )
    for row, members in enumerate(assigned):
        writer = _RowWriter(rows, row)
        if prompt_index is not None:
            prompt_index[row] = examples[members[0]].prompt
        for slot, i in enumerate(members):
            example = examples[i]
            weight = 1.0 if class_weights is None else class_weights[example.label]
            rows.labels[row, slot] = example.label
            rows.example_weights[row, slot] = weight
            rows.examples[row, slot] = example.index
            for space, value in zip(jax.tree.leaves(rows.extra), jax.tree.leaves(example.extra), strict=True):
                space[row, slot] = value
            if class_weights is not None and example.classes is not None:
                weight = np.asarray(class_weights)[example.classes]
            writer.add(example, plan.lead(example), slot * plan.choices, weight)
    return Batch(plan.lead_ids, rows, plan.lead_length)


@dataclasses.dataclass
class _RowWriter:
    """Writes examples one after another into one row of numpy arrays."""

    rows: Rows
    row: int
    tokens: int = 0
    outputs: int = 0
    targets: int = 0
    segments: int = 0
    decoder: int = 0

    def add(self, example: Example, lead: int, group: int, weight: Any) -> None:
        """Writes an example's tokens and targets.

        Args:
          example: the example.
          lead: how many of its ids are leading ids, which are not written.
          group: the number of its first group.
          weight: the weight of all targets, or one weight per target.
        """
        last = len(example.ids) - int(bool(len(example.predicted)) and example.predicted[-1])
        start = self._tokens(example.ids[lead:last], first_position=lead, parent=0)
        starts = example.starts or 0
        if self.rows.stream.types is not None and example.second_at is not None:
            self.rows.stream.types[self.row, start + example.second_at - lead : self.tokens] = 1
        if self.rows.stream.inputs is not None and example.input_end is not None:
            self.rows.stream.inputs[self.row, start : start + example.input_end - lead] = True
        if example.starts is not None:
            self._decoder(start + starts - lead, first_position=0)
        if example.reads is not None:
            assert example.classes is not None
            outputs = self._outputs(start + example.reads - lead + example.pooled * self.rows.ids.shape[1])
            self._targets(outputs, example.classes, group, weight)
            return
        if not example.choices:
            where = np.flatnonzero(example.predicted)
            outputs = self._outputs(start + where - 1 - lead)
            self._targets(outputs, example.ids[where], group, weight)
            return
        parent = self.segments
        last = len(example.ids) - 1 if example.answer_at is None else example.answer_at
        (end,) = self._outputs(np.asarray([start + last - lead]))
        for number, choice in enumerate(example.choices):
            outputs = np.asarray([end])
            if len(choice) > 1:
                begin = self._tokens(choice[:-1], first_position=len(example.ids) - starts, parent=parent)
                if example.starts is not None:
                    self._decoder(begin, first_position=len(example.ids) - starts)
                outputs = np.append(outputs, self._outputs(begin + np.arange(len(choice) - 1)))
            self._targets(outputs, choice, group + number, weight)

    def _tokens(self, ids: np.ndarray, first_position: int, parent: int) -> int:
        start, stop = self.tokens, self.tokens + len(ids)
        self.tokens = stop
        self.segments += 1
        self.rows.ids[self.row, start:stop] = ids
        self.rows.stream.positions[self.row, start:stop] = first_position + np.arange(len(ids))
        self.rows.stream.segments[self.row, start:stop] = self.segments
        self.rows.stream.parents[self.row, start:stop] = parent
        return start

    def _decoder(self, start: int, first_position: int) -> None:
        """Marks the tokens from `start` to the last one written as the decoder's, with positions of their own."""
        places = np.arange(start, self.tokens)
        stream, begin = self.rows.stream, self.decoder
        self.decoder += len(places)
        assert stream.decoder is not None
        stream.decoder[self.row, begin : self.decoder] = places
        stream.positions[self.row, start : self.tokens] = first_position + places - start

    def _outputs(self, positions: np.ndarray) -> np.ndarray:
        start = self.outputs
        self.outputs += len(positions)
        self.rows.outputs[self.row, start : self.outputs] = positions
        return start + np.arange(len(positions))

    def _targets(self, outputs: np.ndarray, ids: np.ndarray, group: int, weight: Any) -> None:
        part = slice(self.targets, self.targets + len(ids))
        self.targets += len(ids)
        self.rows.target_outputs[self.row, part] = outputs
        self.rows.target_ids[self.row, part] = ids
        self.rows.target_weights[self.row, part] = weight
        self.rows.target_groups[self.row, part] = group


def place_batch(batch: Batch, mesh: Mesh, *, stacked: bool = False) -> Batch:
    """Places a host batch on the mesh: rows are split over data and fsdp, leading ids are replicated.

    Args:
      batch: the batch; if `stacked`, several batches with an additional leading axis.
      mesh: the mesh.
      stacked: see `batch`.

    Returns:
      The batch on the devices of the mesh.
    """
    of_rows = NamedSharding(mesh, PartitionSpec(None, ROWS)) if stacked else row_sharding(mesh)

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    rows = jax.tree.map(lambda array: put(array, of_rows), batch.rows)
    lead = jax.tree.map(lambda array: put(array, replicated(mesh)), (batch.lead_ids, batch.lead_length))
    return Batch(lead[0], rows, lead[1])


def multiples(mesh: Mesh, microbatches: int = 1) -> dict[str, Any]:
    """Returns options of `plan_batches`: the multiples that numbers of rows and tokens need on a mesh."""
    return {"multiple": row_shards(mesh) * microbatches, "length_multiple": mesh.shape["sequence"]}
