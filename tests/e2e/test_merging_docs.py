"""Every command of docs/merging.md works as it stands."""

import os
import subprocess
import sys

from smedjan_common.model.params import initial_params
from tests.e2e.test_readme import TEXT, commands
from tests.fakes import models

PAGE = "docs/merging.md"


def test_every_command_of_the_page_runs(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT[:60_000])
    for step in (10, 20, 30):
        models.save_initial(tmp_path / f"runs/mine/step-{step:08d}", step, step=step)
    for seed, name in enumerate("ab"):
        models.save(tmp_path / f"runs/{name}/final", models.model(), initial_params(models.model(), seed))
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "SMEDJAN_NO_OPENBLAS": "1"}
    assert len(commands(PAGE)) >= 5
    for command in commands(PAGE):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
