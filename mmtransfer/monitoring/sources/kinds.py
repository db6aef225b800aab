"""What a source is, decided here and once: live or a recording, and how many channels it is read
as.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from mmtransfer.errors import UserError
from mmtransfer.monitoring.sources.cameras import Camera
from mmtransfer.speech.addresses import public_address
from mmtransfer.speech.audio import channel_count, is_piped
from mmtransfer.speech.recordings import is_recording
from mmtransfer.speech.remote import open_address

logger = logging.getLogger(__name__)
_LIVE_SCHEMES = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "tcp", "tls", "udp", "mms"}
_DEVICES = ("alsa", "pulse", "avfoundation", "dshow", "jack", "oss")
_ANSWER_S = 10.0  # to say what it is; who does not answer by then goes by its address
_AT_ONCE = 16
_CHANNELS = 2  # of what cannot be asked before it is read


def is_live(source: str) -> bool:
    """Whether a source goes on for ever by its address alone: a stream's, or an audio device
    (`alsa:hw:0`). An http address can be either; see `settle`.
    """
    parts = urlsplit(source)
    if parts.scheme in ("http", "https"):
        return not is_recording(parts.path)
    return is_device(source) or (parts.scheme in _LIVE_SCHEMES and "://" in source)


def is_device(source: str) -> bool:
    """Whether a source is an audio device."""
    return source.split(":", 1)[0] in _DEVICES and ":" in source


def is_folder(source: str) -> bool:
    """Whether a source is a folder that recordings are written to."""
    return "://" not in source and Path(source).is_dir()


def goes_on(camera: Camera) -> bool:
    """Whether a camera is live: as it was settled or ordered, else by its address."""
    return is_live(camera.url) if camera.live is None else camera.live


def settle(cameras: Sequence[Camera]) -> list[Camera]:
    """Cameras of which it is known whether they are live, and which of their channels each reads:
    of one to be split, there is one for each channel.

    An http source says itself whether it ends: by its playlist (#EXT-X-ENDLIST) or its length.
    Where it does not answer, its address has to do.

    Raises:
        UserError: an order that does not fit the source.
    """
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="asking") as pool:
        lives = list(pool.map(_settled_live, cameras))
    settled = []
    taken = {camera.name for camera in cameras}
    for camera, live in zip(cameras, lives, strict=True):
        if live and camera.live and "://" not in camera.url and not is_device(camera.url):
            raise UserError(f"{camera.name}: live: expected a stream or a device, found a path.")
        camera = replace(camera, live=live)
        if camera.channels != "split":
            settled.append(camera)
            continue
        for number in range(1, _channels(camera) + 1):
            name = f"{camera.name}-{number}"
            if name in taken:
                raise UserError(
                    f"{camera.name}: one of its channels would be named like the camera '{name}'. "
                    "Rename one."
                )
            taken.add(name)
            settled.append(replace(camera, name=name, channels=number))
    return settled


def _settled_live(camera: Camera) -> bool:
    if camera.live is None and camera.url.startswith(("http://", "https://")):
        says = _is_live_by_answer(camera.url)
        if says is not None:
            return says
    return goes_on(camera)


def _is_live_by_answer(address: str) -> bool | None:
    """What an http source says of itself; None if it does not answer."""
    try:
        with open_address(address, timeout=_ANSWER_S, metadata_errors="replace") as container:
            # A playlist without its end has no length; a file has one, in bytes at least.
            is_playlist = container.format.name in ("hls", "dash")
            return not container.duration and (is_playlist or container.size <= 0)
    except Exception:  # whatever it is, it is reported when the source is opened
        return None


def _channels(camera: Camera) -> int:
    if is_piped(camera.url):
        raise UserError(
            f"{camera.name}: piped input cannot be split into channels, since it comes once only. "
            "Name a file, or one channel."
        )
    if goes_on(camera) or is_folder(camera.url):
        logger.info("%s: split into %d channels", camera.name, _CHANNELS)
        return _CHANNELS
    count = channel_count(camera.url)
    logger.info("%s: split into %d channels", public_address(camera.url), count)
    return count
