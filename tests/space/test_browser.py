"""The Space as a visitor sees it, in a real browser: every kind of upload, filters, the viewer, bad files, a phone."""

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
from served import SUBJECTS, Served, browsing, find_browser, pictures_folder, serving

from modeling_m3ret.space.explore import SIDE, GalleryMap
from modeling_m3ret.space.viewer import WHOLE_RANGE, WINDOWS, picture, voxel_at


SCANS = 5 * SUBJECTS
PATIENCE_MS = 120_000  # of a machine that is busy with other things; a quiet one needs a hundredth
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    find_browser()
    with serving(tmp_path_factory.mktemp("space")) as space:
        yield space


@pytest.fixture(scope="module")
def browser(served: Served) -> Iterator[Any]:
    with browsing() as chromium:
        yield chromium


@pytest.fixture
def asked() -> list[str]:
    """Addresses that the page asked for."""
    return []


@pytest.fixture(scope="module")
def context(browser: Any) -> Any:
    """One for all pages, so that scripts are fetched and compiled once."""
    return browser.new_context(viewport=WIDE, reduced_motion="reduce")


@pytest.fixture
def open_page(context: Any, served: Served, asked: list[str]) -> Iterator[Any]:
    pages = []

    def opened(viewport: dict[str, int] = WIDE, scheme: str = "light") -> Any:
        page = context.new_page()
        pages.append(page)
        page.set_default_timeout(PATIENCE_MS)
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.address)
        page.locator("#upload").wait_for()
        return page

    yield opened
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_folder(tmp_path_factory.mktemp("screenshots"))


