"""`python -m spt_jax COMMAND`: what to do with a saved prompt, and jobs that train many of them."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from spt_jax import comparison, find_rate, sweep
from spt_jax.attribution import ablate, attention_received
from spt_jax.base import FrozenBase, load_base
from spt_jax.config import EvaluationConfig
from spt_jax.data.encoder import Encoder
from spt_jax.data.sources import check_fields, read_records
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.ensemble import evaluate_ensemble, score_together
from spt_jax.errors import CheckpointError, ConfigError, SptError, did_you_mean
from spt_jax.evaluation import EvaluationSet, evaluate, from_scores, make_evaluation_set
from spt_jax.files import write_json, write_text
from spt_jax.generation import SamplingConfig, generate
from spt_jax.inspection import (
    ablation_lines,
    attention_lines,
    compared_rows,
    describe_prompt,
    layer_drift,
    similarity_lines,
    similarity_map,
)
from spt_jax.interop import export_embeddings, export_npy, export_peft, export_peft_tasks, import_npy, import_peft
from spt_jax.interop.peft import default_template
from spt_jax.options import Line, Lines, Pairs
from spt_jax.plots import plot_inspection
from spt_jax.prompts import VirtualPrompt
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import INFO_FILE, SavedPrompt, load_prompt, read_prompt, save_prompt
from spt_jax.prompts.transfer import ranked_sources
from spt_jax.report import comparison_table
from spt_jax.training.loop import Stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved prompt and its base.

    Attributes:
      prompt: the directory of the saved prompt.
      base: where its base is now; default where it was when the prompt was trained.
      dtype: precision of the base; default by device.
      force: use the prompt on another base than its own, if only the sizes fit.
    """

    prompt: Path
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    force: bool = False

    def load(self) -> tuple[FrozenBase, SavedPrompt]:
        base, (saved,) = self.load_all([self.prompt])
        return base, saved

    def load_all(self, folders: Sequence[Path]) -> tuple[FrozenBase, list[SavedPrompt]]:
        """The base of the first of these prompts, and all of them."""
        info = read_prompt(folders[0]).info["base"]
        base = load_base(self.base or info["id"], revision=None if self.base else info["revision"], dtype=self.dtype)
        return base, [load_prompt(folder, base, force=self.force) for folder in folders]

    def named(self, names: Sequence[str]) -> list[Path]:
        """The prompts of these names in the folder of prompts that `prompt` is.

        Raises:
          CheckpointError: it holds no prompts, or none of one of the names.
        """
        known = _bank(self.prompt)
        for name in names:
            if name not in known:
                raise CheckpointError(f"{self.prompt}: holds no prompt {name!r}; {did_you_mean(name, known)}")
        return [known[name] for name in names]


def _bank(folder: Path) -> dict[str, Path]:
    """The prompts of a folder, by name."""
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{INFO_FILE}"))}
    if not found:
        raise CheckpointError(f"{folder}: holds no saved prompts")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Saved):
    """Answers texts with a soft prompt. A classifier prints the class, a tagging head a tag per word.

    Attributes:
      texts: one record each, for a template with one field.
      names: where `prompt` is a folder of prompts, the name of the one for each text: they are all asked together.
      fields: a record as name=value pairs, for a template with several.
      max_new_tokens: longest answer.
      temperature: 0 takes the likeliest token.
      top_k: sample among so many tokens; 0 for all.
      top_p: sample among the likeliest tokens that hold this probability.
      stop: strings that end an answer.
      seed: of sampling.
    """

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    names: tuple[str, ...] = ()
    fields: Pairs = dataclasses.field(default_factory=dict)
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: Lines = ()
    seed: int = 0

    def run(self) -> None:
        sampling = SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop,
            seed=self.seed,
        )
        if self.names:
            self.run_together(sampling)
            return
        template = read_prompt(self.prompt).template
        records = _records(template, self.texts, self.fields)
        base, saved = self.load()
        encoder = _encoder(template, base, saved.virtual)
        if template.verbalizers or template.reads:
            asked = [encoder.with_any_label(record) for record in records]
            result = evaluate(base, make_evaluation_set(base, encoder, asked), saved.virtual)
            for prediction in result.predictions:
                answer = prediction["prediction"]
                print(answer if isinstance(answer, str) else " ".join(answer))
            return
        for answer in generate(base, [encoder.prompt_ids(record) for record in records], saved.virtual, sampling):
            print(answer.text)

    def run_together(self, sampling: SamplingConfig) -> None:
        """Each text under its own prompt, in the same batches."""
        if len(self.names) != len(self.texts):
            raise ConfigError(f"{len(self.names)} names for {len(self.texts)} texts; give a name for each")
        different = list(dict.fromkeys(self.names))
        base, saved = self.load_all(self.named(different))
        if len({bool(one.template.verbalizers) for one in saved}) > 1 or any(one.template.reads for one in saved):
            raise ConfigError("some of these prompts answer with a class and some with words; ask them apart")
        encoders = [_encoder(one.template, base, one.virtual) for one in saved]
        index = [different.index(name) for name in self.names]
        records = [_records(saved[i].template, [text], {})[0] for i, text in zip(index, self.texts, strict=True)]
        virtuals = [one.virtual for one in saved]
        if not saved[0].template.verbalizers:
            prompts = [encoders[i].prompt_ids(record) for i, record in zip(index, records, strict=True)]
            for answer in generate(base, prompts, stack_prompts(virtuals), sampling, prompt_index=index):
                print(answer.text)
            return
        asked = [
            [encoder.with_any_label(r) for i, r in zip(index, records, strict=True) if i == own]
            for own, encoder in enumerate(encoders)
        ]
        sets = [make_evaluation_set(base, encoder, own) for encoder, own in zip(encoders, asked, strict=True)]
        scores = [iter(own) for own in score_together(base, sets, virtuals)]
        for i in index:
            print(list(saved[i].template.verbalizers)[int(next(scores[i]).argmax())])


