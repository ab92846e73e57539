"""The configs for BLOOMZ run on the user's files, here with a tiny BLOOM, and have the settings of their sources."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from spt_jax.experiment.config import make_template, resolve
from spt_jax.experiment.config_files import load_config_file
from spt_jax.testing import write_tiny_checkpoint
from tests.jobs import ROOT
from tests.notebook_files import write_quotes, write_tweets

TWEETS, QUOTES = (ROOT / "configs" / f"{name}_bloomz_560m.py" for name in ("tweets", "quotes"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bloom")
    write_tiny_checkpoint(folder / "model", "bloom")
    write_tweets(folder / "tweets.csv")
    write_quotes(folder / "quotes.jsonl")
    return folder


def run(config: Path, files: Path, workdir: Path, *words: str) -> dict:
    line = [str(config), "--workdir", str(workdir), "--base.path", str(files / "model"), "--train.steps", "12"]
    assert train.main([*line, *words]) == 0
    return json.loads((workdir / "results.json").read_text())


def test_tweets(files, tmp_path):
    tweets = str(files / "tweets.csv")
    results = run(TWEETS, files, tmp_path / "run", "--data.train", tweets, "--data.test", tweets)
    assert set(results["test"]) == {"soft_prompt", "hard_prompt", "no_prompt"}
    assert 0 <= results["test"]["soft_prompt"]["accuracy"] <= 1
    assert load_file(tmp_path / "run" / "prompt" / "prompt.safetensors")["tokens"].shape == (8, 36)


def test_quotes(files, tmp_path):
    run(QUOTES, files, tmp_path / "run", "--data.train", str(files / "quotes.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert load_file(tmp_path / "run" / "prompt" / "prompt.safetensors")["tokens"].shape == (4, 36)


def test_the_settings_of_tweets_are_those_of_the_source():
    """PEFT's example trains AdamW at 0.03, which falls linearly, on all tokens of the label, from the instruction."""
    config = resolve(load_config_file(TWEETS))
    init, optimizer = config.method.init, config.optimizer
    assert (config.method.token_count, config.loss.over) == (8, "vocabulary")
    assert (init.name, init.text) == ("text", "Classify if the tweet is a complaint or not:")
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == ("adamw", 0.03, "linear")
    assert make_template(config).prompt == "<soft>Tweet text : {text} Label : "


def test_the_settings_of_quotes_are_those_of_the_source():
    """The cookbook trains 4 virtual tokens at 0.0035 on 50 texts, without an instruction."""
    config = resolve(load_config_file(QUOTES))
    assert (config.method.token_count, config.data.limit, config.optimizer.learning_rate) == (4, 50, 0.0035)
    assert config.method.init.name != "text"
    assert make_template(config).target == "{quote}"
