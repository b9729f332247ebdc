"""The Space in a real browser: every kind of upload, filters, the viewer, errors, and a phone's screen."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from space_server import SUBJECTS, TIMEOUT, SpaceServer, browsing, find_browser, screenshot_folder, serving

from modeling_m3ret.scan_m3ret import Scan
from modeling_m3ret.space.explore import SIDE, GalleryMap
from modeling_m3ret.space.service import DEFAULT_HITS, key_of_row
from modeling_m3ret.space.side_by_side import modality_name
from modeling_m3ret.space.viewer import FULL_RANGE, WINDOWS, num_slices, render_slice, voxel_at


pytestmark = [pytest.mark.browser, pytest.mark.slow]

SCANS = 5 * SUBJECTS
UPLOAD_BYTES = 2**25
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


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
def open_page(context: Any, server: SpaceServer, requested: list[str]) -> Iterator[Any]:
    """Open the page in a new tab. Violations of its content security policy fail the test."""
    pages: list[Any] = []
    violations: list[str] = []

    def open_new(viewport: dict[str, int] = WIDE, scheme: str = "light") -> Any:
        page = context.new_page()
        pages.append(page)
        page.set_default_timeout(TIMEOUT * 1000)
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme=scheme)
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: violations.append(message.text) if "Policy" in message.text else None)
        page.goto(server.address)
        page.locator("#upload").wait_for()
        return page

    yield open_new
    for page in pages:
        page.close()
    assert violations == []


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return screenshot_folder(tmp_path_factory.mktemp("screenshots"))


def upload(page: Any, *files: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files([str(file) for file in files])


def hits(page: Any) -> list[str]:
    """Return the captions of the grid, once there are some."""
    captions = page.locator("#grid .caption-label")
    captions.first.wait_for()
    wait_until_idle(page)
    return [caption.strip() for caption in captions.all_inner_texts()]


def wait_until_idle(page: Any) -> None:
    """Wait until no event is in progress."""
    page.wait_for_timeout(100)  # until an event has been sent
    page.wait_for_function("() => !document.querySelector('.generating, .progress-text, .eta-bar')")


def open_hit(page: Any, number: int = 0) -> None:
    page.locator("#grid button.thumbnail-item, #grid .grid-container button").nth(number).click()
    page.locator("#viewer #hit-image img").wait_for()
    wait_until_idle(page)


def source(page: Any, image: str) -> str:
    return str(page.locator(f"{image} img").get_attribute("src"))


def wait_for_change(page: Any, image: str, before: str) -> None:
    """Wait until an image has changed."""
    page.wait_for_function(
        "([image, before]) => document.querySelector(image + ' img')?.getAttribute('src') !== before",
        arg=[image, before],
    )


def error(page: Any, text: str) -> Any:
    """Return the error message on the page that contains this name or value."""
    return page.get_by_test_id("toast-body").filter(has_text=text)


def one_of_each(server: SpaceServer, folder: Path) -> dict[str, list[Path]]:
    series = server.scan_path("ct", "")
    packed = folder / "series.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for slice_file in sorted(series.iterdir()):
            archive.write(slice_file, f"study/{slice_file.name}")
    return {
        "slices": sorted(series.iterdir()),
        "zip": [packed],
        "nifti": [next(server.folder.glob("*/mri/*.nii.gz"))],
        "video": [server.scan_path("endoscopy", ".mp4")],
        "dicom": [server.scan_path("xray", ".dcm")],
        "image": [server.scan_path("xray", ".png")],
    }


@pytest.mark.parametrize("kind", ["slices", "zip", "nifti", "video", "dicom", "image"])
def test_an_uploaded_scan_of_the_gallery_is_its_own_best_hit(
    kind: str, open_page: Any, server: SpaceServer, tmp_path: Path, screenshots: Path
) -> None:
    page = open_page()
    upload(page, *one_of_each(server, tmp_path)[kind])
    found = hits(page)
    assert len(found) == DEFAULT_HITS
    assert found[0].startswith("1.000 · ")
    facts = page.locator("#query-facts textarea, #query-facts input").input_value()
    assert re.search(r"\d+ × \d+ px", facts)
    assert ("slices" in facts) == (kind in ("slices", "zip", "nifti"))
    assert ("frames" in facts) == (kind == "video")
    page.screenshot(path=screenshots / f"1280-light-upload-{kind}.png")


def test_filters_narrow_the_hits(open_page: Any, server: SpaceServer, screenshots: Path) -> None:
    page = open_page()
    upload(page, server.scan_path("xray", ".png"))
    assert len(hits(page)) == DEFAULT_HITS
    page.locator("#options button").first.click()
    page.locator("#modalities input").click()
    page.get_by_role("option", name="CT", exact=True).click()
    page.wait_for_function(f"() => document.querySelectorAll('#grid .caption-label').length === {SUBJECTS}")
    assert all(" · CT · " in caption for caption in hits(page))
    page.keyboard.press("Escape")
    page.screenshot(path=screenshots / "1280-light-filtered.png", full_page=True)


def test_linked_slices_move_together(open_page: Any, server: SpaceServer, screenshots: Path) -> None:
    page = open_page()
    page.locator("#example-ct").click()
    hits(page)
    page.locator("#options button").first.click()
    page.locator("#modalities input").click()
    page.get_by_role("option", name="CT", exact=True).click()
    page.wait_for_function(f"() => document.querySelectorAll('#grid .caption-label').length === {SUBJECTS - 1}")
    open_hit(page)
    page.screenshot(path=screenshots / "1280-light-viewer.png", full_page=True)

    hot = source(page, "#hit-image")
    page.locator("#show-heat input").uncheck()
    wait_for_change(page, "#hit-image", hot)
    cold = source(page, "#hit-image")
    page.locator("#window").get_by_label("lung").check()
    wait_for_change(page, "#hit-image", cold)

    query_before, hit_before = source(page, "#query-image"), source(page, "#hit-image")
    slider = page.locator("#query-slice input[type=range]")
    start = int(slider.input_value())
    slider.focus()
    key = "ArrowLeft" if start > 1 + 6 else "ArrowRight"
    for _ in range(6):
        page.keyboard.press(key)
    wait_for_change(page, "#query-image", query_before)
    wait_for_change(page, "#hit-image", hit_before)
    wait_until_idle(page)
    moved = int(slider.input_value())
    assert abs(moved - start) == 6
    hit = page.locator("#hit-slice input[type=range]")
    fraction = (moved - 1) / (int(slider.get_attribute("max")) - 1)
    assert abs((int(hit.input_value()) - 1) - fraction * (int(hit.get_attribute("max")) - 1)) <= 1

    page.locator("#link-slices input").uncheck()
    alone = hit.input_value()
    slider.focus()
    before = source(page, "#query-image")
    page.keyboard.press("ArrowRight")
    wait_for_change(page, "#query-image", before)
    assert hit.input_value() == alone

    page.locator("#to-best").click()
    wait_until_idle(page)
    page.wait_for_function(f"() => document.querySelector('#query-slice input[type=range]').value === '{start}'")


def shown(page: Any, image: str, server: SpaceServer) -> np.ndarray:
    """Return the pixels of an image as the server sent them."""
    answer = httpx.get(source(page, image), timeout=TIMEOUT)
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(float)


def click_at(page: Any, image: str, right: float, down: float) -> tuple[int, int]:
    """Click at fractions of an image's width and height, and wait for the image that this leads to.

    Returns:
        The pixel that was clicked, in the image's own resolution.
    """
    element = page.locator(f"{image} img")
    element.scroll_into_view_if_needed()
    # before the click replaces the image: one that is still loading has size 0 x 0
    page.wait_for_function("image => document.querySelector(image + ' img').naturalWidth > 0", arg=image)
    width, height = element.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    box = element.bounding_box()
    before = source(page, image)
    element.click(position={"x": right * box["width"], "y": down * box["height"]})
    wait_for_change(page, image, before)
    wait_until_idle(page)
    return round(right * width), round(down * height)


def shown_slice(page: Any, hit: Scan) -> int:
    """Return the index of the slice that the page shows of `hit`. A single slice has no slider."""
    return int(page.locator("#hit-slice input[type=range]").input_value()) - 1 if num_slices(hit) > 1 else 0


def region_fields(page: Any) -> list[int]:
    page.locator("#region-left-column input").wait_for()  # created when the accordion is opened
    return [int(field.input_value()) for field in page.locator("#region input").all()]


@pytest.mark.parametrize(("name", "viewport"), [("1280", WIDE), ("390", NARROW)])
def test_two_clicks_select_a_region_and_show_where_it_matches(
    name: str, viewport: dict[str, int], open_page: Any, server: SpaceServer, screenshots: Path
) -> None:
    page = open_page(viewport)
    row = server.row_of("ct")
    query = server.service.query_of_row(row)
    page.locator("#example-ct").click()
    hits(page)
    found = [hit["item"] for hit in server.service.search(query, 8)]
    open_hit(page)
    scan, hit = server.service.scan(key_of_row(row)), server.service.scan(key_of_row(found[0]))
    D, H, W = scan.array.shape[1:]
    index = int(page.locator("#query-slice input[type=range]").input_value()) - 1
    top = voxel_at(scan, *click_at(page, "#query-image", 0.3, 0.35))
    if name == "1280":
        page.screenshot(path=screenshots / f"{name}-light-first-corner.png", full_page=True)
    bottom = voxel_at(scan, *click_at(page, "#query-image", 0.7, 0.6))
    page.screenshot(path=screenshots / f"{name}-light-region.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"], "no horizontal scrolling"
    page.locator("#region button").first.click()
    slab = server.service.slices_in_patch(query, index)
    assert 1 <= slab.stop - slab.start < D
    numbers = region_fields(page)
    # a pixel to either side for the browser's fractions of one
    expected = [slab.start + 1, slab.stop, top[0] + 1, bottom[0] + 1, top[1] + 1, bottom[1] + 1]
    np.testing.assert_allclose(numbers, expected, atol=1)
    assert numbers[:2] == expected[:2]

    region = tuple(slice(low - 1, high) for low, high in zip(numbers[::2], numbers[1::2], strict=True))
    heat, whole = server.service.heat(query, found[0], region), server.service.heat(query, found[0])
    assert shown_slice(page, hit) == heat.hit_slice
    assert page.locator("#query-slice input[type=range]").input_value() == str(index + 1), "the query keeps its slice"
    window = WINDOWS[FULL_RANGE]
    theirs = shown(page, "#hit-image", server)
    of_region, of_whole = (render_slice(hit, heat.hit_slice, window, which.hit) for which in (heat, whole))
    difference = np.abs(theirs - np.asarray(of_region)).mean()
    assert difference < 3, "except for image compression"
    assert difference < np.abs(theirs - np.asarray(of_whole)).mean()
    outlined, plain = (render_slice(scan, index, window, heat.query, which) for which in (region, None))
    ours = shown(page, "#query-image", server)
    assert np.abs(ours - np.asarray(outlined)).mean() < np.abs(ours - np.asarray(plain)).mean()
    if name == "390":
        return

    slider = page.locator("#query-slice input[type=range]")
    before = source(page, "#query-image")
    slider.focus()
    page.keyboard.press("ArrowRight" if index + 1 < D else "ArrowLeft")
    wait_for_change(page, "#query-image", before)
    wait_until_idle(page)
    assert region_fields(page) == numbers, "the region stays while slices move"
    before = source(page, "#hit-image")
    open_hit(page, 1)
    wait_for_change(page, "#hit-image", before)
    wait_until_idle(page)
    assert region_fields(page) == numbers, "and for another hit"

    before = source(page, "#query-image")
    page.locator("#region-left-column input").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(str(numbers[4] + 2))
    wait_for_change(page, "#query-image", before)
    wait_until_idle(page)
    before = source(page, "#query-image")
    page.locator("#clear-region").focus()
    page.keyboard.press("Enter")
    wait_for_change(page, "#query-image", before)
    wait_until_idle(page)
    assert region_fields(page) == [1, D, 1, H, 1, W]
    second = server.service.scan(key_of_row(found[1]))
    assert shown_slice(page, second) == server.service.heat(query, found[1]).hit_slice

    click_at(page, "#query-image", 0.3, 0.3)
    page.locator("#example-xray").click()
    page.wait_for_function("() => !document.querySelector('#viewer')?.offsetParent")
    hits(page)
    open_hit(page)
    assert page.locator("#region-first-slice").count() == 0, "an image has no slices to choose from"


def test_windows_are_offered_only_for_hounsfield_units(open_page: Any, server: SpaceServer) -> None:
    page = open_page()
    upload(page, server.scan_path("xray", ".png"))
    hits(page)
    page.locator("#options button").first.click()
    page.locator("#modalities input").click()
    page.get_by_role("option", name="X-ray", exact=True).click()
    page.wait_for_function(f"() => document.querySelectorAll('#grid .caption-label').length === {SUBJECTS}")
    open_hit(page)
    assert page.locator("#window").get_by_label("lung").count() == 0
    assert not page.locator("#query-slice input[type=range]").is_visible(), "an X-ray has no slices to move through"


def test_a_hit_becomes_the_query(open_page: Any, server: SpaceServer) -> None:
    page = open_page()
    upload(page, server.scan_path("endoscopy", ".mp4"))
    first = hits(page)
    open_hit(page, 2)
    page.locator("#as-query").click()
    page.wait_for_function(
        "before => document.querySelector('#grid .caption-label')?.innerText.trim() !== before", arg=first[0]
    )
    assert len(hits(page)) == DEFAULT_HITS
    assert not page.locator("#viewer").is_visible()


def test_table_and_download_hold_the_hits_of_the_grid(open_page: Any, server: SpaceServer, screenshots: Path) -> None:
    page = open_page()
    upload(page, server.scan_path("ultrasound"))
    found = hits(page)
    page.get_by_role("tab", name="Table").click()
    similarity = page.locator("#table [data-testid='cell-0-1']").first
    similarity.wait_for()
    assert float(similarity.inner_text()) == pytest.approx(float(found[0].split(" · ")[0]), abs=5e-4)
    with page.expect_download() as download:
        page.locator("#as-csv").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "item,similarity,modality,anatomy,labels,source"
    assert len(lines) == 1 + len(found)
    page.screenshot(path=screenshots / "1280-light-table.png", full_page=True)


def test_an_unreadable_file_is_an_error_that_names_it(
    open_page: Any, server: SpaceServer, tmp_path: Path, screenshots: Path
) -> None:
    page = open_page()
    (tmp_path / "broken.dcm").write_text("not a scan")
    upload(page, tmp_path / "broken.dcm")
    error(page, "broken.dcm").wait_for()
    assert page.locator("#status .error").count() == 0, "no error mark covers the status line"
    page.screenshot(path=screenshots / "1280-light-broken-file.png")
    page.reload()
    upload(page, server.scan_path("xray", ".png"))
    assert len(hits(page)) == DEFAULT_HITS


def test_files_that_are_too_large_in_total_are_an_error(open_page: Any, server: SpaceServer, tmp_path: Path) -> None:
    page = open_page()
    slices = [tmp_path / f"{number}.dcm" for number in range(5)]
    for file in slices:
        file.write_bytes(bytes(2**23))
    upload(page, *slices)
    error(page, f"{UPLOAD_BYTES:,}").wait_for()
    page.reload()
    upload(page, server.scan_path("xray", ".png"))
    assert len(hits(page)) == DEFAULT_HITS


def test_html_in_labels_and_file_names_is_shown_as_text(open_page: Any, server: SpaceServer, tmp_path: Path) -> None:
    page = open_page()
    bad = tmp_path / "<img src=x onerror=window.attacked='file'>.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    upload(page, bad)
    error(page, "onerror").wait_for()
    page.reload()
    upload(page, server.scan_path("xray", ".png"))
    hits(page)
    page.locator("#options button").first.click()
    count = page.locator("#count input[type=range]")
    count.wait_for()
    wait_until_idle(page)
    count.press("End")
    page.wait_for_function(f"() => document.querySelectorAll('#grid .caption-label').length === {SCANS}")
    captions = " ".join(hits(page))
    assert "<img src=x onerror=" in captions
    assert "<script>" in captions
    open_hit(page, next(number for number, caption in enumerate(hits(page)) if "<img" in caption))
    page.get_by_role("tab", name="Table").click()
    page.locator("#table [data-testid='cell-0-4']").first.wait_for()
    page.get_by_role("tab", name="Explore").click()
    page.locator("#map-colour input").nth(1).check()
    page.wait_for_function("() => (document.querySelector('#item-facts textarea')?.value ?? '').length > 0")
    wait_until_idle(page)
    assert page.evaluate("() => window.attacked") is None
    assert page.locator("img[src='x']").count() == 0


def test_a_click_on_the_map_selects_the_scan(open_page: Any, server: SpaceServer, screenshots: Path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Explore").click()
    image = page.locator("#map img")
    image.wait_for()
    wait_until_idle(page)
    points = GalleryMap.from_embeddings(server.service.gallery.index.embeddings).points
    box = image.bounding_box()
    scale = box["width"] / SIDE
    page.mouse.click(box["x"] + float(points[7][0]) * scale, box["y"] + float(points[7][1]) * scale)
    page.wait_for_function("() => document.querySelector('#item input').value !== '0'")
    chosen = int(page.locator("#item input").input_value())
    assert np.hypot(*(points[chosen] - points[7])) < 8, "this point, or one that covers it"
    page.wait_for_function(
        "modality => document.querySelector('#item-facts textarea').value.startsWith(modality)",
        arg=modality_name(server.records[chosen].modality),
    )
    page.screenshot(path=screenshots / "1280-light-explore.png", full_page=True)
    page.locator("#search-with-item").click()
    assert len(hits(page)) == DEFAULT_HITS


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "viewport"), [("1280", WIDE), ("390", NARROW)])
def test_the_page_fits_the_screen(
    name: str, viewport: dict[str, int], scheme: str, open_page: Any, server: SpaceServer, screenshots: Path
) -> None:
    page = open_page(viewport, scheme)
    wait_until_idle(page)
    page.screenshot(path=screenshots / f"{name}-{scheme}-start.png")
    page.locator("#example-ct").click()
    hits(page)
    wait_until_idle(page)
    page.screenshot(path=screenshots / f"{name}-{scheme}-hits.png", full_page=True)
    open_hit(page)
    page.screenshot(path=screenshots / f"{name}-{scheme}-viewer.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"], "no horizontal scrolling"
    page.get_by_role("tab", name="About").click()
    page.locator("#card").wait_for()
    page.screenshot(path=screenshots / f"{name}-{scheme}-about.png")


def test_the_page_requests_no_other_server(open_page: Any, server: SpaceServer, requested: list[str]) -> None:
    page = open_page()
    page.locator("#examples button").first.click()
    hits(page)
    open_hit(page)
    page.get_by_role("tab", name="Explore").click()
    page.locator("#map img").wait_for()
    wait_until_idle(page)
    host = urlsplit(server.address).netloc
    assert {urlsplit(url).netloc for url in requested if not url.startswith(("data:", "blob:"))} == {host}


def test_every_control_has_a_name_and_is_reachable_by_keyboard(open_page: Any, server: SpaceServer) -> None:
    page = open_page()
    page.locator("#examples button").first.click()
    hits(page)
    open_hit(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select')]
        .filter(node => node.offsetParent !== null && node.type !== 'file')
        .filter(node => !(node.getAttribute('aria-label') || node.innerText || node.title || node.placeholder
            || node.labels?.length || node.getAttribute('aria-labelledby') || node.querySelector('img[alt]')?.alt))
        .map(node => node.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []
    assert page.evaluate("() => [...document.images].filter(i => i.offsetParent && !i.alt).length") == 0
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.closest('[id]')?.id ?? ''"))
    assert {"example-ct", "grid", "query-slice", "to-best", "as-query"} <= reached
