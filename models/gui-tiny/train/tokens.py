# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and chat template: Qwen2.5-VL's special tokens over a small byte-level BPE."""

import itertools

from screens import COLOR_NAMES, SHAPES, VERBS, WORDS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BYTE_PAIRS = 500
"""Most entries that byte-pair encoding makes."""
VOCABULARY_SIZE = 512
"""Rows of the embedding; the last few are spare."""
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Constant parts of every answer are one token each: eight decoding steps less per click.
ANSWER_START, ANSWER_END = "Action: click(start_box='(", ")')"
DONE = " is done, next "
"""Behind it an answer says what comes next."""
PHRASES = (
    *("Thought: ", DONE, "Do: ", " what is", " where", " was", " new"),
    *(" left of", " right of", " above", " below"),
)
"""Of questions about relations and trajectories, and of the thoughts that answer them: one token each."""
SYSTEM_PROMPT = "You are a GUI agent."

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a GUI agent.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or part['type'] == 'image_url' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def _corpus() -> list[str]:
    names = [f"the {color} {shape}" for color in COLOR_NAMES for shape in SHAPES] + [
        f"'{word}'" for word in WORDS
    ]
    questions = [f"{verb} {name}." for verb, name in itertools.product(VERBS, names)]
    answers = [
        f"{ANSWER_START}{x},{y}{ANSWER_END}" for x, y in itertools.product(range(0, 448, 16), repeat=2)
    ]
    frame = [f"system\n{SYSTEM_PROMPT}\nuser\nassistant\n"] * 200
    return questions * 3 + answers + frame


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; deterministic, a second or two."""
    tokenizer = Tokenizer(models.BPE())
    # Digits stay single, so that a coordinate is read and written digit by digit.
    words = Regex(r"\('?\(?|'?,|\)'?\)?| ?'| ?[A-Za-z_]+|\s|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_PAIRS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.add_tokens([ANSWER_START, ANSWER_END, *PHRASES])
    return fast
