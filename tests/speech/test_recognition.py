import copy
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EXAMPLE
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from mmtransfer.errors import UserError
from mmtransfer.hub.files import fetch
from mmtransfer.speech.audio import decode_clip
from mmtransfer.speech.contexts import (
    SILENCE_S,
    UNADAPTED_CONTEXT_S,
    WINDOW_S,
    clip_context_s,
    context_step_s,
    own_context_s,
    taught_context_s,
)
from mmtransfer.speech.engine import Hypothesis, Word
from mmtransfer.speech.guards import agreed, is_looping, rejection
from mmtransfer.speech.recognition import Recognizer
from mmtransfer.speech.whisper import encode_whisper, load_speech_model


@pytest.fixture(scope="module")
def tiny(whisper_tiny):
    return load_speech_model(str(whisper_tiny))


@pytest.fixture(scope="module")
def clips():
    paths = sorted(p for p in (EXAMPLE / "source").iterdir() if p.suffix != ".csv")[:3]
    return [decode_clip(path) for path in paths]


@given(
    st.floats(0.1, 40.0),
    st.floats(0.5, 29.0),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([1.5, 25.0, 30.0]),
)
def test_a_clip_fits_its_context_which_only_one_of_two_models_decodes(
    seconds, short_s, margin_s, shortest_s
):
    """An adapter for clips of up to `short_s` beside the source, which takes 20 s or more."""
    context = clip_context_s(
        seconds, shortest_s=shortest_s, longest_s=30.0, margin_s=margin_s, short_s=short_s
    )
    assert context >= max(min(seconds, 30.0) - 1e-4, shortest_s)
    own = own_context_s(min(short_s + margin_s, 30.0), 30.0)
    assert own in (UNADAPTED_CONTEXT_S, 30.0)
    if seconds > short_s:  # the source's own weights, which need silence at the end
        assert context >= own
        assert context == 30.0 or context - seconds >= UNADAPTED_CONTEXT_S - WINDOW_S
    else:
        assert context == context_step_s(max(seconds + margin_s, shortest_s), 30.0)
        if shortest_s == 1.5:
            assert context < own or context == 30.0


@given(st.floats(0.1, 40.0), st.floats(0.1, 40.0))
def test_only_clips_like_those_learnt_from_have_a_short_context(learnt_s, seconds):
    """What was learnt from clips of up to `learnt_s` holds them with a second of silence, if they
    are not much longer than a sentence; other speech has the source's 20 s.
    """
    shortest_s = taught_context_s(learnt_s, 30.0)
    assert shortest_s <= 8.0
    assert shortest_s >= min(learnt_s + 1.0, 8.0) - 1e-4
    context = clip_context_s(
        seconds, shortest_s=shortest_s, longest_s=30.0, short_s=shortest_s - SILENCE_S
    )
    assert context == shortest_s if seconds <= shortest_s - SILENCE_S else context >= 20.0


def test_a_fine_tuned_model_takes_longer_clips_in_the_sources_contexts(tiny):
    config = copy.deepcopy(tiny.model.config)
    config.shortest_context_s = 4.0
    model = SimpleNamespace(config=config, generation_config=tiny.model.generation_config)
    tuned = replace(tiny, model=model, short=None)
    contexts = [tuned.context_s(seconds) for seconds in (0.5, 3.0, 3.5, 19.0, 19.5)]
    assert contexts == [4, 4, 20, 20, 30]
    source = replace(tiny, short=None)
    assert [source.context_s(seconds) for seconds in (0.5, 19.0, 19.5)] == [20, 20, 30]


@pytest.fixture(scope="module")
def alone(tiny, clips):
    """What each of the clips is recognised as by itself."""
    return [Recognizer(tiny).transcribe([clip])[0] for clip in clips]


def test_full_window_is_the_models_own_encoder(tiny, clips):
    features = tiny.features(clips[:1], 30.0)
    with torch.inference_mode():
        expected = tiny.model.get_encoder()(features).last_hidden_state
        torch.testing.assert_close(encode_whisper(tiny.model, features), expected)


