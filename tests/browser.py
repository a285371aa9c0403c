"""Pages in a real headless browser: chromium, driven by selenium as a user would."""

import json
import shutil
from contextlib import contextmanager

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)

# The contrast of every text with what is behind it (WCAG 2.2, 1.4.3): [ratio, text] of those that are seen.
CONTRAST = """
const rgba = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const behind = e => e ? over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255, 1];
const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const v = c[i] / 255;
  return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
}, 0);
return [...document.body.querySelectorAll('*')]
  .filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  .filter(e => !['SCRIPT', 'STYLE', 'TITLE'].includes(e.tagName))
  .map(e => {
    const below = behind(e), [a, b] = [light(over(rgba(getComputedStyle(e).color), below)), light(below)];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.trim().slice(0, 40)];
  });
"""


class Browser:
    """One browser for many pages. `driver` is selenium's."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, file, width=1100, height=900, *, dark=False):
        """Open a file in a window of this size, for someone who likes it dark or light."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        likes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in likes.items()]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get_log("browser"), self.driver.get_log("performance")
        self.driver.get(file.as_uri())

    def js(self, expression):
        """The value of an expression."""
        return self.driver.execute_script(f"return {expression}")

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def hover(self, element):
        """Move the mouse to the middle of an element."""
        from selenium.webdriver import ActionChains

        self.js_on(element, "arguments[0].scrollIntoView({block: 'center'})")
        ActionChains(self.driver).move_to_element(element).perform()

    def press(self, element, *keys):
        """Press keys by their names: "END", or type text."""
        from selenium.webdriver.common.keys import Keys

        element.send_keys(*(getattr(Keys, key, key) for key in keys))

    def js_on(self, element, code):
        return self.driver.execute_script(code, element)

    def errors(self):
        """What the console complains of: exceptions, and what the page's policy forbids."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Addresses that were asked for since the page was opened; the browser's own pages are none of it."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        own = ("chrome://", "chrome-untrusted://", "data:,")
        return {params["request"]["url"] for params in sent if not params["documentURL"].startswith(own)}

    def overflow(self):
        """Pixels by which the page is wider than its window, or what is in a card wider than the card."""
        wider = "[...document.querySelectorAll(':root, .tile, .chart, .sample, .findings, .facts, .shares li')]"
        return self.js(f"Math.max(...{wider}.map(e => e.scrollWidth - e.clientWidth))")

    def contrast(self):
        """The text that is hardest to read: (ratio, text)."""
        return tuple(min(self.driver.execute_script(CONTRAST)))


@contextmanager
def start(profile):
    """A browser with a fresh profile in the folder `profile`; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium to drive a browser with")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, path in programs.items():
        if path is None:
            pytest.skip(f"no {name} to open pages in")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
