"""Measure every layer of timm models on images, draw the papers' figures, and set null controls beside them.

    python analyze.py                                              # the newest run: its teacher, its student, untrained
    python analyze.py --models cait_s24_224 --data /data/imagenet/val
    python analyze.py --models deit_tiny_patch16_224=weights.safetensors deit_tiny_patch16_224=random --data DIR
    python analyze.py --models cait_toy_patch8_32=weights/cait_toy_shapes.safetensors runs/spectral runs/none
    python analyze.py --evolution runs/soft runs/spectral          # DD Fig. 4: entropy by layer over training
    python analyze.py --study results/study                        # accuracy by method, over seeds

A model is a timm name (pretrained), NAME=FILE, NAME=random, or the folder of a run (its student). The first is the
one that the others are compared with. Each CSV lies beside the PNG that is drawn from it; summary.md puts the
published numbers beside ours. Notation: A a layer's feature map [B, C, h, w]; X its tokens [B, N, C].
"""
import argparse
import csv
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ParseKwargs
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import data
from models import HookedModel, build_model, read_weights, stages

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
    return _ranks_along(_principal_axes(moment), X, levels)


def _principal_axes(moment):
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)     # by falling eigenvalue


def _ranks_along(axes, X, levels=LEVELS):
    return _smallest_k((X.double() @ axes).square().sum(1), levels)


def _smallest_k(energies, levels):
    cumulative = energies.cumsum(-1)                                    # [B, C]
    wanted = torch.tensor(levels, dtype=torch.float64, device=energies.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted).clamp_max(energies.shape[1] - 1) + 1


def sep_curve(X):
    """EM, Spectral Energy Pattern: the cumulative |FFT over channels|^2 of a token, in index order 0..C-1, in % of its
    whole, mean over tokens. [B, N, C] -> [C]. Tokens of zeros, which have no pattern, are left out."""
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
        found = [lambda path=path: load_image(path) for path in paths]
    else:
        raise ValueError(f"{name} is neither a folder of images nor shapes, torch/NAME or hfds/NAME")
    if not found:
        raise ValueError(f"no images in {folder}")
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in sorted(chosen)]


def load_image(path):
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from error


class Subject:
    """A model to be measured: `maps(start, images)` are the feature maps of its layers for one batch of images."""

    def __init__(self, label, model, layers, device):
        self.label, self.name = label, label.split("=")[0]
        layers = stages(model) if layers is None else layers
        self.model = HookedModel(model, layers).eval().to(device)
        config = resolve_model_data_config(model)
        self.transform = create_transform(**{**config, "input_size": config["input_size"][-1]})
        self.modules = [model.feature_info[layer]["module"] for layer in layers]

    def maps(self, start, images):
        return self.model(images)[1]


class Control:
    """Feature maps that hold nothing, shaped as a subject's: Gaussian noise, or one pattern times one weight a token."""

    def __init__(self, label, subject, seed):
        self.label = self.name = label
        self.subject, self.transform, self.modules = subject, subject.transform, subject.modules
        self.seed, self.shapes = seed, None

    def maps(self, start, images):
        if self.shapes is None:
            self.shapes = [A.shape[1:] for A in self.subject.maps(start, images[:1])]
        generator = torch.Generator(images.device).manual_seed(data.seed_of(self.seed, start))
        draw = lambda *shape: torch.randn(len(images), *shape, generator=generator, device=images.device)
        if self.label == "white noise":
            return [draw(*shape) for shape in self.shapes]
        return [draw(C, 1, 1) * draw(1, h, w) for C, h, w in self.shapes]


def open_subjects(args, device):
    subjects = []
    for text in args.models:
        torch.manual_seed(args.seed)
        name, is_file, source = text.partition("=")                         # no folders in tables and legends
        label = f"{name}={Path(source).name}" if is_file else Path(name).name
        subjects.append(Subject(label, open_model(text, args), args.layers, device))
    if args.controls:
        first = subjects[0]
        if not any(subject.label == f"{first.name}=random" for subject in subjects) and timm.is_model(first.name):
            torch.manual_seed(args.seed)
            subjects.append(Subject(f"{first.name}=random", open_model(f"{first.name}=random", args), args.layers, device))
        subjects += [Control(label, first, args.seed) for label in ("white noise", "rank 1")]
    return subjects


