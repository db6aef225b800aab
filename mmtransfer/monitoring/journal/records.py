"""Lines of the journal as what they are about, whichever version wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mmtransfer.monitoring.events import (
    Alert,
    ClassifiedSound,
    Delivery,
    FileDone,
    LineKind,
    NoText,
    Raised,
    Recording,
    Sound,
    SourceEnd,
    Transcript,
)

Record = Transcript | NoText | Raised | SourceEnd | Recording | FileDone | Delivery
_CLASSES: dict[str | None, type] = {
    None: Transcript,
    LineKind.REJECTED: NoText,
    LineKind.DROPPED: NoText,
    LineKind.ALERT: Alert,
    LineKind.SOUND: Sound,
    LineKind.SOUND_CLASS: ClassifiedSound,
    LineKind.FILE: FileDone,
}
# What stands for values that an earlier version may not have written: they say neither what was
# spoken nor when.
_UNKNOWN: dict[type, dict[str, Any]] = {
    Transcript: dict.fromkeys(
        ("avg_logprob", "no_speech_prob", "compression_ratio", "context_s"), 0.0
    )
    | {"source": ""},
    NoText: {"reason": "unknown"},
    Alert: {"matched": "", "score": 0.0, "text": ""},
    Sound: {"level_db": 0.0, "background_db": 0.0},
}
# Fields and events as version 0.1 wrote them.
_FORMER_FIELDS = {"phrase": "keyword", "said": "matched", "usual_db": "background_db"}
_FORMER_EVENTS = {"no text": LineKind.REJECTED}


def record_of(line: Mapping[str, Any]) -> Record | None:
    """What a line is about; None for what only a reader of the journal wants to know (connections,
    gaps), and for events of later versions.

    Fields that a later version added are left out, and those that an earlier one did not have take
    their defaults.

    Raises:
        ValueError: the line is no such thing; says what was expected and found.
    """
    event = line.get("event")
    if not isinstance(event, str | None):
        raise ValueError(f"expected the name of an event, found {event!r:.40}")
    if not line.keys().isdisjoint(_FORMER_FIELDS):
        line = {_FORMER_FIELDS.get(name, name): value for name, value in line.items()}
    if event in _FORMER_EVENTS:
        event = _FORMER_EVENTS[event]
        line = {**line, "event": event}
    if event in (LineKind.END, LineKind.CUT):
        error = Exception(line.get("detail", "")) if event == LineKind.CUT else None
        return _made(SourceEnd, line, source="", error=error)
    if event == LineKind.READING:
        return _made(Recording, line, path=Path())
    if event in (LineKind.DELIVERED, LineKind.NOT_DELIVERED):
        failure = "" if event == LineKind.DELIVERED else line.get("detail", "unknown")
        return _made(Delivery, line, failure=failure)
    if event is None and "id" not in line:
        raise ValueError(f"expected a segment with an id, or an event; found {_shown(line)}")
    made = _CLASSES.get(event)
    return None if made is None else _made(made, line)


def _made(kind: Any, line: Mapping[str, Any], **known: Any) -> Any:
    """A line's values as the fields of a class, all of the right types."""
    values = _UNKNOWN.get(kind, {}) | known
    for name, (hint, is_needed) in _hints(kind).items():
        if name in known:
            continue
        if name not in line:
            if is_needed and name not in values:
                raise ValueError(f"expected '{name}', found {_shown(line)}")
        elif not _fits(line[name], hint):
            raise ValueError(f"'{name}': unexpected {line[name]!r:.40}")
        else:
            values[name] = LineKind(line[name]) if hint is LineKind else line[name]
    return kind(**values)


@cache
def _hints(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Of each field its type, and whether it has no default."""
    hints = get_type_hints(kind)
    return {
        field.name: (
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
    }


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is LineKind:
        return isinstance(value, str)
    return isinstance(value, get_origin(hint) or hint)


def _shown(line: Mapping[str, Any]) -> str:
    return f"{', '.join(map(repr, line)) or 'nothing'}"
