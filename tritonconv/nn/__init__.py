"""``torch.nn`` modules over the library's functions, and conversion of existing models."""

from .batch_norm import ConvBatchNorm1d, ConvBatchNorm2d, ConvBatchNorm3d, Unnormalised
from .conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .convert import ConversionReport, Converted, Kept, convert, revert
from .graph_capture import GraphedStepError
from .graphed import CudaGraphReport, cuda_graph_report, without_cuda_graphs
from .layer_norm import LayerNorm, LayerNorm1d, LayerNorm2d, LayerNorm3d
from .norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .scaled import ScaledConv1d, ScaledConv2d, ScaledConv3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBatchNorm1d",
    "ConvBatchNorm2d",
    "ConvBatchNorm3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ConversionReport",
    "Converted",
    "CudaGraphReport",
    "GraphedStepError",
    "Kept",
    "LayerNorm",
    "LayerNorm1d",
    "LayerNorm2d",
    "LayerNorm3d",
    "ScaledConv1d",
    "ScaledConv2d",
    "ScaledConv3d",
    "Unnormalised",
    "convert",
    "cuda_graph_report",
    "revert",
    "without_cuda_graphs",
]
