"""Gather the runs of a study in one file, print its table, draw its figures.

    python results/study.py runs/study --out results           # finished runs, in folders NAME-SEED
    python results/study.py results                            # of what study.jsonl holds, without any folder

study.jsonl has a line a run, beside those that it had before: settings, seed, versions, commit, command, and by epoch
the losses and accuracies. Its first line holds the settings that all runs share.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analyze import save, style
from losses import METHODS
from models import read_config

HELD = ("student", "student_kwargs", "teacher", "teacher_weights", "data", "train_size", "label_noise", "img_size",
        "epochs", "batch_size", "lr", "alpha", "tau")  # what all runs of a dose panel have in common


def read_study(path):
    """study.jsonl -> {(name, seed): run}. A line a run; the first one holds the settings that all of them share."""
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
    part = path.with_suffix(".part")  # the folders may be gone: never half a file
    part.write_text("".join(f"{json.dumps(line)}\n" for line in ({"common": common}, *own)), encoding="utf-8")
    part.replace(path)


def read_runs(folder):
    """The finished runs in folders NAME-SEED -> {(name, seed): run}, light enough to be kept by the hundred."""
    def brief(value):
        return value and float(f"{value:.5g}")

    runs = {}
    for path in sorted(folder.glob("*-*/log.jsonl")):
        config, lines = read_config(path.parent), path.read_text(encoding="utf-8").splitlines()
        settings = config["settings"]
        if len(lines) != settings["epochs"]:
            continue
        log, name = [json.loads(line) for line in lines], path.parent.name.rpartition("-")[0]
        runs[name, settings["seed"]] = {
            "name": name, "seed": settings["seed"],
            "settings": {key: value for key, value in settings.items() if key not in ("seed", "out")},
            "student_parameters": config["parameters"]["student"],
            **{key: config[key] for key in ("layers", "versions", "commit", "command")},
            "seconds": brief(float(np.median([line["seconds"] for line in log]))),  # of an epoch
            "terms": {term: [brief(line["terms"].get(term)) for line in log] for term in log[0]["terms"]},
            **{key: [brief(line.get(key)) for line in log] for key in ("top1", "ema_top1")}}
    return runs


def study(source, out):
    """Gather the runs of the folder `source` in study.jsonl, print the table, draw the figures."""
    found = {**read_study(source / "study.jsonl"), **read_runs(source)}
    if not found:
        raise ValueError(f"{source} holds neither finished runs, in folders NAME-SEED, nor a study.jsonl")
    runs = [run for _, run in sorted({**read_study(out / "study.jsonl"), **found}.items())]
    write_study(runs, out / "study.jsonl")
    top1 = {}
    for run in runs:
        top1.setdefault(run["name"], []).append(run["top1"][-1])
    top1 = dict(sorted(top1.items(), key=lambda item: np.mean(item[1])))
    figure = Figure(figsize=(6.4, 0.3 * len(top1) + 1))
    axes = figure.subplots()
    print("| run | n | top-1 of each seed | mean +- standard deviation |\n|---|---|---|---|")
    for y, (name, values) in enumerate(top1.items()):
        mean, spread = moments(values)
        print(f"| {name} | {len(values)} | {' '.join(f'{v:.2f}' for v in values)} | {mean:.2f} +- {spread:.2f} |")
        axes.errorbar(max(100 - mean, 0.01), y, xerr=spread, fmt="s", color="black", markersize=5)
        axes.plot(np.maximum(100 - np.array(values), 0.01), [y] * len(values), "o", color="#c1440e", alpha=0.8)
    axes.set(xscale="log", xlabel="validation error (%, at least 0.01): each seed, mean, std",
             yticks=range(len(top1)), yticklabels=top1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.minorticks_off()
    axes.invert_xaxis()
    save(figure, out / "study.png")
    setups = by_setup(runs)
    if setups:
        draw_dose(next(iter(setups.values())), out / "dose.png")
        gains = gains_over_soft(setups)
        if gains:
            draw_gains(gains, setups, out / "gains.png")


def moments(values):
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else math.nan


def dose_line(run):
    """What a run of beta > 0 compares, and in which layers: "mse, layer 12"; None if nothing."""
    settings, layers = run["settings"], [str(layer + 1) for layer in run["layers"]["student"]]
    if not layers:
        return None
    what, = {*run["terms"]} - {"ce", "kd"}
    name = what if settings["method"] in ("spectral", what) else f"{settings['method']} ({what})"
    norm = ", norm none" if settings.get("norm") == "none" else ""
    own = getattr(METHODS.get(settings["method"]), "variant", "plain")  # a method may have gone since
    variant = f", {settings['variant']}" if settings["variant"] != own else ""
    return f"{name}{norm}, layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}{variant}"


def by_setup(runs):
    """{setup (HELD): {(line, student variant): {beta: [top-1 of a seed]}}}, the setup with most runs first; line None
    is `soft`, at beta 0."""
    setups = {}
    for run in runs:
        line, settings = dose_line(run), run["settings"]
        if line or settings["method"] == "soft":
            lines = setups.setdefault(tuple(json.dumps(settings.get(key)) for key in HELD), {})
            doses = lines.setdefault((line, settings["variant"]), {})
            doses.setdefault(settings["beta"] if line else 0, []).append(run["top1"][-1])
    return dict(sorted(setups.items(), key=lambda item: -sum(len(v) for d in item[1].values() for v in d.values())))


def draw_dose(lines, path):
    """Top-1 against beta in one setup: on the left what compares pooled maps, on the right what learns to compare. A
    line starts at beta 0 with its control, `soft` on the same student."""
    shown = {line: {**lines.get((None, line[1]), {}), **dict(sorted(lines[line].items()))}
             for line in sorted(line for line in lines if line[0])}
    shown = {line: doses for line, doses in shown.items() if len({*doses} - {0}) > 1}
    panels = [{line: doses for line, doses in shown.items() if line[0].startswith(("mse", "spectral")) == pooled}
              for pooled in (True, False)]
    panels = [panel for panel in panels if panel]
    if not panels:
        return
    betas = sorted({beta for doses in shown.values() for beta in doses} - {0})
    place = {0: betas[0] / 4, **{beta: beta for beta in betas}}
    figure = Figure(figsize=(max(4.4 * len(panels), 6.4), 4.8))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels):
        for i, (line, doses) in enumerate(panel.items()):
            x = [place[beta] * 1.4 ** ((i + 0.5) / len(panel) - 0.5) for beta in doses]  # side by side
            axes.errorbar(x, *zip(*map(moments, doses.values())), label=line[0], **style([*shown].index(line)))
        axes.set(xscale="log", xlabel="beta, the weight of the feature loss")
        axes.set_xticks([*place.values()], [f"{beta:g}" for beta in place], fontsize=8)
        axes.xaxis.minorticks_off()
    figure.axes[0].set_ylabel("validation top-1 (%), mean +- std of seeds")
    save(figure, path, ncols=3)


def gains_over_soft(setups):
    """What a feature loss adds to `soft` in top-1, where several setups tell: {(line, beta): {setup: (gain, error)}},
    the difference of the means and its standard error."""
    gains = {}
    for setup, lines in setups.items():
        control = lines.get((None, "plain"), {}).get(0, ())
        for (line, _), doses in lines.items():
            for beta, values in doses.items():
                if line and min(len(values), len(control)) > 1:
                    error = math.sqrt(sum(np.var(each, ddof=1) / len(each) for each in (values, control)))
                    gains.setdefault((line, beta), {})[setup] = np.mean(values) - np.mean(control), error
    return {key: found for key, found in sorted(gains.items()) if len(found) > 1}


def draw_gains(gains, setups, path):
    """`gains_over_soft` +- standard error, a row a setup; a setup's name is what sets it apart from the first one."""
    rows = [setup for setup in setups if any(setup in found for found in gains.values())][::-1]
    figure = Figure(figsize=(7.4, 0.75 * len(rows) + 1.2))
    axes = figure.subplots()
    for i, ((line, beta), found) in enumerate(gains.items()):
        y = [rows.index(setup) + 0.5 - (i + 1) / (len(gains) + 1) for setup in found]
        gain, error = zip(*found.values())
        axes.errorbar(gain, y, xerr=error, label=f"{line}, beta {beta:g}", **{**style(i), "linestyle": "none"})
    names = ["\n".join(f"{key} {value}" for key, value, usual in zip(HELD, setup, rows[-1]) if value != usual)
             for setup in rows]
    axes.axvline(0, color="black", linewidth=0.8)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color="lightgray", linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="top-1 less that of `soft` on the plain student (points)", yticks=range(len(rows)),
             ylim=(-0.5, len(rows) - 0.5),
             yticklabels=[re.sub("[{}\"]", "", name) or "as in dose.png" for name in names])
    save(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(str(message).split())}\n")
    parser.add_argument("source", type=Path, help="a folder of runs, or of a study.jsonl")
    parser.add_argument("--out", type=Path, help="where study.jsonl and the figures go (default: source)")
    args = parser.parse_args(argv)
    out = args.out or args.source
    try:
        out.mkdir(parents=True, exist_ok=True)
        study(args.source, out)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
