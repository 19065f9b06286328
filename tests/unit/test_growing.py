"""`smedjan grow`: the larger model computes the same for every mixer, its copies are no twins, and a run goes on from it."""

import json

import numpy as np
import pytest

from smedjan_common import cli
from smedjan_common.checkpoint import newest, read_checkpoint, read_info, verify_checkpoint
from smedjan_common.checkpoint.growing import grown
from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.errors import ConfigError
from smedjan_common.model.growth import Wanted, plan, shortest
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params, require_tree
from smedjan_common.reference import model as reference
from tests.fakes import models
from tests.fakes.runs import arguments, train_here, write_text

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))


def trained(config, seed=1):
    """Values as after some training: nothing is zero, no norm is one, no two layers are alike."""
    rng = np.random.default_rng(seed)
    start = initial_params(config, seed)
    return {name: (value + 0.2 * rng.standard_normal(value.shape)).astype(np.float32) for name, value in start.items()}


def lazily(params):
    return {name: Lazy(value.dtype, value.shape, lambda value=value: value) for name, value in params.items()}


def larger(config, params, **wanted):
    growth = plan(config, Wanted(**wanted))
    made = {name: np.asarray(value) for name, value in grown(lazily(params), growth, 3).items()}
    require_tree(growth.new, made)
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in made.values())
    return growth, made


def off(config, params, new, made):
    """The largest difference of logits over the largest logit, in float64."""
    before, after = reference.forward(config, params, TOKENS), reference.forward(new, made, TOKENS)
    return np.abs(after - before).max() / np.abs(before).max()


