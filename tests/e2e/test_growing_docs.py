"""Every command of docs/growing.md works as it stands, with a few steps of training."""

import os
import subprocess
import sys

from smedjan_common.checkpoint import newest
from tests.e2e.test_readme import TEXT, commands, shortened
from tests.fakes import models

PAGE = "docs/growing.md"


def test_every_command_of_the_page_runs(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT[:60_000])
    models.save_initial(tmp_path / "runs/mine/final", 0, models.model(dim=32, layers=4, heads=4, ffn_dim=64, context_length=32))
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "SMEDJAN_NO_OPENBLAS": "1"}
    assert len(commands(PAGE)) >= 5
    for command in map(shortened, commands(PAGE)):
        command = command.replace("--sample-tokens 4", "--sample-every 0 --eval-every 0")
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=240)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    made = {name: newest(tmp_path / "runs" / name) for name in ("deep", "wide", "experts", "half")}
    assert (made["deep"].step, made["deep"].model.layers) == (2, 8)
    assert (made["wide"].model.heads, made["wide"].model.head_dim, made["wide"].model.ffn_dim) == (8, 8, 256)
    assert (made["experts"].model.experts, made["half"].model.ffn) == (4, ("swiglu", "experts"))
