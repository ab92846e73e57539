"""Import and export of soft prompts in the file formats of other libraries."""

from spt_jax.interop.arrays import export_embeddings, export_npy, import_npy
from spt_jax.interop.peft import import_peft
from spt_jax.interop.peft_export import export_peft, export_peft_tasks, peft_note

__all__ = [
    "export_embeddings",
    "export_npy",
    "export_peft",
    "export_peft_tasks",
    "import_npy",
    "import_peft",
    "peft_note",
]
