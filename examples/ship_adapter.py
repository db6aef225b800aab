r"""Put the adapter of a short-context run into the package, in half precision.

    mmtransfer train configs/video_monitoring/short_context.yaml \
        --data.train speech --run-dir runs/short
    python examples/ship_adapter.py runs/short whisper-tiny.en

The speech comes from ``make_speech.py``. What is written goes into
``mmtransfer/short_context/NAME`` and is used by every monitor of that source.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PACKAGE = Path(__file__).resolve().parent.parent / "mmtransfer" / "short_context"


def main() -> None:
    """Copy settings and metadata, and the weights as float16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished short-context run")
    parser.add_argument("name", help="bundled source it belongs to, without bundled:")
    arguments = parser.parse_args()

    model, target = arguments.run / "model", PACKAGE / arguments.name
    metadata = json.loads((model / "mmtransfer.json").read_text(encoding="utf-8"))
    if metadata["form"] != "adapter" or "short_reader" not in metadata:
        parser.error(f"{arguments.run}: expected a run of configs/.../short_context.yaml")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weights = load_file(model / "adapter_model.safetensors")
    half = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    save_file(half, target / "adapter_model.safetensors", {"format": "pt"})
    for name in ("adapter_config.json", "mmtransfer.json"):
        shutil.copyfile(model / name, target / name)
    size = (target / "adapter_model.safetensors").stat().st_size
    print(f"{target}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
