"""Recognition side by side with faster-whisper, and short contexts against full ones.

    python3 -m venv peer && peer/bin/pip install faster-whisper==1.2.1
    python benchmarks/recognition.py --peer-python peer/bin/python --video desk_10min.mp4 \
        --reference desk_10min.json --set ljspeech=ljspeech --set grid=grid_s1/validation \
        --noise noise --run runs/site --run-data grid_s1/validation

- long recordings (`--long AUDIO`, repeated; the reference lies beside each as .json): the same as
  speed, with the peer's default of five beams, and the words that are missing or made up. Each
  system has one run of each, the first recording twice, and the sums over all are printed.
- speed: `mmtransfer monitor` and faster-whisper on the same recording, the same weights in int8,
  the same number of threads, each as a process of its own, start-up included, in turn `--repeats`
  times; the smallest of each counts. Both have run once before, so both have what they cache.
- accuracy: every set read in full contexts by the source's own weights, and in short contexts, as
  they are and with noise at 10 dB; and the share of clips that were read again.
- hallucination: words on ten minutes of the noise and of silence.
- run: a fine-tuned run by both engines, and by `mmtransfer evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import jiwer
import numpy as np

from mmtransfer.config import DataConfig
from mmtransfer.hub.bundled import PREFIX, get_bundle, weight_files
from mmtransfer.runs import evaluate
from mmtransfer.speech.audio import SAMPLE_RATE, decode_clip, stream_audio
from mmtransfer.speech.clips import ClipSet, load_clips
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.scores import (
    default_normalizer,
    get_normalizer,
    score_clip,
    speech_metric,
    summarize_speech,
)

PEER = """
import json, sys
from faster_whisper import BatchedInferencePipeline, WhisperModel
model, video, batch, threads, language, beams = sys.argv[1:]
whisper = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=int(threads))
options = {"beam_size": int(beams), "vad_filter": True, "language": language}
if int(batch) > 1:
    pipeline = BatchedInferencePipeline(model=whisper)
    segments, _ = pipeline.transcribe(video, batch_size=int(batch), **options)
else:
    segments, _ = whisper.transcribe(video, **options)
print(json.dumps([segment.text for segment in segments]))
"""


def package_model(source: str, folder: Path) -> Path:
    """The bundle's own CTranslate2 model, its parts joined."""
    parts = weight_files(get_bundle(source))
    for path in parts[0].parent.iterdir():
        if path not in parts and path.is_file():
            (folder / path.name).symlink_to(path)
    with (folder / "model.bin").open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return folder


def timed(command: list[str], threads: int) -> tuple[float, float, str]:
    """Wall seconds, processor seconds and standard output of a process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    # An installed package is compiled, and so is this one from its second start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    used, started = processor_s(), time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{command[:4]} failed:\n{result.stderr[-2000:]}")
    return time.perf_counter() - started, processor_s() - used, result.stdout


def processor_s() -> float:
    """Processor seconds of all processes started here that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


Measured = dict[str, tuple[float, float, jiwer.WordOutput]]
"""Wall and processor seconds and errors of each system."""


def speed(
    arguments: argparse.Namespace,
    audio: str,
    items: Path,
    *,
    beams: int,
    repeats: int,
    with_full: bool = False,
) -> Measured:
    """Wall time and errors on one recording; without `repeats` the only run counts."""
    reference = " ".join(i["text"] for i in json.loads(items.read_text()))
    normalize = get_normalizer(default_normalizer(arguments.language))
    threads, language = str(arguments.threads), arguments.language or "en"
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "out.jsonl")
        model = str(package_model(arguments.model, Path(temporary)))
        ours = [sys.executable, "-m", "mmtransfer.cli", "monitor", arguments.model]
        ours += [audio, "--quiet", "--output", str(output), "--threads", threads]
        if arguments.language:
            ours += ["--language", arguments.language]
        peer = [arguments.peer_python, "-c", PEER, model, audio]
        own = [threads, language, str(beams)]
        commands = {
            "mmtransfer": ours,
            **({"mmtransfer --context full": [*ours, "--context", "full"]} if with_full else {}),
            f"faster-whisper, sequential, beam {beams}": [*peer, "1", *own],
            f"faster-whisper, batch 8, beam {beams}": [*peer, "8", *own],
        }
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        found: dict[str, jiwer.WordOutput] = {}
        for repeat in range(repeats + 1):
            for name, command in commands.items():
                *spent, printed = timed(command, arguments.threads)
                if repeat or not repeats:  # the first fills the caches
                    seconds[name].append((spent[0], spent[1]))
                if name.startswith("mmtransfer"):
                    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
                else:
                    texts = json.loads(printed)
                found[name] = jiwer.process_words(normalize(reference), normalize(" ".join(texts)))
    measured = {name: (*min(seconds[name]), found[name]) for name in commands}
    show(Path(audio).name, [measured])
    return measured


