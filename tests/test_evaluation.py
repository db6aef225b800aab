import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtransfer.errors import UserError
from mmtransfer.evaluation import (
    ClipScore,
    default_normalizer,
    get_normalizer,
    score_clip,
    speech_metric,
    summarize_speech,
)


def test_hand_computed_rates():
    plain = get_normalizer("none-v1")
    scores = [
        score_clip("a b c d", "a x c", plain),  # one substitution, one deletion
        score_clip("e f", "e f g", plain),  # one insertion
        score_clip("", "", plain),
        score_clip("", "thank you", plain),  # two words out of nothing
    ]
    result = summarize_speech(scores, normalizer="none-v1")
    assert result.wer == pytest.approx((2 + 1 + 0 + 2) / 6)
    assert result.cer == pytest.approx((1 + 2 + 2 + 9) / (7 + 3))
    assert (result.clips, result.words) == (4, 6)
    assert (result.silence_clips, result.hallucinated_words) == (2, 2)


def test_normalizers():
    english, basic = get_normalizer("english-v1"), get_normalizer("basic-v1")
    assert english("Press THREE, don't wait!") == english("press 3 do not wait")
    assert basic("Größe,  JA!") == "größe ja"
    assert default_normalizer(None) == default_normalizer("en") == "english-v1"
    assert default_normalizer("zh") == "basic-v1"
    assert speech_metric("zh") == "cer"
    assert speech_metric(None) == "wer"
    with pytest.raises(UserError, match="english-v1"):
        get_normalizer("english-v9")


def test_interval_covers_the_truth_about_95_times_in_100():
    """Clips with a known error rate of 0.2: the interval holds it in most repetitions."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        scores = [ClipScore(int(e), 10, 0, 50, 10) for e in rng.binomial(10, 0.2, 60)]
        result = summarize_speech(scores, normalizer="none-v1", bootstrap_samples=300, seed=seed)
        assert result.ci_low <= result.wer <= result.ci_high
        covered += result.ci_low <= 0.2 <= result.ci_high
    assert 0.88 <= covered / 200 <= 0.99


def test_only_silence():
    quiet = summarize_speech([ClipScore(0, 0, 0, 0, 0)], normalizer="none-v1")
    assert (quiet.wer, quiet.hallucinated_words) == (0.0, 0)
    loud = summarize_speech([ClipScore(3, 0, 9, 0, 3)], normalizer="none-v1")
    assert loud.wer == float("inf")
    with pytest.raises(ValueError):
        summarize_speech([], normalizer="none-v1")


@given(st.lists(st.sampled_from(["gate", "two", "open", "北", "é"]), max_size=8))
def test_a_text_has_no_errors_against_itself(words):
    text = " ".join(words)
    for name in ("english-v1", "basic-v1", "none-v1"):
        score = score_clip(text, text, get_normalizer(name))
        assert score.word_errors == score.char_errors == 0
