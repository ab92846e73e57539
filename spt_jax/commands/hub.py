"""`spt-jax push | pull`: prompts on the Hugging Face hub."""

from spt_jax.commands.options import Pull, Push
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.interop.hub import pull, push
from spt_jax.prompts.storage import read_prompt
from spt_jax.runtime.files import shown


def push_prompt(options: Push) -> None:
    """Uploads a saved prompt, and prints its address."""
    url = push(options.prompt, options.repository, base=options.base, public=options.public)
    named = read_prompt(options.prompt).info["base"]["id"]
    if options.base is None and named.startswith("/"):
        print(f"note: the base is a local directory, {named}; give its hub id with --base, so that others find it")
    print(url)


def pull_prompt(options: Pull) -> None:
    """Downloads a prompt, and prints its description."""
    pull(options.repository, options.directory)
    print(describe_prompt(read_prompt(options.directory)))
    print(f"wrote {shown(options.directory)}")
