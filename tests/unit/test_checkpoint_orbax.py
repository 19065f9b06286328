"""Orbax in the JAX backend: every bit, while training goes on, onto another mesh; a failing disk is told at the next step."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smedjan_common.checkpoint import About, latest_checkpoint, read_checkpoint, read_info, start_own, verify_checkpoint
from smedjan_common.checkpoint.manifest import ARRAYS
from smedjan_common.commands import train
from smedjan_common.errors import CheckpointError
from tests.conformance import subjects
from tests.conformance.cases import CASES
from tests.conformance.compare import demand_equal_bits
from tests.fakes.runs import arguments, figures, saved_steps, tree, write_text

pytest.importorskip("jax", reason="Orbax is JAX's")
ROOT = Path(__file__).parents[2]
CASE = CASES["attention-swiglu-gqa"]


def save(directory: Path, backend: Any, state: Any, step: int) -> Any:
    """Start an Orbax checkpoint of the state."""
    params, slots = backend.own.tensors(state)
    about = About(model=backend.model, train=backend.train, framework={"name": "jax"})
    begin = lambda folder: backend.own.begin(state, folder)  # noqa: E731
    return start_own(directory, begin, about, kind="orbax", step=step, params=params, optimizer_arrays=slots)


def steps(backend: Any, state: Any, first: int, last: int) -> tuple[Any, list[float]]:
    losses = []
    for batch in CASE.batches[first:last]:
        state, metrics = backend.train_step(state, *batch, lr=1e-3)
        losses.append(backend.read(metrics)["loss"])
    return state, losses


def test_what_is_written_is_the_state_of_that_step_though_training_goes_on(tmp_path):
    backend = subjects.backend("jax", CASE.model, CASE.train)
    state, _ = steps(backend, backend.init(CASE.start), 0, 4)
    taken = backend.save(state)
    then = {name: value.copy() for name, value in {**taken.params, **taken.optimizer}.items()}
    del taken
    finish = save(tmp_path, backend, state, 4)
    state, on = steps(backend, state, 4, 9)
    info = verify_checkpoint(finish())
    restored = backend.own.read(info.path / ARRAYS)
    again = backend.save(restored)
    assert (info.step, again.step) == (4, 4)
    demand_equal_bits({**again.params, **again.optimizer}, then)
    demand_equal_bits(backend.own.read_params(info.path / ARRAYS), again.params)
    del again
    restored, resumed = steps(backend, restored, 4, 9)
    assert resumed == on, "the run goes on bit for bit"
    demand_equal_bits(backend.save(restored).params, backend.save(state).params)


def test_parameters_of_another_model_and_those_to_compute_with_are_numpy(tmp_path):
    """A teacher's, the base of adapters: their shapes are not those of the run."""
    backend = subjects.backend("jax", CASE.model, CASE.train)
    path = save(tmp_path, backend, backend.init(CASE.start), 0)()
    other = CASES["attention-swiglu-mha"]
    adapted = dataclasses.replace(CASE.train, lora_rank=2)
    for own, how in (
        (subjects.backend("jax", other.model, other.train).own, {}),
        (subjects.backend("jax", CASE.model, adapted).own, {}),
        (backend.own, {"on_host": True}),
    ):
        found = own.read_params(path / ARRAYS, **how)
        assert all(type(value) is np.ndarray for value in found.values())
        demand_equal_bits(found, CASE.start)


def test_another_model_or_a_damaged_array_is_a_checkpoint_error(tmp_path):
    backend = subjects.backend("jax", CASE.model, CASE.train)
    path = save(tmp_path, backend, backend.init(CASE.start), 0)()
    other = CASES["attention-swiglu-mha"]
    with pytest.raises(CheckpointError, match=r"arrays cannot be read.*Orbax says"):
        subjects.backend("jax", other.model, other.train).own.read(path / ARRAYS)
    for file in (path / ARRAYS).rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"arrays cannot be read.*Orbax says"):
        backend.own.read(path / ARRAYS)


MESHES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from smedjan_common.checkpoint.manifest import ARRAYS
from smedjan_common.training.mesh import parse_mesh
from smedjan_jax.backend import JaxBackend
from tests.unit.test_checkpoint_orbax import CASE, save, steps

