"""Make the speech from which the adapters in ``mmtransfer/speech/short_context`` learn.

Segments of 1 to 15 s as a monitor cuts them: one to three utterances with short gaps, many voices,
rooms, loudness, telephone band; a few of noise alone.  They are quiet, so that the source reads
them well; the noises that the adapter hears them in are written to a folder of their own.  The
audio is synthesised here or, if named, cut from a corpus with a licence that allows it (GRID, CC BY
4.0).  Texts are the usage examples of WordNet 3.0 (its licence permits any use), numbers and times,
and from templates announcements and Mandarin sentences.

Install and fetch (see ``make_site.py`` for the model's archives)::

    pip install kokoro-onnx av numpy scipy 'misaki[zh]'
    apt-get install espeak-ng flite wordnet-base

Run::

    python examples/make_speech.py --shards shards/package --voices kokoro-js/package/voices \
        --work tts-work --clips grid_s1/train --out speech --noise noise --language en
    python examples/make_speech.py ... --out speech-zh --language zh

With ``--single`` the clips are single utterances with transcripts: general speech to rehearse while
a model learns a narrow domain, or with ``--held-out`` to judge one.  ``--talks 80`` adds windows of
10 to 28 s in which one or two people talk, with pauses, hesitations and false starts that the
transcript leaves out, and sends all clips through rooms, telephones and noise.  The set in
``mmtransfer/rehearsal/en`` is that::

    python examples/make_speech.py ... --single --neural 300 --other 60 --talks 80 \
        --bit-rate 20000 --out mmtransfer/rehearsal/en
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnxruntime
from kokoro_onnx import Kokoro
from make_site import (
    RATE,
    ambience,
    coloured_noise,
    join_shards,
    narrow_band,
    reverberate,
    unit,
    write_audio,
)
from numpy.typing import NDArray
from scipy.signal import resample_poly

Audio = NDArray[np.float32]

SEED = 555
LONGEST_S = 15
NOISES = 240
NOISE_LEVEL = 0.02  # RMS; the rest is for the peaks of knocks
HELD_OUT_VOICES = {"bm_daniel", "af_sarah", "am_liam", "bf_lily", "zf_xiaoyi", "zm_yunyang"}
"""Never heard in training, so that a model can be judged on them."""
FORMANT_VOICES = [
    f"en{accent}+{kind}"
    for accent in ("-us", "-gb", "-gb-scotland")
    for kind in ("m1", "m3", "m7", "f1", "f3", "f5")
]
DIPHONE_VOICES = ["awb", "rms", "slt", "kal16"]
ZH_WHO = [
    "值班经理",
    "王老师",
    "隔壁的邻居",
    "送货的司机",
    "新来的同事",
    "张医生",
    "楼下的保安",
    "我妹妹",
]
ZH_WHEN = [
    "今天早上",
    "昨天下午三点",
    "上个星期五",
    "明天晚上八点半",
    "去年冬天",
    "刚才",
    "每个月十五号",
]
ZH_WHERE = [
    "火车站",
    "三号楼门口",
    "超市",
    "市中心的医院",
    "地下停车场",
    "学校图书馆",
    "机场航站楼",
]
ZH_WHAT = [
    "看见一辆红色的汽车",
    "买了两公斤苹果",
    "等了四十分钟",
    "丢了一把钥匙",
    "打了个电话",
    "修好了那台电梯",
    "开了一个会",
    "问路",
    "取走了包裹",
    "拍了几张照片",
    "发现水管漏水了",
    "换了一张新的门卡",
]
ZH_FREE = [
    "请把窗户关上,外面风太大了。",
    "一共是三百二十五块六毛。",
    "你能再说一遍吗?",
    "我觉得这个办法不错。",
    "他的手机号码是一三八零零一二三四五六。",
    "天气预报说明天有雨,记得带伞。",
    "这件事情我们以后再商量。",
    "公司今年的收入增长了百分之十二。",
    "前面路口左转,然后一直走。",
    "报告已经发到你的邮箱里了。",
]


def english_sentences(rng: np.random.Generator) -> list[str]:
    """WordNet's usage examples of four words and more, and spoken numbers."""
    found = set()
    for part in ("noun", "verb", "adj", "adv"):
        text = Path(f"/usr/share/wordnet/data.{part}").read_text(encoding="latin-1")
        found |= set(re.findall(r'; "([A-Za-z][A-Za-z ,\'-]{16,110}[a-z])(?=[;"])', text))
    sentences = sorted(found)
    units = ["unit", "flight", "room", "platform", "order", "camera", "gate", "extension"]
    for _ in range(len(sentences) // 12):
        number, hour, minute = rng.integers(2, 2000), rng.integers(1, 13), rng.integers(10, 60)
        sentences.append(f"{rng.choice(units)} {number} at {hour} {minute}")
    order = rng.permutation(len(sentences))
    return [sentences[i][0].upper() + sentences[i][1:] + "." for i in order]


ANNOUNCEMENTS = (
    "{please} press {key} to {do}.",
    "{please} press {key} {once}, then {key} again.",
    "To {do}, {please} enter the {number} digit code followed by {key}.",
    "The {thing} at {place} is {state}.",
    "{please} wait {place} until the {thing} is {state}.",
    "{attention}, the {thing} to {town} has been {state} at {place}.",
    "{attention}, {who} {number}, {please} come to {place}.",
    "{number} {things} have arrived at {place}, and {number} had to be returned.",
    "You have {number} {things} and no {things}.",
    "{attention}, the doors at {place} will close in {number} minutes.",
    "If the {thing} is {state}, {please} hold the {key} key until you hear a tone.",
    "Your call is now being passed on to {who} {number}, {please} hold.",
)
"""What loudspeakers, lifts, intercoms and telephones say where cameras hang."""
ANNOUNCED = {
    "please": ["please", "kindly", "you may", "you must", "now"],
    "key": ["star", "pound", "hash", "zero", "one", "four", "seven", "nine", "the green button"],
    "do": [
        "call the porter",
        "open the barrier",
        "repeat the last part",
        "be called back",
        "report a fault",
        "change the greeting",
        "delete what was recorded",
        "hear the opening hours",
        "add another caller",
    ],
    "once": ["once", "twice", "after the beep", "after the tone", "within ten seconds"],
    "thing": ["lift", "train", "parcel", "alarm", "queue", "ticket machine", "line", "conference"],
    "things": ["visitors", "parcels", "callers", "new messages", "pallets", "keys", "seats"],
    "place": [
        "platform {number}",
        "gate {number}",
        "floor {number}",
        "the loading bay",
        "the front desk",
        "the north exit",
    ],
    "state": ["out of order", "delayed", "unlocked", "full", "cancelled", "ready", "busy"],
    "attention": ["Attention please", "Ladies and gentlemen", "Security", "Dear customers"],
    "town": ["Oxford", "Lincoln", "Portland", "Bristol", "Denver", "Cardiff"],
    "who": ["operator", "extension", "the driver of lorry", "agent", "the guard on post"],
}

SPOKEN = (
    "Well, I {did} {where} {when}, and I really liked it.",
    "And then we {did}, because nobody else was there.",
    "I was {age} when we moved {where}.",
    "You know, back then everybody {did}.",
    "My {who} used to say that, every time we {did}.",
    "No, I don't think so.",
    "Yeah, that's right, it was {when}.",
    "So how long were you {where}?",
    "It took us, I don't know, maybe {number} days.",
    "I never really thought about it until {when}.",
    "There were about {number} of us, and we all {did}.",
    "Oh, I see, and what did your {who} do?",
    "He was a good man, but he never {did}.",
    "I remember my {who} {where}, just sitting there.",
    "And she said, you can't do that, so we {did}.",
    "That's what I mean, it wasn't easy.",
    "We didn't have any money, so my {who} {did}.",
    "Did you ever go back {where}?",
    "I guess it was {when} when it all started.",
    "Sort of, yes, but it's different now.",
    "I came home {when} and told my {who} about it.",
    "Everybody knew everybody {where}.",
    "Let me think, that must have been {when}.",
    "Okay, so what happened after that?",
    "I worked {where} for {number} years, and then I retired.",
    "It's hard to explain if you weren't there.",
    "And that was it, we {did} and never talked about it again.",
    "They had this big old house {where}, and we {did}.",
    "I was so tired that I just {did}.",
    "To be honest with you, I wish we hadn't.",
    "What I'm trying to say is that people {did}.",
    "You had to walk {number} miles to get {where}.",
    "My {who} and I got married {when}.",
    "So they called me up and asked if I would come {where}.",
    "It was cold, it was raining, and my {who} was late.",
    "I'd say about {number}, maybe a little more.",
    "Could you tell me a little bit about your {who}?",
    "We'd get up at {hour} in the morning, and by then it was light.",
    "Right, and then there was the time we {did}.",
    "I still have it, it's {where} in a box.",
)
"""What people say about their lives."""
SPOKEN_HELD_OUT = (
    "Anyway, my {who} lived {where} until {when}.",
    "I couldn't believe it, {number} people {did}.",
    "Were you there when they {did}?",
    "Not really, I mean, we {did} once or twice.",
    "The thing is, I was only {age}, and I didn't know any better.",
    "Some of them stayed {where}, but most of them left {when}.",
    "And I thought, well, if my {who} can do it, so can I.",
    "It's funny how you forget these things.",
)
SPOKEN_OF = {
    "did": [
        "went to school together",
        "took the bus",
        "played ball in the street",
        "sold the farm",
        "stayed up all night",
        "fixed the roof ourselves",
        "went fishing",
        "left the door open",
        "started our own business",
        "painted the kitchen",
        "sang in the choir",
        "joined the navy",
        "drove all the way to the coast",
        "waited for the phone to ring",
        "laughed about it",
    ],
    "where": [
        "in Chicago",
        "down by the river",
        "at the factory",
        "at my grandmother's place",
        "in the hospital",
        "across the street",
        "in a little town in Ohio",
        "overseas",
        "at the post office",
        "up in the mountains",
    ],
    "when": [
        "last summer",
        "in nineteen sixty two",
        "right after the war",
        "two or three weeks ago",
        "before the kids were born",
        "in the spring",
        "a long time ago",
        "when I was in high school",
        "the year after that",
    ],
    "who": [
        "father",
        "mother",
        "older brother",
        "sister",
        "wife",
        "husband",
        "neighbor",
        "boss",
        "teacher",
        "uncle",
    ],
    "hour": ["four", "five", "half past five", "six"],
    "age": ["six or seven", "about twelve", "nineteen", "twenty three", "almost thirty"],
}
HESITATIONS = ("Um,", "Uh,", "Er,")
"""What Whisper leaves out."""


def announcements(rng: np.random.Generator, count: int) -> list[str]:
    """As the sentences above, filled in."""
    return filled(rng, count, ANNOUNCEMENTS, ANNOUNCED)


def filled(
    rng: np.random.Generator, count: int, patterns: Sequence[str], words: dict[str, list[str]]
) -> list[str]:
    """Sentences of these patterns, their slots filled in."""
    made = []
    for _ in range(count):
        text = str(rng.choice(patterns))
        while found := re.search(r"{(\w+)}", text):
            name = found[1]
            word = str(rng.integers(2, 60) if name == "number" else rng.choice(words[name]))
            text = f"{text[: found.start()]}{word}{text[found.end() :]}"
        made.append(text[0].upper() + text[1:])
    return made


def mandarin_sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Who did what, when and where; and a few sentences as they stand."""
    made = [
        "".join(
            [
                *(rng.choice(part) for part in (ZH_WHEN, ZH_WHO)),
                "在",
                rng.choice(ZH_WHERE),
                rng.choice(ZH_WHAT),
                "。",
            ]
        )
        for _ in range(count)
    ]
    return [str(rng.choice(ZH_FREE)) if rng.random() < 0.2 else text for text in made]


@dataclass(frozen=True)
class Sentence:
    """What a voice has said."""

    audio: Audio
    text: str
    voice: str


@dataclass(frozen=True)
class Cue:
    """Where a sentence of a talk is, in seconds, and who says it."""

    start: float
    end: float
    text: str
    voice: str


class Voices:
    """Every synthesiser, with a cache of what it has said."""

    def __init__(self, shards: Path, voices: Path, work: Path, language: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.language = work, language
        prefixes = ("zf", "zm") if language == "zh" else ("af", "am", "bf", "bm")
        styles = {
            p.stem: np.fromfile(p, np.float32).reshape(-1, 1, 256)
            for p in sorted(voices.glob("*.bin"))
            if p.stem.startswith(prefixes)
        }
        self.neural = sorted(set(styles) - HELD_OUT_VOICES)
        packed = work / f"voices-{language}.npz"
        np.savez(packed, **styles)  # type: ignore[arg-type]
        onnxruntime.set_seed(SEED)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        model = str(join_shards(shards, work / "kokoro.onnx"))
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        self.kokoro = Kokoro.from_session(session, str(packed))
        if language == "zh":
            from misaki import zh

            self.phonemes = zh.ZHG2P()

    def say(self, text: str, voice: str, speed: float) -> Audio:
        """Dry speech at RATE with an RMS of 0.1."""
        key = hashlib.sha256(f"{text}|{voice}|{speed}".encode()).hexdigest()[:20]
        path = self.work / f"{key}.npy"
        if not path.exists():
            np.save(path, self._synthesise(text, voice, speed).astype(np.float16))
        speech = np.load(path).astype(np.float32)
        return (0.1 * speech / np.sqrt(np.mean(speech**2) + 1e-12)).astype(np.float32)

    def _synthesise(self, text: str, voice: str, speed: float) -> Audio:
        if voice in self.neural or voice in HELD_OUT_VOICES:
            spoken, options = text, dict[str, Any](lang="en-gb" if voice[0] == "b" else "en-us")
            if self.language == "zh":
                spoken, _ = self.phonemes(text)
                options = {"is_phonemes": True}
            for tempo in (1.0, 1.03, 0.97, 1.06, 0.94):  # see make_site.Speaker
                speech, _ = self.kokoro.create(spoken, voice=voice, speed=speed * tempo, **options)
                if len(speech) and np.isfinite(speech).all():
                    return resample_poly(np.asarray(speech, np.float32), 2, 3)
            raise RuntimeError(f"no finite audio for {voice}: {text}")
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            if voice in DIPHONE_VOICES:
                stretch = f"duration_stretch={1 / speed:.2f}"
                command = ["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", file.name]
            else:
                words = str(round(165 * speed))
                command = ["espeak-ng", "-v", voice, "-s", words, "-w", file.name, text]
            subprocess.run(command, check=True, capture_output=True)
            return read_audio(Path(file.name))


def read_audio(path: Path) -> Audio:
    """A recording as mono float32 at RATE."""
    with av.open(str(path)) as source:
        resampler = av.AudioResampler("flt", "mono", RATE)
        blocks = [
            out.to_ndarray().reshape(-1)
            for frame in source.decode(audio=0)
            for out in resampler.resample(frame)
        ]
        blocks += [out.to_ndarray().reshape(-1) for out in resampler.resample(None)]
    return np.concatenate(blocks)


def knocks(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Doors, steps, dropped things: decaying bursts over a quiet bed."""
    track = 0.05 * coloured_noise(rng, n, 1.0)
    for _ in range(int(rng.integers(1, 4 + n // RATE))):
        length = int(rng.uniform(0.03, 0.4) * RATE)
        burst = coloured_noise(rng, length, rng.uniform(0, 2))
        burst *= np.exp(-np.arange(length) / (length / rng.uniform(3, 8)))
        at = int(rng.integers(0, n))
        track[at : at + length] += rng.uniform(0.5, 3) * burst[: n - at]
    return unit(track)


def babble(rng: np.random.Generator, n: int, said: list[Audio]) -> NDArray[np.float64]:
    """Several people in the next room."""
    track = np.zeros(n)
    for _ in range(int(rng.integers(4, 8))):
        voice = said[rng.integers(len(said))]
        track += np.resize(np.roll(voice, -int(rng.integers(len(voice)))), n)
    return unit(narrow_band(reverberate(rng, track.astype(np.float32))[:n]))


def background(rng: np.random.Generator, n: int, said: list[Audio]) -> NDArray[np.float64]:
    """Noise of RMS 1."""
    kind = rng.choice(["ambience", "coloured", "knocks", "babble"], p=[0.4, 0.25, 0.2, 0.15])
    if kind == "ambience":
        return ambience(rng, n)
    if kind == "coloured":
        return unit(coloured_noise(rng, n, rng.uniform(0, 2)))
    return knocks(rng, n) if kind == "knocks" else babble(rng, n, said)


def segment(rng: np.random.Generator, utterances: list[Audio]) -> Audio:
    """Utterances as a monitor would cut them out of a quiet recording."""
    parts: list[NDArray[np.float64]] = []
    for speech in utterances:
        # A loudspeaker or a telephone, heard in the room.
        spoken = narrow_band(speech) if rng.random() < 0.3 else speech.astype(np.float64)
        in_room = rng.random() < 0.3
        wet = reverberate(rng, spoken.astype(np.float32)) if in_room else unit(spoken)
        gap = np.zeros(int(rng.uniform(0.1, 0.5) * RATE))
        parts += [wet * 10 ** (rng.uniform(-3, 3) / 20), gap]
    edge = [np.zeros(int(rng.uniform(0.05, most) * RATE)) for most in (0.8, 0.35)]
    track = np.concatenate([edge[0], *parts[:-1], edge[1]])
    return (track * rng.uniform(0.05, 0.9) / (np.abs(track).max() + 1e-9)).astype(np.float32)


def quietest(speech: Audio, start_s: float, end_s: float) -> int:
    """The sample in the middle of the quietest 60 ms between two times."""
    width = int(0.06 * RATE)
    part = speech[int(start_s * RATE) : int(end_s * RATE)].astype(np.float64) ** 2
    energy = np.convolve(part, np.ones(width), mode="valid")
    return int(start_s * RATE) + int(energy.argmin()) + width // 2


def talk(
    rng: np.random.Generator,
    sentences: dict[str, list[Sentence]],
    hesitations: dict[str, list[Audio]],
    seconds: float,
) -> tuple[Audio, list[Cue]]:
    """People who talk in turns for at most so long, as one does unprepared, and what they say.

    `sentences` and `hesitations` are by voice, one or more.  Between sentences there are pauses of
    0.1 to 3 s, before some a hesitation or a false start, inside some a pause; none of these is in
    the text.  At least one sentence is said, however long.
    """
    names = sorted(sentences)
    level = {name: 10 ** (rng.uniform(-4, 4) / 20) for name in names}
    decks = {name: list(rng.permutation(len(sentences[name]))) for name in names}
    parts: list[Audio] = []
    cues: list[Cue] = []
    cursor = 0
    name = str(rng.choice(names))
    while decks[name]:
        sentence = sentences[name][decks[name].pop()]
        speech = sentence.audio
        lead = [pause(rng, 0.1, 3.0, middle=0.5)]
        if rng.random() < 0.3 and hesitations[name]:
            lead += [hesitations[name][rng.integers(len(hesitations[name]))]]
            lead += [pause(rng, 0.1, 1.0, middle=0.3)]
        if rng.random() < 0.15 and len(speech) > 1.5 * RATE:
            begun = speech[: quietest(speech, 0.25, 0.9)].copy()
            fade = min(len(begun), int(0.02 * RATE))
            begun[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
            lead += [begun, pause(rng, 0.1, 0.8, middle=0.3)]
        if rng.random() < 0.25 and len(speech) > 2 * RATE:
            at = quietest(speech, 0.6, len(speech) / RATE - 0.6)
            speech = np.concatenate([speech[:at], pause(rng, 0.2, 1.5, middle=0.5), speech[at:]])
        before = sum(map(len, lead))
        if cues and cursor + before + len(speech) > seconds * RATE:
            break
        start, end = cursor + before, cursor + before + len(speech)
        parts += [part * np.float32(level[name]) for part in (*lead, speech)]
        cues.append(Cue(start / RATE, end / RATE, sentence.text, sentence.voice))
        cursor = end
        if rng.random() < 0.4:
            name = str(rng.choice(names))
    return np.concatenate([*parts, pause(rng, 0.1, 0.6, middle=0.3)]), cues


def pause(rng: np.random.Generator, least_s: float, most_s: float, *, middle: float) -> Audio:
    """Silence; most pauses are short, a few are long."""
    seconds = float(np.clip(rng.lognormal(np.log(middle), 0.8), least_s, most_s))
    return np.zeros(int(seconds * RATE), np.float32)


def disturb(rng: np.random.Generator, speech: Audio, said: list[Audio]) -> Audio:
    """Speech as microphones bring it: some of it from across a room, over a line, in noise."""
    track = speech.astype(np.float64)
    if rng.random() < 0.35:
        track = reverberate(rng, speech)[: len(speech)]
    if rng.random() < 0.5:
        noise = background(rng, len(track), said) * 10 ** (-rng.uniform(8, 35) / 20)
        spoken = np.abs(track) > 1e-4
        track = track + noise * np.sqrt(np.mean(track[spoken] ** 2))
    if rng.random() < 0.3:
        track = narrow_band(track)
    return (track * rng.uniform(0.05, 0.9) / (np.abs(track).max() + 1e-9)).astype(np.float32)


def main() -> None:
    """Synthesise, join, disturb, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True, help="*.part*.bin of the model")
    parser.add_argument("--voices", type=Path, required=True, help="folder of <voice>.bin")
    parser.add_argument("--work", type=Path, required=True, help="cache folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--language", choices=("en", "zh"), default="en")
    parser.add_argument("--clips", type=Path, help="folder of recordings to use beside the speech")
    parser.add_argument("--neural", type=int, default=240, help="sentences of neural voices")
    parser.add_argument("--other", type=int, default=240, help="sentences of simpler voices")
    parser.add_argument("--segments", type=int, default=500)
    parser.add_argument(
        "--noise", type=Path, help="folder to write noises to, for augment.noise_dir"
    )
    parser.add_argument(
        "--single", action="store_true", help="one quiet utterance a clip, with its transcript"
    )
    parser.add_argument(
        "--talks", type=int, default=0, help="windows of talk beside the other clips"
    )
    parser.add_argument("--bit-rate", type=int, default=28_000, help="of the clips, per second")
    parser.add_argument("--held-out", action="store_true", help="voices and texts never trained on")
    args = parser.parse_args()
    for folder in filter(None, (args.out, args.noise)):
        if folder.exists():  # said now, not after all is synthesised
            parser.error(f"{folder}: expected a folder that does not exist yet")

    rng = np.random.default_rng([SEED, args.language == "zh", args.held_out])
    voices = Voices(args.shards, args.voices, args.work, args.language)
    neural = voices.neural
    if args.held_out:
        prefix = "z" if args.language == "zh" else ("a", "b")
        neural = sorted(v for v in HELD_OUT_VOICES if v.startswith(prefix))
    count = args.neural + args.other
    texts = (
        mandarin_sentences(rng, count)
        if args.language == "zh"
        else english_sentences(rng)[-count if args.held_out else 0 :][:count]
    )
    if args.language == "en" and not args.held_out:
        every = 5 if args.talks else 4
        texts[::every] = announcements(rng, len(texts[::every]))
    if args.talks:
        patterns = SPOKEN_HELD_OUT if args.held_out else SPOKEN
        for first in (1, 3):
            texts[first::5] = filled(rng, len(texts[first::5]), patterns, SPOKEN_OF)
    lines: list[Sentence] = []
    for number, text in enumerate(texts):
        simple = FORMANT_VOICES + DIPHONE_VOICES
        kind = neural if number < args.neural else (["cmn"] if args.language == "zh" else simple)
        voice = str(rng.choice(kind))
        speed = round(float(rng.uniform(0.85, 1.2)), 2)
        lines.append(Sentence(voices.say(text, voice, speed), text, voice))
    if args.clips:
        with (args.clips / "metadata.csv").open(encoding="utf-8") as file:
            spoken = {row["file_name"]: row["transcription"] for row in csv.DictReader(file)}
        paths = sorted(p for p in args.clips.iterdir() if p.suffix != ".csv")
        for path in rng.choice(np.array(paths), min(160, len(paths)), replace=False):
            clip = read_audio(path)
            loud = (0.1 * clip / np.sqrt(np.mean(clip**2))).astype(np.float32)
            text = re.sub(r"\b[b-z]\b", lambda letter: letter[0].upper(), spoken[path.name])
            lines.append(Sentence(loud, f"{text[0].upper()}{text[1:]}.", "clip"))
    said = [line.audio for line in lines]
    if args.noise:
        args.noise.mkdir(parents=True)
        for number in range(NOISES):
            own = np.random.default_rng([SEED, 1, number])
            noise = NOISE_LEVEL * background(own, LONGEST_S * RATE, said)
            write_audio(args.noise / f"{number:03d}.ogg", noise.clip(-1, 1).astype(np.float32))
    args.out.mkdir(parents=True)
    with (args.out / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file_name", "transcription", "group", "language"])
        for number in range(len(lines) if args.single else args.segments):
            own = np.random.default_rng([SEED, number])
            if args.single:
                chosen = [number]
                audio = np.pad(lines[number].audio, int(0.25 * RATE))
                if args.talks:
                    audio = disturb(own, audio, said)
                elif own.random() < 0.3 and not args.held_out:
                    audio = (0.1 * unit(narrow_band(audio))).astype(np.float32)
            elif own.random() < 0.03:
                chosen = []
                noise = background(own, int(own.uniform(1, 6) * RATE), said)
                audio = (noise * own.uniform(0.005, 0.2)).astype(np.float32)
            else:
                wanted = own.choice([1, 2, 3], p=[0.5, 0.3, 0.2])
                drawn = [int(i) for i in own.integers(0, len(lines), wanted)]
                lengths = np.cumsum([len(lines[i].audio) / RATE + 0.5 for i in drawn])
                chosen = drawn[: max(1, int((lengths < LONGEST_S - 1).sum()))]
                audio = segment(own, [lines[i].audio for i in chosen])
            name = f"{number:04d}.ogg"
            write_audio(args.out / name, audio, args.bit_rate)
            text = ("" if args.language == "zh" else " ").join(lines[i].text for i in chosen)
            who = lines[chosen[0]].voice if chosen else "noise"
            rows.writerow([name, text, who, args.language])
        by_voice: dict[str, list[Sentence]] = defaultdict(list)
        for line in lines[: args.neural]:
            by_voice[line.voice].append(line)
        for number in range(args.talks):
            own = np.random.default_rng([SEED, 2, number])
            pair = [str(v) for v in own.choice(sorted(by_voice), own.integers(1, 3), replace=False)]
            hesitations = {v: [voices.say(text, v, 1.0) for text in HESITATIONS] for v in pair}
            wanted = own.uniform(10 if args.single else 2, 28)
            speech, cues = talk(own, {v: by_voice[v] for v in pair}, hesitations, wanted)
            name = f"talk{number:03d}.ogg"
            # An adapter's teacher hears it quiet; what rehearses hears it as it will be.
            audio = disturb(own, speech, said) if args.single else segment(own, [speech])
            write_audio(args.out / name, audio, args.bit_rate)
            text = " ".join(cue.text for cue in cues)
            rows.writerow([name, text, cues[0].voice, args.language])


if __name__ == "__main__":
    main()
