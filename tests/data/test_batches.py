"""Rows are taken apart again by what their positions can see, and must give back every example and nothing else."""

import itertools
import json

import jax
import numpy as np
import pytest

from spt_jax.data.batches import (
    multiples,
    pack,
    place_batch,
    plan_batches,
    slots,
)
from spt_jax.data.examples import Example
from spt_jax.data.streams import evaluation_batches, training_batches
from spt_jax.errors import DataError
from spt_jax.models.attention import visible
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from tests.examples import HEAD, KINDS, random_examples

_visible = jax.jit(lambda stream: visible(stream, stream.positions, stream.segments))


def seen_by_position(rows) -> np.ndarray:
    """[B, T, T]: which tokens of its row each token sees."""
    return np.asarray(_visible(rows.stream))


def taken_apart(batch, choices: int) -> dict[int, list[list[tuple[tuple, int]]]]:
    """Record number -> for every scored sequence, the (ids seen, id to predict) of each of its targets.

    Asserts on the way that nothing of another example is seen, directly or through another token.
    """
    rows, lead = batch.rows, batch.lead_ids
    seen = seen_by_position(rows)
    found = {}
    for row in range(rows.ids.shape[0]):
        owned = np.zeros(rows.ids.shape[1], int) - 1
        for slot in np.flatnonzero(rows.examples[row] >= 0):
            sequences = [[] for _ in range(choices)]
            for target in np.flatnonzero(rows.target_weights[row] > 0):
                group = rows.target_groups[row, target]
                if group // choices != slot:
                    continue
                output = rows.outputs[row, rows.target_outputs[row, target]]
                inside = np.flatnonzero(seen[row, output])
                inside = inside[np.argsort(rows.stream.positions[row, inside], kind="stable")]
                np.testing.assert_array_equal(rows.stream.positions[row, inside], len(lead) + np.arange(len(inside)))
                assert set(owned[inside]) <= {-1, slot}, "two examples see one token"
                owned[inside] = slot
                for token in inside:
                    assert set(np.flatnonzero(seen[row, token])) <= set(inside), "a token sees what its reader does not"
                ids = (*lead.tolist(), *rows.ids[row, inside].tolist())
                sequences[group % choices].append((ids, int(rows.target_ids[row, target])))
            assert int(rows.examples[row, slot]) not in found
            found[int(rows.examples[row, slot])] = sequences
    return found


def expected(example: Example) -> list[list[tuple[tuple, int]]]:
    ids = example.ids.tolist()
    if not example.choices:
        return [[(tuple(ids[:at]), ids[at]) for at in np.flatnonzero(example.predicted)]]
    return [
        [((*ids, *choice[:at].tolist()), int(choice[at])) for at in range(len(choice))] for choice in example.choices
    ]


def token_count(examples, lead: int) -> int:
    return sum(slots(example, lead).tokens for example in examples)


@pytest.mark.parametrize("lead", [0, len(HEAD)])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_back_every_example(kind, packing, lead):
    examples = random_examples(kind, 23, lengths=(1, 3, 7, 12, 30))
    plan = plan_batches(examples, lead=lead, batch_size=23, packing=packing)
    batch = pack(examples, plan)
    assert taken_apart(batch, plan.choices) == {example.index: expected(example) for example in examples}
    rows = batch.rows
    real = rows.examples >= 0
    assert rows.example_weights[real].tolist() == [1.0] * 23
    assert not rows.example_weights[~real].any()
    np.testing.assert_array_equal(rows.labels[real], [examples[i].label for i in rows.examples[real]])
    assert (rows.stream.segments > 0).sum() == token_count(examples, lead)
    if packing:
        assert rows.ids.shape[0] <= 23 / 2
    else:
        assert (real.sum(axis=1) <= 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_of_one_example_sees_another(kind):
    """Every token, also those whose output nobody reads: the examples of a row are blocks of the visibility matrix."""
    examples = random_examples(kind, 12)
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=12))
    rows, seen = batch.rows, seen_by_position(batch.rows)
    roots = np.where(rows.stream.parents > 0, rows.stream.parents, rows.stream.segments)
    together = roots[:, :, None] == roots[:, None, :]
    assert not (seen & ~together).any()
    for row in range(len(rows.ids)):
        assert len(set(roots[row]) - {0}) == (rows.examples[row] >= 0).sum()
    assert len(set(roots[0]) - {0}) > 1, "the row holds one example only and shows nothing"


