"""What a terminal shows while problems are tuned."""

from __future__ import annotations

import io
import threading
from pathlib import Path

from autotune_fakes import Aten, Fine, PlaybackLab, Scale, ScaleProblem, Wrong, table_of
from rich.console import Console

from tritonconv.autotune.cli.progress import LiveProgress, PlainProgress, progress_on
from tritonconv.autotune.search import Outcome
from tritonconv.autotune.space import Candidate
from tritonconv.autotune.tune import Options, tune


def terminal(width: int = 140) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, no_color=True)


class Filmed(LiveProgress):
    """Keeps what the table looked like after every candidate."""

    def __init__(self) -> None:
        super().__init__(terminal(), 0)
        self.frames: list[str] = []

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        super().candidate(candidate, outcome)
        self.frames.append(self.picture())

    def picture(self) -> str:
        console = terminal()
        console.print(self.render())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def test_the_table_says_what_is_best_so_far_and_what_failed(cache: Path) -> None:
    times = {("wrong", i): 1.0 + i for i in range(3)} | {("fine", 3): 8.0}
    with Filmed() as film:
        tune(
            Scale(Fine(), Wrong(), Aten()),
            [ScaleProblem(1000), ScaleProblem(2000)],
            lab=PlaybackLab(table_of(times)),
            progress=film,
        )
    assert "searching" in film.frames[0] and "1/" in film.frames[0]
    assert "tuned" in film.frames[-1], "the first problem is still shown beside the second"
    last = film.picture()
    assert last.count("fine") == 2 and "wrong" not in last, "what was found wrong is no winner"
    assert "8.0" in last and "2/2" in last and "left" in last


def test_an_earlier_result_has_its_row_too(cache: Path) -> None:
    operator, lab = Scale(Fine(), Aten()), PlaybackLab(table_of({("fine", 2): 5.0}))
    tune(operator, [ScaleProblem(1000)], lab=lab)
    with Filmed() as film:
        tune(operator, [ScaleProblem(1000)], lab=lab, progress=film)
    assert "kept" in film.picture() and "5.0" in film.picture()


def test_a_long_run_shows_the_latest_and_all_that_run(cache: Path) -> None:
    film = Filmed()
    film.begin(40)
    for index in range(25):
        film.problem(index, ScaleProblem(index + 1), 4)
        film._running.clear()  # as if it had ended
    started = threading.Barrier(3)

    def work(size: int) -> None:
        film.problem(size, ScaleProblem(size), 4)
        started.wait()  # threads that live at the same time have different names

    threads = [threading.Thread(target=work, args=(1000 + i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    picture = film.picture()
    assert all(str(ScaleProblem(1000 + i)) in picture for i in range(3))
    assert str(ScaleProblem(25)) in picture and str(ScaleProblem(5)) not in picture
    assert picture.count("searching") <= LiveProgress.SHOWN


def test_no_terminal_no_table(cache: Path) -> None:
    plain = progress_on(Console(file=io.StringIO(), width=300), 0)
    assert type(plain) is PlainProgress
    with plain:
        tune(
            Scale(Fine(), Aten()),
            [ScaleProblem(1000)],
            lab=PlaybackLab(table_of({("fine", 2): 5.0})),
            options=Options(),
            progress=plain,
        )
    assert isinstance(plain.console.file, io.StringIO)
    assert plain.console.file.getvalue().startswith("[1/1]")
