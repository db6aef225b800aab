"""Inputs that nobody thought of: each target on its kept corpus and on mutations of it."""

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import fuzzing

SECONDS = int(os.environ.get("MMTRANSFER_FUZZ_SECONDS", "600"))
COUNTS = {"configuration": 60, "cameras": 120, "subtitles": 200, "journal": 60, "tensors": 150}


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_a_kept_input_and_what_is_made_of_it_is_an_answer_or_one_line(name):
    inputs = fuzzing.seeds(name)
    for data in inputs:
        fuzzing.run(name, data)
    rng = random.Random(0)
    for _ in range(COUNTS.get(name, 60)):
        fuzzing.run(name, fuzzing.mutated(inputs, rng))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_coverage_finds_no_input_that_breaks_it(name, tmp_path):
    if find_spec("atheris") is None:
        pytest.skip("atheris has no wheel for this Python")
    program = Path(fuzzing.__file__)
    command = [sys.executable, str(program), name, str(SECONDS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [path for path in tmp_path.iterdir() if path.is_file()]
    assert done.returncode == 0, f"{found}: {done.stderr[-3000:]}"