def test_a_choice_does_not_see_its_siblings():
    (example,) = random_examples("choices", 1)
    batch = pack([example], plan_batches([example], lead=0, batch_size=1))
    segments = batch.rows.stream.segments[0]
    seen = seen_by_position(batch.rows)[0]
    children = sorted(set(segments[batch.rows.stream.parents[0] > 0]))
    assert len(children) == 2  # the choice of one id needs no token of its own
    for one, other in itertools.permutations(children, 2):
        assert not seen[np.ix_(segments == one, segments == other)].any()
    assert seen[np.ix_(segments == children[0], segments == 1)].all()


def test_the_last_leading_id_stays_where_it_predicts():
    """With nothing between the shared head and the target, the head's last id still has an output in the rows."""
    ids = np.asarray([1, 320, 9], np.int32)
    examples = [Example(ids, np.asarray([False, False, True]), (), 0, 0)]
    batch = pack(examples, plan_batches(examples, lead=1, batch_size=1))
    assert taken_apart(batch, 1) == {0: [[((1, 320), 9)]]}
    with pytest.raises(DataError, match="record 1"):
        plan_batches(examples, lead=2, batch_size=1)


def test_a_target_with_nothing_before_it_is_refused():
    """Its output would be read at another example's last token."""
    choices = (np.asarray([7], np.int32), np.asarray([8], np.int32))
    empty = Example(np.zeros(0, np.int32), np.zeros(0, bool), choices, 1, 41)
    for example in (empty, empty.as_target()):
        with pytest.raises(DataError, match=r"record 42: .*no token precedes"):
            plan_batches([example], lead=0, batch_size=1)


def test_an_example_longer_than_the_plan_is_refused():
    short, long = (random_examples("target", 3, lengths=(length,)) for length in (2, 90))
    plan = plan_batches(short, lead=0, batch_size=3)
    with pytest.raises(DataError, match=r"record 2: .*tokens"):
        pack([short[0], long[1]], plan)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("multiple", [1, 4, 6])
