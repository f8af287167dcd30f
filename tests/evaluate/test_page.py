"""The page of plots, in a real browser: it shows what was measured, and nothing else."""

import pytest

from stgfast import Guidance, Perturbation
from stgfast.cli import main
from tests.browser import until
from tests.evaluate.test_run import folder, jobs


def settings():
    made = [(Guidance(), {"guidance_scale": cfg}) for cfg in (1.0, 2.0)]
    for kind, layer in (("residual", 1), ("attention", 3)):
        for scale in (0.5, 1.0):
            guidance = Guidance(Perturbation([layer], kind=kind, scale=scale))
            made.append((guidance, {"guidance_scale": 2.0, "negative": "</script><b>bold"}))
            made.append((guidance, {"guidance_scale": 2.0}))
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    assert main(["evaluate", str(folder(out / "clips", jobs(settings()))), "--page", str(out / "page.html")]) == 0
    return out / "page.html"


@pytest.mark.parametrize("size", [(1280, 900), (390, 840)])
def test_it_draws_what_was_measured(browser, page, size):
    browser.set_window_size(*size)
    browser.get(page.as_uri())
    until(browser, "document.querySelectorAll('tbody tr').length === 10")
    found = browser.execute_script("return [...document.querySelectorAll('[data-curve] h3')].map(x => x.textContent)")
    assert found == ["CFG alone", *["residual 1; CFG 2"] * 2, *["attention 3; CFG 2"] * 2]
    dots = browser.execute_script("return [...document.querySelectorAll('[data-curve] title')].map(x => x.textContent)")
    assert len(dots) == 2 + 2 * 3 + 2 * 2  # a curve starts at CFG alone, if it was rendered
    assert dots[0].startswith("CFG alone; guidance_scale 1.0: 0 ± 0")
    # The clips are made so that guidance makes them brighter by 2 of 255.
    browser.execute_script(
        "const box = document.getElementById('of'); box.value = 'diversity'; box.dispatchEvent(new Event('change'))"
    )
    assert browser.execute_script("return document.querySelectorAll('[data-curve]').length") == 5
    assert browser.execute_script("return document.querySelectorAll('.plane circle').length") >= 10
    assert browser.execute_script("return document.querySelector('b') === null")  # data is not interpreted as markup
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_names_are_text(page):
    assert "</script><b>" not in page.read_text()
