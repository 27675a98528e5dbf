"""Sparse QKV: the multiplicative layer and the convolution over length and modules (paper section 3.2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecli.model.layers.tracing import tracing


class MultiplicativeDense(nn.Module):
    """y[s, m] = sum_i x[i] D[s, i] E[m, i] (paper section 3.2): a d_in x d_out map with d_in (S + d_out / S) weights.

    Args:
        d_in, d_out: widths; d_out = S * M.
        modules: S, the slow index of the output.
        modular: follow with an own M x M matrix for each module (an option of the original implementation).

    It saves the reading of weights, not arithmetic: d_in * d_out multiply-adds, as many as a dense layer.
    """

    def __init__(self, d_in: int, d_out: int, modules: int, modular: bool = False) -> None:
        super().__init__()
        if d_out % modules:
            raise ValueError(f"d_out {d_out} is not a multiple of modules {modules}")
        width = d_out // modules
        self.D = nn.Parameter(torch.empty(modules, d_in))
        self.E = nn.Parameter(torch.empty(width, d_in))
        self.modular = nn.Parameter(torch.empty(modules, width, width)) if modular else None
        self.bias = nn.Parameter(torch.empty(d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.D, std=0.5)
        nn.init.xavier_uniform_(self.E)
        if self.modular is not None:
            width = self.modular.shape[-1]
            limit = math.sqrt(6 / (width + width))  # the fans ignore the module axis
            nn.init.uniform_(self.modular, -limit, limit)
        nn.init.normal_(self.bias, std=1e-6)

    @property
    def matrix(self) -> Tensor:
        """The map without its modules' own (d_out, d_in): its row (s, m) is D[s] * E[m]."""
        return (self.D.unsqueeze(1) * self.E).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        d_in = self.D.shape[1]
        width = self.E.shape[0]
        tokens = x.numel() // d_in
        if self.modular is not None:
            y = F.linear(x.unsqueeze(-2) * self.D, self.E)  # (..., S, M)
            y = (y.unsqueeze(-2) @ self.modular).flatten(-3)
            return y + self.bias
        if tracing() or tokens > width:
            # With many tokens, writing it out once is cheaper than a d_in-vector for every token and module.
            return F.linear(x, self.matrix, self.bias)
        return F.linear(x.unsqueeze(-2) * self.D, self.E).flatten(-2) + self.bias