def test_shapes_are_those_of_the_plan(packing, multiple):
    examples = random_examples("target", 200, lengths=(2, 5, 11, 23, 40))
    plan = plan_batches(examples, lead=3, batch_size=16, packing=packing, multiple=multiple)
    assert len(plan.row_buckets) <= 3
    assert list(plan.row_buckets) == sorted(set(plan.row_buckets))
    used = set()
    for start in range(0, 200, 16):
        rows = pack(examples[start : start + 16], plan).rows
        count, length = rows.ids.shape
        assert (length, rows.outputs.shape[1], rows.target_ids.shape[1], rows.labels.shape[1]) == (
            plan.length,
            plan.outputs,
            plan.targets,
            plan.examples,
        )
        assert count % multiple == 0
        used.add(count)
    assert used <= set(plan.row_buckets)
    assert plan.rows_for(plan.row_buckets[-1] + 1) == plan.row_buckets[-1] + multiple
    if not packing:
        assert plan.row_buckets == (-(-16 // multiple) * multiple,)
        assert plan.length == -(-max(slots(example, 3).tokens for example in examples) // 16) * 16


def test_rows_are_never_longer_than_the_model():
    examples = random_examples("target", 8, lengths=(60,))
    assert plan_batches(examples, lead=0, batch_size=8).length > 128
    plan = plan_batches(examples, lead=0, batch_size=8, max_length=128)
    assert plan.length == 128
    assert len(taken_apart(pack(examples, plan), 1)) == 8


def test_packing_leaves_little_room():
    """Lengths spread as those of questions: at least 80 % of the row tokens of a batch of 32 are real."""
    lengths = tuple(np.random.default_rng(0).lognormal(2.5, 0.5, 512).astype(int) + 1)
    examples = random_examples("target", 512, lengths=lengths)
    plan = plan_batches(examples, lead=len(HEAD), batch_size=32)
    chunks = [examples[start : start + 32] for start in range(0, 512, 32)]
    shares = [token_count(chunk, len(HEAD)) / pack(chunk, plan).rows.ids.size for chunk in chunks]
    assert np.mean(shares) > 0.8


def test_class_weights_weigh_every_read_of_a_head_by_its_own_class():
    reads, classes = np.asarray([2, 3, 5]), np.asarray([1, 0, 1])
    example = Example(np.arange(3, 12), np.zeros(9, bool), (), 0, 0, reads=reads, classes=classes)
    rows = pack([example], plan_batches([example], lead=0, batch_size=1), class_weights=(0.5, 2.0)).rows
    np.testing.assert_array_equal(rows.target_weights[0, :3], [2.0, 0.5, 2.0])
    np.testing.assert_array_equal(rows.outputs[0, :3], reads)


def test_class_weights_weigh_targets_and_examples():
    examples = random_examples("choices", 9)
    plan = plan_batches(examples, lead=0, batch_size=9)
    rows = pack(examples, plan, class_weights=(0.5, 2.0, 0.0)).rows
    real = rows.examples >= 0
    np.testing.assert_array_equal(rows.example_weights[real], np.asarray([0.5, 2.0, 0.0])[rows.labels[real]])
    for row, target in np.argwhere(rows.target_weights > 0):
        slot = rows.target_groups[row, target] // 3
        assert rows.target_weights[row, target] == rows.example_weights[row, slot]


def numbers(batch) -> list[int]:
    return batch.rows.examples[batch.rows.examples >= 0].tolist()


def test_every_epoch_has_every_example_once_in_its_own_order():
    examples = random_examples("target", 24)
    plan = plan_batches(examples, lead=0, batch_size=8)
    stream = training_batches(examples, plan, batch_size=8, seed=3)
    epochs = [[numbers(next(stream)) for _ in range(3)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(24))
    batches = [frozenset(batch) for epoch in epochs for batch in epoch]
    assert len(set(batches)) == 9, "two epochs cut the same batches"
    again = training_batches(examples, plan, batch_size=8, seed=3)
    other = training_batches(examples, plan, batch_size=8, seed=4)
    first = numbers(next(again))
    assert first == epochs[0][0]
    assert frozenset(numbers(next(other))) != frozenset(first)


def test_batches_run_across_the_end_of_an_epoch():
    """A batch is always `batch_size` examples: ten examples, four at a time, give two epochs in five batches."""
    examples = random_examples("target", 10)
    stream = training_batches(examples, plan_batches(examples, lead=0, batch_size=4), batch_size=4, seed=0)
    flat = [number for _ in range(5) for number in numbers(next(stream))]
    assert len(flat) == 20
    assert np.bincount(flat).tolist() == [2] * 10


@pytest.mark.parametrize("done", [0, 1, 4, 7])
def test_the_stream_goes_on_where_its_state_was_taken(done):
    """The state is JSON, taken between any two batches, in the first epoch or a later one."""
    examples = random_examples("choices", 10)
    plan = plan_batches(examples, lead=0, batch_size=4)
    stream = training_batches(examples, plan, batch_size=4, seed=5)
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    following = [next(stream) for _ in range(3)]
    resumed = training_batches(examples, plan, batch_size=4, seed=5)
    resumed.set_state(state)
    for batch in following:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_covers_every_example_once(batch_size):
    examples = random_examples("choices", 20)
    plan = plan_batches(examples, lead=len(HEAD), batch_size=batch_size)
    found = {}
    for batch in evaluation_batches(examples, plan, batch_size):
        part = taken_apart(batch, plan.choices)
        assert not set(part) & set(found)
        found |= part
    assert found == {example.index: expected(example) for example in examples}


def test_placing_splits_rows_and_copies_the_lead():
    examples = random_examples("target", 16)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    options = multiples(mesh, microbatches=2)
    assert options == {"multiple": 8, "length_multiple": 1}
    host = pack(examples, plan_batches(examples, lead=4, batch_size=16, packing=False, **options))
    placed = place_batch(host, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, host)
    assert {shard.data.shape for shard in placed.rows.ids.addressable_shards} == {(4, host.rows.ids.shape[1])}
    assert {shard.data.shape for shard in placed.lead_ids.addressable_shards} == {(4,)}


@pytest.mark.parametrize("devices", [3, 8])
def test_rows_divide_over_the_devices_along_them(devices):
    examples = random_examples("target", 16)
    plan = plan_batches(examples, lead=4, batch_size=16, length_multiple=devices, max_length=17)
    assert plan.length % devices == plan.outputs % devices == 0
    assert plan.length - devices < max(17, *(example.length - 4 for example in examples)) <= plan.length
