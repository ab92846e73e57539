"""All names that the package exports."""

from spt_jax.api.compose import compose
from spt_jax.api.fit import Callback, fit
from spt_jax.api.prompt import Prompt, load_prompt
from spt_jax.api.remember import remember
from spt_jax.api.result import FitResult
from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.bases.foreign import from_flax
from spt_jax.data.batches import Batch, Rows, pack, place_batch, plan_batches
from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import Example
from spt_jax.data.sources import read_records
from spt_jax.data.streams import evaluation_batches, training_batches
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError, DataError, SptError, TrainingError
from spt_jax.evaluation.ensembles import evaluate_ensemble, score_together
from spt_jax.evaluation.evaluate import evaluate, make_evaluation_set
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.model import Model
from spt_jax.prompts import (
    ContextPromptTuning,
    DecomposedPromptTuning,
    DeepPrompts,
    LlamaAdapter,
    LowRankPromptAdaptation,
    LowRankPromptTuning,
    Method,
    MultitaskPromptTuning,
    PrefixTuning,
    PrefixTuningPlus,
    ProgressivePrompts,
    PromptTuning,
    PTuning,
    RepresentationFinetuning,
    ResidualPromptTuning,
    StateTuning,
    TrainedTokens,
    VirtualPrompt,
    transfer,
)
from spt_jax.prompts import initializers as init
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import SavedPrompt, save_prompt
from spt_jax.runtime import signals
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.tasks import TASKS, Task
from spt_jax.training.config import TrainConfig
from spt_jax.training.halving import Halving, fit_population
from spt_jax.training.loop import Standing
from spt_jax.training.objectives import (
    ClassDistillation,
    CrossEntropy,
    Distillation,
    Dpo,
    Grpo,
    Ipo,
    Objective,
    Orpo,
    SimPo,
    SpanCrossEntropy,
    VerbalizerCrossEntropy,
    prepare_examples,
)
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer, resolve_optimizer
from spt_jax.training.population import Member, make_population_step, population_step
from spt_jax.training.step import TrainState, init_state, loss_and_gradient, make_train_step, train_step

__all__ = [
    "TASKS",
    "Batch",
    "Callback",
    "CheckpointError",
    "ClassDistillation",
    "ConfigError",
    "ContextPromptTuning",
    "CrossEntropy",
    "DataError",
    "DecomposedPromptTuning",
    "DeepPrompts",
    "Distillation",
    "Dpo",
    "Encoder",
    "Engine",
    "Example",
    "FitResult",
    "FrozenBase",
    "Grpo",
    "Halving",
    "Ipo",
    "LlamaAdapter",
    "LowRankPromptAdaptation",
    "LowRankPromptTuning",
    "Member",
    "MeshConfig",
    "Method",
    "Model",
    "MultitaskPromptTuning",
    "Objective",
    "OptimizerConfig",
    "Orpo",
    "PTuning",
    "PrefixTuning",
    "PrefixTuningPlus",
    "ProgressivePrompts",
    "Prompt",
    "PromptBank",
    "PromptTuning",
    "RepresentationFinetuning",
    "Request",
    "ResidualPromptTuning",
    "Rows",
    "SamplingConfig",
    "SavedPrompt",
    "SimPo",
    "SpanCrossEntropy",
    "SptError",
    "Standing",
    "StateTuning",
    "Task",
    "Template",
    "TrainConfig",
    "TrainState",
    "TrainedTokens",
    "TrainingError",
    "VerbalizerCrossEntropy",
    "VirtualPrompt",
    "compose",
    "encode_prefix",
    "evaluate",
    "evaluate_ensemble",
    "evaluation_batches",
    "fit",
    "fit_population",
    "from_flax",
    "generate",
    "init",
    "init_state",
    "load_base",
    "load_prompt",
    "loss_and_gradient",
    "make_evaluation_set",
    "make_mesh",
    "make_optimizer",
    "make_population_step",
    "make_train_step",
    "output_logits",
    "pack",
    "place_batch",
    "plan_batches",
    "population_step",
    "prepare_examples",
    "read_records",
    "remember",
    "resolve_optimizer",
    "save_prompt",
    "score_together",
    "signals",
    "stack_prompts",
    "train_step",
    "training_batches",
    "transfer",
]
