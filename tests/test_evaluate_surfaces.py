"Jaccard, surface distances, nested regions, PSNR and SSIM: MONAI, SciPy, scikit-image, loops, and every edge."
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.cohort import NESTED
from medssl_nb.evaluate.metrics import dice, jaccard, nested_scores, psnr, ssim, surface_distance


def blobs(space, seed, classes=3, n=2):
    "Masks of smooth blobs."
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((n, classes, *space)), (0, 0, *[2] * len(space)))
    fields[:, 0] += 0.3 * fields.std()
    return torch.from_numpy(fields.argmax(1))


def surface(mask):
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask)


def distances(a, b, spacing):
    "From each surface voxel of a to the nearest of b, in mm, one by one."
    there = np.argwhere(surface(b)) * np.array(spacing)
    return np.array([np.sqrt(((there - place * np.array(spacing)) ** 2).sum(1)).min() for place in np.argwhere(surface(a))])


@pytest.mark.parametrize("space, spacing", [((20, 17), (1.0, 1.0)), ((20, 17), (3.0, 0.5)), ((9, 11, 10), (2.5, 0.8, 1.2))])
def test_surface_distances_equal_a_loop_and_scipy(space, spacing):
    from scipy import ndimage

    truth, found = blobs(space, 0), blobs(space, 1)
    average, most, hd95 = (surface_distance(truth, found, 3, spacing, p) for p in (None, 100, 95))
    for n in range(2):
        for k in (1, 2):
            a, b = (truth[n] == k).numpy(), (found[n] == k).numpy()
            there, back = distances(a, b, spacing), distances(b, a, spacing)
            assert average[n, k - 1].item() == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
            assert most[n, k - 1].item() == pytest.approx(max(there.max(), back.max()), rel=1e-5)
            assert hd95[n, k - 1].item() == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
            whole = ndimage.distance_transform_edt(~surface(b), sampling=spacing)[surface(a)]
            np.testing.assert_allclose(np.sort(whole), np.sort(there), rtol=1e-5)