def upload(page: Any, *files: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files([str(file) for file in files])


def hits(page: Any) -> list[str]:
    """The captions of the grid, once there are some."""
    captions = page.locator("#grid .caption-label")
    captions.first.wait_for()
    settled(page)
    return [caption.strip() for caption in captions.all_inner_texts()]


def settled(page: Any) -> None:
    """Nothing is under way any more, neither here nor at the server."""
    page.wait_for_timeout(100)  # for an event to have been sent
    page.wait_for_function("() => !document.querySelector('.generating, .progress-text, .eta-bar')")


def open_hit(page: Any, number: int = 0) -> None:
    page.locator("#grid button.thumbnail-item, #grid .grid-container button").nth(number).click()
    page.locator("#viewer #hit-image img").wait_for()
    settled(page)


def source(page: Any, image: str) -> str:
    return str(page.locator(f"{image} img").get_attribute("src"))


def changed(page: Any, image: str, before: str) -> None:
    """Wait until a picture is another one."""
    page.wait_for_function(
        "([place, before]) => document.querySelector(place + ' img')?.getAttribute('src') !== before",
        arg=[image, before],
    )


def one_of_each(served: Served, folder: Path) -> dict[str, list[Path]]:
    series = served.of("ct", "")
    packed = folder / "series.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for slice_file in sorted(series.iterdir()):
            archive.write(slice_file, f"study/{slice_file.name}")
    return {
        "slices": sorted(series.iterdir()),
        "zip": [packed],
        "nifti": [next(served.folder.glob("*/mri/*.nii.gz"))],
        "video": [served.of("endoscopy", ".mp4")],
        "dicom": [served.of("xray", ".dcm")],
        "image": [served.of("xray", ".png")],
    }


@pytest.mark.parametrize("kind", ["slices", "zip", "nifti", "video", "dicom", "image"])
def test_what_is_uploaded_is_found(kind: str, open_page: Any, served: Served, tmp_path: Path, pictures: Path) -> None:
    page = open_page()
    upload(page, *one_of_each(served, tmp_path)[kind])
    found = hits(page)
    assert len(found) == 8
    assert found[0].startswith("1.000 · "), "it is a scan of the gallery, and the most similar one to itself"
    facts = page.locator("#query-facts textarea, #query-facts input").input_value()
    assert re.search(r"\d+ × \d+ px", facts)
    assert ("slices of" in facts) == (kind in ("slices", "zip", "nifti"))
    assert ("frames of" in facts) == (kind == "video")
    page.screenshot(path=pictures / f"1280-light-upload-{kind}.png")


def test_filters_narrow_the_hits(open_page: Any, served: Served, pictures: Path) -> None:
    page = open_page()
    upload(page, served.of("xray", ".png"))
    assert len(hits(page)) == 8
    page.get_by_text("Filters and order").click()
    page.get_by_label("Modality (empty: all)").click()
    page.get_by_role("option", name="ct", exact=True).click()
    page.wait_for_function(
        f"() => document.querySelectorAll('#grid .caption-label').length === {SUBJECTS}", timeout=PATIENCE_MS
    )
    assert all(" · ct · " in caption for caption in hits(page))
    page.keyboard.press("Escape")
    page.screenshot(path=pictures / "1280-light-filtered.png", full_page=True)


def test_a_hit_is_seen_beside_the_query_and_both_move(open_page: Any, served: Served, pictures: Path) -> None:
    page = open_page()
    page.locator("#examples button", has_text="ct").click()
    hits(page)
    page.get_by_text("Filters and order").click()
    page.get_by_label("Modality (empty: all)").click()
    page.get_by_role("option", name="ct", exact=True).click()
    page.wait_for_function(f"() => document.querySelectorAll('#grid .caption-label').length === {SUBJECTS - 1}")
    open_hit(page)
    page.screenshot(path=pictures / "1280-light-viewer.png", full_page=True)

    heated = source(page, "#hit-image")
    page.get_by_label("Show where they match").uncheck()
    changed(page, "#hit-image", heated)
    cold = source(page, "#hit-image")
    page.get_by_label("lung").check()
    changed(page, "#hit-image", cold)

    query_before, hit_before = source(page, "#query-image"), source(page, "#hit-image")
    slider = page.locator("#query-slice input[type=range]")
    start = int(slider.input_value())
    slider.focus()
    key = "ArrowLeft" if start > 1 + 6 else "ArrowRight"
    for _ in range(6):
        page.keyboard.press(key)
    changed(page, "#query-image", query_before)
    changed(page, "#hit-image", hit_before)
    settled(page)
    moved = int(slider.input_value())
    assert abs(moved - start) == 6
    hit = page.locator("#hit-slice input[type=range]")
    part = (moved - 1) / (int(slider.get_attribute("max")) - 1)
    assert abs((int(hit.input_value()) - 1) - part * (int(hit.get_attribute("max")) - 1)) <= 1

    page.get_by_label("Move both together").uncheck()
    alone = hit.input_value()
    slider.focus()
    before = source(page, "#query-image")
    page.keyboard.press("ArrowRight")
    changed(page, "#query-image", before)
    assert hit.input_value() == alone

    page.locator("#to-best").click()
    settled(page)
    page.wait_for_function(f"() => document.querySelector('#query-slice input[type=range]').value === '{start}'")


def shown(page: Any, image: str, served: Served) -> np.ndarray:
    """A picture's pixels, as the server sent them."""
    answer = httpx.get(source(page, image), timeout=PATIENCE_MS / 1000)
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(float)


def click_at(page: Any, image: str, right: float, down: float) -> tuple[int, int]:
    """Click at these parts of a picture's width and height; which of its own pixels that is."""
    element = page.locator(f"{image} img")
    element.scroll_into_view_if_needed()
    # before the click, which puts another picture there: one that still loads is 0 x 0
    page.wait_for_function("place => document.querySelector(place + ' img').naturalWidth > 0", arg=image)
    width, height = element.evaluate("picture => [picture.naturalWidth, picture.naturalHeight]")
    box = element.bounding_box()
    element.click(position={"x": right * box["width"], "y": down * box["height"]})
    return round(right * width), round(down * height)


def asking(page: Any, words: str) -> None:
    """Wait until the line above the pictures says this."""
    page.wait_for_function("words => document.querySelector('#asking').innerText.includes(words)", arg=words)
    settled(page)


def region_fields(page: Any) -> list[int]:
    page.locator("#region-left-column input").wait_for()  # they are made when the fold is opened
    return [int(field.input_value()) for field in page.locator("#region input").all()]


@pytest.mark.parametrize(("name", "viewport"), [("1280", WIDE), ("390", NARROW)])
def test_a_region_of_the_query_asks_where_it_matches(
    name: str, viewport: dict[str, int], open_page: Any, served: Served, pictures: Path
) -> None:
    page = open_page(viewport)
    row = next(row for row, record in enumerate(served.records) if record.modality == "ct")
    query = served.searching.query_of_row(row)
    page.locator("#examples button", has_text="ct").click()
    hits(page)
    found = [hit["item"] for hit in served.searching.search(query, 8)]
    open_hit(page)
    asking(page, "Where does this match?")
    scan, hit = served.searching.scan(f"row-{row}"), served.searching.scan(f"row-{found[0]}")
    D, H, W = scan.array.shape[1:]
    place = int(page.locator("#query-slice input[type=range]").input_value()) - 1
    top = voxel_at(scan, *click_at(page, "#query-image", 0.3, 0.35))
    asking(page, "opposite corner")
    if name == "1280":
        page.screenshot(path=pictures / f"{name}-light-first-corner.png", full_page=True)
    bottom = voxel_at(scan, *click_at(page, "#query-image", 0.7, 0.6))
    asking(page, "Where columns")
    page.screenshot(path=pictures / f"{name}-light-region.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"], "nothing sticks out"
    page.get_by_text("The region in numbers").click()
    slab = served.searching.slab(query, place)
    assert 1 <= slab.stop - slab.start < D
    numbers = region_fields(page)
    # a pixel to either side for the browser's fractions of one
    expected = [slab.start + 1, slab.stop, top[0] + 1, bottom[0] + 1, top[1] + 1, bottom[1] + 1]
    np.testing.assert_allclose(numbers, expected, atol=1)
    assert numbers[:2] == expected[:2]

    region = tuple(slice(low - 1, high) for low, high in zip(numbers[::2], numbers[1::2], strict=True))
    heat, whole = served.searching.heat(query, found[0], region), served.searching.heat(query, found[0])
    assert page.locator("#hit-slice input[type=range]").input_value() == str(heat.hit_slice + 1)
    assert page.locator("#query-slice input[type=range]").input_value() == str(place + 1), "the query stays"
    window = WINDOWS[WHOLE_RANGE]
    theirs = shown(page, "#hit-image", served)
    of_region, of_whole = (picture(hit, heat.hit_slice, window, own.hit) for own in (heat, whole))
    error = np.abs(theirs - np.asarray(of_region)).mean()
    assert error < 3, "but for the compression of pictures"
    assert error < np.abs(theirs - np.asarray(of_whole)).mean()
    framed, plain = (picture(scan, place, window, heat.query, own) for own in (region, None))
    ours = shown(page, "#query-image", served)
    assert np.abs(ours - np.asarray(framed)).mean() < np.abs(ours - np.asarray(plain)).mean()
    if name == "390":
        return

    slider = page.locator("#query-slice input[type=range]")
    before = source(page, "#query-image")
    slider.focus()
    page.keyboard.press("ArrowRight" if place + 1 < D else "ArrowLeft")
    changed(page, "#query-image", before)
    settled(page)
    assert region_fields(page) == numbers, "the region stays while slices move"
    open_hit(page, 1)
    asking(page, "Where columns")
    assert region_fields(page) == numbers, "and for another hit"

    page.locator("#region-left-column input").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(str(numbers[4] + 2))
    asking(page, f"Where columns {numbers[4] + 2} to {numbers[5]}")
    page.locator("#whole-scan").focus()
    page.keyboard.press("Enter")
    asking(page, "Where does this match?")
    assert region_fields(page) == [1, D, 1, H, 1, W]
    assert page.locator("#hit-slice input[type=range]").input_value() == str(
        served.searching.heat(query, found[1]).hit_slice + 1
    )

    click_at(page, "#query-image", 0.3, 0.3)
    asking(page, "opposite corner")
    page.locator("#examples button", has_text="xray").click()
    page.wait_for_function("() => !document.querySelector('#viewer')?.offsetParent")
    hits(page)
    open_hit(page)
    asking(page, "Where does this match?")
    assert page.locator("#region-first-slice").count() == 0, "a picture has no slices to choose from"


def test_windows_are_offered_for_hounsfield_units_alone(open_page: Any, served: Served) -> None:
    page = open_page()
    upload(page, served.of("xray", ".png"))
    hits(page)
    page.get_by_text("Filters and order").click()
    page.get_by_label("Modality (empty: all)").click()
    page.get_by_role("option", name="xray", exact=True).click()
    page.wait_for_function(f"() => document.querySelectorAll('#grid .caption-label').length === {SUBJECTS}")
    open_hit(page)
    assert page.get_by_label("lung").count() == 0
    assert not page.locator("#query-slice input[type=range]").is_visible(), "an X-ray has no slices to move through"


def test_a_hit_becomes_the_query(open_page: Any, served: Served) -> None:
    page = open_page()
    upload(page, served.of("endoscopy", ".mp4"))
    first = hits(page)
    open_hit(page, 2)
    page.locator("#as-query").click()
    page.wait_for_function(
        "before => document.querySelector('#grid .caption-label')?.innerText.trim() !== before", arg=first[0]
    )
    assert len(hits(page)) == 8
    assert not page.locator("#viewer").is_visible()


def test_the_table_holds_what_the_pictures_show(open_page: Any, served: Served, pictures: Path) -> None:
    page = open_page()
    upload(page, served.of("ultrasound"))
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
    page.screenshot(path=pictures / "1280-light-table.png", full_page=True)


def test_a_bad_file_is_told_in_words_and_the_page_lives(
    open_page: Any, served: Served, tmp_path: Path, pictures: Path
) -> None:
    page = open_page()
    (tmp_path / "broken.dcm").write_text("this is no scan")
    upload(page, tmp_path / "broken.dcm")
    page.get_by_text("broken.dcm: unsupported data: expected DICOM").wait_for()
    assert page.locator("#status .error").count() == 0, "no mark of an error hides what stands there"
    page.screenshot(path=pictures / "1280-light-broken-file.png")
    page.reload()
    upload(page, served.of("xray", ".png"))
    assert len(hits(page)) == 8


def test_files_that_are_too_large_together_are_told_and_the_page_lives(
    open_page: Any, served: Served, tmp_path: Path
) -> None:
    page = open_page()
    slices = [tmp_path / f"{number}.dcm" for number in range(5)]
    for file in slices:
        file.write_bytes(bytes(2**23))
    upload(page, *slices)
    page.get_by_text(re.compile(r"found an upload of 41,9.* bytes, expected at most 33,554,432 in all")).wait_for()
    page.reload()
    upload(page, served.of("xray", ".png"))
    assert len(hits(page)) == 8


def test_html_in_labels_and_file_names_is_text(open_page: Any, served: Served, tmp_path: Path) -> None:
    page = open_page()
    bad = tmp_path / "<img src=x onerror=window.attacked='file'>.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    upload(page, bad)
    page.get_by_text("expected a complete scan").wait_for()
    page.reload()
    upload(page, served.of("xray", ".png"))
    hits(page)
    page.get_by_text("Filters and order").click()
    most = page.locator("#options input[type=range]").first
    most.wait_for()
    settled(page)
    most.press("End")
    page.wait_for_function(f"() => document.querySelectorAll('#grid .caption-label').length === {SCANS}")
    captions = " ".join(hits(page))
    assert "<img src=x onerror=" in captions
    assert "<script>" in captions
    open_hit(page, next(place for place, caption in enumerate(hits(page)) if "<img" in caption))
    page.get_by_role("tab", name="Table").click()
    page.locator("#table [data-testid='cell-0-4']").first.wait_for()
    page.get_by_role("tab", name="Explore").click()
    page.get_by_role("radio", name="anatomy").check()
    page.wait_for_function("() => (document.querySelector('#item-facts textarea')?.value ?? '').length > 0")
    settled(page)
    assert page.evaluate("() => window.attacked") is None
    assert page.locator("img[src='x']").count() == 0


def test_the_map_shows_the_scan_that_is_clicked(open_page: Any, served: Served, pictures: Path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Explore").click()
    image = page.locator("#map img")
    image.wait_for()
    settled(page)
    points = GalleryMap.of(served.searching.gallery.index.embeddings).points
    box = image.bounding_box()
    scale = box["width"] / SIDE
    page.mouse.click(box["x"] + float(points[7][0]) * scale, box["y"] + float(points[7][1]) * scale)
    page.wait_for_function("() => document.querySelector('#item input').value !== '0'")
    chosen = int(page.locator("#item input").input_value())
    assert np.hypot(*(points[chosen] - points[7])) < 8, "this dot, or one that covers it"
    page.wait_for_function(
        "modality => document.querySelector('#item-facts textarea').value.startsWith(modality)",
        arg=served.records[chosen].modality,
    )
    page.screenshot(path=pictures / "1280-light-explore.png", full_page=True)
    page.get_by_role("button", name="Search with this scan").click()
    assert len(hits(page)) == 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "viewport"), [("1280", WIDE), ("390", NARROW)])
