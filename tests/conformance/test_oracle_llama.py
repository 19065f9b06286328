"""The outside: with the same weights our model is transformers' Llama (torch, CPU, eager attention): logits, loss, gradients, training.

transformers knows nothing of our code, so an error that the reference and both backends share shows here.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model import rope
from smedjan_common.model.params import initial_params
from smedjan_common.model.shape import ROPE_SCALINGS
from smedjan_common.training.schedule import learning_rate
from tests.conformance import subjects
from tests.conformance.cases import CASES, HEADS, Case, model_config
from tests.conformance.compare import Difference, demand, largest, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

TRANSFORMERS_NAMES = {
    "mixer_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "mixer.": "self_attn.",
    "ffn.": "mlp.",
    "embed.": "embed_tokens.",
}


def oracle_name(name: str) -> str:
    for ours, theirs in TRANSFORMERS_NAMES.items():
        name = name.replace(ours, theirs)
    return "lm_head.weight" if name == "head.weight" else f"model.{name}"


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """Our scaling in transformers' words. It has no static NTK-aware form: that is a change of the base, worked out by hand here."""
    stretched = {"rope_type": model.rope_scaling, "rope_theta": model.rope_base, "factor": model.rope_factor}
    if model.rope_scaling == "linear":
        return stretched
    if model.rope_scaling in ("yarn", "llama3"):
        stretched["original_max_position_embeddings"] = model.rope_original_len
        factors = {"low_freq_factor": model.rope_low_freq_factor, "high_freq_factor": model.rope_high_freq_factor}
        return stretched | (factors if model.rope_scaling == "llama3" else {})
    if model.rope_scaling == "longrope":
        lists = {"short_factor": list(model.rope_short_factors), "long_factor": list(model.rope_long_factors)}
        return stretched | lists | {"original_max_position_embeddings": model.rope_original_len}
    stretch = model.rope_factor ** (model.head_dim / (model.head_dim - 2)) if model.rope_scaling == "ntk" else 1.0
    return {"rope_type": "default", "rope_theta": model.rope_base * stretch}


def oracle_config(model: ModelConfig) -> Any:
    return transformers.LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.context_length,
        rms_norm_eps=model.norm_eps,
        rope_parameters=rope_parameters(model),
        head_dim=model.head_dim,
        tie_word_embeddings=model.tied_head,
        attention_bias=model.qkv_bias,
        mlp_bias=False,
        hidden_act="silu",
        attn_implementation="eager",
    )


def llama(model: ModelConfig, params: dict[str, np.ndarray], dtype: Any = None) -> Any:
    oracle = transformers.LlamaForCausalLM(oracle_config(model)).to(dtype or torch.float32)
    weights = {oracle_name(name): torch.tensor(value, dtype=dtype or torch.float32) for name, value in params.items()}
    missing, unexpected = oracle.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.tied_head else set()), missing
    return oracle


def oracle_loss(oracle: Any, inputs: np.ndarray, targets: np.ndarray) -> Any:
    logits = oracle(torch.tensor(inputs).long()).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).long().flatten(), ignore_index=-1)


def llama_cases() -> list[Case]:
    cases = []
    for heads in HEADS:
        for scaling in ROPE_SCALINGS:
            model = model_config(("attention",), "swiglu", heads, scaling)
            cases += [case for case in CASES.values() if case.model == model]
    return [*cases, CASES["attention-swiglu-mha-untied-biases-heads-of-12"]]


CASES_HERE = [pytest.param(case, id=case.id) for case in llama_cases()]


@pytest.mark.parametrize("llama_case", CASES_HERE)
def test_logits_and_loss_equal_transformers_llama(backend: str, llama_case: Case):
    case = llama_case
    inputs, targets = case.batches[0]
    oracle = llama(case.model, case.params)
    with torch.no_grad():
        expected, expected_loss = oracle(torch.tensor(inputs).long()).logits.numpy(), oracle_loss(oracle, inputs, targets).item()
    loss, _ = subjects.loss_and_gradients(backend, case.model, case.train, case.params, (inputs, targets))
    demand(
        [
            Difference("logits", largest(subjects.logits(backend, case.model, case.params, inputs), expected), FLOAT32.oracle),
            Difference("loss", abs(loss / expected_loss - 1), FLOAT32.oracle),
        ]
    )