def open_model(text, args):
    """NAME, NAME=FILE, NAME=random or the folder of a run -> a timm model. Its classifier does not matter here."""
    if (Path(text) / "config.json").is_file():
        return open_student(Path(text), "student.safetensors")
    name, _, source = text.partition("=")
    classes = timm.get_pretrained_cfg(name).num_classes if timm.is_model(name) else 1
    return build_model(name, num_classes=classes, img_size=args.img_size, pretrained=not source, random_head=True,
                       weights=None if source in ("", "random") else source, **args.model_kwargs or {})


def read_config(run):
    return json.loads((run / "config.json").read_text())


def open_student(run, file):
    """The student of a run, as `file` of its folder holds it."""
    config = read_config(run)
    settings = config["settings"]
    if not (run / file).is_file():
        raise ValueError(f"{run} has no {file}: the run has not got there yet")
    state = read_weights(run / file)
    classes, width = state["head.weight"].shape if "head.weight" in state else (config["images"]["classes"], None)
    return build_model(settings["student"], num_classes=classes, img_size=settings["img_size"], variant=settings["variant"],
                       teacher_width=width, weights=run / file, **settings["student_kwargs"] or {})


# ----------------------------------------------------------------------------------------------------
# Streaming over the images


def batches(subject, load, size, device, label):
    """Yield (index of the first image, images [b, 3, H, W])."""
    for start in tqdm(range(0, len(load), size), desc=label, leave=False, disable=None):
        images = torch.stack([subject.transform(get()) for get in load[start:start + size]])
        yield start, images.to(device, non_blocking=True)


@torch.inference_mode()
def measure(subject, load, args, device):
    """All metrics of a subject, in two passes over the images; nothing that grows with them is kept but the ranks.

    First the ranges of the histograms and the second moment of the last layer (float64), then what depends on them.
    """
    count = len(subject.modules)
    lows, highs, moment, tokens = torch.full((count,), math.inf), torch.full((count,), -math.inf), 0, 0
    fine = torch.zeros(FINE + 1, dtype=torch.int64, device=device)
    for start, images in batches(subject, load, args.batch_size, device, f"{subject.label}: ranges"):
        maps = subject.maps(start, images)
        for layer, A in enumerate(maps):
            low, high = A.aminmax()
            lows[layer], highs[layer] = min(lows[layer], low.item()), max(highs[layer], high.item())
            if "percentile" in args.entropy_range:
                fine += fine_counts(A)
        X = tokens_of(maps[-1])
        moment, tokens = moment + second_moment(X) * X.shape[0] * X.shape[1], tokens + X.shape[0] * X.shape[1]
    if not (lows.isfinite() & highs.isfinite()).all():
        raise ValueError(f"{subject.label} yields values that are not finite on these images")
    ranges = {"global": [(lows.min().item(), highs.max().item())] * count,
              "layer": list(zip(lows.tolist(), highs.tolist()))}
    if "percentile" in args.entropy_range:
        ranges["percentile"] = [fine_percentiles(fine, 0.001, 0.999)] * count

    axes = _principal_axes(moment / tokens)
    sums = {name: torch.zeros(count, dtype=torch.float64) for name in (*args.entropy_range, "magnitude")}
    spectra, ranks, pca = [0] * count, [[] for _ in range(count)], []
    sep = permuted = 0
    permutation = torch.randperm(len(axes), generator=torch.Generator().manual_seed(args.seed)).to(device)
    for start, images in batches(subject, load, args.batch_size, device, f"{subject.label}: metrics"):
        maps, weight = subject.maps(start, images), len(images) / len(load)
        for layer, A in enumerate(maps):
            for name in args.entropy_range:
                sums[name][layer] += entropy_map(A, *ranges[name][layer]).mean().item() * weight
            sums["magnitude"][layer] += magnitude(A).item() * weight
            spectra[layer] += channel_spectrum(A).double() * weight
            if args.layer_ranks or layer == count - 1:
                ranks[layer].append(energy_ranks(tokens_of(A)).cpu())
        X = tokens_of(maps[-1])
        pca.append(_ranks_along(axes, X).cpu())
        sep += sep_curve(X).double() * weight
        permuted += sep_curve(X[..., permutation]).double() * weight
    shape = tuple(maps[-1].shape[1:])
    return {"label": subject.label, "name": subject.name, "modules": subject.modules, "shape": shape, "images": len(load),
            "entropy": {name: sums[name].tolist() for name in args.entropy_range}, "magnitude": sums["magnitude"].tolist(),
            "spectra": [S.tolist() for S in spectra], "intensity": [S.mean().item() for S in spectra],
            "svd_layers": [torch.cat(r)[:, -1].double().mean().item() if r else None for r in ranks],
            "svd": torch.cat(ranks[-1]).numpy(), "pca": torch.cat(pca).numpy(),
            "sep": sep.tolist(), "sep_permuted": permuted.tolist(),
            "bands": sep_bandwidth(sep).tolist(), "bands_permuted": sep_bandwidth(permuted).tolist()}


