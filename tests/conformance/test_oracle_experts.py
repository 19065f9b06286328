"""The outside: our experts are transformers' Mixtral, DeepSeek-V2 and OLMoE (softmax router) and DeepSeek-V3 (bias router), weights alike:
with groups of experts or without, with shared ones or without, weights of a token's experts added up to 1 or not.

Outputs, and gradients of the input and of every weight, of the feed-forward by itself; Mixtral's balance loss is ours times k.
"""

from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.params import initial_params
from smedjan_common.reference import experts as reference
from smedjan_common.reference import model as reference_model
from tests.conformance import subjects
from tests.conformance.compare import Difference, Mismatch, demand, largest, relative_l2, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed (extra: oracle)")
deepseek = pytest.importorskip(
    "transformers.models.deepseek_v3.modeling_deepseek_v3", reason="transformers is not installed (extra: oracle)"
)
deepseek_2 = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2", reason="transformers 5 has it (extra: oracle)")
olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

NAME, DIM, WIDTH, TOKENS = "layers.1.ffn", 32, 48, (3, 29)
FORMS: dict[str, dict[str, Any]] = {
    "mixtral, 2 of 4": {"experts": 4, "experts_per_token": 2},
    "mixtral, 3 of 8": {"experts": 8, "experts_per_token": 3},
    "deepseek, 2 of 4 and 1": {"experts": 4, "experts_per_token": 2, "shared_experts": 1, "router": "bias"},
    "deepseek, 3 of 8 and 2": {"experts": 8, "experts_per_token": 3, "shared_experts": 2, "router": "bias"},
    "deepseek, 3 of 12 in 2 of 4 groups": {
        **{"experts": 12, "experts_per_token": 3, "shared_experts": 1, "router": "bias"},
        **{"expert_groups": 4, "expert_groups_per_token": 2, "routed_scaling_factor": 2.5},
    },
    "deepseek, weights as they are": {
        **{"experts": 4, "experts_per_token": 1, "shared_experts": 1, "router": "bias"},
        **{"norm_topk_prob": False, "routed_scaling_factor": 0.7},
    },
    "deepseek 2, 2 of 8": {"experts": 8, "experts_per_token": 2, "shared_experts": 2, "norm_topk_prob": False},
    "deepseek 2, 3 of 12 in 2 of 4 groups": {
        **{"experts": 12, "experts_per_token": 3, "shared_experts": 1, "norm_topk_prob": False},
        **{"expert_groups": 4, "expert_groups_per_token": 2, "routed_scaling_factor": 16.0},
    },
    "olmoe, 3 of 8": {"experts": 8, "experts_per_token": 3, "norm_topk_prob": False},
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> ModelConfig:
    return config_of(request.param)


def config_of(form: str) -> ModelConfig:
    shape: dict[str, Any] = {"vocab_size": 60, "dim": DIM, "layers": 2, "heads": 4, "ffn_dim": 64, "expert_dim": WIDTH, "init_std": 0.15}
    return ModelConfig.build(**shape, ffn=("experts",), **FORMS[form])


def tensors_of(config: ModelConfig) -> subjects.Params:
    """The feed-forward's tensors, by their names in it; a bias that changes the choice of most tokens."""
    params = reference_model.under(initial_params(config, 1), f"{NAME}.")
    if "router.bias" in params:
        params["router.bias"] = np.random.default_rng(2).normal(0, 0.3, config.experts).astype(np.float32)
    return params


def tokens_of(config: ModelConfig) -> np.ndarray:
    """Inputs whose choices are far from ties: those nearer than 1e-3 are left out, so that rounding decides nothing."""
    x = np.random.default_rng(3).standard_normal((400, DIM)).astype(np.float32)
    params = tensors_of(config)
    scores = reference.choice_scores(x.astype(np.float64) @ params["router.weight"].T, params.get("router.bias"))
    clear = _clear(reference.within_groups(config, scores), config.experts_per_token)
    clear &= _clear(reference.group_scores(config, scores), config.expert_groups_per_token)
    return x[clear][: TOKENS[0] * TOKENS[1]].reshape(*TOKENS, DIM)


def _clear(scores: np.ndarray, taken: int) -> np.ndarray:
    ranked = np.sort(scores, axis=-1)[:, ::-1]
    return ranked[:, taken - 1] - ranked[:, taken] > 1e-3 if taken < ranked.shape[1] else np.ones(len(ranked), bool)


def oracle(config: ModelConfig) -> Any:
    """transformers' module in float64, with our tensors."""
    from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, OlmoeConfig

    params = {name: torch.tensor(value, dtype=torch.float64) for name, value in tensors_of(config).items()}
    shared = {"hidden_size": DIM, "num_experts_per_tok": config.experts_per_token, "hidden_act": "silu"}
    weights = {
        "gate.weight": params["router.weight"],
        "experts.gate_up_proj": torch.cat([params["gate_proj.weight"], params["up_proj.weight"]], dim=1),
        "experts.down_proj": params["down_proj.weight"],
    }
    counts = {"n_routed_experts": config.experts, "n_shared_experts": config.shared_experts}
    counts |= {"n_group": config.expert_groups, "topk_group": config.expert_groups_per_token}
    scaling = {"norm_topk_prob": config.norm_topk_prob, "routed_scaling_factor": config.routed_scaling_factor}
    if config.router == "softmax" and config.shared_experts:
        method = "group_limited_greedy" if config.expert_groups > 1 else "greedy"
        block = deepseek_2.DeepseekV2Moe(DeepseekV2Config(**counts, **scaling, **shared, topk_method=method, moe_intermediate_size=WIDTH))
    elif config.router == "softmax" and not config.norm_topk_prob:
        block = olmoe.OlmoeSparseMoeBlock(OlmoeConfig(num_experts=config.experts, norm_topk_prob=False, intermediate_size=WIDTH, **shared))
    elif config.router == "softmax":
        block = mixtral.MixtralSparseMoeBlock(MixtralConfig(num_local_experts=config.experts, intermediate_size=WIDTH, **shared))
    else:
        block = deepseek.DeepseekV3MoE(DeepseekV3Config(**counts, **scaling, **shared, moe_intermediate_size=WIDTH))
        weights["gate.e_score_correction_bias"] = params["router.bias"]
    weights |= {f"shared_experts.{n.removeprefix('shared.')}": value for n, value in params.items() if n.startswith("shared.")}
    block.double().load_state_dict(weights)
    return block


def oracle_gradients(config: ModelConfig, block: Any) -> subjects.Params:
    """Gradients of the module's parameters, under our names."""
    found = {name: parameter.grad.numpy() for name, parameter in block.named_parameters()}
    gate, up = np.split(found["experts.gate_up_proj"], 2, axis=1)
    ours = {
        "router.weight": found["gate.weight"],
        "gate_proj.weight": gate,
        "up_proj.weight": up,
        "down_proj.weight": found["experts.down_proj"],
    }
    return ours | {f"shared.{n.removeprefix('shared_experts.')}": value for n, value in found.items() if n.startswith("shared_experts.")}


def ours(
    backend: str, config: ModelConfig, params: subjects.Params, x: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, subjects.Params]:
    """Our output, and the gradients of its sum weighted by `weight`, of the input too."""
    array, expert_class = subjects.framework(backend).array, subjects.module(backend, "experts").Experts

    def forward(values: Any) -> Any:
        named = {f"{NAME}.{name}": value for name, value in values.items()}
        return expert_class(config, named, NAME)(values["x"], {})[0]

    values, weight = subjects.on_device(backend, {**params, "x": x}), array(weight)
    grads = subjects.framework(backend).grad(lambda values: (forward(values) * weight).sum())(values)
    return np.asarray(forward(values)), subjects.on_host(grads)


def outer_weight() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((*TOKENS, DIM)).astype(np.float32)


def test_the_definition_equals_transformers(form: ModelConfig):
    x = tokens_of(form)
    params = {name: value.astype(np.float64) for name, value in tensors_of(form).items()}
    with torch.no_grad():
        expected = oracle(form)(torch.tensor(x, dtype=torch.float64)).numpy()
    demand([Difference("output", largest(reference.forward(form, params, x.astype(np.float64), {}), expected), FLOAT32.one_op)])


def test_output_equals_transformers(backend: str, form: ModelConfig):
    x = tokens_of(form)
    with torch.no_grad():
        expected = oracle(form)(torch.tensor(x, dtype=torch.float64)).numpy()
    demand([Difference("output", largest(ours(backend, form, tensors_of(form), x, outer_weight())[0], expected), FLOAT32.oracle)])


def test_every_gradient_equals_torch_autograd(backend: str, form: ModelConfig):
    x, block = torch.tensor(tokens_of(form), dtype=torch.float64, requires_grad=True), oracle(form)
    (block(x) * torch.tensor(outer_weight())).sum().backward()
    _, grads = ours(backend, form, tensors_of(form), tokens_of(form), outer_weight())
    bias = grads.pop("router.bias", None)
    assert bias is None or not bias.any(), "the bias only chooses: it has no gradient"
    expected = oracle_gradients(form, block) | {"x": x.grad.numpy()}
    demand(tensors(grads, expected, FFNS["experts"].tolerance.gradient, "gradient of "))


def test_the_bias_changes_the_choice_and_not_the_weights():
    config = config_of("deepseek, 3 of 8 and 2")
    params, x = tensors_of(config), tokens_of(config).astype(np.float64)
    logits = x @ params["router.weight"].T
    without, with_bias = (reference.route(config, logits, bias) for bias in (np.zeros(config.experts), params["router.bias"]))
    assert np.mean(np.sort(without[0]) != np.sort(with_bias[0])) > 0.1
    scores = 1 / (1 + np.exp(-np.take_along_axis(logits, with_bias[0], axis=-1)))
    assert np.abs(with_bias[1] - scores / scores.sum(-1, keepdims=True)).max() < 1e-12


@pytest.mark.parametrize("form", [name for name in FORMS if "mixtral" in name], indirect=True)
def test_balance_loss_times_k_is_that_of_transformers(backend: str, form: ModelConfig):
    logits = tokens_of(form).reshape(-1, DIM) @ tensors_of(form)["router.weight"].T
    scores = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = mixtral.load_balancing_loss_func((scores,), form.experts, form.experts_per_token)
    expected.backward()
    array, module = subjects.framework(backend).array, subjects.module(backend, "experts")
    load = array(reference.load(form, reference.route(form, logits, None)[0]).astype(np.float32))
    grad = subjects.framework(backend).grad(lambda values: module.balance_loss(values, load))(array(logits))
    k = form.experts_per_token
    demand(
        [
            Difference(
                "definition", abs(k * reference.balance_loss(form, logits.astype(np.float64)) / expected.item() - 1), FLOAT32.one_op
            ),
            Difference("balance loss", abs(k * float(module.balance_loss(array(logits), load)) / expected.item() - 1), FLOAT32.oracle),
            Difference("its gradient", relative_l2(k * np.asarray(grad), scores.grad.numpy()), FLOAT32.oracle),
        ]
    )


def test_balance_loss_is_one_at_perfect_balance_and_grows_with_the_share_of_the_busy():
    config = config_of("mixtral, 2 of 4")
    assert abs(reference.balance_loss(config, np.array([[3.0, 3.0, -3.0, -3.0], [-3.0, -3.0, 3.0, 3.0]] * 8)) - 1) < 1e-12
    assert abs(reference.balance_loss(config, np.array([[50.0, 50.0, -50.0, -50.0]] * 8)) - 2) < 1e-12  # 4 experts over the 2 in use


def test_router_z_loss_is_the_mean_square_of_torchs_logsumexp(backend: str):
    logits = np.random.default_rng(8).normal(0, 3, (50, 8)).astype(np.float32)
    scores = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.logsumexp(scores, dim=-1).square().mean()
    expected.backward()
    array, loss = subjects.framework(backend).array, subjects.module(backend, "experts").router_z_loss
    demand(
        [
            Difference("definition", abs(reference.router_z_loss(logits.astype(np.float64)) / expected.item() - 1), 1e-12),
            Difference("z-loss", abs(float(loss(array(logits))) / expected.item() - 1), FLOAT32.oracle),
            Difference(
                "gradient",
                relative_l2(np.asarray(subjects.framework(backend).grad(loss)(array(logits))), scores.grad.numpy()),
                FLOAT32.oracle,
            ),
        ]
    )


@pytest.mark.parametrize("changed", ["router.weight", "router.bias", "down_proj.weight", "shared.up_proj.weight"])
def test_experts_that_are_off_are_caught_by_the_oracle(backend: str, changed: str):
    form = config_of("deepseek, 3 of 8 and 2")
    x, params = tokens_of(form), tensors_of(form)
    with torch.no_grad():
        expected = oracle(form)(torch.tensor(x, dtype=torch.float64)).numpy()
    params[changed] = params[changed] * np.float32(-1 if changed == "router.bias" else 1.001)
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(ours(backend, form, params, x, outer_weight())[0], expected), FLOAT32.oracle)])
