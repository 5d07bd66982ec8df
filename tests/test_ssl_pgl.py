"PGL: aligned pairs hold the same place of the image, and the loss is BYOL's at each of them."
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.nets.base import create_encoder
from medssl_nb.nets.unet import UNet
from medssl_nb.ssl.base import Pretext, create, mlp
from medssl_nb.ssl.distillation import both_ways
from medssl_nb.ssl.pcrl import clean_views, draw_crops
from medssl_nb.ssl.pgl import overlap_readings, voxel_mlp, voxels
from medssl_nb.train.weights import transfer
from medssl_nb.views.geometry import affine
from small_methods import asked, drawn, small


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(batch, *space):
    "A coordinate image: channel a holds each voxel's place along axis a."
    return torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in space], indexing="ij")).expand(batch, -1, *[-1] * len(space))


def pooled(view, cells):
    return (F.adaptive_avg_pool2d if view.ndim == 4 else F.adaptive_avg_pool3d)(view, cells)


def matrix(scale, centre):
    return torch.cat([torch.tensor(scale).diag(), torch.tensor(centre)[:, None]], 1)


@pytest.mark.parametrize("space, cells", [((48, 48), (6, 6)), ((48, 32), (6, 4)), ((48, 48), (2, 2)), ((32, 24, 16), (8, 6, 4)), ((32, 32, 32), (2, 2, 2))])
def test_aligned_pairs_hold_the_same_coordinates(space, cells):
    "To a tenth of a voxel, over random crops and flips along all axes; the crops' own overlap is what is read."
    x, d = coordinates(100, *space), len(space)
    crops = draw_crops(x, 0, "sub", 1 / 3, ((0.3, 1.0),) * 2, generator())
    views, moved = clean_views(x, crops["large"], space, tuple(range(d)), 0.0, generator=generator(1))
    readings = overlap_readings(moved["matrix"], space, cells)
    maps = [pooled(view, cells) for view in views.unbind(1)]
    first, second = (affine(m, readings[:, k]) for k, m in enumerate(maps))
    passed = crops["overlap"] > 1 / 3
    assert passed.float().mean() > 0.9
    assert (first - second).abs()[passed].max() < 0.1
    assert (maps[0] - maps[1]).abs().mean() > 1, "the crops do not differ: the test shows nothing"
    low, high = crops["large"][:, :, 0].amax(1), crops["large"][:, :, 1].amin(1)
    places = first.flatten(2) + 0.5
    assert (places >= low[..., None] - 0.1)[passed].all() and (places <= high[..., None] + 0.1)[passed].all()


def test_readings_by_hand():
    "Two crops of 8 pixels, one flipped, with maps of 4 cells: the shared places in both maps' own counting."
    matrices = torch.stack([matrix([1.0, 1.0], [-2.0, 0.0]), matrix([-1.0, 1.0], [2.0, 0.0])])[None]
    readings = overlap_readings(matrices, (8, 8), (4, 4))[0]
    for j in (-1.5, -0.5, 0.5, 1.5):
        place = 0.0 + 0.5 * j  # image voxels from the centre: the centres meet from -1 to 1, four points
        first, second = (r @ torch.tensor([j, j, 1.0]) for r in readings)
        assert math.isclose(first[0], (place + 2) / 2) and math.isclose(second[0], (place - 2) / -2)
        assert math.isclose(first[1], 0.75 * j) and math.isclose(second[1], 0.75 * j)  # the same crop: all between its outermost centres


def test_the_whole_image_twice_is_read_between_its_centres():
    whole = torch.eye(2, 3).expand(3, 2, 2, 3)
    readings = overlap_readings(whole, (16, 16), (4, 4))
    torch.testing.assert_close(readings[..., :2], (0.75 * torch.eye(2)).expand(3, 2, 2, 2))
    assert not readings[..., 2].any()


