"Patients as positives: who is whose positive, the losses by loops, mixtures, and what a plain tensor is taken for."
import math

import pytest
import torch

from medssl_nb.data.images import Batch, ImageSet
from medssl_nb.ssl.contrastive import nt_xent
from medssl_nb.ssl.patients import allowed_pairs, c2l_terms, draw_partners, mixup, neighbours, paired_contrast, two_of_each
from medssl_nb.train.fit import fit
from small_methods import asked, drawn, small

STILL = {"scale": (1, 1), "ratio": (1, 1), "degrees": 0, "p": (0, 0, 0)}  # views that change nothing but mean and deviation


def marked(n=8, size=12):
    "Images that can be told apart after any normalisation: image i has one bright voxel, number i."
    x = torch.zeros(n, 1, size * size)
    x[torch.arange(n), 0, torch.arange(n)] = 1
    return x.view(n, 1, size, size)


def number_of(view):
    "Which of the marked images each view shows."
    return view.flatten(1).argmax(1).tolist()


def patients(*group):
    "A Batch of marked images of these patients."
    return Batch(marked(len(group)), torch.arange(len(group)), torch.tensor(group))


@pytest.mark.parametrize("temperature", (0.07, 0.5))
def test_paired_contrast_is_that_of_the_loops(temperature):
    z, tables = drawn(7, 5), torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    positive, negative = tables
    u, terms = [v / v.norm() for v in z.double()], []
    for i in range(7):
        for j in range(7):
            if positive[i, j]:
                own = math.exp(u[i] @ u[j] / temperature)
                terms.append(-math.log(own / (own + sum(math.exp(u[i] @ u[k] / temperature) for k in range(7) if negative[i, k]))))
    torch.testing.assert_close(paired_contrast(z, positive, negative, temperature).item(), sum(terms) / len(terms), rtol=1e-4, atol=1e-5)


def test_paired_contrast_with_simclr_s_tables_is_nt_xent_and_length_does_not_count():
    first, second = drawn(6, 8), drawn(6, 8, seed=1)
    image, own = torch.arange(6).repeat(2), torch.eye(12, dtype=torch.bool)
    same = image[:, None] == image
    z = torch.cat([first, second])
    torch.testing.assert_close(paired_contrast(z, same & ~own, ~same, 0.1), nt_xent(first, second, 0.1))
    torch.testing.assert_close(paired_contrast(z * torch.rand(12, 1).add(0.1), same & ~own, ~same, 0.1), nt_xent(first, second, 0.1))


def test_paired_contrast_at_the_edges():
    none, every = torch.zeros(4, 4, dtype=torch.bool), ~torch.eye(4, dtype=torch.bool)
    for positive, negative, temperature in ((none, every, 0.1), (every, none, 0.01), (none, none, 0.1), (every, every, 0.01)):
        z = drawn(4, 3).requires_grad_()
        loss = paired_contrast(z, positive, negative, temperature)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    assert paired_contrast(drawn(4, 3), none, every) == 0 and paired_contrast(drawn(4, 3), every, none).abs() < 1e-6
    torch.testing.assert_close(paired_contrast(torch.ones(4, 3), every, every, 0.01), torch.tensor(4.0).log())  # itself and three


def test_micle_s_views_are_two_images_of_one_patient():
    views = asked(small("micle", views=STILL), patients(3, 3, 1, 1, 7, 7)).views
    assert number_of(views[0]) == [0, 2, 4] and number_of(views[1]) == [1, 3, 5]


@pytest.mark.parametrize("batch", [marked(4), patients(0, 1, 2, 3), patients(0, 1, 1, 2), patients(0, 0, 1)], ids=["tensor", "strangers", "not side by side", "odd"])
def test_who_is_not_paired_is_two_views_of_itself(batch):
    first, second = two_of_each(batch)
    assert torch.equal(first, second) and len(first) == len(getattr(batch, "x", batch))


def test_micle_on_a_tensor_is_simclr():
    ours, theirs = small("micle"), small("simclr")
    x = drawn(4, 1, 16, 16)
    a, b = asked(ours, x), asked(theirs, x)
    assert all(torch.equal(p, q) for p, q in zip(a.views, b.views))
    assert torch.equal(ours(a)["loss"], theirs(b)["loss"])


