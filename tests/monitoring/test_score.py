"""Scores of whole recordings, by the path that monitors them."""

import json
from itertools import pairwise

import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.cli import main
from mmtransfer.errors import UserError
from mmtransfer.monitoring import Transcript
from mmtransfer.monitoring.score import Spoken, read_reference, score_recording

VIDEO = EXAMPLE / "monitor.mp4"


def line(text, start=0.0, end=1.0, words=None):
    return Transcript("f", "f", f"f@{start}", start, end, text, -0.1, 0.0, 1.0, 30.0, words=words)


words = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=5), st.data())
def test_where_lines_are_cut_makes_no_difference(parts, data):
    spoken = [Spoken(" ".join(part)) for part in parts]
    said = [word for part in parts for word in part]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=4)))
    bounds = [0, *cuts, len(said)]
    lines = [line(" ".join(said[a:b])) for a, b in pairwise(bounds)]
    score = score_recording(lines, spoken)
    assert (score.rate, score.words) == (0.0, len(said))


def test_errors_are_counted_by_kind_and_missed_words_by_minute():
    spoken = [Spoken("the quick brown fox"), Spoken("jumps over the lazy dog")]
    score = score_recording(
        [line("the quick green fox"), line("over the lazy dog today")], spoken, seconds_audio=30.0
    )
    assert (score.substitutions, score.deletions, score.insertions) == (1, 1, 1)
    assert score.rate == pytest.approx(3 / 9)
    assert score.missed_per_minute == 2.0
    assert score.ci_low is not None
    assert score.rate is not None
    assert score.ci_high is not None
    assert score.ci_low <= score.rate <= score.ci_high


def test_offsets_are_those_of_the_first_words():
    timed = [{"text": w, "start": 4.0 + n, "end": 4.5 + n} for n, w in enumerate(["one", "two"])]
    spoken = [Spoken("zero", 1.0, 2.0), Spoken("one two", 4.5, 6.0)]
    score = score_recording([line("zero", 1.0, 2.0), line("one two", 4.0, 6.0, timed)], spoken)
    assert (score.offset_p50_s, score.offset_p95_s) == (0.25, pytest.approx(0.475))  # type: ignore[comparison-overlap]
    assert score_recording([line("zero")], [Spoken("zero")]).offset_p50_s is None


def test_chinese_is_scored_by_characters():
    score = score_recording([line("今天天气很好")], [Spoken("今天天气真好")], language="zh")
    assert (score.metric, score.words, score.substitutions) == ("cer", 6, 1)


@pytest.mark.parametrize("name", ["a.srt", "a.vtt", "a.txt", "a.json", "a.jsonl"])
def test_references_of_every_form(name, tmp_path):
    items = [{"text": "Hello there.", "start": 1, "end": 2.5}, {"text": "Good bye."}]
    cues = (
        "00:00:01{0}000 --> 00:00:02{0}500\nHello there.\n\n"
        "00:00:03{0}000 --> 00:00:04{0}000\nGood bye.\n"
    )
    forms = {
        "a.srt": cues.format(","),
        "a.vtt": "WEBVTT\n\n" + cues.format("."),
        "a.txt": "Hello there.\n\nGood bye.\n",
        "a.json": json.dumps(items),
        "a.jsonl": "\n".join(map(json.dumps, items)),
    }
    path = tmp_path / name
    path.write_text(forms[name])
    found = read_reference(path)
    assert [part.text for part in found] == ["Hello there.", "Good bye."]
    assert found[0].start == (None if name == "a.txt" else 1)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.docx", "", "expected a reference in"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"text": "x"}', "expected a list"),
        ("a.json", '[{"words": "x"}]', "item 1: expected an object with a string `text`"),
        ("a.jsonl", '{"text": "x", "start": "now"}', "item 1: start and end are numbers"),
        ("a.txt", "\n", "has no text"),
        ("a.srt", "", "no subtitle cues found"),
    ],
)
def test_references_that_cannot_be_used(name, text, problem, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_reference(path)


def test_a_recording_is_scored_on_the_path_of_monitor(whisper_tiny, tmp_path, capsys):
    truth = json.loads((EXAMPLE / "monitor.json").read_text())
    assert truth
    reference = tmp_path / "truth.json"
    reference.write_text(json.dumps(truth))
    command = ["evaluate", str(whisper_tiny), "--data", str(VIDEO), "--reference", str(reference)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wer"] == found["rate"]
    assert 0 < found["rate"] < 0.6
    assert found["words"] > 100
    assert found["lines"] >= found["segments"] > 3
    assert found["offset_p50_s"] < 1.0
    assert found["seconds_audio"] == pytest.approx(120, abs=10)


@pytest.mark.parametrize(
    ("source", "kind"), [("{}", "a folder"), ("rtsp://u:secret@c/1", "a live source")]
)
def test_what_has_no_end_is_not_scored(source, kind, tmp_path, capsys):
    (tmp_path / "r.txt").write_text("words")
    command = ["evaluate", "bundled:whisper-tiny.en", "--data", source.format(tmp_path)]
    assert main([*command, "--reference", str(tmp_path / "r.txt")]) == 2
    error = capsys.readouterr().err
    assert f"found {kind}. Name one file." in error
    assert "secret" not in error


def test_a_missing_recording_or_reference_is_one_line(whisper_tiny, tmp_path, capsys):
    command = ["evaluate", str(whisper_tiny), "--data", str(VIDEO), "--reference"]
    assert main([*command, str(tmp_path / "none.srt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
