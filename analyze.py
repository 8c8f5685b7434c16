"""Measure every layer of timm models on images, draw the papers' figures, and set null controls beside them.

    python analyze.py                                              # the newest run: its teacher, its student, untrained
    python analyze.py --models runs/soft runs/spectral             # two runs beside each other, their curves included
    python analyze.py --models deit_tiny_patch16_224=weights.safetensors deit_tiny_patch16_224=random --data DIR
    python analyze.py --evolution runs/soft runs/spectral          # DD Fig. 4: entropy by layer over training

A model is a timm name (pretrained), NAME=FILE, NAME=random, or the folder of a run (its student). The first is the
one that the others are compared with. Each CSV lies beside the PNG that is drawn from it; summary.md puts the
published numbers beside ours. Layers count from 1, as in the papers; only --layers has timm's indices, from 0.
Notation: A a layer's feature map [B, C, h, w]; X its tokens [B, N, C].
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # beside other work threads would spin while the next one has no core

import argparse
import csv
import json
import math
import shlex
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ParseKwargs
from tqdm import tqdm

import data
from losses import at_least_float32
from models import (HookedModel, build_model, check_maps, choose_device, is_run, key_value, load_student, read_config,
                    stages)

LEVELS = (0.80, 0.90, 0.95, 0.99)  # shares of energy (EM tables)
BANDS = (50, 60, 70, 80, 90)  # % of energy (EM, SEP)
BINS = 100  # DD Section 2.2

# ---------- Metrics of one layer


def tokens_of(A):
    """Feature map [B, C, h, w] -> tokens [B, N, C]; no copy for the maps of ViTs."""
    return A.flatten(2).transpose(1, 2)


def channel_spectrum(A):
    """DD Eq. 1 and 2: S[k] = mean over B, h, w of |FFT over channels / C|. [B, C, h, w] -> [C]."""
    return torch.fft.fft(at_least_float32(tokens_of(A)), dim=-1, norm="forward").abs().mean((0, 1))


def entropy_map(A, lo, hi, bins=BINS):
    """DD Eq. 3 and 4: the entropy (bits) of the histogram of each token's C values, in equal bins from lo to hi.

    [B, C, h, w] -> [B, h, w]. Bins as numpy.histogram's, whose last one is closed; values outside count at the ends.
    """
    tokens = at_least_float32(tokens_of(A)).contiguous()
    edges = torch.from_numpy(np.histogram_bin_edges([], bins, (float(lo), float(hi)))).to(tokens)
    index = torch.bucketize(tokens, edges[1:-1], right=True)
    counts = tokens.new_zeros(*tokens.shape[:2], bins).scatter_add_(2, index, torch.ones_like(tokens))
    bits = torch.special.entr(counts / A.shape[1]).sum(2) / math.log(2)
    return bits.unflatten(1, A.shape[2:])


def magnitude(A):
    """DD Eq. 6: the mean of |A|. A scalar."""
    return at_least_float32(A).abs().mean()


def energy_ranks(X, levels=LEVELS):
    """EM: for each image the smallest k whose k largest squared singular values hold a share >= level of all.

    Tokens [B, N, C], not centred -> int64 [B, len(levels)]. Squared singular values are the eigenvalues of the smaller
    Gram matrix, found in float64.
    """
    X = at_least_float32(X)
    gram = X @ X.mT if X.shape[1] < X.shape[2] else X.mT @ X
    energies = torch.linalg.eigvalsh(gram.double()).clamp_min(0).flip(-1)
    return _smallest_k(energies, levels)


def second_moment(X):
    """The uncentred second moment of tokens, the mean of x x^T: [B, N, C] -> float64 [C, C]."""
    flat = X.reshape(-1, X.shape[-1]).double()
    return flat.mT @ flat / len(flat)


def principal_axes(moment):
    """Eigenvectors of a second moment [C, C], by falling eigenvalue: the columns."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)


def pca_ranks(X, moment, levels=LEVELS):
    """EM v2, dataset PCA: for each image the smallest k whose first k eigenvectors of `moment` hold a share >= level.

    Tokens [B, N, C], second moment [C, C] of all images' tokens -> int64 [B, len(levels)].
    """
    return ranks_along(principal_axes(moment), X, levels)


def ranks_along(axes, X, levels=LEVELS):
    """As pca_ranks, along axes that are known."""
    return _smallest_k((X.double() @ axes).square().sum(1), levels)


