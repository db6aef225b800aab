"""The environment of programs that talk to the stand-in for the Hub."""

from __future__ import annotations

from pathlib import Path

from conftest import child_environment

TOKEN = "hf_of_this_test"


def environment(hub_address: str, home: Path) -> dict[str, str]:
    inherited = {k: v for k, v in child_environment().items() if not k.startswith("HF_")}
    return inherited | {
        "HF_ENDPOINT": hub_address,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
