"""A finished recording as one HTML page: timeline, text to search, click to seek."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mmtransfer.data.printing import printable
from mmtransfer.monitoring.events import Raised, Transcript
from mmtransfer.speech.recordings import AUDIO_SUFFIXES

if TYPE_CHECKING:
    from jinja2 import Template


def report(source: str, items: Sequence[Transcript | Raised], *, folder: Path) -> str:
    """The page; `folder` is where it will lie, from which the recording is found again.

    The recording itself is not part of the page: it plays while it lies where it was.
    """
    path = Path(source)
    address = source if "://" in source else ""
    if not address and path.is_file():
        try:
            address = quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
        except ValueError:  # another drive
            address = path.resolve().as_uri()
    element = "audio" if path.suffix.lower() in AUDIO_SUFFIXES else "video"
    rows = sorted((asdict(item) for item in items), key=lambda row: float(row["start"]))
    title = printable(path.name if "://" not in source else source)
    return _template().render(title=title, element=element, address=address, rows=rows)


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, keep_trailing_newline=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.get_template("report.html.jinja")
