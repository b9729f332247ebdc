"""Write the synthetic phantom collection: five scans per subject, as DICOM, NIfTI, PNG and MP4 files.

m3ret phantom --output phantom --subjects 200
"""

import time
from pathlib import Path

from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.phantom.dataset import write_phantom


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder that does not exist yet")
    parser.add_argument("--subjects", type=int, default=200, help="number of subjects; 200 are 25 per class")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--workers", type=int, default=None, help="number of processes; by default one per core")
    options = parser.parse_args()
    start = time.perf_counter()
    with user_errors(parser.prog):
        folder = write_phantom(options.output, subjects=options.subjects, seed=options.seed, workers=options.workers)
        print(f"{folder}: {options.subjects} synthetic subjects, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
