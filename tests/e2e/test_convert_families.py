"""Every family that is read, from a tiny model that transformers itself made: the same logits, greedy text and gradients of a step.

CASES has a row for every model that issue lists name; a family of convert/families.py without one fails. Norms are not one, biases are not
zero, keys and values are shared, weights come in shards, texts go past the original context, and config.json is of either generation.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.cli import main
from convert.families import FAMILIES
from convert.hf_import import layout_of
from convert.hf_language import language
from convert.portable import Lazy
from convert.ties import Tie
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.config import TrainConfig
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.model.params import parameter_table
from smedjan_common.tokenizer import Tokenizer
from tests.conformance import subjects
from tests.conformance.compare import Difference, demand, largest
from tests.unit.convert_models import PROMPT, convert, logits
from tests.unit.convert_models import tokenizer as plain_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"
LENGTH, TOKENS, TURN_END = 72, 24, 300
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def longrope(pairs: int) -> dict[str, Any]:
    """Texts of the tests are longer than the first model's original context, and shorter than the second's."""
    lists = {"short_factor": [1.0, 1.1, 1.3, 1.7][:pairs], "long_factor": [1.0, 1.5, 4.0, 9.0][:pairs]}
    return {"rope_type": "longrope", "rope_theta": 1e4, **lists}


FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**FEW, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MULTIPLIED = {"embedding_multiplier": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 4.0}
MAMBA = {
    **{"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48, "num_local_experts": 0, "num_experts_per_tok": 0},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_conv": 3},
}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    **{"head_dim": 4, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446},
}
WIDE = {"qk_nope_head_dim": 12, "v_head_dim": 12}  # heads that do not share the width out
GROUPS = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
DELTA = {
    **{"head_dim": 16, "linear_key_head_dim": 12, "linear_value_head_dim": 8, "linear_num_value_heads": 6, "linear_num_key_heads": 3},
    **{"linear_conv_kernel_dim": 3, "initializer_range": 0.1, "layer_types": ["linear_attention", "full_attention"]},
}
EYES = {
    **{"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 4},
    **{"num_position_embeddings": 16, "spatial_merge_size": 2},
}
# a model, its family, and its configuration
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 1 to 3, TinyLlama": ("llama", {"tie_word_embeddings": False}),
    "Llama 3.1 to 3.3": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "rope_parameters": LLAMA3}),
    "SmolLM2": ("llama", {"rope_parameters": YARN}),
    "Mistral 7B": ("mistral", {"sliding_window": 16, "tie_word_embeddings": False}),
    "Mistral Nemo": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "Ministral 8B": ("ministral", {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "Qwen 2": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": False}),
    "Qwen 2.5": ("qwen2", {"rope_parameters": YARN}),
    "Qwen 3": ("qwen3", {"head_dim": 12}),
    "Qwen 3 MoE": ("qwen3_moe", {**FEW, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "SmolLM3": ("smollm3", {"no_rope_layer_interval": 2}),
    "OLMo 2": ("olmo2", {"attention_bias": True, "tie_word_embeddings": False}),
    "OLMo 3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 16, "rope_scaling": {**YARN, "rope_theta": 5e5}}),
    "Granite 3": ("granite", MULTIPLIED),
    "Granite 4": ("granitemoehybrid", {**MULTIPLIED, **MAMBA, "position_embedding_type": "nope", "tie_word_embeddings": False}),
    "Granite 4 MoE": (
        "granitemoehybrid",
        {**MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.25, "position_embedding_type": "rope"},
    ),
    "Phi-3-mini": ("phi3", {"tie_word_embeddings": False, "sliding_window": 16}),
    "Phi-4-mini, unscaled": ("phi3", {"partial_rotary_factor": 0.75}),
    "Phi-3-mini of 128k": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": longrope(4), "tie_word_embeddings": False}),
    "Phi-4-mini": (
        "phi3",
        {
            **{"original_max_position_embeddings": 80, "partial_rotary_factor": 0.75},
            **{"rope_parameters": {**longrope(3), "attention_factor": 1.19}},
        },
    ),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "tie_word_embeddings": False}),
    "GLM 4.5": (
        "glm4_moe",
        {**ROUTED, "routed_scaling_factor": 2.5, "head_dim": 8, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    ),
    "Moonlight": ("deepseek_v3", {**ROUTED, **LATENT, "q_lora_rank": None, "tie_word_embeddings": False}),
    "DeepSeek V3 of one group": ("deepseek_v3", {**ROUTED, **LATENT, "rope_interleave": False}),
    "DeepSeek V3": (
        "deepseek_v3",
        {**ROUTED, **LATENT, **WIDE, **GROUPS, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "DeepSeek V2": (
        "deepseek_v2",
        {
            **{**ROUTED, **LATENT, **WIDE, **GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
            **{"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.4}},
        },
    ),
    "DeepSeek V2-Lite": (
        "deepseek_v2",
        {
            **{**ROUTED, **LATENT, "q_lora_rank": None, "routed_scaling_factor": 1.0, "tie_word_embeddings": False},
            **{"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        },
    ),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    "Qwen 3.5": ("qwen3_5", {**DELTA, "attention_bias": True}),
    "Qwen 3.5 that sees": ("qwen3_5", {**DELTA, "tie_word_embeddings": False, "vision_config": EYES}),
    "Qwen 3.5 MoE": ("qwen3_5_moe", {**DELTA, **FEW, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "Qwen3-Next": (
        "qwen3_next",
        {**DELTA, **FEW, "num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "linear_attention", "linear_attention"], "num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
}


@functools.cache
def tokenizer() -> Tokenizer:
    """Of 301 tokens, the last of which ends a turn."""
    document = json.loads(plain_tokenizer().to_json())
    document["added_tokens"].append({**document["added_tokens"][0], "id": TURN_END, "content": "<|im_end|>"})
    return Tokenizer.from_json(json.dumps(document))


def test_every_family_has_a_model():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


def built(family: str, changes: dict[str, Any], seed: int) -> Any:
    """A random model of transformers, float32."""
    values = {
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.3},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }
    torch.manual_seed(seed)
    values, name = values | changes, FAMILIES[family].architecture
    if eyes := values.pop("vision_config", None):
        values = {"text_config": values, "vision_config": eyes, "tie_word_embeddings": values["tie_word_embeddings"]}
        name = name.replace("ForCausalLM", "ForConditionalGeneration")
    kind = getattr(transformers, name)
    model = kind._from_config(kind.config_class(**values), attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[tokenizer().vocab_size :] = 0
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value += torch.linspace(-0.3, 0.3, len(value)) * (1 if "q_" in name or "gate" in name else -1)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value += torch.linspace(-0.2, 0.2, len(value))
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path, Path]:
    """(the family, transformers' model, its directory, the neutral checkpoint). A token of its text is made the end of a turn."""
    family, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp("family")
    prompt = torch.tensor([tokenizer().encode(PROMPT)])
    for seed in range(9):
        model = built(family, changes, seed)
        endless = generated(model, prompt)
        end = max(endless, key=endless.index)  # the last token to come that was not there before
        if endless.index(end) >= 4 and end not in prompt:
            break
    else:
        pytest.fail("no seed gives a text with a token that is not in the prompt")
    with torch.no_grad():
        for table in {id(t): t for t in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}.values():
            table[[end, TURN_END]] = table[[TURN_END, end]]
    model.generation_config.eos_token_id = [tokenizer().eot_id, TURN_END]
    model.save_pretrained(folder / "hf", max_shard_size="20KB")
    (folder / "hf/tokenizer.json").write_text(tokenizer().to_json())
    assert len(list((folder / "hf").glob("*.safetensors"))) > 1
    convert(folder / "hf", folder / "neutral", "--to", "neutral")
    return family, model, folder / "hf", folder / "neutral"


def generated(model: Any, prompt: Any) -> list[int]:
    ids = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0)
    return ids[0, prompt.shape[1] :].tolist()


