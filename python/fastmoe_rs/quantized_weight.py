"""A frozen weight of the experts as codes and scales, how one is made, and the numbers that it means.

Legend: E experts, N rows of a weight, D columns, its contraction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check

FORMATS = ("mxfp4", "fp8")
_FP8 = torch.float8_e4m3fn
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCK, _SQUARE = 32, 128


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """The weights [E, N, D] of a product of all experts, D the contraction, as codes times scales.

    Formats:
        "mxfp4": codes uint8 [E, N, D / 32, 16], two numbers E2M1 a byte, the lower half first; scales uint8
            [E, N, D / 32], exponents E8M0 (OCP Microscaling Formats 1.0). So are the `_blocks` and `_scales`
            of gpt-oss, whose gate and up rows alternate: pass them with interleaved=True.
        "fp8": codes float8_e4m3fn [E, N, D]; scales float32 [E, ceil(N / 128), ceil(D / 128)], each the
            factor of 128 x 128 codes, as DeepSeek-V3's `weight_scale_inv`.

    A number is code times scale in float32, rounded to the dtype that is asked for; a scale 255 of E8M0 and a
    code NaN of E4M3 are NaN. A weight is frozen: it has no gradient. It can be pickled and copied.

    Attributes:
        format: "mxfp4" or "fp8".
        codes: see above.
        scales: see above.

    Raises:
        ValueError, TypeError: a format that is none, codes or scales of another dtype, shape or device.
    """

    format: str
    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        _check.one_of("format", self.format, FORMATS)
        mxfp4 = self.format == "mxfp4"
        _check.tensor("codes", self.codes, "[E, N, D / 32, 16]" if mxfp4 else "[E, N, D]")
        _check.tensor(
            "scales", self.scales, "[E, N, D / 32]" if mxfp4 else "[E, ceil(N / 128), ceil(D / 128)]"
        )
        codes, scales = (torch.uint8, torch.uint8) if mxfp4 else (_FP8, torch.float32)
        for name, value, dtype in (("codes", self.codes, codes), ("scales", self.scales, scales)):
            if value.dtype != dtype:
                _check.wanted(name, f"dtype {value.dtype}", f"{dtype} for {self.format!r}", TypeError)
        experts, rows, columns = self.codes.shape[:3]
        if mxfp4:
            _check.shape("codes", self.codes, "[E, N, D / 32, 16]", (experts, rows, columns, 16))
            _check.shape("scales", self.scales, "[E, N, D / 32]", (experts, rows, columns))
        else:
            squares = (experts, -(-rows // _SQUARE), -(-columns // _SQUARE))
            _check.shape("scales", self.scales, "[E, ceil(N / 128), ceil(D / 128)]", squares)
        _check.like("scales", self.scales, "codes", self.codes, dtype=False)
        object.__setattr__(self, "codes", self.codes.detach())
        object.__setattr__(self, "scales", self.scales.detach())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, D)."""
        experts, rows, columns = self.codes.shape[:3]
        return experts, rows, columns * _BLOCK if self.format == "mxfp4" else columns

    @property
    def device(self) -> torch.device:
        """That of both tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The weight on another device."""
        return dataclasses.replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The numbers, [E, N, D].

        Args:
            dtype: float32, bfloat16, float16 or float64.

        Raises:
            TypeError: another dtype.
        """
        if dtype not in _check.DTYPES:
            _check.wanted("dtype", dtype, "float32, bfloat16, float16 or float64", TypeError)
        return numbers(self.codes, self.scales, dtype)

    def __reduce__(self) -> tuple[object, ...]:
        # The pickles of torch hold no float8.
        return of_bytes, (self.codes.view(torch.uint8), self.scales)

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.format!r}, {list(self.shape)}, device={str(self.device)!r})"


def quantize(weight: Tensor, format: str) -> QuantizedWeight:
    """Quantize weights [E, N, D] of any float dtype, an expert at a time.

    MXFP4 takes the scales of the OCP specification, 2 to the power floor(log2(the largest)) - 2, and rounds
    to nearest even; what exceeds 6 scales becomes 6. A number is off by at most a quarter of the largest of
    its 32. FP8 scales by the largest of 128 x 128, divided by 448; a number is off by at most a sixteenth of
    itself, or 2^-10 of the scale where that is more.

    Args:
        weight: [E, N, D], D the contraction; a multiple of 32 for "mxfp4".
        format: "mxfp4" or "fp8".

    Raises:
        ValueError: an unknown format, a shape that does not fit it, NaN or infinite weights.
        TypeError: no float tensor.
    """
    _check.one_of("format", format, FORMATS)
    _check.floating("weight", weight, "[E, N, D]")
    if not all(weight.shape):
        _check.wanted("weight", f"shape {tuple(weight.shape)}", "[E, N, D] without a size of 0")
    if format == "mxfp4" and weight.shape[2] % _BLOCK:
        _check.wanted(
            "weight", f"shape {tuple(weight.shape)}", "[E, N, D] with D a multiple of 32 for 'mxfp4'"
        )
    of_expert = _mxfp4 if format == "mxfp4" else _fp8
    with torch.no_grad():
        experts = [of_expert(_finite(expert.float())) for expert in weight]
    codes, scales = (torch.stack(parts) for parts in zip(*experts, strict=True))
    return QuantizedWeight(format, codes, scales)


def of_bytes(codes: Tensor, scales: Tensor) -> QuantizedWeight:
    """The weight of codes that are uint8, whatever their format."""
    if codes.ndim == 4:
        return QuantizedWeight("mxfp4", codes, scales)
    return QuantizedWeight("fp8", codes.view(_FP8), scales)


def numbers(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of the codes and scales of a `QuantizedWeight`, its FP8 codes also as uint8."""
    mxfp4 = codes.ndim == 4
    shape = (*codes.shape[:2], codes.shape[2] * _BLOCK) if mxfp4 else codes.shape
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if mxfp4:
        of_code = torch.tensor([*_E2M1, *(-number for number in _E2M1)], device=codes.device)
        byte = torch.arange(256, device=codes.device)
        of_byte = torch.stack((of_code[byte % 16], of_code[byte // 16]), dim=1)
        of_scale = torch.exp2(byte.double() - 127).float()
        of_scale[255] = torch.nan
    for expert, code, scale in zip(out, codes, scales, strict=True):
        if mxfp4:
            block = of_byte[code.int()].flatten(2)
            expert.copy_((block * of_scale[scale.int()][..., None]).flatten(1))
        else:
            expert.copy_(code.view(_FP8).float() * _squares(scale, expert.shape))
    return out


def _finite(weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        _check.wanted("weight", "NaN or infinite numbers", "finite ones, in float32 too")
    return weight


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = weight.unflatten(1, (-1, _BLOCK))
    # frexp has the exponent of a fraction below 1: one more than floor(log2).
    exponent = (torch.frexp(blocks.abs().amax(2)).exponent - 3).clamp(-127, 127)
    size = torch.ldexp(blocks.abs(), -exponent[..., None])
    code = 8 * blocks.signbit().to(torch.uint8)
    # Half of the way between two numbers it is the even code, that is now the lower, now the higher one.
    for middle in (0.25, 1.25, 2.5, 5.0):
        code += size > middle
    for middle in (0.75, 1.75, 3.5):
        code += size >= middle
    return code[..., ::2] + 16 * code[..., 1::2], (exponent + 127).to(torch.uint8)


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight, (0, -columns % _SQUARE, 0, -rows % _SQUARE))
    largest = whole.unflatten(1, (-1, _SQUARE)).unflatten(0, (-1, _SQUARE)).abs().amax((1, 3))
    scales = (largest / 448).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (weight / _squares(scales, weight.shape)).clamp(-448, 448)
    return codes.to(_FP8), scales


def _squares(scales: Tensor, shape: torch.Size) -> Tensor:
    """The scale of every number."""
    rows, columns = shape
    down = scales.repeat_interleave(_SQUARE, dim=0)[:rows]
    return down.repeat_interleave(_SQUARE, dim=1)[:, :columns]