def _encoder(template: Template, base: FrozenBase, virtual: VirtualPrompt | None) -> Encoder:
    taken = 0 if virtual is None or virtual.prefix is None else virtual.prefix.keys.shape[-3]
    return Encoder(template, base.tokenizer, base.config.vocab_size, base.config.max_positions - taken)


def _records(template: Template, texts: Sequence[str], fields: Mapping[str, str]) -> list[dict[str, Any]]:
    names = template.prompt_fields
    if texts and fields:
        raise ConfigError("give texts or --fields, not both")
    if template.is_conversation:
        return [{MESSAGES: [{"role": "user", "content": text}]} for text in _some(texts)]
    if fields:
        unknown = sorted(set(fields) - set(names))
        if unknown:
            raise ConfigError(f"the template has no field {unknown[0]!r}; {did_you_mean(unknown[0], names)}")
        return [dict(fields)]
    if len(names) != 1:
        raise ConfigError(
            f"the template has the fields {', '.join(names) or 'none'}; give them as --fields name=value ..."
        )
    return [{names[0]: text} for text in _some(texts)]


def _some(texts: Sequence[str]) -> Sequence[str]:
    if not texts:
        raise ConfigError("give at least one text to answer")
    return texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Saved):
    """Scores a soft prompt, hand-written prompts and no prompt on a file.

    Attributes:
      data: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set id.
      split: of a hub data set.
      hard_prompt: prompts to compare with.
      by: where `prompt` is a folder of prompts, the records' field that names the one for each; all are asked together.
      others: further prompts of the same task; each is scored, and their ensemble with the first.
      combine: how the ensemble decides: by mean log-probability, or by vote.
      batch_size: examples per batch.
      max_new_tokens: of generated answers.
      output: a JSON file for all metrics.
    """

    data: str
    split: str = "test"
    hard_prompt: Lines = ()
    by: str | None = None
    others: tuple[Path, ...] = ()
    combine: Literal["mean", "vote"] = "mean"
    batch_size: int = 64
    max_new_tokens: int = 64
    output: Path | None = None

    def run(self) -> None:
        records = read_records(self.data, split=self.split)
        config = EvaluationConfig(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if self.by is not None:
            self.run_together(records, config)
            return
        template = read_prompt(self.prompt).template
        check_fields(records, template.fields, self.data)
        base, saved = self.load()

        def asked(template: Template, virtual: VirtualPrompt | None) -> EvaluationSet:
            return make_evaluation_set(base, _encoder(template, base, virtual), records, config)

        def metrics(template: Template, virtual: VirtualPrompt | None) -> dict[str, Any]:
            return evaluate(base, asked(template, virtual), virtual).metrics

        results: dict[str, Any] = {"soft_prompt": metrics(template, saved.virtual)}
        if self.others:
            every = [saved, *(load_prompt(path, base, force=self.force) for path in self.others)]
            for path, other in zip(self.others, every[1:], strict=True):
                results[str(path)] = metrics(other.template, other.virtual)
            sets = [asked(prompt.template, prompt.virtual) for prompt in every]
            together = evaluate_ensemble(base, sets, [prompt.virtual for prompt in every], self.combine)
            results[f"{self.combine} of {len(every)} prompts"] = together.metrics
        if template.reads is None:
            results["no_prompt"] = metrics(template.bare(), None)
        elif self.hard_prompt:
            raise ConfigError(f"--hard-prompt: without a head, the model has no {template.head} to compare with")
        for text in self.hard_prompt:
            results[f"hard prompt {text!r}"] = metrics(template.bare(text), None)
        self.report(results)

    def report(self, results: Mapping[str, Any]) -> None:
        print(comparison_table({"test": results}))
        if self.output is not None:
            write_json(self.output, results)

    def run_together(self, records: Sequence[Mapping[str, Any]], config: EvaluationConfig) -> None:
        """Each record under the prompt that it names, in the same batches."""
        if self.others or self.hard_prompt:
            raise ConfigError("--by evaluates a folder of prompts; --others and --hard-prompt go with a single one")
        check_fields(records, [self.by or ""], self.data)
        own: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            own.setdefault(str(record[self.by or ""]), []).append(record)
        base, saved = self.load_all(self.named(list(own)))
        sets = []
        for one, asked in zip(saved, own.values(), strict=True):
            check_fields(asked, one.template.fields, self.data)
            sets.append(make_evaluation_set(base, _encoder(one.template, base, one.virtual), asked, config))
        scores = score_together(base, sets, [one.virtual for one in saved])
        results = [from_scores(asked, values).metrics for asked, values in zip(sets, scores, strict=True)]
        self.report(dict(zip(own, results, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Saved):
    """Shows what a saved prompt is: its rows beside the vocabulary and their start, and what each position is worth.

    Attributes:
      nearest: how many tokens to show per row.
      offline: only what the files say, without loading the base.
      data: a file or hub data set on which to take each position away, and to see what attention they get.
      split: of a hub data set.
      limit: so many of its records at most.
      others: further prompts, for a map of similarities.
      output: a directory for inspect.json and inspect.png.
    """

    nearest: int = 5
    offline: bool = False
    data: str | None = None
    split: str = "validation"
    limit: int = 500
    others: tuple[Path, ...] = ()
    output: Path | None = None

    def run(self) -> None:
        if self.offline:
            if self.data is not None or self.others or self.output is not None:
                raise ConfigError("--offline shows what the files say; --data, --others and --output need the base")
            print(describe_prompt(read_prompt(self.prompt), None, self.nearest))
            return
        base, saved = self.load()
        print(describe_prompt(saved, base, self.nearest))
        report: dict[str, Any] = {
            "rows": [dataclasses.asdict(row) for row in compared_rows(saved, base, self.nearest)],
            "layer_drift": layer_drift(saved, base),
        }
        if self.data is not None:
            report |= self.worth(base, saved)
        if self.others:
            names = [str(path) for path in (self.prompt, *self.others)]
            others = [load_prompt(path, base, force=self.force) for path in self.others]
            cosines = similarity_map([saved.virtual, *(other.virtual for other in others)])
            report["similarity"] = {"prompts": names, "cosines": cosines.tolist()}
            print(similarity_lines(names, cosines))
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            write_json(self.output / "inspect.json", report)
            plot_inspection(self.output / "inspect.png", report)
            print(f"{self.output}: inspect.json, inspect.png")

    def worth(self, base: FrozenBase, saved: SavedPrompt) -> dict[str, Any]:
        """What each position is worth on the records."""
        assert self.data is not None
        records = read_records(self.data, split=self.split, limit=self.limit)
        check_fields(records, saved.template.fields, self.data)
        data = make_evaluation_set(base, _encoder(saved.template, base, saved.virtual), records)
        measure, lost = ablate(base, data, saved.virtual)
        print(ablation_lines(measure, lost))
        report: dict[str, Any] = {"measure": measure, "lost": [dataclasses.asdict(own) for own in lost]}
        if saved.virtual.gated is None:
            received = attention_received(base, data.examples, saved.virtual)
            print(attention_lines(received))
            report["attention"] = {"by_layer_and_position": received.by_position.tolist(), "even": received.even}
        return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Makes a prompt directory of a directory of PEFT's or a .npy file of token rows.

    Attributes:
      source: that directory or file.
      base: the base that the prompt was trained on: a directory, a hub id or "starter".
      output: where the prompt goes.
      template_prompt: how records read; default what PEFT does with a field "text": virtual tokens, BOS, text.
      template_target: what the model is to say.
      verbalizers: the text that stands for each class, for a classifier; for a head, all its classes in order.
      reads: for a tagging or span head, the field that it reads.
      task: of a PEFT multitask prompt, the number of the task whose prompt to take.
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
        base = load_base(self.base, dtype=self.dtype)
        if self.source.is_dir():
            method, virtual = import_peft(self.source, base, task=self.task)
        else:
            method, virtual = import_npy(self.source, base)
        classes = getattr(method, "classes", None)
        if classes is not None and len(self.verbalizers) != classes:
            raise ConfigError(f"the head has {classes} classes; name them all, in order, in --verbalizers")
        template = Template(
            prompt=self.template_prompt or default_template(base, method),
            target=self.template_target,
            virtual_tokens=method.token_count,
            verbalizers=self.verbalizers,
            head=getattr(method, "head", "language_model"),
            reads=self.reads,
        )
        save_prompt(self.output, base, method, virtual, template, extra={"imported_from": str(self.source)})
        print(describe_prompt(read_prompt(self.output), None, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Saved):
    """Writes a saved prompt for other libraries.

    Attributes:
      output: a directory for PEFT, a file otherwise.
      format: peft; npy, the token rows as google-research/prompt-tuning has them; vllm, the embeddings of one whole
        request as its completions API takes them in `prompt_embeds`.
      fields: for vllm, the request's record as name=value pairs.
      others: for peft, further prompts: the tasks 1, 2, ... of one multitask prompt whose task 0 is `prompt`.
    """

    output: Path
    format: Literal["peft", "npy", "vllm"] = "peft"
    fields: Pairs = dataclasses.field(default_factory=dict)
    others: tuple[Path, ...] = ()

    def run(self) -> None:
        base, saved = self.load()
        if self.others and self.format != "peft":
            raise ConfigError(f"--others makes a multitask prompt of PEFT's; --format {self.format} has none")
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
        print(f"written to {self.output}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similar:
    """Ranks the saved prompts of a folder as starts for a new task, by their similarity to its prompt (SPoT).

    Attributes:
      prompt: the new task's prompt, trained for a short while.
      bank: a folder of prompt directories for the same base.
    """

    prompt: Path
    bank: Path

    def run(self) -> None:
        target = read_prompt(self.prompt)
        bank = {str(folder): read_prompt(folder) for folder in _bank(self.bank).values()}
        for folder, saved in bank.items():
            differences = target.fingerprint.differences(saved.fingerprint)
            if differences:
                fields = "; ".join(differences)
                raise CheckpointError(f"{folder}: a prompt for another base than {self.prompt}: {fields}")
        for folder, value in ranked_sources(target.virtual, {name: saved.virtual for name, saved in bank.items()}):
            print(f"{value:7.4f}  {folder}")


COMMANDS: dict[str, Any] = {
    "generate": Generate,
    "evaluate": Evaluate,
    "inspect": Inspect,
    "import": Import,
    "export": Export,
    "similar": Similar,
}


# Commands that start from a config file, as train.py does.
JOBS: dict[str, Any] = {"sweep": sweep.main, "compare": comparison.main, "find-rate": find_rate.main}


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 failed, 2 the words on the command line are wrong, 130 or 143 stopped after saving."""
    known = [*JOBS, *COMMANDS]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m spt_jax {{{','.join(known)}}} ...")
        return 0 if argv else 2
    if argv[0] not in known:
        print(f"error: no command {argv[0]!r}; {did_you_mean(argv[0], known)}", file=sys.stderr)
        return 2
    try:
        if argv[0] in JOBS:
            JOBS[argv[0]](argv[1:])
        else:
            tyro.cli(COMMANDS[argv[0]], args=list(argv[1:]), prog=f"python -m spt_jax {argv[0]}").run()
    except SptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(f"{stopped}. Go on with --resume", file=sys.stderr)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
