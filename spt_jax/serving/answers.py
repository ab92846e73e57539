"""An answer as it grows: texts that can be shown already, and what tokens they are made of."""

import asyncio
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal

from spt_jax.inference.generation import Generated
from spt_jax.serving import protocol as api
from spt_jax.serving.engine import Request, Ticket
from spt_jax.serving.metrics import Metrics
from spt_jax.serving.tokens import TokenName, token_name
from spt_jax.serving.worker import Listener, Update, Worker

Finished = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of an answer.

    Attributes:
      text: what it adds to the answer's text; a character comes with the last of its bytes.
      name: this text, or the token's bytes, escaped, where it is a part of a character.
      bytes: the token's own.
      is_partial: whether it is a part of a character.
    """

    text: str
    name: str
    bytes: bytes
    is_partial: bool


@dataclasses.dataclass
class Choice:
    """One of the texts that answer a request.

    text_of, named: the text of its ids, and the name of one that it might have had.
    stop: texts that end it.
    log_probabilities: of the ids; NaN for one that nothing precedes.
    alternatives: by the likeliest ids of each step, their log-probabilities, where they were asked for.
    text: what of it can be shown, since neither more tokens nor a stop string would change it.
    finished: why it ended, in OpenAI's words; None before the end.
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
        """Takes in new tokens, and returns what can be shown of them."""
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
        """The tokens from one on."""
        texts = [self.text_up_to(count) for count in range(since, len(self.ids) + 1)]
        names = [self.named(id_) for id_ in self.ids]
        found = []
        for place, (before, after) in enumerate(itertools.pairwise(texts), since):
            text, own = after[len(before) :], names[place]
            if own.is_partial and own.bytes is not None:
                found.append(Piece(text, own.text, own.bytes, True))
                continue
            # Parts of a character that were never completed are shown with what follows them.
            follows = place > 0 and names[place - 1].is_partial and not own.text.startswith("\ufffd")
            whole = text.lstrip("\ufffd") if follows else text
            found.append(Piece(text, whole, whole.encode(), False))
        return found

    def text_up_to(self, count: int) -> str:
        """Of the first tokens, without half characters unless these are all tokens there will be."""
        text = self.text_of(self.ids[:count])
        return text if self.finished and count == len(self.ids) else text.rstrip("\ufffd")


def shown(text: str, stop: Sequence[str]) -> str:
    """What of a text more tokens will not change: without half characters, and no beginning of a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for own in stop for n in range(len(own)) if text.endswith(own[:n])), default=0)
    return text[: len(text) - held]


class Answer:
    """The choices of one HTTP request, each a request of the engine's."""

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
        """Hands all of them to the engine, or none.

        Args:
          worker, requests, metrics: who answers what, and who counts it.
          each: so many requests in a row ask the same.
          grows: texts are wanted while they grow.

        Raises:
          QueueFullError, EngineFailedError, ConfigError, DataError: as `Worker.submit`.
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
        """Ends what has no answer yet."""
        for ticket, choice in zip(self._tickets, self.choices, strict=True):
            if choice.finished is None:
                self._worker.cancel(ticket)

    async def changes(self) -> AsyncGenerator[tuple[int, str, int, Finished | None]]:
        """Choices as they grow: which, the text that is new, its first new token, and why it ended if it has.

        Raises:
          EngineFailedError: there will be no more.
          ConfigError: numbers overflow.
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
        """Waits for all."""
        async for _ in self.changes():
            pass

    def usage(self) -> api.Usage:
        """Tokens that came in, virtual ones too, and that went out."""
        prompts = sum(len(request.ids) for request in self._requests[:: self._each])
        new = sum(len(choice.ids) for choice in self.choices)
        return api.Usage(prompt_tokens=prompts, completion_tokens=new, total_tokens=prompts + new)


def completion_logprobs(choice: Choice, since: int = 0, offset: int = 0) -> api.CompletionLogprobs:
    """Of the tokens from one on, as completions have it.

    Args:
      choice: the answer.
      since: the first token.
      offset: characters in front of the answer's text.
    """
    pieces = choice.pieces(since)
    values = [None if math.isnan(value) else value for value in choice.log_probabilities[since:]]
    starts = itertools.accumulate((len(piece.text) for piece in pieces), initial=offset + len(choice.text_up_to(since)))
    top = None
    if choice.alternatives:
        top = [
            # Of ids with one name, the likeliest counts.
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
    """A token's name in completions, where a part of a character is written bytes:\\xf0\\x9f."""
    name = token.name if isinstance(token, Piece) else token.text
    return f"bytes:{name}" if token.is_partial else name


def chat_logprobs(choice: Choice, since: int) -> api.ChatLogprobs:
    """Of the tokens from one on, as chat completions have it."""
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
