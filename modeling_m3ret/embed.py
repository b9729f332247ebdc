"""Embed scan files with a checkpoint and save one embedding per scan.

    m3ret embed --model m3ret-smoke chest.dcm ct.nii.gz clip.mp4 series_folder/ --output embeddings.npz

Each argument is one scan: a file of any supported format, or a folder that holds one DICOM series. The output holds the
arrays `files` (as given) and `embeddings` (N, d), float32 and L2-normalised: `embeddings @ embeddings.T` is the cosine
similarity. A scan that cannot be read is reported on stderr and left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from .atomic_io import atomic_write
from .command_line import CommandLine, user_errors
from .cpu import prepare_cpu
from .data.collection import Record
from .errors import InputError
from .hub import load_pretrained
from .intensity_m3ret import INTENSITIES
from .search.embedding import embed_records, encoder_embedder


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("scans", nargs="+", metavar="SCAN", help="scan file, or folder of one DICOM series")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="file to write, ending in .npz")
    parser.add_argument("--num_workers", default=0, type=int, help="processes that read scans; 0 reads in this one")
    parser.add_argument(
        "--intensity",
        choices=INTENSITIES,
        help="how to scale values of files that do not declare it: hounsfield for a CT in NIfTI",
    )
    options = parser.parse_args()
    with user_errors(parser.prog):
        embed_files(options.scans, options.model, options.output, options.num_workers, options.intensity)


def embed_files(
    scans: list[str],
    model_name: str,
    output: Path,
    num_workers: int = 0,
    intensity: str | None = None,
) -> None:
    """Embed `scans` with the checkpoint `model_name` and write `output` (`.npz` with `files` and `embeddings`).

    `intensity` declares the scale of all scans.

    Raises:
        InputError: if the checkpoint cannot be loaded, `output` is not a `.npz` file, or no scan could be read.
    """
    if output.suffix != ".npz" or not output.absolute().parent.is_dir():
        raise InputError(f"--output: expected a .npz file in an existing folder, got {output}.")
    model, processor = load_pretrained(model_name)
    prepare_cpu()
    records = [
        Record(scan, Path(scan), modality="", anatomy="", label="", group="", intensity=intensity) for scan in scans
    ]
    embedder = encoder_embedder(model)
    embedded = embed_records([embedder], processor, records, num_workers=num_workers)[0]
    for failure in embedded.failures:
        print(failure, file=sys.stderr)
    if not embedded.records:
        raise InputError(
            f"no scan could be read: expected at least one of {len(scans)}, got none. See the errors above."
        )
    with atomic_write(output) as stream:
        np.savez(stream, files=[record.id for record in embedded.records], embeddings=embedded.embeddings.numpy())
    print(f"{output}: {len(embedded.records)} embeddings, {len(embedded.failures)} scans could not be read")


if __name__ == "__main__":
    main()
