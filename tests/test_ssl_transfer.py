"After its pre-training every method hands on its encoder, and its decoder where it has one: from one channel to four, and fine-tuned."
import pytest
import torch
from small_methods import method_of

from medssl_nb.data import ImageSet
from medssl_nb.evaluate.protocols import finetune
from medssl_nb.nets.base import create
from medssl_nb.nets.unet import Decoder, UNet
from medssl_nb.ssl import cards
from medssl_nb.ssl.regions import step_of
from medssl_nb.train.weights import transfer

CASES = [(card.name, dims) for card in cards() for dims in card.dims]
WITH_DECODER = [(name, dims) for name, dims in CASES if isinstance(getattr(method_of(name, dims), "decoder", None), Decoder)]
STEPS = {"global_local": step_of("linear")}  # its decoder enlarges by interpolation


def patients(spatial_dims, channels, cases=6):
    "Images with a bright half and its mask; training, validation and test of two each."
    x = torch.randn(cases, channels, *(16,) * spatial_dims, generator=torch.Generator().manual_seed(0))
    x[..., 8:] += 2
    masks = torch.zeros(cases, *x.shape[2:], dtype=torch.long)
    masks[..., 8:] = 1
    images = ImageSet(x.numpy(), masks=masks.numpy(), regions=["background", "bright"])
    return [images.subset(range(i, i + 2)) for i in range(0, cases, 2)]


def tuned(network, spatial_dims, channels):
    "A short fine-tuning for segmentation: its score, between 0 and 1."
    result = finetune(network, *patients(spatial_dims, channels), task="segmentation", steps=2, batch_size=2, seed=0, device="cpu", progress=False)
    assert 0 <= result.score <= 1 and len(result.history.terms["loss"]) == 2


def more_channels(encoder, channels):
    "The same encoder made anew for so many channels."
    return create(**{**encoder.recipe, "in_channels": channels})


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_an_encoder_goes_from_one_channel_to_four_and_is_fine_tuned(name, dims):
    encoder = method_of(name, dims).encoder
    if encoder.in_channels != 1:  # methods of several modalities: fine-tuned as they are
        return tuned(encoder, dims, encoder.in_channels)
    wide = more_channels(encoder, 4)
    report = transfer(encoder, wide)
    assert not report.missing and not report.unexpected and len(report.reshaped) == 1
    x = torch.randn(2, 1, *(16,) * dims, generator=torch.Generator().manual_seed(1))
    four = x.expand(-1, 4, *x.shape[2:])  # four times the same image says what one says
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(encoder.eval()(x), wide.eval()(four)))
    tuned(wide, dims, 4)


@pytest.mark.parametrize(("name", "dims"), WITH_DECODER)
def test_encoder_and_decoder_go_into_a_segmentation_network(name, dims):
    method = method_of(name, dims)
    options = {"step": STEPS[name]} if name in STEPS else {}
    network = UNet(more_channels(method.encoder, method.encoder.in_channels), 2, skips=method.decoder.skips, **options)
    for source, target in ((method.encoder, network.encoder), (method.decoder, network.decoder)):
        report = transfer(source, target)
        assert not report.missing and not report.unexpected and not report.reshaped
    tuned(network, dims, method.encoder.in_channels)
