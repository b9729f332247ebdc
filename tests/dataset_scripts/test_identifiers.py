"""Identifiers planted in every input appear in no file that training, evaluation, an index or an export writes.

`test_build.py` checks the same for datasets, `test_deidentification.py` for each format.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io
from file_parts import TEXT, encode, exif, planted_nifti
from PIL import Image
from scan_files import PLANTED
from scan_folders import put, texture, write_manifest
from test_build import DATE, NEEDLES, leaves, planted_files, run
from test_deidentification import clip, inflated, named_gzip, planted_npz, variants
from test_reading_limits import zip_of

from modeling_m3ret.reading_m3ret import M3RetReadError, read_scan


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:pydicom")]
ROOT = Path(__file__).parents[2]
MODALITIES = {".mp4": "ultrasound", ".mkv": "ultrasound", ".avi": "ultrasound"} | dict.fromkeys(
    (".png", ".jpg", ".dcm", ".webp", ".heic", ".avif", ".gif", ".tif", ".bmp"), "xray"
)
SETTINGS = {
    "preset": "vitt",
    "model": "{num_hidden_layers: 1, hidden_size: 48, num_attention_heads: 4, intermediate_size: 96, "
    "decoder_hidden_size: 36, decoder_num_hidden_layers: 1}",
    **{"size": 32, "num_frames": 4, "steps": 4, "batch_size": 4, "views_per_decode": 1, "holdout": 0.3},
    **{"num_workers": 1, "log_every": 1, "save_every": 2, "evaluate_every": 2, "report_to": "tensorboard"},
}
INDEX = """
import sys
from pathlib import Path
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.space.gallery import embed_gallery
model, processor = load_pretrained("model")
for data in sys.argv[1:]:
    embed_gallery(open_collection(data), model, processor, "model", None, Path(f"gallery of {Path(data).name}"))
