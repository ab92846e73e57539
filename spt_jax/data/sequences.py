"""How the token sequences of a base begin and end, and where its answers are read."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.both_sides import check_decoder_input
from spt_jax.data.examples import Example
from spt_jax.data.pairs import SEPARATOR, PairForm, pair_form
from spt_jax.data.shots import MASK
from spt_jax.data.templates import DECODER, Template
from spt_jax.data.tokenization import adds_bos
from spt_jax.errors import ConfigError
from spt_jax.models.layout import Layout

# The mean length over the greatest one, above which examples are of nearly equal length.
NEARLY_EQUAL = 0.8


@dataclasses.dataclass(frozen=True)
class SequenceForm:
    """The form of a base's sequences.

    Attributes:
      causal: whether answers follow the prompt. Otherwise the base is an encoder, and answers replace a mask token.
      bos_id: the token that opens a sequence, such as BOS or [CLS]; None if the tokenizer has none.
      opens: whether the tokenizer itself puts it first.
      closing: the ids that end a prompt: those that the tokenizer of an encoder puts last, such as [SEP], and of an
        encoder-decoder also the token that begins the decoder's tokens. What a template has after `<decoder>` follows.
      mask: the name and the id of an encoder's mask token; None if there is none.
      pooling: the hidden state that a class head reads, as in `Layout`.
      decodes: whether the base is an encoder-decoder.
      pairs: how the tokenizer of a base with an encoder joins two texts; None if it does so in an unusual way.
      forced_id: of an encoder-decoder, the first token of every answer; None if the tokenizer decides it.
      start_name: of an encoder-decoder, the name of the token that begins the decoder's tokens.
    """

    causal: bool
    bos_id: int | None
    opens: bool
    closing: tuple[int, ...] = ()
    mask: tuple[str, int] | None = None
    pooling: Literal["last", "first", "mean"] = "last"
    decodes: bool = False
    pairs: PairForm | None = None
    forced_id: int | None = None
    start_name: str | None = None

    @property
    def shares(self) -> bool:
        """Whether hidden states of leading tokens that examples share depend on no example."""
        return self.causal and not self.decodes

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads the prompt."""
        return self.decodes or not self.causal

    @property
    def answer_mask(self) -> str | None:
        """The name of the mask token that an answer replaces; None if answers follow the prompt."""
        return None if self.causal or self.mask is None else self.mask[0]

    @property
    def pooled(self) -> bool:
        """Whether a class head reads the mean of hidden states."""
        return self.pooling == "mean"

    def answer(self, ids: list[int]) -> list[int]:
        """Returns the ids of an answer with the forced token first, in place of the one that opens a sequence.

        Args:
          ids: those that the tokenizer gives.
        """
        if self.forced_id is None:
            return ids
        opened = self.opens and ids[:1] == [self.bos_id]
        return [self.forced_id, *(ids[1:] if opened else ids)]

    def marked(self, prompt: str) -> str:
        """Returns a prompt with the tokenizer's name of the mask token in place of `<mask>`."""
        return prompt if self.mask is None else prompt.replace(MASK, self.mask[0])

    def class_position(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> int:
        """Returns the position that a class head reads, or one of those whose mean it reads.

        Args:
          ids: the ids of a prompt.

        Raises:
          ConfigError: the head reads the opening token, and there is none.
        """
        if self.pooling == "last":
            return len(ids) - 1
        found: Int[np.ndarray, " _"] = np.flatnonzero(np.asarray(ids) == self.bos_id)
        if not len(found) and self.pooling == "first":
            raise ConfigError("a class head of this base reads its opening token, and the prompt has none; add <bos>")
        return int(found[0]) if len(found) else 0

    def answer_position(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> int | None:
        """Returns the position of the mask that an answer replaces; None if answers follow the prompt.

        Args:
          ids: the ids of a prompt.
        """
        if self.causal:
            return None
        assert self.mask is not None
        (position,) = np.flatnonzero(np.asarray(ids) == self.mask[1])
        return int(position)

    def check(self, template: Template, has_head: bool, choices: Sequence[Int[np.ndarray, " _"]]) -> None:
        """Checks that verbalizers differ, and that a base with an encoder can do what a template asks for.

        Args:
          template: the template.
          has_head: whether its task has a head.
          choices: the ids of each verbalizer.

        Raises:
          ConfigError: they do not, or it cannot.
        """
        if any(len(choice) == 0 for choice in choices):
            raise ConfigError("a verbalizer has no tokens; each class needs some text")
        if len({tuple(choice) for choice in choices}) < len(choices):
            raise ConfigError(f"two verbalizers have the same token ids: {dict(template.verbalizers)}")
        check_decoder_input(template, self.start_name)
        if self.decodes and (template.chat or template.is_conversation or template.continues):
            raise ConfigError("this base is an encoder-decoder: it answers no chats and continues no remembered text")
        for name, mark in itertools.product(template.new_tokens, (SEPARATOR, MASK, DECODER)):
            if self.encodes and mark in name:
                raise ConfigError(f"the new token {name!r} contains {mark}, which is markup; rename it")
        if self.encodes and template.prompt.count(SEPARATOR) > 1:
            raise ConfigError(f"template {template.prompt!r} has several <sep>; a tokenizer joins two texts at most")
        if self.causal:
            return
        if template.chat or template.is_conversation or template.continues:
            raise ConfigError("this base is an encoder: it answers no chats and continues no text")
        if has_head:
            return
        if not template.verbalizers:
            raise ConfigError(
                "this base is an encoder, which generates no text: set verbalizers for a prompt with <mask>, or a task"
                " with a head (task.name classification, tagging or span)"
            )
        if self.mask is None:
            raise ConfigError("the tokenizer of this encoder has no mask token; set a task with a head (task.name)")
        count = self.marked(template.prompt).count(self.mask[0])
        if count != 1:
            raise ConfigError(
                f"template {template.prompt!r} has {count} mask tokens; with verbalizers, an encoder needs one <mask>,"
                " where the verbalizer is predicted"
            )
        for text, choice in zip(template.verbalizers.values(), choices, strict=True):
            if len(choice) != 1:
                raise ConfigError(
                    f"the verbalizer {text!r} has {len(choice)} tokens, and one mask stands for one token; choose"
                    " another word (a blank before a word may make it one token)"
                )


def form_of(tokenizer: Tokenizer, layout: Layout | None) -> SequenceForm:
    """Returns the form of a base's sequences.

    Args:
      tokenizer: that of the base.
      layout: that of the base; None for a causal one.

    Raises:
      ConfigError: the tokenizer of a base with an encoder puts several tokens before a text, or changes it.
    """
    if layout is None or layout.causal:
        return SequenceForm(True, tokenizer.bos_token_id, adds_bos(tokenizer))
    whole, text = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    if start is None:
        raise ConfigError("the tokenizer of this base gives a text other tokens beside its special tokens than alone")
    front, closing = whole[:start], whole[start + len(text) :]
    if len(front) > 1:
        raise ConfigError(f"the tokenizer puts {len(front)} tokens before a text; at most 1 is supported")
    bos_id = front[0] if front else tokenizer.bos_token_id
    pairs = pair_form(tokenizer, front, closing)
    if layout.start_id is not None:
        last, forced = (*closing, layout.start_id), layout.forced_id
        name = str(tokenizer.convert_ids_to_tokens(layout.start_id))
        options = {"decodes": True, "pairs": pairs, "forced_id": forced, "start_name": name}
        return SequenceForm(True, bos_id, bool(front), last, **options)
    mask_id = tokenizer.mask_token_id
    mask = None if mask_id is None else (str(tokenizer.mask_token), mask_id)
    return SequenceForm(False, bos_id, bool(front), tuple(closing), mask, layout.pooling, pairs=pairs)


def packing_saves(examples: Sequence[Example], layout: Layout) -> bool:
    """Returns whether rows of several examples save time.

    Attention costs the square of a row's length, and a base that shares no leading tokens has the virtual tokens in
    every example: if all examples are nearly as long as the longest, padding each costs less.

    Args:
      examples: the examples.
      layout: that of the base.
    """
    if not layout.packs or layout.causal:
        return layout.packs
    lengths = [len(example.ids) for example in examples]
    return sum(lengths) < NEARLY_EQUAL * len(lengths) * max(lengths)
