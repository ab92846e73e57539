"""Compares training steps of prompt tuning in spt_jax and PEFT on the CPU: examples per second and peak memory.

    python benchmarks/train_vs_peft.py                       # all three settings, a few minutes on two idle cores
    python benchmarks/train_vs_peft.py --settings "gsm8k P=20 batch 8" --steps 3

Both train the same prompt on one randomly initialized Llama of 39 M parameters (width 512, 8 layers, MLP 1,376, 8
query and 4 key/value heads, vocabulary 32,000, tied; float32) over the same real texts, with Adam and the cross-entropy
of the target's tokens over the whole vocabulary. Each framework runs in a separate process, one after the other, on the
same cores.

PEFT runs in its fastest configuration: sdpa attention, batches padded on the right to their longest example. spt_jax
packs the same examples into rows and runs the prompt once per step. Batches are random; neither sorts by length. Both
use huge pages where the kernel gives them to programs that ask, as the programs of spt_jax do.

Times are of complete steps after warm-up (the warm-up includes compilation, which is reported separately). The losses
of both frameworks' first steps must agree, or no figure is printed.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from spt_jax.data.examples import Example
from spt_jax.runtime.huge_pages import environment_with_huge_pages

SHARED = Path(__file__).resolve().parents[2] / "shared"
LEARNING_RATE = 0.03
TOLERANCE = 1e-4
FRAMEWORKS = ("spt_jax", "peft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A task, its prompt length P and its batch size. BOS comes after the virtual tokens, where PEFT puts it."""

    file: str
    prompt: str
    target: str
    virtual_tokens: int
    batch_size: int


TREC = {"file": "trec/train.jsonl", "prompt": "<soft><bos>{text}\nKind of question:", "target": " {label}"}
GSM8K = {"file": "gsm8k/train.jsonl", "prompt": "<soft><bos>{question}\nAnswer:", "target": " {answer}"}
SETTINGS = {
    "trec P=100 batch 32": Setting(**TREC, virtual_tokens=100, batch_size=32),
    "trec P=20 batch 32": Setting(**TREC, virtual_tokens=20, batch_size=32),
    "gsm8k P=20 batch 8": Setting(**GSM8K, virtual_tokens=20, batch_size=8),
}


def write_base(folder: Path, tokenizer: Path) -> None:
    """Writes the random Llama in Hugging Face format, with the given tokenizer."""
    import transformers
    from flax import traverse_util

    from spt_jax.bases.checkpoint_writing import write_checkpoint
    from spt_jax.bases.config import decoder_config
    from spt_jax.testing import random_params

    hf = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    hf.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    config = decoder_config(hf)
    # Standard deviation 0.02, as at initialization, instead of the 0.2 of the tests' tiny models.
    leaves = traverse_util.flatten_dict(random_params(config))
    leaves = {path: leaf if path[-1] == "scale" else leaf * np.float32(0.1) for path, leaf in leaves.items()}
    write_checkpoint(folder, config, traverse_util.unflatten_dict(leaves), np.float32)


