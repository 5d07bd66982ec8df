"Taleb et al.'s five tasks: the equations by loops, who may see whom, and which shortcuts stay closed."
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import Pretext, create
from medssl_nb.ssl.places import choose_permutations, cut_tiles, hamming
from medssl_nb.ssl.pyramid import Pyramid, PyramidCPC, other_places, pair_terms, pyramid, reflected
from medssl_nb.ssl.triplet import ExemplarTriplet, batch_negatives, exemplar_view, hard_table, triplet_terms, unit_distance
from medssl_nb.train.fit import fit


def encoder(d, seed=0, norm="group"):
    torch.manual_seed(seed)
    return create_encoder("resnet18", d, width=4, stem="small", norm=norm)


def volumes(n, side=16, d=3, seed=0):
    return torch.randn(n, 1, *[side] * d, generator=torch.Generator().manual_seed(seed))


# The pyramid

def test_pyramids_of_the_paper():
    seen = pyramid((1, 2, 1), grid=4)
    assert len(seen) == 10 and seen[-1] == (1, 2, 1) and set(seen[:9]) == set(itertools.product([0], [1, 2, 3], [0, 1, 2]))
    assert pyramid((1, 2), grid=5) == [(0, 1), (0, 2), (0, 3), (1, 2)]
    assert len(pyramid((3, 1, 1), grid=4, height=4)) == 1 + 9 + 25 + 49
    assert pyramid((0, 3, 3), grid=4) == [(0, 3, 3)]


def test_edges_are_mirrored_like_pytorch_pads():
    row = torch.arange(5.0).view(1, 1, 5)
    padded = F.pad(row, (4, 4), mode="reflect").flatten().tolist()
    assert [reflected(k, 5) for k in range(-4, 9)] == padded


@pytest.mark.parametrize("d, grid, height", [(2, 5, 2), (2, 4, 4), (3, 3, 2), (3, 4, 3)])
def test_fast_contexts_equal_a_gru_place_by_place(d, grid, height):
    torch.manual_seed(0)
    context, codes = Pyramid(d, grid, height, 3, 4).double(), torch.randn(2, 3, *[grid] * d, dtype=torch.double)
    gru = torch.nn.GRUCell(3, 4).double()
    gru.load_state_dict(context.reader.state_dict())
    found = context(codes)
    for image, place in itertools.product(range(2), itertools.product(range(grid), repeat=d)):
        state = torch.zeros(1, 4, dtype=torch.double)
        for seen in pyramid(place, grid, height):
            state = gru(codes[(image, slice(None), *seen)][None], state)
        torch.testing.assert_close(found[(image, slice(None), *place)], state[0])


def test_context_never_looks_down_nor_beyond_the_pyramid():
    context, codes = Pyramid(3, 4, 3, 2, 3), torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    context(codes)[0, :, 2, 1, 1].sum().backward()
    seen = codes.grad.abs().sum(1)[0] > 0
    assert {tuple(p) for p in seen.nonzero().tolist()} == set(pyramid((2, 1, 1), 4, 3))


@pytest.mark.parametrize("d, downs, patch", [(2, [2, 3], 8), (3, [1, 2], 7)])
def test_defaults_are_the_paper_s(d, downs, patch):
    method = PyramidCPC(encoder(d))
    assert method.downs == downs and method.grid == {2: 5, 3: 4}[d] and len(method.predictors) == 2
    view = method.pretext(volumes(1, {2: 27, 3: 32}[d], d)).views[0]
    assert view.shape[-1] == method.grid * patch  # 7/8 of a cell of 32 / 4; 27 pixels hold five cells of 9, half over each other


