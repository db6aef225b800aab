"""The verbs: each a module, its arguments known without what it needs to run."""

import argparse
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import child_environment

from mmtransfer.cli import VERBS, main
from mmtransfer.config import build_config
from mmtransfer.errors import UserError

HEAVY = ("torch", "numpy", "av", "transformers", "datasets")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_arguments_and_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: mmtransfer {verb}")
    parser = argparse.ArgumentParser()
    import_module(f"mmtransfer.cli.{verb.replace('-', '_')}").add_arguments(parser)
    assert parser.description is not None
    assert parser.description.split()[0] in printed


def test_help_needs_no_library():
    program = (
        "import sys\nfrom mmtransfer.cli import main\n"
        "for arguments in ([], ['monitor', '--help'], ['evaluate', '--help'], ['predict', '-h']):\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        f"print([name for name in {HEAVY} + ('pydantic',) if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_verb_that_is_none_and_an_argument_that_is_none_are_one_line(capsys):
    assert main(["monitr", "m"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'monitr'" in line
    assert main(["publish", "run", "me/it", "--pubic"]) == 2
    assert "unknown argument --pubic. See mmtransfer publish --help." in capsys.readouterr().err
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mkl_malloc: failed to allocate memory"),
        RuntimeError("CUDA failed with error out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"
        ),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        MemoryError(),
        MemoryError("Unable to allocate 8.00 TiB"),
    ],
)
def test_memory_that_runs_out_is_one_line(monkeypatch, capsys, error):
    def run(arguments):
        raise error

    monkeypatch.setattr("mmtransfer.cli.backbones.run", run)
    assert main(["backbones"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmtransfer: error: out of memory (")
    assert (str(error) or "MemoryError") in line
    assert "run again" in line


def test_other_errors_of_a_library_keep_their_trace(monkeypatch):
    def run(arguments):
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr("mmtransfer.cli.backbones.run", run)
    with pytest.raises(RuntimeError, match="scalar type"):
        main(["backbones"])


def test_behind_two_dashes_everything_is_a_source(capsys):
    for arguments in (["--keywords", "fire", "--", "-a.mp4"], ["--", "-a.mp4"]):
        assert main(["monitor", "bundled:whisper-tiny.en", *arguments]) == 2
        assert "-a.mp4: no such" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1025", "99999999999999999999"])
def test_threads_that_no_machine_has_are_one_line(number, capsys):
    assert main(["predict", "m", "--text", "x", "--threads", number]) == 2
    assert "expected 1024 threads at most" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"runtime\.threads"):
        build_config({"runtime": {"threads": int(number)}})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "c.yaml", "--source", "x"], "'--source' is called '--source_model' now"),
        (["relate", "c.yaml", "--data.sources={}"], "is called '--data.source_domain' now"),
        (["monitor", "m", "a.mp4", "--watch", "fire"], "'--watch' is called '--keywords' now"),
        (["monitor", "m", "a.mp4", "--clips=c"], "'--clips' is called '--alert-clips' now"),
    ],
)
def test_an_option_works_by_its_former_name_and_names_the_new_one(arguments, named, caplog, capsys):
    assert main(arguments) == 2
    assert named in caplog.text
    error = capsys.readouterr().err  # of what comes next: there is no such file or model
    assert "unknown argument" not in error
