"""Under accelerate two processes give the loss curve and the parameters of one process on the joint batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from workingpapers.alignment import RPOConfig, RPOTrainer, TokenPair

PAIRS = [TokenPair([1, 2], [3, 4, 5][: 1 + k % 3], [6 + k % 4]) for k in range(7)]


def trained(accelerator):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model, reference = (transformers.LlamaForCausalLM(config).double() for _ in range(2))
    # 7 pairs in batches of 3: the last step of an epoch has one pair, so that one process has none
    args = RPOConfig(learning_rate=1e-2, batch_size=3, epochs=3, eta=0.05, max_grad_norm=0.3)
    trainer = RPOTrainer(model, reference, PAIRS, args=args, accelerator=accelerator)
    history = trainer.train()
    return history, torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def child(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    history, parameters = trained(accelerator)
    rank = accelerator.process_index
    (Path(folder) / f"{rank}.json").write_text(json.dumps(history))
    torch.save(parameters, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available() or sys.platform != "linux", reason="needs gloo over the loopback")
def test_two_processes_give_the_curve_of_one(tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    history, parameters = trained(None)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == len(history) == 9
        for one, other in zip(found, history, strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-8)
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), parameters, rtol=0, atol=1e-6)


if __name__ == "__main__":
    child(sys.argv[1])
