"Colour: what it is worth, and that the grey stays. Bone: shells, flaps and their loss by slow references, and what must not cheat."
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import create
from medssl_nb.ssl.colour_and_bone import bone_of, dilate, flap_terms, grey, head_shell, random_flap, without_flap
from small_methods import asked, drawn, method_of, small


@pytest.mark.parametrize("d, channels", [(2, 3), (2, 2), (3, 4)])
def test_colour_is_worth_what_the_channels_do_not_share(d, channels):
    x = drawn(1, channels, *[8] * d)
    x = x + x.mean(1, keepdim=True)
    flat = x[0].flatten(1)
    x = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)).view_as(x)
    r = torch.corrcoef(x[0].flatten(1))
    mean = (r.sum() - channels) / (channels * (channels - 1))
    torch.testing.assert_close(F.mse_loss(grey(x), x), (1 - 1 / channels) * (1 - mean), rtol=1e-4, atol=1e-5)


def test_grey_is_the_mean_in_every_channel_and_needs_two():
    x = drawn(2, 3, 4, 4)
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        assert grey(x)[b, :, i, j].tolist() == pytest.approx([sum(x[b, :, i, j].tolist()) / 3] * 3, abs=1e-6)
    with pytest.raises(ValueError, match="one channel has no colour"):
        asked(create("colorization", create_encoder("resnet18", 2, 1, width=4, stem="small")), drawn(2, 1, 16, 16))


@pytest.mark.parametrize("d", (2, 3))
def test_what_is_painted_keeps_the_grey(d):
    method, x = method_of("colorization", d), drawn(2, 3, *[16] * d)
    pretext = asked(method, x)
    assert torch.equal(pretext.target, x) and torch.equal(pretext.views[0], grey(x))
    torch.testing.assert_close(grey(method.restore(pretext.views[0])), pretext.views[0], atol=1e-5, rtol=0)


def test_a_painter_of_biases_cannot_beat_grey_on_normalised_images():
    x = drawn(4, 3, 16, 16)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    method = small("colorization", channels=3, adversarial=0.0)
    torch.nn.init.zeros_(method.head.weight)
    torch.nn.init.constant_(method.head.bias, 0.3)
    torch.testing.assert_close(method(asked(method, x))["loss"], F.mse_loss(grey(x), x))
    method.head.bias.data = torch.tensor([0.3, 0.0, -0.3])
    assert method(asked(method, x))["loss"] > F.mse_loss(grey(x), x)


def test_swapped_colours_are_told_apart_from_grey():
    "The grey of an image and of the same with two channels swapped is one: the loss is not."
    x, method = drawn(2, 3, 16, 16), small("colorization", channels=3, adversarial=0.0).eval()
    other = x[:, [1, 0, 2]]
    torch.testing.assert_close(grey(x), grey(other))
    assert abs(method(asked(method, x))["loss"] - method(asked(method, other))["loss"]) > 1e-4


def test_weights_of_the_two_terms():
    method, x = method_of("colorization", 2), drawn(2, 3, 16, 16)
    terms = method(asked(method, x))
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 0.01 * terms["adversarial"])
    assert set(map(id, method.adversary_parameters())).isdisjoint(map(id, method.encoder.parameters()))


@pytest.mark.parametrize("d, radius", [(2, 1), (2, 2), (3, 1)])
def test_dilation_by_loops(d, radius):
    mask = drawn(1, 1, *[7] * d) > 1.5
    grown = dilate(mask, radius)[0, 0]
    for place in itertools.product(range(7), repeat=d):
        near = any(all(abs(p - q) <= radius for p, q in zip(place, other)) for other in mask[0, 0].nonzero().tolist())
        assert bool(grown[place]) == near


@pytest.mark.parametrize("thickness", (1, 2))
def test_the_shell_of_a_ball_is_its_rim(thickness):
    axis = torch.arange(21.0) - 10
    distance = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2).sqrt()
    ball = (distance <= 7)[None, None]
    shell = head_shell(ball.float(), thickness)
    slow = ball & dilate(~ball, thickness)
    assert torch.equal(shell, slow) and not shell[0, 0, 10, 10, 10] and shell[0, 0, 10, 10, 17]


def test_gaps_are_closed_and_a_cut_head_has_no_shell_at_the_cut():
    head = torch.zeros(1, 1, 20, 20)
    head[..., 4:, 4:16] = 1
    head[..., 9:11, 4:8] = 0  # a fold, two voxels wide
    shell = head_shell(head, 1)[0, 0]
    assert not shell[10, 6] and shell[4:, 4].all() and shell[4, 4:16].all()
    assert not shell[19, 5:15].any() and not shell[:4].any()


def test_bone_by_threshold():
    x = drawn(2, 2, 8, 8)
    assert torch.equal(bone_of(x, 0.7), ((x[:, :1] > 0.7) | (x[:, 1:] > 0.7)))
    assert torch.equal(bone_of(x, None, 0.25), head_shell(x, 2))


