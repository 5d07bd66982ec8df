"What spoils an image, by loops and by physics; and what the methods that restore it may and may not do."
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import create
from medssl_nb.ssl.generative import (
    ARTEFACTS, bias_field, coarse_weights, k_space_lines, lose_slices, low_light, low_resolution, motion_factors,
    random_artefact, random_frequency, random_lines, spike,
)
from small_methods import method_of

NAMES = ("autoencoder", "denoising", "super_resolution", "low_light", "artefact")
drawn_by = lambda seed: torch.Generator().manual_seed(seed)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=drawn_by(seed))


# Low resolution

def coarse_by_loops(line, f):
    "One axis: the mean over each large voxel, then linear interpolation between their centres."
    n, count = len(line), math.ceil(len(line) / f)
    means = []
    for k in range(count):
        shares = [max(0.0, min(j + 1, (k + 1) * f) - max(j, k * f)) for j in range(n)]
        means.append(sum(s * v for s, v in zip(shares, line)) / sum(shares))
    out = []
    for i in range(n):
        place = min(max((i + 0.5) / f - 0.5, 0), count - 1)
        k = min(int(place), count - 1)
        after = means[min(k + 1, count - 1)]
        out.append(means[k] * (1 - (place - k)) + after * (place - k))
    return out


@pytest.mark.parametrize("f", [1.0, 1.5, 2.0, 2.7, 3.0, 4.0, 5.0])
def test_low_resolution_equals_the_loops(f):
    line = images(12)
    found = coarse_weights(torch.tensor([f]), 12)[0] @ line
    torch.testing.assert_close(found, torch.tensor(coarse_by_loops(line.tolist(), f)), atol=1e-5, rtol=0)


def test_low_resolution_of_a_whole_factor_is_pooling_and_interpolation():
    x = images(3, 2, 12, 8)
    slow = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(low_resolution(x, torch.full((3,), 2.0)), slow)


@pytest.mark.parametrize("shape", [(3, 2, 9, 11), (2, 1, 6, 7, 8)])
def test_low_resolution_keeps_constants_and_each_image_its_factor(shape):
    x, factor = images(*shape), torch.linspace(1, 3.3, shape[0])
    assert torch.equal(low_resolution(x, torch.ones(shape[0])), x)
    torch.testing.assert_close(low_resolution(torch.ones(shape), factor), torch.ones(shape))
    alone = torch.cat([low_resolution(x[i : i + 1], factor[i : i + 1]) for i in range(shape[0])])
    torch.testing.assert_close(low_resolution(x, factor), alone)


def test_thick_slices_are_coarse_along_their_axis_only():
    torch.manual_seed(0)
    method = create("super_resolution", create_encoder("resnet18", 3, width=4, stem="small"), factor=(4.0, 4.0), axes=(0,))
    x = torch.arange(16.0).expand(2, 1, 8, 8, 16).contiguous()  # changes along the last axis only
    torch.testing.assert_close(method.pretext(x, drawn_by(0)).views[0], x)
    torch.testing.assert_close(method.pretext(x.transpose(2, 4).contiguous(), drawn_by(0)).drawn["factor"], torch.tensor([[4.0, 1, 1]] * 2))
    assert not torch.allclose(method.pretext(x.transpose(2, 4).contiguous(), drawn_by(0)).views[0], x.transpose(2, 4))


# Low light

@pytest.mark.parametrize("dose", [0.2, 0.5, 1.0])
def test_photons_have_poissons_mean_and_variance(dose):
    x = torch.full((1, 1, 200, 200), 0.5)
    x[..., 0, 0], x[..., 0, 1] = 0.0, 1.0  # the range: half of the light everywhere else
    counts = low_light(x, torch.tensor([dose]), images(*x.shape), photons=100)[..., 1:, :] * 100
    assert abs(counts.mean() - 50 * dose) < 0.2 and abs(counts.var() / (50 * dose) - 1) < 0.05


def test_low_light_is_the_image_where_there_is_nothing_random():
    x = images(2, 2, 8, 8)
    still, all_of_it = torch.zeros_like(x), torch.ones(2)
    torch.testing.assert_close(low_light(x, all_of_it, still), x)
    dark = low_light(x, all_of_it / 2, still)
    low = x.amin((2, 3), keepdim=True)
    torch.testing.assert_close(dark - low, (x - low) / 2)
    assert (low_light(x, all_of_it / 50, 5 * images(*x.shape)) >= low).all()  # fewer than no photons never arrive


def test_low_light_follows_the_scale_of_the_image():
    x, values, dose = images(2, 1, 8, 8), images(2, 1, 8, 8, seed=1), torch.tensor([0.1, 0.7])
    torch.testing.assert_close(low_light(3 * x + 5, dose, values), 3 * low_light(x, dose, values) + 5, atol=1e-5, rtol=1e-5)
    flat = torch.full((2, 1, 8, 8), 3.0)
    assert torch.equal(low_light(flat, dose, values), flat)


