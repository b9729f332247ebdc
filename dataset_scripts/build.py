"""Build a Parquet dataset for training from a local collection, and optionally push it to the Hub.

    python dataset_scripts/build.py --source folder --root /scans --output built --num_proc 8
    python dataset_scripts/build.py --source phantom --root phantom:200 --output built --push_to_hub ORG/NAME
    python dataset_scripts/build.py --list

Run the same command again to resume an interrupted build. `report.json` lists what was built, what was skipped and why.
It names files and is never pushed. Names of patients and scans are hashed with a secret salt, which is created on first
use; keep it as long as data may be added.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dataset_scripts.builder import BuildOptions, ScanBuilder, read_salt
from dataset_scripts.card import make_card
from dataset_scripts.duplicates import choose_duplicates_to_drop
from dataset_scripts.entries import Source
from dataset_scripts.publish import push
from dataset_scripts.report import collect_fingerprints, format_summary, make_report
from dataset_scripts.shards import BuildError, build_shards, drop_rows, plan_shards, write_index, written_shards
from dataset_scripts.sources import SOURCES
from dataset_scripts.sources.folder import Folder
from modeling_m3ret.atomic_io import atomic_write_text
from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.data.schema import MODALITIES


def build(
    source: Source,
    root: Path,
    output: Path,
    *,
    salt: bytes,
    options: BuildOptions = BuildOptions(),
    num_proc: int = 1,
    drop_duplicates: bool = False,
    shard_bytes: int | None = None,
    repository: str | None = None,
) -> dict[str, object]:
    """Build a dataset from the collection in `root`, or resume an interrupted build, and return its report.

    Args:
        output: a new or empty folder outside `root`, or an interrupted build.
        salt: see `read_salt`.
        drop_duplicates: see `choose_duplicates_to_drop`.
        shard_bytes: approximate size of a shard; by default `shards.SHARD_BYTES`.
        repository: Hub repository for the example code on the card; by default the name of `output`.

    Raises:
        SourceError: if `root` does not have the layout of the collection.
        BuildError: if `output` holds other data, a process died, or no scan could be read.
    """
    if output.resolve().is_relative_to(root.resolve()):
        raise BuildError(output, f"expected a folder outside the scans in {root}. Choose another --output.")
    with tempfile.TemporaryDirectory() as cache:  # `datasets` creates a lock file in its cache
        builder = ScanBuilder(source, root, salt=salt, options=options, cache_dir=cache)
    shards = plan_shards(builder.split_entries(), shard_bytes)
    reports = build_shards(builder, output, shards, num_proc)
    if drop_duplicates:
        drop_rows(output, shards, choose_duplicates_to_drop(collect_fingerprints(reports)))
    index = write_index(output, shards)
    report = make_report(builder, reports, index, sum(path.stat().st_size for path in written_shards(output, shards)))
    text = json.dumps(report, indent=2, ensure_ascii=False)
    printable = text.encode(errors="backslashreplace").decode()  # file names may not be UTF-8
    atomic_write_text(output / "report.json", printable + "\n")
    if index is None:
        raise BuildError(output, "no scan could be read. See report.json in this folder for the reasons.")
    atomic_write_text(output / "README.md", make_card(builder, report, index, repository or output.resolve().name))
    return report


def make_parser() -> CommandLine:
    """Return the parser of the command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("--list", action="store_true", help="list all sources, with licence and homepage")
    parser.add_argument("--source", choices=sorted(SOURCES), help="the collection")
    parser.add_argument("--root", help="folder of the collection; for the phantom also phantom[:SUBJECTS[:SEED]]")
    parser.add_argument("--output", type=Path, help="new folder, or an interrupted build")
    parser.add_argument("--num_proc", type=int, default=1, help="number of processes")
    fraction = "fraction of patients, if there is no official split"
    parser.add_argument("--validation", type=float, default=0.1, help=fraction)
    parser.add_argument("--test", type=float, default=0.1, help=fraction)
    parser.add_argument("--max_size", type=int, default=None, help="reduce slices and frames to MAX_SIZE**2 pixels")
    parser.add_argument(
        "--blank_outside_regions",
        action="store_true",
        help="blank ultrasound DICOM outside the regions declared in the header",
    )
    parser.add_argument("--drop_duplicates", action="store_true", help="drop scans that are equal or look the same")
    parser.add_argument(
        "--salt_file", type=Path, default=None, help="secret for the pseudonyms (default: HF_HOME/m3ret/salt)"
    )
    parser.add_argument("--title", default=None, help="title of a folder, for card and rows")
    parser.add_argument("--licence", default=None, help="licence of a folder, for card and rows")
    parser.add_argument("--modality", choices=MODALITIES, default=None, help="modality of files that declare none")
    parser.add_argument("--push_to_hub", default=None, metavar="ORG/NAME", help="upload; a new repository is private")
    return parser


def list_sources() -> str:
    """Return one line per source."""
    lines = []
    for name, source in SOURCES.items():
        note = " (evaluation only)" if source.evaluation_only else ""
        lines.append(f"{name:20} {source.title}{note}, {source.licence}  {source.homepage}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(list_sources())
        return
    if not (arguments.source and arguments.root and arguments.output):
        parser.error("the arguments --source, --root and --output are required")
    if arguments.source == "folder":
        source: Source = Folder(arguments.title, arguments.licence, arguments.modality or "")
    else:
        source = SOURCES[arguments.source]()
    with user_errors(parser.prog):
        options = BuildOptions(
            arguments.validation, arguments.test, arguments.max_size, arguments.blank_outside_regions
        )
        report = build(
            source,
            source.folder(arguments.root),
            arguments.output,
            salt=read_salt(arguments.salt_file),
            options=options,
            num_proc=arguments.num_proc,
            drop_duplicates=arguments.drop_duplicates,
            repository=arguments.push_to_hub,
        )
    print(format_summary(report))
    if arguments.push_to_hub:
        push(arguments.output, arguments.push_to_hub)
        print(f"pushed to {arguments.push_to_hub}")


if __name__ == "__main__":
    main()
