"""`--to quantized`: what is written is opened by every command as it is, read by mlx-lm, and passes into GGUF without a second rounding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert import quantized
from convert.cli import main as convert_main
from convert.safetensors_file import PACKED, open_tensors, write_tensors
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.commands import info, train
from smedjan_common.inference.opened import OpenModel
from smedjan_common.inference.room import rows_that_fit
from smedjan_common.model.params import count_params
from smedjan_common.reference import model as reference
from smedjan_common.reference.loss import logsumexp
from tests.unit.convert_models import PROMPT, TEXT, convert, model_config, neutral, parameters, tokenizer

OPTIONS = {"llama": {"tied_head": False}, "qwen3": {"qk_norm": True, "head_size": 16}, "own": {"mixer": ("linear",), "kv_heads": 4}}
IDS = np.random.default_rng(1).integers(0, 299, (1, 40), dtype=np.int32)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """For each model a run, and its directory in 8 and in 4 bits."""
    folder = tmp_path_factory.mktemp("quantized")
    for name, options in OPTIONS.items():
        config = model_config(tokenizer().vocab_size, **options)
        neutral(folder / name, config, parameters(config))
        for bits in (8, 4):
            convert(folder / name, folder / f"{name}-{bits}", "--to", "quantized", "--bits", bits)
    return folder


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in quantized.params(quantized.read(path)).items()}


def definition(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of the float weights that a directory's stand for, by the float64 definition."""
    model = quantized.read(path)
    params = {name: tensor.read() for name, tensor in model.tensors.items()}
    return reference.forward(model.config, params, ids)[..., : model.config.vocab_size]


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_model_rounded(made: Path, name: str, bits: int, most: float):
    whole, again = read_checkpoint(made / name / "final"), quantized.read(made / f"{name}-{bits}")
    assert again.tokenizer is not None
    assert again.tokenizer.hash == tokenizer().hash
    for tensor, value in whole.snapshot.params.items():
        error = np.abs(again.tensors[tensor].read() - value).max()
        assert error <= most * np.abs(value).max() if tensor in again.packed else error == 0
    assert {packed.bits for packed in again.packed.values()} == {8, bits}
    assert (again.config.mixer, again.config.qk_norm, again.config.head_dim) == (
        whole.model.mixer,
        whole.model.qk_norm,
        whole.model.head_dim,
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_mlx_lm_reads_it_as_it_is(made: Path, name: str, bits: int):
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra: oracle)")
    import mlx.core as mx
    import mlx.nn as nn

    model, _ = mlx_lm.load(str(made / f"{name}-{bits}"))
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.QuantizedLinear)
    model.set_dtype(mx.float32)  # it looks words up in the dtype of the scales, float16
    found, want = np.array(model(mx.array(IDS)))[..., :300], definition(made / f"{name}-{bits}", IDS)
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_language_model_of_it_says_what_its_float_weights_say(made: Path, backend: str):
    package = pytest.importorskip(f"smedjan_{backend}", reason=f"{backend} is not installed")
    with package.load(made / "own-4") as lm:
        found = lm.logits(IDS[0])
        written = lm.generate(PROMPT, max_tokens=6, temperature=0).tokens
        loss = lm.loss([*IDS[0]]).loss
    want = definition(made / "own-4", IDS)[0]
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()
    logprobs = want - logsumexp(want)[:, None]
    assert loss == pytest.approx(-logprobs[np.arange(39), IDS[0, 1:]].mean(), rel=1e-5)
    ids = tokenizer().encode(PROMPT)
    assert len(written) == 6
    for token in written:
        assert token == definition(made / "own-4", np.array([ids], np.int32))[0, -1].argmax()
        ids = [*ids, token]


