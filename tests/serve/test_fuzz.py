"""Random requests: each gets an answer, no answer is an internal error, and no file of the machine is returned
except the clips of the folder."""

import http.client
import json
import logging
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stgfast.queue.state import STATUSES
from stgfast.serve.answers import ACTIONS
from tests.serve.night import Night, ask, served

SECRET = "a-secret-of-the-machine"
PARTS = (
    "..",
    ".",
    "",
    "%2e%2e",
    "%2f",
    "..%2f",
    "%00",
    "clips",
    "api",
    "jobs.db",
    ".stgfast",
    "clip-00000.mp4",
    "0",
    "-1",
)
WORDS = st.sampled_from(PARTS) | st.text(max_size=12)
ACTION = st.sampled_from(sorted(ACTIONS)) | st.just("images")
FIELD = st.sampled_from(
    (
        *("names", "words", "statuses", "every", "job", "name", "changes", "priority", "prompt", "seed", "steps"),
        *("guidance", "pipeline", "image", "repeat", "vars"),
    )
)
LEAF = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20)),
    st.sampled_from((*STATUSES, "clip-00000.mp4", "*", "[", "[!a-]", "{a|{b}", "$x", "../../etc/passwd", "fast")),
)
VALUE = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=3))
BODY = st.dictionaries(FIELD, VALUE, max_size=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    top = tmp_path_factory.mktemp("fuzzed")
    (top / "secret.mp4").write_text(SECRET)
    with Night(top / "out") as night:
        night.begin_with(4)
        night.done(night.claimed()[0])
        with served(top / "out") as address:
            yield address


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog):
    yield
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def check(status, said):
    assert 200 <= status < 500
    text = said.decode(errors="replace") if isinstance(said, bytes) else json.dumps(said)
    assert SECRET not in text
    assert "Traceback" not in text


@given(parts=st.lists(WORDS, max_size=5), encoded=st.booleans(), query=st.dictionaries(WORDS, WORDS, max_size=3))
@settings(max_examples=75)
def test_paths(server, parts, encoded, query):
    from urllib.parse import quote, urlencode

    path = "/" + "/".join(quote(part, safe="" if encoded else "%.", errors="replace") for part in parts)
    status, _, said = ask(server, f"{path}?{urlencode(query, errors='replace')}")
    check(status, said)


@given(
    status=WORDS | st.sampled_from(STATUSES),
    words=st.text(max_size=30),
    order=WORDS | st.sampled_from(("listed", "latest", "next")),
    offset=st.integers() | WORDS,
    limit=st.integers(-1, 300) | WORDS,
)
@settings(max_examples=50)
def test_lists(server, **asked):
    from urllib.parse import urlencode

    status, _, said = ask(server, f"/api/jobs?{urlencode(asked, errors='replace')}")
    check(status, said)
    assert isinstance(said, dict)
    assert ("error" in said) == (status == 400)


@given(action=ACTION, body=BODY)
@settings(max_examples=100)
def test_actions(server, action, body):
    status, _, said = ask(server, f"/api/{action}", body)
    check(status, said)
    assert isinstance(said, dict) == (status != 415)


@given(action=ACTION, body=st.binary(max_size=200), kind=st.sampled_from(("application/json", "image/png")))
@settings(max_examples=37)
def test_bodies(server, action, body, kind):
    status, _, said = ask(server, f"/api/{action}", body=body, Content_Type=kind)
    check(status, said)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"job": ' * 50_000,
        b'{"names": [' + b"1" * 10_000 + b"]}",
        b'{"words": NaN}',
        b'{"words": "\\ud800"}',
        b'{"names": ["\\udfff"]}',
        b'{"name": "\\ud800", "changes": {}}',
        b'{"a": 1, "a": 2}',
        b'{"priority": 1e400, "every": true}',
        b'{"job": {"prompt": "' + b"{a|" * 5000 + b'"}}',
        b'{"job": {"prompt": "{a|b}", "repeat": 10000}}',
        b'{"names": ["' + b"*a" * 400 + b'"]}',
        b"\xff\xfe",
        b"null",
        b"",
    ],
    ids=range(15),
)
def test_bodies_that_are_known_to_be_trouble(server, body):
    for action in ACTIONS:
        status, _, said = ask(server, f"/api/{action}", body=body, Content_Type="application/json")
        check(status, said)


HEADER = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


@given(
    name=st.sampled_from(("Host", "Origin", "Cookie", "Authorization", "Range", "Content-Type", "Sec-Fetch-Site")),
    value=HEADER
    | st.sampled_from(("bytes=0-", "bytes=9-1", "bytes=-", "bytes=0-1,5-7,-1", "bytes=a-b", "[", "[::1", "http://[")),
    path=st.sampled_from(("/", "/api/status", "/clips/clip-00000.mp4", "/metrics")),
)
@settings(max_examples=75)
def test_headers(server, name, value, path):
    connection = http.client.HTTPConnection(*server.split(":"), timeout=30)
    connection.putrequest("GET", path, skip_host=name == "Host")
    connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    check(answer.status, answer.read())
    connection.close()


@given(raw=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: f"GET /{text} HTTP/1.1\r\n\r\n".encode()))
@settings(max_examples=50)
def test_what_is_no_request(server, raw):
    host, port = server.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(raw + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while part := connection.recv(4096):
            said += part
    assert b" 500 " not in said.split(b"\r\n")[0]
    assert SECRET.encode() not in said
    assert ask(server, "/api/status")[0] == 200
