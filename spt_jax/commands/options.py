"""The options of the commands that start from a saved prompt, a base or a work directory.

They are separate from the commands, so that reading them does not wait seconds for JAX.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from spt_jax.options import Line, Lines, Pairs
from spt_jax.runtime.mesh_config import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved prompt and its base.

    Attributes:
      prompt: the saved prompt: a directory, a URL (s3://, gs://), or a hub id (owner/name, hf://owner/name).
      base: where its base is now, or its hub id; default where it was when the prompt was trained.
      dtype: precision of the base; default by device.
      quantize: how the base's matrices are stored: int8, fp8, int4, nf4 or keep. Default as when the prompt was
        trained or, with --base, in dtype.
      force: use the prompt with a base other than its own, if the sizes match.
    """

    prompt: Path
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: str | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Saved):
    """Answers texts with a soft prompt. A classifier prints the class, a tagging head a tag per word.

    Attributes:
      texts: one record each, for a template with one field.
      names: if `prompt` is a folder of prompts, the name of the prompt for each text; all run in the same batches.
      fields: a record as name=value pairs, for a template with several fields.
      max_new_tokens: maximum number of tokens of an answer.
      temperature: sampling temperature; 0 always takes the likeliest token.
      top_k: sample only from this number of likeliest tokens; 0 for all.
      top_p: sample only from the likeliest tokens with this total probability.
      stop: strings that end an answer.
      seed: seed for sampling.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Saved):
    """Scores a soft prompt, hand-written prompts and no prompt on a data set.

    Attributes:
      data: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set id.
      split: split of a hub data set.
      hard_prompt: hand-written prompts to compare with.
      by: if `prompt` is a folder of prompts, the field with the prompt's name for each record; all run in the same
        batches.
      others: further prompts for the same task; each one is scored separately, and all together as an ensemble.
      combine: how the ensemble decides: by mean log-probability or by vote.
      batch_size: examples per batch.
      max_new_tokens: maximum number of tokens of a generated answer.
      reward: for a prompt of the task rewards, the functions or the field that judge its answers, as in task.reward of
        a training run.
      temperature: for such a prompt, the sampling temperature of the answers.
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
    reward: Lines = ()
    temperature: float = 1.0
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Saved):
    """Describes a saved prompt: its rows compared with the vocabulary and their initial values, and each row's effect.

    Attributes:
      nearest: how many of the nearest tokens to show per row.
      offline: show only the contents of the files, without loading the base.
      data: a file or hub data set on which to ablate each position and to measure the attention it receives.
      split: split of a hub data set.
      limit: maximum number of records to read.
      others: further prompts, for a matrix of similarities.
      output: a directory for inspect.json and inspect.png.
    """

    nearest: int = 5
    offline: bool = False
    data: str | None = None
    split: str = "validation"
    limit: int = 500
    others: tuple[Path, ...] = ()
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similar:
    """Ranks the saved prompts of a folder as initial values for a new task, by similarity to the task's prompt (SPoT).

    Attributes:
      prompt: the new task's prompt, trained for a few steps.
      bank: a folder of prompt directories for the same base.
    """

    prompt: Path
    bank: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeReport:
    """Rewrites report.html of a finished run, sweep or comparison from the files of its work directory.

    Attributes:
      workdir: the work directory.
    """

    workdir: tyro.conf.Positional[Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serves a base and any number of saved prompts, with OpenAI's endpoints and a web page at /.

    If the environment variable SPT_JAX_ADMIN_KEY is set, it is the key for adding and removing prompts while serving.

    Attributes:
      base: a directory in Hugging Face format, a hub id, or starter.
      prompts: a directory of prompt directories of this library or of PEFT, a URL (s3://, gs://) or the hub id of one;
        a prompt that is added while serving is read from there again. Prompts are loaded from nowhere else.
      name: name of the bare base among the models; default the last part of `base`.
      revision: revision of the base on the hub.
      strict: do not start if a prompt cannot be read; by default, such a prompt is left out with a message.
      host: address to listen on.
      port: port to listen on; 0 takes a free port.
      allowed_hosts: host names, without ports, under which web pages may use the server, such as a proxy's. On a
        loopback address, they are allowed in addition to localhost and the address; on other addresses, any name is
        allowed unless names are given.
      slots: number of requests that run at once.
      context: positions per slot, for prompt and answer together; default all positions of the base, at most 8,192.
        The memory of the slots grows with it.
      lookup: maximum number of tokens drafted at a time from a request's earlier text, 1 to 32; answers stay the same.
        0 for no drafts.
      chunk: maximum number of tokens of a request that are run at a time, at least 16; other answers go on in between.
        0 for no limit; default no limit for encoder-decoders, and 256 for other bases.
      shared: number of positions for prompts that all slots read from one place, those of at least 64 positions, such
        as remembered texts; 0 copies every prompt to its slots.
      queue: number of answers that may wait; further requests get 429. A client with less than an equal share may
        exceed this.
      dtype: precision of the base; default by device.
      quantize: how the base's matrices are stored: int8, fp8, int4, nf4 or keep; default in dtype. Prompts that were
        trained on another quantization are refused.
      mesh: device mesh.
      prompt_memory: MiB of prompts on the device; if exceeded, the least recently used are removed from it. Default no
        limit.
      max_prompt: maximum size of a prompt's directory in MiB; a remembered text takes kilobytes for each of its tokens.
      max_body: maximum size of a request's body in KiB.
      body_seconds: time limit for a request's body, and for its head.
      drain_seconds: time limit for running requests after SIGTERM.
      compilation_cache: a directory for compiled programs, which makes later starts faster.
    """

    base: str
    prompts: Path | None = None
    name: str | None = None
    revision: str | None = None
    strict: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    slots: int = 16
    context: int | None = None
    lookup: int = 0
    chunk: int | None = None
    shared: int = 0
    queue: int = 256
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: str | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    prompt_memory: int | None = None
    max_prompt: int = 256
    max_body: int = 1024
    body_seconds: float = 30.0
    drain_seconds: int = 60
    compilation_cache: Path | None = None


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remember:
    """Makes a prompt from a text without training: requests continue the text, which is not encoded again.

    Attributes:
      base: the base: a directory, a hub id or "starter".
      text: a UTF-8 file with the text, or its URL. Blanks and newlines at its ends are part of it.
      output: the prompt directory to write; replaced if it holds a prompt. A path or a URL.
      tokens: compact the text to this number of positions, fewer than its tokens, by attention matching. By default,
        all tokens are kept.
      chat_system: the text is the system turn of the base's chat template, and requests are the turns after it.
      control_tokens: names of control tokens in the text are control tokens, as in a chat that was already rendered. By
        default, they are plain text.
      revision: revision of the base on the hub.
      dtype: precision of the base; default by device.
      quantize: how the base's matrices are stored: int8, int4 or nf4; default in dtype.
      mesh: device mesh.
    """

    base: str
    text: Path
    output: Path
    tokens: int | None = None
    chat_system: bool = False
    control_tokens: bool = False
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: str | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compose(Saved):
    """Makes one prompt from the prefixes of several, one after the other, without training.

    Attributes:
      others: the prompts that follow `prompt`, in their order. The template is that of the last.
      output: the prompt directory to write; replaced if it holds a prompt. A path or a URL.
      skip: positions left out at the start of every prefix but the first: 1 leaves out the BOS token of a remembered
        text. By default all stay.
    """

    others: tuple[Path, ...]
    output: Path
    skip: int = 0


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Uploads a saved prompt to the Hugging Face hub, with a model card. A new repository is private.

    The token is that of `hf auth login`, or in the environment variable HF_TOKEN. All of prompt.json is uploaded,
    including the training command.

    Attributes:
      prompt: the directory of the saved prompt.
      repository: its id on the hub, owner/name.
      base: the hub id of the prompt's base, if the prompt was trained with a local directory.
      public: whether a new repository is public.
    """

    prompt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    base: str | None = None
    public: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull:
    """Downloads a prompt from the Hugging Face hub into a directory.

    Attributes:
      repository: its id on the hub, owner/name, or hf://owner/name@revision.
      directory: created, or replaced if it holds a prompt; a path or a URL.
    """

    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
