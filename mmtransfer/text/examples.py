"""Target data for text classification: sets, labels, splits, leak checks."""

from __future__ import annotations

import logging
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmtransfer.config import DataConfig, text_columns
from mmtransfer.data.tables import as_file, numbered_rows, plain, with_columns
from mmtransfer.errors import UserError
from mmtransfer.progress import track
from mmtransfer.speech.clips import connected

logger = logging.getLogger(__name__)
_NAMED_SKIPS = 3
_TOLERATED_LEAK = 0.01


@dataclass(frozen=True)
class TextExample:
    """A text with its class."""

    text: str
    """White space is single spaces."""
    label: str
    """Name of the class; empty where there is none."""
    target: str | None = None
    """What the sentiment is about."""
    group: str | None = None
    """What must stay in one split: article, author, product."""
    name: str = ""
    """Short name for messages: the file and the line (Parquet and Hub: the row, from 1)."""


@dataclass(frozen=True)
class TextSet:
    """The usable examples of one split, and what was left out."""

    name: str
    examples: list[TextExample]
    skipped: list[str] = field(default_factory=list)
    """One line per row that could not be used, with the reason."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def size(self) -> str:
        """How large it is, in words."""
        return f"{len(self)} texts"

    def subset(self, name: str, indices: Sequence[int], *, skipped: bool = False) -> TextSet:
        """Some of its examples; with `skipped` what was left out stays listed."""
        return TextSet(name, [self.examples[i] for i in indices], self.skipped if skipped else [])

    def report(self) -> dict[str, Any]:
        """Its entry in report.json."""
        counts = Counter(example.label for example in self.examples)
        return {
            "examples": len(self),
            "labels": dict(sorted(counts.items())),
            "skipped": len(self.skipped),
            "first_skipped": self.skipped[:10],
        }


# --- reading -------------------------------------------------------------------------------------


def read_texts(source: str, config: DataConfig, *, name: str, split: str = "train") -> TextSet:
    """Read a set of texts (see `tables.numbered_rows` for what `source` and `split` mean).

    Rows without a text or without a label are left out and listed.
    Numbers become the label that they are written as: 1 and 1.0 are "1", True is "true".

    Raises:
        UserError: see `tables.numbered_rows`; a column that is missing or has two roles; a cell
            that is no text or number; nothing usable is left.
    """
    columns = text_columns(config)
    rows = numbered_rows(source, split=split)
    rows = with_columns(source, rows, columns, {"text_column", "label_column"})
    path = as_file(source)
    short = path.name if path else source if ":" in source else f"{source}:{split}"
    roles = ("text_column", "label_column", "target_column", "group_column")
    named = [columns[role] for role in roles]
    examples: list[TextExample] = []
    skipped: list[str] = []
    for number, row in track(rows, f"reading {name}"):
        where = f"{short}:{number}"
        text, label, target, group = (
            plain(row.get(column), where, column) if column is not None else "" for column in named
        )
        if not text or not label:
            empty = columns["label_column" if text else "text_column"]
            skipped.append(f"{where}: column '{empty}' is empty.")
            continue
        examples.append(TextExample(text, label, target or None, group or None, where))
    if not examples:
        raise UserError(
            f"{source}: expected rows with a text and a label, found none among {len(skipped)}. "
            f"First: {skipped[0]}"
        )
    for line in skipped[:_NAMED_SKIPS]:
        logger.warning("skipped: %s", line)
    if len(skipped) > _NAMED_SKIPS:
        more = len(skipped) - _NAMED_SKIPS
        logger.warning("skipped: %d more rows of '%s', for the same reasons", more, name)
    _warn_of_copies(name, examples, columns)
    return TextSet(name, examples, skipped)


def _warn_of_copies(
    name: str, examples: Sequence[TextExample], columns: Mapping[str, str | None]
) -> None:
    """Say which columns stand for the label one to one: they may hold the answer itself."""
    labels = {example.label for example in examples}
    if not 2 <= len(labels) <= len(examples) // 2:
        return
    for role in ("text", "target", "group"):
        found: dict[str, str] = {}
        for example in examples:
            value = getattr(example, role)
            if value is None or found.setdefault(value, example.label) != example.label:
                break
            if len(found) > len(labels):
                break
        else:
            if len(set(found.values())) == len(found):
                shown = ", ".join(f"{value[:20]} = {label}" for value, label in found.items())
                setting = f"{role}_column"
                logger.warning(
                    "'%s': column '%s' determines the label one to one (%s). If it holds the "
                    "answer, scores mean nothing: choose another with data.%s%s.",
                    name,
                    columns[setting],
                    shown if len(found) <= 5 else f"{len(found)} values",
                    setting,
                    "" if role == "text" else ", or none",
                )


# --- labels --------------------------------------------------------------------------------------


def label_names(train: TextSet) -> list[str]:
    """The classes of the training data, sorted; by value if all are integers.

    Raises:
        UserError: fewer than two, or two that look alike.
    """
    first: dict[str, str] = {}
    for example in train.examples:
        first.setdefault(example.label, example.name)
    labels = sorted(first)
    _refuse_lookalikes(train, labels, first)
    if len(labels) < 2:
        found = f"only '{labels[0]}'" if labels else "none"
        raise UserError(f"'{train.name}': expected at least two classes, found {found}.")
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in labels):
        labels.sort(key=int)
    return labels


# Letters of Greek and Cyrillic that are drawn as those of Latin.
_DRAWN = str.maketrans("аеіјорсухѕԁһкмтвαεινοορτυχκ", "aeijopcyxsdhkmtbaeivooptuxk")


def _look(label: str) -> str:
    """What a label looks like: labels that differ in case, width, kind of space, form of a number,
    quotes or a final point are one class spelt in two ways.
    """
    text = unicodedata.normalize("NFKC", label).casefold().translate(_DRAWN)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").strip(" .,;:'\"")
    if re.fullmatch(r"[+-]?[0-9]{1,18}(\.0+)?", text):
        return str(int(text.partition(".")[0]))
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", text)


def _refuse_lookalikes(train: TextSet, labels: Sequence[str], first: Mapping[str, str]) -> None:
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        alike[_look(label)].append(label)
    counts = Counter(example.label for example in train.examples)
    for found in alike.values():
        if len(found) > 1:
            shown = " and ".join(
                f"{label!r} ({counts[label]}, first {first[label]})" for label in found[:5]
            )
            raise UserError(
                f"'{train.name}': the classes {shown} look alike; expected one spelling of each "
                "class. Rename one."
            )


def check_labels(examples: TextSet, labels: Sequence[str], *, where: str) -> None:
    """Refuse labels that are not among the known ones; `where` names the set's origin.

    Raises:
        UserError: a label that training data does not have.
    """
    known = set(labels)
    unseen: dict[str, str] = {}
    for example in examples.examples:
        if example.label not in known:
            unseen.setdefault(example.label, example.name)
    if unseen:
        looks = {_look(label): label for label in labels}
        named = ", ".join(
            f"'{label}'" + (f" (like '{looks[_look(label)]}')" if _look(label) in looks else "")
            for label in sorted(unseen)[:5]
        )
        raise UserError(
            f"{where}: expected labels of the training data ({_shorten(labels)}), found "
            f"{named}{', ...' if len(unseen) > 5 else ''}. First: {next(iter(unseen.values()))}. "
            "Rename the labels or remove the rows."
        )


def add_label_texts(train: TextSet, texts: Mapping[str, Sequence[str]]) -> TextSet:
    """The training examples, and those that say what a label means (`data.label_texts`).

    Raises:
        UserError: a label that the training data does not have.
    """
    where = "data.label_texts"
    added = [
        TextExample(plain(text, where, label), label, name=f"{where}.{label}")
        for label, meaning in texts.items()
        for text in meaning
    ]
    check_labels(TextSet(train.name, added), label_names(train), where=where)
    return TextSet(train.name, [*train.examples, *added], train.skipped)


def _shorten(labels: Sequence[str], most: int = 20) -> str:
    return ", ".join(labels[:most]) + (", ..." if len(labels) > most else "")


# --- splits and leaks ----------------------------------------------------------------------------


def hold_out_texts(
    examples: Sequence[TextExample], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of (training, validation) examples; about `fraction` of them held out.

    If any example has a group, groups and identical texts stay together and are drawn at random.
    Otherwise every class gives about its share, and identical texts about the same target stay
    together. Every class keeps at least one example in training. Case does not distinguish texts.

    Raises:
        UserError: nothing can be held out, e.g. because everything belongs together.
    """
    grouped = any(example.group is not None for example in examples)
    if grouped:
        units = connected(
            [f"text {e.text.casefold()}", *([] if e.group is None else [f"group {e.group}"])]
            for e in examples
        )
    else:
        units = connected([repr(_identity(example))] for example in examples)
    rng = random.Random(seed)
    rng.shuffle(units)
    left = Counter(example.label for example in examples)  # in training
    if not grouped:
        units = _interleaved(units, examples, left, rng)

    def labels(unit: list[int]) -> Counter[str]:
        return Counter(examples[index].label for index in unit)

    def can_go(unit: list[int]) -> bool:
        return all(left[label] > count for label, count in labels(unit).items())

    wanted = max(1, round(fraction * len(examples)))
    held: list[int] = []
    for unit in units:
        # Take a unit only if that brings the share nearer to what was asked.
        nearer = abs(len(held) + len(unit) - wanted) < abs(len(held) - wanted)
        if nearer and can_go(unit):
            held += unit
            left -= labels(unit)
    if not held:
        held = min(filter(can_go, units), key=len, default=[])
    if not held:
        raise UserError(
            f"No validation data can be held out of {len(examples)} training examples in "
            f"{len(units)} {'group(s)' if grouped else 'distinct text(s)'}: some class would have "
            "none left. Name data.validation, or give more examples."
        )
    chosen = set(held)
    return [i for i in range(len(examples)) if i not in chosen], sorted(held)


