"""`spt-jax configs`: lists the configs that ship with the package."""

from collections.abc import Sequence

from spt_jax.errors import ConfigError
from spt_jax.experiment.shipped import config_summary, shipped_configs

HELP = """usage: spt-jax configs

Lists the configs that ship with the package, for `spt-jax train NAME`, `sweep`,
`find-rate` and `compare`."""


def main(argv: Sequence[str]) -> None:
    """Prints a line for each config.

    Raises:
      ConfigError: there are arguments.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return
    if argv:
        raise ConfigError(f"spt-jax configs takes no arguments, such as {argv[0]!r}")
    for line in config_lines():
        print(line)


def config_lines() -> list[str]:
    """Returns the name and the first line of each shipped config."""
    configs = shipped_configs()
    width = max(map(len, configs))
    return [f"{name:<{width}}  {config_summary(path)}" for name, path in configs.items()]