@pytest.mark.parametrize("llama_case", CASES_HERE)
def test_every_gradient_equals_torch_autograd(backend: str, llama_case: Case):
    case = llama_case
    oracle = llama(case.model, case.params, torch.float64)
    oracle_loss(oracle, *case.batches[0]).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in oracle.named_parameters()}
    _, ours = subjects.loss_and_gradients(backend, case.model, case.train, case.params, case.batches[0])
    demand(tensors(ours, {name: gradients[oracle_name(name)] for name in ours}, case.tolerance.gradient, "gradient of "))


@pytest.mark.parametrize("llama_case", CASES_HERE[3:4])
def test_twenty_steps_equal_torch_adamw_on_llama(backend: str, llama_case: Case):
    """A whole run against torch alone in float64: its autograd, its clipping, its AdamW with two groups."""
    case = llama_case
    start = initial_params(case.model, 5)
    run = subjects.train(backend, case.model, case.train, start, case.batches)
    oracle, config = llama(case.model, start, torch.float64), case.train
    decayed = [p for p in oracle.parameters() if p.ndim > 1]
    norms = [p for p in oracle.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    losses = []
    for step, batch in enumerate(case.batches):
        adamw.zero_grad()
        loss = oracle_loss(oracle, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), config.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step)
        adamw.step()
        losses.append(loss.item())
    trained = {name: parameter.detach().numpy() for name, parameter in oracle.named_parameters()}
    worst = max(abs(a / b - 1) for a, b in zip(run.losses, losses, strict=True))
    expected = {name: trained[oracle_name(name)] for name in run.snapshot.params}
    demand([Difference("loss", worst, FLOAT32.steps_loss), *tensors(run.snapshot.params, expected, FLOAT32.steps_params)])


@pytest.mark.parametrize("changed", ["norm_eps", "rope_base", "norm.weight"])
def test_a_model_that_is_off_is_caught_by_the_oracle(backend: str, changed: str):
    case = llama_cases()[3]
    params, model = dict(case.params), case.model
    if changed in params:
        params[changed] = params[changed] * np.float32(1.001)
    else:
        model = dataclasses.replace(model, **{changed: getattr(model, changed) * (1.001 if changed == "rope_base" else 1.1)})
    with torch.no_grad():
        expected = llama(model, params)(torch.tensor(case.tokens).long()).logits.numpy()
    with pytest.raises(AssertionError, match="logits"):
        demand([Difference("logits", largest(subjects.logits(backend, case.model, case.params, case.tokens), expected), FLOAT32.oracle)])


# RoPE frequencies against transformers' own functions, real head sizes


@pytest.mark.parametrize(("head_dim", "base", "original", "factor"), [(64, 1e4, 1024, 4.0), (128, 5e5, 8192, 8.0), (32, 1e4, 256, 2.0)])
@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_rope_frequencies_equal_transformers(scaling: str, head_dim: int, base: float, original: int, factor: float):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched = {} if scaling == "none" else {"rope_scaling": scaling, "rope_factor": factor, "rope_original_len": original}
    if scaling == "longrope":
        lists = (tuple(np.linspace(1, most, head_dim // 2)) for most in (2.0, 30.0))
        stretched |= dict(zip(("rope_short_factors", "rope_long_factors"), lists, strict=True))
    model = ModelConfig.build(
        vocab_size=64, dim=4 * head_dim, layers=1, heads=4, rope_base=base, context_length=int(original * factor), **stretched
    )
    if scaling == "ntk":  # the dynamic form grows by (f n / L - (f - 1)) at length n: with f = 1 and n = factor L, by our factor
        config = oracle_config(dataclasses.replace(model, rope_scaling="none", rope_factor=1.0, context_length=original))
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": base, "factor": 1.0, "original_max_position_embeddings": original}
        expected, attention_factor = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=int(original * factor))
    elif scaling != "none":
        expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling](oracle_config(model), "cpu")
    else:
        expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(oracle_config(model)).inv_freq
        attention_factor = 1.0
    pairs = [(rope.frequencies(rope.settled(model, original)), expected)]
    if scaling == "longrope":
        longer, _ = ROPE_INIT_FUNCTIONS[scaling](oracle_config(model), "cpu", seq_len=original + 1)
        pairs.append((rope.frequencies(rope.settled(model, original + 1)), longer))
    demand(
        [
            *(
                Difference("frequencies", float(np.abs(ours / theirs.double().numpy() - 1).max()), FLOAT32.frequencies)
                for ours, theirs in pairs
            ),
            Difference("attention factor", abs(rope.attention_factor(model) / attention_factor - 1), FLOAT32.frequencies),
        ]
    )
