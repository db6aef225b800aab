r"""A server measured by its clients: throughput, delays of live text, overload.

    python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 rest --count 16
    python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 streams --count 16
    python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 beside --count 8
    python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 overload --count 200
    python benchmarks/serve.py bundled:whisper-tiny.en --video desk_10min.mp4 kill --count 8

The server is `mmtransfer serve` in a process of its own on this machine; the clients are threads
here. `--url` measures another one that is open already and speaks OpenAI's transcriptions, in the
process `--pid`.

- rest: clients that each upload one minute (`--clip`) of the recording after the other; audio
  seconds a second, and a second of the server's CPU time, seconds of a request, and with
  `--reference` word errors.
- streams: clients that send audio as fast as it was spoken; from the moment when the last sample of
  a line's speech was sent until its final text came, and lines that never came.
- beside: four cameras in the server, beside clients as in `rest`; from the moment when the last
  sample of a segment's speech was sent until its line came to somebody who has the page open, and
  segments that never came.
- overload: clients that all upload at once, without pause, and then leave; answers by status,
  memory, and how long it takes from there until another client has its text.
- kill: four recordings as cameras beside uploading clients; SIGKILL when some lines are written,
  and a new start on the same journal. What is in journal and index is compared with what `monitor`
  makes of the recordings.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import jiwer
import live  # type: ignore[import-not-found]
import numpy as np
from websockets.sync.client import connect

from mmtransfer.speech.audio import SAMPLE_RATE, stream_audio
from mmtransfer.speech.scores import default_normalizer, get_normalizer
from mmtransfer.speech.segments import Segmenter

CLIP_S = 60.0
CAMERAS = 4
CHUNK_S = 0.1
TOGETHER_S = 0.05


def wav(samples: np.ndarray) -> bytes:
    """Samples as a file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes(pcm(samples))
    return file.getvalue()


def pcm(samples: np.ndarray) -> bytes:
    """Samples as 16-bit integers."""
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


