"""The options of a monitor: the same names in Python, in `cameras.yaml` and, as flags, on the
command line.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from mmtransfer.data import MOST_THREADS, WIDEST_BEAM
from mmtransfer.data.former_names import MONITOR, with_new_names
from mmtransfer.errors import UserError
from mmtransfer.monitoring.lines import LineSettings
from mmtransfer.monitoring.sources.cameras import (
    Camera,
    Retention,
    cameras_of,
    named_cameras,
    rules_beside,
)
from mmtransfer.monitoring.sources.kinds import settle
from mmtransfer.speech.addresses import without_secrets
from mmtransfer.speech.audio import is_standard_input
from mmtransfer.speech.engine import DecodingOptions
from mmtransfer.speech.recognizers import ENGINES

COMPUTE_TYPES = ("int8", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda", "mps")
_SHOWN = 40  # characters of a value that cannot be used
_FOLDERS = ("journal", "alert_clips")  # of a file, relative to it


class OptionError(UserError):
    """An option's value that cannot be used."""

    def __init__(self, name: str, expected: str, found: Any):
        shown = without_secrets(repr(found))
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        self.name = name
        self.problem = f"expected {expected}, found {shown}"
        super().__init__(f"{name}: {self.problem}.")


@dataclass(frozen=True)
class RecognitionOptions:
    """How speech becomes lines of text, and which sounds are reported.

    Raises:
        UserError: a value that cannot be used.
    """

    model: str
    """Run folder, checkpoint folder, Hub id, or bundled:NAME."""
    _: KW_ONLY
    language: str | None = None
    """ISO code, for multilingual models; auto detects it for each segment."""
    engine: str = "auto"
    """auto takes ctranslate2 for Whisper on CPU, else transformers."""
    compute_type: str | None = None
    """Precision of ctranslate2: int8 (on CPU by default), float16 (on GPU by default), float32."""
    device: str = "auto"
    """cpu, cuda or mps; auto takes a GPU if there is one."""
    threads: int = 0
    """CPU threads; 0 takes every core."""
    context_s: float | Literal["full"] | None = None
    """Shortest encoder context; full for the full window; by default the model's own."""
    beam_size: int | None = None
    """Beam size; 1 is greedy, None leaves it to the engine."""
    prompt: str = ""
    """Names and words to expect, as prompt of the decoder."""
    words: bool = False
    """Whether lines carry word timestamps."""
    line_s: float = LineSettings.longest_s
    """Longest line of text, in seconds."""
    line_characters: int = LineSettings.characters
    """Longest line of text, in characters; subtitles put half on each of two rows."""
    sentiment: str | None = None
    """Model that classifies each transcript."""
    sounds: str | None = None
    """A model that classifies the sounds of every source, whether somebody speaks or not."""
    sound_thresholds: Mapping[str, float] | None = None
    """Probability over which a sound is reported, by class; `default` is for the others (0.8)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in _EXPECTED:
                is_usable, expected = _EXPECTED[field.name]
                value = getattr(self, field.name)
                if not is_usable(value) and value != field.default:
                    raise OptionError(field.name, expected, value)
        if self.sound_thresholds and self.sounds is None:
            raise OptionError("sounds", "a sound classifier for sound_thresholds", self.sounds)

    @property
    def decoding(self) -> DecodingOptions:
        """How text is searched for."""
        words_from_s = 0.0 if self.words else math.inf
        return DecodingOptions(self.beam_size, words_from_s, self.prompt)

    @property
    def lines(self) -> LineSettings:
        """How long a line may be."""
        return LineSettings(self.line_s, self.line_characters)

    @property
    def shortest_context_s(self) -> float | None:
        """`context_s` as a number."""
        return math.inf if self.context_s == "full" else self.context_s


@dataclass(frozen=True)
class MonitorOptions(RecognitionOptions):
    """What is monitored, how, and where transcripts and alerts go.

    `language`, `keywords`, `loud_db`, `channels` and `live` are for all sources; a `Camera` may
    have its own.

    Example:
        MonitorOptions("runs/site", sources=["gate.mp4"], journal="journal", keywords=["fire"])
    """

    sources: Sequence[str | Path | Camera] = ()
    """Recordings, folders, streams, audio devices, `-` or `pcm:RATE` for standard input."""
    _: KW_ONLY
    channels: Literal["mix", "split"] | int = "mix"
    """mix: average all channels; split: each separately, as NAME-1, NAME-2, ...; or a number."""
    live: bool | None = None
    """Whether the sources are live streams or recordings; by default detected for each."""
    keywords: Sequence[str] = ()
    """Words and phrases that raise an alert; matched by spelling and by sound."""
    loud_db: float | None = None
    """Alert on sounds this many dB above the background level (median of the last minute)."""
    partial: bool | None = None
    """Whether live sources give provisional text while speech goes on; on the command line by
    default on a terminal."""
    journal: str | Path | None = None
    """Folder of the write-ahead journal; restart with the same folder to resume."""
    output: Sequence[str | Path] = ()
    """Files to write: .jsonl, .srt, .vtt, .ass, .txt, or .html for a report."""
    alert_clips: str | Path | None = None
    """Folder for a short recording around each alert."""
    webhook: str | None = None
    """URL that gets alerts by HTTP POST as JSON; signed if MMTRANSFER_WEBHOOK_SECRET is set."""
    mqtt: str | None = None
    """mqtt://HOST/TOPIC where alerts are published as JSON."""
    redact: Sequence[str | Mapping[str, str]] = ()
    """What is taken out of texts before they are written or sent: phone, email, card,
    `names: FILE` with one on each line, `pattern: REGEX`."""
    redact_clips: bool = False
    """Whether what is redacted is silenced in alert clips, too; so is speech whose text is not
    known when a clip is written."""
    retention: Mapping[str, float] | None = None
    """Days for which text, clips and audio that waits are kept, by these names; a camera may have
    its own."""
    metrics_port: str | int | None = None
    """[HOST:]PORT that serves Prometheus metrics; localhost unless HOST is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sources", "keywords", "output", "redact"):  # nobody changes them later
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def cameras(self) -> list[Camera]:
        """The sources with names and with what is for all of them, each known to be live or not.

        Raises:
            UserError: no source, an invalid address, a name that is taken, or an option that does
                not fit a source.
        """
        if not self.sources:
            raise UserError("sources: expected at least one source, found none.")
        cameras = named_cameras(self.sources)
        if sum(is_standard_input(camera.url) for camera in cameras) > 1:
            raise UserError("standard input is given twice; give it once.")
        return settle(
            [
                replace(
                    camera,
                    keywords=[*camera.keywords, *self.keywords],
                    loud_db=camera.loud_db or self.loud_db,
                    channels=self.channels if camera.channels == "mix" else camera.channels,
                    live=self.live if camera.live is None else camera.live,
                    redact=(*camera.redact, *self.redact),
                    redact_clips=camera.redact_clips or self.redact_clips,
                    retention=camera.retention or Retention(**(self.retention or {})),
                )
                for camera in cameras
            ]
        )


def load_options(path: str | Path, **given: Any) -> MonitorOptions:
    """Options from a YAML file: sources under `cameras`, beside it any option by its name; what is
    `given` goes before. Paths of journal, output and clips in the file are relative to it.

    Raises:
        UserError: no such file, no cameras or model, an unknown key, a value that cannot be used.
    """
    from mmtransfer.config import read_yaml

    path = Path(path)
    content = with_new_names(read_yaml(path), MONITOR, str(path))
    cameras = cameras_of(content, path)
    own = {key: value for key, value in content.items() if key != "cameras"}
    known = [field.name for field in fields(MonitorOptions) if field.name != "sources"]
    for key in own:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known are {', '.join(known)}."
            raise UserError(f"{path}: expected 'cameras' and options, found '{key}'.{hint}")
    for key in _FOLDERS:
        if isinstance(own.get(key), str):
            own[key] = str(path.parent / own[key])
    if isinstance(own.get("output"), list):
        own["output"] = [str(path.parent / str(file)) for file in own["output"]]
    if isinstance(own.get("redact"), list):
        own["redact"] = rules_beside(path, own["redact"])
    values = own | given
    if "model" not in values:
        raise UserError(f"{path}: expected a model, by the key 'model' or given beside the file.")
    try:
        options = MonitorOptions(**values, sources=cameras)
    except OptionError as error:
        if error.name in given:
            raise
        raise UserError(f"{path}: {error}") from None
    for output in map(Path, options.output):
        if output.exists() and output.samefile(path):
            raise UserError(f"{output}: names the cameras. Write to another file.")
    return options


# --- values --------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or _is_text(value)


def _is_list_of(is_usable: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(map(is_usable, value))

    return check


def _is_thresholds(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_text(name) and _is_number(level) and 0 < level <= 1 for name, level in value.items()
    )


def _is_retention(value: Any) -> bool:
    names = {field.name for field in fields(Retention)}
    return isinstance(value, Mapping) and all(
        name in names and _is_number(days) and 0 < days < 100_000 for name, days in value.items()
    )


_FLAG = (lambda value: isinstance(value, bool), "true or false")
_FOLDER = (_is_path, "a folder")
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, "a model's folder, Hub id or bundled name"),
    "language": (_is_text, "an ISO code or 'auto'"),
    "engine": (lambda value: value in ENGINES, f"one of {', '.join(ENGINES)}"),
    "compute_type": (lambda value: value in COMPUTE_TYPES, f"one of {', '.join(COMPUTE_TYPES)}"),
    "device": (lambda value: value in DEVICES, f"one of {', '.join(DEVICES)}"),
    "threads": (
        lambda value: _is_count(value) and 0 <= value <= MOST_THREADS,
        f"a number from 0 to {MOST_THREADS}",
    ),
    "context_s": (
        lambda value: value == "full" or (_is_number(value) and value > 0),
        "seconds or 'full'",
    ),
    "beam_size": (
        lambda value: _is_count(value) and 1 <= value <= WIDEST_BEAM,
        f"a number from 1 to {WIDEST_BEAM}",
    ),
    "prompt": (lambda value: isinstance(value, str), "a text"),
    "words": _FLAG,
    "line_s": (lambda value: _is_number(value) and 0 < value < math.inf, "seconds above 0"),
    "line_characters": (lambda value: _is_count(value) and value >= 1, "a number of 1 or more"),
    "sentiment": (_is_text, "a sentiment model"),
    "sounds": (_is_text, "a sound classifier"),
    "sound_thresholds": (_is_thresholds, "classes with probabilities over 0 and up to 1"),
    "sources": (
        _is_list_of(lambda value: _is_path(value) or isinstance(value, Camera)),
        "a list of paths, addresses and cameras",
    ),
    "channels": (
        lambda value: value in ("mix", "split") or (_is_count(value) and value >= 1),
        "mix, split or a number",
    ),
    "live": _FLAG,
    "keywords": (_is_list_of(_is_text), "a list of words and phrases"),
    "loud_db": (
        lambda value: _is_number(value) and 0 < value < 100,
        "dB above the background level, less than 100",
    ),
    "partial": _FLAG,
    "journal": _FOLDER,
    "output": (_is_list_of(_is_path), "a list of files"),
    "alert_clips": _FOLDER,
    "webhook": (_is_text, "an address http[s]://HOST[:PORT]/PATH"),
    "mqtt": (_is_text, "an address mqtt[s]://[USER:PASSWORD@]HOST[:PORT]/TOPIC"),
    "redact": (
        _is_list_of(lambda value: _is_text(value) or (isinstance(value, Mapping) and bool(value))),
        "a list of phone, email, card, names: FILE and pattern: REGEX",
    ),
    "redact_clips": _FLAG,
    "retention": (_is_retention, "days above 0 by text, clips, audio"),
    "metrics_port": (lambda value: _is_count(value) or _is_text(value), "[HOST:]PORT"),
}
"""Of each option, what is usable beside its default, and how that is called."""