def test_it_fits_a_desk_and_a_phone(
    name: str, viewport: dict[str, int], scheme: str, open_page: Any, served: Served, pictures: Path
) -> None:
    page = open_page(viewport, scheme)
    settled(page)
    page.screenshot(path=pictures / f"{name}-{scheme}-start.png")
    page.locator("#examples button", has_text="ct").click()
    hits(page)
    settled(page)
    page.screenshot(path=pictures / f"{name}-{scheme}-hits.png", full_page=True)
    open_hit(page)
    page.screenshot(path=pictures / f"{name}-{scheme}-viewer.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"], "nothing sticks out"
    page.get_by_role("tab", name="About").click()
    page.get_by_role("heading", name="Not for diagnosis").wait_for()
    page.screenshot(path=pictures / f"{name}-{scheme}-about.png")


def test_nobody_else_is_asked(open_page: Any, served: Served, asked: list[str]) -> None:
    page = open_page()
    page.locator("#examples button").first.click()
    hits(page)
    open_hit(page)
    page.get_by_role("tab", name="Explore").click()
    page.locator("#map img").wait_for()
    settled(page)
    own = urlsplit(served.address).netloc
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {own}


def test_every_control_has_a_name_and_is_reached_by_keyboard(open_page: Any, served: Served) -> None:
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
    assert {"examples", "grid", "query-slice", "to-best", "as-query"} <= reached
