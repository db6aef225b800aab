"""Small inputs that once failed, of the kinds sound, clocks, addresses and sources.

    python benchmarks/cases_sound.py ../shared/cases

One function for each case: what is right, what was found, whether that is right.
"""

from __future__ import annotations

import difflib
import functools
import http.server
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
MODEL = "bundled:whisper-tiny.en"
_LINE = re.compile(r"^(?:\S+ )?\[(\d+):(\d+):([\d.]+) → (\d+):(\d+):([\d.]+)\] (.*)$", re.M)
Verdict = tuple[str, str, bool]


def monitor(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and errors of the command."""
    command = [sys.executable, "-m", "mmtransfer.cli", "monitor", MODEL, *map(str, arguments)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout, done.stderr


def spoken(output: str) -> list[tuple[float, float, str]]:
    """(start, end, text) of the lines of a recording."""
    found = []
    for match in _LINE.findall(output):
        start, end = (
            int(hours) * 3600 + int(minutes) * 60 + float(seconds)
            for hours, minutes, seconds in (match[:3], match[3:6])
        )
        found.append((start, end, match[6]))
    return found


def text(output: str) -> str:
    """All that was transcribed."""
    return " ".join(line[2] for line in spoken(output))


def length(errors: str) -> float:
    """Seconds of audio that the last line tells of."""
    found = re.search(r"from ([\d.]+) s of audio", errors)
    return float(found[1]) if found else 0.0


def case_C12(folder: Path) -> Verdict:
    """Packets stamped late."""
    lines = {}
    for name in ("plain", "stall300ms_5s", "gap5s"):
        _, output, errors = monitor(folder / "C12" / f"input_{name}.mkv")
        lines[name] = (spoken(output), length(errors))
    pairs = list(zip(lines["stall300ms_5s"][0], lines["plain"][0], strict=False))
    apart = max(abs(a - b) for one, other in pairs for a, b in zip(one[:2], other[:2], strict=True))
    stall, gap, count = lines["stall300ms_5s"][1], lines["gap5s"][1], len(lines["plain"][0])
    is_right = abs(stall - 45.0) < 0.1 and abs(gap - 49.9) < 0.1 and apart < 0.35
    got = f"{stall:.1f} s, {len(pairs)} lines within {apart:.2f} s of {count}; gap: {gap:.1f} s"
    is_right &= len(lines["stall300ms_5s"][0]) == count
    return "45.0 s, as many lines within 0.35 s; gap: 49.9 s", got, is_right


def case_C13(folder: Path) -> Verdict:
    """Audio stamped in seconds since 1970."""
    _, clean, _ = monitor(folder / "C13" / "input_7s.mp4")
    code, output, errors = monitor(folder / "C13" / "input_epoch.mp4")
    clocks = errors.count("its timestamps jump")
    # Where its speech lies in the detector's frames is another place: words may differ.
    alike = difflib.SequenceMatcher(None, text(clean).split(), text(output).split()).ratio()
    got = f"exit {code}, {clocks} line about the clock, {alike:.2f} alike: {text(output)}"
    is_right = code == 0 and alike > 0.5 and clocks == 1
    return f"exit 0, one line about the clock: {text(clean)}", got, is_right


def case_C14(folder: Path) -> Verdict:
    """Passwords with # / ? or [ in them."""
    shown = []
    addresses = [f"rtsp://admin:pa{mark}ss@127.0.0.1:8554/cam" for mark in "#/?["]
    for given in [("--cameras", folder / "C14" / "input-cameras.yaml"), *((a,) for a in addresses)]:
        code, output, errors = monitor(*given)
        shown.append((code, output + errors))
    leaks = sum("ss@" in said or "admin" in said for _, said in shown)
    advised = sum("%23 %2F %3F %5B" in said for _, said in shown)
    codes = {code for code, _ in shown}
    got = f"exit {codes}, {leaks} leaks, {advised} of {len(shown)} advise"
    is_right = not leaks and advised == len(shown) and codes == {2}
    return "exit {2}, 0 leaks, 5 of 5 advise", got, is_right


def case_C15(folder: Path) -> Verdict:
    """A channel that is the other turned over."""
    _, mono, _ = monitor(folder / "C15" / "input-mono.flac")
    _, inverted, _ = monitor(folder / "C15" / "input-inverted-stereo.flac")
    return text(mono), text(inverted), bool(text(mono)) and text(mono) == text(inverted)


def case_C17(folder: Path) -> Verdict:
    """A length that was guessed."""
    code, output, errors = monitor(folder / "C17" / "input-quiet-start.aac")
    got = f"exit {code}, {length(errors):.1f} s, {text(output)}"
    is_right = code == 0 and abs(length(errors) - 8.1) < 0.1 and len(spoken(output)) == 1
    return "exit 0, 8.1 s, its sentence", got, is_right


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder over HTTP; gives its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def case_C19(folder: Path) -> Verdict:
    """A playlist that has an end."""
    with served(folder / "C19" / "input-vod") as address, tempfile.TemporaryDirectory() as made:
        subtitles = Path(made) / "vod.srt"
        code, output, _ = monitor(f"{address}/vod.m3u8", "--output", subtitles)
        cues = subtitles.read_text().count("-->") if subtitles.exists() else 0
    lines = spoken(output)
    got = f"exit {code}, {len(lines)} lines to {lines[-1][1] if lines else 0:.1f} s, {cues} cues"
    is_right = code == 0 and len(lines) == cues == 3 and lines[-1][1] < 13.5
    return "exit 0, 3 lines within 13.4 s, 3 cues", got, is_right


def case_C21(folder: Path) -> Verdict:
    """One sample that is no number."""
    _, clean, _ = monitor(folder / "C21" / "input-clean-8khz.wav")
    _, output, errors = monitor(folder / "C21" / "input-nan-8khz.wav")
    told = errors.count("no sound")
    got = f"{text(output)} ({told} line)"
    return f"{text(clean)} (1 line)", got, bool(text(clean)) and got == f"{text(clean)} (1 line)"


def case_C27(folder: Path) -> Verdict:
    """One speaker on each channel."""
    _, alone, _ = monitor(folder / "C27" / "input-centre-alone.opus")
    code, output, _ = monitor(folder / "C27" / "input-two-talkers.opus", "--channels", "split")
    channels = {line.split()[0]: line.partition("] ")[2] for line in output.splitlines()}
    got = f"exit {code}, " + "; ".join(f"{name}: {said}" for name, said in channels.items())
    is_right = code == 0 and len(channels) == 2 and text(alone) in channels.values()
    return f"two channels; one: {text(alone)}", got, is_right


def case_C28(folder: Path) -> Verdict:
    """A sample rate that changes within a file."""
    _, output, _ = monitor(folder / "C28" / "input-mixed-rate.mp3")
    command = [sys.executable, "-m", "mmtransfer.cli", "evaluate", MODEL]
    command += ["--data", str(folder / "C28" / "input-set")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    said = next((line for line in done.stdout.splitlines() if "clips" in line), done.stderr)
    got = f"{len(spoken(output))} lines; evaluate: exit {done.returncode}, {said.strip()}"
    is_right = bool(text(output)) and done.returncode == 0 and said.startswith("2 clips")
    return "text; evaluate: exit 0, 2 clips", got, is_right


def case_C29(folder: Path) -> Verdict:
    """A channel map that kills PyAV."""
    _, control, _ = monitor(folder / "C29" / "input-control-quad.mov")
    code, output, _ = monitor(folder / "C29" / "input-unused-channels.mov")
    is_right = code == 0 and bool(text(control)) and text(output) == text(control)
    return f"exit 0, {text(control)}", f"exit {code}, {text(output)}", is_right


if __name__ == "__main__":
    cases = sorted(name for name in globals() if name.startswith("case_"))
    for name in cases:
        right, got, ok = globals()[name](Path(sys.argv[1]))
        print(f"{'right' if ok else 'WRONG'} {name.removeprefix('case_')}\n  {right}\n  {got}")
