"""`spt-jax import | export`: converts prompts from and to the formats of other libraries."""

import dataclasses
from pathlib import Path
from typing import Literal

from spt_jax.bases.base import load_base
from spt_jax.commands.saved import Saved
from spt_jax.data.sources import check_fields
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.inspection import (
    describe_prompt,
)
from spt_jax.interop import export_embeddings, export_npy, export_peft, export_peft_tasks, import_npy, import_peft
from spt_jax.interop.peft import default_template
from spt_jax.options import Line, Pairs
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.storage import load_prompt, read_prompt, save_prompt
from spt_jax.runtime.files import shown, write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Converts a PEFT directory or a .npy file of token rows to a prompt directory.

    Attributes:
      source: the PEFT directory or .npy file, a URL of one, or the hub id of a PEFT prompt.
      base: the base that the prompt was trained on: a directory, a hub id or "starter".
      output: the prompt directory to write.
      template_prompt: the template's prompt; default as in PEFT, for a field "text": virtual tokens, BOS, text.
      template_target: the text that the model is to generate.
      verbalizers: for a classifier, the text that stands for each class; for a head, all its classes in order.
      reads: for a tagging or span head, the field that it reads.
      task: for a PEFT multitask prompt, the number of the task to import.
      dtype: precision of the base; default by device.
    """

    source: Path
    base: str
    output: Path
    template_prompt: Line | None = None
    template_target: Line = "{target}"
    verbalizers: Pairs = dataclasses.field(default_factory=dict)
    reads: str | None = None
    task: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def run(self) -> None:
        source = prompt_directory(self.source)
        base = load_base(self.base, dtype=self.dtype)
        if source.is_dir():
            method, virtual = import_peft(source, base, task=self.task)
        else:
            method, virtual = import_npy(source, base)
        classes = getattr(method, "classes", None)
        if classes is not None and len(self.verbalizers) != classes:
            raise ConfigError(f"the head has {classes} classes; name all of them, in order, with --verbalizers")
        template = Template(
            prompt=self.template_prompt or default_template(base, method),
            target=self.template_target,
            virtual_tokens=method.token_count,
            verbalizers=self.verbalizers,
            head=getattr(method, "head", "language_model"),
            reads=self.reads,
        )
        save_prompt(self.output, base, method, virtual, template, extra={"imported_from": shown(self.source)})
        print(describe_prompt(read_prompt(self.output)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Saved):
    """Converts a saved prompt to the format of another library.

    Attributes:
      output: a directory for PEFT, otherwise a file; or a URL.
      format: peft; npy, token rows as in google-research/prompt-tuning; vllm, the embeddings of a complete request, for
        `prompt_embeds` of vLLM's completions API.
      fields: for vllm, the request's record as name=value pairs.
      others: for peft, further prompts, which become the tasks 1, 2, ... of a multitask prompt; `prompt` is task 0.
    """

    output: Path
    format: Literal["peft", "npy", "vllm"] = "peft"
    fields: Pairs = dataclasses.field(default_factory=dict)
    others: tuple[Path, ...] = ()

    def run(self) -> None:
        base, saved = self.load()
        if self.others and self.format != "peft":
            raise ConfigError(
                f"--others writes a PEFT multitask prompt; it is not compatible with --format {self.format}"
            )
        if self.others:
            others = [load_prompt(path, base, force=self.force) for path in self.others]
            export_peft_tasks(self.output, [saved, *others], base)
        elif self.format == "peft":
            export_peft(self.output, saved, base)
        elif self.format == "npy":
            export_npy(self.output, saved)
        else:
            check_fields([dict(self.fields)], saved.template.prompt_fields, "--fields")
            write_text(self.output, export_embeddings(saved, base, dict(self.fields)))
        print(f"wrote {shown(self.output)}")
