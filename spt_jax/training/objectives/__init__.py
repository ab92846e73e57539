"""Objectives, one file each, and their registry."""

from spt_jax.training.objectives.class_distillation import ClassDistillation
from spt_jax.training.objectives.cross_entropy import CrossEntropy
from spt_jax.training.objectives.distillation import Distillation
from spt_jax.training.objectives.grpo import Grpo
from spt_jax.training.objectives.objective import Loss, Objective, prepare_examples
from spt_jax.training.objectives.preference import Dpo, Ipo, Orpo, PairObjective, SimPo
from spt_jax.training.objectives.span_cross_entropy import SpanCrossEntropy
from spt_jax.training.objectives.verbalizer_cross_entropy import VerbalizerCrossEntropy

__all__ = [
    "OBJECTIVES",
    "ClassDistillation",
    "CrossEntropy",
    "Distillation",
    "Dpo",
    "Grpo",
    "Ipo",
    "Loss",
    "Objective",
    "Orpo",
    "PairObjective",
    "SimPo",
    "SpanCrossEntropy",
    "VerbalizerCrossEntropy",
    "prepare_examples",
]

# By the word of `--loss.over`.
OBJECTIVES: dict[str, type[Objective]] = {
    "vocabulary": CrossEntropy,
    "verbalizers": VerbalizerCrossEntropy,
    "span": SpanCrossEntropy,
    "dpo": Dpo,
    "ipo": Ipo,
    "simpo": SimPo,
    "orpo": Orpo,
    "distillation": Distillation,
    "class_distillation": ClassDistillation,
    "grpo": Grpo,
}
