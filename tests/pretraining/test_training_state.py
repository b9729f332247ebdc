"""A checkpoint can be resumed only by a run with the same options and scans, as far as they affect the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from modeling_m3ret.data.collection import Record
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.training_state import STATE_FOLDER, Progress, ResumeError, read_progress


FIRST, SECOND = (Record(name, Path("x"), "ct", "", "", name, shape=(20, 50, 60)) for name in ("first", "second"))


def write_checkpoint(folder: Path, config: dict[str, Any], scans: str) -> Path:
    """Write the `state.json` of a run whose training order is given as text."""
    state = {
        "progress": asdict(Progress(7)),
        "config": config,
        "processes": 1,
        "training_scans": hashlib.sha256(scans.encode()).hexdigest(),
    }
    (folder / STATE_FOLDER).mkdir(parents=True)
    (folder / STATE_FOLDER / "state.json").write_text(json.dumps(state))
    return folder


def differing(checkpoint: Path, config: RunConfig, records: Sequence[Record]) -> set[str]:
    """Return the options that prevent a resume."""
    try:
        progress = read_progress(checkpoint, config, records, 1)
    except ResumeError as error:
        return set(error.differences)
    assert progress.step == 7
    return set()


def test_scans_are_identified_by_id_and_by_size_if_sizes_determine_batches(tmp_path: Path) -> None:
    by_number, by_tokens = RunConfig(), RunConfig(tokens_per_batch=100, learning_rate=1e-3)
    checkpoint = write_checkpoint(tmp_path / "number", asdict(by_number), "first\tct\nsecond\tct")
    assert differing(checkpoint, by_number, [FIRST, SECOND]) == set()
    assert differing(checkpoint, by_number, [replace(FIRST, location=Path("moved"), is_clip=True), SECOND]) == set()
    assert differing(checkpoint, by_number, [SECOND, FIRST]) == {"data"}
    with pytest.raises(ResumeError) as refused:
        read_progress(checkpoint, replace(by_number, seed=3), [FIRST, SECOND], 2)
    assert refused.value.differences == {"seed": (0, 3), "processes": (1, 2)}
    assert all(name in str(refused.value) for name in ("seed", "processes", str(checkpoint)))
    assert differing(checkpoint, by_tokens, [FIRST, SECOND]) == {"data", "tokens_per_batch", "learning_rate"}
    size = "(20, 50, 60) (None, None, None)"
    lines = f"first\tct\t{size} False\nsecond\tct\t{size} True"
    checkpoint = write_checkpoint(tmp_path / "tokens", asdict(by_tokens), lines)
    assert differing(checkpoint, by_tokens, [FIRST, replace(SECOND, is_clip=True)]) == set()
    assert differing(checkpoint, by_tokens, [FIRST, SECOND]) == {"data"}


def test_sources_count_if_a_modality_has_several(tmp_path: Path) -> None:
    config, xray = RunConfig(), replace(SECOND, id="third", modality="xray", source="c")
    one_source = [replace(FIRST, source="a"), replace(SECOND, source="a"), xray]
    two_sources = [replace(FIRST, source="a"), replace(SECOND, source="b"), xray]
    checkpoint = write_checkpoint(tmp_path / "one", asdict(config), "first\tct\nsecond\tct\nthird\txray")
    assert differing(checkpoint, config, one_source) == set()
    assert differing(checkpoint, config, two_sources) == {"data"}
    checkpoint = write_checkpoint(tmp_path / "two", asdict(config), "first\tct\ta\nsecond\tct\tb\nthird\txray")
    assert differing(checkpoint, config, two_sources) == set()
    assert differing(checkpoint, config, one_source) == {"data"}


def test_checkpoint_with_option_names_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    config = RunConfig(objective="simdino", flip_probability=0.25, single_slice_probability=0.75)
    earlier = asdict(config)
    earlier["flip_part"], earlier["slice_part"] = (
        earlier.pop(name) for name in ("flip_probability", "single_slice_probability")
    )
    checkpoint = write_checkpoint(tmp_path, earlier, "first\tct\nsecond\tct")
    assert differing(checkpoint, config, [FIRST, SECOND]) == set()
    assert differing(checkpoint, replace(config, flip_probability=0.5), [FIRST, SECOND]) == {"flip_probability"}
