"""The model, the tokenizer and the conversations that TRL and smedjan are given, made of nothing but their definition."""

import numpy as np

from smedjan_common.config import ModelConfig
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import IM_END, IM_START
from smedjan_common.tokenizer.growing import grown

TALKS = [  # answers of quite different lengths: a mean of means would be another figure
    [("user", "What is tin?"), ("assistant", "A metal.")],
    [("system", "You are a smith."), ("user", "Who is there?"), ("assistant", "A smith with three anvils and a dog that sleeps all day.")],
    [("user", "One?"), ("assistant", "1"), ("user", "Two, and say it in words, please."), ("assistant", "It is two.")],
    [("user", "What does the smith do with the iron when it is red, and why?"), ("assistant", "He strikes it: it is soft.")],
]
MESSAGES = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]
# ChatML with what is trained between the markers of transformers: the answer and the token that ends it
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)
MODEL = ModelConfig(vocab_size=320, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, context_length=128, init_std=0.15)


def tokenizer() -> Tokenizer:
    """Of as many tokens as the model: its head has no rows that only pad it, as transformers has none."""
    said = [content for talk in TALKS for _, content in talk]
    made = grown(Tokenizer.train_from_texts(said * 2, MODEL.vocab_size - 2), (IM_START, IM_END))
    assert made.vocab_size == MODEL.vocab_size == MODEL.padded_vocab_size, made.vocab_size
    return made


def params() -> dict[str, np.ndarray]:
    return initial_params(MODEL, 7)
