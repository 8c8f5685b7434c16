"""Measure every layer of timm models on images, and draw the figures of three papers.

    python analyze.py                                   # teacher and student of the newest run
    python analyze.py --models runs/soft runs/spectral  # two runs beside each other, with curves
    python analyze.py --models deit_tiny_patch16_224=weights.safetensors --data DIR
    python analyze.py --evolution runs/soft             # DD Fig. 4: entropy over the training

DD is the paper Distillation Dynamics, SK is SpectralKD, EM is Encoding Mismatch (see README.md).

A model is a timm name (pretrained), NAME=FILE, NAME=random, the folder of a run (its student), or
RUN=teacher (its teacher). Controls that have learned nothing are measured beside the first model. If a
control shows the same as the model, this is no sign of learning. The numbers of each figure lie in a CSV
file beside it, and summary.md puts the published numbers beside ours.

Layers count from 1, as in the papers; only --layers takes timm's indices, from 0.
Notation: A is a layer's feature map [B, C, h, w], X its tokens [B, N, C], with N = h w.
"""
import argparse
import csv
import json
import math
import os
import re
import shlex
import sys
import tempfile
import textwrap
from functools import partial
from itertools import repeat
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from timm.data import create_transform, resolve_model_data_config
from tqdm import tqdm

import data
from losses import LossError, at_least_float32
from models import (
    HookedModel, ModelError, build_model, build_teacher, check_maps, choose_device, is_run,
    load_student, prepare_console, pretrained_config, read_config, stages)

LEVELS = (0.80, 0.90, 0.95, 0.99)  # shares of energy (EM, ranks)
BANDS = (50, 60, 70, 80, 90)  # % of energy (EM's SEP, see sep_curve)
BINS = 100  # DD Section 2.2


class UserError(ValueError):
    """A mistake of the user. main prints it as one line."""


# ---------- Metrics of one layer


def tokens_of(A):
    """Feature map [B, C, h, w] -> tokens [B, N, C]. A view, not a copy, of a ViT's map."""
    return A.flatten(2).transpose(1, 2)


def channel_spectrum(A):
    """DD Eq. 1 and 2: S[k] = mean over B, h, w of |FFT over channels / C|. [B, C, h, w] -> [C]."""
    tokens = at_least_float32(tokens_of(A))
    return torch.fft.fft(tokens, dim=-1, norm="forward").abs().mean((0, 1))


def entropy_map(A, lo, hi, bins=BINS):
    """DD Eq. 3 and 4: the entropy, in bits, of the histogram of each token's C values.

    [B, C, h, w] -> [B, h, w]. The bins are numpy.histogram's, of equal width from lo to hi. A value
    outside of lo..hi counts in the first or in the last bin.
    """
    tokens = at_least_float32(tokens_of(A)).contiguous()
    edges = np.histogram_bin_edges([], bins, (float(lo), float(hi)))
    inner_edges = torch.from_numpy(edges[1:-1]).to(tokens)
    index = torch.bucketize(tokens, inner_edges, right=True)
    counts = tokens.new_zeros(*tokens.shape[:2], bins)
    counts.scatter_add_(2, index, torch.ones_like(tokens))
    bits = torch.special.entr(counts / A.shape[1]).sum(2) / math.log(2)  # [B, N]
    return bits.unflatten(1, A.shape[2:])


def magnitude(A):
    """DD Eq. 6: the mean of |A|. A scalar."""
    return at_least_float32(A).abs().mean()


def energy_ranks(X, levels=LEVELS):
    """EM: for each image, how many of its largest energies hold at least a share `level` of their sum.

    The energies are the squared singular values of an image's tokens. They are computed as eigenvalues
    of the smaller Gram matrix. Tokens [B, N, C], not centred -> int64 [B, len(levels)].
    """
    X = at_least_float32(X)
    gram = X @ X.mT if X.shape[1] < X.shape[2] else X.mT @ X
    energies = torch.linalg.eigvalsh(gram.double()).clamp_min(0).flip(-1)
    return _smallest_k(energies, levels)


def second_moment(X):
    """The second moment of tokens, the mean of x x^T, not centred. [B, N, C] -> float64 [C, C]."""
    flat = X.reshape(-1, X.shape[-1]).double()
    return flat.mT @ flat / len(flat)


