"""Who may send requests: the page itself and programs, and no one else."""

import pytest

from stgfast.serve.guard import HEADERS
from tests.serve.night import Night, ask, served

TOKEN = "a-token-of-a-test-123"
OPEN = ("/", "/live.js", "/api/status", "/api/jobs", "/metrics", "/clips/clip-00000.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("guarded")
    with Night(out) as night:
        night.begin_with(2)
        night.done(night.claimed()[0])
    return out


@pytest.fixture(scope="module")
def server(folder):
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def closed(folder):
    with served(folder, TOKEN) as address:
        yield address


def code(*args, **kwargs):
    return ask(*args, **kwargs)[0]


@pytest.mark.parametrize("path", OPEN)
def test_the_page_and_programs_may_ask(server, path):
    assert code(server, path) == 200  # as curl does
    assert code(server, path, Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors") == 200
    for host in ("localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:80", "127.0.0.2:8765"):  # for example through a tunnel
        assert code(server, path, host=host) == 200


@pytest.mark.parametrize("path", [*OPEN, "/nothing"])
def test_pages_of_other_sites_may_not(server, path):
    for host in (
        "evil.test",
        "evil.test:8765",
        "localhost.evil.test",
        "127.0.0.1.evil.test",
        "[evil]",
        ":",
        "10.0.0.1",
    ):
        assert code(server, path, host=host) == 403
    port = server.split(":")[1]
    for origin in ("http://evil.test", "null", f"http://localhost:{port}", "http://[", f"http://127.0.0.1:{port}0", ""):
        assert code(server, path, Origin=origin) == 403
    for site in ("cross-site", "same-site", "what?"):
        assert code(server, path, Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors", Sec_Fetch_Dest="image") == 403


def test_a_link_may_be_followed_from_anywhere_to_the_page_alone(server):
    followed = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert code(server, "/", **followed) == 200
    assert code(server, "/", **{**followed, "Sec_Fetch_Dest": "iframe"}) == 403
    assert code(server, "/api/status", **followed) == 403
    assert code(server, "/", body="", **followed) == 403


def test_what_no_form_can_send_is_asked_for(server):
    paused = "/api/pause"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert code(server, paused, body="{}", Content_Type=kind) == 415
    assert code(server, paused, {}, Origin="http://evil.test") == 403
    assert code(server, paused, {}, Sec_Fetch_Site="cross-site") == 403
    assert ask(server, "/api/status")[2]["paused"] is False
    assert code(server, paused, {}, Origin=f"http://{server}", Sec_Fetch_Site="same-origin") == 200
    assert ask(server, "/api/status")[2]["paused"] is True
    assert code(server, "/api/resume", {}) == 200


@pytest.mark.parametrize("path", [*OPEN, "/nothing", "/api/nothing"])
def test_every_answer_says_what_browsers_may_do_with_it(server, path):
    for more in ({}, {"Origin": "http://evil.test"}):
        _, headers, _ = ask(server, path, **more)
        assert {name: headers.get(name.lower()) for name in HEADERS} == HEADERS
        assert "Access-Control-Allow-Origin".lower() not in headers
        assert headers["cache-control"]


@pytest.mark.parametrize("path", OPEN)
def test_with_a_token_nobody_without_it(closed, path):
    port = closed.split(":")[1]
    wrong = [
        {},
        {"Authorization": "Bearer no"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Cookie": f"stgfast-{port}=no"},
        {"Cookie": f"other={TOKEN}"},
        {"Cookie": "\x80;;;=="},
    ]
    for headers in wrong:
        status, _, said = ask(closed, path, **headers)
        assert (status, b"link" in said) == (401, True)
    assert code(closed, path, Cookie=f"stgfast-{port}={TOKEN}") == 200
    assert code(closed, path, Authorization=f"Bearer {TOKEN}") == 200
    assert code(closed, path, Cookie=f"stgfast-{port}={TOKEN}", host="render-7:80") == 200  # under any name


def test_the_link_brings_the_token_once(closed):
    for path in ("/api/status", "/live.js", "/metrics"):
        assert code(closed, f"{path}?token={TOKEN}") == 401
    assert code(closed, "/?token=no") == 401
    status, headers, _ = ask(closed, f"/?token={TOKEN}")
    cookie = headers["set-cookie"]
    assert status == 200
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert code(closed, "/api/status", Cookie=cookie.partition(";")[0]) == 200
    assert "set-cookie" not in ask(closed, "/", Cookie=cookie.partition(";")[0])[1]
