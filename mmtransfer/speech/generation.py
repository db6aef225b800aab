"""What a Whisper's files say of tokens and attention heads, checked before an engine takes it.

CTranslate2 uses these numbers as places in memory, whatever they are. Files from before
transformers 4.26 say little; the rest is derived from the tokenizer, as Whisper's released code
does (whisper/tokenizer.py).
"""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from mmtransfer.data.languages import normal_language
from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
_START = ("decoder_start_token_id", "eos_token_id")
_OTHERS = ("bos_token_id", "pad_token_id", "prev_sot_token_id")
_START_TOKEN = "<|startoftranscript|>"
_LANGUAGE_TOKEN = re.compile(r"<\|([a-z]{2,3})\|>")
_TASKS = ("transcribe", "translate")
_MULTILINGUAL_SIZE = 51865  # one more than the vocabulary of English-only models
# Beside words there are signs that nobody says; a model that may write them describes sounds.
_SIGNS = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』', "<<", ">>", "<<<", ">>>", "--", "---", "-(", "-["]
_SIGNS += ["('", '("', "((", "))", "(((", ")))", "[[", "]]", "{{", "}}", "♪♪", "♪♪♪"]
_NOTES = "♩♪♫♬♭♮♯"  # of which the first byte is enough
_WORD_STARTS = (" -", " '")
_NEVER_TEXT = ("startoftranscript", "startofprev", "startoflm", "nospeech", "nocaptions", *_TASKS)
_LATEST_START = 50  # of the first timestamp: one second
_SIZES = {  # decoder layers and heads
    (4, 6): "tiny",
    (6, 8): "base",
    (12, 12): "small",
    (24, 16): "medium",
    (32, 20): "large",
    (4, 20): "large-v3-turbo",
}
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
_NO_TOKEN = -1  # as an element of these two, also in transformers


def check_config(config: Any, folder: Path) -> None:
    """Make sure that a Whisper's configuration, from that folder, names tokens that it has.

    Raises:
        UserError: the file, the field, what was found there and what it may be.
    """
    path, tokens = folder / "config.json", range(config.vocab_size)
    for name in _START:
        _check(path, name, [getattr(config, name, None)], tokens)
    for name in _OTHERS:
        _check(path, name, _listed(getattr(config, name, None)), tokens)


def complete_generation(model: Any, tokenizer: Any, folder: Path, weights: Path) -> None:
    """Fill in what a Whisper's generation settings do not say, from its tokenizer; and spell the
    languages in them as its tokens do.

    Raises:
        UserError: what is missing, and the tokenizer lacks as well.
    """
    settings, path = model.generation_config, _settings_file(folder, weights)

    def token(name: str) -> int:
        found = token_number(tokenizer, name)
        if found is None:
            raise UserError(
                f"{path}: it lacks <|{name}|>, and the tokenizer does not have it. "
                "Take both files of the model that this one was made from."
            )
        return int(found)

    def lacks(name: str) -> bool:
        return getattr(settings, name, None) is None

    if lacks("no_timestamps_token_id"):
        settings.no_timestamps_token_id = token("notimestamps")
    if lacks("is_multilingual"):
        has_languages = not lacks("lang_to_id") or model.config.vocab_size >= _MULTILINGUAL_SIZE
        settings.is_multilingual = has_languages
    if settings.is_multilingual:
        _complete_languages(settings, tokenizer, path)
        if lacks("task_to_id"):
            settings.task_to_id = {name: token(name) for name in _TASKS}
    end = model.config.eos_token_id
    if lacks("suppress_tokens"):
        settings.suppress_tokens = _not_spoken(tokenizer)
    if lacks("begin_suppress_tokens"):
        settings.begin_suppress_tokens = [*_ids(tokenizer, " ")[:1], end]
    if lacks("alignment_heads"):
        settings.alignment_heads = _published_heads(model.config, settings.is_multilingual)
    # What plain pipelines need of a model that is saved from here.
    if lacks("prev_sot_token_id"):
        settings.prev_sot_token_id = token_number(tokenizer, "startofprev")
    if lacks("max_length"):
        settings.max_length = model.config.max_target_positions
    if lacks("max_initial_timestamp_index"):
        settings.max_initial_timestamp_index = _LATEST_START


def token_number(tokenizer: Any, name: str) -> int | None:
    """The number of the token `<|name|>`; None if the tokenizer does not have it."""
    # Not from `get_vocab`, which makes a dictionary of all tokens at every call.
    found = tokenizer.backend_tokenizer.token_to_id(f"<|{name}|>")
    return None if found is None else int(found)


def _complete_languages(settings: Any, tokenizer: Any, path: Path) -> None:
    known = getattr(settings, "lang_to_id", None)
    if known is None:
        vocabulary = tokenizer.get_vocab()
        found = {name: i for name, i in vocabulary.items() if _LANGUAGE_TOKEN.fullmatch(name)}
        if not found:
            raise UserError(
                f"{path}: it lacks languages, and the tokenizer has none (<|en|>). Take "
                "both files of the model that this one was made from."
            )
        settings.lang_to_id = found
    elif isinstance(known, dict):
        settings.lang_to_id = {f"<|{_code(name)}|>": token for name, token in known.items()}
    if isinstance(getattr(settings, "language", None), str):
        settings.language = _code(settings.language)


