"""`mmtransfer serve`: models and cameras for other programs and for a browser."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mmtransfer.cli.common import BEAM_HELP, INDEX_HELP, add_engine, quiet_libraries
from mmtransfer.errors import UserError

_INSTALL = "pip install 'mmtransfer[server]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, cameras, where to listen, who may, and how much at a time."""
    parser.description = (
        "Serve models to existing clients (OpenAI, Deepgram, Wyoming, Hugging Face), and watch "
        "cameras beside that, with one recogniser."
    )
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="NAME=MODEL",
        help="a model for speech, texts or sounds (run folder, checkpoint folder, Hub id, or "
        "bundled:NAME) and what clients call it; may be repeated",
    )
    parser.add_argument(
        "--cameras",
        type=Path,
        metavar="FILE.yaml",
        help="watch these cameras, as monitor does, before all requests",
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="write-ahead journal of the cameras, which the page searches; without cameras, that "
        "of a monitor beside it",
    )
    parser.add_argument(
        "--index",
        metavar="FILE|ADDRESS",
        help=f"where the page's search keeps its index: {INDEX_HELP}",
    )
    parser.add_argument(
        "--home-assistant",
        action="store_true",
        help="announce the cameras to Home Assistant, at the broker of `mqtt` in their file",
    )
    parser.add_argument(
        "--wyoming",
        type=int,
        metavar="PORT",
        help="also speak the Wyoming protocol of voice assistants, on loopback at this port",
    )
    parser.add_argument(
        "--host", help="address to listen at (default 127.0.0.1); others than loopback need tokens"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to listen at (default 8080); 0 takes a free one"
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="tokens that mmtransfer token wrote; named here they are needed on loopback, too",
    )
    parser.add_argument(
        "--tls-certificate", type=Path, metavar="FILE", help="certificate chain in PEM, for https"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key in PEM")
    parser.add_argument(
        "--audit",
        type=Path,
        metavar="FILE",
        help="append to this file who did what (by default it is logged)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="requests at work and waiting; further ones get 503 (default 32)",
    )
    parser.add_argument(
        "--streams", type=int, metavar="N", help="live streams at the same time (default 32)"
    )
    parser.add_argument(
        "--max-upload-mb", type=float, metavar="N", help="largest request in MB (default 512)"
    )
    parser.add_argument(
        "--max-audio-s",
        type=float,
        metavar="N",
        help="longest recording or stream in seconds (default 14400)",
    )
    parser.add_argument(
        "--language",
        help="ISO code, for multilingual models; detected for each segment where it is not given, "
        "but for cameras whose model was trained in one",
    )
    add_engine(parser)
    parser.add_argument(
        "--beam",
        dest="beam_size",
        type=int,
        metavar="N",
        help=BEAM_HELP,
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads; 0 uses every core (default)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes; returns the exit code."""
    # As in monitor: recognition has threads of its own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    quiet_libraries()
    from mmtransfer.server.options import ServerOptions, named_models

    given: dict[str, Any] = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("verb", "run", "models")
    }
    options = ServerOptions(named_models(getattr(arguments, "models", [])), **given)
    try:
        from mmtransfer.server.serve import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("mmtransfer"):
            raise
        raise UserError(f"serve needs {error.name}. {_INSTALL}") from None
    return serve(options)