def _smallest_k(energies, levels):
    cumulative = energies.cumsum(-1)  # [B, C]
    wanted = torch.tensor(levels, dtype=torch.float64, device=energies.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted).clamp_max(energies.shape[1] - 1) + 1


def sep_curve(X):
    """EM, Spectral Energy Pattern: the cumulative |FFT over channels|^2 of a token, in index order 0..C-1, in % of its
    whole, mean over tokens. [B, N, C] -> [C]. Tokens of zeros are left out. SEP_NOTE says what it can tell."""
    tokens = at_least_float32(X.reshape(-1, X.shape[-1]))
    energy = torch.fft.fft(tokens, dim=-1).abs().square()
    energy = energy[energy.sum(-1) > 0]
    if not len(energy):
        return tokens.new_zeros(tokens.shape[1])
    return 100 * (energy / energy.sum(-1, keepdim=True)).mean(0).cumsum(-1)


def sep_bandwidth(curve, levels=BANDS):
    """EM: the first index, counted from 1, at which the SEP curve reaches each level (%), as a share of C. Raises
    ValueError for a curve that does not end at 100 %."""
    if not abs(curve[-1].item() - 100) < 0.01:
        raise ValueError(f"a SEP curve is in % and ends at 100, not at {curve[-1]:g}")
    reached = curve[None] >= torch.as_tensor(levels, dtype=curve.dtype, device=curve.device)[:, None] - 1e-9
    first = torch.where(reached.any(1), reached.int().argmax(1), len(curve) - 1)
    return (first + 1).double() / len(curve)


# ---------- What is measured: images, models, null controls

EMBEDDED = "cait_toy_patch8_32=weights/cait_toy_shapes.safetensors"  # the teacher that lies beside this file


def open_images(name, count, seed):
    """`count` random images of a folder (searched in depth; its val/ if it has one) or of a data set's validation half.

    Returns a list of functions that each load one PIL image. Raises ValueError if there are none.
    """
    folder = Path(name)
    if name == "shapes" or name.startswith(("torch/", "hfds/")):
        dataset = data.open_data(name).val
        found = [lambda i=i: data.to_rgb(dataset[i][0]) for i in range(len(dataset))]
    elif folder.is_dir():
        folder = folder / "val" if (folder / "val").is_dir() else folder
        paths = [os.path.join(where, file) for where, _, files in os.walk(folder, followlinks=True) for file in files]
        found = [partial(data.load_image, path) for path in sorted(paths) if data.is_image(folder, path, [])]
    else:
        raise ValueError(f"{name} is neither a folder of images nor shapes, torch/NAME or hfds/NAME")
    if not found:
        raise ValueError(f"no images in {folder}")
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in sorted(chosen)]


class Subject:
    """A model to be measured. `label` names it in tables and legends; `kind`: teacher, student, model or untrained.

    `build(trained)` makes the timm model. `numbers`: its layers counted from 1 (a CNN's stem is 0), of `depth`;
    `modules`: timm's names for them. What is measured goes to `entropy`, `layers`, `ranks`, `sep`, ...
    """

    def __init__(self, label, kind, name, build, args, device):
        self.label, self.kind, self.name, self.build, self.device = label, kind, name, build, device
        torch.manual_seed(args.seed)
        model = build(kind != "untrained")
        blocks = stages(model)
        layers = args.layers or blocks
        self.model = HookedModel(model, layers).eval()
        check_maps(self.model, resolve_model_data_config(model)["input_size"][-1])
        self.model.to(device)
        self.transform = create_transform(**resolve_model_data_config(model))
        self.modules = [model.feature_info[layer]["module"] for layer in layers]
        self.numbers, self.depth = [layer - blocks[0] + 1 for layer in layers], len(blocks)

    def maps(self, start, openers):
        """The feature maps of the layers for one batch of images, the first of which is number `start`."""
        images = torch.stack([self.transform(opener()) for opener in openers])
        maps = self.model(images.to(self.device, non_blocking=True))[1]
        return [A.cpu() if A.device.type == "mps" else A for A in maps]  # MPS has neither float64 nor eigvalsh


