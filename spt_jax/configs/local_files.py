"""Any base and data files, named on the command line.

    spt-jax train local_files --workdir out/trec --base.path PATH \\
        --data.train train.jsonl --data.validation validation.jsonl --data.test test.jsonl \\
        --data.prompt "<soft>{text}\\n" --data.target "{label}" \\
        --data.verbalizers person=H location=L number=N entity=E description=D abbreviation=A \\
        --data.hard-prompt "Question: {text}\\nKind of question:" --train.steps 1200
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig
from spt_jax.prompts import PromptTuning


def get_config() -> ExperimentConfig[PromptTuning]:
    """Fields without a sensible default are empty and must be set on the command line."""
    return ExperimentConfig(
        base=BaseConfig(path=""),
        data=DataConfig(train="", prompt=""),
        method=PromptTuning(),
    )
