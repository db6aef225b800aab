"""Inputs of kinds that people really have, and whether each gives what is right.

    python benchmarks/cases.py FOLDER [CASE ...]

prints a table: case, right, got, ok. A case is a function `case_NAME(folder)` here or in a module
`cases_*.py` beside this one; it gives (right, got, whether they are the same).
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtransfer.config import DataConfig
from mmtransfer.data.tables import iter_rows
from mmtransfer.errors import UserError
from mmtransfer.speech.clips import read_clips
from mmtransfer.speech.subtitles import escape_subtitle, parse_subtitles, read_subtitles
from mmtransfer.text.examples import label_names, read_texts

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TINY = "bundled:whisper-tiny.en"
Verdict = tuple[str, str, bool]


def mmtransfer(*arguments: object) -> tuple[int, str]:
    """Exit code and output, both streams together, of the command line."""
    found = subprocess.run(
        [sys.executable, "-m", "mmtransfer.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return found.returncode, found.stdout


def last_line(output: str) -> str:
    """The last line of an output that says something."""
    return next((line for line in reversed(output.splitlines()) if line.strip()), "")


def train(folder: Path, config: str, *arguments: object) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and report of a training run."""
    run = Path(tempfile.mkdtemp()) / "run"
    code, output = mmtransfer("train", CONFIGS / config, "--run-dir", run, *arguments)
    report = run / "report.json"
    return code, output, json.loads(report.read_text()) if report.exists() else {}


def refused(read: Callable[[], object]) -> str:
    """The line that refuses something; empty if it is accepted."""
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def case_C01(folder: Path) -> Verdict:
    """A label in the default target column."""
    data = folder / "C01/input_tweets.csv"
    code, output, report = train(
        folder,
        "news_sentiment/feature.yaml",
        *("--data.train", data, "--data.label_column", "target"),
    )
    score = report["target"]["after"]["macro_f1"] if report else None
    got = f"macro-F1 {score:.3f}" if score is not None else last_line(output)
    ok = code == 2 if score is None else score < 0.75
    return "refused, or macro-F1 about 0.5", got, ok


def case_C02(folder: Path) -> Verdict:
    """Rows of another width than the header."""
    code, output = mmtransfer("evaluate", TINY, "--data", folder / "C02/input_commas")
    line = last_line(output)
    ok = code == 2 and "metadata.csv:2: expected 2 cells as in the header, found 3" in line
    verdicts = []
    for path in sorted((folder / "C02").glob("input_sibling_*")):
        is_right = path.stem.endswith(("quoted_ok", "trailing_comma"))
        verdicts.append((not refused(partial(read_clips, path, DataConfig()))) == is_right)
    return "refused with line; 3 refused, 2 accepted", line, ok and all(verdicts)


def case_C03(folder: Path) -> Verdict:
    """Line ends and blank lines in subtitles."""
    texts = {
        name: [cue.text for cue in read_subtitles(folder / f"C03/input_{name}/talk.srt")]
        for name in ("plain", "crlf", "crcrlf", "blank_between")
    }
    same = [name for name, found in texts.items() if found == texts["plain"]]
    ok = len(same) == 4 and len(texts["plain"]) == 4 and all(texts["plain"])
    return "the four texts of plain in all", f"{len(same)} of 4 files the same", ok


def case_C06(folder: Path) -> Verdict:
    """Training with language: auto."""
    data = ("--data.train", folder / "C06/input", "--source_model", "bundled:whisper-base")
    started = time.perf_counter()
    config = "video_monitoring/end_to_end.yaml"
    code, output, _ = train(folder, config, *data, "--data.language", "auto")
    seconds = time.perf_counter() - started
    _, hint, _ = train(folder, config, *data)
    line = last_line(output)
    ok = code == 2 and "evaluating" not in output and "auto" not in last_line(hint)
    return "exit 2 before any work; no hint offers it", f"{line} ({seconds:.0f} s)", ok


