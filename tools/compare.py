"""Compare runs: a table of what differs and what came out, their curves in one picture, Markdown for a README.

python tools/compare.py checkpoints/sgd-* checkpoints/adam --picture curves.png --markdown runs.md
"""

import csv
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plots
from options import Parser
from utils import UserError, say, write_text

# Settings of where and how often, which change no figure; and those that have a column of their own.
PLACES = {"name", "checkpoint_dir", "data_dir", "download", "workers", "save_minutes", "log_interval", "max_params"}
OWN_COLUMN = {"seed", "epochs"}
FOUND_OUT = {"device", "precision", "compile", "processes"}  # results.json has what "auto" came to
FIGURES = {"last (%)": ("last_accuracy", ".2f"), "best (%)": ("best_accuracy", ".2f"),
           "test (%)": ("test_accuracy", ".2f"), "minutes": ("minutes", ".1f"),
           "images/s": ("images_per_second", ".0f")}


class Run(NamedTuple):
    """What a run folder says; `results` of an unfinished run is what can be known of it."""

    path: Path
    settings: dict[str, Any]
    history: list[dict[str, float | None]]
    results: dict[str, Any]
    finished: bool


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: It is none, or a file of it is damaged.
    """
    try:
        file = path / "args.json"
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
        file = path / "metrics.csv"
        reader = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
        history = [{name: float(cell) if cell else None for name, cell in row.items()} for row in reader]
        results = results_so_far(history)
        file = path / "results.json"
        if finished := file.exists():
            results = dict(json.loads(file.read_text(encoding="utf-8")))
            results.update({name: float(results[name]) for name, _ in FIGURES.values() if name != "minutes"},
                           epochs=int(results["epochs"]), minutes=float(results["seconds"]) / 60)
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{file} cannot be read ({reason}); is {path} the folder of a run?") from error
    settings["device"] = None  # of no use as "auto" or "cuda": results.json names the hardware
    settings.update({name: results[name] for name in FOUND_OUT & results.keys()})
    return Run(path, settings, history, results, finished)


def results_so_far(history: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    """Make of metrics.csv what results.json would say, None for what cannot be known."""
    split = "val" if history and history[0]["val_accuracy"] is not None else "test"
    accuracies = [row[f"{split}_accuracy"] for row in history]
    speeds = [row["images_per_second"] for row in history]
    return {"last_accuracy": accuracies[-1] if history else None, "best_accuracy": max(accuracies, default=None),
            "test_accuracy": None, "picked_by": {"val": "validation", "test": "test"}[split], "epochs": len(history),
            "minutes": sum(row["seconds"] for row in history) / 60,
            "images_per_second": statistics.harmonic_mean(speeds) if history else None}


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Put finished runs together that differ only by seed; a second run of the same seed is no further sample."""
    groups: dict[tuple[str, int], list[Run]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in PLACES | {"seed"}}
        same = json.dumps([settings, None if run.finished else str(run.path)], sort_keys=True)
        repeat = (same, run.settings.get("seed"))
        groups.setdefault((same, seen[repeat]), []).append(run)
        seen[repeat] += 1
    return list(groups.values())


def find_differences(runs: Sequence[Run]) -> list[str]:
    """Name the settings that are not the same in all runs, in the order of args.json."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in PLACES | OWN_COLUMN)
    values = {name: {json.dumps(run.settings.get(name)) for run in runs} for name in names}
    unknown = {"null", '"auto"'}  # what an unfinished run says of itself
    return [name for name in names if len(values[name] - (unknown if name in FOUND_OUT else set())) > 1]


def name_group(group: Sequence[Run]) -> str:
    """Return the name of a run, or what the names of several have in common, as a pattern."""
    names = [run.path.resolve().name for run in group]
    shared = os.path.commonprefix(names)
    return f"{shared}*" if shared and len(names) > 1 else ", ".join(names)


def show(value: Any) -> str:
    """Write a setting as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