def test_gguf_takes_it_without_rounding_again(made: Path, tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
    convert(made / "llama", tmp_path / "direct.gguf", "--to", "gguf", "--dtype", "q8_0")
    for bits, kind in ((8, "Q8_0"), (4, "Q4_1")):
        convert(made / f"llama-{bits}", tmp_path / f"{bits}.gguf", "--to", "gguf")
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{bits}.gguf").tensors}
        assert found["token_embd.weight"].tensor_type.name == "Q8_0"
        assert found["blk.0.ffn_down.weight"].tensor_type.name == found["blk.1.attn_q.weight"].tensor_type.name == kind
        convert(tmp_path / f"{bits}.gguf", tmp_path / f"back-{bits}", "--to", "neutral")
        back, model = read_checkpoint(tmp_path / f"back-{bits}").snapshot.params, quantized.read(made / f"llama-{bits}")
        for name, value in back.items():
            rows = model.config.vocab_size if name in ("embed.weight", "head.weight") else None
            assert np.array_equal(value[:rows], model.tensors[name].read()[:rows]), name
        convert(tmp_path / f"{bits}.gguf", tmp_path / f"again-{bits}", "--to", "quantized", "--bits", bits)
        again, first = (arrays(path) for path in (tmp_path / f"again-{bits}", made / f"llama-{bits}"))
        assert all(np.array_equal(again[name][:300], value[:300]) for name, value in first.items()), "nor on the way back"
    direct = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "direct.gguf").tensors}
    ours = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "8.gguf").tensors}
    assert all(np.array_equal(ours[name], data) for name, data in direct.items()), "8 bits are what --dtype q8_0 gives"


