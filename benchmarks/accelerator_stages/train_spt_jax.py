"""Measures one configuration of training in spt_jax, in a separate process so that peak memory is measured per run."""

import time
from typing import Any

import numpy as np

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.workload import (
    Workload,
    batches,
    examples,
    prefix_arrays,
    prompt_rows,
    random_base,
    texts,
    workload,
)

LEARNING_RATE = 0.01
SECONDS = 3.0  # minimum duration of the timed steps, if there is time
BATCHES = 4  # different ones, taken in turn


def timed(step: Any, synchronize: Any, task: Task, count: int) -> tuple[int, float]:
    """Times rounds of `count` steps for `SECONDS`, or less if time runs out.

    Args:
      step: called with the number of the step; need not wait for the device.
      synchronize: waits for the device.
      task: the task, whose deadline limits the time.
      count: steps per round.

    Returns:
      The number of steps, and their seconds in total.
    """
    synchronize()
    started, done = time.perf_counter(), 0
    limit = 0.2 if task.tiny else min(SECONDS, 0.5 * max(task.left, 0))
    while True:
        for number in range(count):
            step(number)
        synchronize()
        done += count
        if time.perf_counter() - started >= limit:
            return done, time.perf_counter() - started


def start_params(of: Workload, kind: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a method, and initial parameters for it that PEFT can use too."""
    from spt_jax.prompts import PrefixTuning, PromptTuning

    if kind == "prefix":
        free = prefix_arrays(of, config.layers, config.kv_heads, config.head_size)
        return PrefixTuning(length=of.prefix), {"free": free, "scale": np.float32(1)}
    return PromptTuning(length=of.prompt), {"tokens": prompt_rows(of.prompt, config.width)}


def run(task: Task, record: Record) -> None:
    """Options: batch, attention ("xla" or "fused"), remat, method ("prompt" or "prefix")."""
    import jax
    import jax.numpy as jnp
    import optax

    from spt_jax.data.batches import pack, place_batch, plan_batches
    from spt_jax.runtime import measure
    from spt_jax.runtime.sharding import replicated
    from spt_jax.training.cost import choose_remat, plan_shape, step_flops, step_memory, step_shape
    from spt_jax.training.step import TrainState, make_train_step

    started, clock, of, options = time.perf_counter(), measure.compile_clock(), workload(task.tiny), task.options
    attention = device.fused_kernel() if options["attention"] == "fused" else options["attention"]
    record.update(framework="spt_jax", **(options | {"attention": attention}), facts=device.facts(), at="weights")
    base = random_base(of, remat=options["remat"], attention=attention)
    method, start = start_params(of, options["method"], base.config)
    loaded = measure.peak_memory_bytes()

    items = examples(of, BATCHES * options["batch"], virtual=method.token_count)
    plan = plan_batches(items, lead=method.token_count, batch_size=options["batch"])
    placed = [place_batch(pack(chunk, plan), base.mesh) for chunk in batches(items, options["batch"])]
    shapes = [step_shape(batch, method.prefix_length) for batch in placed]
    optimizer = optax.adam(LEARNING_RATE)

    def fresh() -> Any:
        params = jax.tree.map(jnp.asarray, start)
        return jax.device_put(
            TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), replicated(base.mesh)
        )

    largest, itemsize = plan_shape(plan, method.prefix_length), base.params["embedding"].dtype.itemsize
    auto = choose_remat(
        lambda remat: step_memory(base.config, largest, remat=remat, itemsize=itemsize, mesh=base.mesh),
        measure.memory_limit(),
    )
    record.update(at="compilation", loaded_bytes=loaded, remat_that_auto_takes=auto, start_seconds=elapsed(started))
    before = clock()
    step = make_train_step(base, method, optimizer)
    losses = {}
    for number, batch in enumerate(placed):
        if batch.rows.ids.shape not in losses:
            _, metrics = step(fresh(), batch)
            losses[batch.rows.ids.shape] = float(metrics["loss"])
            if number == 0:
                record.update(first_loss=float(metrics["loss"]))
    record.update(
        at="steps",
        compile_seconds=round(clock() - before, 2),
        programs=len(losses),
        row_shapes=[list(shape) for shape in losses],
        peak_bytes=measure.peak_memory_bytes(),
    )

    state = [fresh()]
    metrics_of: list[Any] = [None]

    def one(number: int) -> None:
        state[0], metrics_of[0] = step(state[0], placed[number])

    steps, seconds = timed(one, lambda: jax.block_until_ready(state[0]), task, len(placed))
    real = sum(len(text) for text in texts(of, BATCHES * options["batch"])) / BATCHES
    flops = sum(step_flops(base.config, shape).total for shape in shapes) / len(shapes)
    record.update(
        at="peak",
        steps=steps,
        step_seconds=seconds / steps,
        tokens_per_second=real * steps / seconds,
        examples_per_second=options["batch"] * steps / seconds,
        peak_bytes=measure.peak_memory_bytes(),
        last_loss=float(metrics_of[0]["loss"]),
        step_flops=flops,
    )
    del state[0], metrics_of[0]
    peak = measure.peak_flops(base.dtype)
    record.update(at="end", peak_flops=peak, utilization=flops * steps / seconds / peak)


def elapsed(started: float) -> float:
    return round(time.perf_counter() - started, 2)
