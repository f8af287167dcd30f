"""The live page, in a browser."""

import http.server
import itertools
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from stgfast.queue.desk import Desk
from stgfast.queue.state import CANCELLED, PENDING
from stgfast.queue.status import status_of
from tests.browser import opened_browser, until
from tests.serve.night import Night, ask, served, watched

HOSTILE = "</script><img src=x onerror=document.title='taken'><script>document.title='taken'</script> {{7*7}} \u2028"


@pytest.fixture
def night(tmp_path):
    with Night(tmp_path) as found:
        yield found.begin_with(6)


@pytest.fixture
def server(night):
    with served(night.out) as address:
        yield address


def opened(browser, server, size=(1280, 900)):
    browser.set_window_size(*size)
    browser.get(f"http://{server}/")
    until(browser, "document.querySelectorAll('article').length")
    browser.execute_script("window.loadedOnce = true")


def cards(browser):
    """The name and text of each card on the page."""
    each = "[...document.querySelectorAll('article')].map(card => [card.dataset.name, card.innerText])"
    return dict(browser.execute_script(f"return {each}"))


def press(browser, text, within="body"):
    browser.execute_script(
        "const button = [...document.querySelector(arguments[0]).querySelectorAll('button')]"
        ".find(one => one.textContent.startsWith(arguments[1]) && one.offsetHeight);"
        "if (!button) throw new Error('no button ' + arguments[1]);"
        "button.scrollIntoView({block: 'center'}); button.click()",
        within,
        text,
    )


def of(name):
    return f"article[data-name='{name}']"


def eventually(look, wanted=True):
    until_ = time.monotonic() + 10
    while look() != wanted:
        assert time.monotonic() < until_, f"got {look()!r}, expected {wanted!r}"
        time.sleep(0.05)


def status_of_page(browser, name):
    return browser.execute_script("return status[arguments[0]]", name)


def statuses(night):
    return {row["file"][:10]: row["status"] for row in night.connection.execute("SELECT file, status FROM jobs")}


def test_it_follows_the_night_without_a_reload(browser, server, night):
    opened(browser, server)
    assert browser.find_element("id", "count").text.startswith("0 of 6 · m")
    task, other = night.claimed(2)
    for step in (3, 21):
        night.at(task, step)
        until(browser, f"document.querySelector('#running').innerText.includes('denoise {step}/30')")
        until(browser, f"document.querySelector('progress').value === {step}")
        until(browser, f"document.querySelector(\"{of(task.file)}\").innerText.includes('denoise {step}/30')")
    night.done(task)
    night.fail(other, "ValueError: a reason", {})
    until(browser, "document.querySelector('article video')?.readyState > 0")  # it plays
    until(browser, "document.querySelector('article .bad')?.innerText.includes('ValueError: a reason')")
    until(browser, "document.getElementById('count').innerText.startsWith('2 of 6')")
    assert "clips an hour" in browser.find_element("id", "count").text
    assert "done in" in browser.find_element("id", "count").text
    assert browser.title == f"2/6 {night.out.name}"
    press(browser, "failed 1")
    eventually(lambda: list(cards(browser)), [other.file])
    press(browser, "done 1")
    eventually(lambda: list(cards(browser)), [task.file])
    assert browser.execute_script("return window.loadedOnce") is True


def test_a_clip_goes_on_playing_while_the_page_is_kept_up(browser, server, night):
    task, other = night.claimed(2)
    night.done(task)
    opened(browser, server)
    until(browser, "document.querySelector('article video')?.readyState > 1")
    browser.execute_script("window.playing = document.querySelector('article video'); return window.playing.play()")
    for step in range(1, 4):
        night.at(other, step)
        until(browser, f"document.querySelector('#running').innerText.includes('denoise {step}/30')")
    night.connection.execute(
        "UPDATE jobs SET attempts = 2 WHERE file = ?", (task.file,)
    )  # its card shows another state
    until(browser, "document.querySelector('article').innerText.includes('attempt 2')")
    assert browser.execute_script(
        "return [window.playing.isConnected, window.playing === document.querySelector('article video')]"
    ) == [True, True]


def test_two_clips_are_compared(browser, server, night):
    for task in night.claimed(2):
        night.done(task)
    opened(browser, server)
    until(browser, "document.querySelectorAll('article video').length === 2")
    for file in ("clip-00000.mp4", "clip-00001.mp4"):
        press(browser, "Compare", of(file))
    until(browser, "[...document.querySelectorAll('#pair video')].filter(video => video.readyState > 1).length === 2")
    browser.execute_script("at('place').value = 500; at('place').dispatchEvent(new Event('input'))")
    places = browser.execute_script("return [...document.querySelectorAll('#pair video')].map(v => v.currentTime)")
    assert places[0] == places[1] == pytest.approx(0.25, abs=0.02)
    time.sleep(1.2)  # the page was updated meanwhile
    assert browser.find_element("id", "compare").is_displayed()
    press(browser, "Close", "#compare")
    assert not browser.find_element("id", "compare").is_displayed()


