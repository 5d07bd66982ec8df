"DINO: the loss by hand and by loops, the centre, both collapses, the class token, two processes."
import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssl_nb import nets
from medssl_nb.nets.base import create_encoder, embed
from medssl_nb.ssl.base import Pretext
from medssl_nb.ssl.clustering import swapped_prediction
from medssl_nb.ssl.dino import DINO, Centre, WeightNormalised, describe, entropy, head, sharpened

HERE = Path(__file__).parent
TINY = dict(prototypes=8, hidden=16, bottleneck=8, small=2, frozen=0.0)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolutional(**options):
    torch.manual_seed(0)
    return DINO(create_encoder("resnet18", 2, width=4, stem="small"), **{**TINY, **options})


def transformer(dims=2, class_token=True):
    torch.manual_seed(0)
    return nets.create("vit", spatial_dims=dims, width=16, depth=2, heads=2, patch=4, class_token=class_token)


def question(method, batch=6, size=16, seed=0):
    return method.pretext(numbers(seed, batch, 1, size, size), torch.Generator().manual_seed(seed))


# The terms

def test_two_prototypes_by_hand():
    teacher, student, centre = torch.tensor([[0.3, 0.1]]), torch.tensor([[0.0, 0.2]]), torch.tensor([0.1, 0.0])
    p = 1 / (1 + math.exp(-(0.2 - 0.1) / 0.04))
    q = 1 / (1 + math.exp(0.2 / 0.1))
    words = sharpened(teacher, centre, 0.04)
    torch.testing.assert_close(words, torch.tensor([[p, 1 - p]]))
    loss = swapped_prediction([student, student], [words, words], 0.1)
    assert loss.item() == pytest.approx(-p * math.log(q) - (1 - p) * math.log(1 - q), rel=1e-5)


def by_loops(method, pretext):
    "The loss as in the authors' code: each large view's words against every other view, one pair at a time, row by row."
    total, pairs = 0.0, 0  # views of one size go through the networks together, as there
    teacher_scores = method.teacher_projector(embed(method.teacher_encoder, torch.cat(pretext.views[:2]))).chunk(2)
    scores = [s for part in (pretext.views[:2], pretext.views[2:]) for s in method.projector(embed(method.encoder, torch.cat(part))).chunk(len(part))]
    for i, said in enumerate(teacher_scores):
        for v, answer in enumerate(scores):
            if v == i:
                continue
            for t, s in zip(said.double(), answer.double()):
                p = [math.exp(x / 0.04) for x in (t - method.centre.value).tolist()]
                q = [math.exp(x / 0.1) for x in s.tolist()]
                total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q)) / len(said)
            pairs += 1
    return total / pairs, pairs


def test_the_loss_by_loops_over_crops():
    method = convolutional()
    method.centre.value.copy_(0.1 * numbers(3, 8))
    pretext = question(method)
    slow, pairs = by_loops(copy.deepcopy(method), pretext)
    assert pairs == 6  # 2 · (4 - 1)
    assert method(pretext)["loss"].item() == pytest.approx(slow, rel=1e-4)


def test_the_teacher_sees_large_views_only():
    method, seen = convolutional(), []
    method.teacher_encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    method(question(method, batch=3, size=28))
    assert seen == [(6, 1, 28, 28)]


def test_a_view_is_not_compared_with_itself():
    "What the student says of large view 1 is asked only by the teacher of large view 2."
    scores, words = [numbers(i, 4, 5) for i in range(2)], [numbers(i + 9, 4, 5).softmax(1) for i in range(2)]
    scores = [s.requires_grad_() for s in scores]
    swapped_prediction(scores, words, 0.1).backward()
    expected = ((scores[0] / 0.1).softmax(1) - words[1]) / 0.1 / 4 / 2
    torch.testing.assert_close(scores[0].grad, expected)


def test_without_small_views():
    method = convolutional(small=0)
    terms = method(question(method))
    assert len(question(method).views) == 2 and torch.isfinite(terms["loss"])


def test_entropy_and_divergence_make_the_loss():
    method = convolutional()
    terms = method(question(method))
    torch.testing.assert_close(terms["entropy"] + terms["divergence"], terms["loss"].detach())
    assert terms["divergence"] >= -1e-6 and 0 <= terms["entropy"] <= math.log(8) + 1e-6


