"""Problems of packed rows for the CUDA kernels, each row of which is judged alone."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from device_cases import FEW, SMALL
from emulated import OnDevice
from judge import ROUNDING
from torch import Tensor

from seqconv import fftconv, reference, use_backend
from seqconv.backends.cuda.problem import H100

EXACT = 3e-6  # the relative error of float32
SIGNALS = ("u", "pre_gate", "post_gate")


@dataclass(frozen=True)
class Pack:
    lengths: tuple[int, ...]
    taps: int
    taps_rev: int | None = None
    channels: int = 2
    heads: int | None = None
    per_row: bool = False
    skip: str = ""  # "", "h" or "ch"
    pre_gate: bool = False
    post_gate: bool = False
    bias: str = ""  # as skip
    activation: str | None = None
    layout: str = "bhl"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.lengths)), f"k{self.taps}"]
        for name, usual in (
            ("taps_rev", None),
            ("heads", None),
            ("skip", ""),
            ("bias", ""),
            ("activation", None),
        ):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        parts += [name for name in ("per_row", "pre_gate", "post_gate") if getattr(self, name)]
        return "-".join([*parts, self.layout, str(self.dtype).removeprefix("torch.")])

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments that are there, by name."""
        heads = () if self.heads is None else (self.heads,)
        lead = (len(self.lengths), *heads) if self.per_row else heads

        def signal(*inner):
            shape = (*inner, self.channels, self.total)
            shape = shape if self.layout == "bhl" else (self.total, *shape[:-1])
            return torch.randn(shape).to(self.dtype)

        found = {"u": signal(), "k": torch.randn(*lead, self.channels, self.taps)}
        found["k"] /= max(1, self.taps) ** 0.5
        if self.taps_rev is not None:
            found["k_rev"] = torch.randn(*lead, self.channels, self.taps_rev)
            found["k_rev"] /= max(1, self.taps_rev) ** 0.5
        if self.skip:
            found["skip"] = torch.randn(*{"h": (), "ch": heads}[self.skip], self.channels)
        if self.bias:
            found["bias"] = torch.randn(*{"h": (), "ch": heads}[self.bias], self.channels)
        if self.pre_gate:
            found["pre_gate"] = signal()
        if self.post_gate:
            found["post_gate"] = signal(*heads)
        return found

    def row(self, tensors: dict, i: int) -> dict:
        """The arguments of row i as a batch of its own."""
        time = -1 if self.layout == "bhl" else 0
        begin, own = sum(self.lengths[:i]), {}
        for name, t in tensors.items():
            if name in SIGNALS:
                own[name] = t.narrow(time, begin, self.lengths[i]).unsqueeze(0)
            else:
                own[name] = t[i : i + 1] if self.per_row and name in ("k", "k_rev") else t
        return own

    def alone(self, tensors: dict) -> Tensor:
        """The rows one by one through the plain torch.fft form."""
        options = {"layout": self.layout, "activation": self.activation}
        rows = [
            reference.fftconv_fft(**self.row(tensors, i), **options).squeeze(0)
            for i in range(len(self.lengths))
        ]
        return torch.cat(rows, -1 if self.layout == "bhl" else 0)

    def packed(self, tensors: dict, offsets: Tensor | None = None, max_seqlen=None) -> Tensor:
        offsets = self.offsets if offsets is None else offsets
        options = {"layout": self.layout, "activation": self.activation}
        return fftconv(**tensors, **options, cu_seqlens=offsets, max_seqlen=max_seqlen)

    def errors(self, name: str, found: Tensor, wanted: Tensor) -> list[float]:
        """The relative error of each row of a signal, or of a kernel as a whole or of each row's."""
        if name in ("y", *SIGNALS):
            time = -1 if self.layout == "bhl" else 0
            pairs = zip(
                found.split(self.lengths, time), wanted.split(self.lengths, time), strict=True
            )
        elif self.per_row and name in ("k", "k_rev"):
            pairs = zip(found, wanted, strict=True)
        else:
            pairs = [(found, wanted)]
        # What cancels in a short row has the round-off of its terms.
        usual = wanted.square().mean().sqrt().item()
        return [
            ((a - b).norm() / max(b.norm().item(), usual * b.numel() ** 0.5, 1e-30)).item()
            for a, b in ((a.double(), b) for a, b in pairs if b.numel())
        ]


