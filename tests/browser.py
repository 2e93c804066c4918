"""A headless Chromium, with which tests read a page."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

Broker = TypeVar("Broker")

PATIENCE = 20.0  # s
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
WITHOUT = "no chromium and chromedriver on the PATH (install Debian's chromium, chromium-driver)"

# Each visible text's contrast with what is behind it, as WCAG 2 has it.
CONTRASTS = """
const rgba = (css) => css.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = rgba(getComputedStyle(at).backgroundColor);
    if (colour[3] !== 0) return colour;
  }
}
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
  if (!text || !element.checkVisibility()) continue;
  const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
}
return found;
"""


class Browser:
    """One tab."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None, WITHOUT
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            f"user-data-dir={folder}",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = Chrome(options, ChromeService(DRIVER))  # unnamed, it would be downloaded

    def quit(self) -> None:
        self.driver.quit()

    def do(self, command: str, **settings: object) -> Any:
        """Give a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, settings)

    @contextlib.contextmanager
    def on(self, broker: AbstractContextManager[Broker]) -> Iterator[Broker]:
        """Leave the broker's page before the broker closes, so that no request finds nobody."""
        with broker as opened:
            yield opened
            self.driver.get("about:blank")

    def size(self, width: int, height: int = 900) -> None:
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def scheme(self, name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        self.do("Emulation.setEmulatedMedia", features=[feature])

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def texts(self, selector: str) -> list[str]:
        """What the elements of a selector show, those that are not displayed left out."""
        script = """return [...document.querySelectorAll(arguments[0])]
            .filter((element) => element.checkVisibility()).map((element) => element.innerText)"""
        return self.run(script, selector)

    def until(self, predicate: Callable[[], object], what: str) -> None:
        give_up = time.monotonic() + PATIENCE
        while not predicate():
            assert time.monotonic() < give_up, f"{what} did not come: {self.text('body')}"
            time.sleep(0.02)

    def console(self) -> list[str]:
        """What was written to the console since the last call."""
        return [
            f"{entry['source']}: {entry['message']}" for entry in self.driver.get_log("browser")
        ]
