"""Turn a local collection into one Parquet data set that trains, here or on the Hub.

    python dataset_scripts/build.py --source folder --root /scans --output built --num_proc 8
    python dataset_scripts/build.py --source phantom --root phantom:200 --output built --push_to_hub ORG/NAME
    python dataset_scripts/build.py --list

A build that was killed goes on when the same command is given again. `report.json` says what was built, what failed and
why; it names files and stays here. Patients and scans are named by a hash with a secret salt, which is made on first
use: keep it for as long as you may add data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dataset_scripts.builder import BuildOptions, ScanBuilder, read_salt
from dataset_scripts.card import write_card
from dataset_scripts.duplicates import to_drop
from dataset_scripts.entries import Source, SourceError
from dataset_scripts.publish import push
from dataset_scripts.report import fingerprints, summary, write_report
from dataset_scripts.shards import BuildError, build_shards, drop_rows, plan, write_index, written_shards
from dataset_scripts.sources import SOURCES
from dataset_scripts.sources.folder import Folder
from modeling_m3ret.atomic_io import atomic_write_text
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
    """Build, or go on building, a whole data set in `output`; returns its report.

    Raises:
        SourceError: if `root` is not the collection. BuildError: if `output` holds something else, a process died, or
            none of the scans could be read.
    """
    if output.resolve().is_relative_to(root.resolve()):
        raise BuildError(f"{output} lies in {root}, whose files are the scans: choose a folder outside of it")
    with tempfile.TemporaryDirectory() as cache:  # datasets locks a folder in which it would write
        builder = ScanBuilder(source, root, salt=salt, options=options, cache_dir=cache)
    splits = builder.split_entries()
    shards = plan(splits) if shard_bytes is None else plan(splits, shard_bytes)
    reports = build_shards(builder, output, shards, num_proc)
    if drop_duplicates:
        drop_rows(output, shards, to_drop(fingerprints(reports)))
    index = write_index(output, shards)
    report = write_report(builder, reports, index, sum(path.stat().st_size for path in written_shards(output, shards)))
    told = json.dumps(report, indent=2, ensure_ascii=False).encode(errors="backslashreplace").decode()  # names of files
    atomic_write_text(output / "report.json", told + "\n")
    if index is None:
        raise BuildError(f"none of the scans could be read: {output / 'report.json'} says why of each")
    atomic_write_text(output / "README.md", write_card(builder, report, index, repository or output.resolve().name))
    return report


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which sources there are, and where to get them")
    parser.add_argument("--source", choices=sorted(SOURCES), help="the collection's layout")
    parser.add_argument("--root", help="where it lies; for the phantom also phantom[:SUBJECTS[:SEED]]")
    parser.add_argument("--output", type=Path, help="a folder that does not exist yet, or an unfinished build")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that read and write shards")
    parser.add_argument(
        "--validation", type=float, default=0.1, help="part of the patients, where no split is official"
    )
    parser.add_argument("--test", type=float, default=0.1, help="as above")
    parser.add_argument("--max_size", type=int, default=None, help="largest slice or frame, in sqrt(pixels)")
    parser.add_argument("--blank_outside_regions", action="store_true", help="of ultrasound DICOM, see the docs")
    parser.add_argument(
        "--drop_duplicates", action="store_true", help="leave out what is there twice or looks the same"
    )
    parser.add_argument("--salt_file", type=Path, default=None, help="(default: in HF_HOME/m3ret, made if not there)")
    parser.add_argument("--title", default=None, help="of a folder, for its card")
    parser.add_argument("--licence", default=None, help="of a folder, for its card and rows")
    parser.add_argument("--modality", choices=MODALITIES, default="", help="of files in a folder that do not say it")
    parser.add_argument("--push_to_hub", default=None, metavar="ORG/NAME", help="upload; private if it is new")
    arguments = parser.parse_args(words)
    if arguments.list:
        for name, declared in SOURCES.items():
            unseen = " (evaluation only)" if declared.evaluation_only else ""
            print(f"{name:20} {declared.title}{unseen}, {declared.licence}  {declared.homepage}")
        return
    if not (arguments.source and arguments.root and arguments.output):
        parser.error("--source, --root and --output are needed")
    if arguments.source == "folder":
        source: Source = Folder(arguments.title, arguments.licence, arguments.modality)
    else:
        source = SOURCES[arguments.source]()
    try:
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
    except (SourceError, BuildError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(summary(report))
    if arguments.push_to_hub:
        push(arguments.output, arguments.push_to_hub)
        print(f"pushed to {arguments.push_to_hub}")


if __name__ == "__main__":
    main()
