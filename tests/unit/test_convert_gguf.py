"""`--to gguf`: read with the gguf reader, and run by llama.cpp where llama-cpp-python is installed."""

import dataclasses
import io
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import gguf_file, gguf_layouts, gguf_tokenizer
from convert.cli import main
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.model import rope
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.patterns import PATTERNS
from tests.unit.convert_models import (
    LINEAR,
    LLAMA3,
    NTK,
    YARN,
    convert,
    model_config,
    neutral,
    parameters,
    tokenizer,
)
from tests.unit.llama_cpp import agrees

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
ROOT = Path(__file__).parents[2]


def export(folder: Path, *flags: str, **changes: Any) -> tuple[Path, Any]:
    """A neutral checkpoint of a tiny model, and the reader over its GGUF file."""
    source = neutral(folder, model_config(tokenizer().vocab_size, **changes))
    convert(source, folder / "model.gguf", "--to", "gguf", *flags)
    return source, gguf.GGUFReader(folder / "model.gguf")


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def turned(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """llama.cpp's rotary embedding of one head, [K]: neighbours (2j, 2j + 1) turn by position * base^(-2j/K)."""
    angle = position * base ** (-np.arange(0, len(x), 2) / len(x))
    even, odd = x[0::2], x[1::2]
    out = np.empty_like(x)
    out[0::2], out[1::2] = even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)
    return out


def test_hyper_parameters_and_tokenizer_are_inside(tmp_path: Path):
    _, reader = export(tmp_path, **YARN)
    tok = tokenizer()
    expected = {
        "general.architecture": "llama",
        "llama.vocab_size": tok.vocab_size,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tok.eot_id,
    }
    assert {name: field(reader, name) for name in expected} == expected
    assert field(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == tok.vocab_size
    assert (tokens[tok.eot_id], types[tok.eot_id]) == ("<|endoftext|>", gguf.TokenType.CONTROL)
    assert types.count(gguf.TokenType.NORMAL) == tok.vocab_size - 1
    assert tokens[tok.encode(" the")[0]].startswith("Ġ")
    assert len(field(reader, "tokenizer.ggml.merges")) == len(tok.vocabulary.merges)


def test_ntk_is_written_as_the_base_it_comes_to(tmp_path: Path):
    source, reader = export(tmp_path, **NTK)
    base = field(reader, "llama.rope.freq_base")
    assert field(reader, "llama.rope.scaling.type") == "none"
    assert np.allclose(base ** (-np.arange(0, 8, 2) / 8), rope.frequencies(read_checkpoint(source).model), rtol=1e-6)


def test_scores_are_the_same_with_the_rotary_embedding_of_llama_cpp(tmp_path: Path):
    """q k^T of every head after turning neighbours, against smedjan's halves: the order of the rows is right."""
    source, reader = export(tmp_path)
    checkpoint = read_checkpoint(source)
    params, heads, kv_heads, size = checkpoint.snapshot.params, 4, 2, 8
    stored = {tensor.name: tensor.data.reshape(tuple(tensor.shape)[::-1]) for tensor in reader.tensors}
    rng = np.random.default_rng(0)
    x, y, near, far = rng.standard_normal(32), rng.standard_normal(32), 3, 11
    cos, sin = rope.tables(checkpoint.model, 16)

    def halves(vector: np.ndarray, position: int) -> np.ndarray:
        low, high, c, s = vector[: size // 2], vector[size // 2 :], cos[position], sin[position]
        return np.concatenate([low * c - high * s, high * c + low * s])

    for head in range(heads):
        group = head // (heads // kv_heads)
        theirs_q = (stored["blk.1.attn_q.weight"] @ x).reshape(heads, size)[head]
        theirs_k = (stored["blk.1.attn_k.weight"] @ y).reshape(kv_heads, size)[group]
        ours_q = (params["layers.1.mixer.q_proj.weight"] @ x).reshape(heads, size)[head]
        ours_k = (params["layers.1.mixer.k_proj.weight"] @ y).reshape(kv_heads, size)[group]
        score = turned(theirs_q, far, 1e4) @ turned(theirs_k, near, 1e4)
        assert score == pytest.approx(halves(ours_q, far) @ halves(ours_k, near), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0"])
def test_weights_are_those_of_the_checkpoint_in_every_dtype(tmp_path: Path, dtype: str):
    source, reader = export(tmp_path, "--dtype", dtype)
    params = read_checkpoint(source).snapshot.params
    params["layers.0.mixer.q_proj.weight"] = params["layers.0.mixer.q_proj.weight"][gguf_layouts.neighbours(4, 8)]
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 2 + 9 * 2
    for name, ours, rows in (
        ("token_embd.weight", "embed.weight", tokenizer().vocab_size),
        ("blk.0.attn_q.weight", "layers.0.mixer.q_proj.weight", 32),
        ("blk.1.ffn_down.weight", "layers.1.ffn.down_proj.weight", 32),
        ("output_norm.weight", "norm.weight", 32),
    ):
        tensor, expected = found[name], params[ours][:rows]
        assert tensor.tensor_type.name == (kinds[dtype] if expected.ndim > 1 else "F32")
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        if expected.ndim == 1 or dtype == "float32":
            assert np.array_equal(values, expected)
        elif dtype == "q8_0":  # half a step, a step being 1/127 of the largest of 32; and a step is rounded to float16: 127 * 2^-11
            blocks = expected.reshape(-1, 32)
            assert (np.abs(values.reshape(-1, 32) - blocks) <= np.abs(blocks).max(axis=1, keepdims=True) / 127 * 0.563).all()
        else:
            assert np.array_equal(
                values, expected.astype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]).astype(np.float32)
            )


def test_rows_that_are_no_multiple_of_32_stay_float16(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, reader = export(tmp_path, "--dtype", "q8_0", dim=48, heads=4)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")
    assert "13 matrices have rows that are not a multiple of 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [
        ("cl100k", False, "llama-bpe"),
        ("cl100k", True, "llama-bpe"),
        ("gpt2", False, "gpt-2"),
        ("cl100k-digits1", False, "qwen2"),
        ("cl100k-digits1", True, "qwen2"),
    ],
)
def test_the_split_pattern_has_llama_cpps_name(pattern: str, whole: bool, name: str):
    plain = tokenizer(pattern)
    assert gguf_tokenizer.pre(Tokenizer(dataclasses.replace(plain.vocabulary, ignore_merges=whole))) == name


