"""Objectives as built from a run's options: their views, and options that must not change the result."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packs import make_scans, pack
from processes import in_ranks
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.loading import Pack
from modeling_m3ret.pretraining import objectives
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.run_config import ConfigError, RunConfig


TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "decoder_hidden_size": 36,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
}


def gradients(objective: str, **options: bool) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(0)
    run = RunConfig(objective=objective, preset="vitt", model=TINY, local_views=1, **options)
    built, _ = build_objective(run)
    rows, grids = pack([scan for scan in make_scans()[:3] for _ in range(3)])
    torch.manual_seed(1)  # stochastic depth
    loss, _ = built.train()(rows, grids, noise=torch.rand(len(rows)))
    loss.backward()
    return loss.item(), [p.grad for p in built.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("objective", "option"),
    [
        ("mae", "gradient_checkpointing"),
        ("simdino", "gradient_checkpointing"),
        pytest.param("mae+simdino", "compile_layers", marks=pytest.mark.slow),
    ],
)
def test_checkpointed_and_compiled_layers_give_the_same_gradients(
    objective: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilation stops before code generation, which takes a minute and is tested for the encoder."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    loss, plain = gradients(objective)
    same_loss, same = gradients(objective, **{option: True})
    assert same_loss == pytest.approx(loss, rel=1e-5)
    assert len(plain) == len(same)
    assert all((one - other).norm() <= 1e-4 * one.norm() + 1e-7 for one, other in zip(plain, same, strict=True))


@pytest.mark.slow
def test_compiled_layers_are_not_recompiled_for_new_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten packs of different lengths, with stochastic depth. Dynamo would give up after eight versions."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    run = RunConfig(objective="simdino", preset="vitt", model=TINY | {"drop_path_rate": 0.4}, compile_layers=True)
    encoder = build_objective(run)[0].trained_encoder.train()
    graphs = []
    for number in range(10):
        encoder.embed(*pack(make_scans()[number % 5 :] + make_scans()[: number // 2]))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[0] == graphs[-1]


OBJECTIVES = {
    "mae": {"objective": "mae"},
    "mae by patch": {"objective": "mae", "model": TINY | {"loss_weighting": "patch"}},
    "mae+simdino": {"objective": "mae+simdino"},
    "patch term": {"objective": "simdino", "patch_weight": 1.0},
    "adapters": {"objective": "mae+simdino", "lora_rank": 2},
}


def gradient_and_terms(name: str, scans: slice) -> tuple[torch.Tensor, dict[str, float]]:
    """Train on some of three scans with three views each. The global views of one scan are a single patch."""
    torch.manual_seed(0)
    run = RunConfig(**({"preset": "vitt", "model": TINY, "local_views": 1} | OBJECTIVES[name]))
    built = build_objective(run)[0].eval()
    volumes = make_scans()[:3]
    volumes[2] = volumes[2][..., :1, :16, :16]
    packs = [pack([volume] * 3) for volume in volumes]
    noises = [
        torch.rand(len(rows), generator=torch.Generator().manual_seed(7 + n)) for n, (rows, _) in enumerate(packs)
    ]
    rows, grids = (torch.cat(parts) for parts in zip(*packs[scans], strict=True))
    loss, logged = built(rows, grids, torch.cat(noises[scans]))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in built.parameters() if p.grad is not None])
    return gradient, {key: float(value.detach()) for key, value in (logged | {"loss": loss}).items()}


def _uneven_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    everything = {name: gradient_and_terms(name, slice(0, 1) if rank == 0 else slice(1, 3)) for name in OBJECTIVES}
    torch.save(everything, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_different_numbers_of_scans_give_the_gradient_of_one_rank(tmp_path: Path) -> None:
    in_ranks(_uneven_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in OBJECTIVES:
        gradient, numbers = gradient_and_terms(name, slice(0, 3))
        mean = (first[name][0] + second[name][0]) / 2  # as DDP does
        assert (mean - gradient).norm() / gradient.norm() <= 1e-3, name  # 0.0004 seen, from the order of float32 sums
        for key, number in numbers.items():
            assert (first[name][1][key] + second[name][1][key]) / 2 == pytest.approx(number, rel=1e-4), (name, key)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("simdino", (8, 32)),
        *(pytest.param(name, (16, 64, 256), marks=pytest.mark.slow) for name in ("simdino", *OBJECTIVES)),
    ],
)
def test_operators_of_a_step_do_not_depend_on_the_number_of_scans(name: str, sizes: tuple[int, ...]) -> None:
    """The allocated bytes are proportional to the scans. With stochastic depth, on views of four shapes."""
    processor = M3RetImageProcessor()
    run = RunConfig(
        **(
            {"preset": "vitt", "local_views": 2}
            | OBJECTIVES.get(name, {"objective": name})
            | {"model": TINY | {"drop_path_rate": 0.2}}
        )
    )
    built = build_objective(run)[0].train()
    costs = {}
    for scans in sizes:
        volumes = [torch.rand(1, 1, *shape) for shape in ((48, 48), (32, 64), (32, 32), (16, 48))] * scans
        views = [
            Pack.from_scan(0, volume, processor, torch.rand(volume.shape[2] * volume.shape[3] // 256))
            for volume in volumes
        ]
        pack = Pack.concatenate(views).planned(built.plan, processor)
        built.zero_grad()  # adding to gradients of an earlier step takes other operators
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss, _ = built(**pack.inputs(processor, compact_images=True))
            loss.backward()
        events = profiler.profiler.kineto_results.events()
        memory = sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)
        costs[scans] = sum(event.name().startswith("aten::") for event in events), memory / scans
    (fewest, allocated), *others = costs.values()
    for operators, of_more in others:
        assert operators == pytest.approx(fewest, rel=0.02)
        assert of_more <= 1.02 * allocated


def test_attention_is_chosen_by_the_run_and_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"preset": "vitt", "model": TINY}
    assert build_objective(RunConfig(**run))[1]._attn_implementation == "sdpa"
    eager, _ = build_objective(RunConfig(**run, attn_implementation="eager"))
    assert eager.encoder.config._attn_implementation == "eager"
    monkeypatch.setattr(objectives, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        build_objective(RunConfig(**run, attn_implementation="flash_attention_2"))
    assert error.value.key == "attn_implementation"


def test_patch_term_is_logged_and_refused_for_mae() -> None:
    run = RunConfig(objective="simdino", preset="vitt", model=TINY, local_views=1, patch_weight=1.0)
    built, _ = build_objective(run)
    _, logged = built(*pack([scan for scan in make_scans()[:3] for _ in range(3)]), noise=None)
    assert -1 <= logged["patch_agreement"].item() <= 1
    with pytest.raises(ConfigError) as error:
        RunConfig(objective="mae", patch_weight=1.0)
    assert error.value.key == "patch_weight"


def test_views_follow_the_options_of_the_run() -> None:
    run = RunConfig(
        objective="simdino",
        preset="vitt",
        model=TINY,
        local_views=6,
        local_size=48,
        global_area=[0.3, 0.6],
        single_slice_probability=0.4,
        flip_probability=0.5,
    )
    built, config = build_objective(run)
    shared, local = built.views
    assert (shared.count, shared.size, shared.ranges.area, shared.flip_probability) == (2, None, (0.3, 0.6), 0.5)
    assert (local.count, local.size, local.ranges.area) == (6, 48, (0.05, 0.4))
    assert (shared.ranges.single_slice_probability, local.ranges.single_slice_probability) == (0.4, 0.4)
    assert (config.pooling, config.drop_path_rate) == ("cls", 0.1)
    (crops,) = build_objective(RunConfig(preset="vitt", model=TINY, views_per_decode=3))[0].views
    assert (crops.count, crops.jitter, crops.ranges.single_slice_probability) == (3, None, 0.0)
