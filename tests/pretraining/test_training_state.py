"""What a checkpoint's run was is compared with what is to go on: no less than what decides the result, and no more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from modeling_m3ret.data.collection import Record
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.training_state import STATE_FOLDER, Progress, ResumeError, read_progress


ONE, OTHER = (Record(name, Path("x"), "ct", "", "", name, shape=(20, 50, 60)) for name in ("one", "other"))


def checkpoint_of(folder: Path, config: RunConfig, scans: str) -> Path:
    """Of two scans, told by the hash of this text; of a checkpoint all that says what its run was."""
    told = {"config": asdict(config), "processes": 1, "training_scans": hashlib.sha256(scans.encode()).hexdigest()}
    (folder / STATE_FOLDER).mkdir()
    (folder / STATE_FOLDER / "state.json").write_text(json.dumps({"progress": asdict(Progress(7)), **told}))
    return folder


def refusal(checkpoint: Path, config: RunConfig, records: Sequence[Record]) -> str:
    """What is said to differ; nothing where the run goes on."""
    try:
        assert read_progress(checkpoint, config, records, 1).step == 7
    except ResumeError as error:
        return str(error).partition("\n  ")[2]
    return ""


OTHER_SCANS = "data: the checkpoint's run was trained on other scans, or in another order"


def test_scans_are_told_by_their_names_and_where_sizes_fill_batches_by_their_sizes(tmp_path: Path) -> None:
    by_number, by_size = RunConfig(), RunConfig(tokens_per_batch=100, learning_rate=1e-3)
    checkpoint = checkpoint_of(tmp_path, by_number, "one\tct\nother\tct")
    assert refusal(checkpoint, by_number, [ONE, OTHER]) == ""
    assert refusal(checkpoint, by_number, [replace(ONE, location=Path("moved"), is_clip=True), OTHER]) == ""
    assert refusal(checkpoint, by_number, [OTHER, ONE]) == OTHER_SCANS
    (tmp_path / "sizes").mkdir()
    size = "(20, 50, 60) (None, None, None)"
    checkpoint = checkpoint_of(tmp_path / "sizes", by_size, f"one\tct\t{size} False\nother\tct\t{size} True")
    assert refusal(checkpoint, by_size, [ONE, replace(OTHER, is_clip=True)]) == ""
    assert refusal(checkpoint, by_size, [ONE, OTHER]) == OTHER_SCANS
    assert "tokens_per_batch: None in the checkpoint, 100 now" in refusal(tmp_path, by_size, [ONE, OTHER])


def test_sources_count_where_a_modality_has_several(tmp_path: Path) -> None:
    """Then they decide the order; a checkpoint from when they didn't isn't gone on with."""
    config, xray = RunConfig(), replace(OTHER, id="third", modality="xray", source="c")
    checkpoint = checkpoint_of(tmp_path, config, "one\tct\nother\tct\nthird\txray")
    of_one_source = [replace(ONE, source="a"), replace(OTHER, source="a"), xray]
    assert refusal(checkpoint, config, of_one_source) == ""
    of_two = [replace(ONE, source="a"), replace(OTHER, source="b"), xray]
    assert refusal(checkpoint, config, of_two) == OTHER_SCANS
    (tmp_path / "two").mkdir()
    checkpoint = checkpoint_of(tmp_path / "two", config, "one\tct\ta\nother\tct\tb\nthird\txray")
    assert refusal(checkpoint, config, of_two) == ""
    assert refusal(checkpoint, config, of_one_source) == OTHER_SCANS
