"""SimDINO's terms against the formula in float64, its closed-form maxima, and one batch split over ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_config
from packs import largest_difference, make_scans, pack
from processes import in_ranks
from torch import Tensor

from modeling_m3ret import M3RetForPreTraining, M3RetModel
from modeling_m3ret.masked_autoencoder_m3ret import choose_visible
from modeling_m3ret.packing_m3ret import PackLayout, patch_coordinates
from modeling_m3ret.pretraining.simdino import (
    SimDINO,
    SimDINOHead,
    SimDINOLoss,
    block_masks,
    coding_rate,
    teacher_momentum,
)


def unit_vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def by_the_formula(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return compression, pair by pair, and expansion, by the determinant, in float64."""
    student, teacher = student.double(), teacher.double()
    (V, B, p), G = student.shape, len(teacher)
    cosines = [
        torch.nn.functional.cosine_similarity(teacher[i, b], student[j, b], dim=0)
        for i in range(G)
        for j in range(V)
        for b in range(B)
        if i != j
    ]
    gamma = (p + B) / (p * B)
    rates = [
        gamma / 2 * torch.logdet(torch.eye(p, dtype=torch.float64) + p / (B * eps) * student[v].T @ student[v])
        for v in range(G)
    ]
    return torch.stack(cosines).mean(), torch.stack(rates).mean()


@pytest.mark.parametrize(("V", "B", "p"), [(2, 5, 8), (6, 4, 16), (10, 40, 12)])
def test_terms_and_gradient_against_the_formula(V: int, B: int, p: int) -> None:
    student, teacher = unit_vectors(V, B, p).requires_grad_(), unit_vectors(2, B, p, seed=1)
    terms = SimDINOLoss(eps=0.05, coeff=3.0, expansion_weight=None)(student, teacher)
    compression, expansion = by_the_formula(student, teacher, 0.05)
    assert terms.compression.item() == pytest.approx(compression.item(), abs=1e-6)
    assert terms.expansion.item() == pytest.approx(expansion.item(), rel=1e-5)
    assert terms.loss.item() == pytest.approx((-3 * compression - expansion).item(), rel=1e-5)
    (mine,) = torch.autograd.grad(terms.loss, student)
    # the gradient of the dot product of unit vectors, as in the implementation; that of the cosine has no radial part
    dot = sum((teacher[i] * student[j]).sum() for i in range(2) for j in range(V) if i != j) / (B * (2 * V - 2))
    (truth,) = torch.autograd.grad(-3 * dot.double() - by_the_formula(student, teacher, 0.05)[1], student)
    assert (mine - truth).norm() / truth.norm() <= 1e-5


@pytest.mark.parametrize(("R", "by_hand"), [(512, 2.28), (32, 2.86), (24, 2.94)])
def test_orthogonal_features_reach_the_maximum_expansion(R: int, by_hand: float) -> None:
    """Rows in R orthonormal directions, or R/p rows in each of p directions."""
    p, eps = 256, 0.05
    rows = torch.eye(p)[torch.arange(R) % p]
    rate, maximum, minimum = coding_rate(rows[None], eps)
    assert coding_rate(rows[None, :1].expand(1, R, p), eps)[0].item() == pytest.approx(minimum, rel=1e-4)
    assert rate.item() == pytest.approx(maximum, rel=1e-5)
    assert maximum == pytest.approx(by_hand, abs=0.01)
    rate_of_others, _, _ = coding_rate(unit_vectors(1, R, p), eps)
    assert rate_of_others.item() < maximum


def test_default_expansion_weight_is_the_maximum_of_the_published_run() -> None:
    """64 scans on each of 8 ranks with the covariance of one rank: gamma of 512 scans, and rank 64."""
    gamma = (256 + 512) / (256 * 512)
    assert gamma / 2 * 64 * math.log(1 + 256 / (512 * 0.05)) == pytest.approx(SimDINOLoss().expansion_weight, abs=0.001)


