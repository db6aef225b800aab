"""The documentation: complete, its links alive, its pages in the menu."""

import importlib.util
import re
import subprocess
import sys
from argparse import ArgumentParser
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, child_environment

import mmtransfer
from mmtransfer import monitoring
from mmtransfer.cli import VERBS
from mmtransfer.config import StageConfig, field_names

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```", re.M | re.S)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The names of a page's headings, as mkdocs and others make them."""
    found = set()
    whole = BLOCK.sub("", hooks().on_page_markdown(text_of(path)))
    for title in re.findall(r"^#+ (.+)$", whole, re.M):
        plain = re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()
        found.add(re.sub(r"[\s-]+", "-", plain))
    return found | set(re.findall(r"^::: (\S+)$", text_of(path), re.M))


@cache
def hooks():
    """What mkdocs calls to generate pages."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_in_the_reference(verb):
    parser = ArgumentParser(add_help=False)
    import_module(f"mmtransfer.cli.{verb.replace('-', '_')}").add_arguments(parser)
    text = hooks().on_page_markdown(text_of(DOCS / "reference" / "cli.md"))
    text = text.split(f"## mmtransfer {verb}\n")[1].split("\n## ")[0]
    options = [o for action in parser._actions for o in action.option_strings]
    has_fields = "--train.steps" in options
    fields = set(field_names()) if has_fields else set()  # which the other page has
    options = [option for option in options if option.removeprefix("--") not in fields]
    assert [option for option in options if f"`{option}`" not in text] == []
    assert has_fields == (verb in ("train", "relate", "compare", "lr-range"))
    without = ("backbones", "serve", "token", "index", "forget")  # arguments
    assert re.search(r"\| `[A-Z]", text) or verb in without
    assert "==SUPPRESS==" not in text


def test_every_field_is_in_the_reference():
    text = hooks().on_page_markdown(text_of(DOCS / "reference" / "configuration.md"))
    sections = {name.split(".")[0] for name in field_names() if "." in name}
    names = [*field_names(), *StageConfig.model_fields]
    lacking = [n for n in names if n not in sections and f"| `{n}` |" not in text]
    assert lacking == []
    assert "| `data.train` | `str` | `none` | Training data." in text


def test_every_public_name_is_in_the_reference():
    text = text_of(DOCS / "reference" / "python.md")
    names = [f"mmtransfer.{name}" for name in mmtransfer.__all__]
    names += [f"mmtransfer.monitoring.{name}" for name in monitoring.__all__]
    same = {"mmtransfer.monitoring.load_monitor", "mmtransfer.monitoring.monitor"}
    documented = set(re.findall(r"^::: (\S+)$", text, re.M))
    assert set(names) - same - documented == {"mmtransfer.__version__"}
    for name in documented:
        module, _, last = name.rpartition(".")
        assert getattr(import_module(module), last).__doc__, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_are_alive(page):
    dead = []
    for pair in LINK.findall(BLOCK.sub("", text_of(page))):
        link = pair[0] or pair[1]
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_every_page_is_in_the_menu():
    menu = text_of(ROOT / "mkdocs.yml").split("\nnav:\n")[1]
    listed = re.findall(r": (\S+\.md)$", menu, re.M)
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_the_readme_is_short_and_begins_with_a_command():
    text = text_of(ROOT / "README.md")
    assert len(text.encode()) <= 9 * 1024
    assert text.splitlines().index("```") < 25


def test_one_place_has_the_version():
    assert 'dynamic = ["version"]' in text_of(ROOT / "pyproject.toml")
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["version"] == mmtransfer.__version__
    assert f"## {mmtransfer.__version__}" in text_of(ROOT / "CHANGELOG.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_names_what_there_is(page):
    """Each block compiles, and what it imports from this package exists."""
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S):
        compile(block, str(page), "exec")
        for module, names in re.findall(r"^from (mmtransfer\S*) import (.+)$", block, re.M):
            for name in names.split(","):
                assert hasattr(import_module(module), name.strip()), name
        for name in re.findall(r"\bmmtransfer\.(\w+)\(", block):
            assert name in mmtransfer.__all__


@pytest.mark.slow  # mkdocs is in the docs extra
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs_autorefs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr.replace("MkDocs 2.0", "")
    page = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    assert "--alert-clips" in page