FINE = 2 ** 15                                                          # bins in arcsinh(1000 x), 0.1 % wide at |x| > 0.001


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
    "vit_tiny_patch16_224": dict(note="ViT-Tiny (21k)", svd=(1, 2, 7, 52), pca=(1, 17, 71, 154)),
    "cait_s24_224": dict(note="CaiT-S24", svd=(14, 34, 61, 121), pca=(167, 247, 302, 359), minimum="8-9",
                         bands=(0.500, 0.599, 0.703, 0.805, 0.901)),
    "deit_small_patch16_224": dict(note="DeiT-Small", svd=(30, 59, 89, 146), pca=(205, 278, 324, 369),
                                   bands=(0.503, 0.602, 0.701, 0.797, 0.901)),
    "swin_small_patch4_window7_224": dict(note="Swin-Small", svd=(3, 7, 15, 33), pca=(129, 336, 495, 691),
                                          bands=(0.501, 0.599, 0.701, 0.799, 0.901)),
    "vit_large_patch16_224": dict(note="ViT-Large (21k)", svd=(5, 16, 39, 115), pca=(255, 498, 694, 933)),
    "vit_base_patch16_224.dino": dict(note="ViT-Base DINO", svd=(39, 75, 109, 165), pca=(382, 529, 624, 731)),
    "vit_small_patch16_224.dino": dict(note="ViT-Small DINO", bands=(0.477, 0.583, 0.690, 0.792, 0.896)),
    "vit_base_patch14_dinov2": dict(note="ViT-Base DINOv2", svd=(19, 39, 67, 146), pca=(384, 519, 606, 704)),
    "vit_base_patch16_224.mae": dict(note="ViT-Base MAE", svd=(1, 7, 34, 113), pca=(1, 58, 235, 585), minimum="4"),
    "vit_base_patch16_clip_224": dict(note="ViT-Base CLIP", svd=(6, 27, 60, 135), pca=(129, 340, 502, 704)),
    "vit_base_patch16_224": dict(note="ViT, supervised", minimum="9"),
}


# ----------------------------------------------------------------------------------------------------
# Numbers to files


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)


def write_tables(results, out):
    by_layer = lambda key: [(r["label"], i, module, value) for r in results
                            for i, (module, value) in enumerate(zip(r["modules"], r[key])) if value is not None]
    write_csv(out / "entropy.csv", ("model", "layer", "module", "range", "entropy_bits"),
              [(r["label"], i, module, name, value) for r in results for name, values in r["entropy"].items()
               for i, (module, value) in enumerate(zip(r["modules"], values))])
    write_csv(out / "magnitude.csv", ("model", "layer", "module", "mean_abs_activation"), by_layer("magnitude"))
    write_csv(out / "intensity.csv", ("model", "layer", "module", "mean_spectrum"), by_layer("intensity"))
    write_csv(out / "svd_layers.csv", ("model", "layer", "module", "mean_rank_99"), by_layer("svd_layers"))
    write_csv(out / "spectra.csv", ("model", "layer", "module", "k", "magnitude"),
              [(r["label"], i, module, k, value) for r in results
               for i, (module, S) in enumerate(zip(r["modules"], r["spectra"])) for k, value in enumerate(S)])
    write_csv(out / "ranks.csv", ("model", "image", "method", *(f"rank_{level:.0%}" for level in LEVELS)),
              [(r["label"], i, method, *map(int, row)) for r in results for method in ("svd", "pca")
               for i, row in enumerate(r[method])])
    write_csv(out / "sep.csv", ("model", "channels", "sep_percent", "sep_percent_permuted"),
              [(r["label"], k + 1, *pair) for r in results for k, pair in enumerate(zip(r["sep"], r["sep_permuted"]))])


