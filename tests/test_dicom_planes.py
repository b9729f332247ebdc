"""Frames of a DICOM series are selected, sorted and placed as their headers declare."""

from __future__ import annotations

import copy
import gzip
import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless, generate_uid
from scan_files import CINE, PLANTED, dicom, dicom_bytes, nifti_bytes, reorient, series

from modeling_m3ret.image_processing_m3ret import M3RetImageProcessor
from modeling_m3ret.reading_m3ret import M3RetReadError, ReadLimits, read_scan
from modeling_m3ret.scan_m3ret import Spacing


sitk = pytest.importorskip("SimpleITK")
RNG = np.random.default_rng(18)
FRAMES = RNG.integers(0, 256, (6, 8, 10), dtype=np.uint8)  # 8-bit values are read unchanged
PLACE: dict[str, Any] = {
    "ImagePositionPatient": [0, 0, 5],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PixelSpacing": [1, 1],
}
SHUFFLE = [3, 0, 5, 1, 4, 2]


def slices(frames: np.ndarray = FRAMES, gap: float = 2.0, start: float = 0.0, **elements: Any) -> list[Dataset]:
    """Return axial slices, which are in canonical orientation and thus read unchanged."""
    return [
        dicom(frame, **{**PLACE, "ImagePositionPatient": [0, 0, start + gap * k], **elements})
        for k, frame in enumerate(frames)
    ]


def with_values(files: list[Dataset], keyword: str, values: Any) -> list[Dataset]:
    for ds, value in zip(files, values, strict=True):
        setattr(ds, keyword, value)
    return files


def shuffled(files: list[Dataset]) -> list[Dataset]:
    return [files[index] for index in RNG.permutation(len(files))]


# ------------------------------------------------------------------------------------------------- one position: a clip


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("TemporalPositionIdentifier", [1, 2, 3, 9, 10, 11]),  # numbers, not text
        ("TriggerTime", ["0", "30.5", "61", "91.5", "122", "1000"]),
        ("EchoTime", ["4.6", "9.2", "13.8", "18.4", "23", "100"]),
        ("DiffusionBValue", [0.0, 50, 100, 400, 800, 1000]),
        ("AcquisitionTime", ["0959", "095900.5", "100000", "100000.25", "100001", "235959.9"]),
        ("ContentTime", ["09:59", "095900.5", "100000", "100000.25", "100001", "235959.9"]),  # one of ACR-NEMA
        ("AcquisitionDateTime", [f"2026010{day}0101{day % 2}0+0100" for day in range(1, 7)]),
        ("InstanceNumber", [1, 2, 3, 9, 10, 11]),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_files_at_one_position_are_a_clip_in_time(keyword: str, values: list[Any]) -> None:
    files = with_values([dicom(frame, **PLACE) for frame in FRAMES], keyword, values)
    scan = read_scan([files[index] for index in SHUFFLE])
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert scan.spacing == (None, 1, 1)
    order = (
        keyword if not keyword.endswith("Time") or keyword in ("TriggerTime", "EchoTime") else keyword[:-4] + "DateTime"
    )
    assert scan.description["order"] == order.replace("DateDateTime", "DateTime")
    assert (scan.description["duplicates"], scan.description["slices_left_out"]) == (0, 0)
    assert read_scan(files, num_frames=2).array.shape[1] == 2


def test_clip_that_crosses_midnight_is_in_order() -> None:
    files = with_values(
        [dicom(frame, **PLACE) for frame in FRAMES], "AcquisitionDate", ["20260101"] * 3 + ["20260102"] * 3
    )
    with_values(files, "AcquisitionTime", ["235957", "235958", "235959", "000000", "000001", "000002"])
    np.testing.assert_array_equal(read_scan([files[index] for index in SHUFFLE]).array[0], FRAMES)


def test_thickness_in_wrong_units_merges_no_slices() -> None:
    scan = read_scan(slices(SliceThickness=2000))  # in micrometres
    np.testing.assert_array_equal(scan.array[0], FRAMES)


@pytest.mark.parametrize("drift", [1e-4, 0.02, 0.05])  # rounding; the last two move by up to a quarter of a pixel
def test_positions_that_drift_are_one_position(drift: float) -> None:
    files = slices(gap=drift, start=5)
    with_values(files, "TriggerTime", range(6, 0, -1))  # against the drift
    scan = read_scan(files)
    np.testing.assert_array_equal(scan.array[0], FRAMES[::-1])
    assert scan.spacing[0] is None
    small = read_scan(slices(gap=drift, start=5, PixelSpacing=[drift, drift]))  # slices of a microscope
    assert small.spacing == pytest.approx((drift, drift, drift))


