"""Measure the Space under load: users that upload and search over HTTP, their latencies, and the server's memory.

    python benchmarks/space_load.py --users 20 --seconds 120
    python benchmarks/space_load.py --start              # time from the start of the process to the first hits

`app.py` runs in a process of its own, by default with a small untrained checkpoint and a phantom gallery. Each visit is
a new session: the page, an upload, then `/search` and `/similar`, or `/embed`. Needs `pip install -e ".[app]"`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from modeling_m3ret import M3RetConfig, M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import read_manifest
from modeling_m3ret.phantom.dataset import write_phantom


PROJECT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 900.0
REPORT_SECONDS = 10.0
GALLERY = "phantom:8:1"


def save_small_checkpoint(folder: Path) -> None:
    """Save a checkpoint of two layers as wide as a ViT-T's: latencies are then those of reading and the page."""
    config = M3RetConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3, num_hidden_layers=2)
    M3RetModel(config).save_pretrained(folder)
    M3RetImageProcessor().save_pretrained(folder)


@contextmanager
def serve_app(model: str, gallery: str, home: Path, log: Path) -> Iterator[tuple[str, psutil.Process, float]]:
    """Run the app in a process; yield its address, the process, and the seconds until it served its page."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"HF_HOME": str(home), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, str(PROJECT / "app.py"), "--model", model, "--gallery", gallery, "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    with log.open("wb") as lines:
        process = subprocess.Popen(command, env=environment, stdout=lines, stderr=lines)
    try:
        while True:
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT_SECONDS:
                raise SystemExit(
                    f"app.py did not start. The end of its log:\n{log.read_text(errors='replace')[-2000:]}"
                )
            try:
                if httpx.get(address, timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield address, psutil.Process(process.pid), time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(30)


class Visitor:
    """A simulated user with a set of files."""

    def __init__(self, address: str, uploads: list[Path], seed: int):
        self.address, self.uploads, self.random = address, uploads, random.Random(seed)

    def visit(self, times: dict[str, list[float]], endpoint: str) -> None:
        """Load the page, upload a scan and embed it, or search for it and for the scans similar to the first hit.

        Args:
            times: seconds of each request, appended by name.
            endpoint: "embed" or "search".

        Raises:
            httpx.HTTPError: if a request fails.
            RuntimeError: if the server reports an error.
        """
        with httpx.Client(base_url=self.address, timeout=TIMEOUT_SECONDS) as client:
            with _timed(times, "page"):
                client.get("/").raise_for_status()
            with _timed(times, "upload"):
                sent = client.post("/gradio_api/upload", files={"files": self.file()})
                sent.raise_for_status()
            scan = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in sent.json()]
            if endpoint == "embed":
                with _timed(times, "/embed"):
                    _call(client, "embed", [scan])
                return
            with _timed(times, "/search"):
                (answer,) = _call(client, "search", [scan, 8, [], [], False])
            with _timed(times, "/similar"):
                _call(client, "similar", [answer["hits"][0]["item"], 8, [], [], False])

    def file(self) -> tuple[str, bytes]:
        """Return name and content of a file: one of the scans, or, half of the time, an X-ray never uploaded before."""
        path = self.random.choice(self.uploads)
        if self.random.random() < 0.5:
            return path.name, path.read_bytes()
        pixels = np.full((512, 512), 90, np.uint8)
        pixels[100:400, 150:350] = 200
        pixels[self.random.randrange(512), self.random.randrange(512)] = self.random.randrange(256)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return "xray.png", stream.getvalue()


def _call(client: httpx.Client, endpoint: str, data: list[object]) -> list[dict]:
    posted = client.post(f"/gradio_api/call/{endpoint}", json={"data": data})
    posted.raise_for_status()
    events = client.get(f"/gradio_api/call/{endpoint}/{posted.json()['event_id']}").text
    for event in events.split("\n\n"):
        name, _, content = event.partition("\ndata: ")
        if name == "event: complete":
            return json.loads(content)
    raise RuntimeError(f"/{endpoint}: {events[-200:]!r}")


@contextmanager
def _timed(times: dict[str, list[float]], request: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    times[request].append(time.perf_counter() - started)


def megabytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def measure_load(address: str, process: psutil.Process, uploads: list[Path], users: int, seconds: float) -> None:
    """Let users visit the app for some seconds; print memory, throughput, errors and latencies."""
    times: dict[str, list[float]] = defaultdict(list)
    errors: list[str] = []
    Visitor(address, uploads, -1).visit(defaultdict(list), "search")  # warm-up: memory of the first use is not growth
    print(f"memory at the start {megabytes(process):6.0f} MB", flush=True)
    started = time.perf_counter()

    def keep_visiting(seed: int) -> None:
        visitor = Visitor(address, uploads, seed)
        while time.perf_counter() - started < seconds:
            try:
                visitor.visit(times, "embed" if visitor.random.random() < 0.2 else "search")
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=keep_visiting, args=(seed,)) for seed in range(users)]
    for thread in threads:
        thread.start()
    for tick in range(1, int(seconds // REPORT_SECONDS) + 1):
        time.sleep(max(0.0, started + tick * REPORT_SECONDS - time.perf_counter()))
        print(f"memory after {tick * REPORT_SECONDS:4.0f} s {megabytes(process):6.0f} MB", flush=True)
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - started
    print(f"memory at the end   {megabytes(process):6.0f} MB")
    print(f"{users} users, {taken:.0f} s, {len(times['page']) / taken:.2f} visits a second, {len(errors)} errors")
    for error in sorted(set(errors))[:5]:
        print(f"  {errors.count(error)} x {error}")
    for request, latencies in sorted(times.items()):
        *_, p95 = statistics.quantiles(latencies, n=20) if len(latencies) > 1 else latencies
        print(f"{request:9s} p50 {statistics.median(latencies):6.2f} s   p95 {p95:6.2f} s   {len(latencies)} requests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20, help="concurrent users")
    parser.add_argument("--seconds", type=float, default=120, help="duration of the measurement")
    parser.add_argument("--start", action="store_true", help="measure only the time to the first hits")
    parser.add_argument("--model", default=None, help="checkpoint folder or Hub id (default: small and untrained)")
    parser.add_argument("--gallery", default=GALLERY, help=f"gallery, as for app.py (default: {GALLERY})")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="m3ret-load-") as name:
        folder = Path(name)
        model = arguments.model or str(folder / "m3ret-small")
        if arguments.model is None:
            save_small_checkpoint(folder / "m3ret-small")
        write_phantom(folder / "uploads", subjects=4, workers=0)
        uploads = [record.location for record in read_manifest(folder / "uploads") if Path(record.location).is_file()]
        for start in ("without cached embeddings", "with cached embeddings"):
            started = time.perf_counter()
            with serve_app(model, arguments.gallery, folder / "home", folder / "log") as (address, process, until_page):
                if not arguments.start:
                    measure_load(address, process, uploads, arguments.users, arguments.seconds)
                    return
                Visitor(address, uploads, 0).visit(defaultdict(list), "search")
                until_hits = time.perf_counter() - started
                print(f"{start}: page after {until_page:.1f} s, first hits after {until_hits:.1f} s", flush=True)


if __name__ == "__main__":
    main()