def closeness(result, reference):
    """SK: how alike two intensity profiles are over relative depth: Pearson's r, and the mean |log2 ratio| (octaves)."""
    depth = np.linspace(0, 1, len(reference["intensity"]))
    profile = np.interp(depth, np.linspace(0, 1, len(result["intensity"])), result["intensity"])
    flat = np.std(profile) < 1e-9 * np.mean(profile) or np.std(reference["intensity"]) == 0
    return (math.nan if flat else np.corrcoef(profile, reference["intensity"])[0, 1],
            np.abs(np.log2(profile / reference["intensity"])).mean())


def write_summary(results, args, out):
    """summary.md: ours and, where a model is one of the papers', the published numbers."""
    share = lambda values: "/".join(f"{value:.3f}".lstrip("0") for value in values)
    whole = lambda values: "/".join(f"{value:.0f}" for value in values)
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    last = [f"# {results[0]['images']} images of {Path(args.data).name}", "", f"`{command}`", "", "## Depth (DD Figs. 1, 2, 5, 6)",
            "", "Layers counted from 1. A U falls to a minimum inside and rises again.", "",
            "| model | entropy range | first | minimum (layer) | last | published minimum | magnitude first | minimum (layer) "
            "| last |", "|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        for name, entropy in r["entropy"].items():
            cells = [f"{values[0]:.3f} | {min(values):.3f} ({int(np.argmin(values)) + 1}) | {values[-1]:.3f}"
                     for values in (entropy, r["magnitude"])]
            published = PUBLISHED.get(r["name"], {}).get("minimum", "-")
            last.append(f"| {r['label']} | {name} | {cells[0]} | {published} | {cells[1]} |")
    last += ["", "## Ranks of the last layer, 99th percentile over images, at 80/90/95/99 % energy (EM)", "",
             "| model | C | SVD | published | dataset PCA | published |", "|---|---|---|---|---|---|"]
    for r in results:
        published = PUBLISHED.get(r["name"], {}) if "=random" not in r["label"] else {}
        percentile = [whole(np.round(np.percentile(r[method], 99, axis=0))) for method in ("svd", "pca")]
        last.append(f"| {r['label']} | {r['shape'][0]} | {percentile[0]} | {whole(published.get('svd', ())) or '-'} | "
                    f"{percentile[1]} | {whole(published.get('pca', ())) or '-'} |")
    last += ["", "## SEP bandwidth at 50/60/70/80/90 % (EM)", "",
             "The spectrum of real values is symmetric: anything comes out near .5/.6/.7/.8/.9, noise included.", "",
             "| model | bandwidth | published | channels permuted | mean difference of the curves (points) |",
             "|---|---|---|---|---|"]
    for r in results:
        published = PUBLISHED.get(r["name"], {}) if "=random" not in r["label"] else {}
        difference = np.abs(np.subtract(r["sep"], r["sep_permuted"])).mean()
        last.append(f"| {r['label']} | {share(r['bands'])} | {share(published.get('bands', ())) or '-'} | "
                    f"{share(r['bands_permuted'])} | {difference:.3f} |")
    last += ["", f"## Intensity by depth, compared with {results[0]['label']} (SK)", "",
             "| model | Pearson's r of the profiles | mean distance (octaves) |", "|---|---|---|"]
    for r in results[1:]:
        last.append("| {} | {:.3f} | {:.3f} |".format(r["label"], *closeness(r, results[0])))
    (out / "summary.md").write_text("\n".join(last) + "\n")


# ----------------------------------------------------------------------------------------------------
# Numbers to pictures: lines differ in dash and marker, so that they can be told apart without colour

DASHES = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 4)))
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")
SHADES = ("#000000", "#c1440e", "#2a6fbb", "#7a7a7a", "#b08d57", "#8fbf8f", "#5e3c99", "#d98cb3")


