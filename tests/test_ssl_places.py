"Exemplars, neighbours and puzzles: slow references, what is drawn, what must not leak, and images too small."
import itertools

import pytest
import torch

from medssl_nb.data.images import Batch, ImageSet
from medssl_nb.ssl.places import (
    checked_sizes, choose_permutations, cut_tiles, hamming, join_tiles, neighbours, place_pair, place_tiles, read_tiles, tile_side,
)
from small_methods import asked, drawn, small

NAMES = ("exemplar_cnn", "relative_location", "jigsaw")
EVERY = [(name, d) for name in NAMES for d in (2, 3)]


def piece(image, start, side):
    return image[(slice(None), *(slice(s, s + side) for s in start.tolist()))]


def brought(tile):
    "Mean 0 and deviation 1, each channel."
    flat = tile.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)).view_as(tile)


@pytest.mark.parametrize("space", [(9, 7), (6, 8, 7)])
def test_tiles_are_those_of_the_loops(space):
    x, d = drawn(3, 2, *space), len(space)
    starts = torch.stack([torch.randint(0, n - 3, (3, 5)) for n in space], -1)
    tiles = read_tiles(x, starts, 4)
    assert tiles.shape == (3, 5, 2, *[4] * d)
    for b, t in itertools.product(range(3), range(5)):
        assert torch.equal(tiles[b, t], piece(x[b], starts[b, t], 4))


@pytest.mark.parametrize("d, grid", [(2, 3), (2, 2), (3, 3), (3, 2)])
def test_cutting_undoes_joining_and_rows_come_first(d, grid):
    tiles = drawn(2, grid**d, 3, *[4] * d)
    whole = join_tiles(tiles, grid)
    assert whole.shape == (2, 3, *[4 * grid] * d)
    assert torch.equal(cut_tiles(whole, grid), tiles)
    for i, cell in enumerate(itertools.product(range(grid), repeat=d)):
        assert torch.equal(piece(whole[1], torch.tensor(cell) * 4, 4), tiles[1, i])


