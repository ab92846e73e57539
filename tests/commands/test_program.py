"""The program `spt-jax`: it answers at once, lists what there is, and names what is wrong."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from spt_jax.commands import configs, env
from spt_jax.commands.program import COMMANDS, main, usage
from spt_jax.errors import ConfigError
from spt_jax.experiment.command_line import parse_train
from spt_jax.experiment.shipped import config_path, config_summary, shipped_configs
from spt_jax.experiment.usage import method_summaries
from spt_jax.prompts import METHODS
from tests.jobs import ROOT


def program(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-X", "importtime", "-m", "spt_jax", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


HELP = [[name, "--help"] for name in COMMANDS]
AFTER_A_CONFIG = [[name, "rewards", "--help"] for name, entry in COMMANDS.items() if entry.job]
QUICK = [["--help"], ["configs"], ["trian"], ["serve", "--slots", "x"], *HELP, *AFTER_A_CONFIG]


@pytest.mark.parametrize("words", QUICK)
def test_simple_commands_do_not_wait_for_jax(words: list[str]):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = program(*words)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "flax", "transformers"}
    assert "tyro" not in imported or COMMANDS[words[0]].options
    assert ended.returncode == (2 if {"trian", "x"} & set(words) else 0)
    assert ("usage: spt-jax" in ended.stdout) == ("--help" in words)
    assert words != ["trian"] or ended.stderr.endswith("error: no command 'trian'; did you mean 'train'?\n")


def test_help_may_be_read_in_part():
    line = f"{sys.executable} -m spt_jax train quickstart --help | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "usage: spt-jax train quickstart [--field value ...]\n"


def test_a_line_is_printed_before_jax_is_imported():
    lines = [line.rpartition("|")[2].strip() for line in program("train", "quikstart").stderr.splitlines()]
    assert lines.index("spt-jax train: loading JAX") < lines.index("jax")


def test_the_lists_fit_80_columns(capsys: pytest.CaptureFixture):
    lists = ["--help"], ["configs"], ["configs", "--help"], ["completion", "--help"], ["env", "--help"]
    for words in (*lists, ["train", "--help"], ["sweep", "--resume", "--help"]):
        assert main(words) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    assert all(f"  {name} " in usage() and entry.summary for name, entry in COMMANDS.items())


def test_every_config_has_a_line():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"} == set(shipped_configs())
    assert all(map(config_summary, shipped_configs().values()))
    assert len(configs.config_lines()) == len(shipped_configs())


def test_every_method_has_a_line_in_the_help_of_its_flag(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="0"):
        parse_train(["quickstart", "--method.name", "p_tuning", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--method.encoder-hidden" in shown or "--method.hidden" in shown
    for name, line in method_summaries().items():
        assert f"{name}: {line}" in shown
        assert line and not line.startswith("The hyper-parameters")
    assert list(method_summaries()) == list(METHODS)


def test_a_config_is_named_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    command = parse_train(["quickstart", "--train.steps", "3"])
    assert command.workdir == Path("out/quickstart") and command.config.train.steps == 3
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\nfrom spt_jax.config import variant\n"
        "from spt_jax.prompts import PTuning\n"
        f"get_config = variant(Path({str(config_path('quickstart'))!r}), PTuning())\n"
    )
    assert parse_train(["own.py"]).config.method.name == "p_tuning"
    with pytest.raises(ConfigError, match=r"no config named 'quikstart'.*did you mean 'quickstart'\?"):
        parse_train(["quikstart"])
    with pytest.raises(ConfigError, match="is named quickstart, without a folder"):
        parse_train(["configs/quickstart.py"])
    (tmp_path / ".hidden.yaml").touch()
    with pytest.raises(ConfigError, match=r"mine.yaml; config files there: own.py; `spt-jax configs` lists those"):
        parse_train(["mine.yaml"])


def test_commands_without_arguments_refuse_them(capsys: pytest.CaptureFixture):
    for name in ("configs", "env"):
        assert main([name, "x"]) == 2
        assert f"spt-jax {name} takes no arguments" in capsys.readouterr().err
    assert main(["completion", "bsh"]) == 2
    assert "did you mean 'bash'?" in capsys.readouterr().err


def test_bash_completes_commands_configs_and_options(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + (
        '\ntry() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _spt_jax; echo "${COMPREPLY[@]}"; }\n'
        "try spt-jax gen\ntry spt-jax train quick\ntry spt-jax sweep quickstart --lengt\n"
        "try spt-jax train quickstart --method.enc\ntry spt-jax generate --prom\ntry spt-jax compare own\n"
    )
    (tmp_path / "own.py").touch()
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    commands, config, option, method, saved, file = ended.stdout.splitlines()
    assert (commands, config, option, saved, file) == ("generate", "quickstart", "--lengths", "--prompt", "own.py")
    assert "--method.encoder-hidden" in method or method


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_every_command(shell: str, capsys: pytest.CaptureFixture):
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*COMMANDS, *shipped_configs()])


def test_env_shows_versions_and_devices(capsys: pytest.CaptureFixture):
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "spt_jax 0.1.0, Python 3." in shown and "\njax " in shown
    assert f"devices: 8 x cpu cpu; {os.cpu_count()} CPU cores" in shown


@pytest.mark.parametrize(
    ("platforms", "driver", "tpu", "said"),
    [
        ({"gpu"}, "580.65.06", False, None),
        ({"cpu"}, "580.65.06", False, "pip install 'spt_jax[cuda13]'"),
        ({"cpu"}, "570.124.06", False, "pip install 'spt_jax[cuda12]'"),
        ({"cpu"}, "470.82.01", False, "too old"),
        ({"cpu"}, None, True, "pip install 'spt_jax[tpu]'"),
        ({"cpu"}, None, False, "no accelerator found"),
    ],
)
def test_env_names_what_an_accelerator_needs(platforms, driver, tpu, said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    advice = env.accelerator_advice(platforms, driver, has_tpu=tpu)
    assert advice is None if said is None else said in advice
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert platforms == {"gpu"} or "JAX_PLATFORMS is cpu" in env.accelerator_advice(platforms, driver, has_tpu=tpu)


def test_env_reads_the_version_of_the_driver(tmp_path: Path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)  Sun Jul 27 2025\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu)\n"
    )
    assert env.nvidia_driver(tmp_path / "version") == "580.65.06"
    assert env.nvidia_driver(tmp_path / "missing") is None
