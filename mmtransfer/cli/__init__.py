"""The command line: parses, calls one function, prints.

    mmtransfer train configs/video_monitoring/end_to_end.yaml --data.train FOLDER
    mmtransfer relate configs/news_sentiment/feature.yaml --candidates MODEL
    mmtransfer lr-range configs/news_sentiment/end_to_end.yaml --data.train FILE
    mmtransfer evaluate MODEL --data FOLDER
    mmtransfer predict MODEL --text TEXT
    mmtransfer compare CONFIG.yaml --steps N --to DIR
    mmtransfer merge MODEL MODEL --to RUN
    mmtransfer monitor MODEL VIDEO
    mmtransfer transcribe MODEL FOLDER --output DIR
    mmtransfer serve --model NAME=MODEL
    mmtransfer token add NAME --role operator
    mmtransfer index --journal DIR --search PHRASE
    mmtransfer ship JOURNAL --to nats://HOST
    mmtransfer forget --journal DIR --before DATE
    mmtransfer publish RUN USER/NAME
    mmtransfer export RUN --to DIR --format onnx
    mmtransfer backbones

Each verb is a module here with `add_arguments(parser)` and `run(arguments)`, imported when it is
asked for; nothing heavy is imported before `run`, so that --help is immediate.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from mmtransfer import __version__
from mmtransfer.cli.common import check_signature
from mmtransfer.data.former_names import option_with_new_name
from mmtransfer.data.printing import printable
from mmtransfer.errors import UserError
from mmtransfer.runtime import is_out_of_memory
from mmtransfer.speech.addresses import without_secrets

VERBS = {
    "train": "adapt a pretrained model to your data",
    "relate": "rank source models and measure how far source domains are, untrained",
    "lr-range": "find a learning rate by a range test",
    "evaluate": "score a model on data",
    "predict": "classify texts or sounds",
    "compare": "train structures side by side and say which differences are real",
    "merge": "combine several models into one",
    "monitor": "transcribe the speech in video and live streams",
    "transcribe": "transcribe finished recordings in bulk, here or on Ray",
    "serve": "serve models and cameras to clients and a browser",
    "token": "make, list and remove the tokens of a server",
    "index": "make what was transcribed searchable, and search it",
    "ship": "send journals of many sites to one place",
    "forget": "remove what was transcribed, for good",
    "publish": "upload a run to the Hugging Face Hub",
    "export": "write a run's model for another engine (CTranslate2, ONNX)",
    "backbones": "list the pretrained models that need no download",
}
"""Modules of this package, with a line of help."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for input that cannot be used)."""
    _prepare_output()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Public())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("mmtransfer").setLevel(logging.INFO)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser(argv)
        arguments, unknown = parser.parse_known_args(argv)
        if any(text.startswith("--") for text in unknown):
            argv = [option_with_new_name(text) for text in argv]
            arguments, unknown = parser.parse_known_args(argv)
        if getattr(arguments, "sources", None) is not None:
            # What follows an option's values: argparse takes positional arguments once only. Behind
            # `--` everything is one.
            at = unknown.index("--") if "--" in unknown else len(unknown)
            options = [text for text in unknown[:at] if text[:1] == "-" and text != "-"]
            arguments.sources += [text for text in unknown[:at] if text not in options]
            arguments.sources += unknown[at + 1 :]
            unknown = options
        if unknown:
            _refuse_unknown(unknown, arguments)
        if arguments.verb is None:
            parser.print_help()
            return 0
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if getattr(arguments, "verify", None) is not None:
            check_signature(arguments)
        return int(arguments.run(arguments))
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output (head, a closed terminal) went away; that is not an error.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - keeps the exit flush from failing
        return 0
    except Exception as error:
        message = _machine_problem(error)
        if message is None:
            raise
        return _fail(message)


class _Public(logging.Formatter):
    """Messages alone, without what addresses in them hold back."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of the library
        return printable(without_secrets(super().formatMessage(record)))


def entry() -> NoReturn:
    """The program: `main`, and then the end.

    A camera that hangs leaves a thread in FFmpeg; the interpreter could crash while it is taken
    down around it, so then the process just ends.
    """
    code = main()
    if any(thread.name.startswith("connection ") for thread in threading.enumerate()):
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _prepare_output() -> None:
    """Text goes out whatever the terminal's alphabet is, and also if nobody takes it."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _fail(message: str) -> int:
    print(f"mmtransfer: error: {printable(without_secrets(message))}", file=sys.stderr)
    return 2


def _machine_problem(error: Exception) -> str | None:
    """One line for memory that is full, a disk that is, or a file that may not be written; None for
    a bug.
    """
    why = " ".join(str(error).split())
    if is_out_of_memory(error):
        return (
            f"out of memory ({why or type(error).__name__}). Free memory, or use a smaller model "
            "or smaller batches, then run again."
        )
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return f"{why}. Free space or choose another folder, then run again."
    return None


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other unusable input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of all verbs, with the arguments of the one that is asked for."""
    parser = _Parser(
        prog="mmtransfer",
        description="Transfer pretrained speech and text models to your domain, and run them on "
        "live video.",
    )
    parser.add_argument("--version", action="version", version=f"mmtransfer {__version__}")
    verbs = parser.add_subparsers(dest="verb", title="commands", metavar="COMMAND")
    asked = next((text for text in argv if text[:1] != "-"), None)
    for name, help_text in VERBS.items():
        verb = verbs.add_parser(name, help=help_text, allow_abbrev=False)
        if name == asked:
            module = import_module(f"mmtransfer.cli.{name.replace('-', '_')}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser


def _refuse_unknown(unknown: list[str], arguments: argparse.Namespace) -> None:
    option = unknown[0].split("=")[0]
    hint = ""
    if hasattr(arguments, "overrides") and option.startswith("--"):
        from mmtransfer.config import nearest_field

        hint = nearest_field(option.removeprefix("--")).replace("'", "--", 1).replace("'", "")
    verb = f" {arguments.verb}" if arguments.verb else ""
    raise UserError(f"unknown argument {option}.{hint} See mmtransfer{verb} --help.")
