"""Measure every layer of timm models on images, draw the papers' figures, and set null controls beside them.

    python analyze.py                                              # the newest run: its teacher, its student, untrained
    python analyze.py --models cait_s24_224 --data /data/imagenet/val
    python analyze.py --models deit_tiny_patch16_224=weights.safetensors deit_tiny_patch16_224=random --data DIR
    python analyze.py --models cait_toy_patch8_32=weights/cait_toy_shapes.safetensors runs/spectral runs/none
    python analyze.py --evolution runs/soft runs/spectral          # DD Fig. 4: entropy by layer over training
    python analyze.py --study runs/study --out results             # accuracy by method and by dose, over seeds

A model is a timm name (pretrained), NAME=FILE, NAME=random, or the folder of a run (its student). The first is the
one that the others are compared with. Each CSV lies beside the PNG that is drawn from it; summary.md puts the
published numbers beside ours. Layers count from 1, as in the papers; only --layers has timm's indices, from 0.
Notation: A a layer's feature map [B, C, h, w]; X its tokens [B, N, C].
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                        # Ctrl-C: no traceback, even while importing

import argparse
import csv
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ParseKwargs
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import data
from losses import METHODS
from models import HookedModel, build_model, load_student, read_config, stages

HERE = Path(__file__).resolve().parent
LEVELS = (0.80, 0.90, 0.95, 0.99)                                       # shares of energy (EM tables)
BANDS = (50, 60, 70, 80, 90)                                            # % of energy (EM, SEP)
BINS = 100                                                              # DD Section 2.2

# ----------------------------------------------------------------------------------------------------
# Metrics of one layer


def tokens_of(A):
    """Feature map [B, C, h, w] -> tokens [B, N, C]; no copy for the maps of ViTs."""
    return A.flatten(2).transpose(1, 2)


def channel_spectrum(A):
    """DD Eq. 1 and 2: S[k] = mean over B, h, w of |FFT over channels / C|. [B, C, h, w] -> [C]."""
    C = A.shape[1]
    return _mirrored(torch.fft.rfft(_full(tokens_of(A)), dim=-1, norm="forward").abs().mean((0, 1)), C)


def _mirrored(half, C):
    """All C frequencies from the non-negative ones: the spectrum of real values is symmetric."""
    return torch.cat([half, half[..., 1:(C + 1) // 2].flip(-1)], dim=-1)


def entropy_map(A, lo, hi, bins=BINS):
    """DD Eq. 3 and 4: the entropy (bits) of the histogram of each token's C values, in equal bins from lo to hi.

    [B, C, h, w] -> [B, h, w]. Bins as numpy.histogram's, whose last one is closed; values outside count at the ends.
    """
    B, C, h, w = A.shape
    tokens = _full(tokens_of(A)).reshape(-1, C).contiguous()
    lo, hi = float(lo), float(hi)
    lo, hi = (lo, hi) if hi > lo else (lo - 0.5, hi + 0.5)              # as NumPy does for constant input
    edges = torch.from_numpy(np.linspace(lo, hi, bins + 1)).to(tokens)
    share = torch.arange(C + 1, dtype=torch.float64) / C                # p for every possible count
    bits = (-torch.special.xlogy(share, share) / math.log(2)).to(tokens)
    scale = bins / (hi - lo)
    entropies = []
    for part in tokens.split(max(1, 2 ** 16 // C)):                     # small enough for a core's cache
        position = torch.add(torch.full((), -lo * scale).to(part), part, alpha=scale)
        index = position.clamp_(0, bins - 0.5).int()
        # Rounding can misplace only what lies next to an edge: compare that with the edges themselves.
        close = (position.frac_().sub_(0.5).abs_() > 0.499).flatten().nonzero()[:, 0]
        index.view(-1)[close] = torch.bucketize(part.flatten()[close], edges[1:-1], right=True, out_int32=True)
        index += torch.arange(0, len(part) * bins, bins, dtype=torch.int32, device=part.device)[:, None]
        counts = torch.bincount(index.flatten(), minlength=len(part) * bins)
        entropies.append(bits.take(counts).view(-1, bins).sum(1))
    return torch.cat(entropies).view(B, h, w)


def magnitude(A):
    """DD Eq. 6: the mean of |A|. A scalar."""
    return _full(A).abs().mean()


def energy_ranks(X, levels=LEVELS):
    """EM: for each image the smallest k whose k largest squared singular values hold a share >= level of all.

    Tokens [B, N, C], not centred -> int64 [B, len(levels)]. Squared singular values are the eigenvalues of the smaller
    Gram matrix, found in float64.
    """
    X = _full(X)
    gram = X @ X.mT if X.shape[1] < X.shape[2] else X.mT @ X
    energies = torch.linalg.eigvalsh(gram.double()).clamp_min(0).flip(-1)
    return _smallest_k(energies, levels)


def second_moment(X):
    """The uncentred second moment of tokens, the mean of x x^T: [B, N, C] -> float64 [C, C]."""
    flat = X.reshape(-1, X.shape[-1]).double()
    return flat.mT @ flat / len(flat)


def pca_ranks(X, moment, levels=LEVELS):
    """EM v2, dataset PCA: for each image the smallest k whose first k eigenvectors of `moment` hold a share >= level.

    Tokens [B, N, C], second moment [C, C] of all images' tokens -> int64 [B, len(levels)].
    """
    axes = torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)     # by falling eigenvalue
    return _smallest_k((X.double() @ axes).square().sum(1), levels)


def _smallest_k(energies, levels):
    cumulative = energies.cumsum(-1)                                    # [B, C]
    wanted = torch.tensor(levels, dtype=torch.float64, device=energies.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted).clamp_max(energies.shape[1] - 1) + 1


def sep_curve(X):
    """EM, Spectral Energy Pattern: the cumulative |FFT over channels|^2 of a token, in index order 0..C-1, in % of its
    whole, mean over tokens. [B, N, C] -> [C]. Tokens of zeros, which have no pattern, are left out.

    Channels in no order give the diagonal, be it noise or a model: what leaves it are a mean other than 0 (index 0)
    and channels like their neighbours.
    """
    C = X.shape[-1]
    tokens = _full(X.reshape(-1, C))
    energy = _mirrored(torch.fft.rfft(tokens, dim=-1).abs().square(), C)
    energy = energy[energy.sum(-1) > 0]
    if not len(energy):
        return torch.zeros(C, dtype=tokens.dtype, device=tokens.device)
    return 100 * (energy / energy.sum(-1, keepdim=True)).mean(0).cumsum(-1)


def sep_bandwidth(curve, levels=BANDS):
    """EM: the first index, counted from 1, at which the SEP curve reaches each level (%), as a share of C."""
    reached = curve[None] >= torch.as_tensor(levels, dtype=curve.dtype, device=curve.device)[:, None] - 1e-9
    first = torch.where(reached.any(1), reached.int().argmax(1), len(curve) - 1)
    return (first + 1).double() / len(curve)


def _full(x):
    return x if x.dtype == torch.float64 else x.float()


# ----------------------------------------------------------------------------------------------------
# What is measured: images, models, null controls

EMBEDDED = "weights/cait_toy_shapes.safetensors"                        # the teacher that comes with this file


def open_images(name, count, seed):
    """`count` random images of a folder (searched in depth; its val/ if it has one) or of a data set's validation half.

    Returns a list of functions that each load one PIL image. Raises ValueError if there are none.
    """
    folder = Path(name)
    if name == "shapes" or name.startswith(("torch/", "hfds/")):
        _, dataset, _ = data.open_data(name)
        found = [lambda i=i: dataset[i][0].convert("RGB") for i in range(len(dataset))]
    elif folder.is_dir():
        folder = folder / "val" if (folder / "val").is_dir() else folder
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        found = [partial(load_image, path) for path in paths]
    else:
        raise ValueError(f"{name} is neither a folder of images nor shapes, torch/NAME or hfds/NAME")
    if not found:
        raise ValueError(f"no images in {folder}")
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in sorted(chosen)]


def load_image(path):
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from error


class Subject:
    """A model to be measured, and what was measured. `kind`: teacher, student, model, untrained or control.

    `build(trained)` makes the timm model; `label` names it in tables and legends. `numbers`: its layers counted from 1
    (a CNN's stem is 0), of `depth`; `modules`: timm's names for them. `load`: the functions that load its images.
    """

    def __init__(self, kind, name, path, build, args, device):
        self.kind, self.name, self.path, self.build, self.device = kind, name, path, build, device
        short = name.replace("_patch8_32", "")
        self.label = f"student {path.name}" if kind == "student" else f"{kind} {short}".removeprefix("model ")
        torch.manual_seed(args.seed)
        model = build(kind != "untrained")
        blocks = stages(model) or list(range(len(model.feature_info)))
        layers = args.layers or blocks
        self.model = HookedModel(model, layers).eval().to(device)
        config = resolve_model_data_config(model)
        self.transform = create_transform(**{**config, "input_size": config["input_size"][-1]})
        self.modules = [model.feature_info[layer]["module"] for layer in layers]
        self.numbers, self.depth = [layer - blocks[0] + 1 for layer in layers], len(blocks)

    def maps(self, start, images):
        """The feature maps of the layers for one batch of images, the first of which is number `start`."""
        maps = self.model(images)[1]
        # MPS knows neither float64 nor eigvalsh: there the model runs, and the CPU measures.
        return [A.cpu() if A.device.type == "mps" else A for A in maps]


class Control(Subject):
    """Maps that hold nothing, shaped as a subject's: Gaussian noise, or one pattern times one weight a token."""

    def __init__(self, label, subject, seed):
        vars(self).update(vars(subject), kind="control", name=label, label=label)
        self.subject, self.seed, self.like = subject, seed, None

    def maps(self, start, images):
        generator = torch.Generator().manual_seed(data.seed_of(self.seed, start))
        self.like, maps = self.like or self.subject.maps(start, images[:1]), []
        for like in self.like:
            count, (C, h, w) = len(images), like.shape[1:]
            shapes = [(count, C, h, w)] if self.label == "white noise" else [(count, C, 1, 1), (count, 1, h, w)]
            maps.append(math.prod(torch.randn(shape, generator=generator) for shape in shapes).to(like.device))
        return maps


def open_subjects(args, device, run=None):
    """The models of --models, or teacher and student of a run; with --controls the first one's null controls."""
    subjects = open_teacher(run, args, device) if run else []
    options = {"img_size": args.img_size, **args.model_kwargs}
    subjects += [open_model(text, args, device, options) for text in args.models or [str(run)]]
    first = subjects[0]
    if args.controls:
        if ("untrained", first.name) not in [(subject.kind, subject.name) for subject in subjects]:
            subjects.append(Subject("untrained", first.name, None, first.build, args, device))
        subjects += [Control(label, first, args.seed) for label in ("white noise", "rank 1")]
    tell_apart(subjects)
    return subjects


def open_model(text, args, device, options, kind="model", file="student.safetensors"):
    """The folder of a run (its student), or NAME (a timm model, pretrained), NAME=FILE, NAME=random."""
    run = Path(text)
    if (run / "config.json").is_file():
        settings = read_config(run)["settings"]
        name = f"{settings['variant']} {settings['student']}".removeprefix("plain ")
        kind = "student" if kind == "model" else kind
        return Subject(kind, name, run.resolve(), lambda trained: load_student(run, file, trained), args, device)
    name, _, source = text.partition("=")
    classes = timm.get_pretrained_cfg(name).num_classes if timm.is_model(name) else 1   # no matter: only maps are used

    def build(trained):
        return build_model(name, num_classes=classes, random_head=True, **options,
                           pretrained=trained and not source, weights=source if trained else None)

    if source == "random":
        return Subject("untrained", name, None, build, args, device)
    return Subject(kind, name, Path(source).resolve() if source else None, build, args, device)


def open_teacher(run, args, device):
    """The teacher of a run in a list, which is empty if it had none; on `shapes` the embedded one stands in."""
    settings = read_config(run)["settings"]
    if settings["method"] == "none":
        settings.update(teacher="cait_toy_patch8_32", teacher_weights=EMBEDDED, teacher_kwargs=None, img_size=None)
        if settings["data"] != "shapes":
            return []
    text, weights = settings["teacher"], settings["teacher_weights"]
    if weights:
        weights = str(HERE / weights) if weights == EMBEDDED else weights   # from any working folder, as in train_kd.py
        text = weights if (Path(weights) / "config.json").is_file() else f"{text}={weights}"
    options = {"img_size": settings["img_size"], **(settings.get("teacher_kwargs") or {})}
    return [open_model(text, args, device, options, kind="teacher")]


def tell_apart(subjects):
    """Make equal labels differ: those of runs by their parent folders, those of models by their files."""
    labels = [subject.label for subject in subjects]
    for label in {label for label in labels if labels.count(label) > 1}:
        alike = [subject for subject in subjects if subject.label == label]
        for subject, name in zip(alike, endings([subject.path or Path() for subject in alike])):
            subject.label = f"student {name}" if subject.kind == "student" else f"{label} ({name})" if name else label


def endings(paths):
    """The last name of each path, with as many of its parents as tell it apart. Raises ValueError for equals."""
    if len({*paths}) < len(paths):
        raise ValueError("the same model or run is given twice")
    short = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        short = ["/".join(path.parts[-depth:]) if short.count(name) > 1 else name for path, name in zip(paths, short)]
    return short


# ----------------------------------------------------------------------------------------------------
# Streaming over the images

RANGES = {"global": "each {} over its own range, all its layers together", "layer": "each layer over its own range",
          "percentile": "each {} over its own 0.1 to 99.9 percentiles, all its layers together",
          "shared": "all {}s over one range"}                           # of the entropy's histograms
FINE = 2 ** 15                                                          # bins in arcsinh(1000 x), 0.1 % wide


def batches(subject, args, stage):
    """Yield the feature maps of one batch of images, and the share of all images that are in it."""
    load, size = subject.load, args.batch_size
    for start in tqdm(range(0, len(load), size), desc=f"{subject.label}: {stage}", leave=False, disable=None):
        images = torch.stack([subject.transform(get()) for get in load[start:start + size]])
        yield subject.maps(start, images.to(subject.device, non_blocking=True)), len(images) / len(load)


@torch.inference_mode()
def measure(subjects, args):
    """All metrics of all subjects on their images; nothing that grows with the images is kept but the ranks."""
    for subject in subjects:
        find_ranges(subject, args)
    lows, highs = zip(*(ends for subject in subjects for ends in subject.ranges["layer"]))
    for subject in subjects:
        subject.ranges["shared"] = [(min(lows), max(highs))] * len(subject.modules)
        find_metrics(subject, args)


def find_ranges(subject, args):
    """First pass: {kind of range: (lo, hi) of every layer}, and the second moment of the last layer's tokens."""
    count, fine, subject.moment = len(subject.modules), 0, 0
    lows, highs = torch.full((count,), math.inf), torch.full((count,), -math.inf)
    for maps, weight in batches(subject, args, "ranges"):
        ends = torch.tensor([[end.item() for end in A.aminmax()] for A in maps])
        lows, highs = torch.minimum(lows, ends[:, 0]), torch.maximum(highs, ends[:, 1])
        if "percentile" in args.entropy_range:
            fine = fine + sum(map(fine_counts, maps))
        subject.moment = subject.moment + second_moment(tokens_of(maps[-1])) * weight
    if not (lows.isfinite() & highs.isfinite()).all():
        raise ValueError(f"{subject.label} yields values that are not finite on these images")
    subject.ranges = {"global": [(lows.min().item(), highs.max().item())] * count,
                      "layer": list(zip(lows.tolist(), highs.tolist()))}
    if "percentile" in args.entropy_range:
        subject.ranges["percentile"] = [fine_percentiles(fine, 0.001, 0.999)] * count


def find_metrics(subject, args):
    """Second pass: everything else. What has a value a layer goes to `entropy` (by range) and `layers` (by name)."""
    count, C = len(subject.modules), len(subject.moment)
    entropy = {name: [0] * count for name in args.entropy_range}
    layers = {name: [0] * count for name in ("magnitude", "spectra", "svd_layers")}
    svd, pca, sep = [], [], 0
    permutation = torch.randperm(C, generator=torch.Generator().manual_seed(args.seed))
    for maps, weight in batches(subject, args, "metrics"):
        for layer, A in enumerate(maps):
            for name, values in entropy.items():
                values[layer] += entropy_map(A, *subject.ranges[name][layer]).mean().item() * weight
            layers["magnitude"][layer] += magnitude(A).item() * weight
            layers["spectra"][layer] += channel_spectrum(A).double().cpu().numpy() * weight
            if args.layer_ranks or layer == count - 1:
                ranks = energy_ranks(tokens_of(A)).cpu()
                layers["svd_layers"][layer] += ranks[:, -1].double().mean().item() * weight
        X = tokens_of(maps[-1])
        svd.append(ranks)
        pca.append(pca_ranks(X, subject.moment).cpu())
        sep += torch.stack([sep_curve(X), sep_curve(X[..., permutation.to(X.device)])]).double().cpu() * weight
    layers["intensity"] = [S.mean() for S in layers["spectra"]]
    if not args.layer_ranks:
        del layers["svd_layers"]
    subject.entropy, subject.layers, (subject.sep, subject.sep_permuted) = entropy, layers, sep
    subject.tokens, subject.channels = X.shape[1:]
    subject.ranks = {"svd": torch.cat(svd).numpy(), "pca": torch.cat(pca).numpy()}


def fine_counts(A):
    index = (torch.asinh(1000 * _full(A).flatten()) / 20 + 1) * (FINE / 2)
    return torch.bincount(index.clamp_(0, FINE).int(), minlength=FINE + 1)


def fine_percentiles(counts, *shares):
    cumulative = counts.double().cumsum(0) / counts.sum()
    index = torch.searchsorted(cumulative, torch.tensor(shares, dtype=torch.float64, device=counts.device)).tolist()
    return tuple(math.sinh((2 * (i + 0.5) / FINE - 1) * 20) / 1000 for i in index)


# ----------------------------------------------------------------------------------------------------
# Published numbers (EM tables: 99th percentile over 1000 images at 80/90/95/99 % energy; SEP bandwidth at 50..90 %;
# DD Figs. 1, 5, 6: the layer of the entropy's minimum, counted from 1)

PUBLISHED = {
    "vit_tiny_patch16_224": dict(svd=(1, 2, 7, 52), pca=(1, 17, 71, 154)),                          # 21k
    "cait_s24_224": dict(svd=(14, 34, 61, 121), pca=(167, 247, 302, 359), minimum="8-9",
                         bands=(0.500, 0.599, 0.703, 0.805, 0.901)),
    "deit_small_patch16_224": dict(svd=(30, 59, 89, 146), pca=(205, 278, 324, 369),
                                   bands=(0.503, 0.602, 0.701, 0.797, 0.901)),
    "swin_small_patch4_window7_224": dict(svd=(3, 7, 15, 33), pca=(129, 336, 495, 691),
                                          bands=(0.501, 0.599, 0.701, 0.799, 0.901)),
    "vit_large_patch16_224": dict(svd=(5, 16, 39, 115), pca=(255, 498, 694, 933)),                  # 21k
    "vit_base_patch16_224.dino": dict(svd=(39, 75, 109, 165), pca=(382, 529, 624, 731)),
    "vit_small_patch16_224.dino": dict(bands=(0.477, 0.583, 0.690, 0.792, 0.896)),
    "vit_base_patch14_dinov2": dict(svd=(19, 39, 67, 146), pca=(384, 519, 606, 704)),
    "vit_base_patch16_224.mae": dict(svd=(1, 7, 34, 113), pca=(1, 58, 235, 585), minimum="4"),
    "vit_base_patch16_clip_224": dict(svd=(6, 27, 60, 135), pca=(129, 340, 502, 704)),
    "vit_base_patch16_224": dict(minimum="9")}


def published(subject, key):
    """A published number, if this is one of the papers' models with trained weights."""
    return PUBLISHED.get(subject.name, {}).get(key, ()) if subject.kind in ("teacher", "model") else ()


# ----------------------------------------------------------------------------------------------------
# Numbers to files

BY_LAYER = {                                                            # a column, an axis and a title for each
    "magnitude": ("mean_abs_activation", "mean |activation|", "Magnitude by layer (DD Eq. 6)"),
    "intensity": ("mean_spectrum", "mean of S[k] over k", "Intensity by layer (SK)"),
    "svd_layers": ("mean_rank_99", "mean rank at 99 % energy", "SVD rank by layer (EM)")}


def named(stem, range_name):
    """entropy.png is over the papers' range; the others say theirs."""
    return stem if range_name == "global" else f"{stem}_{range_name}"


FILES = {"summary.md", *(f"{stem}.{end}" for end in ("csv", "png") for stem in (       # all but study.jsonl
    *BY_LAYER, "spectra", "ranks", "sep", "study", "dose", "gains",
    *(named(stem, name) for stem in ("entropy", "evolution") for name in RANGES)))}


def clear(out):
    """Remove what an earlier call has left in the folder `out`, and nothing else."""
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


SEP_NOTE = """Beside noise and the rank-1 pattern, because SEP alone says little: the channel index has no order, so a
token's spectrum over it is flat on average, but for frequency 0, its mean; and the cumulative curve of a flat spectrum
is the diagonal, .5/.6/.7/.8/.9, whatever the rank. Nearness to it says that neighbouring channels are unrelated, and
no more. (The symmetry of a real signal's spectrum only mirrors the curve: noise + 1 has .005/.20/.41/.60/.80.)"""


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
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    ends = ("first", "minimum (layer)", "last")
    lines = [
        f"# {len(first.load)} images of {Path(args.data).name}", "", f"`{command}`",
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


# ----------------------------------------------------------------------------------------------------
# Numbers to pictures: lines differ in dash and marker, so that they can be told apart without colour

DASHES = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 4)))
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")
SHADES = ("#000000", "#c1440e", "#2a6fbb", "#7a7a7a", "#b08d57", "#8fbf8f", "#5e3c99", "#d98cb3")
matplotlib.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.4,
    "lines.markersize": 3.5, "errorbar.capsize": 3, "legend.fontsize": 8, "axes.titlesize": 10, "figure.titlesize": 10,
    "figure.labelsize": 9, "savefig.dpi": 80, "figure.constrained_layout.use": True})


