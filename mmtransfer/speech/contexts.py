"""How much audio an encoder sees: steps of context, so that clips of like length share a batch."""

from __future__ import annotations

SHORTEST_S = 0.5
UNADAPTED_CONTEXT_S = 20.0
"""Shortest context at which a Whisper that never saw short ones keeps its accuracy,"""
UNADAPTED_CLIP_S = 15.0
"""on clips of at most this length: it needs silence at the end, or it loops."""
WINDOW_S = 28.0
"""Speech that a Whisper takes in at a time: it was pretrained on windows of 30 s, and needs silence
at the end."""
SHORT_WINDOW_S = 16.0
"""The same where an adapter has learnt contexts of that length: half the time (the encoder's
attention grows with the square of the context) for as few errors."""
_DOUBTFUL_S = 8.0  # the context of a doubtful short clip, before the full window


def clip_context_s(
    seconds: float,
    *,
    shortest_s: float,
    longest_s: float,
    margin_s: float = 0.0,
    short_s: float = float("inf"),
) -> float:
    """The context of a clip: its own length and a margin, and the longest for clips over `short_s`,
    which a shorter one does not do justice to.
    """
    if seconds > short_s:
        return longest_s
    return context_step_s(max(seconds + margin_s, shortest_s), longest_s)


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
