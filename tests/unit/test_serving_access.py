"""Who may ask a server: the host that a request names, the page it comes from, the key it brings."""

import pytest

from smedjan_common.serving.access import Access, host_name, is_loopback
from smedjan_common.serving.api_error import ApiError


def status(access, method="POST", path="/v1/completions", **headers):
    try:
        access.check(method, path, {"host": "localhost:8080"} | {name.replace("_", "-"): value for name, value in headers.items()})
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.9.9.9", "[::1]:8080", "[::1]"])
def test_loopback_names_are_answered(host):
    assert status(Access(), host=host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "", " ", "10.0.0.5:8080", "[::2]:1", ":8080"],
)
def test_other_hosts_are_refused_so_that_no_name_can_be_pointed_here(host):
    assert status(Access(), host=host) == 403


def test_hosts_are_allowed_by_name_or_all_of_them():
    assert status(Access(hosts=("box.local",)), host="box.local:8080") == 200
    assert status(Access(hosts=("box.local",)), host="other.local:8080") == 403
    assert status(Access(hosts=("*",)), host="evil.example") == 200
    assert status(Access(hosts=("*",)), host="") == 403


def test_elsewhere_than_on_the_loopback_addresses_are_answered_too_and_names_are_not():
    assert status(Access(loopback=False), host="10.0.0.5:8080") == 200
    assert status(Access(loopback=False), host="[fe80::1]:8080") == 200
    assert status(Access(loopback=False), host="evil.example:8080") == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "http://[", ""])
def test_pages_of_other_origins_are_refused(origin):
    assert status(Access(), origin=origin) == 403
    assert Access().cors("POST", {"origin": origin}) == {}


def test_the_own_page_and_allowed_ones_are_answered():
    assert status(Access(), origin="http://localhost:8080") == 200
    page = Access(origins=("https://app.example",))
    assert status(page, origin="https://app.example") == 200
    assert status(page, origin="https://app.example.evil.example") == 403
    assert status(Access(origins=("*",)), origin="https://any.example") == 200


def test_a_browser_is_told_what_it_asks_before_a_request():
    asked = {"origin": "https://app.example", "access-control-request-headers": "authorization,x-stainless-os"}
    told = Access(origins=("https://app.example",)).cors("OPTIONS", asked)
    assert told["access-control-allow-origin"] == "https://app.example"
    assert told["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert told["vary"] == "origin"
    assert Access(origins=("https://other.example",)).cors("OPTIONS", asked) == {}


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("Bearer  secret ", 200),
        ("Bearer secre", 401),
        ("Bearer secrett", 401),
        ("Bearer", 401),
        ("", 401),
        ("Basic secret", 401),
        ("secret", 401),
        ("Bearer séc", 401),
    ],
)
def test_the_key_is_asked_for(authorization, expected):
    assert status(Access(key="secret"), authorization=authorization) == expected


def test_without_a_key_any_is_taken_and_some_paths_need_none():
    assert status(Access(), authorization="Bearer anything") == 200
    assert status(Access(key="secret"), "GET", "/health") == status(Access(key="secret"), "GET", "/") == 200
    assert status(Access(key="secret"), "GET", "/metrics") == status(Access(key="secret"), "GET", "/v1/models") == 401
    assert status(Access(key="secret"), "OPTIONS") == 200, "a browser asks without the key first"


def test_names_in_hosts():
    assert [host_name(each) for each in ("A:1", "[::1]:2", "::1", "a")] == ["a", "::1", "::1", "a"]
    assert [is_loopback(each) for each in ("localhost", "127.1.1.1", "::1", "0.0.0.0", "a")] == [True, True, True, False, False]
