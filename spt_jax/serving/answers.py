"""Answers while they are generated: the text that can already be shown, and the tokens it consists of."""

import asyncio
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal

from spt_jax.inference.answers import Generated
from spt_jax.serving import protocol as api
from spt_jax.serving.metrics import Metrics
from spt_jax.serving.requests import Request, Ticket
from spt_jax.serving.tokens import TokenName, token_name
from spt_jax.serving.worker import Listener, Update, Worker

Finished = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token of an answer.

    Attributes:
      text: the text that it adds to the answer; a character is added by the token with its last byte.
      name: this text, or the token's escaped bytes if it is part of a character.
      bytes: the token's bytes.
      is_partial: whether the token is only part of a character.
    """

    text: str
    name: str
    bytes: bytes
    is_partial: bool


@dataclasses.dataclass
class Choice:
    """One of the texts that answer a request.

    Attributes:
      text_of: returns the text of token ids.
      named: returns the name of a token id.
      stop: strings that end the answer.
      ids: the token ids so far.
      log_probabilities: one per id; NaN for an id with no token before it.
      alternatives: for each step, the log-probabilities of the likeliest ids, if they were requested.
      text: the text that can be shown: neither further tokens nor a stop string can change it.
      finished: the finish reason, as in OpenAI's API; None while the answer is unfinished.
    """

    text_of: Callable[[list[int]], str]
    named: Callable[[int], TokenName]
    stop: tuple[str, ...]
    ids: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)
    text: str = ""
    finished: Finished | None = None

    @property
    def ended(self) -> Finished:
        assert self.finished is not None
        return self.finished

    def add(self, update: Update) -> str:
        """Adds new tokens and returns the text that can now be shown."""
        before = len(self.text)
        if update.result is None:
            self.ids += update.ids
            self.log_probabilities += update.log_probabilities
            self.alternatives += update.alternatives
            self.text = self.text + shown(self.text_of(self.ids), self.stop)[before:]
        else:
            self._end(update.result)
        return self.text[before:]

    def _end(self, result: Generated) -> None:
        self.ids, self.log_probabilities, self.text = result.ids, result.log_probabilities, result.text
        self.alternatives = result.alternatives
        self.finished = "length" if result.finished == "length" else "stop"

    def pieces(self, since: int = 0) -> list[Piece]:
        """Returns the tokens from index `since` on."""
        texts = [self.text_up_to(count) for count in range(since, len(self.ids) + 1)]
        names = [self.named(id_) for id_ in self.ids]
        found = []
        for index, (before, after) in enumerate(itertools.pairwise(texts), since):
            text, name = after[len(before) :], names[index]
            if name.is_partial and name.bytes is not None:
                found.append(Piece(text, name.text, name.bytes, True))
                continue
            # An incomplete character is shown with the token after it.
            follows = index > 0 and names[index - 1].is_partial and not name.text.startswith("\ufffd")
            whole = text.lstrip("\ufffd") if follows else text
            found.append(Piece(text, whole, whole.encode(), False))
        return found

    def text_up_to(self, count: int) -> str:
        """Returns the text of the first `count` tokens; an incomplete character counts only at the answer's end."""
        text = self.text_of(self.ids[:count])
        return text if self.finished and count == len(self.ids) else text.rstrip("\ufffd")


def shown(text: str, stop: Sequence[str]) -> str:
    """Returns the part of a text that further tokens cannot change.

    An incomplete character, or the beginning of a stop string, at the end is held back.
    """
    text = text.rstrip("\ufffd")
    held_back = max((n for string in stop for n in range(len(string)) if text.endswith(string[:n])), default=0)
    return text[: len(text) - held_back]


