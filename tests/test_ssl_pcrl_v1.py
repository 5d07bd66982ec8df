"PCRLv1: turns, gate, mixtures and the seven terms, each by itself and by loops."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_methods import asked, drawn, method_of

from medssl_nb.ssl.base import Pretext
from medssl_nb.ssl.pcrl_v1 import Gate, gated, mixed_maps, random_code, turned


def codes(d):
    "Every code of d dimensions, (2**d * 4, d + 4)."
    flips = np.array(np.meshgrid(*[[0, 1]] * d)).reshape(d, -1).T
    return torch.tensor([[*row, *(int(k == turn) for k in range(4))] for row in flips for turn in range(4)], dtype=torch.float32)


@pytest.mark.parametrize("d", [2, 3])
def test_a_turn_is_flips_and_a_quarter_turn_of_the_last_plane(d):
    every = codes(d)
    x = drawn(len(every), 2, *(5,) * d)
    for image, code, found in zip(x.numpy(), every.numpy().astype(int), turned(x, every).numpy()):
        image = np.flip(image, [1 + axis for axis in range(d) if code[axis]])
        np.testing.assert_array_equal(found, np.rot90(image, code[d:].argmax(), (-2, -1)))


def test_a_plane_that_is_no_square_is_turned_by_half_or_not_at_all():
    every = codes(2)
    x = drawn(len(every), 1, 4, 6)
    for image, code, found in zip(x.numpy(), every.numpy().astype(int), turned(x, every).numpy()):
        image = np.flip(image, [1 + axis for axis in range(2) if code[axis]])
        np.testing.assert_array_equal(found, np.rot90(image, 2 * (code[2:].argmax() // 2), (-2, -1)))


@pytest.mark.parametrize("d", [2, 3])
def test_random_codes_are_fair(d):
    code = random_code(torch.zeros(4000, 1, *(2,) * d), torch.Generator().manual_seed(0))
    assert code.shape == (4000, d + 4) and torch.equal(code[:, d:].sum(1), torch.ones(4000)) and set(code.unique().tolist()) == {0.0, 1.0}
    assert (code[:, :d].mean(0) - 0.5).abs().max() < 0.05 and (code[:, d:].mean(0) - 0.25).abs().max() < 0.05


def test_the_gate_multiplies_the_deepest_map_alone():
    torch.manual_seed(0)
    factors = Gate(2, 3)(codes(2)[:2])
    maps = [drawn(2, 2, 4, 4), drawn(2, 3, 2, 2)]
    found = gated(maps, factors)
    assert found[0] is maps[0] and 0 < factors.min() and factors.max() < 1
    torch.testing.assert_close(found[1][1, 2], maps[1][1, 2] * factors[1, 2])
    assert gated(maps, None) is maps


def test_mixed_maps_by_hand():
    found = mixed_maps([torch.full((2, 1, 1, 1), 8.0)], [torch.full((2, 1, 1, 1), 4.0)], torch.tensor([0.75, 0.5]))
    assert found[0].flatten().tolist() == [7.0, 6.0]


def info_nce(query, key, queue, temperature):
    "The loss of one query, by loops."
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())
    scores = [cosine(query, key), *(cosine(query, old) for old in queue)]
    return math.log(sum(math.exp(s / temperature) for s in scores)) - scores[0] / temperature


@pytest.mark.parametrize("d", [2, 3])
def test_the_seven_terms_by_loops(d):
    method = method_of("pcrl_v1", d).eval()
    with torch.no_grad():
        for p in method.key_encoder.parameters():
            p.mul_(0.9)  # another network than the query's
        pretext = asked(method, drawn(4, 1, *(16,) * d))
        terms = method(pretext)
        x1, x2, c1, c2 = (list(v.split(1)) for v in pretext.views)
        pool = lambda maps: maps[-1].flatten(2).mean(-1)[0]
        contrast, errors = [], []
        for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
            row, n = pretext.target[i : i + 1], d + 4
            codes, (share, alpha, beta) = (row[:, :n], row[:, n : 2 * n]), row[0, 2 * n :].tolist()
            blend = lambda pair: share * pair[i] + (1 - share) * pair[j]
            maps, mix, slow, slow_mix = method.encoder(x1[i]), method.encoder(blend(x1)), method.key_encoder(x2[i]), method.key_encoder(blend(x2))
            head = lambda m, network: network(pool(m)[None])[0]
            query, mixed_query = head(maps, method.head), head(mix, method.head)
            key, mixed_key = head(slow, method.key_head), head(slow_mix, method.key_head)
            partner = head(method.key_encoder(x2[j]), method.key_head)
            both_keys = share * key / key.norm() + (1 - share) * partner / partner.norm()
            contrast += [info_nce(q, k, method.queue.keys(), method.temperature) for q, k in ((query, key), (mixed_query, mixed_key), (mixed_query, both_keys))]
            gate = [method.gate(code)[0].view(-1, *[1] * d) for code in codes]
            mine, theirs = [*maps[:-1], maps[-1] * gate[0]], [*slow[:-1], slow[-1] * gate[1]]
            between = lambda a, b, weight: [weight * p + (1 - weight) * q for p, q in zip(a, b)]
            t1, t2, g1, g2 = turned(x1[i], codes[0]), turned(x2[i], codes[1]), blend(c1), blend(c2)
            for given, wanted in ((mine, t1), (between(mine, theirs, alpha), alpha * t1 + (1 - alpha) * t2),
                                  (mix, g1), (between(mix, slow_mix, beta), beta * g1 + (1 - beta) * g2)):
                errors.append(F.mse_loss(method.paint(given, x1[i].shape[2:]), wanted).item())
    assert abs(terms["contrast"].item() - np.mean(contrast)) < 1e-4
    assert abs(terms["restoration"].item() - np.mean(errors)) < 1e-4
    assert abs(terms["loss"].item() - np.mean(contrast) - np.mean(errors)) < 2e-4


def test_with_all_of_the_share_the_second_view_asks_for_nothing():
    method = method_of("pcrl_v1", 2).eval()
    pretext = asked(method, drawn(4, 1, 16, 16))
    whole = torch.cat([pretext.target[:, :-2], torch.ones(4, 2)], 1)
    other = (pretext.views[0], drawn(4, 1, 16, 16, seed=5), pretext.views[2], drawn(4, 1, 16, 16, seed=6))
    a, b = (method(Pretext(views, whole))["restoration"] for views in (pretext.views, other))
    assert torch.equal(a, b)
    assert not torch.equal(method(Pretext(other, pretext.target))["restoration"], method(pretext)["restoration"])


@pytest.mark.parametrize("d", [2, 3])
def test_a_constant_picture_does_not_restore(d):
    "Views and clean images have variance 1, so the best constant pays most of it."
    method = method_of("pcrl_v1", d)
    pretext = asked(method, drawn(8, 1, *(16,) * d))
    for bias in (-1.0, 0.0, 1.0):
        torch.nn.init.zeros_(method.painter.weight)
        torch.nn.init.constant_(method.painter.bias, bias)
        assert method(pretext)["restoration"] > 0.6


def test_another_code_gives_another_picture_of_the_same_map():
    method = method_of("pcrl_v1", 2).eval()
    maps = method.encoder(drawn(1, 1, 16, 16))
    pictures = [method.paint(gated(maps, method.gate(code[None])), (16, 16)) for code in codes(2)[:4]]
    assert len({round(p.sum().item(), 4) for p in pictures}) == 4