def show_mean(values: Sequence[float | None], form: str) -> str:
    """Write a value, or the mean of several and their sample standard deviation."""
    if None in values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def build_table(runs: Sequence[Run]) -> list[list[str]]:
    """Return the head and a row per group of runs; columns that say nothing are left out."""
    names, rows = find_differences(runs), []
    for group in group_runs(runs):
        settings, results, finished = group[0].settings, group[0].results, group[0].finished
        epochs = show(results["epochs"]) + ("" if finished else f" of {show(settings.get('epochs'))}, unfinished")
        figures = {title: show_mean([run.results[name] for run in group], form)
                   for title, (name, form) in FIGURES.items()}
        rows.append({"run": name_group(group)} | {name.replace("_", "-"): show(settings.get(name)) for name in names}
                    | {"seed": show([run.settings.get("seed") for run in group]), "n": str(len(group)),
                       "epochs": epochs, "picked by": show(results.get("picked_by"))} | figures)
    unused = {"test (%)"} if all(row["picked by"] == "test" for row in rows) else set()  # it is the last once more
    if len(rows) == len(runs):
        unused |= {"n"} if len({row["seed"] for row in rows}) > 1 else {"n", "seed"}
    titles = [name for name in rows[0] if name not in unused]
    return [titles, *([row[name] for name in titles] for row in rows)]


def build_notes(runs: Sequence[Run]) -> list[str]:
    """Say in sentences what a reader of the table must know."""
    notes = []
    if len(group_runs(runs)) < len(runs):
        notes.append("Runs that differ only by seed: mean ± sample standard deviation over n of them.")
    if any(run.results.get("picked_by") == "test" for run in runs):
        notes.append("Where the test images picked the best epoch, it flatters: compare the last.")
    setups = {f"{run.results.get('device')}, {run.results.get('precision')}, "
              f"torch {run.results.get('versions', {}).get('torch')}" for run in runs if run.finished}
    return notes + ([f"Measured on: {'; '.join(sorted(setups))}."] if setups else [])


def format_text(table: Sequence[Sequence[str]]) -> str:
    """Lay the table out for the terminal."""
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)


def format_markdown(table: Sequence[Sequence[str]], notes: Sequence[str], picture: str | None) -> str:
    """Write table and notes as Markdown, and the picture if there is one."""
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines), *notes]
    return "\n\n".join([*parts, f"![Curves of the runs]({picture})"] if picture else parts) + "\n"


def draw_runs(runs: Sequence[Run], path: Path):
    """Draw accuracy above loss, training beside test or validation; runs that differ only by seed share a colour."""
    figure = plots.new_figure(10, 7)
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for index, group in enumerate(group_runs(runs)):
        style = {"color": plots.PALETTE[index % 7], "linestyle": ("-", "--", ":")[index // 7 % 3]}
        for run in group:
            epochs = plots.column(run.history, "epoch")
            label = name_group(group) if run is group[0] else None
            held_out = "val" if run.results["picked_by"] == "validation" else "test"
            for row, column, name in ((0, 0, "train_accuracy"), (0, 1, f"{held_out}_accuracy"),
                                      (1, 0, "train_loss"), (1, 1, f"{held_out}_loss")):
                plots.draw_line(grid[row, column], epochs, plots.column(run.history, name), label=label, **style)
    titles = "training", " or ".join(sorted({run.results["picked_by"] for run in runs}))
    for (top, bottom), title, is_left in zip(grid.T, titles, (True, False), strict=True):
        plots.style_curves(top, "accuracy (%)" if is_left else "")
        plots.style_curves(bottom, "cross-entropy loss (nats)" if is_left else "", log=True)
        top.set_title(title, color=plots.INK)
        bottom.set_xlabel("epoch", color=plots.INK)
    figure.align_ylabels()
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  labelcolor=plots.INK)
    return plots.save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, print the table, write what is asked for; a mistake is one line and status 2."""
    parser = Parser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the curves of all runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table, and a link to the picture")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(path) for path in {path.resolve(): path for path in args.runs}.values()]  # each folder once
        table, notes, picture = build_table(runs), build_notes(runs), None
        say("\n".join([format_text(table), "", *notes]))
        if args.picture:
            draw_runs(runs, args.picture)
            picture = Path(os.path.relpath(args.picture, args.markdown.parent)).as_posix() if args.markdown else None
        if args.markdown:
            write_text(args.markdown, format_markdown(table, notes, picture))
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
