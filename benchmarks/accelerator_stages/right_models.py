"""Compares logits, loss and prompt gradient on the device with the CPU's in float32, for tiny models."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.bases.base import DTYPES, FrozenBase
from spt_jax.data.batches import Batch, pack, place_batch, plan_batches
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.model import Model
from spt_jax.models.quantized import KernelArray
from spt_jax.prompts import PromptTuning
from spt_jax.runtime.sharding import make_mesh, replicated
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import CrossEntropy, Objective
from spt_jax.training.step import loss_and_gradient
from tests.examples import HEAD, QUICK_COMPILE, VIRTUAL, random_examples
from tests.family import BASES, batch_of, method_of, moved_params, objective_of

# Relative to the largest number of the reference. Products of bfloat16 numbers differ from the reference's by 2^-8
# each; over a few layers, and twice as many for gradients, they add up to these bounds.
BOUNDS: dict[str, dict[str, float]] = {
    "float32": {"logits": 1e-4, "loss": 1e-4, "gradient": 1e-4},
    "bfloat16": {"logits": 0.08, "loss": 0.05, "gradient": 0.3},
}
# No search for the fastest kernels, which takes longer than the computation.
_QUICK = {"cpu": QUICK_COMPILE, "gpu": {"xla_gpu_autotune_level": 0}}


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.cache` that computes a value only once, also if several threads request it at the same time."""
    found: dict[Any, Any] = {}
    locks: dict[Any, threading.Lock] = {}
    all_locks = threading.Lock()

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> Any:
        key = args, tuple(sorted(kwargs.items()))
        with all_locks:
            lock = locks.setdefault(key, threading.Lock())
        with lock:
            if key not in found:
                found[key] = function(*args, **kwargs)
        return found[key]

    return cached


def cpu() -> Any:
    return jax.devices("cpu")[0]


def accelerator() -> Any:
    """Returns the default device, which is the CPU if there is no accelerator."""
    return jax.devices()[0]


@contextlib.contextmanager
def on_device(device: Any) -> Iterator[None]:
    """Computes on a device, with float32 products in float32: GPUs and TPUs use fewer bits by default."""
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield


_READING = threading.Lock()  # transformers' lazy imports are not safe in several threads at once


@once
def reference_base(family: str, **overrides: Any) -> FrozenBase:
    """Returns a tiny base on the CPU, float32."""
    with _READING, on_device(cpu()):
        return tiny_base(family, mesh=make_mesh(devices=[cpu()]), **overrides)


def moved_base(base: FrozenBase, device: Any, *, dtype: str = "float32", attention: Any = "xla") -> FrozenBase:
    """Returns the base on another device, in another precision."""
    mesh = make_mesh(devices=[device])

    def move(leaf: Any) -> Any:
        if isinstance(leaf, KernelArray):
            return jax.tree.map(lambda a: jax.device_put(np.asarray(a), replicated(mesh)), leaf)
        return jax.device_put(np.asarray(leaf).astype(DTYPES[dtype]), replicated(mesh))

    params = jax.tree.map(move, base.params, is_leaf=lambda leaf: isinstance(leaf, KernelArray))
    model = DecoderModel(params, base.model.module.clone(mesh=mesh, attention=attention))
    return dataclasses.replace(base, model=model)


def _figures(method: Any, objective: Objective, model: Model, params: Any, batch: Batch) -> Any:
    loss, gradient, _ = loss_and_gradient(method, objective, model, params, batch)
    virtual = method.materialize(params, model)
    prefix = encode_prefix(model, virtual, batch.lead_ids, batch.lead_length)
    return loss, gradient, output_logits(model, virtual, prefix, batch.rows)


@once
def compiled(platform: str) -> Callable[..., Any]:
    """Returns `_figures` jitted, with quick compilation if the compiler supports the options."""
    options = _QUICK.get(platform)
    try:
        jax.jit(jnp.sin, compiler_options=options)(1.0)
    except Exception:
        options = None
    return jax.jit(_figures, static_argnames=("method", "objective"), compiler_options=options)