BF16, F16 = torch.bfloat16, torch.float16
PASSES = replace(
    SMALL, tensor_cores=False
)  # a block has 2,000 points, and longer rows take three passes
MIXED = (5, 0, 40, 1, 300, 7, 0, 64, 65)
GATES = {"pre_gate": True, "post_gate": True}

CASES = [
    (Pack(MIXED, 200), FEW),
    (Pack(MIXED, 500, taps_rev=20, skip="h", bias="h", activation="gelu", **GATES), FEW),
    (Pack(MIXED, 64, heads=2, skip="ch", bias="ch", post_gate=True, activation="silu", layout="blh"), FEW),
    (Pack((90, 33, 90, 0, 2), 64, taps_rev=70, heads=2, per_row=True, skip="h", bias="h"), H100),
    (Pack((256, 250, 1, 700), 700, taps_rev=700, heads=1, per_row=True, layout="blh"), FEW),
    (Pack((1, 1, 0, 1), 3, taps_rev=2, skip="h", activation="relu"), H100),
    (Pack((31, 256, 257), 9, skip="h", bias="h", dtype=BF16, **GATES, layout="blh"), FEW),
    (Pack((31, 511, 90), 600, taps_rev=600, skip="h", bias="h", activation="gelu", dtype=F16), FEW),
    # Windows, of which a short row has few
    (Pack((7000, 9, 5001), 60, taps_rev=30, skip="h", bias="h", channels=1), FEW),
    (Pack((7000, 9, 5001), 60, skip="h", activation="silu", pre_gate=True, dtype=BF16), FEW),
    # Three passes, of one channel at a time
    (Pack((3000, 17, 2100), 3000, taps_rev=100, skip="h", bias="h", activation="gelu", **GATES), PASSES),
    (Pack((2500, 3000), 3000, heads=2, per_row=True, skip="ch", bias="ch", channels=1), PASSES),
    (Pack((2500, 300), 2500, heads=2, skip="h", post_gate=True, layout="blh", dtype=F16), PASSES),
    (Pack((2500, 300), 2500, skip="h", dtype=BF16, channels=1), PASSES),
]  # fmt: skip


def with_gradients(function, tensors: dict, dy: Tensor | None = None) -> tuple[dict, Tensor]:
    """y and the gradients by name, and the dy that was used."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(leaves)
    dy = torch.randn(y.shape).to(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, dy


class Reading(OnDevice):
    """The CUDA backend on a machine whose kernels read offsets, as if they were on the device."""

    def reads_offsets(self, offsets: Tensor) -> bool:
        return True


@contextmanager
def poisoned():
    """New memory holds NaN, and not what an earlier call has left there."""
    torch.use_deterministic_algorithms(True)  # which also fills uninitialized memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(device, pack: Pack, offsets: Tensor | None = None, max_seqlen=None):
    """Inputs, y with the gradients by name, and dy; with max_seqlen the kernels alone read the offsets."""
    tensors = pack.tensors()
    kind = OnDevice if max_seqlen is None else Reading
    with use_backend(kind(device)), poisoned():
        found, dy = with_gradients(lambda t: pack.packed(t, offsets, max_seqlen), tensors)
    return tensors, found, dy


def wrong(pack: Pack, tensors: dict, found: dict, dy: Tensor) -> dict:
    """The errors that are too large, by name."""
    exact, _ = with_gradients(pack.alone, {n: t.double() for n, t in tensors.items()}, dy.double())
    bad = {}
    for name, value in found.items():
        dtype = pack.dtype if name == "y" else tensors[name].dtype
        assert (value.shape, value.dtype) == (exact[name].shape, dtype), name
        allowed = EXACT + ROUNDING.get(value.dtype, 0)
        errors = pack.errors(name, value, exact[name])
        if not all(error <= allowed for error in errors):
            bad[name] = errors
    return bad


def check(device, pack: Pack, offsets: Tensor | None = None, max_seqlen=None) -> None:
    tensors, found, dy = results(device, pack, offsets, max_seqlen)
    assert not wrong(pack, tensors, found, dy)
