"""Pretrains the starter model that ships with the package, from scratch, with this library's own decoder.

    python scripts/pretrain_starter.py --corpus ../shared/corpus --out spt_jax/assets/starter

Reads `*.txt.gz` files whose documents are separated by a line `<|endoftext|>`, trains a byte-level BPE tokenizer of
4,096 entries, then a Llama of 3.4 M parameters with AdamW, and writes a Hugging Face checkpoint in bfloat16 and
`training.json` with the training settings and the held-out perplexity. Stopped runs resume from `--work`.
"""

import argparse
import gzip
import json
import random
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import tokenizers
import transformers
from flax import serialization

from spt_jax.bases.checkpoint_writing import write_checkpoint
from spt_jax.bases.config import decoder_config
from spt_jax.models.attention import Stream
from spt_jax.models.decoder import Decoder

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
LENGTH = 256
# The share of each file's documents that is used, once: people tune prompts for dialogue and questions, while most of
# the text is novels.
SHARES = {
    "dialogue": 1.0,
    "questions-instructions": 1.0,
    "encyclopaedic": 0.6,
    "stories-children": 1.0,
    "stories-tinystories-cdla": 1.0,
    "stories-standardebooks": 0.12,
}


def read_documents(corpus: Path) -> dict[str, list[str]]:
    """Returns the non-empty documents of each file."""
    documents = {}
    for name in SHARES:
        with gzip.open(corpus / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            documents[name] = [text.strip() for text in file.read().split("<|endoftext|>") if text.strip()]
    return documents


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, which can encode any text, with every digit as a separate token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=LENGTH
    )


def model_config() -> transformers.LlamaConfig:
    """3.4 M parameters."""
    return transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def token_stream(tokenizer, documents: list[str]) -> np.ndarray:
    """Returns the documents as one stream BOS text EOS BOS text EOS ..., uint16."""
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return np.concatenate([np.asarray([bos, *ids, eos], np.uint16) for ids in encoded])


def windows(stream: np.ndarray, seed: int) -> np.ndarray:
    """Cuts the stream into shuffled windows [N, LENGTH + 1]."""
    count = (len(stream) - 1) // LENGTH
    cut = np.stack([stream[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(count)])
    return cut[np.random.default_rng(seed).permutation(count)]


def loss(module: Decoder, params, tokens):
    """Mean next-token cross-entropy. Tokens attend only within their document; documents start at BOS, id 0."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    segments = 1 + jnp.cumsum(inputs == 0, axis=1)
    start = jax.lax.cummax(jnp.where(inputs == 0, jnp.arange(inputs.shape[1])[None], 0), axis=1)
    rows = Stream(jnp.arange(inputs.shape[1])[None] - start, segments, jnp.zeros_like(segments))
    x = module.apply({"params": params}, inputs, method="embed")
    hidden, _ = module.apply({"params": params}, x, rows)
    logits = module.apply({"params": params}, hidden, method="logits")
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/spt_jax_starter"), help="snapshots to resume from")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--max-steps", type=int, default=None, help="length of the schedule; default: one pass")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    documents = read_documents(args.corpus)
    held_out, training = [], []
    for name, texts in documents.items():
        held = len(texts) // 100
        held_out += texts[:held]
        training += texts[held : held + int(SHARES[name] * (len(texts) - held))]
    random.Random(0).shuffle(training)
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(args.out)
    data = windows(token_stream(tokenizer, training), seed=0)
    evaluation = windows(token_stream(tokenizer, held_out), seed=1)[:128]
    steps = min(len(data) // args.batch, args.max_steps or 10**9)
    print(f"{len(training)} documents, {data.shape[0] * LENGTH / 1e6:.1f} M tokens, {steps} steps", flush=True)

    hf_config = model_config()
    config = decoder_config(hf_config)
    module = Decoder(config)
    place = jnp.zeros((1, 1), jnp.int32)
    params = module.init(jax.random.key(0), jnp.zeros((1, 1, config.width)), Stream(place, place, place))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(200, steps // 5), steps, 0.05 * args.learning_rate
    )
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=decayed)
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, optimizer_state, tokens):
        value, gradient = jax.value_and_grad(partial(loss, module))(params, tokens)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, value

    evaluate = jax.jit(partial(loss, module))

    def held_out_loss(params) -> float:
        return float(np.mean([evaluate(params, jnp.asarray(part, jnp.int32)) for part in np.split(evaluation, 16)]))

    def save(params, step: int, seconds: float) -> None:
        stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
        write_checkpoint(args.out, config, stored, ml_dtypes.bfloat16)
        hf_config.save_pretrained(args.out)
        value = held_out_loss(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored))
        characters = sum(map(len, held_out)) / sum(len(tokenizer.encode(t, verbose=False)) for t in held_out)
        report = {
            "parameters": count,
            "steps": step,
            "of_steps": steps,
            "tokens_seen": step * args.batch * LENGTH,
            "held_out_loss": round(value, 4),
            "held_out_perplexity": round(float(np.exp(value)), 2),
            "held_out_characters_per_token": round(characters, 3),
            "train_seconds": round(seconds),
            "learning_rate": args.learning_rate,
            "batch": args.batch,
            "length": LENGTH,
        }
        (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        print(f"step {step}: held-out loss {value:.4f}", flush=True)

    state = (params, optimizer.init(params))
    snapshot, first, spent = args.work / "state.msgpack", 0, 0.0
    if snapshot.exists():
        first, spent, state = serialization.from_bytes((first, spent, state), snapshot.read_bytes())
        state = jax.tree.map(jnp.asarray, state)
    started, losses = time.time() - spent, []
    for step in range(first, steps):
        *state, value = train_step(*state, jnp.asarray(data[step * args.batch : (step + 1) * args.batch], jnp.int32))
        losses.append(value)
        if (step + 1) % 50 == 0:
            mean = float(np.mean(jax.device_get(losses)))
            rate = (step + 1 - first) * args.batch * LENGTH / (time.time() - started - spent)
            print(f"step {step + 1}/{steps} loss {mean:.4f} {rate:.0f} tokens/s", flush=True)
            losses = []
        if (step + 1) % 500 == 0:
            partial_file = snapshot.with_suffix(".part")
            partial_file.write_bytes(serialization.to_bytes((step + 1, time.time() - started, tuple(state))))
            partial_file.replace(snapshot)
            save(state[0], step + 1, time.time() - started)
    save(state[0], steps, time.time() - started)


if __name__ == "__main__":
    main()