def test_collapsed_features_have_the_minimum_expansion_and_a_higher_loss() -> None:
    collapsed = unit_vectors(1, 1, 64).expand(4, 32, -1)
    terms = SimDINOLoss()(collapsed, collapsed[:2])
    assert terms.compression.item() == pytest.approx(1, abs=1e-5)
    assert terms.expansion_share.item() == pytest.approx(terms.collapsed_share.item(), rel=1e-4)
    assert terms.expansion_share.item() < 0.15
    spread = torch.eye(64)[:32].expand(4, -1, -1)
    better = SimDINOLoss()(spread, spread[:2])
    assert better.expansion_share.item() == pytest.approx(1, abs=1e-4)
    assert better.loss < terms.loss


def test_nan_in_a_feature_gives_a_nan_loss_and_no_exception() -> None:
    """The training loop stops at such a loss and names the scans; an exception would name none."""
    student = unit_vectors(4, 6, 16)
    student[0, 2, 3] = math.nan
    terms = SimDINOLoss()(student.requires_grad_(), unit_vectors(2, 6, 16, seed=1))
    terms.loss.backward()
    assert terms.loss.isnan()
    assert terms.expansion_share.isnan()


def test_minimum_loss_does_not_depend_on_the_batch_size() -> None:
    """It is -(coeff + expansion_weight)."""
    for B in (8, 32, 200):
        best = torch.eye(64)[torch.arange(B) % 64].expand(3, -1, -1)
        terms = SimDINOLoss(coeff=1.0, expansion_weight=0.45)(best, best[:2])
        assert terms.loss.item() == pytest.approx(-1.45, abs=0.02)


