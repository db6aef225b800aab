"""A command in a terminal as an animated SVG, with the times at which its lines came.

    python docs/record_terminal.py docs/assets/monitor.svg "mmtransfer monitor MODEL VIDEO" \
        --run "python -m mmtransfer monitor runs/site examples/site/monitor.mp4"

The first command is what the picture shows, `--run` what is run. Waits of more than `--longest`
seconds are shortened; the picture says so by its own length alone.
"""

from __future__ import annotations

import argparse
import html
import shlex
import subprocess
import time
from pathlib import Path

ROW, WIDTH, COLUMNS = 19, 8.02, 92


def record(command: str, lines: int) -> list[tuple[float, str]]:
    """The first lines of a command's output with their times in seconds."""
    started, found = time.monotonic(), []
    with subprocess.Popen(
        shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found.append((time.monotonic() - started, line.rstrip("\n")))
        if process.wait():
            raise SystemExit(f"exit code {process.returncode}: {found[-1][1] if found else ''}")
    return found if len(found) <= lines else [*found[: lines - 2], (found[-2][0], "…"), found[-1]]


def paced(lines: list[tuple[float, str]], longest: float) -> list[tuple[float, str]]:
    """The same with every wait shortened to `longest`, after a second for the command itself."""
    now, before, made = 1.0, 0.0, []
    for at, text in lines:
        now, before = now + min(at - before, longest), at
        made.append((now, text))
    return made


def wrapped(text: str) -> list[str]:
    """A line as a terminal breaks it."""
    return [text[i : i + COLUMNS] for i in range(0, len(text), COLUMNS)] or [""]


def svg(command: str, lines: list[tuple[float, str]], hold: float = 5.0) -> str:
    """The picture; it repeats."""
    whole = lines[-1][0] + hold
    rows = [(0.2, part) for part in wrapped(f"$ {command}")]
    rows += [(at, part) for at, text in lines for part in wrapped(text)]
    height = ROW * len(rows) + 50
    styles, texts = [], []
    for number, (at, text) in enumerate(rows):
        share = 100 * at / whole
        styles.append(
            f"@keyframes k{number}{{0%,{share:.2f}%{{opacity:0}}{share + 0.01:.2f}%{{opacity:1}}}}"
        )
        color = "#7ee787" if text.startswith("$") else "#ffa657" if "ALERT" in text else "#e6edf3"
        texts.append(
            f'<text x="16" y="{52 + ROW * number}" fill="{color}" '
            f'style="animation:k{number} {whole:.1f}s infinite">{html.escape(text)}</text>'
        )
    width = round(COLUMNS * WIDTH + 32)
    dots = "".join(
        f'<circle cx="{20 + 18 * i}" cy="17" r="5.5" fill="{color}"/>'
        for i, color in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace" font-size="13.3" '
        f'xml:space="preserve" role="img" aria-label="{html.escape(command)}">'
        f"<style>{''.join(styles)}"
        "@media (prefers-reduced-motion:reduce){text{animation:none!important}}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>{dots}{"".join(texts)}</svg>\n'
    )


def main() -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("svg", type=Path)
    parser.add_argument("command", help="what the picture shows")
    parser.add_argument("--run", help="what is run, if that differs")
    parser.add_argument("--lines", type=int, default=14, help="most lines of output")
    parser.add_argument("--longest", type=float, default=1.5, help="longest wait in seconds")
    arguments = parser.parse_args()
    lines = record(arguments.run or arguments.command, arguments.lines)
    arguments.svg.parent.mkdir(parents=True, exist_ok=True)
    arguments.svg.write_text(svg(arguments.command, paced(lines, arguments.longest)))


if __name__ == "__main__":
    main()
