"""Whether a pause ends a turn, by a small head on a recogniser's own frozen encoder.

A pause is at least 0.2 s without speech by voice activity. It ends the turn if no speech follows
within a second; else the speaker goes on. How something is spoken tells much of that before the
second has passed: after 0.2 s the encoder has the audio up to that moment, and never what comes
later. The head is a mean over the last states and one linear output, so it runs in NumPy.

What a probability means differs with room, microphone and speaker, and how long somebody pauses
with the speaker. So the threshold follows the stream: among its last pauses in which the speaker
went on, it would have cut fewer short than a fixed pause of 0.45 s.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.segments import SegmenterSettings
from mmtransfer.speech.voice_activity import FRAME, SpeechProbability

FRAME_S = FRAME / SAMPLE_RATE
PAUSE_S = 0.2
"""Less without speech is no pause."""
FIXED_S = 0.45
"""The pause that ends a segment where nothing was learnt; as many turns may be cut short."""
HORIZON_S = 1.0
"""A pause that lasts this long has ended the turn."""
STATES_PER_SECOND = 50
_COUNTED_S = 1.5
_REMEMBERED = 200  # pauses of a stream
_MARGIN = 0.9  # of the fixed pause's share, since what comes next differs from what was
_SHIPPED = Path(__file__).parent / "turn_ends"
_SETTINGS = "end_of_turn"

Encode = Callable[[Sequence[np.ndarray], float], np.ndarray]
"""Clips of 16-kHz samples and a context in seconds to encoder states [clip, frame, width]."""


def frames_of(seconds: float) -> int:
    """Frames of voice activity that come closest to so many seconds."""
    return round(seconds / FRAME_S)


# --- the head ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TurnSettings:
    """How a head is used."""

    context_s: float
    """Audio that the encoder is given, up to the moment of the decision."""
    states_s: float
    """The last of its states, over which the mean is taken."""
    longest_s: float
    """Silence after which the turn is over in any case."""
    usual: tuple[tuple[float, float], ...] = ()
    """(probability, seconds) of pauses in which speakers of the training recordings went on: what
    a stream begins with.
    """
    adapter: str = ""
    """SHA-256 of the adapter in whose encoder the head was trained; empty where there is none."""


class EndOfTurn:
    """How likely a turn is over, by the audio up to a pause."""

    def __init__(self, encode: Encode, weights: np.ndarray, bias: float, settings: TurnSettings):
        self._encode, self._weights, self._bias = encode, weights, bias
        self.settings = settings

    def probability(self, samples: np.ndarray) -> float:
        """How likely the turn is over: of 16-kHz samples up to now, of which the last are silent.

        Before the beginning of a stream there is silence.
        """
        states = last_states(self._encode, samples, self.settings)
        return float(1 / (1 + np.exp(-(states.mean(0) @ self._weights + self._bias))))

    def endpointer(self) -> TurnEndpointer:
        """What decides in the pauses of one stream."""
        return TurnEndpointer(self)


class TurnEndpointer:
    """Decides in the pauses of a stream whether the turn is over; see `Endpointer`."""

    ask_s = PAUSE_S

    def __init__(self, head: EndOfTurn):
        self._head = head
        settings = head.settings
        self.context_s, self.longest_s = settings.context_s, settings.longest_s
        # Probabilities and lengths of the last pauses in which the speaker went on.
        self._went_on = deque(settings.usual, _REMEMBERED)
        self._probability = 0.0  # in the running pause

    def is_over(self, samples: np.ndarray) -> bool:
        """Whether the turn is over, after `ask_s` of silence."""
        return self.decide(self._head.probability(samples))

    def decide(self, probability: float) -> bool:
        """The same by the head's probability."""
        probabilities, pauses_s = np.array(self._went_on).T
        self._probability = probability
        # What lasts longest is cut short in any case; the others make up the fixed pause's share.
        others = probabilities[pauses_s < self.longest_s]
        if not len(others):
            return False
        cut = _MARGIN * (pauses_s >= FIXED_S).sum() - (pauses_s >= self.longest_s).sum()
        return bool(probability >= np.quantile(others, 1 - max(0.0, cut / len(others))))

    def went_on(self, pause_s: float) -> None:
        """Speech came again after that much silence."""
        if pause_s < HORIZON_S:
            self._went_on.append((self._probability, pause_s))