def host(backend, state):
    taken = backend.save(state)
    return {name: np.array(value) for name, value in {**taken.params, **taken.optimizer}.items()}

def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)

folder = Path(sys.argv[1])
one = JaxBackend(CASE.model, CASE.train)
state, _ = steps(one, one.init(CASE.start), 0, 3)
path = save(folder, one, state, 3)()
out = {}
for text in sys.argv[2:]:
    four = JaxBackend(CASE.model, CASE.train, parse_mesh(text))
    spread = four.own.read(path / ARRAYS)
    placed = jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, spread, four.shapes)
    kept = same(host(four, spread), host(one, state))
    spread, losses = steps(four, spread, 3, 5)
    before = host(four, spread)
    finish = save(folder / text, four, spread, 5)
    spread, on = steps(four, spread, 5, 7)
    back = one.own.read(finish() / ARRAYS)
    single = {str(leaf.sharding.device_set) for leaf in jax.tree.leaves(back)}
    returned = same(host(one, back), before)
    _, alone = steps(one, back, 5, 7)
    devices = len(spread["params"]["embed.weight"].sharding.device_set)
    out[text] = [devices, all(jax.tree.leaves(placed)), kept, returned, len(single), max(abs(a / b - 1) for a, b in zip(on, alone))]
print(json.dumps(out))
"""


def test_saved_on_one_device_it_is_resumed_on_four_and_back(tmp_path):
    flags = f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
    }  # what is compared is arithmetic: fast code would take longer to compile
    command = [sys.executable, "-c", MESHES, str(tmp_path), "fsdp=2,tensor=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr
    for text, (devices, placed, kept, returned, places, apart) in json.loads(done.stdout.splitlines()[-1]).items():
        assert devices == 4, text
        assert placed, f"{text}: every array is where the mesh wants it"
        assert kept, f"{text}: one device to four changes no bit"
        assert returned, f"{text}: four devices to one changes no bit"
        assert places == 1
        assert apart < 1e-6, f"{text}: both go on to the same losses"


def jax_train(*words: object) -> int:
    """The training command with JAX, in this process."""
    from smedjan_jax import train as program

    return program.main([str(word) for word in words])


@pytest.fixture
def compiled_once(monkeypatch):
    """Runs of the same model and settings share a backend, and what it has compiled."""
    from smedjan_jax import train as program

    load = functools.cache(program.load)
    backends: dict[tuple, Any] = {}

    def shared(*about: Any) -> Any:
        if about not in backends:
            backends[about] = load()[0](*about)
        return backends[about]

    monkeypatch.setattr(program, "load", lambda deterministic=False: (shared, load()[1]))


@pytest.mark.usefixtures("compiled_once")
def test_a_run_saved_as_orbax_goes_on_to_the_bits_of_a_run_that_did_not_stop(tmp_path, capsys):
    text = write_text(tmp_path)
    flags = ("--checkpoint-every", 5, "--log-every", 1, "--eval-every", 4)
    assert jax_train(*arguments(text, tmp_path / "whole", 14, *flags)) == 0
    run = tmp_path / "run"
    assert jax_train(*arguments(text, run, 14, *flags, "--checkpoint-format", "orbax", "--keep", 2, "--keep-every", 5)) == 0
    assert [path.name for path in sorted(run.glob("*-*"))] == ["orbax-00000005", "orbax-00000010", "orbax-00000014"]
    (run / "final").rename(tmp_path / "gone")
    (run / "orbax-00000014").rename(tmp_path / "gone-too")
    (run / "orbax-00000010" / "arrays" / "_CHECKPOINT_METADATA").write_text("{}")
    capsys.readouterr()
    assert jax_train("--checkpoint-dir", run) == 0, "the format is remembered"
    said = capsys.readouterr().out
    assert "_CHECKPOINT_METADATA is damaged" in said
    assert f"Going on from {run / 'orbax-00000005'}, step 5" in said
    assert latest_checkpoint(run) == run / "orbax-00000014"
    demand_equal_bits(read_checkpoint(run / "final").snapshot.params, read_checkpoint(tmp_path / "whole" / "final").snapshot.params)
    assert figures(run) == figures(tmp_path / "whole")


def test_a_save_that_fails_in_the_background_ends_the_run_at_a_later_step_and_costs_no_older_checkpoint(tmp_path, capsys, monkeypatch):
    from smedjan_jax.checkpoint import Orbax

    begin, calls = Orbax.begin, iter(range(10))

    def begins(self: Orbax, state: Any, folder: Path) -> Any:
        wait = begin(self, state, folder)
        if next(calls) == 0:
            return wait

        def fail() -> None:
            wait()
            raise OSError(28, "No space left on device")

        return fail

    monkeypatch.setattr(Orbax, "begin", begins)
    run = tmp_path / "run"
    words = arguments(write_text(tmp_path), run, 100_000, "--checkpoint-every", 3, "--log-every", 1, "--eval-every", 0)
    assert jax_train(*words, "--checkpoint-format", "orbax") == 2
    error = capsys.readouterr().err
    assert "The checkpoint orbax-00000006 could not be written" in error
    assert "No space left on device" in error
    assert saved_steps(run) == [3]
    verify_checkpoint(run / "orbax-00000003")
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


LIMITED = """
import resource, sys
from pathlib import Path
from smedjan_common.errors import CheckpointError
from tests.conformance import subjects
from tests.unit.test_checkpoint_orbax import CASE, save
backend = subjects.backend("jax", CASE.model, CASE.train)
state = backend.init(CASE.start)
save(Path(sys.argv[1]), backend, state, 1)()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save(Path(sys.argv[1]), backend, state, 2)()
except CheckpointError as error:
    print(error)
