"""What several verbs have in common."""

from __future__ import annotations

import argparse
import os
import warnings
from datetime import datetime
from typing import Any

from mmtransfer.data import MOST_THREADS

MODEL_HELP = "run folder, checkpoint folder, Hub id (or ID@REVISION), or bundled:NAME"
REVISION_HELP = "branch, tag or commit of a model on the Hub"
INDEX_HELP = (
    "SQLite file (default: index.sqlite in the journal), or postgresql://USER@HOST/DATABASE, which "
    "several machines write to"
)
VERIFY_HELP = "who must have signed the model: the file of a public key, or WHO,ISSUER (Sigstore)"
BEAM_HELP = (
    "beam size; 1 is greedy (default: 5 with ctranslate2, or 3 in long contexts beside an adapter "
    "for short ones; else 1)"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument that names a model, its revision, and who must have signed it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument("--verify", metavar="IDENTITY", help=VERIFY_HELP)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add what recognises speech, in which precision and where."""
    parser.add_argument(
        "--engine",
        metavar="auto|ctranslate2|transformers",
        help="auto: ctranslate2 for Whisper on CPU, else transformers",
    )
    parser.add_argument(
        "--compute",
        dest="compute_type",
        metavar="int8|float16|float32",
        help="precision of ctranslate2 (default: int8 on CPU, float16 on GPU)",
    )
    parser.add_argument(
        "--device",
        metavar="auto|cpu|cuda|mps",
        help="where models compute; auto takes a GPU if there is one",
    )


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Add where work in bulk is done."""
    parser.add_argument(
        "--ray",
        metavar="local|auto|HOST:PORT",
        help="work on a Ray cluster: of this machine, the one that it belongs to, or another",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="copies of the model on Ray (default: as many as there is room for)",
    )
    parser.add_argument(
        "--gpus-per-worker", type=float, metavar="G", help="GPUs, or share of one, for each"
    )


def at_revision(model: str, revision: str | None) -> str:
    """The name of a model at a revision, as `hub.checkpoint.resolve` takes it."""
    return model if revision is None else f"{model}@{revision}"


def check_signature(arguments: argparse.Namespace) -> None:
    """Make sure that a command's model is signed as `--verify` asks, and that the command takes the
    commit that was looked at.
    """
    from mmtransfer.hub.checkpoint import resolve
    from mmtransfer.hub.signing import verify

    found = resolve(arguments.model, getattr(arguments, "revision", None))
    verify(found, arguments.verify)
    arguments.model = found.source
    arguments.revision = found.commit


def data_config(arguments: argparse.Namespace, *names: str, **sections: dict[str, Any]) -> Any:
    """A configuration with those of these settings of the data that were given, and others."""
    from mmtransfer.config import build_config

    given = {name: getattr(arguments, name) for name in names}
    data = {name: value for name, value in given.items() if value is not None}
    return build_config({"data": data, **sections}, origin="command line")


def quiet_libraries() -> None:
    """No advice from transformers between our own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported


def count(text: str) -> int:
    """An argument that is a number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, found {text!r}")
    return int(text)


def threads(text: str) -> int:
    """An argument that is a number of threads."""
    number = count(text)
    if number > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected {MOST_THREADS} threads at most, found {number}")
    return number


def moment(text: str) -> float:
    """A day or time of this place, as seconds since 1970."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(
            f"expected a date like 2026-11-24 or 2026-11-24T18:30, found {text!r:.40}"
        ) from None
