"""`spt-jax import | export`: converts prompts from and to the formats of other libraries."""

from spt_jax.bases.base import load_base
from spt_jax.commands.options import Export, Import
from spt_jax.commands.saved import load
from spt_jax.data.sources import check_fields
from spt_jax.data.templates import TEXT, Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.evaluation.inspection import (
    describe_prompt,
)
from spt_jax.interop import export_embeddings, export_npy, export_peft, export_peft_tasks, import_npy, import_peft
from spt_jax.interop.peft import default_template
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.storage import load_prompt, read_prompt, save_prompt
from spt_jax.runtime.files import nearest_path, shown, write_text
from spt_jax.runtime.waits import spoken


def import_prompt(options: Import) -> None:
    """Converts a prompt of another library, and prints its description."""
    source = prompt_directory(options.source)
    if not source.exists():
        raise CheckpointError(f"{shown(options.source)}: no such file or directory{nearest_path(options.source)}")
    with spoken(f"loading {options.base}"):
        base = load_base(options.base, dtype=options.dtype)
    if source.is_dir():
        method, virtual = import_peft(source, base, task=options.task)
    else:
        method, virtual = import_npy(source, base)
    classes = getattr(method, "classes", None)
    if classes is not None and len(options.verbalizers) != classes:
        raise ConfigError(f"the head has {classes} classes; name all of them, in order, with --verbalizers")
    template = Template(
        prompt=options.template_prompt or default_template(base, method),
        target=options.template_target,
        virtual_tokens=method.token_count,
        verbalizers=options.verbalizers,
        head=getattr(method, "head", None) or TEXT,
        reads=options.reads,
    )
    save_prompt(options.output, base, method, virtual, template, extra={"imported_from": shown(options.source)})
    print(describe_prompt(read_prompt(options.output)))
    if not source.is_dir() and options.template_prompt is None:
        print(
            "note: a .npy file has no template and no classes; if the prompt was trained with others than those above,"
            " give --template-prompt, --template-target and --verbalizers"
        )


def export_prompt(options: Export) -> None:
    """Converts a saved prompt to the format of another library."""
    base, saved = load(options)
    if options.others and options.format != "peft":
        raise ConfigError(
            f"--others writes a PEFT multitask prompt; it is not compatible with --format {options.format}"
        )
    if options.others:
        others = [load_prompt(path, base, force=options.force) for path in options.others]
        export_peft_tasks(options.output, [saved, *others], base)
    elif options.format == "peft":
        export_peft(options.output, saved, base)
    elif options.format == "npy":
        export_npy(options.output, saved)
    else:
        check_fields([dict(options.fields)], saved.template.prompt_fields, "--fields")
        write_text(options.output, export_embeddings(saved, base, dict(options.fields)))
    print(f"wrote {shown(options.output)}")
    if saved.template.continues:
        rest = saved.template.system if saved.template.is_conversation else saved.template.prompt
        print(f"note: requests continue the text: from {rest!r} on, tokenize them with add_special_tokens=False")