@pytest.mark.parametrize("d", [2, 3])
def test_crops_apart_give_no_nan(d):
    "No overlap at all: both maps are read at the cells nearest to the gap."
    apart = torch.zeros(2, 2, d, d + 1)
    apart[:, :, range(d), range(d)] = 0.2
    apart[:, 0, :, d], apart[:, 1, :, d] = -12.0, 12.0
    readings = overlap_readings(apart, (32,) * d, (4,) * d)
    x = coordinates(2, *(4,) * d)
    for k, expected in ((0, 3.0), (1, 0.0)):
        assert (affine(x, readings[:, k]) == expected).all()
    method = small("pgl", d, hidden=16, dim=8)
    pretext = asked(method, drawn(2, 1, *[32 if d == 2 else 16] * d))
    pretext.target = apart
    loss = method(pretext)["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in method.encoder.parameters())


def test_from_which_overlap_on_the_centres_meet():
    "IoU above 1 / (2m - 1): never a gap, in a million pairs of intervals and in boxes; just below, some."
    def spans(dims, n):
        sides = 0.2 + 0.8 * torch.rand(2, n, dims, generator=generator(1))
        starts = torch.rand(2, n, dims, generator=generator(2))
        return starts, sides

    for dims, m in itertools.product((1, 2, 3), (2, 3, 6)):
        starts, sides = spans(dims, 300_000)
        ends = starts + sides
        shared = (ends.amin(0) - starts.amax(0)).clamp_min(0).prod(-1)
        overlap = shared / (sides.prod(-1).sum(0) - shared)
        meet = ((ends - sides / (2 * m)).amin(0) > (starts + sides / (2 * m)).amax(0)).all(-1)
        assert meet[overlap > 1 / (2 * m - 1) + 1e-6].all()
        if dims == 1:
            assert not meet[(overlap < 1 / (2 * m - 1)) & (overlap > 0.98 / (2 * m - 1))].all()


@pytest.mark.parametrize("d", [2, 3])
def test_loss_by_loops(d):
    "Each place of each image by itself, read by hand from the cells around it; in inference mode."
    method = small("pgl", d, channels=2, hidden=16, dim=8).eval()
    pretext = asked(method, drawn(2, 2, *[32 if d == 2 else 16] * d))
    with torch.no_grad():
        said = [[say(view) for view in pretext.views] for say in (method.predict, method.teach)]
        loss = method(pretext)["loss"]
    cells = said[0][0].shape[2:]
    readings = overlap_readings(pretext.target, pretext.views[0].shape[2:], cells)
    middle = (torch.tensor(cells) - 1) / 2

    def read(maps, reading, point):
        place = reading[:, :d] @ (torch.tensor(point) - middle) + reading[:, d] + middle
        total = 0
        for cell in itertools.product(*map(range, cells)):
            total = total + maps[(slice(None), *cell)] * math.prod(max(0.0, 1 - abs(float(p) - c)) for p, c in zip(place, cell))
        return total

    total = 0.0
    for b in range(2):
        for point in itertools.product(*map(range, cells)):
            p, t = ([read(maps[k][b], readings[b, k], point) for k in (0, 1)] for maps in said)
            total += sum(2 - 2 * F.cosine_similarity(p[k], t[1 - k], dim=0).item() for k in (0, 1))
    torch.testing.assert_close(loss.item(), total / (2 * math.prod(cells)), rtol=1e-4, atol=1e-4)


def test_a_map_of_one_cell_is_byol():
    "One cell knows no place: the loss is BYOL's of the cells, whatever the crops."
    method = small("pgl", 2, hidden=16, dim=8).eval()
    pretext = asked(method, drawn(3, 1, 8, 8))
    with torch.no_grad():
        predictions, targets = ([say(v)[..., 0, 0] for v in pretext.views] for say in (method.predict, method.teach))
        assert method.predict(pretext.views[0]).shape[2:] == (1, 1)
        torch.testing.assert_close(method(pretext)["loss"], both_ways(predictions, targets))


def test_the_order_of_views_and_a_common_flip_do_not_matter():
    method = small("pgl", 2, hidden=16, dim=8).eval()
    pretext = asked(method, drawn(3, 1, 32, 32))
    swapped = Pretext(pretext.views[::-1], pretext.target.flip(1))
    torch.testing.assert_close(method(swapped)["loss"], method(pretext)["loss"])


def test_a_perfect_predictor_reaches_zero_only_with_alignment():
    "Maps that hold the place itself agree when aligned, and do not when each is read where it stands."
    x = torch.cat([coordinates(20, 48, 48) / 48, torch.ones(20, 1, 48, 48)], 1)
    crops = draw_crops(x, 0, "sub", 1 / 3, ((0.3, 1.0),) * 2, generator())
    views, moved = clean_views(x, crops["large"], (48, 48), (0, 1), 0.0, generator=generator(1))
    maps = [pooled(view, (6, 6)) for view in views.unbind(1)]
    readings = overlap_readings(moved["matrix"], (48, 48), (6, 6))
    aligned = [voxels(affine(m, readings[:, k])) for k, m in enumerate(maps)]
    assert both_ways(aligned, aligned) < 1e-5
    assert both_ways([voxels(m) for m in maps], [voxels(m) for m in maps]) > 0.05


@pytest.mark.parametrize("d", [2, 3])
def test_a_voxel_s_perceptron_is_the_perceptron(d):
    torch.manual_seed(0)
    convolutions, rows = voxel_mlp(d, 6, 5, 4), mlp(6, 5, 4)
    for a, b in zip(convolutions.parameters(), rows.parameters(), strict=True):
        b.data.copy_(a.data.view_as(b))
    maps = drawn(2, 6, *range(2, 2 + d))
    torch.testing.assert_close(voxels(convolutions(maps)), rows(voxels(maps)))
    assert torch.equal(voxels(maps)[1], maps[0].flatten(1)[:, 1])


def test_crops_overlap_as_asked_and_flips_are_drawn():
    method = small("pgl", 3)
    pretext = asked(method, drawn(64, 1, 16, 16, 16))
    assert (pretext.drawn["overlap"] > 1 / 3).float().mean() > 0.9
    share = (pretext.target[..., :3].diagonal(dim1=-2, dim2=-1) < 0).float().mean((0, 1))
    assert (share - 0.5).abs().max() < 0.2
    still = asked(small("pgl", 3, flip_axes=(2,)), drawn(64, 1, 16, 16, 16)).target.diagonal(dim1=-2, dim2=-1) < 0
    assert not still[..., :2].any() and still[..., 2].any()
    wide = asked(small("pgl", 2, overlap=0.7, scale=(0.6, 1.0)), drawn(64, 1, 32, 32)).drawn["overlap"]
    assert (wide > 0.7).float().mean() > 0.8


def test_no_gradient_into_the_teacher_and_it_follows():
    method = small("pgl", 2, hidden=16, dim=8, momentum=0.5)
    method(asked(method, drawn(2, 1, 32, 32)))["loss"].backward()
    teacher = [*method.teacher_encoder.parameters(), *method.teacher_projector.parameters()]
    assert all(p.grad is None for p in teacher) and all(p.grad is not None for p in method.predictor.parameters())
    old = next(method.teacher_projector.parameters()).clone()
    with torch.no_grad():
        next(method.projector.parameters()).add_(1.0)
    method.after_step(0.0)
    torch.testing.assert_close(next(method.teacher_projector.parameters()), old + 0.5)


@pytest.mark.parametrize("d", [2, 3])
def test_encoder_transfers_into_a_segmentation_network(d):
    method = small("pgl", d)
    torch.manual_seed(9)
    other = UNet(create_encoder("resnet18", d, 1, width=4, stem="small"), 3)
    report = transfer(method.encoder, other.encoder)
    assert not (report.missing or report.unexpected or report.reshaped)
    four = create_encoder("resnet18", d, 4, width=4, stem="small")
    assert len(transfer(method.encoder, four).reshaped) == 1
    assert torch.isfinite(create("pgl", four, hidden=8, dim=4)(asked(create("pgl", four, hidden=8, dim=4), drawn(2, 4, *[16] * d)))["loss"])
