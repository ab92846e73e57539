"""Small files of the kinds that the notebooks and configs for BLOOMZ read."""

import csv
import json
from pathlib import Path

import numpy as np


def write_tweets(path: Path, count: int = 24) -> None:
    """Writes tweets with a class, 1 for complaints and 2 for others, that a word decides."""
    words = {"1": ("late", "broken", "rude"), "2": ("good", "nice", "great")}
    generator = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "ID", "label"])
        for i in range(count):
            label = str(generator.choice(list(words)))
            writer.writerow([f"@shop the order is {generator.choice(words[label])}", i, label])


def write_quotes(path: Path) -> None:
    """Writes quotes and their authors."""
    quotes = ["the world is good", "answer the question in the text", "a good question is a positive answer"]
    records = [{"quote": quote, "author": "a"} for quote in quotes * 4]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_prompts(path: Path) -> None:
    """Writes prompts for a chat."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["act", "prompt"])
        writer.writerows([name, f"I want you to act as a {name}."] for name in ("good answer", "spam label") * 6)


def write_messages(path: Path) -> None:
    """Writes four messages of each of six topics."""
    topics = ("bank", "calendar", "movie", "music", "recipe", "weather")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["message", "topic"])
        writer.writerows([f"a question about {topic}, number {i}", topic] for i in range(4) for topic in topics)
