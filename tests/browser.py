"""A browser for tests of pages, if one is installed."""

import shutil
from contextlib import contextmanager

import pytest

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def opened_browser(*flags):
    """A new browser."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, *flags):
        options.add_argument(flag)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield made
    finally:
        made.quit()


@pytest.fixture(scope="session")
def one_browser():
    """One browser for all tests, since a start takes a second."""
    with opened_browser() as made:
        yield made


@pytest.fixture
def browser(one_browser):
    """The browser without a page, a log or a size from an earlier test. A page that stays goes on playing its clips."""
    one_browser.set_window_size(1280, 900)
    one_browser.get_log("browser")
    yield one_browser
    one_browser.get("about:blank")


def until(browser, script, seconds=10):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.05).until(lambda browser: browser.execute_script(f"return {script}"))
