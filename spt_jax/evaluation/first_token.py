"""The time until the first token of an answer, with a text in the request or with a soft prompt."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.inference.forward import encode_prefix, run_stream
from spt_jax.models.attention import Prefix, Stream
from spt_jax.models.model import Model
from spt_jax.prompts import VirtualPrompt
from spt_jax.runtime.sharding import replicated, row_shards

# Rounds of measurements: at least the first number, and up to the second while they take less than SECONDS.
ROUNDS, MORE_ROUNDS, SECONDS = 5, 51, 2.0


@dataclasses.dataclass(frozen=True)
class Request:
    """A request whose first token is timed.

    Attributes:
      ids: all ids of the request, real and virtual.
      virtual: the soft prompt; None for none.
      lead: the number of leading ids whose memory is kept from earlier requests, as a server keeps it; fewer than all.
    """

    ids: Int[np.ndarray, " T"]
    virtual: VirtualPrompt | None = None
    lead: int = 0


def first_token_seconds(base: FrozenBase, requests: Mapping[str, Request]) -> dict[str, float]:
    """Returns the median seconds until the first token of each request is chosen, after one run that compiles.

    The requests are timed in turns, each alone. What is kept from earlier requests, the prompt's prefix and the memory
    of the leading ids, is computed before.

    Args:
      base: the frozen base, which generates.
      requests: the requests, by a name of each.

    Returns:
      The seconds, by the same names.
    """
    calls = {name: _call(base, request) for name, request in requests.items()}
    for call in calls.values():
        jax.block_until_ready(call())
    found: dict[str, list[float]] = {name: [] for name in requests}
    began = time.perf_counter()
    for number in range(MORE_ROUNDS):
        if number >= ROUNDS and time.perf_counter() - began > SECONDS:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _call(base: FrozenBase, request: Request) -> Callable[[], Array]:
    """Returns a function that computes the first token from what is kept."""
    everywhere = replicated(base.mesh)
    virtual = None if request.virtual is None else jax.device_put(request.virtual, everywhere)
    prefix = _prefix(base.model, virtual, jax.device_put(request.ids[: request.lead], everywhere))
    own = np.broadcast_to(request.ids[request.lead :], (row_shards(base.mesh), len(request.ids) - request.lead))
    ids = jax.device_put(np.ascontiguousarray(own), everywhere)
    start = request.lead + (0 if request.virtual is None else request.virtual.prefix_length)
    return lambda: _first_token(base.model, virtual, prefix, ids, start)


@jax.jit
def _prefix(model: Model, virtual: VirtualPrompt | None, lead: Int[Array, " P"]) -> Prefix | None:
    return encode_prefix(model, virtual, lead)


@jax.jit
def _first_token(
    model: Model, virtual: VirtualPrompt | None, prefix: Prefix | None, ids: Int[Array, "B T"], start: Int[Array, ""]
) -> Int[Array, " B"]:
    positions = start + jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    stream = Stream(positions, jnp.ones_like(ids), jnp.zeros_like(ids))
    hidden, _ = run_stream(model, virtual, ids, stream, prefix)
    return jnp.argmax(model.logits(hidden[:, -1]), axis=-1)
