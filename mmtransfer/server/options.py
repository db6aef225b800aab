"""The options of a server; nothing here needs the extra `server`."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.monitoring.options import RecognitionOptions

COMPUTING = ("engine", "compute_type", "device", "threads")
"""Options by which a model is loaded."""
RECOGNIZING = (*COMPUTING, "beam_size")
"""Options that those who share a recogniser have in common."""


@dataclass(frozen=True)
class ServerOptions:
    """What is served, to whom, and how much at a time.

    Raises:
        UserError: a value that cannot be used.
    """

    models: Mapping[str, str]
    """Models by the names that clients call them by: run folders, checkpoints, Hub ids or
    bundled:NAME, for speech, texts or sounds."""
    _: KW_ONLY
    cameras: Path | None = None
    """YAML file of cameras, as that of `monitor`; they are watched in the same process."""
    journal: Path | None = None
    """Folder of the cameras' journal, which the page searches; without cameras, that of a monitor
    beside it."""
    index: str | Path | None = None
    """What the page searches, made of the journal: an SQLite file, by default in its folder, or the
    address of a PostgreSQL that several machines write to. Without a journal, what others write."""
    host: str = "127.0.0.1"
    """Address to listen at; others than loopback need tokens."""
    port: int = 8080
    """0 takes a free one."""
    home_assistant: bool = False
    """Announce the cameras to Home Assistant at the MQTT broker that their file names."""
    wyoming: int | None = None
    """Port of the Wyoming protocol, on loopback alone, since it has no tokens."""
    tokens: Path | None = None
    """File of tokens, by default that of this user; see `mmtransfer token`."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    audit: Path | None = None
    """File of audit lines; by default they are logged."""
    max_upload_mb: float = 512.0
    """Largest request."""
    max_audio_s: float = 4 * 3600.0
    """Longest recording, and longest stream."""
    requests: int = 32
    """Requests at work and waiting, together; further ones are refused with 503."""
    streams: int = 32
    """Live streams at once."""
    language: str | None = None
    """ISO code, for multilingual models; detected for each segment where it is not given, but for
    cameras whose model was trained in one."""
    engine: str = "auto"
    compute_type: str | None = None
    device: str = "auto"
    threads: int = 0
    beam_size: int | None = None

    def __post_init__(self) -> None:
        if not self.models and self.cameras is None and self.index is None:
            raise UserError(
                "expected --model NAME=MODEL, --cameras FILE.yaml or --index, found none of them."
            )
        for name, model in self.models.items():
            self.recognition(model)
            if not name.strip():
                raise UserError(f"model {model}: expected a name before '=', found none.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port: expected 0 to 65535, found {self.port}.")
        if self.wyoming is not None and not 0 <= self.wyoming <= 65535:
            raise UserError(f"wyoming: expected a port of 0 to 65535, found {self.wyoming}.")
        if self.home_assistant and self.cameras is None:
            raise UserError("home_assistant: expected --cameras FILE.yaml beside it, found none.")
        if self.journal is not None and self.cameras is None and not self.journal.is_dir():
            raise UserError(f"{self.journal}: expected the folder of a journal, found none.")
        if self.requests < 1 or self.streams < 1:
            raise UserError("requests and streams: expected 1 or more.")
        if not 0 < self.max_upload_mb * 1e6 < math.inf or not self.max_audio_s > 0:  # nor nan
            raise UserError(
                "max_upload_mb and max_audio_s: expected numbers above 0, found "
                f"{self.max_upload_mb:g} and {self.max_audio_s:g}; only max_audio_s may be inf."
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UserError("expected --tls-certificate and --tls-key together, found one of them.")

    @property
    def is_loopback(self) -> bool:
        """Whether nobody else than this machine's users can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def recognizing(self) -> dict[str, Any]:
        """Those of `RECOGNIZING` that are given."""
        own = [field for field in fields(self) if field.name in RECOGNIZING]
        values = {field.name: getattr(self, field.name) for field in own}
        return {one.name: values[one.name] for one in own if values[one.name] != one.default}

    def recognition(self, model: str) -> RecognitionOptions:
        """How a speech model is loaded: as by `monitor`, every word with its time.

        Raises:
            UserError: a value that cannot be used.
        """
        return RecognitionOptions(
            model,
            language=self.language,
            engine=self.engine,
            compute_type=self.compute_type,
            device=self.device,
            threads=self.threads,
            beam_size=self.beam_size,
            words=True,
        )


def short_name(model: str) -> str:
    """What a model is called that is given no name: the last part of its own."""
    return Path(model.removeprefix("bundled:")).name or model


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Models by name, of texts NAME=MODEL, or of models alone.

    Raises:
        UserError: a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, is_named, model = text.partition("=")
        if not is_named:
            name, model = short_name(text), text
        if name in found:
            raise UserError(f"--model: the name '{name}' is given twice.")
        found[name] = model
    return found
