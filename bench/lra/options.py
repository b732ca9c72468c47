"""Every option of a training run, with its type. Importing this needs no torch."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Literal


def option(help: str, **default):
    return field(metadata={"help": help}, **default)


@dataclass(frozen=True)
class Model:
    """The backbone around the layers."""

    depth: int = option("layers")
    d_model: int = option("channels")
    norm: Literal["batch", "layer"] = option("batch: over samples and time; layer: over channels")
    prenorm: bool = option("normalise before a layer instead of after the residual")
    dropout: float = option("dropout in a layer and of what it adds to the residual")
    pool: Literal["mean", "last"] = option(
        "what the decoder reads: the mean over time, or the last step"
    )
    tie_dropout: bool = option(
        "one dropout mask per sample and channel for all times", default=True
    )


@dataclass(frozen=True)
class S4D:
    d_state: int = option("real state size", default=64)
    n_ssm: int | None = option("sets of (A, B); null: one per channel", default=None)
    init: str = option("initial modes, see seqconv.layers.s4d_init", default="lin")
    discretization: str = option("zoh, bilinear, dss or dss_softmax", default="zoh")
    dt_min: float = option("smallest initial step", default=1e-3)
    dt_max: float = option("largest initial step", default=1e-1)
    heads: int = option("kernels per channel", default=1)
    bidirectional: bool = option("see the future too", default=True)
    kernel_lr: float = option("learning rate of dt, A and B", default=1e-3)
    dt_lr: float | None = option("of dt alone; null: kernel_lr", default=None)


@dataclass(frozen=True)
class SGConv:
    kernel_dim: int = option("weights per scale", default=32)
    init_scale: int = option("logarithm of the first scale's stretch", default=0)
    init: Literal["randn", "cos"] = option("initial weights", default="randn")
    combine: Literal["cat", "sum"] = option(
        "scales follow one another, or are added", default="cat"
    )
    upsample: Literal["linear", "nearest"] = option("how weights are stretched", default="linear")
    decay: Literal["geometric", "power", "power_fixed"] = option("decay law", default="geometric")
    decay_min: float = option("decay of the first channel", default=2.0)
    decay_max: float = option("decay of the last channel", default=2.0)
    heads: int = option("kernels per channel", default=1)
    bidirectional: bool = option("see the future too", default=True)
    kernel_lr: float = option("learning rate of the weights", default=1e-3)


@dataclass(frozen=True)
class Taps:
    """What LongConv and ButterflyConv share."""

    init: Literal["random", "double_exp"] = option("initial taps", default="random")
    lam: float = option("threshold of the squash", default=0.003)
    smooth: Literal["time", "frequency"] | None = option("average before the squash", default=None)
    smooth_window: int = option("how many taps an average takes", default=7)
    kernel_dropout: float = option("dropout of single taps", default=0.2)
    heads: int = option("kernels per channel", default=2)


@dataclass(frozen=True)
class LongConv(Taps):
    bidirectional: bool = option("see the future too", default=False)
    kernel_lr: float = option("learning rate of the taps", default=1e-3)


@dataclass(frozen=True)
class Butterfly(Taps):
    butterfly_heads: int = option("sets of learned matrices", default=1)
    additive: bool = option("learn what is added to the Fourier matrices", default=False)
    dft_activation: Literal["gelu", "silu", "relu"] | None = option(
        "applied to both parts after every pass of the transforms", default=None
    )
    dft_dropout: float = option("dropout of single elements of the matrices", default=0.0)
    dft_lr: float = option("learning rate of the matrices", default=1e-3)
    kernel_lr: float = option("learning rate of the taps", default=1e-3)


@dataclass(frozen=True)
class Hyena:
    order: int = option("gates", default=2)
    emb_dim: int = option("features of time that the filter sees, odd", default=3)
    filter_width: int = option("width of the filter's network", default=64)
    filter_layers: int = option("inner layers of the filter's network", default=2)
    filter_frequency: float = option("initial frequency of its sines", default=1.0)
    kernel_lr: float = option("learning rate of the filter's network", default=1e-3)


KERNELS = {
    "s4d": S4D,
    "sgconv": SGConv,
    "long_conv": LongConv,
    "butterfly": Butterfly,
    "hyena": Hyena,
}


@dataclass(frozen=True)
class Optim:
    """AdamW, with a linear warm-up and half a cosine to zero, step by step."""

    lr: float = option("learning rate of all but the kernels")
    weight_decay: float = option("weight decay of all but the kernels; SGConv's have it too")
    batch: int = option("samples per optimiser step, over all processes")
    epochs: int = option("passes over the training split")
    warmup: int = option("steps of warm-up")
    schedule_steps: int | None = option(
        "step at which the cosine is zero; null: at the end. It is scaled with the epochs if only those are changed",
        default=None,
    )
    accumulate: int = option("parts of a batch that are computed one after the other", default=1)


@dataclass(frozen=True)
class Parallel:
    """How processes share the work. A run continues with any other sharing."""

    context: int = option(
        "neighbouring processes that have the same samples and divide the steps of each", default=1
    )


@dataclass(frozen=True)
class Run:
    seed: int = option("seed of weights, order and dropout", default=0)
    out: str | None = option("run folder; null: runs/TASK-LAYER-SEED", default=None)
    data: str = option("folder of the data sets and of their cache", default="data")
    resume: bool = option("continue from the run folder's last checkpoint", default=False)
    overwrite: bool = option("start anew in a folder that holds a run", default=False)
    max_minutes: float | None = option(
        "shorten the schedule so that training and evaluations take about that long", default=None
    )
    stop_minutes: float | None = option(
        "stop after that long, as Ctrl-C does; --resume continues", default=None
    )
    stop_after: int | None = option("stop after that many steps, as Ctrl-C does", default=None)
    eval_steps: int | None = option("steps between evaluations; null: an epoch", default=None)
    checkpoint_steps: int = option("steps between checkpoints", default=200)
    log_steps: int = option("steps between rows of metrics.csv", default=50)
    device: Literal["auto", "cpu", "cuda"] = option("where to train", default="auto")
    packed: bool = option(
        "pack the samples of a batch instead of padding them; BatchNorm then counts real steps only",
        default=False,
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = option(
        "precision of activations and weights", default="32-true"
    )
    wandb: str | None = option("also log to this project of Weights & Biases", default=None)
    compare: int = option("at the end, time that many training steps beside torch.fft", default=0)


# What may differ between a run and its continuation.
FREE = {"out", "data", "resume", "overwrite", "stop_minutes", "stop_after", "checkpoint_steps"}
FREE |= {"device", "wandb", "compare"}


@dataclass(frozen=True)
class Config:
    task: str
    layer: str
    model: Model
    kernel: object
    optim: Optim
    run: Run
    parallel: Parallel = Parallel()

    @property
    def out(self) -> str:
        return self.run.out or run_folder(self.task, self.layer, self.run.seed)

    def identity(self) -> dict:
        """Returns everything that the result depends on: {"optim.lr": 0.01, ...}."""
        flat = {"task": self.task, "layer": self.layer}
        for group in ("model", "kernel", "optim", "run"):
            values = dataclasses.asdict(getattr(self, group))
            flat |= {f"{group}.{name}": value for name, value in values.items()}
        return {name: v for name, v in flat.items() if name.removeprefix("run.") not in FREE}


def run_folder(task: str, layer: str, seed: int) -> str:
    return f"runs/{task.replace(':', '-')}-{layer}-{seed}"


def continued(run: Run, out: str) -> Run:
    """Returns what a continuation takes over. Where the run lies and when its last session should stop are new."""
    own = {"resume": False, "overwrite": False, "stop_minutes": None, "stop_after": None}
    return dataclasses.replace(run, out=out, **own)


def told(value) -> str:
    """Spells a value as a file of options does."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def differences(was: dict, now: dict) -> list[str]:
    return [
        f"{name.removeprefix('run.')} was {told(was.get(name))}, now {told(value)}"
        for name, value in now.items()
        if was.get(name) != value
    ]


