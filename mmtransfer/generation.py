"""What a Whisper's files say of tokens and attention heads, checked before an engine takes it.

CTranslate2 uses these numbers as places in memory, whatever they are.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError

logger = logging.getLogger(__name__)
_START = ("decoder_start_token_id", "eos_token_id")
_OTHERS = ("bos_token_id", "pad_token_id", "prev_sot_token_id")
_START_TOKEN = "<|startoftranscript|>"
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


def check_generation(model: Any, tokenizer: Any, folder: Path, weights: Path) -> None:
    """Make sure that tokenizer and generation settings name tokens that a Whisper has.

    They come from `folder`, or the settings from `weights` where they are in the configuration.
    Attention heads that it does not have are left out of the settings: distilled models inherit
    their teacher's.

    Raises:
        UserError: the file, the field, what was found there and what it may be.
    """
    generation = folder / "generation_config.json"
    if not generation.is_file():
        generation = weights / "config.json"
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
    last = max(vocabulary, key=lambda token: vocabulary[token])
    _check(path, repr(last), [vocabulary[last]], tokens)
    count = len(set(vocabulary.values()))
    if count != vocabulary[last] + 1:  # CTranslate2 numbers them by their order
        raise _wrong(path, "vocabulary", f"all token ids from 0 to {vocabulary[last]}", count)
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
