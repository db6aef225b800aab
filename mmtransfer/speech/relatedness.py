"""What clips of a target and of source domains are like, and their features on a backbone.

The labels of speech are characters on frames, placed by the source's own alignment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from mmtransfer.config import Config
from mmtransfer.data.words import split_words
from mmtransfer.errors import UserError
from mmtransfer.hub.checkpoint import Checkpoint
from mmtransfer.speech.audio import SAMPLE_RATE
from mmtransfer.speech.clips import Clip, load_clips, read_clips, usual_language
from mmtransfer.speech.ctc import LONGEST_S, CtcModel, load_ctc_model, new_ctc_model, spelling
from mmtransfer.speech.engines_transformers import timed_words
from mmtransfer.speech.voice_activity import speech_bounds
from mmtransfer.speech.whisper import SpeechModel, encode_whisper, load_speech_model
from mmtransfer.transfer.encoders import SpeechEncoder
from mmtransfer.transfer.features import FeatureStore, cache_key, cached_features, weights_digest
from mmtransfer.transfer.networks import Network
from mmtransfer.transfer.relatedness import Figure, draw
from mmtransfer.transfer.splits import training_data

CLIPS, SECONDS = 64, 120.0
"""Most clips of a set that are looked at, and seconds of them together."""
_FRAME = 320  # samples whose level is taken
_NOISE_SHARE = 0.1  # of a clip's frames, at least, in which nobody speaks
_BAND_DB = 60.0  # below the loudest frequency there is no sound of use
_BINS = 512  # samples of a spectrum
_RARE = 10  # characters that occur less often say nothing

FIGURES = {
    "source_loss": Figure(
        "source loss",
        "mean loss per token of the reference under the source model, clip by clip",
        "of the source in its own vocabulary; compare sets, not models",
        "Swayamdipta et al. 2020 (loss as difficulty)",
    ),
    "unknown_words": Figure(
        "unknown words",
        "share of words that are no single entry of the source's vocabulary, or that its alphabet "
        "cannot spell",
        "spelt from pieces they may still be recognised",
        "Sennrich et al. 2016",
    ),
    "tokens_per_word": Figure(
        "tokens per word",
        "pieces that the source cuts a word into; for an alphabet, letters",
        "languages differ in it; compare sets of one language",
        "Rust et al. 2021",
    ),
    "words_per_s": Figure(
        "words per second",
        "words over the seconds from the first to the last sound of speech",
        "pauses within a clip count as speech",
        "Siegler & Stern 1995",
    ),
    "bandwidth_khz": Figure(
        "bandwidth, kHz",
        f"highest frequency within {_BAND_DB:g} dB of the loudest: 8 is all, telephones have 4",
        "noise that reaches higher hides a narrow band",
        "ITU-T G.711 and P.341 (the bands of telephones)",
    ),
    "snr_db": Figure(
        "SNR, dB",
        "level of the louder half of a clip's frames over that of its quietest tenth",
        "needs pauses; music or a second voice count as speech",
        "after Hirsch & Ehrlicher 1995 (noise from low quantiles)",
    ),
}


class ClipEncoder(Protocol):
    """A model on a speech encoder."""

    network: Network
    extractor: Any

    @property
    def encoder(self) -> SpeechEncoder:
        """What it stands on."""
        ...

    def context_s(self, seconds: float) -> float:
        """Context of a clip."""
        ...

    def inputs(self, clips: Sequence[np.ndarray], context_s: float) -> dict[str, torch.Tensor]:
        """Encoder inputs."""
        ...

    def mask(self, seconds: Sequence[float], context_s: float) -> torch.Tensor:
        """Which frames hold the clips."""
        ...


class SpeechInputs:
    """Clips of a target and of source-domain sets, up to `CLIPS` of each drawn at random.

    Raises:
        UserError: unusable data, or transcripts of fewer than two characters.
    """

    figures = FIGURES
    rows_are_labelled = True
    """Labels belong to frames, the rows of a clip's features behind the first."""

    def __init__(self, config: Config, source: Checkpoint, device: torch.device):
        self._config, self._device = config, device
        clips = read_clips(training_data(config), config.data)
        self._language = config.data.language or usual_language(clips)
        self._totals: dict[str, int] = {}
        self._sets: dict[str, list[Clip]] = {}
        self._add("target", clips)
        for name, path in config.data.source_domain.items():
            self._add(name, read_clips(path, config.data))
        self._recogniser = self._source_recogniser(source)
        self._losses: dict[str, list[float]] = {}
        self._characters = {name: self._aligned(name) for name in self._sets}

    def _add(self, name: str, clips: list[Clip]) -> None:
        """Only what is drawn is decoded."""
        self._totals[name] = len(clips)
        drawn = draw(clips, CLIPS, self._config.runtime.seed)
        found = load_clips(name, self._config.data, name=name, max_seconds=LONGEST_S, clips=drawn)
        total, kept = 0.0, list[Clip]()
        for clip in found.clips:
            total += clip.seconds
            if total > SECONDS and len(kept) > 1:
                break
            kept.append(clip)
        self._sets[name] = kept

    def _source_recogniser(self, source: Checkpoint) -> SpeechModel | CtcModel | None:
        """What aligns transcripts with frames: the source, if it has an output already."""
        if source.kind == "speech":
            found = load_speech_model(source, language=self._language, can_detect=False)
            for model in (found.model, *([found.short.model] if found.short else [])):
                model.to(self._device).eval()
            return found
        is_recogniser = source.kind == "ctc" and (
            source.metadata is not None or any(c.endswith("ForCTC") for c in source.classes)
        )
        if not is_recogniser:
            return None
        model = load_ctc_model(source)
        model.network.to(self._device).eval()
        return model

    @property
    def samples(self) -> dict[str, str]:
        """How much of each set is looked at."""
        return {
            name: f"{len(own)} of {self._totals[name]} clips, {sum(c.seconds for c in own):.0f} s"
            for name, own in self._sets.items()
        }

    @property
    def labelled_by(self) -> str:
        """What the labels are."""
        if isinstance(self._recogniser, SpeechModel):
            how = "words placed by the source's attention, their characters evenly within them"
        elif self._recogniser is not None:
            how = "placed by the source's CTC alignment"
        else:
            how = "spread evenly over the speech of each clip, since the source has no output yet"
        return f"characters, one frame each ({how})"

    def labels(self) -> tuple[list[str], list[str]]:
        """Label of each of the target's characters, and its clip. Rare ones have an empty label."""
        found = [[c for c, _ in row] for row in self._characters["target"]]
        flat = [c for row in found for c in row]
        counts = {c: flat.count(c) for c in set(flat)}
        if len([c for c in counts if counts[c] >= _RARE]) < 2:
            raise UserError(
                f"target: expected transcripts with at least two characters that occur {_RARE} "
                f"times, found {len(flat)} characters in all. Give more clips."
            )
        owners = [f"clip {number}" for number, row in enumerate(found) for _ in row]
        return [c if counts[c] >= _RARE else "" for c in flat], owners

    # --- alignment ----------------------------------------------------------------------------

    def _aligned(self, name: str) -> list[list[tuple[str, float]]]:
        """(character, second of its middle) of each of the target's clips, of other sets none; the
        loss is taken on the way.
        """
        losses, found = list[float](), list[list[tuple[str, float]]]()
        for clip in self._sets[name]:
            if not clip.text.strip():
                found.append([])
                continue
            with torch.inference_mode():
                row, loss = self._align(clip)
            found.append(row if name == "target" else [])
            losses += [] if loss is None else [loss]
        self._losses[name] = losses
        return found

    def _align(self, clip: Clip) -> tuple[list[tuple[str, float]], float | None]:
        speech = self._recogniser
        samples = clip.samples()
        if isinstance(speech, SpeechModel):
            return _whisper_alignment(speech, clip, samples, self._device)
        if speech is not None:
            return _ctc_alignment(speech, clip, samples, self._device)
        start, end = speech_bounds(samples) or (0.0, clip.seconds)
        letters = _letters(clip.text)
        step = (end - start) / max(1, len(letters))
        return [(c, start + (i + 0.5) * step) for i, c in enumerate(letters)], None

    # --- features -----------------------------------------------------------------------------

    def open(self, checkpoint: Checkpoint) -> ClipEncoder:
        """A backbone, with a head that is not used.

        Raises:
            UserError: not a speech encoder.
        """
        return _WithEncoder(new_ctc_model(checkpoint, ["ab"], head=self._config.head))

    def features(self, model: ClipEncoder, name: str) -> FeatureStore:
        """Mean-pooled states of a set's clips on every layer, and behind them those of the frames
        of their characters: [1 + character, layer, width].
        """
        times = [[second for _, second in row] for row in self._characters[name]]
        return clip_features(model, name, self._sets[name], times, self._config, self._device)

    # --- figures ------------------------------------------------------------------------------

    def describe(self, model: ClipEncoder, name: str) -> dict[str, float | None]:
        """Figures of one set."""
        clips, losses = self._sets[name], self._losses[name]
        words = [split_words(clip.text) for clip in clips]
        rates, levels, bands = [], [], []
        for clip, own in zip(clips, words, strict=True):
            samples = clip.samples()
            bounds = speech_bounds(samples)
            if own and bounds is not None:
                rates.append(len(own) / max(bounds[1] - bounds[0], 0.1))
            level, band = snr_db(samples), bandwidth_hz(samples)
            levels += [] if level is None else [level]
            bands += [] if band is None else [band / 1000]
        unknown, pieces = self._spelt([word for row in words for word in row])
        return {
            "source_loss": _mean(losses),
            "unknown_words": unknown,
            "tokens_per_word": pieces,
            "words_per_s": _mean(rates),
            "bandwidth_khz": None if not bands else float(np.median(bands)),
            "snr_db": None if not levels else float(np.median(levels)),
        }

    def _spelt(self, words: Sequence[str]) -> tuple[float | None, float | None]:
        """Share of words that the source does not know, and its tokens per word."""
        speech = self._recogniser
        if speech is None or not words:
            return None, None
        if isinstance(speech, SpeechModel):
            sizes = {word: len(speech.spell(word, self._language)) for word in set(words)}
            unknown = {word for word, size in sizes.items() if size > 1}
        else:
            known = set(speech.symbols)
            sizes = {word: len(speech.spell(word)) for word in set(words)}
            unknown = {w for w in sizes if any(spelling(c, known) is None for c in w)}
        share = sum(word in unknown for word in words) / len(words)
        return share, sum(sizes[word] for word in words) / len(words)

    def describe_pair(self, name: str) -> dict[str, float | None]:
        """Figures of the target and another set: none beside distances."""
        return {}