class Control:
    """Maps that hold nothing, shaped as a subject's: Gaussian noise, or one channel pattern, weighted by token."""

    def __init__(self, label, subject, seed):
        self.label, self.kind, self.name = label, "control", label
        self.subject, self.seed, self.examples = subject, seed, None
        self.modules, self.numbers, self.depth = subject.modules, subject.numbers, subject.depth

    def maps(self, start, openers):
        generator, maps = torch.Generator().manual_seed(data.seed_of(self.seed, start)), []
        self.examples = self.examples or self.subject.maps(start, openers[:1])
        for example in self.examples:
            count, (C, h, w) = len(openers), example.shape[1:]
            shapes = [(count, C, h, w)] if self.label == "white noise" else [(count, C, 1, 1), (count, 1, h, w)]
            maps.append(math.prod(torch.randn(shape, generator=generator) for shape in shapes).to(example.device))
        return maps


def open_subjects(args, device, run=None):
    """The models of --models, or teacher and student of a run; with --controls the first one's null controls."""
    options = {"img_size": args.img_size, **args.model_kwargs}
    subjects = open_teacher(run, args, device) if run else []
    subjects += [open_model(text, args, device, options) for text in args.models or [str(run)]]
    first = subjects[0]
    if args.controls:
        if ("untrained", first.name) not in [(subject.kind, subject.name) for subject in subjects]:
            subjects.append(Subject(f"untrained {first.name}", "untrained", first.name, first.build, args, device))
        subjects += [Control(label, first, args.seed) for label in ("white noise", "rank 1")]
    if len({subject.label for subject in subjects}) < len(subjects):
        raise ValueError("the same model or run is given twice")
    return subjects


def open_model(text, args, device, options, label=None, kind=None, file="student.safetensors"):
    """The folder of a run (its student), or NAME (a timm model, pretrained), NAME=FILE, NAME=random."""
    label = label or text
    if is_run(text):
        if kind is None and any(options.values()):
            raise ValueError(f"--img-size and --model-kwargs have no effect on the run {text}")
        settings = read_config(text)["settings"]
        name = f"{settings['variant']} {settings['student']}".removeprefix("plain ")
        return Subject(label, kind or "student", name, lambda trained: load_student(text, file, trained), args, device)
    name, _, source = text.partition("=")
    classes = timm.get_pretrained_cfg(name).num_classes if timm.is_model(name) else 1  # any: only maps are used

    def build(trained):
        return build_model(name, num_classes=classes, random_head=True, **options,
                           pretrained=trained and not source, weights=source if trained else None)

    return Subject(label, "untrained" if source == "random" else kind or "model", name, build, args, device)


def open_teacher(run, args, device):
    """[the teacher of a run], or []; for a run without one on `shapes`, the embedded one."""
    settings = read_config(run)["settings"]
    text, options = EMBEDDED, {}
    if settings["method"] != "none":
        weights = settings["teacher_weights"]
        text = weights if is_run(weights) else f"{settings['teacher']}={weights}"
        options = {"img_size": settings["img_size"], **(settings["teacher_kwargs"] or {})}
    elif settings["data"] != "shapes":
        return []
    return [open_model(text, args, device, options, f"teacher {text.partition('=')[0]}", "teacher")]


# ---------- Streaming over the images

RANGES = {"global": "each model over its own range, all its layers together", "layer": "each layer over its own range"}


def feature_maps(subject, args, task):
    """Yield the feature maps of one batch of images, and the share of all images that are in it."""
    for start in tqdm(range(0, len(args.openers), args.batch_size), desc=f"{subject.label}: {task}", leave=False,
                      disable=None):
        openers = args.openers[start:start + args.batch_size]
        yield subject.maps(start, openers), len(openers) / len(args.openers)


