"""Two CPU processes give the gradients of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import batch, pregated_model


def halves_of_a_batch() -> list[dict[str, torch.Tensor]]:
    """Two halves with equally many target tokens, so that the mean of their losses is the loss of the whole."""
    whole = batch(3, size=4, padded=False)
    return [{name: tensor[start : start + 2] for name, tensor in whole.items()} for start in (0, 2)]


def gradients_of_one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # an expert without tokens has no gradient on a rank, which is ordinary in an MoE
    model = DistributedDataParallel(pregated_model(5, 1, entry="embedding").train(), find_unused_parameters=True)
    model(**halves_of_a_batch()[rank]).loss.backward()
    torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{folder}/gradients_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    mp.start_processes(gradients_of_one_process, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"gradients_{rank}.pt") for rank in (0, 1))
    single = pregated_model(5, 1, entry="embedding").train()
    sum(single(**half).loss / 2 for half in halves_of_a_batch()).backward()
    compared = 0
    for name, parameter in single.named_parameters():
        if parameter.grad is None:
            continue
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        compared += 1
    assert compared > 100
