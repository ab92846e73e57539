"""A model of EleutherAI's lm-evaluation-harness: a base under a soft prompt, or alone.

The context of a request takes the place of the template's field, and its continuation follows the prompt. For a
template in PEFT's order (virtual tokens, then the text) this is what the harness computes with transformers and PEFT.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int

from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.requests import text_records
from spt_jax.data.templates import Field, Template, parse
from spt_jax.data.tokenization import tokenization_of
from spt_jax.errors import ConfigError, DataError, did_you_mean
from spt_jax.evaluation.continuations import score_continuations
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.storage import load_prompt, read_prompt
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.extras import load_extra

NAME = "spt_jax"
FEATURE = "the lm-evaluation-harness model"

# What the harness's command line passes if --device is not given.
HARNESS_DEVICE = "cuda:0"

# The names under which tasks give the largest number of new tokens; the first that is given counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
OPTIONS = ("until", *LIMITS, "do_sample", "temperature", "top_k", "top_p")

Ids = Int[np.ndarray, " _"]
Value = str | int | float | bool | None


@runtime_checkable
class HarnessRequest(Protocol):
    """A request of the harness, an `lm_eval.api.instance.Instance`."""

    @property
    def args(self) -> tuple[object, ...]: ...


class PromptModel:
    """Answers the harness's three kinds of requests. `register` makes it a model of the harness.

    Attributes:
      base: the frozen base.
      virtual: the soft prompt; None for the bare base.
      template: the template, with one field.
      batch_size: requests per batch.
      max_gen_toks: the number of new tokens of a task that does not set it.
    """

    def __init__(
        self,
        base: FrozenBase,
        template: Template | None = None,
        virtual: VirtualPrompt | None = None,
        *,
        batch_size: int = 16,
        max_gen_toks: int = 256,
    ):
        """Creates a model.

        Args:
          base: the frozen base.
          template: the template; default the text alone.
          virtual: the soft prompt.
          batch_size: requests per batch.
          max_gen_toks: the number of new tokens of a task that does not set it.

        Raises:
          ConfigError: the base is not causal, the soft prompt has a task head, or the template does not have exactly
            one field.
        """
        if not base.layout.causal:
            raise ConfigError(f"{base.name} has an encoder, and lm-evaluation-harness runs on causal bases only here")
        template = template or Template(prompt="{text}", target="{target}")
        if virtual is not None and virtual.head is not None:
            raise ConfigError(f"this prompt has a {template.head} head and gives no probabilities of text")
        text_records(template, [""])  # which refuses templates with other fields
        self.base, self.virtual, self.batch_size, self.max_gen_toks = base, virtual, batch_size, max_gen_toks
        if not template.is_conversation:
            (field,) = template.prompt_fields
            # As the harness does, too long a context loses its beginning.
            template = dataclasses.replace(template, truncate=field, keep="end")
        self.template = template

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return self._encoder_of(self.template)

    @functools.cached_property
    def _whole_encoder(self) -> Encoder:
        """The encoder that never shortens a text."""
        return self._encoder_of(dataclasses.replace(self.template, truncate=None))

    def _encoder_of(self, template: Template) -> Encoder:
        return encoder_for(self.base, template, taken=0 if self.virtual is None else self.virtual.prefix_length)

    @property
    def _ends_with_text(self) -> bool:
        template = self.template
        return not template.chat and not template.is_conversation and isinstance(parse(template.prompt)[-1], Field)

    @property
    def _opener(self) -> Ids:
        """The token that an empty prompt is replaced with, because a token must precede a predicted one: BOS or EOS."""
        tokenizer = self.base.tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise DataError(f"the context is empty, and the tokenizer of {self.base.name} has neither BOS nor EOS")
        return np.asarray([first], np.int32)

    def pair_ids(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Returns the ids of a context in its template and of a continuation.

        If the template ends with its field, both are tokenized as one text, whose tokens after those of the context are
        the continuation's, and spaces at the end of the context count as the continuation's; otherwise separately.

        Raises:
          DataError: the continuation is empty, or too long to be scored.
        """
        if not continuation:
            raise DataError("a continuation is empty, so there is nothing to score")
        limit = self._encoder.max_length
        if self._ends_with_text:
            words = context.rstrip()
            continuation, context = context[len(words) :] + continuation, words
            whole = self._whole_ids(context + continuation)
            own = whole[len(self._whole_ids(context)) :]
            if not len(own):
                raise DataError(f"the continuation {continuation[:40]!r} merges with its context into the same tokens")
            # Where the whole text is too long, it is shortened from the left.
            fits = len(whole) <= limit or len(self._empty) + len(own) > limit
            front = (whole if fits else self._prompt_ids(context + continuation))[: -len(own)]
        else:
            own = np.asarray(tokenization_of(self.base.tokenizer).continuation(continuation), np.int32)
            front = self._prompt_ids(context, room=len(own))
        if len(front) + len(own) > limit:
            raise DataError(
                f"the continuation {continuation[:40]!r} has {len(own)} tokens; {limit} positions are too few"
            )
        return front if len(front) else self._opener, own

    @functools.cached_property
    def _empty(self) -> Ids:
        """The ids of the prompt without a text."""
        return self._whole_ids("")

    def _prompt_ids(self, text: str, room: int = 0) -> Ids:
        (record,) = text_records(self.template, [text])
        return self._encoder.prompt_ids(record, room=room)

    def _whole_ids(self, text: str) -> Ids:
        (record,) = text_records(self.template, [text])
        return self._whole_encoder.prompt_ids(record)

    def loglikelihood(self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores continuations.

        Args:
          requests: their `args` are (context, continuation).
          disable_tqdm: not used: there is no progress bar.

        Returns:
          For each, the log-probability and whether greedy decoding gives the continuation.

        Raises:
          ConfigError, DataError: as in `pair_ids` and `score_continuations`.
        """
        del disable_tqdm
        pairs = [self.pair_ids(*map(str, request.args)) for request in requests]
        scores = score_continuations(self.base, pairs, self.virtual, batch_size=self.batch_size)
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of whole texts under the prompt.

        A text that is too long is scored in windows, each after what the template puts before the text. BOS is not
        scored.

        Args:
          requests: their `args` are (text,).
          disable_tqdm: not used: there is no progress bar.

        Raises:
          ConfigError: the template does not end with its field.
        """
        del disable_tqdm
        if not self._ends_with_text:
            raise ConfigError(
                f"the template {self.template.prompt!r} puts something after the text, so it cannot be scored from its"
                " first token on; use a prompt whose template ends with its field"
            )
        empty, pairs, owners = self._empty, [], []
        for number, request in enumerate(requests):
            ids = self._whole_ids(str(request.args[0]))
            kept = min(len(empty), len(ids))
            differs = np.flatnonzero(empty[:kept] != ids[:kept])  # the text may merge with the words before it
            front = ids[: int(differs[0]) if len(differs) else kept]
            for context, predicted in windows(ids[len(front) :], self._encoder.max_length - max(len(front), 1)):
                before = np.concatenate([front, context])
                pairs.append((before if len(before) else self._opener, predicted))
                owners.append(number)
        sums = np.zeros(len(requests))
        scores = score_continuations(self.base, pairs, self.virtual, batch_size=self.batch_size)
        np.add.at(sums, owners, [score.log_probability for score in scores])
        return sums.tolist()

    def generate_until(self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False) -> list[str]:
        """Generates answers, each up to EOS, the end of a turn or a stop string.

        Args:
          requests: their `args` are (context, options), with the options `until`, `max_gen_toks`, `do_sample`,
            `temperature`, `top_k` and `top_p`.
          disable_tqdm: not used: there is no progress bar.

        Raises:
          ConfigError: there is another option, or one is out of its range.
        """
        del disable_tqdm
        contexts = [str(request.args[0]) for request in requests]
        samplings = [self._sampling(request.args[1]) for request in requests]
        ids, fitting = [], []
        for context, sampling in zip(contexts, samplings, strict=True):
            room = min(sampling.max_new_tokens, self._encoder.max_length // 2)
            prompt = self._prompt_ids(context, room=room)
            ids.append(prompt if len(prompt) else self._opener)
            left = max(self._encoder.max_length - len(ids[-1]), 1)
            fitting.append(dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, left)))
        answers = generate(self.base, ids, self.virtual, fitting, batch_size=self.batch_size)
        return [answer.text for answer in answers]

    def _sampling(self, options: object) -> SamplingConfig:
        """Returns how tokens are chosen, from a task's options."""
        if not isinstance(options, Mapping):
            raise ConfigError(f"the options of a request are {options!r}, not a mapping")
        for name in options:
            if name not in OPTIONS:
                raise ConfigError(f"generation option {name!r} is not supported; {did_you_mean(str(name), OPTIONS)}")
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(map(str, until))
        limit = next((options[name] for name in LIMITS if options.get(name) is not None), self.max_gen_toks)
        temperature = float(options.get("temperature") or 0.0)
        sample = options.get("do_sample")
        if sample and not temperature:
            temperature = 1.0
        if sample is False or not temperature:
            return SamplingConfig(
                max_new_tokens=int(limit), stop=tuple(filter(None, until)), end_ids=self._encoder.end_ids
            )
        return SamplingConfig(
            max_new_tokens=int(limit),
            temperature=temperature,
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 1.0),
            stop=tuple(filter(None, until)),
            end_ids=self._encoder.end_ids,
        )

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuses the harness's chats: the prompt's own template says whether its text is a turn of a chat.

        Raises:
          ConfigError: always.
        """
        del chat_history, add_generation_prompt
        raise ConfigError(
            "leave out --apply_chat_template: the template of a soft prompt decides how its text becomes a chat"
            " (data.chat, or {messages}), and the harness's text takes the place of its field"
        )

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, for the harness's cache of requests."""
        return self.base.name.replace("/", "__")