def test_jaccard_and_surfaces_are_monais():
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_iou

    truth, found = blobs((9, 11, 10), 2), blobs((9, 11, 10), 3)
    a, b = (F.one_hot(m, 3).movedim(-1, 1) for m in (truth, found))
    torch.testing.assert_close(jaccard(truth, found, 3), compute_iou(b, a, include_background=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = compute_average_surface_distance(b, a, symmetric=True, spacing=(2, 1, 1)), compute_hausdorff_distance(b, a, percentile=95, spacing=(2, 1, 1))
    torch.testing.assert_close(surface_distance(truth, found, 3, (2, 1, 1)), theirs[0])
    torch.testing.assert_close(surface_distance(truth, found, 3, (2, 1, 1), 95), theirs[1].float())


def test_jaccard_is_a_function_of_dice():
    truth, found = blobs((30, 30), 4), blobs((30, 30), 5)
    d = dice(truth, found, 3)
    torch.testing.assert_close(jaccard(truth, found, 3), d / (2 - d))


def test_absent_regions_have_the_documented_value_and_no_warning():
    truth, found = torch.zeros(4, 6, 6).long(), torch.zeros(4, 6, 6).long()
    truth[0, 2, 2] = found[1, 2, 2] = truth[3, 2, 2] = found[3, 2, 5] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for percentile in (None, 95, 100):
            scores = surface_distance(truth, found, 2, (1, 2), percentile).flatten().tolist()
            assert scores[:2] == [math.inf] * 2 and math.isnan(scores[2]) and scores[3] == 6
    overlap = jaccard(truth, found, 2).flatten().tolist()
    assert overlap[:2] == [0, 0] and math.isnan(overlap[2]) and overlap[3] == 0


def test_spacing_may_differ_from_case_to_case_and_scales_the_result():
    truth, found = blobs((12, 12), 6), blobs((12, 12), 7)
    one, two = surface_distance(truth, found, 3, (1, 2)), surface_distance(truth, found, 3, (2, 4))
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(surface_distance(truth, found, 3, [(1, 2), (2, 4)]), torch.stack([one[0], two[1]]))
    torch.testing.assert_close(surface_distance(truth, found, 3), surface_distance(truth, found, 3, (1, 1)))
    assert surface_distance(truth, truth, 3).abs().max() == 0
    torch.testing.assert_close(surface_distance(truth, found, 3), surface_distance(found, truth, 3))


def test_nested_scores_are_those_of_each_union():
    truth, found = blobs((24, 24), 8, classes=7), blobs((24, 24), 9, classes=7)
    scores = nested_scores(dice, truth, found, NESTED)
    assert scores.shape == (2, len(NESTED))
    for column, labels in zip(scores.T, NESTED.values()):
        inside = [sum(m == k for k in labels).bool() for m in (truth, found)]
        expected = [2 * int((a & b).sum()) / int(a.sum() + b.sum()) for a, b in zip(*inside)]
        assert column.tolist() == pytest.approx(expected)
    assert nested_scores(surface_distance, truth, found, [(4, 5, 6)], spacing=(2, 2), percentile=95).shape == (2, 1)
    wrong_part = torch.where(truth == 5, 6, torch.where(truth == 6, 5, truth))  # parts exchanged: the unions that hold both stay
    whole = [labels for labels in NESTED.values() if {5, 6} <= set(labels)]
    assert nested_scores(dice, truth, wrong_part, whole).eq(1).all()


@pytest.mark.parametrize("space", [(24, 31), (14, 15, 16)])
def test_psnr_and_ssim_are_scikit_images(space):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    g = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 2, *space, generator=g) * 3 - 1
    found = truth + 0.2 * torch.randn(truth.shape, generator=g)
    ours = psnr(truth, found), ssim(truth, found)
    for n in range(2):
        for c in range(2):
            a, b = truth[n, c].double().numpy(), found[n, c].double().numpy()
            low, span = a.min(), a.max() - a.min()
            assert ours[0][n, c].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=span), rel=1e-5)
            theirs = structural_similarity(a - low, b - low, data_range=span, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
            assert ours[1][n, c].item() == pytest.approx(theirs, abs=1e-4)


def test_psnr_and_ssim_edges():
    truth = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert psnr(truth, truth).item() == math.inf and ssim(truth, truth).item() == pytest.approx(1, abs=1e-6)
    worse = truth + 0.1
    torch.testing.assert_close(psnr(7 * truth - 3, 7 * worse - 3), psnr(truth, worse))  # the unit does not matter
    torch.testing.assert_close(ssim(7 * truth - 3, 7 * worse - 3), ssim(truth, worse), atol=1e-5, rtol=0)
    assert psnr(truth, worse, span=(0, 1)).item() == pytest.approx(20, abs=1e-4)
    assert psnr(torch.ones(1, 1, 12, 12), torch.zeros(1, 1, 12, 12), span=(0, 2)).item() == pytest.approx(20 * math.log10(2))


@pytest.mark.parametrize("call, words", [
    (lambda: jaccard(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long(), 2), "one size"),
    (lambda: surface_distance(torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), 2), 2), "whole numbers from 0"),
    (lambda: surface_distance(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4).long(), 2, (1, 1, 1)), "one positive length an axis"),
    (lambda: surface_distance(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4).long(), 2, [(1, 1), (1, 1)]), "1 cases of 2 axes"),
    (lambda: surface_distance(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4).long(), 2, (1, 0)), "positive"),
    (lambda: psnr(torch.zeros(1, 1, 12, 12), torch.ones(1, 1, 12, 12)), "give span"),
    (lambda: psnr(torch.zeros(1, 12, 12), torch.ones(1, 12, 12)), "must both be"),
    (lambda: psnr(torch.rand(1, 1, 12, 12), torch.full((1, 1, 12, 12), torch.nan)), "finite"),
    (lambda: ssim(torch.rand(1, 1, 12, 9), torch.rand(1, 1, 12, 9)), "11 or more"),
])
def test_they_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()
