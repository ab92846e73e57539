"""The launch files for SkyPilot and Hugging Face Jobs train with flags that exist, and resume."""

import re
import shlex
import tomllib
from pathlib import Path

import yaml

from spt_jax.experiment.command_line import parse_train

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_launch_files_of_other_platforms():
    """The task of SkyPilot has the fields that it needs; both train with flags that exist, and resume."""
    task = yaml.safe_load((ROOT / "deploy" / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "workdir", "envs", "secrets", "setup", "run"}
    job = (ROOT / "deploy" / "huggingface_job.sh").read_text()
    launch = shlex.split(re.search(r"^hf jobs run.*", job, re.MULTILINE | re.DOTALL)[0])
    image = launch.index("python:3.12")
    flags = [word for word in launch[:image] if word.startswith("--")]
    assert set(flags) == {"--flavor", "--timeout", "--attempts", "--secrets", "--env", "--volume"}
    assert launch[image + 1 : image + 3] == ["bash", "-c"] and len(launch) == image + 4
    sets = {word.partition("=")[0] for word, flag in zip(launch[1:], launch, strict=False) if flag == "--env"}
    extras = PROJECT["optional-dependencies"]
    for script, given in ((task["setup"] + task["run"], set(task["envs"])), (launch[-1], sets)):
        assert all(extra in extras for extra in re.search(r"\[([\w,]+)\]", script)[1].split(","))
        line = re.search(r"spt-jax train (.*)", script, re.DOTALL)[1].replace("\\\n", " ")
        assert set(re.findall(r"\$(\w+)", line)) == given | {"RESUME"}
        command = parse_train(shlex.split(line.replace("$RESUME", "--resume")))
        assert command.resume and command.config.data.prompt == "<soft>{text}\n"