def test_info_nce_of_the_pyramid_by_loops():
    "Equation 1 with a sum of exponentials, over all places i, j, k and all steps l."
    method = PyramidCPC(encoder(3), grid=3, dim=5, hidden=6).double()
    view = method.float().pretext(volumes(2)).views[0]
    method, view = method.double(), view.double()
    codes = method.codes_of(view).detach()
    contexts = method.context(codes).detach()
    everyone = [codes[(b, slice(None), *p)] for b in range(2) for p in itertools.product(range(3), repeat=3)]
    means = []
    for k, predictor in zip(method.downs, method.predictors):
        costs = []
        for b, place in itertools.product(range(2), itertools.product(range(3), repeat=3)):
            if place[0] + k < 3:
                guess = predictor(contexts[(b, slice(None), *place)]).detach()
                right = codes[(b, slice(None), place[0] + k, *place[1:])]
                costs.append(-math.log(math.exp(guess @ right) / sum(math.exp(guess @ z) for z in everyone)))
        means.append(sum(costs) / len(costs))
    torch.testing.assert_close(method(Pretext((view,)))["loss"].item(), sum(means) / len(means), rtol=1e-9, atol=1e-9)


def test_pairs_by_loops():
    torch.manual_seed(0)
    codes, guess = torch.randn(2, 5, 3, 3, dtype=torch.double), torch.randn(2, 5, 2, 3, dtype=torch.double)
    other = other_places(codes, 9, torch.Generator().manual_seed(1))
    cost, right = [], []
    for b, row, column in itertools.product(range(2), range(2), range(3)):
        place = (row + 1) * 3 + column
        score = lambda p: sum(guess[b, c, row, column] * codes[b, c, p // 3, p % 3] for c in range(5)) / 5
        yes, no = 1 / (1 + math.exp(-score(place))), 1 / (1 + math.exp(-score(int(other[b, place]))))
        cost += [-math.log(yes), -math.log(1 - no)]
        right += [yes > 0.5, no < 0.5]
    terms = pair_terms(guess, codes, other, 1)
    torch.testing.assert_close(terms["loss"].item(), sum(cost) / len(cost))
    assert terms["accuracy"].item() == pytest.approx(sum(right) / len(right))


def test_the_offered_patch_is_another_one_and_all_others_occur():
    other = other_places(torch.zeros(3000, 1, 4, 4), 8, torch.Generator().manual_seed(0))
    assert (other != torch.arange(8)).all()
    share = F.one_hot(other, 8).float().mean(0) * (1 - torch.eye(8))
    assert (share + torch.eye(8) / 7 - 1 / 7).abs().max() < 0.03


@pytest.mark.parametrize("d", [2, 3])
def test_pairwise_is_complete(d):
    method = PyramidCPC(encoder(d), grid=3, dim=8, hidden=8, pairwise=True)
    asked = method.pretext(volumes(3, 24, d), torch.Generator().manual_seed(0))
    assert asked.target.shape == (3, 3**d)
    terms = method(asked)
    terms["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(method(asked)["loss"] - terms["loss"]) < 0.05
    blind = method(Pretext((torch.zeros_like(asked.views[0]),), asked.target))
    assert blind["loss"] >= math.log(2) - 1e-6  # one code for all: no answer is better than a coin


@pytest.mark.parametrize("options, said", [({"height": 5}, "5 rows"), ({"height": 0}, "0 rows"), ({"steps": 0}, "at least one"), ({"overlap": 1.0}, "share")])
def test_pyramid_mistakes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        create("cpc_pyramid", encoder(3), **options)


# The triplet

def triplets(b, seed=0, dim=6):
    z = F.normalize(torch.randn(2, b, dim, dtype=torch.double, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return z[0], z[1]


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_equation_3_by_loops(margin):
    anchor, positive = triplets(5)
    cost, right = [], []
    for i, j in itertools.permutations(range(5), 2):
        near = sum((a - b) ** 2 for a, b in zip(anchor[i], positive[i])) ** 0.5
        far = sum((a - b) ** 2 for a, b in zip(anchor[i], anchor[j])) ** 0.5
        cost.append(max(0.0, float(near - far) + margin))
        right.append(float(near < far))
    near, far = unit_distance((anchor * positive).sum(1, keepdim=True)), unit_distance(anchor @ anchor.T)
    terms = triplet_terms(near, far, 1 - torch.eye(5), margin)
    assert terms["loss"].item() == pytest.approx(sum(cost) / 20, abs=1e-6) and terms["accuracy"].item() == pytest.approx(sum(right) / 20)


def test_method_uses_all_others_of_the_batch():
    method, x = ExemplarTriplet(encoder(3), dim=8), volumes(4)
    asked = method.pretext(x, torch.Generator().manual_seed(0))
    z = [F.normalize(method.code(method.embed(v)), dim=1).detach() for v in asked.views]
    cost = [max(0.0, float((z[0][i] - z[1][i]).norm() - (z[0][i] - z[0][j]).norm()) + 1) for i, j in itertools.permutations(range(4), 2)]
    assert method(asked)["loss"].item() == pytest.approx(sum(cost) / 12, abs=1e-4)


def test_scale_of_the_head_does_not_matter_and_biases_cannot_cheat():
    method, x = ExemplarTriplet(encoder(2), dim=8), volumes(4, 16, 2)
    asked = method.pretext(x, torch.Generator().manual_seed(0))
    before = method(asked)["loss"]
    with torch.no_grad():
        method.code.weight.mul_(7), method.code.bias.mul_(7)
    torch.testing.assert_close(method(asked)["loss"], before, rtol=1e-4, atol=1e-4)
    torch.nn.init.zeros_(method.code.weight)
    for seed in range(3):  # whatever the biases are, without the image the margin is what it costs
        torch.nn.init.normal_(method.code.bias, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(method(asked)["loss"], torch.tensor(1.0))


def test_equal_embeddings_have_a_finite_gradient():
    z = F.normalize(torch.ones(3, 4), dim=1).requires_grad_()
    near, far = unit_distance((z * z.detach()).sum(1, keepdim=True)), unit_distance(z @ z.T)
    triplet_terms(near, far, 1 - torch.eye(3))["loss"].backward()
    assert torch.isfinite(z.grad).all()


def test_hard_table_by_loops():
    z = F.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = [i // 3 for i in range(30)]
    table = hard_table(z, groups, 4)
    for i in range(30):
        others = sorted((j for j in range(30) if groups[j] != groups[i]), key=lambda j: float((z[i] - z[j]).norm()))
        assert table[i].tolist() == others[:4]
    assert hard_table(z, groups, 100).shape == (30, 27)
    assert len(hard_table(F.normalize(torch.randn(2000, 3), dim=1), list(range(2000)), 2)) == 2000
    with pytest.raises(ValueError, match="one patient"):
        hard_table(z, ["a"] * 30, 4)


@pytest.mark.parametrize("kind, anchor", [("set", "original"), ("hard", "original"), ("hard", "copy")])
def test_negatives_of_the_whole_set(kind, anchor):
    images = ImageSet(volumes(12, 16, 2), groups=[i // 2 for i in range(12)])
    whole = images.stack().x
    method = ExemplarTriplet(encoder(2), dim=8, negatives=kind, nearest=3, anchor=anchor)
    assert len(method.pretext(next(images.batches(4))).views) == 2  # no set yet: the batch
    method.eval().refresh(images)
    with torch.no_grad():
        z = F.normalize(method.code(method.embed(whole)), dim=1)
    assert kind == "set" or torch.equal(method.table, hard_table(z, images.groups, 3))
    generator, seen = torch.Generator().manual_seed(0), set()
    for batch in itertools.islice(images.batches(4), 60):
        asked = method.pretext(batch, generator)
        negative = asked.drawn["negative"]
        assert (negative != batch.index).all() and torch.equal(asked.views[2], whole[negative])
        assert kind == "set" or (negative // 2 != batch.index // 2).all()
        seen |= {(int(i), int(j)) for i, j in zip(batch.index, negative)}
    assert len(seen) > (100 if kind == "set" else 30)
    o, c, n = (F.normalize(method.code(method.embed(v)), dim=1) for v in asked.views)
    slow = ((o - c).norm(dim=1) - ((c if anchor == "copy" else o) - n).norm(dim=1) + 1).clamp_min(0).mean()
    torch.testing.assert_close(method(asked)["loss"], slow, rtol=1e-3, atol=1e-3)


def test_roles_of_the_code_and_of_the_paper():
    "With all copies in one heap the equation's triplets are in order; with the copy as anchor the margin is what it costs."
    ring = F.normalize(torch.eye(8) - 1 / 8, dim=1)
    original = torch.cat([torch.full((8, 1), 0.6), 0.8 * ring], 1)
    heap = torch.eye(9)[:1].expand(8, 9)
    near = unit_distance((original * heap).sum(1, keepdim=True))
    paper, code = (triplet_terms(near, *batch_negatives(anchor, original)) for anchor in (original, heap))
    assert paper["accuracy"] == 1 and paper["loss"] < 0.75
    assert abs(code["loss"] - 1) < 1e-5


def test_a_killed_run_with_hard_negatives_goes_on(tmp_path):
    images, settings = ImageSet(volumes(12, 16, 2)), dict(steps=6, batch_size=4, device="cpu", precision="fp32", progress=False, checkpoint_every=2)
    make = lambda: ExemplarTriplet(encoder(2), dim=8, negatives="hard", relist_every=4)
    whole, killed = make(), make()
    fit(whole, images, **settings)

    def kill(step, model):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(killed, images, checkpoint=tmp_path / "run.safetensors", on_step=kill, **settings)
    again = make()
    fit(again, images, checkpoint=tmp_path / "run.safetensors", **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("d", [2, 3])
def test_exemplar_view_changes_what_it_says(d):
    x = volumes(400, 8, d)
    view, drawn = exemplar_view(x, torch.Generator().manual_seed(0))
    assert (drawn["flips"].float().mean(0) - 0.5).abs().max() < 0.1
    still = (drawn["matrix"] == torch.eye(d, d + 1)).flatten(1).all(1).float().mean()
    assert abs(still - 0.25) < 0.08 and abs((drawn["factor"] == 1).float().mean() - 0.5) < 0.1
    untouched, _ = exemplar_view(x, p=(0.0, 0.0, 0.0))
    assert torch.equal(untouched, x) and not torch.equal(view, x)


def test_triplet_mistakes_are_named():
    with pytest.raises(ValueError, match="'batch', 'set' or 'hard'"):
        create("exemplar_triplet", encoder(2), negatives="best")
    method = ExemplarTriplet(encoder(2), dim=8)
    with pytest.raises(ValueError, match="at least 2"):
        method(method.pretext(volumes(1, 16, 2)))


# The other three, as the paper counts

def test_classes_of_the_tasks():
    assert create("rotation", encoder(3)).classes == 10 and create("rotation", encoder(2)).classes == 4
    assert len(create("relative_location", encoder(3)).steps) == 26 and len(create("relative_location", encoder(2)).steps) == 8
    assert create("jigsaw", encoder(3)).orders.shape == (100, 27) and create("jigsaw", encoder(2)).orders.shape == (100, 9)


def test_relative_location_with_the_patches_of_the_paper():
    method = create("relative_location", create_encoder("resnet18", 3, width=4, stem="small"), patch=39 / 128, gap=3 / 39, jitter=1 / 39)
    asked = method.pretext(torch.zeros(64, 1, 128, 128, 128)[:2], torch.Generator().manual_seed(0))
    assert asked.views[0].shape[-1] == 39
    away = asked.drawn["starts"].diff(dim=1)[:, 0] - method.steps[asked.target] * 42
    assert away.abs().max() <= 2  # a gap of 1 to 5 voxels


def test_jigsaw_with_the_tiles_of_the_paper():
    method = create("jigsaw", create_encoder("resnet18", 3, width=4, stem="small"), gap=3 / 42)
    asked = method.pretext(torch.zeros(1, 1, 128, 128, 128), torch.Generator().manual_seed(0))
    assert cut_tiles(asked.views[0], 3).shape[-1] == 39


def test_orders_of_27_lie_far_apart():
    chosen = choose_permutations(100, 27)
    distances = hamming(chosen, chosen)[~torch.eye(100, dtype=torch.bool)]
    assert distances.min() >= 23  # the list that the published code loads has 19
