"""Adder networks, each with its twin of products.

A network is a function that builds it, and takes what makes its layers: `resnet20()` is the adder network,
`resnet20(conv=torch.nn.Conv2d)` its convolutional twin, and so for every convolutional network here. A vision
transformer takes what makes its blocks: `deit_tiny()` adds, `deit_tiny(block=product_block)` multiplies. Twins share
their keys but for the transformers, whose adder layers carry a normalisation each.

The first layer and the classifier are ordinary in all of them, as published, and residual additions are modules, so
that quantization finds them.
"""

from q_adder.models.deit import (
    AdderAttention,
    ProductAttention,
    ProductMatmul,
    TokenNorm,
    TransformerBlock,
    VisionTransformer,
    adder_block,
    deit_tiny,
    product_block,
)
from q_adder.models.published import load_published_resnet20
from q_adder.models.resnet import (
    BasicBlock,
    Bottleneck,
    CifarResNet,
    ImageNetResNet,
    bottleneck,
    original_bottleneck,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
)
from q_adder.models.vgg import VGGSmall, vgg_small

__all__ = [
    "AdderAttention",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "ImageNetResNet",
    "ProductAttention",
    "ProductMatmul",
    "TokenNorm",
    "TransformerBlock",
    "VGGSmall",
    "VisionTransformer",
    "adder_block",
    "bottleneck",
    "deit_tiny",
    "load_published_resnet20",
    "original_bottleneck",
    "product_block",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet50",
    "vgg_small",
]