def write_task(folder: Path, setting: Setting, data: Path) -> None:
    """Writes every example of the setting's file as ids, in random order, and the initial rows of the prompt."""
    import transformers

    from spt_jax.data.encoder import Encoder
    from spt_jax.data.sources import read_records
    from spt_jax.data.templates import Template

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    template = Template(prompt=setting.prompt, target=setting.target, virtual_tokens=setting.virtual_tokens)
    encoder = Encoder(template, tokenizer, len(tokenizer), max_length=2048)
    records = read_records(str(data / setting.file))
    order = np.random.default_rng(0).permutation(len(records))
    examples = encoder.encode_all([records[i] for i in order])
    np.savez(
        folder / "task.npz",
        ids=np.concatenate([example.ids for example in examples]),
        predicted=np.concatenate([example.predicted for example in examples]),
        lengths=[len(example.ids) for example in examples],
        lead=encoder.head_length(examples),
        prompt=0.02 * np.random.default_rng(1).standard_normal((setting.virtual_tokens, 512)).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """The data that a framework trains on.

    Attributes:
      examples: all examples; batches take the first ones.
      lead: the number of leading ids that all examples share.
      prompt: the initial rows of the prompt, float32 [P, D].
    """

    examples: list[Example]
    lead: int
    prompt: np.ndarray

    def batches(self, batch_size: int, count: int) -> list[list[Example]]:
        """Returns the first `count` batches."""
        return [self.examples[i * batch_size : (i + 1) * batch_size] for i in range(count)]


def read_task(folder: Path) -> Task:
    with np.load(folder / "task.npz") as stored:
        ends = np.cumsum(stored["lengths"])
        ids, predicted = np.split(stored["ids"], ends[:-1]), np.split(stored["predicted"], ends[:-1])
        pairs = enumerate(zip(ids, predicted, strict=True))
        examples = [Example(own, targets, (), 0, index) for index, (own, targets) in pairs]
        return Task(examples, int(stored["lead"]), stored["prompt"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of both frameworks."""

    folder: Path
    batch_size: int
    warmup: int
    steps: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Resident bytes once model and data are loaded, and the peak until then."""

    loaded: int
    loading_peak: int

    @classmethod
    def of_loaded(cls) -> "Memory":
        """Measures before the first step, so that the peak of training does not include that of loading."""
        memory = cls(common.resident_bytes(), common.peak_resident_bytes())
        common.forget_peak()
        return memory

    def after_training(self) -> dict[str, int]:
        training_peak = common.peak_resident_bytes()
        return {
            "peak_bytes": max(self.loading_peak, training_peak),
            "loaded_bytes": self.loaded,
            "above_loaded_bytes": training_peak - self.loaded,
        }


def run_spt_jax(options: Options) -> dict[str, Any]:
    """Runs spt_jax with packed rows."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import optax

    import spt_jax
    from spt_jax.data.batches import pack, place_batch, plan_batches
    from spt_jax.prompts import PromptTuning
    from spt_jax.prompts.initializers import array
    from spt_jax.runtime.hf_library import import_without_torch
    from spt_jax.training.step import init_state, make_train_step

    import_without_torch()  # as in the programs of spt_jax
    base = spt_jax.load_base(options.folder / "base", dtype="float32")
    task = read_task(options.folder)
    plan = plan_batches(task.examples, lead=task.lead, batch_size=options.batch_size)
    method, optimizer = PromptTuning(length=len(task.prompt), init=array(task.prompt)), optax.adam(LEARNING_RATE)
    step = make_train_step(base, method, optimizer)
    chunks = task.batches(options.batch_size, options.warmup + options.steps)
    jax.block_until_ready(base.params)
    memory = Memory.of_loaded()

    def fresh() -> Any:
        return init_state(jax.random.key(0), base, method, optimizer)

    start = time.perf_counter()
    shapes = {len(pack(chunk, plan).rows.ids): chunk for chunk in chunks}
    for chunk in shapes.values():  # a discarded step for each number of rows
        jax.block_until_ready(step(fresh(), place_batch(pack(chunk, plan), base.mesh)))
    compiled = time.perf_counter() - start
    state, losses, seconds = fresh(), [], []
    for chunk in chunks:
        start = time.perf_counter()
        state, metrics = step(state, place_batch(pack(chunk, plan), base.mesh))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return {
        "losses": losses,
        "step_seconds": seconds,
        **memory.after_training(),
        "compile_seconds": compiled,
        "row_length": plan.length,
        "rows": [len(pack(chunk, plan).rows.ids) for chunk in chunks],
        "parameters": base.parameter_count,
    }


def run_peft(options: Options) -> dict[str, Any]:
    """Runs PEFT with batches padded on the right to their longest example."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.folder / "base", dtype=torch.float32, attn_implementation="sdpa"
    )
    task = read_task(options.folder)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(task.prompt), prompt_tuning_init="RANDOM"
    )
    model = peft.get_peft_model(model, config)
    model.config.use_cache = False
    model.train()
    rows = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        rows.copy_(torch.tensor(task.prompt))
    optimizer = torch.optim.Adam([rows], lr=LEARNING_RATE)
    memory = Memory.of_loaded()
    losses, seconds = [], []
    for chunk in task.batches(options.batch_size, options.warmup + options.steps):
        start = time.perf_counter()
        inputs = {name: torch.tensor(values) for name, values in _padded(chunk, len(task.prompt)).items()}
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {
        "losses": losses,
        "step_seconds": seconds,
        **memory.after_training(),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
    }


def _padded(examples: Sequence[Example], virtual_tokens: int) -> dict[str, np.ndarray]:
    """Returns a right-padded batch without its virtual tokens, which PEFT adds; labels are -100 except at targets."""
    shape = (len(examples), max(len(example.ids) for example in examples) - virtual_tokens)
    ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
    for row, example in enumerate(examples):
        own = example.ids[virtual_tokens:]
        ids[row, : len(own)] = own
        mask[row, : len(own)] = 1
        labels[row, : len(own)] = np.where(example.predicted[virtual_tokens:], own, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def measure(framework: str, options: Options) -> dict[str, Any]:
    """Runs one framework in a separate process; returns its figures and the examples per second."""
    result = options.folder / f"{framework}.json"
    words = [f"--{field.name}={getattr(options, field.name)}" for field in dataclasses.fields(options)]
    command = [sys.executable, __file__, f"--worker={framework}", f"--result={result}", *words]
    subprocess.run(command, check=True, env=environment_with_huge_pages())
    figures = json.loads(result.read_text())
    seconds = figures["step_seconds"][options.warmup :]
    figures["examples_per_second"] = options.batch_size * len(seconds) / sum(seconds)
    return figures


def compare(setting: Setting, options: Options, data: Path) -> dict[str, Any]:
    """Compares both frameworks on one setting.

    Raises:
      SystemExit: the first losses of the frameworks differ.
    """
    write_task(options.folder, setting, data)
    result: dict[str, Any] = {framework: measure(framework, options) for framework in FRAMEWORKS}
    ours, theirs = (result[framework]["losses"] for framework in FRAMEWORKS)
    differences = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    if not differences[0] < TOLERANCE:
        raise SystemExit(f"the first losses differ: {ours[0]} and {theirs[0]}; the figures would not be comparable")
    result["first_loss_difference"], result["last_loss_difference"] = differences[0], differences[-1]
    for name in ("examples_per_second", "peak_bytes", "above_loaded_bytes"):
        result[f"{name}_ratio"] = result["spt_jax"][name] / result["peft"][name]
    return result


HEADER = ("setting", "", "examples/s", "peak MiB", "above loaded MiB", "first loss")


def table_rows(name: str, result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for framework in FRAMEWORKS:
        figures = result[framework]
        memory = [f"{figures[key] / common.MIB:.0f}" for key in ("peak_bytes", "above_loaded_bytes")]
        rows.append([name, framework, f"{figures['examples_per_second']:.2f}", *memory, f"{figures['losses'][0]:.6f}"])
    ratios = [f"{result[f'{key}_ratio']:.2f}" for key in ("examples_per_second", "peak_bytes", "above_loaded_bytes")]
    rows.append([name, "spt_jax / peft", *ratios, f"differ {result['first_loss_difference']:.0e}"])
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        metavar="SETTING",
        help=f"which of {', '.join(map(repr, SETTINGS))}; all by default",
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--threads", type=int, default=2, help="cores for each framework")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with trec/ and gsm8k/")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=SHARED / "models" / "tokenizers" / "llama2",
        help="folder of a Llama 2 tokenizer (32,000 entries)",
    )
    parser.add_argument("--out", type=Path, help="JSON file; by default results/train_vs_peft_<machine>.json here")
    for name, kind in (("worker", str), ("result", Path), ("folder", Path), ("batch_size", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1 or args.warmup < 1 or args.threads < 1:
        parser.error("--steps, --warmup and --threads must be at least 1")
    return args


def work(args: argparse.Namespace) -> None:
    """Runs one framework in this process and writes its figures."""
    common.use_cores(args.threads)
    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    figures = {"spt_jax": run_spt_jax, "peft": run_peft}[args.worker](options)
    common.write_json(args.result, figures)


def main() -> None:
    args = parse_args()
    if args.worker:
        work(args)
        return
    names = ("spt_jax", "jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "numpy")
    report: dict[str, Any] = {
        "benchmark": "train_vs_peft",
        "machine": common.machine(args.threads),
        "versions": common.versions(names),
        "commit": common.commit(),
        "steps": args.steps,
        "warmup": args.warmup,
        "memory": "peak: the peak resident memory of the process from start to end; above loaded: the peak during"
        " training (compilation included) minus the resident memory once model and data were loaded",
        "settings": {},
    }
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder) / "base", args.tokenizer)
        for name in args.settings:
            setting = SETTINGS[name]
            options = Options(
                folder=Path(folder),
                batch_size=setting.batch_size,
                warmup=args.warmup,
                steps=args.steps,
                threads=args.threads,
            )
            report["settings"][name] = compare(setting, options, args.data)
            rows += table_rows(name, report["settings"][name])
            print(f"{name}: done", file=sys.stderr)
    out = args.out or common.RESULTS / f"train_vs_peft_{common.machine_name(args.threads)}.json"
    common.write_json(out, report)
    load = report["machine"]["load_average"][0]
    print(f"{common.processor()}, {args.threads} cores; load before {load:.1f}; commit {report['commit']}")
    print(common.table(HEADER, rows))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
