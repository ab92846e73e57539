"""Measures each optimization of the training step, and how time and memory grow with P, T, B and microbatches.

    python benchmarks/step.py

Steps of prompt tuning on the random Llama of 39 M parameters and the texts of train_vs_peft.py, on the CPU, in float32.
The first table disables one optimization at a time; the second changes one size at a time, with random ids. Time is the
median over compiled steps, memory is what XLA plans for temporaries. Prints the tables and writes JSON.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import optax

from benchmarks import common
from benchmarks.train_vs_peft import SETTINGS, SHARED, read_task, write_base, write_task
from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.data.batches import Batch, pack, place_batch, plan_batches
from spt_jax.data.examples import Example
from spt_jax.models import vocabulary
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.stacks import Remat
from spt_jax.prompts import PromptTuning
from spt_jax.training.step import init_state, make_train_step

PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A step with some optimizations disabled.

    Attributes:
      share: whether leading ids run once; else in every row.
      pack: whether examples share rows.
      outputs: whether only target positions reach the output matrix.
      chunk: whether logits are computed in chunks.
      skip: whether leading ids skip the last layer except for keys and values.
      remat: what the backward pass recomputes.
      microbatches: per step.
    """

    share: bool = True
    pack: bool = True
    outputs: bool = True
    chunk: bool = True
    skip: bool = True
    remat: Remat = "dots"
    microbatches: int = 1


VARIANTS = {
    "as it is": Variant(),
    "the prompt in every row": Variant(share=False),
    "a row for each example": Variant(pack=False),
    "logits of every position": Variant(outputs=False),
    "logits held as a whole": Variant(chunk=False),
    "the whole last layer for leading ids": Variant(skip=False),
    "nothing computed again": Variant(remat="none"),
    "whole layers computed again": Variant(remat="full"),
    "none of the first five": Variant(share=False, pack=False, outputs=False, chunk=False, skip=False),
}


@contextlib.contextmanager
def without(variant: Variant) -> Iterator[None]:
    """Disables optimizations that have no option, for programs traced inside the context."""
    run, limit = DecoderModel.run, vocabulary.CHUNK_LOGITS

    def whole(*args: Any, return_hidden: bool, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    DecoderModel.run = run if variant.skip else whole
    vocabulary.CHUNK_LOGITS = limit if variant.chunk else 2**60
    try:
        yield
    finally:
        DecoderModel.run, vocabulary.CHUNK_LOGITS = run, limit


def at_every_position(batch: Batch) -> Batch:
    """Returns the same batch with outputs at all tokens."""
    rows = batch.rows
    outputs = np.broadcast_to(np.arange(rows.ids.shape[1], dtype=np.int32), rows.ids.shape)
    targets = np.take_along_axis(np.asarray(rows.outputs), np.asarray(rows.target_outputs), axis=1)
    return dataclasses.replace(batch, rows=dataclasses.replace(rows, outputs=outputs, target_outputs=targets))


def measure(
    base: FrozenBase, examples: Sequence[Example], lead: int, length: int, batch_size: int, variant: Variant, steps: int
) -> dict[str, Any]:
    """Measures the median seconds of a step, the planned bytes of temporaries, and the first loss.

    Args:
      base: the frozen base.
      examples: at least `steps * batch_size` of them, batched in order.
      lead: the number of leading ids that all examples share.
      length: virtual tokens P.
      batch_size: examples per batch.
      variant: the optimizations to use.
      steps: timed steps.
    """
    plan = plan_batches(
        examples,
        lead=lead if variant.share else 0,
        batch_size=batch_size,
        packing=variant.pack,
        multiple=variant.microbatches,
    )
    base = dataclasses.replace(base, model=base.model.with_options(remat=variant.remat))
    method, optimizer = PromptTuning(length=length), optax.adam(0.03)
    step = make_train_step(base, method, optimizer, microbatches=variant.microbatches)
    batches = []
    for start in range(0, steps * batch_size, batch_size):
        batch = pack(examples[start : start + batch_size], plan)
        batches.append(place_batch(batch if variant.outputs else at_every_position(batch), base.mesh))

    def fresh() -> Any:
        return init_state(jax.random.key(0), base, method, optimizer)

    state, seconds, losses, planned = fresh(), [], [], []
    with without(variant):
        for batch in {batch.rows.ids.shape: batch for batch in batches}.values():
            program: Any = step
            memory = program.func.lower(*program.args, state, batch).compile().memory_analysis()
            planned.append(memory.temp_size_in_bytes)
            jax.block_until_ready(step(fresh(), batch))
        for batch in batches:
            start_time = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start_time)
    return {
        "seconds": statistics.median(seconds),
        "steps": len(seconds),
        "temporary_bytes": max(planned),
        "loss": losses[0],
    }


