"""`mmtransfer monitor`: sources on the command line or in a file, text on the terminal."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmtransfer.cli.common import BEAM_HELP, add_engine, add_model, at_revision, quiet_libraries
from mmtransfer.data.printing import printable, whole_text
from mmtransfer.errors import UserError

if TYPE_CHECKING:
    from mmtransfer.monitoring import MonitorOptions, MonitorStats, Session, Sink

_OTHERS = ("verb", "run", "flags", "sources", "cameras", "dashboard", "quiet", "revision", "verify")
"""Arguments that are not fields of `MonitorOptions`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the sources, and a flag for each of `MonitorOptions`, which checks the values."""
    parser.description = "Transcribe the speech of recordings and live streams, segment by segment."
    # What is not given is left to the file of cameras, or to MonitorOptions.
    parser.argument_default = argparse.SUPPRESS
    add_model(parser)
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        default=[],
        help="video or audio files, folders that receive recordings, streams (rtsp://, http://, "
        "tcp://, ...), audio devices (alsa:hw:0), - for standard input, or pcm:RATE for raw 16-bit "
        "audio there",
    )
    parser.add_argument(
        "--cameras",
        metavar="FILE.yaml",
        default=None,
        help="named sources with their own settings, and options, from a YAML file",
    )
    parser.add_argument(
        "--channels",
        type=_number,
        metavar="mix|split|N",
        help="mix: average all channels (default); split: transcribe each channel separately, as "
        "NAME-1, NAME-2, ...; N: channel N alone",
    )
    parser.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        help="treat the sources as live (reconnect when they end), or as recordings; by default "
        "detected for each source",
    )
    add_recognition(parser)
    _add_outputs(parser)
    flags = {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings}
    parser.set_defaults(flags=flags)


def add_recognition(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each of `RecognitionOptions`, which checks the values."""
    parser.add_argument(
        "--language", help="ISO code, for multilingual models; auto detects it for each segment"
    )
    add_engine(parser)
    parser.add_argument(
        "--beam",
        dest="beam_size",
        type=_number,
        metavar="N",
        help=BEAM_HELP,
    )
    parser.add_argument(
        "--words", action="store_true", help="write word timestamps to .jsonl output"
    )
    parser.add_argument(
        "--line-seconds",
        dest="line_s",
        type=_number,
        metavar="N",
        help="longest line of text in seconds (default 7)",
    )
    parser.add_argument(
        "--line-characters",
        type=_number,
        metavar="N",
        help="longest line of text in characters; subtitles put half on each of two rows "
        "(default 84)",
    )
    parser.add_argument(
        "--prompt",
        type=whole_text,
        metavar="TEXT",
        help="names and words to expect, as prompt of the decoder",
    )
    parser.add_argument(
        "--context",
        dest="context_s",
        type=_number,
        metavar="SECONDS",
        help="shortest encoder context, or 'full' for the full window (30 s for Whisper); by "
        "default the one stored with the model",
    )
    parser.add_argument(
        "--threads", type=_number, metavar="N", help="CPU threads; 0 uses every core (default)"
    )
    parser.add_argument(
        "--sentiment", metavar="MODEL", help="classify each transcript with this model"
    )
    parser.add_argument(
        "--sounds",
        metavar="MODEL",
        help="report sounds (alarm, glass, ...) that this model of sound classes finds",
    )
    parser.add_argument(
        "--sound-thresholds",
        nargs="+",
        action=_Numbers,
        metavar="CLASS=P",
        help="probability over which a sound is reported, by class; default=P for the others (0.8)",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="also write to these files: .jsonl, .srt, .vtt, .ass, .txt, or .html for a report",
    )
    parser.add_argument(
        "--journal",
        metavar="DIR",
        help="write-ahead journal; restart with the same folder to resume",
    )
    parser.add_argument(
        "--keywords",
        type=whole_text,
        nargs="+",
        action="extend",
        metavar="PHRASE",
        help="words and phrases that raise an alert; matched by spelling and by sound",
    )
    parser.add_argument(
        "--webhook",
        metavar="URL",
        help="send alerts by HTTP POST as JSON; signed if MMTRANSFER_WEBHOOK_SECRET is set",
    )
    parser.add_argument(
        "--mqtt",
        metavar="URL",
        help="publish alerts as JSON to mqtt://HOST/TOPIC (pip install 'mmtransfer[mqtt]')",
    )
    parser.add_argument(
        "--loud",
        dest="loud_db",
        type=_number,
        metavar="DB",
        help="alert on sounds DB above the background level (median of the last minute)",
    )
    parser.add_argument(
        "--alert-clips", metavar="DIR", help="save a short recording around each alert"
    )
    parser.add_argument(
        "--redact",
        nargs="+",
        type=_rule,
        metavar="KIND",
        help="take these out of texts before they are written or sent: phone, email, card, "
        "names=FILE (one on each line), pattern=REGEX",
    )
    parser.add_argument(
        "--redact-clips",
        action="store_true",
        help="silence these words in --alert-clips, and what has no text there, as well",
    )
    parser.add_argument(
        "--retention",
        nargs="+",
        action=_Numbers,
        metavar="KIND=DAYS",
        help="days for which text, clips and audio that waits are kept (text=90 clips=30 audio=2)",
    )
    parser.add_argument(
        "--partial",
        action=argparse.BooleanOptionalAction,
        help="print provisional text while speech goes on (live sources); on a terminal by default",
    )
    parser.add_argument(
        "--dashboard",
        action="store_true",
        default=False,
        help="show a table of all sources below the text",
    )
    parser.add_argument(
        "--metrics-port",
        metavar="[HOST:]PORT",
        help="serve Prometheus metrics; on localhost unless HOST is given",
    )
    parser.add_argument(
        "--quiet", action="store_true", default=False, help="print no transcript lines"
    )


