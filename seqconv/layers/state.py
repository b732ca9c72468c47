"""What a layer remembers between steps: a few tensors with one row for each sample."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree

from seqconv.ops.checks import require

Rows = Tensor | Sequence[int]
OTHER_KERNEL = (
    "state belongs to another kernel: the parameters have changed since init_state, or it is another layer's. Start "
    "anew with init_state"
)


class State:
    """The state of a layer or of a convolution that is computed step by step; init_state makes it.

    It is a tree of tensors for torch (torch.utils._pytree), and copy.deepcopy, pickle, torch.save and torch.load work.
    A step changes it in place. It belongs to the parameters it was made with: with other ones, a step raises
    ValueError.

    Every tensor in it has one row for each sample, and rows may be of different ages:

        state.select(rows)          a new state of these rows, in this order and any number of times: beam search
        state.reset(rows)           forgets the inputs of these rows: a new request takes the place of an old one
        state.insert(rows, other)   puts the rows of another state of the same layer there: a request that was
                                    prefilled elsewhere joins a batch

    rows are sample numbers, a sequence of integers or an integer tensor with one axis; a row outside of the batch is
    a ValueError.
    """

    tensors: ClassVar[tuple[str, ...]] = ()  # attributes: tensors, states, or tuples of states
    options: ClassVar[tuple[str, ...]] = ()  # attributes that are plain values

    def __init__(self, **values: Any):
        for name in (*self.tensors, *self.options):
            setattr(self, name, values.pop(name))
        if values:
            raise TypeError(f"{type(self).__name__}: unknown {', '.join(values)}")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _pytree.register_pytree_node(
            cls,
            _flatten,
            lambda leaves, context: _unflatten(cls, leaves, context),
            flatten_with_keys_fn=lambda state: _with_keys(cls, state),  # torch.export names them
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",  # and saves them,
            to_dumpable_context=list,  # with the options as JSON
            from_dumpable_context=tuple,
        )
        torch.serialization.add_safe_globals([cls])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch={self.batch})"

    @property
    def batch(self) -> int:
        """The number of rows."""
        return self._first().shape[0]

    @property
    def device(self) -> torch.device:
        return self._first().device

    @property
    def dtype(self) -> torch.dtype:
        """In which the state is kept: float32 or float64."""
        return self._first().dtype

    def to(self, device) -> "State":
        """A copy on another device, or this state if it is there."""
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError) as error:
            text = f"device must be a device, got {device!r}"
            raise TypeError(f"{type(self).__name__}.to: {text}") from error
        if device == self.device:
            return self
        return self.map(lambda t: t.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """A new state of function(tensor) for every tensor."""
        new = {name: _map(getattr(self, name), function) for name in self.tensors}
        return type(self)(**new, **{name: getattr(self, name) for name in self.options})

    def select(self, rows: Rows) -> "State":
        """A new state of copies of these rows."""
        index = self._index("select", rows)
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def reset(self, rows: Rows) -> None:
        """Makes these rows as they were before any input, in place."""
        index = self._index("reset", rows)
        for t in self._forgotten():
            t.index_fill_(0, index.to(t.device), 0)

    def insert(self, rows: Rows, other: "State") -> None:
        """Puts the rows of `other` into these rows, in place."""
        name = f"{type(self).__name__}.insert"
        index = self._index("insert", rows)
        if not isinstance(other, type(self)):
            raise TypeError(
                f"{name}: other must be {type(self).__name__}, got {type(other).__name__}"
            )
        if other.batch != len(index):
            raise ValueError(
                f"{name}: other must have batch={len(index)} like rows, got {other.batch}"
            )
        if len(index.unique()) < len(index):
            raise ValueError(f"{name}: rows must be different, got {rows}")
        self._check_same(name, other)
        for to, t in zip(self.leaves(), other.leaves(), strict=True):
            # A clone, because the other state may be a view of this one.
            to.index_copy_(0, index.to(to.device), t.clone())

    def leaves(self) -> list[Tensor]:
        """All tensors, those of nested states too."""
        return [t for name in self.tensors for t in _leaves(getattr(self, name))]

    def _first(self) -> Tensor:
        """One of the tensors."""
        first = getattr(self, self.tensors[0])
        while isinstance(first, tuple):
            first = first[0]
        return first._first() if isinstance(first, State) else first

    def _forgotten(self) -> list[Tensor]:
        """The tensors that are zero before any input."""
        return [t for name in self.tensors for t in _leaves(getattr(self, name), forgotten=True)]

    def _check_same(self, function: str, other: "State") -> None:
        for name in self.options:
            own, found = getattr(self, name), getattr(other, name)
            if own != found and name == "kernel":
                text = "is of another layer, or of other parameters, or of another length"
                raise ValueError(f"{function}: other {text}, so that its rows do not fit")
            if own != found:
                raise ValueError(f"{function}: other must have {name}={own!r}, got {found!r}")
        for name in self.tensors:
            _compare(function, getattr(self, name), getattr(other, name))

    def _index(self, method: str, rows: Rows) -> Tensor:
        name, batch = f"{type(self).__name__}.{method}", self.batch
        if isinstance(rows, Tensor):
            if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
                raise TypeError(
                    f"{name}: rows must be integers with one axis, got {rows.dtype} {tuple(rows.shape)}"
                )
            index = rows
        elif not isinstance(rows, Iterable):
            text = f"a sequence of integers or a tensor, got {type(rows).__name__}"
            raise TypeError(f"{name}: rows must be {text}")
        else:
            rows = list(rows)
            for row in rows:
                if not isinstance(row, Integral) or isinstance(row, bool):
                    raise TypeError(f"{name}: rows must be integers, got {row!r}")
            index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        valid = ((index >= 0) & (index < batch)).all()
        require(valid, f"{name}: rows must be between 0 and batch - 1 = {batch - 1}, got {rows}")
        return index


def _flatten(state: State) -> tuple[list, tuple]:
    return [getattr(state, name) for name in state.tensors], tuple(
        getattr(state, name) for name in state.options
    )


def _with_keys(cls: type[State], state: State) -> tuple[list, tuple]:
    leaves, context = _flatten(state)
    keys = map(_pytree.GetAttrKey, cls.tensors)
    return list(zip(keys, leaves, strict=True)), context


def _unflatten(cls: type[State], leaves, context) -> State:
    pairs = zip((*cls.tensors, *cls.options), (*leaves, *context), strict=True)
    return cls(**dict(pairs))


def _map(value, function):
    if isinstance(value, State):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(_map(one, function) for one in value)
    return function(value)


def _leaves(value, forgotten: bool = False) -> list[Tensor]:
    if isinstance(value, State):
        return value._forgotten() if forgotten else value.leaves()
    if isinstance(value, tuple):
        return [t for one in value for t in _leaves(one, forgotten)]
    return [value]


def _compare(function: str, own, found) -> None:
    if isinstance(own, State):
        return own._check_same(function, found)
    if isinstance(own, tuple):
        for one, other in zip(own, found, strict=True):
            _compare(function, one, other)
        return
    for what in ("dtype", "device"):
        wanted, came = getattr(own, what), getattr(found, what)
        if wanted != came:
            raise ValueError(f"{function}: other must have {what}={wanted}, got {came}")
    if own.shape[1:] != found.shape[1:]:
        raise ValueError(
            f"{function}: other must have rows of shape {tuple(own.shape[1:])}, got {tuple(found.shape[1:])}"
        )


def check_kind(function: str, state, kind: type[State]) -> None:
    if not isinstance(state, kind):
        raise TypeError(f"{function}: state must be {kind.__name__}, got {type(state).__name__}")


def check_state(function: str, state, kind: type[State], batch: int, device, mark: int) -> None:
    """Requires a state of that kind, of so many rows, on x's device, and of the kernel with this mark. A kernel
    that a transform of torch.func watches has the mark 0, and any state goes with it."""
    check_kind(function, state, kind)
    if state.batch != batch:
        raise ValueError(
            f"{function}: state must have batch={batch} like the input, got {state.batch}"
        )
    if state.device != device:
        raise ValueError(
            f"{function}: state must be on the input's device {device}, got {state.device}"
        )
    if state.kernel != mark and 0 not in (state.kernel, mark):  # pyright: ignore
        raise ValueError(f"{function}: {OTHER_KERNEL}")


class States(State):
    """The states of several layers as one, in their order: those of a model's blocks, for instance.

    It can be iterated and indexed. select, reset and insert work on the same rows of all.

    Example:
        >>> from seqconv import S4D, LongConv
        >>> states = States([layer.init_state(2) for layer in (S4D(8), LongConv(8, l_max=16).eval())])
        >>> states.select([0]).batch, len(states)
        (1, 2)
    """

    tensors = ("parts",)
    parts: tuple[State, ...]

    def __init__(self, parts):
        super().__init__(parts=tuple(parts))
        for part in self.parts:
            check_kind("States", part, State)
        if len({part.batch for part in self.parts}) != 1:
            batches = [part.batch for part in self.parts]
            raise ValueError(f"States: parts must have the same batch, got {batches}")

    def __iter__(self):
        return iter(self.parts)

    def __getitem__(self, index: int) -> State:
        return self.parts[index]

    def __len__(self) -> int:
        return len(self.parts)


def mark_of(*tensors: Tensor | None) -> int:
    """A number that tensors with the same values have, and others hardly ever."""
    found = 0
    for t in tensors:
        if t is None:
            continue
        t = getattr(t, "_local_tensor", t)  # of a DTensor
        bits = t.detach().contiguous().flatten().view(torch.int16)
        for i, part in enumerate(bits.split(1 << 20)):
            weights = (
                torch.arange(part.numel(), device=part.device) * 0x9E3779B97F4A7C15 + 2 * i + 1
            )
            found = found * 0x5DEECE66D + int((part * (weights | 1)).sum()) + part.numel()
    return found % (1 << 63)
