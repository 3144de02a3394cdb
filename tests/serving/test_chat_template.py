"""Chat templates: what transformers renders, where they are found, and what they cannot do."""

import json
from pathlib import Path
from typing import Any

import pytest

from statespan.errors import CheckpointError, UserError
from statespan.serving.chat_template import PLAIN, ChatTemplate, TemplateFailed, find_chat_template

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße, 世界"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
    ]},
    {"role": "tool", "content": "3", "tool_call_id": "1"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<sum>", "parameters": {"type": "object"}}}]

# In the manner of Qwen's and Jamba's: tools, loops with breaks, whitespace control, generation marks, JSON.
TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- if tools %}
    {{- "# Tools\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for message in rest %}
    {%- if message.role == 'assistant' %}
        {% generation %}
        {%- for call in message.tool_calls %}
            {%- set value = {"name": call.function.name, "arguments": call.function.arguments} %}
            {{- "<tool_call>" ~ value | tojson ~ "</tool_call>" }}
        {%- endfor %}
        {{- message.content + eos_token }}
        {% endgeneration %}
    {%- elif message.role == 'stop' %}
        {%- break %}
    {%- else %}
[{{ message.role | upper }}] {{ message.content | trim }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}[ASSISTANT]{% endif %}{{ style | default('') }}
"""


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    mine = ChatTemplate(TEMPLATE, tokens=tokens).render(
        MESSAGES, tools=tools, add_generation_prompt=add_generation_prompt, variables={"style": "!", "bos_token": "no"}
    )
    theirs, _ = render_jinja_template(
        conversations=[MESSAGES],
        tools=tools,
        chat_template=TEMPLATE,
        add_generation_prompt=add_generation_prompt,
        style="!",
        **tokens,
    )
    assert mine == theirs[0]
    assert "世界" in mine and "<brief> & kind." not in mine and "<tool_call>" in mine


def test_plain_template_of_base_models() -> None:
    text = ChatTemplate(PLAIN).render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    assert text == "User: Hi\n\nAssistant: Ho\n\nAssistant:"


def test_a_template_reaches_nothing_of_python() -> None:
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ):
        with pytest.raises(TemplateFailed):
            ChatTemplate(attack).render([{"role": "user", "content": "x"}])


def test_messages_are_data_and_no_template() -> None:
    text = ChatTemplate(PLAIN).render([{"role": "user", "content": "{{ 7 * 7 }}{% raise %}"}])
    assert "{{ 7 * 7 }}{% raise %}" in text


def test_a_templates_refusal_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        template.render([])


def test_no_jinja_is_told() -> None:
    with pytest.raises(UserError, match="no Jinja"):
        ChatTemplate("{% for %}")


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def rendered(template: ChatTemplate | None, **options: Any) -> str:
    assert template is not None
    return template.render([{"role": "user", "content": "x"}], **options)


def test_found_in_the_settings_with_their_tokens(tmp_path: Path) -> None:
    settings = {
        "chat_template": "{{ bos_token }}A{{ eos_token }}",
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
    }
    assert rendered(find_chat_template(write(tmp_path, tokenizer_config_json=settings))) == "<s>A</s>"


def test_one_for_tools_among_several(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    template = find_chat_template(write(tmp_path, tokenizer_config_json={"chat_template": named}))
    assert rendered(template) == "plain"
    assert rendered(template, tools=TOOLS) == "with tools"


def test_the_file_comes_before_the_settings(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config_json={"chat_template": "settings"}, chat_template_jinja="file")
    assert rendered(find_chat_template(tmp_path)) == "file"
    write(tmp_path, additional_chat_templates__tool_use_jinja="tools")
    assert rendered(find_chat_template(tmp_path), tools=TOOLS) == "tools"
    (tmp_path / "own.jinja").write_text("own")
    assert rendered(find_chat_template(tmp_path, str(tmp_path / "own.jinja"))) == "own"
    assert rendered(find_chat_template(tmp_path, "plain")).startswith("User: x")


def test_a_checkpoint_without_one(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    assert find_chat_template(write(tmp_path, tokenizer_config_json={})) is None


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_chat_template(tmp_path, str(tmp_path / "missing.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        find_chat_template(tmp_path)