def last_states(encode: Encode, samples: np.ndarray, settings: TurnSettings) -> np.ndarray:
    """The encoder's states [frame, width] of the last moments."""
    size = round(settings.context_s * SAMPLE_RATE)
    heard = samples[-size:]
    clip = np.pad(heard, (size - len(heard), 0))
    return encode([clip], settings.context_s)[0, -round(settings.states_s * STATES_PER_SECOND) :]


def open_end_of_turn(checkpoint: Checkpoint, encode: Encode) -> EndOfTurn | None:
    """The head that ships for a Whisper; None if there is none for this very encoder.

    Raises:
        UserError: a damaged file.
    """
    adapter = checkpoint.short.folder if checkpoint.short is not None else None
    path = _SHIPPED / f"{adapter.name}.safetensors" if adapter is not None else None
    if adapter is None or path is None or not path.is_file():
        return None
    weights, bias, settings = read_turn_head(path)
    if adapter_digest(adapter) != settings.adapter:
        return None
    return EndOfTurn(encode, weights, bias, settings)


def adapter_digest(folder: Path) -> str:
    """Identity of an adapter by its weights; empty if it has none."""
    path = folder / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def write_turn_head(path: Path, weights: np.ndarray, bias: float, settings: TurnSettings) -> None:
    """Write a head's weights and settings into one file."""
    from safetensors.numpy import save_file

    tensors = {"weight": weights.astype(np.float32), "bias": np.array([bias], np.float32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {_SETTINGS: json.dumps(asdict(settings))})


def read_turn_head(path: Path) -> tuple[np.ndarray, float, TurnSettings]:
    """What `write_turn_head` wrote.

    Raises:
        UserError: a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            values = json.loads(file.metadata()[_SETTINGS])
            weights, bias = file.get_tensor("weight"), float(file.get_tensor("bias")[0])
        values["usual"] = tuple((float(found), float(long)) for found, long in values["usual"])
        return weights, bias, TurnSettings(**values)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be loaded as an end-of-turn head ({reason}).") from None


# --- pauses of recordings: what it is trained and measured on ------------------------------------


@dataclass(frozen=True)
class Pause:
    """A pause in a recording."""

    start: int
    """The first frame without speech."""
    frames: int
    """How long it lasts; not counted beyond 1.5 s."""

    def is_end(self, horizon_s: float = HORIZON_S) -> bool:
        """Whether no speech follows within the horizon."""
        return self.frames >= frames_of(horizon_s)


def find_pauses(samples: np.ndarray, settings: SegmenterSettings | None = None) -> Iterator[Pause]:
    """The pauses of a recording, by the rules that cut its segments.

    Pauses with digital silence in them are left out, since recordings are joined there, and so is
    one that the recording ends in.
    """
    settings = settings or SegmenterSettings()
    whole = samples[: len(samples) // FRAME * FRAME]
    frames = whole.reshape(-1, FRAME)
    scores = SpeechProbability()(whole)
    is_joined = np.abs(frames).max(1) == 0
    least, most = frames_of(PAUSE_S), frames_of(_COUNTED_S)
    is_speaking, voiced, last = False, 0, 0
    for frame, score in enumerate(scores):
        if not is_speaking:
            if score < settings.threshold:
                continue
            is_speaking, voiced, last = True, 0, frame
        end = frame if score >= settings.threshold_off else frame + 1
        length = end - last - 1
        if length == most or (length >= least and end == frame):
            is_speech = voiced * FRAME_S >= settings.min_speech_s
            if is_speech and not is_joined[last + 1 : end].any():
                yield Pause(last + 1, length)
            is_speaking = end == frame
        if end == frame:
            last = frame
        voiced += score >= settings.threshold
