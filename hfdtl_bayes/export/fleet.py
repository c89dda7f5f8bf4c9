"""A whole fleet at once: one file per configuration and an index, written together or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.export.files import write_text
from hfdtl_bayes.files import atomic_folder
from hfdtl_bayes.statistics import package_version

INDEX = "index.json"
FORMAT, VERSION = "hfdtl_bayes fleet", 1


def write_fleet(
    folder: str | os.PathLike[str], kind: str, suffix: str, texts: Mapping[str, str], refused: Mapping[str, str]
) -> Path:
    """Write a folder with `<config_id><suffix>` for each configuration and the index; returns the index.

    Parameters
    ----------
    folder : path
        An index in it is replaced together with its files; what else is there is refused.
    kind : str
        What the files are, for the index.
    suffix : str
    texts : mapping of str to str
        By config_id.
    refused : mapping of str to str
        Configurations that cannot be exported, and why.

    Raises
    ------
    InputError
        If the folder exists and holds anything but a fleet, which this would delete; if a file would be called as the index.
    """
    folder = Path(folder)
    taken = [c for c in texts if f"{c}{suffix}".lower() == INDEX]
    if taken:
        raise InputError(f"the file of configuration {taken[0]!r} would be called {INDEX}, as the index is; export it alone")
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise InputError(f"{folder} exists and is no export of a fleet, whose place it would take; choose another --out")
    with atomic_folder(folder) as part:
        entries = []
        for config_id, text in texts.items():
            name = write_text(text, part / f"{config_id}{suffix}").name
            entries.append({"config_id": config_id, "file": name, "sha256": hashlib.sha256(text.encode()).hexdigest()})
        data = {
            "format": FORMAT,
            "version": VERSION,
            "package_version": package_version(),
            "kind": kind,
            "configurations": entries,
            "refused": dict(refused),
        }
        write_text(json.dumps(data, indent=2) + "\n", part / INDEX)
    return folder / INDEX
