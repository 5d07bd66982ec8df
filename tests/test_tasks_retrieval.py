"Retrieval: indices against loops and each other, patients left out, metrics against scikit-learn, Siamese pairs and loss."
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import Batch, ImageSet
from medssl_nb.nets.base import create
from medssl_nb.tasks.retrieval import (
    ExactIndex, FaissIndex, Siamese, average_precision, contrastive_loss, precision_at, reciprocal_rank, retrieval_scores,
)
from medssl_nb.train.fit import fit


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PATIENTS = [f"p{i % 7}" for i in range(40)]


def by_loops(z, patients, query, patient, k, same_patient=False):
    "Places of the k nearest by cosine, the obvious way."
    order = []
    for i, row in enumerate(z.tolist()):
        if same_patient or patients[i] != patient:
            dot = sum(a * b for a, b in zip(row, query.tolist()))
            order.append((-dot / math.sqrt(sum(a * a for a in row) * sum(b * b for b in query.tolist())), i))
    return [i for _, i in sorted(order)[:k]]


# indices

@pytest.mark.parametrize("same_patient", [False, True])
def test_exact_index_equals_loops(same_patient):
    z, q, asking = draw(40, 6), draw(9, 6, seed=1), [f"p{i}" for i in range(9)]  # p7 and p8 are new
    cosine, places = ExactIndex(z, PATIENTS).search(q, asking, 5, same_patient)
    assert places.tolist() == [by_loops(z, PATIENTS, row, who, 5, same_patient) for row, who in zip(q, asking)]
    torch.testing.assert_close(cosine, torch.stack([F.cosine_similarity(q[i : i + 1], z[places[i]]) for i in range(9)]))


def test_own_patient_is_never_an_answer():
    z = draw(40, 3)
    cosine, places = ExactIndex(z, PATIENTS).ranking(z, PATIENTS)
    own = torch.tensor([[i % 7 == j % 7 for j in range(40)] for i in range(40)])
    for i in range(40):
        found = places[i][places[i] >= 0].tolist()
        assert sorted(found) == [j for j in range(40) if not own[i, j]]
        assert (cosine[i][places[i] < 0] == -torch.inf).all() and (cosine[i].diff()[: len(found) - 1] <= 0).all()