def windows(ids: Ids, size: int) -> Iterator[tuple[Ids, Ids]]:
    """Yields disjoint parts of a text, each after as many of the ids before it as fit, at least one.

    Args:
      ids: the ids of the text.
      size: the largest number of ids of a part, at least 1.
    """
    if size < 1:
        raise DataError("the template leaves no position for a text")
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        yield ids[max(end - size - 1, 0) : start], ids[start:end]


def load_model(
    prompt: str | None = None,
    base: str | None = None,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    quantize: str | None = None,
    force: bool = False,
    batch_size: int | str = 16,
    max_gen_toks: int = 256,
    device: str | None = None,
    max_batch_size: int | None = None,
) -> PromptModel:
    """Loads a model from the arguments of `--model_args`.

    Args:
      prompt: a saved prompt: a directory, a URL or a hub id; default the bare base.
      base: the base, or its path or hub id; default where it was when the prompt was trained.
      dtype: precision of the base; default by device.
      quantize: how the base's matrices are stored, such as "int8"; default as when the prompt was trained, if `base` is
        not given.
      force: use the prompt with a base other than its own, if the sizes match.
      batch_size: requests per batch; "auto" is 16.
      max_gen_toks: the number of new tokens of a task that does not set it.
      device: nothing but the kind of device that JAX uses, or the harness's default.
      max_batch_size: must be None.

    Raises:
      ConfigError: neither `prompt` nor `base` is given, an argument is not supported, or the prompt cannot score text.
      CheckpointError: the prompt or the base is missing, damaged, or they do not belong together.
    """
    if prompt is None and base is None:
        raise ConfigError("give --model_args prompt=DIRECTORY, base=MODEL, or both")
    backend = jax.default_backend()
    if device not in (None, HARNESS_DEVICE, backend, *(["cuda"] if backend == "gpu" else [])):
        raise ConfigError(f"leave out --device {device}: JAX uses {backend}; set JAX_PLATFORMS to change that")
    if max_batch_size is not None:
        raise ConfigError("leave out --max_batch_size: the batch size is --batch_size")
    size = 16 if batch_size == "auto" else batch_size
    if isinstance(size, str) and not size.isdigit():
        raise ConfigError(f"--batch_size is {size!r}; it must be a number or auto")
    model = functools.partial(PromptModel, batch_size=int(size), max_gen_toks=int(max_gen_toks))
    if prompt is None:
        return model(load_base(str(base), dtype=dtype, quantize=quantize))
    directory = prompt_directory(prompt)
    trained = read_prompt(directory).info["base"]
    revision = trained["revision"] if base is None else None
    if base is None and quantize is None:
        quantize = trained["fingerprint"].get("quantize")
    loaded = load_base(base or trained["id"], revision=revision, dtype=dtype, quantize=quantize)
    saved = load_prompt(directory, loaded, force=force)
    return model(loaded, saved.template, saved.virtual)


def register() -> type:
    """Registers the model with the harness under "spt_jax", and returns its class.

    Raises:
      ConfigError: the package lm_eval is not installed.
    """
    load_extra("lm_eval.models", FEATURE)  # the harness registers its own models only while there are none
    models, registry = load_extra("lm_eval.api.model", FEATURE), load_extra("lm_eval.api.registry", FEATURE)
    if NAME in registry.model_registry:
        return registry.get_model(NAME)

    class SoftPromptLM(PromptModel, models.LM):
        """`PromptModel` as a model of the harness, made from the arguments of `load_model`."""

        def __init__(self, **arguments: Value):
            models.LM.__init__(self)
            known = inspect.signature(load_model).parameters
            for name in arguments:
                if name not in known:
                    raise ConfigError(f"the model spt_jax has no argument {name!r}; {did_you_mean(name, known)}")
            self.__dict__.update(load_model(**arguments).__dict__)  # type: ignore[arg-type]

    registry.register_model(NAME)(SoftPromptLM)
    return SoftPromptLM
