"""Files that are there whole or not at all: a process may die, or a machine lose its power, at any moment."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

PARTIAL = ".partial"  # the ending of a file that is being written


def save(state: Any, path: str | os.PathLike) -> None:
    """Write tensors and plain containers (dict, list, tuple, numbers, strings, None) to path.

    They are written to another file of the same folder, which takes the place of path once all of it is on the disk.
    Until then a former file at path is untouched.

    Raises:
        TypeError: state holds something that `load` would refuse, because only pickle could restore it.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _load_plain(partial)  # what could be saved but not loaded must be found now, and not when it is needed
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)  # a name is durable once its folder is


def load(path: str | os.PathLike) -> Any:
    """What `save` wrote, on the CPU. Storages are mapped into memory, so that what is larger than it can be copied
    from there to its place. Nothing is unpickled but tensors and plain containers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no file of torch.save.
        TypeError: it holds something other than tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
    except zipfile.BadZipFile as error:
        raise ValueError(f"{os.fspath(path)}: is cut short or not a file of torch.save ({error})") from error
    if damaged is not None:
        raise ValueError(f"{os.fspath(path)}: is damaged, the checksum of its part {damaged} is wrong")
    return _load_plain(path)


def sync(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_plain(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = os.fspath(path).removesuffix(PARTIAL)
        raise TypeError(
            f"{name}: holds something other than tensors and plain containers, which only pickle could restore: {error}"
        ) from error
