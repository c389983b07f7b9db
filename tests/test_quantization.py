"""Quantized weights: what codes mean, how near they are, and layers of them beside those of numbers."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastmoe_rs import RoutingPlan, _native, functional, kernels, nn, reference
from fastmoe_rs.quantization import QuantizedExperts, QuantizedWeight, quantize, quantize_experts
from moe_cases import ACTIVATIONS, DTYPES, EMULATED, mlp_case
from native_cases import CASES, call

FORMATS = ("mxfp4", "fp8")
FP8 = torch.float8_e4m3fn
TOKENS = (0, 1, 7, 64) if EMULATED else (0, 1, 7, 64, 300)


def any_weight(format, *shape, lowest=118, highest=126):
    """Every code but NaN, and scales of many sizes."""
    e, n, d = shape
    if format == "mxfp4":
        codes = torch.randint(256, (e, n, d // 32, 16), dtype=torch.uint8)
        return QuantizedWeight(
            format, codes, torch.randint(lowest, highest, codes.shape[:3], dtype=torch.uint8)
        )
    codes = torch.randint(255, (e, n, d), dtype=torch.uint8)
    codes[codes == 127] = 0
    return QuantizedWeight(format, codes.view(FP8), torch.rand(e, -(-n // 128), -(-d // 128)) * 1e-3)


def quantized_case(formats, tokens=9, hidden=64, intermediate=96, **options):
    """As `mlp_case`, with quantized weights: arguments and options, and the arguments of their numbers."""
    (x, ids, weights, w1, w2), options = mlp_case(tokens, hidden, intermediate, **options)
    quantized = [quantize(w.detach() / 8, format) for w, format in zip((w1, w2), formats, strict=True)]
    numbers = [w.dequantize(x.dtype) for w in quantized]
    return (x, ids, weights, *quantized), (x, ids, weights, *numbers), options


def assert_same_bits(quantized, numbers, options):
    """Outputs and gradients."""
    inputs = [t for t in (*quantized[:3:2], options.get("b1"), options.get("b2")) if t is not None]
    results = []
    for arguments in (quantized, numbers):
        out = functional.moe_mlp(*arguments, **options)
        direction = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, inputs, direction)))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


class TestNumbers:
    def test_every_code_of_mxfp4(self):
        codes = torch.arange(256).to(torch.uint8).reshape(1, 16, 1, 16)
        scales = torch.full((1, 16, 1), 128, dtype=torch.uint8)
        numbers = QuantizedWeight("mxfp4", codes, scales).dequantize(torch.float32).reshape(256, 2)
        e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        e2m1 = torch.tensor(e2m1 + [-number for number in e2m1])
        assert torch.equal(numbers, 2 * torch.stack((e2m1.repeat(16), e2m1.repeat_interleave(16)), 1))

    def test_every_scale_of_mxfp4(self):
        codes = torch.full((1, 256, 1, 16), 0x22, dtype=torch.uint8)
        scales = torch.arange(256).to(torch.uint8).reshape(1, 256, 1)
        numbers = QuantizedWeight("mxfp4", codes, scales).dequantize(torch.float64)[0]
        assert torch.equal(numbers[:255, 0], torch.exp2(torch.arange(255).double() - 127))
        assert numbers[255].isnan().all()

    def test_every_code_of_fp8(self):
        codes = torch.arange(256).to(torch.uint8).view(FP8).reshape(1, 1, 256)
        numbers = QuantizedWeight("fp8", codes, torch.tensor([[[2.0, -3.0]]])).dequantize(torch.float32)[0, 0]
        wanted = codes.float()[0, 0] * torch.tensor([2.0, -3.0]).repeat_interleave(128)
        assert torch.equal(numbers.nan_to_num(7), wanted.nan_to_num(7))
        assert numbers.isnan().sum() == 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_those_of_gpt_oss_in_transformers(self, dtype):
        pytest.importorskip("transformers")
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        weight = any_weight("mxfp4", 3, 10, 96, lowest=20, highest=230)
        wanted = convert_moe_packed_tensors(weight.codes, weight.scales, dtype=dtype)
        assert torch.equal(weight.dequantize(dtype), wanted.mT)  # whose weights are transposed

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_those_of_deepseek_in_transformers(self, dtype):
        pytest.importorskip("transformers")
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

        weight = any_weight("fp8", 2, 256, 384)
        wanted = Fp8Dequantize(None)._dequantize_one(weight.codes, weight.scales, output_dtype=dtype)
        assert torch.equal(weight.dequantize(dtype), wanted)
        ragged = any_weight("fp8", 2, 200, 300)
        wanted = _dequantize_fp8_weight(ragged.codes, ragged.scales, [128, 128], torch.float32)
        assert torch.equal(ragged.dequantize(torch.float32), wanted)


class TestQuantize:
    @given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.sampled_from(FORMATS))
    def test_numbers_are_near(self, seed, exponent, format):
        generator = torch.Generator().manual_seed(seed)
        weight = (
            torch.randn(2, 130, 160, generator=generator) * torch.rand(2, 130, 160, generator=generator) ** 8
        )
        weight *= 2**exponent
        quantized = quantize(weight, format)
        off = (quantized.dequantize(torch.float64) - weight.double()).abs()
        if format == "mxfp4":
            allowed = weight.double().unflatten(2, (-1, 32)).abs().amax(3).div(4).repeat_interleave(32, 2)
        else:
            scales = quantized.scales.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
            allowed = torch.maximum(weight.double().abs() / 16, scales[:, :130, :160] / 1024) * (1 + 1e-6)
        assert (off <= allowed).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_its_own_numbers_stay(self, dtype):
        numbers = quantize(torch.randn(3, 40, 64), "mxfp4").dequantize(dtype)
        assert torch.equal(quantize(numbers, "mxfp4").dequantize(dtype), numbers)

    def test_halves_go_to_the_even_code_and_more_than_six_to_six(self):
        weight = torch.zeros(1, 1, 32)
        weight[0, 0, :9] = torch.tensor([7.9, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75])
        wanted = torch.tensor([6, 0, 1, 1, 2, 2, 4, 4, -1.0])
        assert torch.equal(quantize(weight, "mxfp4").dequantize(torch.float32)[0, 0, :9], wanted)

    @pytest.mark.parametrize("format", FORMATS)
    def test_zeros_and_the_smallest(self, format):
        assert not quantize(torch.zeros(1, 4, 32), format).dequantize(torch.float32).any()
        numbers = quantize(torch.full((1, 4, 32), 1e-44), format).dequantize(torch.float32)
        assert numbers.abs().max() <= 1e-40

    @pytest.mark.parametrize("format", FORMATS)
    def test_bytes(self, format):
        weight = quantize(torch.randn(2, 256, 128), format)
        assert weight.shape == (2, 256, 128)
        assert weight.nbytes == (2 * 256 * 68 if format == "mxfp4" else 2 * 256 * 128 + 4 * 4)


class TestLayer:
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", FORMATS)
    def test_tokens(self, format, dtype, tokens):
        assert_same_bits(*quantized_case((format, format), tokens, dtype=dtype))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("formats", [("mxfp4", "fp8"), ("fp8", "mxfp4")])
    def test_activations(self, formats, activation):
        assert_same_bits(*quantized_case(formats, dtype=torch.bfloat16, activation=activation, bias=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", FORMATS)
    def test_interleaved_as_gpt_oss(self, format, dtype):
        case = quantized_case(
            (format, format), dtype=dtype, activation="swiglu_oai", interleaved=True, bias=True
        )
        assert_same_bits(*case)

    @pytest.mark.cpu_only(reason="about the blocks of the CPU's products")
    @pytest.mark.parametrize("tokens", [3, 500])
    @pytest.mark.parametrize("format", FORMATS)
    def test_blocks_of_odd_sizes(self, format, tokens):
        intermediate = 320 if format == "mxfp4" else 333
        assert_same_bits(*quantized_case((format, format), tokens, 416, intermediate, dtype=torch.bfloat16))

    @pytest.mark.cpu_only(reason="about the threads of the CPU")
    @pytest.mark.parametrize("format", FORMATS)
    def test_any_number_of_threads(self, format, set_threads):
        arguments, _, _ = quantized_case((format, format), 100, 256, 320, dtype=torch.bfloat16)
        results = []
        for threads in (1, 2, 7):
            set_threads(threads)
            out = functional.moe_mlp(*arguments)
            results.append([out, *torch.autograd.grad(out.float().sin().sum(), arguments[:3:2])])
        for others in results[1:]:
            assert all(map(torch.equal, results[0], others))

    @pytest.mark.parametrize("format", FORMATS)
    def test_near_the_layer_that_was_quantized(self, format):
        x, ids, weights = torch.randn(20, 128), torch.randint(4, (20, 2)), torch.rand(20, 2)
        w1, w2 = torch.randn(4, 192, 128) / 11, torch.randn(4, 128, 96) / 10
        wanted = reference.moe_mlp(x, ids, weights, w1, w2)
        out = functional.moe_mlp(x, ids, weights, quantize(w1, format), quantize(w2, format))
        assert (out - wanted).norm() / wanted.norm() < (0.3 if format == "mxfp4" else 0.06)

    @pytest.mark.parametrize("format", FORMATS)
    def test_follows_a_plan(self, format):
        (x, ids, weights, w1, w2), numbers, _ = quantized_case((format, format), dtype=torch.bfloat16)
        plan = RoutingPlan.from_ids(ids, 5, capacity=3)
        out = functional.moe_mlp(x, None, weights, w1, w2, plan=plan)
        assert torch.equal(out, functional.moe_mlp(*numbers, plan=plan))

    def test_scales_that_are_nan_reach_the_output(self):
        arguments, _, _ = quantized_case(("mxfp4", "mxfp4"), dtype=torch.bfloat16)
        arguments[3].scales[:] = 255
        assert functional.moe_mlp(*arguments).isnan().all()

    @pytest.mark.parametrize("format", FORMATS)
    def test_autocast_casts_x(self, format):
        (x, ids, weights, w1, w2), _, _ = quantized_case((format, format), dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = functional.moe_mlp(x, ids, weights, w1, w2)
        assert torch.equal(out, functional.moe_mlp(x.bfloat16(), ids, weights, w1, w2))

    @pytest.mark.parametrize("format", FORMATS)
    def test_without_gradients(self, format):
        arguments, numbers, _ = quantized_case((format, format), dtype=torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(functional.moe_mlp(*arguments), functional.moe_mlp(*numbers))

    @pytest.mark.parametrize("format", FORMATS)
    def test_compiles(self, format):
        (x, ids, weights, w1, w2), _, _ = quantized_case((format, format), dtype=torch.bfloat16)

        def layer(x, ids, weights):
            return functional.moe_mlp(x, ids, weights, w1, w2)

        torch._dynamo.reset()
        outs = [
            f(x, ids, weights) for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
        ]
        grads = [torch.autograd.grad(out.float().sum(), (x, weights)) for out in outs]
        assert torch.equal(*outs)
        assert all(map(torch.equal, *grads))

    @pytest.mark.cpu_only(reason="does on a CPU what is done for a GPU")
    @pytest.mark.parametrize("format", FORMATS)
    def test_dequantized_before_the_call_as_for_a_gpu(self, format, monkeypatch):
        case = quantized_case((format, format), dtype=torch.bfloat16, bias=True)
        forwards = []
        forward = kernels._native.mlp_forward
        monkeypatch.setattr(
            kernels._native, "mlp_forward", lambda *a: forwards.append(a[1].dtype) or forward(*a)
        )
        monkeypatch.setattr(kernels, "_POOLED", False)
        assert_same_bits(*case)
        assert forwards == [torch.bfloat16] * 2

    @pytest.mark.parametrize("format", FORMATS)
    def test_checkpointing(self, format):
        (x, *others), _, _ = quantized_case((format, format), dtype=torch.bfloat16)
        outs = (
            functional.moe_mlp(x, *others),
            checkpoint(lambda x: functional.moe_mlp(x, *others), x, use_reentrant=False),
        )
        grads = [torch.autograd.grad(out.float().sum(), (x, others[1])) for out in outs]
        assert all(map(torch.equal, *grads))

    @pytest.mark.parametrize("format", FORMATS)
    def test_saves_no_numbers_for_the_backward(self, format):
        arguments, _, _ = quantized_case((format, format), dtype=torch.bfloat16)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            functional.moe_mlp(*arguments)
        elements = {w.shape[0] * w.shape[1] * w.shape[2] for w in arguments[3:]}
        assert not any(t.is_floating_point() and t.numel() in elements for t in saved)


@pytest.mark.cpu_only(reason="about the instruction sets of the CPU")
@pytest.mark.parametrize("isa", _native.cpu_info()["available"])
def test_every_instruction_set(isa):
    code = """