def test_short_contexts_encode_to_half_their_frames(tiny, clips):
    features = tiny.features(clips[:1], 3.5)
    assert features.shape == (1, 80, 350)
    with torch.inference_mode():
        assert encode_whisper(tiny.model, features).shape == (1, 175, 384)


def test_results_do_not_depend_on_the_batch(tiny, clips, alone):
    for batch_seconds in (45.0, 1000.0):  # two and three at once
        together = Recognizer(tiny, batch_seconds=batch_seconds).transcribe(clips)
        assert [h.tokens for h in together] == [h.tokens for h in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-3)


def test_a_batch_that_memory_does_not_hold_is_halved(tiny, clips, alone, monkeypatch):
    recognizer = Recognizer(tiny)
    whole, sizes = recognizer.engine.decode, []

    def limited(part, context_s):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("made here")
        return whole(part, context_s)

    monkeypatch.setattr(recognizer.engine, "decode", limited)
    assert [h.tokens for h in recognizer.transcribe(clips)] == [h.tokens for h in alone]
    assert sizes == [3, 1, 2]


class Threaded:
    """An engine of two workers that notes what it decodes, and how much of it at once."""

    workers, max_context_s, shortest_context_s, margin_s = 2, 30.0, 0.5, 0.0
    short_s, window_s = float("inf"), 0.0

    def __init__(self):
        self.batches, self.now, self.most = [], Counter[float](), Counter[float]()

    def decode(self, clips, context_s):
        self.batches.append((len(clips), context_s))
        self.now[context_s] += 1
        time.sleep(0.05)
        self.most[context_s] = max(self.most[context_s], self.now[context_s])
        self.now[context_s] -= 1
        return [Hypothesis("", (), 0.0, 0.0, context_s, True) for _ in clips]


def test_warm_up_takes_the_largest_batches_in_every_worker_at_once():
    engine = Threaded()
    Recognizer(engine, batch_seconds=40.0).warm_up(8)
    assert Counter(engine.batches) == {(8, 5.0): 2, (2, 16.0): 2, (1, 30.0): 4}
    assert engine.most == {5.0: 2, 16.0: 2, 30.0: 2}


def test_source_model_reads_general_speech(alone):
    assert all(len(h.text.split()) >= 3 for h in alone)
    assert all(h.avg_logprob > -1 for h in alone)


def test_no_clips_and_one_sample(tiny):
    recognizer = Recognizer(tiny)
    assert recognizer.transcribe([]) == []
    assert len(recognizer.transcribe([np.zeros(1, np.float32)])) == 1


@given(st.floats(0.0, 40.0), st.floats(0.0, 30.0))
def test_context_is_the_next_step_that_covers_the_clip(seconds, shortest):
    from types import SimpleNamespace

    from mmtransfer.hub.metadata import Base
    from mmtransfer.speech.whisper import SpeechModel

    speech = SpeechModel(
        SimpleNamespace(config=SimpleNamespace()),
        SimpleNamespace(feature_extractor=SimpleNamespace(chunk_length=30)),
        "x",
        None,
        Base("x"),
    )
    context = speech.context_s(seconds, shortest=shortest)
    assert context % 0.5 == 0
    assert 0.5 <= context <= 30
    assert context >= min(seconds, 30) - 1e-4
    assert context >= min(shortest, 30) - 1e-4
    wanted = max(seconds, shortest, 0.5)
    assert context <= wanted + max(0.5, wanted / 4)
    assert speech.shortest_context_s == 20.0


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("window_s", [0.0, 19.0])
def test_measured_contexts_and_windows_are_kept_with_the_model(
    whisper_tiny, tmp_path, form, window_s
):
    speech = load_speech_model("bundled:whisper-tiny.en", short_contexts=False)
    assert speech.shortest_context_s == 20.0
    speech.shortest_context_s, speech.window_s = 3.5, window_s
    adapted = None
    if form == "adapter":
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(copy.deepcopy(speech.model), lora)
    speech.save(tmp_path / "m", form, adapted)
    loaded = load_speech_model(str(tmp_path / "m"))
    assert (loaded.shortest_context_s, loaded.window_s) == (3.5, window_s)


