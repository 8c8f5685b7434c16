"""Gather the runs of a study in one file, print their table, draw their figures.

    python results/study.py results                     # what study.jsonl holds, without the runs
    python results/study.py runs/study --out results    # adds finished runs, in folders NAME-SEED
    python results/study.py results --less soft         # all runs of its setup, less `soft`
    python results/study.py results --less soft-lifted lift-mse lift-mse-beta5    # these two

study.jsonl has a line for each run: settings, seed, versions, commit, command, and by epoch the
losses and accuracies. Its first line holds the settings that all runs share.

Figures: dose.png (top-1 by beta), rates.png (top-1 by learning rate), head_start.png (gain over
`soft` by epoch, beside that of the published logs in published.json).
"""
import argparse
import json
import math
import sys
from collections import defaultdict
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from analyze import save
import train_kd
from models import read_config, write
from train_kd import UserError


# ---------- Records: the lines of study.jsonl


def read_lines(path, parse_float=float):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line, parse_float=parse_float) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} does not consist of JSON lines: {error}") from error


def read_study(path):
    """study.jsonl -> {(name, seed): record}, empty if there is no such file."""
    records = {}
    if path.exists():
        first, *others = read_lines(path) or [{}]
        if "common" not in first:
            raise UserError(f"{path} is no record of a study")
        for record in others:
            record["settings"] = {**first["common"], **record["settings"]}
            records[record["name"], record["seed"]] = record
    return records


def write_study(records, path):
    common = {}
    for key, value in records[0]["settings"].items():
        if all((key, value) in record["settings"].items() for record in records):
            common[key] = value
    text = json.dumps({"common": common}) + "\n"
    for record in records:
        own = {key: value for key, value in record["settings"].items() if key not in common}
        text += json.dumps({**record, "settings": own}) + "\n"
    write(path, text.encode())  # whole or not at all: the folders of the runs may be gone


def five_digits(text):
    return float(f"{float(text):.5g}")


def read_run(folder):
    """The folder NAME-SEED of a run -> its record; None if it has not finished."""
    config = read_config(folder)
    settings = config["settings"]
    log = read_lines(folder / "log.jsonl", five_digits)  # light enough to be kept by the hundred
    if len(log) != settings["epochs"]:
        return None
    del settings["out"]
    record = {
        "name": folder.name.rpartition("-")[0],
        "seed": settings.pop("seed"),
        "settings": settings,
        "terms": {},
    }
    for key in ("layers", "versions", "commit", "command"):
        record[key] = config.get(key)  # an older run may lack it
    for term in log[0]["terms"]:
        record["terms"][term] = [line["terms"].get(term) for line in log]
    for key in ("top1", "ema_top1"):
        record[key] = [line.get(key) for line in log]
    return record


