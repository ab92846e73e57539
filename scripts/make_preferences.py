"""Makes the preference data that ship with the package, from the shipped requests: python scripts/make_preferences.py.

Each request gets two replies of the same wording: the chosen one names the topic of the request, the rejected one
another topic. Which wording and which wrong topic is drawn at random, with a fixed seed for each split.
"""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "spt_jax" / "assets"
REQUESTS, PREFERENCES = ASSETS / "requests", ASSETS / "preferences"
TOPICS = {
    "bank": "money",
    "calendar": "meetings",
    "movie": "films",
    "music": "music",
    "recipe": "cooking",
    "weather": "weather",
}
WORDINGS = (
    "About {}.",
    "It is about {}.",
    "This is about {}.",
)
SIZES = {"train": 1800, "validation": 150, "test": 300}


def pairs(requests: list[Mapping[str, str]], seed: int) -> Iterator[dict[str, str]]:
    """Yields a pair for each request.

    Args:
      requests: records with a text and its topic.
      seed: that of the wordings and the wrong topics.

    Yields:
      Records with `prompt`, `chosen` and `rejected`.
    """
    draw = random.Random(seed)
    for request in requests:
        wording = draw.choice(WORDINGS)
        wrong = draw.choice([topic for topic in TOPICS if topic != request["label"]])
        chosen, rejected = (wording.format(TOPICS[topic]) for topic in (request["label"], wrong))
        yield {"prompt": request["text"], "chosen": chosen, "rejected": rejected}


def main() -> None:
    """Writes the three splits."""
    PREFERENCES.mkdir(exist_ok=True)
    for seed, (split, size) in enumerate(SIZES.items()):
        lines = (REQUESTS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        made = pairs([json.loads(line) for line in lines[:size]], seed)
        text = "".join(json.dumps(record) + "\n" for record in made)
        (PREFERENCES / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
