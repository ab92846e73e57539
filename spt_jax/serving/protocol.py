"""Request and response bodies: OpenAI's completions and chat completions, and additions for a bank of prompts.

A field that the server does not support is refused, unless its value has no effect.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StringConstraints,
    model_validator,
)

from spt_jax.inference.decoding import ALTERNATIVES

MAX_TEXTS = 64
MAX_FIELDS = 100

# Valid file names on all systems, neither hidden nor a path.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

Zero = Annotated[float, Field(ge=0, le=0)]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is not a character") from error
    return text


def _few_keys(given: Any) -> Any:
    """Refuses a mapping with too many keys, before each key can become an error of its own."""
    if isinstance(given, dict) and len(given) > MAX_FIELDS:
        raise ValueError(f"{len(given)} keys; at most {MAX_FIELDS} are allowed")
    return given


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[Text, StringConstraints(max_length=200)]
Fields = Annotated[dict[Text, Text], BeforeValidator(_few_keys)]
# Validation of a list stops at its first error; one error per item could be very many.
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
Nothing = Annotated[list[None], Field(max_length=0, fail_fast=True)]
Stop = Annotated[Text, StringConstraints(min_length=1, max_length=200)]


class Strict(BaseModel):
    """A body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Treats a null field as one that was not given."""
        given = _few_keys(given)
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Strict):
    include_usage: bool = False


class Sampled(Strict):
    """Sampling parameters. `top_k` is an addition to OpenAI's API.

    Attributes:
      seed: requests with the same seed get the same answer; without a seed, answers differ.
    """

    model: Name
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    n: int = Field(1, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**32)
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few_keys), Field(max_length=0)] | None = None
    user: Text | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampled):
    """The body of a request to /v1/completions.

    Attributes:
      prompt: texts or token ids. Token ids replace the text in a template; for the bare base they are the whole prompt.
      fields: an addition to OpenAI's API: the record for a template with several fields.
      max_tokens: 0 is allowed with `echo`, which puts the prompt and its log-probabilities before the answer.
    """

    prompt: Text | Texts | TokenIds | ManyTokenIds | None = None
    fields: Fields | None = None
    max_tokens: int = Field(16, ge=0, lt=2**31)
    logprobs: Annotated[int, Field(ge=0, le=ALTERNATIVES)] | None = None
    best_of: Literal[1] | None = None
    echo: bool = False
    suffix: Literal[""] | None = None

    @property
    def texts(self) -> Sequence[str | list[int]] | None:
        """The prompts as a list."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class TextFormat(Strict):
    type: Literal["text"]


class Message(Strict):
    """A turn of a chat. Fields that clients add without effect are accepted and ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    type: Literal["text", "message"] | None = None
    refusal: Literal[""] | None = None
    annotations: Nothing | None = None
    tool_calls: Nothing | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """The body of a request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int = Field(0, ge=0, le=ALTERNATIVES)


class ClassifyRequest(Strict):
    """The body of a request to /v1/classify: texts for a template with one field, or records."""

    model: Name
    input: Text | Annotated[list[Text | Fields], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]


class AddPrompt(Strict):
    """The body of a request to /v1/prompts: the name of a directory in the server's directory of prompts."""

    name: str = Field(pattern=NAME)


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """A response of /v1/completions.

    Attributes:
      note: an addition to OpenAI's API: that the texts are classes.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    note: str | None = None


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    note: str | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    note: str | None = None


class Classified(BaseModel):
    """The likeliest class of a text.

    Attributes:
      log_probabilities: of each class's verbalizer as a continuation, or of each class of a head, as in evaluation.
      probabilities: the same, normalized over the classes.
    """

    index: int
    label: str
    log_probabilities: dict[str, float]
    probabilities: dict[str, float]


class Classification(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Classified]


class Model(BaseModel):
    """The base or a prompt, as listed by /v1/models.

    Attributes:
      template: the template of its prompt, with virtual tokens as <soft>.
      fields: the fields that its template reads.
      classes: the classes that it distinguishes.
      bytes: size of the trained arrays.
      examples: records to try, from examples.json of its directory.
      generates: whether it can generate text.
      classifies: whether it can classify texts.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["spt_jax"] = "spt_jax"
    kind: Literal["base", "prompt"]
    template: str
    fields: list[str]
    classes: list[str]
    examples: list[dict[str, str]]
    virtual_tokens: int
    bytes: int
    generates: bool
    classifies: bool


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Deleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class Health(BaseModel):
    """The state of the server.

    Attributes:
      compiling: how many programs are being compiled, which answers may wait for.
    """

    status: Literal["ok"] = "ok"
    compiling: int = 0
