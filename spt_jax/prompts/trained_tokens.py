"""Trained tokens: input embeddings of chosen tokens of the vocabulary, and of new ones in the template."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.tokenization import Tokenization
from spt_jax.errors import ConfigError
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.options import Lines
from spt_jax.prompts.method import Method
from spt_jax.prompts.virtual import ReplacedRows, VirtualPrompt, shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTokens(Method):
    """Input embeddings of chosen tokens of the base.

    They replace the base's rows wherever these tokens occur: in templates, in records and in generated text. Training
    starts from the base's own rows, that is, from the unchanged base. The output matrix is not trained, also where the
    base ties it to the embeddings, and neither are the embeddings by layer of families that have some.

    New tokens are names that the vocabulary lacks. They stand beside the tokenizer, which stays as it is: a name in
    the prompt of the template is one token, with a trained row. In records it is plain text, and the base cannot
    generate it.

    Attributes:
      name: the method.
      tokens: the tokens, each as text that the tokenizer encodes as one token, or as the vocabulary spells it.
      ids: their ids; read from the tokenizer by default.
      new_tokens: names of new tokens, each of which the prompt has.
      new_start: how rows of new tokens start: at the mean of the rows of the tokens that the base's tokenizer makes of
        the name, or at the mean of all rows.
      new_pieces: these tokens, for each new token; read from the tokenizer by default.
    """

    name: Literal["trained_tokens"] = "trained_tokens"
    tokens: Lines = ()
    ids: tuple[int, ...] = ()
    new_tokens: Lines = ()
    new_start: Literal["pieces", "mean"] = "pieces"
    new_pieces: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.ids and self.tokens and len(self.ids) != len(self.tokens):
            raise ConfigError(f"method.ids has {len(self.ids)} numbers for {len(self.tokens)} method.tokens")
        for name, values in (("tokens", self.tokens), ("ids", self.ids), ("new_tokens", self.new_tokens)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ConfigError(f"method.{name} holds {twice[0]!r:.200} more than once")
        if self.ids and min(self.ids) < 0:
            raise ConfigError(f"method.ids holds {min(self.ids)}; an id is at least 0")

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the tokens, or the pieces of new ones, are still text."""
        return (bool(self.tokens) and not self.ids) or len(self.new_pieces) != len(self.new_tokens)

    def bind(self, tokenizer: Tokenizer) -> "TrainedTokens":
        """Returns the method with the ids of the tokens.

        Raises:
          ConfigError: a text is not one token of the vocabulary, or a new token is one.
        """
        if not self.needs_tokenizer:
            return self
        vocabulary, encode = tokenizer.get_vocab(), Tokenization(tokenizer).continuation

        def id_of(token: str) -> int:
            if token in vocabulary:
                return vocabulary[token]
            ids = encode(token)
            if len(ids) == 1:
                return ids[0]
            pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids[:8]))
            raise ConfigError(
                f"method.tokens: {token!r:.200} is {len(ids)} tokens of this base ({pieces:.400}); name single tokens"
                " of its vocabulary, such as reserved ones, or add it as one of method.new_tokens"
            )

        def pieces_of(name: str) -> tuple[int, ...]:
            ids = tuple(encode(name))
            if name in vocabulary or len(ids) == 1:
                raise ConfigError(
                    f"method.new_tokens: {name!r:.200} is a token of this base; name it in method.tokens instead"
                )
            return ids

        ids = self.ids or tuple(map(id_of, self.tokens))
        return dataclasses.replace(self, ids=ids, new_pieces=tuple(map(pieces_of, self.new_tokens)))

    def check_base(self, base: FrozenBase) -> None:
        """Checks that tokens are given, and that the base has them.

        Raises:
          ConfigError: there are none, `bind` was not called, or an id is outside the vocabulary.
        """
        if self.needs_tokenizer:
            raise ConfigError("method.tokens have no ids yet: use method.bind(base.tokenizer)")
        if not self.ids and not self.new_tokens:
            raise ConfigError("method.tokens is empty; name the tokens to train, or method.new_tokens")
        largest = max((*self.ids, *(id_ for own in self.new_pieces for id_ in own)))
        if largest >= base.layout.vocab_size:
            raise ConfigError(f"method.ids go up to {largest}; the vocabulary has {base.layout.vocab_size}")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "N D"]]:
        """Returns the base's `rows` of the tokens, and the `new` rows where there are new tokens, float32.

        Raises:
          ConfigError: as in `check_base`.
        """
        del key
        self.check_base(base)
        params = {"rows": _rows(base, self.ids)} if self.ids else {}
        if not self.new_tokens:
            return params
        if self.new_start == "mean":
            mean = jnp.asarray(base.model.embedding_table().mean(axis=0), jnp.float32)
            return {**params, "new": jnp.tile(mean, (len(self.new_tokens), 1))}
        return {**params, "new": jnp.stack([_rows(base, pieces).mean(axis=0) for pieces in self.new_pieces])}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the rows and the ids that they replace, and the rows of new tokens."""
        del model
        replaced = None
        if self.ids:
            replaced = ReplacedRows(jnp.asarray(params["rows"]), jnp.asarray(self.ids, jnp.float32))
        return VirtualPrompt(tokens=jnp.asarray(params["new"]) if self.new_tokens else None, replaced=replaced)

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the rows and ids."""
        count, new = len(self.ids), len(self.new_tokens)
        return VirtualPrompt(
            tokens=shape(new, layout.width) if new else None,
            replaced=ReplacedRows(shape(count, layout.width), shape(count)) if count else None,
        )


def _rows(base: FrozenBase, ids: Sequence[int]) -> Float[Array, "N D"]:
    return base.model.embed(jnp.asarray(ids, jnp.int32)[None])[0].astype(jnp.float32)
