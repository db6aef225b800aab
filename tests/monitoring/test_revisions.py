"""Live text that is there at once, and right when the turn is over."""

import json
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from support.engines import ContextEngine, LoudIsSpeech, utterances
from support.web import wait_for

from mmtransfer.monitoring import Alert, Camera, Journal, LiveSettings, Monitor, Transcript
from mmtransfer.monitoring.keywords import Keywords
from mmtransfer.monitoring.outputs.sinks import FileSink, StandardOutput
from mmtransfer.monitoring.sources import readers
from mmtransfer.monitoring.sources.live import Block
from mmtransfer.monitoring.texts import new_alerts, revised
from mmtransfer.speech import segments
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.recognition import Recognizer

URL = "rtsp://camera.example/1"


"""Each utterance has a loudness of its own, by which the engine knows it."""


@pytest.fixture
def watch(monkeypatch):
    """Plays audio to a monitor as a live source, and gives what it hands out."""
    monkeypatch.setattr(segments, "SpeechProbability", LoudIsSpeech)

    def run(engine, samples, *, keywords=(), journal=None, until=lambda items: False, over=None):
        def play(name, source, stopping, **options):
            at = 1e9
            for start in range(0, len(samples), 1600):
                block = samples[start : start + 1600]
                yield Block(block, at, start > 0)
                at += len(block) / SAMPLE_RATE
            stopping.wait(20)

        monkeypatch.setattr(readers, "read_live", play)
        monitor = Monitor(Recognizer(engine), live=LiveSettings(partial_s=float("inf")))
        camera, items = Camera(name="door", url=URL, keywords=list(keywords)), []
        timer = threading.Timer(120, monitor.stop)
        timer.start()

        def stop_when_over():
            wait_for(over)
            time.sleep(0.5)  # what would come now is late
            monitor.stop()

        if over is not None:
            threading.Thread(target=stop_when_over, daemon=True).start()
        for item in monitor.watch([camera], journal=journal):
            items.append(item)
            if until(items):
                monitor.stop()
        timer.cancel()
        return items, monitor

    return run


def lines(items):
    return [item for item in items if isinstance(item, Transcript)]


def is_revised(items):
    return any(item.revision for item in lines(items))


def test_a_line_that_reads_differently_in_its_turn_comes_again_with_its_id(watch):
    engine = ContextEngine(["oh pen", "the gate", "now"], ["open", "the gate", "now"])
    items, monitor = watch(engine, utterances([0.6, 0.6, 4.0]), until=is_revised)
    first = [line for line in lines(items) if not line.revision]
    assert [line.text for line in first] == ["oh pen", "the gate", "now"]
    (again,) = [line for line in lines(items) if line.revision]
    assert (again.id, again.text, again.revision) == (first[0].id, "open", 1)
    assert again.start == pytest.approx(first[0].start, abs=0.05)
    assert again.delay_s is not None
    assert (monitor.stats.lines, monitor.stats.revised) == (3, 1)


def test_case_and_punctuation_alone_revise_nothing(watch):
    engine = ContextEngine(["open", "the gate", "now"], ["Open,", "the gate", "Now."])
    heard = utterances([0.6, 0.6, 4.0])
    items, monitor = watch(engine, heard, over=lambda: engine.turns)
    assert len(lines(items)) == 3
    assert monitor.stats.revised == 0


def test_one_segment_that_is_its_turn_is_decoded_once(watch):
    calls = []
    engine = ContextEngine(["alone"], ["together"])
    decode = engine.decode

    def counted(clips, context_s):
        calls.append(len(clips))
        return decode(clips, context_s)

    engine.decode = counted  # type: ignore[method-assign]
    items, _ = watch(engine, utterances([4.0]), until=lambda found: len(lines(found)) > 0)
    assert [line.text for line in lines(items)] == ["alone"]
    assert sum(calls) == 1


def test_words_are_given_to_the_segment_they_lie_in(watch):
    engine = ContextEngine(["a", "b", "c"], ["one two", "three", "four five six"])
    items, _ = watch(
        engine, utterances([0.6, 0.6, 4.0]), until=lambda found: len(lines(found)) >= 6
    )
    texts = {line.id: line.text for line in lines(items)}
    assert list(texts.values()) == ["one two", "three", "four five six"]


def test_a_keyword_is_alerted_once_and_again_only_if_the_revision_brings_it(watch):
    engine = ContextEngine(["fire", "tea", "now"], ["fire door", "help", "now"])
    items, _ = watch(
        engine,
        utterances([0.6, 0.6, 4.0]),
        keywords=["fire", "help"],
        until=lambda found: sum(isinstance(item, Alert) for item in found) > 1,
    )
    found = [(alert.keyword, alert.text) for alert in items if isinstance(alert, Alert)]
    assert found == [("fire", "fire"), ("help", "help")]


