"""A real browser without a window, to see what a page does in it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
)


class Browser:
    """Debian's Chromium, driven by Selenium (`driver`)."""

    def __init__(self, profile: Path):
        webdriver = pytest.importorskip("selenium.webdriver")
        programs = [shutil.which("chromium"), shutil.which("chromedriver")]
        if not all(programs):
            pytest.skip("needs a browser: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Shows a page in a window of so many CSS pixels, by day or by night."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # What was before is forgotten.
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function body returns."""
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """What the console said since the page was opened or this was last asked."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since then, but for what the page holds itself and what its
        policy stopped, of which the console complains."""
        sent = {}
        for line in self.driver.get_log("performance"):
            event = json.loads(line["message"])["message"]
            kind, values = event["method"], event["params"]
            if kind == "Network.requestWillBeSent":
                sent[values["requestId"]] = values["request"]["url"]
            elif kind == "Network.loadingFailed" and values.get("blockedReason") == "csp":
                sent.pop(values["requestId"], None)
        return [url for url in sent.values() if not url.startswith("data:")]

    def press(self, key: str) -> Any:
        """Presses a key of `selenium.webdriver.Keys`, and gives the element that has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(key).perform()
        return self.driver.switch_to.active_element

    def tab_stops(self, limit: int = 200) -> list[str]:
        """What the tab key reaches, in order, each by what it is called."""
        from selenium.webdriver import Keys

        name = (
            "const e = document.activeElement;"
            "return e === document.body ? '' : e.getAttribute('aria-label') || e.innerText || e.id"
        )
        stops: list[str] = []
        for _ in range(limit):
            self.press(Keys.TAB)
            if not (stop := self.run(name)):
                break
            stops.append(stop)
        return stops

    def check(self, path: Path) -> None:
        """Holds what is true of every page, by day, by night and on a phone."""
        for width, dark in ((1200, False), (1200, True), (360, False)):
            self.open(path, width=width, dark=dark)
            assert self.complaints() == []
            assert self.requests() == [path.resolve().as_uri()]
            assert self.run("return document.documentElement.scrollWidth") <= width
            assert self.run(_UNNAMED) == []
        assert self.tab_stops()


# Images without words, and controls without a name.
_UNNAMED = """
const named = e => e.getAttribute("alt") || e.getAttribute("aria-label") || e.innerText
  || (e.labels && e.labels.length) || e.closest("[aria-hidden=true]");
const all = document.querySelectorAll("img, main svg, canvas, button, input, select, [tabindex]");
return [...all].filter(e => !named(e)).map(e => e.outerHTML.slice(0, 200));
"""