def gather(source, out):
    """Add the runs in `source` to those of out/study.jsonl -> the records of all."""
    found = read_study(source / "study.jsonl")
    for log in source.glob("*-*/log.jsonl"):
        record = read_run(log.parent)
        if record:
            found[record["name"], record["seed"]] = record
    if not found:
        raise UserError(f"{source} has no finished runs, in folders NAME-SEED, and no study.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    kept = {**read_study(out / "study.jsonl"), **found}
    records = list(map(kept.get, sorted(kept)))
    write_study(records, out / "study.jsonl")
    return records


# ---------- Runs: what the table and the figures need of a record

# The usual setup; a record without the setting stands for the value here. A run's setup is told by
# how it differs.
USUAL = {
    "student": "deit_toy_patch8_32",
    "student_kwargs": {},
    "data": "shapes",
    "train_size": 4000,
    "label_noise": 0.2,
    "img_size": 32,
    "epochs": 30,
    "batch_size": 64,
    "alpha": 0.9,
    "tau": 1.0,
    "fade": 1.0,
    "teacher_maps": "trained",
}


def run_of(record):
    """A record with all that the runs are grouped by: run.name, run.seed, run.label..."""
    run = SimpleNamespace(**record)
    run.top1 = np.array(run.top1, dtype=float)  # by epoch; None, not evaluated, becomes NaN
    run.end = run.top1[-1]
    run.epochs = len(run.top1)
    settings = {key: value for key, value in run.settings.items() if value is not None}
    run.method = settings["method"]
    run.variant = settings.get("variant", "plain")
    run.rate = settings.get("lr", 0)
    compares_maps = run.layers and run.layers["student"]
    run.beta = settings.get("beta", 0) if compares_maps else 0
    run.label = label_of(run, settings)
    run.setup = ""
    for key, usual in USUAL.items():
        value = settings.get(key, usual)
        if value != usual:
            run.setup += f"{key} {value}\n"
    return run


def label_of(run, settings):
    """The method in words: "soft", "soft, lifted", "Last 1, MSE", "lift, MSE"."""
    words = [run.method]
    if run.method in ("spectral", "projector"):
        # These are known by the layers that they align.
        place = f"First {settings.get('first', 1)} Last {settings.get('last', 1)}"
        words = [place.replace("First 0 ", "").replace(" Last 0", "")]
    for term in run.terms:
        if term not in ("ce", "kd", *words):
            words.append("MSE" if term == "mse" else term)
    if run.method in ("none", "soft") and run.variant != "plain":
        words.append(run.variant)
    if settings.get("teacher_weights") == "random":
        words.append("untrained teacher")
    return ", ".join(words)


def group(runs, *fields):
    """{values of the fields: the runs that have them}, in the order of the values."""
    values_of = attrgetter(*fields)
    groups = defaultdict(list)
    for run in runs:
        groups[values_of(run)].append(run)
    return dict(sorted(groups.items()))


def main_group(runs):
    """The runs of the setup and learning rate that most runs have."""
    return max(group(runs, "setup", "rate").values(), key=len)


def gains_of(runs, others):
    """Top-1 less that of the other run with the same seed: [shared seeds, epochs]."""
    gains = []
    for run in runs:
        for other in others:
            if (run.seed, run.epochs) == (other.seed, other.epochs):
                gains.append(run.top1 - other.top1)
    return np.array(gains)


def around(gains, epoch):
    """Means over the nine epochs around one, or those of them that there are: [seeds]."""
    return np.nanmean(gains[:, max(epoch - 5, 0):epoch + 4], axis=1)


# ---------- The table


def deviation(values):
    return np.std(values, ddof=1) if len(values) > 1 else math.nan


def standard_error(values):
    return deviation(values) / math.sqrt(len(values))


def paired(gains):
    return f"{np.mean(gains):+.2f} +- {standard_error(gains):.2f} ({len(gains)})"


def unpaired(ends, others):
    difference = np.mean(ends) - np.mean(others)
    error = math.hypot(standard_error(ends), standard_error(others))
    return f"{difference:+.2f} +- {error:.2f} ({len(ends)}, {len(others)})"


def print_table(names, others):
    """A row a run. With others, also its difference to them, with standard error and numbers of
    seeds: unpaired; paired by seed, at the last epoch and over the last ten."""
    head = ["run", "n", "top-1 of each seed", "mean +- standard deviation"]
    if others:
        head += [f"less {others[0].name}, unpaired", "paired by seed", "paired, last ten epochs"]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for name, runs in names.items():
        ends = [run.end for run in runs]
        each = " ".join(map("{:.2f}".format, ends))
        row = [name, str(len(ends)), each, f"{np.mean(ends):.2f} +- {deviation(ends):.2f}"]
        if others:
            row.append(unpaired(ends, [other.end for other in others]))
        gains = gains_of(runs, others)
        if len(gains):
            row.append(paired(gains[:, -1]))
            row.append(paired(np.nanmean(gains[:, -10:], axis=1)))
        print(f"| {' | '.join(row)} |")


# ---------- Figures

COLOURS = {
    "none": "#8a8a8a",
    "soft": "black",
    "First 1": "#2a6fbb",
    "Last 1": "#c1440e",
    "First 1 Last 1": "#5e3c99",
    "lift": "#3d8b40",
    "widelast": "#b08d57",
}


def style(label):
    """A colour for each place or method, dashes for the spectral loss."""
    return {
        "color": COLOURS.get(label.split(",")[0], "#d98cb3"),
        "linestyle": "--" if "spectral" in label else "-",
        "marker": "o",
    }


def draw_panels(panels, xlabel, path, zero=None, **limits):
    """Mean and standard deviation of the seeds. panels: {title: {label: {x: runs}}}. On the log
    axis x 0 has its place at `zero`."""
    figure = Figure(figsize=(2 + 3.4 * len(panels), 4.8))
    row = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=bool(zero))[0]
    apart = 1.2  # the curves stand beside each other, or their bars would hide
    ticks = {}
    for axes, (title, curves) in zip(row, panels.items()):
        for i, (label, points) in enumerate(curves.items()):
            aside = apart ** ((i + 0.5) / len(curves) - 0.5)
            places, means, spreads = [], [], []
            for x, runs in points.items():
                place = x or zero
                ticks[place] = f"{x:g}"
                ends = [run.end for run in runs]
                places.append(place * aside)
                means.append(np.mean(ends))
                spreads.append(deviation(ends))
            axes.errorbar(places, means, spreads, label=label, **style(label))
        axes.set(xscale="log", xlabel=xlabel, title=title, **limits)
    axes.set_xticks(list(ticks), ticks.values())
    axes.xaxis.minorticks_off()
    row[0].set_ylabel("validation top-1 (%), mean +- std of seeds")
    save(figure, path, ncols=3)


