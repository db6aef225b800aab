import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, child_environment

PACKAGE = ROOT / "mmtransfer"
CODE = ("mmtransfer", "benchmarks", "tasks", "examples")
LOADERS = ("from_pretrained", "from_config", "pipeline")
# Lowest first: what lies in one of these may import from itself and from what stands before it.
LAYERS = [
    "errors",
    "progress",
    "cache",
    "data",
    "config",
    "runtime",
    "hub",
    "transfer",
    "speech",
    "text",
    "sound",
    "runs",
    "monitoring",
    "server",
    "scale",
    "cli",
    "__init__",
    "__main__",
]


def test_imports_point_one_way():
    level = {name: i for i, name in enumerate(LAYERS)}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert own in level, f"{path.name} has no layer"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmtransfer."):
                other = (node.module or "").split(".")[1]
                if level[other] > level[own]:
                    wrong.append(f"{path.name} imports {other}")
    assert not wrong


STARTS = ["import mmtransfer", "from mmtransfer.cli import main; main(['--help'])"]


def start(code: str) -> float:
    """Seconds that a fresh interpreter takes for it."""
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return time.perf_counter() - started


@pytest.mark.parametrize("code", STARTS)
def test_import_and_help_load_nothing_heavy(code: str):
    heavy = {"torch", "transformers", "numpy", "av", "pydantic", "datasets"}
    start(f"import sys\n{code}\nfound = {heavy} & set(sys.modules)\nassert not found, found")


@pytest.mark.slow  # for its clock
@pytest.mark.parametrize("code", STARTS)
def test_import_and_help_are_fast(code: str):
    assert min(start(code) for _ in range(3)) < 0.5


def test_nothing_loads_a_model_together_with_its_code():
    loaders, unsafe = 0, []
    for path in (p for folder in CODE for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            # GenerationConfig is JSON alone, and keeps whatever it is given among its settings.
            if name.split(".")[-1] not in LOADERS or name.startswith("GenerationConfig."):
                continue
            loaders += 1
            assert isinstance(node, ast.Call)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("trust_remote_code") != "False":
                unsafe.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not unsafe
    assert loaders > 10


def test_every_public_name_is_importable():
    import mmtransfer

    for name in mmtransfer.__all__:
        assert getattr(mmtransfer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmtransfer.nothing  # noqa: B018


def test_no_test_imports_another_test():
    """What several of them need is in tests/support."""
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path.name}: {name}" for name in names if name.startswith("test_")]
    assert not wrong


@pytest.mark.parametrize("name", ["video_monitoring", "news_sentiment"])
def test_task_scripts_are_short(name):
    lines = Path(ROOT, "tasks", f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
