"""The task that ships with the package is what its README says: sized, balanced, and without near-duplicates."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import spt_jax

REQUESTS = Path(spt_jax.__file__).parent / "assets" / "requests"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return {
        name: [json.loads(line) for line in (REQUESTS / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }


def normal(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_sizes_and_classes(splits):
    assert sum(map(len, splits.values())) >= 1000
    counts = {name: Counter(record["label"] for record in records) for name, records in splits.items()}
    assert all(set(count) == set(counts["train"]) and len(count) >= 6 for count in counts.values())
    assert max(counts["test"].values()) == min(counts["test"].values())
    texts = [normal(record["text"]) for records in splits.values() for record in records]
    assert len(set(texts)) == len(texts)


def _containment(sets: list[set[str]], others: list[set[str]], of_smaller: bool) -> float:
    """The highest share of common elements over all pairs: of the smaller set, or of the union."""
    vocabulary = {item: i for i, item in enumerate(sorted(set().union(*sets, *others)))}

    def matrix(rows: list[set[str]]) -> np.ndarray:
        dense = np.zeros((len(rows), len(vocabulary)), np.float32)
        for row, items in enumerate(rows):
            dense[row, [vocabulary[item] for item in items]] = 1
        return dense

    a, b = matrix(sets), matrix(others)
    common = a @ b.T
    sizes_a, sizes_b = a.sum(1)[:, None], b.sum(1)[None]
    return float((common / (np.minimum(sizes_a, sizes_b) if of_smaller else sizes_a + sizes_b - common)).max())


def test_no_near_duplicates_across_splits(splits):
    texts = {name: [normal(record["text"]) for record in records] for name, records in splits.items()}
    grams = {name: [{t[i : i + 5] for i in range(len(t) - 4)} for t in part] for name, part in texts.items()}
    words = {name: [set(t.split()) for t in part] for name, part in texts.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert _containment(words[one], words[other], of_smaller=False) < 0.6
        assert _containment(grams[one], grams[other], of_smaller=True) < 0.5
