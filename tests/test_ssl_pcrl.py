"PCRLv2: the paper's equations and crops, evaluated literally with loops."
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.nets.base import create_encoder
from medssl_nb.nets.unet import Decoder, UNet
from medssl_nb.ssl.base import create
from medssl_nb.ssl.pcrl import SIZES, box_overlap, clean_views, comparison_loss, draw_crops, feature_pyramid, levels_of, place_boxes, random_sides, spoil
from medssl_nb.train.weights import transfer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(spatial_dims=2, channels=1, **options):
    torch.manual_seed(0)
    return create("pcrl_v2", create_encoder("resnet18", spatial_dims, channels, width=4), **{"local": 2, **options})


def images(spatial_dims=2, batch=4, channels=1, seed=1):
    return torch.randn(batch, channels, *[32] * spatial_dims, generator=generator(seed))


def at(method, levels):
    "The method with its step set to one that draws these levels."
    method.step = next(step for step in range(10_000) if method.scale_at(step) == levels)
    return method


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_comparison_is_equation_9_summed_over_pairs():
    v, p, w, q = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    w, q = w[:2], q[:2]
    slow = 0.0
    for k in range(3):
        for m in range(2):
            slow += sum(-0.5 * (cosine(v[k, b], q[m, b]) + cosine(p[k, b], w[m, b])) for b in range(5)) / 5
    torch.testing.assert_close(comparison_loss((v, p), (w, q)).item(), slow)


def test_comparison_has_no_gradient_into_the_vectors_and_none_from_length():
    v, p, w, q = (torch.randn(1, 4, 3, requires_grad=True) for _ in range(4))
    comparison_loss((v, p), (w, q)).backward()
    assert v.grad is None and w.grad is None and p.grad is not None and q.grad is not None
    torch.testing.assert_close(comparison_loss((7 * v, 0.1 * p), (3 * w, 9 * q)), comparison_loss((v, p), (w, q)))