def small(mixer, **changes):
    return models.model(**{"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 24, "mixer": (mixer,), **SIZES.get(mixer, {}), **changes})


SIZES = {
    "ssm": {"ssm_head_dim": 16, "ssm_state": 8},
    "rwkv": {"rwkv_head_dim": 16},
    "block-sparse": {"block_size": 4, "block_topk": 2},
}
EVERY = {
    "depth": {"layers": 5},
    "width": {"ffn_dim": 56},
    "experts": {"experts": 4, "shared_experts": 1},
    "all": {"layers": 3, "ffn_dim": 48, "experts": 3},
}


@pytest.mark.parametrize("grows", EVERY)
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_function_is_kept_for_every_mixer(mixer, grows):
    config = small(mixer)
    params = trained(config)
    growth, made = larger(config, params, **EVERY[grows])
    assert off(config, params, growth.new, made) < 1e-6


HYBRID = {"mixer": ("rwkv", "attention", "ssm", "rwkv"), "layers": 4, "rwkv_head_dim": 16, "ssm_head_dim": 16, "ssm_state": 8}
EXPERTS = {"ffn": ("experts",), "experts": 3}
MODELS = {  # what grows, and how
    "a pattern": (HYBRID, {"layers": 7, "ffn_dim": 40}),
    "patterns of single layers": (
        {"layers": 3, "rope_layers": ("on", "off"), "window": 3, "window_layers": ("off", "on", "on")},
        {"layers": 4},
    ),
    "norms after": ({"norms": "post"}, {"layers": 3, "ffn_dim": 40, "heads": 4}),
    "norms around": ({"norms": "sandwich", "tied_head": False, "residual_multiplier": 0.5}, {"layers": 5, "experts": 3}),
    "heads": ({}, {"heads": 3}),
    "heads of one key": ({"heads": 4, "kv_heads": 2}, {"heads": 6}),
    "heads and keys": (
        {"heads": 4, "kv_heads": 2, "qkv_bias": True, "o_bias": True, "qk_norm": True},
        {"heads": 8, "kv_heads": 4, "layers": 3},
    ),
    "keys alone": ({"heads": 4, "kv_heads": 2}, {"kv_heads": 4}),
    "a norm over all heads": ({"qk_norm": True, "qk_norm_over": "all", "heads": 4, "kv_heads": 2}, {"heads": 8, "kv_heads": 4}),
    "heads of their own size": ({"head_size": 8, "rope_dim": 4}, {"heads": 5}),
    "heads that choose blocks": ({"mixer": ("block-sparse",), "block_size": 4, "block_topk": 2}, {"heads": 4}),
    "states": ({"mixer": ("linear",), "heads": 4, "kv_heads": 1}, {"kv_heads": 2}),
    "heads of a gate": ({"heads": 4, "kv_heads": 2, "attention_gate": True, "qkv_bias": True}, {"heads": 8}),
    "heads beside others": (
        {"mixer": ("gated-deltanet", "attention"), "heads": 2, "delta_key_heads": 2, "delta_value_heads": 4, "delta_key_size": 10},
        {"heads": 4, "kv_heads": 4},
    ),
    "keys of their own size": ({"mixer": ("gated-deltanet",), "heads": 4, "kv_heads": 2, "delta_key_size": 6}, {"kv_heads": 4}),
    "experts and a gate": ({**EXPERTS, "shared_experts": 1, "shared_gate": True}, {"layers": 3}),
    "keys that are convolved": ({"mixer": ("gated-deltanet",), "heads": 4, "kv_heads": 2}, {"kv_heads": 4}),
    "experts and depth": (EXPERTS, {"layers": 4, "ffn_dim": 40}),
    "experts of their own width": ({**EXPERTS, "expert_dim": 8, "shared_experts": 2, "router": "bias"}, {"expert_dim": 20}),
    "every second layer's": ({"layers": 3}, {"layers": 4, "experts": 4, "ffn": ("swiglu", "experts"), "router": "bias", "ffn_dim": 32}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_kept(name):
    changes, wanted = MODELS[name]
    config = models.model(**{"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 24, **changes})
    params = trained(config)
    growth, made = larger(config, params, **wanted)
    assert off(config, params, growth.new, made) < 1e-6
    assert {name: getattr(growth.new, name) for name in wanted} == wanted


def test_a_pattern_stays_that_of_the_old_layers():
    growth = plan(models.model(dim=32, **HYBRID), Wanted(layers=7))
    assert growth.new.mixer == ("rwkv", "rwkv", "attention", "attention", "ssm", "ssm")  # and again
    assert [growth.added(layer) for layer in range(7)] == [False, True, False, True, False, True, False]
    assert [shortest(pattern) for pattern in ("abab", "aba", "aaa", "abac")] == [("a", "b"), ("a", "b"), ("a",), tuple("abac")]


def test_growing_again_what_was_never_trained_makes_no_twins():
    config = small("attention")
    growth, made = larger(config, trained(config), layers=3)
    again, more = larger(growth.new, made, ffn_dim=48)
    down = more["layers.1.ffn.down_proj.weight"]
    assert not made["layers.1.ffn.down_proj.weight"].any()
    assert np.linalg.norm(down[:, ::2] - down[:, 1::2]) > 0
    assert off(config, trained(config), again.new, more) < 1e-6


def test_copies_write_different_things_and_together_what_the_one_wrote():
    config = small("attention")
    params = trained(config)
    _, made = larger(config, params, ffn_dim=60, heads=4)
    up, down = made["layers.0.ffn.up_proj.weight"], made["layers.0.ffn.down_proj.weight"]
    index = np.arange(60) * 24 // 60
    np.testing.assert_array_equal(up, params["layers.0.ffn.up_proj.weight"][index])
    whole = params["layers.0.ffn.down_proj.weight"]
    for unit in range(24):
        copies = down[:, index == unit].astype(np.float64)
        np.testing.assert_allclose(copies.sum(axis=1), whole[:, unit], rtol=0, atol=1e-7)
        for a in range(copies.shape[1]):
            for b in range(a):
                between = np.linalg.norm(copies[:, a] - copies[:, b]) / np.linalg.norm(whole[:, unit])
                cosine = copies[:, a] @ copies[:, b] / np.linalg.norm(copies[:, a]) / np.linalg.norm(copies[:, b])
                assert between > 0.2
                assert abs(cosine) < 0.9  # of parallel ones the gradients would be, and Adam's steps would be equal


def test_experts_are_one_function_of_different_values():
    config = small("attention")
    _, made = larger(config, trained(config), experts=3, shared_experts=2)
    gate, up, down = (made[f"layers.0.ffn.{name}_proj.weight"].astype(np.float64) for name in ("gate", "up", "down"))
    x = np.random.default_rng(1).standard_normal(32)
    outputs = [down[e] @ ((g := gate[e] @ x) / (1 + np.exp(-g)) * (up[e] @ x)) for e in range(3)]
    np.testing.assert_allclose(outputs[1:], [outputs[0]] * 2, rtol=1e-5)
    assert all(np.linalg.norm(up[a] - up[b]) > 0.1 * np.linalg.norm(up[a]) for a in range(3) for b in range(a))
    assert not made["layers.0.ffn.shared.down_proj.weight"].any()
    assert np.ptp(made["layers.0.ffn.router.weight"]) > 0


WRONG = {
    "nothing": ({}, {}, "Nothing is to grow."),
    "value heads": ({"mixer": ("gated-deltanet",)}, {"heads": 4}, "The heads of gated-deltanet cannot grow in number."),
    "keys of values": (
        {"mixer": ("gated-deltanet",), "kv_heads": 1, "delta_value_heads": 4},
        {"kv_heads": 2},
        "--delta-value-heads alone",
    ),
    "the same": ({}, {"layers": 2}, "Nothing would grow."),
    "fewer layers": ({}, {"layers": 1}, "--layers would be 1, and the model has 2."),
    "narrower": ({}, {"ffn_dim": 8}, "The feed-forward would be 8 wide"),
    "heads of the width": ({"mixer": ("mla",)}, {"heads": 4}, "The heads of mla cannot grow in number."),
    "heads of one mixer": ({"mixer": ("attention", "ssm"), "ssm_head_dim": 16}, {"heads": 4}, "The heads of ssm cannot grow in number."),
    "keys of none": ({"mixer": ("ssm",), "ssm_head_dim": 16}, {"kv_heads": 4}, "--kv-heads 4 would do nothing."),
    "uneven keys": (
        {"heads": 6, "kv_heads": 2, "head_size": 8},
        {"kv_heads": 3},
        "6 heads over 3 key/value heads cannot be made of 6 over 2.",
    ),
    "uneven groups": ({}, {"heads": 4, "kv_heads": 3}, "does not divide into --kv-heads 3"),
    "blocks": (
        {"mixer": ("block-sparse",), "block_size": 4, "heads": 4, "kv_heads": 2},
        {"heads": 6},
        "Block-sparse heads cannot become 6",
    ),
    "fixed decays": ({"mixer": ("linear",), "linear_decay": "fixed", "kv_heads": 1}, {"kv_heads": 2}, "--linear-decay fixed"),
    "a norm": ({"qk_norm": True, "qk_norm_over": "all"}, {"heads": 3}, "--qk-norm-over all does not go with 3 heads of 2."),
    "more experts": (EXPERTS, {"experts": 4}, "The model has 3 experts already."),
    "wider experts": ({}, {"expert_dim": 40}, "--expert-dim would do nothing."),
    "narrower experts": (EXPERTS, {"expert_dim": 8}, "an expert is 24 wide"),
    "the width of new experts": ({}, {"experts": 4, "expert_dim": 40}, "--expert-dim does not go with --experts."),
    "a width that nothing has": ({**EXPERTS, "expert_dim": 8}, {"ffn_dim": 40}, "--ffn-mult would do nothing."),
    "experts without a number": ({}, {"layers": 3, "shared_experts": 1}, "--shared-experts would do nothing."),
    "a pattern of nothing": ({}, {"layers": 3, "ffn": ("experts",)}, "--ffn would do nothing."),
    "one of one": ({}, {"experts": 4, "experts_per_token": 1}, "--experts-per-token is 1."),
    "a wrong name": ({}, {"experts": 4, "ffn": ("swiglu", "expert")}, "expert"),
    "experts nowhere": ({}, {"experts": 4, "ffn": ("swiglu",)}, "No layer would have experts: --ffn is swiglu."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_grow_is_refused_with_what_can(name):
    changes, wanted, says = WRONG[name]
    config = models.model(**{"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 24, **changes})
    with pytest.raises(ConfigError) as refused:
        plan(config, Wanted(**wanted))
    assert says in str(refused.value)
    assert refused.value.fix


def test_a_run_folder_begins_that_says_where_it_is_from_and_training_goes_on_in_it(tmp_path, capsys):
    text = write_text(tmp_path)
    assert train_here(*arguments(text, tmp_path / "run", 3)) == 0
    assert cli.main(["grow", str(tmp_path / "run"), "--layers", "3", "--ffn-mult", "20", "--output", str(tmp_path / "grown")]) == 0
    assert "layers 1 -> 3, feed-forward 256 -> 512, parameters" in " ".join(capsys.readouterr().out.split())
    verify_checkpoint(tmp_path / "grown/step-00000000")
    info, final = newest(tmp_path / "grown"), read_info(tmp_path / "run/final")
    assert (info.step, info.optimizer, info.train, info.tokenizer_hash) == (0, None, None, final.tokenizer_hash)
    how = info.extra["grow"]
    assert how["of"] == {"path": str(tmp_path / "run/final"), "step": 3, "sha256": final.files["model.safetensors"].sha256}
    assert (how["layers"], how["seed"], how["model"]) == ([0, 0, 0], 0, final.model.to_dict())
    rarely = ("--checkpoint-every", 500, "--eval-every", 0, "--sample-every", 0, "--batch-size", 4)
    assert train_here(text, "--checkpoint-dir", tmp_path / "grown", "--steps", 2, *rarely) == 0
    out = capsys.readouterr().out
    assert "Starting from the weights of" in out
    done = read_checkpoint(tmp_path / "grown")
    assert (done.info.step, done.model, done.train.seq_len) == (2, info.model, 16)
    began = {"path": str(info.path), "step": 0, "sha256": info.files["model.safetensors"].sha256, "grow": how}
    assert done.info.extra["pretrained"] == began
    assert train_here("--checkpoint-dir", tmp_path / "grown", "--steps", 3) == 0
    assert read_info(tmp_path / "grown/final").extra["pretrained"] == began
    assert json.loads((tmp_path / "grown/config.json").read_text())["flags"]["pretrained"] == str(info.path)
    capsys.readouterr()
    assert cli.main(["info", str(tmp_path / "grown")]) == 0
    assert f"began with {info.path}, grown from {tmp_path}/run/final (step 3)" in " ".join(capsys.readouterr().out.split())
    assert (
        train_here(text, "--pretrained", tmp_path / "grown/step-00000000", "--checkpoint-dir", tmp_path / "other", "--steps", 1, *rarely)
        == 0
    )


def test_the_command_refuses_before_it_writes(tmp_path, capsys):
    models.save_initial(tmp_path / "model", 0)
    for words, says in (
        (("--layers", "0"), "--layers is 0."),
        (("--heads", "1"), "--heads would be 1, and the model has 2."),
        (("--layers", "2", "--output", "model/in"), "lies in the input"),
        (("--dim", "32"), "--dim"),
    ):
        words = ["grow", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *words]
        words[-1] = str(tmp_path / words[-1]) if words[-1] == "model/in" else words[-1]
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        assert code == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
