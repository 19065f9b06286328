"""`--to hf` against the outside: transformers and mlx-lm load what is written with no code of ours and say the same as both backends.

And back: directories that transformers itself saved become neutral checkpoints that generate the same text and can be trained on.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.tokenizer import Tokenizer
from tests.unit.convert_models import (
    LINEAR,
    LLAMA3,
    NTK,
    PROMPT,
    TEXT,
    YARN,
    convert,
    greedy,
    logits,
    model_config,
    neutral,
    parameters,
    tokenizer,
)

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]
BACKENDS = ("jax", "mlx")
MODELS = {
    "mha": {"kv_heads": 4},
    "gqa": {},
    "ntk": NTK,
    "yarn": YARN | {"kv_heads": 1},
    "llama3, untied, biases": LLAMA3 | {"tied_head": False, "qkv_bias": True, "o_bias": True, "head_size": 12},
    "qwen2, linear": LINEAR | {"qkv_bias": True, "tied_head": False},
    "qwen3": {"qk_norm": True, "head_size": 12},
    "mistral": {"window": 16, "head_size": 12},
}
MISREAD = {"mistral"}  # mlx-lm knows no window


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """kind -> (neutral, Hugging Face directory)."""
    pairs = {}
    for kind, changes in MODELS.items():
        folder = tmp_path_factory.mktemp(kind)
        source = neutral(folder, model_config(tokenizer().vocab_size, **changes))
        convert(source, folder / "hf", "--to", "hf")
        pairs[kind] = (source, folder / "hf")
    return pairs


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def hf_logits(path: Path, ids: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return load(path, **options)(torch.tensor(ids).long()).logits.float().numpy()


def hf_greedy(path: Path, prompt: str = PROMPT, tokens: int = 48) -> list[int]:
    tok = transformers.AutoTokenizer.from_pretrained(path)
    ids = tok(prompt, return_tensors="pt").input_ids
    out = load(path).generate(ids, max_new_tokens=tokens, attention_mask=torch.ones_like(ids), pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def without_end(ids: list[int], tok: Tokenizer) -> list[int]:
    """transformers' text has the end-of-text token in it, ours ends before."""
    return ids[: ids.index(tok.eot_id)] if tok.eot_id in ids else ids


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_transformers(exported, backend: str, kind: str):
    source, path = exported[kind]
    ids = np.random.default_rng(0).integers(0, tokenizer().vocab_size, (2, 100)).astype(np.int32)
    expected = hf_logits(path, ids)[..., : tokenizer().vocab_size]
    assert difference(logits(backend, source, ids), expected) < 1e-5


@pytest.mark.parametrize(("backend", "kind"), [*(("mlx", kind) for kind in MODELS), ("jax", "gqa"), ("jax", "qwen3")])
def test_greedy_text_equals_transformers(exported, backend: str, kind: str):
    source, path = exported[kind]
    expected = hf_greedy(path)
    assert len(expected) >= 40
    assert greedy(backend, source) == without_end(expected, tokenizer())


def test_ids_that_stand_for_nothing_are_never_chosen(tmp_path: Path):
    """The embedding has rows beyond the vocabulary; here they would win."""
    config = model_config(tokenizer().vocab_size)
    params = parameters(config)
    params["embed.weight"][config.vocab_size :] = 3 * params["embed.weight"][: config.padded_vocab_size - config.vocab_size]
    source = neutral(tmp_path, config, params)
    convert(source, tmp_path / "hf", "--to", "hf")
    ids = np.array([tokenizer().encode(PROMPT)], np.int32)
    assert hf_logits(tmp_path / "hf", ids)[0, -1].argmax() >= config.vocab_size
    assert greedy("jax", source, tokens=20) == without_end(hf_greedy(tmp_path / "hf", tokens=20), tokenizer())


def test_the_tokenizer_gives_the_same_ids_and_has_a_name_for_every_row(exported):
    _, path = exported["gqa"]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), tokenizer()
    assert len(theirs) == load(path).get_input_embeddings().num_embeddings == 320
    for text in (TEXT, "", " ", "\n\n  x", "日本語 🔥", "l'été 12345"):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.encode("a<|endoftext|>") == ours.encode("a<|endoftext|>", allowed_special="all")
    assert (theirs.eos_token, theirs.eos_token_id, theirs.bos_token_id) == ("<|endoftext|>", ours.eot_id, ours.eot_id)
    assert theirs.decode([ours.eot_id, 310], skip_special_tokens=True) == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_the_rounded_weights(exported, tmp_path: Path, dtype: str):
    source, whole = exported["gqa"]
    convert(source, tmp_path / "hf", "--to", "hf", "--dtype", dtype)
    half, full = load(tmp_path / "hf"), load(whole)
    assert half.dtype == getattr(torch, dtype)
    for name, value in full.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.to(getattr(torch, dtype))), name


