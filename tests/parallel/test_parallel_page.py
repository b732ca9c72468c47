"""The code of the page on several processes runs in them, as torchrun would start it."""

import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from processes import run
from test_fsdp import quiet
from torch.distributed.tensor import DTensor

PAGE = Path(__file__).parents[2] / "docs" / "parallel-fsdp.part.md"
END = "dist.destroy_process_group()\n"


def blocks(page: str, folder: str) -> dict:
    """Runs the Python of the page. Returns what one can see of it afterwards."""
    quiet()
    names, before = {}, os.getcwd()
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.chdir(folder)
    try:
        for text in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
            text = text.replace(END, "")  # the processes are used again
            exec(compile(text, str(PAGE), "exec"), names)
    finally:
        os.chdir(before)
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    model, optimizer = names["model"], names["optimizer"]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    states = list(optimizer.state.values())
    return {
        "output": names["y"].dtype,
        "kernel": model[0].kernel.inv_dt.dtype,
        "step": {state["step"].item() for state in states},
        "weight": model[2].weight.full_tensor().detach(),
    }


def test_two_processes_begin_and_three_go_on(tmp_path):
    page, folder = PAGE.read_text(), str(tmp_path)
    assert END in page
    (first, _), then = run(2, blocks, page, folder), run(3, blocks, page, folder)
    assert first["output"] == torch.bfloat16 and first["kernel"] == torch.float32
    assert [found["step"] for found in (first, *then)] == [{1.0}, {2.0}, {2.0}, {2.0}]
    for found in then:
        assert torch.equal(found["weight"], then[0]["weight"])
        assert not torch.equal(found["weight"], first["weight"])
