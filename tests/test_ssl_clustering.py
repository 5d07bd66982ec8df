"DeepCluster and SwAV: k-means with its empty piles, Sinkhorn against loops, codes of the joined batch."
import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import Pretext
from medssl_nb.ssl.clustering import (
    Clusters, DeepCluster, Prototypes, Queue, SwAV, Whitening, joined_codes, kmeans, multi_crop, sinkhorn, swapped_prediction,
    uniform_weights, weighted_cross_entropy, whitening,
)
from medssl_nb.train.fit import fit

HERE = Path(__file__).parent


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(channels=1, dims=2):
    torch.manual_seed(0)
    return create_encoder("resnet18", dims, channels, width=4, stem="small")


def deepcluster(**options):
    return DeepCluster(encoder(), **{"clusters": 4, "pca": 8, "refresh_every": 5, **options})


def swav(**options):
    return SwAV(encoder(), **{"prototypes": 8, "hidden": 16, "dim": 8, "small": 2, **options})


# Whitening and k-means

def test_whitening_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = numbers(0, 60, 7) @ numbers(1, 7, 7) + 20
    mean, matrix = whitening(x, 4)
    ours, theirs = (x - mean) @ matrix, torch.from_numpy(PCA(4, whiten=True).fit_transform(x.double().numpy())).float()
    theirs *= (60 / 59) ** 0.5  # they divide by N - 1
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-3, atol=1e-3)


def test_whitening_of_few_images_and_of_none_that_differ():
    x = numbers(0, 3, 10)  # three images span two directions
    mean, matrix = whitening(x, 5)
    white = (x - mean) @ matrix
    torch.testing.assert_close(white.square().mean(0), torch.tensor([1.0, 1, 0, 0, 0]), atol=1e-4, rtol=0)
    assert whitening(torch.full((8, 3), 1e4), 3)[1].abs().max() == 0
    layer = Whitening(10, 256)
    layer.fit(numbers(1, 80, 10))
    assert layer.kept == 10 and (layer.matrix.abs().sum(0) > 0).sum() == 4  # a direction for every 20 images
    torch.testing.assert_close(layer(numbers(1, 80, 10)).norm(dim=1), torch.ones(80))


def test_kmeans_finds_groups_is_repeatable_and_refills_empty_piles():
    points = torch.cat([c + 0.1 * numbers(k, 20, 2) for k, c in enumerate(torch.tensor([[0.0, 0], [5, 0], [0, 5]]))])
    labels, centres = kmeans(points, 3)
    assert all(len(labels[20 * k : 20 * k + 20].unique()) == 1 for k in range(3)) and len(labels.unique()) == 3
    assert torch.equal(kmeans(points, 3)[0], labels)
    labels, centres = kmeans(points, 3, start=torch.tensor([[0.0, 0], [1, 1], [900, 900]]))
    assert len(labels.unique()) == 3 and centres.max() < 10


def test_identical_images_make_one_cluster_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = Clusters(4, 6)
        state.find(torch.ones(30, 4), 3)
    assert (state.weights > 0).sum() == 1 and state.nearest(numbers(0, 5, 4)).unique().numel() == 1


def test_nearest_never_names_an_empty_cluster():
    state = Clusters(4, 6)
    state.find(numbers(0, 50, 4), 3)
    assert torch.equal(state.nearest(numbers(0, 50, 4)), state.labels)
    assert state.nearest(numbers(5, 500, 4)).max() < 3


# DeepCluster

def test_weights_equal_drawing_evenly_over_clusters():
    labels = torch.tensor([0] * 50 + [1] * 8 + [3] * 2)
    weights = uniform_weights(labels, 5)
    assert weights[2] == weights[4] == 0
    shares = torch.stack([weights[k] * (labels == k).sum() / 60 for k in (0, 1, 3)])
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3))
    torch.testing.assert_close(weights[labels].mean(), torch.tensor(1.0))


def test_weighted_cross_entropy_by_loops():
    logits, labels, weights = numbers(0, 7, 4), torch.tensor([0, 1, 3, 3, 0, 1, 1]), torch.tensor([0.5, 2.0, 0.0, 1.0])
    slow = 0.0
    for row, k in zip(logits.double(), labels):
        slow -= weights[k] * (row[k].exp() / (row[0].exp() + row[1].exp() + row[3].exp())).log() / 7
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, weights).double(), slow)
    with torch.autocast("cpu", torch.bfloat16):
        assert weighted_cross_entropy(logits.bfloat16(), labels, weights).dtype == torch.float32


