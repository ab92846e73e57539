"""Streams of batches for training and evaluation."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spt_jax.data.batches import Batch, BatchPlan, assign_rows, pack, round_up
from spt_jax.data.examples import Example
from spt_jax.data.row_space import slots

if TYPE_CHECKING:
    import grain


def training_batches(
    examples: Sequence[Example],
    plan: BatchPlan,
    *,
    batch_size: int,
    seed: int,
    class_weights: Sequence[float] | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Returns an endless stream of packed batches, reshuffled each epoch.

    `get_state()` returns plain JSON, and `set_state` resumes exactly there. Each process packs the same batch and takes
    its own rows when the batch is placed, so the result does not depend on the number of processes.

    Args:
      examples: the examples.
      plan: the shapes, as from `plan_batches`.
      batch_size: the number of examples per batch.
      seed: that of the order.
      class_weights: as in `pack`.

    Returns:
      The iterator.
    """
    import grain

    dataset = grain.MapDataset.source(_Source(examples)).seed(seed).shuffle().repeat()
    # With a batch size of 1, `batch` would make the endless dataset longer than the maximum length in grain.
    chunks = dataset.map(lambda example: [example]) if batch_size == 1 else dataset.batch(batch_size, batch_fn=list)
    dataset = chunks.map(lambda chunk: pack(chunk, plan, class_weights))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


@dataclasses.dataclass(frozen=True)
class _Source:
    """Random access for grain. Its short repr keeps grain from printing the whole list in messages."""

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __repr__(self) -> str:
        return f"{len(self.examples)} examples"


def evaluation_batches(examples: Sequence[Example], plan: BatchPlan, batch_size: int) -> Iterator[Batch]:
    """Yields packed batches with each example once. All have examples of all lengths, and need about as many rows.

    Args:
      examples: the examples.
      plan: the shapes, as from `plan_batches`.
      batch_size: the number of examples per batch.

    Yields:
      Batches on the host.
    """
    for chunk in _even_chunks(examples, batch_size):
        yield pack(chunk, plan)


def evaluation_plans(sets: Sequence[Sequence[Example]], plans: Sequence[BatchPlan], batch_size: int) -> list[BatchPlan]:
    """Returns plans for `evaluation_batches` with as few shapes as possible: fewer programs are compiled.

    Args:
      sets: for each set, its examples.
      plans: for each set, the shapes as from `plan_batches`.
      batch_size: the number of examples per batch.

    Returns:
      For each set, its plan with the number of rows that its largest batch needs. Sets with the same leading ids get
      the same shapes, unless a set would then have more than a quarter of its rows empty.
    """
    first = plans[0]
    if any(_kind(plan) != _kind(first) for plan in plans):
        return [evaluation_plans([one], [plan], batch_size)[0] for one, plan in zip(sets, plans, strict=True)]
    length, outputs, targets, most = (
        max(getattr(plan, name) for plan in plans) for name in ("length", "outputs", "targets", "examples")
    )
    shared = dataclasses.replace(first, length=length, outputs=outputs, targets=targets, examples=most, row_buckets=())
    needed = [
        max(len(assign_rows([slots(e, shared.lead(e)) for e in chunk], shared)) for chunk in chunks)
        for chunks in (_even_chunks(examples, batch_size) for examples in sets)
    ]
    rows = [round_up(count, shared.multiple) for count in needed]
    most_rows = max(rows)
    return [dataclasses.replace(shared, row_buckets=(most_rows if 4 * own > 3 * most_rows else own,)) for own in rows]


def _kind(plan: BatchPlan) -> tuple[bytes, ...]:
    """Returns what two plans must have in common to be merged."""
    lengths = () if plan.lead_length is None else tuple(plan.lead_length.tolist())
    packs = plan.examples > 1
    return plan.lead_ids.tobytes(), repr((plan.lead_ids.shape, lengths, plan.choices, plan.multiple, packs)).encode()


def _even_chunks(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Returns the examples in chunks of at most `batch_size`, with about the same lengths in each."""
    ordered = sorted(examples, key=lambda example: (example.length, example.index))
    count = -(-len(ordered) // batch_size)
    return [ordered[first::count] for first in range(count)]
