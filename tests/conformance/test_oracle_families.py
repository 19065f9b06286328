"""The outside: models with what other families have more than a Llama are theirs in transformers (torch, CPU, eager): logits and gradients.

The definition and both backends are compared; what their weights are called is said here, and not taken from convert.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.reference import model as reference
from tests.conformance import subjects
from tests.conformance.cases import CASES, Case
from tests.conformance.compare import Difference, Mismatch, demand, largest, tensors
from tests.conformance.gates import FLOAT32
from tests.conformance.test_oracle_llama import oracle_loss
from tests.conformance.test_oracle_llama import oracle_name as llama_name

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]


def _smollm3(model: ModelConfig) -> dict[str, Any]:
    layers = [model.at(layer) for layer in range(model.layers)]
    return {
        "no_rope_layers": [int(layer.rope_layers == ("on",)) for layer in layers],
        "use_sliding_window": True,
        "sliding_window": model.window,
        "layer_types": ["sliding_attention" if layer.window else "full_attention" for layer in layers],
    }


def _granite(model: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": model.attention_multiplier,
        "logits_scaling": model.logits_divisor,
    }


FAMILIES = {
    "patterns": ("SmolLM3", _smollm3),
    "multipliers": ("Granite", _granite),
    "post-norms": ("Olmo2", lambda model: {}),
}  # by the variant of the suite's models
CASES_HERE = [pytest.param(CASES[f"attention-swiglu-mha-{variant}"], id=variant) for variant in FAMILIES]


def oracle_name(name: str) -> str:
    """Norms that come after have names of their own."""
    name = name.replace("mixer_post_norm", "post_attention_layernorm").replace("ffn_post_norm", "post_feedforward_layernorm")
    return llama_name(name)


def oracle(case: Case, dtype: Any = None) -> Any:
    """transformers' model with the case's weights."""
    kind, more = FAMILIES[case.id.removeprefix("attention-swiglu-mha-")]
    model = case.model
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.context_length,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        tie_word_embeddings=model.tied_head,
        attn_implementation="eager",
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
        **more(model),
    )
    built = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype or torch.float32)
    weights = {oracle_name(name): torch.tensor(value, dtype=dtype or torch.float32) for name, value in case.params.items()}
    missing, unexpected = built.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.tied_head else set()), missing
    return built


def _logits(case: Case, dtype: Any) -> np.ndarray:
    with torch.no_grad():
        return oracle(case, dtype)(torch.tensor(case.tokens).long()).logits.numpy()


@pytest.mark.parametrize("case_here", CASES_HERE)
def test_logits_equal_transformers(backend: str, case_here: Case):
    case, expected = case_here, _logits(case_here, torch.float64)
    got = {
        "logits": subjects.logits(backend, case.model, case.params, case.tokens),
        "definition": reference.forward(case.model, case.params, case.tokens),
    }
    demand(Difference(how, largest(value, expected), FLOAT32.oracle) for how, value in got.items())


@pytest.mark.parametrize("case_here", CASES_HERE)
def test_every_gradient_equals_torch_autograd(backend: str, case_here: Case):
    case = case_here
    theirs = oracle(case, torch.float64)
    oracle_loss(theirs, *case.batches[0]).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    _, ours = subjects.loss_and_gradients(backend, case.model, case.train, case.params, case.batches[0])
    demand(tensors(ours, {name: gradients[oracle_name(name)] for name in ours}, case.tolerance.gradient, "gradient of "))


OFF = [
    *(
        ("patterns", {"rope_layers": ("off", "on")}),
        ("patterns", {"window_layers": ("on", "off")}),
        ("patterns", {"window_layers": ("on",)}),
    ),
    *(("multipliers", {"embedding_multiplier": 2.51}), ("multipliers", {"residual_multiplier": 0.701})),
    *(("multipliers", {"attention_multiplier": 0.0}), ("multipliers", {"logits_divisor": 1.501})),
    ("post-norms", {"norm_eps": 1e-3}),
]


@pytest.mark.parametrize(("variant", "changed"), OFF, ids=str)
def test_an_option_that_is_off_is_caught_by_the_oracle(backend: str, variant: str, changed: dict[str, Any]):
    case = CASES[f"attention-swiglu-mha-{variant}"]
    got = subjects.logits(backend, dataclasses.replace(case.model, **changed), case.params, case.tokens)
    with pytest.raises(Mismatch):
        demand([Difference("logits", largest(got, _logits(case, torch.float32)), FLOAT32.oracle)])
