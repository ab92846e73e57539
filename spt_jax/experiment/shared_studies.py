"""Self-studies that the trials of a sweep share, so that the base writes the same questions once."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.encoder import Encoder
from spt_jax.experiment.self_study import Study, read_study, self_study, write_study
from spt_jax.runtime.waits import spoken
from spt_jax.training.objectives import Distillation

FOLDER = "self_studies"


class SharedStudies:
    """Self-studies by what they depend on.

    Args:
      saved: the folder in which an earlier part of the sweep stored them; None if there is none.
    """

    def __init__(self, saved: Path | None = None):
        self._saved = saved
        self._found: dict[str, Study] = {}

    def get(self, key: str, make: Callable[[], Study]) -> Study:
        """Returns the study of a key, which is read or made when it is first asked for.

        Args:
          key: the result of `study_key`.
          make: writes the study.

        Raises:
          CheckpointError: its file is damaged.
        """
        if key not in self._found:
            file = None if self._saved is None else self._saved / _name(key)
            self._found[key] = read_study(file) if file is not None and file.exists() else make()
        return self._found[key]

    def write(self, folder: Path) -> None:
        """Writes the studies to a folder, from which another part of the sweep reads them.

        Args:
          folder: created if there are any studies.

        Raises:
          WriteError: a file cannot be written.
        """
        for key, study in self._found.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_study(folder / _name(key), study)


def study_of(
    saved: Path | SharedStudies | None,
    base: FrozenBase,
    encoder: Encoder,
    objective: Distillation,
    text: Int[np.ndarray, " P"],
    batch_size: int,
) -> Study:
    """Returns the self-study of a run, which is written if there is none.

    Args:
      saved: the file of an earlier part of the run, or the studies of a sweep; None if there are none.
      base: the frozen base.
      encoder: that of the template.
      objective: the options.
      text: the ids of the text.
      batch_size: questions that are generated together.

    Raises:
      CheckpointError: a file is damaged.
      ConfigError, DataError: as in `self_study`.
    """

    def written() -> Study:
        with spoken(f"writing and answering {objective.study + objective.study_validation:,} questions"):
            return self_study(base, encoder, objective, text, batch_size)

    if isinstance(saved, SharedStudies):
        return saved.get(study_key(base, encoder, objective, text), written)
    return read_study(saved) if saved is not None and saved.exists() else written()


def study_key(base: FrozenBase, encoder: Encoder, objective: Distillation, text: Int[np.ndarray, " P"]) -> str:
    """Returns a digest of all that a self-study depends on.

    Virtual tokens are not part of it, because the base writes and answers the questions without them.

    Args:
      base: the frozen base.
      encoder: that of the template.
      objective: the options.
      text: the ids of the text.
    """
    options: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(objective).items() if name.startswith(("study", "answer_"))
    }
    facts = [
        base.fingerprint.as_json(),
        str(base.dtype),
        dataclasses.asdict(encoder.template.bare()),
        encoder.max_length,
        {**options, "chat_system": objective.chat_system},
        hashlib.sha256(text.tobytes()).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _name(key: str) -> str:
    return f"{key[:16]}.jsonl"