def unreachable(pattern: str, whole: bool) -> Tokenizer:
    """A tokenizer with a token that no merge makes: with `ignore_merges` the word is that token, without it is not."""
    plain = tokenizer(pattern).vocabulary
    tokens = {token: number for token, number in plain.tokens.items() if number < 299} | {b"zqx": 299}
    return Tokenizer(dataclasses.replace(plain, tokens=tokens, specials={"<|endoftext|>": 300}, ignore_merges=whole))


def test_a_word_that_is_a_token_is_merged_in_llama_cpp_only_where_it_is_here():
    assert unreachable("cl100k", True).encode("zqx") == [299]
    assert gguf_tokenizer.pre(unreachable("cl100k", True)) == "llama-bpe"
    assert len(unreachable("cl100k", False).encode("zqx")) == 3
    assert gguf_tokenizer.pre(unreachable("cl100k", False)) == "dbrx"
    assert gguf_tokenizer.pre(unreachable("gpt2", False)) == "gpt-2"
    with pytest.raises(ConfigError, match="keeps a word that is a token whole"):
        gguf_tokenizer.pre(unreachable("gpt2", True))


@pytest.mark.parametrize("pattern", ["cl100k-digits2", r"\S+|\s+"])
def test_a_pattern_that_llama_cpp_does_not_have_is_refused_by_name(pattern: str):
    with pytest.raises(ConfigError, match=r"which llama\.cpp does not have"):
        gguf_tokenizer.pre(Tokenizer(dataclasses.replace(tokenizer().vocabulary, pattern=PATTERNS.get(pattern, pattern))))


