"""Bytes made to break what opens files: targets, mutations of a kept corpus, and the same driven by
coverage with atheris.

    python tests/support/fuzzing.py TARGET SECONDS FOLDER

leaves what breaks a target in FOLDER, beside the inputs that reach new code.
"""

import random
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CORPUS = Path(__file__).parent.parent / "hostile" / "corpus"
SECONDS = 1.0  # of CPU that one input may take
_NATIVE = ("media", "tensors")  # whose parsers show no coverage
_SUBTITLES = (".srt", ".vtt", ".ass")
_TOKENS = [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"-1", b"1e999", b"NaN", b"null", b"[" * 50]
_TOKENS += [b"{" * 50, b"&a [*a, *a]", b"<<: ", b"!!python/none", b"\x1b[2J", b"9" * 40, b"-->"]
_TOKENS += [b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\n\n", b'"', b"://", b"WEBVTT", b"[Events]\n"]


def configuration(data: bytes, folder: Path) -> None:
    """A run's configuration."""
    from mmtransfer.config import load_config

    (folder / "x.yaml").write_bytes(data)
    load_config(folder / "x.yaml")


def cameras(data: bytes, folder: Path) -> None:
    """A file of cameras, and of options beside them."""
    from mmtransfer.monitoring.options import load_options

    (folder / "x.yaml").write_bytes(data)
    load_options(folder / "x.yaml")


def subtitles(data: bytes, folder: Path) -> None:
    """Subtitles in the format that the first byte chooses."""
    from mmtransfer.speech.subtitles import read_subtitles

    path = folder / f"x{_SUBTITLES[data[0] % 3 if data else 0]}"
    path.write_bytes(data[1:])
    read_subtitles(path)


def journal(data: bytes, folder: Path) -> None:
    """A day of a journal, its head, or a spooled segment, as the first byte chooses."""
    from mmtransfer.monitoring import Journal

    sources = {"a": "rtsp://x"}
    Journal(folder / "j", model="m", model_digest="d", sources=sources).close()
    names = ("2026-01-01.0000.jsonl", "journal.json", "spool/1.segment")
    path = folder / "j" / names[data[0] % 3 if data else 0]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data[1:])
    opened = Journal(folder / "j", model="m", model_digest="d", sources=sources)
    try:
        opened.known(["a"], [])
        list(opened.records())
        list(opened.spool().waiting())
    finally:
        opened.close()


def tensors(data: bytes, folder: Path) -> None:
    """A safetensors file as head, sample and adapter."""
    import torch

    from mmtransfer.errors import UserError
    from mmtransfer.runs.sample import SAMPLE, _read
    from mmtransfer.transfer.adapters import adapter_shapes
    from mmtransfer.transfer.networks import read_head

    for name in ("head.safetensors", SAMPLE, "adapter_model.safetensors"):
        (folder / name).write_bytes(data)
    opened: list[Callable[[], Any]] = [
        lambda: read_head(folder, torch.nn.Linear(2, 1)),
        lambda: _read(folder / SAMPLE),
        lambda: adapter_shapes(folder),
    ]
    for call in opened:
        with suppress(UserError):
            call()


def media(data: bytes, folder: Path) -> None:
    """The probe of a recording: its track, its length and the first seconds of audio."""
    from mmtransfer.speech.audio import recording_length_s, stream_audio

    path = folder / "x.bin"
    path.write_bytes(data)
    recording_length_s(path)
    for _, _ in zip(range(8), stream_audio(path), strict=False):
        pass


TARGETS = {
    target.__name__: target
    for target in (configuration, cameras, subtitles, journal, tensors, media)
}


def run(name: str, data: bytes) -> None:
    """One input on a target.

    Raises:
        Exception: anything but an answer or one line within the time.
    """
    from mmtransfer.errors import UserError

    _import(name)
    with TemporaryDirectory() as folder:
        started = time.process_time()
        try:
            TARGETS[name](data, Path(folder))
        except UserError as error:
            text = str(error)
            if "\n" in text or len(text) > 4000:
                raise AssertionError(f"not one line: {text[:200]!r}") from None
        took = time.process_time() - started
    if took > SECONDS:
        raise TimeoutError(f"{took:.1f} s of CPU for {len(data)} bytes")


@cache
def _import(name: str) -> None:
    """What a target imports is no time of an input's."""
    from mmtransfer.errors import UserError

    with TemporaryDirectory() as folder, suppress(UserError):
        TARGETS[name](b"", Path(folder))


def seeds(name: str) -> list[bytes]:
    """The kept inputs of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutated(inputs: list[bytes], rng: random.Random) -> bytes:
    """One of the inputs with a few bytes, stretches and words changed."""
    data = bytearray(rng.choice(inputs))
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64, 1 << 12)))
        part = bytes(data[start:end])
        other = rng.choice(inputs)
        cut = rng.randrange(len(other) + 1)
        data[start:end] = rng.choice(
            (
                b"",
                bytes(rng.randrange(256) for _ in part),
                part * 3,
                part[::-1],
                rng.choice(_TOKENS) + part,
                rng.choice(_TOKENS),
                other[cut : cut + 64],
            )
        )
    return bytes(data[: 1 << 16])


def _mutate(name: str, seconds: float, last: Path) -> None:
    """Mutations for so long; the last stays there if it breaks the target."""
    inputs, rng, started = seeds(name), random.Random(), time.monotonic()
    while time.monotonic() - started < seconds:
        data = mutated(inputs, rng)
        last.write_bytes(data)
        run(name, data)
    last.unlink(missing_ok=True)


def main(name: str, seconds: str, folder: str) -> None:
    """Fuzz a target, with atheris where its code is in Python; ends the process."""
    sys.path[:0] = [str(Path(__file__).parents[2])]
    if name in _NATIVE:
        _mutate(name, float(seconds), Path(folder, "last"))
        return
    import atheris  # type: ignore[import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["mmtransfer", "yaml", "pysubs2"]):
        run(name, b"")
    kept = Path(folder, name)
    shutil.copytree(CORPUS / name, kept, dirs_exist_ok=True)
    limits = [f"-max_total_time={seconds}", "-max_len=65536", "-timeout=60", "-rss_limit_mb=4096"]
    found = f"-artifact_prefix={folder}/"
    atheris.Setup([sys.argv[0], str(kept), *limits, found], lambda data: run(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
