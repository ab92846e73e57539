"""README's Python runs as it stands there, and its commands name files and options that exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from spt_jax.commands.compare import Compare
from spt_jax.commands.find_rate import FindRate
from spt_jax.commands.sweep import Sweep, plan_stages
from spt_jax.experiment.command_line import parse_job, parse_train
from spt_jax.prompts import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_python_example_is_short_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 15
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    first, last = (names["result"].history[i]["loss"] for i in (0, -1))
    assert last < 0.1 < first  # a coin would have a loss of 0.69
    assert names["prompt"].classify([record["text"] for record in names["train"]]) == ["billing", "returns"]
    classified, *generated = capsys.readouterr().out.splitlines()
    assert classified == "['billing', 'returns']" and any(generated)


JOBS = {"sweep": Sweep, "compare": Compare, "find-rate": FindRate}
COMMANDS = re.findall(r"^(?:`)?spt-jax (sweep|compare|find-rate) ([^\n`]+)", README, re.MULTILINE)


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_that_start_from_a_config_parse(name: str, line: str):
    argv = shlex.split(line)
    command = parse_job(JOBS[name], argv, name)
    if isinstance(command, Sweep):
        command.validate()
        assert all(plan_stages(command, argv))


def test_the_training_commands_parse():
    found = re.findall(r"^spt-jax train ([^\n]*(?:\n +--[^\n]*)*)", README, re.MULTILINE)
    lines = [shlex.split(line.replace("\\\n", " "), comments=True) for line in found]
    assert [words[0] for words in lines] == ["quickstart", "local_files"]
    for words in lines:
        parse_train(words)


def test_every_such_command_is_shown():
    assert {name for name, _ in COMMANDS} == set(JOBS)


FILES = sorted(set(re.findall(r"(?:configs|colab|deploy|docs|benchmarks|spt_jax)/[\w/.-]+\w", README)))


@pytest.mark.parametrize("path", FILES)
def test_files_that_are_named_exist(path):
    assert (ROOT / path).exists()


def test_every_method_is_named_and_has_a_config():
    assert [name for name in METHODS if f"`{name}`" not in README] == []
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert set(METHODS) - configs == {"prompt_tuning"}  # which is quickstart.py's


LAUNCHES = re.findall(r"train\.py (configs/[^\n]*(?:\n +--[^\n]*)*)", (ROOT / "docs" / "clusters.md").read_text())


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_lines_parse(line: str):
    values = {"RESUME": "--resume", "JOB_COMPLETION_INDEX": "1", "i": "1"}
    line = re.sub(r"\\?\$(\w+)", lambda name: values.get(name[1], "x"), line.rstrip(' "&'))
    path, *words = shlex.split(line)
    command = parse_train([str(ROOT / path), *words])
    assert command.processes.several


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
