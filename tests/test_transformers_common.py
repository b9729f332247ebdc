"""The common tests of transformers, from the source distribution of the installed version, with dense input.

The wheel has no tests, and the distribution lacks a few of their files. `STAND_INS` replaces those that are imported.
Generation is not tested. The distribution lacks the tests of the exporters; `test_exporters.py` has tests of ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers


pytestmark = pytest.mark.slow

OURS = "m3ret_in_common_tests.py"
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = "
    "{'return_dict': False, 'output_hidden_states': True, 'output_attentions': True, 'dtype': 'float16'}",
    "../fetch_hub_objects_for_ci.py": "def url_to_local_path(url): return url",
}
PACKED = "expects (B, 3, H, W); scans of all sizes are packed rows here, as in Qwen2-VL, which overrides this test"
EXPECTED_FAILURES = {
    "M3RetImageProcessorTest::test_call_numpy": PACKED,
    "M3RetImageProcessorTest::test_call_pil": PACKED,
    "M3RetImageProcessorTest::test_call_pytorch": PACKED,
    "M3RetImageProcessorTest::test_call_numpy_4_channels": "passes means of 4 channels; a scan has one mean",
    "M3RetImageProcessorTest::test_image_processor_from_dict_with_kwargs_has_attributes": "expects an attribute "
    "do_convert_rgb; it has one possible value here and is not stored",
    "M3RetImageProcessorTest::test_new_models_require_torchvision_backend": "policy for models inside transformers",
    "M3RetImageProcessorTest::test_pil_can_run_without_torchvision": "needs a class inside transformers",
}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package `upstream_tests`: the files of transformers, and ours beside them."""
    folder = tmp_path_factory.mktemp("upstream")
    requirement = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", ":all:", "--quiet", "--dest", str(folder)]
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True
    )
    archives = list(folder.glob("*.tar.gz"))
    if ran.returncode or not archives:
        pytest.skip(f"needs the source distribution of {requirement}: it could not be downloaded")
    with tarfile.open(archives[0]) as archive:
        members = [each for each in archive if re.fullmatch(r"[^/]+/tests/test_[a-z_]+\.py", each.name)]
        archive.extractall(folder, members, filter="data")
    package = folder / "upstream_tests"
    next(folder.glob("*/tests")).rename(package)
    for name, content in STAND_INS.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).resolve().write_text(content)
    shutil.copy(Path(__file__).parent / "upstream" / OURS, package)
    return folder


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("M3RetModelTest", 80),
        ("M3RetForImageClassificationTest", 80),
        ("M3RetForPreTrainingTest", 80),
        ("M3RetImageProcessorTest", 10),
        ("M3RetPipelineTest", 2),
    ],
)
def test_only_the_listed_tests_fail(upstream: Path, name: str, least: int) -> None:
    paths = os.pathsep.join([str(upstream), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "RUN_SLOW": "1"}
    options = ["-n", "0", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short", "-rfE", "-c", os.devnull]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", ".", f"upstream_tests/{OURS}::{name}"],
        cwd=upstream,
        env=environment,
        capture_output=True,
        text=True,
    )
    failed = set(re.findall(rf"^(?:SUB)?(?:FAILED|ERROR)\S* \S+{OURS}::(\w+::\w+)", ran.stdout, re.MULTILINE))
    assert failed == {test for test in EXPECTED_FAILURES if test.startswith(f"{name}::")}, ran.stdout[-5000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed, ran.stdout[-5000:]
    assert int(passed[1]) >= least
