"""DistributedDataParallel and fully_shard, in two processes."""

import gc

import pytest
import torch
from torch import nn
from twins import assert_same, problem, twins

DEEP = {"num_layers": 2, "bidirectional": True}


def data_parallel(rank, file, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    for cell in ("rnn_tanh", "lstm"):
        ours = nn.parallel.DistributedDataParallel(twins(cell, **DEEP)[1])
        x = problem(ours.module, B=4)[0][:, 2 * rank : 2 * rank + 2]
        ours(x, lengths=torch.tensor([6, 3]))[0].square().sum().backward()
        found[cell] = {n: p.grad.numpy().copy() for n, p in ours.module.named_parameters()}
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def fully_sharded(rank, file, queue):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    mesh = dist.init_device_mesh("cpu", (2,))
    for cell in ("rnn_tanh", "lstm"):
        ours = twins(cell, **DEEP)[1]
        x = problem(ours, B=4)[0][:, 2 * rank : 2 * rank + 2]
        fully_shard(ours, mesh=mesh)
        ours(x, lengths=torch.tensor([6, 3]))[0].square().sum().backward()
        found[cell] = {n: p.grad.full_tensor().numpy().copy() for n, p in ours.named_parameters()}
    if rank == 0:
        queue.put(found)
    del ours, mesh  # they hold process groups, whose threads must end before the process
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("worker", [data_parallel, fully_sharded])
def test_parallel_in_two_processes(worker, tmp_path):
    """Each has half of the batch; the mean of their gradients is that of the whole, halved."""
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").SimpleQueue()
    workers = mp.spawn(worker, (tmp_path / "store", queue), nprocs=2, join=False)
    found = queue.get()
    while not workers.join():
        pass
    for cell, gradients in found.items():
        ours = twins(cell, **DEEP)[1]
        x = problem(ours, B=4)[0]
        output, _ = ours(x, lengths=torch.tensor([6, 3, 6, 3]))
        (output.square().sum() / 2).backward()
        whole = {n: p.grad for n, p in ours.named_parameters()}
        assert_same({n: torch.from_numpy(g) for n, g in gradients.items()}, whole)
