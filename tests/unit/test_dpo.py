"""`smedjan dpo`: a run of pairs of answers from weights: its defaults, its reference, what it tells, and how it goes on."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest

from smedjan_common.checkpoint import read_checkpoint, read_info
from smedjan_common.commands import dpo, sft
from smedjan_common.config import TrainConfig
from smedjan_common.data.packing import PackedPairs
from smedjan_common.data.token_file import TokenFile
from smedjan_common.run import reference_scores
from smedjan_common.run.falling import WINDOW, Falling
from smedjan_common.run.flags import PairFlags, flag_names
from smedjan_common.run.hosts import Hosts
from smedjan_common.run.option_flags import objective_options
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.config import default_lr
from smedjan_common.training.preferences import METRICS
from tests.fakes import bigram
from tests.fakes.runs import ROOT, arguments, arrays, figures, train_here, tree, write_text

DPO = (
    "--seq-len",
    128,
    "--batch-size",
    2,
    "--checkpoint-every",
    2,
    "--keep",
    0,
    "--sample-every",
    0,
    "--val-fraction",
    0,
    "--log-every",
    1,
)
LN2 = math.log(2)


def dpo_here(*words: object, command=dpo) -> int:
    """Teach in this process; returns the exit code."""
    return command.run("fake", lambda deterministic: (bigram.BigramBackend, "float32"), [str(word) for word in words])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a run that answers, a run on a text, and pairs."""
    folder = tmp_path_factory.mktemp("base")
    assert train_here(*arguments(write_text(folder), folder / "text", 2)) == 0
    talks = [{"prompt": f"cat no. {n}?", "completion": f"It sat on mat {n}."} for n in range(24)]
    pairs = [{"prompt": f"cat no. {n}?", "chosen": f"It sat on mat {n}.", "rejected": f"The dog ran {n * n}."} for n in range(24)]
    pairs.insert(5, {"prompt": "the dog", "chosen": "ran off", "rejected": "ran off"})
    for name, rows in (("talks", talks), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--pretrained", folder / "text", "--checkpoint-dir", folder / "chat", "--steps", 2, *DPO[:4], "--val-fraction", 0)
    assert dpo_here(folder / "talks.jsonl", *words, command=sft) == 0
    return folder


def words_of(base, folder, *more):
    return base / "pairs.jsonl", "--pretrained", base / "chat", "--checkpoint-dir", folder, *DPO, *more


@pytest.fixture(scope="module")
def taught(base):
    """A finished run."""
    assert dpo_here(*words_of(base, base / "better", "--lr", 0.02, "--steps", 6)) == 0
    return base / "better"


def config(folder):
    return json.loads((folder / "config.json").read_text())


def scores_of(folder):
    (path,) = (folder / "data").glob("reference-*.npy")
    return path


def test_its_flags_are_those_of_train_and_a_few_more():
    more = ["loss", "reference", "epochs", "max_dropped", "template"]
    assert list(PairFlags.__dataclass_fields__) == more
    more += [option.name for option in objective_options("dpo")]
    listed = (ROOT / "tests" / "fixtures" / "dpo_flags.txt").read_text().split()
    assert listed == [f"--{name.replace('_', '-')}" for name in more]
    assert not set(listed) & set(flag_names())


@pytest.mark.parametrize(
    ("loss", "objective", "beta", "nll"),
    [("sigmoid", "dpo", 0.1, 0.0), ("ipo", "ipo", 0.1, 0.0), ("simpo", "simpo", 2.0, 0.0), ("orpo", "orpo", 0.1, 1.0)],
)
def test_the_defaults_are_those_of_each_loss(base, tmp_path, loss, objective, beta, nll):
    assert dpo_here(*words_of(base, tmp_path / "run", "--loss", loss)) == 0
    values = config(tmp_path / "run")
    train = values["train"]
    assert (values["objective"], train["objective"]) == (objective, objective)
    assert (train["beta"], train["nll_weight"], train["label_smoothing"]) == (beta, nll, 0.0)
    assert (train["packing"], train["mask_documents"], train["weight_decay"]) == ("documents", True, 0.0)
    assert train["lr"] == float(f"{default_lr(16) * 0.005:.1e}")
    data = TokenFile.open(tmp_path / "run" / values["dataset"]["path"])
    assert train["steps"] == math.ceil(PackedPairs(data, 128).num_windows / 2)
    assert train["warmup"] == train["steps"] // 10
    assert ("reference" in values) == bool(list((tmp_path / "run" / "data").glob("reference-*"))) == (loss in ("sigmoid", "ipo"))
    first = figures(tmp_path / "run")[0]
    assert set(METRICS) <= first.keys()
    if loss == "sigmoid":
        assert first["loss"] == pytest.approx(LN2, rel=1e-6)
    if loss == "ipo":
        assert first["loss"] == pytest.approx(25, rel=1e-5)


def test_it_begins_at_ln_2_and_tells_how_the_answers_go_apart(taught, base, tmp_path, capsys):
    rows = [row for row in figures(taught) if "rewards/margins" in row]
    assert rows[0]["batch_loss"] == pytest.approx(LN2, rel=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["rewards/margins"] > 0.05
    assert rows[-1]["rewards/accuracies"] > 0.9
    for row in rows:
        assert row["rewards/chosen"] - row["rewards/rejected"] == pytest.approx(row["rewards/margins"], abs=1e-6)
        assert row["logps/chosen_per_token"] < 0
    assert dpo_here(*words_of(base, tmp_path / "run", "--steps", 2, "--val-fraction", 0.3, "--eval-every", 1)) == 0
    out = capsys.readouterr().out
    assert "1 of 25 rows dropped: the two answers are the same" in out
    assert "The better of two answers as it is learned" in out
    assert "  | \u27e6It sat on mat " in out
    assert "  | \u27e6The dog ran " in out
    line = next(line for line in out.splitlines() if "step 1/2" in line and "lr" in line)
    assert "accuracy " in line
    assert "margin " in line
    assert "log p -" in line
    checked = [row for row in figures(tmp_path / "run") if "val_loss" in row]
    assert [row["step"] for row in checked] == [1, 2]
    assert {f"val_{name}" for name in METRICS} <= checked[0].keys()
    assert checked[0]["val_bits_per_byte"] is None
    assert checked[0]["val_loss"] == pytest.approx(LN2, rel=1e-3)
    assert len(list((tmp_path / "run" / "data").glob("reference-*.npy"))) == 2, "of what is trained on, of what is held out"
    assert "validation loss 0.69" in out


def test_the_reference_gives_what_its_weights_give_by_definition(base, taught):
    scores = np.load(scores_of(taught))
    data = TokenFile.open(taught / config(taught)["dataset"]["path"])
    embed = read_checkpoint(base / "chat" / "final").snapshot.params["embed.weight"].astype(np.float64)
    logits = embed @ embed.T
    logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    bounds = [*data.documents.astype(int), data.num_tokens]
    expected = []
    for first, last in itertools.pairwise(bounds):
        ids, mask = data.tokens[first:last].astype(int), data.mask[first:last]
        expected.append((logps[ids[:-1], ids[1:]] * mask[1:]).sum())
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_run_keeps_its_reference_by_hash_and_needs_the_weights_no_more(base, taught, tmp_path, capsys):
    assert config(taught)["reference"] == read_info(taught).extra["reference"]
    known = config(taught)["reference"]
    assert known["path"] == str((base / "chat" / "final").resolve())
    folder = tmp_path / "better"
    shutil.copytree(taught, folder)
    shutil.rmtree(folder / "final")
    for path in folder.glob("step-*"):
        if int(path.name[5:]) > 2:
            shutil.rmtree(path)
    moved = base / "moved"
    (base / "chat").rename(moved)
    try:
        capsys.readouterr()
        assert dpo_here("--checkpoint-dir", folder) == 0
        assert "gives log-probabilities" not in capsys.readouterr().out
        assert arrays(folder) == arrays(taught)
        assert figures(folder) == figures(taught)
        changed = bytearray(scores_of(folder).read_bytes())
        changed[-1] ^= 1
        scores_of(folder).write_bytes(changed)
        assert dpo_here("--checkpoint-dir", folder, "--steps", 7) == 2
        assert "is needed again" in capsys.readouterr().err
        assert dpo_here("--checkpoint-dir", folder, "--steps", 7, "--reference", base / "text") == 2
        assert "is not what the run compares with" in capsys.readouterr().err
        assert dpo_here("--checkpoint-dir", folder, "--steps", 7, "--reference", moved) == 0
        out = capsys.readouterr().out
        assert "was changed" in out
        assert "gives log-probabilities to 48 answers" in out
        assert scores_of(folder).read_bytes() == scores_of(taught).read_bytes()
    finally:
        moved.rename(base / "chat")


def test_a_reference_pass_that_was_stopped_goes_on_at_its_next_batch(base, taught, tmp_path, monkeypatch, capsys):
    words = words_of(base, tmp_path / "run", "--lr", 0.02, "--steps", 6)
    monkeypatch.setenv("SMEDJAN_FAKE", "reference_stops_at=2")
    assert dpo_here(*words) == 130
    (part,) = (tmp_path / "run" / "data").glob("reference-*.part")
    known = np.isfinite(np.fromfile(part, np.float32))
    assert 0 < known.sum() < len(known)
    monkeypatch.delenv("SMEDJAN_FAKE")
    assert dpo_here(*words) == 0
    assert "rows done before" in capsys.readouterr().out
    assert scores_of(tmp_path / "run").read_bytes() == scores_of(taught).read_bytes()
    assert arrays(tmp_path / "run") == arrays(taught)
    assert not part.exists()


class Blind(Hosts):
    """Host 1 of two, which does not see what host 0 has found."""

    def __init__(self):
        super().__init__()
        self.index, self.first, self.alone = 1, False, False

    def in_turn(self, work, folder=None):
        return work()

    def tell(self, what, value=None):
        return True

    def check_same(self, known):
        pass


def test_a_host_that_does_not_see_what_is_kept_of_the_reference_is_told(base, tmp_path, monkeypatch, capsys):
    known = reference_scores.reference_scores
    monkeypatch.setattr(reference_scores, "reference_scores", lambda decided, make, hosts: known(decided, make, Blind()))
    assert dpo_here(*words_of(base, tmp_path / "new")) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "Host 1 does not find in" in told
    assert "Give all hosts one --checkpoint-dir that they share." in told


def test_another_reference_and_none(base, taught, tmp_path, capsys):
    assert train_here(*arguments(base / "text.txt", tmp_path / "foreign", 1, "--vocab-size", 290)) == 0
    assert dpo_here(*words_of(base, tmp_path / "other", "--steps", 1, "--reference", tmp_path / "foreign")) == 2
    assert "has another tokenizer" in capsys.readouterr().err
    words = ("--pretrained", taught, "--reference", base / "chat", "--checkpoint-dir", tmp_path / "on", *DPO, "--steps", 1)
    assert dpo_here(base / "pairs.jsonl", *words) == 0
    first = figures(tmp_path / "on")[0]
    assert first["loss"] < LN2 - 0.02, "the policy is ahead of what it is compared with"
    assert np.load(scores_of(tmp_path / "on")).tobytes() == np.load(scores_of(taught)).tobytes()
    assert dpo_here(*words_of(base, tmp_path / "none", "--steps", 1, "--reference", "none")) == 0
    first = figures(tmp_path / "none")[0]
    assert first["rewards/chosen"] == pytest.approx(0.1 * first["logps/chosen"])
    assert config(tmp_path / "none")["reference"]["path"] is None
    assert config(tmp_path / "none")["flags"]["reference"] == "none"
    assert dpo_here("--checkpoint-dir", tmp_path / "none", "--steps", 2) == 0


def test_train_goes_on_with_such_a_run(taught, tmp_path):
    shutil.copytree(taught, tmp_path / "better")
    assert train_here("--checkpoint-dir", tmp_path / "better", "--steps", 8) == 0
    assert config(tmp_path / "better")["objective"] == "dpo"
    assert config(tmp_path / "better")["reference"] == config(taught)["reference"]
    assert figures(tmp_path / "better")[-1]["rewards/margins"] > 0
    assert (tmp_path / "better" / "final" / "chat_template.jinja").is_file() or Tokenizer.load(tmp_path / "better" / "final")


def test_a_run_that_goes_on_elsewhere_takes_its_reference_along(base, taught, tmp_path, capsys):
    step = taught / "step-00000002"
    assert dpo_here("--resume", step, "--checkpoint-dir", tmp_path / "on", "--steps", 6) == 0
    assert "gives log-probabilities" not in capsys.readouterr().out
    assert scores_of(tmp_path / "on").read_bytes() == scores_of(taught).read_bytes()
    assert arrays(tmp_path / "on") == arrays(taught)


def test_config_toml_repeats_it(base, tmp_path, capsys):
    words = words_of(base, tmp_path / "one", "--loss", "simpo", "--gamma", 0.5, "--beta", 3, "--steps", 2)
    assert dpo_here(*words) == 0
    for file in ("config.toml", "config.json"):
        assert dpo_here("--config", tmp_path / "one" / file, "--checkpoint-dir", tmp_path / file) == 0
        assert arrays(tmp_path / file) == arrays(tmp_path / "one")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_here("--config", tmp_path / "one" / "config.toml", "--checkpoint-dir", tmp_path / "three")
    assert "Give the file to `smedjan dpo`" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(base, tmp_path, capsys):
    assert dpo_here(*words_of(base, tmp_path / "run", "--dry-run")) == 0
    assert "Dry run: nothing was written." in capsys.readouterr().out
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("PAIRS", "--checkpoint-dir", "NEW"), "--pretrained is not given"),
        (("PAIRS", "--checkpoint-dir", "CHAT"), "learns to answer"),
        (("--pretrained", "CHAT", "--checkpoint-dir", "NEW"), "nothing to learn from"),
        (("TALKS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW"), "talks.jsonl:1"),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--loss", "kto"), "--loss"),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--loss", "ipo", "--gamma", "1"), "--gamma would do nothing"),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--label-smoothing", "0.5"), "--label-smoothing is 0.5"),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--beta", "0"), "--beta is 0"),
        (
            ("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--loss", "orpo", "--reference", "CHAT"),
            "--reference would do nothing",
        ),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--packing", "windows"), "does not work with pairs"),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--no-mask-documents"), "does not work with pairs"),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--reference", ""), "--reference is empty"),
        (("PAIRS", "--pretrained", "CHAT", "--checkpoint-dir", "NEW", "--reference", "NEW"), "new"),
        (("--checkpoint-dir", "BETTER", "--loss", "ipo", "--steps", "9"), "by --loss sigmoid"),
    ],
)
def test_what_cannot_be_taught_is_refused(base, taught, tmp_path, words, why, capsys):
    for name in ("chat", "better"):
        shutil.copytree(base / name, tmp_path / name)
    before = tree(tmp_path)
    names = {name.upper(): base / f"{name}.jsonl" for name in ("pairs", "talks")}
    names |= {name.upper(): tmp_path / name for name in ("chat", "better", "new")}
    try:
        code = dpo_here(*(names.get(word, word) for word in words), *(DPO if "BETTER" not in words else ()))
    except SystemExit as stopped:  # by the words themselves
        code = stopped.code
    assert code == 2
    assert why in capsys.readouterr().err
    assert {name: value for name, value in tree(tmp_path).items() if not name.startswith("new")} == before
    assert not list((tmp_path / "new").rglob("*.bin"))