def figures(base: FrozenBase, method: Any, objective: Objective, params: Any, batch: Batch) -> Any:
    """Returns loss, gradient and logits at the output positions, on the host."""
    device = base.mesh.devices.flat[0]
    with on_device(device):
        params = jax.device_put(params, replicated(base.mesh))
        found = compiled(device.platform)(method, objective, base.model, params, batch)
        return jax.tree.map(np.asarray, found)


def differences(ours: Any, theirs: Any) -> dict[str, float]:
    """Returns the differences between two results of `figures`, relative to the largest number of the second.

    Logits are compared only if their shapes agree.

    Raises:
      ValueError: the second gradient is too small for a comparison.
    """
    (loss, gradient, logits), (own_loss, own_gradient, own_logits) = ours, theirs
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(own_gradient), strict=True))
    largest = max(float(np.abs(b).max()) for _, b in pairs)
    if not largest > 1e-4:
        raise ValueError(f"the reference's largest gradient is {largest}, too small for a comparison")
    found = {
        "loss": abs(float(loss) / float(own_loss) - 1),
        "gradient": max(float(np.abs(a - b).max()) for a, b in pairs) / largest,
    }
    if logits.shape == own_logits.shape:
        found["logits"] = float(np.abs(logits - own_logits).max() / np.abs(own_logits).max())
    return found


def prompt_batch(base: FrozenBase, packing: bool) -> Batch:
    """Returns a batch of nine examples with spans to predict."""
    examples = random_examples("spans", 9)
    plan = plan_batches(examples, lead=len(HEAD), batch_size=len(examples), packing=packing)
    return place_batch(pack(examples, plan), base.mesh)


@once
def prompt_params(family: str) -> Any:
    with on_device(cpu()):
        params = moved_params(PromptTuning(length=VIRTUAL), reference_base(family))
        return jax.tree.map(np.asarray, params)


@once
def family_reference(family: str, packing: bool) -> Any:
    base = reference_base(family)
    return figures(
        base, PromptTuning(length=VIRTUAL), CrossEntropy(), prompt_params(family), prompt_batch(base, packing)
    )


def family(name: str, dtype: str, packing: bool) -> Mapping[str, float]:
    """Checks prompt tuning of one family, in rows of several examples or of one."""
    base = moved_base(reference_base(name), accelerator(), dtype=dtype)
    ours = figures(base, PromptTuning(length=VIRTUAL), CrossEntropy(), prompt_params(name), prompt_batch(base, packing))
    return differences(ours, family_reference(name, packing))


def method(name: str) -> Mapping[str, float]:
    """Checks one method: packed rows with shared leading ids on the device, one full sequence per row on the CPU."""
    own = method_of(name)
    reference = reference_base(**{"family": "llama", "num_key_value_heads": 4, **BASES.get(name, {})})
    with on_device(cpu()):
        params = jax.tree.map(np.asarray, moved_params(own, reference))
    objective, base = objective_of(own, reference), moved_base(reference, accelerator())
    theirs = figures(reference, own, objective, params, batch_of(own, reference, shared=False, packing=False))
    ours = figures(base, own, objective, params, batch_of(own, base, shared=True, packing=True))
    return {"logits": 0.0, **{k: v for k, v in differences(ours, theirs).items() if k != "logits"}}


def int8(name: str) -> Mapping[str, float]:
    """Checks a base whose layers are integers with a scale per channel."""
    reference = reference_base(name, quantize="int8")
    base, own = moved_base(reference, accelerator()), PromptTuning(length=VIRTUAL)
    ours, theirs = (
        figures(one, own, CrossEntropy(), prompt_params(name), prompt_batch(one, True)) for one in (base, reference)
    )
    return differences(ours, theirs)
