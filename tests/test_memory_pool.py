"""Tensors in memory of the native module's recycling pool."""

import threading

import pytest
import torch

from fastmoe_rs import _native, functional
from native_cases import python


class TestPool:
    @pytest.fixture(autouse=True)
    def clean(self):
        _native.empty_cache()
        yield
        _native.empty_cache()

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
    @pytest.mark.parametrize("shape", [(), (0,), (5, 0, 3), (1, 2, 3), (300, 400)])
    def test_tensor(self, shape, dtype):
        tensor = _native.empty(shape, dtype)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.shape == shape
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert torch.equal(tensor.fill_(2), torch.full(shape, 2, dtype=tensor.dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_like_another(self, dtype):
        like = torch.ones(3, 1, 5, dtype=dtype, requires_grad=True)
        tensor = _native.empty_like(like)
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), dtype)
        assert not tensor.requires_grad
        assert tensor.data_ptr() != like.data_ptr()
        with pytest.raises(TypeError, match="float"):
            _native.empty_like(torch.ones(3, dtype=torch.int32))

    def test_memory_comes_back(self):
        tensor = _native.empty((123, 457), "float32")
        used = _native.memory_stats()["used_bytes"]
        address, view = tensor.data_ptr(), tensor[1:]
        del tensor
        assert _native.memory_stats()["used_bytes"] == used, "a view keeps the memory"
        del view
        before = _native.memory_stats()
        assert before["used_bytes"] < used
        assert before["cached_bytes"] >= 123 * 457 * 4
        again = _native.empty((457, 123), "float32")
        after = _native.memory_stats()
        assert again.data_ptr() == address
        assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"])

    @pytest.mark.cpu_only(reason="gradients of the CPU backend lie in the pool")
    def test_gradients_are_the_same_in_new_and_in_used_memory(self):
        """New memory is zeros already, where experts have no tokens; used memory is not."""
        torch.manual_seed(0)
        x, w2 = torch.randn(6, 16), torch.randn(4, 16, 200, requires_grad=True)
        w1 = torch.randn(4, 400, 16, requires_grad=True)
        ids = torch.tensor([[1], [3], [1], [1], [3], [3]])
        results = []
        for _ in range(3):
            out = functional.moe_mlp(x, ids, torch.ones(6, 1), w1, w2)
            grads = torch.autograd.grad(out.sum(), (w1, w2))
            (grad_w,) = torch.autograd.grad(
                functional.grouped_mm(x, w1, torch.tensor([0, 0, 4, 4, 6])).sum(), w1
            )
            results.append([grad.clone() for grad in (*grads, grad_w)])
            for grad in (*grads, grad_w):
                grad.fill_(float("nan"))
            del grads, grad_w, grad, out
        assert _native.memory_stats()["hits"] >= 6
        for ours, want in zip(results[1] + results[2], 2 * results[0], strict=True):
            assert torch.equal(ours, want)
            assert not want[[0, 2]].any()
            assert want[[1, 3]].any()

    def test_empty_cache(self):
        _native.empty((1000, 1000), "float32")
        assert _native.memory_stats()["cached_bytes"] >= 4_000_000
        _native.empty_cache()
        assert _native.memory_stats()["cached_bytes"] == 0

    def test_a_block_that_became_too_small_is_replaced(self):
        _native.empty_cache()
        for numbers in (10_000_000, 10_500_000, 10_000_000, 1_000):
            _native.empty((numbers,), "float32")
        assert 42_000_000 <= _native.memory_stats()["cached_bytes"] < 1.1 * 42_000_000

    def test_dropped_on_another_thread(self):
        held = [_native.empty((1000,), "float32")]
        address = held[0].data_ptr()
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert _native.empty((1000,), "float32").data_ptr() == address

    @pytest.mark.parametrize("shape", [(-1,), (2**62, 8), (2**40, 2**40)])
    def test_bad_shape(self, shape):
        with pytest.raises(
            ValueError, match=r"^shape: got \[.*\], wanted sizes of at least 0 that fit in memory"
        ):
            _native.empty(shape, "float32")

    @pytest.mark.parametrize("dtype", ["int32", "float8", ""])
    def test_bad_dtype(self, dtype):
        with pytest.raises(ValueError, match=rf"^dtype: got '{dtype}', wanted 'float32', "):
            _native.empty((1,), dtype)

    def test_torch_without_exchange_table(self, tmp_path):
        (tmp_path / "torch.py").write_text(
            "class Tensor: pass\nfloat32 = 'f32'\ndef empty(shape, dtype): return 'empty', shape, dtype\n"
        )
        code = "from fastmoe_rs import _native; print(_native.empty((2, 3), 'float32'))"
        assert python(code, PYTHONPATH=str(tmp_path)) == "('empty', (2, 3), 'f32')"
