"""The task of the examples: things with a colour and a size, which a small model knows and a soft prompt asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

import spt_jax

MAX_POSITIONS = 64
COLOURS, SIZES = ("red", "green", "blue", "white"), ("tiny", "small", "large", "huge")
TRAINED = ("apple", "ball", "book", "cake", "chair", "coat", "drum", "flag", "frog", "house", "lamp", "mouse")
TESTED = ("boat", "bowl", "clock", "door", "fish", "glove", "kite", "leaf", "plum", "rose", "shoe", "tree")


def known() -> list[tuple[str, str, str]]:
    """Returns the colour and the size of each thing, drawn once and for all."""
    draw = np.random.default_rng(0)
    return [(thing, COLOURS[draw.integers(4)], SIZES[draw.integers(4)]) for thing in TRAINED + TESTED]


def facts_tokenizer() -> tokenizers.Tokenizer:
    """Returns a tokenizer with an id for each word."""
    words = ["<end>", "<unknown>", "colour", "size", *COLOURS, *SIZES, *TRAINED, *TESTED]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def pretrain(apply, params, tokenizer: tokenizers.Tokenizer, steps: int = 300):
    """Returns parameters that know the facts: rows of 12 lines such as "colour plum red <end>", in random order.

    Args:
      apply: (params, ids) to logits.
      params: initial parameters.
      tokenizer: that of the facts.
      steps: optimizer steps.
    """
    lines = [line for thing, *facts in known() for line in zip(("colour", "size"), (thing, thing), facts, strict=True)]
    ids = np.asarray([tokenizer.encode(" ".join([*line, "<end>"])).ids for line in lines], np.int32)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, steps))

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, rows[:, :-1]), rows[:, 1:])
            # The third word of each line follows from the first two; the others are random.
            return losses[:, 1::4].mean() + losses[:, 2::4].mean()

        gradient = jax.grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state, draw = optimizer.init(params), np.random.default_rng(1)
    for _ in range(steps):
        rows = np.stack([ids[draw.permutation(len(ids))[:12]].ravel() for _ in range(16)])
        params, state = step(params, state, jnp.asarray(rows))
    return params


def accuracy(generate, records: list[dict[str, str]]) -> float:
    """Returns the share of records whose colour is generated, by a function from texts to texts."""
    answers = generate([record["thing"] for record in records])
    return float(np.mean([answer.strip() == record["colour"] for answer, record in zip(answers, records, strict=True)]))


def tune(base: spt_jax.FrozenBase, directory: str) -> tuple[float, float]:
    """Trains a prompt that asks for the colour, saves it, loads it, and prints what it changes.

    Args:
      base: the model.
      directory: where to save the prompt.

    Returns:
      The accuracy on the tested things without and with the prompt.
    """
    records = [{"thing": thing, "colour": colour} for thing, colour, _ in known()]
    train = [record for record in records if record["thing"] in TRAINED]
    tested = [record for record in records if record["thing"] in TESTED]
    one = spt_jax.SamplingConfig(max_new_tokens=1)

    def without(texts: list[str]) -> list[str]:
        return [answer.text for answer in spt_jax.generate(base, texts, sampling=one)]

    def asked(texts: list[str]) -> list[str]:
        return prompt.generate(texts, max_new_tokens=4)

    template = spt_jax.Template(prompt="<soft>{thing}", target=" {colour}")
    # One virtual token, because the 12 records do not determine more of them.
    method = spt_jax.PromptTuning(length=1)
    result = spt_jax.fit(base, method, template, train, steps=60, batch_size=12, learning_rate=0.1, progress=False)
    result.prompt.save(directory)
    prompt = spt_jax.load_prompt(directory, base, progress=False)
    before, after = accuracy(without, tested), accuracy(asked, tested)
    print(f"colours of {len(tested)} other things: {before:.2f} without the prompt, {after:.2f} with it")
    print("plum:", asked(["plum"])[0])
    return before, after