def principal_axes(moment):
    """The eigenvectors of a second moment [C, C] as columns, by falling eigenvalue."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)


def pca_ranks(X, moment, levels=LEVELS):
    """EM v2, dataset PCA: for each image, how many of the first axes hold at least a share `level`.

    The axes are those of all images' tokens, whose second moment is `moment` [C, C]. Tokens [B, N, C] ->
    int64 [B, len(levels)].
    """
    return ranks_along(principal_axes(moment), X, levels)


def ranks_along(axes, X, levels=LEVELS):
    """The same as pca_ranks, with the axes computed once for many batches."""
    energies = (X.double() @ axes).square().sum(1)
    return _smallest_k(energies, levels)


def _smallest_k(energies, levels):
    cumulative = energies.cumsum(-1)  # [B, number of energies]
    shares = torch.tensor(levels, dtype=torch.float64, device=energies.device)
    index = torch.searchsorted(cumulative, shares * cumulative[:, -1:])
    return index.clamp_max(energies.shape[1] - 1) + 1


def sep_curve(X):
    """EM, Spectral Energy Pattern (SEP): cumulative |FFT over channels|^2 of a token, in % of its total.

    [B, N, C] -> [C], in index order 0..C-1, the mean over tokens. Tokens of zeros are left out; if all
    tokens are zero, so is the curve. The text SUMMARY below says what SEP can tell.
    """
    tokens = at_least_float32(X.reshape(-1, X.shape[-1]))
    energy = torch.fft.fft(tokens, dim=-1).abs().square()
    energy = energy[energy.sum(-1) > 0]
    if not len(energy):
        return tokens.new_zeros(tokens.shape[1])
    shares = energy / energy.sum(-1, keepdim=True)
    return 100 * shares.mean(0).cumsum(-1)


def sep_bandwidth(curve, levels=BANDS):
    """EM: which share of the C frequencies a SEP curve needs to reach each level.

    Curve [C] and levels in % -> float64 [len(levels)]. Raises ValueError for a curve that does not
    end at 100 %.
    """
    if not abs(curve[-1].item() - 100) < 0.01:
        raise ValueError(f"a SEP curve is in % and ends at 100, not at {curve[-1]:g}")
    levels = torch.as_tensor(levels, dtype=curve.dtype, device=curve.device)
    reached = curve >= levels[:, None] - 1e-9  # [levels, C]
    first = torch.where(reached.any(1), reached.int().argmax(1), len(curve) - 1)
    return (first + 1).double() / len(curve)


# ---------- What is measured: images, models, controls


def open_images(name, count, seed):
    """`count` random images of a folder (of its val/ if there is one) or of a validation set.

    Returns a list of functions that each load one PIL image. Raises UserError if there are none.
    """
    folder = Path(name)
    if name != "shapes" and folder.is_dir():
        if (folder / "val").is_dir():
            folder = folder / "val"
        openers = [partial(data.load_image, path) for path in data.find_images(folder)]
    else:
        dataset = data.open_data(name).val
        openers = [partial(open_sample, dataset, index) for index in range(len(dataset))]
    if not openers:
        raise UserError(f"there are no images in {name}")
    chosen = np.random.default_rng(seed).permutation(len(openers))[:count]
    return [openers[index] for index in sorted(chosen)]


def open_sample(dataset, index):
    image, _ = dataset[index]
    return data.to_rgb(image)


class Subject:
    """A model to be measured. `measure` adds the results as attributes.

    label, short_label, look: its name in tables, its name and its line in figures
    kind: model (of timm), student (of a run), untrained or control
    build(trained): makes the timm model
    depth: how many layers the model has
    numbers, modules, shapes: of each measured layer the number (1 is the first block, 0 the stem of a
    CNN), timm's name, and the shape of its map (C, h, w)
    """

    def __init__(self, label, kind, name, build, args, device):
        self.label = label
        self.kind = kind
        self.name = name
        self.build = build
        self.device = device
        # MPS has neither float64 nor eigvalsh.
        self.metric_device = torch.device("cpu") if device.type == "mps" else device
        torch.manual_seed(args.seed)
        model = build(kind != "untrained")
        blocks = stages(model)
        layers = sorted({*(args.layers or blocks)})
        config = resolve_model_data_config(model)
        self.model = HookedModel(model, layers).eval()
        self.shapes = [A.shape[1:] for A in check_maps(self.model, config["input_size"][-1])]
        self.model.to(device)
        self.transform = create_transform(**config)
        self.modules = [model.feature_info[layer]["module"] for layer in layers]
        self.numbers = [layer - blocks[0] + 1 for layer in layers]
        self.depth = len(blocks)

    def maps(self, start, openers):
        """The feature maps [B, C, h, w] of a batch, whose first image is number `start`."""
        images = torch.stack([self.transform(opener()) for opener in openers])
        _, maps = self.model(images.to(self.device))
        return [A.to(self.metric_device) for A in maps]


class Control(Subject):
    """Random maps of a subject's shapes: white noise, or maps of rank 1.

    Rank 1: an image has one random pattern of channels, and each of its tokens is the pattern times a
    random weight. The values of an image depend only on the seed and on its number, not on the batch.
    """

    def __init__(self, label, subject, seed):
        # Layers, shapes and device are the subject's.
        vars(self).update(vars(subject), label=label, kind="control", seed=seed)

    def maps(self, start, openers):
        images = [self.draw(start + i) for i in range(len(openers))]
        return [torch.stack(layer).to(self.metric_device) for layer in zip(*images)]

    def draw(self, number):
        """The maps [C, h, w] of one image."""
        generator = torch.Generator().manual_seed(data.seed_of(self.seed, number))
        maps = []
        for C, h, w in self.shapes:
            if self.label == "white noise":
                A = torch.randn(C, h, w, generator=generator)
            else:
                pattern = torch.randn(C, 1, 1, generator=generator)
                A = pattern * torch.randn(1, h, w, generator=generator)
            maps.append(A)
        return maps


def open_subjects(args, device):
    """The models of --models, and with --controls the controls of the first one."""
    subjects = [open_model(text, args, device) for text in args.models]
    first = subjects[0]
    if args.controls:
        if ("untrained", first.name) not in [(s.kind, s.name) for s in subjects]:
            subjects.append(Subject(f"untrained {first.name}", "untrained", first.name, first.build,
                                    args, device))
        subjects.append(Control("white noise", first, args.seed))
        subjects.append(Control("rank 1", first, args.seed))
    for i, short_label in enumerate(short_labels([s.label for s in subjects])):
        subjects[i].short_label = short_label
        subjects[i].look = line_look(i)
    return subjects


def open_model(text, args, device, file="student.safetensors"):
    """A model as --models names it. Of a run: its student, with the weights of that `file`."""
    run = text.removesuffix("=teacher")
    if not is_run(run):
        name, _, source = text.partition("=")
        kind = "untrained" if source == "random" else "model"
        build = partial(build_timm, name, source, args)
    else:
        config = read_config(run)
        settings = config["settings"]
        if run != text:
            if settings["method"] == "none":
                raise UserError(f"{run} was trained without a teacher")
            kind = "untrained" if settings["teacher_weights"] == "random" else "model"
            build = partial(build_teacher_of_run, config)
            name = settings["teacher"]
        else:
            kind = "student"
            build = partial(load_student, run, file)
            name = f"{settings['variant']} {settings['student']}".removeprefix("plain ")
    return Subject(text, kind, name, build, args, device)


def build_teacher_of_run(config, trained):
    settings = argparse.Namespace(**config["settings"])
    return build_teacher(settings, config["images"]["classes"], untrained=not trained)


def build_timm(name, source, args, trained):
    """A timm model: pretrained, from a file, or untrained."""
    return build_model(
        name,
        num_classes=pretrained_config(name).num_classes,
        random_head=True,  # only the maps are used
        pretrained=trained and not source,
        weights=source if trained else None,
        img_size=args.img_size)


def newest_run():
    """--models for the run that was written last: its teacher, if it has one, and its student."""
    files = sorted(Path("runs").glob("**/student.safetensors"), key=os.path.getmtime)
    if not files:
        raise UserError("nothing to analyse: give --models or --evolution, or train first")
    run = str(files[-1].parent)
    if read_config(run)["settings"]["method"] == "none":
        return [run]
    return [f"{run}=teacher", run]


# ---------- Streaming over the images

HIGHEST = 1e15  # sums of squares of higher values do not fit into float32


def feature_maps(subject, openers, args, task):
    """Yield for each batch its feature maps, and its share of all images."""
    for start in tqdm(range(0, len(openers), args.batch_size), desc=f"{subject.label}: {task}",
                      leave=False, disable=None):
        batch = openers[start:start + args.batch_size]
        yield subject.maps(start, batch), len(batch) / len(openers)


def first_pass(subject, openers, args):
    """-> lowest and highest value of each layer, second moment of the last layer's tokens."""
    lows = torch.tensor([math.inf] * len(subject.modules))
    highs = -lows
    moment = 0
    for maps, weight in feature_maps(subject, openers, args, "ranges"):
        lows = torch.minimum(lows, torch.tensor([A.min().item() for A in maps]))
        highs = torch.maximum(highs, torch.tensor([A.max().item() for A in maps]))
        moment = moment + second_moment(tokens_of(maps[-1])) * weight
    largest = torch.maximum(-lows, highs).max().item()
    if not largest < HIGHEST:  # also true for NaN
        raise UserError(f"{subject.label} yields values up to {largest:g} on these images: "
                        f"only finite ones below {HIGHEST:g} can be measured")
    return lows, highs, moment


