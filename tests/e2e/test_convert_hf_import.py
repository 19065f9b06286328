"""`--to neutral` against the outside: directories that transformers itself saved generate the same text and can be trained on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smedjan_common.checkpoint import read_checkpoint
from tests.e2e.in_transformers import difference, hf_greedy, hf_logits, load, torch, transformers, without_end
from tests.unit.convert_models import PROMPT, TEXT, convert, greedy, logits, tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]
BACKENDS = ("jax", "mlx")


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
    "qwen2, window of one layer": {"kind": "Qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3, layer types": {
        **{"kind": "Qwen3", "use_sliding_window": True, "sliding_window": 16, "head_dim": 12},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "ministral": {"kind": "Ministral", "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"kind": "SmolLM3", "no_rope_layer_interval": 2, "pad_token_id": None},
    "smollm3, windows": {
        **{"kind": "SmolLM3", "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 16, "pad_token_id": None},
        "attention_bias": True,
    },
    "granite": {
        **{"kind": "Granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625},
        "logits_scaling": 8.0,
    },
    "olmo2": {"kind": "Olmo2", "pad_token_id": None},
    "olmo3": {
        **{"kind": "Olmo3", "num_hidden_layers": 4, "sliding_window": 16, "pad_token_id": None},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "phi3": {"kind": "Phi3", "pad_token_id": None, "partial_rotary_factor": 0.75, "sliding_window": 16},
    "glm4_moe": {
        **{
            "kind": "Glm4Moe",
            "pad_token_id": None,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "head_dim": 8,
            "use_qk_norm": True,
        },
        **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1},
    },
    "granite, nothing said": {"kind": "Granite"},
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