def test_own_images_are_asked_for_by_name():
    z = draw(12, 4)
    places = ExactIndex(z, [i // 2 for i in range(12)]).search(z, [i // 2 for i in range(12)], 1, same_patient=True)[1]
    assert places[:, 0].tolist() == list(range(12))


def test_length_does_not_matter_and_the_callers_vectors_stay():
    z, q = draw(20, 4), draw(3, 4, seed=2)
    before = z.clone()
    once = ExactIndex(z, range(20)).search(q, "abc", 4)[1]
    assert torch.equal(once, ExactIndex(z * torch.rand(20, 1).add(0.1), range(20)).search(100 * q, "abc", 4)[1])
    assert torch.equal(z, before)


def test_many_queries_are_taken_in_parts():
    z, q = draw(15, 4), draw(2500, 4, seed=3)
    index = ExactIndex(z, range(15))
    whole = index.search(q, ["new"] * 2500, 3)[1]
    assert torch.equal(whole[1020:1030], index.search(q[1020:1030], ["new"] * 10, 3)[1])


@pytest.mark.parametrize("make, words", [
    (lambda: ExactIndex(draw(4, 2), "abc"), "one patient an image"),
    (lambda: ExactIndex(draw(4), "abcd"), r"give \(N, C\)"),
    (lambda: ExactIndex(torch.zeros(2, 3), "ab"), "points nowhere"),
    (lambda: ExactIndex(torch.tensor([[float("nan"), 1.0]]), "a"), "points nowhere"),
    (lambda: ExactIndex(draw(4, 2), "aabb").search(draw(1, 2), "a", 3), "2 of them of a query's own patient"),
    (lambda: ExactIndex(draw(4, 2), "aabb").search(draw(1, 2), "a", 0), "k = 0"),
    (lambda: ExactIndex(draw(4, 2), "aabb").search(draw(1, 3), "a", 1), "do not fit"),
    (lambda: ExactIndex(draw(4, 2), "aabb").search(draw(2, 2), "a", 1), "do not fit"),
])
def test_indices_refuse(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_missing_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        FaissIndex(draw(10, 4), range(10))


def test_faiss_looking_into_all_cells_is_exact_and_few_cells_find_most():
    centres = draw(20, 8, seed=4)
    z = centres.repeat(20, 1) + 0.3 * draw(400, 8, seed=5)
    patients, asking = [i % 50 for i in range(400)], [i % 50 for i in range(60)]
    q = centres.repeat(3, 1) + 0.3 * draw(60, 8, seed=6)
    cosine, places = ExactIndex(z, patients).search(q, asking, 5)
    same_cosine, same_places = FaissIndex(z, patients, cells=10, probes=10).search(q, asking, 5)
    assert torch.equal(places, same_places)
    torch.testing.assert_close(cosine, same_cosine)
    near = FaissIndex(z, patients, cells=10, probes=3).search(q, asking, 5)[1]
    assert (near[:, :, None] == places[:, None]).any(2).float().mean() > 0.9
    assert not any(patients[j] == who for row, who in zip(near.tolist(), asking) for j in row if j >= 0)


def test_faiss_says_what_it_could_not_find():
    z = torch.cat([torch.tensor([[1.0, 0.0]]) + 0.01 * draw(3, 2), torch.tensor([[-1.0, 0.0]]) + 0.01 * draw(5, 2, seed=1)])
    index = FaissIndex(z, range(8), cells=2, probes=1)
    cosine, places = index.search(torch.tensor([[1.0, 0.0]]), ["new"], 5)
    assert sorted(places[0, :3].tolist()) == [0, 1, 2] and places[0, 3:].tolist() == [-1, -1] and (cosine[0, 3:] == -torch.inf).all()
    scores = retrieval_scores(index, torch.tensor([1, 1, 0, 1, 1, 0, 0, 0]), torch.tensor([[1.0, 0.0]]), torch.tensor([1]), ["new"], k=3)
    assert scores["average precision"][0] <= 2 / 4  # two of four were out of reach
    with pytest.raises(ValueError, match="probes"):
        FaissIndex(z, range(8), cells=2, probes=3)


# metrics

@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_scikit_learn(seed):
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(seed)
    hits, scores = rng.random((6, 50)) < 0.3, rng.random((6, 50))
    order = np.argsort(-scores, 1)
    found = average_precision(np.take_along_axis(hits, order, 1))
    np.testing.assert_allclose(found, [average_precision_score(h, s) for h, s in zip(hits, scores)], rtol=1e-12)


def test_scores_equal_loops():
    hits = (draw(8, 20, seed=7) > 0.5).long()
    for row, p, ap, rr in zip(hits.tolist(), precision_at(hits, 6), average_precision(hits), reciprocal_rank(hits)):
        first = row.index(1) + 1
        assert (p, rr) == (pytest.approx(sum(row[:6]) / 6), pytest.approx(1 / first))
        assert ap == pytest.approx(sum(sum(row[: r + 1]) / (r + 1) for r in range(20) if row[r]) / sum(row))


def test_unanswerable_queries_are_nan_and_missed_ones_zero():
    rows = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]])
    total = torch.tensor([0, 2, 2])
    for values, last in ((precision_at(rows, 2, total), 0.5), (average_precision(rows, total), 0.5), (reciprocal_rank(rows, total), 1)):
        assert values[0].isnan() and values[1] == 0 and values[2] == last
    assert average_precision(rows).isnan().tolist() == [True, True, False] and average_precision(rows)[2] == 1


