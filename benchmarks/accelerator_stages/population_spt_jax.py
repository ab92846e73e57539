"""Measures a step of one population, and of one of its members, in a separate process."""

import dataclasses
import time
from typing import Any

import numpy as np

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.train_spt_jax import elapsed, timed
from benchmarks.accelerator_stages.workload import batches, examples, prompt_rows, random_base, workload

BATCH = 8
BATCHES = 4  # different ones, which the members take in turn
STEPS = 100  # length of the learning rate's schedule
# Relative difference between the losses of a member and of its separate run after the first step.
TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-5}


def run(task: Task, record: Record) -> None:
    """Options: members, remat, one_by_one (whether to also time one member's own program)."""
    import jax
    import jax.numpy as jnp

    from spt_jax.data.batches import pack, place_batch, plan_batches
    from spt_jax.prompts import PromptTuning
    from spt_jax.runtime import measure
    from spt_jax.runtime.sharding import replicated
    from spt_jax.training.objectives import CrossEntropy
    from spt_jax.training.optimizers import OptimizerConfig, make_optimizer, resolve_optimizer
    from spt_jax.training.population import make_population_step, stack_batches
    from spt_jax.training.step import TrainState, make_train_step

    started, clock, of, options = time.perf_counter(), measure.compile_clock(), workload(task.tiny), task.options
    members = options["members"]
    record.update(batch=BATCH, **options, facts=device.facts(), at="weights")
    base = random_base(of, remat=options["remat"], attention=device.fused_kernel())
    method, rows = PromptTuning(length=of.prompt), prompt_rows(of.prompt, base.config.width)
    items = examples(of, BATCHES * BATCH, virtual=method.token_count)
    plan = plan_batches(items, lead=method.token_count, batch_size=BATCH)
    # A population's batches have as many rows as the largest batch of a member; those of one run as many as needed.
    largest = dataclasses.replace(plan, row_buckets=plan.row_buckets[-1:])
    own, padded = ([pack(chunk, use) for chunk in batches(items, BATCH)] for use in (plan, largest))
    config = resolve_optimizer(OptimizerConfig(name="adam", learning_rate=0.01), base.config.family)
    optimizer = make_optimizer(config, STEPS)

    def fresh(member: int) -> Any:
        params = {"tokens": jnp.asarray(rows + np.float32(0.01 * member))}
        return jax.device_put(
            TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), replicated(base.mesh)
        )

    groups = [[padded[(first + member) % BATCHES] for member in range(members)] for first in range(BATCHES)]
    stacked = [place_batch(stack_batches(group), base.mesh, stacked=True) for group in groups]
    losses: dict[str, float] = {}
    if options["one_by_one"]:
        record.update(at="compilation of one", start_seconds=elapsed(started))
        step = make_train_step(base, method, optimizer)
        placed = [place_batch(batch, base.mesh) for batch in own]
        for batch in {batch.rows.ids.shape: batch for batch in reversed(placed)}.values():
            _, metrics = step(fresh(0), batch)
        _, metrics = step(fresh(0), placed[0])
        losses["one"] = float(metrics["loss"])
        record.update(at="steps of one", compile_seconds_of_one=round(clock(), 2))
        state = [fresh(0)]

        def one(number: int) -> None:
            state[0], _ = step(state[0], placed[number])

        steps, seconds = timed(one, lambda: jax.block_until_ready(state[0]), task, BATCHES)
        record.update(one_step_seconds=seconds / steps, one_peak_bytes=measure.peak_memory_bytes())
    record.update(at="compilation")
    before = clock()
    together = make_population_step(base, method, config, STEPS, CrossEntropy())
    rates = jnp.full(members, config.learning_rate, jnp.float32)
    _, metrics = together([fresh(member) for member in range(members)], rates, stacked[0])
    losses["member"] = float(metrics["loss"][0])
    record.update(at="steps", compile_seconds=round(clock() - before, 2), first_losses=losses)
    states = [[fresh(member) for member in range(members)]]

    def all_members(number: int) -> None:
        states[0], _ = together(states[0], rates, stacked[number])

    steps, seconds = timed(all_members, lambda: jax.block_until_ready(states[0]), task, BATCHES)
    record.update(at="end", steps=steps, step_seconds=seconds / steps, peak_bytes=measure.peak_memory_bytes())
    if "one" in losses and not abs(losses["member"] / losses["one"] - 1) <= TOLERANCE[of.dtype]:
        record.update(status="failed", error=f"the first member's loss differs from that of its separate run: {losses}")