def test_jobs_are_cancelled_retried_and_put_first(browser, server, night):
    (task,) = night.claimed()
    night.fail(task, "ValueError: a reason", {})
    opened(browser, server)
    press(browser, "Cancel", of("clip-00003.mp4"))
    eventually(lambda: statuses(night)["clip-00003"], CANCELLED)
    until(browser, f"document.querySelector(\"{of('clip-00003.mp4')}\").innerText.includes('cancelled')")
    press(browser, "Retry", of("clip-00003.mp4"))
    eventually(lambda: statuses(night)["clip-00003"], PENDING)
    press(browser, "First", of("clip-00005.mp4"))
    eventually(lambda: night.connection.execute("SELECT MAX(priority) FROM jobs").fetchone()[0], 1000)
    assert [task.file for task in night.claimed()] == ["clip-00005.mp4"]
    press(browser, "Pause", "header")
    eventually(lambda: night.setting("paused"), "1")
    until(browser, "document.getElementById('count').innerText.includes('paused')")
    press(browser, "Resume", "header")
    eventually(lambda: night.setting("paused"), "")
    until(browser, "document.querySelector('#running .job')")
    press(browser, "Cancel", "#running")
    eventually(lambda: statuses(night)["clip-00005"], CANCELLED)


def test_all_that_is_seen_is_cancelled_or_retried(browser, server, night):
    opened(browser, server)
    press(browser, "waiting")
    browser.find_element("id", "words").send_keys("kite 0000")  # names contain it
    until(browser, "document.querySelectorAll('article').length === 6")
    browser.find_element("id", "words").send_keys("1")
    until(browser, "document.querySelectorAll('article').length === 1")
    press(browser, "Cancel these")
    browser.switch_to.alert.dismiss()
    press(browser, "Cancel these")
    assert browser.switch_to.alert.text == "Cancel 1 job?"
    browser.switch_to.alert.accept()
    eventually(lambda: statuses(night)["clip-00001"], CANCELLED)
    assert list(statuses(night).values()).count(CANCELLED) == 1
    browser.find_element("id", "words").clear()
    browser.find_element("id", "words").send_keys(" ")
    press(browser, "cancelled 1")
    until(browser, "document.querySelectorAll('article').length === 1")
    press(browser, "Retry these")
    browser.switch_to.alert.accept()
    eventually(lambda: statuses(night)["clip-00001"], PENDING)


def fill(browser, **fields):
    for name, text in fields.items():
        element = browser.find_element("css selector", f"#form [name={name}]")
        element.clear()
        element.send_keys(text)
    press(browser, "Add", "#form")


def inbox(night):
    import json

    return [json.loads(row["entry"]) for row in night.connection.execute("SELECT entry FROM inbox ORDER BY id")]


def test_a_job_is_added_by_the_form(browser, server, night, tmp_path_factory):
    opened(browser, server)
    press(browser, "Add a job")
    fill(browser, prompt="a {green} kite", seed="7", guidance="nonsense")
    until(browser, "document.getElementById('form-error').innerText.includes('nonsense')")
    assert inbox(night) == []
    picture = tmp_path_factory.mktemp("images") / "one.png"
    from tests.serve.test_answers import picture as drawn

    picture.write_bytes(drawn())
    browser.find_element("css selector", "#form [name=image]").send_keys(str(picture))
    fill(browser, steps="4", guidance='{"perturbations": [{"layers": [5]}]}')
    until(browser, "!document.getElementById('form').open")
    (entry,) = inbox(night)
    assert (entry["prompt"], entry["seed"], entry["steps"]) == ("a {green} kite", 7, 4)
    assert entry["guidance"]["perturbations"][0]["layers"] == [5]
    assert entry["image"].endswith(".image")
    until(browser, "document.getElementById('added').innerText.includes('1 added')")
    night.connection.execute("UPDATE inbox SET error = 'layers: got 5'")
    until(browser, "document.getElementById('added').innerText.includes('layers: got 5')")
    press(browser, "Dismiss")
    eventually(lambda: inbox(night), [])
    until(browser, "!document.getElementById('added').offsetHeight")


