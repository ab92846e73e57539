"""Measures PEFT's `generate` of one prompt for a full batch of requests (its best case): tokens per second, memory."""

import statistics
import time

import numpy as np

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Task, require
from benchmarks.accelerator_stages.serve_spt_jax import BOS_ID, LENGTH, own_ids, sizes
from benchmarks.accelerator_stages.train_peft import peft_model
from benchmarks.accelerator_stages.workload import workload

ROUNDS = 3


def run(task: Task, record: Record) -> None:
    """Measures one batch with as many requests as the engine has slots."""
    require("torch", "peft")
    import dataclasses

    import torch

    of, (slots, _, new_tokens, _) = dataclasses.replace(workload(task.tiny), prompt=LENGTH), sizes(task.tiny)
    place = device.torch_device()
    on_gpu = place.type == "cuda"
    record.update(framework="peft", batch=slots, new_tokens=new_tokens, at="weights")
    model = peft_model(of, "prompt", place, task.tiny).eval()
    rows = [np.append(np.asarray([BOS_ID], np.int32), own_ids(of, number)) for number in range(slots)]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(place)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    rates: list[float] = []
    for number in range(2 if task.tiny else ROUNDS + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(**inputs, **options)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if found.shape[1] not in (new_tokens, ids.shape[1] + new_tokens):
            raise ValueError(f"generate returned {found.shape[1]} ids for {ids.shape[1]} ids and {new_tokens} new ones")
        if number:  # the first warms up
            rates.append(slots * new_tokens / seconds)
            record.update(
                at="end",
                tokens_per_second=statistics.median(rates),
                peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
            )