@torch.inference_mode()
def measure(subject, openers, args):
    """All metrics of a subject, in two passes. Of each image only its ranks are kept."""
    lows, highs, moment = first_pass(subject, openers, args)
    axes = principal_axes(moment)
    generator = torch.Generator().manual_seed(args.seed)
    permutation = torch.randperm(len(moment), generator=generator)  # of the channels, to test SEP
    by_layer = {}  # {name: a number for each layer, the mean over images}
    svd = []
    pca = []
    curves = 0
    live_tokens = 0
    for maps, weight in feature_maps(subject, openers, args, "metrics"):
        for layer, A in enumerate(maps):
            found = {"magnitude": magnitude(A), "spectra": channel_spectrum(A)}
            for name in args.entropy_range:
                ends = (lows[layer], highs[layer]) if name == "layer" else (lows.min(), highs.max())
                found[RANGES[name]] = entropy_map(A, *ends).mean()
            if args.layer_ranks or layer == len(maps) - 1:
                ranks = energy_ranks(tokens_of(A))
                found["svd_layers"] = ranks[:, -1].double().mean()
            for key, value in found.items():
                means = by_layer.setdefault(key, [0] * len(maps))
                means[layer] += value.double().cpu().numpy() * weight

        X = tokens_of(maps[-1])
        svd.append(ranks.cpu())  # of the last layer
        pca.append(ranks_along(axes, X).cpu())
        live = X.any(2).sum().item()  # the tokens that sep_curve does not leave out
        both = torch.stack([sep_curve(X), sep_curve(X[..., permutation])])
        curves = curves + both.double().cpu() * live
        live_tokens += live

    if not args.layer_ranks:
        del by_layer["svd_layers"]
    subject.spectra = by_layer.pop("spectra")
    by_layer["intensity"] = [S.mean() for S in subject.spectra]
    subject.by_layer = by_layer
    subject.ranks = {"svd": torch.cat(svd).numpy(), "pca": torch.cat(pca).numpy()}
    subject.sep, subject.sep_permuted = curves / max(1, live_tokens)
    subject.tokens, subject.channels = X.shape[1:]


