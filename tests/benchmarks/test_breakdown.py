"""Parts of a step: counted work against closed forms, shared time, and the whole benchmark on a tiny model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import breakdown, program, timeline


def test_operations_count_batched_products_by_size():
    left, right = jnp.ones((3, 8, 5)), jnp.ones((3, 5, 7))
    compiled = jax.jit(lambda a, b: jnp.tanh(jnp.einsum("bij,bjk->bik", a, b))).lower(left, right).compile()
    found = [one for one in program.operations(compiled.as_text()).values() if one.products]
    assert {one.products for one in found} == {("3 x 8 x 5 x 7",)}
    assert {one.flops for one in found} == {2 * 3 * 8 * 5 * 7}


def test_operations_of_a_moment_share_it_and_the_innermost_of_a_line_counts():
    step = ("step", 1)
    events = [
        timeline._Event(0e9, 10e9, 0, step, "loop"),
        timeline._Event(0e9, 4e9, 0, step, "product"),
        timeline._Event(2e9, 6e9, 1, step, "copy"),
    ]
    found = timeline._shared_seconds(events)
    # The product alone until 2, with the copy until 4; then the loop with the copy until 6; then the loop.
    assert found == {(step, "product"): 3, (step, "copy"): 2, (step, "loop"): 5}


@pytest.mark.parametrize(
    ("kinds", "products", "scope", "part"),
    [
        ({"dot", "parameter"}, ("2 x 3 x 4",), "Block/mlp/gate", "products with weights"),
        ({"dot", "parameter"}, ("2 x 3 x 4",), "attention/attention.attend", "products of attention"),
        ({"broadcast", "constant"}, (), "", "fills"),
        ({"copy"}, (), "mlp", "layout copies"),
        ({"dynamic-slice", "bitcast", "add", "select"}, (), "", "slices of stacked arrays"),
        ({"dynamic-update-slice", "dynamic-slice"}, (), "", "stores into stacked arrays"),
        ({"multiply", "add"}, (), "Block/attention/attention_norm", "normalization"),
        ({"multiply", "add"}, (), "Block/mlp", "MLP, elementwise"),
    ],
)
def test_parts(kinds: set[str], products: tuple[str, ...], scope: str, part: str):
    assert breakdown.part_of(program.Operation(frozenset(kinds), products, 0, scope)) == part


def test_the_parts_sum_to_the_time_and_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(breakdown.common, "use_cores", lambda _: None)  # it would change this process
    out = tmp_path / "breakdown.json"
    command = ["--shapes", "tiny", "--parts", "step", "--repeats", "2", "--out", str(out)]
    assert breakdown.main(command) == 0
    step = json.loads(out.read_text())["shapes"]["tiny"]["step"]
    assert sum(part["seconds"] for part in step["parts"].values()) == pytest.approx(step["seconds"], rel=1e-6)
    assert step["flops"] == sum(part["flops"] for part in step["products"].values()) > 0
    shown = capsys.readouterr().out
    assert "products with weights" in shown and "of the peak" in shown
