"""The Space in a real browser: what a visitor sees of a query, the viewer, errors, the map, and a phone's screen."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from space_server import SUBJECTS, TIMEOUT, SpaceServer, browsing, find_browser, screenshot_folder, serving

from modeling_m3ret.space.calibration import Calibration
from modeling_m3ret.space.service import DEFAULT_HITS


pytestmark = [pytest.mark.browser, pytest.mark.slow]

SCANS = 5 * SUBJECTS
UPLOAD_BYTES = 2**25
WIDE, TABLET, NARROW = {"width": 1440, "height": 900}, {"width": 1024, "height": 768}, {"width": 390, "height": 844}
OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    find_browser()
    with serving(tmp_path_factory.mktemp("space"), UPLOAD_BYTES, show_labels=True) as space:
        yield space


@pytest.fixture(scope="module")
def browser(server: SpaceServer) -> Iterator[Any]:
    with browsing() as chromium:
        yield chromium


@pytest.fixture
def requested() -> list[str]:
    """URLs that the page requested."""
    return []


@pytest.fixture(scope="module")
def context(browser: Any) -> Any:
    """One context for all pages, so that scripts are downloaded and compiled once."""
    return browser.new_context(viewport=WIDE, reduced_motion="reduce")


@pytest.fixture
def open_page(context: Any, server: SpaceServer, requested: list[str]) -> Iterator[OpenPage]:
    """Open the page in a new tab. Errors of its scripts and violations of its security policy fail the test."""
    pages: list[Any] = []
    errors: list[str] = []

    def open_new(viewport: dict[str, int] = WIDE, scheme: str = "light") -> Any:
        page = context.new_page()
        pages.append(page)
        page.set_default_timeout(TIMEOUT * 1000)
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme=scheme)
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "Policy" in message.text else None)
        page.goto(server.address)
        page.wait_for_function(
            "() => document.querySelector('#examples')?.closest('[data-clickable]')"
            " || document.querySelector('#examples [data-clickable]')"
        )
        page.locator("#examples .card").first.wait_for()
        return page

    yield open_new
    for page in pages:
        page.close()
    assert errors == []


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return screenshot_folder(tmp_path_factory.mktemp("screenshots"))


def upload(page: Any, *files: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files([str(file) for file in files])


def idle(page: Any) -> None:
    """Wait until no event is in progress."""
    page.wait_for_timeout(150)  # until an event has been sent
    page.wait_for_function("() => !document.querySelector('.generating, .progress-text, .eta-bar, .pending')")


def results(page: Any) -> list[int]:
    """Return the items of the visible cards, once there are some."""
    page.locator("#grid .card").first.wait_for()
    idle(page)
    return [int(card.get_attribute("data-index")) for card in page.locator("#grid .card:visible").all()]


def show_all(page: Any, count: int) -> None:
    """Ask for as many results as possible and wait until there are this many, hidden ones included."""
    page.locator("#options button").first.click()
    slider = page.locator("#count input[type=range]")
    slider.wait_for()
    idle(page)  # until the slider, created when the accordion is opened, handles keys
    slider.press("End")
    page.wait_for_function("count => document.querySelectorAll('#grid .card').length === count", arg=count)
    idle(page)


def example_row(page: Any, modality: str) -> int:
    """Return the row of the first example of a modality, as it is named on the page."""
    return int(page.locator("#examples .card").filter(has_text=modality).first.get_attribute("data-index"))


def example(page: Any, modality: str) -> list[int]:
    """Search with the first example of a modality and return the results."""
    page.locator("#examples .card").filter(has_text=modality).first.click()
    return results(page)


def viewed(page: Any, act: Callable[[], Any]) -> None:
    """Act, and wait until the viewer shows what this leads to."""
    page.evaluate("() => { document.querySelector('#viewer').dataset.state = '' }")
    act()
    page.wait_for_function("() => ['ready', 'failed'].includes(document.querySelector('#viewer').dataset.state)")
    assert page.locator("#viewer").get_attribute("data-state") == "ready", page.locator("#viewer .message").inner_text()


def open_result(page: Any, number: int = 0) -> None:
    viewed(page, page.locator("#grid .card:visible").nth(number).click)


def pane(page: Any, number: int, expression: str) -> Any:
    """Evaluate an expression on the query's (0) or the result's (1) pane."""
    return page.evaluate(f"() => {{ const pane = m3ret.panes()[{number}]; return {expression} }}")


def slices(page: Any) -> list[int]:
    return [pane(page, number, "pane.slice") for number in range(2)]


def picture(page: Any, number: int = 0) -> np.ndarray:
    """Return the pixels of a pane `(H, W, 3)` as they are on the screen."""
    page.wait_for_timeout(200)
    return np.asarray(
        Image.open(io.BytesIO(page.locator("#viewer canvas").nth(number).screenshot())).convert("RGB")
    ).astype(int)


def ct_series(folder: Path, values: np.ndarray) -> list[Path]:
    """Write a CT `(D, H, W)` in HU, ordered as an axial DICOM series, of 3 mm voxels."""
    folder.mkdir()
    series = generate_uid()
    for index, plane in enumerate(values):
        header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        header.SeriesInstanceUID, header.SOPInstanceUID = series, generate_uid()
        header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 3 * index]
        header.PixelSpacing, header.SliceThickness, header.InstanceNumber = [3, 3], 3, index + 1
        header.Rows, header.Columns = plane.shape
        header.PixelData = (plane - int(header.RescaleIntercept)).astype("<i2").tobytes()
        header.save_as(folder / f"{index}.dcm")
    return sorted(folder.iterdir())


# -------------------------------------------------------------------------------------------------- results and states


@pytest.mark.parametrize("kind", ["slices", "zip", "nifti", "video", "dicom", "image"])
def test_an_uploaded_scan_of_the_gallery_is_its_own_best_hit(
    kind: str, open_page: OpenPage, server: SpaceServer, tmp_path: Path
) -> None:
    series = server.scan_path("ct", "")
    packed = tmp_path / "series.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for slice_file in sorted(series.iterdir()):
            archive.write(slice_file, f"study/{slice_file.name}")
    files = {
        "slices": sorted(series.iterdir()),
        "zip": [packed],
        "nifti": [next(server.folder.glob("*/mri/*.nii.gz"))],
        "video": [server.scan_path("endoscopy", ".mp4")],
        "dicom": [server.scan_path("xray", ".dcm")],
        "image": [server.scan_path("xray", ".png")],
    }[kind]
    page = open_page()
    upload(page, *files)
    best = results(page)[0]
    location = server.records[best].location
    assert location == (series if kind in ("slices", "zip") else files[0])
    facts = page.locator("#query-card").inner_text()
    assert re.search(r"\d+ × \d+ px", facts)
    assert ("slices" in facts) == (kind in ("slices", "zip", "nifti"))
    assert ("frames" in facts) == (kind == "video")


def test_a_card_says_what_the_scan_is_and_how_close_it_is(open_page: OpenPage, server: SpaceServer) -> None:
    page = open_page()
    row = example_row(page, "MRI")
    items = example(page, "MRI")
    hit = server.service.search(server.service.query_of_row(row), 1)[0]
    assert items[0] == hit["item"]
    text = page.locator("#grid .card").first.inner_text()
    rest = max(0.1, 100 - hit["percentile"])
    assert f"closest {rest:.1f}%" in text or f"closest {rest:.0f}%" in text
    assert page.locator("#grid .rank").all_inner_texts()[:2] == ["1", "2"]
    assert page.locator("#results").is_visible()
    assert not page.locator("#welcome").is_visible()


@pytest.mark.parametrize("nearest", [0.0, 2.0])
def test_a_query_without_a_match_is_called_so(nearest: float, open_page: OpenPage, server: SpaceServer) -> None:
    page = open_page()
    gallery = server.service.gallery
    calibration = gallery.calibration
    gallery.__dict__["calibration"] = Calibration(calibration.pairs, torch.full((200,), nearest))
    try:
        example(page, "CT")
    finally:
        gallery.__dict__["calibration"] = calibration
    weak = page.locator("#grid .card:visible em").count()
    assert page.locator("#status .verdict").count() == (nearest > 1)
    assert weak == (page.locator("#grid .card:visible").count() if nearest > 1 else 0)


def test_a_blank_image_is_called_blank(open_page: OpenPage, tmp_path: Path) -> None:
    Image.new("L", (90, 80), 3).save(tmp_path / "black.png")
    page = open_page()
    upload(page, tmp_path / "black.png")
    results(page)
    assert "blank" in page.locator("#status .verdict").inner_text()


def test_scans_that_look_the_same_are_behind_a_button(
    open_page: OpenPage, server: SpaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_picture = torch.ones(1)
    monkeypatch.setitem(server.service.gallery.__dict__, "miniature", lambda row: same_picture)
    page = open_page()
    example(page, "CT")
    show_all(page, SCANS - 1)
    more = page.locator("#grid .more")
    counts = [int(re.findall(r"\+(\d+)", text)[0]) for text in more.all_inner_texts()]
    before = page.locator("#grid .card:visible").count()
    assert sum(counts) == SCANS - 1 - before
    assert counts, "an untrained encoder hardly tells the phantom's images of one kind apart"
    more.first.click()
    assert page.locator("#grid .card:visible").count() == before + counts[0]
    more.first.click()
    assert page.locator("#grid .card:visible").count() == before


def is_reset(page: Any) -> None:
    assert not page.locator("#results").is_visible()
    assert not page.locator("#viewer").is_visible()
    assert not page.locator("#query-card").is_visible()
    assert page.locator("#welcome").is_visible()
    assert page.locator("#grid .card").count() == page.locator("#table tr").count() == 0
    assert "broken" not in page.locator("#upload").inner_text()


def test_nothing_of_a_query_stays_after_an_error_or_a_new_start(
    open_page: OpenPage, server: SpaceServer, tmp_path: Path, screenshots: Path
) -> None:
    (tmp_path / "broken.dcm").write_text("not a scan")
    page = open_page()
    example(page, "CT")
    open_result(page)
    upload(page, tmp_path / "broken.dcm")
    page.locator("#notice p").first.wait_for()
    idle(page)
    assert "broken.dcm" in page.locator("#notice").inner_text()
    page.screenshot(path=screenshots / "1440-light-error.png")
    is_reset(page)
    upload(page, server.scan_path("xray", ".png"))
    results(page)
    assert not page.locator("#notice p").count(), "the error is gone"
    open_result(page)
    page.locator("#start-over").click()
    page.locator("#welcome").wait_for()
    idle(page)
    is_reset(page)
    example(page, "MRI")
    assert not page.locator("#viewer").is_visible()
    page.reload()
    upload(page, server.scan_path("xray", ".png"))
    results(page)
    page.locator("#upload [aria-label=Clear], #upload button[title=Clear]").first.click()
    page.locator("#welcome").wait_for()
    idle(page)
    is_reset(page)


@pytest.mark.parametrize("slow", ["upload", "reading"])
def test_a_query_that_is_chosen_during_an_upload_replaces_it(
    slow: str, open_page: OpenPage, server: SpaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page()
    row = example_row(page, "CT")
    read, chosen, ended = server.service.query_or_choices, threading.Event(), threading.Event()

    def slow_read(files: Any) -> Any:
        assert chosen.wait(TIMEOUT)
        ended.set()
        return read(files)

    if slow == "reading":
        monkeypatch.setattr(server.service, "query_or_choices", slow_read)
    else:
        page.route("**/upload?*", lambda route: (page.wait_for_function("() => window.go"), route.continue_()))
    with page.expect_request("**/upload?*" if slow == "upload" else "**/queue/join?*"):
        upload(page, server.scan_path("xray", ".png"))
    page.locator(f"#examples [data-index='{row}']").click()
    found = results(page)
    open_result(page)
    with page.expect_response("**/queue/join?*") if slow == "upload" else contextlib.nullcontext():
        chosen.set()
        page.evaluate("() => { window.go = true }")
    assert slow == "upload" or ended.wait(TIMEOUT)
    idle(page)
    assert results(page) == found
    assert page.locator("#viewer").is_visible()
    title = page.locator("#viewer figcaption b")
    shown = title.nth(1).inner_text()
    viewed(page, page.locator("#viewer [data-do=next]").click)
    assert title.nth(1).inner_text() != shown
    assert "CT" in title.first.inner_text(), "the query is still the example"


def test_an_upload_that_is_too_large_is_an_error_in_the_page(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    slices = [tmp_path / f"{number}.dcm" for number in range(5)]
    for file in slices:
        file.write_bytes(bytes(2**23))
    upload(page, *slices)
    page.locator("#notice p").filter(has_text=f"{UPLOAD_BYTES:,}").wait_for()


def test_several_scans_in_an_upload_are_offered(open_page: OpenPage, server: SpaceServer, screenshots: Path) -> None:
    page = open_page()
    image = server.scan_path("xray", ".png")
    upload(page, *sorted(server.scan_path("ct", "").iterdir()), image)
    page.locator("#which-one .card").nth(1).wait_for()
    idle(page)
    page.screenshot(path=screenshots / "1440-light-which-one.png")
    assert page.locator("#which-one .card").count() == 2
    assert not page.locator("#results").is_visible()
    page.locator("#which-one .card").filter(has_not_text="slices").click()
    assert server.records[results(page)[0]].location == image
    assert not page.locator("#which-one .card").count()
    page.locator("#another").click()
    page.locator("#which-one .card").filter(has_text="slices").click()
    assert server.records[results(page)[0]].location == server.scan_path("ct", "")
    page.locator("#start-over").click()
    page.locator("#welcome").wait_for()
    assert not page.locator("#another").is_visible(), "the upload is not the query any more"


def test_a_folder_is_uploaded(open_page: OpenPage, server: SpaceServer) -> None:
    page = open_page()
    series = server.scan_path("ct", "")
    page.locator("#upload-folder input, input[webkitdirectory]").first.set_input_files(str(series))
    assert server.records[results(page)[0]].location == series


def test_a_dropped_folder_is_uploaded(open_page: OpenPage, server: SpaceServer) -> None:
    """The entries are stand-ins of those that a browser makes of a folder, in two batches as a browser reads them."""
    page = open_page()
    series = server.scan_path("ct", "")
    files = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in sorted(series.iterdir())]
    page.evaluate(
        """(files) => {
        const entries = files.map(([name, data]) => ({isFile: true, file: (resolve) => resolve(
            new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name))}))
        const batches = [entries.slice(0, 2), entries.slice(2), []]
        const folder = {isDirectory: true, createReader: () => ({readEntries: (resolve) => resolve(batches.shift())})}
        const event = new Event('drop', {bubbles: true, cancelable: true})
        event.dataTransfer = {items: [{webkitGetAsEntry: () => folder}]}
        document.querySelector('#upload button').dispatchEvent(event)
        }""",
        files,
    )
    assert server.records[results(page)[0]].location == series


def test_chips_sorting_table_and_downloads(open_page: OpenPage, server: SpaceServer, screenshots: Path) -> None:
    page = open_page()
    upload(page, server.scan_path("xray", ".png"))
    assert len(results(page)) <= DEFAULT_HITS
    open_result(page)
    page.locator("#modality-chips").get_by_label(f"CT ({SUBJECTS})").check()
    page.locator("#modality-chips").get_by_label(f"MRI ({SUBJECTS})").check()
    idle(page)
    assert not page.locator("#viewer").is_visible(), "it may show a scan that is no longer a result"
    found = results(page)
    assert {server.records[item].modality for item in found} <= {"ct", "mri"}
    page.locator("#options button").first.click()
    page.locator("#sort").get_by_label("Modality").check()
    idle(page)
    modalities = [server.records[item].modality for item in results(page)]
    assert modalities == sorted(modalities)
    page.locator("#table-accordion button").first.click()
    rows = page.locator("#table tbody tr")
    rows.first.wait_for()
    with page.expect_download() as download:
        page.locator("#as-csv").click()
    lines = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert len(lines) == rows.count() == page.locator("#grid .card").count()
    with page.expect_download() as download:
        page.locator("#as-json").click()
    assert [hit["item"] for hit in json.loads(Path(download.value.path()).read_text())] == [
        int(line["item"]) for line in lines
    ]
    page.screenshot(path=screenshots / "1440-light-table.png", full_page=True)


def test_html_in_labels_and_file_names_is_shown_as_text(
    open_page: OpenPage, server: SpaceServer, tmp_path: Path
) -> None:
    page = open_page()
    bad = tmp_path / "<img src=x onerror=window.attacked='file'>${window.attacked=1}.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    upload(page, bad)
    page.locator("#notice").get_by_text("onerror").first.wait_for()
    upload(page, server.scan_path("xray", ".png"))
    results(page)
    show_all(page, SCANS)
    page.locator("#table-accordion button").first.click()
    page.locator("#table tbody tr").first.wait_for()
    text = page.locator("#table").inner_text()
    assert "<img src=x onerror=" in text
    assert "<script>" in text
    items = [
        json.loads(item)
        for item in page.locator("#grid .card").evaluate_all("nodes => nodes.map(n => n.dataset.index)")
    ]
    evil = next(item for item in items if "<img" in server.records[item].label)
    card = page.locator(f"#grid [data-index='{evil}']")
    viewed(page, lambda: card.dispatch_event("click"))
    assert "<img" in page.locator("#viewer figcaption").nth(1).inner_text()
    page.get_by_role("tab", name="Explore").click()
    page.locator("#map circle").first.wait_for()
    page.locator("#map-colour input").nth(1).check()
    idle(page)
    assert page.evaluate("() => window.attacked") is None
    assert page.locator("img[src='x']").count() == 0


# --------------------------------------------------------------------------------------------------------------- viewer


def test_slices_move_in_the_browser_alone(open_page: OpenPage, requested: list[str], screenshots: Path) -> None:
    page = open_page()
    example(page, "CT")
    page.locator("#modality-chips").get_by_label(f"CT ({SUBJECTS})").check()
    idle(page)
    open_result(page)
    page.screenshot(path=screenshots / "1440-light-viewer.png")
    idle(page)
    requested.clear()
    link = page.locator("#viewer [data-set=link]")
    link.uncheck()
    for canvas in page.locator("#viewer canvas").all():
        canvas.focus()
        page.keyboard.press("Home")
    assert slices(page) == [0, 0]
    link.check()
    first = page.locator("#viewer canvas").first
    first.scroll_into_view_if_needed()
    first.focus()
    box = first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    position = page.evaluate("() => scrollY")
    for _ in range(3):
        page.mouse.wheel(0, 100)
        page.wait_for_timeout(50)
    assert slices(page)[0] == 3
    assert page.evaluate("() => scrollY") == position, "the wheel moves slices, not the page"
    mm = [pane(page, number, "pane.pane.step") for number in range(2)]
    assert slices(page)[1] == round(3 * mm[0] / mm[1]), "the other scan follows by the same distance"
    page.keyboard.press("ArrowDown")
    assert slices(page)[0] == 4
    link.uncheck()
    alone = slices(page)[1]
    slider = page.locator("#viewer .slices input").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slices(page) == [5, alone]
    assert slider.get_attribute("aria-valuetext").startswith("6 of ")
    assert "Slice 6" in page.locator("#viewer output").first.inner_text()
    page.keyboard.press("b")
    assert slices(page) == [pane(page, number, "pane.pane.voxel[0]") for number in range(2)]
    assert requested == [], "no server round trip for a slice"


def test_a_scan_is_shown_as_radiologists_expect(open_page: OpenPage, tmp_path: Path) -> None:
    """The patient's left is at the right and anterior at the top; values are HU; the window can be changed."""
    values = np.full((12, 40, 40), -100)
    values[:, 2:12, 28:38] = 900  # rows go from anterior to posterior, columns from right to left
    page = open_page()
    upload(page, *ct_series(tmp_path / "ct", values))
    results(page)
    open_result(page)
    heat = page.locator("#viewer [data-set=heat]")
    heat.evaluate("node => { node.value = 0; node.dispatchEvent(new Event('input', {bubbles: true})) }")
    page.evaluate("() => m3ret.panes().forEach(pane => pane.nv.setCrosshairWidth(0))")
    bright = np.argwhere(picture(page).min(-1) > 250)
    centre = bright.mean(0) / picture(page).shape[:2]
    assert centre[0] < 0.45, "anterior is at the top"
    assert centre[1] > 0.55, "the patient's left is at the right"
    canvas = page.locator("#viewer canvas").first
    box = canvas.bounding_box()
    at = bright.mean(0)
    page.mouse.move(box["x"] + at[1], box["y"] + at[0])
    page.locator("#viewer output").first.filter(has_text="900 HU").wait_for()

    def window() -> list[float]:
        return pane(page, 0, "[pane.nv.volumes[0].cal_min, pane.nv.volumes[0].cal_max]")

    assert window() == [-160, 240]
    page.locator("#viewer [data-set=window]").select_option(label="lung")
    assert window() == [-1350, 150]
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5, steps=4)
    page.mouse.up(button="right")
    assert window() != [-1350, 150]
    page.locator("#viewer [data-do=reset]").click()
    assert window() == [-1350, 150]
    page.locator("#viewer [data-set=tool]").select_option("measurement")
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    (measured,) = pane(page, 0, "pane.nv.document.completedMeasurements.map(one => one.distance)")
    per_pixel = 120 / min(box["width"], box["height"])  # 40 voxels of 3 mm fill the shorter side, but for a margin
    assert measured == pytest.approx(box["width"] * 0.2 * per_pixel, rel=0.1)
    page.locator("#viewer [data-set=planes]").check()
    assert pane(page, 0, "pane.nv.opts.sliceType === pane.nv.sliceTypeMultiplanar")


