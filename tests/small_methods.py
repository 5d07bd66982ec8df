"Every method of the cards, made tiny: the options and encoders that the tests of all methods share."
import torch

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import create

# Options that make a method tiny; none where nothing is said.
OPTIONS = {
    "exemplar_cnn": {"classes": 16},
    "relative_location": {"hidden": 64, "patch": 0.32, "gap": 0.0, "jitter": 0.0},  # five voxels of 16: smaller ones hold too little
    "jigsaw": {"permutations": 8, "hidden": 32},
    "barlow_twins": {"hidden": 32, "dim": 16},
    "vicreg": {"hidden": 32, "dim": 16},
    "wmse": {"hidden": 32, "dim": 4, "shrinkage": 0.1},
    "byol": {"hidden": 32, "dim": 16},
    "simclr": {"dim": 16},
    "deepcluster": {"clusters": 4, "pca": 8},
    "swav": {"prototypes": 8, "hidden": 32, "dim": 16, "small": 2, "frozen": 0.0},
}
# The network and its options, where a method wants another than a small ResNet-18.
NETWORKS = {
    "relative_location": ("resnet18", {"width": 16, "stem": "small"}),
    "models_genesis": ("unet", {"width": 4, "levels": 3}),
}


def method_of(name, spatial_dims, channels=1, seed=0):
    "The method of this name around a tiny encoder; random weights drawn by the seed."
    torch.manual_seed(seed)
    network, options = NETWORKS.get(name, ("resnet18", {"width": 4, "stem": "small"}))
    return create(name, create_encoder(network, spatial_dims, channels, **options), **OPTIONS.get(name, {}))