def test_shards_hold_the_same_model(exported, tmp_path: Path):
    source, whole = exported["gqa"]
    convert(source, tmp_path / "hf", "--to", "hf", "--max-shard-size", "40KB")
    files = sorted(tmp_path.glob("hf/*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 43_000 for file in files)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    ids = np.arange(20, dtype=np.int32)[None]
    assert np.array_equal(hf_logits(tmp_path / "hf", ids), hf_logits(whole, ids))


@pytest.mark.parametrize("kind", MODELS.keys() - MISREAD)
def test_mlx_lm_loads_it_and_writes_the_same_text(exported, kind: str):
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra: oracle)")
    import mlx.core as mx

    source, path = exported[kind]
    model, tok = mlx_lm.load(str(path))
    ids = np.random.default_rng(1).integers(0, tokenizer().vocab_size, (1, 100)).astype(np.int32)
    found = np.array(model(mx.array(ids)))[..., : tokenizer().vocab_size]
    assert difference(found, logits("mlx", source, ids)) < 1e-5
    text = mlx_lm.generate(model, tok, PROMPT, max_tokens=48)
    assert text == tokenizer().decode(greedy("mlx", source))


# in


def save(path: Path, dtype: str = "float32", shard: str = "5GB", kind: str = "Llama", rows: int = 320, **changes: Any) -> Any:
    """A directory that transformers wrote: a random model and our tokenizer's file."""
    values = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(values | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(getattr(torch, dtype))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer().vocab_size :] = 0
        model.get_output_embeddings().weight[tokenizer().vocab_size :] = 0
        for name, value in model.named_parameters():
            if value.ndim == 1:  # norms that are not one, biases that are not zero: what is left out or in the wrong place shows
                value += torch.linspace(-0.3, 0.3, len(value)).to(value.dtype) * (1 if "q_" in name or "gate" in name else -1)
    model.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text(tokenizer().to_json())
    return model


SAVED = {
    "tied": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "shards": {"shard": "20KB"},
    "rows": {"rows": 305},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 32}},
    "mistral": {"kind": "Mistral", "sliding_window": None},
    "mistral, window": {"kind": "Mistral", "sliding_window": 16},
    "mistral nemo": {"kind": "Mistral", "sliding_window": None, "head_dim": 16, "tie_word_embeddings": False},
    "llama3, untied": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "qwen2": {"kind": "Qwen2"},
    "qwen2, window": {"kind": "Qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "qwen3": {"kind": "Qwen3", "head_dim": 12, "tie_word_embeddings": False},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("case", SAVED)
def test_a_directory_of_transformers_becomes_a_checkpoint_that_writes_the_same_text(tmp_path: Path, case: str):
    save(tmp_path / "hf", **SAVED[case])
    convert(tmp_path / "hf", tmp_path / "neutral", "--to", "neutral")
    ids = np.random.default_rng(0).integers(0, 300, (2, 64)).astype(np.int32)
    expected = hf_logits(tmp_path / "hf", ids, dtype=torch.float32)
    model = read_checkpoint(tmp_path / "neutral").model
    assert model.vocab_size == tokenizer().vocab_size
    for backend in BACKENDS:
        assert difference(logits(backend, tmp_path / "neutral", ids), expected[..., : model.vocab_size]) < 1e-5
    prompt = torch.tensor([tokenizer().encode(PROMPT)])
    whole = load(tmp_path / "hf", dtype=torch.float32)
    text = whole.generate(prompt, max_new_tokens=48, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0)
    assert greedy("mlx", tmp_path / "neutral") == without_end(text[0, prompt.shape[1] :].tolist(), tokenizer())


@pytest.mark.parametrize("case", ["tied", "shards", "bfloat16", "float16", "llama3, untied", "qwen2", "qwen3", "mistral nemo"])
def test_weights_go_round_bit_for_bit(tmp_path: Path, case: str):
    model = save(tmp_path / "hf", **SAVED[case])
    convert(tmp_path / "hf", tmp_path / "neutral", "--to", "neutral")
    convert(tmp_path / "neutral", tmp_path / "again", "--to", "hf", "--dtype", SAVED[case].get("dtype", "float32"))
    for name, value in load(tmp_path / "again").state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_an_imported_model_can_be_trained_on(tmp_path: Path):
    """`train --pretrained`, as a user calls it; then back out to transformers, which says what the trained model says."""
    save(tmp_path / "hf", initializer_range=0.05)
    convert(tmp_path / "hf", tmp_path / "neutral", "--to", "neutral")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    flags = f"--pretrained {tmp_path}/neutral --dataset {tmp_path}/text.txt --checkpoint-dir {tmp_path}/run --eval-every 0 --sample-every 0"
    sizes = "--steps 12 --batch-size 4 --seq-len 32 --lr 2e-2 --log-every 1"
    command = [sys.executable, "-m", "smedjan_mlx.train", *flags.split(), *sizes.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    convert(tmp_path / "run", tmp_path / "out", "--to", "hf")
    assert greedy("mlx", tmp_path / "run/final", tokens=20) == without_end(hf_greedy(tmp_path / "out", tokens=20), tokenizer())