def _code(name: str) -> str:
    """A language's code by whatever files of transformers call it: `<|de|>`, `de`, `German`."""
    return normal_language(str(name)) or str(name).strip("<|>").strip().lower()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _not_spoken(tokenizer: Any) -> list[int]:
    """Tokens that are no speech: signs that are one token, and those that only steer."""
    found = {token for text in _WORD_STARTS for token in _ids(tokenizer, text)[:1]}
    for sign in (*_SIGNS, *_NOTES):
        for text in (sign, f" {sign}"):
            tokens = _ids(tokenizer, text)
            if len(tokens) == 1 or sign in _NOTES:
                found.update(tokens[:1])
    steering = (token_number(tokenizer, name) for name in _NEVER_TEXT)
    return sorted(found | {token for token in steering if token is not None})


def _published_heads(config: Any, is_multilingual: bool) -> list[list[int]] | None:
    """Attention heads that follow the audio in the published model of that size, as CTranslate2
    lists them; None for another size.
    """
    from ctranslate2.converters import transformers as converters

    size = _SIZES.get((config.decoder_layers, config.decoder_attention_heads))
    if size == "large" and config.num_mel_bins != 128:
        size = "large-v2"
    elif size == "large":
        size = "large-v3"
    elif size is not None and not is_multilingual:
        size += ".en"
    listed = getattr(converters, "_WHISPER_ALIGNMENT_HEADS", {})
    heads = listed.get(f"openai/whisper-{size}")
    return [list(pair) for pair in heads] if heads else None


def _settings_file(folder: Path, weights: Path) -> Path:
    path = folder / "generation_config.json"
    return path if path.is_file() else weights / "config.json"


def check_generation(model: Any, tokenizer: Any, folder: Path, weights: Path) -> None:
    """Make sure that tokenizer and generation settings name tokens that a Whisper has.

    They come from `folder`, or the settings from `weights` where they are in the configuration.
    Attention heads that it does not have are left out of the settings: distilled models inherit
    their teacher's.

    Raises:
        UserError: the file, the field, what was found there and what it may be.
    """
    generation = _settings_file(folder, weights)
    tokens = range(model.config.vocab_size)
    settings = model.generation_config
    no_timestamps = getattr(settings, "no_timestamps_token_id", None)
    _check(generation, "no_timestamps_token_id", [no_timestamps], tokens)
    for name in (*_START, *_OTHERS):
        _check(generation, name, _listed(getattr(settings, name, None)), tokens)
    for name in _SUPPRESSED:
        found = getattr(settings, name, None)
        kept = [token for token in _listed(found) if token != _NO_TOKEN]
        _check(generation, name, kept, tokens)
        setattr(settings, name, kept)
    for _, token in _pairs(generation, settings, "forced_decoder_ids", "[position, token]"):
        _check(generation, "forced_decoder_ids", _listed(token), tokens)
    for name, needed in (("lang_to_id", set()), ("task_to_id", {"transcribe"})):
        found = getattr(settings, name, None)
        if found is None and not getattr(settings, "is_multilingual", False):
            continue
        if not isinstance(found, dict) or not found or not found.keys() >= needed:
            what = ", ".join(["names with their token ids", *needed])
            raise _wrong(generation, name, what, found)
        _check(generation, name, found.values(), tokens)
    start = model.config.decoder_start_token_id
    _check_vocabulary(folder / "tokenizer.json", tokenizer.get_vocab(), tokens, start)
    _keep_heads(generation, model)


def _check_vocabulary(path: Path, vocabulary: dict[str, int], tokens: range, start: int) -> None:
    last, number = max(vocabulary.items(), key=itemgetter(1))
    _check(path, repr(last), [number], tokens)
    count = len(set(vocabulary.values()))
    if count != number + 1:  # CTranslate2 numbers them by their order
        raise _wrong(path, "vocabulary", f"all token ids from 0 to {number}", count)
    if vocabulary.get(_START_TOKEN) != start:
        raise _wrong(path, _START_TOKEN, f"the start token, {start}", vocabulary.get(_START_TOKEN))


def _keep_heads(path: Path, model: Any) -> None:
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    found = _pairs(path, model.generation_config, "alignment_heads", "[layer, head]")
    for number in (number for pair in found for number in pair):
        if type(number) is not int:
            raise _wrong(path, "alignment_heads", "pairs [layer, head] of integers", number)
    kept = [pair for pair in found if pair[0] in range(layers) and pair[1] in range(heads)]
    if len(kept) < len(found):
        logger.warning(
            "%s: alignment_heads: %d of %d are not in this model (layers 0 to %d, heads 0 to %d); "
            "times of words come from %s",
            path,
            len(found) - len(kept),
            len(found),
            layers - 1,
            heads - 1,
            "the others" if kept else "the upper half of the layers",
        )
    model.generation_config.alignment_heads = kept or None  # None: the upper half


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pairs(path: Path, settings: Any, name: str, form: str) -> list[Any]:
    found = _listed(getattr(settings, name, None))
    for pair in found:
        if len(_listed(pair)) != 2:
            raise _wrong(path, name, f"pairs {form}", pair)
    return found


def _check(path: Path, name: str, values: Iterable[Any], allowed: range) -> None:
    for value in values:
        if type(value) is not int or value not in allowed:
            raise _wrong(path, name, f"a token id from 0 to {allowed.stop - 1}", value)


def _wrong(path: Path, name: str, expected: str, found: Any) -> UserError:
    return UserError(
        f"{path}: {name}: expected {expected}, found {reprlib.repr(found)}. Correct it, or take "
        "the file of the model that this one was made from."
    )
