"""What `--to neutral` refuses: models that cannot be expressed, by name; wrong files, with the file and the reason; never a half."""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import hf_import
from convert.cli import main
from convert.hf_rope import rope_from_hf
from convert.portable import Lazy
from convert.safetensors_file import write_tensors
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.config import ModelConfig
from smedjan_common.errors import SmedjanError
from smedjan_common.model.rope import attention_factor
from smedjan_common.tokenizer import Tokenizer
from tests.unit.convert_models import YARN, convert, model_config, neutral, tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good directory in three shards, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("good")
    convert(neutral(folder), folder / "hf", "--to", "hf", "--max-shard-size", "80KB")
    return folder / "hf"


@pytest.fixture
def hf(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def refusal(path: Path) -> str:
    """What `convert` says when it refuses the directory; nothing is left of the attempt."""
    target = path.parent / "neutral"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([str(path), str(target), "--to", "neutral"]) == 2
    assert not target.exists()
    assert "Traceback" not in said.getvalue()
    assert len(said.getvalue().strip().splitlines()) >= 2, said.getvalue()
    return said.getvalue()


def change(path: Path, name: str, **values: Any) -> None:
    """Other values in a JSON file; None removes."""
    document = json.loads((path / name).read_text()) | values
    (path / name).write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def one_file(path: Path, edit: Callable[[dict[str, np.ndarray]], Any] = lambda arrays: None, **more: np.ndarray) -> None:
    """Put all tensors into one model.safetensors, edited, with more."""
    arrays = {name: tensor.read() for name, tensor in hf_import.open_weights(path).items()}
    edit(arrays)
    arrays |= more
    for file in (*shards(path), path / hf_import.INDEX):
        file.unlink(missing_ok=True)
    write_tensors(path / hf_import.WEIGHTS, {name: lazy(array) for name, array in arrays.items()})


def lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.dtype, array.shape, lambda: array)


# models that cannot be expressed

SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.5, 4.0, 9.0]}
INEXPRESSIBLE = {
    "activation": ({"hidden_act": "gelu"}, "the activation 'gelu'"),
    "type": ({"model_type": "gpt2"}, "of the type 'gpt2'"),
    "near type": ({"model_type": "qwen"}, "These are read: llama, qwen2"),
    "layers that are not there": ({"layer_types": ["full_attention"]}, "1 layer_types"),
    "rope of a layer that is not said": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers [1]"),
    "layers": ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
    "window of some layers": ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}, "9 positions in 1 of 2"),
    "traditional rope": ({"rope_traditional": True}, "rope_traditional"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    "longrope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "RoPE of the type 'longrope'"),
    "dynamic rope": ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE of the type 'dynamic'"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial rotary"),
    "odd part of a head": ({"model_type": "glm4_moe", "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4"),
    "longrope of a phi": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
        "no short_factor of numbers",
    ),
    "longrope of another number of pairs": ({"model_type": "phi3", "rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "4 and 1 factors"),
    "longrope with factors of short texts": ({"model_type": "phi3", "rope_scaling": {**LONGROPE, "short_mscale": 1.1}}, "short_mscale"),
    "longrope of two lengths": (
        {"model_type": "phi3", "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}},
        "twice, as 32 and 4096",
    ),
    "olmo3 with two bases": (
        {"model_type": "olmo3", "rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}},
        "a base of its own",
    ),
    # transformers gives such layers 500000 then, mlx-lm the base that is there
    "olmo3 with a base that is not for all layers": ({"model_type": "olmo3", "rope_theta": 2e4, "rope_parameters": None}, "of its own"),
    "olmo3 with flat rope": ({"model_type": "olmo3", "rope_parameters": {"rope_type": "yarn"}}, "not of its layer_types"),
    "yarn beta": ({"rope_parameters": SCALED | {"beta_fast": 16}}, "YaRN with beta_fast 16"),
    "yarn factor": ({"rope_parameters": SCALED | {"attention_factor": 1.0}}, "YaRN with attention_factor 1"),
    "yarn mscale": ({"rope_parameters": SCALED | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
    "yarn untruncated": ({"rope_parameters": SCALED | {"truncate": False}}, "truncation"),
    "groups": ({"num_key_value_heads": 3}, "--kv-heads 3"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_the_model_cannot_express_is_refused_by_name(hf: Path, case: str):
    values, words = INEXPRESSIBLE[case]
    change(hf, "config.json", **values)
    assert words in refusal(hf)


def test_a_bias_is_refused_by_name_and_left_out_where_it_is_zero(hf: Path, capsys: pytest.CaptureFixture):
    name = "model.layers.1.self_attn.k_proj.bias"
    one_file(hf, **{name: np.array([0, 0, 1e-9, 0], np.float32)})
    assert f"has the bias {name}" in refusal(hf)
    one_file(hf, **{name: np.zeros(4, np.float32)})
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    assert "biases are all zero" in capsys.readouterr().out


def test_a_head_is_tied_where_it_equals_the_embedding_and_one_that_is_missing_is_refused(hf: Path, capsys: pytest.CaptureFixture):
    embed = hf_import.open_weights(hf)["model.embed_tokens.weight"].read()
    change(hf, "config.json", tie_word_embeddings=False)
    assert "lacks the tensor lm_head.weight" in refusal(hf)
    one_file(hf, **{"lm_head.weight": embed})
    assert hf_import.read(hf).config.tied_head
    one_file(hf, **{"lm_head.weight": embed[:-1]})
    assert "lm_head.weight" in refusal(hf)
    other = np.where(np.arange(320)[:, None] == 5, 0, embed)
    one_file(hf, **{"lm_head.weight": other})
    for said in (False, True, None):  # the tensors are the truth
        change(hf, "config.json", tie_word_embeddings=said)
        model = hf_import.read(hf)
        assert not model.config.tied_head
        assert np.array_equal(model.tensors["head.weight"].read(), other)
    one_file(hf, lambda arrays: arrays.pop("lm_head.weight"))
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    assert "the embedding is taken for the head" in capsys.readouterr().out


def test_the_length_before_yarn_may_stand_beside_it_and_two_lengths_are_refused(hf: Path):
    """At the top of config.json, as transformers 5 takes it; in the scaling; in both."""
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    for keys in ({"rope_parameters": scaling, "rope_scaling": None}, {"rope_parameters": None, "rope_scaling": scaling}):
        change(hf, "config.json", original_max_position_embeddings=32, **keys)
        assert hf_import.read(hf).config.rope_original_len == 32
    change(hf, "config.json", rope_scaling=scaling | {"original_max_position_embeddings": 64})
    assert "twice, as 32 and 64" in refusal(hf)


@pytest.mark.parametrize(("said", "factor"), [({}, 1.0), ({"factor": 4.0}, (1 + math.log(4) / math.log(128)) ** 0.5)])
def test_a_longrope_that_does_not_stretch_multiplies_nothing(said: dict[str, float], factor: float):
    """As transformers has it where a context is the original one, and no factor is said."""
    values = {"original_max_position_embeddings": 128, "rope_scaling": {**LONGROPE, "factor": None} | said}
    found = rope_from_hf(values, "config.json", 128, 8, "phi3")
    config = ModelConfig(vocab_size=64, dim=16, layers=1, heads=2, kv_heads=2, ffn_dim=16, context_length=128, **found)
    config.validate()
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


def test_weights_that_are_no_numbers_are_refused_and_own_code_is_told(hf: Path, capsys: pytest.CaptureFixture):
    change(hf, "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    assert "auto_map" in capsys.readouterr().out
    shutil.rmtree(hf.parent / "neutral")
    name = "model.layers.1.mlp.up_proj.weight"
    one_file(hf, lambda arrays: arrays[name].__setitem__((0, 0), np.nan))
    assert f"{name} in {hf} has values that are not finite" in refusal(hf)


@pytest.mark.parametrize("name", ["score.weight", "model.layers.0.mlp.experts.0.w1.weight", "../../x", "model.layers.2.mlp.up_proj.weight"])
def test_a_tensor_that_no_llama_has_is_refused_by_name(hf: Path, name: str):
    one_file(hf, **{name: np.zeros((2, 2), np.float32)})
    assert repr(name) in refusal(hf)


def test_a_table_of_frequencies_is_left_out(hf: Path):
    convert(hf, hf.parent / "without", "--to", "neutral")
    one_file(hf, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    assert same_model(hf.parent / "neutral", hf.parent / "without")


def same_model(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, bit for bit, and the same tokenizer."""
    hashes = [read_checkpoint(path).tokenizer_hash for path in (one, other)]
    return hashes[0] == hashes[1] and (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


# tokenizers


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.update(model={"type": "Other", "vocab": []}), "model is Other"),
        (lambda t: t["model"].update(dropout=0.1), "gets other ids each time"),
        (lambda t: t.update(added_tokens=5), "added_tokens are not a list"),
        (lambda t: t["model"]["vocab"].update(zzzz=7), "two tokens with the same id 7"),
        (lambda t: t["model"]["vocab"].update(a=10**10), "the id 10000000000"),
        (lambda t: t["model"]["vocab"].update(zzzz=-1), "the id -1"),
        (lambda t: t["model"]["vocab"].update(zzzz=5000), "the model has 320 embedding rows"),
    ],
    ids=["model", "dropout", "types", "twice", "huge", "negative", "too many"],
)
def test_another_tokenizer_is_refused_with_the_reason(hf: Path, edit: Callable[[dict], Any], words: str):
    document = json.loads((hf / "tokenizer.json").read_text())
    edit(document)
    (hf / "tokenizer.json").write_text(json.dumps(document))
    said = refusal(hf)
    assert words in said
    assert "tokenizer.json" in said


def test_without_a_tokenizer_the_weights_are_taken_over_and_it_is_said(hf: Path, capsys: pytest.CaptureFixture):
    (hf / "tokenizer.json").unlink()
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    assert "There is no tokenizer.json" in capsys.readouterr().out
    checkpoint = read_checkpoint(hf.parent / "neutral")
    assert (checkpoint.tokenizer_json, checkpoint.model.vocab_size) == (None, 320)


def test_a_tokenizer_of_another_kind_is_kept_as_it_is(hf: Path, capsys: pytest.CaptureFixture):
    change(hf, "tokenizer.json", normalizer={"type": "NFC"})
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    assert "run by the library tokenizers" in capsys.readouterr().out
    convert(hf.parent / "neutral", hf.parent / "again", "--to", "hf")
    raw = (hf / "tokenizer.json").read_bytes()
    assert (hf.parent / "neutral" / "tokenizer.json").read_bytes() == (hf.parent / "again" / "tokenizer.json").read_bytes() == raw


def test_what_begins_and_ends_a_text_is_kept(hf: Path):
    """A post-processor that puts a token before a text, a list of end tokens: into the checkpoint, and out again."""
    document = json.loads((hf / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    eot = next(token["id"] for token in document["added_tokens"] if token["content"] == "<|endoftext|>")
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [eot], "tokens": ["<|endoftext|>"]}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    step = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text], "special_tokens": special}
    change(hf, "tokenizer.json", post_processor=step)
    change(hf, "generation_config.json", eos_token_id=[eot, eot + 1, 99999, "x"])
    for name in ("neutral", "again"):
        convert(hf if name == "neutral" else hf.parent / "neutral", hf.parent / name, "--to", "neutral" if name == "neutral" else "hf")
        found = Tokenizer.load(hf.parent / name)
        assert found.bos_id == eot
        assert found.begin("the") == [eot, *found.encode("the")]
        assert found.eos_ids == {eot} if name == "again" else found.eos_ids <= {eot, eot + 1}
    change(hf, "tokenizer_config.json", add_bos_token=False)
    assert Tokenizer.load(hf).bos_id is None


# wrong files


def test_a_shard_that_is_cut_short_missing_or_a_pickle_is_named(hf: Path):
    first, second = shards(hf)[:2]
    raw = first.read_bytes()
    for content in (raw[:-1], raw[: len(raw) // 2], raw[:5], b"", b"\xff" * 400, raw + b"\0"):
        first.write_bytes(content)
        assert str(first) in refusal(hf)
    first.write_bytes(pickle.dumps({"model.norm.weight": [1.0] * 100}))
    assert f"{first} is a pickle" in refusal(hf)
    first.unlink()
    assert f"{first} is missing" in refusal(hf)
    first.mkdir()
    assert str(first) in refusal(hf)
    first.rmdir()
    first.write_bytes(second.read_bytes())
    assert str(first) in refusal(hf)


def test_pickled_weights_are_never_opened(hf: Path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(hf / "trapped"),)

    for file in (*shards(hf), hf / hf_import.INDEX):
        file.unlink()
    assert "has no weights" in refusal(hf)
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "pytorch_model.bin, a pickle" in refusal(hf)
    (hf / hf_import.WEIGHTS).write_bytes(pickle.dumps(Trap()))
    assert "model.safetensors is a pickle" in refusal(hf)
    assert not (hf / "trapped").exists()


@pytest.mark.parametrize(
    "name", ["../good.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".hidden.safetensors", "x.bin", "x.safetensors\0"]
)
def test_an_index_names_files_beside_it_only(hf: Path, name: str):
    shutil.copy(shards(hf)[0], hf.parent / "good.safetensors")
    index = json.loads((hf / hf_import.INDEX).read_text())
    index["weight_map"] = {key: name for key in index["weight_map"]}
    (hf / hf_import.INDEX).write_text(json.dumps(index))
    assert f"names the file {name!r}" in refusal(hf)


def test_an_index_that_does_not_fit_its_shards_is_refused(hf: Path):
    index = json.loads((hf / hf_import.INDEX).read_text())["weight_map"]
    first, second = (path.name for path in shards(hf)[:2])
    name = next(key for key, file in index.items() if file == first)
    for wrong, words in (
        (index | {name: second}, f"{first} has a tensor {name!r}"),
        ({key: file for key, file in index.items() if key != name}, f"{first} has a tensor {name!r}"),
        (index | {"model.more": first}, "lacks the tensor 'model.more'"),
        (["model.safetensors"], "no weight_map"),
        ({name: 5}, "no weight_map"),
        ({}, "tensors"),
    ):
        (hf / hf_import.INDEX).write_text(json.dumps({"weight_map": wrong}))
        assert words in refusal(hf)


def test_other_shapes_types_and_missing_tensors_are_named(hf: Path, tmp_path: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    for number, (edit, words) in enumerate(
        (
            (lambda arrays: arrays.update({name: arrays[name].T.copy()}), f"{name} in"),
            (lambda arrays: arrays.update({name: arrays[name].reshape(-1)}), "has shape (8192,)"),
            (lambda arrays: arrays.pop(name), f"lacks the tensor {name}"),
            (lambda arrays: [arrays.pop(key) for key in list(arrays) if "layers.1." in key], "(and 8 more)"),
        )
    ):
        copy = Path(shutil.copytree(hf, tmp_path / f"copy{number}"))
        one_file(copy, edit)
        assert words in refusal(copy)
    from safetensors.numpy import save_file

    one_file(hf)
    arrays = {key: tensor.read() for key, tensor in hf_import.open_weights(hf).items()}
    save_file(arrays | {name: arrays[name].astype(np.int8)}, hf / hf_import.WEIGHTS)
    assert f"The tensor {name!r} in {hf / hf_import.WEIGHTS} has dtype I8" in refusal(hf)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"hidden_size": -32}, "hidden_size -32"),
        ({"hidden_size": None}, "hidden_size None"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"num_hidden_layers": 10_000_000}, "promises 10000000 layers"),
        ({"num_hidden_layers": 3}, "layers.2."),
        ({"num_hidden_layers": 1}, "layers.1."),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 256}, "has shape (320, 32)"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rope_theta": float("nan"), "rope_parameters": None}, "rope_theta"),
        ({"rope_scaling": [1], "rope_parameters": None}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "--rope-factor 0.5"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 9}, "odd number"),
        ({"num_attention_heads": 3}, "--kv-heads 2"),
        ({"num_attention_heads": 32, "head_dim": 1, "num_key_value_heads": 16}, "odd number"),
        ({"layer_types": 7}, "config.json cannot be used"),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window 'x'"),
    ],
)
def test_a_wrong_configuration_is_refused_with_what_is_wrong(hf: Path, values: dict, words: str):
    change(hf, "config.json", **values)
    said = refusal(hf)
    assert words in said


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"model_type": "llama"}', "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(hf: Path, text: str):
    (hf / "config.json").write_text(text, encoding="latin-1")
    said = refusal(hf)
    assert str(hf / "config.json") in said
    assert "no format" not in said


def test_a_directory_with_a_wrong_configuration_is_not_what_force_may_replace(hf: Path, tmp_path: Path):
    (hf / "config.json").write_text("{}")
    assert "of the type None" in refusal(hf)
    assert not hf_import.detect(hf)


def test_dtypes_may_be_mixed(hf: Path):
    """Norms in float32 among bfloat16 matrices, as some models have it."""
    whole = {name: tensor.read() for name, tensor in hf_import.open_weights(hf).items()}
    one_file(hf, lambda arrays: arrays.update({k: v.astype(ml_dtypes.bfloat16) for k, v in arrays.items() if v.ndim == 2}))
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    params = read_checkpoint(hf.parent / "neutral").snapshot.params
    assert np.array_equal(params["norm.weight"], whole["model.norm.weight"])
    assert np.array_equal(params["embed.weight"], whole["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_links_of_the_hub_cache_are_followed(hf: Path):
    """huggingface_hub keeps a snapshot as links into a folder of blobs."""
    convert(hf, hf.parent / "plain", "--to", "neutral")
    (hf.parent / "blobs").mkdir()
    for file in list(hf.iterdir()):
        file.rename(hf.parent / "blobs" / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    convert(hf, hf.parent / "neutral", "--to", "neutral")
    assert same_model(hf.parent / "neutral", hf.parent / "plain")
    assert all(file.is_symlink() for file in hf.iterdir()), "they are left as they are"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_any_file_makes_a_crash_or_a_half(exported: Path, tmp_path: Path, data: st.DataObject):
    """Cut, changed, doubled bytes anywhere: an error of ours, or a model that is whole (damage that no reader can see, in a weight)."""
    hf = tmp_path / "hf"
    shutil.rmtree(hf, ignore_errors=True)
    shutil.copytree(exported, hf)
    name = data.draw(st.sampled_from(sorted(file.name for file in hf.iterdir())), label="file")
    raw = bytearray((hf / name).read_bytes())
    place = data.draw(st.integers(0, min(len(raw) - 1, 3000)), label="place")
    kind = data.draw(st.sampled_from(("cut", "byte", "insert", "digits")), label="kind")
    if kind == "cut":
        raw = raw[:place]
    elif kind == "byte":
        raw[place] = data.draw(st.integers(0, 255), label="value")
    elif kind == "insert":
        raw[place:place] = data.draw(st.binary(min_size=1, max_size=9), label="bytes")
    else:
        raw = bytearray(raw.replace(b"32", data.draw(st.sampled_from((b"-1", b"1e9", b"null", b"[]", b"33333333333333"))), 3))
    (hf / name).write_bytes(raw)
    target = tmp_path / "neutral"
    shutil.rmtree(target, ignore_errors=True)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(hf), str(target), "--to", "neutral"])
    assert code == (0 if target.exists() else 2), said.getvalue()
    if code == 0:
        assert set(read_checkpoint(target).snapshot.params)


def test_reading_raises_only_errors_of_ours(hf: Path):
    change(hf, "config.json", hidden_size=[])
    with pytest.raises(SmedjanError):
        hf_import.read(hf)


@pytest.mark.parametrize(("sliding", "window"), [(16, 16), (127, 127), (128, 0), (4096, 0), (None, 0)])
def test_the_sliding_window_of_mistral_is_the_window(hf: Path, sliding: int | None, window: int):
    document = json.loads((hf / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": sliding}
    (hf / "config.json").write_text(json.dumps(document))
    assert hf_import.read(hf).config.window == window
    change(hf, "config.json", sliding_window=None, max_position_embeddings=8192)  # left out: what transformers takes
    assert hf_import.read(hf).config.window == 4096


def test_yarn_is_read_from_either_generation(hf: Path):
    """rope_parameters alone (transformers 5), rope_scaling alone (4), its older key `type`, the length left to the context."""
    config = model_config(tokenizer().vocab_size, **YARN)
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32}
    for keys in (
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **scaling}},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", **scaling}},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", **scaling, "attention_factor": 0.1 * np.log(4.0) + 1}},
    ):
        change(hf, "config.json", **keys)
        assert hf_import.read(hf).config == config
    change(hf, "config.json", rope_scaling={"type": "yarn", "factor": 4.0})
    assert hf_import.read(hf).config.rope_original_len == 128
