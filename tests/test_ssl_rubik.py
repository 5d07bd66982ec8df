"Rubik's cubes: turns and twists by slow references, what is drawn, the loss by loops, the opponent, and what must not cheat."
import itertools
import math

import pytest
import torch

from medssl_nb.ssl.places import cut_tiles, tile_side
from medssl_nb.ssl.rubik import answer_terms, half_turns, mask_voxels, quarter_steps, random_scramble, scramble, twist, unscramble
from small_methods import asked, drawn, small


@pytest.mark.parametrize("d", (2, 3))
def test_half_turns_are_those_of_rot90(d):
    cubes = drawn(1, 4, 2, *[3] * d)
    turns = torch.tensor([[[False, False], [True, False], [False, True], [True, True]]])
    turned = half_turns(cubes, turns)
    horizontal, vertical = (lambda c: torch.rot90(c, 2, (-2, -1)), lambda c: torch.rot90(c, 2, (-3, -2))) if d == 3 else (lambda c: c.flip(-1), lambda c: c.flip(-2))
    for i, change in enumerate((lambda c: c, horizontal, vertical, lambda c: vertical(horizontal(c)))):
        assert torch.equal(turned[0, i], change(cubes[0, i]))
    assert torch.equal(half_turns(turned, turns), cubes)  # twice is not at all


