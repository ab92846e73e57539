"""Where a prompt is: a directory, a remote path (`s3://`), or a repository of the Hugging Face hub (`owner/name`)."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from spt_jax.errors import CheckpointError, RemoteError
from spt_jax.runtime.files import nearest_path
from spt_jax.runtime.remote import local_copy, url_of

# What is downloaded of a repository: prompts of this library and of PEFT.
FILES = ("prompt.json", "prompt.safetensors", "adapter_config.json", "adapter_model.safetensors")

_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"({_PART}/{_PART})")
_HUB_URL = re.compile(rf"({_PART}/{_PART})(?:@([^/]+))?(?:/(.+))?")


@dataclasses.dataclass(frozen=True)
class HubName:
    """A prompt on the hub.

    Attributes:
      repository: its id, `owner/name`.
      revision: branch, tag or commit; None for the main branch.
      folder: the directory in the repository; "" for its root.
    """

    repository: str
    revision: str | None = None
    folder: str = ""


def hub_name(name: str | Path) -> HubName | None:
    """Returns what a name means on the hub, None if it is the name of something else.

    On the hub are `hf://owner/name`, `hf://owner/name@revision`, `hf://owner/name/folder`, and `owner/name` if there is
    no local path of that name and no directory `owner`.

    Raises:
      CheckpointError: a name with hf:// has another form.
    """
    url = url_of(name)
    if url is not None and url.startswith("hf://"):
        found = _HUB_URL.fullmatch(url.removeprefix("hf://"))
        if found is None:
            raise CheckpointError(
                f"{url}: on the hub, a prompt is hf://owner/name, hf://owner/name@revision or a folder"
            )
        return HubName(found[1], found[2], found[3] or "")
    if url is not None or not _HUB_ID.fullmatch(str(name)):
        return None
    local = Path(name)
    return None if local.exists() or local.parent.exists() else HubName(str(name))


def prompt_directory(name: str | Path) -> Path:
    """Returns the local directory of a prompt, or of a folder of prompts, after a download if it is elsewhere.

    A name that is a local path, or looks like one, is returned as it is, whether or not it exists.

    Args:
      name: a directory, a URL, `hf://owner/name[@revision][/folder]`, or a hub id; see `hub_name`.

    Raises:
      ConfigError: the package for the scheme of a URL is not installed; the message names the extra.
      CheckpointError: the name is not valid, or the hub has no prompt of this name.
      RemoteError: the hub or the file system cannot be reached, or has no such directory.
    """
    found = hub_name(name)
    return local_copy(name) if found is None else _from_hub(found)


def _from_hub(name: HubName) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        """No progress bar: a prompt is a few kilobytes."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    inside = f"{name.folder}/" if name.folder else ""
    near = nearest_path(name.repository)
    patterns = [f"{inside}{file}" for file in FILES] + [f"{inside}*/{file}" for file in FILES]
    try:
        root = huggingface_hub.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=patterns, tqdm_class=NoBar
        )
    except errors.RevisionNotFoundError as error:
        raise RemoteError(f"{name.repository!r} has no revision {name.revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:  # the hub does not tell a private repository from a missing one
        raise RemoteError(
            f"there is no directory {name.repository!r} here, and no such repository on the hub, or no permission to"
            " read it; `hf auth login` stores a token"
            f"{near}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        raise RemoteError(f"there is no directory {name.repository!r} here, and {why}{near}") from error
    except Exception as error:  # connection errors of many types
        raise RemoteError(
            f"there is no directory {name.repository!r} here, and the hub cannot be reached"
            f" ({type(error).__name__}: {str(error).partition(chr(10))[0][:300]}){near}"
        ) from error
    directory = Path(root) / name.folder
    if not any(next(directory.glob(pattern), None) for file in FILES for pattern in (file, f"*/{file}")):
        raise CheckpointError(f"{name.repository!r} on the hub is not a prompt: it has none of {', '.join(FILES)}")
    return directory
