"""What clients send: OpenAI's fields and a few of our own. What is unknown or not supported is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    """A JSON object with these fields and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted and ignored


class SamplingBody(Body):
    """How to generate. Null is as good as absent, as in OpenAI's API."""

    model: Name
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted and ignored.
    user: Name | None = None
    # Ours, under the names that other open servers use.
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None  # larger first
    deadline_s: Annotated[float, Field(gt=0, le=86400)] | None = None  # the reply ends with "deadline" by then
    return_token_ids: bool | None = None  # choices carry token_ids, and prompt_token_ids once

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream: true")
        return self


class JsonSchema(Body):
    name: Name
    schema_: Annotated[dict[str, JsonValue] | bool, Field(alias="schema")] = True
    description: str | None = None
    strict: bool | None = None  # every schema is kept to strictly


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and that needs it")
        return self


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None  # samples, of which the likeliest n are given
    suffix: str | None = None  # only an empty one
    response_format: ResponseFormat | None = None  # ours, here

    @model_validator(mode="after")
    def _what_is_asked_for_can_be(self) -> "CompletionBody":
        if self.suffix:
            raise ValueError("suffix is not supported: the model writes forward only")
        if self.num_samples < (self.n or 1):
            raise ValueError("best_of must be n or more")
        if self.stream and self.num_samples > (self.n or 1):
            raise ValueError("best_of beyond n is not supported with stream: true: the best is known at the end")
        return self

    @property
    def num_samples(self) -> int:
        """Of each prompt."""
        return self.best_of or self.n or 1


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str  # JSON of an object


class ToolCall(Body):
    id: Name
    type: Literal["function"]
    function: FunctionCall


class Message(Body):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None  # of assistants' messages sent back; ignored

    @model_validator(mode="after")
    def _content_is_there(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"content of a {self.role} message is missing")
        return self


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # before max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None  # false: one call at most
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    prompt_cache_key: Name | None = None  # a session's name where no X-Session-Id header gives one
    # Accepted and ignored.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_retention: Name | None = None
    reasoning_effort: Name | None = None
    verbosity: Name | None = None
    # Ours.
    chat_template_kwargs: dict[str, JsonValue] | None = None  # further variables of the template
    add_generation_prompt: bool | None = None  # false: the last message is continued as it stands in the template

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs: true")
        return self

    @model_validator(mode="after")
    def _a_call_that_must_come_is_possible(self) -> "ChatBody":
        if not self.must_call:
            return self
        names = [tool.function.name for tool in self.tools or []]
        if not names:
            raise ValueError("tool_choice asks for a call, and there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        if self.response_format is not None and self.response_format.type != "text":
            raise ValueError("response_format and a tool_choice that asks for a call exclude each other")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the reply has to call a function."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class EmbeddingsBody(Body):
    """POST /v1/embeddings."""

    model: Name
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2048)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None  # only the model's own
    user: Name | None = None  # accepted and ignored


class Reply(BaseModel):
    """The least that every reply has, for the description of the API; replies are written as plain JSON."""

    model_config = ConfigDict(extra="allow")

    object: str


class Usage(BaseModel):
    model_config = ConfigDict(extra="allow")

    prompt_tokens: int
    total_tokens: int


class CompletionReply(Reply):
    id: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class EmbeddingsReply(Reply):
    data: list[dict[str, Any]]
    model: str
    usage: Usage


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail
