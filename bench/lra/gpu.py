"""What the Long Range Arena's generated tasks show on a GPU, the most telling first, in as many sessions as it takes.

Every run in bf16-mixed and in float32. ListOps and Pathfinder go through their whole schedules; Path-X gets ten
minutes of a schedule shortened to that; Path256, 65,536 steps long, two, and its training step is then timed
beside torch.fft.
"""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.lra import recipes, sweep


@dataclass(frozen=True)
class Job:
    task: str
    layer: str
    options: tuple[str, ...] = ()


JOBS = (
    *(Job("listops-gen", layer) for layer in ("s4d", "sgconv", "long_conv")),
    *(Job("pathfinder32-hard", layer) for layer in ("s4d", "sgconv", "long_conv")),
    Job("pathx-gen", "s4d", ("--max_minutes", "10")),
    Job("path256-gen", "long_conv", ("--max_minutes", "2", "--compare", "10")),
)
PRECISIONS = ("bf16-mixed", "32-true")
SAMPLES = {"pathx-gen": 20_000, "path256-gen": 2_000}  # more than the minutes can use


def main(argv: list[str], make_parser: Callable, parse_fit: Callable) -> None:
    tasks = tuple(dict.fromkeys(job.task for job in JOBS))
    parser = make_parser("gpu", " ".join(__doc__.split()))
    parser.add_argument("tasks", nargs="*", default=list(tasks), help=f"of {', '.join(tasks)}")
    parser.add_argument("--minutes", type=float, default=25.0, help="of this session")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/gpu", help="folder of the run folders")
    parser.add_argument("--data", default="data", help="folder of the data sets")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try it")
    chosen = parser.parse_args(argv)
    for task in chosen.tasks:
        if task not in tasks:
            parser.error(f"unknown task {task!r}{recipes.suggest(task, tasks)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu tries the command without one")
    if chosen.minutes <= 0:
        parser.error(f"--minutes must be positive, got {chosen.minutes}")
    common = ["--seed", str(chosen.seed), "--data", chosen.data, "--device", chosen.device]
    plans = []
    for job in (job for job in JOBS if job.task in chosen.tasks):
        for precision in PRECISIONS:
            name = f"{job.task}-{job.layer}-{chosen.seed}-{precision}"
            out = Path(chosen.out) / name
            arguments = [job.task, "--layer", job.layer, *common, "--precision", precision]
            arguments += ["--out", str(out), *job.options]
            parse_fit(arguments, "gpu")
            plans.append((name, out, arguments))
    began = time.perf_counter()
    for task in dict.fromkeys(job.task for job in JOBS if job.task in chosen.tasks):
        made = Path(chosen.data) / "generated" / task / "generated.json"
        if made.exists() and json.loads(made.read_text())["whole"]:
            continue
        making = [*sweep.COMMAND, "data", "make", task, "--root", chosen.data]
        making += ["--n", str(SAMPLES[task])] if task in SAMPLES else []
        if subprocess.run(making).returncode:
            raise SystemExit(1)
    sweep.run(plans, chosen.minutes - (time.perf_counter() - began) / 60)
