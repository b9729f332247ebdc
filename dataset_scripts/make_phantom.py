"""Write the synthetic phantom collection: python dataset_scripts/make_phantom.py --output phantom --subjects 200"""

import argparse
import time
from pathlib import Path

from modeling_m3ret.phantom.dataset import write_phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--subjects", type=int, default=200, help="five scans each (default: %(default)s, 25 per class)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    folder = write_phantom(
        arguments.output, subjects=arguments.subjects, seed=arguments.seed, workers=arguments.workers
    )
    print(f"{folder}: {arguments.subjects} synthetic subjects, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