def test_pairs_are_no_data_of_other_commands(base, taught, tmp_path, capsys):
    file = next(taught.glob("data/*/train.bin"))
    assert train_here("--dataset", file, "--checkpoint-dir", tmp_path / "run", "--size", "tiny", "--steps", 1) == 2
    assert "holds pairs of answers" in capsys.readouterr().err
    words = ("--pretrained", base / "chat", "--checkpoint-dir", tmp_path / "run", "--steps", 1)
    assert dpo_here(base / "pairs.jsonl", *words, command=sft) == 2
    assert "smedjan dpo" in capsys.readouterr().err


def falling(losses, objective="dpo", compared=True):
    train = TrainConfig(steps=99, batch_size=1, seq_len=8, lr=1e-3, objective=objective)
    watch = Falling(train, compared)
    told = [watch.add(values) for values in losses]
    return [step for step, line in enumerate(told) if line], [line for line in told if line]


def of_step(logp, reference=-20.0, beta=0.1):
    return {"logps/chosen": logp, "logps/chosen_per_token": logp / 10, "rewards/chosen": beta * (logp - reference)}


def test_better_answers_that_become_less_probable_are_told_once():
    steps, lines = falling([of_step(-20 - 0.2 * step) for step in range(40)])
    assert steps == [WINDOW - 1]
    assert "log p -20.00 -> -20.90 an answer" in lines[0]
    assert "--nll-weight" in lines[0]
    assert falling([of_step(-20 + 0.2 * step) for step in range(40)])[0] == []
    assert falling([of_step(-20.1) for _ in range(40)])[0] == [], "by less than anyone would see"
    steps, lines = falling([of_step(-20 - 0.3 * step) for step in range(40)], "simpo", compared=False)
    assert steps == [2 * WINDOW - 1]
    assert "a token" in lines[0]
    assert falling([of_step(-20, reference=0.0) for _ in range(40)], compared=False)[0] == [], "--reference none"
    assert falling([{"loss": 1.0}] * 20, "lm", compared=False)[0] == []


def test_a_rate_that_breaks_the_model_is_told_of(base, tmp_path, capsys):
    rows = [{"prompt": f"cat no. {n}?", "chosen": f"It sat on mat {n}.", "rejected": f"It sat on mat {n + 7}!"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "--pretrained",
        base / "chat",
        "--checkpoint-dir",
        tmp_path / "run",
        *DPO[:4],
        *DPO[8:],
        "--steps",
        30,
        "--lr",
        0.3,
        "--checkpoint-every",
        0,
    )
    assert dpo_here(tmp_path / "pairs.jsonl", *words) == 0
    assert "the better answers have become less probable" in capsys.readouterr().out
