"""A chat template stays with its model: through training, through convert in and out, into what transformers and llama.cpp read."""

import json
from pathlib import Path

import pytest

from smedjan_common.checkpoint import read_info
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import ChatML, template_of
from smedjan_common.tokenizer.chat_files import CHATML_JINJA, ChatSource
from tests.fakes.runs import TEXT as RUN_TEXT
from tests.fakes.runs import train_here
from tests.unit.convert_models import TEXT, convert, neutral

SOURCE = ChatSource(
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message.role }}:{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}",
    {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"},
)
TALK = [{"role": "user", "content": "Is it <|end|> hot? é"}]


def made(names: tuple[str, ...], chat: ChatSource | None) -> Tokenizer:
    tokenizer = Tokenizer.train_from_texts([TEXT + RUN_TEXT[:2000]] * 3, 300, special_tokens=("<|endoftext|>", *names))
    tokenizer.chat = chat
    return tokenizer


@pytest.fixture(scope="module")
def foreign() -> Tokenizer:
    return made(("<|begin|>", "<|start|>", "<|end|>"), SOURCE)


def test_a_checkpoint_holds_the_template_and_its_hash(tmp_path, foreign):
    final = neutral(tmp_path, tok=foreign)
    assert (final / "chat_template.jinja").read_text() == SOURCE.template
    assert Tokenizer.load(final).chat == SOURCE
    assert (read_info(final).extra or {})["chat_template_sha256"] == SOURCE.sha256
    assert "chat_template_sha256" not in (read_info(neutral(tmp_path / "base")).extra or {})


def test_a_template_goes_to_hugging_face_and_back(tmp_path, foreign):
    transformers = pytest.importorskip("transformers", reason="the oracle extra has transformers")
    convert(neutral(tmp_path, tok=foreign), tmp_path / "hf", "--to", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = template_of(tmp_path / "final", foreign)
    assert ours is not None
    assert theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False) == ours.render(TALK)
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == ours.stop_ids(foreign) == {foreign.special_tokens[name] for name in ("<|endoftext|>", "<|end|>")}
    convert(tmp_path / "hf", tmp_path / "again", "--to", "neutral")
    back = Tokenizer.load(tmp_path / "again")
    assert back.chat == SOURCE
    assert (template_of(tmp_path / "again", back) or ours).encode(back, TALK) == ours.encode(foreign, TALK)
    convert(tmp_path / "hf", tmp_path / "again", "--to", "neutral", "--force")


def test_chatml_of_our_own_is_written_for_others_and_known_again(tmp_path):
    chatml = made(("<|im_start|>", "<|im_end|>"), None)
    convert(neutral(tmp_path, tok=chatml), tmp_path / "hf", "--to", "hf")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == CHATML_JINJA
    convert(tmp_path / "hf", tmp_path / "again", "--to", "neutral")
    assert isinstance(template_of(tmp_path / "again", Tokenizer.load(tmp_path / "again")), ChatML)


def test_llama_cpp_finds_the_template_and_the_end_of_a_turn(tmp_path, foreign):
    gguf = pytest.importorskip("gguf", reason="the extra gguf has it")
    convert(neutral(tmp_path, tok=foreign), tmp_path / "model.gguf", "--to", "gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: reader.get_field(f"tokenizer.{name}").contents() for name in ("chat_template", "ggml.eot_token_id")}
    assert fields == {"chat_template": SOURCE.template, "ggml.eot_token_id": foreign.special_tokens["<|end|>"]}


def test_training_hands_the_template_on(tmp_path: Path, foreign):
    base = neutral(tmp_path / "base", tok=foreign)
    (tmp_path / "text.txt").write_text(RUN_TEXT[:9000])
    words = ["--dataset", tmp_path / "text.txt", "--checkpoint-dir", tmp_path / "run", "--steps", 2, "--batch-size", 2, "--seq-len", 16]
    assert train_here(*words, "--pretrained", base, "--val-fraction", "0") == 0
    assert Tokenizer.load(tmp_path / "run" / "final").chat == SOURCE
    assert train_here(*words, "--steps", 4, "--val-fraction", "0") == 0
    assert Tokenizer.load(tmp_path / "run" / "final").chat == SOURCE