def test_a_job_is_rendered_again_with_another_setting(browser, server, night):
    opened(browser, server)
    press(browser, "Again", of("clip-00002.mp4"))
    assert browser.find_element("css selector", "#form [name=prompt]").get_attribute("value") == "a red kite 2"
    fill(browser, seed="40", num_frames="9")
    eventually(lambda: len(inbox(night)), 1)
    (entry,) = inbox(night)
    assert (entry["prompt"], entry["seed"], entry["num_frames"]) == ("a red kite 2", 40, 9)
    assert (entry["model"], status_of_page(browser, "models")) == ("m", ["m"])
    assert entry["guidance"]["perturbations"][0]["layers"] == [3]
    assert "name" not in entry


def test_a_second_browser_sees_it(browser, server, night):
    opened(browser, server)
    with opened_browser() as other:
        opened(other, server, (390, 800))
        press(browser, "Cancel", of("clip-00004.mp4"))
        until(
            other,
            f"document.querySelector(\"{of('clip-00004.mp4')}\")?.innerText.includes('cancelled')"
            " || document.getElementById('statuses').innerText.includes('cancelled 1')",
        )
        press(other, "Pause", "header")
        until(browser, "document.getElementById('count').innerText.includes('paused')")


def test_it_says_that_the_server_is_gone_and_goes_on_when_it_is_back(browser, night):
    with served(night.out) as address:
        opened(browser, address)
    until(browser, "document.getElementById('trouble').innerText === 'The server does not answer.'")


def test_a_link_with_a_token(browser, night):
    with served(night.out, "a-token-of-a-test-123") as address:
        browser.get(f"http://{address}/")
        assert "link" in browser.find_element("css selector", "body").text
        browser.get(f"http://{address}/?token=a-token-of-a-test-123")
        until(browser, "document.querySelectorAll('article').length === 6")
        assert browser.current_url == f"http://{address}/"  # the address may be copied or seen by others
        browser.refresh()
        until(browser, "document.querySelectorAll('article').length === 6")
        press(browser, "Pause", "header")
        eventually(lambda: night.setting("paused"), "1")


@pytest.mark.parametrize("size", [(1280, 900), (390, 800)], ids=["desk", "phone"])
def test_nothing_of_a_job_is_code_and_it_is_readable(browser, tmp_path, size):
    with Night(tmp_path) as night:
        night.begin_with(3, HOSTILE)
        first, second = night.claimed(2)
        night.done(first)
        night.fail(second, HOSTILE, {})
        with Desk(tmp_path) as desk:
            desk.add([{"prompt": HOSTILE.replace("\u2028", "")}])
        night.connection.execute("UPDATE inbox SET error = ?", (HOSTILE,))
        with served(tmp_path) as address:
            opened(browser, address, size)
            until(browser, "document.querySelector('article video')?.readyState > 0")
            assert "</script><img" in browser.find_element("id", "added").text
            press(browser, "Again")
            press(browser, "Close", "#form")
            assert browser.title == f"2/3 {tmp_path.name}"
            assert browser.execute_script("return document.querySelectorAll('main img').length") == 0
            wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide <= window
            low = "button, input, select", "e.offsetHeight && e.offsetHeight < 36 && e.type !== 'range'"
            small = "p, li, button", "parseFloat(getComputedStyle(e).fontSize) < 12"
            for which, wrong in (low, small):
                found = f"return [...document.querySelectorAll('{which}')].filter(e => {wrong}).length"
                assert browser.execute_script(found) == 0
            # No part of a card covers another part.
            within = "[...document.querySelector('article').querySelectorAll('.media, .prompt, .chips, .small, .row')]"
            tops = browser.execute_script(
                f"return {within}.map(e => e.getBoundingClientRect()).map(b => [b.top, b.bottom])"
            )
            inner = browser.execute_script(
                "const video = document.querySelector('article video').getBoundingClientRect(); return video.bottom"
            )
            assert all(above[1] <= below[0] for above, below in itertools.pairwise(tops))
            assert inner <= tops[0][1]
            assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


ATTACK = (Path(__file__).parent / "attack.html").read_text()