def picture_of_query(open_page: OpenPage, path: Path) -> tuple[Any, np.ndarray]:
    """Search with a file, open the first result, and return the page and the query's picture without match colours."""
    page = open_page()
    upload(page, path)
    results(page)
    open_result(page)
    page.locator("#viewer canvas").first.focus()
    page.keyboard.press("h")
    return page, picture(page)


def test_the_face_is_at_the_left_of_a_sagittal_slice(open_page: OpenPage, tmp_path: Path) -> None:
    values = np.full((6, 40, 40), 100, np.int16)  # from right to left, posterior to anterior, inferior to superior
    values[:, 28:38, 28:38] = 900  # anterior and superior
    nibabel.save(nibabel.Nifti1Image(values, np.diag([6.0, 1.0, 1.0, 1.0])), tmp_path / "sagittal.nii")
    _, shown = picture_of_query(open_page, tmp_path / "sagittal.nii")
    bright = np.argwhere(shown.min(-1) > 200).mean(0) / shown.shape[:2]
    assert (bright < 0.45).all(), "at the top left"


def test_an_image_is_not_mirrored(open_page: OpenPage, tmp_path: Path) -> None:
    pixels = np.full((60, 60, 3), (60, 90, 60), np.uint8)
    pixels[5:15, 5:15] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    page, shown = picture_of_query(open_page, tmp_path / "corner.png")
    red = np.argwhere((shown[..., 0] > 200) & (shown[..., 1] < 60)).mean(0) / shown.shape[:2]
    assert (red < 0.45).all(), "at the top left"
    assert not page.locator("#viewer .slices").first.is_visible()
    assert not page.locator("#viewer [data-for=ct]").is_visible()


