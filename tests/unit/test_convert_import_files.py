"""Weights and tokenizers for `--to neutral`: what is strange is kept or refused by name; what is damaged, with the file; never a half."""

import contextlib
import io
import json
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
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.tokenizer import Tokenizer
from tests.unit.convert_models import convert
from tests.unit.hf_directories import change, one_file, refusal, shards

# weights


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
def test_no_damage_to_any_file_makes_a_crash_or_a_half(good_hf: Path, tmp_path: Path, data: st.DataObject):
    """Cut, changed, doubled bytes anywhere: an error of ours, or a model that is whole (damage that no reader can see, in a weight)."""
    hf = tmp_path / "hf"
    shutil.rmtree(hf, ignore_errors=True)
    shutil.copytree(good_hf, hf)
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
