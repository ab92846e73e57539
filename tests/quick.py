"""Compiler flags for programs that run once or twice: optimising such a program costs more than it saves."""

QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
