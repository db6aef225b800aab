import pytest

from mmtransfer.data.languages import normal_language, read_language
from mmtransfer.errors import UserError


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["en", "EN", "en-US", "en_GB", "English", " english ", "eng", "<|en|>"], "en"),
        (["American English", "English (US)", "english-uk", "en_US.UTF-8"], "en"),
        (["zh", "ZH-cn", "zh_TW", "zh-Hant-TW", "Chinese", "mandarin", "cmn-Hans-CN", "zho"], "zh"),
        (["Chinese (Simplified)", "中文"], "zh"),
        (["yue", "Cantonese", "zh-yue"], "yue"),
        (["pt-BR", "Brazilian Portuguese", "PORTUGUESE"], "pt"),
        (["iw", "he", "heb", "Hebrew"], "he"),
        (["de", "ger", "deu", "Deutsch", "German"], "de"),
        (["ga", "ga-IE"], "ga"),
        (["gsw", "gsw-CH"], "gsw"),
    ],
)
def test_every_name_of_a_language_becomes_one_code(names, code):
    assert [normal_language(name) for name in names] == [code] * len(names)


@pytest.mark.parametrize(
    "name",
    ["", "auto", "klingon", "xx", "xx-YY", "und", "en/zh", "n/a", "orig", "1", "not English"],
)
def test_what_names_no_language_is_refused(name):
    assert normal_language(name) is None
    with pytest.raises(UserError, match=r"^a\.csv:2: expected a language such as en, en-US"):
        read_language(name, "a.csv:2")


def test_every_name_that_whisper_has_is_known():
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    for code, name in LANGUAGES.items():
        assert normal_language(code) == normal_language(name) == code
    for name, code in TO_LANGUAGE_CODE.items():
        assert normal_language(name) == code
