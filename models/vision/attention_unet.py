"""Attention U-Net: a U-Net whose skip connections pass through attention gates.

Oktay et al. 2018, "Attention U-Net: Learning Where to Look for the Pancreas",
https://arxiv.org/abs/1804.03999. The network follows the authors' multi-gate computed-tomography
network with deep supervision, in two or three spatial dimensions.

Where arithmetic can ride on a convolution it does, as an epilogue of :func:`tritonconv.conv2d`:

- ``relu(theta(x) + phi(g))`` is theta's epilogue, with ``phi(g)`` as epilogue argument;
- the sigmoid is psi's epilogue;
- a 1 × 1 convolution is linear in every pixel, so ``W(alpha * x) + b = alpha * W(x) + b``: the
  product with the attention map is the epilogue of W, and ``alpha * x`` is never written;
- in evaluation mode every batch normalisation (and ReLU) is its convolution's epilogue.

Where two maps meet before a convolution (skip and upsampled map, a pair of gates) it takes the
pair: their concatenation is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonconv.runtime.errors import bad_type, bad_value

from ._dims import dimension

Maps = Tensor | tuple[Tensor, Tensor]
"""A map, or two that stand for their concatenation along the channels."""


def _add_relu(y: Tensor, addend: Tensor) -> Tensor:
    return torch.relu(y + addend)


def _sigmoid(y: Tensor) -> Tensor:
    return torch.sigmoid(y)


def _affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return y * scale + shift


def _affine_relu(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(y * scale + shift)


def _attend_affine(y: Tensor, attention: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return y * attention * scale + shift


def _attend_affine_relu(y: Tensor, attention: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(y * attention * scale + shift)


class ConvNorm(nn.Module):
    """Convolution with bias, batch normalisation and, if asked, ReLU.

    Computes ``BatchNorm(conv(x))``. In evaluation mode the normalisation is an epilogue
    ``y * scale + shift`` of the convolution, with ``scale = weight / sqrt(var + eps)``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel; the padding keeps the size.
        relu: append a ReLU.
        dim: number of spatial dimensions, 2 or 3.

    Shapes:
        ``x``: ``(N, in_channels, *spatial)``, or two tensors of so many channels together; result
        ``(N, out_channels, *spatial)``.

    Example:
        >>> import torch
        >>> ConvNorm(3, 8, 3)(torch.randn(2, 3, 5, 7)).shape
        torch.Size([2, 8, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        relu: bool = True,
        dim: int = 2,
    ) -> None:
        super().__init__()
        self.ops = dimension(dim)
        self.relu = relu
        self.conv = self.ops.Conv(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = self.ops.BatchNorm(out_channels)

    def forward(self, x: Maps, attention: Tensor | None = None) -> Tensor:
        """Apply the block to ``x`` or, for a 1 × 1 kernel only, to ``attention * x``.

        Args:
            x: ``(N, in_channels, *spatial)``; a pair stands for its concatenation.
            attention: ``(N, 1, *spatial)`` or None.
        """
        conv, per_channel = self.conv, self.ops.per_channel
        if attention is not None and max(conv.kernel_size) > 1:
            raise bad_value("attention", "None for a kernel wider than 1", "a tensor")
        if self.training:
            if attention is None:
                y = conv(x)
            else:
                y = self.ops.conv(
                    x,
                    conv.weight,
                    epilogue=_affine,
                    epilogue_args=(attention, per_channel(conv.bias)),
                )
            y = self.norm(y)
            return torch.relu(y) if self.relu else y
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        shift = self.norm.bias + (conv.bias - self.norm.running_mean) * scale
        args: tuple[Tensor, ...] = (per_channel(scale), per_channel(shift))
        epilogue: Callable[..., Tensor] = _affine_relu if self.relu else _affine
        if attention is not None:
            args = (attention, *args)
            epilogue = _attend_affine_relu if self.relu else _attend_affine
        return self.ops.conv(
            x, conv.weight, padding=conv.padding, epilogue=epilogue, epilogue_args=args
        )


class GridAttentionGate(nn.Module):
    """The additive attention gate on a grid: scales ``x`` by how relevant ``g`` says it is.

    With ``theta`` a convolution whose kernel and stride are ``subsample``, and ``phi``, ``psi``
    and ``W`` 1 × 1 convolutions (section 2.2 of the paper, equations 1 and 2)::

        f     = relu(theta(x) + resize(phi(g)) )        at the resolution of theta(x)
        alpha = sigmoid(psi(f))                         one channel
        out   = BatchNorm(W(resize(alpha) * x))

    ``theta`` has no bias; ``phi``, ``psi`` and ``W`` have one. ``resize`` is linear with
    ``align_corners=False``; the authors' code leaves that open.

    Args:
        in_channels: channels of ``x`` and of the result.
        gating_channels: channels of ``g``.
        inter_channels: channels of ``f``; ``in_channels // 2`` by default. The networks of the
            paper use ``in_channels``.
        dim: number of spatial dimensions, 2 or 3.
        subsample: kernel and stride of ``theta``.
        pass_through_start: start fully open, as the paper does: ``psi`` begins with weight 0 and
            bias 3, so ``alpha`` is sigmoid(3) = 0.953 everywhere, a constant that the batch
            normalisation after ``W`` takes out again. (A later block of the authors' repository
            also sets this bias to 3; the one that the paper's network uses leaves 0, so that
            ``alpha`` starts near one half. ``False`` gives that.)

    Shapes:
        ``x``: ``(N, in_channels, *size)``; ``g``: ``(N, gating_channels, *any_size)``, usually half
        the size. Result ``(N, in_channels, *size)``; attention ``(N, 1, *size)``. Floating dtypes.

    Raises:
        ValueError: a number of channels or ``subsample`` is not positive, or ``dim`` is not 2 or 3.

    Example:
        >>> import torch
        >>> gate = GridAttentionGate(16, 32)
        >>> x, g = torch.randn(2, 16, 12, 20), torch.randn(2, 32, 6, 10)
        >>> out, alpha = gate(x, g, return_attention=True)
        >>> out.shape, alpha.shape, round(alpha.mean().item(), 3)
        (torch.Size([2, 16, 12, 20]), torch.Size([2, 1, 12, 20]), 0.953)
    """

    def __init__(
        self,
        in_channels: int,
        gating_channels: int,
        inter_channels: int | None = None,
        *,
        dim: int = 2,
        subsample: int = 2,
        pass_through_start: bool = True,
    ) -> None:
        super().__init__()
        if inter_channels is None:
            inter_channels = max(in_channels // 2, 1)
        for name, value in (
            ("in_channels", in_channels),
            ("gating_channels", gating_channels),
            ("inter_channels", inter_channels),
            ("subsample", subsample),
        ):
            if value < 1:
                raise bad_value(name, "a positive integer", value)
        self.ops = dimension(dim)
        self.pass_through_start = pass_through_start
        self.theta = self.ops.Conv(
            in_channels,
            inter_channels,
            subsample,
            stride=subsample,
            bias=False,
            epilogue=_add_relu,
        )
        self.phi = self.ops.Conv(gating_channels, inter_channels, 1)
        self.psi = self.ops.Conv(inter_channels, 1, 1, epilogue=_sigmoid)
        self.W = ConvNorm(in_channels, in_channels, 1, relu=False, dim=dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as :class:`AttentionUNet` documents."""
        _initialise(self)

    @overload
    def forward(self, x: Tensor, g: Tensor, return_attention: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, g: Tensor, return_attention: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, g: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gate ``x`` by ``g``; with ``return_attention`` return ``(out, alpha)``."""
        stride = self.theta.stride
        coarse = tuple(n // s for n, s in zip(x.shape[2:], stride, strict=True))
        if min(coarse) < 1:
            raise bad_value("x", f"spatial sides of at least {stride}", tuple(x.shape[2:]))
        f = self.theta(x, self.ops.resize(self.phi(g), coarse))
        alpha = self.ops.resize(self.psi(f), x.shape[2:])
        out = self.W(x, alpha)
        return (out, alpha) if return_attention else out


class _GatedSkip(nn.Module):
    """Several parallel gates, concatenated and brought back to the channels of the skip."""

    def __init__(self, channels: int, gating_channels: int, gates: int, **gate: Any) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            GridAttentionGate(channels, gating_channels, channels, **gate) for _ in range(gates)
        )
        self.combine = ConvNorm(gates * channels, channels, 1, dim=gate["dim"])

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        outs, alphas = zip(*(gate(x, g, return_attention=True) for gate in self.gates), strict=True)
        return self.combine(_together(outs)), torch.cat(alphas, 1)


class AttentionUNet(nn.Module):
    """Attention U-Net, in two or three dimensions.

    The encoder has ``len(widths) - 1`` levels of two 3 × 3 convolutions (bias, batch normalisation,
    ReLU) and a 2 × 2 maximum pooling, and a centre of the last width. A decoder level doubles the
    coarser feature linearly, concatenates ``[skip, doubled]`` and applies two convolutions. The
    skips of every level but the first pass through ``gates_per_level`` attention gates, each
    steered by the next coarser decoder feature; the coarsest by the gating signal, a 1 × 1
    convolution of the centre. With deep supervision a 1 × 1 convolution at every level predicts
    the classes, all are resized to the input and a last 1 × 1 convolution fuses them.

    Initialisation: Kaiming normal (fan-in) for convolutions, N(1, 0.02²) for the weights of batch
    normalisation, 0 for biases; the gates as :class:`GridAttentionGate` says.

    Inputs may have any size: they are extended at both ends by repeating the border to multiples
    of ``2 ** (len(widths) - 1)``, and the result is cropped back. In training mode the centre must
    hold more than one value per channel (batch normalisation), so one 16 × 16 image is too little.

    Args:
        in_channels: channels of the input.
        num_classes: channels of the result.
        dim: number of spatial dimensions, 2 or 3.
        widths: channels of the levels, finest first, and of the centre.
        gates_per_level: parallel gates on each gated skip; 0 gives the plain U-Net.
        separate_gating: with False the centre itself steers the coarsest gates.
        deep_supervision: with False the classes come from the finest level alone.
        gate_subsample: stride of theta in the gates.
        pass_through_start: start the gates open.

    Shapes:
        Input ``(N, in_channels, *size)``, floating; result ``(N, num_classes, *size)`` logits.
        With ``return_attention``: ``(logits, {level: (N, gates_per_level, *size)})``, the maps
        resized to the input, levels counted from 1, the finest; 2 is the finest gated one.

    Raises:
        ValueError: an argument or the shape of the input does not fit.
        TypeError: the input is not floating.

    Example:
        >>> import torch
        >>> net = AttentionUNet(1, 3, widths=(4, 8, 16)).eval()
        >>> logits, attention = net(torch.randn(1, 1, 30, 45), return_attention=True)
        >>> logits.shape, {level: tuple(a.shape) for level, a in attention.items()}
        (torch.Size([1, 3, 30, 45]), {2: (1, 2, 30, 45)})

    Sources: Oktay et al. 2018 (arXiv 1804.03999); details from the authors' code,
    https://github.com/ozan-oktay/Attention-Gated-Networks (MIT; nothing is copied from it). With
    ``dim=3``, four classes and ``separate_gating=False`` it has the 6.40 M parameters of the paper.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        dim: int = 2,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        gates_per_level: int = 2,
        separate_gating: bool = True,
        deep_supervision: bool = True,
        gate_subsample: int = 2,
        pass_through_start: bool = True,
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise bad_value("in_channels", "a positive integer", in_channels)
        if num_classes < 2:
            raise bad_value("num_classes", "at least 2, the background included", num_classes)
        if len(widths) < 2 or min(widths) < 1:
            raise bad_value("widths", "at least two positive integers", tuple(widths))
        if gates_per_level < 0:
            raise bad_value("gates_per_level", "0 or more", gates_per_level)
        self.ops = dimension(dim)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.widths = tuple(widths)
        self.deep_supervision = deep_supervision

        def double(channels: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                ConvNorm(channels, width, 3, dim=dim), ConvNorm(width, width, 3, dim=dim)
            )

        *levels, centre = self.widths
        inputs = (in_channels, *levels)
        self.encoder = nn.ModuleList(double(c, w) for c, w in zip(inputs[:-1], levels, strict=True))
        self.centre = double(levels[-1], centre)
        self.decoder = nn.ModuleList(
            double(w + coarser, w) for w, coarser in zip(levels, self.widths[1:], strict=True)
        )
        self.gating: nn.Module = nn.Identity()
        self.skips = nn.ModuleDict()
        if gates_per_level and len(levels) > 1:
            if separate_gating:
                self.gating = ConvNorm(centre, centre, 1, dim=dim)
            for level in range(2, len(levels) + 1):
                self.skips[str(level)] = _GatedSkip(
                    self.widths[level - 1],
                    self.widths[level],
                    gates_per_level,
                    dim=dim,
                    subsample=gate_subsample,
                    pass_through_start=pass_through_start,
                )
        heads = levels if deep_supervision else levels[:1]
        self.heads = nn.ModuleList(self.ops.Conv(w, num_classes, 1) for w in heads)
        self.fuse: nn.Module = nn.Identity()
        if deep_supervision:
            self.fuse = self.ops.Conv(len(heads) * num_classes, num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from the global generator."""
        _initialise(self)

    @overload
    def forward(self, input: Tensor, return_attention: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(
        self, input: Tensor, return_attention: Literal[True]
    ) -> tuple[Tensor, dict[int, Tensor]]: ...
    def forward(
        self, input: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Compute logits, and with ``return_attention`` the attention maps; see the class."""
        ops = self.ops
        if input.dim() != ops.count + 2 or input.shape[1] != self.in_channels:
            axes = ", ".join("DHW"[3 - ops.count :])
            raise bad_value(
                "input", f"shape (N, {self.in_channels}, {axes})", f"shape {tuple(input.shape)}"
            )
        if not input.is_floating_point():
            raise bad_type("input", "a floating dtype", input.dtype)
        size = input.shape[2:]
        x, inner = self._extend(input)
        extended = x.shape[2:]

        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = ops.max_pool(x, 2)
        x = self.centre(x)

        gate_signal = self.gating(x)
        attention: dict[int, Tensor] = {}
        scores: list[Tensor] = []
        for level in range(len(skips), 0, -1):
            skip = skips[level - 1]
            if str(level) in self.skips:
                skip, alphas = self.skips[str(level)](skip, gate_signal)
                if return_attention:
                    attention[level] = ops.resize(alphas, extended)[inner]
            pair = (skip, ops.resize(x, skip.shape[2:]))
            x = gate_signal = self.decoder[level - 1](pair)
            if level <= len(self.heads):
                scores.append(ops.resize(self.heads[level - 1](x), extended))
        logits = self.fuse(torch.cat(scores, 1) if len(scores) > 1 else scores[0])
        if extended != size:
            logits = logits[inner]
        return (logits, attention) if return_attention else logits

    def _extend(self, input: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Extend to the next multiples; return the result and the index of the input in it."""
        multiple = 2 ** (len(self.widths) - 1)
        pads: list[int] = []
        inner: list[Any] = [...]
        for side in input.shape[2:]:
            if side < 1:
                raise bad_value("input", "spatial sides of at least 1", tuple(input.shape))
            missing = -side % multiple
            before = missing // 2
            inner.append(slice(before, before + side))
            pads = [before, missing - before, *pads]  # F.pad counts from the last dimension
        return (F.pad(input, pads, mode="replicate") if any(pads) else input), tuple(inner)


def _together(maps: Sequence[Tensor]) -> Maps:
    """One map or two for a convolution, which takes no more."""
    if len(maps) == 1:
        return maps[0]
    first, *rest = maps
    return first, rest[0] if len(rest) == 1 else torch.cat(rest, 1)


def _initialise(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(m.weight, mode="fan_in")
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.weight, 1.0, 0.02)
        bias = getattr(m, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
    for m in module.modules():
        if isinstance(m, GridAttentionGate) and m.pass_through_start:
            nn.init.zeros_(m.psi.weight)
            nn.init.constant_(m.psi.bias, 3.0)


def build(in_channels: int = 1, num_classes: int = 2, **options: Any) -> AttentionUNet:
    """Build :class:`AttentionUNet`; the name by which tools reach it.

    Example:
        >>> sum(p.numel() for p in build(dim=3, num_classes=4, gates_per_level=0).parameters())
        5888004
    """
    return AttentionUNet(in_channels, num_classes, **options)
