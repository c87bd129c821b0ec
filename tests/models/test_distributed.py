"""Two CPU processes give the gradients of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2MoeConfig

from pregate.models.family import family_named
from pregate.models.pregating import PreGating
from tests.tiny import batch, pregated_model


def model_of(family: str) -> Any:
    if family == "switch_transformers":
        return pregated_model(5, 1, entry="embedding").train()
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 67,
    }
    widths: dict[str, Any] = {"hidden_size": 16, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    source = Qwen2MoeConfig(**sizes, **widths, num_experts=5, num_experts_per_tok=2, initializer_range=0.3)
    qwen = family_named(family)
    torch.manual_seed(5)
    config = qwen.config(qwen.pregated_json(source.to_dict(), PreGating(1, entry="embedding")))
    return qwen.model_class(config).train()


def halves_of_a_batch(family: str) -> list[dict[str, torch.Tensor]]:
    """Two halves with equally many target tokens, so that the mean of their losses is the loss of the whole."""
    whole = batch(3, size=4, padded=False)
    if family != "switch_transformers":
        whole["labels"] = whole["input_ids"]
    return [{name: tensor[start : start + 2] for name, tensor in whole.items()} for start in (0, 2)]


def gradients_of_one_process(rank: int, folder: str, family: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # an expert without tokens has no gradient on a rank, which is ordinary in an MoE
    model = DistributedDataParallel(model_of(family), find_unused_parameters=True)
    model(**halves_of_a_batch(family)[rank]).loss.backward()
    torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{folder}/gradients_{rank}.pt")
    # the group must outlive the model: where the model is its last owner, torch ends gloo's threads while it holds the
    # interpreter's lock, for which such a thread may wait
    del model
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "parameters"), [("switch_transformers", 100), ("qwen2_moe", 50)])
def test_two_processes_give_the_gradients_of_one(family: str, parameters: int, tmp_path: Path) -> None:
    mp.start_processes(gradients_of_one_process, args=(str(tmp_path), family), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"gradients_{rank}.pt") for rank in (0, 1))
    single = model_of(family)
    sum(single(**half).loss / 2 for half in halves_of_a_batch(family)).backward()
    compared = 0
    for name, parameter in single.named_parameters():
        if parameter.grad is None:
            continue
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        compared += 1
    assert compared > parameters
