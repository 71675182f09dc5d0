"""What packed phases ask of a device, in closed form."""

from __future__ import annotations

from ...runtime.device import DeviceFacts
from ...runtime.space import Footprint
from ..problem import ConvProblem
from .footprints import cdiv, rows_of
from .packed_geometry import PackedConfig, product_of


def packed_footprint(problem: ConvProblem, config: PackedConfig, device: DeviceFacts) -> Footprint:
    """Of the product; the kernel that packs the weights is one more launch."""
    product = product_of(problem, config.run, config.block_k)
    m, n, k = config.block_m, product.block_n, config.block_k
    size = problem.dtype.itemsize
    tiles = cdiv(product.units, m)
    threads = config.num_warps * (64 if device.arch.startswith("gfx") else 32)
    matrix = size == 2 or problem.precision != "ieee"
    grouped = device.arch == "sm_90" and matrix and config.num_warps >= 4
    streams = rows_of(problem, problem.y_strides, problem.out_channels)
    buffers = max(1, config.num_stages if grouped else config.num_stages - 1)
    if product.steps == 1:  # no loop
        buffers = 1
    pipeline = k * size * (m * (buffers if streams else 1) + n * buffers)
    # What a step is padded with is not loaded.
    rows = min(m, product.units) * product.offsets * problem.out_channels
    return Footprint(
        programs=tiles,
        threads=threads,
        shared_bytes=max(pipeline, m * n * size),
        accumulators=m * n // threads,
        bytes_loaded=tiles * size * (rows + product.steps * k * n),
        bytes_stored=size * problem.in_pixels * problem.in_channels,
        flops=2 * tiles * product.steps * m * n * k,
        steps=product.steps,
        in_flight=max(1, config.num_stages - 1) if streams else 1,
        launches=2,
        matrix=matrix,
    )
