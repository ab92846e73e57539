"""Reads a config file and a command line into an experiment."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import tyro

from spt_jax.errors import ConfigError, SptError, did_you_mean
from spt_jax.experiment.config import AnyMethod, ExperimentConfig
from spt_jax.experiment.config_files import load_config_file
from spt_jax.experiment.shipped import config_path
from spt_jax.experiment.usage import last_value, method_summaries
from spt_jax.prompts import METHODS, Method
from spt_jax.runtime.files import DISK_FULL, READ_ONLY, shown, write_error
from spt_jax.runtime.measure import PROFILE_BEHIND
from spt_jax.runtime.processes import ProcessesConfig
from spt_jax.training.loop import Stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Generic[AnyMethod]):
    """Options of a command that starts from a config and writes to a work directory.

    Attributes:
      workdir: directory or URL (s3://, gs://) for all output; default out/ and the config file's name.
      overwrite: delete the run in workdir and start over.
      compilation_cache: directory for compiled programs, which makes later runs start faster; default
        $JAX_COMPILATION_CACHE_DIR, or on an accelerator ~/.cache/spt_jax.
    """

    prefix: ClassVar[str] = ""  # of the default work directory's name

    config: Annotated[ExperimentConfig[AnyMethod], tyro.conf.arg(name="")]
    workdir: Path
    overwrite: bool = False
    compilation_cache: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Job[AnyMethod]):
    """Trains a soft prompt on a frozen language model.

    Attributes:
      resume: resume the run in workdir from its newest intact checkpoint.
      resume_from: resume the run in workdir from the checkpoint of this step; later checkpoints are removed.
      dry_run: show examples as tokens, the packing and the memory needed, and stop.
      profile: number of steps to trace, after compilation, into the work directory's profile/, for TensorBoard's xprof.
      processes: how this process finds the others of its run.
    """

    resume: bool = False
    resume_from: int | None = None
    dry_run: bool = False
    profile: int = 0
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)

    @property
    def resumes(self) -> bool:
        """Whether to resume a run, from any checkpoint."""
        return self.resume or self.resume_from is not None

    def __post_init__(self) -> None:
        if self.profile < 0:
            raise ConfigError(f"--profile is {self.profile}; it must be at least 0")
        if self.profile and self.config.train.steps <= PROFILE_BEHIND:
            raise ConfigError(
                f"--profile traces steps after the first {PROFILE_BEHIND}; train.steps is {self.config.train.steps}"
            )


def exit_code(program: Callable[[], None]) -> int:
    """Runs a program; turns errors into a message on stderr, and returns the exit code."""
    try:
        program()
    except SptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno in READ_ONLY:
            print(f"error: {error.filename or 'a file'} cannot be read or written ({error.strerror})", file=sys.stderr)
        elif error.errno in DISK_FULL:
            print(f"error: {write_error(error)}", file=sys.stderr)
        else:
            raise
        return 1
    except Stopped as stopped:
        print(f"{stopped}. Continue with --resume", file=sys.stderr)
        return stopped.exit_code
    return 0


AnyJob = TypeVar("AnyJob", bound=Job[Any])


def parse_train(argv: Sequence[str], program: str = "spt-jax train") -> Command[Any]:
    """Parses the command line of `spt-jax train`, as in `parse_job`."""
    return parse_job(Command, argv, program)


def parse_job(kind: type[AnyJob], argv: Sequence[str], program: str) -> AnyJob:
    """Parses a job's command line: a config, then flags that override its fields or set options of the job.

    The config is the name of one that ships with the package, or a file.

    The names of the method and of the objective are read first, so that only their options exist. An invalid flag ends
    the program with exit code 2 and a suggestion.

    Raises:
      ConfigError: there is no config, or the method or the objective is unknown.
    """
    if not argv or argv[0].startswith("-"):
        raise ConfigError(
            f"the first argument must be a config, the name of a shipped one or a file: {program} quickstart"
            " [--field value ...]; `spt-jax configs` lists the names"
        )
    path, words = config_path(argv[0]), list(argv[1:])
    config = load_config_file(path)
    name = last_value(words, "--method.name") or config.method.name
    if name not in METHODS:
        raise ConfigError(f"no method {name!r}; {did_you_mean(name, METHODS)}")
    if name != config.method.name:
        config = dataclasses.replace(config, method=METHODS[name]())
    task = last_value(words, "--task.name")
    if task is not None and getattr(config.method, "head", None) and last_value(words, "--method.head") is None:
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, head=task))
    over = last_value(words, "--loss.over") or config.loss.over
    config = dataclasses.replace(config, loss=config.loss.with_options(None if over == "None" else over))
    _describe_names(METHODS[name])
    return tyro.cli(
        kind[METHODS[name]],  # type: ignore[index]
        default=kind(config=config, workdir=Path("out") / f"{kind.prefix}{path.stem}"),
        args=words,
        prog=f"{program} {argv[0]}",
    )


def _describe_names(method: type[Method]) -> None:
    """Makes the help of --method.name list all methods; tyro reads it from the metadata of the field."""
    (field,) = (field for field in dataclasses.fields(method) if field.name == "name")
    text = "\n".join(["the method, one of:", *(f"{name}: {line}" for name, line in method_summaries().items())])
    field.metadata = MappingProxyType({**field.metadata, "help": text})


def first_command(argv: Sequence[str]) -> str:
    """Returns a command without --resume, --resume-from and --overwrite: the command of the run that is resumed."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name == "--resume-from" and not equals:
            next(words, None)
        elif name not in ("--resume", "--no-resume", "--resume-from", "--overwrite", "--no-overwrite"):
            kept.append(word)
    return shlex.join(kept)


def config_json(config: Any) -> dict[str, Any]:
    """Returns a config as plain JSON values, for `config.json` and checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_as_text))


def _as_text(value: Any) -> str:
    return shown(value) if isinstance(value, Path) else str(value)
