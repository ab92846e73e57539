"""Splits a training step, an evaluation and a decoding step into named parts, with their share of the device's peak.

    python benchmarks/breakdown.py                           # a few minutes on two idle cores
    python benchmarks/breakdown.py --shapes smollm2 --parts step
    python benchmarks/breakdown.py --shapes 8b               # only counts the work of a step; nothing is run

Models have random weights and texts random ids, so nothing is read. Times come from JAX's profiler: the operations of
the device are grouped by the matrix products in them, or by where they come from. Operations that run at the same time
share it, so the parts sum to the time of the step; "host and waiting" is when no operation ran. The peak is that of one
large matrix product, measured in the same process right before and after.

(The file is not called profile.py: Python's cProfile imports a module of that name.)
"""

import argparse
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.accelerator_stages.workload import TINY, Workload

PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "numpy")
WAITING = "host and waiting"


def llama(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    """Returns the fields of a LlamaConfig with tied embeddings."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


_SMALL, _SMOLLM2 = llama(512, 1376, 8, 8, 4, 32_000), llama(576, 1536, 30, 9, 3, 49_152)
# The lengths and target shares of TREC and GSM8K.
_SHORT, _LONG = {"mean_length": 17, "target_share": 0.1}, {"mean_length": 210, "target_share": 0.55}
SHAPES = {
    "39m short": (Workload(model=_SMALL, dtype="float32", prompt=20, **_SHORT), 32),
    "39m long": (Workload(model=_SMALL, dtype="float32", prompt=20, **_LONG), 8),
    "smollm2": (Workload(model=_SMOLLM2, dtype="float32", prompt=20, **_SHORT), 16),
}
PLANNED, TINY_SHAPE = "8b", "tiny"
# Operations that write a constant, that only move data, and that compute where to move it.
_FILLS = frozenset({"parameter", "constant", "broadcast", "fusion", "call", "bitcast", "iota"})
_MOVES = _FILLS | {"reshape", "copy", "transpose", "slice", "concatenate", "pad", "gather", "convert"}
_STACKED = frozenset({"dynamic-slice", "dynamic-update-slice"})
_INDEX = frozenset({"compare", "select", "add", "subtract", "clamp", "maximum", "minimum", "and", "or", "not"})


def part_of(operation: Any) -> str:
    """Names the part of a step that an operation belongs to."""
    if operation is None:
        return "other programs"
    scope, kinds = operation.scope, operation.kinds
    if operation.products:
        if "attend" in scope:
            return "products of attention"
        return "products of logits" if "logits" in scope else "products with weights"
    if kinds <= _FILLS:
        return "fills"
    if kinds <= _MOVES:
        return "layout copies"
    if kinds & _STACKED and kinds <= _MOVES | _STACKED | _INDEX:
        return "stores into stacked arrays" if "dynamic-update-slice" in kinds else "slices of stacked arrays"
    if "norm" in scope:
        return "normalization"
    if "attention" in scope:
        return "attention, elementwise"
    return "MLP, elementwise" if "mlp" in scope else "the rest"


def split(run: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Splits the time of one call of `run` into parts.

    Args:
      run: waits for its work; was called before.
      repeats: calls to average over.

    Returns:
      Seconds and flops of a call; by part, and by size for matrix products: seconds, times, flops.
    """
    from benchmarks.timeline import trace

    line = trace(lambda: [run() for _ in range(repeats)])
    parts: dict[str, Counter[str]] = {}
    products: dict[str, Counter[str]] = {}
    for one in line.operations:
        flops = one.operation.flops * one.times if one.operation else 0
        figures = Counter(seconds=one.seconds, times=one.times, flops=flops)
        parts.setdefault(part_of(one.operation), Counter()).update(figures)
        if one.operation and one.operation.products:
            products.setdefault(" + ".join(one.operation.products), Counter()).update(figures)
    parts[WAITING] = Counter(seconds=line.seconds - line.busy, times=repeats)
    seconds, flops = line.seconds / repeats, sum(part["flops"] for part in parts.values()) / repeats

    def each(found: dict[str, Counter[str]]) -> dict[str, dict[str, float]]:
        ordered = sorted(found.items(), key=lambda item: -item[1]["seconds"])
        return {
            name: {key: figures[key] / repeats for key in ("seconds", "times", "flops")} for name, figures in ordered
        }

    return {
        "seconds": seconds,
        "flops": flops,
        "parts": each(parts),
        "products": each(products),
    }


def step_run(base: Any, of: Workload, batch: int) -> Callable[[], object]:
    """Returns a training step of prompt tuning with Adam on one packed batch."""
    import jax
    import optax

    from benchmarks.accelerator_stages.workload import examples
    from spt_jax.data.batches import pack, place_batch, plan_batches
    from spt_jax.prompts import PromptTuning
    from spt_jax.training.step import init_state, make_train_step

    method, optimizer = PromptTuning(length=of.prompt), optax.adam(0.01)
    items = examples(of, batch, virtual=of.prompt)
    placed = place_batch(pack(items, plan_batches(items, lead=of.prompt, batch_size=batch)), base.mesh)
    step, state = make_train_step(base, method, optimizer), [init_state(jax.random.key(0), base, method, optimizer)]

    def run() -> None:
        state[0], metrics = step(state[0], placed)
        float(metrics["loss"])

    return run


def evaluation_run(base: Any, of: Workload, batch: int) -> Callable[[], object]:
    """Returns the scores of six classes of one token after each of four batches of texts, under the bare base."""
    import numpy as np

    from benchmarks.accelerator_stages.workload import examples
    from spt_jax.evaluation.evaluate import reference_scores

    classes = tuple(np.asarray([number], np.int32) for number in range(10, 16))
    items = [
        dataclasses.replace(one, predicted=np.zeros_like(one.predicted), choices=classes)
        for one in examples(of, 4 * batch, virtual=of.prompt)
    ]
    return lambda: reference_scores(base, items, batch)


def decoding_run(base: Any, of: Workload, batch: int) -> Callable[[], object]:
    """Returns a step of the engine with 16 requests, each behind a soft prompt; all are in the middle of an answer."""
    import spt_jax
    from benchmarks.accelerator_stages.serve_spt_jax import fill_bank, requests_of

    slots, steps = 16, 200
    engine = spt_jax.Engine(fill_bank(base, 4), slots=slots, context=512)
    state: list[Any] = []

    def run() -> None:
        if not state or any(ticket.done for ticket in state):
            state[:] = [engine.submit(one) for one in requests_of(of, engine.bank.names, slots, steps)]
            while not all(ticket.ids for ticket in state):
                engine.step()
        engine.step()

    return run


PARTS = {"step": step_run, "evaluation": evaluation_run, "decoding": decoding_run}


def measure(of: Workload, batch: int, parts: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measures the parts of one shape."""
    from benchmarks.accelerator_stages.workload import random_base
    from spt_jax.bases.base import DTYPES
    from spt_jax.runtime.measure import peak_flops
    from spt_jax.testing import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None  # every answer has its full length
    base = random_base(of, tokenizer=tokenizer)
    found: dict[str, Any] = {"batch": batch}
    for part in parts:
        run = PARTS[part](base, of, batch)
        for _ in range(2):
            run()
        peak_flops.cache_clear()
        before = peak_flops(DTYPES[of.dtype])
        own = split(run, repeats)
        peak_flops.cache_clear()
        peak = max(before, peak_flops(DTYPES[of.dtype]))
        found[part] = {**own, "peak_flops_per_second": peak, "share_of_peak": own["flops"] / own["seconds"] / peak}
    return found


def planned_step() -> dict[str, Any]:
    """Counts the work of a step in the sizes of Llama 3.1 8B: 16 rows of 512 tokens behind a prompt of 100."""
    import jax.numpy as jnp

    from benchmarks.ahead_of_time import CONFIG, SHORT
    from benchmarks.program import count
    from benchmarks.shapes import lower_step
    from spt_jax.training.cost import StepShape, step_flops

    shape = StepShape(rows=16, **SHORT)
    work = count(lower_step(CONFIG, shape, dtype=jnp.bfloat16, remat="dots").compile().as_text())
    return {"shape": vars(shape), "flops": work.flops, "formula_flops": step_flops(CONFIG, shape).total}


def tables(name: str, found: dict[str, Any]) -> str:
    """Returns the tables of one shape."""
    texts = []
    for part in (part for part in PARTS if part in found):
        own = found[part]
        peak = own["peak_flops_per_second"]
        head = f"{own['seconds'] * 1e3:.1f} ms, {own['flops'] / 1e9:.1f} GFLOP, {own['share_of_peak']:.0%} of the peak"
        texts.append(f"\n{name}, {part}: {head}")
        for title, kind in (("part", "parts"), ("matrix product", "products")):
            rows = [
                [
                    label,
                    f"{one['times']:.0f}",
                    f"{one['seconds'] * 1e3:.2f}",
                    f"{one['seconds'] / own['seconds']:.1%}",
                    f"{one['flops'] / one['seconds'] / peak:.0%}" if one["flops"] else "",
                ]
                for label, one in own[kind].items()
                if one["seconds"] >= 0.01 * own["seconds"]
            ]
            texts.append(common.table((title, "times", "ms", "share of the time", "share of the peak"), rows))
    return "\n".join(texts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SHAPES, PLANNED, TINY_SHAPE]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names[:-1])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="calls that a figure is the mean of")
    parser.add_argument("--cores", type=int, default=2, help="cores of the CPU to use")
    parser.add_argument("--out", type=Path, help="JSON file; by default results/breakdown_<machine>.json here")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    common.use_cores(options.cores)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    report: dict[str, Any] = {
        "benchmark": "breakdown",
        "machine": common.machine(options.cores),
        "versions": common.versions(PACKAGES),
        "commit": common.commit(),
        "shapes": {},
    }
    for name in options.shapes:
        if name == PLANNED:
            found = planned_step()
            print(
                f"\n{name}, step: {found['flops'] / 1e12:.2f} TFLOP; by the formula {found['formula_flops'] / 1e12:.2f}"
            )
        else:
            of, batch = SHAPES.get(name, (TINY, 4))
            found = measure(of, batch, options.parts, options.repeats)
            print(tables(name, found), flush=True)
        report["shapes"][name] = found
    out = options.out or common.RESULTS / f"breakdown_{common.machine_name(options.cores)}.json"
    common.write_json(out, report)
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
