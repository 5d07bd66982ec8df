"MoCo and CPC: closed forms, slow references, the order of the queue, what must not leak, and mistakes."
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import Pretext, create
from medssl_nb.ssl.places import answered, cut_tiles
from medssl_nb.ssl.queues import (
    Context, KeyQueue, SlowCopy, grid_starts, move_statistics, patch_rows, patch_side, queue_logits, row_logits, rows_down,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(name, d=2, norm="batch", **options):
    torch.manual_seed(0)
    return create(name, create_encoder("resnet18", d, width=4, stem="small", norm=norm), **options)


def ask(method, x, seed=0):
    return method.pretext(x, torch.Generator().manual_seed(seed))


def loss_of(query, positive, negatives, temperature):
    return answered(queue_logits(query, positive, negatives, temperature), torch.zeros(len(query), dtype=torch.long))["loss"]


# The loss of MoCo

@pytest.mark.parametrize("tau", [0.07, 0.2, 0.5])
@pytest.mark.parametrize("count", [1, 6])
def test_closed_forms_of_the_queue_loss(tau, count):
    axes = torch.eye(count + 1)
    torch.testing.assert_close(loss_of(axes[:1], axes[:1], axes[1:], tau).item(), math.log(1 + count * math.exp(-1 / tau)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_of(drawn(3, 4), torch.ones(3, 4), torch.ones(count, 4), tau).item(), math.log(1 + count), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_of(axes[:1], -axes[:1], axes[:1].expand(count, -1), tau).item(), math.log(1 + count * math.exp(2 / tau)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_queue_loss_equals_the_loops_and_ignores_lengths(tau):
    query, positive, negatives = drawn(5, 6), drawn(5, 6, seed=1), drawn(9, 6, seed=2)
    cosine = lambda a, b: float(a @ b / (a.norm() * b.norm()))
    total = 0.0
    for q, k in zip(query.double(), positive.double()):
        own = math.exp(cosine(q, k) / tau)
        total -= math.log(own / (own + sum(math.exp(cosine(q, n) / tau) for n in negatives.double())))
    torch.testing.assert_close(loss_of(query, positive, negatives, tau).item(), total / 5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_of(3 * query, 0.1 * positive, 7 * negatives, tau), loss_of(query, positive, negatives, tau))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss_of(query, positive, negatives[order], tau), loss_of(query, positive, negatives, tau))


def test_queue_loss_is_sound_at_the_edges_and_gives_keys_no_gradient():
    query, positive, negatives = (drawn(2, 8, seed=s).requires_grad_() for s in range(3))
    loss = loss_of(query, positive, negatives, 0.01)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(query.grad).all()
    assert positive.grad is None and negatives.grad is None
    assert torch.isfinite(loss_of(torch.zeros(2, 8), torch.zeros(2, 8), drawn(3, 8), 0.01))


def test_queue_loss_in_bf16_is_computed_in_float32():
    query, positive, negatives = drawn(16, 32), drawn(16, 32, seed=1), drawn(64, 32, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss_of(query, positive, negatives, 0.05)
    torch.testing.assert_close(rough, loss_of(query, positive, negatives, 0.05), rtol=1e-6, atol=1e-6)


# The queue

@pytest.mark.parametrize("length, batch", [(7, 3), (6, 3), (4, 4), (3, 5), (1, 2)])
def test_first_in_first_out_for_any_batch(length, batch):
    queue, came = KeyQueue(length, 1), []
    start = queue.keys().clone()
    for step in range(5):
        keys = torch.arange(step * batch, (step + 1) * batch, dtype=torch.float32)[:, None]
        queue.offer(keys[None])
        queue.push()
        came = keys.flatten().tolist() + came
        expected = (came + start.flatten().tolist())[:length]
        assert queue.keys().flatten().tolist() == expected
    queue.push()
    assert queue.keys().flatten().tolist() == expected, "nothing was offered"


def test_a_queue_begins_with_directions_and_survives_saving():
    queue = KeyQueue(50, 8)
    torch.testing.assert_close(queue.keys().norm(dim=1), torch.ones(50))
    assert queue.keys().mean(0).abs().max() < 0.3
    queue.offer(drawn(1, 3, 8)), queue.push()
    other = KeyQueue(50, 8)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys(), queue.keys())
    with pytest.raises(ValueError, match="at least 1"):
        KeyQueue(0, 8)


# The slow copy

def test_averages_are_exact():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    slow = SlowCopy(network)
    old = {k: v.clone() for k, v in slow.network.state_dict().items()}
    with torch.no_grad():
        for p in network.parameters():
            p.add_(drawn(*p.shape))
    network[1].running_mean.add_(3.0), network[1].running_var.mul_(5.0), network[1].num_batches_tracked.fill_(5000)
    slow.follow(network, 0.99)
    for k, new in network.state_dict().items():
        if new.is_floating_point():
            torch.testing.assert_close(slow.network.state_dict()[k], 0.99 * old[k] + 0.01 * new)
    assert all(not p.requires_grad for p in slow.parameters()) and all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_statistics_begin_as_the_plain_average(momentum):
    slow, student, seen = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2), []
    for step in range(1, 6):
        student.running_mean.copy_(drawn(2, seed=step)), student.running_var.copy_(drawn(2, seed=50 + step).square())
        student.num_batches_tracked.fill_(step)
        move_statistics(slow, student, momentum)
        seen.append((student.running_mean.clone(), student.running_var.clone()))
    torch.testing.assert_close(slow.running_mean, torch.stack([m for m, _ in seen]).mean(0))
    torch.testing.assert_close(slow.running_var, torch.stack([v for _, v in seen]).mean(0))


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_keys_do_not_know_their_mates_and_get_no_gradient(name):
    method, x = small(name, dim=8, queue=4).train(), drawn(4, 1, 16, 16)
    assert not any(m.training for m in [*method.key_encoder.modules(), *method.key_head.modules()]) and method.encoder.training
    method.eval(), method.train()
    assert not method.key_encoder.training
    with torch.no_grad():
        for slow in (method.key_encoder, method.key_head):
            for p in slow.parameters():
                p.add_(0.05 * drawn(*p.shape))
    other = torch.cat([x[:1], drawn(5, 1, 16, 16, seed=3)])
    torch.testing.assert_close(method.keys_of(x)[0], method.keys_of(other)[0])
    before = {k: v.clone() for k, v in method.key_encoder.state_dict().items()}
    method(ask(method, x))["loss"].backward()
    assert all(p.grad is None for p in [*method.key_encoder.parameters(), *method.key_head.parameters()])
    assert all(p.grad is not None for p in [*method.encoder.parameters(), *method.head.parameters()])
    assert all(torch.equal(v, before[k]) for k, v in method.key_encoder.state_dict().items()), "forward moved the slow copy"


def test_this_batch_becomes_negatives_only_after_the_step():
    method, x = small("moco_v2", dim=8, queue=6).train(), drawn(4, 1, 16, 16)
    pretext, start = ask(method, x), method.queue.keys().clone()
    keys = method.keys_of(pretext.views[1])
    first = method(pretext)["loss"]
    assert torch.equal(method.queue.keys(), start)
    logits = queue_logits(method.head(method.embed(pretext.views[0])), keys, start, method.temperature)
    torch.testing.assert_close(first, F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)))
    method.after_step(0.5)
    torch.testing.assert_close(method.queue.keys(), torch.cat([keys, start[:2]]))
    method.eval()(pretext), method.after_step(0.6)
    torch.testing.assert_close(method.queue.keys(), torch.cat([keys, start[:2]])), "a look without training fills no queue"


