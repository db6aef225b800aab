r"""The server's page in headless Chromium: first paint, and frames while lines come and it scrolls.

    python benchmarks/page.py --cameras 32 --seconds 20 --screenshots screenshots --axe axe.min.js

A server in this process hands out one made-up line a second of each camera, as its monitor would;
the page's list of lines is scrolled all the time. Frames are counted by the page itself; a frame
that takes longer than 50 ms is a dropped one. Then every view at 390 and 1440 pixels, light and
dark: as a picture, and what axe-core (`npm pack axe-core`) objects to in it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from selenium import webdriver

from mmtransfer.data.printing import json_line
from mmtransfer.monitoring import Alert, ClassifiedSound, Transcript
from mmtransfer.monitoring.stats import MonitorStats
from mmtransfer.server.options import ServerOptions
from mmtransfer.server.serve import program

WORDS = (
    *("the", "gate", "is", "open", "wait", "for", "lorry", "seven", "at", "yard", "two"),
    *("call", "the", "desk", "when", "it", "has", "left"),
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions")
WATCH = """
window.frames_ = [];
let last = performance.now(), down = true;
const list = document.getElementById("lines");
(function step(now) {
  window.frames_.push(now - last);
  last = now;
  list.scrollTop += down ? 12 : -12;
  if (list.scrollTop + list.clientHeight >= list.scrollHeight) down = false;
  if (list.scrollTop <= 0) down = true;
  requestAnimationFrame(step);
})(last);
"""


def line(camera: str) -> Transcript:
    """A made-up line of a camera, spoken now."""
    now = time.time()
    text = " ".join(random.choices(WORDS, k=random.randint(4, 16))).capitalize() + "."
    known = ("", camera, f"{camera}@{now:.3f}", now - 2, now, text)
    return Transcript(*known, -0.2, 0.01, 1.2, 3.0, delay_s=0.5)


def speak(state: Any, names: list[str], over: threading.Event) -> None:
    """A line a second of each camera."""
    number = 0
    while not over.wait(1 / len(names)):
        name = names[number % len(names)]
        state.live.put(line(name))
        state.stats.cameras[name].lines += 1
        number += 1


def measure(browser: Any, url: str, seconds: float) -> None:
    """First paint, then frames."""
    browser.set_window_size(1440, 900)
    paints = []
    for _ in range(5):
        browser.get("about:blank")
        browser.get(url)
        while not (found := browser.execute_script(
            "return performance.getEntriesByName('first-contentful-paint').map(x => x.startTime)"
        )):  # fmt: skip
            time.sleep(0.05)
        paints.append(found[0])
    print(f"first paint: {np.median(paints):.0f} ms (of {len(paints)}; most {max(paints):.0f} ms)")
    browser.execute_script(WATCH)
    time.sleep(seconds)
    frames = np.array(browser.execute_script("return window.frames_")[5:])
    rows = browser.execute_script("return document.getElementById('lines').children.length")
    print(
        f"{len(frames)} frames in {frames.sum() / 1000:.1f} s, {rows} lines on the page: "
        f"p50 {np.median(frames):.1f} ms, p99 {np.quantile(frames, 0.99):.1f} ms, "
        f"most {frames.max():.1f} ms, {np.sum(frames > 50)} over 50 ms"
    )


def journal_of_today(folder: Path, names: list[str]) -> None:
    """Lines of this day until now, some with alerts and sentiments, and sounds between them."""
    rng = random.Random(0)
    now = time.time()
    midnight = time.mktime(time.strptime(time.strftime("%Y-%m-%d"), "%Y-%m-%d"))
    lines = []
    for at in sorted(rng.uniform(midnight, now - 60) for _ in range(600)):
        name = rng.choice(names)
        spoken = line(name)
        feeling = rng.choice(("negative", "neutral", "positive"))
        known = replace(spoken, id=f"{name}@{at:.3f}", start=at, end=at + 2, sentiment=feeling)
        lines.append(asdict(known))
        if "lorry" in spoken.text and rng.random() < 0.2:
            found = (name, "lorry", "lorry", 1.0, lines[-1]["id"], at, at + 2, spoken.text)
            lines.append(asdict(Alert(*found)))
        if rng.random() < 0.05:
            place = (name, f"{name}@{at + 5:.3f}#alarm", "alarm", at + 5, at + 6, 0.9)
            lines.append(asdict(ClassifiedSound(*place)))
    path = folder / time.strftime("%Y-%m-%d.0000.jsonl")
    path.write_text("".join(json_line(one) + "\n" for one in lines), encoding="utf-8")


def views(browser: Any, url: str, folder: Path | None, axe: Path | None) -> None:
    """Every view on a phone and a desk, light and dark."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for width, height in ((390, 844), (1440, 900)):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            for view in ("live", "search", "day", "file", "admin"):
                browser.get(f"{url}/#{view}")
                browser.refresh()
                time.sleep(1.5)
                name = f"{view}-{width}-{scheme}"
                if folder is not None:
                    browser.save_screenshot(str(folder / f"{name}.png"))
                if axe is not None:
                    browser.execute_script(axe.read_text(encoding="utf-8"))
                    found = browser.execute_async_script("axe.run().then(arguments[0])")
                    kinds = [(one["impact"], one["id"]) for one in found["violations"]]
                    print(f"{name}: {len(found['passes'])} rules pass, {kinds or 'none'} do not")


def main() -> None:
    """Measure, and take pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cameras", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="for how long frames count")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures")
    parser.add_argument("--axe", type=Path, help="axe-core's axe.min.js")
    arguments = parser.parse_args()
    names = [f"camera {n:02d}" for n in range(1, arguments.cameras + 1)]
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.ChromeService(shutil.which("chromedriver"))
    with tempfile.TemporaryDirectory() as journal:
        journal_of_today(Path(journal), names[:8])
        models = {"site": "bundled:whisper-tiny.en"}
        made, bound = program(ServerOptions(models, port=0, journal=Path(journal)))
        app: Any = made.config.app
        state = app.state.server
        state.stats = MonitorStats()
        state.stats.add_cameras(names)
        for one in state.stats.cameras.values():
            one.is_connected, one.events["connected"] = True, 1
        serving = threading.Thread(target=lambda: asyncio.run(made.serve(sockets=[bound])))
        serving.start()
        over = threading.Event()
        speaking = threading.Thread(target=speak, args=(state, names, over))
        speaking.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        browser = webdriver.Chrome(options, driver)
        try:
            measure(browser, url, arguments.seconds)
            if arguments.screenshots is not None or arguments.axe is not None:
                views(browser, url, arguments.screenshots, arguments.axe)
        finally:
            browser.quit()
            over.set()
            speaking.join()
            made.should_exit = True
            serving.join()


if __name__ == "__main__":
    main()
