"""Tasks, one file each, registered here."""

from spt_jax.data.task import TASKS, EncodedRecords, Evaluation, Task, register, task_of
from spt_jax.tasks.class_head import ClassHead
from spt_jax.tasks.preference import Preference
from spt_jax.tasks.rewards import Rewards
from spt_jax.tasks.span import Span
from spt_jax.tasks.tagging import Tagging
from spt_jax.tasks.text import Text
from spt_jax.tasks.verbalizers import Verbalizers

__all__ = [
    "TASKS",
    "ClassHead",
    "EncodedRecords",
    "Evaluation",
    "Preference",
    "Rewards",
    "Span",
    "Tagging",
    "Task",
    "Text",
    "Verbalizers",
    "register",
    "task_of",
]

register(Text(), ClassHead(), Tagging(), Span(), Preference(), Rewards())