"""


def test_a_limit_on_file_sizes_is_an_error_in_the_systems_words(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert "The checkpoint orbax-00000002 could not be written" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["orbax-00000001"]
    verify_checkpoint(tmp_path / "orbax-00000001")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a run of 4 steps on it, saved as Orbax."""
    folder = tmp_path_factory.mktemp("finished")
    assert jax_train(*arguments(write_text(folder), folder / "run", 4, "--checkpoint-format", "orbax")) == 0
    return folder


def test_mlx_refuses_it_with_the_way_on_and_does_not_write_it(finished, tmp_path, capsys):
    run, before = finished / "run", tree(finished)
    never = lambda *_: pytest.fail("the framework was imported")  # noqa: E731
    for more in (("--steps", 8), ("--steps", 8, "--resume", run / "orbax-00000004")):
        assert train.run("mlx", never, [str(word) for word in ("--checkpoint-dir", run, *more)]) == 2
        assert f"convert {run / 'orbax-00000004'} {run / 'step-00000004'} --to neutral" in capsys.readouterr().err
    assert train.run("mlx", never, [*arguments(finished / "text.txt", tmp_path / "new", 4), "--checkpoint-format", "orbax"]) == 2
    assert "--checkpoint-format orbax is of the backend jax, not mlx" in capsys.readouterr().err
    assert tree(finished) == before
    assert read_info(run).step == 4


def test_pretrained_takes_the_weights_of_an_orbax_checkpoint(finished, tmp_path):
    words = ("--dataset", finished / "text.txt", "--steps", 1, "--batch-size", 4, "--seq-len", 16, "--lr", 1e-30)
    assert jax_train("--pretrained", finished / "run" / "orbax-00000004", "--checkpoint-dir", tmp_path / "new", *words) == 0
    old, new = (read_checkpoint(folder / "final").snapshot.params for folder in (finished / "run", tmp_path / "new"))
    for name, value in old.items():
        assert np.allclose(value, new[name], rtol=1e-6, atol=1e-12), name


def test_it_is_a_model_in_python_too_and_mlx_says_how_to_convert_it(finished):
    import smedjan_jax
    import smedjan_mlx

    with smedjan_jax.load(finished / "run" / "orbax-00000004") as orbax, smedjan_jax.load(finished / "run" / "final") as final:
        assert orbax.name == final.name == "run"
        assert orbax.generate("the cat", max_tokens=5).tokens == final.generate("the cat", max_tokens=5).tokens
    with pytest.raises(CheckpointError, match="--to neutral"):
        smedjan_mlx.load(finished / "run" / "orbax-00000004")
