"""What makes the final comparison fast: common shapes, even batches, and evaluations that are kept on disk."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.data.encoder import encoder_for
from spt_jax.data.streams import evaluation_batches, evaluation_plans
from spt_jax.data.templates import Template
from spt_jax.evaluation import kept
from spt_jax.evaluation.evaluate import EvaluationConfig, EvaluationSet, evaluate, make_evaluation_set
from spt_jax.runtime import disk_cache
from spt_jax.testing import write_tiny_checkpoint

TEMPLATE = Template(prompt="Say {text} is", target="{label}", verbalizers={"a": " good", "b": " bad"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    directory = tmp_path_factory.mktemp("base")
    write_tiny_checkpoint(directory, "llama")
    return load_base(directory, dtype="float32")


def records(count: int, longest: int) -> list[dict[str, str]]:
    random = np.random.default_rng(count)
    return [
        {"text": "x" * int(random.integers(1, longest)), "label": "ab"[int(random.integers(2))]} for _ in range(count)
    ]


def evaluation_set(base: FrozenBase, count: int = 21, longest: int = 12, **template: str) -> EvaluationSet:
    encoder = encoder_for(base, dataclasses.replace(TEMPLATE, **template))
    return make_evaluation_set(base, encoder, records(count, longest), EvaluationConfig(batch_size=8))


def test_all_batches_of_a_set_have_one_shape_and_each_example_once(base: FrozenBase):
    data = evaluation_set(base, 61, 40)
    batches = list(evaluation_batches(data.examples, data.plan, 8))
    assert len({batch.rows.ids.shape for batch in batches}) == 1
    numbers = np.concatenate([batch.rows.examples.ravel() for batch in batches])
    assert sorted(numbers[numbers >= 0]) == list(range(61))
    sizes = [int((batch.rows.examples >= 0).sum()) for batch in batches]
    assert len(batches) == 8 and max(sizes) - min(sizes) <= 1


def test_sets_of_one_template_share_shapes_and_keep_their_scores(base: FrozenBase):
    sets = [evaluation_set(base, 21, 12), evaluation_set(base, 37, 20)]
    plans = evaluation_plans([own.examples for own in sets], [own.plan for own in sets], 8)
    assert dataclasses.replace(plans[0], lead_ids=None) == dataclasses.replace(plans[1], lead_ids=None)
    for own, plan in zip(sets, plans, strict=True):
        ours, alone = evaluate(base, dataclasses.replace(own, plan=plan), None), evaluate(base, own, None)
        assert ours.metrics["accuracy"] == alone.metrics["accuracy"]
        np.testing.assert_allclose(
            [p["log_probabilities"] for p in ours.predictions],
            [p["log_probabilities"] for p in alone.predictions],
            atol=3e-5,
        )


def test_a_small_set_or_other_leading_ids_keep_their_shapes(base: FrozenBase):
    large, small, other = evaluation_set(base, 32), evaluation_set(base, 3), evaluation_set(base, prompt="Is {text} a")
    plans = evaluation_plans([large.examples, small.examples], [large.plan, small.plan], 8)
    assert plans[1].row_buckets < plans[0].row_buckets
    plans = evaluation_plans([large.examples, other.examples], [large.plan, other.plan], 8)
    assert [plan.lead_ids.tolist() for plan in plans] == [large.plan.lead_ids.tolist(), other.plan.lead_ids.tolist()]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(disk_cache.CACHE, str(tmp_path))
    return tmp_path / kept.KIND


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[EvaluationSet]:
    """The sets that were evaluated and not read from the cache."""
    made: list[EvaluationSet] = []

    def counted(base: FrozenBase, data: EvaluationSet, virtual: None, **options: bool):
        made.append(data)
        return evaluate(base, data, virtual, **options)

    monkeypatch.setattr(kept, "evaluate", counted)
    return made


def test_an_evaluation_is_computed_once(base: FrozenBase, cache: Path, calls: list[EvaluationSet]):
    data = evaluation_set(base)
    first = kept.evaluate_without_prompt(base, data)
    again = kept.evaluate_without_prompt(base, evaluation_set(base))
    assert len(calls) == 1 and len(list(cache.iterdir())) == 1
    assert json.dumps(dataclasses.asdict(again)) == json.dumps(dataclasses.asdict(first))


def test_what_an_evaluation_depends_on_is_its_key(
    base: FrozenBase, cache: Path, calls: list[EvaluationSet], monkeypatch: pytest.MonkeyPatch
):
    data = evaluation_set(base)
    kept.evaluate_without_prompt(base, data)
    changed = [dict(data.records[0], other="1"), *data.records[1:]]
    weights = dataclasses.replace(base.fingerprint, weights="0" * 64)
    for other_base, other in [
        (base, evaluation_set(base, 22)),
        (base, evaluation_set(base, prompt="Tell {text} is")),
        (base, dataclasses.replace(data, records=changed)),
        (base, dataclasses.replace(data, config=EvaluationConfig(batch_size=9))),
        (dataclasses.replace(base, fingerprint=weights), data),
    ]:
        before = len(calls)
        kept.evaluate_without_prompt(other_base, other)
        assert len(calls) == before + 1
    unknown = dataclasses.replace(data, records=[{**data.records[0], "image": object()}, *data.records[1:]])
    kept.evaluate_without_prompt(base, unknown)
    assert len(calls) == 7 and len(list(cache.iterdir())) == 6
    monkeypatch.setattr(disk_cache, "code_digest", lambda: "of another version")
    kept.evaluate_without_prompt(base, data)
    assert len(calls) == 8


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_damaged_file_is_computed_again(
    base: FrozenBase, cache: Path, calls: list[EvaluationSet], damage: bytes | None
):
    data = evaluation_set(base)
    first = kept.evaluate_without_prompt(base, data)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b"x" + content[-8:] if damage is None else damage)
    assert kept.evaluate_without_prompt(base, data).metrics == first.metrics
    assert len(calls) == 2 and file.read_bytes() == content


def test_the_cache_can_be_switched_off_and_a_full_disk_only_noted(
    base: FrozenBase, cache: Path, calls: list[EvaluationSet], monkeypatch: pytest.MonkeyPatch, capsys
):
    data = evaluation_set(base)
    cache.write_text("a file where the folder should be")
    kept.evaluate_without_prompt(base, data)
    assert "evaluations are not cached for the next run" in capsys.readouterr().err
    cache.unlink()
    monkeypatch.setenv(disk_cache.CACHE, disk_cache.OFF)
    kept.evaluate_without_prompt(base, data)
    assert len(calls) == 2 and not cache.exists()


def test_the_oldest_files_are_removed(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 400)
    for number in range(6):
        disk_cache.write_entry(kept.KIND, str(number), bytes(60))
    disk_cache.write_entry(kept.KIND, "large", bytes(101))
    names = {file.name for file in cache.iterdir()}
    assert len(names) == 4 and "5" in names and "large" not in names