# k-space

def lines_by_hand(x, factors):
    "One image: the sum that Fourier wrote, line by line."
    light, n = (x - x.min()).double(), x.shape[0]
    out = torch.zeros_like(light, dtype=torch.complex128)
    for place, k in enumerate(range(-(n // 2), n - n // 2)):
        wave = torch.exp(2j * math.pi * k * torch.arange(n) / n)
        line = (light.T * wave.conj()).sum(-1)  # one number a column
        out += factors[place] * wave[:, None] * line[None] / n
    return out.abs().float() + x.min()


@pytest.mark.parametrize("n", [8, 9])
def test_k_space_lines_equals_the_sum(n):
    x = images(2, 1, n, 5)
    factors = torch.complex(images(2, n, seed=1), images(2, n, seed=2))
    slow = torch.stack([lines_by_hand(x[i, 0], factors[i].to(torch.complex128)) for i in range(2)])[:, None]
    torch.testing.assert_close(k_space_lines(x, factors), slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 2, 9, 6), (2, 1, 8, 5, 6)])
def test_a_head_that_stands_elsewhere_all_the_time_is_shifted(shape):
    x = images(*shape)
    moved = k_space_lines(x, motion_factors(torch.full((2, shape[2]), 3.0)))
    torch.testing.assert_close(moved, x.roll(3, 2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(k_space_lines(x, torch.ones(2, shape[2])), x, atol=1e-5, rtol=1e-5)


def test_every_second_line_lost_overlays_the_image_shifted_by_half():
    x = images(1, 1, 8, 6)
    kept = (torch.arange(8) % 2 == 0).float()[None]  # the middle, line 4, is kept
    light = x - x.min()
    torch.testing.assert_close(k_space_lines(x, kept), (light + light.roll(4, 2)).abs() / 2 + x.min(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 8, 9), (2, 1, 6, 7, 8)])
def test_a_spike_is_one_point_of_k_space(shape):
    x, dims = images(*shape), len(shape) - 2
    frequency = torch.tensor([[2.0, -1.0, 3.0][:dims], [-3.0, 2.0, 0.0][:dims]])
    amplitude, phase = torch.tensor([0.3, 0.1]), torch.tensor([0.5, 2.0])
    for i in range(2):
        low, span = x[i].min(), x[i].max() - x[i].min()
        k = torch.fft.fftn((x[i, 0] - low).to(torch.complex64))
        k[tuple(frequency[i].int().tolist())] += amplitude[i] * span * k.numel() * torch.exp(1j * phase[i])
        slow = torch.fft.ifftn(k).abs() + low
        torch.testing.assert_close(spike(x, frequency, amplitude, phase)[i, 0], slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(spike(x, frequency, 0 * amplitude, phase), x)


@pytest.mark.parametrize("shape", [(2, 2, 5, 6), (2, 1, 4, 5, 6)])
def test_bias_field_by_loops(shape):
    x, dims = images(*shape), len(shape) - 2
    coefficients = images(2, *[3] * dims, seed=1)
    out = torch.empty_like(x)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[2:])).tolist():
        field = torch.zeros(2)
        for orders in torch.cartesian_prod(*[torch.arange(3)] * dims).tolist():
            wave = math.prod(math.cos(math.pi * o * (i + 0.5) / n) for o, i, n in zip(orders, index, shape[2:]))
            field += coefficients[(slice(None), *orders)] * wave
        low = x.flatten(2).amin(2)
        out[(..., *index)] = (x[(..., *index)] - low) * field.exp()[:, None] + low
    torch.testing.assert_close(bias_field(x, coefficients), out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias_field(x, 0 * coefficients), x)


def test_lost_slices_are_as_dark_as_the_darkest_voxel():
    x, lost = images(2, 2, 6, 4, 4), torch.zeros(2, 6, dtype=torch.bool)
    lost[0, 2] = True
    y = lose_slices(x, lost)
    assert torch.equal(y[1], x[1]) and torch.equal(y[0, :, 3:], x[0, :, 3:])
    assert torch.equal(y[0, :, 2], x[0].amin((1, 2, 3), keepdim=True).expand(2, 1, 4, 4)[:, 0])


# The draw

@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ARTEFACTS)
def test_each_kind_spoils_by_its_own_way_and_more_with_more_strength(kind, dims):
    x = images(64, 1, *[12] * dims)
    change = [(random_artefact(x, (kind,), (s, s), drawn_by(0))[0] - x).square().mean() for s in (0.0, 0.3, 1.0)]
    assert change[0] < 1e-10 < change[1] < change[2]
    drawn = random_artefact(x, (kind,), generator=drawn_by(0))[1]
    active = {
        "motion": drawn["lines"].imag.any(), "lost lines": (drawn["lines"].abs() < 0.5).any(), "spike": drawn["amplitude"].any(),
        "bias field": drawn["coefficients"].any(), "missing slices": drawn["lost"].any(),
    }
    assert [name for name, found in active.items() if found] == [kind]