def draw_dose(runs, path):
    """Top-1 by beta in the setup with most runs. A curve begins at beta 0 with its control, `soft`
    on the same student."""
    runs = main_group(runs)
    panels = defaultdict(dict)
    for label, own in group(runs, "label").items():
        control = [run for run in runs if run.method == "soft" and run.variant == own[0].variant]
        if len(group(own, "beta")) > 1:  # a curve needs two doses
            title = "maps pooled" if own[0].method == "spectral" else "maps not pooled"
            panels[title][label] = group(control + own, "beta")
    if panels:
        least = min(run.beta for run in runs if run.beta)
        draw_panels(panels, "beta, the weight of the feature loss", path, zero=least / 4)


def draw_rates(runs, path):
    """Top-1 by learning rate: a panel a setup, a curve a method with three rates."""
    panels = defaultdict(dict)
    for setup, own in group(runs, "setup").items():
        for (label, beta), curve in group(own, "label", "beta").items():
            rates = group(curve, "rate")
            if beta:
                label += f", beta {beta:g}"
            if len(rates) >= 3:
                panels[setup or "usual setup"][label] = rates
    if panels:
        # A training that breaks down lies below.
        draw_panels(panels, "learning rate", path, ylim=(84, 100))


# Gain over SoftKD by epoch in the authors' logs; the file says how it was computed.
PUBLISHED = json.loads((HERE / "published.json").read_text())


def draw_head_start(runs, path):
    """Gain over `soft` by epoch, published and ours: the longest runs, mean and range of seeds."""
    lengths = group(runs, "epochs")
    longest = max(lengths)
    curves = group(main_group(lengths[longest]), "label", "beta")
    soft = curves.pop(("soft", 0), [])
    figure = Figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_title("ImageNet, published logs")
    for label, gains in PUBLISHED["gains"].items():
        left.plot(PUBLISHED["epochs"], gains, label=label, **style(label))
    right.set_title(f"this study, {longest} epochs, all seeds")
    for (label, beta), own in curves.items():
        gains = gains_of(own, soft)
        if len(gains):
            epochs = range(min(5, longest), longest + 1)
            means = np.array([around(gains, epoch) for epoch in epochs])  # [epochs, seeds]
            look = style(label)
            look["marker"] = None
            right.plot(epochs, means.mean(1), label=f"{label}, beta {beta:g}", **look)
            right.fill_between(epochs, means.min(1), means.max(1), color=look["color"], alpha=0.2)
    for axes in (left, right):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="epoch")
        ticks = [5, 10, 30, 100, 300]
        axes.set_xticks(ticks, ticks)
    left.set_ylabel("top-1 less that of soft (points)")
    save(figure, path, ncols=3)


# ---------- The program


def study(source, out, less):
    runs = list(map(run_of, gather(source, out)))
    names = group(runs, "name")
    for name in less:
        if name not in names:
            raise UserError(f"no run is named {name}; there are {', '.join(names)}")
    if less:
        others = names[less[0]]
        setup = group(runs, "setup")[others[0].setup]
        shown = less[1:] or group(setup, "name")
        print_table({name: names[name] for name in shown}, others)
    else:
        print_table(names, [])
    draw_dose(runs, out / "dose.png")
    draw_rates(runs, out / "rates.png")
    draw_head_start(runs, out / "head_start.png")


def run_program(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = train_kd.fail
    parser.add_argument("source", type=Path, help="a folder of runs, or of a study.jsonl")
    parser.add_argument("--out", type=Path, help="for study.jsonl and figures (default: source)")
    parser.add_argument("--less", nargs="+", default=[], metavar="NAME",
                        help="the run to compare with, and which (default: all of its setup)")
    args = parser.parse_args(argv)
    study(args.source, args.out or args.source, args.less)


if __name__ == "__main__":
    train_kd.main(program=run_program)
