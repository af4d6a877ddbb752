"""Compare runs: a table of the settings that differ and the results, and a picture of the curves.

python tools/compare.py checkpoints/sgd-* checkpoints/adam --picture curves.png --markdown runs.md
"""

import csv
import glob
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plots
from options import FREE_ON_RESUME, Parser, build_parser, typed
from process import program, set_up_process
from utils import UserError, check_output, print_line, warn, write_text

HARDWARE = {"device", "precision", "compile", "ranks"}  # read from results.json: args.json may hold "auto"
RESULTS = {"last (%)": ("last_accuracy", ".2f"), "best (%)": ("best_accuracy", ".2f"),
           "test (%)": ("test_accuracy", ".2f"), "minutes": ("minutes", ".1f"),
           "images/s": ("images_per_second", ".0f")}


class Run(NamedTuple):
    """The contents of a run folder; an unfinished run has only the results known so far."""

    path: Path
    settings: dict[str, Any]
    history: list[dict[str, float | None]]
    results: dict[str, Any]


def read_run(path: Path) -> Run:
    """Read a run folder."""
    try:
        file = path / "args.json"
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
        split, selected_on = ("val", "validation") if settings["val_size"] else ("test", "test")
        file = path / "metrics.csv"
        rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
        history = [{name: float(cell) if cell else None for name, cell in row.items()} for row in rows]
        accuracies = [row[f"{split}_accuracy"] for row in history] or [None]
        results = {"last_accuracy": accuracies[-1], "best_accuracy": max(accuracies), "selected_on": selected_on}
        if (file := path / "results.json").exists():
            results |= json.loads(file.read_text(encoding="utf-8"))
            results["minutes"] = results["seconds"] / 60
            results |= {name: float(results[name]) for name, _ in RESULTS.values()}
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or repr(error)}; expected a run folder") from error
    settings = build_parser().defaults | settings  # a flag may be newer than the run
    settings = {name: value for name, value in settings.items() if name not in FREE_ON_RESUME}  # has no effect
    settings |= {name: results[name] for name in sorted(HARDWARE & results.keys())}
    return Run(path, settings, history, results)


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs of the same length that differ only by seed, sorted by mean last accuracy, best first."""
    groups, seen = {}, []
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name != "seed"}
        key = json.dumps([settings, len(run.history)], sort_keys=True), run.settings.get("seed")
        groups.setdefault((key[0], seen.count(key)), []).append(run)  # a repeated seed is not another sample
        seen.append(key)
    return sorted(groups.values(), reverse=True,
                  key=lambda group: statistics.fmean(run.results["last_accuracy"] or 0 for run in group))


def name_group(group: Sequence[Run]) -> str:
    """Return the name of a run, or a pattern for the names of several."""
    names = [run.path.resolve().name for run in group]
    return f"{prefix}*" if len(names) > 1 and (prefix := os.path.commonprefix(names)) else ", ".join(names)


def show_mean(values: Sequence[float | None], form: str) -> str:
    """Format a value, or the mean and sample standard deviation of several."""
    if None in values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def build_table(groups: Sequence[Sequence[Run]]) -> list[list[str]]:
    """Return a header and a row per group of runs: the settings that differ and the results."""
    settings, rows = [run.settings for group in groups for run in group], []
    names = [name for name in dict.fromkeys(name for known in settings for name in known if name != "epochs")
             if len({json.dumps(known[name]) for known in settings if name in known}) > 1]
    for group in groups:
        varied = {name: dict.fromkeys(typed("-" if (value := run.settings.get(name)) is None else value)
                                      for run in group) for name in names}
        rows.append({"run": name_group(group)}
                    | {name.replace("_", "-"): " ".join(values) for name, values in varied.items()}
                    | {"epochs": f"{len(group[0].history)}/{group[0].settings['epochs']}",
                       "selected on": group[0].results["selected_on"]}
                    | {title: show_mean([run.results.get(name) for run in group], form)
                       for title, (name, form) in RESULTS.items()})
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def build_notes(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return sentences that explain the table."""
    notes, runs = [], [run for group in groups for run in group]
    if len(groups) < len(runs):
        notes.append("Runs that differ only by seed share a row: mean ± sample standard deviation.")
    if any(run.results["selected_on"] == "test" for run in runs):
        notes.append("Where the best epoch was selected on the test set, its accuracy is optimistic; compare the last.")
    setups = {f"{run.results.get('device')}, {run.results.get('precision')}, "
              f"torch {run.results.get('versions', {}).get('torch')}" for run in runs if "device" in run.results}
    return notes + ([f"Measured on: {'; '.join(sorted(setups))}."] if setups else [])