"""


def other_formats() -> dict[str, bytes]:
    """Return files of the formats that `planted_files` leaves out, with the text in every field that can hold one.

    Each has other pixels, as duplicates are dropped.
    """
    pytest.importorskip("SimpleITK")
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("pillow_heif").register_heif_opener()
    rng = np.random.default_rng(41)

    def voxels() -> np.ndarray:
        return rng.integers(0, 900, (6, 10, 12)).astype(np.int16)

    def minc_1() -> bytes:
        stream = io.BytesIO()
        with scipy.io.netcdf_file(stream, "w") as file:
            file.history = TEXT
            for name, size in zip(("zspace", "yspace", "xspace"), (6, 10, 12), strict=True):
                file.createDimension(name, size)
                axis = file.createVariable(name, "i", ())
                axis.step, axis.start, axis.spacing, axis.comments = 1.0, 0.0, b"regular__", TEXT
            image = file.createVariable("image", "h", ("zspace", "yspace", "xspace"))
            image[:], image.signtype, image.valid_range = voxels(), b"signed__", np.array([0.0, 899.0])
            for name, value in (("image-max", 899.0), ("image-min", 0.0)):
                file.createVariable(name, "d", ())[...] = value
            patient = file.createVariable("patient", "i", ())
            patient.full_name, patient.identification, patient.birthdate = TEXT, TEXT, DATE
            file.flush()
            return stream.getvalue()

    def minc_2() -> bytes:
        stream = io.BytesIO()
        with h5py.File(stream, "w") as file:
            root = file.create_group("minc-2.0")
            root.attrs["ident"] = root.attrs["history"] = PLANTED
            for name, size in zip(("zspace", "yspace", "xspace"), (6, 10, 12), strict=True):
                axis = root.create_dataset(f"dimensions/{name}", data=0)
                axis.attrs.update({"step": 1.0, "start": 0.0, "length": size, "spacing": b"regular__", "units": b"mm"})
                axis.attrs["comments"] = TEXT
            image = root.create_dataset("image/0/image", data=voxels())
            image.attrs.update(
                {
                    "dimorder": np.bytes_(b"zspace,yspace,xspace"),
                    "signtype": np.bytes_(b"signed__"),
                    "valid_range": [0.0, 899.0],
                }
            )
            root.create_dataset("image/0/image-max", data=899.0)
            root.create_dataset("image/0/image-min", data=0.0)
            patient = root.create_dataset("info/patient", data=PLANTED)
            patient.attrs.update({"full_name": PLANTED, "birthdate": DATE})
        return stream.getvalue()

    def mgz() -> bytes:
        tags = struct.pack(">if", 0, 0.0) + struct.pack(">iq", 3, len(TEXT)) + TEXT  # TR, and the command line
        return named_gzip(nib.MGHImage(voxels(), np.diag([1.0, 1, 1, 1])).to_bytes() + tags)

    nrrd = (
        f"NRRD0005\n# {PLANTED}\ntype: short\ndimension: 3\nsizes: 12 10 6\nendian: little\ncontent: {PLANTED}\n"
        f"space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
        f'measurement frame: (1,0,0) (0,1,0) (0,0,1)\nspace units: "mm" "mm" "mm"\nPatientName:={PLANTED}\n'
        f"DICOM_0008_0020:={DATE}\n"
    )
    meta = (
        f"ObjectType = Image\nNDims = 3\nComment = {PLANTED}\nName = {PLANTED}\nAcquisitionDate = {DATE}\n"
        f"BinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\nElementSpacing = 1 1 1\n"
        f"DimSize = 12 10 6\n0010|0010 = {PLANTED}\nElementType = MET_SHORT\nElementDataFile = "
    )
    colour = [Image.fromarray(np.stack([texture(seed)] * 3, -1)) for seed in range(60, 64)]
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{PLANTED}</x:xmpmeta>".encode()
    tags = dict.fromkeys((269, 270, 271, 272, 285, 305, 306, 315, 316, 333, 432, 33432, 34737, 65000), PLANTED)
    slices = Image.fromarray(texture(70)), Image.fromarray(texture(71))
    return {
        f"a {PLANTED}.nrrd": f"{nrrd}encoding: raw\n\n".encode() + voxels().tobytes(),
        f"b {PLANTED}.nhdr": f"{nrrd}encoding: raw\ndata file: {PLANTED}.raw\n".encode(),
        f"{PLANTED}.raw": voxels().tobytes(),
        f"c {PLANTED}.mha": f"{meta}LOCAL\n".encode() + voxels().tobytes(),
        f"d {PLANTED}.mhd": f"{meta}{PLANTED}.2.raw\n".encode(),
        f"{PLANTED}.2.raw": voxels().tobytes(),
        f"e {PLANTED}.mgz": mgz(),
        f"f {PLANTED}.mnc": minc_1(),
        f"g {PLANTED}.mnc": minc_2(),
        f"h {PLANTED}.mkv": clip("matroska", "mpeg4", True),
        f"i {PLANTED}.avi": clip("avi", "mpeg4", True, frames=9),
        f"j {PLANTED}.webp": encode(colour[0], "WEBP", exif=exif(), xmp=xmp, icc_profile=TEXT),
        f"k {PLANTED}.heic": encode(colour[1], "HEIF", exif=exif(), xmp=xmp),
        f"l {PLANTED}.avif": encode(colour[2], "AVIF", exif=exif(), xmp=xmp),
        f"m {PLANTED}.gif": encode(slices[0], "GIF", comment=TEXT, save_all=True, append_images=slices[1:]),
        f"n {PLANTED}.tif": encode(colour[3], "TIFF", tiffinfo=tags | {700: xmp}) + TEXT,
        f"o {PLANTED}.npz": planted_npz(),
        f"p {PLANTED}.bmp": encode(colour[3].rotate(90), "BMP") + TEXT,
        f"q {PLANTED}.zip": zip_of(f"{PLANTED}/{PLANTED}.nii", planted_nifti(voxels())),
    }


def encodings(needle: bytes) -> list[bytes]:
    """Return the encodings of a needle that files may hold; text in hex and ASCII is compared in lower case."""
    return [*variants(needle.decode()), needle.hex().encode()]


def assert_no_needle(found: Iterable[tuple[str, bytes]]) -> None:
    for name, content in found:
        lower = content.lower()
        for needle in NEEDLES:
            assert needle.lower() not in lower, (name, needle)
            assert not any(encoding in content for encoding in encodings(needle)), (name, needle)


def written_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file, also decompressed, except those that stay on the machine.

    `training_state` names the scans that a run could not read, for the person who resumes it, and is never uploaded.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not {"training_state", ".build"} & {*path.parts} and path.name != "report.json":
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            yield name, name.encode()
            yield name, data
            yield from ((name, content) for content in inflated(data))
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from ((f"{name}/{member}", archive.read(member)) for member in archive.namelist())
            if path.suffix == ".parquet":
                yield from ((name, content) for content in leaves(pq.read_table(path)))


def is_readable(path: Path) -> bool:
    try:
        return read_scan(path).array.size > 0
    except M3RetReadError:
        return False


def test_nothing_that_is_written_holds_an_identifier(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scans, work = tmp_path / "scans", tmp_path / PLANTED / "work"  # commands print the folders that they are given
    work.mkdir(parents=True)
    rows = []
    for number in range(6):
        folder = f"patient {number}"
        files = {f"{folder}/{name}": data for name, data in planted_files().items()}
        if number == 0:
            files |= {f"{folder}/{name}": data for name, data in other_formats().items()}
        put(scans, files)
        singles = [name for name in files if "/series/" not in name and not name.endswith(".raw")]
        series = str(Path(singles[0]).parent / "series")
        for name in [series, *singles]:
            identifying = {"id": f"{PLANTED} {number}/{name}", "group": f"{PLANTED} {DATE} {number}", "name": PLANTED}
            words = {"modality": MODALITIES.get(Path(name).suffix, "ct"), "anatomy": "chest", "label": f"l{number % 2}"}
            rows.append({"file": name, "source": "a collection", **words, **identifying})
    write_manifest(scans, rows)
    assert not [row["file"] for row in rows if not is_readable(scans / row["file"])][6:], "only broken.dcm"
    run(scans, tmp_path / "built")
    printed = [("build", text.encode()) for text in capfd.readouterr()]

    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def script(*words: object) -> None:
        command = [sys.executable, *map(str, words)]
        ran = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        printed.append((str(words[0]), (ran.stdout + ran.stderr).encode()))

    for data, model in ((scans, "model"), (tmp_path / "built", "model-of-built")):
        options = SETTINGS | {"data": data, "output_dir": model, "run_dir": f"runs/{model}"}
        script(ROOT / "train.py", *(word for key, value in options.items() for word in (f"--{key}", value)))
    script(ROOT / "eval_retrieval.py", "--model", "model", "--data", scans, "--output", "results", "--protocols", "all")
    script("-c", INDEX, scans, tmp_path / "built")
    for kind in ("onnx", "torch"):
        script("-m", "modeling_m3ret.export", "--model", "model", "--output", f"exported-{kind}", "--format", kind)
    assert json.loads((work / "model/training.json").read_text())["unreadable_scans"] > 0

    found = dict.fromkeys(name for name, _ in written_files(work))
    for expected in ("model/README.md", "model/model.safetensors", "runs/model/metrics.jsonl", "results/report.md"):
        assert expected in found
    assert any("tfevents" in name for name in found)
    assert any(name.startswith("hf/m3ret/embeddings") for name in found)
    assert any(name.startswith("gallery of") and name.endswith(".parquet") for name in found)
    # a file that cannot be read is named to whoever runs a command, and in no file; its header is not quoted
    path = re.compile(rb"[^\r\n]*broken\.dcm")
    assert any(path.search(text) for _, text in printed)
    assert_no_needle([(name, path.sub(b"", text)) for name, text in printed])
    for folder in (work, tmp_path / "built"):
        assert_no_needle(written_files(folder))
