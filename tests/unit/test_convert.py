"""The command: what SRC is, what is never overwritten, what is kept bit for bit, what `convert` imports, memory, start-up."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import convert.hf_export
import convert.neutral
from convert.cli import main, parse_size
from convert.formats import FORMATS, source_format
from convert.portable import Lazy, cast, check_equal
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, read_checkpoint, write_checkpoint
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import CheckpointError, ConfigError
from tests.unit.convert_models import NTK, YARN, model_config, neutral, parameters, tokenizer
from tests.unit.convert_models import convert as run

ROOT = Path(__file__).parents[2]
CONFIG = model_config(tokenizer().vocab_size)
TRAIN = TrainConfig(steps=9, batch_size=2, seq_len=8, lr=1e-3)
ABOUT = About(
    model=CONFIG,
    train=TRAIN,
    tokenizer=SavedTokenizer.of(tokenizer()),
    dataset={"hash": "one", "path": "a", "tokens": 5},
    framework={"name": "test"},
    optimizer="adamw",
)


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    """The error of a command line that must be refused with exit code 2."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    return capsys.readouterr().err


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("scaling", [{}, YARN, NTK], ids=["none", "yarn", "ntk"])
def test_out_to_hf_and_back_keeps_every_bit(tmp_path: Path, scaling: dict):
    config = model_config(tokenizer().vocab_size, **scaling)
    params = parameters(config)
    params["embed.weight"][-1] = [np.float32("-0.0"), 1e-45, 3e38, *([0.1] * 29)]  # a row that no token has, and odd values
    source = neutral(tmp_path, config, params)
    run(source, tmp_path / "hf", "--to", "hf")
    run(tmp_path / "hf", tmp_path / "back", "--to", "neutral")
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (before.tokenizer_json, before.tokenizer_hash) == (after.tokenizer_json, after.tokenizer_hash)
    if scaling is not NTK:
        assert before.model == after.model
    run(tmp_path / "back", tmp_path / "hf2", "--to", "hf")
    assert content(tmp_path / "hf2") == content(tmp_path / "hf")


def test_a_tokenizer_with_gaps_among_its_ids_keeps_every_id(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: oracle)")
    from smedjan_common.tokenizer import Tokenizer

    plain = tokenizer().vocabulary
    moved = {token: number + 5 * (number > 280) for token, number in plain.tokens.items()}
    gapped = Tokenizer(dataclasses.replace(plain, tokens=moved, specials={"<|endoftext|>": 310, "<|user|>": 312}))
    source = neutral(tmp_path, model_config(gapped.vocab_size), tok=gapped)
    run(source, tmp_path / "hf", "--to", "hf")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    assert theirs.get_vocab_size() == 320
    spare = {f"<|reserved_{number}|>": number for number in (*range(281, 286), 305, 311, *range(313, 320))}
    for name, number in (gapped.special_tokens | spare).items():
        assert theirs.token_to_id(name) == number, name
    text = "The smith heats the iron <|user|> until"
    assert theirs.encode(text).ids == gapped.encode(text, allowed_special="all")
    run(tmp_path / "hf", tmp_path / "back", "--to", "neutral")
    assert read_checkpoint(tmp_path / "back").tokenizer_hash == gapped.hash


def test_a_run_gives_its_newest_weights(tmp_path: Path):
    train = TrainConfig(steps=9, batch_size=2, seq_len=8, lr=1e-3)
    config = model_config(tokenizer().vocab_size)
    for step in (3, 9):
        params = parameters(config, seed=step)
        slots = {f"mu.{name}": value for name, value in params.items()}
        about = About(model=config, train=train, tokenizer=SavedTokenizer.of(tokenizer()), framework={"name": "test"})
        write_checkpoint(tmp_path / "run", Snapshot(step, params, slots), about)
    assert source_format(tmp_path / "run").name == "neutral"
    assert convert.neutral.newest(tmp_path / "run").step == 9
    neutral(tmp_path / "run")  # final/ of step 7: older
    assert convert.neutral.newest(tmp_path / "run").step == 9
    assert convert.neutral.newest(tmp_path / "run/step-00000003").step == 3
    run(tmp_path / "run/step-00000003", tmp_path / "hf", "--to", "hf")


