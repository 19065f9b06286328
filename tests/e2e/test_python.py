"""Python: every example of docs/python.md and every cell of docs/notebook.ipynb, in both backends; what the two give is the same."""

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from smedjan_common.errors import CheckpointError, ConfigError, TemplateError
from tests.unit import convert_models

ROOT = Path(__file__).parents[2]
BACKENDS = ("jax", "mlx")
TEXT = "".join(f"Once the smith of village {i % 97} struck the iron {i % 13} times; sparks flew over anvil {i % 7}.\n" for i in range(500))


def package(backend: str):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    return importlib.import_module(f"smedjan_{backend}")


def small(folder: Path) -> None:
    """A model of one layer: what costs here is compiling."""
    convert_models.neutral(folder, convert_models.model_config(convert_models.tokenizer().vocab_size, layers=1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python") / "mine"
    small(folder)
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def lm(request, run):
    with package(request.param).load(run) as model:
        yield model


def run_cells(cells: list[str], backend: str, folder: Path, monkeypatch) -> str:
    """What the cells print, one after another in one namespace, fewer steps of training and layers."""
    package(backend)
    monkeypatch.chdir(folder)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for cell in cells:
            cell = re.sub(r"steps=\d+", "steps=3, sample_every=0, eval_every=0", cell.replace("smedjan_jax", f"smedjan_{backend}")).replace(
                "range(20)", "range(2)"
            )
            cell = cell.replace("layers=2", "layers=1") if "mixer" not in cell else cell
            *body, last = ast.parse(cell).body  # the value of the last line is shown, as in a notebook
            if isinstance(last, ast.Expr):
                last = ast.parse(f"print(repr({ast.unparse(last.value)}))").body[0]
            exec(compile(ast.Module([*body, last], []), "cell", "exec"), names)
    return out.getvalue()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_example_of_the_page_runs(backend, tmp_path, monkeypatch):
    (tmp_path / "my.txt").write_text(TEXT)
    small(tmp_path / "runs" / "mine")
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(cells) == 6
    out = run_cells(cells, backend, tmp_path, monkeypatch)
    assert f"LanguageModel('mine', 37,984 parameters, {backend} on " in out
    assert (tmp_path / "runs" / "by-hand" / "final").is_dir()


def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch):
    backend = "mlx" if importlib.util.find_spec("mlx") else "jax"  # which has less to compile
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    out = run_cells(cells, backend, tmp_path, monkeypatch)
    assert "Completion(" in out
    assert "Loss(" in out


def test_importing_the_packages_imports_no_framework():
    code = "import sys, smedjan_jax, smedjan_mlx; print({'jax', 'mlx', 'numpy', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_both_backends_give_the_same(run):
    given = []
    for backend in BACKENDS:
        with package(backend).load(run) as lm:
            chat = lm.chat([{"role": "user", "content": "hi"}], max_tokens=12, seed=2)
            texts = lm.generate(["The smith ", [5, 6, 7]], n=2, max_tokens=20, top_k=40, seed=3)
            given.append(
                (chat.text, [[each.tokens for each in pair] for pair in texts], lm.logits("The anvil"), lm.loss("naïve 中文 " * 60))
            )
    (chat, texts, logits, loss), (other_chat, other_texts, other_logits, other_loss) = given
    assert (chat, texts) == (other_chat, other_texts)
    np.testing.assert_allclose(logits, other_logits, atol=1e-4)
    assert loss.loss == pytest.approx(other_loss.loss, rel=1e-5)


def test_a_stream_gives_the_same_text_and_can_be_closed(lm):
    whole = lm.generate("The smith ", max_tokens=30, seed=4)
    pieces = list(lm.stream("The smith ", max_tokens=30, seed=4))
    assert "".join(piece.text for piece in pieces) == whole.text == str(whole)
    assert (pieces[-1].finish_reason, pieces[-1].usage.completion_tokens) == (whole.finish_reason, whole.usage.completion_tokens)
    assert len(pieces) > 5
    endless = lm.stream("The smith ", max_tokens=None, logit_bias={lm.tokenizer.eot_id: -100})
    next(endless)
    endless.close()
    assert lm.generate("The smith ", max_tokens=30, seed=4).text == whole.text, "the model is free again"


def test_samples_are_those_of_their_seeds_alone(lm):
    samples = lm.generate("The", n=3, max_tokens=10, seed=6)
    assert [each.tokens for each in samples] == [lm.generate("The", max_tokens=10, seed=6 + number).tokens for number in range(3)]
    assert len({each.text for each in samples}) == 3


def test_a_draft_changes_no_text(lm, run, request):
    load = package(request.node.callspec.params["lm"]).load
    asked = {"n": 2, "max_tokens": 12, "seed": 6, "top_k": 40}
    with load(run, draft=run, draft_tokens=3) as faster:
        assert [each.tokens for each in faster.generate("The", **asked)] == [each.tokens for each in lm.generate("The", **asked)]
    with pytest.raises(ConfigError, match="needs a draft"):
        load(run, draft_tokens=3)


def test_losses_scores_and_logits_agree(lm):
    text, eot = "The smith heats the iron", lm.tokenizer.eot_id
    ids = lm.tokenizer.encode(text)
    logits = lm.logits([eot, *ids]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -logprobs[np.arange(len(ids)), ids].sum()
    loss = lm.loss(text)
    assert (loss.tokens, loss.bytes) == (len(ids), len(text.encode()))
    assert loss.loss * loss.tokens == pytest.approx(nats, rel=1e-5)
    assert loss.bits_per_byte == pytest.approx(nats / np.log(2) / len(text), rel=1e-5)
    scored = lm.score("", text)
    assert (scored.logprob, scored.tokens) == (pytest.approx(-nats, rel=1e-5), len(ids))
    given = lm.generate(text, max_tokens=0, echo=True, logprobs=0)
    logits = lm.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert given.text == text
    assert [token.logprob for token in given.logprobs[1:]] == pytest.approx(logprobs[np.arange(len(ids) - 1), ids[1:]].tolist(), rel=1e-4)


def test_threads_may_share_a_model(lm):
    expected, found = lm.generate("The smith ", max_tokens=15).text, []
    threads = [threading.Thread(target=lambda: found.append(lm.generate("The smith ", max_tokens=15).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize(
    ("call", "error", "what"),
    [
        (lambda lm: lm.generate("a", max_new_tokens=3), TypeError, "It is called max_tokens here"),
        (lambda lm: lm.stream("a", temprature=3), TypeError, "Did you mean temperature"),
        (lambda lm: lm.chat([], num_beams=3), TypeError, "It has max_tokens"),
        (lambda lm: lm.generate("a", top_p=3), ConfigError, "top-p"),
        (lambda lm: lm.generate("a", n=0), ConfigError, "n is 0"),
        (lambda lm: lm.generate([300]), ConfigError, "token 300"),
        (lambda lm: lm.generate("iron " * 200), ConfigError, "context of 128"),
        (lambda lm: lm.logits("iron " * 200), ConfigError, "context of 128"),
        (lambda lm: lm.loss(""), ConfigError, "nothing to score"),
        *((lambda lm, ids=ids: lm.logits(ids), ConfigError, "no token|has the token") for ids in ([], [1 << 20], [-1])),
        *((lambda lm, ids=ids: lm.loss(ids), ConfigError, "has the token") for ids in ([0, 1 << 20], [0, -1])),
        (lambda lm: lm.generate("a", max_tokens=2.5), ConfigError, "max_tokens is 2.5"),
        (lambda lm: lm.generate("a", n=2.5), ConfigError, "n is 2.5"),
        (lambda lm: lm.generate("a", top_k=1.5), ConfigError, "--top-k is 1.5"),
        (lambda lm: lm.generate("a", temperature="cold"), ConfigError, "--temperature is 'cold'"),
        (lambda lm: lm.generate("a", seed=None), ConfigError, "--seed is None"),
        (lambda lm: lm.generate("a", stop=[1]), ConfigError, "stop text is 1"),
        (lambda lm: lm.generate("a", logit_bias={1: "x"}), ConfigError, "logit_bias of token 1"),
        (lambda lm: lm.chat("hello"), TemplateError, "Message 1 is 'h'"),
    ],
)
def test_what_is_wrong_is_said_at_once(lm, call, error, what):
    with pytest.raises(error, match=what):
        call(lm)


def test_a_call_that_fails_in_the_model_harms_none_after_it(lm, monkeypatch):
    """What a decoder raises leaves requests unfinished and, in JAX, its state used up."""
    expected, decoder = lm.generate("the smith", max_tokens=4).tokens, type(lm._engine.decoder)
    for name in ("feed", "step"):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, name, lambda *_: (_ for _ in ()).throw(MemoryError("once")))
            with pytest.raises(MemoryError):
                lm.generate(f"another text {name}", max_tokens=4)
        assert lm.generate("the smith", max_tokens=4).tokens == expected


def test_a_path_without_a_model_is_told(tmp_path):
    with pytest.raises(CheckpointError):
        package("jax").load(tmp_path)


def test_keywords_of_training_are_the_flags(tmp_path):
    for call in (package("jax").fit, package("mlx").fit):
        with pytest.raises(TypeError, match="It is called lr here"):
            call(dataset="my.txt", learning_rate=1)
        with pytest.raises(ConfigError, match="--steps"):
            call(dataset="my.txt", steps=0)


def test_batches_that_are_none_are_refused(run):
    trainer = package("mlx").trainer(run, lr=1e-2)
    for batch, what in (([1, 2, 3], "sequences, tokens"), ([[1, 400]], "has not"), ([[1]], "sequences, tokens")):
        with pytest.raises(ConfigError, match=what):
            trainer.step(batch)
    with pytest.raises(TypeError, match="no keyword 'betas'"):
        package("mlx").trainer(run, betas=1)
    losses = [trainer.step([[1, 2, 3, 4, 5]] * 2)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert trainer.evaluate([[1, 2, 3, 4, 5]] * 2)["loss"] < losses[0]
    assert "4 steps done" in repr(trainer)


def test_ctrl_c_ends_the_call_and_not_the_model_and_an_open_stream_does_not_keep_the_program(run):
    package("mlx")
    code = f"""
import smedjan_mlx, threading, os, signal
lm = smedjan_mlx.load({str(run)!r})
endless = {{"max_tokens": None, "logit_bias": {{lm.tokenizer.eot_id: -100}}}}
threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    lm.generate("a", **endless)
except KeyboardInterrupt:
    print(len(lm.generate("a", max_tokens=3, logit_bias={{lm.tokenizer.eot_id: -100}}).tokens))
stream = lm.stream("a", **endless)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_what_is_closed_says_so(run):
    lm = package("mlx").load(run)
    lm.close()
    lm.close()
    with pytest.raises(RuntimeError, match="closed"):
        lm.generate("a")