def test_loss_and_normalisation_are_float32_under_autocast() -> None:
    student, teacher = unit_vectors(4, 16, 32), unit_vectors(2, 16, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SimDINOLoss()(student, teacher).loss
    assert inside.dtype == torch.float32
    assert torch.equal(inside, SimDINOLoss()(student, teacher).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lengths = SimDINOHead(32)(unit_vectors(64, 32)).norm(dim=-1)
    assert lengths.sub(1).abs().max() < 1e-6, "a cosine would be above 1"


def _rank(rank: int, folder: str, split: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weight = torch.eye(24, requires_grad=True)
    student, teacher = unit_vectors(4, 10, 24), unit_vectors(2, 10, 24, seed=1)
    scans = slice(0, split) if rank == 0 else slice(split, None)
    projected = torch.nn.functional.normalize(student[:, scans] @ weight, dim=-1)
    terms = SimDINOLoss()(projected, teacher[:, scans])
    terms.loss.backward()
    gradient = weight.grad
    dist.all_reduce(gradient)  # the mean over ranks, as DDP computes
    loss = terms.loss.detach()
    dist.all_reduce(loss)
    if rank == 0:
        torch.save({"gradient": gradient / 2, "loss": loss / 2}, Path(folder) / "split.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("split_at", [5, 3])
def test_split_over_ranks_gives_the_same_loss_and_gradient(tmp_path: Path, split_at: int) -> None:
    """Ten scans, five on each rank, or three and seven as under a token budget."""
    in_ranks(_rank, 2, str(tmp_path), split_at)
    split = torch.load(tmp_path / "split.pt", weights_only=True)
    weight = torch.eye(24, requires_grad=True)
    whole = SimDINOLoss()(
        torch.nn.functional.normalize(unit_vectors(4, 10, 24) @ weight, dim=-1), unit_vectors(2, 10, 24, seed=1)
    )
    whole.loss.backward()
    assert split["loss"].item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert ((split["gradient"] - weight.grad).norm() / weight.grad.norm()).item() <= 1e-5


def test_only_the_student_has_gradients_and_the_teacher_is_its_moving_average() -> None:
    torch.manual_seed(0)
    model = SimDINO(M3RetModel(tiny_config(pooling="cls", drop_path_rate=0.1)), SimDINOLoss(), views=3).train()
    assert not model.teacher.training
    rows, grids = pack([scan for scan in make_scans()[:2] for _ in range(3)])
    terms = model(rows, grids)
    assert terms.reconstruction is None
    assert terms.patch_agreement is None
    terms.loss.backward()
    assert all(p.grad is None for p in (*model.teacher.parameters(), *model.teacher_head.parameters()))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.parameters())

    before = model.teacher.encoder.layers[0].attention.qkv.weight.clone()
    student = model.student.encoder.layers[0].attention.qkv.weight
    with torch.no_grad():
        student.add_(1)
    model.update_teacher(0.9)
    expected = 0.9 * before + 0.1 * student
    assert largest_difference(model.teacher.encoder.layers[0].attention.qkv.weight, expected) <= 1e-6
    with pytest.raises(ValueError, match="grid_thw"):
        model(*pack(make_scans()[:2]))


def test_teacher_momentum_rises_from_its_start_to_one() -> None:
    assert teacher_momentum(0, 100, 0.996) == pytest.approx(0.996)
    assert teacher_momentum(50, 100, 0.996) == pytest.approx(0.998)
    assert teacher_momentum(100, 100, 0.996) == 1


def test_both_objectives_from_one_pass_equal_each_alone() -> None:
    """The reconstruction equals that of `M3RetForPreTraining` on the global views. The student sees only their visible
    patches; its local views and the teacher's views are not masked."""
    config = tiny_config(pooling="cls")
    autoencoder = M3RetForPreTraining(config).eval()
    model = SimDINO(autoencoder.m3ret, SimDINOLoss(), 3, autoencoder.decoder).eval()
    rows, grids = pack([scan for scan in make_scans()[:3] for _ in range(3)])
    noise = torch.rand(len(rows))
    terms = model(rows, grids, noise)

    is_global = torch.arange(9) % 3 < 2
    of_global = is_global.repeat_interleave(grids.prod(-1))
    alone = autoencoder(rows[of_global], grids[is_global], noise=noise[of_global])
    assert terms.reconstruction.item() == pytest.approx(alone.loss.item(), rel=1e-5)

    counts = [int(n) for n in grids.prod(-1)]
    visible, _, visible_counts = choose_visible(noise, counts, [0.75 if masks else 0.0 for masks in is_global.tolist()])
    places = patch_coordinates([tuple(grid) for grid in grids.tolist()], rows.device)
    layout = PackLayout.from_patch_counts(visible_counts, model.student.config.num_prefix_tokens)
    tokens, _ = model.student.encode(rows[visible], places[visible], layout)
    student = model.student_head(model.student.pool(tokens, layout))
    teacher = model.teacher_head(model.teacher(rows[of_global], grids[is_global]).pooler_output)
    expected = SimDINOLoss()(student.view(3, 3, -1).transpose(0, 1), teacher.view(3, 2, -1).transpose(0, 1))
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)

    (terms.loss + terms.reconstruction).backward()
    assert all(p.grad is not None for p in (*model.student.parameters(), *model.decoder.parameters()))


def test_block_masks_have_the_drawn_size_and_cover_half_of_the_views() -> None:
    generator = torch.Generator().manual_seed(0)
    grids = torch.tensor([[1, 6, 6], [4, 6, 6], [1, 1, 1], [2, 3, 5]] * 100)
    noise = torch.rand(int(grids.prod(-1).sum()), generator=generator)
    hidden, masked_counts = block_masks(noise, grids)
    assert int(hidden.sum()) == sum(masked_counts)
    sizes = grids.prod(-1).tolist()
    views = zip(hidden.split(sizes), noise.split(sizes), masked_counts, grids.tolist(), strict=True)
    fractions = []
    for mask, view_noise, masked, (t, h, w) in views:
        assert int(mask.sum()) == masked
        if view_noise[0] >= 0.5 or t * h * w == 1:
            assert masked == 0
            continue
        fractions.append(masked / (t * h * w))
        assert masked == max(1, round(t * h * w * (0.1 + 0.4 * float(view_noise[0]) / 0.5)))
        alone, _ = block_masks(view_noise, torch.tensor([[t, h, w]]))
        assert torch.equal(alone, mask), "a mask must not depend on the batch"
        # no visible patch is nearer to the centre than a masked one, in units of the view's size
        centre = divmod(int(view_noise.argmax()), h * w)
        centre = (centre[0], *divmod(centre[1], w))
        distance = torch.tensor(
            [
                max(2 * abs(z - centre[0]) / t, 2 * abs(y - centre[1]) / h, 2 * abs(x - centre[2]) / w)
                for z in range(t)
                for y in range(h)
                for x in range(w)
            ]
        )
        assert mask[view_noise.argmax()]
        assert distance[mask].max() <= distance[~mask].min() + 1e-6
    assert 0.4 < len(fractions) / 300 < 0.6
    assert 0.25 < sum(fractions) / len(fractions) < 0.35


def test_patch_term_equals_that_of_each_view_alone() -> None:
    torch.manual_seed(0)
    model = SimDINO(M3RetModel(tiny_config(pooling="cls")), SimDINOLoss(), 3, patch_weight=2.0).eval()
    with torch.no_grad():
        model.mask_patch.normal_()
        model.teacher_head.layers[0].weight.mul_(1.5)  # a teacher that differs from the student
    rows, grids = pack([scan for scan in make_scans()[:4] for _ in range(3)])
    rows.requires_grad_()
    noise = torch.rand(len(rows), generator=torch.Generator().manual_seed(5))
    terms = model(rows, grids, noise)

    agreements, pooled, hidden_rows = [], [], []
    sizes = grids.prod(-1).tolist()
    views = zip(rows.split(sizes), grids.split(1), noise.split(sizes), strict=True)
    for view, (rows_of_view, grid, drawn) in enumerate(views):
        hidden = torch.zeros(len(rows_of_view), dtype=torch.bool)
        if view % 3 < 2:
            hidden, _ = block_masks(drawn, grid)
        hidden_rows.append(hidden)
        seen = rows_of_view.clone()
        seen[hidden] = model.mask_patch.view(3, 1, -1).expand(-1, 4, -1).flatten()
        output = model.student(seen, grid)
        pooled.append(output.pooler_output[0])
        if hidden.any():
            student = model.student_head(output.last_hidden_state[5:][hidden])
            teacher = model.teacher_head(model.teacher(rows_of_view, grid).last_hidden_state[5:][hidden])
            agreements.append(torch.nn.functional.cosine_similarity(student, teacher, dim=-1).mean())
    assert 0 < len(agreements) < 8
    agreement = torch.stack(agreements).mean()
    assert terms.patch_agreement.item() == pytest.approx(agreement.item(), rel=1e-4)

    student = model.student_head(torch.stack(pooled)).view(4, 3, -1).transpose(0, 1)
    is_global = torch.arange(12) % 3 < 2
    of_global = is_global.repeat_interleave(grids.prod(-1))
    teacher = model.teacher_head(model.teacher(rows[of_global], grids[is_global]).pooler_output)
    alone = SimDINOLoss()(student, teacher.view(4, 2, -1).transpose(0, 1)).loss
    expected = alone - 2.0 * sum(agreements) / 8  # over all global views, masked or not
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-4)

    (gradient,) = torch.autograd.grad(terms.loss, rows, retain_graph=True)
    assert not gradient[torch.cat(hidden_rows)].any(), "a masked pixel must not reach the student"
    assert gradient[~torch.cat(hidden_rows)].any(1).all()
    terms.loss.backward()
    assert model.mask_patch.grad is not None
    assert model.mask_patch.grad.any()


def test_decoder_and_patch_term_together_are_refused() -> None:
    autoencoder = M3RetForPreTraining(tiny_config())
    with pytest.raises(ValueError, match="patch_weight"):
        SimDINO(autoencoder.m3ret, SimDINOLoss(), 3, autoencoder.decoder, patch_weight=1.0)


def test_accumulated_packs_average_the_compression_but_not_the_expansion() -> None:
    """The mean compression of packs equals that of one large pack; the mean expansion does not."""
    student, teacher = unit_vectors(4, 12, 16), unit_vectors(2, 12, 16, seed=1)
    loss = SimDINOLoss(expansion_weight=None)
    whole = loss(student, teacher)
    halves = [loss(student[:, half], teacher[:, half]) for half in (slice(0, 6), slice(6, 12))]
    assert sum(half.compression for half in halves).item() / 2 == pytest.approx(whole.compression.item(), abs=1e-6)
    by_hand = [by_the_formula(student[:, half], teacher[:, half], 0.05)[1] for half in (slice(0, 6), slice(6, 12))]
    assert sum(half.expansion for half in halves).item() == pytest.approx(sum(by_hand).item(), rel=1e-5)
    assert abs(sum(half.expansion for half in halves).item() / 2 - whole.expansion.item()) > 0.01