def test_match_colours_are_an_overlay_inside_the_body(open_page: OpenPage, tmp_path: Path) -> None:
    values = np.full((12, 40, 40), -1000)
    values[:, 8:32, 8:32] = 40
    page = open_page()
    upload(page, *ct_series(tmp_path / "ct", values))
    results(page)
    open_result(page)
    page.evaluate("() => m3ret.panes().forEach(pane => pane.nv.setCrosshairWidth(0))")
    heat = pane(page, 0, "Array.from(pane.nv.volumes[1].img)")
    assert 0 < max(heat) <= 255
    node = page.locator("#viewer [data-set=heat]")
    pictures = []
    for opacity in (0, 100):
        node.evaluate(
            f"node => {{ node.value = {opacity}; node.dispatchEvent(new Event('input', {{bubbles: true}})) }}"
        )
        pictures.append(picture(page))
    cold, hot = pictures
    changed = np.abs(hot - cold).max(-1) > 12
    air = cold.max(-1) < 40
    edge = 12  # px of interpolation at the border of the body
    inside = np.argwhere(~air)
    (top, left), (bottom, right) = inside.min(0) - edge, inside.max(0) + edge
    changed[max(0, top) : bottom, max(0, left) : right] = False
    assert changed.sum() == 0, "no colour in the air"
    assert (np.abs(hot - cold).max(-1) > 12).any()


