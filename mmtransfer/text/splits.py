"""The texts of a run: splits, classes, and what is rehearsed beside them."""

from __future__ import annotations

from mmtransfer.config import Config
from mmtransfer.errors import UserError
from mmtransfer.text.examples import (
    TextSet,
    add_label_texts,
    check_labels,
    hold_out_texts,
    label_names,
    read_texts,
    refuse_text_leaks,
)
from mmtransfer.transfer.splits import Splits, choose_rehearsal, load_splits


def load_text_splits(config: Config) -> tuple[Splits[TextSet], list[str]]:
    """Training, validation, source-domain and rehearsal texts, checked for leaks; and the classes.

    Raises:
        UserError: no training data named, unusable data, one class only, a label that training
            data does not have, or a leak between splits.
    """
    data, labels = config.data, list[str]()

    def read(path: str, name: str, role: str) -> TextSet:
        found = read_texts(
            path, data, name=name, split="train" if role == "train" else "validation"
        )
        if role == "train":
            labels.extend(label_names(found))
        return found

    def refuse(one: TextSet, other: TextSet) -> None:
        refuse_text_leaks(one, other, data.allow_leaks)

    splits = load_splits(
        config,
        read,
        lambda train: hold_out_texts(train.examples, data.validation_fraction, config.runtime.seed),
        refuse,
        lambda train: add_label_texts(train, data.label_texts),
    )
    rehearsed = choose_rehearsal(config)
    if rehearsed == "bundled":
        raise UserError("data.rehearsal: bundled is speech; for texts name a file, or none.")
    if rehearsed is not None:
        splits.rehearsal = read_texts(rehearsed, data, name="rehearsal")
        for other in (splits.validation, *splits.source_domain.values()):
            refuse(splits.rehearsal, other)
    for texts in splits.all:
        check_labels(texts, labels, where=texts.name)
    return splits, labels