def test_info_knows_it_and_training_refuses_it(made: Path, tmp_path: Path, capsys):
    assert info.main([str(made / "llama-4"), "--json", "--verify"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["bits"], facts["group"]) == ("quantised model, to infer with", "4 and 8", 32)
    assert facts["bytes"] == sum(tensor.nbytes for tensor in open_tensors(made / "llama-4/model.safetensors", PACKED).values())
    (tmp_path / "text.txt").write_text("The smith heats the iron. " * 50)
    flags = ["--pretrained", str(made / "llama-4"), "--dataset", str(tmp_path / "text.txt"), "--checkpoint-dir", str(tmp_path / "run")]
    assert train.main(["--backend", "mlx", *flags]) == 2
    assert "are quantised" in capsys.readouterr().err


def test_it_takes_a_fraction_of_the_memory(made: Path):
    """The device is of a size that the float32 weights alone would fill."""
    from smedjan_common.backend import Device

    small, whole = OpenModel(made / "llama-4").info, OpenModel(made / "llama").info
    weights = 4 * count_params(whole.model)
    device = Device("fake", "gpu", "a card", memory_bytes=weights + 4096)
    assert sum(tensor.nbytes for tensor in small.weights.values()) < 0.25 * weights
    assert rows_that_fit(small, device, "float32", 8, 4) == 4
    assert rows_that_fit(whole, device, "float32", 128, 4) == 0


def test_float_again_is_told(made: Path, tmp_path: Path, capsys):
    convert(made / "qwen3-4", tmp_path / "whole", "--to", "neutral")
    assert "quantised to 4, 8 bits" in capsys.readouterr().out
    found, small = read_checkpoint(tmp_path / "whole").snapshot.params, quantized.read(made / "qwen3-4").tensors
    assert all(np.array_equal(found[name], value.read()) for name, value in small.items())


def changed(path: Path, target: Path, **arrays: np.ndarray) -> Path:
    from convert.portable import Lazy

    shutil.copytree(path, target)
    tensors = dict(open_tensors(path / "model.safetensors", PACKED))
    for name, array in arrays.items():
        tensors[name] = Lazy(array.dtype, array.shape, lambda array=array: array)
    (target / "model.safetensors").unlink()
    write_tensors(target / "model.safetensors", tensors)
    return target


def refused(capsys, *args: object) -> str:
    assert convert_main([str(arg) for arg in args]) != 0
    return capsys.readouterr().err


def test_what_is_not_right_is_refused_by_name(made: Path, tmp_path: Path, capsys):
    source = made / "own-4"
    assert "quantized already" in refused(capsys, source, tmp_path / "out", "--to", "quantized")
    assert "--bits" in refused(capsys, made / "own", tmp_path / "out", "--to", "quantized", "--bits", 5)
    scales = open_tensors(source / "model.safetensors", PACKED)["layers.0.mixer.q_proj.scales"].read()
    broken = {"nan": scales * np.float16(np.nan), "wide": scales.astype(np.float32), "cut": scales[:-1]}
    for name, array in broken.items():
        path = changed(source, tmp_path / name, **{"layers.0.mixer.q_proj.scales": array})
        assert "layers.0.mixer.q_proj" in refused(capsys, path, tmp_path / "out", "--to", "neutral")
    path = changed(source, tmp_path / "more", extra=scales)
    assert "'extra'" in refused(capsys, path, tmp_path / "out", "--to", "neutral")
    shutil.copytree(source, tmp_path / "64")
    values = json.loads((source / "config.json").read_text())
    values["quantization"]["group_size"] = 64
    (tmp_path / "64" / "config.json").write_text(json.dumps(values))
    assert "groups of 64" in refused(capsys, tmp_path / "64", tmp_path / "out", "--to", "neutral")


def test_the_commands_run_it(made: Path, tmp_path: Path):
    """As a user does: greedy text by the definition, and a loss close to the whole model's."""
    pytest.importorskip("smedjan_mlx", reason="mlx is not installed")
    (tmp_path / "text.txt").write_text("The smith heats the iron. " * 20)

    def run(command: str, *args: object, said: str | None = None) -> str:
        line = [sys.executable, "-m", "smedjan_common.cli", command, *map(str, args), "--backend", "mlx"]
        return subprocess.run(line, input=said, capture_output=True, text=True, check=True, timeout=120).stdout

    ids = tokenizer().encode(PROMPT)
    for _ in range(8):
        ids.append(int(definition(made / "llama-8", np.array([ids], np.int32))[0, -1].argmax()))
    assert (
        run("generate", made / "llama-8", "--prompt", PROMPT, "--max-tokens", 8, "--temperature", 0).strip()
        == tokenizer().decode(ids).strip()
    )
    losses = [json.loads(run("eval", made / name, "--dataset", tmp_path / "text.txt", "--json")) for name in ("llama", "llama-8")]
    whole, small = (found["texts"][0]["loss"] for found in losses)
    assert small != whole
    assert small == pytest.approx(whole, rel=0.02)
    assert run("chat", made / "llama-8", "--max-tokens", 4, "--temperature", 0, said="Hello\n")


def test_llama_cpp_runs_its_gguf(made: Path, tmp_path: Path):
    """It rounds activations to 8 bits too, so log-probabilities are as near as those of its own Q8_0."""
    pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
    from tests.unit.llama_cpp import llama_cpp

    convert(made / "llama-4", tmp_path / "model.gguf", "--to", "gguf")
    ids, tok = tokenizer().encode(TEXT)[:60], tokenizer()
    prefixes = [ids[:end] for end in range(4, 60, 8)]
    asked = {"texts": [TEXT], "prefixes": prefixes, "prompt": tok.encode(PROMPT), "tokens": 1, "size": tok.vocab_size}
    found, _, logprobs, _ = llama_cpp(tmp_path / "model.gguf", **asked)
    assert found == [tok.encode(TEXT)]
    ours = definition(made / "llama-4", np.array([ids], np.int32))[0]
    ours -= logsumexp(ours)[:, None]
    known = [(len(prefix), row) for prefix, row in zip(prefixes, logprobs, strict=True) if row]
    assert len(known) >= 4
    for end, row in known:
        theirs = np.array([row[str(number)] for number in range(tok.vocab_size)])
        assert np.abs(theirs - ours[end - 1]).max() / np.abs(ours[end - 1]).max() < 3e-2
