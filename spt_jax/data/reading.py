"""Where a tagging or span head reads, and what is right there.

`spans` gives, for every token of an example, the characters of the read field that it covers; (0, 0) for none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from spt_jax.data.values import is_list, text_of
from spt_jax.errors import DataError, did_you_mean

# Classes of a span head's reads are sums of these.
START, END = 1, 2

Spans = Sequence[tuple[int, int]]
Reads = tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]


def words_of(value: Any, what: str) -> list[str]:
    """The words of a field that holds a list of them, or text with spaces between them.

    Args:
      value: of the field.
      what: names it in errors.

    Raises:
      DataError: it, or one of its words, is not text.
    """
    if not is_list(value):
        return text_of(value, what).split()
    return [text_of(word, f"{what}: word {number}") for number, word in enumerate(value, 1)]


def tag_reads(words: Sequence[str], tags: Sequence[str], classes: Sequence[str], spans: Spans) -> Reads:
    """The last token of every word, which has seen the whole word, and the class of the word's tag.

    words: what the field holds, with one space between two of them.

    Raises:
      DataError: there are not as many tags as words, none at all, an unknown tag, or a word without tokens.
    """
    if len(words) != len(tags) or not words:
        raise DataError(f"{len(words)} words and {len(tags)} tags; a tag for each word is needed, and a word at least")
    reads, end = [], -1
    for word in words:
        end += len(word) + (1 if reads else 0)
        covering = [i for i, (first, last) in enumerate(spans) if first <= end < last]
        if not word or not covering:
            raise DataError(f"the tokenizer leaves nothing of the word {word!r}")
        reads.append(covering[-1])
    for tag in tags:
        if tag not in classes:
            raise DataError(
                f"the tag {tag!r} is neither in the training data nor in data.verbalizers; {did_you_mean(tag, classes)}"
            )
    return np.asarray(reads, np.int32), np.asarray([classes.index(tag) for tag in tags], np.int32)


def span_reads(text: str, answer: Any, spans: Spans) -> Reads:
    """Every token of the field, and whether the answer starts or ends there.

    answer: a part of the text, of which the first place where it stands is meant; or as SQuAD has it, a mapping with
      lists "text" and "answer_start", of which the first entries are taken.

    Raises:
      DataError: the text does not hold the answer, or there is none.
    """
    words, start = _located(text, answer)
    reads = [i for i, (first, last) in enumerate(spans) if last > first]
    starts = [i for i in reads if spans[i][1] > start]
    ends = [i for i in reads if spans[i][0] < start + len(words)]
    if not starts or not ends:
        raise DataError(f"the tokenizer leaves nothing of the answer {words!r}")
    classes = [START * (i == starts[0]) + END * (i == ends[-1]) for i in reads]
    return np.asarray(reads, np.int32), np.asarray(classes, np.int32)


def answer_text(answer: Any) -> str:
    """The words of an answer in either form of `span_reads`.

    Raises:
      DataError: it has no words.
    """
    if isinstance(answer, Mapping):
        texts = answer.get("text")
        answer = texts[0] if isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) else ""
    if not isinstance(answer, str) or not answer:
        raise DataError("there is no answer; a span head always finds one, so leave such records out")
    return answer


def _located(text: str, answer: Any) -> tuple[str, int]:
    words = answer_text(answer)
    start = text.find(words)
    if isinstance(answer, Mapping):
        starts = answer.get("answer_start")
        start = starts[0] if isinstance(starts, Sequence) and len(starts) else -1
    if type(start) is not int or start < 0 or text[start : start + len(words)] != words:
        raise DataError(f"the answer {words[:60]!r} does not stand in the text that the head reads")
    return words, start