def ids_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, tokenizer().vocab_size, (rows, LENGTH)).astype(np.int32)


IN_JAX = (
    CASES if FULL else ("Qwen 2", "OLMo 3", "Phi-4-mini, unscaled")
)  # compiling is dear; that backends agree, the conformance suite shows


@pytest.mark.parametrize(("backend", "case"), [*(("mlx", kind) for kind in CASES), *(("jax", kind) for kind in IN_JAX)], indirect=["case"])
def test_logits_equal_transformers(case, backend: str):
    _, model, _, path = case
    with torch.no_grad():
        expected = model(torch.tensor(ids_of(2)).long()).logits.numpy()[..., : tokenizer().vocab_size]
    demand([Difference("logits", largest(logits(backend, path, ids_of(2)), expected), 1e-5)])


def test_greedy_text_ends_where_the_model_s_own_tokens_end_it(case):
    _, model, _, path = case
    prompt = tokenizer().encode(PROMPT)
    expected = generated(model, torch.tensor([prompt]))
    ends = model.generation_config.eos_token_id
    assert expected[-1] in ends
    checkpoint, tok = read_checkpoint(path), Tokenizer.load(path)
    assert set(ends) <= tok.eos_ids
    side = subjects.backend("mlx", checkpoint.model, TrainConfig(steps=1, batch_size=1, seq_len=8, lr=1e-3))
    engine = Engine(side.decoder(checkpoint.snapshot.params, len(prompt) + TOKENS), tok)
    ticket = engine.submit(Request(prompt, TOKENS, Sampling(temperature=0)))
    assert [piece.finish_reason for _, piece in engine.answer([ticket])][-1] == "stop"
    assert [token for token in ticket.ids[len(prompt) :] if token not in ends] == expected[:-1]