def show(title: str, recordings: list[Measured]) -> None:
    """The table of one recording, or of several together."""
    print(
        f"\n{title}\n\n| what | wall s | mmtransfer's share | CPU s | share | WER | deletions "
        "| insertions |\n|---|---|---|---|---|---|---|---|"
    )
    own, own_used = (sum(each["mmtransfer"][of] for each in recordings) for of in (0, 1))
    for name in recordings[0]:
        wall, used = (sum(each[name][of] for each in recordings) for of in (0, 1))
        errors = [each[name][2] for each in recordings]
        deleted = sum(each.deletions for each in errors)
        inserted = sum(each.insertions for each in errors)
        wrong = deleted + inserted + sum(each.substitutions for each in errors)
        words = wrong - inserted + sum(each.hits for each in errors)
        print(
            f"| {name} | {wall:.2f} | {own / wall:.3f} | {used:.2f} | {own_used / used:.3f} "
            f"| {wrong / words:.4f} | {deleted} | {inserted} |",
            flush=True,
        )


def noisy(clip: np.ndarray, noise: np.ndarray, seed: int, snr_db: float = 10.0) -> np.ndarray:
    """A clip with noise from a place that depends on the seed."""
    start = int(np.random.default_rng(seed).integers(len(noise)))
    piece = np.resize(np.roll(noise, -start), len(clip))
    level = np.sqrt(np.mean(clip**2) / (np.mean(piece**2) + 1e-12)) * 10 ** (-snr_db / 20)
    return (clip + level * piece).astype(np.float32)