def test_unusable_models_get_one_clear_line(tmp_path, random_whisper):
    from transformers import BertConfig

    for source, message in [
        (str(tmp_path), "expected a run folder"),
        (str(tmp_path / "nothing"), "no such model folder"),
        ("bundled:nothing", "no such bundled source"),
        ("someone/not-on-this-machine", "cannot be downloaded"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_speech_model(source)
        assert "\n" not in str(caught.value)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="expected a Whisper model, found 'bert'"):
        load_speech_model(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="English only"):
        load_speech_model(str(random_whisper), language="zh")
    with pytest.raises(UserError, match="no revisions"):
        fetch("bundled:whisper-tiny.en", "main")


def hypothesis(text, *, logprob=-0.2, no_speech=0.0, finished=True):
    return Hypothesis(text, (1,), logprob, no_speech, 20.0, finished)


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("go " * 5, True),
        ("go go go go", False),
        ("the gate is open, " * 5, True),
        ("the gate is open, the gate is shut, the gate is open, the gate is shut", False),
        ("好好好好好好", True),
        ("我们加油加油加油加油加油，快到了", True),  # beside other words
        ("नमस्ते " * 5, True),
        ("नमस्ते नमस्कार नमस्ते नमस्कार", False),
        ("one two three four five six seven eight nine ten", False),
        ("", False),
    ],
)
def test_loops_are_recognised(text, looping):
    assert is_looping(hypothesis(text)) is looping


def test_loops_with_small_changes_compress_too_well():
    text = " ".join(f"and then we went to the gate {n}" for n in range(30))
    assert hypothesis(text).compression_ratio > 2.4
    assert is_looping(hypothesis(text))
    assert is_looping(hypothesis("cut off by the token limit", finished=False))


@pytest.mark.parametrize(
    ("found", "seconds", "reason"),
    [
        (hypothesis("Gate two is open."), 2.0, None),
        (hypothesis(""), 2.0, "empty"),
        (hypothesis(" ... "), 2.0, "empty"),
        (hypothesis("Thanks for watching!", logprob=-1.2, no_speech=0.9), 2.0, "no speech"),
        (hypothesis("Sure of it.", logprob=-0.3, no_speech=0.9), 2.0, None),
        (hypothesis("Hard to hear.", logprob=-1.2, no_speech=0.3), 2.0, None),
        (hypothesis("Wxyz", logprob=-1.7), 2.0, "improbable"),
        (hypothesis("Huh?", logprob=-0.9), 0.4, "improbable"),
        (hypothesis("Yes.", logprob=-0.4), 0.4, None),
        (hypothesis("no " * 9), 2.0, "looping"),
        (hypothesis("and then we went over to the other gate and waited there"), 0.6, "too fast"),
        (hypothesis("and then we went over to the other gate and waited there"), 3.0, None),
        (hypothesis("สวัสดีครับผมกำลังเปิดประตูอยู่ตรงนี้นะครับ"), 2.4, None),
        (hypothesis("我们现在去三号门等你过来"), 2.0, None),
    ],
)
def test_guards(found, seconds, reason):
    assert rejection(found, seconds) == reason


@pytest.mark.parametrize(
    ("sentence", "times", "seconds", "looping"),
    [
        ("Zephrine five, the crane at Hexburn yard needs a pilot.", 2, 3.2, True),
        ("Zephrine five, the crane at Hexburn yard needs a pilot.", 2, 6.4, False),  # spoken twice
        ("Zephrine five, the crane at Hexburn yard needs a pilot.", 1, 1.6, False),
        ("No, no.", 2, 0.6, False),
    ],
)
@pytest.mark.parametrize("after", ["", " Open the gate."])
def test_a_sentence_that_comes_twice_in_the_time_of_one_loops(
    sentence, times, seconds, looping, after
):
    spoken = " ".join([sentence] * times).split()
    each = seconds / len(spoken)
    words = [Word(word, n * each, (n + 1) * each, 0.9) for n, word in enumerate(spoken)]
    words += [Word(w, seconds + n, seconds + n + 0.5, 0.9) for n, w in enumerate(after.split())]
    text = " ".join(spoken) + after
    assert is_looping(replace(hypothesis(text), words=tuple(words))) is looping
    if not after:  # the times of words are not always known
        assert is_looping(hypothesis(text), seconds) is looping