def test_what_cannot_be_converted_is_told_with_a_way_on(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = neutral(tmp_path)
    run(source, tmp_path / "m.gguf", "--to", "gguf")
    (tmp_path / "nothing").mkdir()
    for args, words in (
        ((tmp_path / "gone", tmp_path / "x", "--to", "hf"), ["There is no", "Check the path"]),
        ((tmp_path / "nothing", tmp_path / "x", "--to", "hf"), ["not recognised", "neutral", "hf"]),
        ((source / "model.safetensors", tmp_path / "x", "--to", "hf"), ["give the directory"]),
        ((source, tmp_path / "x", "--to", "neutral"), ["neutral already"]),
        ((source, tmp_path / "x", "--to", "huggingface"), ["--to 'huggingface'", "neutral, orbax, quantized, hf, gguf"]),
        ((source, tmp_path / "x", "--to", "hf", "--dtype", "bfloat"), ["bfloat", "Did you mean bfloat16"]),
        ((source, tmp_path / "x", "--to", "hf", "--dtype", "q8_0"), ["q8_0 does not fit --to hf", "float32"]),
        ((source, tmp_path / "x", "--to", "hf", "--max-shard-size", "big"), ["big", "5GB"]),
    ):
        said = refused(capsys, *args)
        assert all(word in said for word in words), said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"window": 64, "qkv_bias": True, "o_bias": True, "qk_norm": True}, "window = 64"),
        ({"rope_layers": ("on", "off"), "qk_norm": True}, "rope_layers = ['on', 'off']"),
        ({"o_bias": True}, "o_bias"),
        ({"qk_norm": True, "qkv_bias": True}, "qk_norm = True"),
        ({"ffn": ("experts", "swiglu"), "experts": 4}, "experts"),
        *(({"mixer": ("attention", m)}, m) for m in ("mla", "block-sparse", "linear")),
    ],
)
def test_a_model_that_no_layout_has_is_refused_by_name_and_nothing_is_written(tmp_path: Path, capsys, change: dict, name: str):
    source = neutral(tmp_path / "run", model_config(tokenizer().vocab_size, **change))
    for form in ("hf", "gguf"):
        assert name in refused(capsys, source, tmp_path / "out", "--to", form)
        assert os.listdir(tmp_path) == ["run"]


def test_a_window_has_no_form_for_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = neutral(tmp_path / "run", model_config(tokenizer().vocab_size, window=64))
    assert "sliding window" in refused(capsys, source, tmp_path / "out", "--to", "gguf")
    run(source, tmp_path / "hf", "--to", "hf")
    assert "mlx-lm does not read this window" in capsys.readouterr().out


def test_an_order_of_layers_that_mlx_lm_does_not_read_has_a_note(tmp_path: Path, capsys: pytest.CaptureFixture):
    delta = {"mixer": ("attention", "gated-deltanet"), "qk_norm": True}
    experts = {"ffn": ("experts",), "experts": 4, "shared_experts": 1}
    for order, noted in ((delta["mixer"], True), (delta["mixer"][::-1], False)):
        model = model_config(tokenizer().vocab_size, **(delta | experts | {"mixer": order}))
        run(neutral(tmp_path / order[0], model), tmp_path / f"{order[0]}-hf", "--to", "hf")
        assert ("mlx-lm takes others of its layers" in " ".join(capsys.readouterr().out.split())) is noted


