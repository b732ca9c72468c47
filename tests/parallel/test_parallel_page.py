"""The code of the page on several processes runs in them, as torchrun would start it."""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run
from test_fsdp import quiet

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
SHAPES = {0: (2, 5001, 64), 1: (2, 64, 5001), 2: (2, 5000, 65), 3: (4, 500, 64)}


def program(text: str, folder: str) -> dict:
    """Runs a block of the page in this rank. Returns what one can see of it afterwards."""
    quiet()
    names, before, output = {}, os.getcwd(), io.StringIO()
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.chdir(folder)
    text = text.replace('dist.init_process_group("gloo")\n', "")  # it is there already
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(text, str(PAGE), "exec"), names)
    finally:
        os.chdir(before)
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    found = {"printed": output.getvalue()}
    if "y" in names:
        found["y"] = names["y"].detach()
    if "k" in names:
        found["gradient"] = names["k"].grad
    if "optimizer" in names:
        states = names["optimizer"].state.values()
        found["steps"] = {state["step"].item() for state in states}
        found["weight"] = names["model"][1].weight.full_tensor().detach()
    return found


@pytest.mark.parametrize("number", SHAPES)
def test_programs(number, tmp_path):
    first, second = run(2, program, BLOCKS[number], str(tmp_path))
    batch, *rest = SHAPES[number]
    y = first["y"]
    if number == 0:
        y = torch.cat([y, second["y"]], 1)
    if number == 1:
        y = torch.cat([y, second["y"]], -1)
        assert torch.equal(first["gradient"], second["gradient"])
        assert first["printed"].startswith("all-to-all, channels divided over 2 processes")
    assert y.shape == (batch, *rest) and y.isfinite().all()
    if number == 2:
        assert torch.equal(y, second["y"])
    if number == 3:
        assert y.dtype == torch.bfloat16


def test_two_processes_begin_and_three_go_on(tmp_path):
    assert len(BLOCKS) == len(SHAPES) + 1
    folder = str(tmp_path)
    (first, _), then = run(2, program, BLOCKS[-1], folder), run(3, program, BLOCKS[-1], folder)
    assert [found["steps"] for found in (first, *then)] == [{1.0}, {2.0}, {2.0}, {2.0}]
    for found in then:
        assert torch.equal(found["weight"], then[0]["weight"])
        assert not torch.equal(found["weight"], first["weight"])
