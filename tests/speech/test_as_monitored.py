"""What `evaluate` and a training run measure is what `monitor` runs, and says so."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import EXAMPLE, write_dataset

from mmtransfer import runs
from mmtransfer.cli import main
from mmtransfer.config import build_config
from mmtransfer.speech.audio import decode_clip
from mmtransfer.speech.engine import Hypothesis
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.recognizers import open_recognizer
from mmtransfer.speech.scores import get_normalizer, score_clip, summarize_speech

SITE_NAMES = (
    *("Falkyn", "Orrivane", "Zephrine", "Brannoch", "Skelvoe", "Tarrowmoss", "Okonkwo-Reyes"),
    *("Vasterling", "Thibodrin", "Ejlersund", "Mirrowick", "Hexburn", "gantrel"),
)

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The first clips of the example site."""
    folder = tmp_path_factory.mktemp("site")
    with (EXAMPLE / "validation" / "metadata.csv").open(encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    for row in rows[:3]:
        shutil.copy(EXAMPLE / "validation" / row[0], folder)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows[:3]])
    return folder, [(folder / row[0], row[1]) for row in rows[:3]]


def evaluated(model, data, capsys, *options):
    assert main(["evaluate", str(model), "--data", str(data), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_scores_what_monitor_runs(whisper_tiny, site, capsys):
    folder, clips = site
    found = evaluated(whisper_tiny, folder, capsys)
    expected = {"engine": "ctranslate2", "precision": "int8", "beams": 5, "guards": True}
    expected["prompt"] = ""
    assert found["decoding"] == expected
    rate = found["wer"]
    waves = [decode_clip(path).astype(np.float16).astype(np.float32) for path, _ in clips]
    heard = open_recognizer(str(whisper_tiny)).transcribe(waves, guarded=True, reject=True)
    name = found["normalizer"]
    normalizer = get_normalizer(name)
    pairs = zip(clips, heard, strict=True)
    records = [score_clip(text, heard_.text, normalizer) for (_, text), heard_ in pairs]
    score = summarize_speech(records, normalizer=name, bootstrap_samples=100)
    assert rate == pytest.approx(score.wer)


def test_names_to_expect_are_recognised_more_often(whisper_tiny, site, capsys):
    folder, clips = site
    names = ", ".join(word for word in SITE_NAMES if any(word in text for _, text in clips))
    assert names
    without = evaluated(whisper_tiny, folder, capsys)
    found = evaluated(whisper_tiny, folder, capsys, "--prompt", names)
    assert found["decoding"]["prompt"] == names
    assert found["wer"] < without["wer"]
    recording = [str(clips[0][0]), "--reference", str(folder / "spoken.txt")]
    (folder / "spoken.txt").write_text(clips[0][1])
    rates = [
        evaluated(whisper_tiny, *recording[:1], capsys, *recording[1:], "--prompt", prompt)["wer"]
        for prompt in ("", names)
    ]
    assert rates[1] < rates[0]


@pytest.mark.slow
def test_evaluate_scores_what_training_scores_if_asked_to(whisper_tiny, site, capsys):
    folder, _ = site
    options = ["--engine", "transformers", "--beam", "1", "--no-guards"]
    found = evaluated(whisper_tiny, folder, capsys, *options)
    expected = {"engine": "transformers", "precision": "float32", "beams": 1, "guards": False}
    expected["prompt"] = ""
    assert found["decoding"] == expected
    plain = runs.evaluate(str(whisper_tiny), str(folder))
    assert {name: found[name] for name in ("wer", "cer", "ci_low")} == {
        name: plain[name] for name in ("wer", "cer", "ci_low")
    }
    assert main(["evaluate", str(whisper_tiny), "--data", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "decoded by transformers in float32, greedy, no guards" in out


def test_a_training_run_reports_both(random_whisper, tmp_path, capsys):
    train = write_dataset(tmp_path / "train", ["gate one", "gate two"])
    validation = write_dataset(tmp_path / "validation", ["crane one", "gate"])
    run = tmp_path / "run"
    values = {
        "data": {"train": str(train), "validation": str(validation), "rehearsal": "none"},
        "source_model": str(random_whisper),
        "run_dir": str(run),
        "train": {"steps": 1},
        "transfer": {"interpolate": "none"},
        "runtime": {"device": "cpu", "threads": 1},
    }
    report = runs.train(build_config(values))
    both = report["target"]
    assert evaluated(run, validation, capsys)["wer"] == both["monitored"]["wer"]
    assert runs.evaluate(str(run), str(validation))["wer"] == both["after"]["wer"]
    card = " ".join((run / "README.md").read_text().split())
    assert f"| target, as monitored | – | {both['monitored']['wer']:.4f}" in card
    assert "by ctranslate2 in int8, 5 beams, guards, as `mmtransfer monitor` decodes on CPU" in card


class Doubtful:
    """Decodes to the same text in every context, with little confidence if told so."""

    workers, language, max_context_s, shortest_context_s = 1, None, 30.0, 1.0
    margin_s, short_s, window_s = 0.0, float("inf"), 0.0

    def __init__(self, text, logprob):
        self.text, self.logprob, self.contexts = text, logprob, []

    def decode(self, clips, context_s):
        self.contexts.append(context_s)
        return [Hypothesis(self.text, (1, 2), self.logprob, 0.0, context_s) for _ in clips]


def test_text_that_stays_in_doubt_is_left_out_if_so_wanted():
    clip = [np.zeros(32_000, np.float32)]
    engine = Doubtful("hello there", -3.0)
    [found] = Recognizer(engine).transcribe(clip, guarded=True, reject=True)
    assert found.text == ""
    assert engine.contexts[-1] == 30.0
    assert len(engine.contexts) > 1
    assert Recognizer(engine).transcribe(clip, guarded=True)[0].text == "hello there"
    sure = Doubtful("hello there", -0.1)
    assert Recognizer(sure).transcribe(clip, guarded=True, reject=True)[0].text == "hello there"
    assert len(sure.contexts) == 1


def test_words_that_a_person_repeats_stay():
    clip = [np.zeros(6 * 16_000, np.float32)]
    engine = Doubtful("control " * 6, -0.1)
    [found] = Recognizer(engine).transcribe(clip, guarded=True, reject=True)
    assert found.text.split() == ["control"] * 6