def images_of_groups(n=60):
    coarse = F.interpolate(numbers(0, 3, 1, 4, 4), size=(16, 16), mode="bilinear")
    return ImageSet(coarse.repeat_interleave(n // 3, 0) + 0.05 * numbers(1, n, 1, 16, 16))


def test_refresh_labels_every_image_and_forgets_the_classifier():
    method, images = deepcluster(), images_of_groups()
    method.train()
    statistics = {k: v.clone() for k, v in method.encoder.state_dict().items()}
    before = method.head.weight.clone()
    method.refresh(images)
    assert method.training and all(m.training for m in method.encoder.modules())
    assert all(torch.equal(v, statistics[k]) for k, v in method.encoder.state_dict().items()), "looking changed the encoder"
    assert len(method.clusters.labels) == 60 and not torch.equal(before, method.head.weight) and method.head.bias.abs().max() == 0
    assert all(len(method.clusters.labels[20 * g : 20 * g + 20].unique()) <= 2 for g in range(3))
    batch = images.subset([41, 3, 17]).stack()
    batch.index = torch.tensor([41, 3, 17])
    pretext = method.pretext(batch, torch.Generator().manual_seed(0))
    assert torch.equal(pretext.target, method.clusters.labels[batch.index])
    plain = method.pretext(batch.x, torch.Generator().manual_seed(0))  # without an index: the nearest centre
    assert torch.equal(plain.target, pretext.target)


def test_the_first_loss_after_a_refresh_is_that_of_guessing():
    method, images = deepcluster(), images_of_groups()
    method.refresh(images)
    torch.nn.init.zeros_(method.head.weight)
    batch = next(images.batches(60))
    loss = method(method.pretext(batch, torch.Generator().manual_seed(0)))["loss"]
    torch.testing.assert_close(loss, (method.clusters.weights > 0).sum().float().log(), rtol=1e-4, atol=1e-4)


def test_few_images_make_few_clusters():
    method = deepcluster(clusters=50)
    method.refresh(images_of_groups(60))
    assert (method.clusters.weights > 0).sum() == 6


def test_a_biased_answer_pays_for_the_small_clusters():
    labels = torch.tensor([0] * 90 + [1] * 10)
    constant = lambda p: torch.tensor([[p, 1 - p]]).log().repeat(100, 1)
    loss = lambda p: weighted_cross_entropy(constant(p), labels, uniform_weights(labels, 2))
    torch.testing.assert_close(loss(0.5), torch.tensor(2.0).log())
    assert all(loss(p) > loss(0.5) for p in (0.9, 0.7, 0.3, 0.1))


def test_a_killed_run_keeps_its_labels(tmp_path):
    images, options = images_of_groups(), dict(steps=8, batch_size=6, lr=1e-3, device="cpu", precision="fp32", progress=False)
    whole = deepcluster()
    fit(whole, images, **options)
    path = tmp_path / "run.safetensors"

    def kill(step, model):
        if step == 7:  # saved at step 6, its labels are of step 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(deepcluster(), images, **options, checkpoint=path, checkpoint_every=6, on_step=kill)
    again = deepcluster()
    fit(again, images, **options, checkpoint=path, checkpoint_every=6)
    for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


# Sinkhorn and SwAV

def sinkhorn_by_loops(scores, epsilon, iterations):
    q = np.exp(scores.double().numpy() / epsilon)
    for _ in range(iterations):
        for k in range(q.shape[1]):
            q[:, k] /= sum(q[i, k] for i in range(len(q)))
        for i in range(len(q)):
            q[i] /= sum(q[i, k] for k in range(q.shape[1]))
    return torch.from_numpy(q)


@pytest.mark.parametrize("b, k, epsilon, iterations", [(2, 3, 0.05, 3), (9, 4, 0.05, 3), (5, 20, 0.5, 1), (6, 6, 0.03, 10)])
def test_sinkhorn_equals_the_loops(b, k, epsilon, iterations):
    scores = F.normalize(numbers(b, b, 5), dim=1) @ F.normalize(numbers(k, k, 5), dim=1).T
    torch.testing.assert_close(sinkhorn(scores, epsilon, iterations).double(), sinkhorn_by_loops(scores, epsilon, iterations), rtol=1e-3, atol=1e-6)


def test_sinkhorn_shares_out_evenly():
    scores = numbers(0, 40, 8).clamp(-1, 1) + torch.arange(8) / 8
    codes = sinkhorn(scores, 0.2, 200)
    torch.testing.assert_close(codes.sum(1), torch.ones(40))
    torch.testing.assert_close(codes.sum(0), torch.full((8,), 5.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sinkhorn(scores, 0.2, 3).sum(1), torch.ones(40))  # rows come last
    torch.testing.assert_close(sinkhorn(scores, 0.2, 0), (scores / 0.2).softmax(1))


def test_sinkhorn_is_sound_at_the_edges_and_in_bf16():
    scores = numbers(0, 32, 8).clamp(-1, 1)
    for epsilon in (0.001, 0.01, 100.0):
        assert torch.isfinite(sinkhorn(scores, epsilon)).all()
    assert sinkhorn(torch.ones(2, 3)).sub(1 / 3).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores)
    assert codes.dtype == torch.float32 and torch.equal(codes, sinkhorn(scores))
    assert sinkhorn(scores.bfloat16()).dtype == torch.float32
    assert sinkhorn(scores.double()).dtype == torch.float64


def test_sinkhorn_does_not_see_the_order():
    scores = numbers(0, 10, 4)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sinkhorn(scores[order], 0.5), sinkhorn(scores, 0.5)[order])


def test_swapped_prediction_by_the_official_formula():
    views, temperature = [numbers(v, 6, 5) for v in range(4)], 0.1
    codes = [sinkhorn(v, 0.5) for v in views[:2]]
    loss = 0.0
    for i in (0, 1):  # the two large views; each is predicted by the three others
        part = 0.0
        for v in (v for v in range(4) if v != i):
            part -= (codes[i] * (views[v] / temperature).log_softmax(1)).sum(1).mean()
        loss += part / 3
    torch.testing.assert_close(swapped_prediction(views, codes, temperature), loss / 2)


@pytest.mark.parametrize("k", [2, 7])
def test_uniform_scores_cost_log_k(k):
    zeros = torch.zeros(5, k)
    torch.testing.assert_close(swapped_prediction([zeros] * 3, [sinkhorn(zeros)] * 2), torch.tensor(float(k)).log())


def test_a_collapsed_network_pays_at_least_log_k():
    "However the one answer looks: the balanced code is uniform. Unbalanced, it costs nothing."
    for seed in range(5):
        same = numbers(seed, 1, 6).clamp(-1, 1).repeat(8, 1)
        code, greedy = sinkhorn(same), sinkhorn(4 * same, 0.05, 0)
        torch.testing.assert_close(code, torch.full((8, 6), 1 / 6))
        assert swapped_prediction([same, same], [code, code]) >= torch.tensor(6.0).log() - 1e-6
    sure = torch.eye(6)[:1].repeat(8, 1)
    assert swapped_prediction([sure, sure], [sinkhorn(sure, 0.05, 0)] * 2) < 1e-3


def test_constant_images_cannot_beat_guessing():
    method = swav()
    constant = Pretext((torch.zeros(6, 1, 16, 16),) * 2)
    assert method(constant)["loss"] >= torch.tensor(8.0).log() - 1e-4


@pytest.mark.parametrize("agreement, epsilon, grows", [(0.4, 0.05, False), (0.6, 0.05, True), (0.1, 0.02, False), (0.3, 0.02, True)])
def test_faint_differences_grow_where_views_agree_by_more_than_epsilon_over_temperature(agreement, epsilon, grows):
    common, *own = numbers(0, 3, 1000, 30).double()
    views = [agreement**0.5 * common + (1 - agreement) ** 0.5 * noise for noise in own]
    size = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    loss = swapped_prediction([size * v for v in views], [sinkhorn(1e-3 * v, epsilon) for v in views], 0.1)
    assert (torch.autograd.grad(loss, size)[0] < 0) == grows


def test_it_leaves_the_uniform_answer_and_learns():
    method = swav(small=1, epsilon=0.02, views={"scale": (0.8, 1.0), "degrees": 5.0})
    history = fit(method, images_of_groups(), steps=60, batch_size=20, lr=3e-3, device="cpu", precision="fp32", progress=False)
    assert sum(history.terms["loss"][-5:]) / 5 < 2.0794 - 0.2  # log 8


def test_codes_carry_no_gradient_and_both_orders_cost_the_same():
    method = swav(small=0)
    pretext = method.pretext(numbers(0, 6, 1, 16, 16), torch.Generator().manual_seed(0))
    assert not any(c.requires_grad for c in method.codes([numbers(0, 4, 8).requires_grad_()] * 2))
    one, two = (copy.deepcopy(method)(Pretext(v))["loss"] for v in (pretext.views, pretext.views[::-1]))
    torch.testing.assert_close(one, two)


def test_prototypes_are_frozen_first_and_have_length_one():
    layer = Prototypes(4, 6, frozen=0.5)
    for progress, moves in ((0.25, False), (0.5, False), (0.75, True)):  # the progress after the step
        layer.zero_grad()
        layer(numbers(0, 3, 4)).square().sum().backward()
        assert (layer.weight.grad.abs().max() > 0) == moves
        with torch.no_grad():
            layer.weight.mul_(3.0)
        layer.after_step(progress)
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(6))
    assert layer(7 * numbers(0, 3, 4)).abs().max() <= 1 + 1e-6  # cosines


