"""From a config file and words on the command line to an experiment."""

import dataclasses
import difflib
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import tyro

from spt_jax.errors import ConfigError, SptError, did_you_mean
from spt_jax.experiment.config import AnyMethod, ExperimentConfig
from spt_jax.prompts import METHODS
from spt_jax.runtime.files import DISK_FULL, READ_ONLY, write_error
from spt_jax.runtime.measure import PROFILE_BEHIND
from spt_jax.runtime.processes import ProcessesConfig
from spt_jax.training.loop import Stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Generic[AnyMethod]):
    """What a command does that starts from a config and fills a work directory.

    Attributes:
      workdir: where everything is written; default out/ and the config file's name.
      overwrite: delete the run in workdir and start anew.
      compilation_cache: where compiled programs wait for the next run; default $JAX_COMPILATION_CACHE_DIR, else, on an
        accelerator, ~/.cache/spt_jax.
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
      resume: go on with the run in workdir, from its newest checkpoint that is intact.
      resume_from: go on with the run in workdir from the checkpoint of this step; those after it are removed.
      dry_run: show examples as tokens, the packing and the memory needed, and stop.
      profile: trace so many steps, once compiled, into the work directory's profile/, for TensorBoard's xprof.
      processes: how this process finds the others of its run.
    """

    resume: bool = False
    resume_from: int | None = None
    dry_run: bool = False
    profile: int = 0
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)

    @property
    def resumes(self) -> bool:
        """Whether a run goes on, from whichever checkpoint."""
        return self.resume or self.resume_from is not None

    def __post_init__(self) -> None:
        if self.profile < 0:
            raise ConfigError(f"--profile is {self.profile}; it is a number of steps")
        if self.profile and self.config.train.steps <= PROFILE_BEHIND:
            raise ConfigError(
                f"--profile traces steps behind the first {PROFILE_BEHIND}; train.steps is {self.config.train.steps}"
            )


def load_config_file(path: Path) -> ExperimentConfig[Any]:
    """Runs a config file's `get_config()`.

    Raises:
      ConfigError: no such file (the nearest is named), no `get_config`, or a field that no config has.
    """
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), siblings, n=1)
        hint = (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(siblings)) or 'none in that folder'}"
        )
        raise ConfigError(f"no config file {path}; {hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except AttributeError as error:
        raise ConfigError(f"{path}: {error}; a config file defines get_config() -> ExperimentConfig") from error
    except (TypeError, SyntaxError) as error:
        raise ConfigError(f"{path}: {error}{_nearest_field(str(error))}") from error
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not an ExperimentConfig")
    return config


def _nearest_field(message: str) -> str:
    """For "unexpected keyword argument 'stepz'": which field of which config part comes nearest."""
    if "unexpected keyword argument" not in message:
        return ""
    parts = [ExperimentConfig, *ExperimentConfig.__annotations__.values(), *METHODS.values()]
    fields = {f.name for part in parts if dataclasses.is_dataclass(part) for f in dataclasses.fields(part)}
    return "; " + did_you_mean(message.rsplit("'", 2)[1], fields)


def exit_code(program: Callable[[], None]) -> int:
    """Runs a program; turns errors into a line on stderr, and everything into an exit code."""
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
        print(f"{stopped}. Go on with --resume", file=sys.stderr)
        return stopped.exit_code
    return 0


AnyJob = TypeVar("AnyJob", bound=Job[Any])


def parse_train(argv: Sequence[str]) -> Command[Any]:
    """`train.py`'s words, as `parse_job` reads them."""
    return parse_job(Command, argv, "python train.py")


def parse_job(kind: type[AnyJob], argv: Sequence[str], program: str) -> AnyJob:
    """A job's words: a config file, then flags that override its fields or are the job's own.

    The method's name is read first, so that only the options of that method exist. Wrong words end the program with
    exit code 2 and the nearest right ones.
    """
    if not argv or argv[0].startswith("-"):
        usage = f"{program} CONFIG.py"
        if {"-h", "--help"} & set(argv):
            print(f"usage: {usage} [--field value ...]\n\nfields: {usage} --help")
            sys.exit(0)
        raise ConfigError(f"the first word is a config file: {program} configs/quickstart.py [--field value ...]")
    path, words = Path(argv[0]), list(argv[1:])
    config = load_config_file(path)
    name = _method_name(words) or config.method.name
    if name not in METHODS:
        raise ConfigError(f"no method {name!r}; {did_you_mean(name, METHODS)}")
    if name != config.method.name:
        config = dataclasses.replace(config, method=METHODS[name]())
    return tyro.cli(
        kind[METHODS[name]],  # type: ignore[index]
        default=kind(config=config, workdir=Path("out") / f"{kind.prefix}{path.stem}"),
        args=words,
        prog=f"{program} {path}",
    )


def _method_name(words: Sequence[str]) -> str | None:
    """The last that is named."""
    name = None
    for i, word in enumerate(words):
        if word == "--method.name" and i + 1 < len(words):
            name = words[i + 1]
        if word.startswith("--method.name="):
            name = word.partition("=")[2]
    return name


def first_command(argv: Sequence[str]) -> str:
    """The words of a command without --resume, --resume-from and --overwrite: those of the run that it goes on with."""
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
    """A config as plain JSON values, for `config.json` and checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