# ---------- Tables

# For each --entropy-range the name of its values in `by_layer`, and of its figure.
RANGES = {"global": "entropy", "layer": "entropy_layer"}
# What has a value for each layer: the column of its CSV, the axis and the title of its figure.
BY_LAYER = {
    "entropy": ("entropy_bits", "entropy (bits)", "Entropy by layer (DD Eq. 3-5):\n"
                "each model over its own range, all its layers together"),
    "entropy_layer": ("entropy_bits", "entropy (bits)", "Entropy by layer (DD Eq. 3-5):\n"
                      "each layer over its own range"),
    "magnitude": ("mean_abs_activation", "mean |activation|", "Magnitude by layer (DD Eq. 6)"),
    "intensity": ("mean_spectrum", "mean of S[k] over k", "Intensity by layer (SK)"),
    "svd_layers": ("mean_rank_99", "mean rank at 99 % energy", "SVD rank by layer (EM)"),
}


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        for row in rows:
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])


def entropy_rows(subject, *first):
    """Rows of a table of entropies: the values in `first`, then layer, module, range, entropy."""
    rows = []
    for name, key in RANGES.items():
        bits = subject.by_layer.get(key, ())
        for row in zip(subject.numbers, subject.modules, repeat(name), bits):
            rows.append((*first, *row))
    return rows


def write_tables(subjects, folder):
    entropy = []
    spectra = []
    ranks = []
    sep = []
    for s in subjects:
        entropy += entropy_rows(s, s.label)
        for number, module, S in zip(s.numbers, s.modules, s.spectra):
            for k, value in enumerate(S):
                spectra.append((s.label, number, module, k, value))
        for method, table in s.ranks.items():
            for image, row in enumerate(table):
                ranks.append((s.label, image, method, *row))
        channels = range(1, s.channels + 1)
        sep += zip(repeat(s.label), channels, s.sep.tolist(), s.sep_permuted.tolist())
    write_csv(folder / "entropy.csv", "model,layer,module,range,entropy_bits", entropy)
    write_csv(folder / "spectra.csv", "model,layer,module,k,magnitude", spectra)
    levels = ",".join([f"rank_{level:.0%}" for level in LEVELS])
    write_csv(folder / "ranks.csv", f"model,image,method,{levels}", ranks)
    write_csv(folder / "sep.csv", "model,channels,sep_percent,sep_percent_permuted", sep)
    for key in subjects[0].by_layer.keys() - RANGES.values():  # entropy.csv holds the entropies
        rows = []
        for s in subjects:
            rows += zip(repeat(s.label), s.numbers, s.modules, s.by_layer[key])
        write_csv(folder / f"{key}.csv", f"model,layer,module,{BY_LAYER[key][0]}", rows)


