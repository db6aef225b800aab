"""What old generation settings do not say comes from the tokenizer."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import random_token

from mmtransfer.errors import UserError
from mmtransfer.speech.engines_transformers import TransformersWhisper, transformers_engine
from mmtransfer.speech.generation import complete_generation
from mmtransfer.speech.whisper import load_speech_model

DERIVED = [
    *("no_timestamps_token_id", "is_multilingual", "suppress_tokens", "begin_suppress_tokens"),
    *("alignment_heads", "max_length", "prev_sot_token_id", "max_initial_timestamp_index"),
]


def altered(source, folder, change):
    """A checkpoint with other generation settings; without any if there are none left."""
    shutil.copytree(source, folder)
    path = folder / "generation_config.json"
    settings = change(json.loads(path.read_text()))
    path.write_text(json.dumps(settings)) if settings else path.unlink()
    return folder


def settings_of(folder, **options):
    return load_speech_model(str(folder), **options).model.generation_config.to_dict()


def without(*names):
    return lambda settings: {k: v for k, v in settings.items() if k not in names}


@pytest.fixture(scope="module")
def own(whisper_tiny):
    """Settings that say it all."""
    return settings_of(whisper_tiny)


@pytest.mark.parametrize(
    "change",
    [
        # As transformers 4.25 wrote it, as some scripts leave it, and none at all.
        without(*DERIVED),
        lambda settings: {},
        pytest.param(without("no_timestamps_token_id", "alignment_heads"), marks=pytest.mark.slow),
        pytest.param(lambda settings: settings, marks=pytest.mark.slow),  # one that says it all
    ],
)
def test_what_old_settings_do_not_say_is_derived(own, whisper_tiny, tmp_path, change):
    found = settings_of(altered(whisper_tiny, tmp_path / "old", change))
    for name in DERIVED:
        expected, derived = own[name], found[name]
        if isinstance(expected, list):
            expected, derived = sorted(map(str, expected)), sorted(map(str, map(_listed, derived)))
        assert derived == expected, name


def _listed(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def test_what_settings_say_is_kept(random_whisper, tmp_path):
    said = {"suppress_tokens": [7], "begin_suppress_tokens": [], "alignment_heads": [[1, 1]]}
    folder = altered(random_whisper, tmp_path / "said", lambda settings: settings | said)
    found = settings_of(folder)
    assert {name: found[name] for name in said} == said


@pytest.fixture(scope="module")
def multilingual(random_whisper, tmp_path_factory):
    """A random Whisper that has languages, of tokens that lie in the English one's vocabulary."""
    folder = tmp_path_factory.mktemp("multilingual") / "model"
    vocabulary = load_speech_model(str(random_whisper)).processor.tokenizer.get_vocab()
    languages = {f"<|{code}|>": vocabulary[f"<|{code}|>"] for code in ("en", "de", "haw")}
    tasks = {name: vocabulary[f"<|{name}|>"] for name in ("transcribe", "translate")}
    own = {"is_multilingual": True, "lang_to_id": languages, "task_to_id": tasks}
    return altered(random_whisper, folder, lambda settings: settings | own)


@pytest.mark.parametrize(
    ("said", "language"),
    [
        ({"lang_to_id": None, "task_to_id": None}, "de"),
        ({"language": "German"}, None),
        (
            {
                "lang_to_id": {
                    "english": random_token(50258),
                    "German": random_token(50260),
                    "<|haw|>": random_token(50350),
                }
            },
            "de",
        ),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({"task_to_id": None}, "haw"),
                ({"language": "german"}, None),
                ({"language": "<|de|>"}, None),
                ({}, "de"),  # one that says it all
            )
        ),
    ],
)
def test_languages_have_one_spelling(multilingual, tmp_path, said, language):
    kept = {name: value for name, value in said.items() if value is not None}
    change = lambda settings: without(*said)(settings) | kept  # noqa: E731
    speech = load_speech_model(
        str(altered(multilingual, tmp_path / "m", change)), language=language
    )
    vocabulary = speech.processor.tokenizer.get_vocab()
    wanted = ["startoftranscript", language or "de", "transcribe", "notimestamps"]
    assert speech.prompt(timestamps=False) == [vocabulary[f"<|{name}|>"] for name in wanted]


@pytest.mark.slow
def test_an_old_model_is_decoded_like_a_new_one(whisper_tiny, tmp_path, speech):
    old = altered(whisper_tiny, tmp_path / "old", without(*DERIVED))
    texts = []
    for folder in (whisper_tiny, old):
        engine = transformers_engine(load_speech_model(str(folder)))
        assert isinstance(engine, TransformersWhisper)
        texts.append(engine.decode([speech[: 4 * 16_000]], 20.0)[0].text)
    assert texts[0] == texts[1]
    assert texts[0]


@pytest.fixture(scope="module")
def loaded(random_whisper):
    return load_speech_model(str(random_whisper))


def test_a_tokenizer_is_loaded_once_until_its_files_change(random_whisper, tmp_path):
    folder = shutil.copytree(random_whisper, tmp_path / "model")
    first, second = (load_speech_model(str(folder)).processor.tokenizer for _ in range(2))
    assert first is second
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    path.write_text(json.dumps(content), encoding="utf-8")
    changed = load_speech_model(str(folder)).processor.tokenizer
    assert len(changed("gate").input_ids) > len(first("gate").input_ids)


class _Tokenizer:
    """Has these tokens alone."""

    def __init__(self, *tokens):
        self._tokens = {token: number for number, token in enumerate(tokens)}

        self.backend_tokenizer = SimpleNamespace(token_to_id=self._tokens.get)

    def get_vocab(self):
        return self._tokens


@pytest.mark.parametrize(
    ("tokens", "settings", "missing"),
    [
        (["<|en|>"], {}, r"<\|notimestamps\|>"),
        (["<|notimestamps|>"], {"is_multilingual": True}, r"<\|en\|>"),
        (["<|notimestamps|>", "<|en|>"], {"is_multilingual": True}, r"<\|transcribe\|>"),
    ],
)
def test_what_cannot_be_derived_is_one_line(
    tmp_path, loaded, tokens, settings, missing, monkeypatch
):
    model = loaded.model
    for name in (*DERIVED, "lang_to_id", "task_to_id"):
        monkeypatch.setattr(model.generation_config, name, settings.get(name), raising=False)
    with pytest.raises(UserError, match=missing) as error:
        complete_generation(model, _Tokenizer(*tokens), tmp_path, tmp_path)
    assert "\n" not in str(error.value)
