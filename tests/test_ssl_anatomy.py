"Slices and patches as rulers: slow references, what is drawn, what must not leak, and images too small."
import itertools
import math

import pytest
import torch

from medssl_nb.ssl.anatomy import apart, distance_loss, even_starts, order_loss, ordered_pair, spacing_loss, take_slices, two_places
from medssl_nb.ssl.base import Pretext
from small_methods import asked, drawn, small

SLICES = ("slice_order", "slice_position")


def brought(piece):
    "Mean 0 and deviation 1, each channel."
    flat = piece.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)).view_as(piece)


@pytest.mark.parametrize("space, axis", [((9, 7), 0), ((9, 7), 1), ((6, 8, 7), 0), ((6, 8, 7), 1), ((6, 8, 7), 2)])
def test_slices_are_those_of_the_loops(space, axis):
    x, starts = drawn(3, 2, *space), torch.randint(0, space[axis] - 2, (3, 4))
    taken = take_slices(x, starts, 2, axis)
    for b, t in itertools.product(range(3), range(4)):
        assert torch.equal(taken[b, t], x[b].narrow(1 + axis, int(starts[b, t]), 2))


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("d, shape, axis", [(2, (18, 20), 0), (2, (20, 18), 1), (3, (18, 10, 12), 0), (2, (16, 12, 10), 0), (2, (12, 10, 16), 2)])
def test_views_are_the_normalised_slices(name, d, shape, axis):
    "An encoder of the batch's dimension sees slabs, a 2D one single slices of volumes."
    method, x = small(name, d, axis=axis), drawn(4, 1, *shape)
    pretext, thick = asked(method, x), 1 if len(shape) > d else 2
    for view, starts in zip(pretext.views, pretext.drawn["starts"].T):
        for b in range(4):
            slab = x[b].narrow(1 + axis, int(starts[b]), thick)
            torch.testing.assert_close(view[b], brought(slab.squeeze(1 + axis) if len(shape) > d else slab), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(method(pretext)["loss"])


@pytest.mark.parametrize("name", SLICES)
def test_a_volume_trains_a_2d_encoder_of_several_channels(name):
    method = small(name, 2, channels=3)
    loss = method(asked(method, drawn(4, 3, 16, 12, 12)))["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in method.encoder.parameters())


def test_order_says_which_lies_above_and_keeps_its_distance():
    method, x = small("slice_order", gap=0.1), torch.zeros(4000, 1, 30, 8)
    pretext = asked(method, x)
    first, second = pretext.drawn["starts"].T
    assert torch.equal(pretext.target, (first > second).long())
    assert (first - second).abs().min() == 4 + 3 and max(first.max(), second.max()) == 26 and min(first.min(), second.min()) == 0
    assert abs(pretext.target.float().mean() - 0.5) < 0.03


def test_pairs_are_spread_evenly():
    pairs = ordered_pair(torch.zeros(40000, 1, 1, 1), 6, 2, torch.Generator().manual_seed(0))
    table = torch.zeros(6, 6).index_put((pairs[:, 0], pairs[:, 1]), torch.ones(40000), accumulate=True) / 40000
    for i, j in itertools.product(range(6), range(6)):
        assert abs(table[i, j] - (0 if j < i + 2 else (1 if j == i + 2 else 2) / 16)) < 0.01


def test_order_and_spacing_are_the_papers_sums():
    scores = drawn(5, 8).double()
    sigmoid, order, spacing = (lambda v: 1 / (1 + math.exp(-v))), 0.0, 0.0
    for image in scores.tolist():
        steps = [b - a for a, b in zip(image, image[1:])]
        order -= sum(math.log(sigmoid(step)) for step in steps)
        for a, b in zip(steps, steps[1:]):
            spacing += 0.5 * (b - a) ** 2 if abs(b - a) < 1 else abs(b - a) - 0.5
    torch.testing.assert_close(order_loss(scores).item(), order / 5)
    torch.testing.assert_close(spacing_loss(scores).item(), spacing / 5)


def test_the_ruler_has_no_zero_and_is_sound_far_out():
    scores = drawn(4, 8)
    torch.testing.assert_close(order_loss(scores + 100), order_loss(scores), rtol=1e-4, atol=1e-4)
    far = torch.tensor([[0.0, -1e4, 2e4]], requires_grad=True)
    (order_loss(far) + spacing_loss(far)).backward()
    assert torch.isfinite(far.grad).all()


def test_constant_scores_do_not_solve_slice_position():
    method = small("slice_position")
    torch.nn.init.zeros_(method.head.weight)
    terms = method(asked(method, drawn(4, 1, 16, 16)))
    torch.testing.assert_close(terms["order"].item(), 7 * math.log(2))
    assert terms["accuracy"] == 0


def test_scores_come_slice_by_slice():
    method, x = small("slice_position", count=4).eval(), drawn(3, 1, 16, 16)
    views = asked(method, x).views
    slow = torch.stack([torch.cat([method.head(method.embed(view[b : b + 1]))[0] for view in views]) for b in range(3)])
    torch.testing.assert_close(method.score(views), slow, atol=1e-5, rtol=1e-4)


def test_absolute_asks_for_the_place_in_the_array():
    method, x = small("slice_position", absolute=True, count=3), drawn(6, 1, 16, 16)
    pretext = asked(method, x)
    torch.testing.assert_close(pretext.target, (pretext.drawn["starts"] + 1) / 16)  # the centre of a slab of two
    slow = sum((s - t) ** 2 for s, t in zip(method.score(pretext.views).flatten().tolist(), pretext.target.flatten().tolist())) / 18
    torch.testing.assert_close(method(pretext)["loss"].item(), slow, atol=1e-5, rtol=1e-4)


def test_starts_are_even_and_use_all_the_room():
    starts = even_starts(torch.zeros(5000, 1, 1, 1), 23, 4, torch.Generator().manual_seed(0))
    steps = starts.diff(dim=1)
    assert (steps == steps[:, :1]).all() and steps.unique().tolist() == list(range(1, 8))
    assert starts.min() == 0 and starts.max() == 22


def test_brightness_and_contrast_of_a_slice_do_not_count():
    x = drawn(4, 1, 24, 16, 16)
    shaded = x * torch.linspace(0.5, 2, 24).view(1, 1, 24, 1, 1) + torch.linspace(-5, 5, 24).view(1, 1, 24, 1, 1)
    for name in SLICES:
        method = small(name)
        for a, b in zip(asked(method, x).views, asked(method, shaded).views):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("space", [(20, 14), (16, 12, 18)])
def test_patches_distances_and_places_by_loops(space):
    method, x = small("patch_distance", len(space), patch=0.34), drawn(5, 2, *space)
    pretext, side = asked(method, x), 4
    for b in range(5):
        corners = pretext.drawn["starts"][b]
        for view, corner in zip(pretext.views, corners):
            piece = x[b][(slice(None), *(slice(s, s + side) for s in corner.tolist()))]
            torch.testing.assert_close(view[b], brought(piece), atol=1e-4, rtol=1e-4)
        distance = math.dist(corners[0].tolist(), corners[1].tolist()) / math.hypot(*space)
        shares = [(c + side / 2) / n for corner in corners.tolist() for c, n in zip(corner, space)]
        torch.testing.assert_close(pretext.target[b], torch.tensor([distance, *shares]))


def test_the_squared_distance_of_the_vectors_is_the_answer():
    first, second, distance = drawn(4, 8), drawn(4, 8, seed=1), torch.rand(4)
    slow = sum((sum((p - q) ** 2 for p, q in zip(a, b)) - d) ** 2 for a, b, d in zip(first.tolist(), second.tolist(), distance.tolist())) / 4
    torch.testing.assert_close(distance_loss(first, second, distance).item(), slow, rtol=1e-4, atol=1e-5)
    assert distance_loss(first, first, torch.zeros(4)) == 0


def test_distance_is_symmetric_and_one_vector_for_all_is_no_answer():
    method, x = small("patch_distance", places=0.0).eval(), drawn(6, 1, 20, 20)
    pretext = asked(method, x)
    swapped = Pretext(pretext.views[::-1], pretext.target)
    torch.testing.assert_close(method(pretext)["loss"], method(swapped)["loss"])
    torch.nn.init.zeros_(method.vector.weight)
    torch.testing.assert_close(method(pretext)["loss"], pretext.target[:, 0].square().mean())


def test_distance_counts_in_mm():
    centres = torch.tensor([[[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]]])
    assert torch.isclose(apart(centres, (10, 10, 10), (2.0, 1.0, 1.0)), torch.tensor(math.hypot(6, 4) / math.hypot(20, 10, 10)))


def test_patches_reach_every_place():
    starts, side = two_places(torch.zeros(3000, 1, 9, 12), 0.34, 2, torch.Generator().manual_seed(0))
    assert side == 3 and starts.amin((0, 1)).tolist() == [0, 0] and starts.amax((0, 1)).tolist() == [6, 9]


@pytest.mark.parametrize("make, said", [
    (lambda: asked(small("slice_order", 3), torch.zeros(2, 1, 16, 16)), "slice_order.*dimensions"),
    (lambda: asked(small("slice_order"), torch.zeros(2, 1, 4, 16)), "larger images"),
    (lambda: asked(small("slice_position"), torch.zeros(2, 1, 6, 16)), "larger images"),
    (lambda: asked(small("slice_position", count=2), torch.zeros(2, 1, 16, 16)), "count from 3"),
    (lambda: asked(small("slice_order", axis=2), torch.zeros(2, 1, 16, 16)), "axis 2"),
    (lambda: asked(small("patch_distance", patch=1.5), torch.zeros(2, 1, 16, 16)), "lower patch"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
