"""The help after a config, which is made from source, against what the command line reads and the configs set."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from spt_jax.commands.compare import Compare
from spt_jax.commands.find_rate import FindRate
from spt_jax.commands.program import COMMANDS, main
from spt_jax.commands.sweep import Sweep
from spt_jax.experiment import declared
from spt_jax.experiment.command_line import Command, Job, parse_job
from spt_jax.experiment.config_files import load_config_file
from spt_jax.experiment.config_help import WIDTH, config_help
from spt_jax.experiment.declared_settings import read_settings
from spt_jax.experiment.shipped import shipped_configs
from spt_jax.prompts import METHODS
from spt_jax.training.objectives import OBJECTIVES

JOBS = {"train": Command, "sweep": Sweep, "compare": Compare, "find-rate": FindRate}
CASES = [
    *((job, ()) for job in JOBS),
    *(("train", ("--method.name", name)) for name in METHODS),
    *(("train", ("--loss.over", name)) for name in OBJECTIVES),
]


def shown(job: str, *words: str) -> str:
    entry = COMMANDS[job]
    assert entry.job is not None
    text = config_help(f"spt_jax.commands.{entry.module}", entry.job, words, f"spt-jax {job}")
    assert text is not None
    return text


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.-])--[a-z][\w.-]*", "\n".join(re.findall(r"^  (--.*)", text, re.MULTILINE))))


def attributes(kind: type) -> Iterator[str]:
    """Yields the help of every option of a dataclass, without whitespace, of those that it holds included."""
    for field in declared.fields(declared.declaration(kind.__module__, kind.__name__)).values():
        yield "".join(field.help.split())


@pytest.mark.parametrize(("job", "words"), CASES, ids=lambda case: case if isinstance(case, str) else "-".join(case))
def test_the_help_has_the_options_that_the_command_line_reads(
    job: str, words: tuple[str, ...], capsys: pytest.CaptureFixture
):
    text = shown(job, "quickstart", *words)
    assert all(len(line) <= WIDTH for line in text.splitlines() if not line.startswith("/"))
    kind: type[Job] = JOBS[job]
    with pytest.raises(SystemExit, match="0"):
        parse_job(kind, ["quickstart", *words, "--help"], f"spt-jax {job}")
    read = re.sub(r"^[│╭╰]?|[│╮╯]$", "", capsys.readouterr().out, flags=re.MULTILINE)
    expected = flags(re.sub(r"^ +(?=--)", "  ", read, flags=re.MULTILINE)) - {"--help"}
    assert expected and flags(text) == expected
    compact = "".join(read.split())
    options = {METHODS[words[1]]} if "--method.name" in words else set()
    for option in options | {kind}:
        assert all(line in compact or line.startswith("name") for line in attributes(option) if line != "themethod.")


@pytest.mark.parametrize("over", [name for name, kind in OBJECTIVES.items() if hasattr(kind, "system_rest")])
def test_the_rest_of_a_system_turn_is_no_option(over: str, capsys: pytest.CaptureFixture):
    words = "--loss.over", over
    assert "--loss.chat-system" in shown("train", "quickstart", *words)
    assert "system-rest" not in shown("train", "quickstart", *words)
    with pytest.raises(SystemExit, match="2"):
        parse_job(Command, ["quickstart", *words, "--loss.text", "a", "--loss.system-rest", ""], "spt-jax train")
    assert "Unrecognized options: --loss.system-rest" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", shipped_configs())
def test_the_help_shows_what_a_config_sets(name: str):
    path = shipped_configs()[name]
    methods = declared.table("spt_jax.prompts", "METHODS")
    settings = read_settings(path, methods, declared.table("spt_jax.training.objectives", "OBJECTIVES"))
    config = load_config_file(path)
    assert settings is not None and settings.method == config.method.name
    assert settings.objective == config.loss.over
    sections = {type(getattr(config, field.name)).__name__: getattr(config, field.name) for field in fields(config)}
    checked = 0
    for kind, own in settings.fields.items():
        for field, code in own.items():
            if kind in sections:
                value = getattr(sections[kind], field)
                assert not is_literal(code) or ast.literal_eval(code) == value
                checked += is_literal(code)
    # Every field that differs from its default is shown, as a literal or as the code that computes it.
    for kind, section in sections.items():
        if not kind.endswith("Config") or kind in ("LossConfig", "GivenLoss") or section is config.loss:
            continue
        different = {field.name for field in fields(section) if getattr(section, field.name) != default(field)}
        assert different <= settings.fields.get(kind, {}).keys()
    assert checked


def fields(config: object) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(config)  # type: ignore[arg-type]


def default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def is_literal(code: str) -> bool:
    try:
        ast.literal_eval(code)
    except (ValueError, SyntaxError):
        return False
    return True


def test_a_yaml_config_has_the_options_of_its_method_and_objective(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "base: {path: starter}\ndata: {train: a.jsonl, prompt: '<soft>{text}', verbalizers: {a: b c}}\n"
        "method: {name: p_tuning, length: 5, init: {name: normal}}\nloss: {over: simpo, beta: 3}\n"
    )
    text = " ".join(shown("train", str(path)).split())
    assert "--method.encoder {mlp,lstm}" in text and "--loss.group-size" not in text
    for setting in ("starter)", "a.jsonl)", "<soft>{text})", "{'a': 'b c'})", "5)", "normal)", "simpo)", "3)"):
        assert f"own.yaml: {setting}" in text
    assert "--loss.group-size" in shown("train", str(path), "--loss.over", "grpo")
    other = shown("train", str(path), "--method.name=prompt_tuning")
    assert "own.yaml: 5" not in other and "--method.encoder" not in other


@pytest.mark.parametrize(
    "text",
    [
        "def get_config(:",
        "from spt_jax.prompts import Method\nclass Own(Method): ...\ndef get_config(): return Own()\n",
        "from spt_jax.prompts import PTuning, DeepPrompts\nboth = PTuning(), DeepPrompts()\n",
        "from spt_jax.prompts import PTuning\nx = PTuning()\ny = LossConfig(over=name())\n",
        "x = ExperimentConfig(method=PTuning(), train=shared())\n",
        "x = ExperimentConfig(method=PTuning(), train=dataclasses.replace(TrainConfig(steps=3), steps=4))\n",
        "x = ExperimentConfig(method=PTuning(), train=TrainConfig(**options))\n",
        "x = ExperimentConfig(method=PTuning(5), train=TrainConfig())\n",
        "x = [ExperimentConfig(method=PTuning(), train=TrainConfig(steps=3)), TrainConfig(steps=4)]\n",
    ],
)
def test_a_config_that_must_be_run_is_left_to_the_command_line(text: str, tmp_path: Path):
    path = tmp_path / "own.py"
    path.write_text(text)
    for name in (path, tmp_path / "missing.py"):
        assert config_help("spt_jax.commands.train", "Command", [str(name)], "spt-jax train") is None
    for flag in ("--method.name", "--loss.over"):
        assert config_help("spt_jax.commands.train", "Command", ["quickstart", flag, "x"], "spt-jax train") is None


@pytest.mark.parametrize("text", ["- 1", "train: 5", "method: prompt_tuning"])
def test_a_file_whose_sections_are_not_mappings_is_left_to_the_command_line(text: str, tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert config_help("spt_jax.commands.train", "Command", [str(path)], "spt-jax train") is None


def test_classes_of_modules_and_under_other_names_are_read(tmp_path: Path):
    path = tmp_path / "own.py"
    path.write_text(
        "import spt_jax\nfrom spt_jax import config\nfrom spt_jax.config import DataConfig as Data\nLENGTH = 20\n"
        "def get_config(limit=3):\n  LENGTH = 30\n"
        "  data = Data(train='x.jsonl', prompt='{text}', limit=limit)\n"
        "  return config.ExperimentConfig(method=spt_jax.PromptTuning(length=LENGTH), data=data,\n"
        "    train=config.TrainConfig(steps=7))\n"
    )
    text = " ".join(shown("train", str(path)).split())
    for setting in ("steps. (default: 1000; own.py: 7)", "own.py: x.jsonl)", "own.py: LENGTH)", "own.py: limit)"):
        assert setting in text


def test_a_misspelled_config_is_refused_before_jax_is_imported(capsys: pytest.CaptureFixture):
    assert main(["train", "quikstart", "--help"]) == 2
    assert capsys.readouterr().err.startswith("error: no config named 'quikstart' ships")