def test_equal_frames_of_a_clip_are_kept_and_copies_are_dropped() -> None:
    frames = FRAMES[[0, 1, 1, 2, 2, 2]]
    files = with_values([dicom(frame, **PLACE) for frame in frames], "TriggerTime", range(6))
    np.testing.assert_array_equal(read_scan(files).array[0], frames)
    again = [copy.deepcopy(ds) for ds in files]
    for ds in again[:3]:
        ds.SOPInstanceUID = generate_uid()  # stored under another UID
    scan = read_scan([*files, *again])
    np.testing.assert_array_equal(scan.array[0], frames)
    assert scan.description["duplicates"] == 6
    for ds in files:
        ds.SOPInstanceUID = "1.2.840.1"  # as some software for removing identifiers writes
    np.testing.assert_array_equal(read_scan(files).array[0], frames)


# ------------------------------------------------------------------------------- several positions, repeated: one phase


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("EchoTime", [("4.6", "4.60001"), ("9.2", "9.19999"), ("13.8", "13.8")]),
        ("TriggerTime", [("0", "0"), ("333.3", "333.31"), ("666.6", "666.6")]),
        ("DiffusionBValue", [(0.0, 0.0), (500.0, 500.0), (1000.0, 1000.0)]),
        ("TemporalPositionIdentifier", [(1, 1), (2, 2), (10, 10)]),
        ("AcquisitionNumber", [(1, 1), (2, 2), (10, 10)]),
        ("ConvolutionKernel", [("B30f", "B30f"), ("B70f", "B70f"), ("H60s", "H60s")]),
    ],
)
def test_first_phase_of_repeated_positions_is_read(keyword: str, values: list[tuple[Any, Any]]) -> None:
    files: list[Dataset] = []
    for number, pair in enumerate(values):
        phase = slices(FRAMES // (number + 1))
        files += with_values(phase, keyword, [pair[k % 2] for k in range(6)])
    scan = read_scan(shuffled(files))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert scan.spacing == (2, 1, 1)
    found = {key: scan.description[key] for key in ("phases", "selected_by", "slices", "slices_left_out")}
    assert found == {"phases": 3, "selected_by": keyword, "slices": 6, "slices_left_out": 12}


def test_phases_of_two_kinds_are_resolved_one_after_the_other() -> None:
    files: list[Dataset] = []
    for echo in (1, 2):
        for phase in (1, 2, 3):
            files += slices(FRAMES // (echo * phase), EchoTime=str(5 * echo), TriggerTime=str(100 * phase))
    scan = read_scan(shuffled(files))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert (scan.description["phases"], scan.description["selected_by"]) == (6, "EchoTime, TriggerTime")


def test_repeats_that_differ_in_time_only_are_resolved_per_position() -> None:
    files = slices() + slices(FRAMES // 2)
    with_values(files, "AcquisitionTime", [f"1000{seconds:02d}" for seconds in range(12)])
    scan = read_scan(shuffled(files))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert (scan.description["selected_by"], scan.description["slices_left_out"]) == ("AcquisitionDateTime", 6)


def test_slice_that_was_acquired_again_does_not_split_the_volume() -> None:
    files = with_values(slices(), "AcquisitionNumber", [1] * 6)
    repeated = slices(FRAMES // 2, AcquisitionNumber=2)[2:4]
    scan = read_scan(shuffled([*files, *repeated]))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert scan.description["slices_left_out"] == 2


# ---------------------------------------------------------------------------------------------- acquisitions and stacks


def test_acquisitions_that_interleave_are_not_mixed() -> None:
    first, second = slices(AcquisitionNumber=1), slices(FRAMES // 2, start=1, AcquisitionNumber=2)
    scan = read_scan(shuffled([*first, *second]))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert scan.spacing[0] == 2
    assert (scan.description["selected_by"], scan.description["slices_left_out"]) == ("AcquisitionNumber", 6)
    thin = [*first, *second]
    for ds in thin:  # slices acquired in turns, to avoid crosstalk
        ds.SliceThickness = 1
    scan = read_scan(shuffled(thin))
    assert (scan.array.shape[1], scan.spacing[0], scan.description["slices_left_out"]) == (12, 1, 0)


def test_acquisitions_that_follow_each_other_are_one_volume() -> None:
    files = with_values(slices(), "AcquisitionNumber", [1, 1, 2, 2, 3, 3])  # step and shoot, two slices per rotation
    np.testing.assert_array_equal(read_scan(shuffled(files)).array[0], FRAMES)
    with_values(files, "AcquisitionNumber", range(6))
    np.testing.assert_array_equal(read_scan(shuffled(files)).array[0], FRAMES)


@pytest.mark.parametrize(
    ("elements", "other"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}),
        ({"StackID": "1"}, {"StackID": "2"}),
        ({"FrameOfReferenceUID": "1.2.1"}, {"FrameOfReferenceUID": "1.2.2"}),
        ({"PixelSpacing": [1, 1]}, {"PixelSpacing": [1.05, 1.05]}),
        ({}, {"ImageOrientationPatient": [1, 0, 0, 0, 0.9962, 0.0872]}),  # 5 degrees
    ],
)
def test_stacks_are_not_mixed(elements: dict[str, Any], other: dict[str, Any]) -> None:
    files = with_values(slices(**elements) + slices(FRAMES // 2, start=1, **other), "InstanceNumber", range(1, 13))
    scan = read_scan(shuffled(files))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert (scan.description["stacks"], scan.description["slices_left_out"]) == (2, 6)


def test_stations_side_by_side_are_not_mixed() -> None:
    files = with_values(slices() + slices(FRAMES // 2), "InstanceNumber", range(1, 13))
    for ds in files[6:]:
        ds.ImagePositionPatient = [0, 300, ds.ImagePositionPatient[2]]
    for number, expected in ((6, FRAMES), (1, FRAMES[:1])):
        scan = read_scan(shuffled(files[:number] + files[6 : 6 + number]))
        np.testing.assert_array_equal(scan.array[0], expected)
        assert scan.description["slices_left_out"] == number


def test_slices_with_and_without_positions_are_not_mixed() -> None:
    files = slices() + [dicom(frame, PixelSpacing=[1, 1]) for frame in FRAMES[:3]]
    scan = read_scan(shuffled(files))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert (scan.description["order"], scan.description["slices_left_out"]) == ("ImagePositionPatient", 3)


def test_frames_of_reference_that_differ_in_every_file_are_ignored() -> None:
    files = with_values(slices(), "FrameOfReferenceUID", [generate_uid() for _ in range(6)])
    np.testing.assert_array_equal(read_scan(shuffled(files)).array[0], FRAMES)


@pytest.mark.parametrize(
    "sop", ["1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.1.2"]
)
def test_radiographs_of_one_series_are_not_frames_of_a_clip(sop: str) -> None:
    views = with_values([dicom(frame, sop=sop) for frame in FRAMES[:3]], "InstanceNumber", [3, 1, 2])
    scan = read_scan(views)
    np.testing.assert_array_equal(scan.array[0], FRAMES[1:2])
    assert (scan.description["stacks"], scan.description["slices_left_out"]) == (3, 2)


def test_clips_of_one_series_are_not_joined() -> None:
    short, long = dicom(FRAMES[:2], sop=CINE, InstanceNumber=1), dicom(FRAMES, sop=CINE, InstanceNumber=2)
    still = dicom(FRAMES[0], sop=CINE, InstanceNumber=3)
    scan = read_scan([short, long, still])
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert (scan.description["clips"], scan.description["slices_left_out"]) == (2, 3)


# ------------------------------------------------------------------------------------------------------ several series


def two_series() -> list[Dataset]:
    small = slices(FRAMES[:2], series="1.2.30", SeriesNumber=2)
    return small + slices(series="1.2.4", SeriesNumber=10)


@pytest.mark.parametrize(("choice", "count"), [("1.2.30", 2), ("1.2.4", 6), (0, 2), (1, 6), ("largest", 6)])
def test_one_of_several_series_is_selected(choice: str | int, count: int, tmp_path: Path) -> None:
    for index, ds in enumerate(shuffled(two_series())):
        (tmp_path / str(index)).write_bytes(dicom_bytes(ds))
    scan = read_scan(tmp_path, series=choice)
    np.testing.assert_array_equal(scan.array[0], FRAMES[:count])
    assert (scan.description["series_total"], scan.description["series_index"]) == (2, int(count == 6))
    processor = M3RetImageProcessor(size=32)
    expected = processor(slices(FRAMES[:count])[0] if count == 1 else [slices(FRAMES[:count])])
    np.testing.assert_array_equal(processor(tmp_path, series=choice)["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("choice", [None, 2, -1, "1.2.5", ""])
def test_several_series_are_refused_with_their_sizes(choice: str | int | None) -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(two_series(), series=choice)
    assert caught.value.reason == "unsupported"
    assert "2 frames of 8 x 10" in caught.value.advice
    assert "1.2.30" not in str(caught.value)
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize("choice", [True, 1.0, ["1.2.4"]])
def test_series_of_a_wrong_type_is_an_error(choice: Any) -> None:
    with pytest.raises(ValueError, match="series"):
        read_scan(two_series(), series=choice)


@pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID"])
def test_patients_and_studies_are_never_joined(keyword: str) -> None:
    files = with_values(slices(), keyword, ["1"] * 3 + ["2"] * 3)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(files)
    assert (caught.value.reason, caught.value.got) == ("unsupported", "2 series")
    with pytest.raises(M3RetReadError):
        read_scan(files, series="1.2.3")  # the UID of both
    assert read_scan(files, series=1).array.shape[1] == 3


def test_file_without_a_patient_or_study_joins_the_only_series_that_fits() -> None:
    files = slices(StudyInstanceUID="1.5")
    del files[0].StudyInstanceUID, files[1].PatientID
    np.testing.assert_array_equal(read_scan(files).array[0], FRAMES)
    files[5].PatientID = "another"
    with pytest.raises(M3RetReadError):
        read_scan(files)


def test_index_of_a_series_follows_the_series_number() -> None:
    files = slices(FRAMES[:2], series="1.2.1", SeriesNumber=10) + slices(series="1.2.2", SeriesNumber=9)
    assert [read_scan(files, series=index).array.shape[1] for index in (0, 1)] == [6, 2]


# ------------------------------------------------------------------------------------------------------ decimal strings


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("PixelSpacing", (["0.9765625"] * 2, ["0.98"] * 2, ["0.976562"] * 2)),
        (
            "ImageOrientationPatient",
            ([1, 0, 0, 0, 1, 0], ["0.999999", "-0.001", 0, "0.001", 1, 0], ["1.0", "1e-9", 0, 0, 1, 0]),
        ),
        ("ImagerPixelSpacing", (["0.143"] * 2, ["0.1430001"] * 2, ["1.43e-1"] * 2)),
    ],
)
def test_decimals_that_differ_by_rounding_are_equal(keyword: str, values: tuple[Any, ...]) -> None:
    files = with_values(slices(), keyword, [values[k % 3] for k in range(6)])
    if keyword == "ImagerPixelSpacing":
        for ds in files:
            del ds.PixelSpacing
    scan = read_scan(shuffled(files))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert scan.spacing[0] == pytest.approx(2)


def test_positions_rounded_differently_are_a_uniform_volume() -> None:
    files = slices(gap=1.25)
    with_values(
        files,
        "ImagePositionPatient",
        [["0", "1e-7", z] for z in ("0", "1.25", "2.5000001", "3.75", "5.0", "6.2499999")],
    )
    scan = read_scan(shuffled(files))
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert scan.spacing[0] == pytest.approx(1.25)
    assert "slice_spacing_min" not in scan.description


# ---------------------------------------------------------------------------------------------- order without positions


@pytest.mark.parametrize(
    ("elements", "order", "spacing"),
    [
        ({"SliceLocation": ["-3", "-1.5", "0", "1.5", "3", "4.5"]}, "SliceLocation", 1.5),
        ({"SliceLocation": ["5"] * 6, "TriggerTime": range(6)}, "TriggerTime", None),  # one position
        ({"InStackPositionNumber": range(1, 7), "InstanceNumber": range(6, 0, -1)}, "InStackPositionNumber", None),
        ({"TriggerTime": ["0"] * 6, "InstanceNumber": range(6)}, "InstanceNumber", None),  # a time that all share
        ({"AcquisitionTime": [f"1000{k:02d}" for k in range(6)]}, "AcquisitionDateTime", None),
        ({"InstanceNumber": [1] * 6}, "input order", None),
        ({"InstanceNumber": [1, 2, 3, 4, 4, 5]}, "InstanceNumber, input order", None),
        ({"ImagePositionPatient": [[9, 9, 2 * k] for k in range(6)]}, "ImagePositionPatient", 2),  # no orientation
    ],
)
def test_order_without_positions(elements: dict[str, Any], order: str, spacing: float | None) -> None:
    files = [dicom(frame, PixelSpacing=[1, 1]) for frame in FRAMES]
    for keyword, values in elements.items():
        with_values(files, keyword, values)
    scan = read_scan(files if "input order" in order else [files[index] for index in SHUFFLE])
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert (scan.description["order"], scan.spacing) == (order, (spacing, 1, 1))


def test_files_of_a_folder_without_numbers_follow_their_names(tmp_path: Path) -> None:
    for index in SHUFFLE:
        (tmp_path / f"slice{index}").write_bytes(dicom_bytes(dicom(FRAMES[index])))
    np.testing.assert_array_equal(read_scan(tmp_path).array[0], FRAMES)


def test_uneven_spacing_is_recorded() -> None:
    files = slices()
    del files[2]
    scan = read_scan(files)
    assert (scan.description["missing_slices"], scan.spacing[0]) == (1, 2)
    assert (scan.description["slice_spacing_min"], scan.description["slice_spacing_max"]) == (2, 4)


# ---------------------------------------------------------------------------------------------------------- multi-frame


def enhanced(frames: np.ndarray, groups: list[dict[str, dict[str, Any]]]) -> Dataset:
    """Return an enhanced MR image with one functional group per frame: sequence -> elements."""
    ds = dicom(frames, sop="1.2.840.10008.5.1.4.1.1.4.1")

    def group(sequences: dict[str, dict[str, Any]]) -> Dataset:
        made = Dataset()
        for name, elements in sequences.items():
            item = Dataset()
            for key, value in elements.items():
                setattr(item, key, value)
            setattr(made, name, [item])
        return made

    shared = {
        "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        "PixelMeasuresSequence": {"PixelSpacing": [1, 1]},
    }
    ds.SharedFunctionalGroupsSequence = [group(shared)]
    ds.PerFrameFunctionalGroupsSequence = [group(sequences) for sequences in groups]
    return ds


def place(z: float) -> dict[str, dict[str, Any]]:
    return {"PlanePositionSequence": {"ImagePositionPatient": [0, 0, z]}}


PHASES_OF_ENHANCED: list[Callable[[int], dict[str, dict[str, Any]]]] = [
    lambda phase: {"FrameContentSequence": {"TemporalPositionIndex": phase}},
    lambda phase: {"CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": 100.0 * phase}},
    lambda phase: {"MREchoSequence": {"EffectiveEchoTime": 5.0 * phase}},
    lambda phase: {"MRDiffusionSequence": {"DiffusionBValue": 500.0 * phase}},
    lambda phase: {"FrameContentSequence": {"DimensionIndexValues": [1, phase]}},
    lambda phase: {"FrameContentSequence": {"FrameAcquisitionDateTime": f"2026010110000{phase}"}},
    lambda phase: {"MRImageFrameTypeSequence": {"FrameType": ["ORIGINAL", "PRIMARY", "ABC"[phase - 1], "NONE"]}},
    lambda phase: {"FrameContentSequence": {"StackID": str(phase)}},
]


@pytest.mark.parametrize("describe", PHASES_OF_ENHANCED)
def test_one_phase_or_stack_of_an_enhanced_image_is_read(describe: Callable[[int], dict[str, dict[str, Any]]]) -> None:
    order = [(z, phase) for phase in (1, 2, 3) for z in (4, 0, 2)]
    frames = np.stack([FRAMES[z // 2] // phase for z, phase in order])
    scan = read_scan(dicom_bytes(enhanced(frames, [{**place(z), **describe(phase)} for z, phase in order])))
    np.testing.assert_array_equal(scan.array[0], FRAMES[:3])
    assert (scan.spacing, scan.description["slices_left_out"]) == ((2, 1, 1), 6)


def test_enhanced_cine_is_a_clip_in_time() -> None:
    groups = [{**place(5 + 1e-4 * k), "FrameContentSequence": {"TemporalPositionIndex": 6 - k}} for k in range(6)]
    scan = read_scan(dicom_bytes(enhanced(FRAMES, groups)), num_frames=3)
    np.testing.assert_array_equal(scan.array[0], FRAMES[::-1][[1, 3, 5]])
    assert (scan.spacing, scan.description["order"]) == ((None, 1, 1), "TemporalPositionIdentifier")


def test_dose_equals_that_of_simpleitk() -> None:
    path = str(get_testdata_file("rtdose.dcm", download=False))
    truth = sitk.ReadImage(path)
    values, scan = sitk.GetArrayFromImage(truth).astype(np.float64), read_scan(path)
    low, high = np.percentile(values, [0.5, 99.5])
    np.testing.assert_allclose(scan.array[0], ((values - low) / (high - low)).clip(0, 1), atol=1e-5)
    assert scan.spacing == pytest.approx(truth.GetSpacing()[::-1])
    assert scan.description["order"] == "GridFrameOffsetVector"


def test_dose_with_coordinates_of_its_planes_is_sorted() -> None:  # PS3.3, C.8.8.3.2, option b
    ds = dicom(FRAMES, **{**PLACE, "ImagePositionPatient": [0, 0, 10]}, GridFrameOffsetVector=[10, 8, 6, 4, 2, 0])
    scan = read_scan(ds)
    np.testing.assert_array_equal(scan.array[0], FRAMES[::-1])
    assert scan.spacing == (2, 1, 1)


@pytest.mark.parametrize("gap", [3.0, -3.0])
def test_slices_of_nuclear_medicine_are_placed(gap: float) -> None:  # PS3.3, C.8.4.15
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [0, 0, 5], [1, 0, 0, 0, 1, 0]
    ds = dicom(
        FRAMES,
        PixelSpacing=[1, 1],
        SpacingBetweenSlices=gap,
        SliceVector=[1, 2, 3] * 2,
        TimeSlotVector=[1] * 3 + [2] * 3,
    )
    ds.DetectorInformationSequence = [detector]
    scan = read_scan(dicom_bytes(ds))
    np.testing.assert_array_equal(scan.array[0], FRAMES[:3] if gap > 0 else FRAMES[2::-1])
    assert (scan.spacing, scan.description["phases"]) == ((3, 1, 1), 2)
    del ds.DetectorInformationSequence  # of unknown orientation
    scan = read_scan(dicom_bytes(ds))
    assert (scan.spacing, "plane" in scan.description) == ((3, 1, 1), False)


def test_frames_with_a_frame_time_are_a_clip() -> None:
    elements = {**PLACE, "SpacingBetweenSlices": 3}
    assert read_scan(dicom(FRAMES, **elements, FrameTime=40)).spacing == (None, 1, 1)
    assert read_scan(dicom(FRAMES, **elements, SliceLocationVector=[0, 4, 8, 12, 16, 20])).spacing == (4, 1, 1)
    assert read_scan(dicom(FRAMES, **elements)).spacing == (3, 1, 1)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR"])
def test_volume_written_by_simpleitk_equals_nifti(codes: str, tmp_path: Path) -> None:
    volume, affine = reorient(RNG.integers(0, 999, (9, 8, 7)).astype(np.uint16), np.diag([0.8, 0.9, 1.2, 1]), codes)
    (tmp_path / "a.nii").write_bytes(nifti_bytes(volume, affine))
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii"), sitk.sitkUInt16), str(tmp_path / "a.dcm"))
    a, b = read_scan(tmp_path / "a.nii"), read_scan(tmp_path / "a.dcm")
    np.testing.assert_allclose(a.array, b.array, atol=1e-6)
    assert a.spacing == pytest.approx(b.spacing)


def test_series_agrees_with_simpleitk(tmp_path: Path) -> None:
    volume, affine = reorient(RNG.integers(0, 256, (9, 8, 7)).astype(np.uint8), np.diag([0.8, 0.9, 1.2, 1]), "LPS")
    names = []
    for index, ds in enumerate(shuffled(series(volume, affine, Modality="MR"))):
        (tmp_path / f"{index}.dcm").write_bytes(dicom_bytes(ds))
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    truth = sitk.ReadImage(names)
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(scan.array[0], sitk.GetArrayFromImage(truth))
    assert scan.spacing == pytest.approx(truth.GetSpacing()[::-1])


# -------------------------------------------------------------------------------------------------------------- mosaics


def siemens(name: str) -> Dataset:
    """Return a mosaic of 48 slices of nibabel's test data, with random voxels instead of zeros."""
    path = Path(nib.__file__).parent / "nicom" / "tests" / "data" / name
    if not path.is_file():
        pytest.skip("this nibabel has no test files")
    ds = pydicom.dcmread(io.BytesIO(gzip.decompress(path.read_bytes())))
    values = np.random.default_rng(len(name)).integers(0, 4096, (ds.Rows, ds.Columns)).astype("<u2")
    ds.PixelData = values.tobytes()
    return ds


@pytest.mark.filterwarnings("ignore:The DICOM readers")
def test_mosaic_equals_that_of_nibabel() -> None:
    from nibabel.nicom.dicomreaders import mosaic_to_nii

    ds = siemens("siemens_dwi_1000.dcm.gz")
    image = mosaic_to_nii(ds)
    truth = read_scan(nifti_bytes(np.asarray(image.dataobj).astype(np.uint16), image.affine))
    scan = read_scan(dicom_bytes(ds))
    assert (scan.array.shape, scan.description["slices"]) == ((1, 48, 128, 128), 48)
    np.testing.assert_allclose(scan.array, truth.array, atol=1e-6)
    assert scan.spacing == pytest.approx(truth.spacing, rel=1e-4)
    assert scan.description["format"] == "dicom mosaic"


def test_first_of_several_mosaics_is_read() -> None:
    files = [siemens("siemens_dwi_1000.dcm.gz"), siemens("siemens_dwi_0.dcm.gz")]
    assert files[0].SeriesInstanceUID == files[1].SeriesInstanceUID
    scan = read_scan(files)
    np.testing.assert_array_equal(scan.array, read_scan(files[1]).array)
    assert (scan.description["phases"], scan.description["slices_left_out"]) == (2, 48)


def test_mosaic_without_its_private_header() -> None:
    ds = siemens("siemens_dwi_1000.dcm.gz")
    truth = read_scan(ds)
    del ds[0x0029, 0x1010]
    ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 48)
    np.testing.assert_allclose(read_scan(ds).array, truth.array, atol=1e-6)
    ds.remove_private_tags()
    with pytest.raises(M3RetReadError) as caught:
        read_scan(ds)
    assert caught.value.reason == "unsupported"
    ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 50)  # 8 x 8 tiles of 128 needs 1024
    ds.Rows = 1023
    with pytest.raises(M3RetReadError):
        read_scan(ds)


# ---------------------------------------------------------------------------------------------------------------- video


def video_stream(codec: str, container: str, sample_aspect_ratio: Fraction = Fraction(1)) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(codec, rate=10)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        track.codec_context.sample_aspect_ratio = sample_aspect_ratio
        for k in range(12):
            frame = np.zeros((48, 64, 3), np.uint8)
            frame[:, 4 * k : 4 * k + 8] = 200
            output.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(track.encode(None))
    return stream.getvalue()


def video_dicom(stream: bytes, syntax: str, **elements: Any) -> Dataset:
    ds = dicom(np.zeros((12, 48, 64, 3), np.uint8), sop="1.2.840.10008.5.1.4.1.1.77.1.1.1", **elements)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([stream + b"\0" * (len(stream) % 2)])
    ds["PixelData"].is_undefined_length = True
    return ds


@pytest.mark.parametrize(
    ("codec", "container", "syntax"),
    [
        ("mpeg2video", "mpeg2video", "100"),
        ("mpeg2video", "mpegts", "101"),
        ("libx264", "mp4", "102"),
        ("libx264", "h264", "103"),
        ("libx264", "mp4", "104.1"),
        ("libx265", "hevc", "107"),
    ],
)
def test_video_in_dicom_equals_its_stream(codec: str, container: str, syntax: str, tmp_path: Path) -> None:
    stream = video_stream(codec, container)
    scan = read_scan(dicom_bytes(video_dicom(stream, "1.2.840.10008.1.2.4." + syntax, PixelSpacing=[0.5, 0.5])))
    with av.open(io.BytesIO(stream)) as source:
        truth = np.stack([frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)])
    assert np.abs(scan.array.transpose(1, 2, 3, 0) - truth.astype(int)[..., : len(scan.array)]).max() <= 3
    assert (scan.spacing, scan.description["format"]) == ((None, 0.5, 0.5), "dicom video")
    few = read_scan(video_dicom(stream, "1.2.840.10008.1.2.4." + syntax), num_frames=3)
    np.testing.assert_array_equal(few.array, scan.array[:, [2, 6, 10]])


@pytest.mark.parametrize(
    ("elements", "spacing", "ratio"),
    [
        ({}, (None, 0.75, 1.0), 0.75),
        ({"PixelSpacing": [0.5, 0.25]}, (None, 0.5, 0.25), None),
        ({"PixelAspectRatio": [2, 1]}, (None, 2.0, 1.0), 2.0),
    ],
)
def test_pixel_sides_of_the_header_precede_those_of_the_stream(
    elements: dict[str, Any], spacing: Spacing, ratio: float | None
) -> None:
    stream = video_stream("libx264", "mp4", Fraction(4, 3))  # width / height, as FFmpeg defines it
    scan = read_scan(video_dicom(stream, "1.2.840.10008.1.2.4.102", **elements))
    assert (scan.spacing, scan.description.get("pixel_aspect_ratio")) == (spacing, ratio)


def test_video_in_dicom_keeps_the_limits() -> None:
    ds = video_dicom(video_stream("libx264", "mp4"), "1.2.840.10008.1.2.4.102")
    for limits in (ReadLimits(max_decoded_bytes=20_000), ReadLimits(max_pixels_per_image=1000)):
        with pytest.raises(M3RetReadError) as caught:
            read_scan(ds, limits=limits)
        assert caught.value.reason == "too_large"
    with pytest.raises(M3RetReadError) as caught:
        read_scan(video_dicom(b"\1\2\3\4" * 100, "1.2.840.10008.1.2.4.102"))
    assert caught.value.reason in ("damaged", "undecodable", "unsupported")


# --------------------------------------------------------------------------------------------------------------- limits


def test_only_the_frames_that_are_read_count_for_the_limit() -> None:
    ds = dicom(RNG.integers(0, 256, (60, 32, 32), dtype=np.uint8), sop=CINE)
    limits = ReadLimits(max_decoded_bytes=50_000)
    assert read_scan(ds, num_frames=4, limits=limits).array.shape[1] == 4
    ds.compress(RLELossless)
    assert read_scan(ds, num_frames=4, limits=limits).array.shape[1] == 4
    with pytest.raises(M3RetReadError) as caught:
        read_scan(ds, limits=limits)
    assert caught.value.reason == "too_large"


def test_tiny_frames_are_limited_in_number() -> None:
    ds = dicom(np.zeros((1, 1), np.uint8), sop=CINE, NumberOfFrames=60_000_000, PixelData=b"\0" * 60_000_000)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(ds)
    assert caught.value.reason == "too_large"
    assert read_scan(ds, num_frames=5).array.shape == (1, 5, 1, 1)
    ds.SpacingBetweenSlices = 1  # a volume is read whole
    with pytest.raises(M3RetReadError):
        read_scan(ds, num_frames=5)


# ------------------------------------------------------------------------------------------ objects that are not scans


@pytest.mark.parametrize(
    ("sop", "modality", "pixels"),
    [
        ("1.2.840.10008.5.1.4.1.1.66.4", "SEG", True),
        ("1.2.840.10008.5.1.4.1.1.7", "SEG", True),
        ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", False),
        ("1.2.840.10008.5.1.4.1.1.11.1", "PR", False),
        ("1.2.840.10008.5.1.4.1.1.88.59", "KO", False),
        ("1.2.840.10008.5.1.4.1.1.88.33", "SR", False),
        ("1.2.840.10008.5.1.4.1.1.77.1.6", "SM", True),
    ],
)
def test_objects_beside_a_scan_are_not_scans(sop: str, modality: str, pixels: bool, tmp_path: Path) -> None:
    other = dicom(FRAMES[0], sop=sop, series="1.2.9", Modality=modality)
    if not pixels:
        del other.PixelData
    with pytest.raises(M3RetReadError) as caught:
        read_scan(other)
    assert caught.value.reason == "unsupported"
    for index, ds in enumerate([*slices(), other]):
        (tmp_path / str(index)).write_bytes(dicom_bytes(ds))
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(scan.array[0], FRAMES)
    assert scan.description["files_ignored"] == 1


def test_dicomdir_is_ignored_in_a_folder_and_refused_alone(tmp_path: Path) -> None:
    for index, ds in enumerate(slices()):
        (tmp_path / str(index)).write_bytes(dicom_bytes(ds))
    directory = dicom(FRAMES[0], sop="1.2.840.10008.1.3.10", PixelData=None, DirectoryRecordSequence=[])
    (tmp_path / "DICOMDIR").write_bytes(dicom_bytes(directory))
    assert read_scan(tmp_path).description["files_ignored"] == 1
    with pytest.raises(M3RetReadError) as caught:
        read_scan(tmp_path / "DICOMDIR")
    assert caught.value.reason == "unsupported"


def test_detector_spacing_is_divided_by_the_magnification() -> None:
    ds = dicom(FRAMES[0], ImagerPixelSpacing=[0.3, 0.2], EstimatedRadiographicMagnificationFactor=2)
    assert read_scan(ds).spacing == pytest.approx((None, 0.15, 0.1))
    ds.PixelSpacing = [0.1, 0.1]
    assert read_scan(ds).spacing == (None, 0.1, 0.1)
