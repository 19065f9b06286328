"""`--to neutral` from a GGUF file: the model that was written, quantised weights as `gguf` dequantises them; the rest is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import gguf_import, gguf_vocabulary
from convert.cli import main
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.errors import CheckpointError
from smedjan_common.tokenizer import Tokenizer
from tests.unit.convert_models import LINEAR, LLAMA3, TEXT, YARN, convert, model_config, neutral, parameters, tokenizer
from tests.unit.llama_cpp import llama_cpp

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "yarn": YARN,
    "linear": LINEAR,
    "llama3": LLAMA3 | {"dim": 64},
    "untied, biases": {"tied_head": False, "qkv_bias": True, "o_bias": True, "head_size": 16},
    "qwen2": {"tied_head": False, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_size": 16},
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_comes_back_as_the_model_that_was_written(tmp_path: Path, kind: str):
    tok = tokenizer("cl100k-digits1" if kind.startswith("qwen") else "cl100k")
    config = model_config(tok.vocab_size, **MODELS[kind])
    source = neutral(tmp_path / "run", config, parameters(config), tok)
    convert(source, tmp_path / "m.gguf", "--to", "gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", "--to", "neutral")
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "back")
    kept = {key: value for key, value in before.model.to_dict().items() if key != "init_std"}
    assert {key: value for key, value in after.model.to_dict().items() if key != "init_std"} == kept
    for name, value in before.snapshot.params.items():
        if value.ndim == 2 and "vocab" not in name:
            assert np.array_equal(after.snapshot.params[name][: len(value)], value), name
        else:
            assert np.array_equal(after.snapshot.params[name], value), name
    found = Tokenizer.load(tmp_path / "back")
    assert [found.encode(text) for text in (TEXT, "12345", " \n x")] == [tok.encode(text) for text in (TEXT, "12345", " \n x")]
    assert (found.eot_id, found.bos_id) == (tok.eot_id, None)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_what_the_package_dequantises(tmp_path: Path, kind: str):
    """A file of each type, made by the gguf package itself, and the note that something was rounded away."""
    tok = tokenizer()
    config = model_config(tok.vocab_size, dim=64)
    source = neutral(tmp_path / "run", config, parameters(config), tok)
    convert(source, tmp_path / "whole.gguf", "--to", "gguf")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    number = gguf.GGMLQuantizationType[kind]
    expected = {}
    for tensor in reader.tensors:
        data = np.asarray(tensor.data, np.float32)
        if data.ndim == 2:
            raw = gguf.quantize(data, number)
            expected[tensor.name] = gguf.dequantize(raw, number)
            writer.add_tensor(tensor.name, raw, raw_dtype=number)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = gguf_import.read(tmp_path / "m.gguf")
    assert np.array_equal(model.tensors["layers.1.ffn.up_proj.weight"].read(), expected["blk.1.ffn_up.weight"])
    assert np.array_equal(model.tensors["embed.weight"].read()[: tok.vocab_size], expected["token_embd.weight"])
    assert any("were quantised" in note for note in model.notes) == (kind not in ("F16", "BF16"))


def changed(path: Path, target: Path, key: str, value: Any) -> None:
    """The file with one field changed, written anew."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, value if key == "general.architecture" else architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kinds = field.types
        writer.add_key_value(name, value if name == key else field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    if key not in reader.fields:
        writer.add_uint32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("split", gguf_vocabulary.DIGITS)
def test_digits_are_split_one_by_one_as_llama_cpp_splits_them(tmp_path: Path, split: str):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: foreign)")
    convert(neutral(tmp_path / "run", tok=(plain := tokenizer("gpt2"))), tmp_path / "whole.gguf", "--to", "gguf")
    changed(tmp_path / "whole.gguf", tmp_path / "m.gguf", "tokenizer.ggml.pre", split)
    found = gguf_import.read(tmp_path / "m.gguf").tokenizer
    texts = [TEXT, "12345  678", "a1b 22\n\n  3\t4", "x  9", " 0", "l'été 1592… 🔥7"]
    asked = {"texts": texts, "prefixes": [], "prompt": [1], "tokens": 1, "size": plain.vocab_size}
    theirs = llama_cpp(tmp_path / "m.gguf", **asked)[0]
    assert found is not None
    assert [found.encode(text) for text in texts] == theirs
    assert theirs != [plain.encode(text) for text in texts]


def test_the_window_of_a_phi3_is_in_all_layers(tmp_path: Path):
    config = model_config(tokenizer().vocab_size, rope_dim=4)
    convert(neutral(tmp_path / "run", config, parameters(config)), tmp_path / "whole.gguf", "--to", "gguf")
    changed(tmp_path / "whole.gguf", tmp_path / "m.gguf", "phi3.attention.sliding_window", 32)
    assert gguf_import.read(tmp_path / "m.gguf").config.window == 32


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "gemma", "architecture 'gemma'"),
        ("tokenizer.ggml.pre", "deepseek-llm", "pattern 'deepseek-llm'"),
        ("tokenizer.ggml.model", "bert", "kind 'bert'"),
        ("llama.rope.scaling.type", "longrope", "'longrope'"),
        ("llama.rope.dimension_count", 4, "turns 4 of 8"),
        ("llama.attention.sliding_window", 32, "sliding window of 32"),
        ("llama.feed_forward_length", 72, "has shape"),
        ("llama.rope.freq_base", 0.0, "freq_base 0"),
        ("llama.block_count", 3, "lacks the tensor blk.2."),
        ("llama.block_count", 1, "has a tensor 'blk.1."),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture, key: str, value: Any, words: str):
    convert(neutral(tmp_path / "run"), tmp_path / "whole.gguf", "--to", "gguf")
    changed(tmp_path / "whole.gguf", tmp_path / "m.gguf", key, value)
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--to", "neutral"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tokens", value) for value in (3, "abc", [1, 2])),
        *(("token_type", value) for value in (1, ["a"])),
        *(("merges", value) for value in (1, "a b", [1])),
        *((name, [1]) for name in ("pre", "eos_token_id", "bos_token_id")),
        ("scores", ["a"]),
    ],
)
def test_a_value_of_the_tokenizer_of_another_kind_is_told(key: str, value: Any):
    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]}
    with pytest.raises(CheckpointError, match=f"tokenizer.ggml.{key} "):
        gguf_vocabulary.read(values | {f"tokenizer.ggml.{key}": value}, "m.gguf")


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    convert(neutral(tmp_path / "run"), tmp_path / "m.gguf", "--to", "gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (4, 30, 400, len(whole) // 2):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        assert main([str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--to", "neutral"]) == 2
        assert "Traceback" not in capsys.readouterr().err
