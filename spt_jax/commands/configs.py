"""`spt-jax configs`: lists the configs that ship with the package."""

from spt_jax.experiment.shipped import config_summary, shipped_configs


def main() -> None:
    """Lists the configs that ship with the package, for `spt-jax train NAME`,
    `sweep`, `find-rate` and `compare`.
    """
    for line in config_lines():
        print(line)


def config_lines() -> list[str]:
    """Returns the name and the first line of each shipped config."""
    configs = shipped_configs()
    width = max(map(len, configs))
    return [f"{name:<{width}}  {config_summary(path)}" for name, path in configs.items()]
