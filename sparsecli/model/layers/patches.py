"""Images as sequences of patches, and Sparse QKV over them: the convolution sees neighbours on all sides.

Shapes: B images, side x side patches of an image, T tokens (what leads, such as a class token, then the patches row by
row), S modules of M channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PatchGrid:
    """Where the tokens of an image lie.

    Attributes:
        side: patches along a side.
        leading: tokens before the patches, which lie nowhere.
    """

    side: int
    leading: int


class PatchEmbedding(nn.Module):
    """A linear layer over the pixels of each patch, and a trained class token before them.

    Args:
        class_token: whether there is one.
    """

    def __init__(self, channels: int, patch_size: int, d_model: int, class_token: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(channels * patch_size**2, d_model)
        self.class_token = nn.Parameter(torch.empty(d_model)) if class_token else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, channels, height, width) -> (B, T, d)."""
        size = self.patch_size
        patches = pixel_values.unfold(2, size, size).unfold(3, size, size)  # (B, C, side, side, size, size)
        x = self.projection(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        if self.class_token is None:
            return x
        return torch.cat((self.class_token.to(x.dtype).expand(len(x), 1, -1), x), dim=1)


class PatchConvolution(nn.Module):
    """Convolution over neighbouring patches and modules, symmetric in both, shared by all modules.

    It is `ModuleConvolution` with a second axis of positions and without an order: beyond the edges of the image, and
    beyond the first and the last module, there are zeros. A leading token has no neighbours.

    Args:
        width: channels of a module.
        kernel: patches along a side of the neighbourhood; odd.
        kernel_modules: neighbouring modules; odd.
        count_area: count the kernel's area in the fan of the initialiser.
    """

    def __init__(self, width: int, kernel: int, kernel_modules: int, count_area: bool = True) -> None:
        super().__init__()
        if kernel % 2 == 0 or kernel_modules % 2 == 0:
            raise ValueError(f"kernels {kernel} and {kernel_modules} have to be odd: they are centred")
        self.weight = nn.Parameter(torch.empty(width, kernel, kernel, kernel_modules, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.count_area = count_area
        self.reset_parameters()

    def reset_parameters(self) -> None:
        width, kernel, _, kernel_modules, _ = self.weight.shape
        area = kernel**2 * kernel_modules if self.count_area else 1
        nn.init.normal_(self.weight, std=math.sqrt(1 / (width * area)))
        nn.init.normal_(self.bias, std=1e-6)

    def forward(self, x: Tensor, grid: PatchGrid) -> Tensor:
        """x (B, T, S, M) -> (B, T, S, M)."""
        weight = self.weight.flatten(3)  # (M, kernel, kernel, F_w * M)
        middle = weight.shape[1] // 2
        batch, _, modules, width = x.shape
        x = _with_neighbours(x, self.weight.shape[3])  # (B, T, S, F_w * M)
        leading, patches = x.split((grid.leading, grid.side**2), dim=1)
        # Every module is an image of its own, its channels last in memory: (B * S, F_w * M, side, side).
        images = (
            patches.transpose(1, 2).reshape(batch * modules, grid.side, grid.side, -1).permute(0, 3, 1, 2)
        )
        y = F.conv2d(images, weight.permute(0, 3, 1, 2), self.bias, padding=middle)
        y = y.permute(0, 2, 3, 1).reshape(batch, modules, grid.side**2, width).transpose(1, 2)
        if not grid.leading:
            return y
        return torch.cat((F.linear(leading, weight[:, middle, middle], self.bias), y), dim=1)


def _with_neighbours(x: Tensor, kernel_modules: int) -> Tensor:
    """Each module with those around it, zeros beyond the first and last: x (B, T, S, M) -> (B, T, S, F_w * M)."""
    if kernel_modules == 1:
        return x
    margin, modules = kernel_modules // 2, x.shape[2]
    padded = F.pad(x, (0, 0, margin, margin))
    return torch.cat([padded[:, :, first : first + modules] for first in range(kernel_modules)], dim=-1)


class PatchProjection(nn.Module):
    """Queries, keys and values from one shared projection m and three convolutions over patches (Sparse QKV).

    As in `ConvolutionProjection`, queries and keys look at 3 neighbouring modules and values at their own.

    Args:
        shared: the projection d -> d, multiplicative or dense.
    """

    def __init__(
        self, shared: nn.Module, d_model: int, modules: int, kernel: int, grid: PatchGrid, count_area: bool
    ) -> None:
        super().__init__()
        if d_model % modules:
            raise ValueError(f"d_model {d_model} is not a multiple of modules {modules}")
        width = d_model // modules
        self.shared = shared
        self.query = PatchConvolution(width, kernel, 3, count_area)
        self.key = PatchConvolution(width, kernel, 3, count_area)
        self.value = PatchConvolution(width, kernel, 1, count_area)
        self.modules_count, self.grid = modules, grid

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d) -> q, k, v (B, T, d)."""
        m = self.shared(x).unflatten(-1, (self.modules_count, -1))  # (B, T, S, M)
        q, k, v = (layer(m, self.grid).flatten(-2) for layer in (self.query, self.key, self.value))
        return q, k, v