def _interleaved(
    units: list[list[int]],
    examples: Sequence[TextExample],
    totals: Counter[str],
    rng: random.Random,
) -> list[list[int]]:
    """Units in an order of which every beginning holds about the same share of each class."""
    passed: Counter[str] = Counter()
    position = []
    for unit in units:
        label = examples[unit[0]].label
        # The random part decides which of the small classes, all below one example's share, give.
        position.append((passed[label] + rng.random() * len(unit)) / totals[label])
        passed[label] += len(unit)
    return [units[i] for i in sorted(range(len(units)), key=position.__getitem__)]


def _identity(example: TextExample) -> tuple[str, str]:
    return example.text.casefold(), (example.target or "").casefold()


def text_leaks(first: TextSet, second: TextSet) -> dict[str, list[str]]:
    """What two splits share: `same-text`, examples of `second` whose text and target are also in
    `first`. Case does not count.
    """
    known = {_identity(example): example for example in first.examples}
    names = []
    for example in second.examples:
        twin = known.get(_identity(example))
        if twin is not None:
            same_label = "same" if twin.label == example.label else "different"
            names.append(f"{example.name} = {twin.name} ({same_label} label)")
    return {"same-text": names} if names else {}


def refuse_text_leaks(
    first: TextSet, second: TextSet, allowed: Sequence[str]
) -> dict[str, list[str]]:
    """Leaks between two splits; those not allowed by name end the run.

    Up to 1 % of `second` is only warned of: short sentences recur by chance.

    Raises:
        UserError: a larger leak that is not in `allowed`.
    """
    leaks = text_leaks(first, second)
    for kind, names in leaks.items():
        message = (
            f"{len(names)} of {len(second)} texts of '{second.name}' are also in '{first.name}' "
            f"({kind}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."
        )
        if kind in allowed:
            logger.warning("%s Accepted by data.allow_leaks.", message)
        elif len(names) <= _TOLERATED_LEAK * len(second):
            logger.warning("%s Accepted: no more than 1 %%.", message)
        else:
            raise UserError(
                f"{message} Scores would flatter the model. Remove them from one of the two, or "
                f"accept them with data.allow_leaks: [{kind}]."
            )
    return leaks
