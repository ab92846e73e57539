"""Trains a small GPT in Flax Linen, then a soft prompt for it.

    python examples/linen_gpt.py

The model learns the colour and the size of 24 things from lines such as "colour plum red". The prompt then learns, from
12 things and their colours, to ask for the colour, and is tested on the other 12.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from facts import MAX_POSITIONS, facts_tokenizer, pretrain, tune

import spt_jax


class Block(nn.Module):
    """One layer of a pre-norm transformer."""

    heads: int

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        normed = nn.LayerNorm(1e-5, name="attention_norm")(x)
        query, key, value = (
            nn.DenseGeneral((self.heads, width // self.heads), name=name)(normed) for name in ("query", "key", "value")
        )
        mixed = nn.dot_product_attention(query, key, value, mask=mask[:, None])
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out")(mixed)
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(1e-5, name="mlp_norm")(x)))
        return x + nn.Dense(width, name="down")(hidden)


class GPT(nn.Module):
    """A decoder with learned positions and tied embeddings, as three methods and the whole."""

    vocab_size: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    max_positions: int = MAX_POSITIONS

    def setup(self):
        self.tokens = nn.Embed(self.vocab_size, self.width)
        self.places = nn.Embed(self.max_positions, self.width)
        self.blocks = [Block(self.heads) for _ in range(self.layers)]
        self.norm = nn.LayerNorm(1e-5)

    def embed(self, ids):
        return self.tokens(ids)

    def hidden(self, x, positions, mask):
        x = x + self.places(positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def logits(self, hidden):
        return self.tokens.attend(hidden)

    def __call__(self, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = positions[:, None, :] <= positions[:, :, None]
        return self.logits(self.hidden(self.embed(ids), positions, mask))


def as_base(model: GPT, variables, tokenizer, **options) -> spt_jax.FrozenBase:
    """Returns the model as a frozen base: its methods become functions of the variables."""
    return spt_jax.from_flax(
        variables,
        embed=lambda variables, ids: model.apply(variables, ids, method="embed"),
        hidden=lambda variables, x, positions, mask: model.apply(variables, x, positions, mask, method="hidden"),
        logits=lambda variables, hidden: model.apply(variables, hidden, method="logits"),
        tokenizer=tokenizer,
        max_positions=model.max_positions,
        name="linen-gpt",
        **options,
    )


def main() -> None:
    tokenizer = facts_tokenizer()
    model = GPT(vocab_size=tokenizer.get_vocab_size())
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    variables = pretrain(model.apply, variables, tokenizer)
    tune(as_base(model, variables, tokenizer, end_ids=[tokenizer.token_to_id("<end>")]), "out/linen_gpt")


if __name__ == "__main__":
    main()