def test_a_model_without_tokenizer_is_refused(tmp_path: Path):
    convert(neutral(tmp_path), tmp_path / "hf", "--to", "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    with redirect_stderr(io.StringIO()) as said:
        assert main([str(tmp_path / "hf"), str(tmp_path / "x.gguf"), "--to", "gguf"]) == 2
    assert "has no tokenizer" in said.getvalue()
    assert not (tmp_path / "x.gguf").exists()


def test_from_hugging_face_straight_to_gguf(tmp_path: Path):
    source, _ = export(tmp_path)
    convert(source, tmp_path / "hf", "--to", "hf")
    (tmp_path / "other").mkdir()
    convert(tmp_path / "hf", tmp_path / "other/model.gguf", "--to", "gguf")  # of the same name as before
    assert (tmp_path / "other/model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_what_is_not_there_or_other_than_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One bit of a weight and one field: each is found before the file takes its name."""
    from convert.neutral import read

    model = read(neutral(tmp_path / "run"))
    write = gguf_file._write

    def one_bit(path: Path, *args: Any) -> None:
        write(path, *args)
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1
        path.write_bytes(raw)

    def other_field(path: Path, name: str, fields: dict, *args: Any) -> None:
        write(path, name, fields | {"llama.rope.freq_base": 5e5}, *args)

    def cut(path: Path, *args: Any) -> None:
        write(path, *args)
        path.write_bytes(path.read_bytes()[:-200])

    for broken, word in ((one_bit, "output_norm.weight differs"), (other_field, "llama.rope.freq_base"), (cut, "When read back")):
        monkeypatch.setattr(gguf_file, "_write", broken)
        with pytest.raises(CheckpointError, match=word):
            gguf_file.write(model, tmp_path / "x.gguf", "float32", lambda *_: None)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_the_package_it_is_said_how_to_get_it(tmp_path: Path):
    source = neutral(tmp_path)
    code = (
        "import sys; sys.modules['gguf'] = None\nfrom convert.cli import main\n"
        f"sys.exit(main([{str(source)!r}, {str(tmp_path / 'x.gguf')!r}, '--to', 'gguf']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "pip install 'smedjan[gguf]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("pattern", "changes", "dtype", "tolerance"),
    [
        ("cl100k", {}, "float32", 1e-5),
        ("gpt2", NTK, "float32", 1e-5),
        ("cl100k-digits1", YARN, "float32", 1e-5),
        ("cl100k", YARN | {"kv_heads": 4}, "float32", 1e-5),
        ("cl100k", LINEAR, "float32", 1e-5),
        ("cl100k", LLAMA3, "float32", 1e-5),
        ("cl100k", {"tied_head": False, "qkv_bias": True, "o_bias": True, "head_size": 16}, "float32", 1e-5),
        ("cl100k", {"tied_head": False, "qkv_bias": True}, "float32", 1e-5),
        ("cl100k", {"qk_norm": True, "head_size": 16}, "float32", 1e-5),
        ("cl100k", {}, "bfloat16", 3e-2),
        ("cl100k", {}, "float16", 3e-3),
        ("cl100k", {}, "q8_0", 3e-2),
    ],
    ids=["none", "ntk", "yarn", "mha", "linear", "llama3", "untied-biases", "qwen2", "qwen3", "bfloat16", "float16", "q8_0"],
)
def test_llama_cpp_gives_the_same_ids_probabilities_and_greedy_text(
    tmp_path: Path, pattern: str, changes: dict, dtype: str, tolerance: float
):
    tok = tokenizer(pattern)
    config = model_config(tok.vocab_size, **changes)
    source = neutral(tmp_path, config, parameters(config), tok)
    convert(source, tmp_path / "model.gguf", "--to", "gguf", "--dtype", dtype)
    agrees(tmp_path / "model.gguf", source, tok, tolerance, dtype == "float32")
