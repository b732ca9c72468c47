"""Generation: of one text, and of many in one batch that rows join and leave while the others go on."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.language.model import LanguageModel, as_tokens

SHORT = 8  # bytes: shorter prompts come in by steps, which the other rows take anyway


@dataclass
class Request:
    """A prompt, how many bytes shall follow it, and by which seed they are drawn."""

    prompt: bytes
    count: int
    seed: int = 0

    def __post_init__(self):
        if not self.prompt or self.count < 1:
            text = f"a prompt of {len(self.prompt)} bytes and {self.count} to follow"
            raise ValueError(f"Request: at least one byte of each is needed, got {text}")


@dataclass
class Served:
    """A request in its row: the prompt's bytes to come, those that followed it, and the seconds each took."""

    request: Request
    temperature: float
    pending: deque
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.request.seed)
        self.before = time.perf_counter()

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.request.count

    def next(self) -> int:
        """What the model is given in the next step."""
        return self.pending.popleft() if self.pending else self.tokens[-1]

    def take(self, logits: Tensor) -> None:
        """Draws the byte after those that the model was given, unless more of the prompt is to come."""
        if self.pending:
            return
        self.tokens.append(choose(logits, self.temperature, self.generator))
        now = time.perf_counter()
        self.seconds.append(now - self.before)
        self.before = now


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> int:
    """The likeliest token at temperature 0; one by its probability otherwise."""
    if temperature == 0:
        return int(logits.argmax())
    shares = (logits.double() / temperature).softmax(-1)
    return int(torch.multinomial(shares, 1, generator=generator))


def alone(model: LanguageModel, request: Request, temperature: float) -> list[int]:
    """The bytes after the prompt, generated in a batch of one."""
    served = Served(request, temperature, deque())
    prompt = as_tokens(request.prompt).unsqueeze(0)
    with torch.no_grad():
        logits, state = model.prefill(prompt, model.init_state(1))
        served.take(logits[0, -1])
        while not served.done:
            served.take(model.step(torch.tensor([served.next()]), state)[0])
    return served.tokens


def serve(
    model: LanguageModel, requests: Sequence[Request], rows: int, temperature: float
) -> list[Served]:
    """Serves requests in their order in a batch of `rows`.

    A request joins as soon as a row is free. A prompt longer than SHORT is prefilled, together with others that join
    at the same time, in a state of its own, whose rows are then inserted. A shorter one begins in a row that is reset,
    and comes in one byte a step.
    """
    waiting, active = deque(enumerate(requests)), {}
    found: list[Served] = [None] * len(requests)  # pyright: ignore
    with torch.no_grad():
        state = model.init_state(rows)
        while waiting or active:
            joined = []
            for row in range(rows):
                if row not in active and waiting:
                    number, request = waiting.popleft()
                    found[number] = active[row] = Served(request, temperature, deque())
                    joined.append(row)
            _join(model, state, joined, active)
            active = {row: served for row, served in active.items() if not served.done}
            if active:
                tokens = torch.zeros(rows, dtype=torch.int64)
                for row, served in active.items():
                    tokens[row] = served.next()
                logits = model.step(tokens, state)
                for row, served in active.items():
                    served.take(logits[row])
                active = {row: served for row, served in active.items() if not served.done}
    return found


def _join(model: LanguageModel, state, joined: list[int], active: dict[int, Served]) -> None:
    short = [row for row in joined if len(active[row].request.prompt) <= SHORT]
    if short:
        state.reset(short)
        for row in short:
            active[row].pending.extend(active[row].request.prompt)
    long = [row for row in joined if row not in short]
    if not long:
        return
    prompts = [as_tokens(active[row].request.prompt) for row in long]
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.stack([F.pad(p, (0, int(lengths.max()) - len(p))) for p in prompts])
    same = bool((lengths == lengths[0]).all())
    new = model.init_state(len(long))
    logits, new = model.prefill(padded, new, None if same else lengths)
    state.insert(long, new)
    for i, row in enumerate(long):
        active[row].take(logits[i, lengths[i] - 1])


def statistics(found: list[Served], seconds: float) -> dict[str, float]:
    """Bytes a second over all rows, and percentiles of latencies in milliseconds: of the bytes after the first of a
    request, each since the one before it, and of the first ones, since the request joined."""
    count = sum(len(served.tokens) for served in found)
    result = {"bytes": count, "bytes_per_second": count / seconds}
    for name, each in (
        ("", [1e3 * t for served in found for t in served.seconds[1:]]),
        ("first_", [1e3 * served.seconds[0] for served in found]),
    ):
        for share in (50, 90, 99):
            found_here = torch.tensor(each or [math.nan], dtype=torch.float64)
            result[f"{name}p{share}_ms"] = found_here.quantile(share / 100).item()
    return result


# ---- the proof ----


def compare_greedy(model: LanguageModel, prompt: bytes, count: int, tick=lambda: None) -> dict:
    """Generates `count` likeliest bytes step by step, and again by the whole forward pass of all bytes so far for each.

    Both choose for themselves. margin is the least distance between the best logit of the forward passes and the second
    one, and difference the largest between logits of both ways.
    """
    tokens = as_tokens(prompt)
    with torch.no_grad():
        logits, state = model.prefill(tokens.unsqueeze(0), model.init_state(1))
        ours = [logits[0, -1]]
        while len(ours) < count:
            ours.append(model.step(ours[-1].argmax().unsqueeze(0), state)[0])
        whole = []
        for _ in range(count):
            whole.append(model(tokens.unsqueeze(0))[0, -1].clone())  # not a view of all times
            tokens = torch.cat([tokens, whole[-1].argmax().unsqueeze(0)])
            tick()
    stepped, wanted = torch.stack(ours), torch.stack(whole)
    same = stepped.argmax(1) == wanted.argmax(1)
    best = wanted.topk(2, 1).values
    return {
        "count": count,
        "equal": int(same.long().cumprod(0).sum()),
        "margin": (best[:, 0] - best[:, 1]).min().item(),
        "difference": (stepped - wanted).abs().max().item(),
        "tokens": tokens[len(prompt) :].tolist(),
    }