def format_table(table: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown that also lines up on a terminal."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(4, *map(len, cells)) for cells in zip(*rows, strict=True)]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def draw_runs(groups: Sequence[Sequence[Run]], path: Path):
    """Draw accuracy and loss, training beside test or validation; runs that differ only by seed share a color."""
    figure = plots.new_figure(10, 6.4)
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for index, group in enumerate(groups):
        style = {"color": plots.PALETTE[index % 7], "linestyle": ("-", "--", ":")[index // 7 % 3]}
        for run in group:
            split = "val" if run.results["selected_on"] == "validation" else "test"
            # matplotlib leaves a name that begins with "_" out of the legend, and reads "$" as math
            label = name_group(group).lstrip("_").replace("$", r"\$") if run is group[0] else None
            for (left, right), metric in zip(grid, ("accuracy", "loss"), strict=True):
                plots.draw_line(left, run.history, f"train_{metric}", **style)
                plots.draw_line(right, run.history, f"{split}_{metric}", label=label, **style)
    splits = " or ".join(sorted({run.results["selected_on"] for group in groups for run in group}))
    for row, metric in zip(grid, ("accuracy (%)", "loss"), strict=True):
        for axes, split in zip(row, ("Training", splits.capitalize()), strict=True):
            plots.style_curves(axes, f"{split} {metric}", loss=metric == "loss")
            axes.set_xlabel("epoch" if metric == "loss" else "", color=plots.MUTED)
    figure.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside right upper", frameon=False,
                  labelcolor="linecolor")
    return plots.save(figure, path)


@program("compare.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the files that a command line asks for."""
    parser = Parser("compare.py", "RUN... [flags]", "Compare runs: settings, results and curves.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; others are skipped")
    flag = parser.group("output")
    flag("--picture", None, "draw the curves of all runs", type=Path, metavar="FILE.png")
    flag("--markdown", None, "write the table, and a link to the picture", type=Path, metavar="FILE")
    args, _ = parser.parse(argv)
    runs, errors = [], []
    # cmd and PowerShell leave patterns to the programs; a shell's names may hold brackets
    paths = [Path(path) for run in args.runs for path in sorted(glob.glob(run)) * (not os.path.exists(run)) or [run]]
    for path in {path.resolve(): path for path in paths}.values():
        try:
            runs.append(read_run(path))
        except UserError as error:
            errors.append(str(error))
    if not runs:
        raise UserError("; ".join(errors))
    for error in errors:
        warn(f"skipped {error}")
    groups = group_runs(runs)
    for path in filter(None, (args.picture, args.markdown)):
        check_output(path)
    parts = [format_table(build_table(groups)), *build_notes(groups)]
    print_line("\n\n".join(parts))
    if args.picture:
        draw_runs(groups, args.picture)
        link = Path(os.path.relpath(args.picture, (args.markdown or args.picture).parent)).as_posix()
        parts.append(f"![Curves of the runs]({link})")
    if args.markdown:
        write_text(args.markdown, "\n\n".join(parts) + "\n")
    return 0


if __name__ == "__main__":
    set_up_process()
    sys.exit(main())
