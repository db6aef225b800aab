"""Uploads to the Hub: what changed, in one commit, again and again until it is there or refused."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmtransfer.errors import UserError
from mmtransfer.hub.files import MODEL_FILES, SIGNATURE

logger = logging.getLogger(__name__)
Contents = Mapping[str, Path | bytes]
"""Files of a repository by their names in it: where each lies, or what it holds."""
EVAL_RESULTS = ".eval_results/"
"""Folder of a repository with results on benchmarks of the Hub."""
EXPORTS = ("ct2", "onnx")
"""Folders of a repository with the model in formats of other engines."""
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT_S = 300.0
_PASSING = (408, 409, 412, 429, 500, 502, 503, 504)  # may be gone at the next attempt
_HINTS = {
    401: "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there.",
    403: "Take a token that may write there.",
    404: "Expected a repository, and a branch, that this token may see.",
    413: "The Hub has no room for so much.",
    507: "The Hub has no room left.",
}


@dataclass(frozen=True)
class Destination:
    """Where an upload goes, and how."""

    repo_id: str
    """USER/NAME on the Hub."""
    private: bool = True
    """Of a new repository; one that is there has to be so."""
    revision: str | None = None
    """Branch, made where it is not there; None for main."""
    tag: str | None = None
    """What the commit is called besides."""
    message: str = "Upload a model transferred with mmtransfer"
    """Of the commit."""
    pr: bool = False
    """Whether the commit is proposed as a pull request, to a repository of whomever."""


def check_repo_id(repo_id: str) -> None:
    """Make sure that a name is USER/NAME.

    Raises:
        UserError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: {error} Expected USER/NAME.") from None
    if "/" not in repo_id:
        raise UserError(f"{repo_id}: names no user or organisation. Expected USER/NAME.")


def upload(files: Contents, to: Destination) -> str:
    """Bring a repository's model files to these, in one commit; returns the commit's address, or
    that of the pull request.

    What the repository has already is not sent again, so that an interrupted upload continues where
    it was. Files of a model that it has and that are not among these are deleted: an old adapter
    would be put into a new model. Faults that pass are waited for.

    Raises:
        UserError: a repository that is public or private unlike what is asked, a tag that is
            another commit's, or a Hub that refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api, waits = HfApi(), list(_WAITS_S)
    with _refusals(to.repo_id):
        while True:
            try:
                return _attempt(api, files, to)
            except Exception as error:
                wait = _wait_s(error, waits.pop(0) if waits else None, is_pr=to.pr)
                if wait is None:
                    raise
                logger.warning("%s: %s; again in %.0f s", to.repo_id, _reason(error)[:200], wait)
                time.sleep(wait)


def _attempt(api: Any, files: Contents, to: Destination) -> str:
    """One attempt of `upload`. Each asks anew what there is: an answer may be lost after the commit
    was made, and another commit may have come in between.
    """
    if not to.pr:
        api.create_repo(to.repo_id, private=to.private, exist_ok=True)
        _check_privacy(api.model_info(to.repo_id), to)
        if to.revision not in (None, "main"):
            api.create_branch(to.repo_id, branch=str(to.revision), exist_ok=True)
    commit, address = _bring(api, files, to)
    tags = api.list_repo_refs(to.repo_id).tags if to.tag is not None else []
    tagged = next((tag.target_commit for tag in tags if tag.name == to.tag), commit)
    if tagged != commit:
        raise UserError(
            f"{to.repo_id}: the model is there ({address}), but the tag {to.tag} is that of "
            f"another commit ({tagged[:12]}). Choose another tag."
        )
    if to.tag is not None:
        api.create_tag(to.repo_id, tag=to.tag, revision=commit, exist_ok=True)
    return address


def _check_privacy(there: Any, to: Destination) -> None:
    if bool(there.private) != to.private:
        raise UserError(
            f"{to.repo_id}: exists and is {'private' if there.private else 'public'}. Change that "
            f"on the Hub, or publish {'with' if to.private else 'without'} --public."
        )


def _bring(api: Any, files: Contents, to: Destination) -> tuple[str, str]:
    """(commit, address) of the repository's state with these files."""
    there = api.model_info(to.repo_id, revision=to.revision, files_metadata=True)
    operations = _changes(files, there.siblings or [])
    if not operations:
        return there.sha, f"{api.endpoint}/{to.repo_id}/commit/{there.sha}"
    made = api.create_commit(
        to.repo_id,
        operations,
        commit_message=to.message,
        revision=to.revision,
        create_pr=to.pr,
        parent_commit=there.sha,
    )
    return made.oid, str(made.pr_url if to.pr else made.commit_url)


def _changes(files: Contents, there: Sequence[Any]) -> list[Any]:
    """Operations that make of a repository's files these."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    known = {file.rfilename: file for file in there}
    changed = [name for name, content in files.items() if not _is_same(content, known.get(name))]
    surplus = sorted(name for name in known if name not in files and _is_model_file(name))
    added = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in ((name, files[name]) for name in changed)
    ]
    return [*added, *(CommitOperationDelete(name) for name in surplus)]


def _is_same(content: Path | bytes, there: Any) -> bool:
    """Whether a repository's file holds that, by its digest."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if there is None or there.size != size:
        return False
    if there.lfs is not None:
        return bool(_digest(content, "sha256") == there.lfs.sha256)
    return bool(_digest(content, "sha1", b"blob %d\0" % size) == there.blob_id)


def _digest(content: Path | bytes, kind: str, start: bytes = b"") -> str:
    digest = hashlib.new(kind, start, usedforsecurity=False)
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest()
    with content.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_model_file(name: str) -> bool:
    folder, _, rest = name.partition("/")
    if rest:
        return folder in EXPORTS
    return any(fnmatch(name, pattern) for pattern in (*MODEL_FILES, SIGNATURE))


# --- faults --------------------------------------------------------------------------------------


def _wait_s(error: Exception, usual: float | None, *, is_pr: bool) -> float | None:
    """How long to wait before the next attempt; None where there is to be none."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    cause = error.__cause__ if isinstance(error, RuntimeError) else error  # of a file of the upload
    response = getattr(cause, "response", None)
    if usual is None or isinstance(error, UserError):
        return None
    if response is None:
        # A lost connection; whether a pull request was opened before that nobody can say.
        lost = isinstance(error, RuntimeError) or isinstance(cause, HTTPError | ConnectionError)
        return usual if lost and (not is_pr or isinstance(error, RuntimeError)) else None
    if response.status_code not in _PASSING:
        return None
    asked = response.headers.get("Retry-After", "")
    wait = max(usual, float(asked)) if asked.isdecimal() else usual
    return wait if wait <= _LONGEST_WAIT_S else None


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """What the Hub does not take as one line, and the library's own lines held back: they name
    addresses that let whoever reads them write.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{repo_id}: the Hub did not take the model ({_reason(error)}).{_hint(error)}"
        ) from None
    finally:
        library.set_verbosity(level)


def _reason(error: BaseException) -> str:
    """Why an upload failed, without what could open anything."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    text = re.sub(r"(https?://[^\s?'\")]+)\?[^\s'\")]+", r"\1", text)
    return re.sub(r"\bhf_\w{8,}", "hf_***", text)[:400]


def _hint(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    status = None if response is None else response.status_code
    asked = "" if response is None else response.headers.get("Retry-After", "")
    if status in _HINTS:
        return f" {_HINTS[status]}"
    if asked.isdecimal():
        return f" It asks to wait {asked} s; then run the same command again."
    if status is None or status in _PASSING:
        return " Run the same command again: what is there is not sent twice."
    return ""