def test_a_field_that_no_layout_knows_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A new option of ModelConfig must not be lost in silence."""
    from convert import families

    monkeypatch.setattr(families, "EXPRESSED", families.EXPRESSED - {"rope_factor"})
    assert families.family_of(model_config(300), "hf") == "llama"
    with pytest.raises(ConfigError, match="rope_factor"):
        families.family_of(model_config(300, **YARN), "hf")


@pytest.mark.parametrize("what", ["train", "dataset", "optimizer", "config", "step", "tokenizer"])
def test_each_thing_that_reads_back_otherwise_is_noticed(tmp_path: Path, what: str):
    model = convert.neutral.read(
        write_checkpoint(tmp_path, Snapshot(3, parameters(CONFIG), {"mu.norm.weight": np.ones(32, np.float32)}), ABOUT)
    )
    convert.neutral.check_same(tmp_path, model, model)
    others = {
        "train": dataclasses.replace(TRAIN, lr=2e-3),
        "dataset": {"hash": "other", "path": "a", "tokens": 5},
        "optimizer": "lion",
        "config": dataclasses.replace(CONFIG, rope_base=5e5),
        "step": 4,
        "tokenizer": tokenizer("gpt2"),
    }
    inside = what in ("train", "dataset", "optimizer")
    other = {"info": dataclasses.replace(model.info, **{what: others[what]})} if inside else {what: others[what]}
    with pytest.raises(CheckpointError, match="not what was written"):
        convert.neutral.check_same(tmp_path, dataclasses.replace(model, **other), model)


def test_a_write_that_goes_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    source = neutral(tmp_path / "run")
    monkeypatch.setattr(convert.hf_export, "write_tensors", lambda path, tensors: path.write_bytes(b"\0" * 100))
    assert "safetensors" in refused(capsys, source, tmp_path / "hf", "--to", "hf")
    assert os.listdir(tmp_path) == ["run"]


def test_other_values_on_the_disk_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """One bit of one weight, one token, one number of the configuration: each is found before the directory takes its name."""
    from convert import hf_config, hf_tokenizer
    from convert.safetensors_file import write_tensors

    def one_bit(path: Path, tensors: dict) -> None:
        write_tensors(path, tensors)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    source, (to_hf, files) = neutral(tmp_path / "run"), (hf_config.to_hf, hf_tokenizer.files)

    def other_token(*args: object) -> dict:
        out = files(*args)
        document = json.loads(out["tokenizer.json"])
        document["model"]["merges"].pop()
        return out | {"tokenizer.json": json.dumps(document)}

    for module, name, broken, word in (
        (convert.hf_export, "write_tensors", one_bit, "down_proj.weight has other values"),
        (hf_config, "to_hf", lambda *args: to_hf(*args) | {"rope_theta": 1e5, "rope_parameters": None}, "another model"),
        (hf_tokenizer, "files", other_token, "tokenizer.json reads back differently"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            assert word in refused(capsys, source, tmp_path / "hf", "--to", "hf")
        assert os.listdir(tmp_path) == ["run"]


def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = neutral(tmp_path)
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[-100] ^= 1
    (source / "model.safetensors").write_bytes(raw)
    assert "model.safetensors is damaged in norm.weight" in refused(capsys, source, tmp_path / "hf", "--to", "hf")
    assert not (tmp_path / "hf").exists()


def test_a_value_that_float16_cannot_hold_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    config = model_config(300)
    params = parameters(config)
    params["layers.1.ffn.up_proj.weight"][3, 4] = 7e4
    source = neutral(tmp_path / "run", config, params)
    for form in ("hf", "gguf"):
        said = refused(capsys, source, tmp_path / "out", "--to", form, "--dtype", "float16")
        assert "mlp.up_proj.weight has the value 70000" in said or "blk.1.ffn_up.weight has the value 70000" in said
    assert os.listdir(tmp_path) == ["run"]
    run(source, tmp_path / "hf", "--to", "hf", "--dtype", "bf16")


def test_cast_and_check_equal():
    import ml_dtypes

    lazy = Lazy(np.dtype(np.float32), (2,), lambda: np.array([1.0, -2.5], np.float32))
    assert cast("x", lazy, np.dtype(np.float32)) is lazy
    half = cast("x", lazy, np.dtype(ml_dtypes.bfloat16))
    assert half.nbytes == 4
    assert np.asarray(half).dtype == ml_dtypes.bfloat16
    assert np.asarray(lazy, np.float64).tolist() == [1.0, -2.5]
    check_equal("here", {"x": lazy}, {"x": lazy})
    negative_zero = Lazy(lazy.dtype, (1,), lambda: np.array([-0.0], np.float32))
    zero = Lazy(lazy.dtype, (1,), lambda: np.zeros(1, np.float32))
    for found, expected in (({}, {"x": lazy}), ({"x": half}, {"x": lazy}), ({"x": negative_zero}, {"x": zero})):
        with pytest.raises(CheckpointError, match="is not what was written"):
            check_equal("here", found, expected)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("40KB", 40_000), ("17", 17)])
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "nan", "inf", "1e999"])
def test_no_sizes(text: str):
    with pytest.raises(ConfigError):
        parse_size(text)


def test_convert_imports_no_framework(tmp_path: Path):
    source = neutral(tmp_path)
    code = (
        "import sys; from convert.cli import main\n"
        f"assert main([{str(source)!r}, {str(tmp_path / 'hf')!r}, '--to', 'hf']) == 0\n"
        f"assert main([{str(tmp_path / 'hf')!r}, {str(tmp_path / 'n')!r}, '--to', 'neutral']) == 0\n"
        "loaded = {'jax', 'flax', 'mlx', 'torch', 'transformers', 'tokenizers', 'gguf', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_there_at_once():
    """Best of five, less what an empty interpreter takes: other work on the machine only ever adds."""

    def seconds(*command: str) -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=True)
        assert "--to" in done.stdout or command[0] == "-c"
        return time.perf_counter() - start

    assert min(seconds("-m", "convert", "--help") for _ in range(5)) - min(seconds("-c", "pass") for _ in range(3)) < 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM of Linux")
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, form: str):
    """200 MB of weights pass through: read, written, read back. To hf half of that is allowed, to gguf, whose reader maps files, 1.2 N."""
    config = model_config(300, dim=512, heads=8, kv_heads=8, layers=16)
    size = 4 * config.num_params()
    assert size > 150e6
    zeros = {name: np.broadcast_to(np.float32(0.01), shape) for name, shape in shapes(config).items()}
    source = neutral(tmp_path, config, zeros)
    code = (
        "import sys; from convert.cli import main; import convert.formats, smedjan_common.checkpoint\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        f"start = peak(); assert main([{str(source)!r}, {str(tmp_path / 'out')!r}, '--to', {form!r}]) == 0\n"
        "print(peak() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert grown < (0.5 if form == "hf" else 1.2) * size, f"{grown / 1e6:.0f} MB"


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from smedjan_common.model.params import parameter_table

    return {name: spec.shape for name, spec in parameter_table(config).items()}


def test_every_format_is_in_the_help_and_in_the_documentation():
    page = (ROOT / "docs/convert.md").read_text()
    done = subprocess.run([sys.executable, "-m", "convert", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for name in FORMATS:
        assert f"`{name}`" in page
        assert name in done.stdout


def test_the_commands_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [line.split() for line in (ROOT / "docs/convert.md").read_text().splitlines() if line.startswith("convert ")]
    commands = [words[1:] for words in lines if "SRC" not in words and not words[1].startswith("hf://")]  # tests/cli/test_hub_cli.py
    assert {words[words.index("--to") + 1] for words in commands} == set(FORMATS)
    monkeypatch.chdir(tmp_path)
    run(neutral(tmp_path / "runs/shakespeare"), "some-llama", "--to", "hf")
    for words in commands:
        run(*words)


def test_the_command_is_installed_under_both_names():
    from smedjan_common.cli import COMMANDS

    project = (ROOT / "pyproject.toml").read_text()
    assert 'convert = "convert.cli:main"' in project
    assert COMMANDS["convert"].module == "convert.cli"


def test_a_full_disk_leaves_nothing_half(tmp_path: Path):
    source = neutral(tmp_path / "run")
    (tmp_path / "out").mkdir()
    both = [[str(source), str(tmp_path / "out" / form), "--to", form] for form in ("hf", "gguf")]
    code = (
        "import resource, signal, sys; from convert.cli import main\n"
        "import convert.formats, gguf; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"codes = [main(args) for args in {both!r}]\n"
        "assert codes == [2, 2], codes"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "out") == []


def test_the_written_configuration_is_what_it_was(tmp_path: Path):
    """Both generations' keys, so that a change of them is seen."""
    run(neutral(tmp_path, model_config(300, **YARN)), tmp_path / "hf", "--to", "hf")
    values = json.loads((tmp_path / "hf/config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
    assert values["rope_scaling"] == yarn
    assert values["rope_parameters"] == {"rope_theta": 10000.0, **yarn}
    assert values["rope_theta"] == 10000.0
    assert (values["vocab_size"], values["tie_word_embeddings"], values["architectures"]) == (320, True, ["LlamaForCausalLM"])
