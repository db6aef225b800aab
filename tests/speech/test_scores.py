import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtransfer.errors import UserError
from mmtransfer.speech.scores import (
    NORMALIZERS,
    ClipScore,
    default_normalizer,
    get_normalizer,
    score_clip,
    speech_metric,
    summarize_speech,
)
from mmtransfer.transfer.task import comparable


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
    english, basic = get_normalizer("english-v2"), get_normalizer("basic-v2")
    assert english("Press THREE, don't wait!") == english("press 3 do not wait")
    assert basic("Größe,  JA!") == "größe ja"
    assert english("$5.50 or 50% ... no.") == "$5.50 or 50% no"
    assert english("...") == english("— – -") == basic("...") == ""
    assert default_normalizer(None) == default_normalizer("en") == "english-v2"
    assert default_normalizer("de") == default_normalizer("hi") == "basic-v2"
    assert default_normalizer("zh") == default_normalizer("th") == "unspaced-v2"
    assert speech_metric("zh") == "cer"
    assert speech_metric(None) == "wer"
    with pytest.raises(UserError, match="english-v2"):
        get_normalizer("english-v9")


@pytest.mark.parametrize(
    ("language", "reference", "heard", "words", "chars"),
    [
        ("hi", "किताब", "कुतीब", (1, 1), (2, 5)),  # two vowel signs wrong
        ("hi", "प्राचीन किताब", "प्राचीन किताब।", (0, 2), (0, 13)),
        ("ta", "தமிழ்", "தமழ", (1, 1), (2, 5)),
        ("mr", "पाणी", "पाणि", (1, 1), (1, 4)),
        ("th", "ที่นี่", "ทีนี", (2, 2), (2, 6)),  # two tone marks left out
        ("my", "မြန်မာ", "မန်မာ", (1, 3), (1, 6)),
        ("km", "ខ្មែរ", "ខមែរ", (1, 3), (1, 5)),
        ("lo", "ນ້ຳ", "ນໍ້າ", (0, 2), (0, 4)),  # one letter, or its two parts
        (None, "किताब", "कुतीब", (1, 1), (2, 5)),  # a model that names no language
        ("ru", "мой", "мои", (1, 1), (1, 3)),
        ("tr", "İstanbul", "istanbul", (0, 1), (0, 8)),
        ("yo", "ọjọ́", "ọjọ", (1, 1), (1, 4)),
    ],
)
def test_marks_belong_to_their_letters(language, reference, heard, words, chars):
    score = score_clip(reference, heard, get_normalizer(default_normalizer(language)))
    assert (score.word_errors, score.words) == words
    assert (score.char_errors, score.chars) == chars


@pytest.mark.parametrize(
    ("language", "reference", "heard", "errors"),
    [
        ("ar", "كِتَابٌ", "كتاب", 0),
        ("ar", "ﺑِﺴْﻢِ", "بسم", 0),  # the letters' forms for printing
        ("ar", "كـــتاب", "كتاب", 0),
        ("ar", "سأل", "سال", 1),  # hamza makes another letter
        ("ur", "رحمٰن", "رحمن", 0),
        ("he", "שָׁלוֹם", "שלום", 0),
        ("he", "שלום", "שלים", 1),
        ("fa", "می\u200cروم", "میروم", 0),
        ("de", "Haus\u00adtür", "haustür", 0),
        ("de", "schon", "schön", 1),
        ("en", "café", "cafe", 0),
        ("en", "nice \u2764\ufe0f 1\ufe0f\u20e3", "nice 1", 0),
    ],
)
def test_what_may_be_left_out_is_no_error(language, reference, heard, errors):
    score = score_clip(reference, heard, get_normalizer(default_normalizer(language)))
    assert score.word_errors == errors


@pytest.mark.parametrize(
    ("language", "reference", "heard", "chars"),
    [
        ("zh", "这样的新股", "这样 的 新股。", (0, 5)),
        ("ja", "東京 タワー", "東京タワー", (0, 5)),
        ("th", "สวัสดี ครับ", "สวัสดีครับ", (0, 10)),
        ("yue", "我用 hot dog", "我用hot dog", (0, 8)),
        ("ko", "안녕 하세요", "안녕하세요", (1, 6)),  # written with spaces: they count
    ],
)
def test_white_space_counts_where_words_are_separated(language, reference, heard, chars):
    score = score_clip(reference, heard, get_normalizer(default_normalizer(language)))
    assert (score.char_errors, score.chars) == chars


def test_a_letter_is_a_word_where_words_are_not_separated():
    unspaced = get_normalizer("unspaced-v2")
    assert unspaced.words(unspaced("我用 iPhone 13 打电话")) == [*"我用", "iphone", "13", *"打电话"]
    assert score_clip("", "谢谢观看", unspaced).emitted == 4


def test_interval_covers_the_truth_about_95_times_in_100():
    """Clips with a known error rate of 0.2: the interval holds it in most repetitions."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        scores = [ClipScore(int(e), 10, 0, 50, 10) for e in rng.binomial(10, 0.2, 60)]
        result = summarize_speech(scores, normalizer="none-v1", bootstrap_samples=300, seed=seed)
        assert result.wer is not None
        assert result.ci_low is not None
        assert result.ci_high is not None
        assert result.ci_low <= result.wer <= result.ci_high
        covered += result.ci_low <= 0.2 <= result.ci_high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("emitted", [0, 3])
def test_rates_without_reference_words_are_undefined(emitted):
    scores = [ClipScore(emitted, 0, 3 * emitted, 0, emitted)] * 2
    for metric in ("wer", "cer"):
        found = summarize_speech(scores, normalizer="none-v1", metric=metric)
        assert (found.wer, found.cer, found.ci_low, found.ci_high) == (None,) * 4
        assert (found.silence_clips, found.hallucinated_words) == (2, 2 * emitted)
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["wer"] is None
        assert comparable(found.as_dict(), "wer") == 2 * emitted
    with pytest.raises(ValueError):
        summarize_speech([], normalizer="none-v1")


@given(st.lists(st.sampled_from(["gate", "two", "open", "北", "é"]), max_size=8))
def test_a_text_has_no_errors_against_itself(words):
    text = " ".join(words)
    for name in NORMALIZERS:
        score = score_clip(text, text, get_normalizer(name))
        assert score.word_errors == score.char_errors == 0
