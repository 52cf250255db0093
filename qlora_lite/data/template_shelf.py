"""Chat templates for bases that have none, by the names that `data.template` takes."""

from dataclasses import dataclass

# the system message in front of the first question
_WITH_SYSTEM = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set turns = messages[1:] if system is not none else messages %}"
)
_REFUSES_OTHERS = (
    "{% else %}{{ raise_exception('this template has no role ' + message.role) }}{% endif %}"
)


@dataclass(frozen=True)
class Known:
    """A template of the shelf, and the tokens that it needs."""

    source: str | None
    """None: the plain template."""
    tokens: tuple[str, ...] = ()
    is_text: bool = False
    """It has a BOS only if the tokenizer puts one in front of a text."""


SHELF = {
    "chatml": Known(
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Known(
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": Known(
        "{{ bos_token }}" + _WITH_SYSTEM + "{% for message in turns %}"
        "{% if message.role == 'assistant' %}<start_of_turn>model\n"
        "{% elif message.role == 'user' %}<start_of_turn>user\n"
        "{% if loop.first and system %}{{ system | trim }}\n\n{% endif %}"
        + _REFUSES_OTHERS
        + "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": Known(
        _WITH_SYSTEM + "{% for message in turns %}"
        "{% if message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
        "{% elif message.role == 'user' %}[INST] "
        "{% if loop.first and system %}{{ system | trim }}\n\n{% endif %}"
        "{{ message.content | trim }} [/INST]" + _REFUSES_OTHERS + "{% endfor %}",
        is_text=True,
    ),
    "alpaca": Known(
        _WITH_SYSTEM + "{{ system if system else 'Below is an instruction that "
        "describes a task. Write a response that appropriately completes the request.' }}\n\n"
        "{% for message in turns %}"
        "{% if message.role == 'assistant' %}{{ message.content | trim }}{{ eos_token }}\n\n"
        "{% elif message.role == 'user' %}### Instruction:\n{{ message.content | trim }}\n\n"
        "### Response:\n" + _REFUSES_OTHERS + "{% endfor %}",
        is_text=True,
    ),
    "plain": Known(None),
}
