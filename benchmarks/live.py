r"""Live monitoring measured from outside: delays, how many cameras two cores carry, memory.

    python benchmarks/live.py bundled:whisper-tiny.en --video desk_10min.mp4 delay
    python benchmarks/live.py bundled:whisper-tiny.en --video desk_10min.mp4 cameras --count 16
    python benchmarks/live.py bundled:whisper-tiny.en --video desk_10min.mp4 memory
    python benchmarks/live.py bundled:whisper-tiny.en --video talk.mp3 --reference talk.json talk

Cameras are simulated: a process of its own sends the recording's audio over TCP as fast as it was
spoken, each camera from another place in it. The monitor is `mmtransfer monitor` with a journal, in
a process of its own too, so the simulation takes time from it but nothing else.

- delay: from the moment when the last sample of a segment's speech was sent until its line was
  printed. The end of speech is the monitor's own (by voice activity).
- cameras: the same with as many cameras, of which speech fills `--speech` of the time: pauses in
  the recording are lengthened.
- talk: a conversation in real time, each camera another part of it; word errors of the final text
  and of the same parts as recordings, how many lines are revised, and when.
- memory: peak resident memory of the monitor (and processes it starts) after 10 minutes and after
  2 hours of audio from four cameras, sent `--speed` times as fast as it was spoken.

Every segment is compared with what was sent: the audio, cut by the same rules without a network,
gives the segments that must be in the journal, each once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import wave
from itertools import pairwise
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from mmtransfer.monitoring import LiveSettings, SegmenterSettings
from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio
from mmtransfer.speech.end_of_turn import EndOfTurn
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.scores import default_normalizer, get_normalizer
from mmtransfer.speech.segments import Segment, Segmenter

LEAD_S = 2.0  # silence first: a camera is not switched on in the middle of a word


def with_share_of_speech(samples: np.ndarray, share: float) -> np.ndarray:
    """The recording with pauses longer or shorter, so that speech fills the share."""
    segmenter = Segmenter()
    spans = [(s.start, s.end) for s in [*segmenter.feed(samples), *segmenter.finish()]]
    spoken = sum(end - start for start, end in spans)
    wanted = spoken / share - spoken  # seconds without speech
    edges = [0.0, *(t for span in spans for t in span), len(samples) / SAMPLE_RATE]
    pauses = [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]
    scale = wanted / sum(end - start for start, end in pauses)
    parts = []
    for index, (start, end) in enumerate(pauses):
        pause = samples[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]
        length = max(min(len(pause), SAMPLE_RATE), round(scale * len(pause)))
        # Its own sound, forwards and backwards in turn, so that there is no step in it.
        bed = np.concatenate([pause, pause[::-1]]) if len(pause) else np.zeros(1, np.float32)
        parts.append(np.resize(bed, length))
        if index < len(spans):
            a, b = spans[index]
            parts.append(samples[int(a * SAMPLE_RATE) : int(b * SAMPLE_RATE)])
    return np.concatenate(parts).astype(np.float32)


def serve(tracks: list[np.ndarray], ports: Any, began: Any, seconds: float, speed: float) -> None:
    """Send every track, round and round, from when all cameras are connected."""
    header = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 0xFFFFFFFF, b"WAVEfmt ", 16, 1, 1,
                         SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16, b"data", 0xFFFFFFFF)  # fmt: skip
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in tracks]
    ports.put([listener.getsockname()[1] for listener in listeners])
    connections = [listener.accept()[0] for listener in listeners]
    for connection in connections:
        connection.sendall(header)
    start = time.time() + 0.5
    began.value = start
    piece = SAMPLE_RATE // 20
    data = [(np.clip(track, -1, 1) * 32767).astype("<i2") for track in tracks]
    for number in range(int(seconds * 20)):
        pause = start + (number + 1) / 20 / speed - time.time()
        if pause > 0:
            time.sleep(pause)
        for track, connection in zip(data, connections, strict=True):
            at = number * piece % (len(track) - piece)
            connection.sendall(track[at : at + piece].tobytes())
    time.sleep(20)


def expected(
    track: np.ndarray, seconds: float, end_of_turn: EndOfTurn | None
) -> list[tuple[float, float]]:
    """(start, end) of the segments in what is sent, as the monitor cuts."""
    piece = SAMPLE_RATE // 20
    cut = SegmenterSettings(pause_s=LiveSettings().pause_s)
    segmenter = Segmenter(cut, 3, end_of_turn.endpointer() if end_of_turn else None)
    found: list[Segment] = []
    for number in range(int(seconds * 20)):
        at = number * piece % (len(track) - piece)
        found += segmenter.feed(track[at : at + piece])
    return [(segment.start, segment.end) for segment in found]


def peak_mib(pid: int) -> float:
    """The most memory that a process and its children have held so far, in MiB."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
            )
        except OSError:
            continue
        if int(fields["Pid"]) == pid or int(fields["PPid"]) == pid:
            total += int(fields.get("VmHWM", "0 kB").split()[0])
    return total / 1024


