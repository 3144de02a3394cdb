"""Chat templates of checkpoints: Jinja, rendered in a sandbox, as transformers renders them."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from statespan.errors import CheckpointError, UserError, first_line

# For models without a template: plain text that a base model can go on with.
PLAIN = (
    "{% if tools %}Functions: {{ tools | tojson }}\n"
    'Call one by <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>\n\n{% endif %}'
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEMPLATE, SETTINGS, ADDITIONAL = "chat_template.jinja", "tokenizer_config.json", "additional_chat_templates"
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TemplateFailed(UserError):
    """The template refuses these messages, or fails at them; the message says how."""


class ChatTemplate:
    """Turns messages into the text that the model continues.

    Args:
        source: Jinja, with the names that transformers gives templates: messages, tools, add_generation_prompt,
            bos_token and so on, raise_exception, strftime_now, and the filter tojson.
        tool_source: another one for requests with tools; None: the same.
        tokens: values of bos_token, eos_token and so on.

    Raises:
        UserError: it is no Jinja template, or jinja2 is not installed.

    Example:
        >>> ChatTemplate(PLAIN).render([{"role": "user", "content": "Hello"}])
        'User: Hello\\n\\nAssistant:'
    """

    def __init__(self, source: str, *, tool_source: str | None = None, tokens: Mapping[str, str] | None = None) -> None:
        try:
            import jinja2  # only chats need it
        except ImportError:
            raise UserError("chat templates need jinja2: pip install 'statespan[serve]'") from None
        self.source = source
        self.tool_source = source if tool_source is None else tool_source
        self._tokens = dict(tokens or {})
        environment = _environment()
        try:
            self._plain, self._with_tools = (environment.from_string(text) for text in (source, self.tool_source))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is no Jinja: {first_line(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, with the beginning of the reply.

        Args:
            messages: each with role and content, a text; arguments of tool calls are objects.
            tools: in OpenAI's form.
            add_generation_prompt: end with what begins a reply.
            variables: further ones that the template may ask for; those above come first.

        Raises:
            TemplateFailed: the template refuses them.
        """
        template = self._with_tools if tools else self._plain
        given = {**(variables or {}), **self._tokens, "messages": list(messages), "tools": tools or None}
        try:
            return template.render(given | {"documents": None, "add_generation_prompt": add_generation_prompt})
        except Exception as error:  # a template is a program: it may fail in every way, and the messages are why
            raise TemplateFailed(f"the chat template cannot take these messages: {first_line(error)}") from None


def find_chat_template(directory: Path, choice: str | None = None) -> ChatTemplate | None:
    """The template of a checkpoint: `choice`, its chat_template.jinja, or that of its tokenizer_config.json.

    Args:
        directory: of the checkpoint.
        choice: a Jinja file to use instead, or "plain" for one that labels each message with its role.

    Returns:
        None where the checkpoint has none.

    Raises:
        CheckpointError: a file cannot be read.
        UserError: it is no template.
    """
    settings = _settings(directory)
    tokens = {name: text for name in TOKENS if (text := _token_text(settings.get(name))) is not None}
    if choice is not None:
        return ChatTemplate(PLAIN if choice == "plain" else _read(Path(choice)), tokens=tokens)
    named = _named_templates(directory, settings)
    source = named.get("default")
    return None if source is None else ChatTemplate(source, tool_source=named.get("tool_use"), tokens=tokens)


def _named_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name; files come before the settings, as in transformers."""
    entry = settings.get("chat_template")
    if isinstance(entry, str):
        entry = [{"name": "default", "template": entry}]
    named: dict[str, str] = {}
    for item in entry if isinstance(entry, list) else []:
        if isinstance(item, Mapping) and isinstance(item.get("template"), str):
            named[str(item.get("name"))] = item["template"]
    if (directory / TEMPLATE).exists():
        named["default"] = _read(directory / TEMPLATE)
    return named | {file.stem: _read(file) for file in sorted((directory / ADDITIONAL).glob("*.jinja"))}


def _settings(directory: Path) -> Mapping[str, Any]:
    file = directory / SETTINGS
    if not file.exists():
        return {}
    try:
        settings = json.loads(_read(file))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {first_line(error)}") from None
    return settings if isinstance(settings, Mapping) else {}


def _token_text(token: object) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from None


def _environment() -> Any:
    """Jinja as transformers sets it up: no access to Python's inside, and the messages cannot be changed."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says, for training; here it is nothing."""

        tags = {"generation"}  # noqa: RUF012 - the name and form that Jinja asks for

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Without Jinja's escapes for HTML, which models have not seen."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
