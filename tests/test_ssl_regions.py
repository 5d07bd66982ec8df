"Slices and regions as positives: which pieces are taken, who is a positive and who is left out, the losses by loops, what is frozen."
import itertools
import math

import pytest
import torch

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.nets.unet import UNet
from medssl_nb.ssl.base import create
from medssl_nb.ssl.contrastive import nt_xent
from medssl_nb.ssl.patients import paired_contrast
from medssl_nb.ssl.regions import GLOBAL, global_tables, nearest_regions, read_regions, region_contrast, region_starts, step_of, take_partitions
from medssl_nb.tasks.segmentation import Segmenter
from medssl_nb.train.fit import fit
from medssl_nb.train.weights import transfer
from small_methods import asked, drawn, small


def heights(*shape):
    "Volumes whose voxels hold their place along the first axis."
    return torch.arange(shape[2]).view(1, 1, -1, 1, 1).expand(shape).float()


@pytest.mark.parametrize("depth, axis", [(16, 0), (17, 0), (16, 1)])
def test_each_slice_comes_from_its_partition(depth, axis):
    x = heights(50, 1, depth, 5, 6).movedim(2, 2 + axis)
    pieces, target, starts = take_partitions(x, 2, 4, axis, torch.Generator().manual_seed(0))
    assert pieces.shape == (200, 1, 5, 6) and target.tolist() == [[v, p] for v in range(50) for p in range(4)]
    place = pieces[:, 0, 0, 0].long()
    assert torch.equal(place, starts.flatten()) and (pieces == place.view(-1, 1, 1, 1)).all()
    edges = [p * depth // 4 for p in range(5)]
    assert all(set(place[target[:, 1] == p].tolist()) == set(range(edges[p], edges[p + 1])) for p in range(4))  # all of them, no other


@pytest.mark.parametrize("depth", (16, 18))
def test_slabs_are_whole_partitions(depth):
    pieces, target, _ = take_partitions(heights(3, 2, depth, 4, 4), 3, 4, generator=torch.Generator().manual_seed(0))
    assert pieces.shape == (12, 2, depth // 4, 4, 4)
    for piece, (_, p) in zip(pieces, target.tolist()):
        voxels = piece[0, :, 0, 0].tolist()
        assert p * depth // 4 <= voxels[0] and voxels[-1] < (p + 1) * depth // 4 and voxels == list(range(int(voxels[0]), int(voxels[-1]) + 1))


def test_plain_images_stay_whole_and_are_each_their_own():
    x = drawn(5, 1, 12, 12)
    pieces, target, _ = take_partitions(x, 2)
    assert torch.equal(pieces, x) and target[:, 1].tolist() == list(range(5))
    for match in GLOBAL:  # nothing is known: all three are SimCLR
        z = drawn(10, 6)
        torch.testing.assert_close(paired_contrast(z, *global_tables(target, match)), nt_xent(*z.chunk(2)))


@pytest.mark.parametrize("match", GLOBAL)
def test_who_is_a_positive_and_who_is_left_out(match):
    target = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
    positive, negative = global_tables(target, match)
    for i, j in itertools.product(range(10), range(10)):
        a, b = i % 5, j % 5
        alike, same_piece = target[a, 1] == target[b, 1], a == b
        expected = {"random": (same_piece, not same_piece), "excluded": (same_piece, not alike), "matched": (alike, not alike)}[match]
        assert (positive[i, j], negative[i, j]) == (expected[0] and i != j, expected[1])


@pytest.mark.parametrize("match", GLOBAL)
def test_global_loss_is_that_of_the_loops(match):
    method = small("global_local", 2, match=match, dim=16, stage="global").eval()
    pretext = asked(method, drawn(3, 1, 16, 16, 16))
    z = torch.cat([method.projector(method.embed(view)) for view in pretext.views]).detach().double()
    u, part, piece = z / z.norm(dim=1, keepdim=True), pretext.target[:, 1].repeat(2).tolist(), list(range(12)) * 2
    losses = []
    for i, j in itertools.product(range(24), range(24)):
        if i != j and (piece[i] == piece[j] or (match == "matched" and part[i] == part[j])):
            rest = [k for k in range(24) if (piece[k] != piece[i] if match == "random" else part[k] != part[i])]
            own = math.exp(u[i] @ u[j] / 0.1)
            losses.append(-math.log(own / (own + sum(math.exp(u[i] @ u[k] / 0.1) for k in rest))))
    torch.testing.assert_close(method(pretext)["global"].item(), sum(losses) / len(losses), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space, count", [((12, 12), 13), ((7, 9), 13), ((12, 12, 12), 35), ((4, 12, 12), 13), ((6, 12), 5), ((2, 2), 1)])
def test_regions_lie_inside_and_are_different(space, count):
    starts = region_starts(space)
    assert starts.shape == (count, len(space)) and len({tuple(s) for s in starts.tolist()}) == count
    assert (starts >= 0).all() and all(s + 3 <= n or n < 3 for row in starts.tolist() for s, n in zip(row, space))
    wide = [axis for axis, n in enumerate(space) if n >= 7]
    assert all(set(starts[:, axis].tolist()) >= {0, space[axis] - 3} for axis in wide)  # from edge to edge


def test_rivals_are_the_nearest_and_never_the_region_itself():
    starts = region_starts((24, 24))
    rivals, apart = nearest_regions(starts, 5), torch.cdist(starts.double(), starts.double())
    for a in range(13):
        others = [k for k in range(13) if k != a]
        chosen = rivals[a].tolist()
        assert a not in chosen and len(set(chosen)) == 5
        assert max(apart[a, chosen]) <= min([apart[a, k] for k in others if k not in chosen]) + 1e-9
    assert torch.equal(rivals, nearest_regions(starts, 5)) and nearest_regions(starts, 12).shape == (13, 12)


@pytest.mark.parametrize("space", [(9, 8), (4, 9, 8), (2, 9)])
def test_regions_are_read_where_they_lie(space):
    maps, starts = drawn(2, 3, *space), region_starts(space)
    found = read_regions(maps, starts)
    for b, a in itertools.product(range(2), range(len(starts))):
        window = maps[b]
        for axis, s in enumerate(starts[a].tolist()):
            window = window.index_select(1 + axis, torch.tensor([min(s + k, space[axis] - 1) for k in range(3)]))
        assert torch.equal(found[b, a], window.flatten())


def test_region_contrast_is_that_of_the_loops():
    first, second, rivals = drawn(2, 6, 4), drawn(2, 6, 4, seed=1), torch.tensor([[1, 2], [0, 5], [3, 4], [0, 1], [5, 2], [4, 0]])
    s = lambda a, b: (a @ b / a.norm() / b.norm() / 0.1).item()
    losses = []
    for b, k in itertools.product(range(2), range(6)):
        for mine, other in ((first[b].double(), second[b].double()), (second[b].double(), first[b].double())):
            own = math.exp(s(mine[k], other[k]))
            against = sum(math.exp(s(mine[k], view[n])) for n in rivals[k].tolist() for view in (mine, other))
            losses.append(-math.log(own / (own + against)))
    torch.testing.assert_close(region_contrast(first, second, rivals).item(), sum(losses) / len(losses), rtol=1e-4, atol=1e-5)


def test_a_map_that_says_the_same_everywhere_does_not_win():
    method = small("global_local", 2, stage="local", dim=16)
    torch.nn.init.zeros_(method.mixing[-1].weight)
    method.region.weight.data.fill_(0.0)
    assert abs(method(asked(method, drawn(2, 1, 16, 16)))["loss"].item() - math.log(11)) < 1e-4
    same = torch.full((2, 13, 4), 0.3)
    torch.testing.assert_close(region_contrast(same, same, nearest_regions(region_starts((9, 9))), 0.01), torch.tensor(11.0).log(), rtol=1e-4, atol=1e-4)


def test_the_twin_looks_where_the_first_view_looks():
    x = torch.nn.functional.interpolate(drawn(6, 1, 4, 4), size=(24, 24), mode="bicubic")
    method = small("global_local", 2, views={"p": (1.0, 0.0, 0.0), "scale": (0.3, 0.6), "degrees": 30})
    first, second, twin = asked(method, x).views
    likeness = lambda a, b: torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert min(likeness(a, b) for a, b in zip(first, twin)) > 0.9  # another gamma only
    assert min(likeness(a, b) for a, b in zip(first, second)) < 0.6
    assert not torch.equal(first, twin)


@pytest.mark.parametrize("stage, terms, trained", [("both", {"local", "global"}, {"encoder", "projector", "decoder", "mixing", "region"}),
                                                   ("global", {"global"}, {"encoder", "projector"}), ("local", {"local"}, {"decoder", "mixing", "region"})])
def test_a_stage_trains_its_parts_and_no_other(stage, terms, trained):
    method = small("global_local", 2, stage=stage, blocks=2, dim=16)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    history = fit(method, ImageSet(drawn(4, 1, 16, 16, 16)), steps=2, batch_size=4, device="cpu", progress=False)
    moved = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k]) and "num_batches" not in k}
    assert {k.split(".")[0] for k in moved} == trained and set(history.terms) == {"loss", *terms}
    assert not any(k.startswith("decoder.steps.2") or k.startswith("decoder.steps.3") for k in moved)  # beyond the trained blocks
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)  # what several processes ask for