def test_frozen_prototypes_survive_the_optimiser_as_they_were():
    method = swav(frozen=0.9)
    before = method.prototypes.weight.clone()
    fit(method, images_of_groups(12), steps=4, batch_size=4, lr=1e-2, weight_decay=0.1, device="cpu", precision="fp32", progress=False)
    torch.testing.assert_close(method.prototypes.weight, before)


def test_queue_is_first_in_first_out_and_waits_until_full():
    queue = Queue(5, 1, 2)
    for start in (0, 2, 4):
        assert not queue.full()
        queue.offer(torch.arange(start, start + 2.0).view(1, 2, 1).repeat(2, 1, 1))
        queue.push()
    assert queue.full() and queue.kept[1].flatten().tolist() == [4, 5, 2, 3, 0]
    queue.push()
    assert queue.kept[1].flatten().tolist() == [4, 5, 2, 3, 0], "nothing was offered"
    empty = Queue(0, 1)
    empty.offer(torch.zeros(2, 3, 1)), empty.push()
    assert not empty.full()


def test_the_queue_takes_part_in_the_balance():
    scores, kept = numbers(0, 4, 3), numbers(1, 9, 3)
    torch.testing.assert_close(joined_codes(scores, kept, 0.5, 3), sinkhorn(torch.cat([scores, kept]), 0.5, 3)[:4])
    method = swav(queue=6)
    for step in range(3):
        terms = method(method.pretext(numbers(step, 4, 1, 16, 16), torch.Generator().manual_seed(step)))
        terms["loss"].backward()
        method.after_step(step / 3)
    assert method.queue.full() and torch.isfinite(terms["loss"])
    torch.testing.assert_close(method.queue.kept.norm(dim=2), torch.ones(2, 6))


