"""The service behind the endpoints: a bank of prompts loaded from one directory, and the reading of requests."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spt_jax.data.encoder import Encoder
from spt_jax.data.requests import field_record, text_records
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import ConfigError, SptError, did_you_mean
from spt_jax.inference.answers import continuation_text, is_opening
from spt_jax.inference.generation import SamplingConfig
from spt_jax.serving import protocol as api
from spt_jax.serving.answers import Choice
from spt_jax.serving.bank import DevicePrompt, Entry, PromptBank, can_generate
from spt_jax.serving.classify import Classifier
from spt_jax.serving.fairness import Lane, Sender, has_share
from spt_jax.serving.lengths import size, text_bound, texts_of
from spt_jax.serving.metrics import Metrics
from spt_jax.serving.prompt_directories import RefusedError, checked_directory
from spt_jax.serving.prompt_examples import examples_for, read_examples
from spt_jax.serving.requests import Request
from spt_jax.serving.scoring import score_tokens
from spt_jax.serving.tokens import token_name
from spt_jax.serving.worker import QueueFullError, Worker

logger = logging.getLogger(__name__)

# Texts of more bytes than this take turns in one thread to be tokenized, which bounds the memory.
LONG = 2**15
# Number of texts that are classified in one turn.
TOGETHER = 16

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Echo:
    """An echoed prompt.

    Attributes:
      choice: the prompt in the form of an answer.
      prompt_tokens: the number of tokens of the prompt and its template.
    """

    choice: Choice
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class _Echoed:
    """The ids of a prompt, of which `ids[first:last]` are echoed."""

    name: str | None
    entry: Entry
    ids: np.ndarray
    first: int
    last: int


class Service:
    """The state that all endpoints share.

    Attributes:
      bank: the prompts.
      worker: the worker that runs the engine.
      name: the name of the bare base among the models.
      folder: the directory of prompt directories; prompts are loaded from nowhere else.
      admin_key: the key for adding and removing prompts; None forbids both.
      refresh: brings `folder` up to date before a prompt is loaded, if it is a copy of a remote directory.
      max_prompt_bytes: the size of the largest prompt directory that is loaded.
      reading: a thread that tokenizes long texts; senders take turns.
      scoring: a thread that scores classes and echoed tokens; senders take turns.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        folder: Path | None,
        admin_key: str | None = None,
        max_prompt_bytes: int = 2**28,
    ):
        self.worker, self.name, self.folder, self.admin_key = worker, name, folder, admin_key
        self.bank: PromptBank = worker.engine.bank
        self.classifier = Classifier(self.bank, worker.compilations)
        self._examples: dict[str, list[str | dict[str, str]]] = {}
        self.reading, self.scoring = Lane("reading"), Lane("scoring")
        self._placed: collections.Counter[str] = collections.Counter()
        self._bound = text_bound(self.bank.base.tokenizer)
        self.metrics = Metrics(worker)
        self.refresh: Callable[[], None] = lambda: None
        self.max_prompt_bytes = max_prompt_bytes
        self.created = {name: int(time.time())}

    def load(self, name: str) -> None:
        """Loads a prompt from the directory of prompts.

        Raises:
          RefusedError: the name, the directory or its contents are invalid.
        """
        if self.folder is None:
            raise RefusedError(403, "the server was started without a directory of prompts", code="no_prompts")
        if not re.fullmatch(api.NAME, name) or name == self.name:
            raise RefusedError(422, f"{name!r} cannot name a prompt", param="name")
        try:
            self.refresh()
            folder = checked_directory(self.folder, name, self.max_prompt_bytes)
            examples = read_examples(folder)
            self.bank.load(name, folder)
            self._examples[name] = examples
        except RefusedError:
            raise
        except (SptError, OSError) as error:
            raise RefusedError(400, f"prompt {name!r}: {error}", code="invalid_prompt") from error
        except Exception as error:  # anything that the code that reads the files may raise
            logger.info("prompt %r cannot be read", name, exc_info=error)
            why = f"{type(error).__name__}: {error}"
            raise RefusedError(400, f"prompt {name!r} cannot be read ({why})", code="invalid_prompt") from error
        self.created[name] = int(time.time())

    def remove(self, name: str) -> None:
        """Removes a prompt.

        Raises:
          UnknownPromptError: there is no prompt with this name.
        """
        self.bank.remove(name)
        self.created.pop(name, None)
        self._examples.pop(name, None)

    def warm(self, name: str) -> None:
        """Computes the arrays that a prompt's requests share, and compiles the programs for the shortest requests."""
        held = self.bank.held(name)
        if held.generates and self.bank.base.layout.generates:
            self.worker.engine.warm(held, len(held.lead) + 1)

    def known(self, model: str) -> str | None:
        """Returns the prompt's name for a model's name; None for the bare base.

        Raises:
          RefusedError: there is no such model.
        """
        names = self.bank.names
        if model != self.name and model not in names:
            hint = did_you_mean(model, [self.name, *names])
            raise RefusedError(404, f"there is no model {model!r}; {hint}", code="model_not_found", param="model")
        return None if model == self.name else model

    def records(
        self, model: str, texts: Sequence[str | Sequence[int]] | None, fields: Mapping[str, str] | None
    ) -> list[dict[str, Any]]:
        """Returns the records for a template, from texts (or their token ids) or from its fields.

        Raises:
          RefusedError: the template needs other fields, or a text is too long however it is tokenized.
        """
        template = self.bank.entry(self.known(model)).template
        if (texts is None) == (fields is None):
            raise RefusedError(422, "give either a prompt or fields", param="prompt")
        if texts and template.is_conversation and not all(isinstance(text, str) for text in texts):
            raise RefusedError(422, f"{model!r} reads a chat and does not take token ids", param="prompt")
        try:
            records = text_records(template, texts or ()) if fields is None else [field_record(template, fields)]
        except ConfigError as error:
            raise RefusedError(422, f"{model!r}: {error}", param="prompt" if fields is None else "fields") from error
        return [self._bounded(model, template, record) for record in records]

    def classifies(self, model: str) -> bool:
        """Returns whether a model is a prompt that classifies whole records.

        Raises:
          RefusedError: there is no such model.
        """
        return self.bank.entry(self.known(model)).classifies

    def chat_record(self, model: str, messages: Sequence[api.Message]) -> dict[str, Any]:
        """Returns the record for a template from a chat: the whole chat, or the text of its only user turn."""
        name = self.known(model)
        if messages[-1].role == "assistant":
            raise RefusedError(422, "the last turn is the assistant's, so there is nothing to answer", param="messages")
        template = self.bank.entry(name).template
        if template.is_conversation or (name is None and not self.bank.base.layout.encodes):
            turns = [{"role": turn.role, "content": turn.text} for turn in messages]
            return self._bounded(model, template, {MESSAGES: turns})
        if len(messages) > 1 or messages[0].role != "user":
            raise RefusedError(
                422, f"{model!r} takes a single user turn, because its template reads one text", param="messages"
            )
        return self.records(model, [messages[0].text], None)[0]

    def _bounded(self, model: str, template: Template, record: dict[str, Any]) -> dict[str, Any]:
        """Returns the record if its texts can fit; the field that may be truncated is cut to the most that can fit."""
        if self._bound is None:
            return record
        limit, name = self.bank.base.layout.max_positions, template.truncate
        most = limit * self._bound.longest
        if name in record and not self._bound.folds_spaces:
            text = record[name]
            record = {**record, name: text[:most] if template.keep == "start" else text[-most:]}
        given = sum(map(self._bound.bytes, texts_of({key: own for key, own in record.items() if key != name})))
        if given > most:
            raise RefusedError(
                400,
                f"{given} bytes of text are too long: {model!r} has {limit} positions, and a token stands for at most"
                f" {self._bound.longest} bytes",
                code="context_length_exceeded",
            )
        return record

    async def read(self, sender: Sender, records: Sequence[Mapping[str, Any]], work: Callable[[], T]) -> T:
        """Runs work that tokenizes records in another thread; with long texts, in the sender's turn.

        Raises:
          QueueFullError: too many requests wait for their turn.
        """
        if sum(size(text) for record in records for text in texts_of(record)) > LONG:
            with self._place(sender.client):
                return await self.reading.run(sender, work)
        return await asyncio.to_thread(work)

    def ask(
        self,
        body: api.Sampled,
        records: Sequence[Mapping[str, Any]],
        max_tokens: int | None,
        alternatives: int = 0,
        sender: Sender | None = None,
    ) -> list[Request]:
        """Returns the engine's requests: `n` for each record. Without `max_tokens`, an answer may fill its slot."""
        name, entry, held = self._generator(body.model)
        seed, found = secrets.randbits(32) if body.seed is None else body.seed, []
        # The number of the base's positions that neither the prompt takes nor a slot has.
        engine, positions = self.worker.engine, self.bank.base.layout.max_positions
        beyond = positions - held.start - engine.room(held, len(held.lead))
        for record in records:
            encoder = entry.encoder if name else self.bank.encoder(None, record)
            # At most half of a slot, so that a field that may be truncated is never truncated to nothing.
            wanted = min(max_tokens or SamplingConfig.max_new_tokens, engine.context // 2)
            reserved = wanted + beyond
            ids, _ = self._prompt_ids(name, encoder, record, reserved)
            room = self._room(held, ids, max_tokens or 1)
            greedy = body.temperature == 0
            for number in range(body.n):
                sampling = SamplingConfig(
                    max_new_tokens=max_tokens or room,
                    temperature=body.temperature,
                    top_k=0 if greedy else body.top_k,
                    top_p=1.0 if greedy else body.top_p,
                    stop=body.stops,
                    end_ids=encoder.end_ids,
                    seed=(seed + number) % 2**32,
                )
                found.append(Request(np.asarray(ids), name, sampling, held, alternatives, sender))
        return found

    def _generator(self, model: str) -> tuple[str | None, Entry, DevicePrompt]:
        """Returns a prompt that can generate text, or the bare base.

        Raises:
          RefusedError: there is no such model, or it only classifies.
        """
        name = self.known(model)
        entry, held = self.bank.take(name)
        if entry.template.reads is not None:
            raise RefusedError(
                400,
                f"{model!r} labels words of a field, which the server does not; use `spt-jax generate`",
                param="model",
            )
        if entry.classifies:
            raise RefusedError(400, f"{model!r} only classifies; use /v1/classify", param="model")
        if not held.generates:
            raise RefusedError(
                400, f"the server cannot generate text with {model!r}; use `spt-jax generate`", param="model"
            )
        return name, entry, held

    def _room(self, held: DevicePrompt, ids: np.ndarray, max_tokens: int) -> int:
        """Returns how many tokens an answer may have after these ids.

        Raises:
          RefusedError: it is fewer than `max_tokens`.
        """
        room, before = self.worker.engine.room(held, len(ids)), held.start - len(held.lead) + len(ids)
        if room < max_tokens:
            raise RefusedError(
                400,
                f"the prompt's {before} tokens and max_tokens={max_tokens} add up to {before + max_tokens}, but"
                f" {self.name!r} has {before + room} positions",
                code="context_length_exceeded",
            )
        return room

    def _prompt_ids(
        self, name: str | None, encoder: Encoder, record: Mapping[str, Any], room: int = 0
    ) -> tuple[np.ndarray, int | None]:
        """Returns the prompt's ids, and the index of the first given token id; None if the record has texts."""
        given = next((value for value in record.values() if not isinstance(value, str)), None)
        if given is None or MESSAGES in record:
            return encoder.prompt_ids(record, room=room), None
        vocab_size = self.bank.base.layout.vocab_size
        unknown = next((id_ for id_ in given if id_ >= vocab_size), None)
        if unknown is not None:
            raise RefusedError(400, f"token id {unknown}: the base has {vocab_size} tokens", param="prompt")
        if name is None and not self.bank.base.layout.encodes:
            return np.asarray(given, np.int32), 0
        return encoder.prompt_ids_around(given)

    async def echo(
        self, model: str, records: Sequence[Mapping[str, Any]], alternatives: int | None, sender: Sender
    ) -> list[Echo]:
        """Returns the texts or token ids of records, with log-probabilities unless `alternatives` is None.

        Raises:
          RefusedError: the text's tokens could merge with the words that the template puts around it, or the prompt is
            empty or too long.
          QueueFullError: too many requests wait for their turn.
          ConfigError: values overflow the base's dtype.
        """
        found = await self.read(sender, records, lambda: [self._to_echo(model, record) for record in records])
        with self._place(sender.client):
            work = [functools.partial(self._echo, echoed, alternatives) for echoed in found]
            return [await self.scoring.run(sender, piece) for piece in work]

    def _to_echo(self, model: str, record: Mapping[str, Any]) -> _Echoed:
        name, entry, held = self._generator(model)
        if self.bank.base.layout.encodes:
            raise RefusedError(
                400,
                f"{self.name!r} is an encoder-decoder, which predicts no token of a prompt, so there is no echo",
                param="echo",
            )
        ids, place = self._prompt_ids(name, entry.encoder if name else self.bank.encoder(None, record), record)
        if place is None:
            if name is not None:
                raise RefusedError(
                    422,
                    f"echo needs the prompt as token ids: the template of {model!r} puts words around the text, and the"
                    " text's tokens could merge with them",
                    param="echo",
                )
            place = len(entry.encoder.prompt_ids(dict.fromkeys(record, "")))
        self._room(held, ids, 0)
        if not len(ids):
            raise RefusedError(400, "the prompt is empty, so there is nothing to echo", param="prompt")
        given = next((len(value) for value in record.values() if not isinstance(value, str)), len(ids) - place)
        return _Echoed(name, entry, ids, place, place + given)

    def _echo(self, echoed: _Echoed, alternatives: int | None) -> Echo:
        base, part = self.bank.base, slice(echoed.first, echoed.last)
        choice = Choice(
            functools.partial(continuation_text, base.tokenizer, opens=is_opening(base, echoed.ids[: echoed.first])),
            functools.partial(token_name, base.tokenizer),
            (),
            echoed.ids[part].tolist(),
            finished="length",
        )
        choice.text = choice.text_of(choice.ids)
        if alternatives is not None:
            scores = score_tokens(base, echoed.name, echoed.entry, echoed.ids, alternatives)
            choice.log_probabilities = scores.log_probabilities[part]
            choice.alternatives = scores.alternatives[part] if alternatives else []
        return Echo(choice, len(echoed.ids))

    async def classify(self, name: str, records: Sequence[Mapping[str, Any]], sender: Sender) -> list[dict[str, float]]:
        """Returns the log-probabilities of all classes for each record; a few records are scored per turn.

        Raises:
          QueueFullError: too many requests wait for their turn.
          ConfigError, DataError: as in `Classifier`.
        """
        asked = await self.read(sender, records, lambda: self.classifier.read(name, records))
        with self._place(sender.client):
            found = []
            for first in range(0, len(records), TOGETHER):
                work = functools.partial(self.classifier.score, asked, first, first + TOGETHER)
                found += await self.scoring.run(sender, work)
            return found

    @contextlib.contextmanager
    def _place(self, client: str) -> Iterator[None]:
        """Counts a request as waiting for its turn. Call it in the event loop's thread.

        Raises:
          QueueFullError: as many requests wait as may wait for a slot.
        """
        if not has_share(self._placed, client, 1, self.worker.queue):
            raise QueueFullError(f"{self._placed.total()} requests are already waiting")
        self._placed[client] += 1
        try:
            yield
        finally:
            self._placed[client] -= 1
            self._placed += collections.Counter()  # removes clients that have none

    def model(self, name: str | None) -> api.Model:
        """Returns the description of a model for /v1/models."""
        entry = self.bank.entry(name)
        template, virtual = entry.template, entry.virtual
        model = name or self.name
        return api.Model(
            id=model,
            created=self.created.get(model, 0),
            kind="base" if name is None else "prompt",
            template=template.prompt,
            fields=list(template.prompt_fields),
            classes=list(template.verbalizers),
            examples=examples_for(self._examples.get(model, ()), template.prompt_fields),
            virtual_tokens=template.virtual_tokens or (0 if virtual is None else virtual.prefix_length),
            bytes=entry.bytes,
            generates=can_generate(virtual) and not template.verbalizers,
            classifies=entry.classifies,
        )