@pytest.mark.parametrize("case", ["Phi-3-mini of 128k"], indirect=True)
def test_a_prompt_past_the_original_context_goes_on_as_in_transformers(case):
    _, model, _, path = case
    checkpoint, ends = read_checkpoint(path), model.generation_config.eos_token_id
    texts = ((ids, generated(model, torch.tensor([ids]))) for ids in ids_of(16).tolist())
    prompt, whole = next((ids, text) for ids, text in texts if len(text) > 8)
    assert len(prompt) > model.config.original_max_position_embeddings
    side = subjects.backend("mlx", checkpoint.model, TrainConfig(steps=1, batch_size=1, seq_len=8, lr=1e-3))
    engine = Engine(side.decoder(checkpoint.snapshot.params, len(prompt) + TOKENS), Tokenizer.load(path))
    ticket = engine.submit(Request(prompt, TOKENS, Sampling(temperature=0)))
    assert [piece.finish_reason for _, piece in engine.answer([ticket])]
    assert [token for token in ticket.ids[len(prompt) :] if token not in ends] == [token for token in whole if token not in ends]


@pytest.mark.parametrize("backend", [*(["jax"] if FULL else []), "mlx"])
def test_gradients_of_a_step_equal_transformers(case, backend: str):
    family, model, _, path = case
    checkpoint = read_checkpoint(path)
    inputs, targets = ids_of(2), np.roll(ids_of(2), -1, axis=1)
    expected = gradients(model, family, checkpoint.model, inputs, targets)
    train = TrainConfig(steps=1, batch_size=2, seq_len=LENGTH, lr=1e-3, weight_decay=0.0, balance_loss=0.0, router_z_loss=0.0)
    _, found = subjects.loss_and_gradients(backend, checkpoint.model, train, checkpoint.snapshot.params, (inputs, targets))
    biggest = max(float(np.abs(value).max()) for value in expected.values())
    # a gradient that is nothing beside the others is held to them
    scales = {name: max(float(np.abs(value).max()), 1e-2 * biggest) for name, value in expected.items()}
    gate = 1e-4 if set(checkpoint.model.mixer) & {"ssm", "gated-deltanet"} else 2e-5  # transformers' own recurrences are float32 always
    errors = {name: float(np.abs(found[name] - value).max()) / scales[name] for name, value in expected.items() if name in found}
    demand(Difference(name, error, gate) for name, error in errors.items())
    assert {name.rsplit(".", 2)[-2] for name in expected.keys() - found.keys()} <= {"router"}  # whose bias learns without a gradient


def gradients(model: Any, family: str, config: Any, inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """transformers', of our tensors, float64: what a tie does to weights is linear, so its transpose takes gradients back."""
    wide = model.double()
    scores = wide(torch.tensor(inputs).long()).logits
    wide.zero_grad()
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.tensor(targets).long().flatten()).backward()
    saved = {name: Lazy(value.dtype, value.shape, lambda value=value: value) for name, value in saved_gradients(wide).items()}
    theirs = {name: value.read() for name, value in language(saved, {"model_type": family})[0].items()}
    model.float()
    table, found = parameter_table(config), {}
    for tie in layout_of(model.config.to_dict() | {"model_type": family}, config):
        if tie.ours and all(name in theirs for name in tie.theirs):
            for name, value in zip(tie.ours, transposed(tie, [theirs[name] for name in tie.theirs]), strict=True):
                found[name] = found.get(name, 0.0) + value.reshape(table[name].shape)
    return found