class _Numbers(argparse.Action):
    """NAME=NUMBER ... as a dictionary; what these may be is checked where the options are."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        pairs = [value.rpartition("=") for value in values]
        found = {name.strip(): _number(level) for name, _, level in pairs}
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **found})


def _rule(text: str) -> str | dict[str, str]:
    """A kind of what is redacted, by itself or with its file or expression."""
    name, equals, value = whole_text(text).partition("=")
    return {name: value} if equals else name


def _number(text: str) -> int | float | str:
    """A value as a number, if it is one; what it may be is checked where the options are."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run(arguments: argparse.Namespace) -> int:
    """Monitor until the sources end or a signal comes; returns the exit code."""
    # Recognition has threads of its own; those of NumPy's matrix products, whose number is read
    # when it is imported, would stand in their way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    quiet_libraries()
    from mmtransfer.monitoring import Session
    from mmtransfer.monitoring.outputs.dashboard import dashboard
    from mmtransfer.monitoring.outputs.sinks import StandardOutput

    options = _options(arguments)
    is_partial = options.partial
    if is_partial is None:
        is_partial = sys.stdout.isatty()
    is_partial = is_partial and not arguments.quiet
    options = replace(options, partial=is_partial or arguments.dashboard)
    with Session(options) as session, ExitStack() as opened:
        terminal = StandardOutput(
            name_source=len(session.cameras) > 1,
            # The table shows provisional text, too.
            partial=is_partial and not arguments.dashboard,
            quiet=arguments.quiet,
        )
        opened.callback(lambda: print(summary(session.stats), file=sys.stderr))
        if arguments.dashboard:
            opened.enter_context(dashboard(session.stats))
        return _follow(session, terminal)


def _options(arguments: argparse.Namespace) -> MonitorOptions:
    """What the command line says, on top of what the file of cameras says."""
    from mmtransfer.monitoring.options import MonitorOptions, OptionError, load_options

    given = {name: value for name, value in vars(arguments).items() if name not in _OTHERS}
    given["model"] = at_revision(arguments.model, getattr(arguments, "revision", None))
    if arguments.sources and arguments.cameras:
        raise UserError("give either SOURCE... or --cameras, not both.")
    if not arguments.sources and not arguments.cameras:
        raise UserError("expected SOURCE... or --cameras FILE.yaml. See mmtransfer monitor -h.")
    try:
        if arguments.cameras:
            return load_options(arguments.cameras, **given)
        return MonitorOptions(**given, sources=arguments.sources)
    except OptionError as error:
        flag = arguments.flags.get(error.name, error.name)
        raise UserError(
            f"argument {flag}: {error.problem}. See mmtransfer monitor --help."
        ) from None


def _follow(session: Session, terminal: Sink) -> int:
    from mmtransfer.monitoring import SourceEnd, SourceEvent
    from mmtransfer.speech.audio import MediaError

    stops: list[int] = []

    def stop(number: int, frame: Any) -> None:
        """What has been cut is still decoded; a second signal ends it at once."""
        if stops:
            raise KeyboardInterrupt
        stops.append(number)
        session.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for item in session.items():
            if isinstance(item, SourceEvent):
                print(
                    printable(f"{item.camera}: {item.event} {item.detail}".strip()), file=sys.stderr
                )
            elif isinstance(item, SourceEnd):
                if isinstance(item.error, MediaError):
                    print(printable(f"mmtransfer: error: {item.error}"), file=sys.stderr)
            else:
                terminal.write(item)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + stops[0] if stops else 2 if session.stats.failed else 0


def summary(stats: MonitorStats) -> str:
    """The last line of a run."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in stats.rejected.items())
    dropped = f"; {stats.dropped} dropped" if stats.dropped else ""
    if stats.sounds:
        counts = ", ".join(f"{count} {label}" for label, count in sorted(stats.sounds.items()))
        dropped += f"; sounds: {counts}"
    if stats.unclassified_s:
        dropped += f"; {stats.unclassified_s:.1f} s in which sounds were not classified"
    if stats.revised or stats.not_revised:
        late = f" ({stats.not_revised} turns not, for lack of time)" if stats.not_revised else ""
        dropped = f"; {stats.revised} of {stats.lines} lines revised{late}{dropped}"
    return (
        f"{stats.segments} segments from {stats.audio_s:.1f} s of audio in {stats.wall_s:.1f} s "
        f"(real-time factor {stats.real_time_factor:.3f}); {stats.decoded_again} decoded again; "
        f"rejected: {rejected or 'none'}{dropped}"
    )
