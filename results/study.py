"""Gather the runs of a study in one file, print its table, draw its figures.

    python results/study.py results                       # of what study.jsonl holds, without any folder of a run
    python results/study.py runs/study --out results      # adds finished runs, in folders NAME-SEED

study.jsonl has one line per run: settings, seed, versions, commit, command, and by epoch the losses and accuracies. Its
first line holds the settings that all runs share. Figures: dose.png, head_start.png.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analyze import save
from models import read_config

# ---------- Records


def read_study(path):
    """study.jsonl -> {(name, seed): run}."""
    try:
        common, *runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for run in runs:
            run["settings"] = {**common["common"], **run["settings"]}
        return {(run["name"], run["seed"]): run for run in runs}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a study: {error}") from error


def write_study(runs, path):
    common = {key: value for key, value in runs[0]["settings"].items()
              if all(key in run["settings"] and run["settings"][key] == value for run in runs)}
    own = [{**run, "settings": {k: v for k, v in run["settings"].items() if k not in common}} for run in runs]
    part = path.with_suffix(".part")  # whole or not at all: the runs' folders may be gone
    part.write_text("".join(f"{json.dumps(line)}\n" for line in ({"common": common}, *own)), encoding="utf-8")
    part.replace(path)


def read_runs(folder):
    """The finished runs in folders NAME-SEED -> {(name, seed): run}, light enough to be kept by the hundred."""
    def brief(value):
        return value and float(f"{value:.5g}")

    runs = {}
    for path in sorted(folder.glob("*-*/log.jsonl")):
        config = read_config(path.parent)
        settings = config["settings"]
        log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if len(log) != settings["epochs"]:
            continue
        name = path.parent.name.rpartition("-")[0]
        runs[name, settings["seed"]] = {
            "name": name, "seed": settings["seed"],
            "settings": {key: value for key, value in settings.items() if key not in ("seed", "out")},
            "student_parameters": config.get("parameters", {}).get("student"),
            **{key: config.get(key) for key in ("layers", "versions", "commit", "command")},
            "seconds": brief(float(np.median([line["seconds"] for line in log]))),  # of an epoch
            "terms": {term: [brief(line["terms"].get(term)) for line in log] for term in log[0]["terms"]},
            **{key: [brief(line.get(key)) for line in log] for key in ("top1", "ema_top1")}}
    return runs


# ---------- What a run compares, and in which setup

SETUP = ("student", "student_kwargs", "teacher", "teacher_weights", "data", "train_size", "label_noise", "img_size",
         "epochs", "batch_size", "lr", "alpha", "tau")


def setup_of(run):
    return tuple(json.dumps(run["settings"].get(key) or 0) for key in SETUP)


def label_of(run):
    """What a run of beta > 0 compares: "Last 1, MSE"; None if nothing."""
    settings, layers = run["settings"], (run["layers"] or {}).get("student", [])
    terms = [term for term in run["terms"] if term not in ("ce", "kd")]
    if not layers or not terms:
        return None
    first = sum(layer == place for place, layer in enumerate(layers))
    where = " ".join(f"{word} {count}" for word, count in (("First", first), ("Last", len(layers) - first)) if count)
    method = settings["method"]
    words = [where if method == "spectral" else method, *([where] if method == "projector" else [])]
    words += ["MSE" if term == "mse" else term for term in terms if term != "projector"]
    own = {"lift": "lifted", "widelast": "widened"}.get(method, "plain")
    words += [settings["variant"]] * (settings["variant"] != own) + ["fading"] * (settings.get("fade", 1) < 1)
    words += ["untrained maps"] * (settings.get("teacher_maps") == "random")
    return ", ".join(words + ["norm none"] * (settings.get("norm") == "none"))


COLOURS = {"soft": "black", "First 1": "#2a6fbb", "Last 1": "#c1440e", "First 1 Last 1": "#5e3c99", "lift": "#3d8b40",
           "widelast": "#b08d57", "projector": "#7a7a7a"}


def style(label):
    """A colour for each place or method, a dash for each loss."""
    dash = ":" if "fading" in label else "--" if "spectral" in label else "-"
    return dict(color=COLOURS.get(label.split(",")[0], "#d98cb3"), linestyle=dash, marker="s" if dash == "--" else "o")


# ---------- Table and figures


def moments(values):
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else math.nan


def by_setup(runs):
    """{setup: {(label, student variant): {beta: [top-1 of a seed]}}}, most runs first; label None is `soft`, beta 0."""
    setups, sizes = {}, {}
    for run in runs:
        label, settings, setup = label_of(run), run["settings"], setup_of(run)
        if label or settings["method"] == "soft":
            curve = setups.setdefault(setup, {}).setdefault((label, settings["variant"]), {})
            curve.setdefault(settings["beta"] if label else 0, []).append(run["top1"][-1])
            sizes[setup] = sizes.get(setup, 0) + 1
    return {setup: setups[setup] for setup in sorted(setups, key=sizes.get, reverse=True)}


def draw_dose(curves, path):
    """Top-1 against beta in one setup: on the left what compares pooled maps, on the right what learns to compare. A
    line starts at beta 0 with its control, `soft` on the same student."""
    shown = {}
    for label, variant in sorted(key for key in curves if key[0]):
        doses = {**curves.get((None, variant), {}), **dict(sorted(curves[label, variant].items()))}
        if len(doses.keys() - {0}) > 1:  # a curve needs two doses
            shown[label] = doses
    panels = [{label: shown[label] for label in shown if label.startswith(("First", "Last")) == pooled}
              for pooled in (True, False)]
    panels = [panel for panel in panels if panel]
    if not panels:
        return
    betas = sorted({beta for doses in shown.values() for beta in doses} - {0})
    place = {0: betas[0] / 4, **{beta: beta for beta in betas}}  # a log axis has no 0
    figure = Figure(figsize=(max(4.4 * len(panels), 6.4), 4.8))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels):
        for i, (label, doses) in enumerate(panel.items()):
            beside = 1.4 ** ((i + 0.5) / len(panel) - 0.5)
            means, spreads = zip(*map(moments, doses.values()))
            axes.errorbar([place[beta] * beside for beta in doses], means, spreads, label=label, **style(label))
        axes.set(xscale="log", xlabel="beta, the weight of the feature loss")
        axes.set_xticks([*place.values()], [f"{beta:g}" for beta in place], fontsize=8)
        axes.xaxis.minorticks_off()
    figure.axes[0].set_ylabel("validation top-1 (%), mean +- std of seeds")
    save(figure, path, ncols=3)


# Gain over SoftKD (76.9 % at the end) on ImageNet, DeiT-Tiny from CaiT-S24: computed from the authors' released logs
# (one run each), means over the nine epochs around the one named; the last is the mean of the last ten of 300.
PUBLISHED_EPOCHS = (5, 10, 20, 30, 45, 60, 90, 120, 150, 200, 250, 280, 296)
PUBLISHED = {
    "First 1, spectral": (1.49, 3.19, 3.01, 2.59, 1.67, .73, .13, 0, -.10, -.09, -.10, -.07, -.01),
    "Last 1, spectral": (3.86, 5.21, 3.03, 2.22, 1.23, .79, .26, .24, 0, -.06, -.14, -.13, -.16),
    "First 1 Last 1, spectral": (4.09, 5.96, 3.92, 3.04, 1.99, 1.25, .42, .27, .12, .10, .12, .06, .10)}


def draw_head_start(runs, path, least=100):
    """Gain over `soft` by epoch, smoothed over nine: published logs, and our setup with the longest runs."""
    longest = max(run["settings"]["epochs"] for run in runs)
    setups = {setup_of(run) for run in runs if run["settings"]["epochs"] == longest and label_of(run)}
    if longest < least or not setups:
        return
    setup = sorted(setups)[0]
    ours = [run for run in runs if setup_of(run) == setup]
    figure = Figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2, sharey=True)
    for label, gains in PUBLISHED.items():
        left.plot(PUBLISHED_EPOCHS, gains, label=label, **style(label))
    for label in sorted({label_of(run) for run in ours} - {None}):
        gains = np.array([np.subtract(*(np.array(each["top1"], float) for each in (run, other)))  # null: not measured
                          for run in ours for other in ours if label_of(run) == label and run["seed"] == other["seed"]
                          and other["settings"]["method"] == "soft"])  # [seeds, epochs]
        if len(gains):
            gains = np.nanmean(np.lib.stride_tricks.sliding_window_view(gains, 9, axis=1), axis=2)
            epochs = np.arange(5, 5 + gains.shape[1])
            right.plot(epochs, gains.mean(0), label=label, **{**style(label), "marker": None})
            right.fill_between(epochs, gains.min(0), gains.max(0), color=style(label)["color"], alpha=0.2)
    for axes, title in ((left, "ImageNet, published logs"), (right, f"shapes, {longest} epochs, all seeds")):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, xscale="log", xlabel="epoch")
        axes.set_xticks([5, 10, 30, 100, 300], ["5", "10", "30", "100", "300"])
    left.set_ylabel("top-1 less that of soft (points)")
    save(figure, path, ncols=3)


def study(source, out):
    """Gather the runs of the folder `source` in study.jsonl, print the table, draw the figures."""
    found = {**read_study(source / "study.jsonl"), **read_runs(source)}
    if not found:
        raise ValueError(f"{source} holds neither finished runs, in folders NAME-SEED, nor a study.jsonl")
    runs = [run for _, run in sorted({**read_study(out / "study.jsonl"), **found}.items())]
    write_study(runs, out / "study.jsonl")
    print("| run | n | top-1 of each seed | mean +- standard deviation |\n|---|---|---|---|")
    for name in sorted({run["name"] for run in runs}):
        values = [run["top1"][-1] for run in runs if run["name"] == name]
        mean, spread = moments(values)
        print(f"| {name} | {len(values)} | {' '.join(f'{v:.2f}' for v in values)} | {mean:.2f} +- {spread:.2f} |")
    for curves in [*by_setup(runs).values()][:1]:
        draw_dose(curves, out / "dose.png")
        draw_head_start(runs, out / "head_start.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(str(message).split())}\n")
    parser.add_argument("source", type=Path, help="a folder of runs, or of a study.jsonl")
    parser.add_argument("--out", type=Path, help="where study.jsonl and the figures go (default: source)")
    args = parser.parse_args(argv)
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        study(args.source, args.out or args.source)
    except (ValueError, OSError, LookupError) as error:
        parser.error(f"a record has no {error}" if isinstance(error, LookupError) else error)


if __name__ == "__main__":
    main()