def test_multi_crop_sizes_and_what_they_see():
    x = numbers(0, 200, 1, 56, 70)
    views, drawn = multi_crop(x, torch.Generator().manual_seed(0), small=3)
    assert [tuple(v.shape[2:]) for v in views] == [(56, 70)] * 2 + [(24, 30)] * 3 and len(drawn["small"]) == 3
    for draw in drawn["small"]:  # |det| is voxels of the image a voxel of the view
        share = torch.linalg.det(draw["matrix"][:, :, :2]).abs() * 24 * 30 / (56 * 70)
        assert share.min() > 0.09 and share.max() < 0.41
    assert not torch.equal(views[2], views[3])
    small, _ = multi_crop(x[:2], small=1, least=40)
    assert small[2].shape[2:] == (40, 40)


def test_volumes_get_small_volumes():
    method = SwAV(encoder(dims=3), prototypes=8, hidden=16, dim=8, small=1)
    pretext = method.pretext(numbers(0, 2, 1, 16, 24, 32))
    assert pretext.views[2].shape[2:] == tuple(max(method.encoder.smallest, n) for n in (7, 10, 14))
    assert torch.isfinite(method(pretext)["loss"])


# Two processes

WORKER = """
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, {here!r})
from test_ssl_clustering import deepcluster, images_of_groups, joined_codes, numbers, sinkhorn, swav
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
scores, kept = numbers(0, 8, 5).double(), numbers(1, 6, 5).double()
code = joined_codes(scores.chunk(2)[rank], kept, 0.5, 3)
wrong = (code - sinkhorn(torch.cat([scores, kept]), 0.5, 3)[:8].chunk(2)[rank]).abs().max()
torch.manual_seed(10 + rank)  # the processes must agree without sharing a seed
method = deepcluster()
torch.manual_seed(20 + rank)
method.refresh(images_of_groups(33))
mine = torch.cat([v.double().flatten() for v in (*method.clusters.buffers(), *method.head.parameters())])
theirs = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(theirs, mine)
net = swav(queue=4)
net.queue.offer(torch.stack([numbers(3, 4, 8).chunk(2)[rank]] * 2))
net.queue.push()
queue = (net.queue.kept[0] - numbers(3, 4, 8)).abs().max()
if rank == 0:
    print(json.dumps([wrong.item(), (theirs[0] - theirs[1]).abs().max().item(), queue.item(), len(method.clusters.labels)]))
dist.destroy_process_group()
"""


def test_two_processes_balance_cluster_and_remember_together(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(here=str(HERE)))
    commands = [[sys.executable, str(script), str(rank), str(tmp_path / "meet")] for rank in (0, 1)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    told = [p.communicate(timeout=120) for p in running]
    assert all(p.returncode == 0 for p in running), told[0][1] + told[1][1]
    wrong, disagreement, queue, labelled = json.loads(told[0][0].splitlines()[-1])
    assert wrong < 1e-12 and disagreement == 0 and queue == 0 and labelled == 33
