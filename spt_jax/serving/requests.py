"""A request to the engine, and its progress."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spt_jax.errors import ConfigError
from spt_jax.inference.answers import Endings, Generated
from spt_jax.inference.generation import NO_ID, SamplingConfig
from spt_jax.serving.bank import DevicePrompt
from spt_jax.serving.fairness import Sender
from spt_jax.serving.slots import MAX_ENDS, MIN_STEPS, Until

# The sender of requests that name none; they are served in the order of arrival.
NOBODY = Sender("", -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A request to generate one answer.

    Attributes:
      ids: real and virtual ids, as from `PromptBank.request_ids`.
      prompt: the name of the soft prompt that the virtual ids belong to; None for the bare base.
      sampling: how tokens are chosen and when the answer ends.
      held: the arrays that the prompt's requests share, from `PromptBank.take`; None looks them up in `submit`.
      alternatives: how many of each step's likeliest tokens to report, at most `decoding.ALTERNATIVES`.
      sender: used for fair scheduling; None for in-process requests, which may take all slots.
    """

    ids: np.ndarray
    prompt: str | None = None
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    held: DevicePrompt | None = None
    alternatives: int = 0
    sender: Sender | None = None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A submitted request and its progress.

    Attributes:
      request: the request.
      held: the prompt's arrays at the time of submission, even if the prompt is replaced or removed later.
      ends: the ids and strings that end the answer.
      text_of: returns the text of token ids.
      ids: the generated ids so far.
      log_probabilities: one per generated id.
      alternatives: per generated id, the log-probabilities of the likeliest ids.
      parent: the segment of the shared entries that its tokens follow; 0 for none.
      done: whether the request has ended.
      result: the answer; None before the end, and if the request was cancelled or has failed.
      error: the error, if the request has failed.
    """

    request: Request
    held: DevicePrompt
    ends: Endings
    text_of: Callable[[list[int]], str]
    ids: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)
    parent: int = 0
    done: bool = False
    result: Generated | None = None
    error: ConfigError | None = None

    @property
    def sender(self) -> Sender:
        return self.request.sender or NOBODY


def until(tickets: Sequence[Ticket], most: int, waiting: bool) -> Until:
    """Returns when a decode call for these requests ends.

    Args:
      tickets: the requests.
      most: the most steps of the call.
      waiting: whether other requests wait for a slot.
    """
    ends = [ticket.ends for ticket in tickets]
    remaining = [ticket.request.sampling.max_new_tokens - len(ticket.ids) for ticket in tickets]
    end_ids = sorted(frozenset().union(*(end.ids for end in ends)))
    if any(end.texts for end in ends) or len(end_ids) > MAX_ENDS:
        most = min(most, MIN_STEPS)  # the device does not detect these ends
    # Returning early for a free slot only helps if requests wait.
    steps = min(most, max(min(remaining), MIN_STEPS) if waiting else max(remaining, default=0))
    detected = np.full(MAX_ENDS, NO_ID, np.int32)
    detected[: len(end_ids)] = end_ids[:MAX_ENDS]
    arrays: Any = np.int32(steps), np.int32(1 if waiting else len(tickets)), detected
    return Until(*arrays)
