"""Processes that measure together, in groups of the first one, two, ... of them."""

import contextlib
import datetime
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.micro.worker import Worker

PATIENCE = datetime.timedelta(minutes=5)  # of a rank that waits for another


class Ranks:
    """The processes, in groups of the first ones. Each calls everything here at the same time."""

    def __init__(self, counts: list[int], device: str, **options):
        backend = "gloo"
        self.device = torch.device("cpu")
        if device == "cuda":
            own = int(os.environ.get("LOCAL_RANK", options.get("rank", 0)))
            backend, self.device = "nccl", torch.device("cuda", own)
            torch.cuda.set_device(self.device)
        dist.init_process_group(backend, timeout=PATIENCE, **options)
        self.rank = dist.get_rank()
        self.groups = {count: dist.new_group(range(count)) for count in counts}

    def tell(self, values, group=None) -> list[list[float]]:
        """The numbers that every rank of a group has come with."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, own, group=group)
        return torch.stack(rows).tolist()

    def seconds(self, part: "Part") -> float:
        """The time of the slowest rank of the part's group."""
        self.tell([0.0])
        if part.run is None:
            return float("nan")
        self.tell([0.0], part.group)
        start = time.perf_counter()
        part.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return max(self.tell([time.perf_counter() - start], part.group))[0]

    def first_says(self, over: bool) -> bool:
        return bool(self.tell([over])[0][0])


@dataclass
class Part:
    """A rank's part of an entry; run is None in ranks that have none."""

    group: dist.ProcessGroup
    run: Callable[[], object] | None

    def __call__(self) -> None:
        if self.run is not None:
            self.run()


def of_worker(settings: dict) -> Ranks:
    """The ranks of a process that local() has started."""
    store = dist.FileStore(settings["store"], settings["world_size"])
    group = {name: settings[name] for name in ("rank", "world_size")}
    return Ranks(settings["counts"], settings["device"], store=store, **group)


@contextlib.contextmanager
def local(module: str, counts: list[int], device: str):
    """Starts as many processes of a module as the largest count, with one thread each, and ends them. Gives a function
    that answers a job with the first rank's rows."""
    world = max(counts)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        common = {"world_size": world, "store": f"{folder}/store", "counts": counts}
        workers = []
        for rank in range(world):
            workers.append(Worker(module, "tuned", 1, rank=rank, device=device, **common))
            started.callback(workers[-1].close)
        pool = started.enter_context(ThreadPoolExecutor(world))
        title = f"a rank of {module}; its message is above"

        def answer(job: dict) -> list[dict]:
            tasks = [pool.submit(worker, job, title) for worker in workers]
            if any(task.exception() for task in wait(tasks, return_when=FIRST_EXCEPTION).done):
                for worker in workers:  # the others would wait for the one that is dead
                    worker.process.kill()
            first, *_ = [task.result() for task in tasks]
            return first

        yield answer


@contextlib.contextmanager
def torchrun(counts: list[int], device: str, prepare: Callable[[Ranks], Callable]):
    """The same for processes that torchrun has started: each calls prepare(ranks)(job) itself."""
    torch.set_num_threads(1)
    yield prepare(Ranks(counts, device))
    dist.destroy_process_group()
