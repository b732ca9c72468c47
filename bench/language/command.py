"""Trains a language model of bytes, generates with it step by step, and serves several prompts in one batch.

python -m bench.generate [--layer long_conv] [--steps 600] [--minutes 10] [--out FOLDER] [--check 2000]

The text is Python's language reference, which is part of Python. The loss on its last tenth stands beside what gzip and
xz make of it after they have seen the rest. A run goes on from its checkpoint in --out. --check compares the greedy
text of so many bytes with that of a whole forward pass for each byte, in float64.
"""

import argparse
import copy
import time
import warnings
from pathlib import Path

import torch

from bench import files
from bench.facts import now, plural
from bench.language.corpus import levels
from bench.language.model import LAYERS, as_text
from bench.language.serving import Request, alone, compare_greedy, serve, statistics
from bench.language.training import Training, bits_per_byte
from bench.micro.worker import machine, refuse_fallback
from bench.terminal import plain, progress

SAVED_EVERY = 50  # steps


def make_requests(tail: bytes, count: int, length: int) -> list[Request]:
    """Prompts of 1 to 400 bytes from the held-out text, which ask for length / 2 to 3 / 2 length bytes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(count):
        size = int(400 ** torch.rand((), generator=generator).item())
        start = int(torch.randint(max(1, len(tail) - size), (), generator=generator))
        wanted = max(1, int(length * (0.5 + torch.rand((), generator=generator).item())))
        found.append(Request(tail[start : start + size], wanted, seed))
    return found


def show_sample(model, args) -> str:
    request = Request(args.prompt.encode(), args.sample, args.seed)
    text = args.prompt + as_text(alone(model, request, args.temperature))
    plain.print(f"\n{text}", markup=False)
    return text


def show_serving(model, tail: bytes, args) -> dict:
    requests = make_requests(tail, args.requests, args.sample)
    start = time.perf_counter()
    found = serve(model, requests, args.rows, args.temperature)
    result = statistics(found, time.perf_counter() - start)
    result |= {"requests": args.requests, "rows": args.rows}
    texts = [alone(model, request, args.temperature) for request in requests[: args.rows]]
    result["same_as_alone"] = sum(t == f.tokens for t, f in zip(texts, found, strict=False))
    parts = [f"{s} {{{n}p{s}_ms:.3g}}" for n in ("", "first_") for s in (50, 90, 99)]
    each, first = (", ".join(parts[i : i + 3]).format(**result) for i in (0, 3))
    shape = f"{plural(args.requests, 'request')} in {plural(args.rows, 'row')}"
    rate = f"{result['bytes']} bytes, {result['bytes_per_second']:,.0f} a second"
    plain.print(f"\n{shape}: {rate}.")
    plain.print(f"Milliseconds, percentiles: {each}; of first bytes: {first}.")
    same = f"{result['same_as_alone']} of {plural(len(texts), 'text')}"
    plain.print(f"{same} are those of a batch of one.")
    return result


def show_check(model, args) -> dict:
    with warnings.catch_warnings(), progress(plain) as bar:
        # The text may be longer than the context: both ways see as many taps.
        warnings.filterwarnings("ignore", ".*is not seen")
        task = bar.add_task("checking", total=args.check)
        double = copy.deepcopy(model).double()
        found = compare_greedy(double, args.prompt.encode(), args.check, lambda: bar.advance(task))
    found["text"] = as_text(found.pop("tokens"))
    same = f"{found['equal']} of {args.check} bytes are those of the whole forward pass for each"
    apart = f"differ by {found['difference']:.1e} at most"
    margin = f"the best and the second one by {found['margin']:.1e} at least"
    plain.print(f"Greedy, float64: {same}. The logits {apart}, {margin}.")
    return found


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.generate", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--layer", default="long_conv", choices=LAYERS)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3, help="blocks")
    parser.add_argument("--context", type=int, default=512, help="of the training, and taps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop then; the next run goes on"
    )
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/generate-LAYER)")
    parser.add_argument(
        "--prompt", default="A function definition", help="of the text that is shown"
    )
    parser.add_argument("--sample", type=int, default=400, help="bytes")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest byte")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8, help="of the batch that serves them")
    parser.add_argument("--check", type=int, nargs="?", const=2000, default=0, metavar="BYTES")
    args = parser.parse_args(argv)
    sizes = ("width", "depth", "context", "batch", "steps", "sample", "requests", "rows")
    small = [f"--{name}" for name in sizes if getattr(args, name) < 1]
    if not args.prompt:
        parser.error("--prompt: at least one byte is needed")
    if small or args.temperature < 0 or args.check < 0 or (args.threads or 1) < 1:
        parser.error(f"{', '.join(small) or '--temperature, --check and --threads'}: too small")
    args.out = args.out or Path(f"runs/generate-{args.layer}")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    refuse_fallback()
    training = Training(vars(args), args.out)
    model = training.model
    count = sum(p.numel() for p in model.parameters())
    size = len(training.train_text), len(training.tail)
    plain.print(
        f"{args.layer}, {count:,} parameters; {size[0]:,} bytes to train on, {size[1]:,} held out"
    )
    if training.step:
        plain.print(f"Goes on from step {training.step}.")
    done = training.run(args.minutes, SAVED_EVERY)
    if not done:
        plain.print(f"Stopped at step {training.step} of {args.steps}. The same command goes on.")
    model.eval()
    known = levels(training.train_text, training.tail)
    bits = bits_per_byte(model, training.train_text, training.tail)
    plain.print(f"Trained for {training.seconds / 60:.1f} minutes, {training.step} steps.")
    beside = ", ".join(f"{name} {value:.3f}" for name, value in known.items())
    plain.print(f"Held out: {bits:.3f} bits per byte. Others: {beside}.")
    result = {"layer": args.layer, "options": training.options, "parameters": count}
    result |= {"step": training.step, "seconds": training.seconds, "text": training.digest}
    result |= {"bits_per_byte": bits, "levels": known}
    result["sample"] = show_sample(model, args)
    result["serving"] = show_serving(model, training.tail, args)
    if args.check:
        result["check"] = show_check(model, args)
    result |= machine() | {"threads": torch.get_num_threads(), "when": now()}
    files.write_json(args.out / "result.json", result)
    if args.check and result["check"]["equal"] < args.check:
        raise SystemExit("the text generated step by step is not that of the whole forward pass")


if __name__ == "__main__":
    main()
