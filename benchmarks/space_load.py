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
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
Times = dict[str, list[float]]  # seconds of each request, by name


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
        while not _serves_page(address):
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT_SECONDS:
                raise SystemExit(f"app.py did not start. The end of its log:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield address, psutil.Process(process.pid), time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(30)


def _serves_page(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).is_success
    except httpx.TransportError:
        return False


def visit(address: str, uploads: list[Path], generator: random.Random, times: Times, endpoint: str) -> None:
    """Load the page, upload a scan and embed it, or search for it and for the scans similar to the first hit.

    Raises:
        httpx.HTTPError: if a request fails.
        RuntimeError: if the server reports an error.
    """
    with httpx.Client(base_url=address, timeout=TIMEOUT_SECONDS) as client:
        page = client.get("/").raise_for_status()
        times["page"].append(page.elapsed.total_seconds())
        file = _choose_file(uploads, generator)
        sent = client.post("/gradio_api/upload", files={"files": file}).raise_for_status()
        times["upload"].append(sent.elapsed.total_seconds())
        scan = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in sent.json()]
        if endpoint == "embed":
            _call(client, times, "/embed", [scan])
        else:
            (answer,) = _call(client, times, "/search", [scan, 8, [], [], False])
            _call(client, times, "/similar", [answer["hits"][0]["item"], 8, [], [], False])


def _choose_file(uploads: list[Path], generator: random.Random) -> tuple[str, bytes]:
    """Return name and content of one of the scans or, half of the time, of an X-ray never uploaded before."""
    if generator.random() < 0.5:
        path = generator.choice(uploads)
        return path.name, path.read_bytes()
    image = Image.new("L", (512, 512), 90)
    image.paste(200, (150, 100, 350, 400))
    image.putpixel((generator.randrange(512), generator.randrange(512)), generator.randrange(256))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "xray.png", stream.getvalue()


def _call(client: httpx.Client, times: Times, endpoint: str, data: list[object]) -> list[dict]:
    url = f"/gradio_api/call{endpoint}"
    posted = client.post(url, json={"data": data}).raise_for_status()
    answer = client.get(f"{url}/{posted.json()['event_id']}")
    for event in answer.text.split("\n\n"):
        name, _, content = event.partition("\ndata: ")
        if name == "event: complete":
            times[endpoint].append((posted.elapsed + answer.elapsed).total_seconds())
            return json.loads(content)
    raise RuntimeError(f"{endpoint}: {answer.text[-200:]!r}")


def measure_load(address: str, process: psutil.Process, uploads: list[Path], users: int, seconds: float) -> None:
    """Let users visit the app for some seconds; print memory, throughput, errors and latencies."""
    times: Times = defaultdict(list)
    errors: list[str] = []

    def print_memory(moment: str) -> None:
        print(f"memory {moment:12} {process.memory_info().rss / 2**20:6.0f} MB", flush=True)

    def keep_visiting(seed: int) -> None:
        generator = random.Random(seed)
        while time.perf_counter() - started < seconds:
            try:
                visit(address, uploads, generator, times, "embed" if generator.random() < 0.2 else "search")
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")

    visit(address, uploads, random.Random(-1), defaultdict(list), "search")  # memory of the first use is not growth
    print_memory("at the start")
    started = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        finished = pool.map(keep_visiting, range(users))
        for tick in range(1, int(seconds // REPORT_SECONDS) + 1):
            time.sleep(max(0.0, started + tick * REPORT_SECONDS - time.perf_counter()))
            print_memory(f"after {tick * REPORT_SECONDS:4.0f} s")
        list(finished)  # raises an error of a thread
    taken = time.perf_counter() - started
    print_memory("at the end")
    print(f"{users} users, {taken:.0f} s, {len(times['page']) / taken:.2f} visits a second, {len(errors)} errors")
    for error, count in Counter(errors).most_common(5):
        print(f"  {count} x {error}")
    for request, latencies in sorted(times.items()):
        p50, p95 = np.percentile(latencies, [50, 95])
        print(f"{request:9s} p50 {p50:6.2f} s   p95 {p95:6.2f} s   {len(latencies)} requests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20, help="concurrent users")
    parser.add_argument("--seconds", type=float, default=120, help="duration of the measurement")
    parser.add_argument("--start", action="store_true", help="measure only the time to the first hits")
    parser.add_argument("--model", default=None, help="checkpoint folder or Hub id (default: small and untrained)")
    parser.add_argument("--gallery", default="phantom:8:1", help="gallery, as for app.py (default: phantom:8:1)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="m3ret-load-") as name:
        folder = Path(name)
        model = arguments.model or str(folder / "m3ret-small")
        if arguments.model is None:  # two layers as wide as a ViT-T's: latencies are those of reading and the page
            config = M3RetConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3, num_hidden_layers=2)
            M3RetModel(config).save_pretrained(model)
            M3RetImageProcessor().save_pretrained(model)
        write_phantom(folder / "uploads", subjects=4, workers=0)
        uploads = [record.location for record in read_manifest(folder / "uploads") if Path(record.location).is_file()]
        for start in ("without cached embeddings", "with cached embeddings"):
            started = time.perf_counter()
            with serve_app(model, arguments.gallery, folder / "home", folder / "log") as (address, process, until_page):
                if not arguments.start:
                    measure_load(address, process, uploads, arguments.users, arguments.seconds)
                    return
                visit(address, uploads, random.Random(0), defaultdict(list), "search")
                until_hits = time.perf_counter() - started
                print(f"{start}: page after {until_page:.1f} s, first hits after {until_hits:.1f} s", flush=True)


if __name__ == "__main__":
    main()
