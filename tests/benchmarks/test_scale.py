"""The curves of sizes: the points of a tiny step and of tiny prompts, and the page."""

from pathlib import Path

import pytest

from benchmarks import scale

TINY = {"P": 2, "T": 8, "B": 2, "vocabulary": 64, "layers": 1, "width": 64}


def test_a_point_has_the_operations_of_its_sizes_and_a_plan_below_the_estimate():
    point = scale.step_point(TINY, steps=1)
    longer = scale.step_point({**TINY, "layers": 2}, steps=1)
    of_output = 4 * TINY["B"] * scale.TARGETS * TINY["width"] * TINY["vocabulary"]
    # A second layer doubles all but the output, and more for leading ids, which skip the last layer.
    assert longer["flops"] - of_output > 2 * (point["flops"] - of_output) > 0
    assert 0 < point["bytes"] <= 1.2 * point["formula_bytes"] and point["seconds"] > 0


def test_prompts_in_use_take_the_bytes_of_the_formula():
    found = scale.prompt_points((2, 4), (1, 3))
    assert [one["prompts"] for one in found["registered"]] == [2, 4]
    for point in found["in_use"]:
        assert point["bytes"] == pytest.approx(point["formula_bytes"], rel=1e-3)


def test_the_page_shows_every_curve(tmp_path: Path):
    steps = {
        axis: [
            {
                "sizes": {**TINY, axis: value},
                "seconds": 1e-3 * value,
                "flops": value,
                "bytes": value,
                "formula_bytes": 9,
            }
            for value in (1, 2)
        ]
        for axis in scale.AXES
    }
    devices = [
        {"axis": axis, "devices": count, "flops_over_formula": 1.0, "collective_bytes_per_device": 1e6 * count}
        for axis, count in [("data", 1), *((axis, 2) for axis in scale.DEVICE_AXES)]
    ]
    prompts = {
        "registered": [{"prompts": 2, "seconds": 0.1}],
        "in_use": [{"prompts": 2, "bytes": 8, "formula_bytes": 8}],
    }
    report = {"steps": {"flops_per_second": 1e3, "axes": steps}, "prompts": prompts, "devices": devices}
    scale.draw(report, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
