"Modalities that teach each other: SSIM and k-means by loops, what is left out, and what a batch must hold."
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.nets.unet import UNet
from medssl_nb.ssl.multimodal import edge_map, intensity_clusters, ssim
from medssl_nb.train.fit import fit
from medssl_nb.train.weights import transfer
from small_methods import asked, drawn, small


def ssim_by_loops(x, y, sigma):
    "Wang et al. 2004, one window at a time, in two dimensions; light from the truth's darkest voxel to its brightest."
    low, high = y.min().item(), y.max().item()
    x, y = ((a.double() - low) / (high - low) for a in (x, y))
    total, (h, w) = 0.0, x.shape
    for i in range(h):
        for j in range(w):
            weights = torch.tensor([[math.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * sigma**2)) for b in range(w)] for a in range(h)], dtype=torch.float64)
            weights /= weights.sum()
            mean = lambda a: (weights * a).sum().item()
            mx, my = mean(x), mean(y)
            vx, vy, c = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
            total += (2 * mx * my + 0.01**2) * (2 * c + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))
    return total / (h * w)


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_ssim_by_loops(sigma):
    x, y = drawn(2, 2, 9, 7), drawn(2, 2, 9, 7, seed=1)
    y = y + x
    slow = [[ssim_by_loops(x[b, c], y[b, c], sigma) for c in range(2)] for b in range(2)]
    torch.testing.assert_close(ssim(x, y, sigma), torch.tensor(slow), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("d", [2, 3])
def test_ssim_of_equals_is_one_and_gain_and_offset_of_both_do_not_matter(d):
    x, y = drawn(2, 3, *[12] * d), drawn(2, 3, *[12] * d, seed=1)
    torch.testing.assert_close(ssim(y, y), torch.ones(2, 3))
    torch.testing.assert_close(ssim(4 * x - 7, 4 * y - 7), ssim(x, y), atol=1e-4, rtol=1e-3)
    assert (ssim(x, y) < 0.9).all() and (ssim(x, y) > -1).all()


def test_ssim_stands_constant_images_half_precision_and_gradients():
    x = torch.zeros(2, 1, 8, 8, requires_grad=True)
    found = ssim(x, torch.zeros(2, 1, 8, 8))
    found.sum().backward()
    torch.testing.assert_close(found, torch.ones(2, 1))
    assert torch.isfinite(x.grad).all()
    a, b = drawn(2, 1, 8, 8), drawn(2, 1, 8, 8, seed=1)
    exact = ssim(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ssim(a, b), exact)


def test_ssim_agrees_with_scikit_image_inside():
    "Their windows are cut at 3.5 standard deviations and leave out a rim; the rest is the same number."
    from skimage import metrics

    y = F.interpolate(drawn(1, 1, 6, 6), size=(192, 192), mode="bicubic")
    x = y + 0.2 * drawn(1, 1, 192, 192, seed=1)
    low, span = y.min(), y.max() - y.min()
    unit = [((a - low) / span)[0, 0].double().numpy() for a in (x, y)]
    theirs = metrics.structural_similarity(*unit, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    assert abs(ssim(x, y).item() - theirs) < 0.01


@pytest.mark.parametrize("d", [2, 3])
def test_one_channel_is_left_out_and_asked_for(d):
    method, x = small("modality_restoration", d, channels=3), drawn(60, 3, *[8] * d)
    pretext = asked(method, x)
    missing = pretext.drawn["missing"].tolist()
    assert [missing.count(c) > 8 for c in range(3)] == [True] * 3
    for view, image, target, c in zip(pretext.views[0], x, pretext.target, missing):
        assert torch.equal(target[0], image)
        for channel in range(3):
            assert torch.equal(view[channel], torch.zeros_like(view[channel]) if channel == c else image[channel])
            assert (target[1, channel] == (channel == c)).all()


@pytest.mark.parametrize("missing", [0, 2, -1])
def test_a_fixed_direction(missing):
    pretext = asked(small("modality_restoration", 2, channels=3, missing=missing), drawn(5, 3, 16, 16))
    assert pretext.drawn["missing"].tolist() == [missing % 3] * 5


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("loss", ["ssim", "mse"])
def test_only_the_missing_channel_counts(d, loss):
    method = small("modality_restoration", d, channels=3, loss=loss).eval()
    pretext = asked(method, drawn(4, 3, *[16] * d))
    with torch.no_grad():
        found, terms = method.restore(pretext.views[0]), method(pretext)
    slow = {"ssim": [], "mse": []}
    for b, c in enumerate(pretext.drawn["missing"].tolist()):
        a, y = found[b, c][None, None], pretext.target[b, 0, c][None, None]
        slow["ssim"].append(1 - ssim(a, y).item())
        slow["mse"].append(((a - y) ** 2).mean().item())
    torch.testing.assert_close(terms["loss"].item(), sum(slow[loss]) / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["error"].item(), sum(slow["mse"]) / 4, rtol=1e-4, atol=1e-5)
    shown = pretext.target[:, 1].bool()
    pretext.target[:, 0][~shown] += 5.0  # the others change: no matter
    torch.testing.assert_close(method(pretext)["loss"], terms["loss"])


def test_biases_alone_cannot_restore():
    "A head that ignores its maps pays the variance, whatever it says; and has no structure."
    method = small("modality_restoration", 2, channels=2, loss="mse").eval()
    x = drawn(16, 2, 16, 16)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)
    pretext = asked(method, x)
    torch.nn.init.zeros_(method.head.weight)
    for constant in (-1.0, 0.0, 0.3):
        torch.nn.init.constant_(method.head.bias, constant)
        assert method(pretext)["loss"] > 0.999
        assert ssim(torch.full_like(x, constant), x).mean() < 0.1


def test_clusters_are_k_means_by_loops():
    for seed, clusters in ((0, 2), (1, 3), (2, 5)):
        image = drawn(1, 1, 7, 6, seed=seed) ** 3
        values = image.flatten().tolist()
        low, high = min(values), max(values)
        means = [low + (high - low) * (k + 0.5) / clusters for k in range(clusters)]
        nearest = lambda v: min(range(clusters), key=lambda k: abs(v - means[k]))
        for _ in range(10):
            belongs = [nearest(v) for v in values]
            means = [sum(mine) / len(mine) if (mine := [v for v, b in zip(values, belongs) if b == k]) else means[k] for k in range(clusters)]
        assert intensity_clusters(image, clusters).flatten().tolist() == [nearest(v) for v in values]


@pytest.mark.parametrize("d", [2, 3])
def test_clusters_of_a_batch_are_each_image_s_own(d):
    x = drawn(3, 1, *[8] * d)
    found = intensity_clusters(x, 4)
    assert found.shape == (3, *[8] * d) and found.dtype == torch.int64 and found.min() == 0 and found.max() == 3
    for i in range(3):
        assert torch.equal(intensity_clusters(x[i : i + 1], 4)[0], found[i])
        order = [x[i, 0][found[i] == k].mean().item() for k in range(4)]
        assert order == sorted(order)
    assert torch.equal(intensity_clusters(100 + 32 * x, 4), found)
    assert torch.isfinite(intensity_clusters(torch.zeros(2, 1, *[4] * d), 3).float()).all()


def test_edges_of_a_ramp_and_of_a_plane():
    z, y, x = torch.meshgrid(*[torch.arange(5.0)] * 3, indexing="ij")
    torch.testing.assert_close(edge_map((2 * z - 3 * y + 6 * x)[None, None]), torch.full((1, 1, 5, 5, 5), 7.0))
    assert not edge_map(torch.full((2, 1, 6, 6), 4.0)).any()


@pytest.mark.parametrize("source", [0, 1, 2, -1])
def test_the_source_is_never_seen(source):
    method, x = small("cross_modal", 2, channels=2, source=source), drawn(4, 3, 16, 16)
    pretext = asked(method, x)
    others = [c for c in range(3) if c != source % 3]
    assert torch.equal(pretext.views[0], x[:, others])
    assert torch.equal(pretext.target, intensity_clusters(x[:, [source]], 4))


@pytest.mark.parametrize("d", [2, 3])
def test_cross_modal_losses_by_their_formulas(d):
    x = drawn(2, 3, *[16] * d)
    method = small("cross_modal", d, channels=2, clusters=3).eval()
    pretext = asked(method, x)
    with torch.no_grad():
        p = method.predict(pretext.views[0]).softmax(1)
        right = p.gather(1, pretext.target[:, None])
        torch.testing.assert_close(method(pretext)["loss"], -right.log().mean())
        torch.nn.init.zeros_(method.head.weight), torch.nn.init.zeros_(method.head.bias)
        torch.testing.assert_close(method(pretext)["loss"], torch.tensor(3.0).log())
        edges = small("cross_modal", d, channels=2, answer="edges").eval()
        pretext = asked(edges, x)
        slow = ((edges.predict(pretext.views[0]) - edge_map(x[:, 2:])) ** 2).mean()
        torch.testing.assert_close(edges(pretext)["loss"], slow)


@pytest.mark.parametrize("name, channels, answer", [("modality_restoration", 3, {}), ("cross_modal", 2, {}), ("cross_modal", 2, {"answer": "edges"})])
def test_learns_what_one_modality_says_of_another(name, channels, answer):
    "Channels that are functions of one another: the loss falls far below its start."
    first = F.interpolate(drawn(32, 1, 4, 4), size=(16, 16), mode="bicubic")
    images = ImageSet(torch.cat([first, -first, first.abs()], 1))
    method = small(name, 2, channels=channels, **answer)
    losses = fit(method, images, steps=60, batch_size=16, lr=1e-2, device="cpu", precision="fp32", progress=False).terms["loss"]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("name, channels", [("modality_restoration", 3), ("cross_modal", 2)])
@pytest.mark.parametrize("d", [2, 3])
def test_encoder_and_decoder_transfer(name, channels, d):
    method = small(name, d, channels=channels)
    torch.manual_seed(9)
    other = UNet(create_encoder("resnet18", d, channels, width=4, stem="small"), 5)
    for report in (transfer(method.encoder, other.encoder), transfer(method.decoder, other.decoder)):
        assert not (report.missing or report.unexpected or report.reshaped)
    one = create_encoder("resnet18", d, 1, width=4, stem="small")
    assert len(transfer(method.encoder, one).reshaped) == 1


@pytest.mark.parametrize("make, said", [
    (lambda: small("modality_restoration", 2, channels=1), "two or more"),
    (lambda: small("modality_restoration", 2, channels=2, missing=2), "0 to 1"),
    (lambda: small("modality_restoration", 2, channels=2, loss="l1"), "mse"),
    (lambda: asked(small("modality_restoration", 2, channels=3), drawn(2, 2, 16, 16)), "2 channels, where 3"),
    (lambda: small("cross_modal", 2, channels=2, source=3), "0 to 2"),
    (lambda: small("cross_modal", 2, channels=2, answer="lines"), "edges"),
    (lambda: small("cross_modal", 2, channels=2, clusters=1), "two or more"),
    (lambda: asked(small("cross_modal", 2, channels=2), drawn(2, 2, 16, 16)), "2 channels, where 3"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
