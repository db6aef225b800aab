r"""Put the adapter of a short-context run into the package, in half precision.

    mmtransfer train configs/video_monitoring/short_context.yaml \
        --data.train speech --run-dir runs/short
    python examples/ship_adapter.py runs/short whisper-tiny.en

The speech comes from ``make_speech.py``. What is written goes into
``mmtransfer/speech/short_context/NAME`` and is used by every monitor of that source.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PACKAGE = Path(__file__).resolve().parent.parent / "mmtransfer" / "speech" / "short_context"


def main() -> None:
    """Copy settings and metadata, and the weights as float16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished short-context run")
    parser.add_argument("name", help="bundled source it belongs to, without bundled:")
    parser.add_argument("--margin", type=float, help="s; the run's own was judged on few clips")
    arguments = parser.parse_args()

    model, target = arguments.run / "model", PACKAGE / arguments.name
    described = model / "mmtransfer.json"
    metadata = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    if metadata.get("form") != "adapter" or "short_reader" not in metadata:
        parser.error(f"{arguments.run}: expected a finished run of configs/.../short_context.yaml")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weights = load_file(model / "adapter_model.safetensors")
    half = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    save_file(half, target / "adapter_model.safetensors", {"format": "pt"})
    shutil.copyfile(model / "adapter_config.json", target / "adapter_config.json")
    if arguments.margin is not None:
        metadata["short_reader"]["margin_s"] = arguments.margin
    text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
    (target / "mmtransfer.json").write_text(text, encoding="utf-8")
    size = (target / "adapter_model.safetensors").stat().st_size
    print(f"{target}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
