"""Under DistributedDataParallel two processes end where one process ends on their joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from workingpapers.training.frugal import Frugal, frugal_param_groups

KINDS = ["block", "columns", "randk", "svd", "random"]


def trained(projection, share):
    """Parameters after 8 steps on a share of every batch; under DistributedDataParallel if there are processes."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh())
    plain.append(nn.Linear(6, 2)).double()
    model = nn.parallel.DistributedDataParallel(plain) if distributed.is_initialized() else plain
    torch.manual_seed(1 + share.start)  # the processes' own random numbers differ
    optimiser = Frugal(frugal_param_groups(plain, exclude=("6",)), lr=1e-2, update_gap=3, projection=projection)
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (6, 2))
        optimiser.zero_grad()
        (model(x[share]) - y[share]).square().mean().backward()
        optimiser.step()
    return [p.detach().clone() for p in plain.parameters()]


def child(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    share = slice(8 * rank, 8 * rank + 8)
    torch.save({kind: trained(kind, share) for kind in KINDS}, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available() or sys.platform != "linux", reason="needs gloo over the loopback")
def test_two_processes_end_where_one_ends(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind in KINDS:
        alone = trained(kind, slice(0, 16))
        for here, there, one in zip(first[kind], second[kind], alone, strict=True):
            assert torch.equal(here, there), kind
            torch.testing.assert_close(here, one, rtol=0, atol=1e-9)


if __name__ == "__main__":
    child(int(sys.argv[1]), sys.argv[2])
