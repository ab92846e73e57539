"""Trains a small GPT in Flax NNX, then a soft prompt for it.

    python examples/nnx_gpt.py

The task is that of `linen_gpt.py`.
"""

import jax.numpy as jnp
from facts import MAX_POSITIONS, facts_tokenizer, pretrain, tune
from flax import nnx

import spt_jax


class Block(nnx.Module):
    """One layer of a pre-norm transformer."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        shape = heads, width // heads
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.query, self.key, self.value = (nnx.LinearGeneral(width, shape, rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral(shape, width, axis=(-2, -1), rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        normed = self.attention_norm(x)
        mixed = nnx.dot_product_attention(self.query(normed), self.key(normed), self.value(normed), mask=mask[:, None])
        x = x + self.out(mixed)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """A decoder with learned positions and tied embeddings, as three methods and the whole."""

    def __init__(self, vocab_size, width=64, layers=2, heads=4, *, max_positions=MAX_POSITIONS, rngs):
        self.tokens = nnx.Embed(vocab_size, width, rngs=rngs)
        self.places = nnx.Embed(max_positions, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

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


def as_base(graphdef: nnx.GraphDef, params: nnx.State, tokenizer, **options) -> spt_jax.FrozenBase:
    """Returns the model as a frozen base: its methods become functions of the parameters."""
    return spt_jax.from_flax(
        params,
        embed=lambda params, ids: nnx.merge(graphdef, params).embed(ids),
        hidden=lambda params, x, positions, mask: nnx.merge(graphdef, params).hidden(x, positions, mask),
        logits=lambda params, hidden: nnx.merge(graphdef, params).logits(hidden),
        tokenizer=tokenizer,
        max_positions=nnx.merge(graphdef, params).places.num_embeddings,
        name="nnx-gpt",
        **options,
    )


def main() -> None:
    tokenizer = facts_tokenizer()
    graphdef, params = nnx.split(GPT(tokenizer.get_vocab_size(), rngs=nnx.Rngs(0)))
    params = pretrain(lambda params, ids: nnx.merge(graphdef, params)(ids), params, tokenizer)
    tune(as_base(graphdef, params, tokenizer, end_ids=[tokenizer.token_to_id("<end>")]), "out/nnx_gpt")


if __name__ == "__main__":
    main()