@torch.inference_mode()
def measure(subject, args):
    """All metrics of a subject, in two passes; nothing that grows with the images is kept but the ranks."""
    count, moment = len(subject.modules), 0
    lows, highs = torch.full((count,), math.inf), torch.full((count,), -math.inf)
    for maps, weight in feature_maps(subject, args, "ranges"):
        ends = torch.tensor([[end.item() for end in A.aminmax()] for A in maps])
        lows, highs = torch.minimum(lows, ends[:, 0]), torch.maximum(highs, ends[:, 1])
        moment = moment + second_moment(tokens_of(maps[-1])) * weight
    if not (lows.isfinite() & highs.isfinite()).all():
        raise ValueError(f"{subject.label} yields values that are not finite on these images")
    ranges = {"global": [(lows.min().item(), highs.max().item())] * count,
              "layer": list(zip(lows.tolist(), highs.tolist()))}
    entropy = {name: [0] * count for name in args.entropy_range}
    layers = {name: [0] * count for name in ("magnitude", "spectra", "svd_layers")}
    svd, pca, sep, axes = [], [], 0, principal_axes(moment)
    permutation = torch.randperm(len(moment), generator=torch.Generator().manual_seed(args.seed))
    for maps, weight in feature_maps(subject, args, "metrics"):
        for layer, A in enumerate(maps):
            for name, values in entropy.items():
                values[layer] += entropy_map(A, *ranges[name][layer]).mean().item() * weight
            layers["magnitude"][layer] += magnitude(A).item() * weight
            layers["spectra"][layer] += channel_spectrum(A).double().cpu().numpy() * weight
            if args.layer_ranks or layer == count - 1:
                ranks = energy_ranks(tokens_of(A)).cpu()
                layers["svd_layers"][layer] += ranks[:, -1].double().mean().item() * weight
        X = tokens_of(maps[-1])
        svd.append(ranks)
        pca.append(ranks_along(axes, X).cpu())
        sep += torch.stack([sep_curve(X), sep_curve(X[..., permutation.to(X.device)])]).double().cpu() * weight
    layers["intensity"] = [S.mean() for S in layers["spectra"]]
    if not args.layer_ranks:
        del layers["svd_layers"]
    subject.entropy, subject.layers, (subject.sep, subject.sep_permuted) = entropy, layers, sep
    subject.tokens, subject.channels = X.shape[1:]
    subject.ranks = {"svd": torch.cat(svd).numpy(), "pca": torch.cat(pca).numpy()}


# ---------- Published numbers: EM's ranks (99th percentile over 1000 images at 80/90/95/99 % energy) and SEP bandwidths
# (at 50..90 %), the layer of the entropy's minimum, counted from 1, of DD Figs. 1, 5, 6

PUBLISHED = {
    "vit_tiny_patch16_224": dict(svd=(1, 2, 7, 52), pca=(1, 17, 71, 154)),  # 21k
    "cait_s24_224": dict(svd=(14, 34, 61, 121), pca=(167, 247, 302, 359), minimum="8-9",
                         bands=(0.500, 0.599, 0.703, 0.805, 0.901)),
    "deit_small_patch16_224": dict(svd=(30, 59, 89, 146), pca=(205, 278, 324, 369),
                                   bands=(0.503, 0.602, 0.701, 0.797, 0.901)),
    "swin_small_patch4_window7_224": dict(svd=(3, 7, 15, 33), pca=(129, 336, 495, 691),
                                          bands=(0.501, 0.599, 0.701, 0.799, 0.901)),
    "vit_large_patch16_224": dict(svd=(5, 16, 39, 115), pca=(255, 498, 694, 933)),  # 21k
    "vit_base_patch16_224.dino": dict(svd=(39, 75, 109, 165), pca=(382, 529, 624, 731)),
    "vit_small_patch16_224.dino": dict(bands=(0.477, 0.583, 0.690, 0.792, 0.896)),
    "vit_base_patch14_dinov2": dict(svd=(19, 39, 67, 146), pca=(384, 519, 606, 704)),
    "vit_base_patch16_224.mae": dict(svd=(1, 7, 34, 113), pca=(1, 58, 235, 585), minimum="4"),
    "vit_base_patch16_clip_224": dict(svd=(6, 27, 60, 135), pca=(129, 340, 502, 704)),
    "vit_base_patch16_224": dict(minimum="9")}


def published(subject, key):
    """A published number, if this is one of the papers' models with trained weights."""
    return PUBLISHED.get(subject.name, {}).get(key, ()) if subject.kind in ("teacher", "model") else ()


# ---------- Numbers to files

BY_LAYER = {  # a column, an axis and a title for each
    "magnitude": ("mean_abs_activation", "mean |activation|", "Magnitude by layer (DD Eq. 6)"),
    "intensity": ("mean_spectrum", "mean of S[k] over k", "Intensity by layer (SK)"),
    "svd_layers": ("mean_rank_99", "mean rank at 99 % energy", "SVD rank by layer (EM)")}


def stem_of(figure, range_name):
    return figure if range_name == "global" else f"{figure}_{range_name}"


FILES = {"summary.md", *(f"{stem}.{end}" for end in ("csv", "png") for stem in (
    *BY_LAYER, "spectra", "ranks", "sep", "curves",
    *(stem_of(figure, name) for figure in ("entropy", "evolution") for name in RANGES)))}


