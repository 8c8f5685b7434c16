"""Data: the embedded `shapes` set, any folder or timm data set, and batches that are the same on every machine.

What a training sample looks like depends on (seed, epoch, index, repeat, repeats) alone, and which samples make up a
global batch depends on (seed, epoch, batch size, repeats): not on numbers of processes or workers, or interruptions.
"""
import hashlib
import multiprocessing
import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment, create_dataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

# ---------- shapes: 20 classes = shape (contour, low frequency) x texture (detail, high frequency)

SHAPES = ("disk", "square", "triangle", "ring", "star")
TEXTURES = ("gradient", "stripes", "checker", "noise")
SIZE = 32
VAL_SIZE = 4000


def draw_shapes(count, split="train", seed=0):
    """Draw images 0..count-1 of a split. Image i depends on (seed, split, i) only; its class is i mod 20.
    Returns uint8 [count, 3, 32, 32] and int64 [count]. About 0.3 ms an image on one core."""
    # Row i of a generator's table does not depend on how many rows are drawn.
    table, pixels = (np.random.default_rng([seed, ("train", "val").index(split), stream]) for stream in (0, 1))
    labels = np.arange(count) % (len(SHAPES) * len(TEXTURES))
    chunks = [_draw(table.random((n := len(part), 35), np.float32), pixels.random((n, 2, SIZE, SIZE), np.float32), part)
              for part in np.array_split(labels, max(1, count // 1000))]
    return torch.from_numpy(np.concatenate(chunks)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def _draw(table, pixels, labels):
    """The formula: float32 table [n, 35] and pixels [n, 2, 32, 32] in [0, 1), labels [n] -> uint8 [n, 32, 32, 3]."""
    columns = iter(table.T)
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2
    rows, shape, texture = np.arange(len(labels)), *divmod(labels, len(TEXTURES))

    def uniform(low, high):  # a number for each image: [n, 1, 1]
        return low + (high - low) * next(columns)[:, None, None]

    def colour(low, high):  # [n, 1, 1, 3]
        return np.stack([uniform(low, high) for _ in range(3)], axis=-1)

    def rotated(x, y, turn):
        return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)

    def paint(image, mask, paint_colour):  # mask: coverage, [n, 32, 32]
        return image + np.clip(mask, 0, 1)[..., None] * (paint_colour - image)

    def litter(image):  # a small bar anywhere
        x, y = rotated(xs - uniform(-16, 16), ys - uniform(-16, 16), uniform(0, np.pi))
        half_length, half_width = uniform(1.5, 8), uniform(1, 2)
        return paint(image, np.minimum(half_length - abs(x), half_width - abs(y)), colour(0, 0.6))

    image = colour(0, 0.4) + colour(-0.15, 0.15) * ((xs + ys) / SIZE)[..., None]  # dark, a slight gradient
    image = litter(image)

    # Shape: a function that is positive inside, in units of the radius.
    radius = uniform(10, 13)
    x, y = rotated(xs - uniform(-1, 1), ys - uniform(-1, 1), uniform(-0.35, 0.35))
    u, v, rho, phi = x / radius, y / radius, np.hypot(x, y) / radius, np.arctan2(y, x)
    triangle = np.max([u * np.cos(k) + v * np.sin(k) for k in np.pi * np.array([1 / 6, 5 / 6, 9 / 6])], axis=0)
    inside = np.stack([0.9 - rho, 0.8 - np.maximum(abs(u), abs(v)), 0.55 - triangle,
                       0.27 - abs(rho - 0.68), 0.68 + 0.26 * np.cos(5 * phi) - rho])[shape, rows]

    # Texture: a number in [0, 1] at every pixel, between two colours.
    p, q = rotated(x, y, uniform(0, 2 * np.pi))
    frequency = 2 * np.pi / uniform(5, 7)  # of stripes and checkers: 5 to 7 pixels
    wave_p, wave_q = np.sin(frequency * p), np.sin(frequency * q)
    pattern = np.stack([np.clip(0.5 + 0.5 * p / radius, 0, 1), 0.5 + 0.5 * np.tanh(3 * wave_p),
                        0.5 + 0.5 * np.tanh(3 * wave_p * wave_q), pixels[:, 0]])[texture, rows]
    base, contrast = colour(0.5, 0.9), uniform(0.45, 0.6)[..., None] + colour(-0.15, 0.15)
    image = paint(image, inside * radius + 0.5, base + (pattern[..., None] - 0.5) * contrast)

    image = litter(image) + (pixels[:, 1, ..., None] - 0.5) * 0.12  # something in front, and sensor noise
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


class Shapes(Dataset):
    """The embedded set: (PIL image, label)."""

    def __init__(self, count, split, label_noise=0.0):
        self.images, self.labels = draw_shapes(count, split)
        draws = torch.from_numpy(np.random.default_rng([0, 2]).random((count, 2)))
        guesses = (draws[:, 1] * len(SHAPES) * len(TEXTURES)).long()  # a wrong label may be right by chance
        self.labels = torch.where(draws[:, 0] < label_noise, guesses, self.labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy()), int(self.labels[index])


# ---------- Opening a data set


class Images(NamedTuple):
    """A data set: its two splits, its number of classes, their names in order (None where it does not tell)."""

    train: Dataset
    val: Dataset
    classes: int
    names: list

    def counts(self):
        return {"train": len(self.train), "val": len(self.val), "classes": self.classes}


def open_data(name, train_size=4000, label_noise=0.0, only_val=False):
    """Open a data set -> Images. Raises ValueError or OSError for what cannot be used.

    name: "shapes" (`train_size` images to train on, a share `label_noise` of them labelled at random); a folder that
    holds train/ and val/ with one folder per class; or a name that timm.data.create_dataset knows (torch/cifar100,
    hfds/...), kept in data/. With `only_val` a folder needs no train/ (train is val) and may hold the class folders.
    """
    if name == "shapes":
        names = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
        return Images(Shapes(train_size, "train", label_noise), Shapes(VAL_SIZE, "val"), len(names), names)
    if name.startswith(("torch/", "hfds/")):
        return _open_timm(name)
    folders = [Path(name) / "train", Path(name) / "val"]
    if only_val and Path(name).is_dir():
        folders = [folders[1] if folders[1].is_dir() else Path(name)]
    splits = [Folder(folder) for folder in folders]
    train, val = splits[0], splits[-1]
    if train.classes != val.classes:
        raise ValueError(f"train/ and val/ of {name} differ in classes: "
                         f"{', '.join(sorted({*train.classes} ^ {*val.classes})[:5])} in only one of them")
    if len(train.classes) < 2:
        raise ValueError(f"{name} has one class: there is nothing to tell apart")
    return Images(train, val, len(val.classes), val.classes)


class Folder(ImageFolder):
    """torchvision's folder of class folders, without hidden names. A class may be empty, to keep its number."""

    def __init__(self, root):
        others = []
        super().__init__(root, loader=load_image, is_valid_file=partial(is_image, root, others=others),
                         allow_empty=True)
        if others and int(os.environ.get("RANK", 0)) == 0:
            print(f"warning: {len(others)} files in {root} are no images and left out, as {others[0]}", flush=True)
        self.refuse(not self.samples)

    def find_classes(self, directory):
        names = sorted(path.name for path in Path(directory).glob("[!.]*") if path.is_dir())
        self.refuse(not names)
        return names, {name: number for number, name in enumerate(names)}

    def refuse(self, condition):
        if condition:
            raise ValueError(f"{self.root} holds no images: give shapes, torch/NAME, hfds/NAME, or a folder that holds "
                             f"train/ and val/ with one folder of .jpg, .png, ... per class")


def is_image(root, path, others):
    """Whether a file below `root` is an image by its name. A visible one that is not joins the list `others`."""
    if any(part.startswith(".") for part in Path(path).relative_to(root).parts):
        return False
    if not path.lower().endswith((*IMG_EXTENSIONS, ".jfif")):
        others += [path]
        return False
    return True


class BadImage(ValueError):
    """An image that cannot be read."""


UNREADABLE = OSError, SyntaxError, ValueError, Image.DecompressionBombError  # what PIL raises


def load_image(path):
    """A file as RGB. Raises BadImage."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except UNREADABLE as error:
        raise BadImage(f"cannot read image {path} ({error}): mend or remove it, or use --skip-bad-images") from None


def to_rgb(image):
    """Of 16 bits the upper 8 count. Raises ValueError for integers and floats, whose range nobody knows."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range: save it with 8 bits")
    return image.convert("RGB")


def _open_timm(name):
    """A data set of timm.data.create_dataset. The first process of each node downloads while the others wait."""
    wait = dist.barrier if dist.is_initialized() else tuple  # nothing to wait for
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        wait()
    try:
        train, val = (create_dataset(name, root="data", split=split, is_training=split == "train", download=True)
                      for split in ("train", "validation"))
    except Exception as error:  # each back end raises its own kind
        raise ValueError(f"cannot open data set {name}: {' '.join(str(error).split())[:200]}") from error
    finally:
        if first:
            wait()
    numbers = getattr(getattr(train, "reader", None), "class_to_idx", None) or {}
    names = [", ".join(each) if isinstance(each, tuple) else each  # ImageNet's are tuples of synonyms
             for each in getattr(train, "classes", None) or sorted(numbers, key=numbers.get)] or None
    return Images(train, val, len(names) if names else max(label for _, label in train) + 1, names)


# ---------- Which samples make up which batch


def seed_of(*numbers):
    """A 32-bit seed from any numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def training_batches(size, batch_size, *, seed, epoch, start=0, repeats=1, accum=1, rank=0, world=1):
    """This process's micro-batches of an epoch, from update `start` on: arrays [b, 2] of (index, repeat). All `world`
    processes share each of a batch's `accum` parts. An epoch holds size / repeats images, each `repeats` times."""
    sampler = RepeatAugSampler(range(size), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0)
    sampler.set_epoch(seed_of(seed, epoch))
    order = np.fromiter(sampler, np.int64)
    keys = np.stack([order, np.arange(size) % repeats], axis=1)
    updates = keys[:size // batch_size * batch_size].reshape(-1, batch_size, 2)[start:]
    return [part[rank::world] for update in updates for part in np.split(update, accum)]


def evaluation_batches(size, batch_size, *, rank=0, world=1):
    """This process's share of 0..size-1 in batches: every index once over all processes."""
    indices = np.arange(rank, size, world)
    keys = np.stack([indices, np.zeros_like(indices)], axis=1)
    return np.split(keys, range(batch_size, len(keys), batch_size)) if len(keys) else []


# ---------- Loaders: images reach the device as uint8 and are normalised there


class Loader:
    """What both kinds share: `size`, the count of images; `normalise`, uint8 [b, 3, S, S] -> float32 for the model."""

    def __init__(self, size, mean, std, device, seed):
        self.scale = torch.tensor(std, device=device).view(3, 1, 1).mul(255).reciprocal()
        self.shift = (torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self.size, self.device, self.seed = size, device, seed

    def normalise(self, images):
        return images.float().mul_(self.scale).sub_(self.shift)


class TensorLoader(Loader):
    """Small images (below 64 px): the whole set as uint8 [N, 3, S, S] on the device, pad-crop and flip batched."""

    evaluation_batch = 250  # images

    def __init__(self, dataset, *, img_size, repeats, skip_bad, **common):
        super().__init__(len(dataset), **common)
        self.repeats = repeats
        if isinstance(dataset, Shapes) and img_size == SIZE:
            images, labels = dataset.images, dataset.labels
        else:
            transform = create_transform(img_size, crop_pct=1.0, interpolation="bicubic", normalize=False)
            samples = Samples(dataset, transform, skip_bad)
            decoded = [samples[index, 0] for index in range(len(dataset))]
            images, labels = torch.stack([image for image, _ in decoded]), torch.tensor([label for _, label in decoded])
        self.images, self.labels = images.to(self.device), labels.to(self.device)

    def load(self, batches, epoch=None):
        """Yield (images [b, 3, S, S], labels [b]) on the device for batches of keys; augmented if in an `epoch`."""
        if epoch is not None:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, 1))
            draws = torch.rand(len(self.labels), self.repeats, 3, generator=generator).to(self.device)
        sizes = [len(keys) for keys in batches]
        keys = torch.from_numpy(np.concatenate([np.empty((0, 2), np.int64), *batches])).to(self.device)
        for index, repeat in (part.unbind(1) for part in keys.split(sizes)):  # one copy an epoch, not one a batch
            images = self.images[index]
            if epoch is not None:
                images = pad_crop_flip(images, draws[index, repeat])
            yield self.normalise(images), self.labels[index]


def pad_crop_flip(images, draws, padding=4):
    """Shift each image by up to `padding` pixels, zeros moving in, and mirror half of them. Images [b, C, S, S] of any
    dtype; draws [b, 3] in [0, 1), which decide: down, right, mirrored."""
    down, right = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
    steps = torch.arange(images.shape[-1], device=images.device)
    ys = down[:, None] + steps  # [b, S]
    xs = right[:, None] + torch.where(draws[:, 2:] < 0.5, steps.flip(0), steps)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return F.pad(images, [padding] * 4)[batch, :, ys[:, :, None], xs[:, None, :]].movedim(-1, 1)


def at_least_one_bit(level_to_arg, level, hparams):
    """At one end of its range timm's posterize keeps 0 bits of a colour, which Pillow 13 refuses: keep 1."""
    return (max(1, level_to_arg(level, hparams)[0]),)


for _name in ("Posterize", "PosterizeIncreasing"):  # no lambdas: spawned workers unpickle them
    auto_augment.LEVEL_TO_ARG[_name] = partial(at_least_one_bit, auto_augment.LEVEL_TO_ARG[_name])


class StreamLoader(Loader):
    """One split, train or val, of a `Pool` of workers that decode and augment large images."""

    evaluation_batch = 64  # 10 MB at 224 px, for a container's /dev/shm

    def __init__(self, pool, split, erasing=None, **common):
        super().__init__(pool.sizes[split], **common)
        self.pool, self.split, self.erasing = pool, split, erasing

    def load(self, batches, epoch=None):
        """As TensorLoader.load."""
        reseed = {"cuda": torch.cuda.manual_seed, "mps": torch.mps.manual_seed}.get(
            self.device.type, torch.default_generator.manual_seed)
        for images, labels, seeds in self.pool.load(self.split, batches, epoch or 0):
            images = self.normalise(images.to(self.device, non_blocking=True))
            for image, seed in zip(images, seeds.tolist() if self.erasing else ()):
                random.seed(seed)  # of its own: the same in any batch
                reseed(seed)
                self.erasing(image)
            yield images, labels.to(self.device, non_blocking=True)


class Pool:
    """Worker processes for both splits, started once, at the first batch. Keys travel with each batch, so that no state
    of a former epoch leaks into this one. Fork is the cheapest start, and safe on Linux."""

    def __init__(self, splits, seed, workers, pin_memory):
        self.batches, self.sizes = [], [len(samples.dataset) for samples in splits]
        asked = multiprocessing.get_start_method(allow_none=True)
        context = asked or ("fork" if sys.platform == "linux" else "spawn")
        parallel = dict(num_workers=workers, multiprocessing_context=context, persistent_workers=True,
                        worker_init_fn=leave_process_group) if workers else {}
        self.loader = DataLoader(Splits(splits, seed), batch_sampler=self.batches, pin_memory=pin_memory, **parallel)

    def load(self, split, batches, epoch):
        """Yield (uint8 images [b, 3, S, S], labels [b], a seed for each image [b])."""
        self.batches[:] = [[(split, epoch, *key) for key in keys.tolist()] for keys in batches]
        return iter(self.loader)


def leave_process_group(worker):
    """Only the main process answers Ctrl-C and torchrun's signals."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


class Splits(Dataset):
    """Samples of two data sets by (split, epoch, index, repeat): uint8 image, label, and a seed of its own."""

    def __init__(self, splits, seed):
        self.splits, self.seed = splits, seed

    def __getitem__(self, key):
        split, epoch, index, repeat = key
        digest = hashlib.blake2s(repr((self.seed, epoch, index, repeat)).encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little")  # seed_of is 0.1 ms slower: 2 % of an image
        return *self.splits[split][index, seed], seed


def default_workers():
    """This process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Samples(Dataset):
    """samples[index, seed]: an image through the transform, whose randomness starts from the seed, and its label. An
    unreadable image raises BadImage; with `skip_bad` the next readable one replaces it."""

    def __init__(self, dataset, transform, skip_bad=False):
        self.dataset, self.transform, self.skip_bad = dataset, transform, skip_bad

    def __getitem__(self, key):
        first, seed = key
        random.seed(seed)  # timm's transforms draw from all three
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would ask every device
        for index in range(first, first + len(self.dataset)):
            try:
                image, label = self.dataset[index % len(self.dataset)]
                return self.transform(to_rgb(image)), label
            except UNREADABLE as error:
                if not self.skip_bad:
                    raise BadImage(str(error) if isinstance(error, BadImage) else f"image {index}: {error}") from None
        raise BadImage("none of the images can be read")


def build_loaders(train, val, *, img_size, mean, std, device, seed=0, repeats=1, workers=2, crop_pct=0.875,
                  auto_augment=None, color_jitter=None, random_erasing=0.0, skip_bad_images=False):
    """Loaders of the two data sets: `.load(batches, epoch)` with the batches of the functions above. Below 64 px:
    pad-crop and flip. From 64 px: timm's ImageNet pipeline in `workers` processes for both (0: in this one)."""
    common = dict(mean=mean, std=std, device=device, seed=seed)
    if img_size < 64:
        return tuple(TensorLoader(dataset, img_size=img_size, repeats=repeats, skip_bad=skip_bad_images, **common)
                     for dataset in (train, val))
    make_transform = partial(create_transform, img_size, interpolation="bicubic", mean=mean, std=std,
                             use_prefetcher=True)  # as bytes
    transforms = (make_transform(is_training=True, auto_augment=auto_augment, color_jitter=color_jitter),
                  make_transform(crop_pct=crop_pct))
    splits = [Samples(dataset, transform, skip_bad_images) for dataset, transform in zip((train, val), transforms)]
    pool = Pool(splits, seed, workers, pin_memory=device.type == "cuda")
    erasing = RandomErasing(random_erasing, mode="pixel", device=device) if random_erasing else None
    return StreamLoader(pool, 0, erasing, **common), StreamLoader(pool, 1, **common)