def test_a_constant_ends_at_guessing():
    method, black = small("moco_v1", dim=8, queue=12), Pretext((torch.zeros(4, 1, 16, 16),) * 2)
    with torch.no_grad():
        for _ in range(3):
            method(black), method.queue.push()
        torch.testing.assert_close(method(black)["loss"].item(), math.log(13), rtol=1e-5, atol=1e-5)


def test_defaults_are_the_papers():
    one, two = small("moco_v1"), small("moco_v2")
    assert (one.temperature, two.temperature, one.momentum, two.momentum) == (0.07, 0.2, 0.999, 0.999)
    assert one.queue.keys().shape == (4096, 128) and isinstance(one.head, torch.nn.Linear)
    assert [type(m).__name__ for m in two.head] == ["Linear", "ReLU", "Linear"]
    blurred = [ask(m, drawn(64, 1, 16, 16)).drawn["first"]["sigma"].max() > 0 for m in (one, two)]
    assert blurred == [False, True]


# CPC

@pytest.mark.parametrize("space, grid, overlap", [((48, 48), 7, 0.5), ((50, 61), 7, 0.5), ((33, 40), 3, 0.5), ((17, 16, 21), 4, 0.0), ((31, 30, 29), 4, 0.25), ((256, 256), 7, 0.5)])
def test_predicted_rows_share_no_voxel_with_the_context(space, grid, overlap):
    cell, side = patch_side(space, grid, overlap, 0.0, 1)
    starts = grid_starts(space, grid, cell).view(*[grid] * len(space), len(space))
    assert starts.amin() == 0 and cell == side
    for axis, n in enumerate(space):
        along = starts.movedim(axis, 0)[..., axis].flatten(1)[:, 0]
        assert along[-1] + cell == n, "the grid does not reach the edge"
        for k in rows_down(grid, overlap, grid):
            assert (along[k:] - along[:-k] >= cell).all()