def clear(out):
    """Remove an earlier call's files from `out`. Its summary.md or evolution.csv shows that there was one."""
    if (out / "summary.md").exists() or (out / "evolution.csv").exists():
        for name in FILES:
            (out / name).unlink(missing_ok=True)


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in (header, *rows))


def entropy_rows(subject):
    return [(number, module, name, value) for name, values in subject.entropy.items()
            for number, module, value in zip(subject.numbers, subject.modules, values)]


def write_tables(subjects, out):
    head = ("model", "layer", "module")

    def by_layer(key):
        return [(s.label, *row) for s in subjects for row in zip(s.numbers, s.modules, s.layers[key])]

    write_csv(out / "entropy.csv", (*head, "range", "entropy_bits"),
              [(s.label, *row) for s in subjects for row in entropy_rows(s)])
    for key in subjects[0].layers.keys() & BY_LAYER.keys():
        write_csv(out / f"{key}.csv", (*head, BY_LAYER[key][0]), by_layer(key))
    write_csv(out / "spectra.csv", (*head, "k", "magnitude"),
              [(*row, k, value) for *row, S in by_layer("spectra") for k, value in enumerate(S)])
    write_csv(out / "ranks.csv", ("model", "image", "method", *(f"rank_{level:.0%}" for level in LEVELS)),
              [(s.label, i, method, *row) for s in subjects for method, ranks in s.ranks.items()
               for i, row in enumerate(ranks)])
    write_csv(out / "sep.csv", ("model", "channels", "sep_percent", "sep_percent_permuted"),
              [(s.label, k, *pair) for s in subjects
               for k, pair in enumerate(zip(s.sep.tolist(), s.sep_permuted.tolist()), 1)])


def closeness(subject, reference):
    """SK: how alike two intensity profiles are by relative depth: Pearson's r, and the mean |log2 ratio|."""
    ours, theirs = subject.layers["intensity"], np.array(reference.layers["intensity"])
    ours = np.interp(np.linspace(0, 1, len(theirs)), np.linspace(0, 1, len(ours)), ours)
    flat = np.std(ours) < 1e-9 * np.mean(ours) or np.std(theirs) == 0
    return math.nan if flat else np.corrcoef(ours, theirs)[0, 1], np.abs(np.log2(ours / theirs)).mean()


SEP_NOTE = """Compare with noise and the rank-1 pattern, because SEP alone says little. Channels have no order, so a
token's spectrum over them is flat on average, except at frequency 0 (its mean). The curve of a flat spectrum is the
diagonal, .5/.6/.7/.8/.9, whatever the rank: it shows that neighbouring channels are unrelated, and nothing more."""


def markdown(title, note, columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return ["", f"## {title}", "", *([note, ""] if note else []),
            *(f"| {' | '.join(map(str, cells))} |" for cells in lines)]


def write_summary(subjects, args):
    """summary.md: ours and, where a model is one of the papers', the published numbers."""
    def listed(values, form):
        return "/".join(format(value, form).removeprefix("0") or "0" for value in values) or "-"

    def depth(s, values):
        return f"{values[0]:.3f}", f"{min(values):.3f} ({s.numbers[int(np.argmin(values))]})", f"{values[-1]:.3f}"

    def ranks(s, method):
        ours = np.round(np.percentile(s.ranks[method], 99, axis=0))
        return listed(ours, ".0f"), listed(published(s, method), ".0f")

    def sep(s):
        bands = sep_bandwidth(s.sep).tolist(), published(s, "bands"), sep_bandwidth(s.sep_permuted).tolist()
        return *(listed(values, ".3f") for values in bands), f"{(s.sep - s.sep_permuted).abs().mean():.3f}"

    first, *others = subjects
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    ends = ("first", "minimum (layer)", "last")
    lines = [
        f"# {len(args.openers)} images of {Path(args.data).name}", "", f"`{command}`",
        *markdown("Depth (DD Figs. 1, 2, 5, 6)",
                  "Layers counted from 1. A U falls to a minimum inside and rises again.",
                  ["model", "entropy range", *ends, "published minimum", *(f"magnitude {end}" for end in ends)],
                  [[s.label, name, *depth(s, entropy), published(s, "minimum") or "-",
                    *depth(s, s.layers["magnitude"])] for s in subjects for name, entropy in s.entropy.items()]),
        *markdown("Ranks of the last layer, 99th percentile over images, at 80/90/95/99 % energy (EM)",
                  "No SVD rank can exceed min(N tokens, C channels), no PCA rank C.",
                  ["model", "N", "C", "SVD", "published", "dataset PCA", "published"],
                  [[s.label, s.tokens, s.channels, *ranks(s, "svd"), *ranks(s, "pca")] for s in subjects]),
        *markdown("SEP bandwidth at 50/60/70/80/90 % (EM)", SEP_NOTE,
                  ["model", "bandwidth", "published", "channels permuted", "mean difference (points)"],
                  [[s.label, *sep(s)] for s in subjects]),
        *markdown(f"Intensity by depth, compared with {first.label} (SK)", "",
                  ["model", "Pearson's r of the profiles", "mean distance (octaves)"],
                  [[s.label, *(f"{value:.3f}" for value in closeness(s, first))] for s in others])]
    (args.out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------- Numbers to pictures: lines differ in dash and marker, so that they can be told apart without colour

DASHES = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 4)))
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")
SHADES = ("#000000", "#c1440e", "#2a6fbb", "#7a7a7a", "#b08d57", "#8fbf8f", "#5e3c99", "#d98cb3")
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.4,
    "lines.markersize": 3.5, "errorbar.capsize": 3, "legend.fontsize": 8, "axes.titlesize": 10, "figure.titlesize": 10,
    "figure.labelsize": 9, "savefig.dpi": 110, "figure.constrained_layout.use": True})


