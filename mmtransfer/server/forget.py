"""What is to be forgotten leaves everything that a monitor and a server have written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtransfer.cache import open_private
from mmtransfer.data.printing import json_line
from mmtransfer.errors import UserError
from mmtransfer.monitoring.journal.files import journal_files, locked, mend
from mmtransfer.monitoring.journal.forgetting import Forgotten, Rule, forget, forget_spool
from mmtransfer.server.index import FILE_NAME
from mmtransfer.server.indexing import is_address, open_index


def forget_everywhere(
    journal: str | Path,
    rule: Rule,
    *,
    index: str | Path | None = None,
    clips: str | Path | None = None,
    dry_run: bool = False,
) -> Forgotten:
    """Forget in a journal that nobody writes, its spool, its clips and its index, if there is one.

    Args:
        journal: Its folder.
        rule: What is to be forgotten.
        index: Its file or address, by default in the journal's folder.
        clips: Folder of the clips, where they are not where the journal says.
        dry_run: Count alone.

    Raises:
        UserError: no journal there, or one that a monitor is writing.
    """
    folder = Path(journal)
    if not journal_files(folder):
        raise UserError(f"{journal}: expected the folder of a journal, found none.")
    with locked(folder):
        for path in () if dry_run else journal_files(folder):
            mend(path)

        def append(line: Mapping[str, Any]) -> None:
            with open_private(journal_files(folder)[-1], "ab") as file:
                file.write((json_line(line) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

        where = Path(clips) if clips is not None else None
        found = forget(folder, rule, append, clips=where, dry_run=dry_run)
        found.segments = forget_spool(folder, rule, dry_run=dry_run)
        index = folder / FILE_NAME if index is None else index
        if not dry_run and (is_address(index) or Path(index).exists()):
            with open_index(index, folder) as opened:
                opened.catch_up(folder)
    return found
