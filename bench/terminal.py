"""What commands print: tables, progress bars, and requirements with what was measured."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# A table needs a fixed width where the output is a log and not a screen.
console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=160)
# Lines of text are never broken: programs read them too.
plain = Console(highlight=False, soft_wrap=True)


def progress(on: Console) -> Progress:
    """A bar with a description, the finished and the total number of steps, and the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), console=on)


def table(title: str, words: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Table:
    """An empty table. The columns of words are aligned left, those of numbers right."""
    made = Table(title=title, title_justify="left")
    for name in words:
        made.add_column(name)
    for name in numbers:
        made.add_column(name, justify="right")
    return made


def show_requirements(lines: list[tuple[str, str, str, bool]]) -> None:
    """Prints every (what, wanted, measured, met)."""
    shown = table("requirements", ("what", "wanted", "measured", ""))
    for what, wanted, value, met in lines:
        shown.add_row(what, wanted, value, "[green]met[/]" if met else "[red]not met[/]")
    console.print(shown)
    console.print(f"{sum(line[3] for line in lines)} of {len(lines)} met")