def style(i):
    return dict(color=SHADES[i % 8], linestyle=DASHES[i % 8], marker=MARKERS[(i + i // 8) % 8])


def save(figure, path, ncols=2):
    """Write a figure, under it one legend for all its panels."""
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
        if shown.max() > 30 * np.median(shown):                         # else a line at 0 beside one peak
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
        title = f"Entropy by layer (DD Eq. 3-5):\n{RANGES[name].format('model')}"
        draw_by_depth([s.entropy[name] for s in subjects], subjects, "entropy (bits)", title,
                      out / f"{named('entropy', name)}.png")
    for key in BY_LAYER.keys() & subjects[0].layers.keys():
        draw_by_depth([s.layers[key] for s in subjects], subjects, *BY_LAYER[key][1:], out / f"{key}.png")
    draw_spectra(subjects, out / "spectra.png")
    draw_ranks(subjects, out / "ranks.png")
    draw_sep(subjects, out / "sep.png")


# ----------------------------------------------------------------------------------------------------
# DD Fig. 4


def evolution(args, device):
    """Entropy by layer at the snapshots of runs: evolution.csv, and a figure a kind of range with a panel a run."""
    runs = [Path(text).resolve() for text in args.evolution]
    panels = {}                                                         # {run: [a subject a snapshot]}
    for run, name in zip(runs, endings(runs)):
        snapshots = sorted(run.glob("epoch_*.pt"))
        if not snapshots:
            raise ValueError(f"{run} is not the folder of a run with snapshots (config.json, epoch_NNNN.pt)")
        load = open_images(args.data or read_config(run)["settings"]["data"], args.images, args.seed)
        panels[name] = [open_model(str(run), args, device, {}, file=snapshot.name) for snapshot in snapshots]
        for subject, snapshot in zip(panels[name], snapshots):
            subject.load, subject.epoch = load, int(snapshot.stem.removeprefix("epoch_"))
    measure([subject for subjects in panels.values() for subject in subjects], args)
    clear(args.out)
    write_csv(args.out / "evolution.csv", ("run", "epoch", "layer", "module", "range", "entropy_bits"),
              [(name, s.epoch, *row) for name, subjects in panels.items() for s in subjects for row in entropy_rows(s)])
    for name in args.entropy_range:
        draw_evolution(panels, name, args.out / f"{named('evolution', name)}.png")


def draw_evolution(panels, range_name, path):
    figure = Figure(figsize=(max(2.4 * len(panels) + 0.8, 5.5), 3.6))
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (run, subjects) in zip(grid, panels.items()):
        last = len(subjects) - 1
        for i, s in enumerate(subjects):
            axes.plot(s.numbers, s.entropy[range_name], marker="o" if i == last else None,
                      color=str(0.85 * (1 - i / max(1, last))),         # light: early, black: last
                      label=f"epoch {s.epoch}" if i in (0, (last + 1) // 2, last) else None)
        axes.set(title=run, xlabel="layer", xticks=s.numbers[::max(1, len(s.numbers) // 6)])
    grid[0].set_ylabel("entropy (bits)")
    figure.suptitle(f"Entropy by layer in training (DD Fig. 4):\n{RANGES[range_name].format('snapshot')}")
    save(figure, path, ncols=3)


# ----------------------------------------------------------------------------------------------------
# A study: accuracy by method and by dose

HELD = ("student", "student_kwargs", "teacher", "teacher_weights", "data", "train_size", "label_noise", "img_size",
        "epochs", "batch_size", "lr", "alpha", "tau")                   # what all runs of a dose panel have in common


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
    part = path.with_suffix(".part")                                    # the folders may be gone: never half a file
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
            "seconds": brief(float(np.median([line["seconds"] for line in log]))),      # of an epoch
            "terms": {term: [brief(line["terms"].get(term)) for line in log] for term in log[0]["terms"]},
            **{key: [brief(line.get(key)) for line in log] for key in ("top1", "ema_top1")}}
    return runs


def study(source, out):
    """Gather runs of the folder `source` (or of a study.jsonl) in study.jsonl, print the table, draw the figures."""
    found = read_study(source) if source.is_file() else {**read_study(source / "study.jsonl"), **read_runs(source)}
    if not found:
        raise ValueError(f"{source} holds neither finished runs, in folders NAME-SEED, nor a study.jsonl")
    runs = [run for _, run in sorted({**read_study(out / "study.jsonl"), **found}.items())]
    clear(out)
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
            x = [place[beta] * 1.4 ** ((i + 0.5) / len(panel) - 0.5) for beta in doses]             # side by side
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


# ----------------------------------------------------------------------------------------------------
# The program


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_args(argv=None):
    def count(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not at least 1")
        return int(text)

    def pair(text):
        if "=" not in text:
            raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
        return text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="NAME, NAME=FILE, NAME=random, or a run's folder")
    parser.add_argument("--evolution", nargs="+", metavar="RUN", help="folders of runs with snapshots")
    parser.add_argument("--study", type=Path, metavar="DIR",
                        help="gather the finished runs DIR/NAME-SEED in OUT/study.jsonl, beside those that it has, and "
                             "show accuracy by NAME and by beta; a study.jsonl, or a folder with one, will do as well")
    parser.add_argument("--data",
                        help="folder of images, shapes, torch/NAME or hfds/NAME (default: the run's, or shapes)")
    parser.add_argument("--images", type=count, default=32, help="chosen at random (32 as in DD; EM has 1000)")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L",
                        help="timm's indices, from 0 (default: all); figures and tables count from 1")
    parser.add_argument("--entropy-range", nargs="+", choices=tuple(RANGES), default=["global"],
                        help="of the histograms: all layers of a model (global, as in DD), each layer's own, the 0.1 "
                             "to 99.9 percentiles of all layers, or one shared by all models or snapshots")
    parser.add_argument("--layer-ranks", action=argparse.BooleanOptionalAction, default=True,
                        help="SVD of every layer, not the last alone")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True,
                        help="beside the models: the first one untrained, white noise, a rank-1 pattern")
    parser.add_argument("--img-size", type=count, help="for models that can be built for another size")
    parser.add_argument("--model-kwargs", nargs="+", type=pair, action=ParseKwargs, default={}, metavar="KEY=VALUE",
                        help="arguments for timm")
    parser.add_argument("--batch-size", type=count, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: cuda, else mps, else cpu")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="what an earlier call wrote there is replaced (default: runs/analysis; DIR of a study)")
    return parser.parse_args(argv)


def choose_device(name):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(kind for kind in there if there[kind])
    if not there[name]:
        raise ValueError(f"there is no {name.upper()} device: leave --device out, or --device cpu")
    return torch.device(name)


def analyse(args, device):
    """The models of the command line, or those of the newest run: every metric, table and figure."""
    runs = sorted(Path("runs").glob("**/student.safetensors"), key=lambda path: path.stat().st_mtime)
    if not args.models and not runs:
        raise ValueError("nothing to analyse: give --models, --evolution or --study (see --help), or train first")
    run = None if args.models else runs[-1].parent
    args.data = args.data or (read_config(run)["settings"]["data"] if run else "shapes")
    load = open_images(args.data, args.images, args.seed)
    subjects = open_subjects(args, device, run)
    for subject in subjects:
        subject.load = load
    if run:
        print(f"analysing {run} on {args.data}: {', '.join(subject.label for subject in subjects)}")
    measure(subjects, args)
    clear(args.out)
    write_tables(subjects, args.out)
    write_summary(subjects, args)
    draw_all(subjects, args.out)


def main(argv=None):
    args = parse_args(argv)
    try:
        device = choose_device(args.device)
        if args.layers and args.layers != sorted({*args.layers}):
            raise ValueError(f"--layers {args.layers} must ascend without repeats")
        beside = args.study and (args.study.parent if args.study.is_file() else args.study)
        args.out = args.out or beside or Path("runs/analysis")
        args.out.mkdir(parents=True, exist_ok=True)
        if args.evolution:
            evolution(args, device)
        elif args.study:
            study(args.study, args.out)
        else:
            analyse(args, device)
    except (ValueError, OSError) as error:
        fail(error)
    written = FILES | ({"study.jsonl"} if args.study else set())
    print(f"done: {args.out}: {', '.join(sorted(name for name in written if (args.out / name).exists()))}")


if __name__ == "__main__":
    main()
