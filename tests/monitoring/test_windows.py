import json
import wave
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import FakeEngine, LoudIsSpeech

from mmtransfer.monitoring import Monitor, Transcript
from mmtransfer.monitoring.journal.journal import Journal
from mmtransfer.monitoring.keywords import Keywords
from mmtransfer.monitoring.lines import (
    Line,
    LineSettings,
    last_piece,
    rows,
    split_lines,
    split_pieces,
    text_ends_at,
)
from mmtransfer.monitoring.texts import alerts, transcripts
from mmtransfer.speech import segments
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.engine import Hypothesis, Word
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.segments import (
    Piece,
    Segment,
    Segmenter,
    SegmenterSettings,
    TurnJoiner,
    WindowSegmenter,
)

VIDEO = EXAMPLE / "monitor.mp4"
_STEP = 1e-7  # a sample's place is in its value


@pytest.fixture(autouse=True)
def loud_is_speech(request, monkeypatch):
    if "real_speech" not in request.keywords:
        monkeypatch.setattr(segments, "SpeechProbability", LoudIsSpeech)


def stream(parts):
    """Speech and silence in turns, so many frames each; every sample tells its place."""
    loud = np.concatenate([np.full(n * 512, i % 2 == 0) for i, n in enumerate(parts)])
    return (np.arange(len(loud)) * _STEP + 0.5 * loud).astype(np.float32)


def place(value):
    return (value - 0.5 if value >= 0.45 else value) / _STEP


def windows(samples, window_s, blocks=(16_000,), **options):
    segmenter = WindowSegmenter(SegmenterSettings(**options), window_s)
    found, at, number = list[Segment](), 0, 0
    while at < len(samples):
        size = blocks[number % len(blocks)]
        found += segmenter.feed(samples[at : at + size])
        at, number = at + size, number + 1
    return [*found, *segmenter.finish()]


