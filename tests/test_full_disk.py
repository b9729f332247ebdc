"""A full or read-only disk: what was there before stays, no part of a file remains, and the error is one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors import SafetensorError

from modeling_m3ret.command_line import user_errors


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
    import resource, signal, sys
    from pathlib import Path
    import pyarrow as pa, torch
    from safetensors import SafetensorError
    from modeling_m3ret.atomic_io import atomic_folder, atomic_write, atomic_write_text
    from modeling_m3ret.model_facts import ModelFacts
    from modeling_m3ret.search.index import RetrievalIndex

    folder = Path(sys.argv[1])
    facts = ModelFacts("m", "r", "p")
    table = pa.table({"id": [str(row) for row in range(200)]})
    small = RetrievalIndex.build(torch.eye(4), table.slice(0, 4), facts)
    large = RetrievalIndex.build(torch.randn(200, 64), table, facts)
    small.save(folder / "index")
    atomic_write_text(folder / "file", "before")
    with atomic_folder(folder / "folder") as partial:
        (partial / "file").write_text("before")

    def write_file():
        with atomic_write(folder / "file") as stream:
            stream.write(bytes(2**16))

    def write_folder():
        with atomic_folder(folder / "folder", replace=True) as partial:
            (partial / "file").write_bytes(bytes(2**16))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, 2**12))
    for write in (write_file, write_folder, lambda: large.save(folder / "index")):
        try:
            write()
        except (OSError, SafetensorError):
            continue
        sys.exit("it was written")
    found = sorted(path.name for path in folder.rglob("*") if not path.name.startswith("version-"))
    print(len(RetrievalIndex.load(folder / "index")), len(list((folder / "index").glob("version-*"))), *found)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_failed_writes_leave_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    scans, versions, *names = run.stdout.split()
    assert (scans, versions) == ("4", "1")
    expected = ["current.json", "embeddings.safetensors", "file", "file", "folder", "index", "metadata.parquet"]
    assert names == expected
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "before"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_full_or_read_only_disk_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    errors = (
        OSError(number, os.strerror(number), "results/report.md"),
        SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"),
    )
    for error in errors:
        with pytest.raises(SystemExit) as ended, user_errors("train.py"):
            raise error
        printed = capsys.readouterr().err
        assert (ended.value.code, len(printed.splitlines())) == (2, 1)
        assert os.strerror(number) in printed
        assert not isinstance(error, OSError) or "results/report.md" in printed


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), SafetensorError("invalid header"), OSError("other")]
)
def test_other_failures_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), user_errors("train.py"):
        raise error
