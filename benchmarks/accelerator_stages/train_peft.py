"""Measures one configuration of training in PEFT: sdpa attention, rows padded to the longest of their batch."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Skip, Task, require
from benchmarks.accelerator_stages.train_spt_jax import BATCHES, LEARNING_RATE, elapsed, timed
from benchmarks.accelerator_stages.workload import (
    Workload,
    batches,
    fill_torch_model,
    llama_config,
    predicted,
    prefix_arrays,
    prompt_rows,
    texts,
    workload,
)


def peft_model(of: Workload, kind: str, place: Any, tiny: bool) -> Any:
    """Returns a model of the shape with `random_base`'s weights, wrapped in PEFT's prompt or prefix.

    Raises:
      Skip: torch or peft is not installed, or torch has no accelerator for the large shape.
    """
    require("torch", "peft")
    import peft
    import torch
    import transformers

    if not tiny and place.type == "cpu":
        raise Skip("needs a torch with support for the accelerator")
    with place:
        model = transformers.AutoModelForCausalLM.from_config(
            llama_config(of), dtype=getattr(torch, of.dtype), attn_implementation="sdpa"
        )
    fill_torch_model(model)
    common = {"task_type": "CAUSAL_LM"}
    if kind == "prefix":
        config = peft.PrefixTuningConfig(**common, num_virtual_tokens=of.prefix)
    else:
        config = peft.PromptTuningConfig(**common, num_virtual_tokens=of.prompt, prompt_tuning_init="RANDOM")
    model = peft.get_peft_model(model, config).to(place)
    layers, heads = of.model["num_hidden_layers"], of.model["num_key_value_heads"]
    if kind == "prefix":
        size = of.model.get("head_dim") or of.model["hidden_size"] // of.model["num_attention_heads"]
        both = prefix_arrays(of, layers, heads, size)  # PEFT stores keys of layer l at 2l, values at 2l + 1
        start = both.transpose(2, 1, 0, 3, 4).reshape(of.prefix, -1)
    else:
        start = prompt_rows(of.prompt, of.model["hidden_size"])
    rows = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        rows.copy_(torch.from_numpy(start))
    return model


def padded(of: Workload, chunk: Sequence[np.ndarray], place: Any) -> dict[str, Any]:
    """Returns texts padded on the right; labels are -100 where nothing is predicted."""
    import torch

    shape = (len(chunk), max(map(len, chunk)))
    ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
    for row, text in enumerate(chunk):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
        labels[row, : len(text)] = np.where(predicted(of, text), text, -100)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array).to(place) for name, array in arrays.items()}


def run(task: Task, record: Record) -> None:
    """Options: batch, method ("prompt" or "prefix"), checkpointing."""
    require("torch", "peft")
    import torch

    started, of, options = time.perf_counter(), workload(task.tiny), task.options
    place = device.torch_device()
    on_gpu = place.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    record.update(framework="peft", **options, torch_device=name, at="weights")
    model = peft_model(of, options["method"], place, task.tiny)
    model.config.use_cache = False
    model.train()
    if options["checkpointing"]:
        model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = model.prompt_encoder["default"].embedding.weight
    optimizer = torch.optim.Adam([rows], lr=LEARNING_RATE)
    all_texts = texts(of, BATCHES * options["batch"])
    placed = [padded(of, chunk, place) for chunk in batches(all_texts, options["batch"])]
    start = rows.detach().clone()

    def peak() -> int | None:
        return torch.cuda.max_memory_allocated() if on_gpu else None

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def one(number: int) -> Any:
        optimizer.zero_grad()
        loss = model(**placed[number]).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    synchronize()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    record.update(at="warm-up", start_seconds=elapsed(started), loaded_bytes=peak())
    warming = time.perf_counter()
    losses = [one(number) for number in range(len(placed))]
    synchronize()
    record.update(
        at="steps", first_loss=float(losses[0]), warm_up_seconds=elapsed(warming), peak_bytes=peak(), programs=None
    )
    with torch.no_grad():
        rows.copy_(start)
    optimizer.state.clear()
    steps, seconds = timed(one, synchronize, task, len(placed))
    real = sum(map(len, all_texts)) / BATCHES
    record.update(
        at="end",
        steps=steps,
        step_seconds=seconds / steps,
        tokens_per_second=real * steps / seconds,
        examples_per_second=options["batch"] * steps / seconds,
        peak_bytes=peak(),
        row_lengths=[int(batch["input_ids"].shape[1]) for batch in placed],
    )