def run(
    model: str, tracks: list[np.ndarray], seconds: float, *, speed: float = 1.0, more: list[str]
) -> dict[str, Any]:
    """Monitor simulated cameras; what was heard, when, and how much memory it took."""
    context = multiprocessing.get_context("spawn")
    ports, began = context.Queue(), context.Value("d", 0.0)
    server = context.Process(target=serve, args=(tracks, ports, began, seconds, speed))
    server.start()
    found = ports.get(timeout=60)
    with tempfile.TemporaryDirectory() as folder:
        cameras = Path(folder, "cameras.yaml")
        listed = [
            {"name": f"camera{n}", "url": f"tcp://127.0.0.1:{port}"} for n, port in enumerate(found)
        ]
        cameras.write_text(json.dumps({"cameras": listed}))
        journal = Path(folder, "journal")
        command = [sys.executable, "-m", "mmtransfer.cli", "monitor", model]
        command += ["--cameras", str(cameras), "--journal", str(journal), *more]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        printed: list[float] = []
        assert process.stdout is not None
        assert process.stderr is not None
        stdout, stderr = process.stdout, process.stderr
        errors: list[str] = []

        def read() -> None:
            for line in stdout:
                if not line.startswith("~"):
                    printed.append(time.time())

        threads = [
            threading.Thread(target=read, daemon=True),
            threading.Thread(target=lambda: errors.extend(stderr), daemon=True),
        ]
        for thread in threads:
            thread.start()
        memory: list[tuple[float, float]] = []
        while not began.value or time.time() < began.value + seconds / speed + 3:
            if process.poll() is not None:
                sys.exit("".join(errors))
            memory.append((time.time(), peak_mib(process.pid)))
            time.sleep(0.5)
        process.terminate()
        process.wait(30)
        for thread in threads:
            thread.join(5)
        server.terminate()
        lines = [
            json.loads(line)
            for path in sorted(journal.glob("*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
    return {
        "lines": lines,
        "printed": printed,
        "memory": [(at - began.value, mib) for at, mib in memory],
        "began": began.value,
        "summary": errors[-1].strip() if errors else "",
    }


def compare(
    model: str, result: dict[str, Any], tracks: list[np.ndarray], seconds: float, speed: float
) -> tuple[int, int, list[float]]:
    """(lost, doubled) segments, and seconds from sending the end of each to its printed line."""
    lost = doubled = 0
    delays: list[float] = []
    end_of_turn = open_recognizer(model).end_of_turn
    texts = first_lines(result["lines"])
    # Lines are printed in the journal's order.
    printed = {line["id"]: at for line, at in zip(texts, result["printed"], strict=False)}
    for number, track in enumerate(tracks):
        own = [x for x in result["lines"] if x["camera"] == f"camera{number}"]
        own = [x for x in own if not x.get("revision")]
        heard = sorted((x for x in own if "id" in x), key=lambda line: line["start"])
        sent = [span for span in expected(track, seconds, end_of_turn) if span[1] < seconds - 1.0]
        if not heard:
            lost += len(sent)
            continue
        offset = heard[0]["start"] - sent[0][0]
        for start, end in sent:
            hits = [
                x
                for x in heard
                if min(x["end"] - offset, end) - max(x["start"] - offset, start) > 0.1
            ]
            lost += not hits
            if not hits:
                print(f"lost: camera{number}, {start:.2f} to {end:.2f} s")
            if speed > 1 and hits and abs(hits[-1]["end"] - offset - end) < 0.5:
                # The monitor's time line slips a little all the time; not so in real time, where a
                # segment that was cut elsewhere would shift all behind it.
                offset = hits[-1]["end"] - end
            if hits and hits[-1]["id"] in printed:
                delays.append(printed[hits[-1]["id"]] - (result["began"] + end / speed))
        doubled += sum(b["start"] < a["end"] - 0.1 for a, b in pairwise(heard))
    return lost, doubled, delays


def first_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of text as they came first."""
    texts = [line for line in lines if "text" in line and "event" not in line]
    return [line for line in texts if not line["revision"]]


def parts(
    samples: np.ndarray, items: list[dict[str, Any]], count: int, seconds: float
) -> list[tuple[np.ndarray, str]]:
    """For each camera some turns of the recording, of about so many seconds, with their text; the
    same ones for several cameras where there are not enough.
    """
    runs = []
    for first, item in enumerate(items):
        last = first
        while last + 1 < len(items) and items[last]["end"] < item["start"] + seconds:
            last += 1
        if seconds <= items[last]["end"] - item["start"] <= 1.5 * seconds:
            runs.append((item["start"], items[last]["end"], items[first : last + 1]))
    if not runs:
        sys.exit(f"the recording has no turns of {seconds:g} s together; ask for other --seconds")
    chosen, taken = [], 0.0
    for number in range(count):
        place = max(taken, number * items[-1]["end"] / count)
        free = [run for run in runs if run[0] >= taken]
        if not free:
            free, place = runs, 0.0
        start, end, own = min(free, key=lambda run: abs(run[0] - place))
        taken = end
        audio = samples[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]
        chosen.append((audio, " ".join(item["text"] for item in own)))
    return chosen


def talk(arguments: argparse.Namespace, count: int, seconds: float) -> None:
    """Word errors of live text against those of the same audio as recordings."""
    samples = np.concatenate(list(stream_audio(arguments.video)))
    items = json.loads(Path(arguments.reference).read_text(encoding="utf-8"))
    chosen = parts(samples, items, count, seconds)
    # Each begins at another moment, as people at different places do.
    leads = [round((LEAD_S + 7.3 * n % 20) * SAMPLE_RATE) for n in range(count)]
    longest = max(len(a) + lead for (a, _), lead in zip(chosen, leads, strict=True))
    longest += 5 * SAMPLE_RATE
    tracks = [
        np.pad(audio, (lead, longest - lead - len(audio)))
        for (audio, _), lead in zip(chosen, leads, strict=True)
    ]
    seconds = longest / SAMPLE_RATE - 1
    result = run(arguments.model, tracks, seconds, more=arguments.more)
    lost, doubled, delays = compare(arguments.model, result, tracks, seconds, 1.0)
    normalize = get_normalizer(default_normalizer("en"))
    first, final, recorded, counted = 0, 0, 0, 0

    def errors(texts: list[str], reference: str) -> int:
        found = jiwer.process_words(normalize(reference), normalize(" ".join(texts)))
        return found.substitutions + found.deletions + found.insertions

    for number, (audio, reference) in enumerate(chosen):
        texts = [x for x in result["lines"] if "text" in x and "event" not in x]
        own = [x for x in texts if x["camera"] == f"camera{number}"]
        last = {line["id"]: line for line in own}
        counted += len(normalize(reference).split())
        first += errors([line["text"] for line in own if not line["revision"]], reference)
        ordered = sorted(last.values(), key=lambda line: line["start"])
        final += errors([line["text"] for line in ordered], reference)
        with tempfile.TemporaryDirectory() as folder:
            path, output = Path(folder, "part.wav"), Path(folder, "out.jsonl")
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(SAMPLE_RATE)
                file.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
            command = [sys.executable, "-m", "mmtransfer.cli", "monitor", arguments.model]
            command += [str(path), "--quiet", "--output", str(output), *arguments.more]
            subprocess.run(command, check=True, capture_output=True)
            lines = output.read_text(encoding="utf-8").splitlines()
        recorded += errors([json.loads(line)["text"] for line in lines], reference)
    texts = first_lines(result["lines"])
    changed = [line for line in result["lines"] if line.get("revision")]
    print(f"{count} cameras, {seconds:.0f} s each, {counted} words")
    print(f"lines {len(texts)}, lost {lost}, doubled {doubled}")
    p50, p95, most = np.quantile(delays, [0.5, 0.95, 1.0])
    print(f"end of speech to first text: p50 {p50:.2f} s, p95 {p95:.2f} s, most {most:.2f} s")
    print(
        f"WER of first text {first / counted:.4f}, of final text {final / counted:.4f}, "
        f"as recordings {recorded / counted:.4f}"
    )
    if changed:
        p50, p95, most = np.quantile([line["delay_s"] for line in changed], [0.5, 0.95, 1.0])
        print(
            f"lines revised {len({(x['camera'], x['id']) for x in changed}) / len(texts):.3f}; "
            f"end of turn to final text: p50 {p50:.2f} s, p95 {p95:.2f} s, most {most:.2f} s"
        )
    print(result["summary"])


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("what", choices=("delay", "cameras", "memory", "talk"))
    parser.add_argument("--video", required=True)
    parser.add_argument("--reference", help="for `talk`: JSON list of start, end, text")
    parser.add_argument("--count", type=int, help="cameras; 4, for `cameras` 16")
    parser.add_argument("--speech", type=float, default=0.35, help="share, for `cameras`")
    parser.add_argument("--seconds", type=float, help="of audio; 180, for `memory` 7200")
    parser.add_argument("--speed", type=float, default=6.0, help="for `memory`")
    parser.add_argument("--more", nargs="*", default=[], help="options of the monitor")
    arguments = parser.parse_args()
    count = arguments.count or (16 if arguments.what == "cameras" else 4)
    seconds = arguments.seconds or (7200.0 if arguments.what == "memory" else 180.0)
    speed = arguments.speed if arguments.what == "memory" else 1.0

    if arguments.what == "talk":
        talk(arguments, count, seconds)
        return
    samples = np.concatenate(list(stream_audio(arguments.video)))
    if arguments.what != "delay":
        samples = with_share_of_speech(samples, arguments.speech)
    lead = np.zeros(int(LEAD_S * SAMPLE_RATE), np.float32)
    tracks = [
        np.concatenate([lead, np.roll(samples, -n * len(samples) // count)]) for n in range(count)
    ]
    result = run(arguments.model, tracks, seconds, speed=speed, more=arguments.more)
    lost, doubled, delays = compare(arguments.model, result, tracks, seconds, speed)
    texts = first_lines(result["lines"])
    print(f"{count} cameras, {seconds:g} s of audio each, {speed:g} times real time")
    print(f"segments with text {len(texts)}, lost {lost}, doubled {doubled}")
    if arguments.what == "memory":
        ten = max(mib for at, mib in result["memory"] if at * speed <= 600)
        end = result["memory"][-1][1]
        print(f"peak after 10 minutes {ten:.0f} MiB, at the end {end:.0f} MiB: {end / ten:.3f}")
    else:
        p50, p95, most = np.quantile(delays, [0.5, 0.95, 1.0])
        print(f"end of speech to text: p50 {p50:.2f} s, p95 {p95:.2f} s, most {most:.2f} s")
    print(result["summary"])


if __name__ == "__main__":
    main()