@pytest.mark.parametrize("d, size", [(2, (20, 17)), (3, (16, 17, 19))])
def test_place_i_holds_cube_order_i_turned_as_said(d, size):
    method, x = small("rubik_cube", d, normalise=False, permutations=8, hidden=8), drawn(4, 2, *size)
    pretext, side = asked(method, x), tile_side(size, 2, 0.15, 2)
    cubes, count = cut_tiles(pretext.views[0], 2), 2**d
    order, turns = pretext.target[:, 0], pretext.target[:, 1:].view(4, count, 2).bool()
    for b, i in itertools.product(range(4), range(count)):
        start = pretext.drawn["starts"][b, i].tolist()
        cell = list(itertools.product(range(2), repeat=d))[method.orders[order[b]][i]]
        assert all(c * (n // 2) <= s <= (c + 1) * (n // 2) - side for s, c, n in zip(start, cell, size))
        piece = x[b][(slice(None), *(slice(s, s + side) for s in start))]
        assert torch.equal(cubes[b, i], half_turns(piece[None, None], turns[b, i][None, None])[0, 0])


def test_all_turns_and_orders_are_asked_alike():
    target = asked(small("rubik_cube", 2), torch.zeros(6000, 1, 12, 12)).target
    assert (torch.bincount(target[:, 0], minlength=24) / 6000 - 1 / 24).abs().max() < 0.015
    assert (target[:, 1:].float().mean(0) - 0.5).abs().max() < 0.03


def test_loss_is_that_of_the_loops():
    order, answers = drawn(3, 5), {"turns": drawn(3, 4, seed=1), "masks": drawn(3, 2, seed=2)}
    target = torch.tensor([[4, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 1, 1], [2, 1, 1, 1, 1, 0, 0]])
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    order_term = -sum(math.log(math.exp(row[t[0]]) / sum(map(math.exp, row))) for row, t in zip(order.tolist(), target.tolist())) / 3
    truths, binary = {"turns": target[:, 1:5], "masks": target[:, 5:]}, {}
    for name, logits in answers.items():
        each = [math.log(sigmoid(v if g else -v)) for v, g in zip(logits.flatten().tolist(), truths[name].flatten().tolist())]
        binary[name] = -sum(each) / len(each)
    two = answer_terms(order, {"turns": answers["turns"]}, target[:, :5])
    three = answer_terms(order, answers, target)
    torch.testing.assert_close(two["loss"].item(), 0.5 * order_term + 0.5 * binary["turns"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(three["loss"].item(), (order_term + binary["turns"] + binary["masks"]) / 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, questions", [("rubik_cube", 2), ("rubik_cube_plus", 3)])
def test_biases_alone_do_not_reach_a_solved_task(name, questions):
    method = small(name, 3, permutations=8, hidden=8)
    for head in (method.order_head, *method.heads.values()):
        torch.nn.init.zeros_(head[-1].weight), torch.nn.init.zeros_(head[-1].bias)
    guess = (math.log(8) + (questions - 1) * math.log(2)) / questions
    torch.testing.assert_close(method(asked(method, drawn(4, 1, 12, 12, 12)))["loss"].item(), guess)


def test_cubes_pass_the_encoder_one_by_one():
    method, x = small("rubik_cube", 3, permutations=8, hidden=8).eval(), drawn(2, 1, 16, 16, 16)
    views = asked(method, x).views
    slow = torch.stack([torch.cat([method.embed(cube[None])[0] for cube in cubes]) for cubes in cut_tiles(views[0], 2)])
    torch.testing.assert_close(method.together(views), slow, atol=1e-5, rtol=1e-4)


def test_masks_hide_the_share_that_was_asked_for_and_only_where():
    cubes = torch.ones(50, 8, 2, 6, 6, 6)
    where = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden = mask_voxels(cubes, where, 0.3, torch.Generator().manual_seed(1)) == 0
    assert not hidden[~where].any() and abs(hidden[where].float().mean() - 0.3) < 0.005
    assert torch.equal(hidden[:, :, 0], hidden[:, :, 1]) and cubes.min() == 1


def test_plus_says_which_cubes_it_masked():
    method, x = small("rubik_cube_plus", 3, permutations=8, hidden=8, share=1.0), drawn(6, 1, 16, 16, 16)
    pretext = asked(method, x)
    assert torch.equal((cut_tiles(pretext.views[0], 2) == 0).flatten(2).all(-1), pretext.target[:, 17:].bool())
    assert torch.equal(pretext.target[:, 17:].bool(), pretext.drawn["masks"])


@pytest.mark.parametrize("axis", (0, 1, 2))
@pytest.mark.parametrize("layers", (2, 3))
def test_twists_are_those_of_the_loops(axis, layers):
    x, turns = drawn(5, 2, 6, 6, 6), torch.randint(0, 4, (5, layers), generator=torch.Generator().manual_seed(0))
    found, plane = twist(x, axis, turns), [a for a in (1, 2, 3) if a != axis + 1]
    for b, layer in itertools.product(range(5), range(layers)):
        piece = lambda image: image.narrow(axis + 1, layer * (6 // layers), 6 // layers)
        assert torch.equal(piece(found[b]), torch.rot90(piece(x[b]), int(turns[b, layer]), plane))


@pytest.mark.parametrize("space", [(8, 8), (8, 6), (8, 8, 8), (4, 8, 8), (7, 7, 7), (4, 6, 8)])
@pytest.mark.parametrize("layers", (2, 3))
def test_unscrambling_undoes_every_scramble(space, layers):
    x = drawn(6, 2, *space)
    spoiled, what = random_scramble(x, layers, torch.Generator().manual_seed(0))
    assert spoiled.shape == x.shape and torch.equal(unscramble(spoiled, what["turns"]), x) and not torch.equal(spoiled, x)
    assert torch.equal(spoiled.flatten(2).sort().values, x.flatten(2).sort().values)
    assert torch.equal(scramble(x, what["turns"]), spoiled)


def test_flat_volumes_make_quarter_turns_about_one_axis_only():
    assert quarter_steps((4, 8, 8)).tolist() == [1, 2, 2] and quarter_steps((8, 8)).tolist() == [2, 2]
    turns = random_scramble(torch.zeros(500, 1, 4, 8, 8), 2, torch.Generator().manual_seed(0))[1]["turns"]
    assert turns[:, 0].unique().tolist() == [0, 1, 2, 3] and turns[:, 1:].unique().tolist() == [0, 2]


def test_the_opponent_and_the_restorer_move_apart():
    method, x = small("rubik_cube_pp", 3, width=4, grid=2), drawn(4, 1, 16, 16, 16)
    pretext = asked(method, x)
    norms = {k: v.clone() for k, v in method.named_buffers()}
    method.adversary(pretext).backward()
    own = {id(p) for p in method.adversary_parameters()}
    assert all((p.grad is not None) == (id(p) in own) for p in method.parameters())
    assert all(torch.equal(v, norms[k]) for k, v in method.named_buffers() if "running" in k and not k.startswith("opponent")), "judging moved the restorer's statistics"
    method.zero_grad()
    method(pretext)["loss"].backward()
    assert all((p.grad is None) == (id(p) in own) for p in method.parameters())


def test_pp_is_reconstruction_and_the_weighted_opponent():
    method, x = small("rubik_cube_pp", 3, width=4, grid=2, adversarial=0.3).eval(), drawn(2, 1, 16, 16, 16)
    pretext, terms = asked(method, x), None
    terms, restored = method(pretext), method.restore(pretext.views[0])
    fooling = torch.nn.functional.softplus(-method.opponent(restored)).mean()
    torch.testing.assert_close(terms["loss"], (restored - x).square().mean() + 0.3 * fooling)
    assert torch.equal(pretext.target, x)
    alone = small("rubik_cube_pp", 3, grid=2, adversarial=0.0)
    assert alone.adversary_parameters() == [] and set(alone(asked(alone, x))) == {"loss"}


@pytest.mark.parametrize("make, said", [
    (lambda: asked(small("rubik_cube", 3), torch.zeros(2, 1, 4, 16, 16)), "larger|images of at least"),
    (lambda: small("rubik_cube", 2, permutations=100), "24"),
    (lambda: small("rubik_cube_pp", 3, grid=1), "at least 2"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
