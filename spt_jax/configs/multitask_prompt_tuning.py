"""Several tasks in one run, from files of your own.

The records name their task. Trains a shared prompt, and a small matrix per task.

    spt-jax train multitask_prompt_tuning --workdir out/tasks --base.path PATH \\
        --data.train train.jsonl --data.validation validation.jsonl --data.test test.jsonl --data.task task \\
        --data.prompt "<soft:20>{text}\\n" --data.target "{answer}"

Writes a prompt for each task to out/tasks/prompt/TASK, and the rows that they share to out/tasks/prompt/shared. To
start a new task from them: --method.name prompt_tuning --method.init.name prompt
--method.init.path out/tasks/prompt/shared
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig
from spt_jax.prompts import MultitaskPromptTuning


def get_config() -> ExperimentConfig[MultitaskPromptTuning]:
    """Fields without a sensible default are empty and must be set on the command line."""
    return ExperimentConfig(
        base=BaseConfig(path=""),
        data=DataConfig(train="", prompt="", task="task"),
        method=MultitaskPromptTuning(),
    )
