"""The rule for file names in tables (manifests and tables of public collections): they stay inside their folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def stays_inside(name: str) -> bool:
    """Return whether a file name is relative and stays inside the folder that it is relative to.

    Only the name is checked: symbolic links inside the folder are followed, wherever they point.
    """
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not set(name) & {"\0", "\\"} and not Path(name).is_absolute()
