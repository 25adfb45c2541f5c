"""Folders: where a run's files go. No run writes over the files of another."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_caq.profile import CurvatureProfile
from lightning_caq.reporting.files import read_profile

_NAME = "caq"


def output_directory(trainer: Trainer) -> Path:
    """A folder for the files of a run: ``caq`` in the log folder, or ``caq-v1`` and so on where there is one already.

    Without a logger that has a folder of its own it lies in the trainer's ``default_root_dir``. Every rank has to ask:
    ``log_dir`` is a collective.
    """
    folder = log_folder(trainer) / _NAME
    return unused(folder) if folder.is_dir() else folder


def log_folder(trainer: Trainer) -> Path:
    """The log folder, a collective too."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def earlier_profile(directory: Path) -> CurvatureProfile | None:
    """What the run before the one whose files go to ``directory`` measured, in the same log folder."""
    folders = [path for path in directory.parent.glob(f"{_NAME}*") if path.is_dir()]
    return read_profile(max(folders, key=_version)) if folders else None


def unused(path: Path) -> Path:
    """A path that does not exist: the one given, or the first of its versions, counted as Lightning counts them.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.ckpt").touch()
        >>> unused(folder / "a.ckpt").name, unused(folder / "b.ckpt").name
        ('a-v1.ckpt', 'b.ckpt')
    """
    versions = (path.with_name(f"{path.stem}-v{version}{path.suffix}") for version in count(1))
    return path if not path.exists() else next(version for version in versions if not version.exists())


def _version(path: Path) -> int:
    number = path.name.rpartition("-v")[2]
    return int(number) if number.isdigit() else 0
