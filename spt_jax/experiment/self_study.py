"""Self-study: questions about a text that the base itself writes, with its answers, as records of a distillation.

The base reads the text and then a seed prompt of some kind, such as facts or summary, which may quote a passage, and
continues it with a question (Eyuboglu et al. 2025, arXiv 2506.06266, whose seed prompts are for chat models; here there
are also those for bases without a chat template). Then it answers the question, again after the text.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.sources import read_text
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import CheckpointError, ConfigError, DataError
from spt_jax.evaluation.after_text import ids_after_text
from spt_jax.experiment.distillation import answered, answers_after_text, check_answers
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.runtime.files import write_text
from spt_jax.training.objectives import Distillation

STUDY_FILE = "self_study.jsonl"
# What a seed prompt of each kind asks the base to write.
SEEDS: Mapping[str, tuple[str, ...]] = {
    "facts": (
        "a question about a fact in the text",
        "a question about a name, a number or a place in the text",
        "a question that only the text answers",
    ),
    "summary": ("a request to summarize a part of the text", "a request for the main points of the text"),
    "structure": (
        "a request to write a part of the text as a list or a table",
        "a request to write the facts of the text as JSON",
    ),
    "use": (
        "a question of someone who wants to use what the text says",
        "a practical problem that the text helps to solve",
    ),
    "creative": ("a request for a story or a poem about the text", "a request for a new example of what the text says"),
}
# The most attempts for each question that is asked for.
_ATTEMPTS = 4
_PASSAGE = re.compile(r"[^\s.!?\n][^.!?\n]*[.!?]?")
_LONGEST_PASSAGE = 120  # characters
# A question with this many words loops if it has fewer different words than this share of them.
_LOOP_WORDS, _LOOP_SHARE = 6, 0.5


@dataclasses.dataclass(frozen=True)
class Study:
    """Records of a self-study.

    Attributes:
      train: the records to train on.
      validation: further records, with other questions.
      kinds: the kind of the seed prompt of each record, of `train` and then of `validation`.
    """

    train: tuple[Mapping[str, Any], ...]
    validation: tuple[Mapping[str, Any], ...]
    kinds: tuple[str, ...]


def check_study(template: Template) -> str:
    """Returns the field that questions go into: the only one of the prompt, or `messages`.

    Args:
      template: the template of the run.

    Raises:
      ConfigError: the prompt has several fields or none, or the target is not one field that the base can generate.
    """
    check_answers(template)
    if template.is_conversation:
        return MESSAGES
    if len(template.prompt_fields) != 1:
        raise ConfigError(
            f"loss.study writes questions into the only field of data.prompt; {template.prompt!r} has"
            f" {len(template.prompt_fields)}"
        )
    return template.prompt_fields[0]


def self_study(
    base: FrozenBase, encoder: Encoder, objective: Distillation, text: Int[np.ndarray, " P"], batch_size: int
) -> Study:
    """Returns different questions about the text, with answers.

    Questions that are empty, that loop, or that differ from another only in case, blanks and punctuation are left out,
    and others are written in their place. They depend only on the base, the text, the template and the options.

    Args:
      base: the frozen base.
      encoder: that of the template.
      objective: how many questions are written, and how they are sampled.
      text: the ids of the text.
      batch_size: questions that are generated together.

    Raises:
      ConfigError: as in `check_study`, or the text and a question leave no positions for an answer.
      DataError: the base repeats itself, so that it does not write enough different questions.
    """
    field, wanted = check_study(encoder.template), objective.study + objective.study_validation
    passages = [found[:_LONGEST_PASSAGE] for found in _PASSAGE.findall(read_text(objective.text)) if " " in found]
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    tried, left_out = 0, {"empty": 0, "looping": 0, "repeated": 0, "unanswered": 0}
    while len(found) < wanted and tried < _ATTEMPTS * wanted:
        numbers = range(tried, min(tried + wanted - len(found), _ATTEMPTS * wanted))
        tried = numbers.stop
        kinds = [objective.study_kinds[number % len(objective.study_kinds)] for number in numbers]
        seeds = [_seed(kind, passages, number) for kind, number in zip(kinds, numbers, strict=True)]
        new: dict[str, tuple[str, str]] = {}
        for kind, question in zip(kinds, _questions(base, objective, text, seeds, numbers, batch_size), strict=True):
            problem = _problem(question, [*found, *new])
            if problem is None:
                new[_normalized(question)] = kind, question
            else:
                left_out[problem] += 1
        asked = [_record(field, question) for _, question in new.values()]
        answers = answers_after_text(base, encoder, objective, text, asked, batch_size)
        for (key, (kind, _)), record, answer in zip(new.items(), asked, answers, strict=True):
            if answer:
                found[key] = kind, answered(encoder.template, record, answer)
            else:
                left_out["unanswered"] += 1
    if len(found) < wanted:
        numbers_of = ", ".join(f"{count:,} {name}" for name, count in left_out.items())
        raise DataError(
            f"loss.text={objective.text}: the base wrote {len(found):,} different questions about the text in"
            f" {tried:,} attempts ({numbers_of}), and loss.study and loss.study_validation ask for {wanted:,}; ask for"
            " fewer, raise loss.study_temperature, or give questions as data.train"
        )
    kinds, records = zip(*found.values(), strict=True)
    return Study(records[: objective.study], records[objective.study :], kinds)


def write_study(path: Path, study: Study) -> None:
    """Writes a self-study to a file, a line for each record.

    Args:
      path: the file; replaced if it exists.
      study: the records.

    Raises:
      WriteError: the file cannot be written.
    """
    splits = ["train"] * len(study.train) + ["validation"] * len(study.validation)
    records = [*study.train, *study.validation]
    lines = (
        json.dumps({"split": split, "kind": kind, "record": record}, ensure_ascii=False)
        for split, kind, record in zip(splits, study.kinds, records, strict=True)
    )
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_study(path: Path) -> Study:
    """Reads the file that `write_study` wrote.

    Args:
      path: the file.

    Raises:
      CheckpointError: it cannot be read, or is damaged.
    """
    by_split: dict[str, list[Mapping[str, Any]]] = {"train": [], "validation": []}
    kinds = []
    try:
        # JSON leaves some characters as they are at which `splitlines` would split.
        for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            entry = json.loads(line)
            by_split[entry["split"]].append(dict(entry["record"]))
            kinds.append(str(entry["kind"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}); restore it, or start over with --overwrite"
        ) from error
    return Study(tuple(by_split["train"]), tuple(by_split["validation"]), tuple(kinds))


def _seed(kind: str, passages: Sequence[str], number: int) -> tuple[str, str | None]:
    """Returns what is to be written, and for every second question of a kind a passage of the text."""
    draw = np.random.default_rng(number)
    phrases = SEEDS[kind]
    quotes = passages and (number // len(SEEDS)) % 2
    phrase = phrases[int(draw.integers(len(phrases)))]
    return phrase, passages[int(draw.integers(len(passages)))] if quotes else None


def _questions(
    base: FrozenBase,
    objective: Distillation,
    text: Int[np.ndarray, " P"],
    seeds: Sequence[tuple[str, str | None]],
    numbers: Sequence[int],
    batch_size: int,
) -> list[str]:
    """Returns the first line of what the base writes after the text and each seed prompt."""
    if objective.chat_system:
        rest = objective.system_rest
        template = Template(prompt=f"{{{MESSAGES}}}", system=rest, continues=rest is not None)
        encoder, stop = encoder_for(base, template), ()
        records: list[Mapping[str, Any]] = [_record(MESSAGES, _request(*seed)) for seed in seeds]
    else:
        encoder, stop = encoder_for(base, Template(prompt="{seed}", target="{question}")), ("\n",)
        records = [{"seed": _lead(*seed)} for seed in seeds]
    sampling = [
        SamplingConfig(
            max_new_tokens=objective.study_tokens,
            temperature=objective.study_temperature,
            stop=stop,
            end_ids=encoder.end_ids,
            seed=number,
        )
        for number in numbers
    ]
    prompts = [ids_after_text(base, text, encoder.prompt_ids(record)) for record in records]
    answers = generate(base, prompts, None, sampling, batch_size=batch_size)
    return [answer.text.strip().partition("\n")[0].strip() for answer in answers]


def _request(asked: str, passage: str | None) -> str:
    """Returns the user turn that asks for a question."""
    about = "" if passage is None else f' It is about this passage: "{passage}"'
    return f"Write {asked}.{about} Reply with it only, in one line."


def _lead(asked: str, passage: str | None) -> str:
    """Returns a line that a question continues, for a base that completes texts."""
    about = "" if passage is None else f' where it says "{passage}"'
    return f"\n\n{asked[0].upper()}{asked[1:]} above{about}:"


def _problem(question: str, others: Sequence[str]) -> str | None:
    """Returns why a question is left out; None if it is not."""
    words = _normalized(question).split()
    if not words:
        return "empty"
    if len(words) >= _LOOP_WORDS and len(set(words)) < _LOOP_SHARE * len(words):
        return "looping"
    return "repeated" if " ".join(words) in others else None


def _normalized(question: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", question.casefold()).split())


def _record(field: str, question: str) -> dict[str, Any]:
    return {field: [{"role": "user", "content": question}] if field == MESSAGES else question}
