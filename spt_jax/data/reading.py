"""The positions that a tagging or span head reads, and the correct class at each.

In this module, `spans` holds for each token of an example the character span of the read field that it covers, or
(0, 0).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from spt_jax.data.values import is_list, text_of
from spt_jax.errors import DataError, did_you_mean

# The class of a position that a span head reads is the sum of these flags.
START, END = 1, 2

Spans = Sequence[tuple[int, int]]
Reads = tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]


def words_of(value: Any, what: str) -> list[str]:
    """Returns the words of a field that holds a list of words, or text with words separated by spaces.

    Args:
      value: the value of the field.
      what: the name of the field in error messages.

    Raises:
      DataError: the value, or one of its words, is not text.
    """
    if not is_list(value):
        return text_of(value, what).split()
    return [text_of(word, f"{what}: word {number}") for number, word in enumerate(value, 1)]


def tag_reads(
    words: Sequence[str], tags: Sequence[str], classes: Sequence[str], spans: Spans, *, causal: bool = True
) -> Reads:
    """Returns for each word the token that a head reads, and the class of its tag.

    Of a causal base that is the last token, whose hidden state depends on the whole word. Of an encoder it is the
    first, as in BERT (Devlin et al. 2019, arXiv 1810.04805).

    Args:
      words: the words of the field; in its text they are separated by single spaces.
      tags: a tag per word.
      classes: the names of the classes, in order.
      spans: see the module docstring.
      causal: whether a token sees only itself and earlier tokens.

    Raises:
      DataError: there are not as many tags as words, there are no words, a tag is unknown, or a word has no tokens.
    """
    if len(words) != len(tags) or not words:
        raise DataError(f"{len(words)} words and {len(tags)} tags; each word needs a tag, and there must be a word")
    reads, start = [], 0
    for word in words:
        place = start + len(word) - 1 if causal else start
        covering = [i for i, (first, last) in enumerate(spans) if first <= place < last]
        if not word or not covering:
            raise DataError(f"the tokenizer makes no token of the word {word!r}")
        reads.append(covering[-1] if causal else covering[0])
        start += len(word) + 1
    for tag in tags:
        if tag not in classes:
            raise DataError(
                f"the tag {tag!r} is neither in the training data nor in data.verbalizers; {did_you_mean(tag, classes)}"
            )
    return np.asarray(reads, np.int32), np.asarray([classes.index(tag) for tag in tags], np.int32)


def span_reads(text: str, answer: Any, spans: Spans) -> Reads:
    """Returns the tokens of the field, and for each whether the answer starts or ends there.

    Args:
      text: the text of the field.
      answer: a substring of the text, whose first occurrence counts; or, in the format of SQuAD, a mapping with lists
        "text" and "answer_start", whose first entries are used.
      spans: see the module docstring.

    Raises:
      DataError: there is no answer, or the text does not contain it.
    """
    words, start = _located(text, answer)
    reads = [i for i, (first, last) in enumerate(spans) if last > first]
    starts = [i for i in reads if spans[i][1] > start]
    ends = [i for i in reads if spans[i][0] < start + len(words)]
    if not starts or not ends:
        raise DataError(f"the tokenizer makes no token of the answer {words!r}")
    classes = [START * (i == starts[0]) + END * (i == ends[-1]) for i in reads]
    return np.asarray(reads, np.int32), np.asarray(classes, np.int32)


def answer_text(answer: Any) -> str:
    """Returns the text of an answer in either format of `span_reads`.

    Raises:
      DataError: the answer is missing or empty.
    """
    if isinstance(answer, Mapping):
        texts = answer.get("text")
        answer = texts[0] if isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) else ""
    if not isinstance(answer, str) or not answer:
        raise DataError("there is no answer; a span head always finds one, so remove such records")
    return answer


def _located(text: str, answer: Any) -> tuple[str, int]:
    words = answer_text(answer)
    start = text.find(words)
    if isinstance(answer, Mapping):
        starts = answer.get("answer_start")
        start = starts[0] if isinstance(starts, Sequence) and len(starts) else -1
    if type(start) is not int or start < 0 or text[start : start + len(words)] != words:
        raise DataError(f"the answer {words[:60]!r} does not occur in the text that the head reads")
    return words, start