def test_grid_is_the_papers():
    assert patch_side((256, 256), 7, 0.5, 1 / 16, 1) == (64, 60)
    assert patch_side((128, 128, 128), 4, 0.0, 0.0, 1) == (32, 32)
    assert small("cpc").downs == [2, 3, 4, 5] and small("cpc", 3).downs == [1, 2, 3]
    assert small("cpc").grid == 7 and small("cpc", 3).grid == 4


@pytest.mark.parametrize("d", [2, 3])
def test_patches_come_from_their_cells(d):
    method, n = small("cpc", d, grid=3, overlap=0.5, jitter=0.25, views={"scale": (1, 1), "ratio": (1, 1), "degrees": 0, "p": (0, 0, 0)}), 16
    x = drawn(2, 1, *[n] * d)
    pretext = ask(method, x)
    tiles, starts = cut_tiles(pretext.views[0], 3), pretext.drawn["starts"]
    x = (x - x.flatten(1).mean(1).view(-1, *[1] * (d + 1))) / x.flatten(1).std(1, correction=0).view(-1, *[1] * (d + 1))
    for b, t in itertools.product(range(2), range(3**d)):
        cut = x[b][(slice(None), *(slice(s, s + 6) for s in starts[b, t].tolist()))]
        torch.testing.assert_close(tiles[b, t], cut, atol=1e-4, rtol=1e-4)
    corner = grid_starts((n,) * d, 3, 8)
    assert (starts >= corner).all() and (starts <= corner + 2).all()


@pytest.mark.parametrize("d", [2, 3])
def test_context_sees_its_row_and_above(d):
    torch.manual_seed(0)
    context, codes = Context(d, 5, 6), drawn(2, 5, *[5] * d).requires_grad_()
    context(codes)[(0, slice(None), 2, *[2] * (d - 1))].sum().backward()
    seen = codes.grad.abs().sum(1)
    assert (seen[1] == 0).all(), "another image"
    assert (seen[0, 3:] == 0).all(), "below"
    beside = seen[0, :3]
    for axis in range(1, d):
        assert (beside.movedim(axis, 0)[[0, 4]] == 0).all()
    assert beside.count_nonzero() == 3 * 3 ** (d - 1)


