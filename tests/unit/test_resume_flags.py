"""Every flag of training, given with another value to a run that goes on: it is refused, told, or has no bearing for a reason."""

import shutil

import pytest

from smedjan_common.checkpoint import read_info
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.run.flags import flag_names
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.runs import arguments, train_here, tree, write_text

TOLD = "told"  # note: FIELD: … in the run, … now
MODEL = "is of another model"
FIXED = "was trained with other settings"
UNREAD = "would do nothing"
NO_BEARING = {
    "checkpoint-dir": "it names the run",
    "dry-run": "it writes nothing",
    "config": "what it names counts as given",
    "force": "it is about the machine, not the run",
    "mesh": "it changes no result, and a run may go on on another one",
    **dict.fromkeys(("coordinator", "num-hosts", "host-id"), "they are about the machines, not the run"),
    **dict.fromkeys(("devices", "device", "devices-per-host", "network-gbits"), "they are of a plan, of which no run has any"),
}
REFUSED_OR_TOLD = {  # flag: (another value, what the refusal says, or TOLD)
    "dataset": ("OTHER.txt", TOLD),
    "val-dataset": ("OTHER.txt", TOLD),
    "val-fraction": (0.3, UNREAD),
    "tokenizer": ("OTHER.json", "was trained with another tokenizer"),
    "vocab-size": (290, "is not that of the run"),
    "checkpoint-every": (7, TOLD),
    "checkpoint-format": ("orbax", "is of the backend jax"),
    "keep": (5, TOLD),
    "keep-every": (2, TOLD),
    "resume": ("never", "already has a run"),
    "pretrained": ("RUN", "--pretrained starts a new run, and RUN has one that began without weights"),
    "lora-rank": (4, "has other adapters"),
    "lora-alpha": (8.0, "has other adapters"),
    "lora-targets": ("q_proj", "has other adapters"),
    "teacher-checkpoint": ("RUN", "has no teacher"),
    "backend": ("mlx", "mlx"),
    "size": ("small", MODEL),
    "dim": (32, MODEL),
    "layers": (2, MODEL),
    "heads": (4, MODEL),
    "kv-heads": (1, MODEL),
    "ffn-mult": (30, MODEL),
    "mixer": ("ssm", MODEL),
    "ffn": ("experts", MODEL),
    "rope-base": (500.0, MODEL),
    "rope-scaling": ("linear", MODEL),
    "rope-factor": (2.0, MODEL),
    "rope-original-len": (8, MODEL),
    "rope-low-freq-factor": (2.0, MODEL),
    "rope-high-freq-factor": (8.0, MODEL),
    "rope-attention-factor": (1.5, MODEL),
    "rope-global-layers": ("off", MODEL),
    "norm-eps": (1e-3, MODEL),
    "no-tied-head": ((), MODEL),
    "head-size": (8, MODEL),
    "qkv-bias": ((), MODEL),
    "o-bias": ((), MODEL),
    "norms": ("post", MODEL),
    "qk-norm-over": ("all", MODEL),
    "embedding-multiplier": (2.0, MODEL),
    "residual-multiplier": (0.5, MODEL),
    "logits-divisor": (2.0, MODEL),
    "attention-multiplier": (0.5, MODEL),
    "attention-gate": ((), MODEL),
    "init-std": (0.5, UNREAD),
    "qk-norm": ((), MODEL),
    "window": (8, MODEL),
    "window-layers": ("off", MODEL),
    "rope-dim": (4, MODEL),
    "rope-layers": ("off", MODEL),
    "linear-decay": ("fixed", MODEL),
    "linear-feature-map": ("elu1", MODEL),
    "linear-normalizer": ("denominator", MODEL),
    "ssm-state": (16, MODEL),
    "ssm-head-dim": (16, MODEL),
    "ssm-expand": (1, MODEL),
    "ssm-groups": (2, MODEL),
    "conv-width": (3, MODEL),
    "mla-kv-rank": (8, MODEL),
    "mla-q-rank": (8, MODEL),
    "mla-rope-dim": (4, MODEL),
    "mla-plain-factor": (1.5, MODEL),
    "delta-key-heads": (1, MODEL),
    "delta-value-heads": (4, MODEL),
    "delta-key-size": (8, MODEL),
    "delta-value-size": (8, MODEL),
    "block-size": (16, MODEL),
    "block-topk": (2, MODEL),
    "rwkv-head-dim": (16, MODEL),
    "experts": (4, MODEL),
    "experts-per-token": (1, MODEL),
    "shared-experts": (1, MODEL),
    "shared-gate": ((), MODEL),
    "expert-dim": (64, MODEL),
    "router": ("bias", MODEL),
    "no-norm-topk-prob": ((), MODEL),
    "routed-scaling-factor": (2.5, MODEL),
    "expert-groups": (2, MODEL),
    "expert-groups-per-token": (2, MODEL),
    "steps": (3, "is less than the 4 steps that the run has done"),
    "batch-size": (8, FIXED),
    "seq-len": (32, FIXED),
    "lr": (0.5, TOLD),
    "warmup": (2, TOLD),
    "lr-schedule": ("linear", TOLD),
    "min-lr-ratio": (0.5, TOLD),
    "decay-fraction": (0.5, UNREAD),
    "optimizer": ("lion", "has the state of --optimizer adamw"),
    "beta1": (0.8, TOLD),
    "beta2": (0.8, TOLD),
    "eps": (1e-6, TOLD),
    "muon-momentum": (0.5, UNREAD),
    "muon-steps": (3, UNREAD),
    "no-muon-nesterov": ((), UNREAD),
    "ema": (0.9, "keeps no average of its weights"),
    "weight-decay": (0.3, TOLD),
    "clip-norm": (0.5, TOLD),
    "grad-accum": (2, TOLD),
    "gradient-checkpointing": ("full", TOLD),
    "dtype": ("bfloat16", TOLD),
    "attention": ("plain", TOLD),
    "kernels": ("plain", UNREAD),
    "deterministic": ((), TOLD),
    "chunk-size": (32, UNREAD),
    "mask-documents": ((), TOLD),
    "packing": ("documents", FIXED),
    "z-loss": (0.1, TOLD),
    "balance-loss": (0.5, UNREAD),
    "router-z-loss": (0.5, UNREAD),
    "router-bias-rate": (0.5, UNREAD),
    "seed": (1, FIXED),
    "distill-temperature": (2.0, UNREAD),
    "distill-alpha": (0.3, UNREAD),
    "log-every": (3, TOLD),
    "eval-every": (3, TOLD),
    "eval-batches": (3, TOLD),
    "sample-every": (3, TOLD),
    "sample-prompt": ("a", UNREAD),
    "sample-tokens": (9, UNREAD),
    "tracker": ("none", TOLD),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of 4 steps of 6, another text and another tokenizer."""
    folder = tmp_path_factory.mktemp("place")
    text = write_text(folder)
    assert train_here(*arguments(text, folder / "RUN", 4, "--eval-every", 2)) == 0
    (folder / "OTHER.txt").write_text("a quite different text, and a short one, on other cats\n" * 60)
    Tokenizer.train([text], vocab_size=280).save(folder / "OTHER.json")
    return folder


SWITCHED_OFF = {
    "--muon-nesterov": "no-muon-nesterov",
    "--tied-head": "no-tied-head",
    "--norm-topk-prob": "no-norm-topk-prob",
}  # on unless they are told


def test_the_table_has_every_flag():
    assert sorted([*REFUSED_OR_TOLD, *NO_BEARING]) == sorted(SWITCHED_OFF.get(name, name[2:]) for name in flag_names())


@pytest.mark.parametrize("name", REFUSED_OR_TOLD)
def test_a_given_flag_that_is_another_than_the_run_s_is_refused_or_told(place, capsys, monkeypatch, name):
    monkeypatch.chdir(place)
    value, said = REFUSED_OR_TOLD[name]
    words = [f"--{name}"] if value == () else [f"--{name}", value]
    more = [] if name == "steps" else ["--steps", 6]
    told = said == TOLD or said.startswith("note: ")
    assert train_here("--checkpoint-dir", "RUN", *more, *words, "--dry-run") == (0 if told else 2)
    out, err = capsys.readouterr()
    assert (f"note: {name.replace('-', '_')}: " if said == TOLD else said) in out + err


def test_the_command_of_the_run_goes_on_without_a_word(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert train_here(*arguments("text.txt", "RUN", 4, "--eval-every", 2), "--dry-run") == 0
    out = capsys.readouterr().out
    assert "Done already" in out
    assert "note:" not in out


def test_fewer_steps_than_are_done_change_nothing(place, capsys):
    before = tree(place / "RUN")
    assert train_here("--checkpoint-dir", place / "RUN", "--steps", 3) == 2
    assert "--steps 3 is less than the 4 steps" in capsys.readouterr().err
    assert tree(place / "RUN") == before


@pytest.mark.parametrize("file", ["OTHER.txt", "OTHER.bin"])
def test_another_dataset_of_a_finished_run_is_told(place, capsys, file):
    if file.endswith(".bin"):
        from smedjan_common.data.prepare import prepare

        prepare([place / "OTHER.txt"], place / file, Tokenizer.load(read_info(place / "RUN").path))
    before = tree(place / "RUN")
    for flag in ("--dataset", "--val-dataset"):
        assert train_here("--checkpoint-dir", place / "RUN", flag, place / file) == 0
        out = capsys.readouterr().out
        assert f"note: {flag[2:].replace('-', '_')}: " in out
        assert "Done already" in out
        assert "with what the notes say" in out
    assert tree(place / "RUN") == before


def test_steps_that_end_where_the_run_was_stopped_write_what_a_finished_run_has(place, tmp_path, capsys):
    run = shutil.copytree(place / "RUN", tmp_path / "run")
    shutil.rmtree(run / "final")
    rows = read_rows(run)
    assert train_here("--checkpoint-dir", run) == 0
    assert read_info(run / "final").step == 4
    assert read_rows(run) == rows


def test_an_older_final_is_not_taken_for_the_end(place, tmp_path):
    run = shutil.copytree(place / "RUN", tmp_path / "run")
    assert train_here("--checkpoint-dir", run, "--steps", 6) == 0
    shutil.rmtree(run / "final")
    shutil.copytree(place / "RUN" / "final", run / "final")
    assert train_here("--checkpoint-dir", run, "--steps", 6) == 0
    assert read_info(run / "final").step == 6
