"""Writes the logits of transformers' torch models for every case of the tests to tests/golden.

Those of encoder-decoders are in encoder_decoders.safetensors, all others in logits.safetensors.

Run it from the repository root, with the `parity` extra installed, when a case is added:

    python scripts/make_golden.py [CASE ...]

It adds the cases that are not stored, and removes those that are not among the cases of the tests. With names of cases,
or "all", it computes these again.

Checkpoints are not stored: `spt_jax.testing` recreates them from their seeds.
"""

import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from spt_jax.bases.families import ENCODER_DECODERS, FAMILIES  # noqa: E402
from spt_jax.testing import write_tiny_checkpoint  # noqa: E402
from tests.encoder_decoders import START  # noqa: E402
from tests.golden import encoder_decoders  # noqa: E402
from tests.golden.cases import CASES, GOLDEN, KEPT, precise, token_ids  # noqa: E402


def reference_logits(case) -> np.ndarray:
    """Returns the logits of transformers' model, float32 [len(KEPT), V]."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        write_tiny_checkpoint(directory, case.family, seed=case.seed, **case.overrides)
        architecture = getattr(transformers, FAMILIES[case.family].architecture)
        model = architecture.from_pretrained(directory, dtype=torch.float32, attn_implementation=case.attention)
        ids = torch.tensor(token_ids(case)[None].astype(np.int64))
        return np.ascontiguousarray(precise(model.eval())(input_ids=ids, use_cache=False).logits[0, list(KEPT)].numpy())


def decoder_logits(name: str) -> np.ndarray:
    """Returns the logits of the decoder of transformers' encoder-decoder, float32 [len(KEPT), V]."""
    family, overrides = encoder_decoders.CASES[name]
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        write_tiny_checkpoint(directory, family, seed=encoder_decoders.SEED, **overrides)
        architecture = getattr(transformers, ENCODER_DECODERS[family].architecture)
        model = architecture.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        prompt, target = encoder_decoders.PROMPT, encoder_decoders.TARGET
        inputs = np.concatenate([[START], target[:-1]])
        ids, decoder_ids = (torch.tensor(one[None].astype(np.int64)) for one in (prompt, inputs))
        return encoder_decoders.kept(model(input_ids=ids, decoder_input_ids=decoder_ids).logits[0].numpy())


def write(file: Path, cases: Mapping[str, Callable[[], np.ndarray]], again: list[str]) -> None:
    """Writes the logits of the cases, computing those that are not stored and those in `again`."""
    stored = safetensors.numpy.load_file(file) if file.is_file() else {}
    kept = {} if "all" in again else {name: rows for name, rows in stored.items() if name not in again}
    tensors = {name: kept[name] if name in kept else logits() for name, logits in cases.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    temporary = file.with_suffix(".tmp")
    safetensors.numpy.save_file(tensors, temporary, metadata=versions)
    temporary.replace(file)
    print(f"{file}: {len(tensors)} cases, {file.stat().st_size:,} bytes")


def main(again: list[str]) -> None:
    write(GOLDEN, {case.name: functools.partial(reference_logits, case) for case in CASES}, again)
    both = {name: functools.partial(decoder_logits, name) for name in encoder_decoders.CASES}
    write(encoder_decoders.GOLDEN, both, again)


if __name__ == "__main__":
    main(sys.argv[1:])