def test_a_box_on_the_query_searches_by_that_region(
    open_page: OpenPage, server: SpaceServer, screenshots: Path
) -> None:
    page = open_page()
    query = server.service.query_of_row(example_row(page, "CT"))
    example(page, "CT")
    open_result(page)
    page.locator("#viewer [data-set=tool]").select_option("roiSelection")
    box = page.locator("#viewer canvas").first.bounding_box()

    def drag() -> None:
        page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.35)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6, steps=5)
        page.mouse.up()

    viewed(page, drag)
    idle(page)
    page.screenshot(path=screenshots / "1440-light-region.png")
    assert "region" in page.locator("#status").inner_text()
    assert page.locator("#viewer [data-do=whole]").is_visible()
    heat = np.array(pane(page, 0, "Array.from(pane.nv.volumes[1].img)"))
    D, h, w = (pane(page, 0, f"pane.nv.volumes[1].hdr.dims[{axis}]") for axis in (3, 2, 1))
    hot = np.argwhere(heat.reshape(D, h, w).any(0)) / [h, w]
    assert len(hot)
    assert hot.min() > 0.2, "no colour outside of the region"
    assert hot.max() < 0.8
    shown = picture(page)
    outline = np.argwhere(np.abs(shown - [255, 217, 51]).max(-1) < 40)
    ends = np.concatenate([outline.min(0), outline.max(0)]) / [*shown.shape[:2], *shown.shape[:2]]
    np.testing.assert_allclose(ends, [0.35, 0.35, 0.6, 0.6], atol=0.04)
    assert not page.locator("#grid small", has_text="closest").count(), "another score than the cosine"
    viewed(page, page.locator("#viewer [data-do=next]").click)
    assert "region" in page.locator("#viewer .message").inner_text()
    viewed(page, page.locator("#viewer [data-do=whole]").click)
    idle(page)
    assert results(page)[0] == server.service.search(query, 1)[0]["item"]


