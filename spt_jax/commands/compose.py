"""`spt-jax compose`: puts the prefixes of several prompts into one prompt."""

from spt_jax.api.compose import compose
from spt_jax.api.prompt import Prompt
from spt_jax.commands.options import Compose
from spt_jax.commands.saved import load_all
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.runtime.files import shown
from spt_jax.runtime.remote import check_path


def compose_prompts(options: Compose) -> None:
    """Writes the prompt, and prints its description."""
    check_path(options.output)
    base, prompts = load_all(options, [options.prompt, *options.others])
    prompt = compose([Prompt.of(saved, base) for saved in prompts], skip=options.skip)
    prompt.save(options.output)
    print(describe_prompt(prompt))
    positions = " + ".join(f"{count:,}" for count in prompt.info["extra"]["composed"]["positions"])
    skipped = f", without the first {options.skip} of all but the first" if options.skip else ""
    print(f"wrote {shown(options.output)}: {positions} positions{skipped}")
