"""Stands in for the process helpers of transformers' distributed tests, which its source distribution lacks."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs)


def _run_rank(rank: int, function: Callable, world_size: int, rendezvous: str, args: tuple, kwargs: dict) -> None:
    _set_rank_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """Run a function `f(rank, ...)` in `world_size` processes on the CPU."""

    def decorate(function: Callable) -> Callable:
        def run(*args, **kwargs) -> None:
            with tempfile.TemporaryDirectory() as directory:
                rendezvous = str(Path(directory, "rendezvous"))
                rank_args = (function, world_size, rendezvous, args, kwargs)
                _start_rank_processes(_run_rank, args=rank_args, nprocs=world_size)

        return run

    return decorate