def test_previous_next_and_a_result_as_query(open_page: OpenPage) -> None:
    page = open_page()
    items = example(page, "Endoscopy")
    open_result(page, 1)
    assert page.evaluate("() => document.activeElement.closest('#viewer') !== null"), "the focus moves to the viewer"
    title = page.locator("#viewer figcaption b").nth(1)
    assert title.inner_text().startswith("Result ")
    shown = title.inner_text()
    viewed(page, page.locator("#viewer [data-do=previous]").click)
    assert title.inner_text() != shown
    page.locator("#viewer canvas").first.focus()
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert page.evaluate("() => document.activeElement.dataset.index") == str(items[1]), "and back to the card"
    open_result(page, 1)
    page.locator("#viewer [data-do=query]").click()
    page.wait_for_function("() => document.querySelector('#viewer').hidden")
    assert items[1] not in results(page)


# ------------------------------------------------------------------------------------------------------ map and screens


def test_the_map_shows_scans_on_hover_and_searches_on_click(
    open_page: OpenPage, server: SpaceServer, screenshots: Path
) -> None:
    page = open_page()
    example(page, "MRI")
    page.get_by_role("tab", name="Explore").click()
    points = page.locator("#map circle[data-index]")
    points.first.wait_for()
    idle(page)
    assert points.count() == SCANS
    assert page.locator("#map .query").count() == 1
    point = points.nth(SCANS - 1)  # drawn last, so nothing covers it
    item = int(point.get_attribute("data-index"))
    point.hover()
    tip = page.locator("#map-tip")
    tip.wait_for()
    assert f"/{item}.webp" in f"/{tip.locator('img').get_attribute('src')}"
    page.screenshot(path=screenshots / "1440-light-explore.png")
    point.click()
    page.get_by_role("tab", name="Search").filter(visible=True).wait_for()
    assert item not in results(page)
    assert not tip.is_visible()
    page.get_by_role("tab", name="Explore").click()
    page.locator("#item input").fill("2")
    page.locator("#search-with-item").click()
    assert 2 not in results(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "viewport"), [("1440", WIDE), ("1024", TABLET), ("390", NARROW)])
