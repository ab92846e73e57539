"""The model card of a prompt on the Hugging Face hub, made from the prompt's own metadata."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.data.templates import DECODER
from spt_jax.models.memory import states
from spt_jax.prompts.storage import SavedPrompt
from spt_jax.prompts.virtual import parts_of

# Metrics in the order of the table.
_MEASURES = ("accuracy", "macro_f1", "exact_match", "f1", "bleu", "rouge_l", "log_probability", "perplexity", "loss")
_PEFT_PARTS = (["tokens"], ["prefix"], ["prefix", "head"], ["gated"])


def model_card(repository: str, saved: SavedPrompt, *, on_hub: bool) -> str:
    """Returns the text of README.md: base, task, template, metrics with intervals, and how to use the prompt.

    Args:
      repository: the id of the prompt on the hub.
      saved: the prompt.
      on_hub: whether the id of its base is one on the hub.
    """
    info, template = saved.info, saved.template
    base, extra = info["base"]["id"], info["extra"]
    front = {
        "library_name": "spt_jax",
        **({"base_model": base} if on_hub else {}),
        "pipeline_tag": "text-classification" if template.verbalizers else "text-generation",
        "tags": ["soft-prompt", "prompt-tuning", info["method"]["name"]],
    }
    trained = [
        f"- Base: {_code(base)}"
        + (f", revision {_code(info['base']['revision'])}" if info["base"]["revision"] else ""),
        f"- Method: {_code(info['method']['name'])}, {_parts(saved)}",
        f"- Task: {_task(saved)}",
    ]
    for name, label in (("trainable_parameters", "Trained parameters"), ("step", "Training steps"), ("seed", "Seed")):
        if isinstance(extra.get(name), int):
            trained.append(f"- {label}: {extra[name]:,}")
    flag = "" if on_hub or base == "starter" else " --base DIRECTORY"
    sections = [
        f"# {repository}",
        "A soft prompt: trained vectors that are inserted into the input of a frozen language model.",
        "\n".join(trained),
        "## Template",
        _block("", f"prompt: {template.prompt!r}\ntarget: {template.target!r}" + _classes(template.verbalizers)),
        *_metrics(extra.get("validation")),
        "## Use",
        _block("sh", f'pip install spt_jax\nspt-jax generate --prompt {repository}{flag} "a text"'),
        _block(
            "python",
            f"import spt_jax\n\nbase = spt_jax.load_base({base!r})\nprompt = spt_jax.load_prompt({repository!r}, base)",
        ),
        "## Use with PEFT",
        *_peft(saved, repository, base, flag),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
    return "\n".join(["---", *_yaml(front), "---", "", "\n\n".join([*sections, f"Made with {versions}."]), ""])


def _yaml(values: Mapping[str, str | Sequence[str]]) -> list[str]:
    # A JSON string or list of strings is YAML too.
    return [f"{name}: {json.dumps(value)}" for name, value in values.items()]


def _code(text: str) -> str:
    return f"`{text}`"


def _block(language: str, text: str) -> str:
    fence = "```" if "```" not in text else "~~~~"
    return f"{fence}{language}\n{text}\n{fence}"


def _parts(saved: SavedPrompt) -> str:
    virtual = saved.virtual
    lengths = []
    if virtual.tokens is not None:
        lengths.append(f"{virtual.tokens.shape[-2]} virtual tokens")
    if virtual.prefix is not None:
        lengths.append(f"a prefix of {virtual.prefix_length} positions")
    others = "shift", "replaced", "gated", "linear", "edits", "instance", "head"
    lengths += [name for name in others if getattr(virtual, name) is not None]
    return ", ".join(lengths)


def _task(saved: SavedPrompt) -> str:
    template = saved.template
    if template.reads:
        return f"{template.head} of the field {_code(template.reads)}"
    if template.verbalizers:
        return f"classification into {', '.join(map(_code, template.verbalizers))}"
    return "conversation" if template.is_conversation else "text generation"


def _classes(verbalizers: Mapping[str, str]) -> str:
    return f"\nclasses: {dict(verbalizers)!r}" if verbalizers else ""


def _metrics(found: Any) -> list[str]:
    if not isinstance(found, Mapping):
        return []
    rows = []
    for name in _MEASURES:
        value, interval = found.get(name), found.get(f"{name}_interval")
        if isinstance(value, (int, float)):
            shown = "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
            rows.append(f"| {name.replace('_', ' ')} | {value:.3f} | {shown} |")
    count = found.get("examples")
    of = f" on {count:,} records" if isinstance(count, int) else ""
    title = f"## Validation{of}"
    return [title, "\n".join(["| measure | value | 95 % interval |", "|---|---|---|", *rows])] if rows else []


def _peft(saved: SavedPrompt, repository: str, base: str, flag: str) -> list[str]:
    virtual, prompt = saved.virtual, saved.template.prompt
    parts = parts_of(virtual)
    recurrent = virtual.prefix is not None and bool(states(virtual.prefix.memory))
    first = virtual.tokens is None or (prompt.startswith("<soft") and prompt.count("<soft") == 1)
    if parts not in _PEFT_PARTS or virtual.pinned or recurrent or not first or DECODER in prompt:
        return ["PEFT has no soft prompts of this kind."]
    after = prompt.partition(">")[2] if virtual.tokens is not None else "<bos>"
    bos = (
        ""
        if after.startswith("<bos>")
        else (" In PEFT the virtual tokens come before BOS, so the export is refused if the base's tokenizer adds one.")
    )
    return [
        _block("sh", f"spt-jax export --prompt {repository}{flag} --output peft --format peft"),
        _block(
            "python",
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "peft")',
        ),
        "The text after the soft prompt must be written as in the template." + bos,
    ]
