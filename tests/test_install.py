"""The wheel works where the checkout is not: installed into a new environment, in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.jobs import ROOT

CONTENTS = ("spt_jax", "pyproject.toml", "README.md", "LICENSE")
BUILD = """
from setuptools import build_meta
build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, built from a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("source")
    for name in CONTENTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "dist").mkdir()
    subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD], cwd=copy, check=True, capture_output=True)
    return copy / "dist"


@pytest.fixture(scope="module")
def program(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`spt-jax` of a new environment that holds the wheel, and sees the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "spt-jax"


def run(program: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([program, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended


def test_train_and_generate_from_a_wheel_in_an_empty_folder(program: Path, tmp_path: Path):
    steps = ["--train.steps", "2", "--train.batch-size", "4", "--data.limit", "20"]
    run(program, tmp_path, "train", "quickstart", *steps, "--data.validation", "None", "--data.hard-prompt")
    assert (tmp_path / "out" / "quickstart" / "results.json").exists()
    answer = run(program, tmp_path, "generate", "--prompt", "out/quickstart/prompt", "play some jazz")
    assert answer.stdout.strip() in ("bank", "calendar", "movie", "music", "recipe", "weather")
    assert str(ROOT) not in (tmp_path / "out" / "quickstart" / "config.json").read_text()


def test_the_source_archive_builds_the_same_wheel(built: Path, tmp_path: Path):
    shutil.unpack_archive(next(built.glob("*.tar.gz")), tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "spt_jax").rglob("*") if path.is_file()}
    packed = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name in ours if "__pycache__" not in name} <= packed


def test_the_metadata_passes_twine(built: Path):
    files = map(str, built.iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True, capture_output=True)
