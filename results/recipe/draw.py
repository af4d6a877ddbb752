"""Draw ideas.png and print the table of docs/recipe.md, from runs.jsonl."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import plots

# Each idea, its runs, and the runs that it is compared with; seed 0 and, where there is a second one, seed 1.
IDEAS = {
    "Muon instead of SGD": ("muon.05", "sgd"),
    "images of 24 pixels for half of the steps": ("small24", "muon.05"),
}
KEPT = {"Muon instead of SGD", "images of 24 pixels for half of the steps"}


def main() -> None:
    """Run the program."""
    runs = {run["name"]: run for run in map(json.loads, (HERE / "runs.jsonl").read_text().splitlines())}
    rows = []
    for idea, (name, base) in IDEAS.items():
        run = runs[name]
        rows.append((idea, run["accuracy"] - runs[base]["accuracy"]))
        print(f"| {idea} | {run['accuracy']:.2f}% | {rows[-1][1]:+.2f} | {'yes' if idea in KEPT else 'no'} |")
    figure = plots.new_figure(9, 0.9 + 0.32 * len(rows))
    axes = figure.subplots()
    for place, (idea, gain) in enumerate(rows):
        axes.barh(place, gain, color=plots.PALETTE[0] if idea in KEPT else "#b6bcc4", height=0.65)
        axes.annotate(f"{gain:+.1f}", (gain, place), (4 if gain >= 0 else -4, 0), textcoords="offset points",
                      va="center", ha="left" if gain >= 0 else "right", color=plots.INK, fontsize=9)
    axes.set_yticks(range(len(rows)), [idea for idea, _ in rows], color=plots.INK)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(0, color=plots.MUTED, linewidth=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=plots.MUTED)
    axes.grid(axis="x", color=plots.GRID)
    axes.set_axisbelow(True)
    axes.set_title("Difference in held-out accuracy, in points, at equal compute (blue: kept)", loc="left",
                   color=plots.INK, fontsize=11)
    plots.save(figure, HERE / "ideas.png")


if __name__ == "__main__":
    main()
