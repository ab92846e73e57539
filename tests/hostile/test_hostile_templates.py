"""Chat templates: legitimate ones render as transformers renders them, hostile ones end within limits."""

import resource
import threading
import time
from pathlib import Path

import pytest

from spt_jax.data import rendering
from spt_jax.data.rendering import render_chat
from spt_jax.errors import ConfigError
from spt_jax.testing import tiny_tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
LEGITIMATE = {
    "plain": PLAIN,
    "trim": """
        {%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif -%}
        {{ bos_token }}
        {%- for message in messages %}
            {{- '<turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
            {{- message['content'] | trim + '<end>\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}""",
    "namespace": """
        {%- set ns = namespace(last=-1) %}
        {%- for m in messages[::-1] if m.role == 'user' and ns.last < 0 %}
            {%- set ns.last = messages | length - loop.index %}
        {%- endfor %}
        {%- for m in messages %}
            {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
            {{- m.role }}|{{ m.content.split('x')[-1].lstrip('\n') }}|{{ loop.last }}
        {%- endfor %}
        {%- if enable_thinking is defined and not enable_thinking %}{{ 'off' }}{% endif %}{{ tools is none }}""",
    "tools": """
        {%- macro show(value) %}{{ value | tojson(indent=2) }}{% endmacro %}
        {%- if tools %}{{ show(tools) }}{% endif %}
        {%- for m in messages %}
            {%- if m.content is string %}{{ m.content }}{% else %}{{ show(m.tool_calls) }}{% continue %}{% endif %}
        {%- endfor %}{{ dict(a=1) }}{{ '%s' | format('x') }}""",
    "generation": """
        {%- for m in messages %}
            {%- if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
            {%- else %}<u>{{ m.content }}{% endif %}
        {%- endfor %}""",
}
CHAT = [
    {"role": "user", "content": " Ünï<code> 'x' \n"},
    {"role": "assistant", "content": "fine\n", "name": None},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "  yes, x\nso"},
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"é": 1}}]}


@pytest.fixture(scope="module", autouse=True)
def _two_seconds():
    """A process of this module's own, with less time."""
    rendering._worker.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "SECONDS", 2)
        yield
    rendering._worker.close()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("name", LEGITIMATE)
@pytest.mark.parametrize("prompt", [False, True])
def test_rendering_is_that_of_transformers(name, prompt, tokenizer):
    tokenizer.chat_template = LEGITIMATE[name]
    for chat in (CHAT, CHAT[:3], *([[*CHAT, CALL]] if name == "tools" else [])):
        theirs = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        ours, _ = render_chat(tokenizer, chat, add_generation_prompt=prompt)
        assert ours == theirs


def test_what_an_assistant_says_is_the_mask_of_transformers(tokenizer):
    tokenizer.chat_template = LEGITIMATE["generation"]
    text, spoken = render_chat(tokenizer, CHAT)
    assert [text[first:last] for first, last in spoken] == ["fine\n<eos>", "  yes, x\nso<eos>"]
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a < last and b > first for first, last in spoken)) for a, b in encoded["offset_mapping"]]
    assert encoded["input_ids"] == theirs["input_ids"] and mask == theirs["assistant_masks"]
    tokenizer.chat_template = PLAIN
    assert render_chat(tokenizer, CHAT)[1] == []


HOSTILE = {
    "a large string": ("{{ 'a' * 10**10 }}", "memory"),
    "doubled strings": (
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "memory",
    ),
    "doubled lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "memory",
    ),
    "a wide number": ("{{ '%1000000000d' % 1 }}", "memory"),
    "a wide format": ("{{ '{:1000000000}'.format(1) }}", "memory"),
    "much text": ("{{ 'a' * 5000000 }}", "5,000,000 characters"),
    "a macro without end": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recurses too deeply"),
    "its own refusal": ("{{ raise_exception('only users') }}", "only users"),
    "its own long refusal": ("{{ raise_exception('no ' * 10**6) }}", "no no no"),
    "Python's own": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "files": ("{% include '/etc/passwd' %}", "loader"),
    "wrong syntax": ("{% for %}", "(?i)expected"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat template"),
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "stopped after"),
    "a large power": ("{{ (3 ** 10000000) ** 100 % 7 }}", "stopped after|memory"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_and_the_next_chat_is_rendered(name, tokenizer):
    tokenizer.chat_template, message = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message) as raised:
        render_chat(tokenizer, CHAT)
    assert len(str(raised.value)) < 1000
    tokenizer.chat_template = PLAIN
    assert render_chat(tokenizer, CHAT[:1])[0].startswith("user:  Ünï")
    assert time.monotonic() - start < 20


def test_the_process_cannot_take_two_gibibytes(tokenizer):
    tokenizer.chat_template = PLAIN
    render_chat(tokenizer, CHAT)
    process = rendering._worker._process.pid
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    reserved, resident = (int(status[name].split()[0]) << 10 for name in ("VmSize", "VmRSS"))
    assert resource.prlimit(process, resource.RLIMIT_AS)[0] - reserved + resident < 2 << 30


def test_threads_share_the_process_and_get_their_own_answers(tokenizer):
    tokenizer.chat_template = PLAIN
    wrong = []

    def render(number):
        for turn in range(20):
            text, _ = render_chat(tokenizer, [{"role": "user", "content": f"{number} {turn}"}])
            wrong.extend([text] if text != f"user: {number} {turn}<eos>" else [])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_chats_that_are_no_json_and_tokenizers_without_a_template(tokenizer):
    tokenizer.chat_template = PLAIN
    with pytest.raises(ConfigError, match="not JSON serializable"):
        render_chat(tokenizer, [{"role": "user", "content": b"bytes"}])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat_template is not set"):
        render_chat(tokenizer, CHAT)
