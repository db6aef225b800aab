"""What a model's JSON files may say: numbers that become sizes and loops have limits, far beyond
what models have, and below what a machine cannot do.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmtransfer.data.files import read_object
from mmtransfer.errors import UserError

_SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_TOKENIZER, _ADDED = "tokenizer.json", "added_tokens.json"
_MOST_BYTES = 64 << 20  # of settings; names of a million classes take half of it
# By the ends of names; the first that fits counts.
_LIMITS = (
    (re.compile(r"(?:^|_)(?:n_)?layers?$"), 0, 1000),
    (re.compile(r"^num_labels$"), 0, 1_000_000),
    (re.compile(r"^(?:feature_size|num_mel_bins|num_mel_filters)$"), 1, 4096),
    (re.compile(r"^(?:n_fft|hop_length|win_length|frame_length)$"), 1, 1 << 17),
    (re.compile(r"^chunk_length$"), 1, 3600),
    (re.compile(r"^sampling_rate$"), 1, 1_000_000),
    (re.compile(r"^(?:nb_max_frames|n_samples)$"), 1, 1 << 27),
    (re.compile(r"(?:_size|_dim|^d_model|_width)$"), -1, 10_000_000),
    (re.compile(r"_heads$"), 1, 10_000),
    (re.compile(r"(?:_positions|_embeddings|_groups|_buckets|_kernel|_stride)$"), -1, 1e8),
    (re.compile(r"(?:_eps|_epsilon)$"), 0, 1),
)
_NAMES = ("id2label", "label2id", "lang_to_id", "task_to_id")  # whose keys are no settings
_MOST_ADDED = 100_000  # tokens beside the vocabulary; a library takes a minute for a million
_MOST_PADDING = 1 << 20
_ENDLESS = re.compile(r"[+*}][?+]?\)[+*{]")
_MOST_GROWTH = 64  # of a text by what normalises it


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file of a model, within limits.

    Raises:
        UserError: see `read_object`; a number beyond them.
    """
    stat = path.stat() if path.exists() else None
    mark = (stat.st_size, stat.st_mtime_ns, stat.st_ino) if stat is not None else None
    return dict(_read_settings(path, mark))


@lru_cache(maxsize=64)
def _read_settings(path: Path, mark: Any) -> dict[str, Any]:
    found = read_object(path, most=_MOST_BYTES)
    _check(path, found)
    return found


def _check(path: Path, found: dict[str, Any], within: str = "") -> None:
    for key, value in found.items():
        name = f"{within}{key}"
        if isinstance(value, dict):
            if key not in _NAMES:
                _check(path, value, f"{name}.")
            continue
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float):
                _check_number(path, name, key, number)


def _check_number(path: Path, name: str, key: str, number: float) -> None:
    for pattern, low, high in _LIMITS:
        if pattern.search(key):
            if not low <= number <= high:
                raise UserError(
                    f"{path}: {name:.80}: expected a number from {low:g} to {high:g}, found "
                    f"{reprlib.repr(number)}. Correct it, or save or download the model again."
                )
            return


def check_labels(labels: Any, path: Path) -> None:
    """Make sure that the classes in a file of a model have distinct names.

    Raises:
        UserError: none, no text, an empty name, or one that occurs twice.
    """
    names = labels if isinstance(labels, list) else []
    is_named = names and all(isinstance(name, str) and name.strip() for name in names)
    twice = next((name for name, count in Counter(map(str, names)).items() if count > 1), None)
    if not is_named or twice is not None:
        found = f"{twice!r:.60} twice" if is_named else reprlib.repr(labels)
        raise UserError(
            f"{path}: expected distinct names of the classes, found {found}. Name each class, or "
            "save or download the model again."
        )


def check_settings(folder: Path) -> None:
    """Make sure that the JSON files which libraries load of a model are within limits.

    Raises:
        UserError: the first file and field that is not.
    """
    for name in _SETTINGS:
        if (folder / name).is_file():
            read_settings(folder / name)
    added = folder / _ADDED
    if added.is_file():
        _check_added(added, read_object(added))
    tokenizer = folder / _TOKENIZER
    if tokenizer.is_file():
        stat = tokenizer.stat()
        _check_tokenizer(tokenizer, (stat.st_size, stat.st_mtime_ns, stat.st_ino))
    named = folder / "tokenizer_config.json"
    if named.is_file():
        _check_added(named, read_settings(named).get("added_tokens_decoder"))


def _check_added(path: Path, tokens: Any) -> None:
    if isinstance(tokens, (list, dict)) and len(tokens) > _MOST_ADDED:
        raise UserError(
            f"{path}: expected at most {_MOST_ADDED} tokens beside the vocabulary, found "
            f"{len(tokens)}. Save or download the model again."
        )


@lru_cache(maxsize=16)
def _check_tokenizer(path: Path, mark: Any) -> None:
    found = read_object(path)
    _check_added(path, found.get("added_tokens"))
    padding = found.get("padding")
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        fixed = strategy.get("Fixed") if isinstance(strategy, dict) else None
        for number in (fixed, padding.get("pad_to_multiple_of")):
            if isinstance(number, int) and not 0 <= number <= _MOST_PADDING:
                raise UserError(
                    f"{path}: padding: expected a length up to {_MOST_PADDING}, found "
                    f"{reprlib.repr(number)}. Save or download the model again."
                )
    for part in ("normalizer", "pre_tokenizer"):
        steps = list(_steps(found.get(part)))
        for step in steps:
            pattern = step.get("pattern")
            regex = str(pattern.get("Regex", "")) if isinstance(pattern, dict) else ""
            if _ENDLESS.search(regex):
                raise UserError(
                    f"{path}: {part}: expected a regular expression that ends, found "
                    f"{regex!r:.80}, which repeats what repeats itself."
                )
        _check_growth(path, part, steps)


def _steps(found: Any) -> Iterable[dict[str, Any]]:
    """The parts of a normaliser or pre-tokenizer in their order."""
    if not isinstance(found, dict):
        return
    for name in ("normalizers", "pretokenizers"):
        inner = found.get(name)
        if isinstance(inner, list):
            for part in inner:
                yield from _steps(part)
            return
    yield found


def _check_growth(path: Path, part: str, steps: list[dict[str, Any]]) -> None:
    """Make sure that a text does not grow without end while it is normalised: each step is played
    through on all characters that any of them replaces.
    """
    replaced = [step for step in steps if step.get("type") == "Replace"]
    patterns = [_literal(step) for step in replaced]
    contents = [str(step.get("content", "")) for step in replaced]
    probe = "".join(sorted(set("".join([*patterns, *contents])) | {"a"}))
    probe += " ".join(patterns)
    most = _MOST_GROWTH * (len(probe) + max(map(len, contents), default=0))
    text = probe
    for pattern, content in zip(patterns, contents, strict=True):
        # What a regular expression finds may be each character.
        count = text.count(pattern) if pattern else len(text)
        if len(text) + count * len(content) > most:
            raise UserError(
                f"{path}: {part}: a text grows more than {_MOST_GROWTH}-fold in it. Save or "
                "download the model again."
            )
        text = text.replace(pattern, content) if pattern else text + count * content


def _literal(step: dict[str, Any]) -> str:
    pattern = step.get("pattern")
    return str(pattern.get("String", "")) if isinstance(pattern, dict) else ""
