"The DCGAN: what only it must hold; the contract of all methods is tested in test_ssl.py."
import math

import pytest
import torch
from torch import nn

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.adversarial import StridedEncoder, coverage, discriminator_loss, diversity, generator_loss, judging, unrecorded
from medssl_nb.ssl.base import create
from medssl_nb.train.fit import fit
from small_methods import asked, method_of


def batch_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_losses_equal_the_formulas_by_loops():
    real, made = 3 * batch_of(7), 3 * batch_of(5, seed=1)
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    slow = sum(-math.log(sigmoid(v)) for v in real.tolist()) / 7 + sum(-math.log(1 - sigmoid(v)) for v in made.tolist()) / 5
    assert abs(discriminator_loss(real, made).item() - slow) < 1e-5
    assert abs(generator_loss(made).item() + sum(math.log(sigmoid(v)) for v in made.tolist()) / 5) < 1e-5
    assert abs(generator_loss(made, saturating=True).item() - sum(math.log(1 - sigmoid(v)) for v in made.tolist()) / 5) < 1e-5


def test_who_cannot_decide_pays_log_2_for_each_kind():
    nothing = torch.zeros(2)
    torch.testing.assert_close(discriminator_loss(nothing, nothing), torch.tensor(4.0).log())
    torch.testing.assert_close(generator_loss(nothing), torch.tensor(2.0).log())


def test_losses_do_not_overflow():
    far = torch.tensor([-200.0, 200.0], requires_grad=True)
    for loss in (discriminator_loss(far, far), generator_loss(far)):
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(far.grad).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator_loss(far.bfloat16(), far.bfloat16()).dtype == torch.float32


def test_the_two_generator_losses_pull_the_same_way_but_not_as_hard():
    logits = torch.linspace(-5, 5, 11)
    for saturating, expected in ((False, logits.sigmoid() - 1), (True, -logits.sigmoid())):
        leaf = logits.clone().requires_grad_()
        generator_loss(leaf, saturating).backward()
        torch.testing.assert_close(leaf.grad * 11, expected)


def test_the_context_is_undone_even_after_an_error():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=0.3))
    network[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), judging(network):
        assert not network[0].weight.requires_grad and network[1].momentum == 0
        raise RuntimeError
    assert network[0].weight.requires_grad and network[1].momentum == 0.3
    assert not network[0].bias.requires_grad  # what was frozen stays frozen


def test_unrecorded_norms_answer_as_always():
    norm, x = nn.BatchNorm2d(3), batch_of(4, 3, 5, 5)
    with unrecorded(norm):
        y = norm(x)
    assert torch.equal(norm.running_mean, torch.zeros(3)) and torch.equal(y, norm(x))
    assert not torch.equal(norm.running_mean, torch.zeros(3))


@pytest.mark.parametrize("d", [2, 3])
def test_each_loss_moves_its_own_network(d):
    method = method_of("dcgan", d)
    pretext = asked(method, batch_of(4, 1, *[16] * d))
    discriminator = [*method.encoder.parameters(), *method.head.parameters()]
    method(pretext)["loss"].backward()
    assert all(p.grad is None for p in method.generator.parameters())
    assert all(p.grad is not None for p in discriminator)
    method.zero_grad(set_to_none=True)
    method.adversary(pretext).backward()
    assert all(p.grad is None for p in discriminator)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.generator.parameters())
    own = {id(p) for p in method.adversary_parameters()}
    assert own == {id(p) for p in method.generator.parameters()} and not own & {id(p) for p in discriminator}


def test_only_real_images_enter_the_running_statistics():
    method, x = method_of("dcgan", 2), batch_of(4, 1, 16, 16)
    start = {k: v.clone() for k, v in method.named_buffers() if "running" in k}
    pretext = asked(method, x)
    method.adversary(pretext)
    assert all(torch.equal(v, start[k]) for k, v in method.named_buffers() if k in start and not k.startswith("generator."))
    method(pretext)
    twin = method_of("dcgan", 2)
    twin.encoder(x)
    expected = dict(twin.encoder.named_buffers())
    for k, v in method.encoder.named_buffers():
        if "running" in k:
            torch.testing.assert_close(v, expected[k])


def test_pretext_leaves_no_trace_and_says_what_the_adversary_makes():
    method, x = method_of("dcgan", 2), batch_of(4, 1, 16, 16)
    before = {k: v.clone() for k, v in method.state_dict().items() if "num_batches" not in k}
    pretext = asked(method, x)
    assert all(torch.equal(v, method.state_dict()[k]) for k, v in before.items())
    assert pretext.views[0] is x or torch.equal(pretext.views[0], x)
    assert torch.equal(pretext.views[1], method.generator(pretext.target))
    assert pretext.target.abs().max() <= 1 and pretext.target.min() < -0.5


