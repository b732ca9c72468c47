"""Long convolutions of other packages' models, replaced in place by this package's."""

import copy
from types import MethodType

from torch import nn

from seqconv.ops.checks import check_flag, check_positive
from seqconv.patching.gated import RULES as GATED
from seqconv.patching.long import RULES as LONG
from seqconv.patching.report import Report, Row, compare, measure
from seqconv.patching.rule import Rule, probe

RULES = [*LONG, *GATED]


def patch(
    model: nn.Module,
    *,
    length: int | None = None,
    batch: int = 1,
    test: bool = True,
    repeats: int = 5,
) -> Report:
    """Replaces the long convolutions in a model of another package by seqconv's, in place, until the report is called.

    It knows S4D and FFTConv of s4, LongConv and HyenaOperator of safari, HyenaOperator of HyenaDNA and of its Hugging
    Face port, GConv of SGConv, HyenaCascade of vortex (Evo 2; its steps stay its own), and LongConvolution and
    ImplicitLongConvolution of fla, by the names of classes and attributes. A layer gets a new forward, which reads the
    layer's own parameters: an optimizer, a state_dict and hooks stay as they are, and so does what the layer computes.
    A layer whose test shows other outputs or gradients, because its code was changed, say, is left alone. The test has
    no dropout, and sees no difference below 3.5e-4 in float32, 3 % in float16 and 9 % in bfloat16.
    Deep copies of a patched model are patched, and their patch cannot be taken back. Take the patch back before you
    pickle the model, and before nn.DataParallel makes replicas of it.

    Args:
        model: the model, or a layer.
        length, batch: those of the random input on which a copy of each layer is tested, in evaluation mode. length is
            by default what the layer says, at most 1024.
        test: whether layers are tested. Without it the report has no numbers.
        repeats: how many passes are timed.

    Returns:
        A Report, which prints as a table of error, time and memory before and after. Calling it restores the model. It
        also lists the layers that were left alone, and why, and the modules with parameters of their own that are
        neither torch's nor known.

    Example:
        >>> undo = patch(nn.Sequential(nn.Linear(4, 4)))
        >>> undo.rows, undo.left
        ([], [])
        >>> undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    check_positive("patch", batch=batch, repeats=repeats)
    if length is not None:
        check_positive("patch", length=length)
    check_flag("patch", test=test)
    report = Report([], [])
    inside: set[nn.Module] = set()
    try:
        for name, module in model.named_modules():
            if module in inside:
                continue
            rule = next((rule for rule in RULES if rule.knows(module)), None)
            kind = type(module).__name__
            if rule is None:
                if _foreign(module):
                    report.left.append((name, kind, "unknown"))
                continue
            inside |= set(module.modules())
            why = (
                "it has a forward of its own" if "forward" in vars(module) else rule.refuse(module)
            )
            if why:
                report.left.append((name, kind, why))
                continue
            row, why = _tested(rule, name, module, length, batch, test and repeats)
            if why:
                report.left.append((name, kind, why))
                continue
            module.forward = MethodType(rule.forward, module)  # A copy then has its own.
            report.rows.append(row)
            report._replaced.append((module, vars(module)["forward"]))
    except BaseException:
        report()
        raise
    return report


def _foreign(module: nn.Module) -> bool:
    """Whether the module is neither torch's nor this package's, and has parameters of its own."""
    package = type(module).__module__.split(".")[0]
    return package not in ("torch", "seqconv") and next(module.parameters(False), None) is not None


def _tested(
    rule: Rule, name: str, module: nn.Module, length: int | None, batch: int, repeats: int
) -> tuple[Row, str | None]:
    """The layer's row of the report, and why it must stay as it is."""
    row = Row(name, type(module).__name__, rule.package)
    if repeats:
        # A copy is tested, because some of these layers change in their forward.
        twin = copy.deepcopy(module).eval()
        x = probe(rule, module, length, batch)
        own = copy.deepcopy(module).eval()
        twin.forward = MethodType(rule.forward, twin)
        try:
            before = measure(own, x, repeats)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            text = (
                f"{name or 'the model'} ({type(module).__name__}) cannot compute its own test input"
            )
            raise RuntimeError(f"patch: {text}, test=False leaves the test out: {error}") from error
        try:
            row.error, why = compare(own, twin, x)
            if why:
                return row, why
            after = measure(twin, x, repeats)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            return row, f"the new forward cannot compute its test input: {error}"
        row.ms, row.mib = zip(before, after, strict=True)
    return row, None
