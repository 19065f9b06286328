"""The four commands on a Ray cluster of two machines (two of its nodes here), of which one is lost on the way: the same bytes as without.

`make test-full` runs it where the package ray is; tests/cli/test_executors.py has the same promises against a cluster of one process.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.cli.test_executors import FILES, make, texts

if os.environ.get("SMEDJAN_TEST_FULL") != "1":
    pytest.skip("a minute of two nodes; SMEDJAN_TEST_FULL=1 runs it", allow_module_level=True)
pytest.importorskip("ray", reason="needs the package ray: pip install -e '.[ray]'")
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]
NODE = {"num_cpus": 2, "object_store_memory": 150 << 20}
MAKE = """
import sys
from pathlib import Path
from tests.cli.test_executors import make
make(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))  # of the workers
    found = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        yield found
    finally:
        found.shutdown()


def test_two_nodes_write_the_same_bytes_though_one_is_lost(cluster, tmp_path) -> None:
    second = cluster.add_node(**NODE)
    text = texts(tmp_path, 40)
    here = make(text, tmp_path / "here", "--workers", "1")
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", MAKE, str(text), str(tmp_path / "there"), "--executor", "ray"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    losing = threading.Thread(target=_lose, args=(cluster, second, tmp_path / "there"))
    losing.start()
    said = process.communicate(timeout=400)[1]
    losing.join()
    assert process.returncode == 0, said
    for name in FILES:
        assert (tmp_path / "there" / name).read_bytes() == here[name], name
    assert len([node for node in cluster.list_all_nodes() if node != second]) == 1


def _lose(cluster: Cluster, node: object, out: Path) -> None:
    """Take a node away while documents are cleaned."""
    deadline = time.monotonic() + 300
    while not list(out.glob("*p.jsonl*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.0)
    cluster.remove_node(node)
