"""MPG-Net, the Metric-Perturbation Generation Network: a generator of images that match badly (APD, eq. 1-5).

For an image x_i and its negatives x_ij, j = 1 … M, images of other identities, with SP(x) = ln(1 + e^x):

    1  L_G  = −½ E log D(G(x_i))
    2  L_D  = −½ E log(1 − D(G(x_i))) − ½ E log D(x_ij)                         D's real images are the negatives
    3  L_MP = E SP( ‖ψ(G(x_i)) − ψ(x_ij)‖ − ‖ψ(G(x_i)) − ψ(x_i)‖ )              toward the negative, off the original
    4  L_C  = mean |φ(G(x_i)) − φ(x_i)|                                         shallow content stays
    5  L_S  = mean |G(G(x_i)) − G(x_i)|                                         a second pass changes nothing more

The generator descends L_G + λ1 L_MP + λ2 L_S + λ3 L_C, the discriminator L_D. The paper's L1 norms are means over
elements here: a sum over a map of φ would drown the other terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from apd.config.values import MPGConfig
from apd.models.trunk import Trunk, TrunkFeatures
from apd_kernels import metric_perturbation_loss

_BRIGHTEST = 1 - 2 / 255  # black and white are kept a level away from where tanh has no slope left


def _normed(convolution: nn.Module, channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return convolution, nn.InstanceNorm2d(channels, affine=True), nn.ReLU(inplace=True)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

        def convolution() -> nn.Conv2d:
            # No bias: the norm that follows takes the mean away.
            return nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)

        self.body = nn.Sequential(
            *_normed(convolution(), channels), convolution(), nn.InstanceNorm2d(channels, affine=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Generator(nn.Module):
    """A residual generator: 7×7 stem, two steps down, residual blocks, two steps up, tanh.

    What comes out of the last convolution is added to the image before the tanh, and is 0 at first: training starts
    from G(x) = x and learns what to change. From a random image it would first have to learn to copy.

    Args:
        width: channels of the stem; 4 × as many in the blocks.
        blocks: number of residual blocks.
    """

    def __init__(self, width: int = 64, blocks: int = 6) -> None:
        super().__init__()

        def down(inputs: int) -> tuple[nn.Module, ...]:
            return _normed(nn.Conv2d(inputs, 2 * inputs, 3, 2, padding=1, bias=False), 2 * inputs)

        def up(inputs: int) -> tuple[nn.Module, ...]:
            # A kernel that the stride divides covers every pixel equally often and leaves no checkerboard.
            return _normed(nn.ConvTranspose2d(inputs, inputs // 2, 4, 2, padding=1, bias=False), inputs // 2)

        self.body = nn.Sequential(
            *_normed(nn.Conv2d(3, width, 7, padding=3, padding_mode="reflect", bias=False), width),
            *down(width),
            *down(2 * width),
            *(_Residual(4 * width) for _ in range(blocks)),
            *up(4 * width),
            *up(2 * width),
        )
        # 3×3, not 7×7: on a CPU six times as quick with three output channels (32×16×128×64: 22 and 140 ms).
        self.change = nn.Conv2d(width, 3, 3, padding=1)
        for parameter in self.change.parameters():
            nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of such; H and W multiples of 4. The network itself works in [−1, 1]."""
        x = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        start = x.clamp(-_BRIGHTEST, _BRIGHTEST).atanh()
        return ((start + self.change(self.body(x))).tanh() + 1) / 2


class Discriminator(nn.Module):
    """PatchGAN: a logit for every patch of an image; spectral norm in place of other norms.

    Args:
        width: channels of the first layer; doubled by each following one, up to 8 ×.
        layers: layers of stride 2.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [3, *(width * min(2**i, 8) for i in range(layers + 1))]
        strides = [2] * layers + [1]
        self.hidden = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 4, stride, padding=1))
            for inputs, outputs, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.last = spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W) in [0, 1]: how much each patch looks like a real one."""
        x = images * 2 - 1
        for layer in self.hidden:
            x = leaky_relu(layer(x), 0.2)
        return self.last(x)


class GeneratorLosses(NamedTuple):
    """Each a scalar Tensor."""

    total: Tensor
    adversarial: Tensor  # L_G
    metric: Tensor  # L_MP
    content: Tensor  # L_C
    consistency: Tensor  # L_S


def adversarial_loss(logits: Tensor, real: bool) -> Tensor:
    """−½ E log D, or −½ E log(1 − D), of logits: the halves of eq. 1 and 2."""
    return 0.5 * binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def generator_losses(
    generator: Generator,
    discriminator: Discriminator,
    trunk: Trunk,
    images: Tensor,
    original: TrunkFeatures,
    bank: Tensor,
    negatives: Tensor,
    config: MPGConfig,
) -> tuple[GeneratorLosses, Tensor, Tensor]:
    """Eq. 1, 3, 4 and 5 of a batch.

    Args:
        images: x_i, (B, 3, H, W) in [0, 1].
        original: φ and ψ of them, without gradient.
        bank: ψ of all images that negatives are drawn from, (N, D).
        negatives: rows of the bank, int64 (B, M).
        config: the weights λ.

    Returns:
        the losses, G(x_i) with its gradient's graph, and ψ(G(x_i)).
    """
    made = generator(images)
    features = trunk(made)
    adversarial = adversarial_loss(discriminator(made), real=True)
    # Mixed precision leaves ψ in half precision; the bank is not.
    deep, anchor = features.deep.to(bank.dtype), original.deep.to(bank.dtype)
    metric = metric_perturbation_loss(deep, bank, anchor, indices=negatives)
    content = l1_loss(features.shallow, original.shallow)
    consistency = l1_loss(generator(made), made)
    total = adversarial + config.weight_mp * metric + config.weight_s * consistency + config.weight_c * content
    return GeneratorLosses(total, adversarial, metric, content, consistency), made, deep


def discriminator_loss(discriminator: Discriminator, made: Tensor, negatives: Tensor) -> Tensor:
    """Eq. 2: the negatives are the real images.

    Args:
        made: G(x_i), (B, 3, H, W); no gradient flows back to it.
        negatives: images x_ij, (B·M, 3, H, W).
    """
    return adversarial_loss(discriminator(made.detach()), real=False) + adversarial_loss(
        discriminator(negatives), real=True
    )
