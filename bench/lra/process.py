"""What a process of a run needs first: its rank, its device, the data and the model of a seed."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from bench.lra import options
from bench.lra.model import SequenceClassifier

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


def together(make):
    """The first process's value on all of them."""
    box = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def open_task(name: str, root: str):
    """Info and splits; a data set that is missing ends the program with the loader's message."""
    from bench.lra import data

    if dist.is_initialized() and RANK > 0:
        dist.barrier()  # the first process packs, the others open
    try:
        opened = data.open_task(name, Path(root))
    except data.DataError as error:
        raise SystemExit(str(error)) from None
    if dist.is_initialized() and RANK == 0:
        dist.barrier()
    return opened


def device_for(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def move(batch, device: torch.device):
    return tuple(None if part is None else part.to(device) for part in batch)


def classifier(config: options.Config, info) -> SequenceClassifier:
    """The model of a seed, the same on every device; options that a layer refuses end the program."""
    torch.manual_seed(config.run.seed)
    with warnings.catch_warnings():
        # LongConv's published settings squash most taps from the start, and it warns of that.
        warnings.filterwarnings("ignore", message="LongConvKernel: lam=")
        try:
            return SequenceClassifier(
                config.layer,
                config.model,
                config.kernel,
                classes=info.classes,
                l_max=info.l_max,
                channels=info.channels,
                vocab=info.vocab,
                pair=info.pair,
            )
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{config.task}, {config.layer}: {error}") from None
