"""Examples for encoder-decoders, as the library packs them, and what they predict."""

import jax
import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Rows, pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.inference.forward import output_logits
from spt_jax.prompts.virtual import VirtualPrompt

START = 0
# The variants that differ: the relative biases of each layer or of all, the MLP, and the output matrix; learned
# positions, the scale of the embedding table, and the places of norms.
VARIANTS = {
    "t5": ("t5", {}),
    "t5 1.1": ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", {}),
    "umt5": ("umt5", {"tie_word_embeddings": False}),
    "umt5 tied": ("umt5", {}),
    "bart": ("bart", {"decoder_start_token_id": START}),
    "bart without a scale": ("bart", {"decoder_start_token_id": START, "scale_embedding": False}),
    "t5gemma": ("t5gemma", {"decoder_start_token_id": START, "bos_token_id": START, "pad_token_id": 1}),
    "t5gemma untied, no windows, linear rope": (
        "t5gemma",
        {
            "decoder_start_token_id": START,
            "bos_token_id": START,
            "pad_token_id": 1,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"] * 3,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
            "final_logit_softcapping": None,
        },
    ),
    "t5gemma2": ("t5gemma2", {"decoder_start_token_id": START, "bos_token_id": START, "pad_token_id": 1}),
    "mbart": ("mbart", {"decoder_start_token_id": START}),
}


def words(count: int, seed: int = 0) -> np.ndarray:
    """Ids that no control token is among."""
    return np.random.default_rng(seed).integers(3, 320, count).astype(np.int32)


def text(prompt: np.ndarray, target: np.ndarray, index: int = 0) -> Example:
    """A prompt for the encoder, and a target for the decoder to predict."""
    ids = np.concatenate([prompt, [START], target]).astype(np.int32)
    predicted = np.arange(len(ids)) > len(prompt)
    return Example(ids, predicted, (), 0, index).decoded(START)


def choice(prompt: np.ndarray, choices: list[np.ndarray], label: int = 0, index: int = 0) -> Example:
    """A prompt for the encoder, and verbalizers for the decoder to score."""
    ids = np.concatenate([prompt, [START]]).astype(np.int32)
    return Example(ids, np.zeros(len(ids), bool), tuple(choices), label, index).decoded(START)


def rows_of(examples: list[Example], *, packing: bool, batch_size: int = 8) -> Rows:
    """The rows of a batch of these examples."""
    plan = plan_batches(examples, lead=0, batch_size=batch_size, packing=packing)
    return pack(examples, plan).rows


def logits_by_target(
    base: FrozenBase, rows: Rows, virtual: VirtualPrompt | None = None
) -> dict[tuple[int, int], np.ndarray]:
    """The logits [M, V] that predict the targets of each scored sequence, by record number and choice."""
    logits = np.asarray(jax.jit(output_logits)(base.model, virtual, None, rows))
    choices = int(np.max(rows.target_groups)) + 1
    choices = max(1, choices // max(1, rows.examples.shape[1]))
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for row in range(len(logits)):
        for place, weight in enumerate(rows.target_weights[row]):
            if weight:
                slot, number = divmod(int(rows.target_groups[row, place]), choices)
                key = int(rows.examples[row, slot]), number
                found.setdefault(key, []).append(logits[row, rows.target_outputs[row, place]])
    return {key: np.stack(parts) for key, parts in found.items()}
