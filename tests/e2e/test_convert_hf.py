"""`--to hf` against the outside: transformers and mlx-lm load what is written with no code of ours and say the same as both backends."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.model.params import parameter_table
from tests.e2e.in_transformers import difference, hf_greedy, hf_logits, load, torch, transformers, without_end
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

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]
MODELS = {
    "mha": {"kv_heads": 4},
    "gqa": {},
    "ntk": NTK,
    "yarn": YARN | {"kv_heads": 1},
    "llama3, untied, biases": LLAMA3 | {"tied_head": False, "qkv_bias": True, "o_bias": True, "head_size": 12},
    "qwen2, linear": LINEAR | {"qkv_bias": True, "tied_head": False},
    "qwen3": {"qk_norm": True, "head_size": 12},
    "mistral": {"window": 16, "head_size": 12},
    "qwen2, window": {"qkv_bias": True, "window": 16, "window_layers": ("off", "on")},
    "qwen3, window": {"qk_norm": True, "window": 16},
    "ministral": {"window": 16, "window_layers": ("on", "off"), "head_size": 12},
    "smollm3": {"rope_layers": ("on", "off"), "head_size": 12},
    "smollm3, windows": {"rope_layers": ("off",), "window": 16, "window_layers": ("off", "on"), "tied_head": False},
}
EXPERTS = {"ffn": ("experts",), "experts": 4, "experts_per_token": 2, "expert_dim": 24}
ROUTED = {**EXPERTS, "ffn": ("swiglu", "experts"), "router": "bias"}  # after a dense layer
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25, "logits_divisor": 8.0}
SSM = {"mixer": ("ssm", "attention"), "ssm_head_dim": 16, "ssm_state": 8}
DELTA = {"mixer": ("gated-deltanet", "attention"), "qk_norm": True}
OWN = {"delta_key_heads": 3, "delta_value_heads": 6, "delta_key_size": 16, "delta_value_size": 20, "head_size": 12}
GROUPS = {"experts": 6, "experts_per_token": 3, "expert_groups": 3, "expert_groups_per_token": 2, "routed_scaling_factor": 1.5}
LONGROPE = {  # all texts are longer than the original context
    **{"rope_scaling": "longrope", "rope_factor": 32.0, "rope_original_len": 4},
    **{"rope_short_factors": (1.0, 1.1, 1.3), "rope_long_factors": (1.0, 1.5, 4.0)},
}
MLA = {"mixer": ("mla",), "kv_heads": 4, "norm_eps": 1e-6}  # so a round trip is exact
MODELS |= {
    "mixtral": EXPERTS | {"tied_head": False},
    "qwen3_moe": EXPERTS | {"ffn": ("swiglu", "experts"), "qk_norm": True, "head_size": 12},
    "glm4_moe": ROUTED | {"shared_experts": 1, "qk_norm": True},
    "glm4_moe, none shared": ROUTED | {"ffn": ("experts",)},
    "olmo2": {"norms": "post", "qk_norm": True, "qk_norm_over": "all", "tied_head": False},
    "olmo3": {
        **{"norms": "post", "qk_norm": True, "qk_norm_over": "all", "window": 16, "window_layers": ("on", "off")},
        **YARN,
        **{"rope_global_layers": ("off", "on"), "qkv_bias": True, "o_bias": True},
    },
    "phi3": {"rope_dim": 6, "tied_head": False},
    "phi3, longrope": LONGROPE | {"rope_dim": 6},
    "phi3, window": {"rope_dim": 4, "window": 16},
    "glm4_moe, parts": ROUTED | {"rope_dim": 4, "qkv_bias": True, "tied_head": False},
    "granite": MULTIPLIERS,
    "granite, biases": MULTIPLIERS | {"attention_multiplier": 0.0, "qkv_bias": True, "o_bias": True, "tied_head": False},
    "granitemoehybrid": SSM,
    "granitemoehybrid, not turned": SSM | MULTIPLIERS | {"rope_layers": ("off",)},
    "granitemoehybrid, attention alone": MULTIPLIERS | {"rope_layers": ("off",)},
    "granitemoehybrid, experts": SSM | EXPERTS | {"shared_experts": 2, "tied_head": False},
    "granitemoehybrid, attention": EXPERTS | {"shared_experts": 1},
    "deepseek_v3": MLA,
    "olmoe": EXPERTS | {"qk_norm": True, "qk_norm_over": "all", "norm_topk_prob": False, "tied_head": False},
    "qwen3_moe, weights as they are": EXPERTS | {"qk_norm": True, "norm_topk_prob": False},
    "deepseek_v3, groups": MLA | ROUTED | GROUPS | YARN | {"head_size": 12, "mla_q_rank": 12, "shared_experts": 1},
    "deepseek_v2": MLA | EXPERTS | GROUPS | YARN | {"norm_topk_prob": False, "rope_attention_factor": 0.1 * 0.75 * math.log(4.0) + 1},
    "deepseek_v3, experts": MLA | ROUTED | {"mla_q_rank": 12, "shared_experts": 1},
    "qwen3_5": DELTA | {"mixer": ("gated-deltanet", "gated-deltanet", "attention"), "layers": 3, "conv_width": 3},
    "qwen3_next": DELTA | EXPERTS | {"shared_experts": 1, "rope_dim": 4, "tied_head": False},
    "qwen3_5, gates": DELTA | OWN | {"attention_gate": True, "rope_dim": 4, "tied_head": False},
    "qwen3_next, gates": DELTA | OWN | EXPERTS | {"shared_experts": 2, "attention_gate": True, "shared_gate": True},
    "qwen3_next, another order": DELTA
    | EXPERTS
    | {"mixer": ("attention", "gated-deltanet", "gated-deltanet"), "layers": 3, "ffn": ("experts", "swiglu")}
    | {"shared_experts": 1, "attention_gate": True, "qkv_bias": True, "o_bias": True, "norm_topk_prob": False, "init_std": 0.2},
}
MISREAD = {"mistral", "qwen2, window", "qwen3, window", "ministral", "phi3, window"}  # mlx-lm knows no window there
MISREAD |= {"qwen3_next, another order"}  # nor which layers attend


ARCHITECTURES = [kind for kind in MODELS if kind not in {"mha", "gqa", "ntk", "yarn", "llama3, untied, biases"}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """kind -> (neutral, Hugging Face directory)."""
    pairs = {}
    for kind, changes in MODELS.items():
        folder = tmp_path_factory.mktemp(kind)
        source = neutral(folder, model_config(tokenizer().vocab_size, **changes))
        convert(source, folder / "hf", "--to", "hf")
        pairs[kind] = (source, folder / "hf")
        assert kind not in ARCHITECTURES or json.loads((folder / "hf/config.json").read_text())["model_type"] == kind.split(",")[0]
    return pairs


@pytest.mark.parametrize(  # that both backends are equal, the conformance suite shows for all
    ("backend", "kind"), [*(("mlx", kind) for kind in MODELS), *(("jax", kind) for kind in ("gqa", "yarn", "qwen3", "deepseek_v3"))]
)
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


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in MISREAD])
def test_mlx_lm_loads_it_and_writes_the_same_text(exported, kind: str):
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra: oracle)")
    import mlx.core as mx

    source, path = exported[kind]
    model, tok = mlx_lm.load(str(path))
    ids = np.random.default_rng(1).integers(0, tokenizer().vocab_size, (1, 100)).astype(np.int32)
    found = np.array(model(mx.array(ids)))[..., : tokenizer().vocab_size]
    assert difference(found, logits("mlx", source, ids)) < 1e-5
    found = [response.token for response in mlx_lm.stream_generate(model, tok, PROMPT, max_tokens=48)]
    assert without_end(found, tokenizer()) == greedy("mlx", source)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_was_written_reads_back_as_the_same_model(exported, tmp_path: Path, kind: str):
    source, path = exported[kind]
    convert(path, tmp_path / "neutral", "--to", "neutral")
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "neutral")
    left_to_defaults = {"ffn_dim", "expert_dim", "mla_kv_rank", "mla_rope_dim"}  # said outright there
    fields = [{k: v for k, v in side.model.to_dict().items() if k not in left_to_defaults} for side in (before, after)]
    assert fields[0] == fields[1]
    assert parameter_table(after.model) == parameter_table(before.model)
    for name, value in before.snapshot.params.items():
        assert np.array_equal(value, after.snapshot.params[name]), name


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("glm4_moe", {"routed_scaling_factor": "x"}, "routed_scaling_factor 'x'"),
        ("glm4_moe", {"partial_rotary_factor": 0.4, "rope_parameters": None}, "partial_rotary_factor 0.4"),
        ("glm4_moe", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("granitemoehybrid", {"time_step_limit": [0.001, 0.1]}, "time_step_limit [0.001, 0.1]"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
        ("granitemoehybrid", {"residual_multiplier": "x"}, "residual_multiplier 'x'"),
        ("granitemoehybrid", {"attention_multiplier": -1.0}, "attention_multiplier -1"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention", "conv"]}, "layer_types"),
        ("deepseek_v3", {"v_head_dim": 16}, "v_head_dim 16"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("deepseek_v2", {"topk_group": 4}, "--expert-groups-per-token 4"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate False"),
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "layer_types"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "3 value heads of gated-deltanet"),
    ],
)
def test_what_an_architecture_may_ask_for_and_we_do_not_have_is_refused_by_name(
    exported, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, values: dict, words: str
):
    from convert.cli import main

    path = Path(shutil.copytree(exported[kind][1], tmp_path / "hf"))
    document = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    assert main([str(path), str(tmp_path / "neutral"), "--to", "neutral"]) == 2
    assert words in capsys.readouterr().err


def test_layers_that_guess_further_tokens_are_left_out(exported, tmp_path: Path, capsys: pytest.CaptureFixture):
    """As GLM 4.5 has one, with an embedding and a head of its own."""
    from safetensors.numpy import load_file, save_file

    source, hf = exported["glm4_moe"]
    path = Path(shutil.copytree(hf, tmp_path / "hf"))
    arrays = load_file(path / "model.safetensors")
    more = {name: np.ones((320, 32), np.float32) for name in ("embed_tokens.weight", "shared_head.head.weight", "eh_proj.weight")}
    save_file(arrays | {f"model.layers.2.{name}": array for name, array in more.items()}, path / "model.safetensors")
    document = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(document))
    convert(path, tmp_path / "neutral", "--to", "neutral")
    assert "guess further tokens" in capsys.readouterr().out
    before, after = (read_checkpoint(each).snapshot.params for each in (source, tmp_path / "neutral"))
    assert all(np.array_equal(value, after[name]) for name, value in before.items())


def changed(hf: Path, folder: Path, part: str) -> tuple[Path, str]:
    """A copy with another number in the first tensor with `part` in its name, and that name."""
    from safetensors.numpy import load_file, save_file

    path = Path(shutil.copytree(hf, folder / "hf"))
    arrays = load_file(path / "model.safetensors")
    name = next(name for name in sorted(arrays) if part in name)
    arrays[name][-1, -1] = 0.5
    save_file(arrays, path / "model.safetensors")
    return path, name


def test_shared_experts_that_are_not_zero_where_there_are_none_are_refused(exported, tmp_path: Path, capsys: pytest.CaptureFixture):
    from convert.cli import main

    path, name = changed(exported["glm4_moe, none shared"][1], tmp_path, "shared_experts")
    assert main([str(path), str(tmp_path / "neutral"), "--to", "neutral"]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(("part", "gate"), [("shared_expert_gate", "shared_gate"), ("self_attn.q_proj", "attention_gate")])
def test_gates_are_there_where_one_is_not_zero(exported, tmp_path: Path, part: str, gate: str):
    """The model that went out without gates has halves there: after another program moved one of them they are gates."""
    path, _ = changed(exported["qwen3_next"][1], tmp_path, part)
    convert(path, tmp_path / "neutral", "--to", "neutral")
    model = read_checkpoint(tmp_path / "neutral").model
    assert {name for name in ("shared_gate", "attention_gate") if getattr(model, name)} == {gate}
