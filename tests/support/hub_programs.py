"""The environment of programs that talk to the stand-in for the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import child_environment
from support.children import run_command

TOKEN = "hf_of_this_test"

# Every output as a digest of its bytes: equal digests are equal bits.
OUTPUTS = """
import hashlib, json, sys
import numpy as np, torch
import mmtransfer
from mmtransfer.text.classifier import TextModel

asked = json.load(sys.stdin)
torch.set_num_threads(1)
noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
digest = lambda array: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
found = {}
for name, source, revision in asked["models"]:
    model = mmtransfer.load(source, revision=revision)
    if isinstance(model, TextModel):
        encoded = model.encode(asked["texts"], [None] * len(asked["texts"]))
        logits = model.encoded_logits(encoded, device="cpu")
        rest = [vars(prediction) for prediction in model.predict(asked["texts"])]
    else:
        hypotheses = mmtransfer.Recognizer(model).transcribe([noise, noise[:9_000]])
        rest = [[h.text, h.tokens, h.avg_logprob] for h in hypotheses]
        with torch.inference_mode():
            if hasattr(model, "symbols"):
                mask = model.mask([1.5], 1.5)
                logits = model.network(model.inputs([noise], 1.5), mask).numpy()
            else:
                prompt = torch.tensor([model.prompt(timestamps=False)])
                features = model.features([noise], 30.0)
                logits = model.model(features, decoder_input_ids=prompt).logits.numpy()
    found[name] = {"logits": digest(logits), "shape": list(logits.shape), "rest": rest}
json.dump(found, sys.stdout)
"""

# Runs the command line several times, with whatever any library writes to either stream; waits
# between attempts, ours and those of the library, are noted and take no time.
COMMANDS = """
import json, os, sys, tempfile, time, traceback
from mmtransfer.cli import main

waits, results = [], []
time.sleep = waits.append
inherited = dict(os.environ)
answer = os.fdopen(os.dup(1), "w")
for environment, argv in json.load(sys.stdin):
    os.environ.update(inherited | environment)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = main(argv)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    results.append([code, *texts, list(waits)])
    waits.clear()
json.dump(results, answer)
answer.close()
"""


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


def python(program: str, given, hub_address: str, home: Path, *arguments: str) -> str:
    """Standard output of a program in a process of its own."""
    code, out, error = run_command(
        *arguments,
        program=program,
        given=json.dumps(given),
        environment=environment(hub_address, home),
    )
    assert code == 0, error
    return out


def commands(given: list[Any], hub_address: str, home: Path) -> list[Any]:
    """(exit code, output, error output) of command lines, each with changes to the environment."""
    return [answer[:3] for answer in json.loads(python(COMMANDS, given, hub_address, home))]