@pytest.mark.parametrize("d, size, grid", [(2, (32, 38), 3), (3, (16, 17, 19), 3), (3, (16, 16, 16), 2)])
def test_place_i_of_a_puzzle_holds_tile_order_i(d, size, grid):
    method, x = small("jigsaw", d, grid=grid, permutations=20, hidden=8), drawn(4, 2, *size)
    pretext, side = asked(method, x), tile_side(size, grid, 0.15, 2)
    tiles = cut_tiles(pretext.views[0], grid)
    for b in range(4):
        order = method.orders[pretext.target[b]]
        for i in range(grid**d):
            tile = piece(x[b], pretext.drawn["starts"][b, i], side)
            corner = torch.tensor(list(itertools.product(range(grid), repeat=d))[order[i]]) * torch.tensor([n // grid for n in size])
            assert (pretext.drawn["starts"][b, i] >= corner).all() and (pretext.drawn["starts"][b, i] < corner + torch.tensor(size) // grid).all()
            torch.testing.assert_close(tiles[b, i], brought(tile), atol=1e-4, rtol=1e-4)


def test_every_tile_stays_in_its_cell_and_reaches_all_of_it():
    side = tile_side((30, 36), 3, 0.3, 2)
    starts = place_tiles(torch.zeros(4000, 1, 30, 36), 3, side, torch.Generator().manual_seed(0))
    assert side == 7
    for axis, cell in enumerate((10, 12)):
        corner = torch.tensor([i // 3 if axis == 0 else i % 3 for i in range(9)]) * cell
        slack = starts[..., axis] - corner
        assert slack.min() == 0 and slack.max() == cell - side
        share = torch.bincount(slack.flatten()) / slack.numel()
        assert (share - 1 / (cell - side + 1)).abs().max() < 0.02


def test_without_gap_and_normalisation_the_puzzle_is_the_image():
    method, x = small("jigsaw", gap=0.0, normalise=False, permutations=50), drawn(6, 1, 30, 30)
    pretext = asked(method, x)
    back = method.orders[pretext.target].argsort(1)[:, :, None, None, None]
    assert torch.equal(join_tiles(cut_tiles(pretext.views[0], 3).take_along_dim(back, 1), 3), x)


def test_all_orders_are_asked_alike():
    method = small("jigsaw", permutations=10)
    share = torch.bincount(asked(method, torch.zeros(5000, 1, 12, 12)).target, minlength=10) / 5000
    assert (share - 0.1).abs().max() < 0.02


def test_tiles_pass_the_encoder_one_by_one():
    method, x = small("jigsaw", permutations=7, hidden=8).eval(), drawn(3, 1, 32, 32)
    pretext = asked(method, x)
    tiles = cut_tiles(pretext.views[0], 3)
    slow = torch.stack([method.head(torch.cat([method.embed(t[None])[0] for t in puzzle])[None])[0] for puzzle in tiles])
    torch.testing.assert_close(method.logits(pretext.views), slow, atol=1e-5, rtol=1e-4)


def test_greedy_takes_the_farthest_each_time():
    orders = choose_permutations(12, 5)
    everything = torch.tensor(list(itertools.permutations(range(5))))
    for k in range(1, 12):
        nearest = hamming(everything, orders[:k]).min(1).values
        assert hamming(orders[k : k + 1], orders[:k]).min() == nearest.max()
    assert len({tuple(o) for o in orders.tolist()}) == 12
    assert all(sorted(o) == [0, 1, 2, 3, 4] for o in orders.tolist())


@pytest.mark.parametrize("tiles, least", [(8, 5), (9, 6), (27, 23)])
def test_a_chosen_set_is_farther_apart_than_a_random_one(tiles, least):
    apart = lambda orders: hamming(orders, orders)[~torch.eye(len(orders), dtype=torch.bool)].min()
    chosen = choose_permutations(100, tiles)
    assert apart(chosen) >= least > apart(torch.rand(100, tiles, generator=torch.Generator().manual_seed(5)).argsort(1))


def test_hamming_counts_places():
    assert hamming(torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[0, 1, 2], [1, 2, 0]])).tolist() == [[0, 3], [2, 2]]


def test_permutations_are_those_of_every_process():
    torch.manual_seed(1)
    first = small("jigsaw").orders
    torch.manual_seed(2)
    assert torch.equal(first, small("jigsaw").orders) and torch.equal(first, choose_permutations(100, 9))
    assert len(choose_permutations(24, 4)) == 24


@pytest.mark.parametrize("count, tiles", [(1, 9), (25, 4)])
def test_impossible_counts_of_permutations_are_named(count, tiles):
    with pytest.raises(ValueError, match=f"{count} permutations of {tiles} tiles"):
        choose_permutations(count, tiles)


@pytest.mark.parametrize("d, count", [(2, 8), (3, 26)])
def test_neighbours_are_all_around(d, count):
    steps = neighbours(d)
    assert steps.shape == (count, d) and len({tuple(s) for s in steps.tolist()}) == count
    assert steps.abs().max() == 1 and (steps.abs().sum(1) > 0).all()
    assert steps[0].tolist() == [-1] * d and torch.equal(steps, -steps.flip(0))


@pytest.mark.parametrize("d, size", [(2, (48, 60)), (3, (24, 30, 26))])
def test_the_second_patch_lies_where_the_answer_says(d, size):
    side, gap, shake = checked_sizes(size, 2, 0.2, 0.5, 0.1)
    placed = place_pair(torch.zeros(3000, 1, *size), neighbours(d), side, gap, shake, torch.Generator().manual_seed(0))
    starts = placed["starts"]
    assert starts.min() >= 0 and all((starts[..., a] + side <= n).all() for a, n in enumerate(size))
    apart = starts[:, 1] - starts[:, 0] - neighbours(d)[placed["direction"]] * (side + gap)
    assert apart.abs().max() == 2 * shake
    share = torch.bincount(placed["direction"], minlength=3**d - 1) / 3000
    assert (share - 1 / (3**d - 1)).abs().max() < 0.03


def test_the_first_patch_alone_tells_nothing():
    placed = place_pair(torch.zeros(8000, 1, 48, 48), neighbours(2), 9, 5, 1, torch.Generator().manual_seed(0))
    starts = placed["starts"][:, 0].float()
    for k in range(8):
        assert (starts[placed["direction"] == k].mean(0) - starts.mean(0)).abs().max() < 0.35  # 1000 draws, deviation 2


@pytest.mark.parametrize("d", [2, 3])
def test_patches_are_those_of_the_loops(d):
    x = drawn(5, 2, *[32 if d == 2 else 16] * d)
    for normalise in (True, False):
        method = small("relative_location", d, normalise=normalise)
        pretext, side = asked(method, x), checked_sizes(x.shape[2:], 2, 0.2, 0.5, 7 / 96)[0]
        for b, i in itertools.product(range(5), (0, 1)):
            patch = piece(x[b], pretext.drawn["starts"][b, i], side)
            torch.testing.assert_close(pretext.views[i][b], brought(patch) if normalise else patch, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["relative_location", "jigsaw"])
def test_brightness_and_contrast_of_a_scan_do_not_reach_the_network(name):
    method, x = small(name), drawn(4, 1, 32, 32)
    other = x * torch.tensor([3, 0.2, 1, 50.0]).view(4, 1, 1, 1) + torch.tensor([1, -5, 0, 9.0]).view(4, 1, 1, 1)
    for a, b in zip(asked(method, x).views, asked(method, other).views):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name, d", EVERY)
def test_silence_costs_the_logarithm_of_the_classes(name, d):
    method = small(name, d)
    last = method.head if name == "exemplar_cnn" else method.head[-1]
    torch.nn.init.zeros_(last.weight), torch.nn.init.zeros_(last.bias)
    terms = method(asked(method, drawn(6, 1, *[16] * d)))
    torch.testing.assert_close(terms["loss"], torch.tensor(float(last.out_features)).log())


@pytest.mark.parametrize("name, d", EVERY)
def test_without_an_image_all_get_the_same_answer(name, d):
    "So the loss of biases alone is that of the classes' frequencies, and no better than silence where they are equal."
    method = small(name, d).eval()
    logits = method.logits(asked(method, torch.full((6, 1, *[16] * d), 3.0)).views)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))
    even = logits[:1].log_softmax(1).mean()
    assert -even >= torch.tensor(float(logits.shape[1])).log() - 1e-4


def test_an_image_is_its_class_whatever_its_place_in_the_batch():
    method, x = small("exemplar_cnn", classes=50), drawn(4, 1, 16, 16)
    assert asked(method, x).target.tolist() == [0, 1, 2, 3]
    assert asked(method, Batch(x)).target.tolist() == [0, 1, 2, 3]
    assert asked(method, Batch(x, index=torch.tensor([7, 49, 0, 7]))).target.tolist() == [7, 49, 0, 7]
    batch = next(ImageSet(drawn(20, 1, 16, 16)).batches(8, seed=3))
    assert torch.equal(asked(method, batch).target, batch.index)
    assert asked(small("exemplar_cnn", classes=3), x).target.tolist() == [0, 1, 2, 0]


def test_views_of_an_image_differ_and_are_not_the_image():
    method, x = small("exemplar_cnn"), drawn(2, 1, 16, 16)
    assert not torch.equal(asked(method, x, 0).views[0], asked(method, x, 1).views[0])
    assert small("exemplar_cnn", views={"degrees": 5.0}).views["degrees"] == 5.0
    assert small("exemplar_cnn", views={"degrees": 5.0}).views["scale"] == (0.3, 1.0)


def test_more_images_than_classes_are_refused_before_training():
    method = small("exemplar_cnn", classes=10)
    method.refresh(ImageSet(drawn(10, 1, 16, 16)))
    with pytest.raises(ValueError, match="classes=11"):
        method.refresh(ImageSet(drawn(11, 1, 16, 16)))


@pytest.mark.parametrize("name, options", [("jigsaw", {}), ("jigsaw", {"gap": 0.0}), ("relative_location", {}), ("relative_location", {"jitter": 0.0, "gap": 0.2})])
def test_an_image_that_is_too_small_names_the_size_it_needs(name, options):
    method = small(name, stem="full", **options)  # needs tiles of 8
    with pytest.raises(ValueError, match=r"images of at least \d+ voxels") as told:
        asked(method, drawn(2, 1, 16, 16))
    enough = int(str(told.value).split("at least ")[1].split()[0])
    asked(method, drawn(2, 1, enough, enough))
    with pytest.raises(ValueError):
        asked(method, drawn(2, 1, enough - 1, enough - 1))


def test_patches_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match="lower patch, gap or jitter"):
        asked(small("relative_location", patch=0.5), drawn(2, 1, 64, 64))