def test_first_texts_do_not_wait_for_a_turn_that_is_being_decoded(watch):
    hold, is_held = threading.Event(), threading.Event()

    class Held(ContextEngine):
        """Waits with the second turn, all of it and nothing else."""

        def decode(self, clips, context_s):
            found = super().decode(clips, context_s)
            if [one.text for one in found] == ["C1 D1"]:
                is_held.set()
                hold.wait(60)
            if "e" in [one.text for one in found]:
                is_held.wait(60)
            return found

    engine = Held(list("abcde"), ["A1", "B1", "C1", "D1", "E1"])

    def until(items):
        first = [line.text for line in lines(items) if not line.revision]
        if len(first) == 5:  # all of them, though the second turn is still being decoded
            assert is_held.is_set()
            hold.set()
        return len(first) == 5

    items, _ = watch(engine, utterances([0.6, 2.7, 0.6, 4.0, 4.0], 0.8), until=until)
    first = [line.text for line in lines(items) if not line.revision]
    assert [text[0].lower() for text in first] == list("abcde")


def test_a_turn_that_its_last_segment_was_decoded_with_is_not_decoded_again(watch):
    batches: list[list[Any]] = []  # as they began, in two threads

    class Counted(ContextEngine):
        def decode(self, clips, context_s):
            found: list[Any] = []
            batches.append(found)
            found += super().decode(clips, context_s)
            return found

    engine = Counted(["oh pen", "a gate"], ["open", "the gate"])
    items, _ = watch(engine, utterances([0.6, 4.0]), until=is_revised)
    assert [line.text for line in lines(items)] == ["oh pen", "the gate", "open"]
    decoded = [one.text for found in batches for one in found]
    assert decoded == ["oh pen", "open the gate"]


def test_a_segment_that_its_turn_has_no_text_for_is_decoded_alone(watch):
    engine = ContextEngine(["open", "now", "then"], ["open", "", ""])
    items, _ = watch(
        engine, utterances([0.6, 0.6, 4.0]), until=lambda found: len(lines(found)) == 3
    )
    assert [line.text for line in lines(items)] == ["open", "now", "then"]


def test_the_journal_holds_both_and_a_restart_repeats_neither(watch, tmp_path):
    engine = ContextEngine(["oh pen", "the gate"], ["open", "the gate"])
    identity: dict[str, Any] = {"model": "fake", "model_digest": "0", "sources": {"door": URL}}
    journal = Journal(tmp_path, **identity)
    watch(engine, utterances([0.6, 4.0]), journal=journal, until=is_revised)
    journal.close()
    written = [
        json.loads(line)
        for path in tmp_path.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    texts = [(line["id"], line["text"], line["revision"]) for line in written if "text" in line]
    assert [(text, revision) for _, text, revision in texts] == [
        ("oh pen", 0),
        ("the gate", 0),
        ("open", 1),
    ]
    assert texts[0][0] == texts[2][0]


def line(number, text, revision=0):
    return Transcript(
        *("file", "door", f"s#{number}" if number else "s", float(number), number + 0.9, text),
        *(-0.1, 0.0, 1.0, 30.0),
        revision=revision,
    )


def test_lines_are_replaced_added_and_emptied():
    old = [line(0, "one two"), line(1, "three")]
    assert revised(old, [line(0, "One two."), line(1, "three")]) == []
    (changed,) = revised(old, [line(0, "one too"), line(1, "three")])
    assert (changed.id, changed.text, changed.revision) == ("s", "one too", 1)
    more = revised(old, [*old, line(2, "four")])
    assert [(x.id, x.text, x.revision) for x in more] == [("s#2", "four", 1)]
    gone = revised(old, [line(0, "one too three")])
    assert [(x.id, x.text, x.revision) for x in gone] == [
        ("s", "one too three", 1),
        ("s#1", "", 1),
    ]
    assert [x.text for x in revised([], [line(0, "there was something")])] == [
        "there was something"
    ]


def test_a_keyword_that_moved_to_the_next_line_is_not_alerted_again():
    keywords = Keywords(["fire"])
    before = [line(0, "there is a fire"), line(1, "now")]
    assert new_alerts([line(0, "there is a"), line(1, "fire now")], before, keywords) == []
    late = replace(line(9, "fire"), start=9.0, end=9.9)
    (alert,) = new_alerts([*before, late], before, keywords)
    assert alert.segment == "s#9"


def test_revised_lines_are_marked_where_people_look(capsys, tmp_path):
    sink = StandardOutput()
    file = FileSink(tmp_path / "out.txt")
    for item in (line(0, "oh pen"), line(0, "open", 1)):
        sink.write(item)
        file.write(item)
    file.close()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[")
    assert printed[1] == f"~ {printed[0].replace('oh pen', 'open')}"
    assert (tmp_path / "out.txt").read_text().splitlines() == printed


def test_a_doubtful_first_text_is_left_to_its_turn_which_is_decoded_again_instead(watch):
    contexts = []

    class Doubtful(ContextEngine):
        def decode(self, clips, context_s):
            contexts.append(context_s)
            found = super().decode(clips, context_s)
            doubt = -2.0 if context_s < 30 else -0.1
            return [replace(one, avg_logprob=doubt) for one in found]

    engine = Doubtful(["oh", "pen"], ["open", "the gate"])
    items, monitor = watch(engine, utterances([0.6, 4.0]), until=is_revised)
    found = lines(items)
    assert [line.text for line in found] == ["open", "the gate"]
    assert [line.revision for line in found] == [1, 1]
    assert contexts.count(30.0) == 1
    assert monitor.stats.revised == 2