def random_examples(count: int, lead: int, length: int, vocab_size: int) -> list[Example]:
    """Returns examples of `lead` virtual ids and `length` random ids, the last of which is the target."""
    random, virtual = np.random.default_rng(0), vocab_size + np.arange(lead)
    predicted = np.arange(lead + length) == lead + length - 1
    texts = random.integers(3, vocab_size, (count, length))
    return [
        Example(np.concatenate([virtual, text]).astype(np.int32), predicted, (), 0, i) for i, text in enumerate(texts)
    ]


SIZES = {"P": 20, "T": 64, "B": 16, "microbatches": 1}
CURVES = {"P": (5, 20, 100, 200), "T": (32, 64, 128, 256), "B": (4, 16, 64), "microbatches": (1, 4, 16)}


def ablation(base: FrozenBase, folder: Path, setting: str, data: Path, steps: int) -> dict[str, Any]:
    """Measures every variant on one setting of train_vs_peft.py; all must have the same first loss."""
    chosen = SETTINGS[setting]
    write_task(folder, chosen, data)
    task = read_task(folder)
    sizes = task.examples, task.lead, chosen.virtual_tokens, chosen.batch_size
    found = {name: measure(base, *sizes, variant, steps) for name, variant in VARIANTS.items()}
    first = found["as it is"]["loss"]
    if any(abs(one["loss"] / first - 1) > 1e-4 for one in found.values()):
        raise SystemExit(f"the first losses differ: { ({name: one['loss'] for name, one in found.items()}) }")
    return found


def curves(base: FrozenBase, steps: int) -> list[dict[str, Any]]:
    """Measures steps with one size changed at a time, each example in a separate row."""
    found = []
    for axis, values in CURVES.items():
        for value in values:
            sizes = {**SIZES, axis: value}
            examples = random_examples(steps * sizes["B"], sizes["P"], sizes["T"], base.config.vocab_size)
            variant = Variant(pack=False, microbatches=sizes["microbatches"])
            figures = measure(base, examples, sizes["P"], sizes["P"], sizes["B"], variant, steps)
            found.append({"changed": axis, **sizes, **figures})
    return found


def cells(figures: dict[str, Any], against: dict[str, Any]) -> list[str]:
    time_, memory = figures["seconds"], figures["temporary_bytes"]
    ratios = time_ / against["seconds"], memory / against["temporary_bytes"]
    return [f"{time_ * 1e3:.0f}", f"{memory / common.MIB:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]


HEADER = ("ms per step", "MiB temporaries", "time", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="+", default=["trec P=100 batch 32", "gsm8k P=20 batch 8"], choices=SETTINGS
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each variant")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with trec/ and gsm8k/")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "models" / "tokenizers" / "llama2")
    parser.add_argument("--out", type=Path, help="JSON file; by default results/step_<machine>.json here")
    options = parser.parse_args()
    common.use_cores(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base", options.tokenizer)
        base = load_base(folder / "base", dtype="float32")
        tricks = {one: ablation(base, folder, one, options.data, options.steps) for one in options.settings}
        grown = curves(base, options.steps)
    for setting, found in tricks.items():
        print(f"\n{setting}")
        rows = [[name, *cells(figures, found["as it is"])] for name, figures in found.items()]
        print(common.table(("without", *HEADER), rows))
    (usual,) = [one for one in grown if one["changed"] == "P" and one["P"] == SIZES["P"]]
    print(f"\n{SIZES}, with one of them changed")
    print(common.table(("changed", *HEADER), [[f"{o['changed']} {o[o['changed']]}", *cells(o, usual)] for o in grown]))
    report = {
        "benchmark": "step",
        "machine": common.machine(2),
        "versions": common.versions(PACKAGES),
        "commit": common.commit(),
        "ablation": tricks,
        "curves": grown,
    }
    out = options.out or common.RESULTS / f"step_{common.machine_name(2)}.json"
    common.write_json(out, report)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
