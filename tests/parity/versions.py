"""What PEFT can do depends on the version of transformers.

transformers 5.24 renamed its models' argument `past_key_values` to `cache`. PEFT 0.21.2 passes keys and values only by
the old name: its heads raise, and its `generate` answers as the bare base does.
"""

import importlib.metadata

import pytest
from packaging.version import Version

PEFT_LOSES_PREFIX = Version(importlib.metadata.version("transformers")) >= Version("5.24")

# `make parity` runs these tests once more, with the last version of transformers whose prefixes work in PEFT.
older_transformers = pytest.mark.older_transformers
# Strict: a PEFT that is mended makes these tests fail, so that the mark is removed.
heads_raise = pytest.mark.xfail(
    PEFT_LOSES_PREFIX, raises=ValueError, strict=True, reason="PEFT's heads reject the models of transformers >= 5.24"
)

# What PEFT still uses by its old name.
peft_marks = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning"),
]
