"""Cases of models and of their text; `cases.py` runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmtransfer.hub.bundled import materialize
from mmtransfer.speech.scores import default_normalizer, get_normalizer, score_clip

ROOT = Path(__file__).resolve().parent.parent
TINY, BASE = "bundled:whisper-tiny.en", "bundled:whisper-base"
Verdict = tuple[str, str, bool]


def _run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and messages of the command line."""
    found = subprocess.run(
        [sys.executable, "-m", "mmtransfer", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, found.stdout, found.stderr


def _scores(*arguments: object) -> dict[str, Any]:
    code, output, messages = _run("evaluate", *arguments, "--json")
    return json.loads(output) if code == 0 else {"error": messages.strip().splitlines()[-1]}


def case_C05(folder: Path) -> Verdict:
    """A word that somebody repeats."""
    clips = folder / "C05"
    _, between, _ = _run(
        "monitor", TINY, clips / "input_control_between.mp3", "--keywords", "control"
    )
    _, six, messages = _run("monitor", TINY, clips / "input_control6.mp3")
    has_both = "lower the hook" in between and "eight pallets" in between
    repeated = min(text.lower().count("control") for text in (between, six))
    ok = has_both and repeated >= 4 and "ALERT" in between and "looping" not in messages
    got = f"sentences {'kept' if has_both else 'lost'}, word {repeated} times"
    return "both sentences, the word 4 to 6 times, ALERT", got, ok


def case_C09(folder: Path) -> Verdict:
    """Generation settings of 2022."""
    talk = folder / "C09/input_talk.mp3"
    own = materialize(BASE)
    same = []
    with tempfile.TemporaryDirectory() as root:
        old = Path(root, "old")
        shutil.copytree(own, old)
        shutil.copyfile(folder / "C09/input_generation_config.json", old / "generation_config.json")
        for language in (["--language", "en"], ["--language", "de"], []):
            found = [_run("monitor", model, talk, *language)[:2] for model in (own, old)]
            same.append(found[0] == found[1] and (bool(found[0][1]) or not language))
    return "the same text for en, de and none", f"{sum(same)} of 3 the same", all(same)


def case_C10(folder: Path) -> Verdict:
    """Hindi: vowel signs."""
    words = _scores(BASE, "--data", folder / "C10/input_clip", "--language", "hi").get("words")
    score = score_clip("किताब", "कुतीब", get_normalizer(default_normalizer("hi")))
    counts = (words, score.word_errors, score.words, score.char_errors, score.chars)
    got = "{} reference words; {} of {} words, {} of {} characters wrong".format(*counts)
    right = "2 reference words; 1 of 1 words, 2 of 5 characters wrong"
    return right, got, got == right


def case_C11(folder: Path) -> Verdict:
    """Mandarin: white space."""
    found = _scores(BASE, "--data", folder / "C11/input_clip", "--language", "zh")
    rate = found.get("cer", found.get("error"))
    return "CER 0.0000", f"CER {rate}", rate == 0.0


def case_C16(folder: Path) -> Verdict:
    """Clips without speech alone."""
    data = ("--data", folder / "C16/input-quiet")
    code, output, _ = _run("evaluate", TINY, *data)
    scores = _run("evaluate", TINY, *data, "--json")[1]
    is_plain = not any(word in scores.lower() for word in ("inf", "nan"))
    got = output.splitlines()[0] if output else f"exit {code}"
    ok = code == 0 and "WER undefined" in got and "on 4 silent clips" in got and is_plain
    return "WER undefined, words on 4 silent clips", got, ok


def case_C40(folder: Path) -> Verdict:
    """A peft adapter from elsewhere."""
    talk = folder / "C05/input_control_between.mp3"
    code, output, messages = _run("monitor", folder / "C40/input-adapter", talk)
    got = output.splitlines()[0] if output else messages.strip().splitlines()[-1]
    is_named = "adapter_config.json" in got and "openai/whisper-tiny.en" in got
    ok = (code == 0 and bool(output)) or (code == 2 and is_named)
    return "text, or one line that names the base", got, ok
