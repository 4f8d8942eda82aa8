"""The study of divergences: computes, prints its tables, draws its figures.

    python examples/kl_study/run.py            # tables, and figures in runs/kl_study
    python examples/kl_study/run.py --check    # also fails unless every number is as expected

About half a minute on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bimodal import REVERSE_STARTS
from figures import draw
from results import Check, Study, checks, measure
from rich.console import Console
from rich.table import Table
from topk_bias import STEPS

ROOT: Final = Path(__file__).resolve().parents[2]
console = Console(highlight=False)


def table(title: str, *columns: str) -> Table:
    """An empty table, the first column on the left."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=True)
    return made


def gaussian_tables(study: Study) -> Iterator[Table]:
    """One Gaussian for two modes."""
    starts = [f"reverse, from {start:g}" for start in REVERSE_STARTS]
    for result in study.gaussians:
        made = table(f"One Gaussian for {result.teacher}", "minimised", "mean", "std", "forward KL", "reverse KL")
        fits = [result.forward, *result.reverse, result.resting]
        for name, fit in zip(["forward", *starts, "reverse, by gradient"], fits, strict=True):
            numbers = (round(fit.mu, 3) + 0.0, fit.sigma, fit.forward, fit.reverse)  # + 0.0: no -0.000
            made.add_row(name, *(f"{value:.3f}" for value in numbers))
        yield made


def letter_table(study: Study) -> Table:
    """Texts that a student writes letter by letter."""
    columns = ("w", "T", "valid, forward", "valid, reverse", "reverse KL at A", "at B")
    made = table("Letter by letter: AA..A with probability w, else BB..B", *columns)
    for (weight, length), found in study.letters.items():
        if length in (1, 2, 4, 8):
            numbers = (found.valid_forward, found.valid_reverse, found.reverse_a, found.reverse_b)
            made.add_row(f"{weight:g}", str(length), *(f"{abs(value):.4f}" for value in numbers))
    return made


def topk_tables(study: Study) -> Iterator[Table]:
    """What top-k forms train towards; the columns are explained in the README."""
    columns = ("form", "at p = q", "cosine", "norm", "mass", "KL", "kept mass")
    for direction, is_reverse in (("reverse", True), ("forward", False)):
        made = table(f"Top-k forms of the {direction} KL after {STEPS:,} steps", *columns)
        for course in (course for course in study.courses if course.form.is_reverse == is_reverse):
            end = course.from_student
            numbers = (course.norm_at_teacher, course.cosine, course.norm_ratio, end.masses[-1], abs(end.kls[-1]))
            made.add_row(course.form.name, *(f"{value:.3f}" for value in (*numbers, course.from_teacher.masses[-1])))
        yield made


def sampled_table(study: Study) -> Table:
    """What one sampled token says."""
    made = table("One sampled token, the example of the top-k study", "", "value")
    made.add_row("variance of its gradient", f"{study.noise[0]:.3f}")
    made.add_row("the same with the exact baseline", f"{study.noise[1]:.3f}")
    made.add_row("KL of equal models at temperatures 0.7 and 1, nats", f"{study.spurious_kl:.3f}")
    return made


def jsd_table(study: Study) -> Table:
    """The scale of JSD."""
    made = table("JSD of the same pair of models, nats", "beta", "as defined", "beta_rescale: true")
    for beta, (raw, rescaled) in study.jsd.items():
        made.add_row(f"{beta:g}", f"{raw:.5f}", f"{rescaled:.4f}")
    return made


def wrong(found: list[Check]) -> list[str]:
    """What is not as expected."""
    return [f"{c.name}: {c.found:.5f}, not {c.expected:.5f} +- {c.tolerance:g}" for c in found if not c.is_right]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    out_help = "folder of the figures (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kl_study", help=out_help)
    parser.add_argument("--check", action="store_true", help="fail unless every number is as expected")
    options = parser.parse_args()
    started = time.monotonic()
    with console.status("starting") as status:

        def tell(text: str) -> None:
            status.update(text)
            console.print(f"[dim]{time.monotonic() - started:5.1f} s  {text}[/]")

        study = measure(tell)
    console.print(*gaussian_tables(study), letter_table(study))
    console.print(*topk_tables(study), sampled_table(study), jsd_table(study))
    for path in draw(study, options.out):
        console.print(f"figure: {path}")
    found = checks(study)
    complaints = wrong(found)
    console.print(f"{len(found) - len(complaints)} of {len(found)} numbers as expected")
    for complaint in complaints:
        console.print(complaint)
    if options.check and complaints:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