def test_fit_draws_two_images_of_each_patient():
    seen = []
    method = small("micle", views=STILL)
    pretext = method.pretext
    method.pretext = lambda batch, generator=None: seen.append(batch.group.tolist()) or pretext(batch, generator)
    fit(method, ImageSet(drawn(12, 1, 16, 16), groups=[i // 3 for i in range(12)]), steps=2, batch_size=8, device="cpu", progress=False)
    assert len(seen) == 2 and all(group[::2] == group[1::2] and len(set(group)) == 4 for group in seen)


def by_hand(metadata, rules):
    "Who may be whose positive, pair by pair."
    count, ok = len(next(iter(metadata.values()))), {"same": lambda a, b: a == b, "other": lambda a, b: a != b}
    return [[all(ok[rule](metadata[name][i], metadata[name][j]) for name, rule in rules.items()) for j in range(count)] for i in range(count)]


@pytest.mark.parametrize("rules", [{}, {"patient": "same"}, {"patient": "same", "study": "same"}, {"patient": "same", "study": "other"},
                                   {"patient": "same", "study": "same", "view": "other"}, {"patient": "other"}])
def test_rules_are_what_they_say(rules):
    metadata = {"patient": torch.tensor([0, 0, 0, 0, 1, 1, 2]), "study": torch.tensor([0, 0, 1, 1, 0, 1, 0]), "view": torch.tensor([0, 1, 0, 1, 0, 0, 1])}
    assert allowed_pairs(metadata, rules).tolist() == by_hand({k: v.tolist() for k, v in metadata.items()}, rules)


@pytest.mark.parametrize("metadata, rules, said", [({"patient": torch.zeros(2)}, {"study": "same"}, "'study'"), ({"patient": torch.zeros(2)}, {"patient": "diff"}, "'diff'")])
def test_wrong_rules_are_told(metadata, rules, said):
    with pytest.raises(ValueError, match=said):
        allowed_pairs(metadata, rules)


def test_partners_are_drawn_alike_and_only_from_the_allowed():
    allowed = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    found = torch.stack([draw_partners(allowed, g) for g in [torch.Generator().manual_seed(0)] for _ in range(3000)])
    share = torch.stack([(found == j).float().mean(0) for j in range(4)], 1)
    torch.testing.assert_close(share, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3], [0, 1, 0, 0], [0.5, 0, 0, 0.5], [0, 0, 0, 1]]), atol=0.03, rtol=0)


def test_medaug_s_key_follows_the_rules_and_its_query_does_not():
    metadata = {"study": [0, 1, 0, 1, 0, 1, 0, 1]}
    batch = Batch(marked(4), torch.tensor([4, 5, 2, 3]), torch.tensor([2, 2, 1, 1]))  # places in the set are not places in the batch
    for rule, keys in (("other", [1, 0, 3, 2]), ("same", [0, 1, 2, 3])):
        method = small("medaug", rules={"patient": "same", "study": rule}, metadata=metadata, views=STILL, queue=4)
        pretext = asked(method, batch)
        assert number_of(pretext.views[0]) == [0, 1, 2, 3] and number_of(pretext.views[1]) == keys
        assert pretext.drawn["partner"].tolist() == keys


def test_medaug_without_patients_pairs_each_image_with_itself():
    method = small("medaug", views=STILL, queue=4)
    assert asked(method, marked(4)).drawn["partner"].tolist() == [0, 1, 2, 3]
    alone = small("medaug", views=STILL, queue=4, rules={"patient": "same", "study": "same"}, metadata={"study": [0] * 9})
    assert asked(alone, Batch(marked(4), group=torch.zeros(4))).drawn["partner"].tolist() == [0, 1, 2, 3]  # no places: no metadata


def test_medaug_s_mistakes_are_told():
    with pytest.raises(ValueError, match="'study' has 2 numbers"):
        asked(small("medaug", rules={"study": "same"}, metadata={"study": [0, 1]}, queue=4), patients(0, 0, 1, 1))
    with pytest.raises(ValueError, match="rule about 'study'"):
        asked(small("medaug", rules={"study": "same"}, queue=4), patients(0, 0))


