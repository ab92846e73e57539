"""What the training loop asks of a stream of batches."""

from typing import Any, Protocol, runtime_checkable

from spt_jax.data.batches import Batch
from spt_jax.prompts import PromptParams


@runtime_checkable
class Batches(Protocol):
    """An endless stream of batches whose position is a JSON value."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@runtime_checkable
class SampledBatches(Batches, Protocol):
    """Batches of answers that the prompt being trained samples."""

    def sample(self, params: PromptParams) -> None:
        """Samples what the next batch needs. If it raises, the position is as before.

        Args:
          params: the parameters of the prompt before the step that the batch is for.
        """
        ...
