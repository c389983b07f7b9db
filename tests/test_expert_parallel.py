"""Experts shared out over 2 and 3 processes compute and train what one process with all of them does."""

import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expert_parallel_cases import CASES, H, layer
from fastmoe_rs.expert_parallel import ExpertParallel, shard_experts


def run_cases(rank, ranks, folder):
    """All cases until one fails; who then waits for this rank gets an exception from the group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    for case in CASES:
        started = time.monotonic()
        try:
            case(rank, ranks)
        except BaseException:
            told = f"{case.__name__} on rank {rank}:\n{traceback.format_exc()}"
            (folder / f"failed-{rank}").write_text(told)
            raise
        print(f"{case.__name__} {time.monotonic() - started:.2f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(ranks, tmp_path):
    processes = mp.spawn(run_cases, args=(ranks, tmp_path), nprocs=ranks, join=False)
    deadline = time.monotonic() + 300
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    except (mp.ProcessRaisedException, mp.ProcessExitedException):
        pytest.fail("\n".join(path.read_text() for path in sorted(tmp_path.glob("failed-*"))))
    finally:
        for process in processes.processes:
            process.kill()


def test_one_rank_computes_as_ever(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        moe, x = layer(bias=True), torch.randn(9, H, dtype=layer().experts.w1.dtype)
        y = moe(x)
        y.sum().backward()
        grads = [weight.grad for weight in moe.parameters()]
        shard_experts(moe)
        again = moe(x)
        assert torch.equal(again, y)
        again.sum().backward()
        assert all(
            torch.equal(weight.grad, grad) for weight, grad in zip(moe.parameters(), grads, strict=True)
        )
        few = shard_experts(layer(bias=True), capacity=1)
        _, stats = few(x, return_stats=True)
        assert stats.counts.max() == 1
    finally:
        dist.destroy_process_group()


def test_needs_a_process_group():
    for give in (lambda: shard_experts(layer()), lambda: ExpertParallel(layer().experts)):
        with pytest.raises(RuntimeError, match="not initialized, call init_process_group first"):
            give()