class ModuleConvolution(nn.Module):
    """Convolution over length (causal) and modules (symmetric), shared by all modules (paper section 3.2).

    A sequence is an image of height T and width S with M channels. The last kernel row meets the current position.

    Args:
        width_in, width_out: channels of a module.
        kernel_length: F_h, positions (the current one and F_h - 1 before it).
        kernel_modules: F_w, neighbouring modules; odd.
        count_area: count the kernel's area in the fan of the initialiser; the original does not.
    """

    def __init__(
        self, width_in: int, width_out: int, kernel_length: int, kernel_modules: int, count_area: bool = True
    ) -> None:
        super().__init__()
        if kernel_modules % 2 == 0:
            raise ValueError(f"kernel_modules {kernel_modules} is even: it could not be centred")
        # (M_out, F_h, F_w, M_in): one row serves an unfolded window, and permuted it is a channels-last kernel.
        self.weight = nn.Parameter(torch.empty(width_out, kernel_length, kernel_modules, width_in))
        self.bias = nn.Parameter(torch.empty(width_out))
        self.count_area = count_area
        self.reset_parameters()

    def reset_parameters(self) -> None:
        width_out, kernel_length, kernel_modules, width_in = self.weight.shape
        area = kernel_length * kernel_modules if self.count_area else 1
        nn.init.normal_(self.weight, std=math.sqrt(2 / ((width_in + width_out) * area)))
        nn.init.normal_(self.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, F_h - 1 + T, S, M_in), earlier positions first -> (B, T, S, M_out)."""
        margin = self.weight.shape[2] // 2
        kernel = self.weight.permute(0, 3, 1, 2)  # (M_out, M_in, F_h, F_w)
        image = x.permute(0, 3, 1, 2)  # (B, M_in, F_h - 1 + T, S)
        return F.conv2d(image, kernel, self.bias, padding=(0, margin)).permute(0, 2, 3, 1)

    def step(self, windows: Tensor) -> Tensor:
        """One position: windows (B, S, F_h * F_w * M_in) of `module_windows` -> (B, S, M_out)."""
        return F.linear(windows, self.weight.flatten(1), self.bias)


def module_windows(x: Tensor, kernel_modules: int) -> Tensor:
    """Windows (B, S, F_h * F_w * M) around every module of x (B, F_h, S, M), zeros beyond the first and last."""
    if kernel_modules == 1:
        return x.transpose(1, 2).flatten(-2)
    margin = kernel_modules // 2
    windows = F.pad(x, (0, 0, margin, margin)).unfold(2, kernel_modules, 1)  # (B, F_h, S, M, F_w)
    return windows.permute(0, 2, 1, 4, 3).flatten(-3)


class ConvolutionProjection(nn.Module):
    """Queries, keys and values from one shared projection m and three convolutions (paper section 3.2).

    Q and K have an F_h x 3 kernel, V has F_h x 1. V is made from m, not from x, unless `value_concat` joins x:
    `modules` joins it module by module, `whole` joins the vectors before they are cut into modules (an old
    behaviour of the original implementation, kept for its checkpoints).

    Args:
        shared: the projection d -> d (multiplicative in the paper; a dense one tells what the convolution brings).
        share_query_key: make no keys; queries serve as such.
    """

    def __init__(
        self,
        shared: nn.Module,
        d_model: int,
        modules: int,
        kernel: int,
        value_concat: Literal["none", "modules", "whole"] = "none",
        count_area: bool = True,
        share_query_key: bool = False,
    ) -> None:
        super().__init__()
        if d_model % modules:
            raise ValueError(f"d_model {d_model} is not a multiple of modules {modules}")
        width = d_model // modules
        self.shared = shared
        self.query = ModuleConvolution(width, width, kernel, 3, count_area)
        self.key = None if share_query_key else ModuleConvolution(width, width, kernel, 3, count_area)
        value_width = width if value_concat == "none" else 2 * width
        self.value = ModuleConvolution(value_width, width, kernel, 1, count_area)
        self.modules_count = modules
        self.value_concat = value_concat
        self.kernel = kernel

    def conv_input(self, x: Tensor) -> Tensor:
        """The input of the convolutions for x (B, T, d), which the cache keeps: m, or m and x if values need both."""
        m = self.shared(x)
        return m if self.value_concat == "none" else torch.cat((m, x), dim=-1)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows of `conv_input` (B, F_h - 1 + T, d or 2 d), earlier positions first -> q, k, v (B, T, d)."""
        d_model = self.modules_count * self.query.weight.shape[0]
        m = rows[..., :d_model].unflatten(-1, (self.modules_count, -1))  # (B, F_h - 1 + T, S, M)
        values = m
        if self.value_concat == "modules":
            x = rows[..., d_model:].unflatten(-1, (self.modules_count, -1))
            values = torch.cat((m, x), dim=-1)
        elif self.value_concat == "whole":
            values = rows.unflatten(-1, (self.modules_count, -1))
        if (
            rows.shape[1] == self.kernel and not tracing()
        ):  # one new position: a small product beats a convolution's set-up
            windows = module_windows(m, 3)
            q = self.query.step(windows).flatten(-2).unsqueeze(1)
            k = q if self.key is None else self.key.step(windows).flatten(-2).unsqueeze(1)
            return q, k, self.value.step(module_windows(values, 1)).flatten(-2).unsqueeze(1)
        q = self.query(m).flatten(-2)
        k = q if self.key is None else self.key(m).flatten(-2)
        return q, k, self.value(values).flatten(-2)


class MultiplicativeConvolution(nn.Module):
    """A multiplicative layer, then an F_h x 3 convolution: an output projection of the original implementation."""

    def __init__(self, d_model: int, modules: int, kernel: int, count_area: bool = True) -> None:
        super().__init__()
        width = d_model // modules
        self.shared = MultiplicativeDense(d_model, d_model, modules)
        self.convolution = ModuleConvolution(width, width, kernel, 3, count_area)
        self.modules_count = modules
        self.kernel = kernel

    def conv_input(self, x: Tensor) -> Tensor:
        """The input of the convolution for x (B, T, d), which the cache keeps."""
        return self.shared(x)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (B, F_h - 1 + T, d), earlier positions first -> (B, T, d)."""
        return self.convolution(rows.unflatten(-1, (self.modules_count, -1))).flatten(-2)
