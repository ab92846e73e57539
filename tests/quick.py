"""Compiler flags for programs that run once or twice: optimising such a program costs more than it saves."""

import importlib.metadata

QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later compilers refuse flags that they do not have
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"