def plotter():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8, "axes.grid": True,
                         "grid.alpha": 0.3, "lines.linewidth": 1.4})
    return plt


def style(i, markers=True):
    marked = {"marker": MARKERS[i % 8], "markersize": 3.5} if markers else {}
    return dict(color=SHADES[i % 8], linestyle=DASHES[i % 8], **marked)


def finish(plt, figure, path, legend=None, dpi=80):
    if legend:
        figure.legend(*legend.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def draw_by_depth(results, series, ylabel, title, path):
    """One line a model; models of other depths share the axis by relative depth."""
    plt = plotter()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    depths = {len(r["modules"]) for r in results}
    for i, r in enumerate(results):
        values = series(r)
        x = np.arange(1, len(values) + 1) if len(depths) == 1 else np.linspace(0, 1, len(values))
        axes.plot(x, values, label=r["label"], **style(i))
    axes.set(xlabel="layer" if len(depths) == 1 else "relative depth (0: first layer, 1: last)", ylabel=ylabel, title=title)
    axes.locator_params(axis="x", integer=len(depths) == 1)
    finish(plt, figure, path, legend=axes)


def draw_spectra(results, path):
    """DD Figs. 3 and 7: S[k] for k < C/2: first two, middle two, last two layers, or first and last of a few stages."""
    plt = plotter()
    picks = [sorted({0, 1, d // 2 - 1, d // 2, d - 2, d - 1}) if d >= 6 else sorted({0, d - 1})
             for d in (len(r["modules"]) for r in results)]
    columns = max(map(len, picks))
    figure, grid = plt.subplots(len(results), columns, figsize=(2.2 * columns + 0.6, 1.9 * len(results)),
                                layout="constrained", squeeze=False)
    for r, row, pick in zip(results, grid, picks):
        for axes in row[len(pick):]:
            axes.set_visible(False)
        for axes, layer in zip(row, pick):
            S = np.array(r["spectra"][layer])
            k = np.arange(len(S) // 2)
            axes.plot(k / len(S), S[:len(k)], color="black", linewidth=0.8)
            axes.set_title(f"layer {layer + 1} of {len(r['modules'])}", fontsize=8)
            axes.tick_params(labelsize=7)
        shown = np.concatenate([r["spectra"][layer][:len(r["spectra"][layer]) // 2] for layer in pick])
        for axes in row[:len(pick)]:                                    # one scale a row
            if shown.max() > 30 * np.median(shown):                     # low-pass: a line at 0 beside one peak otherwise
                axes.set_yscale("log")
                axes.set_ylim(shown.min() / 1.5, shown.max() * 1.5)
            else:
                axes.set_ylim(0, 1.05 * shown.max())
        row[0].set_ylabel(r["label"] if len(r["label"]) < 30 else "..." + r["label"][-27:], fontsize=7)
    figure.supxlabel("frequency over channels, k / C", fontsize=9)
    figure.supylabel("S[k], mean magnitude", fontsize=9)
    finish(plt, figure, path, dpi=80 if len(results) < 5 else 60)


def draw_ranks(results, path):
    """EM: histogram over images of the rank at 99 % energy, by SVD of each image and in the PCA basis of all of them."""
    plt = plotter()
    figure, panels = plt.subplots(len(results), 1, figsize=(6.4, 1.3 * len(results) + 0.7), layout="constrained",
                                  squeeze=False, sharex=True)
    bins = np.linspace(0, max(r["shape"][0] for r in results), 49)
    for r, axes in zip(results, panels[:, 0]):
        axes.hist(r["svd"][:, -1], bins, color="black", label="SVD of each image")
        axes.hist(r["pca"][:, -1], bins, fill=False, edgecolor="#c1440e", hatch="////", label="dataset PCA")
        axes.axvline(r["shape"][0], color="gray", linestyle=":", label="channels")
        axes.set_title(r["label"], fontsize=8)
        axes.set_ylabel("images")
    panels[-1, 0].set_xlabel("dimensions that hold 99 % of an image's energy in the last layer")
    finish(plt, figure, path, legend=panels[0, 0])


def draw_sep(results, path):
    """EM: SEP curves over the share of channels, and what each curve differs by from the diagonal."""
    plt = plotter()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for i, r in enumerate(results):
        share = np.arange(1, len(r["sep"]) + 1) / len(r["sep"])
        left.plot(share, r["sep"], label=r["label"], **style(i, markers=False))
        right.plot(share, np.array(r["sep"]) - 100 * share, **style(i, markers=False))
    left.set(xlabel="share of channels, index order", ylabel="cumulative energy (%)", title="SEP")
    right.set(xlabel="share of channels, index order", ylabel="cumulative energy - diagonal (points)",
              title="less the diagonal")
    finish(plt, figure, path, legend=left)


def draw_all(results, out):
    for name in results[0]["entropy"]:
        draw_by_depth(results, lambda r: r["entropy"][name], "entropy (bits)",
                      f"Entropy by layer, {name} range (DD Eq. 3-5)",
                      out / ("entropy.png" if name == "global" else f"entropy_{name}.png"))
    for key, ylabel, title in (("magnitude", "mean |activation|", "Magnitude by layer (DD Eq. 6)"),
                               ("intensity", "mean of S[k] over k", "Intensity by layer (SK)"),
                               ("svd_layers", "mean rank at 99 % energy", "SVD rank by layer (EM)")):
        if None not in results[0][key]:
            draw_by_depth(results, lambda r: r[key], ylabel, title, out / f"{key}.png")
    draw_spectra(results, out / "spectra.png")
    draw_ranks(results, out / "ranks.png")
    draw_sep(results, out / "sep.png")


# ----------------------------------------------------------------------------------------------------
# DD Fig. 4


def evolution(args, device):
    """Entropy by layer at a run's snapshots, one panel a run, each snapshot over its own global range."""
    rows, panels = [], []
    for run in map(Path, args.evolution):
        if not (run / "config.json").is_file() or not sorted(run.glob("epoch_*.pt")):
            raise ValueError(f"{run} is not the folder of a run with snapshots (config.json, epoch_NNNN.pt)")
        load = open_images(args.data or read_config(run)["settings"]["data"], args.images, args.seed)
        lines = {}
        for snapshot in sorted(run.glob("epoch_*.pt")):
            subject = Subject(f"{run.name}: {snapshot.stem}", open_student(run, snapshot.name), args.layers, device)
            lines[int(snapshot.stem[6:])] = measure(subject, load, args, device)["entropy"]["global"]
        panels.append((run.name, lines))
        rows += [(run.name, epoch, layer, value) for epoch, line in lines.items() for layer, value in enumerate(line)]
    write_csv(args.out / "evolution.csv", ("run", "epoch", "layer", "entropy_bits"), rows)
    plt = plotter()
    figure, grid = plt.subplots(1, len(panels), figsize=(3.1 * len(panels) + 0.8, 3.2), layout="constrained",
                                squeeze=False, sharey=True)
    for axes, (name, lines) in zip(grid[0], panels):
        for i, (epoch, line) in enumerate(lines.items()):
            shade = 0.85 * (1 - i / max(1, len(lines) - 1))             # light: early, black: the last
            axes.plot(range(1, len(line) + 1), line, color=str(shade), marker="o" if i == len(lines) - 1 else None,
                      markersize=3, label=f"epoch {epoch}" if i in (0, len(lines) // 2, len(lines) - 1) else None)
        axes.set(xlabel="layer", title=name, xticks=range(1, len(line) + 1, max(1, len(line) // 6)))
    grid[0, 0].set_ylabel("entropy (bits)")
    grid[0, -1].legend()
    finish(plt, figure, args.out / "evolution.png")


# ----------------------------------------------------------------------------------------------------
# Accuracy by method


def study(folder, out):
    """The finished runs in folders NAME-SEED: study.csv, study.png, and a table of mean and standard deviation."""
    rows = []
    for run in sorted(folder.glob("*-*")):
        settings = read_config(run)["settings"]
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        if len(log) == settings["epochs"]:
            minutes = np.median([line["seconds"] for line in log]) * len(log) / 60      # the median: not of interruptions
            results = (log[-1][key] for key in ("top1", "ema_top1", "loss"))
            rows.append((run.name.rpartition("-")[0], settings["seed"], *results, minutes))
    if not rows:
        raise ValueError(f"{folder} holds no finished runs in folders NAME-SEED (config.json, log.jsonl)")
    write_csv(out / "study.csv", ("run", "seed", "top1", "ema_top1", "train_loss", "minutes"), rows)
    top1 = {name: [row[2] for row in rows if row[0] == name] for name in {row[0] for row in rows}}
    top1 = sorted(top1.items(), key=lambda item: np.mean(item[1]))
    plt = plotter()
    figure, axes = plt.subplots(figsize=(6.4, 0.3 * len(top1) + 1), layout="constrained")
    for y, (name, values) in enumerate(top1):
        spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
        axes.errorbar(np.mean(values), y, xerr=spread, fmt="s", color="black", markersize=5, capsize=4)
        axes.plot(values, [y] * len(values), "o", color="#c1440e", markersize=3.5, alpha=0.8)
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {len(values)} | {each} | {np.mean(values):.2f} ± {spread:.2f} |")
    axes.set(xlabel="validation top-1 (%): each seed, mean and standard deviation", yticks=range(len(top1)),
             yticklabels=[name for name, _ in top1])
    finish(plt, figure, out / "study.png")


# ----------------------------------------------------------------------------------------------------
# The program


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def fail(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_args(argv=None):
    def count(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not at least 1")
        return int(text)

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="NAME, NAME=FILE, NAME=random, or the folder of a run")
    parser.add_argument("--evolution", nargs="+", metavar="RUN", help="folders of runs with snapshots")
    parser.add_argument("--study", type=Path, metavar="DIR", help="accuracies of the runs in DIR/NAME-SEED, by NAME")
    parser.add_argument("--data", help="folder of images, shapes, torch/NAME or hfds/NAME (default: shapes, or the run's)")
    parser.add_argument("--images", type=count, default=32, help="how many, chosen at random (32 as in DD; EM has 1000)")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help="counted from 0 (default: all)")
    parser.add_argument("--entropy-range", nargs="+", choices=("global", "layer", "percentile"), default=["global"],
                        help="over all layers (DD), each layer's own, or the 0.1 to 99.9 percentiles of all layers")
    parser.add_argument("--layer-ranks", action=argparse.BooleanOptionalAction, default=True,
                        help="SVD of every layer, not the last alone")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True,
                        help="beside the models: the first with random weights, white noise, a rank-1 pattern")
    parser.add_argument("--img-size", type=count, help="for models that can be built for another size")
    parser.add_argument("--model-kwargs", nargs="+", action=ParseKwargs, metavar="KEY=VALUE", help="arguments for timm")
    parser.add_argument("--batch-size", type=count, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/analysis")
    return parser.parse_args(argv)


def newest_run(args):
    """Without models: those of the newest run."""
    runs = sorted(Path("runs").glob("**/student.safetensors"), key=os.path.getmtime)
    if not runs:
        raise ValueError("nothing to analyse: give --models, --evolution or --study (see --help), or train something first")
    settings = read_config(runs[-1].parent)["settings"]
    args.models, args.data = [str(runs[-1].parent)], args.data or settings["data"]
    if settings["teacher_weights"] and settings["method"] != "none":
        args.models.insert(0, f"{settings['teacher']}={settings['teacher_weights']}")
    print(f"analysing {' '.join(args.models)} on {args.data}")


def main(argv=None):
    args = parse_args(argv)
    args.out = args.out or Path("runs/analysis")
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device: leave --device out, or --device cpu")
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if args.layers and args.layers != sorted({*args.layers}):
            raise ValueError(f"--layers {args.layers} must ascend without repeats")
        args.out.mkdir(parents=True, exist_ok=True)
        if args.evolution:
            evolution(args, device)
        elif args.study:
            study(args.study, args.out)
        else:
            if not args.models:
                newest_run(args)
            args.data = args.data or "shapes"
            load = open_images(args.data, args.images, args.seed)
            results = [measure(subject, load, args, device) for subject in open_subjects(args, device)]
            write_tables(results, args.out)
            write_summary(results, args, args.out)
            draw_all(results, args.out)
    except (ValueError, OSError) as error:
        fail(error)
    print(f"done: {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    main()
