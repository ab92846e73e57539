"""Stands for the package wandb: records what runs of Weights & Biases are told."""

import dataclasses
import importlib.machinery
import types
from pathlib import Path


@dataclasses.dataclass
class WandbRun:
    """What a run of Weights & Biases is told."""

    options: dict
    lines: list = dataclasses.field(default_factory=list)
    summary: dict = dataclasses.field(default_factory=dict)
    artifacts: list = dataclasses.field(default_factory=list)
    finished: bool = False

    def log(self, values, step):
        self.lines.append((step, values))

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self):
        self.finished = True


class Artifact:
    def __init__(self, name, type):
        self.name, self.type, self.folders = name, type, []

    def add_dir(self, folder):
        assert (Path(folder) / "prompt.json").exists()
        self.folders.append(folder)


class Wandb(types.ModuleType):
    """Stands for the package wandb."""

    Artifact = Artifact

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs = []

    def init(self, **options):
        self.runs.append(WandbRun(options))
        return self.runs[-1]
