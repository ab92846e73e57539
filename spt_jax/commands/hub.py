"""`spt-jax push | pull`: prompts on the Hugging Face hub."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.interop.hub import pull, push
from spt_jax.prompts.storage import read_prompt
from spt_jax.runtime.files import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Uploads a saved prompt to the Hugging Face hub, with a model card. A new repository is private.

    The token is that of `hf auth login`, or in the environment variable HF_TOKEN. prompt.json is uploaded with all that
    it holds, such as the training command.

    Attributes:
      prompt: the directory of the saved prompt.
      repository: its id on the hub, owner/name.
      base: the hub id of the prompt's base, if the prompt was trained with a local directory.
      public: whether a new repository is public.
    """

    prompt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    base: str | None = None
    public: bool = False

    def run(self) -> None:
        url = push(self.prompt, self.repository, base=self.base, public=self.public)
        named = read_prompt(self.prompt).info["base"]["id"]
        if self.base is None and named.startswith("/"):
            print(f"note: the base is a local directory, {named}; give its hub id with --base, so that others find it")
        print(url)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull:
    """Downloads a prompt from the Hugging Face hub into a directory.

    Attributes:
      repository: its id on the hub, owner/name, or hf://owner/name@revision.
      directory: created, or replaced if it holds a prompt; a path or a URL.
    """

    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]

    def run(self) -> None:
        pull(self.repository, self.directory)
        print(describe_prompt(read_prompt(self.directory)))
        print(f"wrote {shown(self.directory)}")