def test_comparison_is_simsiam_s_with_one_view_each():
    from medssl_nb.ssl.distillation import both_ways

    v, p, w, q = torch.randn(4, 1, 5, 6)
    torch.testing.assert_close(comparison_loss((v, p), (w, q)), both_ways([p[0], q[0]], [v[0], w[0]]) / 4 - 1)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_loss_is_the_paper_s_equations_at_every_scale(spatial_dims):
    "Equations 2 to 10, one view, image and pair at a time; in inference mode, where batch norms see one image at a time."
    method = make(spatial_dims, channels=2).eval()
    pretext = method.pretext(images(spatial_dims, 2, channels=2), generator())
    for i in range(1, 6):
        with torch.no_grad():
            maps = [feature_pyramid(method.encoder, method.decoder, view)[i] for view in pretext.views]
            v = [method.norms[str(i)](m.flatten(2).mean(2)) for m in maps]
            p = [method.predictors[f"{i}-{i}"](a) for a in v]
        restored = [F.interpolate(method.heads[str(i)].layers(m), pretext.views[0].shape[2:], mode=("bilinear", "trilinear")[spatial_dims - 2]) for m in maps[:2]]
        R = sum((a - b).square().sum().item() / a.numel() for a, b in zip(restored, (pretext.target[:, 0], pretext.target[:, 1])))
        C = lambda a, b: sum(-0.5 * (cosine(v[a][n], p[b][n]) + cosine(p[a][n], v[b][n])) for n in range(2)) / 2
        terms = at(method, (i, i, i))(pretext)
        torch.testing.assert_close(terms["restoration"].item(), R, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(terms["comparison"].item(), C(0, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(terms["local"].item(), sum(C(k, m) for m in (0, 1) for k in (2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(terms["loss"], terms["restoration"] + terms["comparison"] + terms["local"])


def test_the_order_of_views_does_not_matter():
    method = make().eval()
    pretext = method.pretext(images(), generator())
    terms = method(pretext)
    first, second, *small = pretext.views
    pretext.views, pretext.target = (second, first, *small[::-1]), pretext.target.flip(1)
    for name, value in method(pretext).items():
        torch.testing.assert_close(value, terms[name], rtol=1e-4, atol=1e-5)


def test_pyramid_is_the_decoder_s_and_stops_where_asked():
    for name, options in (("resnet18", {"width": 4}), ("unet", {"width": 4, "levels": 3})):
        for skips in (True, False):
            torch.manual_seed(0)
            encoder = create_encoder(name, 2, **options)
            decoder, x = Decoder(encoder, skips=skips).eval(), images()
            whole = decoder(encoder.eval()(x), x.shape[2:])
            found = feature_pyramid(encoder, decoder, x)
            assert torch.equal(found[0], encoder(x)[-1]) and all(torch.equal(a, b) for a, b in zip(found[1:], whole, strict=True))
            assert len(feature_pyramid(encoder, decoder, x, 1)) == 2


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_recomputing_changes_neither_loss_nor_gradient_nor_running_statistics(spatial_dims):
    found = []
    for recompute in (False, True):
        method = make(spatial_dims, recompute=recompute)
        terms = method(method.pretext(images(spatial_dims), generator()))
        terms["loss"].backward()
        found.append([terms["loss"].detach(), *(p.grad for p in method.parameters()), *method.buffers()])
        assert all(m.momentum == 0.1 for m in method.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_overlap_by_counting_voxels():
    draw = random.Random(0)
    for _ in range(20):
        boxes = []
        for _ in range(2):
            start = [draw.randrange(6) for _ in range(3)]
            boxes.append([start, [s + draw.randrange(1, 6) for s in start]])
        inside = lambda box, p: all(a <= c < b for a, b, c in zip(*box, p))
        points = [(x, y, z) for x in range(12) for y in range(12) for z in range(12)]
        shared = sum(inside(boxes[0], p) and inside(boxes[1], p) for p in points)
        joint = sum(inside(boxes[0], p) or inside(boxes[1], p) for p in points)
        torch.testing.assert_close(box_overlap(*torch.tensor(boxes).float()).item(), shared / joint)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_sub_crop_by_its_three_rules(spatial_dims):
    x = torch.zeros(()).expand(300, 1, *[112, 112, 96][:spatial_dims])
    drawn = draw_crops(x, 6, "sub", 0.3, generator=generator())
    assert drawn["large"].shape == (300, 2, 2, spatial_dims) and drawn["small"].shape == (300, 6, 2, spatial_dims)
    for i in range(300):
        a, b = drawn["large"][i]
        assert box_overlap(a, b) > 0.3
        low = [min(a[0, axis], b[0, axis]) for axis in range(spatial_dims)]
        high = [max(a[1, axis], b[1, axis]) for axis in range(spatial_dims)]
        assert drawn["bounds"][i].tolist() == [[v.item() for v in low], [v.item() for v in high]]
        for box in drawn["small"][i]:
            assert all(low[axis] <= box[0, axis] < box[1, axis] <= high[axis] + 1e-4 for axis in range(spatial_dims))
    assert (drawn["large"] >= 0).all() and (drawn["large"][:, :, 1] <= torch.tensor(x.shape[2:]) + 1e-3).all()


def test_the_smallest_size_pairs_with_itself_alone():
    drawn = draw_crops(torch.zeros(()).expand(3000, 1, 112, 112, 96), 0, generator=generator())
    sides = (drawn["large"][:, :, 1] - drawn["large"][:, :, 0]).round().int().tolist()
    pairs = Counter(tuple(sorted(map(tuple, pair))) for pair in sides)
    small = (64, 64, 32)
    assert all(pair == (small, small) for pair in pairs if small in pair) and len(pairs) > 4


def test_an_overlap_that_none_reaches_gives_the_best_pair():
    x = torch.zeros(50, 1, 64, 64)
    best = draw_crops(x, 2, "sub", 0.999, generator=generator())["overlap"]
    any_pair = draw_crops(x, 2, "multi", generator=generator())["overlap"]
    assert torch.isfinite(best).all() and best.mean() > 0.6 > any_pair.mean()


def test_small_boxes_are_spread_evenly_over_the_bounds():
    bounds = torch.tensor([[[10.0], [30.0]]]).expand(4000, -1, -1)
    starts = place_boxes(bounds, torch.full((4000, 1, 1), 4.0), generator())[:, 0, 0, 0]
    assert abs(starts.mean() - 18) < 0.3 and starts.min() >= 10 and starts.max() <= 26
    assert place_boxes(bounds[:1], torch.full((1, 1, 1), 50.0)).tolist() == [[[[10.0], [30.0]]]]


def test_sizes_are_drawn_evenly():
    sides = random_sides(torch.zeros(()).expand(4000, 1, 112, 112, 96), 1, SIZES[3][1], generator()).round().int()[:, 0].tolist()
    counts = Counter(map(tuple, sides))
    assert set(counts) == {(8, 8, 8), (16, 16, 16), (32, 32, 16), (32, 32, 32)} and min(counts.values()) > 900


def test_a_clean_view_shows_its_box():
    "On a coordinate image every view's voxels hold their own place, whatever was turned or flipped."
    x = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="ij"))[None].expand(3, -1, -1, -1)
    boxes = torch.tensor([[8.0, 6.0], [16.0, 14.0]]).expand(3, 2, 2, 2)
    views, drawn = clean_views(x, boxes, (8, 8), (1,), 10.0, (0.9, 1.1), generator())
    offset = torch.arange(8) - 3.5
    for b in range(3):
        for n in range(2):
            for i in (0, 3, 7):
                for j in (0, 4, 7):
                    there = drawn["matrix"][b, n, :, :2] @ torch.stack([offset[i], offset[j]]) + drawn["matrix"][b, n, :, 2]
                    expected = there + torch.tensor([11.5, 9.5])
                    torch.testing.assert_close(views[b, n, :, i, j], expected, atol=2e-2, rtol=0)
    centre = views.mean((-1, -2))
    torch.testing.assert_close(centre, torch.tensor([11.5, 9.5]).expand(3, 2, 2), atol=0.05, rtol=0)
    assert any(drawn["matrix"][..., 1, 1].flatten() < 0) and not any(drawn["matrix"][..., 0, 0].flatten() < 0)


def test_large_views_are_the_spoiled_target_and_small_ones_are_never_swapped_or_holed():
    quiet = {"sigma": (0.0, 0.0), "noise": (0.0, 0.0), "log_gamma": 0.0, "swaps": 3, "holes": 2}
    method = make(3, spoiling=quiet)
    pretext = method.pretext(images(3, 2), generator())
    for n in range(2):
        clean = pretext.target[:, n]
        standard = (clean - clean.mean((2, 3, 4), keepdim=True)) / clean.std((2, 3, 4), correction=0, keepdim=True)
        same = ((pretext.views[n] - standard).abs() < 1e-4).float().mean()
        assert 0.7 < same < 0.999
    assert all(v.shape[2:] == (8, 8, 8) and (v == 0).float().mean() < 0.01 for v in pretext.views[2:])


def test_spoiling_by_nothing_is_standardising():
    x = 5 + 3 * images()
    y, _ = spoil(x)
    torch.testing.assert_close(y, (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True), atol=1e-4, rtol=0)


def test_scales_are_drawn_evenly_by_the_step_alone():
    method, other = make(), make()
    counts = Counter(method.scale_at(step)[0] for step in range(2000))
    assert set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) > 330
    assert [method.scale_at(s) for s in range(50)] == [other.scale_at(s) for s in range(50)]
    for _ in range(7):
        method.after_step(0.5)
    other.load_state_dict(method.state_dict())
    assert other.step == 7


@pytest.mark.parametrize("options, levels", [
    ({"scales": 1}, {(5, 0, 0)}), ({"scales": 3}, {(i, i, i) for i in (1, 3, 5)}),
    ({"comparison": "crossed", "scales": 2}, {(i, i, j) for i in (1, 5) for j in (1, 5)}),
])
def test_which_levels_the_ablations_draw(options, levels):
    method = make(**options)
    assert {method.scale_at(step) for step in range(200)} == levels


@pytest.mark.parametrize("options, terms", [
    ({"comparison": None}, {"restoration"}), ({"comparison": None, "scales": 1}, {"restoration"}),
    ({"restoration": False}, {"comparison", "local"}), ({"restoration": False, "scales": 1}, {"comparison", "local"}),
    ({"local": 0}, {"restoration", "comparison"}), ({"comparison": "crossed"}, {"restoration", "comparison", "local"}),
    ({"skips": True}, {"restoration", "comparison", "local"}), ({"scales": 3, "crops": "sub"}, {"restoration", "comparison", "local"}),
])
def test_ablations_run_and_every_parameter_has_a_gradient(options, terms):
    method = make(**options)
    for step in range(4):
        method.zero_grad(set_to_none=True)
        found = method(method.pretext(images(), generator(step)))
        found["loss"].backward()
        assert set(found) == terms | {"loss"}
        assert all(p.grad is not None for p in method.parameters())
        assert sum(p.grad.abs().sum() for p in method.encoder.parameters()) > 0
        method.after_step(0.1)


def test_only_the_drawn_heads_learn():
    method = at(make(), (2, 2, 2))
    method(method.pretext(images(), generator()))["loss"].backward()
    moved = {name for name, p in method.named_parameters() if p.grad.abs().sum() > 0}
    assert any(n.startswith("heads.2") for n in moved) and not any(n.startswith(("heads.1", "heads.3", "norms.5", "decoder.steps.2")) for n in moved)
    assert any(n.startswith("decoder.steps.1") for n in moved)


def test_crossed_compares_two_levels():
    method = at(make(comparison="crossed").eval(), (1, 1, 4))
    pretext = method.pretext(images(), generator())
    with torch.no_grad():
        pyramids = [feature_pyramid(method.encoder, method.decoder, view) for view in pretext.views[:2]]
        v1, v4 = method.norms["1"](pyramids[0][1].mean((2, 3))), method.norms["4"](pyramids[1][4].mean((2, 3)))
        p14, p41 = method.predictors["1-4"](v1), method.predictors["4-1"](v4)
    slow = sum(-0.5 * (cosine(p14[b], v4[b]) + cosine(p41[b], v1[b])) for b in range(4)) / 4
    torch.testing.assert_close(method(pretext)["comparison"].item(), slow, rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_local_terms():
    a, b = make().eval(), make(average_local=True).eval()
    pretext = a.pretext(images(), generator())
    torch.testing.assert_close(a(pretext)["local"], 4 * b(pretext)["local"])


def test_biases_alone_cannot_restore():
    "Heads that ignore their maps pay the variance of the images, whatever constant they say."
    method = at(make(comparison=None).eval(), (5, 5, 5))
    pretext = method.pretext(images(batch=16), generator())
    last = method.heads["5"].layers[1]
    torch.nn.init.zeros_(last.weight)
    costs = []
    for constant in (-1.0, -0.1, 0.0, 0.1, 1.0):
        torch.nn.init.constant_(last.bias, constant)
        costs.append(method(pretext)["loss"].item())
    lowest = sum(pretext.target[:, n].var(correction=0).item() for n in range(2))
    assert min(costs) > 0.99 * lowest


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_encoder_and_decoder_transfer(spatial_dims):
    method = make(spatial_dims)
    torch.manual_seed(9)
    other = UNet(create_encoder("resnet18", spatial_dims, 1, width=4), 3, skips=False)
    for report in (transfer(method.encoder, other.encoder), transfer(method.decoder, other.decoder)):
        assert not (report.missing or report.unexpected or report.reshaped)
    x = images(spatial_dims)
    other.eval(), method.eval()
    assert torch.equal(other.decoder(other.encoder(x), x.shape[2:])[-1], feature_pyramid(method.encoder, method.decoder, x)[-1])
    four = create_encoder("resnet18", spatial_dims, 4, width=4)
    assert len(transfer(method.encoder, four).reshaped) == 1


def test_no_decoder_where_nothing_would_train_it():
    assert make(restoration=False, scales=1).decoder is None and make(restoration=False).decoder is not None


def test_sizes_of_the_views():
    assert make(2).small_size((48, 48)) == (48, 48) and make(2, local_size=24).small_size((48, 48)) == (24, 24)
    assert make(3).small_size((64, 64, 32)) == (16, 16, 16) and make(3).small_size((16, 16, 16)) == (8, 8, 8)
    assert make(3, local_size=(16, 16, 8)).small_size((64, 64, 32)) == (16, 16, 8)


@pytest.mark.parametrize("options, said", [
    ({"scales": 6}, "1 to 5"), ({"scales": 0}, "1 to 5"), ({"comparison": "both"}, "crossed"),
    ({"comparison": None, "restoration": False}, "restoration"), ({"crops": "some"}, "multi"),
])
def test_mistakes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_levels_are_spread_with_both_ends():
    for steps in range(2, 8):
        for scales in range(2, steps + 1):
            levels = levels_of(steps, scales)
            assert levels[0] == 1 and levels[-1] == steps and len(set(levels)) == scales