def test_medaug_s_loss_is_moco_s():
    ours, theirs = small("medaug", queue=4), small("moco_v2", queue=4)
    pretext = asked(ours, drawn(4, 1, 16, 16))
    assert torch.equal(ours(pretext)["loss"], theirs(pretext)["loss"])


@pytest.mark.parametrize("count", (1, 2, 5, 8))
def test_neighbours_are_exchanged_twice_to_nothing(count):
    order = neighbours(count)
    assert torch.equal(order[order], torch.arange(count)) and sum(order == torch.arange(count)) == count % 2


def test_mixup_by_loops():
    x, weight, order = drawn(4, 2, 3, 3), torch.tensor([0.5, 0.9, 1.0, 0.6]), torch.tensor([2, 0, 3, 1])
    slow = torch.stack([weight[i] * x[i] + (1 - weight[i]) * x[order[i]] for i in range(4)])
    torch.testing.assert_close(mixup(x, weight, order), slow)
    torch.testing.assert_close(mixup(x, torch.ones(4)), x)
    assert mixup(x.half(), weight).dtype == torch.half


def test_c2l_terms_by_loops():
    q, mq, k, mk, queue = (drawn(4, 6, seed=s) for s in range(5))
    weight, temperature = torch.tensor([0.5, 0.8, 1.0, 0.7]), 0.07
    length1 = lambda v: v / v.norm()

    def slow(queries, keys):
        total = 0
        for a, b in zip(queries.double(), keys.double()):
            scores = [length1(a) @ length1(c) / temperature for c in (b, *queue.double())]
            total += math.log(sum(math.exp(s) for s in scores)) - scores[0].item()
        return total / len(queries)

    mixed = torch.stack([weight[i] * length1(k[i]) + (1 - weight[i]) * length1(k[i ^ 1]) for i in range(4)])
    found = c2l_terms(q, mq, k, mk, weight, queue, temperature)
    expected = {"plain": slow(q, k), "image_mixup": slow(mq, mk), "feature_mixup": slow(mq, mixed)}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].item(), value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["loss"].item(), sum(expected.values()) / 3, rtol=1e-4, atol=1e-4)


def test_c2l_has_no_gradient_into_keys_and_weight_one_is_the_plain_mixture():
    q, mq, k, mk = (drawn(4, 6, seed=s).requires_grad_() for s in range(4))
    terms = c2l_terms(q, mq, k, mk, torch.ones(4), drawn(3, 6, seed=9))
    terms["loss"].backward()
    assert k.grad is None and mk.grad is None and q.grad.abs().sum() > 0 and mq.grad.abs().sum() > 0
    torch.testing.assert_close(c2l_terms(q, q, k, k, torch.ones(4), drawn(3, 6, seed=9))["feature_mixup"], c2l_terms(q, q, k, k, torch.ones(4), drawn(3, 6, seed=9))["plain"])


def test_c2l_sees_the_mixtures_of_its_views_and_queues_plain_keys_once():
    method = small("c2l", queue=6).train()
    pretext = asked(method, drawn(4, 1, 16, 16))
    first, second, mixed, other = pretext.views
    assert ((pretext.target >= 0.5) & (pretext.target <= 1)).all() and len(set(pretext.target.tolist())) == 4
    assert torch.equal(mixed, mixup(first, pretext.target)) and torch.equal(other, mixup(second, pretext.target))
    expected = method.keys_of(second)
    method(pretext), method.after_step(0.1)
    torch.testing.assert_close(method.queue.keys()[:4], expected)


def test_c2l_s_holes_are_cut():
    whole, cut = (asked(small("c2l", queue=4, holes=holes), drawn(3, 1, 28, 28)).views[0] for holes in (0, 3))
    assert torch.equal(whole[cut != 0], cut[cut != 0]) and 0.01 < (cut == 0).float().mean() < 0.08


def test_constant_images_are_no_solution():
    "One embedding for all: NT-Xent stays at log(2N - 1), and a queue of the same key at log(1 + K)."
    same = torch.ones(4, 8)
    torch.testing.assert_close(nt_xent(same, same, 0.1), torch.tensor(7.0).log())
    terms = c2l_terms(same, same, same, same, torch.full((4,), 0.7), torch.ones(15, 8))
    for name in ("plain", "image_mixup", "feature_mixup"):
        torch.testing.assert_close(terms[name], torch.tensor(16.0).log())
