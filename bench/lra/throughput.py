"""Sequences per second in training steps and forward passes: samples packed beside the same samples padded.

ListOps and Text have random tokens where their data sets are absent, because a step takes the same time for all tokens.
ListOps then has the lengths of the generator's expressions, and Text those of IMDB's reviews by their quartiles.
"""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import seqconv
from bench import files
from bench.facts import commit, now, plural, processor, versions
from bench.files import markdown
from bench.lra import data, options
from bench.lra.batches import Batch, TrainBatches
from bench.lra.data import formats, listops
from bench.lra.run import classifier, device_for
from bench.lra.schedule import TORCH_FFT, autocast, synchronize, time_steps
from bench.micro.timing import quartiles, ratios

# Characters of the 50,000 reviews: the shortest, the quartiles and the longest.
REVIEWS = (32, 699, 970, 1590, 13704)
FORWARD = 3  # forward passes that are timed for every training step


class StandIn:
    """A split of random tokens, in samples of these lengths."""

    def __init__(self, lengths: np.ndarray, vocab: int, classes: int):
        self.lengths, self.vocab = lengths, vocab
        self.labels = np.arange(len(lengths)) % classes

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices):
        lengths = self.lengths[indices]
        x = np.random.default_rng(0).integers(1, self.vocab, (len(indices), lengths.max()))
        return x * (np.arange(x.shape[1]) < lengths[:, None]), lengths, self.labels[indices]


def stand_in(task: str, count: int):
    """Returns the info and the training split of a task whose data set is absent; None for tasks without a stand-in."""
    if task in ("listops", "listops-gen", "listops-short"):
        settings = listops.SHORT if task == "listops-short" else listops.FULL
        chunks = range(-(-count // listops.CHUNK))
        drawn = [n for i in chunks for *_, n in listops.chunk(settings, 0, i)[0]]
        lengths = np.array(drawn[:count]) + 1  # the end has a token
        l_max, classes = settings.longest + 1, 10
        vocab = formats.END + 1 + len(formats.LISTOPS_TOKENS)
    elif task == "text":
        shares = np.random.default_rng(0).random(count)
        drawn = np.exp(np.interp(shares, (0, 0.25, 0.5, 0.75, 1), np.log(REVIEWS)))
        l_max, classes, vocab = 4096, 2, 135
        lengths = np.minimum(drawn.astype(int), l_max - 1) + 1
    else:
        return None
    name = f"{task}, random tokens"
    chance = 1 / classes
    info = data.Info(task, name, classes, None, vocab, l_max, False, chance, chance, True)
    return info, StandIn(lengths, vocab, classes)


def opened(task: str, root: Path, count: int):
    """Returns the info and the training split, or those of the stand-in."""
    try:
        info, splits = data.open_task(task, root)
        return info, splits["train"]
    except data.DataError as error:
        found = stand_in(task, count)
        if found is None:
            raise SystemExit(str(error)) from None
        return found


def forward(model, batches: list[Batch], precision: str) -> float:
    """Returns the seconds of forward passes without gradients."""
    device = batches[0].x.device
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(device.type, *autocast(precision)):
        for batch in batches:
            model(*batch.inputs)
    synchronize(device)
    return time.perf_counter() - start


def measure(config: options.Config, count: int, rounds: int, torch_fft: bool) -> dict:
    """Returns what was measured of a task and layer, on `count` batches of the recipe's order.

    rows: for each contender the sequences per second, as medians of interleaved rounds with quartiles, and how many
    times as long as packing it takes. padding: the share of the steps of padded batches that are padding. Raises
    RuntimeError if the contenders' gradients differ.
    """
    device, part = device_for(config.run.device), config.optim.batch // config.optim.accumulate
    info, split = opened(config.task, Path(config.run.data), max(512, count * config.optim.batch))
    order = {"batch": part, "period": count, "seed": config.run.seed}
    padded, packed = (
        [batch.to(device) for batch in TrainBatches(split, **order, packed=packs)]
        for packs in (False, True)
    )
    model = classifier(config, info).to(device)
    contenders = {"packed": (seqconv.fftconv, packed), "padded": (seqconv.fftconv, padded)}
    if torch_fft:
        contenders["padded, torch.fft"] = (TORCH_FFT, padded)
    precision = config.run.precision
    training, difference, peaks = time_steps(model, contenders, rounds, precision)
    model.eval()
    passes: dict[str, list[float]] = {"packed": [], "padded": []}
    for done in range(rounds * FORWARD + 1):
        for name, seconds in passes.items():
            took = forward(model, contenders[name][1], precision)
            if done:  # the first one warms up
                seconds.append(took)
    rows = {}
    for what, seconds in (("training", training), ("forward", passes)):
        for name, times in seconds.items():
            low, middle, high = (count * part / t for t in reversed(quartiles(times)))
            slower = ratios(times, seconds["packed"])
            rows[f"{what}, {name}"] = {"q1": low, "median": middle, "q3": high, "slower": slower}
    real = sum(len(batch.x) for batch in packed)
    return {
        "task": config.task,
        "data": info.title,
        "layer": config.layer,
        "batch": part,
        "batches": count,
        "rounds": rounds,
        "padding": 1 - real / sum(batch.x.shape[0] * batch.x.shape[1] for batch in padded),
        "longest": max(batch.x.shape[1] for batch in padded),
        "difference": difference,
        "rows": rows,
        "config": asdict(config),
    } | ({"peak_mib": peaks} if peaks else {})


def where() -> dict:
    """Returns what every result says of where it was measured."""
    threads = torch.get_num_threads()
    device = f"{processor()['model name']}, {plural(threads, 'thread')}"
    facts = {"device": device, "threads": threads, "versions": versions(("seqconv", "torch"))}
    return facts | {"commit": commit(), "when": now()}


def rounded(value: float) -> str:
    """Three digits: 2,130 or 30.4."""
    return f"{float(f'{value:.3g}'):,.6g}"


def table(found: dict) -> str:
    """Returns what `measure` has found in Markdown."""
    lines = []
    for name, row in found["rows"].items():
        low, middle, high = (rounded(row[key]) for key in ("q1", "median", "q3"))
        slower = "{1:.2f}x ({0:.2f} to {2:.2f})".format(*row["slower"])
        slower = "" if name.endswith(", packed") else slower
        lines.append([name, middle, f"{low} to {high}", slower])
    text = (
        f"{found['data']}, {found['layer']}: {found['batches']} x {found['batch']} samples of up to "
        f"{found['longest']:,} steps, {found['padding']:.0%} padding if padded; {plural(found['rounds'], 'round')}; "
        f"gradients agree to {found['difference']:.0e}; {found['device']}, commit {found['commit']}."
    )
    header = ["", "sequences/s", "quartiles", "time over packing"]
    return "\n\n".join([text, markdown(header, lines)])


def compare(configs: list[options.Config], count: int, rounds: int, torch_fft: bool, json) -> None:
    """Measures each in turn, prints it, and appends it to the file `json` if that is given."""
    for config in configs:
        try:
            found = measure(config, count, rounds, torch_fft) | where()
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"{config.task}, {config.layer}: {error}") from None
        print(table(found), end="\n\n", flush=True)
        if json:
            files.append(Path(json), found)