class _WithEncoder:
    """A CTC model under the names of `ClipEncoder`."""

    def __init__(self, model: CtcModel):
        self.network, self.extractor = model.network, model.extractor
        self.context_s, self.inputs, self.mask = model.context_s, model.inputs, model.mask

    @property
    def encoder(self) -> SpeechEncoder:
        found = self.network.encoder
        if not isinstance(found, SpeechEncoder):
            raise TypeError("a speech model stands on a speech encoder")
        return found


def clip_features(
    model: ClipEncoder,
    name: str,
    clips: Sequence[Clip],
    times: Sequence[Sequence[float]],
    config: Config,
    device: torch.device,
    longest_s: float = LONGEST_S,
) -> FeatureStore:
    """States [1 + time, layer, width] of clips on every layer: their mean, then those at the given
    seconds; from the cache where they are known. Clips are cut to `longest_s`.
    """
    encoder = model.encoder
    layers = list(range(encoder.depth + 1))
    seconds = [min(clip.seconds, longest_s) for clip in clips]
    key = cache_key(
        kind="relatedness",
        weights=weights_digest([encoder.model], encoder.model.config),
        features=model.extractor.to_dict(),
        items=[[c.identity, s, list(t)] for c, s, t in zip(clips, seconds, times, strict=True)],
    )
    model.network.to(device).eval()

    def compute(rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        by_context: dict[float, list[int]] = {}
        for row in rows:
            by_context.setdefault(model.context_s(seconds[row]), []).append(row)
        for context, chosen in sorted(by_context.items()):
            size = max(1, int(config.evaluation.batch_seconds / context))
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                waves = [clips[r].samples()[: round(seconds[r] * SAMPLE_RATE)] for r in part]
                mask = model.mask([seconds[row] for row in part], context)
                with torch.inference_mode():
                    inputs = model.inputs(waves, context)
                    moved = {n: value.to(device) for n, value in inputs.items()}
                    states = encoder.hidden_states(layers, moved)
                    stacked = torch.stack([states[n] for n in layers], 2).cpu()  # [clip, frame, ..
                for row, own, shown in zip(part, stacked, mask, strict=True):
                    held = own[shown]
                    places = np.array(times[row]) / max(seconds[row], 1e-9) * len(held)
                    frames = held[np.clip(places.astype(int), 0, len(held) - 1)]
                    yield row, torch.cat([held.mean(0, keepdim=True), frames]).numpy()

    values = [(1 + len(t)) * len(layers) * encoder.width for t in times]
    return cached_features(f"{name} clips", key, values, compute, dtype="float32")


def _letters(text: str) -> list[str]:
    """The characters of a text that are spoken."""
    return [c for c in text.lower() if c.isalnum()]


def _whisper_alignment(
    speech: SpeechModel, clip: Clip, samples: np.ndarray, device: torch.device
) -> tuple[list[tuple[str, float]], float | None]:
    """(character, second) of a clip, and the mean loss of its tokens."""
    room = speech.model.config.max_target_positions - 8
    tokens = speech.spell(clip.text, clip.language)[:room]
    context = speech.context_s(clip.seconds)
    model = speech.model_for(context)
    hidden = encode_whisper(model, speech.features([samples], context).to(device))[0]
    prompt = speech.prompt(timestamps=False, language=clip.language)
    words, shares = timed_words(
        model,
        speech.processor.tokenizer,
        hidden,
        torch.tensor(prompt, device=device),
        tokens,
        clip.seconds,
    )
    found = []
    for word in words:
        letters = _letters(word.text)
        step = (word.end_s - word.start_s) / max(1, len(letters))
        found += [(c, word.start_s + (i + 0.5) * step) for i, c in enumerate(letters)]
    return found, -float(shares.mean())


def _ctc_alignment(
    speech: CtcModel, clip: Clip, samples: np.ndarray, device: torch.device
) -> tuple[list[tuple[str, float]], float | None]:
    """(character, second) of a clip on the best path that spells its text (Graves et al. 2006), and
    the mean loss of its symbols. A clip too short for its text has none.
    """
    context = speech.context_s(clip.seconds)
    inputs = speech.inputs([samples], context)
    mask = speech.mask([clip.seconds], context).to(device)
    logits = speech.network({n: value.to(device) for n, value in inputs.items()}, mask)
    scores = logits[0, : int(mask.sum())].float().log_softmax(-1).cpu()
    symbols = torch.tensor(speech.spell(clip.text), dtype=torch.long)
    doubles = int((symbols[1:] == symbols[:-1]).sum()) if len(symbols) else 0
    if not len(symbols) or len(symbols) + doubles > len(scores):
        return [], None
    loss = functional.ctc_loss(
        scores[:, None],
        symbols[None],
        torch.tensor([len(scores)]),
        torch.tensor([len(symbols)]),
        blank=speech.blank,
        reduction="sum",
    )
    places = best_ctc_path(scores.numpy(), symbols.numpy(), speech.blank)
    step = clip.seconds / len(scores)
    found = []
    for symbol, frame in zip(symbols.tolist(), places, strict=True):
        piece = _letters(speech.symbols[symbol])
        found += [(c, (frame + 0.5) * step) for c in piece]
    return found, float(loss) / len(symbols)


def best_ctc_path(scores: np.ndarray, symbols: np.ndarray, blank: int) -> list[int]:
    """First frame of each symbol on the most probable path through log probabilities [frame,
    symbol] that spells these symbols (Viterbi over symbols with blanks between them).
    """
    states = np.full(2 * len(symbols) + 1, blank)
    states[1::2] = symbols
    can_skip = np.zeros(len(states), bool)
    can_skip[3::2] = symbols[1:] != symbols[:-1]
    total = np.full(len(states), -np.inf)
    total[:2] = scores[0, states[:2]]
    steps = np.zeros((len(scores), len(states)), int)
    for frame in range(1, len(scores)):
        from_before = np.concatenate([[-np.inf], total[:-1]])
        from_skip = np.where(can_skip, np.concatenate([[-np.inf, -np.inf], total[:-2]]), -np.inf)
        choices = np.stack([total, from_before, from_skip])
        steps[frame] = choices.argmax(0)
        total = choices.max(0) + scores[frame, states]
    state = len(states) - 1 if total[-1] >= total[-2] else len(states) - 2
    first = [0] * len(symbols)
    for frame in range(len(scores) - 1, -1, -1):
        if state % 2:
            first[state // 2] = frame
        state -= int(steps[frame, state])
    return first


# --- sound ---------------------------------------------------------------------------------------


def snr_db(samples: np.ndarray) -> float | None:
    """Level of the louder half of a clip's frames over that of its quietest tenth, in dB; None for
    digital silence. At most 60: more is inaudible.
    """
    frames = samples[: len(samples) // _FRAME * _FRAME].reshape(-1, _FRAME).astype(float)
    powers = np.sort((frames**2).mean(1))
    powers = powers[powers > 0]
    if len(powers) < 10:
        return None
    noise = powers[: max(1, int(_NOISE_SHARE * len(powers)))].mean()
    speech = powers[len(powers) // 2 :].mean() - noise
    return float(np.clip(10 * np.log10(max(speech, 1e-12) / noise), -10, 60))


def bandwidth_hz(samples: np.ndarray) -> float | None:
    """Highest frequency whose mean power is within 60 dB of the loudest; None for silence."""
    pieces = samples[: len(samples) // _BINS * _BINS].reshape(-1, _BINS)
    if not len(pieces) or not np.any(pieces):
        return None
    spectrum = (np.abs(np.fft.rfft(pieces * np.hanning(_BINS), axis=1)) ** 2).mean(0)
    loud = np.flatnonzero(spectrum >= spectrum.max() * 10 ** (-_BAND_DB / 10))
    return float(loud[-1] * SAMPLE_RATE / _BINS)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
