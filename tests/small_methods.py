"Every method of the cards, made tiny: the options and encoders that the tests of all methods share."
import torch

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import create

# Options that make a method tiny; none where nothing is said.
OPTIONS = {
    "exemplar_cnn": {"classes": 16},
    "relative_location": {"hidden": 64, "patch": 0.32, "gap": 0.0, "jitter": 0.0},  # five voxels of 16: smaller ones hold too little
    "jigsaw": {"permutations": 8, "hidden": 32},
    "slice_order": {"hidden": 32},
    "patch_distance": {"dim": 8},
    "rubik_cube": {"permutations": 8, "hidden": 32},
    "rubik_cube_plus": {"permutations": 4, "hidden": 64, "share": 0.9},  # masks that forty steps can find
    "rubik_cube_pp": {"grid": 2, "width": 4},
    "barlow_twins": {"hidden": 32, "dim": 16},
    "vicreg": {"hidden": 32, "dim": 16},
    "wmse": {"hidden": 32, "dim": 4, "shrinkage": 0.1},
    "byol": {"hidden": 32, "dim": 16},
    "simsiam": {"hidden": 32, "dim": 16},
    "dino": {"prototypes": 16, "hidden": 32, "bottleneck": 16, "teacher_temperature": 0.02, "centring": 0.0, "small": 2, "frozen": 0.0},
    "simclr": {"dim": 16},
    "vae": {"code": 8, "size": 16, "width": 4},
    "moco_v1": {"dim": 16, "queue": 8, "momentum": 0.9},
    "moco_v2": {"dim": 16, "queue": 2, "momentum": 0.5},  # few images: in a longer queue each would meet its own old keys
    "micle": {"dim": 16},
    "medaug": {"dim": 16, "queue": 2, "momentum": 0.5, "views": {"scale": (0.8, 1.0)}},
    "c2l": {"dim": 16, "queue": 2, "momentum": 0.5, "holes": 0},
    "global_local": {"dim": 16},
    "cpc": {"grid": 3, "overlap": 0.5, "dim": 16, "hidden": 16},
    "cpc_pyramid": {"grid": 3, "overlap": 0.5, "dim": 16, "hidden": 16},
    "exemplar_triplet": {"dim": 16},
    "mae": {"width": 16, "depth": 1, "heads": 2},
    "context_encoder": {"width": 4},
    "dcgan": {"code": 8, "width": 4, "levels": 2},
    "latent_diffusion": {"width": 8, "depth": 1},
    "image_gpt": {"pool": 2, "levels": 8},
    "deepcluster": {"clusters": 4, "pca": 8},
    "swav": {"prototypes": 8, "hidden": 32, "dim": 16, "small": 2, "frozen": 0.0},
    "pcrl_v2": {"local": 2},
    "pcrl_v1": {"dim": 16, "queue": 8, "momentum": 0.9},
    "transvw": {"words": 4, "patch": 0.75, "hidden": 32, "weight": 0.1},  # patches of 12 voxels of 16: no smaller ones can be painted
    "colorization": {"width": 4},
    "skull_reconstruction": {"threshold": 0.5},  # noise has no surface that could stand for bone
    "pgl": {"hidden": 32, "dim": 16},
}
# The network and its options, where a method wants another than a small ResNet-18.
NETWORKS = {
    "relative_location": ("resnet18", {"width": 16, "stem": "small"}),
    "mae": ("vit", {"width": 32, "depth": 2, "heads": 2, "patch": 4}),
    "image_gpt": ("vit", {"width": 32, "depth": 2, "heads": 2, "patch": 2}),
    "models_genesis": ("unet", {"width": 4, "levels": 3}),
    "transvw": ("unet", {"width": 4, "levels": 3}),
}
# Channels of a batch, where one is too few; of these, cross_modal hides one from its encoder.
CHANNELS = {"colorization": 3, "modality_restoration": 2, "cross_modal": 2}


def channels_of(name):
    "How many channels the smallest batch has that the method takes."
    return CHANNELS.get(name, 1)


def method_of(name, spatial_dims, channels=None, seed=0):
    "The method of this name around a tiny encoder, for batches with these channels; random weights drawn by the seed."
    torch.manual_seed(seed)
    network, options = NETWORKS.get(name, ("resnet18", {"width": 4, "stem": "small"}))
    seen = (channels or channels_of(name)) - (name == "cross_modal")
    return create(name, create_encoder(network, spatial_dims, seen, **options), **OPTIONS.get(name, {}))


def small(name, d=2, channels=1, stem="small", **options):
    "A method with these options alone, around a tiny ResNet-18."
    torch.manual_seed(0)
    return create(name, create_encoder("resnet18", d, channels, width=4, stem=stem), **options)


def drawn(*shape, seed=0, dtype=torch.float32):
    "Normal numbers of this shape, drawn by the seed."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def asked(method, x, seed=0):
    "The method's pretext, drawn by the seed."
    return method.pretext(x, torch.Generator().manual_seed(seed))
