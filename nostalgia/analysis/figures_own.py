"""Figures of the user's own, drawn beside the built-in ones: a function named as ``module:function``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from nostalgia.analysis.run_folder import RunFolder
from nostalgia.errors import UsageError
from nostalgia.utils.own_code import is_own, load_own
from nostalgia.utils.tracebacks import last_frame


@dataclass(frozen=True)
class OwnFigure:
    """``function`` takes a run's folder and returns a figure; it raises ValueError where the run has nothing to draw."""

    word: str  # module:function
    function: Callable[[RunFolder], Any]
    option: str = "--figure "  # what named it, for errors

    @property
    def name(self) -> str:
        return self.word.partition(":")[2]

    @property
    def caption(self) -> str:
        """The first line of the function's docstring."""
        return next(iter((self.function.__doc__ or "").strip().splitlines()), "")

    def draw(self, run: RunFolder) -> Figure:
        """The figure of ``run``; raises UsageError where the function fails or returns something else."""
        try:
            figure = self.function(run)
        except ValueError:
            raise
        except Exception as error:
            raise UsageError(f"{self.option}{self.word}: drawing it failed at {last_frame(error)}") from error
        if not isinstance(figure, Figure):
            raise UsageError(f"{self.option}{self.word}: it returned {figure!r:.60}; allowed is a matplotlib Figure")
        return figure


def load_figures(words: Iterable[str], taken: Iterable[str], option: str = "--figure ") -> list[OwnFigure]:
    """The figures that ``words`` name; ``taken`` are the names of the built-in ones, ``option`` what named them.

    Raises UsageError for a word of another form, a name that is taken and what is no function, NotFoundError where there
    is no such module or function.
    """
    names, figures = set(taken), []
    for word in words:
        where = f"{option}{word}"
        if not is_own(word):
            raise UsageError(f"{where}: allowed is module:function of your own")
        figure = OwnFigure(word, load_own(word, where), option)
        if not callable(figure.function):
            raise UsageError(f"{where}: {figure.function!r:.60} is no function; it takes a RunFolder, returns a Figure")
        if figure.name in names:
            raise UsageError(f"{where}: there is a figure {figure.name} already; give the function another name")
        names.add(figure.name)
        figures.append(figure)
    return figures