@pytest.mark.parametrize("d", (2, 3))
def test_flaps_are_what_lies_in_a_ball_or_a_box(d):
    n = {2: 24, 3: 14}[d]
    bone = drawn(12, 1, *[n] * d) > 0
    flap, what = random_flap(bone, (0.2, 0.4), torch.Generator().manual_seed(0))
    assert what["ball"].any() and not what["ball"].all() and 0.2 * n <= what["reach"].min() and what["reach"].max() <= 0.4 * n
    for b in range(12):
        centre = [int(i) for i in torch.unravel_index(what["chosen"][b], bone.shape[2:])]
        assert bone[b, 0][tuple(centre)] and flap[b, 0][tuple(centre)]
        for place in itertools.product(range(n), repeat=d):
            away = [abs(p - c) for p, c in zip(place, centre)]
            distance = math.sqrt(sum(a * a for a in away)) if what["ball"][b] else max(away) / 0.8
            if abs(distance - what["reach"][b].item()) > 1e-4:
                assert bool(flap[b, 0][place]) == (bool(bone[b, 0][place]) and distance <= what["reach"][b].item())


def test_flaps_begin_at_every_voxel_of_bone_alike():
    bone = torch.zeros(6000, 1, 6, 6, dtype=torch.bool)
    places = [3, 8, 20, 35]
    bone.flatten(1)[:, places] = True
    chosen = random_flap(bone, (0.1, 0.1), torch.Generator().manual_seed(0))[1]["chosen"]
    counts = torch.bincount(chosen, minlength=36)
    assert counts[places].sum() == 6000 and (counts[places] / 6000 - 0.25).abs().max() < 0.03


def test_without_bone_there_is_no_flap():
    assert not random_flap(torch.zeros(2, 1, 8, 8, dtype=torch.bool))[0].any()


@pytest.mark.parametrize("binary", (True, False))
def test_the_saw_leaves_everything_else(binary):
    x = drawn(3, 2, 16, 16)
    pretext = asked(small("skull_reconstruction", channels=2, threshold=0.5, binary=binary), x)
    bone, flap, view = pretext.drawn["bone"], pretext.drawn["flap"], pretext.views[0]
    assert torch.equal(pretext.target, flap.float()) and torch.equal(view, without_flap(x, bone, flap, binary))
    if binary:
        assert torch.equal(view, (bone & ~flap).float().expand(3, 2, 16, 16))
    else:
        kept = ~flap.expand_as(x)
        assert torch.equal(view[kept], x[kept])
        assert torch.equal(torch.where(flap, view, 0), torch.where(flap, x.amin((2, 3), keepdim=True), 0))


def test_the_whole_skull_is_flap_and_rest():
    x = drawn(3, 1, 16, 16)
    pretext = asked(small("skull_reconstruction", threshold=0.5, estimate="skull"), x)
    assert torch.equal(pretext.target.bool(), pretext.drawn["flap"] | (pretext.views[0] > 0.5))
    method = small("skull_reconstruction", threshold=0.5, estimate="skull")
    assert not (method.flap(pretext.views[0]) & (pretext.views[0] > 0.5)).any()  # what is there is subtracted
    with pytest.raises(ValueError, match="'flap' or 'skull'"):
        small("skull_reconstruction", estimate="implant")


def test_loss_is_that_of_the_loops():
    logits, target = drawn(3, 1, 4, 4), (drawn(3, 1, 4, 4, seed=1) > 0.5).float()
    sure = [[1 / (1 + math.exp(-v)) for v in image.flatten().tolist()] for image in logits]
    truth = [image.flatten().tolist() for image in target]
    entropy = -sum(math.log(p if t else 1 - p) for s, g in zip(sure, truth) for p, t in zip(s, g)) / 48
    dice = sum(1 - (2 * sum(p * t for p, t in zip(s, g)) + 1) / (sum(s) + sum(g) + 1) for s, g in zip(sure, truth)) / 3
    found = flap_terms(logits, target)
    torch.testing.assert_close(found["loss"].item(), entropy + dice, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([found["cross_entropy"].item(), found["dice"].item()], [entropy, dice], rtol=1e-5, atol=1e-6)


def test_solved_empty_and_undecided():
    target = (drawn(4, 1, 16, 16) > 2).float()
    assert flap_terms(40 * target - 20, target)["loss"] < 1e-3
    assert flap_terms(torch.full_like(target, -30.0), torch.zeros_like(target))["loss"] < 1e-3  # nothing was taken, nothing given
    share = target.mean()
    undecided = flap_terms(torch.full_like(target, (share / (1 - share)).log().item()), target)
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    torch.testing.assert_close(undecided["cross_entropy"], entropy, rtol=1e-3, atol=0)
    assert undecided["dice"] > 0.8  # a bias alone does not find a flap


def test_passing_the_bone_through_finds_no_flap():
    pretext = asked(small("skull_reconstruction", threshold=0.5), drawn(4, 1, 24, 24))
    assert flap_terms(40 * pretext.views[0] - 20, pretext.target)["dice"] > 0.9