def test_a_shrugging_teacher_asks_for_uniform_answers():
    "Teacher uniform: the loss is the student's cross-entropy with the uniform distribution, and log K at its best."
    method, pretext = convolutional(teacher_temperature=1e6), question(convolutional())
    answers = [s for part in (pretext.views[:2], pretext.views[2:]) for s in copy.deepcopy(method).answer(part)]
    weights = [1 / 6, 1 / 6, 2 / 6, 2 / 6]  # small views are asked by both of the teacher's
    expected = sum(-w * (s / 0.1).log_softmax(1).mean() for w, s in zip(weights, answers))
    terms = method(pretext)
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-4, atol=1e-4)
    assert terms["loss"] >= math.log(8) - 1e-5
    torch.testing.assert_close(terms["entropy"], torch.tensor(math.log(8)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [2, 7])
def test_both_collapses_and_their_constants(k):
    same = torch.zeros(5, k).index_fill(1, torch.tensor([1]), 0.5)  # the same answer for all images
    one_word = sharpened(same, torch.zeros(k), 0.01)
    shrug = sharpened(same, same.mean(0), 0.01)
    assert entropy(one_word) < 1e-6 and entropy(shrug).item() == pytest.approx(math.log(k), rel=1e-5)
    assert swapped_prediction([20 * same] * 3, [one_word] * 2) < 1e-6
    assert swapped_prediction([torch.zeros(5, k)] * 3, [shrug] * 2).item() == pytest.approx(math.log(k), rel=1e-5)


def test_a_common_offset_is_taken_away_by_the_centre():
    scores, offset = 0.1 * numbers(0, 6, 5), numbers(1, 5)
    torch.testing.assert_close(sharpened(scores + offset, offset), sharpened(scores, torch.zeros(5)), rtol=1e-4, atol=1e-6)


def test_words_are_float32_and_sound_at_low_temperature():
    scores = numbers(0, 2, 6).clamp(-1, 1)
    for temperature in (0.01, 0.0001, 1e4):
        words = sharpened(scores, torch.zeros(6), temperature)
        assert torch.isfinite(words).all() and torch.isfinite(entropy(words))
        torch.testing.assert_close(words.sum(1), torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert sharpened(scores.bfloat16(), torch.zeros(6)).dtype == torch.float32
    method = convolutional(temperature=0.01, teacher_temperature=0.01)
    loss = method(question(method, batch=2))["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in method.encoder.parameters())


# The centre

def test_the_centre_is_a_moving_average():
    centre, expected = Centre(3, 0.9), torch.zeros(3)
    for step in range(4):
        scores = numbers(step, 5, 3)
        centre.offer(scores)
        torch.testing.assert_close(centre.value, expected)  # not before the step is done
        centre.move()
        expected = 0.9 * expected + 0.1 * scores.mean(0)
        torch.testing.assert_close(centre.value, expected)
    centre.move()
    torch.testing.assert_close(centre.value, expected)  # nothing was offered


def test_the_centre_takes_in_the_teacher_s_scores():
    method = convolutional()
    pretext = question(method)
    scores = copy.deepcopy(method).teach(torch.cat(pretext.views[:2]))
    method(pretext)
    method.after_step(0.5)
    torch.testing.assert_close(method.centre.value, 0.1 * scores.mean(0))


# The teacher and the head

def test_no_gradient_reaches_the_teacher():
    method = convolutional()
    before = copy.deepcopy(method.state_dict())
    method(question(method))["loss"].backward()
    assert all(p.grad is None for part in (method.teacher_encoder, method.teacher_projector) for p in part.parameters())
    with torch.no_grad():
        for part in (method.encoder, method.projector):
            for p in part.parameters():
                p.add_(1.0)
    method.after_step(0.0)
    for name, parameter in method.named_parameters():
        if name.startswith("teacher"):
            torch.testing.assert_close(parameter, before[name] + 0.004, msg=name)


def test_prototypes_of_any_length_and_their_frozen_start():
    layer, z = WeightNormalised(4, 6, frozen=0.5), numbers(0, 3, 4)
    before = layer(z)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.5, 4, 6)[:, None])
    torch.testing.assert_close(layer(7 * z), before)
    for progress, moves in ((0.25, False), (0.5, False), (0.75, True)):
        layer.zero_grad()
        layer(z).square().sum().backward()
        assert (layer.weight.grad.abs().max() > 0) == moves
        layer.after_step(progress)
    torch.testing.assert_close((layer.weight.grad * layer.weight).sum(1), torch.zeros(6), atol=1e-6, rtol=0)  # along the sphere
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(z).dtype == torch.float32


def test_it_has_the_sizes_of_the_paper():
    layers = head(32, 2048, 256, 100)
    assert [tuple(m.weight.shape) for m in layers if hasattr(m, "weight")] == [(2048, 32), (2048, 2048), (256, 2048), (100, 256)]
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in layers)


def test_a_constant_answer_earns_nothing_once_it_is_centred():
    "Constant images, centre settled: the teacher shrugs, and the loss is at least log K."
    method = convolutional()
    constant = Pretext((torch.zeros(4, 1, 16, 16),) * 2)
    method.centre.value.copy_(method.teach(constant.views[0])[0])
    assert method(constant)["loss"] >= math.log(8) - 1e-4


# The class token

@pytest.mark.parametrize("dims", [2, 3])
def test_a_vit_speaks_by_its_class_token(dims):
    encoder, x = transformer(dims), numbers(0, 2, 1, *[8] * dims)
    tokens, _ = encoder.patches(x)
    torch.testing.assert_close(describe(encoder, x), encoder.encode(tokens)[:, 0])
    plain = transformer(dims, class_token=False)
    torch.testing.assert_close(describe(plain, x), embed(plain, x))
    method = DINO(encoder, **TINY)
    pretext = method.pretext(numbers(1, 3, 1, *[12] * dims), torch.Generator().manual_seed(0))
    assert pretext.views[2].shape[2:] == (5,) * dims  # 3/7 of the axis; padded to whole patches inside
    terms = method(pretext)
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"]) and all(p.grad is not None for p in encoder.parameters())
    assert encoder.class_token.grad.abs().max() > 0


# Two processes

WORKER = """
import sys, json, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
from test_ssl_dino import Centre, numbers
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
centre, alone = Centre(5), torch.zeros(5)
for step in range(3):
    scores = numbers(step, 8, 5)
    centre.offer(scores.chunk(2)[rank])
    centre.move()
    alone = 0.9 * alone + 0.1 * scores.mean(0)
if rank == 0:
    print(json.dumps((centre.value - alone).abs().max().item()))
dist.destroy_process_group()
"""


def test_two_processes_share_one_centre(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(here=str(HERE)))
    running = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    told = [p.communicate(timeout=120) for p in running]
    assert all(p.returncode == 0 for p in running), told[0][1] + told[1][1]
    assert json.loads(told[0][0].splitlines()[-1]) < 1e-6