def style(i):
    return dict(color=SHADES[i % 8], linestyle=DASHES[i % 8], marker=MARKERS[(i + i // 8) % 8])


def save(figure, path, ncols=2):
    """Write a figure with one legend below all its panels."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=ncols)
    figure.savefig(path)


def draw_by_depth(series, subjects, ylabel, title, path):
    """One line a model; models of other depths share the axis by relative depth."""
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    same = len({tuple(s.numbers) for s in subjects}) == 1
    for i, (s, values) in enumerate(zip(subjects, series)):
        x = s.numbers if same else (np.array(s.numbers) - 1) / max(1, s.depth - 1)
        axes.plot(x, values, label=s.label, **style(i))
    axes.set(xlabel="layer" if same else "relative depth (0: first layer, 1: last)", ylabel=ylabel, title=title)
    axes.xaxis.get_major_locator().set_params(integer=same)
    save(figure, path)


def draw_spectra(subjects, path):
    """DD Figs. 3 and 7: S[k] for k < C/2: first two, middle two, last two layers, or first and last of a few stages."""
    picks = [sorted({0, 1, d // 2 - 1, d // 2, d - 2, d - 1} if d >= 6 else {0, d - 1})
             for d in (len(s.modules) for s in subjects)]
    columns = max(map(len, picks))
    figure = Figure(figsize=(max(1.6 * columns + 0.6, 5), 1.75 * len(subjects) + 0.4))
    for s, strip, pick in zip(subjects, np.atleast_1d(figure.subfigures(len(subjects), 1)), picks):
        strip.suptitle(s.label, fontweight="bold", x=0.01, ha="left")
        row = strip.subplots(1, columns, sharey=True, squeeze=False)[0]
        halves = [S[:len(S) // 2] for S in (s.layers["spectra"][layer] for layer in pick)]
        for axes in row[len(pick):]:
            axes.set_visible(False)
        for axes, layer, S in zip(row, pick, halves):
            axes.plot(np.linspace(0, 0.5, len(S), endpoint=False), S, color="black", linewidth=0.8)
            axes.set_title(f"layer {s.numbers[layer]} of {s.depth}", fontsize=8)
            axes.set_xticks([0, 0.25, 0.5], ["0", ".25", ".5"])
            axes.tick_params(labelsize=8)
        shown = np.concatenate(halves)
        if shown.max() > 30 * np.median(shown):  # else a line at 0 beside one peak
            row[0].set(yscale="log", ylim=(shown.min() / 1.5, shown.max() * 1.5))
        else:
            row[0].set_ylim(0, 1.05 * shown.max())
        row[0].set_ylabel("S[k]", fontsize=8)
    figure.supxlabel("k / C, frequency over channels; S[k]: mean magnitude, one scale a model")
    save(figure, path)


def draw_ranks(subjects, path):
    """EM: histogram over images of the rank at 99 % energy, by SVD of each and in the PCA basis of all."""
    figure = Figure(figsize=(6.4, 1.35 * len(subjects) + 0.9))
    panels = figure.subplots(len(subjects), 1, squeeze=False, sharex=True)[:, 0]
    widest = max(s.channels for s in subjects)
    step = max(1, widest // 48)
    bins = np.arange(0.5, widest + step + 0.5, step)
    for s, axes in zip(subjects, panels):
        axes.hist(s.ranks["svd"][:, -1], bins, color="black", label="SVD of each image")
        axes.hist(s.ranks["pca"][:, -1], bins, fill=False, edgecolor="#c1440e", hatch="////", label="dataset PCA")
        axes.axvline(min(s.tokens, s.channels) + 0.5, color="#2a6fbb", linestyle="--",
                     label="min(tokens, channels): the highest SVD rank")
        axes.axvline(s.channels + 0.5, color="gray", linestyle=":", linewidth=2,
                     label="channels: the highest PCA rank")
        axes.set(title=f"{s.label}: {s.tokens} tokens, {s.channels} channels", ylabel="images")
    panels[-1].set_xlabel("dimensions that hold 99 % of an image's energy in the last layer")
    save(figure, path)


def draw_sep(subjects, path):
    """EM: SEP curves over the share of channels, and what each curve differs by from the diagonal."""
    figure = Figure(figsize=(9, 3.8 + 0.1 * len(subjects)))
    left, right = figure.subplots(1, 2)
    for i, s in enumerate(subjects):
        share = np.arange(1, s.channels + 1) / s.channels
        left.plot(share, s.sep, label=s.label, **{**style(i), "marker": None})
        right.plot(share, s.sep.numpy() - 100 * share, **{**style(i), "marker": None})
    left.set(xlabel="share of channels, index order", ylabel="cumulative energy (%)", title="SEP")
    right.set(xlabel="share of channels, index order", ylabel="cumulative energy - diagonal (points)",
              title="less the diagonal")
    save(figure, path, ncols=3)


def draw_all(subjects, out):
    for name in subjects[0].entropy:
        title = f"Entropy by layer (DD Eq. 3-5):\n{RANGES[name]}"
        draw_by_depth([s.entropy[name] for s in subjects], subjects, "entropy (bits)", title,
                      out / f"{stem_of('entropy', name)}.png")
    for key in BY_LAYER.keys() & subjects[0].layers.keys():
        draw_by_depth([s.layers[key] for s in subjects], subjects, *BY_LAYER[key][1:], out / f"{key}.png")
    draw_spectra(subjects, out / "spectra.png")
    draw_ranks(subjects, out / "ranks.png")
    draw_sep(subjects, out / "sep.png")


# ---------- Runs: curves, and DD Fig. 4


def read_log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def draw_curves(logs, path):
    """Loss terms and accuracy by epoch, a column for each run: {its folder: its log}."""
    figure = Figure(figsize=(max(3.6 * len(logs), 4.5), 5.6))
    grid = figure.subplots(2, len(logs), squeeze=False, sharey="row", sharex="col")
    for (run, log), (upper, lower) in zip(logs.items(), grid.T):
        epochs, marker = range(1, len(log) + 1), "o" if len(log) < 5 else None
        for term, dash in zip(log[0]["terms"] if log else (), DASHES):
            values = [record["terms"][term] or math.nan for record in log]  # a log axis has no 0
            upper.plot(epochs, values, linestyle=dash, marker=marker, label=term)
        for key, name, dash in (("top1", "student", "-"), ("ema_top1", "its EMA", "--")):
            lower.plot(epochs, [record[key] for record in log], dash, marker=marker, label=name)
        upper.set(title="/".join(Path(run).parts[-2:]), yscale="log")
        lower.set_xlabel("epoch")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        upper.legend()
        lower.legend()
    grid[0, 0].set_ylabel("weighted loss term")
    grid[1, 0].set_ylabel("validation top-1 (%)")
    figure.savefig(path)


def evolution(args, device):
    """Entropy by layer at the snapshots of runs: evolution.csv, and for each range a figure with a panel a run."""
    panels = {}  # {run: [a subject a snapshot]}
    for run in args.evolution:
        snapshots = sorted(Path(run).glob("epoch_[0-9]*.pt"))
        if not snapshots or not is_run(run):
            raise ValueError(f"{run} is not the folder of a run with snapshots (config.json, epoch_NNNN.pt)")
        args.openers = open_images(args.data or read_config(run)["settings"]["data"], args.images, args.seed)
        panels[run], args.layer_ranks = [], False
        for file in snapshots:
            subject = open_model(run, args, device, {"img_size": args.img_size, **args.model_kwargs}, file=file.name)
            subject.epoch = int(file.stem.removeprefix("epoch_"))
            measure(subject, args)
            del subject.model
            panels[run].append(subject)
    clear(args.out)
    write_csv(args.out / "evolution.csv", ("run", "epoch", "layer", "module", "range", "entropy_bits"),
              [(run, s.epoch, *row) for run, subjects in panels.items() for s in subjects for row in entropy_rows(s)])
    for name in args.entropy_range:
        draw_evolution(panels, name, args.out / f"{stem_of('evolution', name)}.png")


def draw_evolution(panels, range_name, path):
    figure = Figure(figsize=(max(2.4 * len(panels) + 0.8, 5.5), 3.6))
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (run, subjects) in zip(grid, panels.items()):
        last = len(subjects) - 1
        for i, s in enumerate(subjects):
            axes.plot(s.numbers, s.entropy[range_name], marker="o" if i == last else None,
                      color=str(0.85 * (1 - i / max(1, last))),  # light: early, black: last
                      label=f"epoch {s.epoch}" if i in (0, (last + 1) // 2, last) else None)
        axes.set(title=Path(run).name, xlabel="layer", xticks=s.numbers[::max(1, len(s.numbers) // 6)])
    grid[0].set_ylabel("entropy (bits)")
    figure.suptitle(f"Entropy by layer in training (DD Fig. 4):\n{RANGES[range_name]}")
    save(figure, path, ncols=3)


# ---------- The program


def make_parser():
    def positive_int(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not at least 1")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(str(message).split())}\n")
    add = parser.add_argument
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--models", nargs="+", metavar="MODEL", help="NAME, NAME=FILE, NAME=random, or a run's folder")
    one.add_argument("--evolution", nargs="+", metavar="RUN", help="folders of runs with snapshots")
    add("--data", help="folder of images, shapes, torch/NAME or hfds/NAME (default: the first run's, or shapes)")
    add("--images", type=positive_int, default=32, help="chosen at random (32 as in DD; EM has 1000)")
    add("--layers", type=int, nargs="+", metavar="L",
        help="timm's indices, from 0 (default: all); figures and tables count from 1")
    add("--entropy-range", nargs="+", choices=tuple(RANGES), default=["global"],
        help="of the histograms: all layers of a model together (global, as in DD), or each layer's own")
    add("--layer-ranks", action=argparse.BooleanOptionalAction, default=True, help="SVD of every layer")
    add("--controls", action=argparse.BooleanOptionalAction, default=True,
        help="beside the models: the first one untrained, white noise, a rank-1 pattern")
    add("--img-size", type=positive_int, help="for models that can be built for another size")
    add("--model-kwargs", nargs="+", type=key_value, action=ParseKwargs, default={}, metavar="KEY=VALUE",
        help="arguments for timm")
    add("--batch-size", type=positive_int, default=16)
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda", "mps"), help="default: cuda, else mps, else cpu")
    add("--out", type=Path, default=Path("runs/analysis"), metavar="DIR", help="what an earlier call wrote is replaced")
    return parser


def analyse_models(args, device):
    """The models of the command line, or those of the newest run: every metric, table and figure."""
    finished = sorted(Path("runs").glob("**/student.safetensors"), key=lambda path: path.stat().st_mtime)
    if not args.models and not finished:
        raise ValueError("nothing to analyse: give --models or --evolution (see --help), or train first")
    newest = None if args.models else str(finished[-1].parent)
    runs = [text for text in args.models or [newest] if is_run(text)]
    args.data = args.data or (read_config(runs[0])["settings"]["data"] if runs else "shapes")
    args.openers = open_images(args.data, args.images, args.seed)
    logs, subjects = {run: read_log(run) for run in runs}, open_subjects(args, device, newest)
    print(f"on {args.data}: {', '.join(subject.label for subject in subjects)}", flush=True)
    for subject in subjects:
        measure(subject, args)
    clear(args.out)
    write_tables(subjects, args.out)
    write_summary(subjects, args)
    draw_all(subjects, args.out)
    if logs:
        draw_curves(logs, args.out / "curves.png")


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
        if args.layers and args.layers != sorted({*args.layers}):
            raise ValueError(f"--layers {args.layers} must ascend without repeats")
        args.out.mkdir(parents=True, exist_ok=True)
        (evolution if args.evolution else analyse_models)(args, device)
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"done: {args.out}: {', '.join(sorted(name for name in FILES if (args.out / name).exists()))}")


if __name__ == "__main__":
    main()
