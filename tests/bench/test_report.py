"""The page of results shows the numbers of the rows, without an error in the browser."""

import json

import pytest

from stgfast.bench import report
from stgfast.cli import main
from tests.browser import until

COMMON = {"device": "CPU, some </script>", "clock": "processor time", "torch": "2.13.0", "commit": "0123456789ab"}


def steps(model, stgfast=1.25, whole=False):
    seconds = {"stock": 1.1, "paper": 1.6543, "stgfast": stgfast}
    return {
        **{"bench": "steps", **COMMON, "model": model, "size": "small", "steps": 2, "whole": whole, "dtype": "float32"},
        **{"clip": [64, 96, 9], "tokens": 432, "rounds": 3, "seconds": seconds, "matrix_rate": 9.1e10},
        "spread": {name: [0.9 * value, 1.1 * value] for name, value in seconds.items()},
        "over": {"stock": 0.881, "paper": 1.3234, "stgfast": 1.0},
        "predicted": {"stock": 0.88, "paper": 1.321, "stgfast": 1.0},
        **{"matrix_share": {"stgfast": 0.4567, "compiled": 0.7}, "peak_memory": {"stgfast": 3 << 30}},
    }


def growth(axis="tokens", by="tokens"):
    points = [{by: n, "seconds": 0.1 * n, "spread": [0.09 * n, 0.12 * n], "block_rows": 10 * n} for n in (1, 2, 4, 8)]
    fit = {"seconds": {"coefficients": [0.0, 0.1, 0.001], "r2": 0.9987}}
    about = {"model": "wan-1.3b", "size": "tiny", "steps": 2, "rounds": 5}
    return {"bench": "growth", **COMMON, **about, "axis": axis, "by": by, "points": points, "fit": fit}


KERNEL = {"bench": "combine", **COMMON, "case": "3 branches", "MB of a branch": 64, "GB/s": 1234.5}


@pytest.fixture
def page(tmp_path):
    results, out = tmp_path / "results", tmp_path / "report.html"
    results.mkdir()
    rows = [steps("mochi", stgfast=9.0), steps("mochi"), steps("svd"), steps("svd", whole=True)]
    (results / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (results / "more.jsonl").write_text(f"{json.dumps(growth())}\n\n{json.dumps(KERNEL)}\n")
    assert main(["bench", "--report", str(results), "--out", str(out)]) == 0
    return out


def test_the_last_answer_to_a_question_counts():
    rows = [steps("mochi", stgfast=9.0), growth(), steps("svd"), steps("mochi")]
    assert report.latest(rows) == [growth(), steps("svd"), steps("mochi")]


def test_a_table_for_a_readme():
    names = {"mochi": "Mochi", "svd": "SVD", "no": "No"}
    made = report.table([steps("svd"), steps("mochi"), growth()], "small", names)
    assert made.splitlines() == [
        "|  | Mochi | SVD |",
        "| --- | --- | --- |",
        "| the paper's scheme | 1.32 | 1.32 |",
        "| as the blocks predict | 1.32 | 1.32 |",
        "| CFG alone | 0.88 | 0.88 |",
    ]
    with_code = steps("mochi")
    with_code["over"]["reference"] = 1.345
    assert "| the paper's own code | 1.34 |  |" in report.table([with_code, steps("svd")], "small", names)


def test_a_folder_without_results(tmp_path, capsys):
    assert main(["bench", "--report", str(tmp_path)]) == 2
    assert "expected a folder with results" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(1280, 900), (390, 800)], ids=["desk", "phone"])
def test_the_numbers_are_those_of_the_rows(browser, page, size):
    browser.set_window_size(*size)
    browser.get(page.as_uri())
    until(browser, "document.querySelectorAll('[data-axis] svg circle').length")
    shown = "[...document.querySelectorAll('[data-model=mochi] [data-variant]')]"
    texts = browser.execute_script(
        f"return {shown}.map(e => [e.dataset.variant, e.querySelector('.seconds').textContent,"
        " (e.querySelector('.over') || {}).textContent])"
    )
    over = {variant: over and float(over.split()[1]) for variant, _, over in texts}
    assert over == {"stock": 0.881, "paper": 1.32, "stgfast": None}
    assert [seconds for _, seconds, _ in texts] == ["1.1 s", "1.654 s", "1.25 s"]
    widths = browser.execute_script(f"return {shown}.map(e => e.querySelector('.fill').getBoundingClientRect().width)")
    assert widths[0] / widths[2] == pytest.approx(1.1 / 1.25, rel=0.01)
    share = browser.execute_script("return document.querySelector('[data-share=\"mochi stgfast\"]').textContent")
    assert share.endswith("45.7%")
    assert "0.1 n + 0.001 n²; R² 0.9987" in browser.execute_script("return document.querySelector('.fit').textContent")
    places = browser.execute_script(
        "return [...document.querySelectorAll('circle')].map(e => Number(e.getAttribute('cy')))"
    )
    assert len(places) == 4
    assert places == sorted(places, reverse=True)
    text = browser.execute_script("return document.body.textContent")
    for said in ("CPU, some </script>", "1235", "stgfast 3", "0.091 TFLOP/s", "A whole clip by variant"):
        assert said in text, said
    wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