@pytest.mark.parametrize("call, words", [
    (lambda: precision_at(torch.ones(2, 3), 4), "k = 4"), (lambda: average_precision(torch.ones(3)), r"\(Q, R\)"),
    (lambda: average_precision(torch.ones(2, 3), [1, 3]), "never fewer than its hits"), (lambda: reciprocal_rank(torch.ones(2, 0)), r"\(Q, R\)"),
])
def test_metrics_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_retrieval_scores_by_loops():
    z, q = draw(30, 4), draw(6, 4, seed=8)
    labels, asked = torch.arange(30) % 3, torch.tensor([0, 1, 2, 0, 1, 5])  # nobody has label 5
    patients, asking = [i // 3 for i in range(30)], [0, 1, 2, 50, 51, 52]
    found = retrieval_scores(ExactIndex(z, patients), labels, q, asked, asking, k=4)
    for i in range(6):
        order = by_loops(z, patients, q[i], asking[i], 30)
        hits = torch.tensor([[int(labels[j] == asked[i]) for j in order]])
        for name, value in (("precision", precision_at(hits, 4)), ("average precision", average_precision(hits)), ("reciprocal rank", reciprocal_rank(hits))):
            assert found[name][i].item() == pytest.approx(value.item(), nan_ok=True)
    assert found["average precision"].isnan().tolist() == [False] * 5 + [True]


def test_a_label_only_the_own_patient_has_cannot_be_found():
    z = draw(6, 3)
    labels, patients = torch.tensor([7, 7, 0, 0, 1, 1]), ["a", "a", "b", "c", "d", "e"]
    honest = retrieval_scores(ExactIndex(z, patients), labels, z[:1], labels[:1], ["a"], k=1)
    leaky = retrieval_scores(ExactIndex(z, patients), labels, z[:1], labels[:1], ["a"], k=1, same_patient=True)
    assert honest["precision"].isnan().all() and leaky["precision"].tolist() == [1]
    with pytest.raises(ValueError, match="one class each"):
        retrieval_scores(ExactIndex(z, patients), labels[:4], z, labels, patients)


# Siamese

def small(dims=2):
    torch.manual_seed(0)
    return create("resnet18", spatial_dims=dims, width=4, stem="small")


def test_contrastive_loss_by_hand_and_its_gradient():
    a = torch.tensor([[3.0, 0], [3.0, 0], [0.3, 0], [0.0, 0], [0.0, 0]], requires_grad=True)
    b, same = torch.zeros(5, 2), torch.tensor([1, 0, 0, 0, 1])
    loss = contrastive_loss(a, b, same, margin=1.0)
    torch.testing.assert_close(loss, torch.tensor([4.5, 0, 0.5 * 0.49, 0.5, 0]), atol=2e-6, rtol=1e-6)
    loss.sum().backward()
    assert a.grad[0].tolist() == [3, 0] and a.grad[1].tolist() == [0, 0] and a.grad[2, 0] == pytest.approx(-0.7)
    assert torch.isfinite(a.grad).all()  # two images on one spot
    torch.testing.assert_close(contrastive_loss(b, a, same), loss)


@pytest.mark.parametrize("dims", [2, 3])
def test_siamese_loss_equals_a_loop(dims):
    model = Siamese(small(dims), margin=0.7).eval()
    batch = Batch(draw(6, 1, *[16] * dims), labels=torch.tensor([0, 0, 1, 1, 2, 2]))
    pairs = model.pretext(batch, torch.Generator().manual_seed(0))
    terms, z = model(pairs), [F.normalize(model.encoder(batch.x[i : i + 1])[-1].flatten(2).mean(2)[0], dim=0) for i in range(6)]
    total = 0
    for i, j in enumerate(pairs.partner.tolist()):
        d = (z[i] - z[j]).norm()
        total += 0.5 * (d**2 if batch.labels[i] == batch.labels[j] else max(0, 0.7 - d) ** 2) / 6
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx((terms["pull"] + terms["push"]).item())
    terms["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pairs_are_half_alike_never_oneself_and_drawn_by_the_generator():
    model, labels = Siamese(small()), torch.arange(60) % 4
    batch = Batch(draw(60, 1, 8, 8), labels=labels)
    same = []
    for seed in range(20):
        pairs = model.pretext(batch, torch.Generator().manual_seed(seed))
        assert (pairs.partner != torch.arange(60)).all() and torch.equal(pairs.same, labels == labels[pairs.partner])
        assert torch.equal(pairs.partner, model.pretext(batch, torch.Generator().manual_seed(seed)).partner)
        same.append(pairs.same.float().mean().item())
    assert abs(np.mean(same) - 0.5) < 0.05


def test_batches_without_one_kind_of_pair():
    model = Siamese(small())
    alone = model.pretext(Batch(draw(3, 1, 8, 8), labels=torch.tensor([0, 1, 2])))
    assert not alone.same.any()
    one = model.pretext(Batch(draw(2, 1, 8, 8), labels=torch.tensor([1, 1])))
    assert one.same.all() and one.partner.tolist() == [1, 0]


@pytest.mark.parametrize("make, words", [
    (lambda: Siamese(small(), margin=0), "margin 0"), (lambda: Siamese(small(), margin=2.5), "margin 2.5"),
    (lambda: Siamese(small()).pretext(Batch(draw(2, 1, 8, 8))), "no labels"),
    (lambda: Siamese(small()).pretext(Batch(draw(1, 1, 8, 8), labels=torch.tensor([0]))), "at least two images"),
    (lambda: Siamese(small()).pretext(Batch(draw(2, 1, 8, 8), labels=torch.ones(2, 3))), "at least two images"),
])
def test_siamese_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_siamese_learns_to_retrieve_a_planted_class():
    def planted(n, seed):
        x, labels = 1.5 * draw(n, 1, 16, 16, seed=seed), torch.arange(n) % 3
        for i in range(n):
            x[i, 0, :, 5 * int(labels[i]) : 5 * int(labels[i]) + 3] += 1
        return ImageSet(x, labels=labels)

    def score(encoder):
        encoder.eval()
        with torch.no_grad():
            a, q = (encoder(part.stack().x)[-1].flatten(2).mean(2) for part in (planted(60, 1), planted(30, 2)))
        labels = torch.arange(60) % 3
        return retrieval_scores(ExactIndex(a, range(60)), labels, q, labels[:30], ["new"] * 30)["average precision"].mean().item()

    encoder = small()
    before = score(encoder)
    fit(Siamese(encoder), planted(60, 1), steps=40, batch_size=16, lr=1e-2, device="cpu", precision="fp32", progress=False)
    assert score(encoder) > before + 0.1
