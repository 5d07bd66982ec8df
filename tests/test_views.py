"Views against MONAI, SciPy and torch at fixed parameters, and the properties every view keeps."
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from medssl_nb.views import corruption as C
from medssl_nb.views import geometry as G
from medssl_nb.views import intensity as I
from medssl_nb.views import recipes as R

SHAPES = [(3, 2, 24, 20), (3, 1, 16, 20, 14)]
CUBES = [(5, 2, 20, 20), (5, 1, 14, 14, 14)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(shape, seed=0):
    "Random images without structure finer than interpolation can follow."
    x = torch.randn(shape, generator=seeded(seed))
    return I.standardise(I.blur(x, torch.full((shape[0],), 1.5)))


# name -> (drawing function, pure function, options of the draw, options shared with the pure function)
VIEWS = {
    "flip": (G.random_flip, G.flip, {}, {}),
    "crop": (G.random_resized_crop, G.crop_resize, {}, {"size": 12}),
    "affine": (G.random_affine, G.affine, {"degrees": 20, "translate": 0.1, "shear": 0.1}, {}),
    "brightness": (I.random_brightness, I.brightness, {}, {}),
    "contrast": (I.random_contrast, I.contrast, {}, {}),
    "gamma": (I.random_gamma, I.gamma, {}, {}),
    "bezier": (I.random_bezier, I.bezier, {}, {}),
    "blur": (I.random_blur, I.blur, {}, {}),
    "noise": (I.random_noise, I.noise, {}, {}),
    "cutout": (I.random_cutout, I.cutout, {}, {}),
    "patch_swap": (I.random_patch_swap, I.patch_swap, {}, {"size": 4}),
    "local_shuffle": (C.random_local_shuffle, C.local_shuffle, {}, {}),
    "paint": (C.random_paint, C.paint, {}, {}),
    "in_paint": (C.random_in_paint, C.in_paint, {}, {}),
    "out_paint": (C.random_out_paint, C.out_paint, {}, {}),
    "augment": (R.augment, R.make_view, {}, {}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VIEWS)
def test_drawn_makes_the_view_again(name, shape):
    draw, pure, options, shared = VIEWS[name]
    x = smooth(shape)
    y, drawn = draw(x, generator=seeded(1), **options, **shared)
    again, _ = draw(x, generator=seeded(1), **options, **shared)
    other, _ = draw(x, generator=seeded(2), **options, **shared)
    assert torch.equal(y, again) and not torch.equal(y, other)
    assert torch.equal(y, pure(x, **drawn, **shared))
    assert all(isinstance(v, torch.Tensor) and len(v) == len(x) for v in drawn.values())
    assert torch.equal(x, smooth(shape)), "the input was changed in place"
    for i in range(len(x)):  # each image alone gives what it gave in the batch
        alone = pure(x[i : i + 1], **{k: v[i : i + 1] for k, v in drawn.items()}, **shared)
        torch.testing.assert_close(alone, y[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in VIEWS if n != "augment"])
def test_probability_zero_changes_no_bit(name, shape):
    draw, _, options, shared = VIEWS[name]
    if name == "crop":
        shared = {}
    x = smooth(shape)
    assert torch.equal(draw(x, p=0.0, generator=seeded(), **options, **shared)[0], x)
    if name != "flip":
        some = torch.tensor([1.0, 0.0, 1.0])
        y, _ = draw(x, p=some, generator=seeded(3), **options, **shared)
        assert torch.equal(y[1], x[1]) and not torch.equal(y, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", VIEWS)
def test_type_is_kept_and_arithmetic_is_float32(name, dtype):
    draw, pure, options, shared = VIEWS[name]
    x = smooth((2, 1, 20, 20)).to(dtype)
    y, drawn = draw(x, generator=seeded(1), **options, **shared)
    assert y.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pure(x, **drawn, **shared), y)
    exact = pure(x.float(), **drawn, **shared)
    torch.testing.assert_close(y.float(), exact, atol=1e-5 if dtype == torch.float64 else 0.02, rtol=0.01)


# --- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_is_monai_flip(shape):
    from monai.transforms import Flip

    x = smooth(shape)
    y, drawn = G.random_flip(x, generator=seeded(1))
    for image, flips, got in zip(x, drawn["flips"], y):
        axes = [a for a in range(len(shape) - 2) if flips[a]]
        want = Flip(spatial_axis=axes)(image) if axes else image
        assert torch.equal(got, torch.as_tensor(want))
    only, drawn = G.random_flip(x, p=1.0, axes=(1,))
    assert torch.equal(only, x.flip(3)) and drawn["flips"][:, 1].all() and drawn["flips"].sum() == len(x)


def test_the_ten_turns_are_the_papers():
    from monai.transforms import Rotate90

    x = smooth((1, 1, 6, 6, 6)).repeat(10, 1, 1, 1, 1)
    y = G.quarter_turn(x, torch.arange(10))
    plan = [(0, (0, 1)), (1, (0, 1)), (2, (0, 1)), (3, (0, 1)), (3, (1, 2)), (2, (1, 2)), (1, (1, 2)), (3, (0, 2)), (2, (0, 2)), (1, (0, 2))]
    for c, (k, plane) in enumerate(plan):
        want = np.rot90(x[c, 0].numpy(), k, plane)
        assert np.array_equal(y[c, 0].numpy(), want)
        if k:
            assert np.array_equal(np.asarray(Rotate90(k, plane)(x[c])), y[c].numpy())
    assert len({t.numpy().tobytes() for t in y}) == 10
    flat = smooth((4, 2, 6, 6))
    for c, got in enumerate(G.quarter_turn(flat, torch.arange(4))):
        assert torch.equal(got, torch.rot90(flat[c], c, (1, 2)))


@pytest.mark.parametrize("shape", CUBES)
def test_quarter_turns_of_images_and_masks_agree(shape):
    x = torch.randn(shape, generator=seeded())
    y, drawn = G.random_quarter_turn(x, generator=seeded(2))
    assert drawn["turn"].dtype == torch.int64 and torch.equal(y, G.quarter_turn(x, **drawn))
    mask = (x[:, :1] > 0).long()
    assert torch.equal(G.quarter_turn(mask, **drawn), (y[:, :1] > 0).long())


def test_every_turn_is_drawn_alike():
    for shape, classes in (((4000, 1, 2, 2), 4), ((4000, 1, 2, 2, 2), 10)):
        _, drawn = G.random_quarter_turn(torch.zeros(shape), generator=seeded())
        counts = drawn["turn"].bincount(minlength=classes)
        assert len(counts) == classes and (counts - 4000 / classes).abs().max() < 5 * (4000 / classes) ** 0.5


@pytest.mark.parametrize("shape,size", [((2, 2, 24, 20), (11, 33)), ((2, 1, 16, 20, 14), (7, 31, 14))])
def test_crop_is_torch_interpolation_of_the_crop(shape, size):
    x = smooth(shape)
    d = len(shape) - 2
    whole = torch.tensor([[0.0] * d, shape[2:]]).expand(2, 2, d)
    mode = "bilinear" if d == 2 else "trilinear"
    if d == 2:
        want = F.interpolate(x, size, mode=mode, antialias=True)
        torch.testing.assert_close(G.crop_resize(x, whole, size), want, atol=1e-5, rtol=1e-5)
    larger = tuple(2 * n for n in shape[2:])
    torch.testing.assert_close(G.crop_resize(x, whole, larger), F.interpolate(x, larger, mode=mode), atol=1e-5, rtol=1e-5)
    boxes = torch.tensor([[[2.0, 3, 1][:d], [9.0, 13, 8][:d]]] * 2)
    window = x[(slice(None), slice(None), slice(2, 9), slice(3, 13), slice(1, 8))[: d + 2]]
    assert torch.equal(G.crop_resize(x, boxes, window.shape[2:]), window)


def test_shrinking_in_3d_is_shrinking_axis_by_axis():
    x = smooth((1, 1, 24, 20, 16))
    whole = torch.tensor([[[0.0, 0, 0], [24, 20, 16]]])
    got = G.crop_resize(x, whole, (8, 10, 16))
    plane = F.interpolate(x[:, 0], (10, 16), mode="bilinear", antialias=True)  # each slice (20, 16)
    want = F.interpolate(plane.permute(0, 2, 1, 3).reshape(1, 10, 24, 16), (8, 16), mode="bilinear", antialias=True).permute(0, 2, 1, 3)
    torch.testing.assert_close(got[:, 0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_keeps_labels(shape):
    x = smooth(shape)
    mask = (x[:, 0] > 0).long() + 3 * (x[:, 0] > 1)
    _, crop = G.random_resized_crop(x, generator=seeded())
    _, turn = G.random_affine(x, generator=seeded())
    _, mirror = G.random_flip(x, generator=seeded())
    for y in (G.crop_resize(mask, mode="nearest", **crop), G.affine(mask, mode="nearest", **turn), G.flip(mask, **mirror)):
        assert y.dtype == torch.int64 and y.shape == mask.shape and set(y.unique().tolist()) <= {0, 1, 4}
    with_channel = G.crop_resize(mask[:, None], mode="nearest", **crop)
    assert torch.equal(with_channel[:, 0], G.crop_resize(mask, mode="nearest", **crop))
    whole = torch.tensor([[0.0] * (len(shape) - 2), shape[2:]]).expand(3, 2, -1)
    assert torch.equal(G.crop_resize(mask, whole, mode="nearest"), mask)


def test_random_boxes_have_the_asked_share_and_ratio():
    for space, size in (((60, 80), (32, 32)), ((32, 64, 64), (32, 64, 64))):
        x = torch.empty(2000, 1, *space)
        boxes = G.random_boxes(x, size, (0.3, 0.6), (3 / 4, 4 / 3), seeded())
        side = boxes[:, 1] - boxes[:, 0]
        assert (boxes >= -1e-3).all() and (boxes[:, 1] <= torch.tensor(space) + 1e-3).all()
        share = side.prod(1) / torch.tensor(space).prod()
        inside = (share > 0.299) & (share < 0.601)
        assert inside.float().mean() > 0.99 and abs(share.mean() - 0.45) < 0.03
        step = side / torch.tensor(size)
        ratio = step[:, 1:] / step[:, :1]
        assert (ratio[inside] > 0.74).all() and (ratio[inside] < 1.35).all()


@pytest.mark.parametrize("padding,scipy_mode", [("zeros", "grid-constant"), ("border", "nearest"), ("reflection", "reflect")])
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_is_scipys(shape, padding, scipy_mode):
    x = smooth(shape)
    d = len(shape) - 2
    _, drawn = G.random_affine(x, degrees=30, scale=(0.7, 1.4), translate=0.1, shear=0.2, generator=seeded(4))
    y = G.affine(x, **drawn, padding=padding)
    centre = (np.array(shape[2:]) - 1) / 2
    for image, matrix, got in zip(x[:, 0], drawn["matrix"].numpy(), y[:, 0]):
        offset = centre - matrix[:, :d] @ centre + matrix[:, d]
        want = scipy.ndimage.affine_transform(image.numpy(), matrix[:, :d], offset, order=1, mode=scipy_mode)
        np.testing.assert_allclose(got.numpy(), want, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_affine_matrix_is_monais(shape):
    from monai.transforms import Affine

    x = smooth(shape)[:1]
    d = len(shape) - 2
    angle, zoom, shift = 25.0, [0.8, 1.2, 1.1][:d], [2.0, -3.0, 1.0][:d]
    degrees = torch.tensor([[angle]]) if d == 2 else torch.tensor([[0.0, 0.0, angle]])  # in the plane of the first two axes
    matrix = G.affine_matrix(degrees, torch.tensor([zoom]), torch.zeros(1, d), torch.zeros(1, d, d))
    linear = matrix[0, :, :d].numpy()
    affine = np.eye(d + 1)
    affine[:d, :d], affine[:d, d] = linear, shift
    want, _ = Affine(affine=affine, padding_mode="border", image_only=False)(x[0])
    ours = torch.cat([matrix[..., :d], torch.tensor(shift)[None, :, None]], -1)
    torch.testing.assert_close(G.affine(x, ours)[0], torch.as_tensor(np.asarray(want)), atol=2e-4, rtol=0)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    np.testing.assert_allclose(linear[:2, :2], np.diag(1 / np.array(zoom[:2])) @ [[cos, sin], [-sin, cos]], atol=1e-6)


@pytest.mark.parametrize("d,plane,axis", [(2, (0, 1), 0), (3, (1, 2), 0), (3, (0, 2), 1), (3, (0, 1), 2)])
def test_ninety_degrees_are_a_quarter_turn(d, plane, axis):
    x = smooth((1, 1, *[12] * d))
    degrees = torch.zeros(1, 1 if d == 2 else 3)
    degrees[0, axis] = 90
    matrix = G.affine_matrix(degrees, torch.ones(1, d), torch.zeros(1, d), torch.zeros(1, d, d))
    torch.testing.assert_close(G.affine(x, matrix), torch.rot90(x, 1, [p + 2 for p in plane]), atol=1e-4, rtol=0)


def test_translation_moves_the_content_forward_and_zoom_enlarges():
    x = torch.zeros(1, 1, 21, 31)
    x[0, 0, 10, 15] = 1
    move = G.affine_matrix(torch.zeros(1, 1), torch.ones(1, 2), torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2, 2))
    assert G.affine(x, move)[0, 0, 13, 11] > 0.999
    disc = (sum((torch.arange(n) - (n - 1) / 2).view(shape) ** 2 for n, shape in ((41, (-1, 1)), (41, (1, -1)))) < 64).float()[None, None]
    grown = G.affine(disc, G.affine_matrix(torch.zeros(1, 1), torch.full((1, 2), 2.0), torch.zeros(1, 2), torch.zeros(1, 2, 2)))
    assert abs(grown.sum() / disc.sum() - 4) < 0.3


def test_with_spacing_a_rotation_is_rigid_in_mm():
    spacing = torch.tensor([5.0, 1.0, 0.7])
    x = torch.zeros(4, 1, 10, 30, 40)
    _, drawn = G.random_affine(x, degrees=40, scale=(1, 1), spacing=tuple(spacing.tolist()), generator=seeded())
    mm = drawn["matrix"][:, :, :3] * spacing[:, None] / spacing
    torch.testing.assert_close(mm @ mm.mT, torch.eye(3).expand(4, 3, 3), atol=1e-5, rtol=0)
    _, careless = G.random_affine(x, degrees=40, scale=(1, 1), generator=seeded())
    assert (careless["matrix"] - drawn["matrix"]).abs().max() > 0.1


# --- intensity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gamma_is_monais(shape):
    from monai.transforms import AdjustContrast

    x, log_gamma = smooth(shape), torch.tensor([-0.6, 0.3, 0.9])
    y = I.gamma(x, log_gamma)
    for i in range(3):
        for c in range(shape[1]):
            want = AdjustContrast(gamma=float(log_gamma[i].exp()))(x[i, c : c + 1])
            torch.testing.assert_close(y[i, c : c + 1], torch.as_tensor(np.asarray(want)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_is_scipys(shape):
    x, sigma = smooth(shape), torch.tensor([0.3, 1.0, 2.5])
    y = I.blur(x, sigma)
    for i in range(3):
        options = {"sigma": float(sigma[i]), "mode": "constant", "radius": 40}
        ones = scipy.ndimage.gaussian_filter(np.ones(shape[2:]), **options)
        want = scipy.ndimage.gaussian_filter(x[i, 0].double().numpy(), **options) / ones
        np.testing.assert_allclose(y[i, 0].numpy(), want, atol=1e-5)
    each = torch.rand(3, len(shape) - 2, generator=seeded()) + 0.3
    for i in range(3):
        options = {"sigma": each[i].tolist(), "mode": "constant", "radius": 40}
        want = scipy.ndimage.gaussian_filter(x[i, 0].double().numpy(), **options) / scipy.ndimage.gaussian_filter(np.ones(shape[2:]), **options)
        np.testing.assert_allclose(I.blur(x, each)[i, 0].numpy(), want, atol=1e-5)


def test_blur_is_monais_away_from_the_rim():
    from monai.transforms import GaussianSmooth

    x = smooth((1, 1, 40, 40))
    want = GaussianSmooth(sigma=1.5, approx="sampled")(x[0])
    got = I.blur(x, torch.tensor([1.5]))[0]
    torch.testing.assert_close(got[:, 10:-10, 10:-10], torch.as_tensor(np.asarray(want))[:, 10:-10, 10:-10], atol=2e-3, rtol=0)


@pytest.mark.parametrize("decreasing", [False, True])
def test_bezier_is_the_paper_code_formula(decreasing):
    x, points = smooth((4, 1, 12, 12, 10)), torch.rand(4, 2, 2, generator=seeded(3))
    y = I.bezier(x, points, torch.full((4,), decreasing))
    t = np.linspace(0, 1, 100_000)
    for i in range(4):
        (x1, y1), (x2, y2) = points[i].double().numpy()
        a, b = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2
        across, up = a * x1 + b * x2 + t**3, a * y1 + b * y2 + t**3
        low, high = float(x[i].min()), float(x[i].max())
        unit = (x[i].double().numpy() - low) / (high - low)
        mapped = np.interp(unit, np.sort(across), np.sort(up)[::-1] if decreasing else np.sort(up))
        np.testing.assert_allclose(y[i].numpy(), low + (high - low) * mapped, atol=5e-3)


def test_brightness_contrast_noise_by_hand():
    x = torch.tensor([[[[1.0, 3.0]]], [[[10.0, 10.0]]]])
    assert I.brightness(x, torch.tensor([2.0, 1.0])).flatten().tolist() == [3, 5, 10, 10]
    assert I.contrast(x, torch.tensor([2.0, 0.5])).flatten().tolist() == [0, 4, 10, 10]
    y, drawn = I.random_noise(1000 + 50 * smooth((2, 1, 100, 100)), sigma=(0.2, 0.2), p=1, generator=seeded())
    assert (drawn["values"].std((1, 2, 3)) / 10 - 1).abs().max() < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_intensity_of_any_unit(shape):
    x = smooth(shape)
    for draw in (I.random_brightness, I.random_contrast, I.random_gamma, I.random_bezier, I.random_blur, I.random_noise):
        y, _ = draw(x, generator=seeded(5))
        scaled, _ = draw(300 * x - 1000, generator=seeded(5))  # the same image in HU
        torch.testing.assert_close(scaled, 300 * y - 1000, atol=0.3, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in VIEWS if n not in ("crop", "affine")])
def test_constant_and_black_images_stay_finite(name):
    draw, _, options, shared = VIEWS[name]
    for value in (0.0, 7.0):
        y, _ = draw(torch.full((2, 1, 16, 16), value), generator=seeded(), **options, **shared)
        assert torch.isfinite(y).all()


def test_cutout_by_loops():
    x = torch.randn(2, 2, 9, 8, 7, generator=seeded())
    boxes = torch.tensor([[[[1, 2, 0], [4, 5, 7]], [[0, 0, 0], [0, 0, 0]]], [[[5, 5, 5], [9, 8, 7]], [[0, 0, 0], [2, 9, 9]]]])
    want = x.clone()
    for i in range(2):
        for (a, b, c), (d, e, f) in boxes[i].tolist():
            want[i, :, a:d, b:e, c:f] = -4
    assert torch.equal(I.cutout(x, boxes, -4), want)


@pytest.mark.parametrize("shape,size", [((3, 2, 24, 20), (4, 5)), ((3, 1, 16, 20, 14), (4, 3, 2))])
def test_patch_swap_by_loops(shape, size):
    x = torch.randn(shape, generator=seeded())
    y, drawn = I.random_patch_swap(x, size, count=30, generator=seeded(1))
    want = x.clone()
    for i in range(len(x)):
        for a, b in zip(drawn["first"][i].tolist(), drawn["second"][i].tolist()):
            here = (i, slice(None), *(slice(p, p + s) for p, s in zip(a, size)))
            there = (i, slice(None), *(slice(p, p + s) for p, s in zip(b, size)))
            want[here], want[there] = want[there].clone(), want[here].clone()
            assert a == b or any(abs(p - q) >= s for p, q, s in zip(a, b, size))
    assert torch.equal(y, want) and not torch.equal(y, x)
    assert torch.equal(y.flatten(2).sort().values, x.flatten(2).sort().values)


# --- corruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space,high", [((20, 30), (4, 5)), ((12, 14, 10), (4, 3, 2))])
def test_local_shuffle_by_loops(space, high):
    x = torch.arange(2 * np.prod(space), dtype=torch.float32).view(2, 1, *space)
    starts, sides = C.random_windows(x, 150, torch.ones(len(space)).long(), torch.tensor(high), seeded())
    source, last = C.shuffle_source(starts, sides, space, seeded(1))
    want = torch.full(last.shape, -1)
    for i in range(2):
        for k in range(150):
            want[(i, *(slice(a, a + s) for a, s in zip(starts[i, k].tolist(), sides[i, k].tolist())))] = k
    assert torch.equal(last, want) and (want < 0).any()
    y = C.local_shuffle(x, source)
    assert torch.equal(y[last[:, None] < 0], x[last[:, None] < 0])
    for i in range(2):
        for k in range(150):
            original = x[(i, 0, *(slice(a, a + s) for a, s in zip(starts[i, k].tolist(), sides[i, k].tolist())))].flatten()
            seen = y[i, 0][last[i] == k]
            assert torch.isin(seen, original).all() and len(seen.unique()) == len(seen)
            if len(seen) == len(original):
                assert torch.equal(seen.sort().values, original.sort().values)


def test_each_permutation_of_a_window_is_as_likely():
    n = 6000
    starts, sides = torch.zeros(n, 1, 2).long(), torch.tensor([1, 3]).expand(n, 1, 2)
    source, _ = C.shuffle_source(starts, sides, (1, 3), seeded())
    codes = (source.view(n, 3) * torch.tensor([9, 3, 1])).sum(1)
    _, counts = codes.unique(return_counts=True)
    assert len(counts) == 6 and (counts - 1000).abs().max() < 150


def test_windows_stay_inside_and_take_every_side():
    for margin in (0, 3):
        x = torch.empty(1, 1, 30, 40)
        starts, sides = C.random_windows(x, 5000, torch.tensor([1, 2]), torch.tensor([4, 6]), seeded(), margin)
        assert sides[..., 0].unique().tolist() == [1, 2, 3, 4] and sides[..., 1].unique().tolist() == [2, 3, 4, 5, 6]
        assert starts.amin() == margin and (starts + sides).amax((0, 1)).tolist() == [30 - margin, 40 - margin]


@pytest.mark.parametrize("space", [(64, 64), (64, 64, 32)])
def test_paint_sizes_are_models_genesis(space):
    x = smooth((60, 1, *space)) if len(space) == 2 else torch.randn(30, 1, *space, generator=seeded())
    for draw, bounds in ((C.random_in_paint, lambda n: (n // 6, n // 3)), (C.random_out_paint, lambda n: (n - 4 * n // 7, n - 3 * n // 7))):
        y, drawn = draw(x, p=1.0, generator=seeded(1))
        start, end = drawn["boxes"].unbind(2)
        real = end[..., 0] > 0
        for axis, n in enumerate(space):
            sides = (end - start)[real][:, axis]
            low, high = bounds(n)
            assert sides.min() >= low and sides.max() <= high
            assert start[real][:, axis].min() >= 3 and end[real][:, axis].max() <= n - 3
        assert (real.int().diff(dim=1) <= 0).all()  # drawing stops once, it does not skip
        assert draw is C.random_in_paint or real[:, 0].all()
        assert (y.amax(dim=tuple(range(1, y.ndim))) <= x.amax(dim=tuple(range(1, y.ndim)))).all()
        values = drawn["values"].flatten(1)
        assert (values.amin(1) >= x.flatten(1).amin(1)).all() and (values.amin(1) < x.flatten(1).amin(1) + 0.1).all()
        inside = I.inside_boxes(drawn["boxes"], space)
        keep = ~inside if draw is C.random_in_paint else inside
        assert torch.equal(y[keep], x[keep]) and torch.equal(y[~keep], drawn["values"][~keep])


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape,size", [((3, 2, 24, 20), (16, 18)), ((3, 1, 16, 20, 14), (12, 16, 14)), ((3, 1, 16, 16), 32)])
def test_views_are_normalised_and_differ(shape, size):
    a, b, drawn = R.two_views(smooth(shape), size, seeded())
    for y in (a, b):
        axes = tuple(range(2, y.ndim))
        assert y.mean(axes).abs().max() < 1e-4 and (y.std(axes, correction=0) - 1).abs().max() < 1e-3
    assert not torch.equal(a, b) and torch.equal(b, R.make_view(smooth(shape), **drawn["second"]))


@pytest.mark.parametrize("shape,size", [((2, 1, 24, 20), (12, 14)), ((2, 1, 16, 20, 14), (8, 10, 7))])
def test_one_reading_equals_crop_then_flip(shape, size):
    x, d = smooth(shape), len(shape) - 2
    boxes = torch.tensor([[[2.0] * d, [2.0 + s for s in size]], [[1.0] * d, [1.0 + s for s in size]]])  # one to one: no shrinking
    flips = torch.rand(2, d, generator=seeded(1)) < 0.5
    matrix = R.view_matrix(boxes, flips, torch.eye(d).expand(2, d, d), shape[2:], size)
    want = G.flip(G.crop_resize(x, boxes, size), flips)
    torch.testing.assert_close(G.affine(x, matrix, size), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(R.read_view(x, matrix, size), want, atol=1e-4, rtol=0)
    mask = (x[:, 0] > 0).long()
    assert torch.equal(R.view_mask(mask, matrix, size), (want[:, 0] > 0).long())


def test_nothing_flips_unless_asked():
    x = torch.empty(200, 1, 16, 16)
    x.normal_(generator=seeded())
    diagonal = lambda **o: R.augment(x, generator=seeded(), degrees=10, **o)[1]["matrix"][:, [0, 1], [0, 1]]
    assert (diagonal() > 0).all()
    asked = diagonal(flip_axes=(1,))
    assert (asked[:, 0] > 0).all() and 60 < (asked[:, 1] < 0).sum() < 140


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call,message", [
    (lambda x: G.random_flip(x[0, 0]), "add the batch or channel axis"),
    (lambda x: G.random_flip(x, axes=(2,)), "axes 0 to 1"),
    (lambda x: G.flip(x, torch.ones(3, 2)), "do not fit"),
    (lambda x: G.random_quarter_turn(x), "crop or resize it to a square"),
    (lambda x: G.random_quarter_turn(x[..., None].expand(2, 1, 16, 12, 4)), "crop or resize it to a cube"),
    (lambda x: G.quarter_turn(x[..., :12, :], torch.zeros(2)), "one whole number an image"),
    (lambda x: G.random_resized_crop(x, (8, 8, 8)), "2 spatial axes"),
    (lambda x: G.random_resized_crop(x, 0), "positive"),
    (lambda x: G.random_resized_crop(x, scale=(0, 2)), "scale"),
    (lambda x: G.crop_resize(x, torch.zeros(2, 3, 2)), "boxes"),
    (lambda x: G.crop_resize(x, torch.zeros(2, 2, 2), mode="cubic"), "nearest"),
    (lambda x: G.affine(x, torch.zeros(2, 3, 3)), "matrix"),
    (lambda x: G.random_affine(x, scale=(0, 1)), "scale"),
    (lambda x: I.brightness(x, torch.zeros(3)), "one number an image"),
    (lambda x: I.bezier(x, torch.zeros(2, 2), torch.zeros(2).bool()), "control points"),
    (lambda x: I.blur(x, torch.zeros(2, 3)), "sigma"),
    (lambda x: I.noise(x, x[:1]), "shapes must agree"),
    (lambda x: I.cutout(x, torch.zeros(2, 1, 2, 3)), "boxes"),
    (lambda x: I.random_patch_swap(x, 9), "side by side"),
    (lambda x: C.local_shuffle(x, torch.zeros(2, 3, 3).long()), "one place a voxel"),
    (lambda x: C.random_paint(x[..., :8]), "at least 12"),
    (lambda x: C.paint(x, torch.zeros(2, 1, 2, 3), x, torch.zeros(2).bool()), "boxes"),
    (lambda x: R.augment(x, flip_axes=(2,)), "flip_axes"),
])
def test_bad_input_gives_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 1, 16, 12, generator=seeded()))