frames = st.lists(st.integers(9, 400), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(frames, st.sampled_from([4.0, 10.0, 28.0]))
def test_all_speech_is_in_one_window_and_no_window_is_too_long(parts, window_s):
    samples = stream(parts)
    found = windows(samples, window_s)
    pieces = SegmenterSettings(pause_s=0.3, max_segment_s=window_s)
    cutter = Segmenter(pieces)
    expected = [*cutter.feed(samples), *cutter.finish()]
    assert [p.start for w in found for p in w.pieces] == [s.start for s in expected]
    assert [p.end for w in found for p in w.pieces] == [s.end for s in expected]
    for window in found:
        assert len(window.samples) <= (window_s + 0.04) * SAMPLE_RATE
        assert (window.start, window.end) == (window.pieces[0].start, window.pieces[-1].end)
        for before, piece in pairwise(window.pieces):
            assert piece.start - before.end <= SegmenterSettings().join_s


@settings(max_examples=60, deadline=None)
@given(frames, st.integers(0, 2**31))
def test_times_in_a_window_are_those_of_the_stream_though_pauses_are_cut(parts, seed):
    rng = np.random.default_rng(seed)
    for window in windows(stream(parts), 28.0):
        for at in rng.integers(0, len(window.samples), 8):
            time = window.time_at(at / SAMPLE_RATE)
            assert time * SAMPLE_RATE == pytest.approx(place(window.samples[at]), abs=3)
        moved = window.moved(100.0)
        assert moved.time_at(0.5) == pytest.approx(100 + window.time_at(0.5))
        assert moved.samples is window.samples


@settings(max_examples=40, deadline=None)
@given(frames, st.lists(st.integers(100, 40_000), min_size=1, max_size=5))
def test_windows_do_not_depend_on_how_the_audio_comes(parts, blocks):
    samples = stream(parts)
    one, other = windows(samples, 10.0), windows(samples, 10.0, blocks)
    assert [(w.start, w.end, len(w.samples)) for w in one] == [
        (w.start, w.end, len(w.samples)) for w in other
    ]


def test_a_long_pause_ends_a_turn_and_a_shorter_one_is_shortened():
    second = round(SAMPLE_RATE / 512)
    found = windows(stream([5 * second, 2 * second, 2 * second, 4 * second, 2 * second]), 28.0)
    assert [len(window.pieces) for window in found] == [2, 1]
    # Seven seconds of speech, of the pause between them what is kept, and the end's padding.
    assert len(found[0].samples) / SAMPLE_RATE == pytest.approx(7 + 0.6 + 0.25, abs=0.1)


def test_after_a_short_answer_a_pause_ends_the_turn_sooner():
    second = round(SAMPLE_RATE / 512)
    found = windows(stream([second, 2 * second, 5 * second, 2 * second, second]), 28.0)
    assert [len(window.pieces) for window in found] == [1, 2]


def test_where_somebody_waits_a_long_turn_is_closed_at_its_next_pause():
    pieces = [
        Segment(start, start + 4.0, np.zeros(4 * SAMPLE_RATE, np.float32), start)
        for start in (0.0, 4.5, 9.0, 13.5, 18.0)
    ]
    turns = TurnJoiner(SegmenterSettings(), 28.0, close_s=11.0)
    closed = [[piece.start for w in turns.add(piece) for piece in w.pieces] for piece in pieces]
    assert closed == [[], [], [0.0, 4.5, 9.0], [], []]
    assert [piece.start for w in turns.finish() for piece in w.pieces] == [13.5, 18.0]


def test_where_somebody_waits_a_turn_is_closed_once_it_has_no_room_for_what_is_spoken():
    def piece(start, seconds):
        return Segment(start, start + seconds, np.zeros(round(seconds * SAMPLE_RATE)), start)

    turns = TurnJoiner(SegmenterSettings(), 19.0, close_s=12.0)
    assert list(turns.go_on(piece(0.0, 25.0))) == []  # nothing is before it
    assert not [*turns.add(piece(0.0, 5.0)), *turns.add(piece(5.5, 5.0))]
    assert list(turns.go_on(piece(11.0, 8.5))) == []
    (closed,) = turns.go_on(piece(11.0, 9.5))
    assert [piece.start for piece in closed.pieces] == [0.0, 5.5]
    assert turns.start is None


def test_a_segment_is_decoded_with_its_turn_and_a_young_turn_with_the_one_before():
    def piece(start, seconds):
        audio = np.full(round(seconds * SAMPLE_RATE), start, np.float32)
        return Segment(start, start + seconds, audio, start)

    def starts(segment):
        return [piece.start for piece in turns.with_before(segment).pieces]

    turns = TurnJoiner(SegmenterSettings(), 12.0, close_s=6.0)
    assert starts(piece(0.0, 4.0)) == [0.0]
    assert list(turns.add(piece(0.0, 4.0))) == []
    assert starts(piece(4.5, 3.0)) == [0.0, 4.5]
    (first,) = turns.add(piece(4.5, 3.0))  # closed, as somebody waits
    assert len(first.pieces) == 2
    window = turns.with_before(piece(8.0, 4.0))  # up to three quarters of a window, of 9 s
    assert [piece.start for piece in window.pieces] == [4.5, 8.0]
    assert window.samples[-1] == 8.0
    assert starts(piece(8.0, 2.0)) == [0.0, 4.5, 8.0]
    assert starts(piece(11.0, 1.0)) == [11.0]  # nobody goes on after so long
    assert starts(piece(8.0, 13.0)) == [8.0]
    assert turns.start is None  # looking changes nothing


def test_a_full_window_is_cut_at_its_widest_pause():
    second = round(SAMPLE_RATE / 512)
    speech, short, wide = 3 * second, second // 2, 2 * second
    found = windows(stream([speech, short, speech, wide, speech, short, speech]), 12.0)
    assert [len(window.pieces) for window in found] == [2, 2]


def test_halves_of_a_window_hold_all_of_it():
    second = round(SAMPLE_RATE / 512)
    window = windows(stream([3 * second, second, 3 * second, second, 2 * second]), 28.0)[0]
    one, other = window.halves()
    assert np.array_equal(np.concatenate([one.samples, other.samples]), window.samples)
    assert len(one.pieces) + len(other.pieces) == 3
    assert (one.start, other.end) == (window.start, window.end)
    for half in (one, other):
        assert half.time_at(0.0) * SAMPLE_RATE == pytest.approx(place(half.samples[0]), abs=3)
    assert Segment(0, 1, np.zeros(16_000, np.float32)).halves() is None


# --- lines ----------------------------------------------------------------------------------------


def spoken(text, pace_s=0.3, pauses=None):
    words, at = [], 0.0
    for number, word in enumerate(text.split()):
        at += (pauses or {}).get(number, 0.0)
        words.append(Word(word, at, at + pace_s, 0.9))
        at += pace_s
    segment = Segment(0.0, at, np.zeros(round(at * SAMPLE_RATE) + 1, np.float32))
    return Hypothesis(text, (1,), -0.2, 0.0, 30.0, words=tuple(words)), segment


words = st.lists(
    st.sampled_from(["a", "gate", "two,", "open.", "observation", "why?", "Hexburn"]), min_size=1
)


@given(words, st.floats(0.05, 3.0))
def test_lines_hold_the_whole_text_in_order_and_none_is_too_long(parts, pace_s):
    hypothesis, segment = spoken(" ".join(parts), pace_s)
    lines = split_lines(hypothesis, segment)
    assert " ".join(line.text for line in lines) == hypothesis.text
    assert lines[0].start == segment.start
    assert lines[-1].end == segment.end
    assert all(a.start <= b.start and a.start <= a.end for a, b in pairwise(lines))
    for line in lines:
        assert len(line.text) <= 84 or len(line.words) == 1
        assert line.end - line.start <= 7.1 or len(line.words) == 1


@given(st.lists(st.floats(0, 2), min_size=1, max_size=12), st.floats(0, 1))
def test_every_line_lasts_long_enough_to_be_shown(ends, left_s):
    times = sorted(ends)
    words = tuple(Word(f"W{i}.", at, at, 0.9) for i, at in enumerate(times))  # no time of their own
    text = " ".join(word.text for word in words)
    segment = Segment(0.0, times[-1] + left_s + 0.01, np.zeros(1, np.float32))
    lines = split_lines(Hypothesis(text, (1,), -0.2, 0.0, 30.0, words=words), segment)
    assert len(lines) == len(words)
    shortest = min(0.1, segment.end / len(lines))
    assert all(line.end - line.start >= shortest - 1e-9 for line in lines)
    assert all(a.end <= b.start + 1e-9 for a, b in pairwise(lines))
    assert (lines[0].start, lines[-1].end) == (segment.start, segment.end)


def test_a_line_is_a_sentence_or_what_is_between_two_pauses():
    hypothesis, segment = spoken("Open the gate. Who is there nobody came", pauses={6: 1.5})
    texts = [line.text for line in split_lines(hypothesis, segment)]
    assert texts == ["Open the gate.", "Who is there", "nobody came"]


def test_a_long_sentence_is_cut_at_a_clause_near_its_middle():
    text = "when the lorry had passed the barrier at the gate, the guard closed it again at once"
    hypothesis, segment = spoken(text)
    texts = [line.text for line in split_lines(hypothesis, segment, LineSettings(characters=60))]
    assert texts == [
        "when the lorry had passed the barrier at the gate,",
        "the guard closed it again at once",
    ]


def test_without_times_of_words_a_segment_is_one_line():
    hypothesis = Hypothesis("Open. The gate.", (1,), -0.2, 0.0, 30.0)
    (line,) = split_lines(hypothesis, Segment(3.0, 9.0, np.zeros(1, np.float32)))
    assert (line.start, line.end, line.text) == (3.0, 9.0, "Open. The gate.")


def test_text_without_spaces_is_split_between_its_words():
    text = "请把窗户关上。外面风太大了。"
    words = tuple(Word(text[a:b], a / 4, b / 4, 0.9) for a, b in ((0, 1), (1, 4), (4, 7), (7, 14)))
    hypothesis = Hypothesis(text, (1,), -0.2, 0.0, 30.0, words=words)
    lines = split_lines(hypothesis, Segment(0.0, 3.5, np.zeros(1, np.float32)))
    assert [line.text for line in lines] == ["请把窗户关上。", "外面风太大了。"]


def test_a_keyword_is_found_across_two_lines_and_once_in_each():
    hypothesis, segment = spoken("Please open. The gate is open the gate.")
    lines = transcripts("a", "a", "a@0.000", hypothesis, split_lines(hypothesis, segment))
    found = alerts(lines, Keywords(["open the gate", "please"]))
    assert [(a.keyword, a.segment) for a in found] == [
        ("please", "a@0.000"),
        ("open the gate", "a@0.000#1"),
    ]
    hypothesis, segment = spoken("Please open. The gate now.")
    lines = transcripts("a", "a", "a@0.000", hypothesis, split_lines(hypothesis, segment))
    (alert,) = alerts(lines, Keywords(["open the gate"]))
    assert alert.segment == "a@0.000"


# --- through the monitor --------------------------------------------------------------------------


class WindowEngine(FakeEngine):
    """Takes in whole turns, and loops on what is longer than it can bear."""

    window_s = 28.0

    def __init__(self, bears_s=60.0):
        super().__init__()
        self._bears_s, self.lengths = bears_s, []

    def decode(self, clips, context_s):
        found = []
        for clip in clips:
            seconds = len(clip) / SAMPLE_RATE
            self.lengths.append(seconds)
            text = "no no no no no no no" if seconds > self._bears_s else "one two. three four."
            times = [seconds * k / 4 for k in range(4)]
            words = tuple(
                Word(word, at, at + 0.5, 0.9)
                for word, at in zip(text.split()[:4], times, strict=False)
            )
            found.append(Hypothesis(text, (1,), -0.1, 0.0, context_s, words=words))
        return found


@pytest.mark.real_speech
def test_a_window_that_loops_is_decoded_in_halves_before_it_is_rejected(tmp_path):
    whole = Monitor(Recognizer(WindowEngine()))
    expected = list(whole.transcribe(VIDEO))
    engine = WindowEngine(bears_s=6.0)
    monitor = Monitor(Recognizer(engine))
    found = list(monitor.transcribe(VIDEO))
    assert max(engine.lengths) > 6
    assert " ".join(line.text for line in found).split()[:4] == ["one", "two.", "three", "four."]
    assert not any("no" in line.text.split() for line in found)
    assert not monitor.stats.rejected
    assert monitor.stats.decoded_again > 0
    assert monitor.stats.segments == whole.stats.segments
    assert len(found) > len(expected)
    assert len({line.id for line in found}) == len(found)
    starts = [line.start for line in found]
    assert starts == sorted(starts)


@pytest.mark.real_speech
def test_lines_of_a_window_are_in_the_journal_once_also_after_a_restart(tmp_path):
    def session():
        journal = Journal(tmp_path / "j", model="m", model_digest="d", sources={"a": str(VIDEO)})
        monitor = Monitor(Recognizer(WindowEngine()))
        from mmtransfer.monitoring import Camera

        items = monitor.watch([Camera(name="a", url=str(VIDEO))], journal=journal)
        return journal, items

    journal, items = session()
    first = [next(items) for _ in range(2)]
    items.close()
    journal.close()
    journal, items = session()
    rest = [item for item in items if isinstance(item, Transcript)]
    written = [json.loads(x) for path in journal.files for x in path.read_text().splitlines()]
    lines = [line for line in written if "text" in line]
    journal.close()
    assert all(isinstance(item, Transcript) for item in first)
    ids = [line["id"] for line in lines]
    assert {item.id for item in rest} <= set(ids)
    undisturbed = Monitor(Recognizer(WindowEngine())).transcribe(VIDEO)
    assert [i.partition("@")[2] for i in ids] == [t.id.partition("@")[2] for t in undisturbed]


@given(st.text(st.sampled_from("ab ,"), max_size=84))
def test_rows_hold_the_whole_line(text):
    text = " ".join(text.split())
    found = rows(text)
    assert len(found) <= 2
    assert " ".join(found) == text or "".join(found) == text


def test_rows_are_cut_behind_a_clause_near_the_middle():
    text = "When the crane is free, send the fitter to the north gate, and call me."
    found = rows(text)
    assert " ".join(found) == text
    assert [len(row) <= 42 for row in found] == [True, True]
    assert rows("The gate is open, " + "so close it now and lock it well") == [
        "The gate is open,",
        "so close it now and lock it well",
    ]
    assert rows("short") == ["short"]
    assert [len(row) for row in rows("字" * 60)] == [30, 30]


def window_of(count):
    """Pieces of two seconds with half a second between them."""
    pieces = tuple(
        segments.Piece(2.5 * n, 10 + 2.5 * n, 10 + 2.5 * n, 12 + 2.5 * n) for n in range(count)
    )
    samples = np.zeros(round(2.5 * count * SAMPLE_RATE), np.float32)
    return Segment(10.0, pieces[-1].end, samples, 10.0, pieces)


def talk(folder, samples):
    """A recording of that."""
    path = folder / "talk.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


class ForgetfulEngine(FakeEngine):
    """Ends behind the first piece of what is longer than it likes; notes what it was given."""

    window_s = 28.0

    def __init__(self, longest_s):
        super().__init__()
        self.longest_s, self.lengths = longest_s, []

    def decode(self, clips, context_s):
        self.lengths += [len(clip) / SAMPLE_RATE for clip in clips]
        return [self._decode(len(clip) / SAMPLE_RATE, context_s) for clip in clips]

    def _decode(self, seconds, context_s):
        ends = seconds if seconds <= self.longest_s else 1.0
        words = tuple(
            Word(f" w{at:.0f}" if at else "w0", at, at + 0.5, 0.9) for at in np.arange(0, ends, 1.0)
        )
        return Hypothesis("".join(w.text for w in words), (1,), -0.1, 0.0, context_s, words=words)


def test_how_much_of_a_window_has_text():
    window = window_of(4)
    words = (Word("a", 0.2, 0.4, 0.9), Word(" b", 2.6, 3.0, 0.9))
    assert text_ends_at(Hypothesis("a b", (1,), -0.1, 0.0, 30.0, words=words), window) == 2
    assert text_ends_at(Hypothesis("a b", (1,), -0.1, 0.0, 30.0), window) == 4


@pytest.mark.parametrize("longest_s", [100.0, 6.0])
def test_what_a_decoder_left_out_at_the_end_of_a_window_is_decoded_on_its_own(longest_s, tmp_path):
    second = round(SAMPLE_RATE / 512)
    samples = stream([3 * second, second, 3 * second, second, 3 * second, 4 * second])
    path = talk(tmp_path, samples)
    engine = ForgetfulEngine(longest_s)
    found = list(Monitor(Recognizer(engine)).transcribe(path))
    assert len({line.id.partition("#")[0] for line in found}) == 1
    covered = [
        at
        for at in (1.5, 5.5, 9.5)
        if any(x.start <= at + 1.5 and at - 1.5 <= x.end for x in found)
    ]
    assert len(covered) == 3
    assert sum(len(line.text.split()) for line in found) >= 9
    assert (len(engine.lengths) > 1) == (longest_s < 10)


class SkippingEngine(ForgetfulEngine):
    """Leaves out a window's beginning, whose time its first word takes."""

    def _decode(self, seconds, context_s):
        skipped_s = 3.0 if seconds > self.longest_s else 0.0
        words = [
            Word(f" w{at:.0f}", at, at + 0.5, 0.9) for at in np.arange(skipped_s, seconds - 0.5)
        ]
        words[0] = replace(words[0], start_s=0.0)
        text = "".join(word.text for word in words)
        return Hypothesis(text, (1,), -0.1, 0.0, context_s, words=tuple(words))


@pytest.mark.parametrize("longest_s", [100.0, 6.0, 0.0])
def test_what_a_decoder_left_out_before_a_pause_is_decoded_in_halves(longest_s, tmp_path):
    second = round(SAMPLE_RATE / 512)
    samples = stream([4 * second, second, 4 * second, 4 * second])
    path = talk(tmp_path, samples)
    engine = SkippingEngine(longest_s)
    found = list(Monitor(Recognizer(engine)).transcribe(path))
    whole, *halves = engine.lengths
    assert len(halves) == (0 if longest_s > 10 else 2)
    spoken = [word for line in found for word in line.text.split()]
    if longest_s:
        assert len(spoken) >= 8
        assert found[0].start < 1.0
    else:  # the halves lack as much, so the whole stays
        (alone,) = engine.decode([np.zeros(round(whole * SAMPLE_RATE), np.float32)], 30.0)
        assert spoken == alone.text.split()


def two_pieces() -> Segment:
    """A window of two pieces of two seconds, a second apart."""
    return Segment(
        10.0,
        15.0,
        np.zeros(5 * SAMPLE_RATE, np.float32),
        10.0,
        (Piece(0.0, 10.0, 10.0, 12.0), Piece(3.0, 13.0, 13.0, 15.0)),
    )


def decoded(text: str, *starts: float) -> Hypothesis:
    words = text.split(" ")
    timed = [
        Word(word if n == 0 else f" {word}", at, at + 0.2, 0.9)
        for n, (word, at) in enumerate(zip(words, starts, strict=True))
    ]
    return Hypothesis(text, (1,) * len(words), -0.1, 0.0, 30.0, words=tuple(timed))


def test_words_stay_in_the_line_in_which_they_were_although_their_times_are_inexact():
    # "door" seems to be spoken in the second piece, by its time.
    found = decoded("open the door close the gate", 0.1, 0.5, 3.1, 3.3, 3.6, 4.0)
    texts = [[line.text for line in lines] for lines in split_pieces(found, two_pieces())]
    assert texts == [["open the"], ["door close the gate"]]
    known = [[Line(10.0, 12.0, "Open the door.")], [Line(13.0, 15.0, "close a gate")]]
    lines = split_pieces(found, two_pieces(), known=known)
    assert [[line.text for line in own] for own in lines] == [["open the door"], ["close the gate"]]
    assert [(line.start, line.end) for own in lines for line in own] == [(10.0, 12.0), (13.0, 15.0)]


def test_a_piece_without_known_lines_gets_the_words_spoken_in_it():
    found = decoded("open the door close the gate", 0.1, 0.5, 1.1, 3.3, 3.6, 4.0)
    lines = split_pieces(found, two_pieces(), known=[[Line(10.0, 12.0, "open the door")], []])
    assert [[line.text for line in own] for own in lines] == [["open the door"], ["close the gate"]]


def test_the_text_of_the_last_piece_is_taken_out_of_a_window_with_its_own_times():
    window = two_pieces()
    alone = Segment(13.0, 15.0, np.zeros(3 * SAMPLE_RATE, np.float32), 12.0)
    # Attention lets the first word behind a pause begin in it.
    found = decoded("open the door close the gate", 0.1, 0.5, 1.1, 2.1, 3.6, 4.0)
    close = replace(found.words[3], end_s=3.6)
    found = replace(found, words=(*found.words[:3], close, *found.words[4:]))
    known = [[Line(10.0, 12.0, "open the door")], [Line(13.0, 15.0, "not this")]]
    own = last_piece(found, window, alone, known)
    assert (own.text, len(own.words)) == ("close the gate", 3)
    piece = window.pieces[1]
    moved_s = piece.samples_start - alone.samples_start - piece.offset_s
    assert own.words[-1].start_s == pytest.approx(4.0 + moved_s)
    assert alone.time_at(own.words[-1].start_s) == pytest.approx(window.time_at(4.0))
    assert own.avg_logprob == pytest.approx(own.word_logprob)
    assert last_piece(replace(found, words=()), window, alone, known).text == ""


def test_a_word_that_was_before_in_another_place_is_not_taken_for_it():
    # The new piece begins with words that the one before has as well.
    found = decoded("open the gate the gate", 0.1, 0.5, 1.1, 3.3, 3.9)
    known = [[Line(10.0, 12.0, "open the door and the gate")], []]
    lines = split_pieces(found, two_pieces(), known=known)
    assert [[line.text for line in own] for own in lines] == [["open the gate"], ["the gate"]]


@given(
    st.lists(st.sampled_from(list("abcdef")), min_size=1, max_size=12),
    st.lists(st.lists(st.sampled_from(list("abcdef")), max_size=6), min_size=2, max_size=2),
)
def test_all_words_are_given_to_lines_once_and_in_order(words, before):
    starts = [4.8 * n / len(words) for n in range(len(words))]
    found = decoded(" ".join(words), *starts)
    known = [
        [Line(start, start + 2, " ".join(own))] if own else []
        for start, own in zip((10.0, 13.0), before, strict=True)
    ]
    lines = split_pieces(found, two_pieces(), known=known)
    assert " ".join(line.text for own in lines for line in own if line.text) == " ".join(words)
    assert all(len(own) == 1 for own, had in zip(lines, known, strict=True) if had)