def from_dict(values: dict) -> Config:
    """Inverts dataclasses.asdict(Config)."""
    groups = {"model": Model, "kernel": KERNELS[values["layer"]], "optim": Optim, "run": Run}
    values = {"parallel": {}} | values  # older runs have not recorded it
    parts = {name: cls(**values[name]) for name, cls in (groups | {"parallel": Parallel}).items()}
    return Config(values["task"], values["layer"], **parts)


def check(config: Config) -> None:
    """Raises ValueError for numbers that no run can have."""
    m, o, r = config.model, config.optim, config.run
    positive = {"model.depth": m.depth, "model.d_model": m.d_model, "optim.batch": o.batch}
    positive |= {"optim.epochs": o.epochs, "optim.accumulate": o.accumulate, "optim.lr": o.lr}
    positive |= {"checkpoint_steps": r.checkpoint_steps, "log_steps": r.log_steps}
    positive["parallel.context"] = config.parallel.context
    limits = ("max_minutes", "stop_minutes", "stop_after", "eval_steps")
    positive |= {k: getattr(r, k) for k in limits if getattr(r, k) is not None}
    if o.schedule_steps is not None:
        positive["optim.schedule_steps"] = o.schedule_steps
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"--{name} must be positive, got {value}")
    for name, value in (("optim.warmup", o.warmup), ("optim.weight_decay", o.weight_decay)):
        if value < 0:
            raise ValueError(f"--{name} must be >= 0, got {value}")
    rates = ("kernel_lr", "dt_lr", "dft_lr")
    rates = {k: getattr(config.kernel, k, None) for k in rates}
    for name, rate in rates.items():
        if rate is not None and not rate >= 0:
            raise ValueError(f"--kernel.{name} must be >= 0, got {rate}")
    if r.seed >= 2**31:
        raise ValueError(f"--seed must be below 2^31, got {r.seed}")
    if r.seed < 0 or r.compare < 0:
        name = "seed" if r.seed < 0 else "compare"
        raise ValueError(f"--{name} must be >= 0, got {getattr(r, name)}")
    if r.compare and config.layer == "butterfly":
        raise ValueError(
            "--compare must be 0 for butterfly: it has no fftconv to put torch.fft in the place of"
        )
    if not 0 <= m.dropout < 1:
        raise ValueError(f"--model.dropout must be in [0, 1), got {m.dropout}")
    if r.packed and config.parallel.context > 1:
        text = "must be 1 with --packed: processes divide the steps of padded samples only"
        raise ValueError(f"--parallel.context {text}, got {config.parallel.context}")
    if o.batch % o.accumulate:
        text = f"--optim.accumulate must divide --optim.batch={o.batch}"
        raise ValueError(f"{text}, got {o.accumulate}")


def hints(cls) -> dict:
    return typing.get_type_hints(cls)
