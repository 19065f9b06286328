"""Runs with adapters, end to end: what they write, how they go on, what reads them, and what becomes of their base."""

import json
import shutil

import numpy as np
import pytest

from smedjan_common.checkpoint import lazy_weights, read_checkpoint, read_info, read_weights
from smedjan_common.commands import dpo, info, merge, sft, train
from smedjan_common.inference.open import open_model
from smedjan_common.model.adapters import adapter_table
from tests.fakes.runs import TEXT, arrays, figures

RUN = "--batch-size 2 --seq-len 16 --sample-every 0 --log-every 1 --dtype float32 --val-fraction 0.1 --eval-every 0 --lr-schedule wsd"
SIZE = "--size custom --dim 16 --layers 2 --heads 2 --ffn-mult 1 --vocab-size 300"
LORA = "--lora-rank 4 --lora-targets q_proj,ffn --lr 0.02"


def run(backend: str, words: str, command=train) -> int:
    """The command in this process."""
    load = __import__(f"smedjan_{backend}.train", fromlist=["load"]).load
    return command.run(backend, load, words.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a run of four steps beside it, and one that was stopped after two and went on in the other backend."""
    pytest.importorskip("jax")
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "text.txt").write_text(TEXT)
    assert run("jax", f"{folder / 'text.txt'} --checkpoint-dir {folder / 'base'} {RUN} {SIZE} --steps 3 --checkpoint-every 0") == 0
    shutil.copytree(folder / "base", folder / "untouched")
    beside = f"{folder / 'text.txt'} --pretrained {folder / 'base'} {RUN} {LORA} --steps 4 --checkpoint-every 2 --keep 0"
    assert run("jax", f"{beside} --checkpoint-dir {folder / 'whole'}") == 0
    return folder


def test_a_checkpoint_has_adapters_alone_and_the_base_is_as_it_was(folder):
    found = read_info(folder / "whole" / "final")
    assert found.adapter
    adapters = found.adapter.adapters
    assert (adapters.rank, adapters.alpha, adapters.targets) == (4, 32.0, ("q_proj", "ffn"))
    assert found.weights.keys() == adapter_table(found.model, adapters).keys()
    step = read_checkpoint(folder / "whole" / "step-00000004")
    assert {name.partition(".")[2] for name in step.snapshot.optimizer} == found.weights.keys()
    assert sum(f.stat().st_size for f in (folder / "whole/final").glob("*.safetensors")) < 0.7 * 4 * found.model.num_params()
    for name in ("final/model.safetensors", "final/checkpoint.json"):
        assert (folder / "base" / name).read_bytes() == (folder / "untouched" / name).read_bytes()


def test_a_run_goes_on_to_the_same_bits_and_in_the_other_backend_to_the_same_model(folder, tmp_path):
    for name in ("jax", "mlx"):
        pytest.importorskip("jax" if name == "jax" else "mlx.core")
        again = tmp_path / name
        shutil.copytree(folder / "whole", again, ignore=shutil.ignore_patterns("final", "step-00000004"))
        (again / "config.json").write_text((folder / "whole/config.json").read_text())
        assert run(name, f"--checkpoint-dir {again}") == 0
        ours, theirs = (read_weights(read_info(one / "final"), None) for one in (again, folder / "whole"))
        if name == "jax":
            assert arrays(again) == arrays(folder / "whole")
            assert [row["batch_loss"] for row in figures(again)][-2:] == [row["batch_loss"] for row in figures(folder / "whole")][-2:]
        assert max(np.abs(ours[key] - theirs[key]).max() for key in ours) < 2e-6


def test_the_model_is_the_base_and_what_was_learned(folder):
    found, base = read_info(folder / "whole" / "final"), read_checkpoint(folder / "base/final").snapshot.params
    learned, whole = read_checkpoint(folder / "whole/final").snapshot.params, read_weights(found, None)
    for name, value in whole.items():
        path = name.removesuffix(".weight")
        added = 8.0 * learned[f"{path}.lora_b"].astype(float) @ learned[f"{path}.lora_a"] if f"{path}.lora_a" in learned else 0.0
        assert np.allclose(value, base[name] + added, rtol=1e-6, atol=1e-8)
        assert np.array_equal(np.asarray(lazy_weights(found)[name]), value), "and no other where it is read tensor by tensor"
    changed = {name for name in whole if not np.array_equal(whole[name], base[name])}
    assert changed == {f"{path.removesuffix('.lora_a')}.weight" for path in learned if path.endswith("lora_a")}


def test_answers_are_compared_with_the_model_that_adapters_began_as(folder, tmp_path):
    """The reference of a run of dpo is the whole model of --pretrained, its adapters included: at first both are even, which is ln 2."""
    rows = [{"prompt": f"cat no. {n}?", "chosen": f"On mat {n}.", "rejected": "Off."} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"{tmp_path / 'pairs.jsonl'} --pretrained {folder / 'whole'} --checkpoint-dir {tmp_path / 'dpo'} --lora-rank 2 --batch-size 1"
    words += " --seq-len 96 --steps 2 --sample-every 0 --checkpoint-every 0 --val-fraction 0 --dtype float32 --log-every 1"
    assert run("jax", words, dpo) == 0
    first = next(row for row in figures(tmp_path / "dpo") if "batch_loss" in row)
    assert first["batch_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert read_info(tmp_path / "dpo" / "final").adapter


def test_a_trainer_gives_and_saves_the_whole_model(folder, tmp_path):
    import smedjan_jax

    trainer = smedjan_jax.trainer(str(folder / "base"), lr=0.1, lora_rank=2, lora_targets="q_proj")
    base = read_checkpoint(folder / "base/final").snapshot.params
    assert all(np.array_equal(value, base[name]) for name, value in trainer.params().items()), "it begins as the base"
    for _ in range(2):
        trainer.step(np.arange(34).reshape(2, 17))
    found = trainer.params()
    assert {name for name in base if not np.array_equal(found[name], base[name])} == {f"layers.{i}.mixer.q_proj.weight" for i in (0, 1)}
    trainer.save(tmp_path)
    assert np.array_equal(
        read_weights(read_info(tmp_path / "final"), None)["layers.1.mixer.q_proj.weight"], found["layers.1.mixer.q_proj.weight"]
    )


def test_merge_writes_the_whole_model_and_refuses_what_is_one(folder, tmp_path, capsys):
    assert merge.main(["--adapter", str(folder / "whole"), "--output", str(tmp_path / "out")]) == 0
    made, whole = read_checkpoint(tmp_path / "out"), read_weights(read_info(folder / "whole" / "final"), None)
    assert all(np.array_equal(made.snapshot.params[name], whole[name]) for name in whole)
    assert made.info.adapter is None
    assert made.train
    assert made.train.lora_rank == 0
    for words, told in (
        (["--adapter", str(folder / "base")], "holds a whole model."),
        (["--adapter", str(folder / "whole"), "--t", "0.4"], "--t does not go with --adapter."),
        ([str(folder / "base"), "--adapter", str(folder / "whole")], "Another path does not go with --adapter."),
    ):
        assert merge.main([*words, "--output", str(tmp_path / "other")]) == 2
        assert told in capsys.readouterr().err


@pytest.fixture
def away(folder, tmp_path):
    """The base and the run, both somewhere else, and not where they were."""
    for name in ("base", "whole"):
        shutil.copytree(folder / name, tmp_path / name)
    (folder / "base").rename(folder / "aside")
    yield tmp_path
    (folder / "aside").rename(folder / "base")


def test_both_may_move_together_and_a_missing_or_another_base_is_told(folder, away, capsys):
    final = away / "whole" / "final"
    assert np.array_equal(
        read_weights(read_info(final), None)["norm.weight"], read_checkpoint(away / "base/final").snapshot.params["norm.weight"]
    )
    shutil.rmtree(away / "base")
    assert info.main([str(final)]) == 0
    assert run("jax", f"--checkpoint-dir {away / 'whole'}") == 0
    assert "Done already" in capsys.readouterr().out
    assert merge.main([str(final), str(final), "--output", str(away / "out")]) == 2
    assert f"The base of {final} is missing." in capsys.readouterr().err
    shutil.copytree(final, away / "base" / "final")
    assert merge.main([str(final), str(final), "--output", str(away / "out")]) == 2
    assert "has other weights than those that the adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--checkpoint-dir {new} --dataset {text} --lora-rank 4", "--lora-rank needs --pretrained."),
        ("--checkpoint-dir {run} --lora-rank 8", "has other adapters: --lora-rank is 4 there, 8 now."),
        ("--checkpoint-dir {run} --lora-alpha 8", "has other adapters: --lora-alpha is 32"),
        ("--checkpoint-dir {new} --pretrained {base} --dataset {text} --lora-rank 4 --lora-targets embed", "which has no adapter."),
        ("--checkpoint-dir {new} --pretrained {base} --dataset {text} --lora-rank 4 --lora-targets q_prj", "Did you mean q_proj"),
        ("--checkpoint-dir {new} --pretrained {base} --dataset {text} --lora-rank 4 --lora-targets ,", "--lora-targets is empty."),
        ("--checkpoint-dir {new} --pretrained {base} --dataset {text} --lora-alpha 4", "--lora-alpha would do nothing"),
        (
            "--checkpoint-dir {new} --pretrained {base} --dataset {text} --lora-rank 4 --checkpoint-format orbax",
            "does not go with --lora-rank",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(folder, tmp_path, capsys, words, told):
    places = {"new": tmp_path / "new", "run": folder / "whole", "base": folder / "base", "text": folder / "text.txt"}
    assert run("jax", words.format(**places) + " --steps 9") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_rows_of_new_tokens_are_learned_and_a_plan_knows_what_is_kept(folder, tmp_path, capsys):
    rows = [{"prompt": f"cat no. {n}?", "completion": f"On mat {n}."} for n in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"{tmp_path / 'chats.jsonl'} --pretrained {folder / 'whole'} --checkpoint-dir {tmp_path / 'chat'} --lora-rank 2 --batch-size 1"
    words += " --seq-len 64 --steps 3 --sample-every 0 --checkpoint-every 0 --val-fraction 0 --dtype float32"
    assert run("jax", f"{words} --dry-run", sft) == 0
    assert "rank 2, alpha 32: 14 linear maps (all)" in capsys.readouterr().out
    assert run("jax", words, sft) == 0
    found, tokenizer = open_model(tmp_path / "chat")
    new = slice(*found.adapter.adapters.new_rows)
    assert new == slice(tokenizer.vocab_size - 2, tokenizer.vocab_size)
    table, before = read_weights(found, None)["embed.weight"], read_weights(read_info(folder / "base/final"), None)["embed.weight"]
    assert np.array_equal(table[: new.start], before[: new.start])
    assert not np.array_equal(table[new.start], table[new.start + 1]), "equal at first, they part"
    assert found.train.lr == pytest.approx(2 * 3e-4 * (4096 / 16) ** 0.5)
