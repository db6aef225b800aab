"""The upload of a run to the Hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import yaml

from mmtransfer.errors import UserError
from mmtransfer.hub.files import MODEL_FILES
from mmtransfer.hub.metadata import read_metadata

_GIT = (".gitattributes", ".gitignore")


def publish(run: str | Path, repo_id: str, *, private: bool = True, dry_run: bool = False) -> str:
    """Upload a run's model in one commit; returns the commit's address.

    With `dry_run` nothing is sent; the model card is checked and the files are returned, one per
    line with their size in bytes. Model files that the repository holds from before and that the
    run does not have are deleted: an old adapter would be put into a new model.

    Raises:
        UserError: no finished run, a model card whose metadata is wrong, a base that others cannot
            load, a repository that is public or private unlike what is asked, or a Hub that
            refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = Path(run) / "model"
    if not (Path(run) / "report.json").is_file() or not folder.is_dir():
        raise UserError(f"{run}: expected the folder of a finished run (report.json and model/).")
    metadata = read_metadata(folder)
    base = metadata.base if metadata else None
    if metadata and metadata.form != "full" and (base is None or not base.is_portable):
        raise UserError(
            f"{run}: the {metadata.form} stands on a base that is in no public place. Train "
            "with transfer.merge_adapter: true to get a whole model."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: {error} Expected USER/NAME.") from None
    if "/" not in repo_id:
        raise UserError(f"{repo_id}: names no user or organisation. Expected USER/NAME.")
    paths = _own_files(folder)
    try:
        card = ModelCard.load(folder / "README.md")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{folder / 'README.md'}: not a model card ({reason}).") from None
    if dry_run:
        return "\n".join(f"{p.relative_to(folder)} {p.stat().st_size}" for p in paths)
    api = HfApi()
    try:
        card.validate(repo_type="model")
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if bool(there.private) != private:
            raise UserError(
                f"{repo_id}: exists and is {'private' if there.private else 'public'}. Change that "
                f"on the Hub, or publish {'with' if private else 'without'} --public."
            )
        names = {path.relative_to(folder).as_posix(): str(path) for path in paths}
        old = {file.rfilename for file in there.siblings or []} - names.keys()
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for name, path in names.items()]
            + [CommitOperationDelete(name) for name in sorted(old) if _is_model_file(name)],
            commit_message="Upload a model transferred with mmtransfer",
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{repo_id}: the Hub did not take the model ({reason}).") from None
    return str(commit.commit_url)


def _own_files(folder: Path) -> list[Path]:
    """The files of a model's folder.

    Raises:
        UserError: a link, which could lead anywhere, or what is no file of a model.
    """
    found = sorted(folder.rglob("*"))
    for path in [folder, *found]:
        if path.is_symlink():
            raise UserError(
                f"{path}: is a link; what it leads to may not be meant for others. Put a copy in "
                "its place, or remove it."
            )
        is_hidden = path.name.startswith(".") and path.name not in _GIT
        if path is not folder and (is_hidden or not (path.is_file() or path.is_dir())):
            raise UserError(f"{path}: is no file of a model; remove it before publishing.")
    return [path for path in found if path.is_file()]


def _is_model_file(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in MODEL_FILES)
