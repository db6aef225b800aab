"""How much audio an encoder sees: steps of context, so that clips of like length share a batch."""

from __future__ import annotations

SHORTEST_S = 0.5
UNADAPTED_CONTEXT_S = 20.0
"""Shortest context at which a Whisper that never saw short ones keeps its accuracy."""
SILENCE_S = 1.0
"""Silence at the end of a context, without which a Whisper loops that never saw short ones."""
WINDOW_S = UNADAPTED_CONTEXT_S - SILENCE_S
"""Speech that a Whisper takes in at a time: what that context holds beside the silence. Windows of
the pretrained 30 s have as many errors and take half as long again (attention grows with the square
of the context)."""
ADAPTED_CLIP_S = 15.0
"""Longest clip of an adapter for short contexts that does not state its own."""
_LONGEST_TAUGHT_S = 8.0  # beyond it talk has fewer errors in 20 s
_DOUBTFUL_S = 8.0  # the context of a doubtful short clip, before the full window


def clip_context_s(
    seconds: float,
    *,
    shortest_s: float,
    longest_s: float,
    margin_s: float = 0.0,
    short_s: float = float("inf"),
) -> float:
    """The context of a clip: its own length and a margin, at least `shortest_s`; for clips over
    `short_s`, which a short context does not do justice to, the least that the source's own weights
    decode.
    """
    if seconds > short_s:
        own_s = own_context_s(min(short_s + margin_s, longest_s), longest_s)
        own_s = max(own_s, min(shortest_s, longest_s))
        return own_s if seconds <= own_s - SILENCE_S else longest_s
    return context_step_s(max(seconds + margin_s, shortest_s), longest_s)


def own_context_s(short_s: float, longest_s: float) -> float:
    """Shortest context that the source's own weights decode beside an adapter for contexts of up to
    `short_s`: the adapter decodes all shorter ones.
    """
    is_free = context_step_s(short_s, longest_s) < UNADAPTED_CONTEXT_S
    return min(UNADAPTED_CONTEXT_S, longest_s) if is_free else longest_s


def taught_context_s(clip_s: float, longest_s: float) -> float:
    """Shortest context for a model that learns from clips of up to `clip_s`: the longest of them
    and silence, at most 8 s. Conversation, of which fine-tuning sees little, has more errors in
    short contexts, so clips beyond those learnt from have the source's; see `clip_context_s`.
    """
    return context_step_s(min(clip_s + SILENCE_S, _LONGEST_TAUGHT_S), longest_s)


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