# The full name of timm's weights; EM's ranks of the last layer by SVD and by dataset PCA,
# its SEP bandwidths, at the levels that SUMMARY names; the layer of the lowest entropy in DD Figs. 1, 5, 6.
PUBLISHED = """\
vit_tiny_patch16_224.augreg_in21k               1/2/7/52      1/17/71/154     -                        -
cait_s24_224.fb_dist_in1k                       14/34/61/121  167/247/302/359 .500/.599/.703/.805/.901 8-9
deit_small_patch16_224.fb_in1k                  30/59/89/146  205/278/324/369 .503/.602/.701/.797/.901 -
swin_small_patch4_window7_224.ms_in22k_ft_in1k  3/7/15/33     129/336/495/691 .501/.599/.701/.799/.901 -
vit_large_patch16_224.augreg_in21k              5/16/39/115   255/498/694/933 -                        -
vit_base_patch16_224.dino                       39/75/109/165 382/529/624/731 -                        -
vit_small_patch16_224.dino                      -             -               .477/.583/.690/.792/.896 -
vit_base_patch14_dinov2.lvd142m                 19/39/67/146  384/519/606/704 -                        -
vit_base_patch16_224.mae                        1/7/34/113    1/58/235/585    -                        4
vit_base_patch16_clip_224.laion2b_ft_in12k_in1k 6/27/60/135   129/340/502/704 -                        -
vit_base_patch16_224.augreg2_in21k_ft_in1k      -             -               -                        9
"""
SUMMARY = """# {count} images of {data}

`{command}`

## Depth (DD Figs. 1, 2, 5, 6)

Layers counted from 1. A U falls to a minimum inside and rises again.

| model | entropy range | first | minimum (layer) | last | published minimum | magnitude first | \
magnitude minimum (layer) | magnitude last |
|---|---|---|---|---|---|---|---|---|
{depth}

## Ranks of the last layer, 99th percentile over images, at 80/90/95/99 % energy (EM)

No SVD rank can exceed min(N tokens, C channels), no PCA rank C.

| model | N | C | SVD | published | dataset PCA | published |
|---|---|---|---|---|---|---|
{ranks}

## SEP bandwidth at 50/60/70/80/90 % (EM)

Compare with noise and the rank-1 pattern, because SEP alone says little. Channels have no order,
so a token's spectrum over them is flat on average, except at frequency 0 (its mean). The curve of a
flat spectrum is the diagonal, .5/.6/.7/.8/.9, whatever the rank: it shows that neighbouring
channels are unrelated, and nothing more.

| model | bandwidth | published | channels permuted | mean difference (points) |
|---|---|---|---|---|
{sep}

## Intensity by depth, compared with {reference} (SK)

| model | Pearson's r of the profiles | mean distance (octaves) |
|---|---|---|
{intensity}
"""


def published(subject):
    """The papers' [SVD, PCA, SEP, minimum], if this is one of their models with trained weights."""
    if subject.kind == "model":
        config = timm.get_pretrained_cfg(subject.name)
        for line in PUBLISHED.splitlines():
            name, *numbers = line.split()
            if name == f"{config.architecture}.{config.tag}":
                return numbers
    return repeat("-", 4)


def relative_depth(subject):
    """0 for the first layer of a model, 1 for its last; a stem lies below 0."""
    return (np.array(subject.numbers) - 1) / max(1, subject.depth - 1)


def closeness(subject, reference):
    """SK: Pearson's r of two intensity profiles over relative depth, and their mean |log2 ratio|.

    NaN or infinity for flat profiles, for layers of zeros, or without two layers in common.
    """
    theirs = np.array(reference.by_layer["intensity"])
    ours = np.interp(relative_depth(reference), relative_depth(subject),
                     subject.by_layer["intensity"], np.nan, np.nan)
    common = np.isfinite(ours)  # np.interp puts NaN where only the reference has layers
    ours = ours[common]
    theirs = theirs[common]
    if len(ours) < 2:
        return math.nan, math.nan
    with np.errstate(all="ignore"):  # NaN and infinity become "-"
        r = np.corrcoef(ours, theirs)[0, 1]
        distance = np.abs(np.log2(ours / theirs)).mean()
    return r, distance


