"""The viewer: query and hit side by side in NiiVue, which draws all slices in the browser (static/page.js).

The browser loads each scan once, from `/m3ret/scan/KEY.nii`, as pixels, spacing and orientation (`pixels.py`). The key
of an upload is random, so that only its visitor knows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
import numpy as np
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..errors import InputError
from ..reading_m3ret import M3RetReadError
from . import pixels
from .results import Group, alikeness, describe, once_loaded, webp
from .service import Query, SearchService, Voxel, key_of_row


STATIC = files("modeling_m3ret.space") / "static"
TEMPLATE = (STATIC / "viewer.html").read_text(encoding="utf-8")
KEY = re.compile(r"row-\d{1,9}|upload-[0-9a-f]{32}")


class Viewer:
    """The component of the viewer. Construct it within a `gr.Blocks`.

    `view` is what it shows, as `open` returns it, or None. Its events are `select` of another hit, `submit` of a hit as
    the next query, and `input` of a region: slice, first and last row, first and last column, from 0.
    """

    def __init__(self, service: SearchService):
        self.service = service
        self.view = gr.HTML(
            None,
            html_template=TEMPLATE,
            js_on_load=once_loaded("m3ret.viewer(element, props, trigger, watch)"),
            apply_default_css=False,
            elem_id="viewer-block",
        )

    def open(self, query: Query, groups: Sequence[Group], item: int) -> dict[str, Any]:
        """Return what the browser needs to show the query beside the hit `item`, each at its best match."""
        heat = self.service.heat(query, item)
        of_item = {hit["item"]: (group.rank, hit) for group in groups for hit in group.hits}
        rank, hit = of_item[item]
        region = ""
        if query.region is not None:
            depth, *_ = query.region
            slices = "" if depth.stop - depth.start == 1 else f" of slices {depth.start + 1} to {depth.stop}"
            region = f"Results are ordered by the region{slices} that you selected."
        name = " · ".join(filter(None, (describe(hit), hit["source"], alikeness(hit["percentile"]))))
        query_name = describe(self.service.gallery.facts(query.row)) if query.row is not None else "Your scan"
        return {
            "item": item,
            "items": [*of_item],
            "region": region,
            "box": [[axis.start, axis.stop] for axis in query.region or ()],
            "panes": [
                self._pane(f"Query · {query_name}", query.key, heat.query, heat.query_voxel),
                self._pane(f"Result {rank} · {name}", key_of_row(item), heat.hit, heat.hit_voxel),
            ],
        }

    def _pane(self, name: str, key: str, heat: Any, voxel: Voxel) -> dict[str, Any]:
        scan = self.service.scan(key)
        stride = pixels.volume_stride(scan)
        plane = pixels.plane_of(scan)
        is_bytes = scan.array.dtype == np.uint8
        return {
            "name": name,
            "facts": pixels.describe_scan(scan),
            "url": f"m3ret/scan/{key}.nii",
            "heat": pixels.heat_base64(scan, heat),
            "shape": [int(size) for size in scan.array.shape[1:]],
            "axes": pixels.ORIENTATIONS[plane or "axial"],
            "plane": plane or "axial",
            "oriented": bool(plane),
            "voxel": [voxel[0], voxel[1] // stride, voxel[2] // stride],
            "stride": stride,
            "unit": "HU" if pixels.is_hounsfield(scan) else "",
            "max": 255 if is_bytes else pixels.PER_MILLE,
            "step": scan.spacing[0] or 1.0,
            "mm": pixels.has_mm(scan),
            "volume": scan.spacing[0] is not None and scan.array.shape[1] > 1,
        }


def viewer_routes(service: SearchService) -> Mount:
    """Return the routes of the viewer under `/m3ret`: its scripts, and the pixels of scans."""
    limiter = CapacityLimiter(8)  # reading scans again must not occupy the threads that answer everything else

    async def scan(request: Request) -> Response:
        key = request.path_params["name"].removesuffix(".nii")
        if not KEY.fullmatch(key) or (key.startswith("row-") and int(key[4:]) >= len(service.gallery)):
            return PlainTextResponse("This scan does not exist.", 404)
        try:
            size, parts = await to_thread.run_sync(lambda: pixels.volume_bytes(service.scan(key)), limiter=limiter)
        except (M3RetReadError, InputError) as error:
            return PlainTextResponse(str(error), 404)
        headers = {"Content-Length": str(size), "Cache-Control": "no-store"}
        return StreamingResponse(parts, headers=headers, media_type="application/octet-stream")

    def thumbnail(request: Request) -> Response:
        row = request.path_params["row"]
        if row >= len(service.gallery):
            return PlainTextResponse("This scan does not exist.", 404)
        return Response(webp(service.gallery.thumbnail(row)), media_type="image/webp")

    routes = [
        Route("/scan/{name}", scan),
        Route("/thumbnail/{row:int}.webp", thumbnail),
        Mount("/", StaticFiles(packages=[("modeling_m3ret.space", "static")])),
    ]
    return Mount("/m3ret", app=Starlette(routes=routes))
