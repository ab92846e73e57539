"""Compares matrix products that share their input with one product of their joined matrices, on the default device.

    python benchmarks/fused.py

Query, key and value of a layer, and gate and up of its MLP: apart, and as one product whose result is split. Forward,
and the gradient for the input, which is what training behind a frozen base needs. Prints the time of the joined form
divided by that of the separate form, the median over pairs.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

THREADS = 2
PAIRS, CALLS = 7, 5
# Width, sizes of the outputs of query, key and value, and that of gate and up.
SHAPES = {"39 M": (512, (512, 512, 512), 1376), "SmolLM2 135M": (576, (576, 192, 192), 1536)}
TOKENS = (768, 4096)


def seconds(function: Callable[..., Any], *arrays: Any) -> float:
    """Returns the time of some calls."""
    import jax

    begin = time.perf_counter()
    for _ in range(CALLS):
        jax.block_until_ready(function(*arrays))
    return time.perf_counter() - begin


def ratio(combine: Callable[..., Any], x: Any, matrices: Sequence[Any], *, gradient: bool) -> float:
    """Returns the time of one joined product divided by that of separate ones."""
    import jax
    import jax.numpy as jnp

    ends = [sum(matrix.shape[1] for matrix in matrices[: i + 1]) for i in range(len(matrices) - 1)]

    def separate(x: Any, matrices: Sequence[Any]) -> Any:
        return combine(*(x @ matrix for matrix in matrices))

    def joined(x: Any, matrix: Any) -> Any:
        return combine(*jnp.split(x @ matrix, ends, axis=1))

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(
            jax.grad(lambda x, own: sum(jnp.sum(part) for part in function(x, own))) if gradient else function
        )

    inputs = (compiled(separate), x, list(matrices)), (compiled(joined), x, jnp.concatenate(matrices, axis=1))
    for function, *arrays in inputs:
        seconds(function, *arrays)  # compiles
    pairs = [[seconds(function, *arrays) for function, *arrays in inputs] for _ in range(PAIRS)]
    return statistics.median(after / before for before, after in pairs)


def main() -> None:
    common.use_cores(THREADS)
    import jax
    import numpy as np

    print(common.machine_name(THREADS), f"jax {jax.__version__}", jax.devices()[0].device_kind)
    draw, rows = np.random.default_rng(0), []

    def array(*shape: int) -> Any:
        return jax.device_put(draw.standard_normal(shape, dtype=np.float32))

    def squares(*parts: Any) -> Any:
        return [part * part for part in parts]

    def gated(gate: Any, up: Any) -> Any:
        return [jax.nn.silu(gate) * up]

    for name, (width, heads, inner) in SHAPES.items():
        for tokens in TOKENS:
            x, projections, mlp = array(tokens, width), [array(width, n) for n in heads], [array(width, inner)] * 2
            cells = [
                ratio(combine, x, matrices, gradient=gradient)
                for combine, matrices in ((squares, projections), (gated, mlp))
                for gradient in (False, True)
            ]
            rows.append([name, f"{tokens:,}", *(f"{cell:.2f}" for cell in cells)])
    print(common.table(["shape", "tokens", "q k v", "gradient", "gate up", "gradient"], rows))


if __name__ == "__main__":
    main()