def case_C07(folder: Path) -> Verdict:
    """A column with languages."""
    from mmtransfer.config import build_config
    from mmtransfer.speech.clips import ClipSet, load_clips
    from mmtransfer.speech.whisper import load_speech_model
    from mmtransfer.speech.whisper_task import SpeechTask

    data = folder / "C07/input"
    speech = load_speech_model("bundled:whisper-base", language="zh", short_contexts=False)
    clips = load_clips(data, DataConfig(), name="train", languages=speech.languages)
    task = SpeechTask(speech, clips, ClipSet("validation", clips.clips), build_config({}))
    tokenizer = speech.processor.tokenizer
    right = []
    for index, clip in enumerate(clips.clips):
        tokens = task._target(index, 1.0, timestamps=False)
        text = tokenizer.decode(tokens[4:], skip_special_tokens=True)
        begins = tokens[1] == speech.model.generation_config.lang_to_id[f"<|{clip.language}|>"]
        right.append(begins and text.startswith(" ") == (clip.language == "en"))
    code, output = mmtransfer("evaluate", "bundled:whisper-base", "--data", data, "--json")
    found = json.loads(last_line(output)).get("languages", {}) if code == 0 else {}
    metrics = {language: scores["metric"] for language, scores in found.items()}
    ok = all(right) and metrics == {"zh": "cer", "en": "wer"}
    return "prompt and space by row; CER for zh, WER for en", f"{right}, {metrics}", ok


def case_C18(folder: Path) -> Verdict:
    """A CTC source in upper case, transcripts in lower."""
    cases = folder / "C18"
    code, output, report = train(
        folder,
        "video_monitoring/end_to_end.yaml",
        *("--source_model", cases / "input-upper-case-source", "--train.steps", 1),
        *("--data.train", cases / "input-lower", "--data.validation", cases / "input-val"),
    )
    before = report["target"]["before"] if report else None
    wer = before["wer"] if before else None
    lines = [line for line in output.splitlines() if "its output layer is kept" in line]
    got = f"before {wer}; {lines[0] if lines else last_line(output)}"
    return "before 0.0000, layer kept, one line", got, code == 0 and wer == 0.0 and len(lines) == 1


def case_C22(folder: Path) -> Verdict:
    """Transcripts that are too long."""
    code, output, report = train(
        folder,
        "video_monitoring/end_to_end.yaml",
        *("--data.train", folder / "C22/input-two-long", "--train.steps", 1),
        *("--data.validation", folder / "C23/input-two-languages", "--data.language", "en"),
        *("--data.rehearsal", "none", "--transfer.interpolate", "none"),
    )
    lines = [line for line in output.splitlines() if "k1.flac" in line and "k2.flac" in line]
    skipped = report["data"]["train"]["skipped"] if report else []
    got = f"{lines[0] if lines else last_line(output)}; {len(skipped)} counted"
    return (
        "both named together, skipped, counted",
        got,
        code == 0 and bool(lines) and len(skipped) == 2,
    )


def case_C23(folder: Path) -> Verdict:
    """Subtitles in two languages beside a recording."""
    clips = read_clips(folder / "C23/input-two-languages", DataConfig(language="en"))
    line = refused(lambda: read_clips(folder / "C23/input-two-languages", DataConfig()))
    ok = [clip.language for clip in clips] == ["en"] * 3 and "data.language" in line
    return "3 clips with language en", f"{len(clips)} clips; without: {line[-60:]}", ok


def case_C24(folder: Path) -> Verdict:
    """A picture beside a recording."""
    with tempfile.TemporaryDirectory() as bare:
        for name in ("talk.mp4", "talk.srt"):
            shutil.copy(folder / "C24/input-thumbnail" / name, bare)
        scores = []
        for data in (folder / "C24/input-thumbnail", Path(bare)):
            code, output = mmtransfer("evaluate", TINY, "--data", data, "--json")
            scores.append(json.loads(last_line(output)) if code == 0 else {"clips": 0})
    got = ", ".join(f"{s['clips']} clips, WER {s.get('wer')}" for s in scores)
    ok = scores[0]["clips"] == 3 and scores[0]["wer"] == scores[1].get("wer")
    return "3 clips, WER as without the picture", got, ok


