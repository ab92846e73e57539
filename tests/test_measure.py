"""Where compiled programs are kept for the next run."""

from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import train
from spt_jax.__main__ import main
from spt_jax.bases.base import load_base
from spt_jax.runtime import measure
from spt_jax.testing import write_tiny_checkpoint
from tests.jobs import words, write_task


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home directory on a machine with a GPU, where JAX is not configured with a directory."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "home"
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def kept() -> str | None:
    return jax.config.jax_compilation_cache_dir


def test_on_an_accelerator_by_default(home, monkeypatch):
    measure.keep_compiled_programs()
    assert kept() == str(home / ".cache" / "spt_jax") and list((home / ".cache" / "spt_jax").iterdir()) == []
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    measure.keep_compiled_programs()
    assert kept() is None


@pytest.mark.parametrize("configured", ["gs://bucket/programs", ""])
def test_what_jax_is_configured_with_stays(home, configured):
    """JAX_COMPILATION_CACHE_DIR; an empty one turns the cache off."""
    jax.config.update("jax_compilation_cache_dir", configured)
    measure.keep_compiled_programs()
    assert kept() == configured


def test_a_directory_that_is_asked_for(home, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    measure.keep_compiled_programs(tmp_path / "programs")
    assert kept() == str(tmp_path / "programs")


@pytest.mark.parametrize("asked", [True, False])
def test_a_directory_that_cannot_be_written_is_no_error(home, tmp_path, capsys, asked):
    home.write_text("a file in its place")
    measure.keep_compiled_programs(home / "programs" if asked else None)
    assert kept() is None
    assert "compiled programs are not cached for the next run: " in capsys.readouterr().err


def test_for_users_of_the_library(home, tmp_path):
    """And for all commands that load a saved prompt."""
    load_base(write_tiny_checkpoint(tmp_path / "model"))
    assert kept() == str(home / ".cache" / "spt_jax")


class ReachedError(Exception):
    """So that a command ends there."""


@pytest.mark.parametrize("command", ["train", "sweep", "compare", "find-rate", "serve"])
@pytest.mark.parametrize("directory", [None, "programs"])
def test_for_every_command(tmp_path, monkeypatch, command, directory):
    asked = []

    def keep(directory):
        asked.append(directory)
        raise ReachedError

    monkeypatch.setattr(measure, "keep_compiled_programs", keep)
    write_task(tmp_path)
    more = [] if directory is None else ["--compilation-cache", directory]
    line = words(tmp_path, tmp_path / "out", *more)
    if command == "serve":
        line = ["--base", str(tmp_path / "model"), *more]
    elif command == "compare":
        line += ["--prompts", str(tmp_path / "prompt")]
    with pytest.raises(ReachedError):
        train.main(line) if command == "train" else main([command, *line])
    assert asked == [directory and Path(directory)]
