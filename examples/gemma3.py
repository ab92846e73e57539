"""Trains a small Gemma 3 of Google DeepMind's library `gemma`, then a soft prompt for it.

    uv pip install gemma "sentencepiece<0.2.2"
    python examples/gemma3.py

The model is that library's own Linen module; `as_base` takes a Gemma 2 or 3 of any size and its weights, such as
`gm.nn.Gemma3_1B()` with `gm.ckpts.load_params`. The task is that of `linen_gpt.py`.
"""

import jax
import jax.numpy as jnp
from facts import MAX_POSITIONS, facts_tokenizer, pretrain, tune
from gemma import gm

import spt_jax


def small_gemma(vocab_size: int) -> gm.nn.Transformer:
    """Returns a Gemma 3 of two layers, one with a sliding window."""
    return gm.nn.Transformer(
        config=gm.nn.config.TransformerConfig(
            num_embed=vocab_size,
            embed_dim=64,
            hidden_dim=128,
            num_heads=4,
            head_dim=16,
            num_kv_heads=2,
            final_logit_softcap=None,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            use_qk_norm=True,
            attention_types=(gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL),
            sliding_window_size=16,
        ),
        dtype=jnp.float32,
        tokens="batch.tokens",
    )


def hidden(model: gm.nn.Transformer, x, positions, mask):
    """The layers and the last norm."""
    for block in model.blocks:
        _, x = block(x, positions, None, mask)
    return model.final_norm(x)


def logits(model: gm.nn.Transformer, hidden):
    """The output matrix, which is the embedding table, and the soft cap."""
    found, cap = model.embedder.decode(hidden), model.config.final_logit_softcap
    return found if cap is None else cap * jnp.tanh(found / cap)


def as_base(model: gm.nn.Transformer, variables, tokenizer, **options) -> spt_jax.FrozenBase:
    """Returns the model as a frozen base; `options` are those of `spt_jax.from_flax`."""
    return spt_jax.from_flax(
        variables,
        embed=lambda variables, ids: model.apply(variables, ids, method=lambda model, ids: model.embedder.encode(ids)),
        hidden=lambda variables, *inputs: model.apply(variables, *inputs, method=hidden),
        logits=lambda variables, states: model.apply(variables, states, method=logits),
        tokenizer=tokenizer,
        name="gemma3",
        **options,
    )


def main() -> None:
    tokenizer = facts_tokenizer()
    model = small_gemma(tokenizer.get_vocab_size())
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    variables = pretrain(lambda variables, ids: model.apply(variables, ids).logits, variables, tokenizer)
    ends = [tokenizer.token_to_id("<end>")]
    tune(as_base(model, variables, tokenizer, max_positions=MAX_POSITIONS, end_ids=ends), "out/gemma3")


if __name__ == "__main__":
    main()
