"""Which hosts a run has by its environment: JAX finds out, in what Slurm and Open MPI tell a process."""

import os

import pytest

from smedjan_common.errors import ConfigError
from smedjan_common.run.hosts import Place
from smedjan_jax import hosts

SLURM = {"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[07-10]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORDINATOR", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, (Place("node07:61440", 2, 4), None)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, (Place("node07:61440", 2, 4), [1])),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0"}, (Place("node07:61440", 2, 4), None)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),
        (OPEN_MPI, (Place("10.96.0.1:62624", 3, 4), [1])),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (Place("10.96.0.1:62624", 3, 4), None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
    ids=[
        "alone",
        "a task a node",
        "a task a GPU",
        "a task with a GPU of its own",
        "one task",
        "the batch script",
        "Open MPI",
        "a node",
        "a pod",
    ],
)
def test_the_place_of_a_process_and_its_gpus(environment, found, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._detected() == found


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "Open MPI has started several processes"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "nonsense"}, "This looks like one of several hosts"),
    ],
)
def test_who_cannot_find_the_others_does_not_train_alone(environment, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        hosts._detected()
