"""Only pages that the server served itself, or that were named to it, may use it."""

import json

import httpx
import pytest

from spt_jax.errors import ConfigError
from spt_jax.serving.hosts import LOOPBACK, allowed_hosts
from tests.serving.conftest import serving

BODY = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 1})


def test_the_names_of_a_server():
    assert set(allowed_hosts("127.0.0.1", ()) or ()) == set(LOOPBACK)
    assert set(allowed_hosts("127.0.0.2", ["box"]) or ()) == {*LOOPBACK, "127.0.0.2", "box"}
    assert set(allowed_hosts("::1", ()) or ()) == set(LOOPBACK)
    assert allowed_hosts("0.0.0.0", ()) is None
    assert set(allowed_hosts("192.168.1.5", ["example.com"]) or ()) == {"192.168.1.5", "example.com"}
    for name in ("example.com:80", "https://example.com", "example.com/x", "user@example.com", "", "a b"):
        with pytest.raises(ConfigError, match="without a scheme, port or path"):
            allowed_hosts("127.0.0.1", [name])


@pytest.fixture(scope="module")
def named(base, tmp_path_factory):
    """A server on a loopback address that has another name besides."""
    hosts = allowed_hosts("127.0.0.1", ["Example.com"])
    with serving(base, tmp_path_factory.mktemp("none"), hosts=hosts) as own:
        yield own


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("localhost.:80", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("example.com", 200),
        ("evil.example.com", 403),
        ("example.com.evil.org", 403),
        ("127.0.0.1.evil.org:8000", 403),
        ("127.0.0.1:x", 403),
        ("localhost:80@evil.org", 403),
        ("evil.org/localhost", 403),
        ("127.0.0.2", 403),
        ("0.0.0.0:8000", 403),
        ("", 403),
    ],
)
def test_host(named, host, status):
    answers = [
        httpx.get(named.url + "/v1/models", headers={"host": host}),
        httpx.post(
            named.url + "/v1/completions", content=BODY, headers={"host": host, "content-type": "application/json"}
        ),
    ]
    assert [answer.status_code for answer in answers] == [status, status]
    if status == 403:
        assert "--allowed-hosts" in answers[0].json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://{here}", 200),
        ("https://example.com", 200),
        ("http://example.com:9000", 200),
        ("http://localhost:3000", 403),
        ("https://evil.org", 403),
        ("http://evil.org#{here}", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_origin(named, origin, status):
    headers = {"origin": origin.format(here=named.url.removeprefix("http://")), "content-type": "application/json"}
    assert httpx.post(named.url + "/v1/completions", content=BODY, headers=headers).status_code == status


def test_any_name_where_none_are_known(base, tmp_path):
    headers = {"host": "service.cluster", "origin": "https://example.com", "content-type": "application/json"}
    with serving(base, tmp_path, hosts=None) as own:
        assert httpx.post(own.url + "/v1/completions", content=BODY, headers=headers).status_code == 200
        headers["content-type"] = "text/plain"
        assert httpx.post(own.url + "/v1/completions", content=BODY, headers=headers).status_code == 415


def test_no_page_may_frame_the_page(named):
    headers = httpx.get(named.url).headers
    assert headers["content-security-policy"] == "frame-ancestors 'none'" and headers["x-frame-options"] == "DENY"
