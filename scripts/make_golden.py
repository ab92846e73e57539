"""Writes tests/golden/logits.safetensors: the logits of transformers' torch models for every case of the tests.

Run it from the repository root, with the `parity` extra installed, when a case is added or changed:

    python scripts/make_golden.py [CASE ...]

With names of cases, the others keep their stored logits.
Checkpoints are not stored: `spt_jax.testing` recreates them from their seeds.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from spt_jax.testing import write_tiny_checkpoint  # noqa: E402
from tests.golden.cases import CASES, GOLDEN, KEPT, token_ids  # noqa: E402


def reference_logits(case) -> np.ndarray:
    """Returns the logits of transformers' model, float32 [len(KEPT), V]."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        write_tiny_checkpoint(directory, case.family, seed=case.seed, **case.overrides)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=case.attention
        )
        ids = torch.tensor(token_ids(case)[None].astype(np.int64))
        return np.ascontiguousarray(model.eval()(input_ids=ids, use_cache=False).logits[0, list(KEPT)].numpy())


def main(names: list[str]) -> None:
    stored = safetensors.numpy.load_file(GOLDEN) if names else {}
    unknown = [name for name in names if name not in {case.name for case in CASES}]
    if unknown:
        sys.exit(f"no case is named {unknown[0]!r}")
    tensors = {
        case.name: reference_logits(case) if case.name in names or not names else stored[case.name] for case in CASES
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    temporary = GOLDEN.with_suffix(".tmp")
    safetensors.numpy.save_file(tensors, temporary, metadata=versions)
    temporary.replace(GOLDEN)
    print(f"{GOLDEN}: {len(tensors)} cases, {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
