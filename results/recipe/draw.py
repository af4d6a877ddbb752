"""Draw ideas.png and print the differences of docs/recipe.md, from runs.jsonl."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import plots

# Each idea, its run, and the run that it is compared with.
IDEAS = {
    "Muon (lr 0.05) instead of SGD": ("muon.05", "sgd"),
    "SGD with lr 0.05": ("sgd.05", "sgd"),
    "SGD with lr 0.2": ("sgd.2", "sgd"),
    "Muon with lr 0.1": ("muon.1", "muon.05"),
    "images of 24 pixels for half of the steps": ("small24", "muon.05"),
    "images of 16 pixels instead": ("small16", "small24"),
    "first convolution starts as whitening": ("whiten", "small24"),
    "lr of batch norm's biases x 8": ("biaslr8", "small24"),
    "x 64 instead": ("biaslr64", "biaslr8"),
    "Muon with momentum 0.8 instead of 0.95": ("mom.8", "biaslr8"),
    "linear instead of cosine decay": ("linear", "biaslr8"),
    "images of 16 pixels, again": ("small16b", "biaslr8"),
    "Muon with lr 0.03": ("muon.03", "biaslr8"),
    "lr of the rest 0.2": ("lr.2", "biaslr8"),
    "Lookahead, batch norm with momentum 0.4": ("lookahead", "biaslr8"),
    "no weight decay of biases and batch norm": ("nodecay", "biaslr8"),
    "alternating flip": ("altflip", "biaslr8"),
    "alternating flip, three times the computation": ("long.altflip", "long"),
    "scale of each block's last batch norm from 0": ("zeroinit", "biaslr8"),
    "label smoothing 0.2 instead of 0.1": ("ls.2", "biaslr8"),
    "batch 256, Muon with lr 0.07": ("batch256", "biaslr8"),
    "batch 512, Muon with lr 0.1": ("batch512", "biaslr8"),
    "weight decay, not constant length, with Muon": ("decay", "biaslr8"),
    "cutout of 8 pixels": ("cutout8", "biaslr8"),
    "the harder half of each batch": ("hard", "biaslr8"),
    "nothing but another seed": ("biaslr8.s1", "biaslr8"),
}
KEPT = {"Muon (lr 0.05) instead of SGD", "images of 24 pixels for half of the steps", "lr of batch norm's biases x 8",
        "Muon with momentum 0.8 instead of 0.95"}


def differences(runs: dict[str, dict], name: str, base: str) -> list[float]:
    """Return the difference in accuracy for each seed that both have; a name without a suffix is seed 0."""
    pairs = [(name + seed, base + seed) for seed in ("", ".s1", ".s2")]
    return [runs[a]["accuracy"] - runs[b]["accuracy"] for a, b in pairs if a in runs and b in runs]


def main() -> None:
    """Run the program."""
    runs = {run["name"]: run for run in map(json.loads, (HERE / "runs.jsonl").read_text().splitlines())}
    figure = plots.new_figure(9, 0.9 + 0.32 * len(IDEAS))
    axes = figure.subplots()
    for place, (idea, (name, base)) in enumerate(IDEAS.items()):
        found = differences(runs, name, base)
        gain = sum(found) / len(found)
        print(f"| {idea} | {', '.join(f'{each:+.1f}' for each in found)} | {gain:+.1f} |")
        axes.barh(place, gain, color=plots.PALETTE[0] if idea in KEPT else "#b6bcc4", height=0.65)
        if len(found) > 1:
            axes.plot(found, [place] * len(found), ".", color=plots.INK, markersize=5)
        end = max(found) if gain >= 0 else min(found)
        axes.annotate(f"{gain:+.1f}", (end, place), (5 if gain >= 0 else -5, 0), textcoords="offset points",
                      va="center", ha="left" if gain >= 0 else "right", color=plots.INK, fontsize=9)
    axes.set_yticks(range(len(IDEAS)), IDEAS, color=plots.INK)
    axes.invert_yaxis()
    axes.margins(0.12, 0.02)
    axes.axvline(0, color=plots.MUTED, linewidth=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=plots.MUTED)
    axes.grid(axis="x", color=plots.GRID)
    axes.set_axisbelow(True)
    axes.set_title("Difference in held-out accuracy, in points, at equal compute\n"
                   "(blue: kept; number: mean of the seeds; dots: each seed, if several)",
                   loc="left", color=plots.INK, fontsize=11)
    plots.save(figure, HERE / "ideas.png")


if __name__ == "__main__":
    main()