@pytest.mark.parametrize("d", [2, 3])
def test_a_lower_patch_changes_no_guess_above(d):
    method = small("cpc", d, norm="group", grid=3, overlap=0.5, dim=8, hidden=8)
    view = ask(method, drawn(2, 1, *[16] * d)).views[0]
    side = view.shape[2] // 3
    other = view.clone()
    other[:, :, 2 * side :] = drawn(*other[:, :, 2 * side :].shape, seed=4)
    a, b = (method.context(method.codes_of(v)) for v in (view, other))
    torch.testing.assert_close(a[:, :, :2], b[:, :, :2])
    assert not torch.allclose(a[:, :, 2], b[:, :, 2])
    for (k, one), (_, two) in zip(method.guesses(method.codes_of(view)), method.guesses(method.codes_of(other))):
        torch.testing.assert_close(one, two)


def test_batch_norm_would_leak():
    "The reason for norm='group': with batch statistics, a lower patch changes the codes above."
    method = small("cpc", grid=3, overlap=0.5, dim=8, hidden=8).train()
    view = ask(method, drawn(2, 1, 16, 16)).views[0]
    other = view.clone()
    other[:, :, 2 * view.shape[2] // 3 :] = 0.0
    assert (method.codes_of(view)[:, :, 0] - method.codes_of(other)[:, :, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("down", [1, 2])
def test_row_loss_equals_the_loops(down):
    codes, predicted = drawn(2, 3, 4, 3), drawn(2, 3, 4 - down, 3, seed=1)
    total, count = 0.0, 0
    everyone = [codes[b, :, i, j].double() for b, i, j in itertools.product(range(2), range(4), range(3))]
    for b, i, j in itertools.product(range(2), range(4 - down), range(3)):
        guess = predicted[b, :, i, j].double()
        total -= float(guess @ codes[b, :, i + down, j].double()) - math.log(sum(math.exp(guess @ z) for z in everyone))
        count += 1
    logits, right = row_logits(predicted, codes, down)
    torch.testing.assert_close(answered(logits, right)["loss"].item(), total / count, rtol=1e-5, atol=1e-5)
    assert torch.equal(patch_rows(codes)[right], patch_rows(codes[:, :, down:]))


def test_row_scores_in_bf16_are_computed_in_float32():
    codes, predicted = drawn(2, 32, 4, 4), drawn(2, 32, 2, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = row_logits(predicted, codes, 2)[0]
    torch.testing.assert_close(rough, row_logits(predicted, codes, 2)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [2, 3])
def test_chance_is_the_logarithm_of_all_patches(d):
    method = small("cpc", d, grid=3, overlap=0.5, dim=8, hidden=8)
    side = patch_side([16] * d, 3, 0.5, 1 / 16, 1)[1]
    black = Pretext((torch.zeros(2, 1, *[3 * side] * d),))
    with torch.no_grad():
        torch.nn.init.normal_(method.code.bias), torch.nn.init.normal_(method.context.beside.bias, std=3.0)  # biases alone do not help
        torch.testing.assert_close(method(black)["loss"].item(), math.log(2 * 3**d), rtol=1e-5, atol=1e-5)


def test_longer_images_and_several_channels():
    torch.manual_seed(0)
    method = create("cpc", create_encoder("resnet18", 2, 2, width=4, stem="small"), grid=3, dim=8, hidden=8)
    pretext = ask(method, drawn(2, 2, 16, 24))
    assert pretext.views[0].shape[:2] == (2, 2) and torch.isfinite(method(pretext)["loss"])


@pytest.mark.parametrize("make, said", [
    (lambda: small("cpc", grid=2), "no row to predict"),
    (lambda: small("cpc", reach=1), "no row to predict"),
    (lambda: small("cpc", overlap=1.0), "shares of a patch"),
    (lambda: small("cpc").pretext(drawn(2, 1, 6, 6)), "at least 8 voxels"),
    (lambda: small("moco_v1", queue=0), "at least 1"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_copy_trains_alike():
    "What moves without a gradient is part of the state: a loaded method goes on to the same loss."
    method, x = small("moco_v2", dim=8, queue=6).train(), drawn(4, 1, 16, 16)
    method(ask(method, x)), method.after_step(0.1)
    other = copy.deepcopy(small("moco_v2", dim=8, queue=6)).train()
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(other(ask(other, x, 1))["loss"], method(ask(method, x, 1))["loss"])