def saved_gradients(model: Any) -> dict[str, np.ndarray]:
    """By the names that save_pretrained gives the weights: they are saved in the place of the weights."""
    import tempfile

    from safetensors.torch import load_file

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        values = {name: value.detach().clone() for name, value in model.named_parameters()}
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        model.save_pretrained(folder)
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
        return {name: value.numpy() for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


def transposed(tie: Tie, gradients_of_theirs: list[np.ndarray]) -> list[np.ndarray]:
    """Weights that are only moved come back the same way; of those that are multiplied, by the square of that."""
    zero = [np.zeros_like(gradient) for gradient in gradients_of_theirs]
    none = tie.back(zero)
    ones, zeros = ([np.full_like(each, value) for each in none] for value in (1, 0))
    factors = [one - nothing for one, nothing in zip(tie.out(ones), tie.out(zeros), strict=True)]
    squared = tie.back([gradient * factor**2 for gradient, factor in zip(gradients_of_theirs, factors, strict=True)])
    return [each - nothing for each, nothing in zip(squared, none, strict=True)]


def test_published_forms_are_read_alike(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A language model inside a whole one, all experts of a layer in two tensors, layers that guess further tokens, and eyes."""
    from safetensors.numpy import load_file, save_file

    built("qwen3_5_moe", CASES["Qwen 3.5 MoE"][1], 0).save_pretrained(tmp_path / "plain")
    arrays, fused = load_file(tmp_path / "plain/model.safetensors"), {}
    for name in [name for name in arrays if ".experts." in name]:
        at, number, part, _ = name.rsplit(".", 3)
        fused.setdefault(at, {}).setdefault(part, {})[int(number)] = arrays.pop(name)
    for at, parts in fused.items():
        gate, up, down = (np.stack([parts[name][e] for e in range(4)]) for name in ("gate_proj", "up_proj", "down_proj"))
        arrays |= {f"{at}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{at}.down_proj": down}
    arrays = {name.replace("model.", "model.language_model.", 1): value for name, value in arrays.items()}
    arrays |= {name: np.ones(3, np.float32) for name in ("mtp.norm.weight", "model.visual.blocks.0.norm1.weight")}
    (tmp_path / "whole").mkdir()
    save_file(arrays, tmp_path / "whole/model.safetensors")
    values = json.loads((tmp_path / "plain/config.json").read_text())
    outer = {"model_type": "qwen3_5_moe", "text_config": values | {"mtp_num_hidden_layers": 1, "attn_output_gate": True}}
    (tmp_path / "whole/config.json").write_text(json.dumps(outer))
    for each in ("plain", "whole"):
        convert(tmp_path / each, tmp_path / f"{each}-neutral", "--to", "neutral")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("sees pictures was left out") == said.count("guess further tokens at once were left out") == 1
    plain, whole = (read_checkpoint(tmp_path / f"{each}-neutral") for each in ("plain", "whole"))
    assert plain.model == whole.model
    assert all(np.array_equal(value, whole.snapshot.params[name]) for name, value in plain.snapshot.params.items())


def test_the_older_keys_are_read_alike(case, tmp_path: Path):
    """config.json with rope_theta and rope_scaling, which transformers wrote before 5."""
    _, _, hf, path = case
    older = Path(shutil.copytree(hf, tmp_path / "hf"))
    values = json.loads((older / "config.json").read_text())
    inner = values.get("text_config", values)
    rope = inner.pop("rope_parameters")
    rope = rope.get("full_attention", rope)
    inner |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}
    if "partial_rotary_factor" in rope:
        inner["partial_rotary_factor"] = rope["partial_rotary_factor"]
    (older / "config.json").write_text(json.dumps(values))
    assert main([str(older), str(tmp_path / "neutral"), "--to", "neutral"]) == 0
    assert read_checkpoint(tmp_path / "neutral").model == read_checkpoint(path).model
