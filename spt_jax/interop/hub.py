"""Prompts on the Hugging Face hub: upload with a model card, and download.

A repository holds the two files of a saved prompt, and README.md. `spt_jax.prompts.names` resolves its id wherever a
prompt is named.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from spt_jax.errors import ConfigError, RemoteError
from spt_jax.interop.card import model_card
from spt_jax.prompts.names import hub_name, prompt_directory
from spt_jax.prompts.storage import INFO_FILE, PARAMS_FILE, read_prompt
from spt_jax.prompts.writing import write_directory
from spt_jax.runtime.remote import url_of


def push(prompt: str | Path, repository: str, *, base: str | None = None, public: bool = False) -> str:
    """Uploads a saved prompt with a model card, in one commit. The repository is created if it does not exist.

    Args:
      prompt: the prompt, as in `prompt_directory`.
      repository: the id, `owner/name` or `hf://owner/name`.
      base: the hub id of the prompt's base, written into the uploaded copy. Of a base that is a local directory, only
        the directory's name is uploaded without it.
      public: whether a new repository is public. The visibility of an existing one stays.

    Returns:
      The URL of the repository.

    Raises:
      ConfigError: the id is not of that form.
      CheckpointError: the directory is not a valid prompt.
      RemoteError: the hub cannot be reached, or does not permit it.
    """
    repository = _repository(repository)
    directory = prompt_directory(prompt)
    saved = read_prompt(directory)
    named = saved.info["base"]["id"]
    on_hub = base is not None or not (named == "starter" or named.startswith("/") or url_of(named))
    info = {**saved.info, "base": {**saved.info["base"], "id": base or _public_name(named)}}
    if base is not None:
        info["base"]["revision"] = None
    files = {
        "README.md": model_card(repository, dataclasses.replace(saved, info=info), on_hub=on_hub).encode(),
        PARAMS_FILE: (directory / PARAMS_FILE).read_bytes(),
        INFO_FILE: (json.dumps(info, indent=1, ensure_ascii=False) + "\n").encode(),
    }
    api = huggingface_hub.HfApi()
    with _reaching(repository):
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.create_commit(
            repository,
            [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Upload soft prompt",
        )
    return str(url)


def pull(name: str, directory: str | Path) -> Path:
    """Downloads a prompt into a directory, which is created, or replaced if it holds a prompt.

    Args:
      name: `owner/name`, or `hf://owner/name[@revision][/folder]`.
      directory: a path or a URL.

    Raises:
      ConfigError: the name is not one of the hub.
      CheckpointError: the repository is not a prompt of this library, or the directory holds something else.
      RemoteError: the hub cannot be reached, or has no such repository.
    """
    name = name if url_of(name) else f"hf://{name}"
    if hub_name(name) is None:
        raise ConfigError(f"{name}: give the id of a repository on the hub, owner/name or hf://owner/name")
    source = prompt_directory(name)
    read_prompt(source)
    files = {file: (source / file).read_bytes() for file in (PARAMS_FILE, INFO_FILE)}
    return write_directory(directory, files)


def _repository(name: str) -> str:
    found = hub_name(name if url_of(name) else f"hf://{name}")
    if found is None or found.revision or found.folder:
        raise ConfigError(f"{name}: give the id of a repository on the hub, owner/name or hf://owner/name")
    return found.repository


def _public_name(name: str) -> str:
    """Returns the name of a base without the directory that it is in here."""
    return Path(name).name if name.startswith("/") else name


@contextmanager
def _reaching(repository: str) -> Iterator[None]:
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise RemoteError(f"{repository!r}: the hub is not used, because HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = "; `hf auth login` stores a token that may write" if status in (401, 403) else ""
        raise RemoteError(f"{repository!r}: the hub answered {status}{advice} ({_line(error)})") from error
    except Exception as error:  # connection errors of many types
        raise RemoteError(
            f"{repository!r}: the hub cannot be reached ({type(error).__name__}: {_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]
