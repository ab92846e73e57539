"""The Dockerfile and the launch files for SkyPilot and Hugging Face Jobs name files, extras and flags that exist."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import tyro
import yaml

from spt_jax.commands import options
from spt_jax.commands.program import COMMANDS
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


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, without comments, with continued lines joined."""
    lines = "\n".join(line for line in dockerfile.splitlines() if not line.lstrip().startswith("#"))
    return [
        (name, rest.strip())
        for name, _, rest in (line.partition(" ") for line in lines.replace("\\\n", " ").splitlines() if line)
    ]


def test_the_dockerfile_copies_what_the_package_is_built_from():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    found = instructions(text)
    assert [name for name, _ in found] == [
        "FROM", "ARG", "WORKDIR", "COPY", "COPY", "RUN", "RUN", "USER", "WORKDIR", "VOLUME", "ENTRYPOINT", "CMD",
    ]  # fmt: skip
    copied = {word for name, rest in found if name == "COPY" for word in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert copied >= {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "spt_jax"}
    install = next(rest for name, rest in found if name == "RUN")
    assert set(re.findall(r"-c (\S+)", install)) <= copied
    kinds = re.findall(r"([\w |]+)\) extras=(\S+) ;;", install.partition(" in ")[2])
    accelerators = {kind.strip(): extras for names, extras in kinds for kind in names.split("|")}
    assert accelerators == {"cpu": "all", "cuda12": "all,$ACCELERATOR", "cuda13": "all,$ACCELERATOR"}
    extras = PROJECT["optional-dependencies"].keys()
    for kind, named in accelerators.items():
        assert set(named.replace("$ACCELERATOR", kind).split(",")) <= extras
    assert set(re.findall(r"ACCELERATOR=(\w+)", text)) <= accelerators.keys()
    version = re.match(r"python:(3\.\d+)-slim", dict(found)["FROM"])
    assert version and f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]
    assert dict(found)["ENTRYPOINT"] == '["spt-jax"]' and "spt-jax" in PROJECT["scripts"]


def test_the_commands_of_the_dockerfile_are_read():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    commands = [shlex.split(line) for line in re.findall(r"docker run .* spt-jax(?::cuda)? (.*)", text)]
    assert [words[0] for words in commands] == ["train", "env", "serve"]
    for name, *rest in commands:
        if COMMANDS[name].job:
            assert parse_train(rest).workdir == Path("out/quickstart")  # in the mounted /work/out
        elif COMMANDS[name].options:
            serve = tyro.cli(getattr(options, COMMANDS[name].options), args=rest)
            assert dataclasses.asdict(serve)["host"] == "0.0.0.0"
