"""A run on the Hub: checked, loaded once more, sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mmtransfer.errors import UserError
from mmtransfer.hub.card import read_card
from mmtransfer.hub.files import SIGNATURE
from mmtransfer.hub.metadata import read_metadata
from mmtransfer.hub.publish import EVAL_RESULTS, Destination, check_repo_id, upload
from mmtransfer.hub.signing import signatures
from mmtransfer.runs.exports import export
from mmtransfer.runs.models import load
from mmtransfer.runs.sample import SAMPLE, check_sample
from mmtransfer.runs.snippets import PLACE

logger = logging.getLogger(__name__)
_HIDDEN = (".gitattributes", ".gitignore", EVAL_RESULTS.rstrip("/"))


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    pr: bool = False,
    exports: Sequence[str] = (),
    sign: str | None = None,
    dry_run: bool = False,
) -> str:
    """Upload a run's model in one commit; returns the commit's address, or with `pr` that of a pull
    request.

    Before that the model is loaded from its folder and must give what training recorded for the
    sample that the run keeps. The commit goes to the branch `revision` (main unless given), is
    called `tag` besides and says `message`. What the repository has already is not sent again;
    model files that it holds from before and that the run does not have are deleted. `exports` are
    further formats, `ct2` and `onnx`, in folders of their own (see `exports.export`). `sign` is a
    private key, or `sigstore` (see `signing.signatures`). With `dry_run` nothing is loaded or sent:
    files with their size in bytes, and the model card, are returned.

    Raises:
        UserError: no finished run, weights that are not those of training, a model card whose
            metadata is wrong, a base that others cannot load, a repository that is public or
            private unlike what is asked, or a Hub that refuses or cannot be reached.

    Example:
        publish("runs/site", "user/site", revision="next", tag="v2")
    """
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
    check_repo_id(repo_id)
    if pr and tag is not None:
        raise UserError("--pr opens a pull request; give it a --tag when it is merged.")
    paths = _own_files(folder)
    card = read_card(folder / "README.md").replace(PLACE, repo_id)
    files: dict[str, Path | bytes] = {p.relative_to(folder).as_posix(): p for p in paths}
    files["README.md"] = card.encode()
    if dry_run:
        sizes = [f"{name} {_size(content)}" for name, content in sorted(files.items())]
        sizes += [f"{SIGNATURE} made when it is sent"] * (sign is not None)
        sizes += [f"{kind}/ made when it is sent" for kind in dict.fromkeys(exports)]
        return "\n".join([*sizes, "", card.rstrip("\n")])
    _check_weights(Path(run))
    to = Destination(repo_id, private, revision, tag, pr=pr)
    if message is not None:
        to = replace(to, message=message)
    with TemporaryDirectory() as scratch:
        for kind in dict.fromkeys(exports):
            made = export(run, Path(scratch, kind), kind)
            logger.info("%s: as %s the same on %d examples", run, kind, made.examples)
            card += made.section.replace(PLACE, repo_id)
            own = sorted(path for path in Path(scratch, kind).rglob("*") if path.is_file())
            files |= {path.relative_to(scratch).as_posix(): path for path in own}
        files["README.md"] = card.encode()
        if sign is not None:
            files |= signatures(files, sign)
        return upload(files, to)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _check_weights(run: Path) -> None:
    """Load a run's model and compare what it gives with what training recorded.

    Raises:
        UserError: they differ, or it cannot be loaded.
    """
    if not (run / SAMPLE).is_file():
        load(str(run))
        logger.warning(
            "%s: the model was loaded; what it gives was not checked, since the run keeps no "
            "sample (%s), as training does now",
            run,
            SAMPLE,
        )
        return
    count = check_sample(run, load(str(run)))
    logger.info("%s: the saved model gives what training recorded on %d examples", run, count)


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
        is_hidden = path.name.startswith(".") and path.name not in _HIDDEN
        if path is not folder and (is_hidden or not (path.is_file() or path.is_dir())):
            raise UserError(f"{path}: is no file of a model; remove it before publishing.")
    return [path for path in found if path.is_file()]