def noise_track(folder: Path, seconds: float) -> np.ndarray:
    """The recordings of a folder, one after the other, that long."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".ogg", ".wav", ".flac"))
    return np.resize(np.concatenate([decode_clip(p) for p in paths]), int(seconds * SAMPLE_RATE))


def rate(clips: ClipSet, texts: list[str], language: str | None) -> float:
    """WER, or CER where words are not separated."""
    name = default_normalizer(language)
    pairs = zip(clips.clips, texts, strict=True)
    records = [score_clip(clip.text, text, get_normalizer(name)) for clip, text in pairs]
    metric = speech_metric(language)
    score = summarize_speech(records, normalizer=name, metric=metric, bootstrap_samples=100)
    return float(getattr(score, metric))


def accuracy(arguments: argparse.Namespace) -> None:
    """Short contexts against full ones on every set."""
    options: dict[str, Any] = {"threads": arguments.threads, "engine": arguments.engine}
    options["language"] = arguments.language
    short = open_recognizer(arguments.model, **options)
    full = open_recognizer(arguments.model, context_s=float("inf"), **options)
    noise = noise_track(arguments.noise, 120) if arguments.noise else None
    language = arguments.language
    print(
        f"\n{arguments.model}: contexts from {short.engine.shortest_context_s:g} s, margin "
        f"{short.engine.margin_s:g} s\n\n"
        f"| set | clips | full {speech_metric(language).upper()} | short | difference | read again "
        "| s full | s short |\n|---|---|---|---|---|---|---|---|"
    )
    for given in arguments.set:
        name, _, path = given.partition("=")
        clips = load_clips(path, DataConfig(), name=name)
        waves = [clip.samples() for clip in clips.clips]
        versions = {name: waves}
        if noise is not None:
            versions[f"{name}, 10 dB"] = [noisy(w, noise, i) for i, w in enumerate(waves)]
        for label, heard in versions.items():
            found, seconds = [], []
            for recognizer in (full, short):
                started = time.perf_counter()
                found.append(recognizer.transcribe(heard, guarded=True))
                seconds.append(time.perf_counter() - started)
            one, other = (rate(clips, [h.text for h in hs], language) for hs in found)
            own = [short.context_s(wave) for wave in heard]
            again = sum(h.context_s > c for h, c in zip(found[1], own, strict=True)) / len(own)
            print(
                f"| {label} | {len(clips)} | {one:.4f} | {other:.4f} | {other - one:+.4f} | "
                f"{again:.1%} | {seconds[0]:.1f} | {seconds[1]:.1f} |",
                flush=True,
            )


def hallucination(arguments: argparse.Namespace) -> None:
    """Words on ten minutes in which nobody speaks: nine of noise, one of silence."""
    track = np.concatenate([noise_track(arguments.noise, 540), np.zeros(60 * SAMPLE_RATE)])
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "noise.wav"), Path(folder, "out.jsonl")
        with av.open(str(path), "w") as out:
            stream = out.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
            samples = (np.clip(track, -1, 1) * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.rate = SAMPLE_RATE
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        length = sum(len(block) for block in stream_audio(path)) / SAMPLE_RATE
        command = [sys.executable, "-m", "mmtransfer.cli", "monitor", arguments.model, str(path)]
        command += ["--quiet", "--output", str(output)]
        if arguments.language:
            command += ["--language", arguments.language]
        timed(command, arguments.threads)
        texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    words = sum(len(text.split()) for text in texts)
    print(f"\nwords on {length:.0f} s of noise and silence: {words} {texts}")


def fine_tuned(arguments: argparse.Namespace) -> None:
    """A run by both engines and by `evaluate`."""
    reference = evaluate(arguments.run, arguments.run_data)["wer"]
    clips = load_clips(arguments.run_data, DataConfig(), name="run")
    waves = [clip.samples() for clip in clips.clips]
    print(f"\n{arguments.run}: WER by evaluate {reference:.4f}", end="")
    for engine in ("transformers", "ctranslate2"):
        recognizer = open_recognizer(arguments.run, engine=engine, threads=arguments.threads)
        texts = [h.text for h in recognizer.transcribe(waves, guarded=True)]
        print(f", {engine} {rate(clips, texts, None):.4f}", end="")
    print()


def main() -> None:
    """Measure what the arguments give the material for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=f"{PREFIX}whisper-tiny.en")
    parser.add_argument("--language", help="ISO code, for multilingual models")
    parser.add_argument("--engine", default="auto", help="for accuracy")
    parser.add_argument("--peer-python", help="Python of an environment with faster-whisper")
    parser.add_argument("--video")
    parser.add_argument("--reference", type=Path, help='list of {"start", "end", "text"}')
    parser.add_argument(
        "--long", action="append", default=[], metavar="AUDIO", help="with AUDIO's .json beside it"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--noise", type=Path, help="folder of noise recordings")
    parser.add_argument("--run", help="a fine-tuned run folder")
    parser.add_argument("--run-data", help="clips for it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if arguments.video and arguments.peer_python:
        given = (arguments.video, arguments.reference)
        speed(arguments, *given, beams=1, repeats=arguments.repeats, with_full=True)
    if arguments.long and arguments.peer_python:
        pairs = [(audio, Path(audio).with_suffix(".json")) for audio in arguments.long]
        runs = [speed(arguments, *p, beams=5, repeats=p == pairs[0]) for p in pairs]
        show("all of them", runs)
    if arguments.set:
        accuracy(arguments)
    if arguments.noise:
        hallucination(arguments)
    if arguments.run:
        fine_tuned(arguments)


if __name__ == "__main__":
    main()