import torch
from test_quantization import FORMATS, assert_same_bits, quantized_case
from moe_cases import DTYPES
for dtype in DTYPES:
    for format in FORMATS:
        for tokens in (1, 40, 300):
            assert_same_bits(*quantized_case((format, format), tokens, 160, 224, dtype=dtype, bias=True))
"""
    environment = os.environ | {"FASTMOE_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_is_pickled_and_moved(format):
    weight = any_weight(format, 2, 64, 96)
    for other in (pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight), weight.to("cpu")):
        assert (other.format, other.shape, other.device) == (format, (2, 64, 96), torch.device("cpu"))
        assert torch.equal(other.dequantize(), weight.dequantize())
    assert weight.to("meta").device.type == "meta"
    assert repr(weight) == f"QuantizedWeight('{format}', [2, 64, 96], device='cpu')"


MX, F8 = any_weight("mxfp4", 4, 64, 32), any_weight("fp8", 4, 64, 32)
X, IDS, WEIGHTS = torch.randn(6, 32), torch.zeros(6, 2, dtype=torch.long), torch.rand(6, 2)
DOWN = any_weight("mxfp4", 4, 32, 32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: quantize(torch.randn(2, 4, 40), "mxfp4"),
            ValueError,
            "weight: got shape (2, 4, 40), wanted [E, N, D] with D",
        ),
        (
            lambda: quantize(torch.randn(4, 32), "fp8"),
            ValueError,
            "weight: got shape (4, 32), wanted [E, N, D]",
        ),
        (lambda: quantize(torch.randn(0, 4, 32), "fp8"), ValueError, "without a size of 0"),
        (
            lambda: quantize(torch.randn(2, 4, 32), "int4"),
            ValueError,
            "format: got 'int4', wanted one of 'mxfp4', 'fp8'",
        ),
        (lambda: quantize(torch.ones(2, 4, 32).int(), "fp8"), TypeError, "weight: got dtype torch.int32"),
        (
            lambda: quantize(torch.full((2, 4, 32), torch.nan), "fp8"),
            ValueError,
            "weight: got NaN or infinite",
        ),
        (
            lambda: quantize(torch.full((2, 4, 32), torch.inf), "mxfp4"),
            ValueError,
            "weight: got NaN or infinite",
        ),
        (lambda: quantize([1.0], "fp8"), TypeError, "weight: got list, wanted a torch tensor"),
        (lambda: QuantizedWeight("nf4", MX.codes, MX.scales), ValueError, "format: got 'nf4'"),
        (
            lambda: QuantizedWeight("mxfp4", MX.codes.int(), MX.scales),
            TypeError,
            "codes: got dtype torch.int32",
        ),
        (
            lambda: QuantizedWeight("mxfp4", MX.codes, MX.scales.int()),
            TypeError,
            "scales: got dtype torch.int32",
        ),
        (
            lambda: QuantizedWeight("mxfp4", MX.codes[..., :8], MX.scales),
            ValueError,
            "codes: got shape (4, 64, 1, 8)",
        ),
        (
            lambda: QuantizedWeight("mxfp4", MX.codes, MX.scales[1:]),
            ValueError,
            "scales: got shape (3, 64, 1)",
        ),
        (
            lambda: QuantizedWeight("fp8", MX.codes, MX.scales),
            ValueError,
            "codes: got shape (4, 64, 1, 16), wanted [E, N, D]",
        ),
        (
            lambda: QuantizedWeight("fp8", F8.codes, F8.scales[0]),
            ValueError,
            "scales: got shape (1, 1), wanted [E, ceil",
        ),
        (
            lambda: QuantizedWeight("fp8", F8.codes, F8.scales.double()),
            TypeError,
            "scales: got dtype torch.float64",
        ),
        (
            lambda: QuantizedWeight("fp8", F8.codes, F8.scales.to("meta")),
            ValueError,
            "scales: got a tensor on meta",
        ),
        (lambda: MX.dequantize(torch.int8), TypeError, "dtype: got torch.int8"),
        (
            lambda: functional.moe_mlp(X, IDS, WEIGHTS, MX, DOWN.dequantize()),
            TypeError,
            "w2: got Tensor, wanted a QuantizedWeight",
        ),
        (
            lambda: functional.moe_mlp(X, IDS, WEIGHTS, MX.dequantize(), DOWN),
            TypeError,
            "w1: got Tensor, wanted a QuantizedWeight",
        ),
        (
            lambda: functional.moe_mlp(X, IDS, WEIGHTS, MX, DOWN, transposed=True),
            ValueError,
            "transposed: got True, wanted False",
        ),
        (
            lambda: functional.moe_mlp(X[:, :31], IDS, WEIGHTS, MX, DOWN),
            ValueError,
            "w1: got shape (4, 64, 32), wanted [E, 2I, H]",
        ),
        (
            lambda: functional.moe_mlp(X, IDS, WEIGHTS, MX, MX),
            ValueError,
            "w2: got shape (4, 64, 32), wanted [E, H, I]",
        ),
        (lambda: functional.moe_mlp(X.int(), IDS, WEIGHTS, MX, DOWN), TypeError, "x: got dtype torch.int32"),
        (
            lambda: functional.moe_mlp(X, IDS, WEIGHTS, MX.to("meta"), DOWN),
            ValueError,
            "w1: got a tensor on meta",
        ),
        (lambda: functional.moe_mlp(X, IDS + 4, WEIGHTS, MX, DOWN), ValueError, "ids"),
        (
            lambda: quantize_experts(torch.nn.Linear(2, 2), "fp8"),
            ValueError,
            "model: got a Linear without nn.Experts",
        ),
        (
            lambda: quantize_experts(nn.MoE(32, 48, 4, 2), "mxfp4"),
            ValueError,
            "model: got experts with a weight (4, 32, 48)",
        ),
        (lambda: quantize_experts(nn.MoE(32, 32, 4, 2, device="meta"), "fp8"), ValueError, "not in memory"),
        (lambda: quantize_experts(3, "fp8"), TypeError, "model: got int"),
        (lambda: quantize_experts(nn.MoE(32, 32, 4, 2), "fp9"), ValueError, "format: got 'fp9'"),
        (QuantizedExperts, TypeError, "made by fastmoe_rs.quantization.quantize_experts"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


NATIVE = {"w1": torch.zeros(3, 12, 8, dtype=torch.uint8), "w1_scales": torch.ones(3, 1, 1)}


@pytest.mark.cpu_only(reason="GPUs take numbers only")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w1": torch.zeros(3, 12, 8)}, TypeError, "w1: got dtype float32, wanted uint8"),
        (
            {"w1_scales": torch.ones(3, 1)},
            ValueError,
            "w1_scales: got shape (3, 1), wanted [E, ceil(N/128), ceil(D/128)]",
        ),
        (
            {"w1_scales": torch.ones(3, 1, 1).double()},
            TypeError,
            "w1_scales: got dtype float64, wanted float32",
        ),
        (
            {"w1": NATIVE["w1"][:, :, :6].contiguous()},
            ValueError,
            "w1: got shape (3, 12, 6), wanted [E, 2I, H]",
        ),
        ({"w1": torch.zeros(3, 12, 1, 8, dtype=torch.uint8)}, ValueError, "wanted [E, N, D/32, 16]"),
        (
            {"w1": torch.zeros(3, 12, 1, 16, dtype=torch.uint8)},
            TypeError,
            "w1_scales: got dtype float32, wanted uint8",
        ),
        (
            {
                "w1": torch.zeros(3, 12, 1, 16, dtype=torch.uint8),
                "w1_scales": torch.zeros(3, 12, 1, dtype=torch.uint8),
            },
            ValueError,
            "w1: got shape (3, 12, 32), wanted [E, 2I, H] = (3, 12, 8)",
        ),
        ({"w1_scales": None}, TypeError, "w1: got dtype uint8, wanted float32"),
        ({"transposed": True}, ValueError, "w1_scales: got scales, wanted None beside transposed=True"),
    ],
)
def test_native_module_refuses(change, error, message):
    with pytest.raises(error) as raised:
        call("mlp_forward", **(NATIVE | change))
    assert message in str(raised.value)


@pytest.mark.cpu_only(reason="GPUs take numbers only")
def test_native_module_has_no_gradient_of_quantized_weights():
    assert "grad_w1" in CASES["mlp_backward"]()[1]
    with pytest.raises(ValueError, match="w1_scales: got scales, wanted None beside grad_w1"):
        call("mlp_backward", **NATIVE)


class TestModules:
    @pytest.mark.parametrize("format", FORMATS)
    def test_layer_of_quantized_experts(self, format):
        moe = nn.MoE(64, 96, 6, 2, bias=True, shared_intermediate_size=32)
        plain = copy.deepcopy(moe)
        assert quantize_experts(moe, format) is moe
        for name in ("w1", "w2"):
            numbers = getattr(moe.experts, name).dequantize(torch.float32)
            getattr(plain.experts, name).data = numbers
        x = torch.randn(7, 64, requires_grad=True)
        grads = []
        for layer in (moe, plain):
            layer(x).square().sum().backward()
            grads.append([x.grad, layer.router.weight.grad, layer.experts.b1.grad, layer.shared.w1.grad])
            x.grad = None
        assert torch.equal(moe(x), plain(x))
        assert all(map(torch.equal, *grads))
        names = {name for name, _ in moe.experts.named_parameters()}
        assert names == {"b1", "b2"}
        assert f"format='{format}'" in repr(moe)

    @pytest.mark.parametrize("format", FORMATS)
    def test_is_saved_copied_and_cast(self, format):
        moe = quantize_experts(nn.MoE(64, 96, 6, 2), format)
        x = torch.randn(5, 64)
        file = io.BytesIO()
        torch.save(moe.state_dict(), file)
        file.seek(0)
        other = quantize_experts(nn.MoE(64, 96, 6, 2), format)
        other.load_state_dict(torch.load(file))
        for layer in (other, copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), moe.to("cpu")):
            assert torch.equal(layer(x), moe(x))
        half = copy.deepcopy(moe).bfloat16()
        assert half.router.weight.dtype == torch.bfloat16
        assert torch.equal(half.experts.w1.dequantize(), moe.experts.w1.dequantize())
        assert half(x.bfloat16()).dtype == torch.bfloat16

    def test_compiles(self):
        moe = quantize_experts(nn.MoE(64, 96, 6, 2), "mxfp4")
        x = torch.randn(5, 64)
        torch._dynamo.reset()
        compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), moe(x))

    def test_refuses_before_it_changes_anything(self):
        model = torch.nn.ModuleList([nn.MoE(32, 32, 4, 2), nn.MoE(32, 48, 4, 2)])
        with pytest.raises(ValueError, match="a multiple of 32"):
            quantize_experts(model, "mxfp4")
        assert type(model[0].experts) is nn.Experts
        quantize_experts(model, "fp8")
        with pytest.raises(ValueError, match=r"without nn\.Experts"):
            quantize_experts(model, "fp8")

    def test_refuses_a_subclass(self):
        class Own(nn.Experts):
            pass

        with pytest.raises(ValueError, match="experts of the class Own"):
            quantize_experts(Own(32, 32, 2), "fp8")
