"""A run is told by YAML and command line, and a wrong word is refused by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from modeling_m3ret.pretraining.run_config import RunConfig, parse_run_config


CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\npreset: vitt\nmodel: {mask_ratio: 0.5}\n")
    config = parse_run_config(["--config", str(file), "--steps", "9", "--exclude_modalities", "[ct, mri]"])
    assert (config.steps, config.preset, config.model) == (9, "vitt", {"mask_ratio": 0.5})
    assert config.exclude_modalities == ["ct", "mri"]
    assert config.seed == RunConfig().seed
    assert parse_run_config(["--learning_rate", "1e-3"]).learning_rate == 0.001
    assert parse_run_config(["--weight_decay", "1"]).weight_decay == 1.0
    assert parse_run_config(["--resume"]).resume
    assert parse_run_config(["--resume", "--steps", "3"]).steps == 3
    assert not parse_run_config(["--resume", "false"]).resume
    for name in ("2024-01-01", "0012", "null"):
        assert parse_run_config(["--output_dir", name]).output_dir == name


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_that_we_ship_is_valid(file: Path) -> None:
    config = parse_run_config(["--config", str(file)])
    assert config.output_dir.startswith("m3ret-")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("accelerate/*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configs(file: Path) -> None:
    settings = load_config_from_file(str(file))
    expected = {"cpu": 1, "cpu_2_processes": 2, "8_gpus": 8, "8_gpus_fsdp2": 8, "2_nodes": 16}
    assert settings.num_processes == expected[file.stem]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "steps is int, not"),
        (["--steps", "0"], "at least 1"),
        (["--gradient_clip", "0"], "gradient_clip is a norm above 0"),
        (["--warmup_fraction", "3"], "warmup_fraction"),
        (["--num_workers", "-1"], "num_workers is a number from 0 up, not -1"),
        (["--model", "{num_hidden_layer: 1}"], "model has no num_hidden_layer"),
        (["--run_dir", "m3ret-vitb/run"], "run_dir lies in output_dir"),
        (["--steps", "2024-01-01"], "steps is int"),
        (["--learning_rate", "fast"], 'learning_rate is float or NoneType, not "fast"'),
        (["--steps", "true"], "steps is int, not true"),
        (["--preset", "vith"], "preset is vitt"),
        (["--objective", "simclr"], "objective is mae, simdino or mae\\+simdino, not 'simclr'"),
        (["--precision", "fp16"], "precision is no, bf16 or None"),
        (["--resume", "--restart"], "one of them"),
        (["--resume", "perhaps"], 'resume is bool, not "perhaps"'),
        (["--global_area", "[0.5, 0.2]"], "global_area is two parts of the area"),
        (["--local_area", "[0.5]"], "local_area is two parts of the area"),
        (["--accumulate", "0"], "accumulate is at least 1"),
        (["--layer_decay", "1.5"], "layer_decay is a part from 0 to 1"),
        (["--layer_decay", "0"], "layer_decay is above 0"),
        (["--seed", "-1"], "seed is a number from 0 up, not -1"),
        (["--learning_rate", "nan"], "learning_rate is a number from 0 up, not nan"),
        (["--cache_gib", ".inf"], "cache_gib is a number from 0 up, not inf"),
        (["--gradient_clip", "nan"], "gradient_clip is a norm above 0"),
        (["--mae_weight", "2"], "mae_weight is a part of objective mae\\+simdino, and mae has none"),
        (["--slice_part", "0"], "slice_part is a part of objective simdino and mae\\+simdino, and mae has none"),
        (["--global_area", "[0.5, 1]"], "global_area is a part of objective simdino and"),
        (["--objective", "mae+simdino", "--patch_weight", "1"], "patch_weight is a part of objective simdino, and mae"),
        (["--holdout", "1.5"], "holdout is a part"),
        (
            [
                "--tokens_per_batch",
                "9",
                "--learning_rate",
                "1",
                "--accumulate",
                "2",
                "--model",
                "{loss_weighting: patch}",
            ],
            "not with loss_weighting patch",
        ),
    ],
)
def test_a_wrong_value_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_run_config(arguments)


def test_an_older_run_goes_on_that_was_told_what_its_objective_has_not() -> None:
    assert parse_run_config(["--teacher_momentum", "0.9", "--resume"]).teacher_momentum == 0.9


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stepps: 7\n")
    with pytest.raises(ValueError, match="no key 'stepps'"):
        parse_run_config(["--config", str(file)])


def test_learning_rate_follows_the_views_of_a_step() -> None:
    """MAE's linear rule: 1.5e-4 for 256 views."""
    assert RunConfig(batch_size=64, views_per_decode=4).peak_learning_rate(1) == pytest.approx(1.5e-4)
    assert RunConfig(batch_size=64, views_per_decode=4).peak_learning_rate(8) == pytest.approx(1.2e-3)
    assert RunConfig(learning_rate=1e-3).peak_learning_rate(8) == 1e-3
    assert RunConfig(batch_size=16, views_per_decode=4, accumulate=4).peak_learning_rate(1) == pytest.approx(1.5e-4)
    assert RunConfig(objective="simdino", batch_size=32, accumulate=2).peak_learning_rate(4) == pytest.approx(5e-4)
    for peak in (1.5e-4, None):
        with pytest.raises(ValueError, match=r"final_learning_rate is at most the peak of 0\.00015, not 0\.001"):
            RunConfig(learning_rate=peak, final_learning_rate=1e-3).as_launched("no", 1)


def test_another_run_differs_by_what_decides_the_result_alone() -> None:
    config = RunConfig()
    elsewhere = asdict(RunConfig(output_dir="x", run_dir="y", data="z", num_workers=0, log_every=1, resume=True))
    assert config.differences(elsewhere) == []
    other = asdict(RunConfig(steps=5, model={"mask_ratio": 0.5}))
    del other["seed"]
    assert config.differences(other) == [
        "model: {'mask_ratio': 0.5} in the checkpoint, {} now",
        "seed: absent in the checkpoint, 0 now",
        "steps: 5 in the checkpoint, 100000 now",
    ]


def test_a_run_goes_on_at_the_precision_that_it_was_launched_at() -> None:
    """Null is what the launcher said; of a checkpoint that holds null no one knows."""
    launched = RunConfig().as_launched("bf16", 1)
    assert RunConfig().as_launched("bf16", 1).differences(asdict(launched)) == []
    assert RunConfig(precision="bf16").differences(asdict(launched)) == []
    told = RunConfig().as_launched("no", 1).differences(asdict(launched))
    assert told == ["precision: bf16 in the checkpoint, no now"]
    assert launched.differences(asdict(RunConfig())) == []
    with pytest.raises(ValueError, match="precision: found fp16, as `accelerate launch` says, expected bf16 or no"):
        RunConfig().as_launched("fp16", 1)
