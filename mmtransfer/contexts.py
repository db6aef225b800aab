"""How much audio an encoder sees: steps of context, so that clips of like length share a batch."""

from __future__ import annotations

SHORTEST_S = 0.5
_DOUBTFUL_S = 8.0  # what a doubtful short clip is read with, before the full window


def context_step_s(seconds: float, longest_s: float) -> float:
    """The context for that much audio: the next of 0.5, 1.0, ... 4.0, 5, ... 8, 10, ... 16, 20, ...
    up to the longest.

    Steps grow with length, so that padding stays below a quarter and many clips share a context.
    A clip's context depends on its own length only, so its result does not depend on its batch.
    """
    seconds = min(seconds, longest_s)
    step = SHORTEST_S
    while seconds > 8 * step + 1e-6:
        step *= 2
    count = max(1, -(-round(seconds * 16_000) // round(step * 16_000)))
    return min(count * step, longest_s)


def longer_context_s(context_s: float, longest_s: float) -> float | None:
    """What a doubtful clip is read with next; None after the full window."""
    if context_s >= longest_s:
        return None
    longer = context_step_s(max(2 * context_s, _DOUBTFUL_S), longest_s)
    return longer if longer <= longest_s / 2 else longest_s
