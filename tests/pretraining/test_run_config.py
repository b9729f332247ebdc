"""Options of a run from YAML and command line, and the errors of wrong ones."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from modeling_m3ret.pretraining.run_config import ConfigError, RunConfig
from modeling_m3ret.pretraining.run_options import parse_run_config


CONFIGS = Path(__file__).parents[2] / "configs"


def test_options_override_the_file_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\npreset: vitt\nmodel: {mask_ratio: 0.5}\nlearning_rate: 1e-3\n")
    options = ["--steps", "9", "--exclude_modalities", "[ct, mri]"]
    for arguments in (["--config", str(file), *options], [*options, "--config", str(file)]):
        config = parse_run_config(arguments)
        assert (config.steps, config.preset, config.model) == (9, "vitt", {"mask_ratio": 0.5})
        assert (config.exclude_modalities, config.learning_rate) == (["ct", "mri"], 0.001)
        assert config.seed == RunConfig().seed
    assert parse_run_config([]) == RunConfig()


def test_values_have_the_type_of_their_option() -> None:
    assert parse_run_config(["--learning_rate", "1e-3"]).learning_rate == 0.001
    assert parse_run_config(["--weight_decay", "1"]).weight_decay == 1.0
    assert parse_run_config(["--precision", "no"]).precision == "no"
    for name in ("2024-01-01", "0012", "null"):
        assert parse_run_config(["--output_dir", name]).output_dir == name


def test_boolean_option_may_stand_alone() -> None:
    assert parse_run_config(["--resume"]).resume
    assert parse_run_config(["--restart", "--steps", "3"]).restart
    assert parse_run_config(["--resume", "true"]).resume
    assert not parse_run_config(["--resume", "false"]).resume


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_run_config(["--help"], description="Pretrain.")
    assert exit_info.value.code == 0
    options = capsys.readouterr().out.split("\n  --")[1:]
    explained = {option.split()[0]: " ".join(option.split()) for option in options}
    assert explained.keys() >= {entry.name for entry in fields(RunConfig)}
    for entry in fields(RunConfig):
        assert len(explained[entry.name].split("(type:")[0].split()) >= 4, entry.name
        assert "default:" in explained[entry.name], entry.name


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_config_is_valid(file: Path) -> None:
    assert parse_run_config(["--config", str(file)]).output_dir.startswith("m3ret-")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("accelerate/*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configs(file: Path) -> None:
    settings = load_config_from_file(str(file))
    expected = {"cpu": 1, "cpu_2_processes": 2, "8_gpus": 8, "8_gpus_fsdp2": 8, "2_nodes": 16}
    assert settings.num_processes == expected[file.stem]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "many"],
        ["--steps", "1.5"],
        ["--steps", "true"],
        ["--steps", "2024-01-01"],
        ["--learning_rate", "fast"],
        ["--preset", "vith"],
        ["--objective", "simclr"],
        ["--precision", "fp16"],
        ["--resume", "perhaps"],
        ["--model", "[1]"],
        ["--exclude_modalities", "ct"],
        ["--stepps", "3"],
        ["--config", "missing.yaml"],
    ],
)
def test_wrong_option_is_named_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_run_config(arguments)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert arguments[0].removeprefix("--") in line
    assert arguments[1] in line or arguments[1] == "true"  # printed as True


@pytest.mark.parametrize("text", ["stepps: 7\n", "steps: [7\n", "- steps\n", "steps: many\n"])
def test_wrong_file_ends_in_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        parse_run_config(["--config", str(file)])
    assert exit_info.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("steps", {"steps": 0}),
        ("accumulate", {"accumulate": 0}),
        ("tokens_per_batch", {"tokens_per_batch": 0, "learning_rate": 1.0}),
        ("num_workers", {"num_workers": -1}),
        ("seed", {"seed": -1}),
        ("learning_rate", {"learning_rate": float("nan")}),
        ("cache_gib", {"cache_gib": float("inf")}),
        ("gradient_clip", {"gradient_clip": 0.0}),
        ("gradient_clip", {"gradient_clip": float("nan")}),
        ("warmup_fraction", {"warmup_fraction": 3.0}),
        ("layer_decay", {"layer_decay": 1.5}),
        ("layer_decay", {"layer_decay": 0.0}),
        ("holdout", {"holdout": 1.0}),
        ("global_area", {"objective": "simdino", "global_area": [0.5, 0.2]}),
        ("local_area", {"objective": "simdino", "local_area": [0.5]}),
        ("model", {"model": {"num_hidden_layer": 1}}),
        ("run_dir", {"run_dir": "m3ret-vitb/run"}),
        ("restart", {"resume": True, "restart": True}),
        ("mae_weight", {"mae_weight": 2.0}),
        ("single_slice_probability", {"single_slice_probability": 0.0}),
        ("global_area", {"global_area": [0.5, 1.0]}),
        ("patch_weight", {"objective": "mae+simdino", "patch_weight": 1.0}),
        ("learning_rate", {"tokens_per_batch": 9}),
        (
            "accumulate",
            {"tokens_per_batch": 9, "learning_rate": 1.0, "accumulate": 2, "model": {"loss_weighting": "patch"}},
        ),
    ],
)
def test_value_out_of_range_or_in_conflict_is_refused_by_name(key: str, settings: dict) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig(**settings)
    assert error.value.key == key
    assert key in str(error.value)


def test_infinite_gradient_clip_disables_clipping() -> None:
    assert RunConfig(gradient_clip=float("inf")).gradient_clip == float("inf")


def test_resume_accepts_options_that_do_not_apply_to_the_objective() -> None:
    """Earlier versions accepted them, and such a run must stay resumable."""
    assert parse_run_config(["--teacher_momentum", "0.9", "--resume"]).teacher_momentum == 0.9


def test_teacher_of_a_short_run_averages_over_few_steps() -> None:
    momenta = {
        steps: RunConfig(objective="simdino", steps=steps).start_momentum() for steps in (300, 20_000, 1_000_000)
    }
    assert momenta == pytest.approx({300: 0.95, 20_000: 0.98, 1_000_000: 0.996})
    assert RunConfig(objective="simdino", steps=300, teacher_momentum=0.9).start_momentum() == 0.9


def test_learning_rate_scales_with_the_views_of_a_step() -> None:
    """MAE's linear rule: 1.5e-4 for 256 views."""
    assert RunConfig(batch_size=64, views_per_decode=4).peak_learning_rate(1) == pytest.approx(1.5e-4)
    assert RunConfig(batch_size=64, views_per_decode=4).peak_learning_rate(8) == pytest.approx(1.2e-3)
    assert RunConfig(learning_rate=1e-3).peak_learning_rate(8) == 1e-3
    assert RunConfig(batch_size=16, views_per_decode=4, accumulate=4).peak_learning_rate(1) == pytest.approx(1.5e-4)
    assert RunConfig(objective="simdino", batch_size=32, accumulate=2).peak_learning_rate(4) == pytest.approx(5e-4)
    for peak in (1.5e-4, None):
        with pytest.raises(ConfigError) as error:
            RunConfig(learning_rate=peak, final_learning_rate=1e-3).as_launched("no", 1)
        assert error.value.key == "final_learning_rate"


def test_only_options_that_affect_the_result_differ() -> None:
    config = RunConfig()
    elsewhere = asdict(RunConfig(output_dir="x", run_dir="y", data="z", num_workers=0, log_every=1, resume=True))
    assert config.differences(elsewhere) == {}
    other = asdict(RunConfig(steps=5, model={"mask_ratio": 0.5}))
    del other["seed"]
    assert config.differences(other) == {
        "model": ({"mask_ratio": 0.5}, {}),
        "seed": ("absent", 0),
        "steps": (5, 100_000),
    }


def test_precision_of_the_launcher_must_stay_the_same() -> None:
    """Early checkpoints hold null if the launcher set the precision, and are accepted with any."""
    launched = RunConfig().as_launched("bf16", 1)
    assert RunConfig().as_launched("bf16", 1).differences(asdict(launched)) == {}
    assert RunConfig(precision="bf16").differences(asdict(launched)) == {}
    assert RunConfig().as_launched("no", 1).differences(asdict(launched)) == {"precision": ("bf16", "no")}
    assert launched.differences(asdict(RunConfig())) == {}
    with pytest.raises(ConfigError) as error:
        RunConfig().as_launched("fp16", 1)
    assert error.value.key == "precision"
