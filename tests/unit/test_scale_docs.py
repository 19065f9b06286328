"""The files that docs/scale.md gives for clusters: shells and YAML read them, and the flags in them are flags."""

import itertools
import re
import shlex
import subprocess

import pytest

from smedjan_common.run.flags import flag_names
from tests.fakes.runs import ROOT

PAGE = (ROOT / "docs" / "scale.md").read_text()


def blocks(language: str) -> list[str]:
    """The blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def flags(text: str) -> set[str]:
    """What is given to smedjan in it."""
    found = re.findall(r"smedjan\"? train (.*?)(?:\n *- |\n *\w+:|\n\w|$)", text.replace("\\\n", " "), re.DOTALL)
    assert found
    return {word for words in found for word in shlex.split(words.replace("'", " "), comments=True) if word.startswith("--")}


@pytest.mark.parametrize("script", blocks("bash"), ids=lambda text: text.split()[0].split("/")[-1])
def test_scripts_are_bash_and_their_flags_are_of_train(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert flags(script) <= set(flag_names())


def test_the_job_of_kubernetes_is_whole():
    yaml = pytest.importorskip("yaml")
    [text] = blocks("yaml")
    service, job = yaml.safe_load_all(text)
    pod, [container] = job["spec"]["template"]["spec"], job["spec"]["template"]["spec"]["containers"]
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    [command] = container["command"][2:]
    assert subprocess.run(["bash", "-n"], input=command, text=True).returncode == 0
    words = shlex.split(command)
    given = dict(itertools.pairwise(words))
    assert flags(command) <= set(flag_names())
    assert given["--coordinator"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert given["--num-hosts"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])


def test_the_hosts_of_mlx_launch_are_what_it_reads(tmp_path):
    common = pytest.importorskip("mlx._distributed_utils.common")
    [text] = blocks("json")
    (tmp_path / "hosts.json").write_text(text)
    hosts = common.Hostfile.from_file(str(tmp_path / "hosts.json")).hosts
    assert [(host.ssh_hostname, host.ips) for host in hosts] == [("localhost", ["192.168.2.1"]), ("second.local", ["192.168.2.2"])]
