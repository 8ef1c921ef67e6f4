"""What releases of TensorRT and Triton accept, as data.

Sources: onnx-tensorrt's operators.md at 10.1 (opset 9 to 20) and NVIDIA's ONNX Opset Guide for TensorRT 11.x (opset 9
to 25, ONNX 1.20); ONNX's table of IR versions and opsets (``onnx.helper.VERSION_TABLE``). Triton's releases name their
ONNX Runtime in ``build.py`` of the release branch; the newest opset and IR version of each ONNX Runtime, and the
operators of com.microsoft that it knows, were found by loading models into its wheel (1.14.1 has no wheel for our
Python any more: ONNX Runtime's table of versions).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from registry.errors import InputError

Version = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtRelease:
    """What TensorRT takes from this version on.

    Attributes:
        opsets: the oldest and the newest opset of the default domain.
        ir_version: the newest IR version of the ONNX release that its parser is built with.
    """

    opsets: tuple[int, int]
    ir_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonRelease:
    """What Triton's onnxruntime backend takes in a release.

    Attributes:
        onnxruntime: the version that the release is built with.
        opset: the newest opset of the default domain.
        ml_opset: the newest opset of ai.onnx.ml; a newer one is refused even where no node uses it.
        ir_version: the newest IR version.
    """

    onnxruntime: str
    opset: int
    ml_opset: int
    ir_version: int


TENSORRT: Mapping[Version, TensorRtRelease] = {
    (10, 0): TensorRtRelease(opsets=(9, 20), ir_version=10),
    (11, 0): TensorRtRelease(opsets=(9, 25), ir_version=13),
}

# Operators that TensorRT learnt after 10.0. Source: its release notes.
TENSORRT_SINCE: Mapping[str, Version] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
}

TRITON: Mapping[str, TritonRelease] = {
    "23.03": TritonRelease(onnxruntime="1.14.1", opset=18, ml_opset=3, ir_version=8),
    "23.06": TritonRelease(onnxruntime="1.15.0", opset=19, ml_opset=3, ir_version=9),
    "24.01": TritonRelease(onnxruntime="1.16.3", opset=19, ml_opset=3, ir_version=9),
    "24.04": TritonRelease(onnxruntime="1.17.3", opset=20, ml_opset=4, ir_version=9),
    "24.07": TritonRelease(onnxruntime="1.18.1", opset=21, ml_opset=5, ir_version=10),
    "24.10": TritonRelease(onnxruntime="1.19.2", opset=21, ml_opset=5, ir_version=10),
    "25.01": TritonRelease(onnxruntime="1.20.1", opset=21, ml_opset=5, ir_version=10),
    "25.04": TritonRelease(onnxruntime="1.21.0", opset=22, ml_opset=5, ir_version=10),
    "25.07": TritonRelease(onnxruntime="1.22.0", opset=22, ml_opset=5, ir_version=10),
    "26.01": TritonRelease(onnxruntime="1.23.2", opset=23, ml_opset=5, ir_version=11),
    "26.04": TritonRelease(onnxruntime="1.24.4", opset=25, ml_opset=5, ir_version=13),
    "26.07": TritonRelease(onnxruntime="1.27.0", opset=26, ml_opset=5, ir_version=13),
}

# Operators of com.microsoft younger than ONNX Runtime 1.14 -> the minor version that brought them.
CONTRIB_SINCE: Mapping[str, int] = {
    "PackedAttention": 15, "GroupQueryAttention": 16, "MatMulBnb4": 16, "MatMulFpQ4": 16, "MatMulNBits": 16,
    "PackedMultiHeadAttention": 16, "RotaryEmbedding": 16, "DynamicTimeWarping": 17, "GemmFloat8": 17, "MoE": 17,
    "UnfoldTensor": 17, "WhisperBeamSearch": 17, "GemmaRotaryEmbedding": 18, "QMoE": 18, "SparseAttention": 18,
    "GatherBlockQuantized": 20, "PagedAttention": 23, "CausalConvWithState": 27, "LinearAttention": 27,
    "MatMulNBitsMlp": 27, "MatMulNBitsQkv": 27,
}  # fmt: skip

# Types of tensors -> the IR version whose ONNX brought them.
TYPE_SINCE: Mapping[str, int] = {
    "FLOAT8E4M3FN": 9, "FLOAT8E4M3FNUZ": 9, "FLOAT8E5M2": 9, "FLOAT8E5M2FNUZ": 9, "INT4": 10, "UINT4": 10,
    "FLOAT4E2M1": 11, "FLOAT8E8M0": 12, "INT2": 13, "UINT2": 13,
}  # fmt: skip


def tensorrt_version(text: str) -> Version:
    """The version that ``10``, ``11`` or ``10.14`` names; a bare ``10`` is 10.0, so that what passes fits each 10.x.

    Raises:
        InputError: it is no version, or of a major version that nothing is known of.
    """
    major, _, minor = text.partition(".")
    known = sorted({version[0] for version in TENSORRT})
    if not major.isdecimal() or not (minor or "0").isdecimal() or int(major) not in known:
        raise InputError(
            f"nothing is known of TensorRT {text!r}",
            hint=f"Known are {' and '.join(map(str, known))}, also with a minor version (10.14).",
        )
    return int(major), int(minor or 0)


def tensorrt_release(version: Version) -> TensorRtRelease:
    """What is known of this version: the newest entry that is not newer."""
    return TENSORRT[max(known for known in TENSORRT if known <= version)]


def triton_release(text: str) -> TritonRelease:
    """What is known of a release of Triton.

    Raises:
        InputError: it is not in the table.
    """
    if text not in TRITON:
        raise InputError(f"nothing is known of Triton {text!r}", hint=f"Known releases: {', '.join(TRITON)}.")
    return TRITON[text]
