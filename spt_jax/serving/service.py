"""What a server serves: a bank of prompts, read from one directory, and how requests are read for them."""

import contextlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.data.templates import MESSAGES
from spt_jax.errors import SptError, did_you_mean
from spt_jax.generation import SamplingConfig
from spt_jax.serving import protocol as api
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.classify import Classifier
from spt_jax.serving.engine import Request
from spt_jax.serving.metrics import Metrics
from spt_jax.serving.worker import QueueFullError, Worker


class RefusedError(SptError):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class Service:
    """What the endpoints share.

    Attributes:
      bank, worker: the prompts, and who answers.
      name: of the bare base among the models.
      folder: of prompt directories, the only place that prompts are read from.
      admin_key: what adds and removes prompts; None lets nobody.
      max_prompt_bytes: the largest prompt directory that is read.
      classifying: the thread of the classifier, which does one request after another.
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
        self.classifier = Classifier(self.bank)
        self.classifying = ThreadPoolExecutor(1, "classifying")
        self._to_classify = 0
        self.metrics = Metrics(worker)
        self.max_prompt_bytes = max_prompt_bytes
        self.created = {name: int(time.time())}

    def load(self, name: str) -> None:
        """Takes in a prompt of the folder.

        Raises:
          RefusedError: the name, the directory or what it holds is wrong.
        """
        if self.folder is None:
            raise RefusedError(403, "the server was started without a directory of prompts", code="no_prompts")
        if not re.fullmatch(api.NAME, name) or name == self.name:
            raise RefusedError(422, f"{name!r} cannot name a prompt", param="name")
        root = self.folder.resolve()
        folder = root / name
        if not folder.resolve().is_relative_to(root):
            raise RefusedError(403, f"{name!r} leads out of the directory of prompts")
        try:
            files = list(folder.iterdir()) if folder.is_dir() else []
            regular = [path for path in files if path.is_file()]
            size = sum(path.stat().st_size for path in regular)
        except OSError as error:
            raise RefusedError(400, f"prompt {name!r}: {error}", code="invalid_prompt") from error
        if not files:
            raise RefusedError(404, f"there is no prompt directory {name!r} on the server", code="model_not_found")
        if any(not path.resolve().is_relative_to(root) for path in files):
            raise RefusedError(403, f"{name!r} leads out of the directory of prompts")
        if any(path.exists() and not (path.is_file() or path.is_dir()) for path in files):
            raise RefusedError(400, f"prompt {name!r} holds something that is no file", code="invalid_prompt")
        if size > self.max_prompt_bytes:
            raise RefusedError(413, f"prompt {name!r} has {size} bytes; {self.max_prompt_bytes} are allowed")
        try:
            self.bank.load(name, folder)
        except (SptError, OSError) as error:
            raise RefusedError(400, f"prompt {name!r}: {error}", code="invalid_prompt") from error
        self.created[name] = int(time.time())

    def remove(self, name: str) -> None:
        """Forgets a prompt.

        Raises:
          UnknownPromptError: there is none of this name.
        """
        self.bank.remove(name)
        self.created.pop(name, None)

    def warm(self, name: str) -> None:
        """Computes what a prompt's requests share, and compiles what the shortest of them need."""
        held = self.bank.held(name)
        if held.generates:
            self.worker.engine.warm(held, len(held.lead) + 1)

    def known(self, model: str) -> str | None:
        """The name of a prompt; None for the bare base."""
        names = self.bank.names
        if model != self.name and model not in names:
            hint = did_you_mean(model, [self.name, *names])
            raise RefusedError(404, f"there is no model {model!r}; {hint}", code="model_not_found", param="model")
        return None if model == self.name else model

    def records(
        self, model: str, texts: Sequence[str] | None, fields: Mapping[str, str] | None
    ) -> list[dict[str, Any]]:
        """What a template reads, from texts or from its fields."""
        template = self.bank.entry(self.known(model)).template
        names = template.prompt_fields
        if (texts is None) == (fields is None):
            raise RefusedError(422, "give either a prompt or fields", param="prompt")
        if fields is not None:
            for name in fields:
                if name not in names:
                    hint = did_you_mean(name, names)
                    raise RefusedError(422, f"{model!r} reads no field {name!r}; {hint}", param="fields")
            return [dict(fields)]
        assert texts is not None
        if template.is_conversation:
            return [{MESSAGES: [{"role": "user", "content": text}]} for text in texts]
        if len(names) != 1:
            listed = ", ".join(names) or "none"
            raise RefusedError(422, f"{model!r} reads the fields {listed}; give them as fields", param="prompt")
        return [{names[0]: text} for text in texts]

    def chat_record(self, model: str, messages: Sequence[api.Message]) -> dict[str, Any]:
        """What a template reads of a chat: all of it, or the one user's turn."""
        name = self.known(model)
        if messages[-1].role == "assistant":
            raise RefusedError(422, "the last turn is the assistant's: nothing is left to say", param="messages")
        template = self.bank.entry(name).template
        if name is None or template.is_conversation:
            turns = [{"role": turn.role, "content": turn.text} for turn in messages]
            return {MESSAGES: turns}
        if len(messages) > 1 or messages[0].role != "user":
            raise RefusedError(
                422, f"{model!r} takes one user's turn: its template has a place for one text", param="messages"
            )
        return self.records(model, [messages[0].text], None)[0]

    def ask(
        self, body: api.Sampled, records: Sequence[Mapping[str, Any]], max_tokens: int | None, alternatives: int = 0
    ) -> list[Request]:
        """The engine's requests: `n` for every record. Without `max_tokens`, as many as there is room for."""
        self.worker.check_room(body.n * len(records))
        name, limit = self.known(body.model), self.worker.engine.context
        entry, held = self.bank.take(name)
        if not held.generates:
            raise RefusedError(
                400, f"{body.model!r} has shifts, gates or a head, and only classifies: /v1/classify", param="model"
            )
        seed, found = secrets.randbits(32) if body.seed is None else body.seed, []
        beyond = self.bank.base.config.max_positions - limit  # positions of the base that a slot does not have
        for record in records:
            encoder = entry.encoder if name else self.bank.encoder(None, record)
            ids = encoder.prompt_ids(record, room=(max_tokens or SamplingConfig.max_new_tokens) + beyond)
            before = held.start - len(held.lead) + len(ids)
            room = limit - before
            if room < (max_tokens or 1):
                raise RefusedError(
                    400,
                    f"{before} tokens of the prompt and max_tokens={max_tokens or 1} make {before + (max_tokens or 1)};"
                    f" {self.name!r} has {limit} positions",
                    code="context_length_exceeded",
                )
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
                found.append(Request(np.asarray(ids), name, sampling, held, alternatives))
        return found

    @contextlib.contextmanager
    def place_to_classify(self) -> Iterator[None]:
        """Counts a request to classify among those that wait. In the thread of the event loop.

        Raises:
          QueueFullError: as many wait as may wait for a slot.
        """
        if self._to_classify >= self.worker.queue:
            raise QueueFullError(f"{self._to_classify} requests to classify wait already")
        self._to_classify += 1
        try:
            yield
        finally:
            self._to_classify -= 1

    def model(self, name: str | None) -> api.Model:
        """As /v1/models lists it."""
        entry = self.bank.entry(name)
        template, virtual = entry.template, entry.virtual
        parts = () if virtual is None else (virtual.shift, virtual.gated, virtual.head)
        model = name or self.name
        return api.Model(
            id=model,
            created=self.created.get(model, 0),
            kind="base" if name is None else "prompt",
            fields=list(template.prompt_fields),
            classes=list(template.verbalizers),
            virtual_tokens=template.virtual_tokens or (0 if virtual is None else virtual.prefix_length),
            bytes=entry.bytes,
            generates=all(part is None for part in parts),
            classifies=entry.classifies,
        )
