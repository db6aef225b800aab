"""The unit of systemd."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

UNIT = ROOT / "examples" / "service" / "mmtransfer.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path):
    """A program has to be there, so this interpreter stands in for it."""
    unit = UNIT.read_text(encoding="utf-8")
    program = "/opt/mmtransfer/bin/mmtransfer"
    assert f"ExecStart={program} serve" in unit
    path = tmp_path / UNIT.name
    path.write_text(unit.replace(program, sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
