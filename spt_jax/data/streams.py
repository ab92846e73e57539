"""Streams of batches for training and evaluation."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spt_jax.data.batches import Batch, BatchPlan, pack
from spt_jax.data.examples import Example

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
    """Yields packed batches with each example once, sorted by length so that rows are well filled.

    Args:
      examples: the examples.
      plan: the shapes, as from `plan_batches`.
      batch_size: the number of examples per batch.

    Yields:
      Batches on the host.
    """
    ordered = sorted(examples, key=lambda example: (example.length, example.index))
    for start in range(0, len(ordered), batch_size):
        yield pack(ordered[start : start + batch_size], plan)