@pytest.mark.parametrize("spatial_dims, upsample", [(2, "linear"), (3, "linear"), (2, "transposed")])
def test_encoder_and_decoder_transfer(spatial_dims, upsample):
    method = small("global_local", spatial_dims, dim=16, upsample=upsample)
    torch.manual_seed(1)
    network = UNet(create_encoder("resnet18", spatial_dims, 1, width=4, stem="small"), 3, step=step_of(upsample))
    for source, into in ((method.encoder, network.encoder), (method.decoder, network.decoder)):
        report = transfer(source, into)
        assert not report.missing and not report.unexpected
    for key, value in method.decoder.state_dict().items():
        assert torch.equal(network.decoder.state_dict()[key], value)
    network = Segmenter(network, 3)
    assert network.predict(drawn(2, 1, *[16] * spatial_dims)).shape[:2] == (2, 3)


@pytest.mark.parametrize("channels", (1, 4))
def test_a_2d_encoder_takes_volumes(channels):
    method = small("global_local", 2, channels, dim=16)
    pretext = asked(method, drawn(3, channels, 16, 16, 16))
    assert [v.shape for v in pretext.views] == [(12, channels, 16, 16)] * 3 and pretext.target.shape == (12, 2)
    assert torch.isfinite(method(pretext)["loss"]) and len(method.picture(drawn(3, channels, 16, 16, 16)).axes) == 4 * 3


@pytest.mark.parametrize("make, said", [
    (lambda e: create("global_local", e, match="all"), "random, excluded, matched"),
    (lambda e: create("global_local", e, stage="first"), "both, global, local"),
    (lambda e: asked(m := create("global_local", e), drawn(2, 1, 3, 16, 16)), "4 partitions"),
    (lambda e: (m := create("global_local", e))(asked(m, drawn(2, 1, 4, 4))), "larger images"),
])
def test_mistakes_are_told(make, said):
    with pytest.raises(ValueError, match=said):
        make(create_encoder("resnet18", 2, width=4, stem="small"))
