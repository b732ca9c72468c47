"""Operators on torch's DTensors: how several processes share the work of one call.

An operator declares rows, each of them one way to share it along ONE dimension of a mesh:

    (output, {input: ...}): the axis along which a tensor is cut; or SUM, where the tensor is the sum of what the
    processes have. Every process has the whole of an input that is not named. The operator on the parts gives the part.

    (0, {"u": 0})       samples are shared, and every process has the kernel
    (SUM, {"u": SUM})   the operator is linear in u

`placements` makes DTensor's rules of them, for the gradient, too. A gradient is cut as its tensor is; it is a sum
where every process has the whole tensor and a part of the output; and where the tensor is SUM, the operator is linear
in it, so that every process has the whole gradient.

Rules are made when torch.distributed.tensor is there, whose import takes longer than all of this package.
"""

import contextlib
import importlib.util
import sys

SUM = "sum"
_MODULE = "torch.distributed.tensor"
_declared: list = []  # operators that wait for their rules


def rows_of(operator, inputs, options, ranks: int) -> list[tuple]:
    """The operator's rows for such tensors, of which the shapes are read: those that say something of tensors
    that are there, with axes from 0 on."""
    rows = operator.shardings(inputs, *options, ranks=ranks) if operator.shardings else []
    found = []
    for out, axes in rows:
        if unknown := axes.keys() - set(inputs._fields):
            text = f"must name {', '.join(inputs._fields)}, got {', '.join(sorted(unknown))}"
            raise ValueError(f"{operator.name}: shardings {text}")
        kinds = [None if t is None else axes.get(n) for n, t in inputs._asdict().items()]
        if any(kind is not None for kind in kinds):
            pairs = zip(kinds, inputs, strict=True)
            found.append((out, [k % len(t.shape) if isinstance(k, int) else k for k, t in pairs]))
    return found


def gradient_row(row: tuple) -> tuple[list, list]:
    """(gradients, [dy, *inputs]) of a row."""
    out, axes = row
    grads = [SUM if axis is None else None if axis == SUM else axis for axis in axes]
    return grads, [None if out == SUM else out, *axes]


def declare(operator) -> None:
    """Gives the operator its rules, now or when torch.distributed.tensor is imported."""
    _declared.append(operator)
    if _MODULE in sys.modules:
        _register()


def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    while _declared:
        operator = _declared.pop()
        register_sharding(operator.fwd)(_forward_rule(operator))
        if (
            not operator.takes_list
        ):  # A rule cannot say how the tensors of a list are placed that is returned.
            register_sharding(operator.bwd)(_gradient_rule(operator))


def _placements(kinds, tensors) -> list:
    """torch's names for axis, None and SUM; None for a tensor that is not there."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def place(kind):
        return Replicate() if kind is None else Partial() if kind == SUM else Shard(kind)

    pairs = zip(kinds, tensors, strict=True)
    return [None if t is None else place(kind) for kind, t in pairs]


def _ranks(tensors) -> int:
    return next(t.mesh.size() for t in tensors if t is not None)


def _forward_rule(operator):
    def rule(*args):
        inputs, options = operator.split(args)
        rows = rows_of(operator, inputs, options, _ranks(inputs))
        rows.append((None, [None] * len(inputs)))
        rest = [None] * (1 + len(options))
        return [
            (_placements([out], [inputs]), _placements(axes, inputs) + rest) for out, axes in rows
        ]

    return rule


def _gradient_rule(operator):
    def rule(dy, *args):
        inputs, (*options, wanted) = operator.split(args)
        rows = [gradient_row(r) for r in rows_of(operator, inputs, options, _ranks([dy]))]
        none = [None] * len(inputs)
        rows += [(none, [None, *none]), ([SUM] * len(inputs), [SUM, *none])]  # linear in dy
        rest = [None] * (len(options) + 2)
        found = []
        for grads, axes in rows:
            # What nobody wants is an empty tensor, the same one everywhere.
            known = zip(grads, wanted, inputs, strict=True)
            grads = [g if want and t is not None else None for g, want, t in known]
            tensors = _placements(axes, [dy, *inputs])
            found.append((_placements(grads, [dy] * len(grads)), tensors + rest))
        return found

    return rule


def constants_replicated(tensors):
    """A context in which a definition may mix DTensors and the plain tensors that it makes of nothing but sizes:
    every process makes the same ones."""
    if _MODULE in sys.modules:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.experimental import implicit_replication

        if any(isinstance(t, DTensor) for t in tensors):
            return implicit_replication()
    return contextlib.nullcontext()


def on_all(t, like):
    """t as a DTensor that every process has all of, where `like` is a DTensor and t is not."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or hasattr(t, "device_mesh"):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


class _Waiting:
    """Registers the rules as soon as torch.distributed.tensor has been imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(_Waiting)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(
                0, _Waiting
            )  # Who asks for the module may not import it, or in vain.
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            with contextlib.suppress(ValueError):  # when it is loaded once more
                sys.meta_path.remove(_Waiting)
            _register()

        spec.loader.exec_module = exec_module
        return spec


if _MODULE not in sys.modules:
    sys.meta_path.insert(0, _Waiting)
