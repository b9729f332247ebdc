"""Check and measure M3Ret on a GPU, with torch, transformers and accelerate alone, and without a network.

    python benchmarks/gpu.py                       # everything
    python benchmarks/gpu.py --parts "check *"     # some parts; --list prints all
    python benchmarks/gpu.py --quick               # tiny models and sizes, for a test on a CPU

Each part runs in a process of its own, for ten minutes at most, so a part that fails or crashes leaves the others
alone. `results.json` and the table `results.md` in the output folder are written after each part. The next call runs
the parts that they lack: repeat it where a command may run for a limited time only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


FOLDERS = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # the package need not be installed
sys.path[:0] = FOLDERS

import gpu_checks  # noqa: E402
import gpu_speed  # noqa: E402
import torch  # noqa: E402

from modeling_m3ret.atomic_io import atomic_write_text  # noqa: E402


LIMIT_SECONDS = 600.0  # of a part


def run_checks(check: Callable[[bool], list[gpu_checks.Check]], quick: bool) -> list[dict[str, Any]]:
    return [asdict(each) | {"passed": each.passed} for each in check(quick)]


CHECKS: dict[str, Callable[[bool], list[gpu_checks.Check]]] = {
    "parity": gpu_checks.check_parity,
    "batch independence": gpu_checks.check_batch_independence,
    "determinism": gpu_checks.check_determinism,
    "variable-length attention": gpu_checks.check_variable_length,
    "compilation": gpu_checks.check_compile,
    "gradient checkpointing": gpu_checks.check_checkpointing,
    "FSDP2": gpu_checks.check_fsdp2,
}
# every part: name -> what it measures, as a function of `quick` that returns JSON
PARTS: dict[str, Callable[[bool], Any]] = {
    "machine": gpu_speed.describe_machine,
    **{f"check {name}": partial(run_checks, check) for name, check in CHECKS.items()},
    **{
        f"speed {work} {preset}": partial(gpu_speed.measure_speed, work, preset)
        for preset in gpu_speed.BATCH
        for work in gpu_speed.OURS
    },
}


def run_part(name: str, quick: bool, sender: Connection) -> None:
    """Run a part in this process and send its outcome: `status`, and `result` or `error`."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        result = PARTS[name](quick)
        failed = name.startswith("check ") and not all(check["passed"] for check in result)
        sender.send({"status": "failed" if failed else "passed", "result": result})
    except gpu_checks.SkippedError as reason:
        sender.send({"status": "skipped", "error": str(reason)})
    except Exception:
        sender.send({"status": "failed", "error": traceback.format_exc()})


def fork_server() -> multiprocessing.context.BaseContext:
    """Return a context whose processes are forked from one that has imported everything, but not touched the GPU."""
    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU does not initialise it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu_checks", "gpu_speed"])
    return context


def isolated(context: multiprocessing.context.BaseContext, name: str, quick: bool) -> dict[str, Any]:
    """Run a part in a new process, and return its outcome. A process that crashes or takes too long has failed."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_part, args=(name, quick, sender))
    started = time.perf_counter()
    process.start()
    sender.close()
    try:
        outcome = (
            receiver.recv()
            if receiver.poll(LIMIT_SECONDS)
            else {"status": "failed", "error": f"did not end within {LIMIT_SECONDS:.0f} seconds"}
        )
    except EOFError:
        process.join()
        outcome = {"status": "failed", "error": f"the process ended with exit code {process.exitcode}"}
    process.join(5)
    process.kill()
    process.join()
    return outcome | {"seconds": time.perf_counter() - started}


def as_markdown(outcomes: dict[str, dict[str, Any]]) -> str:
    """Return the tables of all outcomes: machine, checks, speeds, and the parts without a result."""
    machine = outcomes.get("machine", {}).get("result") or {}
    lines = ["# M3Ret on a GPU", "", ", ".join(f"{name}: {short(value)}" for name, value in machine.items()), ""]
    lines += ["| check | measured | limit | |", "|---|---:|---:|---|"]
    for name, outcome in outcomes.items():
        for check in (outcome.get("result") or []) if name.startswith("check ") else []:
            verdict = "passed" if check["passed"] else "**failed**"
            numbers = f"{check['value']:.2g} | {check['limit']:g} | {verdict}"
            lines.append(f"| {name.removeprefix('check ')}: {check['name']} | {numbers} |")
    columns = ("images", "milliseconds", "images_per_second", "tokens_per_second", "gflop_per_image", "memory_gib")
    heads = ("images", "ms a step", "images/s", "tokens/s", "GFLOP an image", "GiB", "share of peak", "kernels")
    lines += ["", f"| step | size | model | {' | '.join(heads)} |", "|---|---|---|" + "---:|" * len(heads)]
    for name, outcome in outcomes.items():
        for row in (outcome.get("result") or []) if name.startswith("speed ") else []:
            share = row["tflop_per_second"] / machine["peak_tflops"] if machine else None
            values = [*(row[column] for column in columns), share, row["kernels"]]
            lines.append(f"| {row['work']} | {row['preset']} | {row['model']} | {' | '.join(map(short, values))} |")
    without = {name: outcome["error"] for name, outcome in outcomes.items() if "error" in outcome}
    lines += ["", *(f"- {name}, {outcomes[name]['status']}: {last_line(error)}" for name, error in without.items())]
    return "\n".join(lines).rstrip() + "\n"


def short(value: Any) -> str:
    """Format a number with three significant digits, or a whole number in full."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_results"), help="folder of results.json and results.md"
    )
    parser.add_argument("--parts", default="*", help="pattern of the names of the parts to run")
    parser.add_argument("--list", action="store_true", help="print the names of all parts and exit")
    parser.add_argument("--retry", action="store_true", help="also run parts again that failed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no part after this time")
    parser.add_argument("--quick", action="store_true", help="tiny models and sizes, for a test on a CPU")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(PARTS))
        return
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("no GPU: expected a CUDA device, got none. Use --quick for a test on the CPU.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results, started = arguments.output / "results.json", time.perf_counter()
    saved = json.loads(results.read_text()) if results.is_file() else {"quick": arguments.quick, "parts": {}}
    if saved["quick"] != arguments.quick:
        parser.error(
            f"{results} is of a run {'with' if saved['quick'] else 'without'} --quick. Choose another --output."
        )
    outcomes, context = saved["parts"], fork_server()
    parts = [name for name in PARTS if fnmatch(name, arguments.parts)]
    if arguments.quick:  # the tiny model has one size
        parts = [name for name in parts if not name.endswith(("vitb", "vitl"))]
    for name in parts:
        is_done = name in outcomes and not (arguments.retry and outcomes[name]["status"] == "failed")
        if is_done:
            continue
        if time.perf_counter() - started > 60 * arguments.minutes:
            print(f"stopped before {name}; run the command again")
            break
        outcomes[name] = isolated(context, name, arguments.quick)
        print(f"{name}: {outcomes[name]['status']}, {outcomes[name]['seconds']:.0f} s", flush=True)
        atomic_write_text(results, json.dumps(saved, indent=1) + "\n")
        atomic_write_text(
            arguments.output / "results.md", as_markdown({n: outcomes[n] for n in PARTS if n in outcomes})
        )
    sys.exit(any(outcome["status"] == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
