"""Trained tokens: input embeddings of chosen tokens of the vocabulary, used wherever these tokens occur."""

import dataclasses
from collections.abc import Mapping
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

    Attributes:
      name: the method.
      tokens: the tokens, each as text that the tokenizer encodes as one token, or as the vocabulary spells it.
      ids: their ids; read from the tokenizer by default.
    """

    name: Literal["trained_tokens"] = "trained_tokens"
    tokens: Lines = ()
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.ids and self.tokens and len(self.ids) != len(self.tokens):
            raise ConfigError(f"method.ids has {len(self.ids)} numbers for {len(self.tokens)} method.tokens")
        for name, values in (("tokens", self.tokens), ("ids", self.ids)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ConfigError(f"method.{name} holds {twice[0]!r:.200} more than once")
        if self.ids and min(self.ids) < 0:
            raise ConfigError(f"method.ids holds {min(self.ids)}; an id is at least 0")

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the tokens are still text."""
        return bool(self.tokens) and not self.ids

    def bind(self, tokenizer: Tokenizer) -> "TrainedTokens":
        """Returns the method with the ids of the tokens.

        Raises:
          ConfigError: a text is not one token of the vocabulary.
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
                " of its vocabulary, such as reserved ones"
            )

        return dataclasses.replace(self, ids=tuple(map(id_of, self.tokens)))

    def check_base(self, base: FrozenBase) -> None:
        """Checks that tokens are given, and that the base has them.

        Raises:
          ConfigError: there are none, `bind` was not called, or an id is outside the vocabulary.
        """
        if self.needs_tokenizer:
            raise ConfigError("method.tokens have no ids yet: use method.bind(base.tokenizer)")
        if not self.ids:
            raise ConfigError("method.tokens is empty; name the tokens to train")
        if max(self.ids) >= base.layout.vocab_size:
            raise ConfigError(f"method.ids go up to {max(self.ids)}; the vocabulary has {base.layout.vocab_size}")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "N D"]]:
        """Returns the base's rows of the tokens, float32.

        Raises:
          ConfigError: as in `check_base`.
        """
        del key
        self.check_base(base)
        return {"rows": base.model.embed(jnp.asarray(self.ids, jnp.int32)[None])[0].astype(jnp.float32)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the rows and the ids that they replace."""
        del model
        return VirtualPrompt(replaced=ReplacedRows(jnp.asarray(params["rows"]), jnp.asarray(self.ids, jnp.float32)))

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the rows and ids."""
        return VirtualPrompt(replaced=ReplacedRows(shape(len(self.ids), layout.width), shape(len(self.ids))))