def markdown(rows):
    """The rows of a Markdown table."""
    lines = []
    for row in rows:
        cells = [str(cell).replace("|", r"\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number_cell(value):
    return f"{value:.3f}" if math.isfinite(value) else "-"


def profile_cells(subject, key):
    values = subject.by_layer[key]
    lowest = int(np.argmin(values))
    minimum = f"{values[lowest]:.3f} ({subject.numbers[lowest]})"
    return [f"{values[0]:.3f}", minimum, f"{values[-1]:.3f}"]


def last_layer_cells(subject):
    """-> SVD ranks, PCA ranks, bandwidths of both SEP curves and their mean difference."""
    if not subject.sep.any():  # a layer of zeros
        return repeat("-", 5)
    cells = []
    for ranks in subject.ranks.values():
        percentiles = np.percentile(ranks, 99, axis=0)
        cells.append("/".join([f"{rank:.0f}" for rank in percentiles]))
    for curve in (subject.sep, subject.sep_permuted):
        shares = sep_bandwidth(curve).tolist()
        cells.append("/".join([f"{share:.3f}".removeprefix("0") for share in shares]))
    cells.append(number_cell((subject.sep - subject.sep_permuted).abs().mean()))
    return cells


def write_summary(subjects, image_count, args, path):
    """summary.md: ours and, where a model is one of the papers', the published numbers."""
    reference = subjects[0]
    depth = []
    ranks = []
    sep = []
    intensity = []
    for s in subjects:
        paper_svd, paper_pca, paper_bands, paper_minimum = published(s)
        for name in args.entropy_range:
            bits = profile_cells(s, RANGES[name])
            depth.append([s.label, name, *bits, paper_minimum, *profile_cells(s, "magnitude")])
        svd, pca, bands, permuted, difference = last_layer_cells(s)
        ranks.append([s.label, s.tokens, s.channels, svd, paper_svd, pca, paper_pca])
        sep.append([s.label, bands, paper_bands, permuted, difference])
        if s is not reference:
            r, distance = closeness(s, reference)
            intensity.append([s.label, number_cell(r), number_cell(distance)])
    text = SUMMARY.format(
        count=image_count,
        data=Path(args.data).name,
        command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        depth=markdown(depth),
        ranks=markdown(ranks),
        sep=markdown(sep),
        reference=reference.label,
        intensity=markdown(intensity))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


# ---------- Figures

# 7 dashes beside 8 colours and markers: the first 56 lines differ, without colour too.
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 4)))
MARKERS = "os^DvxP*"
COLOURS = "#000000 #c1440e #2a6fbb #7a7a7a #b08d57 #8fbf8f #5e3c99 #d98cb3".split()
matplotlib.rcParams.update({
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "errorbar.capsize": 3,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "savefig.dpi": 110,
})


def line_look(i):
    """How the line of model i looks."""
    return dict(color=COLOURS[i % 8], linestyle=DASHES[i % 7], marker=MARKERS[i % 8])


def short_labels(labels, width=50):
    """Labels for figures: without the leading folders that do not tell them apart, and wrapped."""
    labels = [label.rstrip("/\\") for label in labels]
    short = labels
    for folders in range(1, 99):  # the deepest cut that still tells all labels apart is kept
        cut = [re.sub(r"[^/\\=]*[/\\]", "", label, count=folders) for label in labels]
        if len({*cut}) == len(labels):
            short = cut
    return [textwrap.fill(plain_text(label), width) for label in short]