@pytest.mark.parametrize(("again_s", "looping"), [(0.1, True), (1.2, False)])
def test_a_sentence_that_comes_once_more_in_no_time_loops(again_s, looping):
    """Alignment may give the first one a pause before it, so that both have time enough."""
    sentence = "could you spell that for me please"
    words = [Word(w, 2 + n * 0.3, 2.3 + n * 0.3, 0.9) for n, w in enumerate(sentence.split())]
    words[0] = replace(words[0], start_s=0.0)
    end_s, each = words[-1].end_s, again_s / len(words)
    words += [
        Word(w, end_s + n * each, end_s + (n + 1) * each, 0.9)
        for n, w in enumerate(sentence.split())
    ]
    found = replace(hypothesis(f"{sentence} {sentence}"), words=tuple(words))
    assert is_looping(found) is looping
    assert rejection(found, 6.0) == ("looping" if looping else None)


AROUND = "Tower to crane three. {} Lower the hook slowly."


@pytest.mark.parametrize(
    ("texts", "seconds", "believed"),
    [
        # A word shouted six times, which two decodings have.
        (["Control. " * 6, "Control. " * 5], 4.0, "Control. " * 5),
        ([AROUND.format("Stop! " * 6)] * 2, 8.0, AROUND.format("Stop! " * 6)),
        (["Fire! " * 7, "gate", "Fire! " * 6], 3.0, "Fire! " * 6),
        (["controls " * 5, "control " * 6], 4.0, "control " * 5),  # two readings of one word
        (["stop now " * 5] * 2, 5.0, "stop now " * 5),
        (["加油" * 5 + "。"] * 2, 3.0, "加油" * 5 + "。"),
        (["बचाओ " * 6] * 2, 5.0, "बचाओ " * 6),
        # What nobody can say in the time goes; the text beside it stays.
        (["go " * 30] * 2, 4.0, None),
        (["control " * 30] * 3, 4.0, None),
        (["好" * 40] * 2, 4.0, None),
        ([AROUND.format("go " * 60)] * 2, 8.0, AROUND.format("")),
        # A loop has another length each time, or ends at the limit.
        (["you " * 6, "you " * 21], 8.0, None),
        ([AROUND.format("you " * 9), AROUND.format("you " * 30)], 9.0, AROUND.format("")),
        # One decoding alone, and decodings of which each has other words.
        (["Control. " * 6], 4.0, None),
        (["so we " * 5 + "left the old house", "no no no no no no"], 6.0, None),
        (["gate " * 6, "thank you " * 6], 6.0, None),
    ],
)
def test_repetition_stays_that_decodings_agree_on_and_the_duration_holds(texts, seconds, believed):
    found = agreed([hypothesis(text.strip()) for text in texts], seconds)
    assert (found and found.text.split()) == (believed and believed.split())


def test_a_refrain_stays_that_decodings_agree_on():
    refrain = "and then we all went down to the old stone bridge by the river "  # 14 words
    assert is_looping(hypothesis(refrain * 6))
    assert agreed([hypothesis(refrain * 6)] * 2, 30.0) is not None
    assert agreed([hypothesis(refrain * 6)] * 2, 5.0) is None
    assert agreed([hypothesis(refrain * 6), hypothesis("go " * 30)], 30.0) is None


def test_a_loop_that_never_ended_goes_and_its_words_with_it():
    words = ["Tower", "to", "crane.", *["go"] * 40]
    timed = tuple(Word(word, number / 10, number / 10, 1.0) for number, word in enumerate(words))
    endless = replace(hypothesis(" ".join(words), finished=False), words=timed)
    found = agreed([hypothesis("Tower to crane."), endless], 3.0)
    assert found is not None
    assert found.text == "Tower to crane."
    assert [word.text for word in found.words] == words[:3]
    cut_off = hypothesis("Tower to crane three lower", finished=False)
    assert agreed([cut_off, cut_off], 3.0) is None
