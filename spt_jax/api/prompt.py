"""A prompt with its base: it classifies, generates, scores, and is saved and loaded."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.api.requests import request_set
from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.records import RecordSource, gather_records, rows_of
from spt_jax.data.requests import text_records
from spt_jax.data.sources import check_fields
from spt_jax.data.task import Evaluation, task_of
from spt_jax.errors import CheckpointError, ConfigError, DataError
from spt_jax.evaluation.evaluate import EvaluationConfig, evaluate, make_evaluation_set, score
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import storage
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.storage import SavedPrompt, read_prompt, save_prompt
from spt_jax.runtime.waits import spoken


@dataclasses.dataclass(frozen=True, repr=False)
class Prompt(SavedPrompt):
    """A soft prompt with its base and its template, ready for use.

    The inputs of its methods are texts, if the template has one field; or records, in any form that `spt_jax.fit`
    takes. Records need no target, except in `evaluate`. Programs are compiled at the first call, and for longer or more
    inputs.

    Attributes:
      base: the frozen base.
      progress: whether to say on stderr what takes longer than a second.
    """

    base: FrozenBase
    progress: bool = True

    @staticmethod
    def of(saved: SavedPrompt, base: FrozenBase, *, progress: bool = True) -> "Prompt":
        """Returns a prompt that was loaded for a base, with that base.

        Args:
          saved: the loaded prompt.
          base: the base that it was loaded for.
          progress: as in the attributes.
        """
        return Prompt(saved.method, saved.virtual, saved.template, saved.info, base, progress)

    def __repr__(self) -> str:
        template = self.template
        classes = f", classes={list(template.verbalizers)!r:.120}" if template.verbalizers else ""
        return f"Prompt({self.method!r}, prompt={template.prompt!r}{classes}, base={self.base.name!r})"

    def classify(self, inputs: Iterable[object]) -> list[str]:
        """Returns the likeliest class of each input.

        Args:
          inputs: texts or records.

        Raises:
          ConfigError: the template has no classes, or several fields and the inputs are texts.
          DataError: a record lacks a field or is too long.
        """
        if not self.template.verbalizers or self.template.reads is not None:
            other = "predict" if self.template.reads is not None else "generate"
            raise ConfigError(f"this prompt does not classify inputs: its task is {self._task_name}; use `{other}`")
        return [str(prediction) for prediction in self.predict(inputs)]

    def predict(self, inputs: Iterable[object]) -> list[str | list[str]]:
        """Returns for each input its class, or what the task's head reads in it: a tag per word, or the answer.

        Args:
          inputs: texts or records.

        Raises:
          ConfigError: the task is to generate text, or the template has several fields and the inputs are texts.
          DataError: a record lacks a field or is too long.
        """
        if task_of(self.template).generates:
            raise ConfigError("this prompt generates text and predicts no classes; use `generate` or `score`")
        records, encoder = self._records(inputs), self._encoder()
        if not records:
            return []
        with spoken(f"predicting {len(records):,} answer{'s' * (len(records) > 1)}", shown=self.progress):
            data = request_set(self.base, encoder, [encoder.with_any_label(record) for record in records])
            return [prediction["prediction"] for prediction in evaluate(self.base, data, self.virtual).predictions]

    def generate(
        self,
        inputs: Iterable[object],
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Generates the answer to each input.

        Args:
          inputs: texts or records.
          sampling: how tokens are chosen and what ends an answer; default `SamplingConfig()`, which is greedy.
          max_new_tokens: the maximum number of tokens of an answer, in place of that of `sampling`.

        Returns:
          The text of each answer, without control tokens.

        Raises:
          ConfigError: the prompt classifies or has a head, or the template has several fields and the inputs are texts.
          DataError: a record lacks a field, or is too long for the base together with the new tokens.
        """
        if not task_of(self.template).generates:
            other = "classify" if self.template.reads is None else "predict"
            raise ConfigError(f"this prompt does not generate text: its task is {self._task_name}; use `{other}`")
        records, encoder = self._records(inputs), self._encoder()
        sampling = dataclasses.replace(sampling or SamplingConfig(), end_ids=encoder.end_ids)
        if max_new_tokens is not None:
            sampling = dataclasses.replace(sampling, max_new_tokens=max_new_tokens)
        room = min(sampling.max_new_tokens, encoder.max_length // 2)
        ids = [encoder.prompt_ids(record, room=room) for record in records]
        positions = self.base.layout.max_positions
        most = positions - self.virtual.prefix_length - sampling.max_new_tokens
        for number, own in enumerate(ids, 1):
            if len(own) > most:
                raise DataError(
                    f"record {number}: its {len(own):,} tokens and max_new_tokens={sampling.max_new_tokens:,} need more"
                    f" than the {positions:,} positions of {self.base.name}; shorten the record, or lower"
                    " max_new_tokens"
                )
        with spoken(f"generating {len(ids):,} answer{'s' * (len(ids) > 1)}", shown=self.progress):
            return [answer.text for answer in generate(self.base, ids, self.virtual, sampling)]

    def score(self, inputs: Iterable[object], answers: Sequence[str] | None = None) -> list[dict[str, float]]:
        """Returns the log-probability of each class, or of each of some answers, for each input.

        A verbalizer or an answer has the sum over its tokens, for an answer including the one that ends it.

        Args:
          inputs: texts or records.
          answers: the answers to score, for a prompt that generates text; each takes the place of the target's field.

        Raises:
          ConfigError: a head reads a field, there are answers for a classifier or none for a generator, the target does
            not have exactly one field, or the template has several fields and the inputs are texts.
          DataError: a record lacks a field or is too long.
        """
        records, template, encoder = self._records(inputs), self.template, self._encoder()
        if template.reads is not None:
            raise ConfigError(f"the task {self._task_name} has no score per input; use `predict` or `evaluate`")
        names = self._answers(answers)
        if not records:
            return []
        if template.verbalizers:
            rows: list[Mapping[str, Any]] = [encoder.with_any_label(record) for record in records]
        else:
            rows = [{**record, template.label_field or "": name} for record in records for name in names]
        with spoken(f"scoring {len(rows):,} examples", shown=self.progress):
            scores = score(self.base, request_set(self.base, encoder, rows), self.virtual).reshape(len(records), -1)
        scores = task_of(template).class_scores(scores)
        return [dict(zip(names, map(float, row), strict=True)) for row in scores]

    def evaluate(self, records: RecordSource, config: EvaluationConfig | None = None) -> Evaluation:
        """Computes the metrics of the prompt on records with their targets, as `spt-jax evaluate` does.

        Args:
          records: the records, in any form that `spt_jax.fit` takes.
          config: how the evaluation is run.

        Returns:
          The metrics, and the prediction for each record.

        Raises:
          DataError: the records are of another type, there are none, or one lacks a field or is too long.
        """
        found = gather_records(records, "records")
        check_fields(found, task_of(self.template).required_fields(self.template), "records")
        taken = self.virtual.prefix_length
        with spoken(f"evaluating {len(found):,} records", shown=self.progress):
            data = make_evaluation_set(self.base, self._encoder(), found, config, taken=taken)
            return evaluate(self.base, data, self.virtual)

    def save(self, directory: str | Path) -> Path:
        """Writes the prompt to a directory, which `spt_jax.load_prompt` and all commands read.

        Args:
          directory: created, or replaced if it holds a prompt.

        Returns:
          The directory.

        Raises:
          CheckpointError: the files cannot be written, the directory holds something else, or the prompt was loaded
            with `force` for another base than its own.
        """
        differences = self.base.fingerprint.differences(self.fingerprint)  # also of a quantized base and a float one
        if differences:
            raise CheckpointError(
                f"{directory}: the prompt was trained on {self.info['base']['id']!r} and is used with another base,"
                " which would be recorded as its own; copy its directory instead"
            )
        return save_prompt(directory, self.base, self.method, self.virtual, self.template, extra=self.info.get("extra"))

    @property
    def _task_name(self) -> str:
        return "classification" if self.template.verbalizers and not self.template.reads else self.template.head

    def _encoder(self) -> Encoder:
        return encoder_for(self.base, self.template, taken=self.virtual.prefix_length)

    def _records(self, inputs: Iterable[object]) -> list[dict[str, Any]]:
        """Returns a record for each input."""
        if isinstance(inputs, str):
            raise DataError(f"inputs is one text ({inputs!r:.60}); give a list of texts")
        rows = list(rows_of(inputs, "inputs"))
        if not rows:
            return []
        if all(isinstance(row, str) for row in rows):
            return text_records(self.template, [str(row) for row in rows])
        if any(isinstance(row, str) for row in rows):
            raise DataError("inputs has texts and records; give only texts or only records")
        return gather_records(rows, "inputs")

    def _answers(self, answers: Sequence[str] | None) -> list[str]:
        if self.template.verbalizers:
            if answers is not None:
                raise ConfigError(
                    f"a classifier scores its classes, {', '.join(self.template.verbalizers)}: no answers"
                )
            return list(self.template.verbalizers)
        if not answers or isinstance(answers, str):
            raise ConfigError("this prompt generates text: give a list of the answers to score")
        if self.template.label_field is None or self.template.is_conversation:
            raise ConfigError(
                f"target {self.template.target!r}: answers take the place of its field; it needs exactly one"
            )
        return list(answers)


def load_prompt(
    name: str | Path,
    base: FrozenBase | str | Path | None = None,
    *,
    force: bool = False,
    progress: bool = True,
) -> Prompt:
    """Loads a saved prompt with its base.

    Args:
      name: a directory written by `Prompt.save`, `save_prompt` or `spt-jax train`, or its URL; or a repository of the
        Hugging Face hub: "owner/name" if there is no such directory, or "hf://owner/name@revision/folder".
      base: the base of the prompt, or its path or hub id; default where it was when the prompt was trained.
      force: accept, with a warning, another base of the same width and vocabulary size.
      progress: whether to say on stderr what takes longer than a second.

    Returns:
      The prompt, with its arrays replicated over the mesh of the base.

    Raises:
      CheckpointError: there is no such prompt, it cannot be read, its base is not found, or `base` is another one; the
        message names all fields that differ.
      ConfigError: the architecture of the base is not supported, or a package for the scheme of a URL is missing.
      RemoteError: the hub or the file system cannot be reached, or has no such directory.
    """
    directory = prompt_directory(name)
    if not isinstance(base, FrozenBase):
        base = _load_base(directory, base, progress)
    return Prompt.of(storage.load_prompt(directory, base, force=force), base, progress=progress)


def _load_base(directory: Path, path: str | Path | None, progress: bool) -> FrozenBase:
    """Loads the base from a path or hub id, or from where it was when the prompt was trained."""
    saved = read_prompt(directory)
    info = saved.info["base"]
    if path is None and saved.fingerprint.is_foreign:
        raise CheckpointError(
            f"{directory}: trained on {info['id']!r}, a model given to from_flax; make the base again, and give it as"
            " base="
        )
    where = info["id"] if path is None else str(path)
    try:
        with spoken(f"loading {where}", shown=progress):
            if path is not None:
                return load_base(where)
            return load_base(where, revision=info["revision"], quantize=info["fingerprint"].get("quantize"))
    except CheckpointError as error:
        if path is not None:
            raise
        raise CheckpointError(f"{error}. If the base of {directory} is elsewhere, give it as base=") from error
