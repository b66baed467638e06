"""A headless Chromium for pages, driven as a user would: keys, clicks, and what is then on the screen."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def open_browser(profile):
    """Yield a driver; the test is skipped where Chromium or its driver is not installed."""
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium to open pages in: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(20)
    try:
        yield browser
    finally:
        browser.quit()


def show(browser, page, width=1280, height=900, *, at="", colours="light"):
    """Open a file at a size of the screen, anew; ``at`` is the address's part behind #."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": colours}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get(page.as_uri() + (f"#{at}" if at else ""))
    settle(browser)


def settle(browser):
    """Wait until the page has drawn what it was told last."""
    browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 30)"
    )


def errors(browser):
    """Return what the page complained of since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
