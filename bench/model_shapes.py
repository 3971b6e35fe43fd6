"""The shapes of the parameters of well-known models."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """The parameters of torchvision's ResNet-50, 25,557,032 numbers in 161 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def gpt2() -> Shapes:
    """The parameters of GPT-2 small, 124,439,808 numbers in 148 tensors; its head is tied."""
    width = 768
    norm: Shapes = [(width,), (width,)]
    block: Shapes = [
        *norm,
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(50257, width), (1024, width), *block * 12, *norm]


def vit_b16() -> Shapes:
    """The parameters of ViT-B/16, 86,567,656 numbers in 152 tensors."""
    width = 768
    layer: Shapes = [(width,), (width,)]
    block: Shapes = [
        *layer,
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        *layer,
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    first: Shapes = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*first, *block * 12, *layer, (1000, width), (1000,)]


MODELS: dict[str, tuple[Callable[[], Shapes], int, int]] = {
    "ResNet-50": (resnet50, 25_557_032, 161),
    "GPT-2 small": (gpt2, 124_439_808, 148),
    "ViT-B/16": (vit_b16, 86_567_656, 152),
}
