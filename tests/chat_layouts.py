"""Chat templates in the layouts of public model families, and tokenizers with their control tokens.

The templates are written for these tests. What they have in common with the families' own is where texts, blanks and
control tokens stand, which filters the contents go through, and how the tokenizer's added tokens are declared.
"""

import dataclasses
from typing import Any

import tokenizers

from spt_jax.testing import TokenizerKind, tiny_tokenizer


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family's chat.

    template: Jinja.
    controls: its control tokens, added as special ones. Only BOS and EOS are named in the tokenizer's config.
    end: what ends an assistant's turn; None where no control token does.
    kind: of the tokenizer.
    plain: added tokens that are not special.
    rstrip: control tokens take the blanks after them with them.
    bos, eos: names among the controls, or the tokenizer's own.
    """

    template: str
    controls: tuple[str, ...]
    end: str | None
    kind: TokenizerKind = "byte"
    plain: tuple[str, ...] = ()
    rstrip: bool = False
    bos: str | None = None
    eos: str | None = None

    def tokenizer(self) -> Any:
        tokenizer = tiny_tokenizer(self.kind, add_bos=False)
        added = [
            tokenizers.AddedToken(name, rstrip=self.rstrip, special=True, normalized=False) for name in self.controls
        ]
        tokenizer.add_tokens(added)
        for name, value in (("bos_token", self.bos), ("eos_token", self.eos)):
            if value is not None:
                setattr(tokenizer, name, value)
        tokenizer.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in self.plain])
        tokenizer.chat_template = self.template
        return tokenizer


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LAYOUTS = {
    "gemma": Layout(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}"
        "{% endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        kind="sentencepiece",
    ),
    "llama2": Layout(
        "{% if messages[0].role == 'system' %}{% set told = messages[0].content %}{% set said = messages[1:] %}"
        "{% else %}{% set said = messages %}{% endif %}{% for m in said %}{% set text = m.content %}"
        "{% if loop.first and told is defined %}"
        "{% set text = '<<SYS>>\n' + told + '\n<</SYS>>\n\n' + text %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        (),
        "</s>",
        kind="sentencepiece",
    ),
    "llama3": Layout(
        "{% for m in messages %}"
        "{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
        " + '<|eot_id|>' %}{{ (bos_token if loop.first else '') + text }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    ),
    "qwen2": Layout(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}" + _CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "qwen3": Layout(
        "{% set ns = namespace(asked=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set text = m.content %}{% set why = m.reasoning_content or '' %}"
        "{% if m.role == 'assistant' and '</think>' in text %}"
        "{% set why = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or why) %}"
        "{{ '<think>\n' + why + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
    ),
    "mistral": Layout(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        (),
        "</s>",
        kind="sentencepiece",
    ),
    "mistral-v3": Layout(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        "</s>",
        kind="sentencepiece",
    ),
    "phi3": Layout(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
        kind="sentencepiece",
        rstrip=True,
        eos="<|endoftext|>",
    ),
    "zephyr": Layout(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        (),
        "</s>",
        kind="sentencepiece",
    ),
    "smollm3": Layout(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "olmo": Layout(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}",
        (),
        "<eos>",
    ),
    "command-r": Layout(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
        "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role] }}"
        "{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Layout(
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}"
        "{{ m.content + '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        eos="<|end_of_text|>",
    ),
    "deepseek": Layout(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
        "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        (),
        "<eos>",
    ),
    # No control token ends a turn.
    "solar": Layout(
        "{% for m in messages %}{{ '### ' + m.role | capitalize + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
        (),
        None,
    ),
}