@contextmanager
def elsewhere(page):
    """Another site with a page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *args):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    try:
        yield site.server_address[1]
    finally:
        site.shutdown()
        site.server_close()


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("127.0.0.1", ""),
        ("evil.test", "a-token-of-a-test-123"),
        pytest.param("127.0.0.1", "a-token-of-a-test-123", marks=pytest.mark.again),
        pytest.param("localhost", "", marks=pytest.mark.again),
        pytest.param("evil.test", "", marks=pytest.mark.again),
    ],
)
def test_a_page_of_another_site_neither_reads_nor_acts(night, name, token):
    """With another port of this machine, or another name; with the page open, and its cookie set."""
    (task,) = night.claimed()
    night.done(task)
    before = statuses(night)
    with (
        served(night.out, token) as address,
        elsewhere(ATTACK.replace("TARGET", address)) as port,
        opened_browser("--host-resolver-rules=MAP evil.test 127.0.0.1") as browser,
    ):
        browser.get(f"http://{address}/{f'?token={token}' if token else ''}")
        until(browser, "document.querySelectorAll('article').length === 6")
        browser.get(f"http://{name}:{port}/")
        until(browser, "window.found")
        found = browser.execute_script("return window.found")
        assert [
            line
            for line in found
            if line.startswith(("read", "window", "frame"))
            and "opaque 0" not in line
            and not line.endswith(("refused", "none"))
        ] == []
        assert [line for line in found if line.endswith("loaded")] == []
        assert len([line for line in found if line.startswith("post")]) == 18
        assert statuses(night) == before
        assert night.setting("paused") == ""
        assert inbox(night) == []
        # A name that resolves to this machine is still another site.
        browser.get(f"http://evil.test:{address.split(':')[1]}/")
        assert "article" not in browser.page_source
        assert "pause" not in browser.page_source.lower()


def test_thousands_of_jobs(browser, tmp_path):
    count = 6_000
    with Night(tmp_path) as night:
        night.begin_with(count)
        with served(tmp_path) as address:
            browser.set_window_size(1280, 900)
            began = time.monotonic()
            browser.get(f"http://{address}/")
            until(browser, "document.querySelectorAll('article').length")
            took = time.monotonic() - began
            painted = until(browser, "performance.getEntriesByType('paint').map(entry => entry.startTime).pop()")
            sys.stdout.write(f"first paint after {painted:.0f} ms, first cards after {took * 1000:.0f} ms\n")
            seen = set()
            for place in (0, 0.25, 0.5, 1):
                browser.execute_script("window.scrollTo(0, arguments[0] * document.body.scrollHeight)", place)
                index = round(place * (count - 1))
                want = f"clip-{index:05}.mp4"
                near = "[...document.querySelectorAll('article')].map(a => Number(a.dataset.name.slice(5, 10)))"
                until(browser, f"{near}.some(number => Math.abs(number - {index}) < 12)")
                there = cards(browser)
                seen |= set(there)
                assert len(there) < 60, want
                inside = "box => box.bottom > 0 && box.top < innerHeight"
                boxes = "[...document.querySelectorAll('article')].map(card => card.getBoundingClientRect())"
                top = browser.execute_script(f"return {boxes}.filter({inside}).length")
                assert top >= 3
            assert f"clip-{count - 1:05}.mp4" in seen
            browser.find_element("id", "words").send_keys("4777")
            eventually(lambda: list(cards(browser)), ["clip-04777.mp4"])


def test_the_server_s_memory_stays(tmp_path):
    """A minute and a half of a run; `python -m tests.serve.night` has an hour."""
    found = watched(tmp_path, 90, jobs=1000, looks=1)
    sys.stdout.write(f"{[f'{each / 1e6:.1f} MB' for each in found]}\n")
    half = found[len(found) // 2 :]
    assert max(half) - found[len(found) // 2 - 1] < 8e6


@pytest.mark.xdist_group("commands")
def test_a_job_that_is_added_in_the_page_is_rendered(browser, tmp_path):
    """By a run that waits for it, from the form to the frames."""
    command = [sys.executable, "-m", "stgfast.cli", "render", "--wait", "--model", "toy", "--out", str(tmp_path)]
    with subprocess.Popen([*command, "--same-process", "--quiet"]) as run:
        try:
            until_ = time.monotonic() + 60
            while not (tmp_path / ".stgfast" / "jobs.db").exists():
                assert time.monotonic() < until_
                time.sleep(0.1)
            with served(tmp_path) as address:
                browser.get(f"http://{address}/")
                press(browser, "Add a job")
                fill(browser, prompt="a red square moves right", steps="2")
                until(browser, "document.querySelector('article video')?.readyState > 0", 60)
                (job,) = ask(address, "/api/jobs")[2]["jobs"]
                assert (job["status"], job["settings"]["steps"]) == ("done", 2)
        finally:
            run.send_signal(signal.SIGINT)
    assert run.returncode == 130


def test_nothing_is_kept_of_a_look(server, night):
    """Requests leave the folder unchanged."""
    with Desk(night.out) as desk:
        before = status_of(desk).counts
    for _ in range(3):
        assert ask(server, "/api/jobs")[0] == 200
    with Desk(night.out) as desk:
        assert status_of(desk).counts == before