@pytest.mark.parametrize("space", [(16, 16), (32, 32), (24, 20), (9, 13)])
def test_real_images_take_the_generators_size(space):
    method = method_of("dcgan", 2)
    x = torch.ones(2, 1, *space)
    pretext = asked(method, x)
    assert pretext.views[0].shape == pretext.views[1].shape == (2, 1, 16, 16)
    torch.testing.assert_close(pretext.views[0], torch.ones(2, 1, 16, 16))
    halves = batch_of(2, 1, 32, 32)
    by_hand = (halves[..., ::2, ::2] + halves[..., 1::2, ::2] + halves[..., ::2, 1::2] + halves[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(asked(method, halves).views[0], by_hand)


def test_biases_alone_pay_chance():
    method = method_of("dcgan", 2)
    pretext = asked(method, batch_of(4, 1, 16, 16))
    nn.init.zeros_(method.head.weight)
    for bias in (-2.0, -0.1, 0.1, 2.0):
        nn.init.constant_(method.head.bias, bias)
        assert method(pretext)["loss"] > math.log(4)
    nn.init.zeros_(method.head.bias)
    torch.testing.assert_close(method(pretext)["loss"], torch.tensor(4.0).log())


def test_terms_add_up():
    method = method_of("dcgan", 2)
    terms = method(asked(method, batch_of(4, 1, 16, 16)))
    torch.testing.assert_close(terms["loss"], terms["real"] + terms["generated"])


def test_diversity_and_coverage_by_loops():
    images, reference = batch_of(5, 1, 4, 4), batch_of(7, 1, 4, 4, seed=1)
    pairs = lambda x: [(x[i] - x[j]).norm().item() for i in range(len(x)) for j in range(i)]
    mean = lambda values: sum(values) / len(values)
    assert abs(diversity(images, reference) - mean(pairs(images)) / mean(pairs(reference))) < 1e-5
    named = {min(range(7), key=lambda j: (image - reference[j]).norm().item()) for image in images}
    assert coverage(images, reference) == len(named) / 5
    assert diversity(images + 3, reference) == pytest.approx(diversity(images, reference), abs=1e-5)  # shifting all changes nothing


def test_a_collapsed_set_is_found():
    reference = batch_of(20, 1, 4, 4)
    assert diversity(reference[:1].repeat(10, 1, 1, 1), reference) == 0
    assert coverage(reference[:1].repeat(10, 1, 1, 1), reference) == 0.1
    assert coverage(reference, reference) == diversity(reference, reference) == 1


def test_fit_trains_both_and_samples_are_new_images():
    method = method_of("dcgan", 2)
    before = {k: v.clone() for k, v in method.named_parameters()}
    history = fit(method, ImageSet(batch_of(12, 1, 16, 16)), steps=3, batch_size=4, lr=1e-3, device="cpu", precision="fp32", progress=False)
    assert all(not torch.equal(v, before[k]) for k, v in method.named_parameters()), "a weight stood still"
    assert set(history.terms) == {"loss", "real", "generated"}
    draw = lambda seed: method.sample(3, torch.Generator().manual_seed(seed))
    assert draw(0).shape == (3, 1, 16, 16) and torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert not draw(0).requires_grad


def test_the_papers_generator():
    with torch.device("meta"):
        method = create("dcgan", create_encoder("resnet18", 2, 3, width=64))
    assert method.generator.size == (64, 64) and method.generator.code == 100
    assert sum(p.numel() for p in method.generator.parameters()) == 3_576_704  # the authors' code: widths 512 to 64


@pytest.mark.parametrize("d, space", [(2, (32, 24)), (2, (9, 11)), (3, (16, 8, 12))])
def test_the_papers_discriminator_is_an_encoder(d, space):
    encoder = StridedEncoder(d, 2, width=4, levels=3)
    maps = encoder(batch_of(2, 2, *space))
    for found, channels, stride in zip(maps, encoder.channels, encoder.strides):
        assert found.shape == (2, channels, *[-(-n // stride) for n in space])
    assert len(maps) == 3 and (maps[-1] < 0).any()  # leaky
    with pytest.raises(ValueError, match="channel"):
        encoder(batch_of(2, 1, *space))
    deviation = torch.cat([level.conv.weight.flatten() for level in StridedEncoder(width=32).levels]).std()
    assert abs(deviation - 0.02) < 0.001


def test_it_learns_with_the_papers_discriminator_too():
    torch.manual_seed(0)
    method = create("dcgan", StridedEncoder(2, 1, width=8, levels=3), code=8, width=4, levels=2)
    history = fit(method, ImageSet(1 + 0.3 * batch_of(16, 1, 16, 16)), steps=30, batch_size=16, lr=5e-3, device="cpu", precision="fp32", progress=False)
    assert sum(history.terms["loss"][5:15]) / 10 < math.log(4) - 0.1  # bright images are told from what a fresh generator makes


@pytest.mark.parametrize("options, said", [({"levels": 0}, "level"), ({"levels": 1, "start": 2}, "too small"), ({"start": (4, 4, 4)}, "start")])
def test_mistakes_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        create("dcgan", create_encoder("resnet18", 2, 1, width=4), width=4, **options)
