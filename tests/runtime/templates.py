"""Chat templates of the kinds that vision-language checkpoints carry, and a tokenizer for them."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SCENES = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAVA = """\
{% for message in messages %}
    {% if message['role'] != 'system' %}
        {{ message['role'].upper() + ': '}}
    {% endif %}
    {# pictures come first #}
    {% for content in message['content'] | selectattr('type', 'equalto', 'image') %}
        {{ '<image>\n' }}
    {% endfor %}
    {% if message['role'] != 'assistant' %}
        {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}
            {{ content['text'] + ' '}}
        {% endfor %}
    {% else %}
        {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}
            {{ content['text'] + ' ' }}
        {% endfor %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{ 'ASSISTANT:' }}
{% endif %}
"""
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Loops with break, slices, macros, filters and methods, as tool-calling templates have them.
ELABORATE = """\
{{- bos_token -}}
{%- macro part(content) -%}
  {%- if content is string -%}{{ content | trim }}
  {%- else -%}
    {%- for item in content -%}
      {%- if item.type == 'image' -%}<image>
      {%- elif item.type == 'text' -%}{{ item.text }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system, rest = messages[0]['content'], messages[1:] -%}
  <<SYS>>{{ part(system) }}<</SYS>>
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{%- set ns = namespace(turn=0, last='') -%}
{%- for message in rest -%}
  {%- if message.role not in ['user', 'assistant'] -%}
    {{- raise_exception('only user and assistant take turns, got ' ~ message.role) -}}
  {%- endif -%}
  {%- set ns.turn = ns.turn + 1 -%}
  {{- '[%s]' | format(message.role) if false else '[' ~ message.role ~ ' ' ~ ns.turn ~ ']' }}
  {{- part(message.content) }}{{ eos_token if message.role == 'assistant' and not loop.last }}
{%- endfor -%}
{{- messages | map(attribute='role') | list | tojson }}
{{- {'a': 1.5, 'b': none, 'c': "<&'é>"} | tojson }}
{%- for number in range(9) -%}
  {%- if number == 2 -%}{%- continue -%}{%- endif -%}{%- if number > 3 -%}{%- break -%}{%- endif -%}
  {{- number -}}
{%- endfor -%}
{{- 'x y'.split(' ')[::-1] | join('|') }}
{{- 7 // 2 }}{{ 7 % 4 }}{{ 1 / 2 }}{{ true }}{{ none is none }}
{%- if add_generation_prompt %}[assistant]{% endif %}
"""

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]


def byte_level(*, bos: bool = False) -> Tokenizer:
    """A small byte-level BPE tokenizer; with `bos` it opens every text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is in the picture? a cat\n\n on the mat."] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    if bos:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", number)]
        )
    return tokenizer