def plain_text(text):
    """Text that matplotlib draws as it is."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    text = text.replace("$", r"\$")  # else it begins a formula
    return f" {text}" if text.startswith("_") else text  # else it is left out of legends


def save(figure, path, ncols=2):
    """Write a figure with one legend below all its panels."""
    handles = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, lines))
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=ncols)
    figure.savefig(path)


def draw_by_depth(key, panels, path):
    """Draw what has a value for each layer. `panels`: {title of a panel: the subjects in it}.

    Models of different depths, or with different layers, share the axis by relative depth.
    """
    figure = Figure(figsize=(2.4 * len(panels) + 4, 4.2))
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    _, ylabel, title = BY_LAYER[key]
    for axes, (panel_title, subjects) in zip(grid, panels.items()):
        same_layers = len({(s.depth, *s.numbers) for s in subjects}) == 1
        for s in subjects:
            x = s.numbers if same_layers else relative_depth(s)
            axes.plot(x, s.by_layer[key], label=s.short_label, **s.look)
        axes.set_title(panel_title)
        axes.set_xlabel("layer" if same_layers else "relative depth (0: first layer, 1: last)")
        axes.xaxis.get_major_locator().set_params(integer=same_layers)
    grid[0].set_ylabel(ylabel)
    figure.suptitle(title)
    save(figure, path)


def shown_layers(count):
    """All of a few layers; of many the first two, the middle two and the last two."""
    if count < 7:
        return range(count)
    middle = count // 2
    return [0, 1, middle - 1, middle, count - 2, count - 1]


def draw_spectra(subjects, path):
    """DD Figs. 3 and 7: S[k] for k < C/2 (the rest mirrors it), a row for each model."""
    figure = Figure(figsize=(10, 1.75 * len(subjects) + 0.4))
    strips = figure.subfigures(len(subjects), 1, squeeze=False)[:, 0]
    for s, strip in zip(subjects, strips):
        strip.suptitle(s.short_label, fontweight="bold", x=0.01, ha="left")
        layers = shown_layers(len(s.modules))
        row = strip.subplots(1, len(layers), sharey=True, squeeze=False)[0]
        for axes, layer in zip(row, layers):
            S = s.spectra[layer]
            half = S[:(len(S) + 1) // 2]
            axes.plot(np.arange(len(half)) / len(S), half, color="black", linewidth=0.8)
            axes.set_title(f"layer {s.numbers[layer]} of {s.depth}")
        row[0].set_ylabel("S[k]")
        values = np.concatenate(s.spectra)
        if 0 < 30 * np.median(values) < values.max():
            row[0].set_yscale("log")  # else one peak flattens all the rest
        else:
            row[0].set_ylim(bottom=0)
    figure.supxlabel("k / C, frequency over channels; S[k]: mean magnitude, one scale a model")
    save(figure, path)


def draw_ranks(subjects, path):
    """EM: histogram over images of the rank at 99 % energy, by SVD of each and by dataset PCA."""
    figure = Figure(figsize=(6.4, 1.35 * len(subjects) + 0.9))
    panels = figure.subplots(len(subjects), 1, squeeze=False, sharex=True)[:, 0]
    bins = np.linspace(0.5, max(s.channels for s in subjects) + 0.5, 49)
    for s, axes in zip(subjects, panels):
        svd = s.ranks["svd"][:, -1]
        pca = s.ranks["pca"][:, -1]
        axes.hist(svd, bins, color="black", label="SVD of each image")
        axes.hist(pca, bins, fill=False, edgecolor="#c1440e", hatch="////", label="dataset PCA")
        axes.axvline(min(s.tokens, s.channels) + 0.5, color="#2a6fbb", linestyle="--",
                     label="min(tokens, channels): the highest SVD rank")
        axes.axvline(s.channels + 0.5, color="gray", linestyle=":",
                     label="channels: the highest PCA rank")
        axes.set_title(f"{s.short_label}: {s.tokens} tokens, {s.channels} channels")
        axes.set_ylabel("images")
    panels[-1].set_xlabel("dimensions that hold 99 % of an image's energy in the last layer")
    save(figure, path)


def draw_sep(subjects, path):
    """EM: SEP curves over the share of channels, and by how much they differ from the diagonal."""
    figure = Figure(figsize=(9, 3.8 + 0.1 * len(subjects)))
    left, right = figure.subplots(1, 2)
    for s in subjects:
        share = np.arange(1, s.channels + 1) / s.channels
        left.plot(share, s.sep, label=s.short_label, markevery=0.1, **s.look)
        right.plot(share, s.sep.numpy() - 100 * share, markevery=0.1, **s.look)
    left.set(title="SEP", ylabel="cumulative energy (%)", xlabel="share of channels, index order")
    right.set(title="less the diagonal", ylabel="difference (points)", xlabel="share of channels")
    save(figure, path, ncols=3)


def draw_all(subjects, folder):
    for key in subjects[0].by_layer:
        draw_by_depth(key, {"": subjects}, folder / f"{key}.png")
    draw_spectra(subjects, folder / "spectra.png")
    draw_ranks(subjects, folder / "ranks.png")
    draw_sep(subjects, folder / "sep.png")


# ---------- Runs: curves, and DD Fig. 4


def read_log(run):
    """A record for each epoch of a run; none in a folder that was shared without its log."""
    path = Path(run) / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def draw_curves(logs, path):
    """Loss terms and accuracy by epoch, a column for each run: {its folder: its log}."""
    figure = Figure(figsize=(3.6 * len(logs) + 0.9, 5.6))
    grid = figure.subplots(2, len(logs), squeeze=False, sharey="row", sharex="col")
    for title, log, upper, lower in zip(short_labels(logs), logs.values(), *grid):
        epochs = range(1, len(log) + 1)
        for term, dash in zip(log[0]["terms"], DASHES):
            values = [record["terms"][term] or math.nan for record in log]  # a log axis has no 0
            upper.plot(epochs, values, marker=".", linestyle=dash, label=term)
        lower.plot(epochs, [record["top1"] for record in log], ".-", label="student")
        lower.plot(epochs, [record["ema_top1"] for record in log], ".--", label="its EMA")
        upper.set(title=title, yscale="log")
        lower.set_xlabel("epoch")
        lower.xaxis.get_major_locator().set_params(integer=True)
        upper.legend()
        lower.legend()
    grid[0, 0].set_ylabel("weighted loss term")
    grid[1, 0].set_ylabel("validation top-1 (%)")
    figure.savefig(path)


def analyse_evolution(args, device, folder):
    """DD Fig. 4, entropy by layer at the snapshots of runs: a table, and a figure a range."""
    args.layer_ranks = False  # the ranks are neither drawn nor written here
    panels = {}
    rows = []
    for run, title in zip(args.evolution, short_labels(args.evolution, width=28)):
        files = sorted(Path(run).glob("epoch_[0-9]*.pt"))
        if not files:
            raise UserError(f"{run} is not the folder of a run that has snapshots (epoch_NNNN.pt)")
        data_name = args.data or read_config(run)["settings"]["data"]
        openers = open_images(data_name, args.images, args.seed)
        panels[title] = []
        for i, file in enumerate(files, 1):
            subject = open_model(run, args, device, file.name)
            epoch = int(file.stem.removeprefix("epoch_"))
            subject.short_label = f"epoch {epoch}"
            subject.look = dict(color=str(0.85 * (1 - i / len(files))))  # the last is black
            measure(subject, openers, args)
            subject.model = None  # its memory is needed for the next one
            panels[title].append(subject)
            rows += entropy_rows(subject, run, epoch)
    write_csv(folder / "evolution.csv", "run,epoch,layer,module,range,entropy_bits", rows)
    for name in args.entropy_range:
        key = RANGES[name]
        draw_by_depth(key, panels, folder / f"{key.replace('entropy', 'evolution')}.png")


# ---------- The program

# All that a call can write.
FILES = """
summary.md curves.png evolution.csv evolution.png evolution_layer.png
entropy.csv entropy.png entropy_layer.png magnitude.csv magnitude.png intensity.csv intensity.png
svd_layers.csv svd_layers.png spectra.csv spectra.png ranks.csv ranks.png sep.csv sep.png
""".split()


def positive_int(text, least=1):
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    return int(text)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(str(message).split())}\n")
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--models", nargs="+", help="NAME, NAME=FILE, NAME=random, RUN or RUN=teacher")
    what.add_argument("--evolution", nargs="+", help="folders of runs with snapshots")
    add("--data",
        help="folder of images, shapes, torch/NAME, hfds/NAME (default: a run's own, or shapes)")
    add("--images", type=positive_int, default=32, help="chosen at random (DD: 32, EM: 1000)")
    add("--layers", type=int, nargs="+",
        help="timm's indices, from 0 (default: all); figures and tables count from 1")
    add("--entropy-range", nargs="+", choices=RANGES, default=["global"],
        help="of the histograms: all layers of a model together (as in DD), or each layer's own")
    add("--layer-ranks", action=switch, default=True, help="SVD of every layer")
    add("--controls", action=switch, default=True,
        help="beside the models: the first one untrained, white noise, a rank-1 pattern")
    add("--img-size", type=positive_int, help="of timm models that can be built for another size")
    add("--batch-size", type=positive_int, default=16)
    add("--seed", type=partial(positive_int, least=0), default=0)
    add("--device", choices=("cpu", "cuda", "mps"), help="default: cuda, else mps, else cpu")
    add("--out", type=Path, default=Path("runs/analysis"),
        help="what an earlier call wrote there is replaced")
    return parser


def analyse_models(args, device, folder):
    """Every metric, table and figure of the models of the command line, or of the newest run."""
    args.models = args.models or newest_run()
    logs = {}
    for text in args.models:
        run = text.removesuffix("=teacher")
        if is_run(run):
            args.data = args.data or read_config(run)["settings"]["data"]
            log = read_log(run)
            if log:
                logs[run] = log
    args.data = args.data or "shapes"
    openers = open_images(args.data, args.images, args.seed)
    subjects = open_subjects(args, device)
    print(f"on {args.data}: {', '.join(s.label for s in subjects)}", flush=True)
    for subject in subjects:
        measure(subject, openers, args)
    write_tables(subjects, folder)
    write_summary(subjects, len(openers), args, folder / "summary.md")
    draw_all(subjects, folder)
    if logs:
        draw_curves(logs, folder / "curves.png")


def move_files(folder, out):
    """Put a call's files in the place of an earlier call's, if there was one. -> their names"""
    if (out / "summary.md").exists() or (out / "evolution.csv").exists():
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    names = sorted(os.listdir(folder))
    for name in names:
        os.replace(folder / name, out / name)
    return names


def main(argv=None):
    prepare_console()
    parser = make_parser()
    args = parser.parse_args(argv)
    analyse = analyse_evolution if args.evolution else analyse_models
    try:
        device = choose_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        # All files appear at the end together, or none. The folder lies within --out because a file
        # cannot be moved to another disk in one step.
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            analyse(args, device, Path(folder))
            names = move_files(Path(folder), args.out)
    except (UserError, ModelError, data.DataError, LossError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: nothing was written\n")
    print(f"done: {args.out}: {', '.join(names)}")


if __name__ == "__main__":
    main()
