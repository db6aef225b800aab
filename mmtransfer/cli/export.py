"""`mmtransfer export`: a run in the format of another engine."""

from __future__ import annotations

import argparse
import sys

from mmtransfer.cli.common import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the format, and where it goes."""
    parser.description = (
        "Write a run's model in the format of another engine, and compare what it gives there with "
        "what it gives here on examples of the run; what differs is not kept."
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=("ct2", "onnx"),
        help="ct2: CTranslate2, a Whisper for faster-whisper, in int8 or, where that gives "
        "another text, in float32; onnx: Whisper, texts, CTC and sounds on wav2vec 2.0, HuBERT and "
        "WavLM (pip install 'mmtransfer[onnx]')",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export and say how it was compared; returns the exit code."""
    quiet_libraries()
    from mmtransfer.runs.exports import export

    made = export(arguments.run_folder, arguments.to, arguments.format)
    how = f"in {made.precision}, gives the same on {made.examples} examples"
    print(f"{arguments.to}: {how}", file=sys.stderr)
    return 0