class Served:
    """`mmtransfer serve` while the block lasts."""

    def __init__(self, model: str, more: list[str]):
        command = [sys.executable, "-m", "mmtransfer.cli", "serve", "--model", f"site={model}"]
        self._command = [*command, "--port", "0", *more]
        self.url = ""

    def __enter__(self) -> Served:
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("serving at "):
                self.url = line.split()[-1]
                break
        else:
            sys.exit("the server did not start")
        errors = self.process.stderr
        threading.Thread(target=lambda: sys.stderr.writelines(errors), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    @property
    def memory_mib(self) -> float:
        """What it holds now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0


def cpu_s(pid: int) -> float:
    """The CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Clients:
    """Clients that upload without pause; what they were answered, and when. At the end they wait
    for their last answer, or leave without it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        clips: list[bytes],
        count: int,
        seconds: float,
        *,
        leaving: bool = False,
    ):
        self.leaving = leaving
        self.answers: list[tuple[int, float]] = []
        self.texts: dict[int, str] = {}
        self.failures: list[str] = []
        self._url, self._model, self._clips = url, model, clips
        self._until = time.monotonic() + seconds
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(count)
        ]
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()

    def join(self) -> float:
        """Wait for all; returns the seconds that it took."""
        for thread in self._threads:
            thread.join()
        return time.monotonic() - self._started

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=600) as client:
            while time.monotonic() < self._until:
                at = number % len(self._clips)
                form = {"file": ("clip.wav", self._clips[at])}
                started = time.monotonic()
                patience = self._until - started if self.leaving else 600.0
                try:
                    answer = client.post(
                        "/v1/audio/transcriptions",
                        data={"model": self._model},
                        files=form,
                        timeout=max(0.1, patience),
                    )
                except httpx.TransportError as error:
                    if time.monotonic() < self._until:
                        self.failures.append(type(error).__name__)
                    continue
                self.answers.append((answer.status_code, time.monotonic() - started))
                if answer.status_code == 200:
                    self.texts[at] = answer.json()["text"]
                elif answer.status_code == 503:
                    time.sleep(min(1.0, float(answer.headers.get("retry-after", 1))))
                number += 1

    def stop(self) -> None:
        """Let them end soon."""
        self._until = 0.0

    def print(self, wall_s: float, clip_s: float = CLIP_S) -> None:
        """How many, how fast; recordings have that length."""
        seconds = [took for status, took in self.answers if status == 200]
        print("answers:", dict(Counter(status for status, _ in self.answers)))
        if self.failures:
            print("connections that broke:", dict(Counter(self.failures)))
        if seconds:
            p50, p95 = np.quantile(seconds, [0.5, 0.95])
            rate = clip_s * len(seconds) / wall_s
            print(f"{rate:.1f} s of audio a second; request p50 {p50:.2f} s, p95 {p95:.2f} s")


def rest(url: str, pid: int, arguments: argparse.Namespace, samples: np.ndarray) -> None:
    """Throughput of whole recordings."""
    clip_s = arguments.clip
    step = round(clip_s * SAMPLE_RATE)
    clips = [wav(samples[at : at + step]) for at in range(0, len(samples) - step + 1, step)]
    name = arguments.name or "site"
    Clients(url, name, clips[:1], 1, 0.1).join()  # loaded now
    before = cpu_s(pid)
    clients = Clients(url, name, clips, arguments.count, arguments.seconds)
    clients.print(clients.join(), clip_s)
    audio_s = clip_s * sum(status == 200 for status, _ in clients.answers)
    print(f"{audio_s / (cpu_s(pid) - before):.1f} s of audio a second of CPU time")
    if arguments.reference:
        normalize = get_normalizer(default_normalizer("en"))
        items = json.loads(Path(arguments.reference).read_text(encoding="utf-8"))
        errors = words = 0
        for at, text in clients.texts.items():
            own = [
                x for x in items if at * clip_s <= (x["start"] + x["end"]) / 2 < (at + 1) * clip_s
            ]
            reference = normalize(" ".join(item["text"] for item in own))
            found = jiwer.process_words(reference, normalize(text))
            errors += found.substitutions + found.deletions + found.insertions
            words += len(reference.split())
        print(f"WER {errors / words:.4f} of {words} words")


def streams(url: str, pid: int, arguments: argparse.Namespace, samples: np.ndarray) -> None:
    """Delays of live text."""
    track = live.with_share_of_speech(samples, arguments.speech)
    size, piece = round(arguments.seconds * SAMPLE_RATE), round(CHUNK_S * SAMPLE_RATE)
    address = url.replace("http", "ws", 1) + "/v1/listen?model=site&interim_results=true"
    address += f"&encoding=linear16&sample_rate={SAMPLE_RATE}"
    delays: list[float] = []
    lost: list[int] = []

    def talk(number: int) -> None:
        lead = round((live.LEAD_S + 7.3 * number % 20) * SAMPLE_RATE)
        at = number * len(track) // arguments.count
        own = np.concatenate([np.zeros(lead, np.float32), np.resize(np.roll(track, -at), size)])
        finals: list[tuple[float, float, float]] = []
        with connect(address, max_size=None) as socket:
            began = time.monotonic()

            def send() -> None:
                for start in range(0, len(own), piece):
                    pause = began + (start + piece) / SAMPLE_RATE - time.monotonic()
                    time.sleep(max(0.0, pause))
                    socket.send(pcm(own[start : start + piece]))
                socket.send('{"type": "CloseStream"}')

            sender = threading.Thread(target=send)
            sender.start()
            for message in socket:
                found = json.loads(message)
                if found["type"] == "Results" and found["is_final"]:
                    end = found["start"] + found["duration"]
                    finals.append((found["start"], end, time.monotonic() - began - end))
            sender.join()
        segmenter = Segmenter()
        spans = [*segmenter.feed(own), *segmenter.finish()]
        lost.append(
            sum(not any(a < s.end and s.start < b for a, b, _ in finals) for s in spans[:-1])
        )
        # The lines of a segment come together; somebody waits from the end of the last.
        arrived = [end + delay for _, end, delay in finals] + [math.inf]
        delays.extend(
            delay
            for (_, end, delay), at, after in zip(finals, arrived, arrived[1:], strict=False)
            if after - at > TOGETHER_S and end < len(own) / SAMPLE_RATE - 1
        )

    before = cpu_s(pid)
    threads = [threading.Thread(target=talk, args=(n,)) for n in range(arguments.count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p95, most = np.quantile(delays, [0.5, 0.95, 1.0])
    print(f"{arguments.count} streams, {len(delays)} final lines, {sum(lost)} segments without")
    print(f"end of speech to final text: p50 {p50:.2f} s, p95 {p95:.2f} s, most {most:.2f} s")
    print(f"CPU time {(cpu_s(pid) - before) / arguments.seconds:.2f} s a second")


def follow(url: str) -> dict[tuple[str, str], float]:
    """When each line comes first to somebody who has the page open, by camera and id; it is filled
    as long as the server runs.
    """
    came: dict[tuple[str, str], float] = {}

    def take() -> None:
        with (
            suppress(httpx.TransportError),
            httpx.stream("GET", f"{url}/api/live", timeout=None) as events,
        ):
            for event in events.iter_lines():
                found = json.loads(event.removeprefix("data: ") or "{}")
                if found.get("type") == "line":
                    came.setdefault((found["camera"], found["id"]), time.time())

    threading.Thread(target=take, daemon=True).start()
    return came


def beside(arguments: argparse.Namespace, samples: np.ndarray) -> None:
    """Delays of cameras while clients upload."""
    track = live.with_share_of_speech(samples, arguments.speech)
    tracks = [
        np.pad(np.roll(track, -n * len(track) // CAMERAS), (round(live.LEAD_S * SAMPLE_RATE), 0))
        for n in range(CAMERAS)
    ]
    context = multiprocessing.get_context("spawn")
    ports, began = context.Queue(), context.Value("d", 0.0)
    sent = (tracks, ports, began, arguments.seconds, 1.0)
    simulation = context.Process(target=live.serve, args=sent)
    simulation.start()
    step = round(CLIP_S * SAMPLE_RATE)
    clips = [wav(samples[at : at + step]) for at in range(0, len(samples) - step + 1, step)]
    with tempfile.TemporaryDirectory() as folder:
        listed = [
            {"name": f"camera{n}", "url": f"tcp://127.0.0.1:{port}"}
            for n, port in enumerate(ports.get(timeout=60))
        ]
        cameras, journal = Path(folder, "cameras.yaml"), Path(folder, "journal")
        cameras.write_text(json.dumps({"model": arguments.model, "cameras": listed}))
        more = ["--cameras", str(cameras), "--journal", str(journal), *arguments.more]
        with Served(arguments.model, more) as server:
            came = follow(server.url)
            clients = Clients(server.url, "site", clips, arguments.count, arguments.seconds)
            wall_s = clients.join()
            time.sleep(max(3.0, began.value + arguments.seconds + 3 - time.time()))
        simulation.terminate()
        lines = [
            json.loads(line)
            for path in sorted(journal.glob("*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
    texts = live.first_lines(lines)
    printed = [came.get((line["camera"], line["id"]), math.inf) for line in texts]
    result = {"lines": lines, "printed": printed, "began": began.value}
    found = live.compare(arguments.model, result, tracks, arguments.seconds, 1.0)
    lost, doubled, delays = found
    p50, p95, most = np.quantile(delays, [0.5, 0.95, 1.0])
    print(f"{CAMERAS} cameras, {len(delays)} lines, {lost} segments lost, {doubled} doubled")
    print(f"end of speech to text: p50 {p50:.2f} s, p95 {p95:.2f} s, most {most:.2f} s")
    clients.print(wall_s)


def overload(arguments: argparse.Namespace, samples: np.ndarray) -> None:
    """Far more clients than there is room for."""
    clip = wav(samples[: round(CLIP_S * SAMPLE_RATE)])
    with Served(arguments.model, arguments.more) as server:
        before = Clients(server.url, "site", [clip], 8, 1.0)
        before.join()
        memory = [server.memory_mib]
        clients = Clients(
            server.url, "site", [clip], arguments.count, arguments.seconds, leaving=True
        )
        watching = threading.Event()

        def watch() -> None:
            while not watching.wait(1.0):
                memory.append(server.memory_mib)

        watcher = threading.Thread(target=watch)
        watcher.start()
        clients.print(clients.join())
        left = time.monotonic()
        watching.set()
        watcher.join()
        while True:
            after = Clients(server.url, "site", [clip], 1, 0.1)
            after.join()
            if after.answers[-1][0] == 200:
                break
        print(f"from there until another client has its text: {time.monotonic() - left:.2f} s")
        texts = {*before.texts.values(), *clients.texts.values(), *after.texts.values()}
        print(f"different texts of the same recording: {len(texts)}")
        quarter, late = len(memory) // 4, memory[len(memory) // 2 :]
        print(
            f"memory {memory[0]:.0f} MiB before, at most {max(memory[1:]):.0f} MiB; "
            f"{memory[quarter]:.0f} MiB after a quarter of the time, {np.mean(late):.0f} MiB on "
            f"average in its second half, {memory[-1]:.0f} MiB at its end"
        )


def kill(arguments: argparse.Namespace, samples: np.ndarray) -> None:
    """A server that is killed in the middle of its work, and started again."""
    step, minute = len(samples) // CAMERAS, round(CLIP_S * SAMPLE_RATE)
    clips = [wav(samples[at : at + minute]) for at in range(0, len(samples) - minute + 1, minute)]
    uploads = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory() as folder:
        listed = []
        for n in range(CAMERAS):
            path = Path(folder, f"camera{n}.wav")
            path.write_bytes(wav(samples[n * step : n * step + round(arguments.seconds * 16_000)]))
            listed.append({"name": f"camera{n}", "url": str(path)})
        cameras, journal = Path(folder, "cameras.yaml"), Path(folder, "journal")
        cameras.write_text(json.dumps({"model": arguments.model, "words": True, "cameras": listed}))
        expected = Path(folder, "expected")
        command = [sys.executable, "-m", "mmtransfer.cli", "monitor", arguments.model]
        command += ["--cameras", str(cameras), "--journal", str(expected), "--quiet"]
        subprocess.run(command, check=True, capture_output=True)
        wanted = Counter(places(expected))
        more = ["--cameras", str(cameras), "--journal", str(journal), *arguments.more]
        with Served(arguments.model, more) as server:
            load = Clients(server.url, "site", clips, arguments.count, 3600, leaving=True)
            while len(places(journal)) < len(wanted) // 3:
                time.sleep(0.05)
            server.kill()
            load.stop()
            load.join()
        written = len(places(journal))
        with Served(arguments.model, more) as server:
            load = Clients(server.url, "site", clips, arguments.count, 3600, leaving=True)
            while not set(wanted) <= set(places(journal)):
                time.sleep(0.5)
            load.stop()
            load.join()
            time.sleep(2)  # the index looks twice a second
            indexed: list[str] = []
            cursor = None
            while True:
                query = {"limit": 200} | ({"cursor": cursor} if cursor else {})
                page = httpx.get(f"{server.url}/api/search", params=query).json()
                indexed += [f"{hit['camera']} {hit['id']}" for hit in page["hits"]]
                cursor = page["cursor"]
                if cursor is None:
                    break
            left = len(list(uploads.glob("mmtransfer-uploads-*")))
        found = Counter(places(journal))
    print(f"{written} of {len(wanted)} lines were written before the kill")
    print(
        f"afterwards: {len(set(wanted) - set(found))} lost, {len(set(found) - set(wanted))} new, "
        f"{sum(found.values()) - len(found)} twice"
    )
    print(
        f"index: {len(set(wanted) - set(indexed))} lost, {len(indexed) - len(set(indexed))} twice; "
        f"folders of uploads: {left}"
    )


def places(journal: Path) -> list[str]:
    """Camera and id of each line of text in a journal."""
    found = []
    for path in sorted(journal.glob("*.jsonl")):
        for raw in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(raw)
            except ValueError:  # it is being written
                continue
            if "text" in line and "event" not in line:
                found.append(f"{line['camera']} {line['id']}")
    return found


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("what", choices=("rest", "streams", "beside", "overload", "kill"))
    parser.add_argument("--video", required=True)
    parser.add_argument("--reference", help="for `rest`: JSON list of start, end, text")
    parser.add_argument("--count", type=int, default=16, help="clients")
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long")
    parser.add_argument("--clip", type=float, default=CLIP_S, help="seconds, for `rest`")
    parser.add_argument("--speech", type=float, default=0.35, help="share, of what is live")
    parser.add_argument("--url", help="of another server, for `rest`")
    parser.add_argument("--pid", type=int, help="its process")
    parser.add_argument("--name", help="what that calls the model")
    parser.add_argument("--more", nargs="*", default=[], help="options of the server")
    arguments = parser.parse_args()
    samples = np.concatenate(list(stream_audio(arguments.video)))
    alone = {"beside": beside, "overload": overload, "kill": kill}
    if arguments.what in alone:
        alone[arguments.what](arguments, samples)
    elif arguments.url:
        rest(arguments.url, arguments.pid, arguments, samples)
    else:
        measure = {"rest": rest, "streams": streams}[arguments.what]
        with Served(arguments.model, arguments.more) as server:
            measure(server.url, server.process.pid, arguments, samples)


if __name__ == "__main__":
    main()
