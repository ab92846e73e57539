"""An answer as it grows: texts that can be shown already, and what tokens they are made of."""

import asyncio
import dataclasses
import functools
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal

from spt_jax.generation import Generated, token_text
from spt_jax.serving import protocol as api
from spt_jax.serving.engine import Request, Ticket
from spt_jax.serving.metrics import Metrics
from spt_jax.serving.worker import Listener, News, Worker

Finished = Literal["stop", "length"]


@dataclasses.dataclass
class Choice:
    """One of the texts that answer a request.

    text_of, token_text: of its ids, and of one that it might have had.
    stop: texts that end it.
    alternatives: by the likeliest ids of each step, their log-probabilities, where they were asked for.
    text: what of it can be shown, since neither more tokens nor a stop string would change it.
    finished: why it ended, in OpenAI's words; None before the end.
    """

    text_of: Callable[[list[int]], str]
    token_text: Callable[[int], str]
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

    def add(self, news: News) -> str:
        """Takes in new tokens, and returns what can be shown of them."""
        before = len(self.text)
        if news.result is None:
            self.ids += news.ids
            self.log_probabilities += news.log_probabilities
            self.alternatives += news.alternatives
            self.text = self.text + shown(self.text_of(self.ids), self.stop)[before:]
        else:
            self._end(news.result)
        return self.text[before:]

    def _end(self, result: Generated) -> None:
        self.ids, self.log_probabilities, self.text = result.ids, result.log_probabilities, result.text
        self.alternatives = result.alternatives
        self.finished = "length" if result.finished == "length" else "stop"

    def pieces(self, since: int = 0) -> list[str]:
        """The text of every token from one on, a character with the last of its bytes."""
        texts = [self.text_up_to(count) for count in range(since, len(self.ids) + 1)]
        return [after[len(before) :] for before, after in itertools.pairwise(texts)]

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
        self._news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
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
            def tell(news: News) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(answer._news.put_nowait, (index, news))

            return tell

        for request in requests:
            if not worker.is_prepared(request):
                await loop.run_in_executor(worker.compiling, worker.prepare, request)
        asked = [(request, listener(index)) for index, request in enumerate(requests)]
        answer._tickets = await asyncio.to_thread(worker.submit, asked)
        named = functools.partial(token_text, worker.engine.bank.base.tokenizer)
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
            index, news = await self._news.get()
            if news.error is not None:
                raise news.error
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._began)
                first = False
            if news.result is None and not self._grows:
                continue
            choice = self.choices[index]
            since, text = len(choice.ids), choice.add(news)
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


def completion_logprobs(choice: Choice, since: int) -> api.CompletionLogprobs:
    """Of the tokens from one on, as completions have it."""
    offset, offsets, pieces = len(choice.text_up_to(since)), [], choice.pieces(since)
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    chosen = choice.log_probabilities[since:]
    top = None
    if choice.alternatives:
        top = [
            # Of ids with one text, the likeliest counts.
            {choice.token_text(id_): value for id_, value in reversed(others.items()) if id_ != own}
            | {piece: log_probability}
            for others, own, piece, log_probability in zip(
                choice.alternatives[since:], choice.ids[since:], pieces, chosen, strict=True
            )
        ]
    return api.CompletionLogprobs(tokens=pieces, token_logprobs=chosen, text_offset=offsets, top_logprobs=top)


def chat_logprobs(choice: Choice, since: int) -> api.ChatLogprobs:
    """Of the tokens from one on, as chat completions have it."""
    pieces, values = choice.pieces(since), choice.log_probabilities[since:]
    alternatives = choice.alternatives[since:] or [{}] * len(pieces)
    return api.ChatLogprobs(
        content=[
            api.TokenLogprob(
                token=piece,
                logprob=value,
                bytes=list(piece.encode()),
                top_logprobs=[
                    api.Alternative(token=piece if id_ == own else choice.token_text(id_), logprob=other)
                    for id_, other in others.items()
                ],
            )
            for own, piece, value, others in zip(choice.ids[since:], pieces, values, alternatives, strict=True)
        ]
    )