def case_C30(folder: Path) -> Verdict:
    """Entities in WebVTT."""
    found = [cue.text for cue in read_subtitles(folder / "C30/input-entities.vtt")]
    right = [
        ">> Falkyn seven, the gantrel at Skelvoe gate & yard needs a fitter.",
        'It\'s Hexburn yard to "Zephrine" three, lower the hook slowly. 5 < 7',
    ]
    returned = []
    for is_vtt in (False, True):
        times = "00:00:01,000 --> 00:00:02,000\n"
        written = "".join(f"{times}{escape_subtitle(t, is_vtt=is_vtt)}\n\n" for t in right)
        returned += [cue.text for cue in parse_subtitles(written, is_vtt=is_vtt)]
    return "decoded; what is written comes back", found[0], found == right and returned == right * 2


def case_C31(folder: Path) -> Verdict:
    """U+2028 inside a JSON line."""
    clips = read_clips(folder / "C31/input-u2028", DataConfig())
    return "1 clip", f"{len(clips)} clips", len(clips) == 1


def case_C33(folder: Path) -> Verdict:
    """Class names in Parquet."""
    path = folder / "C33/input-classlabel.parquet"
    labels = label_names(read_texts(str(path), DataConfig(), name="train"))
    return "negative, positive", ", ".join(labels), labels == ["negative", "positive"]


def case_C34(folder: Path) -> Verdict:
    """Texts that are longer than the model reads."""
    from mmtransfer.runs.models import load
    from mmtransfer.text.classifier import TextModel, find_mention

    with tempfile.TemporaryDirectory() as place:
        run = Path(place, "run")
        code, output = mmtransfer(
            *("train", CONFIGS / "news_sentiment/feature.yaml", "--run-dir", run),
            *("--data.train", folder / "C34/input-train.csv", "--train.epochs", 6),
        )
        data = folder / "C34/input-long.csv"
        code, output = mmtransfer("predict", run, "--data", data)
        lines = [line for line in output.splitlines() if "were cut" in line]
        model = load(str(run)) if run.exists() else None
        rows = list(iter_rows(str(data)))
        held = []
        if isinstance(model, TextModel):
            for row in rows:
                [encoded] = model.encode([row["text"]], [row["target"]])
                text = model.tokenizer.decode(encoded.windows[0], skip_special_tokens=True)
                about = row["target"].lower()
                held.append(find_mention(text[: text.rfind(about)], about) is not None)
    got = f"{lines[0] if lines else last_line(output)} mention held: {held}"
    return "a line counts; the mention is held", got, bool(code == 0 and lines and all(held))


def collect() -> dict[str, Callable[[Path], Verdict]]:
    """Every case here and in the modules beside, by its name."""
    sys.path.insert(0, str(Path(__file__).parent))
    modules = [importlib.import_module(p.stem) for p in Path(__file__).parent.glob("cases_*.py")]
    found = {}
    for module in (sys.modules[__name__], *modules):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("case_"):
                found[name.removeprefix("case_")] = function
    return dict(sorted(found.items()))


def main() -> int:
    """Print the table; 1 if a case is not right."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, chosen = Path(sys.argv[1]), sys.argv[2:]
    table = Table("case", "right", "got", "ok")
    are_right = True
    for name, case in collect().items():
        if chosen and name not in chosen:
            continue
        try:
            right, got, ok = case(folder)
        except Exception as error:  # one broken case must not hide the others
            right, got, ok = "", f"{type(error).__name__}: {error}", False
        are_right &= ok
        table.add_row(name, right, got.replace("[", r"\["), "yes" if ok else "NO")
        print(f"{name}: {'ok' if ok else 'NOT ok'}: {got}", file=sys.stderr, flush=True)
    Console().print(table)
    return 0 if are_right else 1


if __name__ == "__main__":
    sys.exit(main())
