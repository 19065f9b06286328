"""The line between the hosts of a run, in one process: real sockets, a thread for each host."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from smedjan_common.errors import ConfigError, HostError
from smedjan_common.run import hosts as hosts_module
from smedjan_common.run import line as line_module
from smedjan_common.run.hosts import ALONE, ONE_HOST, Hosts, Place, by_hand, meet
from smedjan_common.run.line import Line, join, listen, serve
from tests.fakes.hosts import free_port


class Flags:
    """An Asked of these flags alone."""

    def __init__(self, **values):
        self.value = values.get


def met(count):
    """The hosts of a run; that one is lost ends no process here."""
    port = free_port()
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda index: meet(Place(f"127.0.0.1:{port}", index, count)), range(count)))
    for host in found:
        host._line.lost = lambda error: None
    return found


def each(hosts, work):
    """What `work` gives, or raises, on each of them at the same time."""

    def one(host):
        try:
            return work(host)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(one, hosts))


@pytest.fixture
def three():
    found = met(3)
    yield found
    for host in found:
        host.leave()


def test_everybody_hears_what_everybody_says_in_any_order(three):
    assert (
        each(three, lambda host: [host.gather("what", host.index + 10 * turn) for turn in range(3)])
        == [[[10 * turn + index for index in range(3)] for turn in range(3)]] * 3
    )
    assert each(three, lambda host: host.tell("name", "zero" if host.first else None)) == ["zero"] * 3


def test_host_0_works_first_and_the_others_find_what_it_made(three, tmp_path):
    folder = tmp_path / "run"

    def work(host):
        if host.first:
            time.sleep(0.1)
            folder.mkdir()
            return "made"
        return "found" if folder.is_dir() else "came too early"

    assert each(three, lambda host: host.in_turn(lambda: work(host), folder)) == ["made", "found", "found"]
    assert list(folder.iterdir()) == []


def test_a_folder_that_not_all_see_is_told(three, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts_module, "_SHARED_SECONDS", 0.2)
    folders = [tmp_path / str(index) for index in range(3)]
    for folder in folders:
        folder.mkdir()

    def one(host):
        try:
            return host.in_turn(lambda: None, folders[host.index])
        except Exception as error:
            host.leave(error)
            raise

    first, *others = each(three, one)
    assert isinstance(first, HostError)
    assert "has ended the run" in first.what
    assert any(isinstance(error, ConfigError) and "is not shared" in error.what for error in others)


def test_what_fails_on_one_ends_all(three):
    def work(host):
        if host.index == 2:
            raise ConfigError("Two is odd.", "It is even.", "Take three.")
        return "done"

    found = each(three, lambda host: host.together("start", lambda: work(host)))
    assert [type(error) for error in found] == [HostError, HostError, ConfigError]
    assert (found[0].what, found[0].why) == ("Host 2 could not go on.", "Two is odd.")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        (
            lambda host: {"--seed": 1} | ({"--lr": 0.1} if host.index == 1 else {}),
            "Host 1 differs from host 0 in --lr. Host 0 has none, host 1 0.1.",
        ),
        (
            lambda host: {"the model": {"dim": 8 + host.index // 2}},
            "Host 2 differs from host 0 in dim in the model. Host 0 has 8, host 2 9.",
        ),
    ],
)
def test_what_must_be_the_same_is_compared_on_all(three, known, said):
    for error in each(three, lambda host: host.check_same(known(host))):
        assert isinstance(error, ConfigError)
        assert f"{error.what} {error.why}" == said


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_is_known_at_once_and_the_others_wait_no_longer(three, lost):
    others = [host for host in three if host.index != lost]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(each, others, lambda host: host.gather("never"))
        time.sleep(0.1)
        three[lost]._line._closed = True  # who is killed tells nobody what it noticed
        for connection in three[lost]._line._peers.values():  # as the kernel does with what a killed process has open
            connection.shutdown(socket.SHUT_RDWR)
        found = waiting.result(timeout=5)
    assert [(type(error), error.what) for error in found] == [(HostError, f"Host {lost} of the run is lost.")] * 2
    assert found[0].exit_code == 5
    assert others[0].explain(RuntimeError("a collective failed")).what == f"Host {lost} of the run is lost."


def test_a_silent_host_is_lost_and_one_that_works_long_is_not(monkeypatch):
    monkeypatch.setattr(line_module, "SILENT_SECONDS", 2.5)
    monkeypatch.setattr(line_module, "BEAT_SECONDS", 0.2)
    two = met(2)
    time.sleep(3.5)
    assert [host._line.gone for host in two] == [None, None]
    monkeypatch.setattr(Line, "_send", lambda self, peer, message: None)  # its machine has no network any more
    assert "said nothing for" in each(two, lambda host: host.gather("never"))[0].why


def test_the_end_is_told_from_a_loss():
    two = met(2)
    two[1].leave()
    time.sleep(0.1)
    assert two[0]._line.gone is None
    with pytest.raises(HostError, match="ended the run already"):
        two[0].gather("more")
    two[0].leave()


def refused(count=2, index=1, version=None):
    """What host `index` of `count` hears that comes to a run of 2 whose host 1 comes later."""
    server = listen(0)
    address = f"127.0.0.1:{server.getsockname()[1]}"
    with ThreadPoolExecutor(1) as pool:
        host_0 = pool.submit(serve, server, 2, 30.0)
        try:
            if version is None:
                join(address, index, count, 5.0)
            else:
                with socket.create_connection(("127.0.0.1", server.getsockname()[1])) as connection:
                    connection.sendall(line_module._bytes({"hello": [index, count, version]}))
                    raise ConfigError(*next(line_module._messages(connection))["refused"])
        finally:
            join(address, 1, 2, 5.0).close()
            host_0.result().close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"count": 3}, "told --num-hosts 3, host 0 2"),
        ({"index": 0}, "--host-id 0 is taken"),
        ({"index": 2}, "--host-id 2 is taken"),
        ({"version": "0.0"}, "has smedjan 0.0"),
    ],
)
def test_who_does_not_belong_is_refused_and_the_run_goes_on(words, said):
    with pytest.raises(ConfigError, match=said):
        refused(**words)


def test_what_is_no_host_is_refused_and_noise_does_not_hurt():
    server = listen(0)
    port = server.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        host_0 = pool.submit(serve, server, 2, 30.0)
        with socket.create_connection(("127.0.0.1", port)) as noise:
            noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        other = join(f"127.0.0.1:{port}", 1, 2, 5.0)
        host_0.result().close()
        other.close()
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"220 mail\n"), daemon=True).start()
        with pytest.raises(ConfigError, match="is not host 0 of this run"):
            join(f"127.0.0.1:{server.getsockname()[1]}", 1, 2, 5.0)


def test_who_does_not_come_is_named():
    with pytest.raises(HostError, match="Hosts 1, 2 did not come within 0 seconds"):
        serve(listen(0), 3, 0.1)
    with pytest.raises(HostError, match="Host 0 was not found at "):
        join(f"127.0.0.1:{free_port()}", 1, 2, 0.3)


def test_a_run_by_itself_asks_nobody():
    assert ALONE.gather("what", 1) == [1]
    assert ALONE.in_turn(lambda: 2) == 2
    assert ALONE.together("what", lambda: 3) == 3
    ALONE.check_same({"a": 1})


def test_the_place_of_a_host_by_its_flags():
    assert by_hand(Flags()) is None
    assert by_hand(Flags(num_hosts=1)) == ONE_HOST
    assert by_hand(Flags(coordinator="a:6000", num_hosts=2, host_id=1)) == Place("a:6000", 1, 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"num_hosts": 2}, "--coordinator and --host-id are not given"),
        ({"coordinator": "a:1", "num_hosts": 2}, "--host-id is not given"),
        ({"coordinator": "a", "num_hosts": 2, "host_id": 0}, "--coordinator a is no address"),
        ({"coordinator": "a:1", "num_hosts": 0, "host_id": 0}, "--num-hosts is 0"),
        ({"coordinator": "a:1", "num_hosts": 2, "host_id": 2}, "--host-id 2 is not one of 2 hosts"),
    ],
)
def test_a_place_that_cannot_be_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        by_hand(Flags(**flags))


def test_hosts_of_no_line_are_one():
    assert (Hosts().first, Hosts().alone, Hosts().count) == (True, True, 1)
