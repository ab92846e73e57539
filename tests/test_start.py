"""What a process imports before it does its work, and what a run checks first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.experiment.config import resolve
from spt_jax.experiment.run import load_experiment
from spt_jax.prompts import PromptTuning
from tests.jobs import ROOT

# Modules that take long to import, and that only some calls need.
HEAVY = ("transformers", "torch", "orbax.checkpoint", "grain", "datasets", "matplotlib", "pandas", "pyarrow")
READS_A_CONFIG = "from spt_jax.bases.config import hf_config; hf_config({'model_type': 'llama'})"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, env=own)


def test_the_package_imports_only_what_every_use_needs():
    ended = run("-c", f"import sys, spt_jax; spt_jax.fit; print({{*{HEAVY}}} & sys.modules.keys())")
    assert ended.stdout == "set()\n", ended.stdout + ended.stderr


def test_the_version_needs_no_heavy_module():
    ended = run("-X", "importtime", "-m", "spt_jax", "--version")
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "spt_jax.commands.program" in imported
    assert not imported & {*HEAVY, "jax", "numpy", "flax", "tyro"}


def write_base(directory: Path, model_type: str, **files: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    return directory


def test_only_the_program_keeps_transformers_from_importing_torch(tmp_path: Path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("print('torch')\nraise ImportError('not a real torch')\n")
    (tmp_path / "torch-2.99.0.dist-info").mkdir()
    (tmp_path / "torch-2.99.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    library = run("-c", READS_A_CONFIG, PYTHONPATH=path)
    assert library.stdout == "torch\n" and "not a real torch" in library.stderr
    base = write_base(tmp_path / "base", "llama", model_safetensors="")
    words = ["--base.path", str(base), "--data.train", str(tmp_path / "absent.jsonl"), "--data.prompt", "<soft>{text}"]
    words += ["--data.target", "{text}", "--workdir", str(tmp_path / "out")]
    program = run("-m", "spt_jax", "train", "local_files", *words, PYTHONPATH=path)
    assert program.stdout == "" and "absent.jsonl" in program.stderr and "PyTorch" not in program.stderr, (
        program.stdout + program.stderr
    )


@pytest.mark.parametrize(
    ("model_type", "files", "error", "message"),
    [
        (None, {}, CheckpointError, "no such directory"),
        ("llama", {}, CheckpointError, "no model.safetensors"),
        ("lama", {"model_safetensors": ""}, ConfigError, "lama"),
    ],
)
def test_a_wrong_base_is_found_before_wrong_data(
    tmp_path: Path, model_type: str | None, files: dict[str, str], error: type[Exception], message: str
):
    if model_type is not None:
        write_base(tmp_path / "base", model_type, **files)
    config = ExperimentConfig(
        base=BaseConfig(path=str(tmp_path / "base")),
        data=DataConfig(train=str(tmp_path / "absent.jsonl"), prompt="<soft>{text}", target="{label}"),
        method=PromptTuning(),
    )
    with pytest.raises(error, match=message):
        load_experiment(resolve(config))