def test_the_page_fits_the_screen(
    name: str, viewport: dict[str, int], scheme: str, open_page: OpenPage, screenshots: Path
) -> None:
    page = open_page(viewport, scheme)
    idle(page)
    page.screenshot(path=screenshots / f"{name}-{scheme}-start.png")
    example(page, "CT")
    page.wait_for_timeout(300)
    if name == "390":
        top = page.locator("#status").bounding_box()["y"]
        assert 0 <= top < 200, "the results are in view"
    page.screenshot(path=screenshots / f"{name}-{scheme}-hits.png")
    open_result(page)
    page.wait_for_timeout(300)
    for canvas in page.locator("#viewer canvas").all():
        box = canvas.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= viewport["height"], "both pictures are in view"
    page.screenshot(path=screenshots / f"{name}-{scheme}-viewer.png")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"], "no horizontal scrolling"


def test_pictures_do_not_move_the_page_when_they_load(open_page: OpenPage) -> None:
    page = open_page()
    page.evaluate(
        "() => { window.shift = 0; new PerformanceObserver(list => list.getEntries().forEach(entry => {"
        "if (!entry.hadRecentInput) window.shift += entry.value })).observe({type: 'layout-shift'}) }"
    )
    page.route("**/thumbnail/**", lambda route: (page.wait_for_timeout(300), route.continue_()))
    example(page, "CT")
    before = page.evaluate("() => document.querySelector('#grid').getBoundingClientRect().height")
    page.wait_for_function("() => [...document.querySelectorAll('#grid img')].every(image => image.complete)")
    assert page.evaluate("() => document.querySelector('#grid').getBoundingClientRect().height") == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(scheme: str, open_page: OpenPage) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    page = open_page(scheme=scheme)

    def serious(what: str) -> list[str]:
        idle(page)
        found = axe.run(page).response["violations"]
        return [
            f"{what}: {one['id']}: {node['html'][:160]}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]

    violations = serious("start")
    example(page, "CT")
    page.locator("#options button").first.click()
    page.locator("#table-accordion button").first.click()
    violations += serious("results")
    open_result(page)
    violations += serious("viewer")
    page.get_by_role("tab", name="Explore").click()
    page.locator("#map circle").first.wait_for()
    violations += serious("explore")
    page.get_by_role("tab", name="About").click()
    violations += serious("about")
    assert violations == []


def test_the_page_can_be_used_with_the_keyboard_alone(open_page: OpenPage) -> None:
    page = open_page()

    def tab_to(selector: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reachable")

    tab_to("#examples .card")
    page.keyboard.press("Enter")
    results(page)
    page.evaluate("() => document.activeElement.blur()")
    tab_to("#grid .card")
    viewed(page, lambda: page.keyboard.press("Enter"))
    tab_to("#viewer canvas")
    before = slices(page)[0]
    page.keyboard.press("ArrowUp" if before else "ArrowDown")
    assert slices(page)[0] != before
    page.keyboard.press("Escape")
    assert page.evaluate("() => document.activeElement.matches('#grid .card')")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select')]
        .filter(node => node.offsetParent !== null && node.type !== 'file')
        .filter(node => !(node.getAttribute('aria-label') || node.innerText || node.title || node.placeholder
            || node.labels?.length || node.getAttribute('aria-labelledby') || node.querySelector('img[alt]')?.alt))
        .map(node => node.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []
    assert page.evaluate("() => [...document.images].filter(i => i.offsetParent && !i.alt).length") == 0


def test_the_page_requests_no_other_server(open_page: OpenPage, server: SpaceServer, requested: list[str]) -> None:
    page = open_page()
    example(page, "CT")
    open_result(page)
    page.get_by_role("tab", name="Explore").click()
    page.locator("#map circle").first.wait_for()
    idle(page)
    host = urlsplit(server.address).netloc
    assert {urlsplit(url).netloc for url in requested if not url.startswith(("data:", "blob:"))} == {host}