def test_kinds_come_equally_often_and_the_scales_are_as_said():
    x = images(4000, 1, 12, 12)
    drawn = random_artefact(x, strength=(1.0, 1.0), generator=drawn_by(0))[1]
    assert drawn["kind"].unique().tolist() == [0, 1, 2, 3]
    assert (drawn["kind"].bincount() / 4000 - 0.25).abs().max() < 0.03
    field = bias_field(torch.stack([torch.zeros(12, 12), torch.ones(12, 12)])[:, None].amax(0)[None].expand(4000, -1, -1, -1), drawn["coefficients"])
    assert field.isfinite().all()
    waves = drawn["coefficients"][drawn["kind"] == 3]
    log_field = torch.einsum("bij,hi,wj->bhw", waves, *[torch.cos(math.pi * (torch.arange(12)[:, None] + 0.5) / 12 * torch.arange(3))] * 2)
    assert abs(log_field.std() - 0.4) < 0.1 and (waves[:, 0, 0] == 0).all()


def test_the_middle_of_k_space_neither_moves_nor_is_lost():
    x = images(50, 1, 24, 8)
    factors = random_lines(x, torch.ones(50), torch.ones(50), drawn_by(0))
    middle = factors[:, 10:15]
    torch.testing.assert_close(factors[:, 12], torch.ones(50, dtype=factors.dtype))
    torch.testing.assert_close(middle.abs(), torch.ones(50, 5)) and (factors[:, :9] == 0).all()


def test_a_spike_never_hits_the_middle():
    assert random_frequency(images(5000, 1, 6, 6), drawn_by(0)).any(1).all()


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="choose from motion"):
        random_artefact(images(2, 1, 12, 12), ("movement",))
    with pytest.raises(ValueError, match="dose"):
        create("low_light", create_encoder("resnet18", 2, width=4), dose=(0.0, 1.0))
    with pytest.raises(ValueError, match="factor of shape"):
        low_resolution(images(2, 1, 8, 8), torch.ones(3))
    with pytest.raises(ValueError, match="one a line"):
        k_space_lines(images(2, 1, 8, 8), torch.ones(2, 9))


# The methods

@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_the_clean_image_and_the_loss_its_mean_squared_error(name, dims):
    method, x = method_of(name, dims), images(3, 1, *[16] * dims)
    pretext = method.pretext(x, drawn_by(0))
    assert torch.equal(pretext.target, x) and torch.equal(pretext.views[0], x) == (name == "autoencoder")
    answer = method.eval().restore(pretext.views[0])
    assert answer.shape == x.shape
    slow = sum((a - b) ** 2 for a, b in zip(answer.flatten().tolist(), x.flatten().tolist())) / x.numel()
    torch.testing.assert_close(method(pretext)["loss"].item(), slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes_come_back_as_they_went(name):
    method, x = method_of(name, 2), images(2, 1, 19, 26)
    assert method.eval().restore(method.pretext(x, drawn_by(0)).views[0]).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_without_an_image_nothing_beats_the_mean_image(name):
    "Biases alone give all images one answer, and the best such answer still pays the variance between images."
    method, x = method_of(name, 2).eval(), images(16, 1, 16, 16)
    pretext = method.pretext(x, drawn_by(0))
    pretext.views = (torch.zeros_like(x),)
    assert method(pretext)["loss"] > x.var(0, correction=0).mean() - 1e-4


def test_noise_has_its_strength_and_masked_voxels_are_mean():
    x = images(40, 1, 32, 32)
    encoder = create_encoder("resnet18", 2, width=4, stem="small")
    noisy = create("denoising", encoder, sigma=(0.5, 0.5)).pretext(x, drawn_by(0)).views[0]
    assert abs((noisy - x).std() - 0.5) < 0.02
    holes = create("denoising", encoder, sigma=(0.0, 0.0), masked=0.25).pretext(x, drawn_by(0)).views[0]
    gone = holes == 0
    assert abs(gone.float().mean() - 0.25) < 0.02 and torch.equal(holes[~gone], x[~gone])


def test_a_bottleneck_limits_what_passes():
    "Through one channel of the coarsest map, answers for different images differ in one number a place."
    torch.manual_seed(0)
    method = create("autoencoder", create_encoder("resnet18", 2, width=4, stem="small"), bottleneck=1).eval()
    codes = method.squeeze[0](method.encoder(images(5, 1, 16, 16))[-1])
    assert codes.shape[1] == 1 and method.squeeze(method.encoder(images(5, 1, 16, 16))[-1]).shape[1] == method.encoder.channels[-1]
    assert len(method_of("autoencoder", 2).squeeze) == 0


def test_skips_are_off_unless_asked_for():
    encoder = create_encoder("resnet18", 2, width=4, stem="small")
    for name in NAMES:
        assert not create(name, encoder).decoder.skips and create(name, encoder, skips=True).decoder.skips