class Answer:
    """The choices of one HTTP request; each choice is one engine request."""

    def __init__(self, worker: Worker, requests: Sequence[Request], metrics: Metrics, *, each: int, grows: bool):
        self._worker, self._requests, self._metrics = worker, requests, metrics
        self._each, self._grows = each, grows
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._began = time.perf_counter()
        self.choices: list[Choice] = []

    @classmethod
    async def begin(
        cls, worker: Worker, requests: Sequence[Request], metrics: Metrics, *, each: int = 1, grows: bool = False
    ) -> "Answer":
        """Submits either all of the requests to the engine or none.

        Args:
          worker: the worker that answers.
          requests: the engine requests, one per choice.
          metrics: counts the answers and their tokens.
          each: the number of consecutive requests that share one prompt.
          grows: whether to report the text while it is generated.

        Raises:
          QueueFullError, EngineFailedError, ConfigError, DataError: as in `Worker.submit`.
        """
        answer, loop = cls(worker, requests, metrics, each=each, grows=grows), asyncio.get_running_loop()

        def listener(index: int) -> Listener:
            def tell(update: Update) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(answer._updates.put_nowait, (index, update))

            return tell

        for request in requests:
            if not worker.is_prepared(request):
                await loop.run_in_executor(worker.compiling, worker.prepare, request)
        asked = [(request, listener(index)) for index, request in enumerate(requests)]
        answer._tickets = await asyncio.to_thread(worker.submit, asked)
        named = functools.partial(token_name, worker.engine.bank.base.tokenizer)
        answer.choices = [Choice(ticket.text_of, named, ticket.ends.texts) for ticket in answer._tickets]
        return answer

    def cancel(self) -> None:
        """Cancels all unfinished choices."""
        for ticket, choice in zip(self._tickets, self.choices, strict=True):
            if choice.finished is None:
                self._worker.cancel(ticket)

    async def changes(self) -> AsyncGenerator[tuple[int, str, int, Finished | None]]:
        """Yields the choices' changes: choice index, new text, index of the first new token, and finish reason or None.

        Raises:
          EngineFailedError: the engine has stopped.
          ConfigError: values overflow the base's dtype.
        """
        first = True
        while any(choice.finished is None for choice in self.choices):
            index, update = await self._updates.get()
            if update.error is not None:
                raise update.error
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._began)
                first = False
            if update.result is None and not self._grows:
                continue
            choice = self.choices[index]
            since, text = len(choice.ids), choice.add(update)
            if text or choice.finished or since < len(choice.ids):
                yield index, text, since, choice.finished
        self._metrics.answered(len(self.choices), self.usage(), time.perf_counter() - self._began)

    async def finish(self) -> None:
        """Waits until all choices are finished."""
        async for _ in self.changes():
            pass

    def usage(self) -> api.Usage:
        """Returns the number of prompt tokens, virtual ones included, and of generated tokens."""
        prompts = sum(len(request.ids) for request in self._requests[:: self._each])
        new = sum(len(choice.ids) for choice in self.choices)
        return api.Usage(prompt_tokens=prompts, completion_tokens=new, total_tokens=prompts + new)


def completion_logprobs(choice: Choice, since: int = 0, offset: int = 0) -> api.CompletionLogprobs:
    """Returns the log-probabilities of the tokens from `since` on, in the format of the completions API.

    Args:
      choice: the answer.
      since: the index of the first token.
      offset: the number of characters before the answer's text.
    """
    pieces = choice.pieces(since)
    values = [None if math.isnan(value) else value for value in choice.log_probabilities[since:]]
    starts = itertools.accumulate((len(piece.text) for piece in pieces), initial=offset + len(choice.text_up_to(since)))
    top = None
    if choice.alternatives:
        top = [
            # If several ids have the same name, the likeliest is used.
            {_legacy(choice.named(id_)): other for id_, other in reversed(others.items()) if id_ != own}
            | ({} if value is None else {_legacy(piece): value})
            if others
            else None
            for others, own, piece, value in zip(
                choice.alternatives[since:], choice.ids[since:], pieces, values, strict=True
            )
        ]
    names = [_legacy(piece) for piece in pieces]
    return api.CompletionLogprobs(
        tokens=names, token_logprobs=values, text_offset=list(starts)[: len(pieces)], top_logprobs=top
    )


def _legacy(token: Piece | TokenName) -> str:
    """Returns a token's name in the completions API, where a partial character is written bytes:\\xf0\\x9f."""
    name = token.name if isinstance(token, Piece) else token.text
    return f"bytes:{name}" if token.is_partial else name


def chat_logprobs(choice: Choice, since: int) -> api.ChatLogprobs:
    """Returns the log-probabilities of the tokens from `since` on, in the format of the chat completions API."""
    pieces, values = choice.pieces(since), choice.log_probabilities[since:]
    alternatives = choice.alternatives[since:] or [{}] * len(pieces)

    def alternative(id_: int, value: float) -> api.Alternative:
        name = choice.named(id_)
        return api.Alternative(token=name.text, logprob=value, bytes=None if name.bytes is None else list(name.bytes))

    return api.ChatLogprobs(
        content=[
            api.TokenLogprob(
                token=piece.name,
                logprob=value,
                bytes=list(piece.bytes),
                top_logprobs=[
                    api.Alternative(token=piece.name, logprob=other, bytes=list(piece.bytes))
                    if id_ == own
                    else alternative(id_, other)
                    for id_, other in others.items()
                ],
            )
            for own, piece, value, others in zip(choice.ids[since:], pieces, values, alternatives, strict=True)
        ]
    )
