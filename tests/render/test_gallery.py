"""The page of an output folder, read as text and, if there is a browser, viewed in it."""

import json
import re

import numpy as np
import pytest

from stgfast import Guidance, Perturbation
from stgfast.queue.job import Job
from stgfast.queue.store import Row
from stgfast.render.files import Form, write
from stgfast.render.gallery import write_gallery
from tests.browser import until

HOSTILE = "</script><img src=x onerror=document.title='taken'><script>document.title='taken'</script> \u2028 & \"'"


def row(file, prompt="a red square moves right", status="done", error=None, attempts=1, **job):
    return Row(file, status, attempts, 7, Job(prompt=prompt, **job), {"denoise": 1.234}, error, "toy")


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


@pytest.fixture
def folder(tmp_path):
    """Two layers by three scales, in all three formats, and two failed jobs."""
    rows = []
    for number, (layer, scale) in enumerate((layer, scale) for layer in (2, 10) for scale in (0.5, 1.0, 2.0)):
        frames = np.zeros((24, 32, 48, 3), np.uint8)
        for time in range(24):
            frames[time, 8:24, time : time + 12] = (255, int(80 * scale), 60)
        form = Form(kind=("mp4", "gif", "png")[number % 3])
        file = form.file(f"clip {number} #%")
        write(tmp_path / file, frames, form, {})
        rows.append(row(file, seed=4, width=48, guidance=Guidance(Perturbation([layer], scale=scale))))
    rows.append(row("bad.mp4", HOSTILE, "failed", f"image: got a text, {HOSTILE}", 2))
    rows.append(row("worse.mp4", "another prompt", "failed", "out of memory"))
    write_gallery(tmp_path, iter(rows), tmp_path / "aside")
    return tmp_path


def test_what_the_page_knows(folder):
    clips = data_of(folder / "index.html")
    assert [clip["status"] for clip in clips] == ["done"] * 6 + ["failed"] * 2
    first, _, third = clips[:3]
    assert first["frames"] == ["clip%200%20%23%25.mp4"]
    assert third["frames"][:2] == ["clip%202%20%23%25/0000.png", "clip%202%20%23%25/0001.png"]
    assert len(third["frames"]) == 24
    assert first["guidance"] == [{"layers": "2", "kind": "residual", "scale": 0.5}]
    assert (first["seed"], first["settings"], first["seconds"]) == (4, {"width": 48}, {"denoise": 1.23})
    assert clips[6]["prompt"] == HOSTILE
    assert clips[6]["line"] == 7
    assert not (folder / "aside").exists()


def test_nothing_of_a_job_is_markup(folder):
    page = (folder / "index.html").read_text()
    assert page.count("</script>") == 2  # the template's own
    assert "<img" not in page
    assert "\u2028" not in page


def test_the_page_stands_while_it_is_written_anew(folder):
    before = (folder / "index.html").read_text()

    def rows():
        assert (folder / "index.html").read_text() == before
        yield row("one.mp4")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_gallery(folder, rows(), folder / "aside")
    assert (folder / "index.html").read_text() == before


def opened(browser, folder, size=(1280, 900)):
    browser.set_window_size(*size)
    browser.get((folder / "index.html").as_uri())
    until(browser, "document.querySelectorAll('article').length")


def visible(browser):
    return browser.execute_script("return [...document.querySelectorAll('article')].map(a => Number(a.dataset.number))")


def test_filters(browser, folder):
    opened(browser, folder)
    assert visible(browser) == list(range(8))
    words = browser.find_element("id", "words")
    words.send_keys('SQUARE scale":2')
    assert visible(browser) == [2, 5]
    words.clear()
    words.send_keys("memory")
    assert visible(browser) == [7]
    words.clear()
    words.send_keys(" ")
    browser.find_element("css selector", "#status option[value=failed]").click()
    assert visible(browser) == [6, 7]
    assert browser.find_element("id", "count").text == "2 of 8, 2 failed"
    assert "image: got a text" in browser.find_element("css selector", "article .bad").text


def test_more_are_shown_after_those_that_are_there(browser, tmp_path):
    write_gallery(tmp_path, (row(f"{n}.mp4", status="failed") for n in range(130)), tmp_path / "aside")
    opened(browser, tmp_path)
    browser.execute_script("window.first = document.querySelector('article')")
    more = browser.find_element("id", "more")
    for count in (60, 120, 130):
        assert visible(browser) == list(range(count))
        assert more.is_displayed() == (count < 130)
        assert browser.execute_script("return window.first.isConnected")  # nothing was drawn again
        if count < 130:
            browser.execute_script("arguments[0].click()", more)


def test_two_clips_in_step(browser, folder):
    opened(browser, folder)
    buttons = browser.find_elements("css selector", "article button")
    buttons[0].click()  # an MP4
    buttons[2].click()  # pictures
    until(browser, "document.querySelector('#pair video').readyState > 1")
    for place in (0, 500, 900):
        browser.execute_script(
            "const place = document.getElementById('place'); place.value = arguments[0];"
            "place.dispatchEvent(new Event('input'))",
            place,
        )
        frame = round(place / 1000 * 24 - 0.5)
        assert browser.execute_script("return document.querySelector('#pair img').src").endswith(
            f"/{frame:04}.png"
        ) or (place == 0)
        assert (
            abs(browser.execute_script("return document.querySelector('#pair video').currentTime") - place / 1000)
            < 0.01
        )
    browser.find_element("id", "play").click()
    until(browser, "document.getElementById('place').value != 900")
    browser.find_element("id", "close").click()
    assert not browser.find_element("id", "compare").is_displayed()


def test_layers_by_scales(browser, folder):
    opened(browser, folder)
    browser.find_element("css selector", "#status option[value=done]").click()
    browser.find_element("id", "grid").click()
    table = [
        [cell.text.split("\n")[0] for cell in line.find_elements("css selector", "th")]
        for line in browser.find_elements("css selector", "table tr")
    ]
    assert table == [["layers \\ scale", "0.5", "1", "2"], ["residual 2"], ["residual 10"]]
    assert visible(browser) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [(1280, 900), (390, 800)], ids=["desk", "phone"])
def test_it_is_readable_and_quiet(browser, folder, size):
    opened(browser, folder, size)
    until(browser, "[...document.querySelectorAll('article video')].slice(0, 1).every(video => video.readyState > 0)")
    wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    small = "[...document.querySelectorAll('p, li, button')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12)"
    assert browser.execute_script(f"return {small}.length") == 0
    low = "[...document.querySelectorAll('button, input, select')].filter(e => e.offsetHeight && e.offsetHeight < 36)"
    assert browser.execute_script(f"return {low}.filter(e => e.type !== 'range').length") == 0
    assert browser.title == "Clips"  # and not a value from a prompt
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
