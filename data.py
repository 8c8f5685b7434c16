"""Data: the embedded `shapes` set, any folder or timm data set, and the same batches on every machine.

With repeated augmentation an epoch has `repeats` copies of an image, and `repeat` is the number of a
copy. A training sample depends on (seed, epoch, index, repeat, repeats). A global batch depends also on
the batch size. Neither depends on the number of processes or workers, or on interruptions.
"""
import hashlib
import itertools
import os
import random
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
from torchvision.datasets.folder import IMG_EXTENSIONS


class DataError(ValueError):
    """Data that cannot be used, or an image that cannot be read."""


# ---------- shapes: 20 classes = shape (contour, low frequency) x texture (detail, high frequency)

SHAPES = ("disk", "square", "triangle", "ring", "star")
TEXTURES = ("gradient", "stripes", "checker", "noise")
SIZE = 32
VAL_SIZE = 4000


def draw_shapes(count, split="train", seed=0):
    """Draw images 0..count-1 of a split -> (images uint8 [count, 3, 32, 32], labels int64 [count]).

    Image i depends on (seed, split, i) only; its class is i mod 20. About 0.3 ms an image.
    """
    number = ("train", "val").index(split)
    # NumPy fills tables row by row. So row i is the same for every count.
    table_generator = np.random.default_rng([seed, number, 0])
    pixel_generator = np.random.default_rng([seed, number, 1])
    labels = np.arange(count) % (len(SHAPES) * len(TEXTURES))
    chunks = []
    for part in np.array_split(labels, max(1, count // 1000)):  # in parts, to save memory
        table = table_generator.random((len(part), 35), np.float32)
        pixels = pixel_generator.random((len(part), 2, SIZE, SIZE), np.float32)
        chunks.append(_draw(table, pixels, part))
    images = torch.from_numpy(np.concatenate(chunks)).permute(0, 3, 1, 2)
    return images.contiguous(), torch.from_numpy(labels)


def _draw(table, pixels, labels):
    """Draw n images from random numbers in [0, 1), by a formula -> uint8 [n, 32, 32, 3].

    table [n, 35]: a number for each call of `uniform`, in order. pixels [n, 2, 32, 32], labels [n].
    """
    columns = iter(table.T)
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2
    rows = np.arange(len(labels))
    shape, texture = np.divmod(labels, len(TEXTURES))

    def uniform(low, high):  # a number for each image: [n, 1, 1]
        return low + (high - low) * next(columns)[:, None, None]

    def colour(low, high):  # [n, 1, 1, 3]
        return np.stack([uniform(low, high) for _ in range(3)], axis=-1)

    def rotated(x, y, turn):
        cos = np.cos(turn)
        sin = np.sin(turn)
        return x * cos + y * sin, y * cos - x * sin

    def paint(image, coverage, rgb):  # coverage: [n, 32, 32]
        return image + np.clip(coverage, 0, 1)[..., None] * (rgb - image)

    def add_bar(image):  # clutter: a small bar anywhere
        x = xs - uniform(-16, 16)
        y = ys - uniform(-16, 16)
        x, y = rotated(x, y, uniform(0, np.pi))
        half_length = uniform(1.5, 8)
        half_width = uniform(1, 2)
        bar = np.minimum(half_length - abs(x), half_width - abs(y))
        return paint(image, bar, colour(0, 0.6))

    # Background: dark, with a slight gradient.
    slope = (xs + ys) / SIZE
    image = colour(0, 0.4) + colour(-0.15, 0.15) * slope[..., None]
    image = add_bar(image)

    # Shape: a function of the place, which is positive inside. Its unit is the radius.
    radius = uniform(10, 13)
    x = xs - uniform(-1, 1)
    y = ys - uniform(-1, 1)
    x, y = rotated(x, y, uniform(-0.35, 0.35))
    u = x / radius
    v = y / radius
    rho = np.hypot(x, y) / radius
    phi = np.arctan2(y, x)
    normals = np.pi * np.array([1 / 6, 5 / 6, 9 / 6])  # of the triangle's sides
    triangle = np.max([u * np.cos(k) + v * np.sin(k) for k in normals], axis=0)
    inside = np.stack([
        0.9 - rho,  # disk
        0.8 - np.maximum(abs(u), abs(v)),  # square
        0.55 - triangle,
        0.27 - abs(rho - 0.68),  # ring
        0.68 + 0.26 * np.cos(5 * phi) - rho,  # star
    ])[shape, rows]  # picks each image's shape

    # Texture: a number in [0, 1] at every pixel, which mixes two colours.
    p, q = rotated(x, y, uniform(0, 2 * np.pi))
    frequency = 2 * np.pi / uniform(5, 7)  # stripes and checkers repeat every 5 to 7 pixels
    wave_p = np.sin(frequency * p)
    wave_q = np.sin(frequency * q)
    pattern = np.stack([
        np.clip(0.5 + 0.5 * p / radius, 0, 1),  # gradient
        0.5 + 0.5 * np.tanh(3 * wave_p),  # stripes
        0.5 + 0.5 * np.tanh(3 * wave_p * wave_q),  # checker
        pixels[:, 0],  # noise
    ])[texture, rows]  # picks each image's texture
    base = colour(0.5, 0.9)
    contrast = uniform(0.45, 0.6)[..., None] + colour(-0.15, 0.15)
    texture_colour = base + (pattern[..., None] - 0.5) * contrast
    image = paint(image, inside * radius + 0.5, texture_colour)  # with an edge of one pixel

    image = add_bar(image)  # something in front
    image = image + (pixels[:, 1, ..., None] - 0.5) * 0.12  # sensor noise
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


class Shapes(Dataset):
    """The embedded set: (PIL image, label)."""

    def __init__(self, count, split, label_noise=0.0):
        self.images, labels = draw_shapes(count, split)
        draws = torch.from_numpy(np.random.default_rng([0, 2]).random((count, 2)))
        classes = len(SHAPES) * len(TEXTURES)
        guesses = (draws[:, 1] * classes).long()  # a guess may be right by chance
        self.labels = torch.where(draws[:, 0] < label_noise, guesses, labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index].permute(1, 2, 0).numpy()
        return Image.fromarray(image), int(self.labels[index])


# ---------- Opening a data set


class Images(NamedTuple):
    """A data set: its two splits, and the names of its classes in the order of the labels."""

    train: Dataset
    val: Dataset
    classes: list


KINDS_OF_DATA = (
    "Give shapes, torch/NAME, hfds/NAME, or a folder that holds train/ and val/ with one folder of "
    ".jpg, .png, ... per class")


def open_data(name, train_size=4000, label_noise=0.0, only_val=False):
    """Open a data set -> Images. Raises DataError or OSError for what cannot be used.

    name: "shapes": `train_size` images to train on, a share `label_noise` of them with random labels;
          a folder that holds train/ and val/ with one folder per class;
          or a name that timm.data.create_dataset knows (torch/cifar100, hfds/...), kept in data/.
    only_val: a folder needs no train/, and may hold the class folders itself. Its train is its val.
    """
    if name == "shapes":
        train = Shapes(train_size, "train", label_noise)
        val = Shapes(VAL_SIZE, "val")
        names = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
        return Images(train, val, names)
    if name.startswith(("torch/", "hfds/")):
        return _open_timm(name)
    root = Path(name)
    if only_val:
        val = Folder(root / "val" if (root / "val").is_dir() else root)
        return Images(val, val, val.classes)
    train = Folder(root / "train")
    val = Folder(root / "val")
    check_classes(train, val)
    return Images(train, val, val.classes)


class Folder(Dataset):
    """A folder of images for each class: (PIL image, label)."""

    def __init__(self, root):
        self.root = root
        self.classes = []
        self.samples = []  # (path, label)
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and is_visible(folder.name):
                self.samples += [(path, len(self.classes)) for path in find_images(folder)]
                self.classes.append(folder.name)
        if not self.samples:
            raise DataError(f"{root} holds no images. {KINDS_OF_DATA}")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return load_image(path), label


def check_classes(train, val):
    """Refuse splits that do not fit each other, and classes without training images."""
    unshared = sorted({*train.classes} ^ {*val.classes})
    if unshared or len(train.classes) < 2:
        raise DataError(
            f"{train.root} and {val.root} must hold the same folders, one per class, two or more; "
            f"not in both: {unshared[:5]}")
    filled = {label for _, label in train.samples}
    for label, name in enumerate(train.classes):
        if label not in filled:
            folder = train.root / name
            files = os.listdir(folder)[:3]
            raise DataError(
                f"{folder} holds no .jpg, .png, ..., only {files}: convert these, or remove it")


def is_visible(name):
    return not name.startswith((".", "__MACOSX", "@eaDir"))  # leftovers of macOS and of a NAS


def find_images(folder):
    """The sorted paths of all images below a folder, without what is hidden."""
    found = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(filter(is_visible, folders))  # in place: os.walk enters only these
        for name in sorted(filter(is_visible, names)):
            if name.lower().endswith((*IMG_EXTENSIONS, ".jfif")):
                found.append(os.path.join(where, name))
    return found


UNREADABLE = (  # what PIL raises
    OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


def load_image(path):
    """A file as RGB. Raises DataError."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except UNREADABLE as error:
        raise DataError(f"cannot read image {path} ({error})") from None


def to_rgb(image):
    """Convert to RGB; of 16 bits keep the upper 8. Raises ValueError for pixels of unknown range."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range: save it with 8 bits")
    return image.convert("RGB")


def _open_timm(name):
    """A data set of timm.data.create_dataset. The first process of each node downloads, the others wait."""
    waits = dist.is_initialized()
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if waits and not first:
        dist.barrier()  # until the first has reached its barrier below
    try:
        options = dict(root="data", download=True)
        train = create_dataset(name, split="train", is_training=True, **options)
        val = create_dataset(name, split="validation", **options)
    except Exception as error:  # each back end raises its own kind
        raise DataError(f"cannot open data set {name}: {str(error)[:200]}") from error
    finally:
        if waits and first:
            dist.barrier()
    classes = getattr(train, "classes", None)
    if not classes and hasattr(train, "reader"):
        classes = getattr(train.reader, "class_to_idx", None)
    if not classes:  # no names: the labels are counted
        classes = range(1 + max(label for _, label in train))
    return Images(train, val, list(map(str, classes)))  # ImageNet's are tuples


# ---------- Which samples make up which batch


def seed_of(*numbers):
    """A 32-bit seed from any numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def training_batches(
        size, batch_size, *, seed, epoch, start=0, repeats=1, accum=1, rank=0, world=1):
    """This process's micro-batches of an epoch, from update `start` on: arrays [b, 2] of (index, repeat).

    Each batch is cut into `accum` parts, and each part is shared by `world` processes. An epoch holds
    size / repeats images, each `repeats` times; an incomplete last batch is dropped.
    """
    sampler = RepeatAugSampler(
        range(size), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0)
    sampler.set_epoch(seed_of(seed, epoch))
    order = np.fromiter(sampler, np.int64)
    keys = np.stack([order, np.arange(size) % repeats], axis=1)
    updates = keys[:size // batch_size * batch_size].reshape(-1, batch_size, 2)
    batches = []
    for update in updates[start:]:
        for part in np.split(update, accum):
            batches.append(part[rank::world])
    return batches


def evaluation_batches(size, batch_size, *, rank=0, world=1):
    """This process's share of 0..size-1, in batches. All processes together have each index once."""
    indices = np.arange(rank, size, world)
    keys = np.stack([indices, np.zeros_like(indices)], axis=1)
    return np.split(keys, range(batch_size, len(keys), batch_size)) if len(keys) else []


# ---------- Loaders: images reach the device as uint8 and are normalised there


class Samples(Dataset):
    """samples[epoch, index, repeat] = (transformed image, label, seed). Raises DataError.

    The transform's random numbers follow from the seed, as does random erasing later. With `skip_bad`
    the next image takes the place of one that cannot be read.
    """

    def __init__(self, dataset, transform, seed, skip_bad):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.skip_bad = skip_bad

    def __getitem__(self, key):
        epoch, index, repeat = key
        text = repr((self.seed, epoch, index, repeat))
        digest = hashlib.blake2s(text.encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little")  # as seed_of, but 0.1 ms faster
        random.seed(seed)  # timm's transforms draw from all three
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would ask every device
        image, label = self.read(index)
        return self.transform(image), label, seed

    def read(self, first):
        for index in itertools.chain(range(first, len(self.dataset)), range(first)):
            try:
                image, label = self.dataset[index]
                return to_rgb(image), label
            except UNREADABLE as error:
                message = f"image {index}: {error}"
                if not self.skip_bad:
                    raise DataError(f"{message}: mend it, or --skip-bad-images") from None
                print(f"warning: skipped: {message}", flush=True)
        raise DataError("no image can be read")


class Loader:
    """The base of the two below: `size`, the number of images, and `normalise`, uint8 -> float32."""

    def __init__(self, size, mean, std, device, seed):
        mean, std = torch.tensor(mean), torch.tensor(std)
        self.scale = std.to(device).view(3, 1, 1).mul(255).reciprocal()
        self.mean_by_std = (mean / std).view(3, 1, 1).to(device)
        self.size = size
        self.device = device
        self.seed = seed

    def normalise(self, images):
        return images.float().mul_(self.scale).sub_(self.mean_by_std)


class TensorLoader(Loader):
    """Small images (below 64 px): all of them as uint8 [N, 3, S, S] on the device, augmented in batches."""

    evaluation_batch = 250  # images

    def __init__(self, dataset, img_size, repeats, skip_bad, **common):
        super().__init__(len(dataset), **common)
        self.repeats = repeats
        transform = create_transform(
            img_size, crop_pct=1.0, interpolation="bicubic", normalize=False)
        samples = Samples(dataset, transform, 0, skip_bad)
        decoded = [samples[0, index, 0] for index in range(self.size)]
        images, labels, _ = zip(*decoded)
        self.images = torch.stack(images).to(self.device)
        self.labels = torch.tensor(labels).to(self.device)

    def load(self, batches, epoch=None):
        """Yield (images [b, 3, S, S], labels [b]) on the device for batches of keys.

        Within an `epoch` the images are augmented.
        """
        if epoch is not None:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, 1))
            draws = torch.rand(self.size, self.repeats, 3, generator=generator).to(self.device)
        for keys in batches:
            keys = torch.from_numpy(keys).to(self.device)
            index, repeat = keys.unbind(1)
            images = self.images[index]
            if epoch is not None:
                images = pad_crop_flip(images, draws[index, repeat])
            yield self.normalise(images), self.labels[index]


def pad_crop_flip(images, draws, padding=4):
    """Shift each image by up to `padding` pixels, zeros moving in, and mirror half of them.

    Images [b, C, S, S] of any dtype; draws [b, 3] in [0, 1): for down, right, mirror.
    """
    shifts = (draws[:, :2] * (2 * padding + 1)).long()
    down, right = shifts.unbind(1)
    steps = torch.arange(images.shape[-1], device=images.device)
    ys = down[:, None] + steps  # [b, S]
    xs = right[:, None] + torch.where(draws[:, 2:] < 0.5, steps.flip(0), steps)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, [padding] * 4)
    return padded[batch, :, ys[:, :, None], xs[:, None, :]].movedim(-1, 1)


class StreamLoader(Loader):
    """Large images (from 64 px): worker processes decode and augment them, and live for the whole training.

    The DataLoader reads `self.batches` anew in each epoch, so `load` puts the keys there.
    """

    evaluation_batch = 64  # 10 MB at 224 px: a container's /dev/shm is small

    def __init__(self, samples, workers, erasing=None, **common):
        super().__init__(len(samples.dataset), **common)
        self.erasing = erasing
        self.batches = []  # the keys of the epoch's batches
        self.loader = DataLoader(
            samples, batch_sampler=self.batches, pin_memory=self.device.type == "cuda",
            num_workers=workers, persistent_workers=workers > 0, worker_init_fn=leave_process_group)

    def load(self, batches, epoch=None):
        """As TensorLoader.load."""
        self.batches.clear()
        for keys in batches:
            self.batches.append([(epoch or 0, *key) for key in keys.tolist()])
        for images, labels, seeds in self.loader:
            images = self.normalise(images.to(self.device, non_blocking=True))
            if self.erasing:
                for image, seed in zip(images, seeds.tolist()):
                    random.seed(seed)  # of its own: the same in any batch
                    torch.manual_seed(seed)
                    self.erasing(image)
            yield images, labels.to(self.device, non_blocking=True)


def leave_process_group(worker):
    """Only the main process answers Ctrl-C and torchrun's signals."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def default_workers():
    """This process's share of the cores, 16 at most: more would exhaust open files before they help."""
    share = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, share))


def at_least_one_bit(level_to_arg, level, hparams):
    """timm's posterize may keep 0 bits of a colour, which Pillow 13 refuses: keep at least 1."""
    return (max(1, level_to_arg(level, hparams)[0]),)


for _name in ("Posterize", "PosterizeIncreasing"):  # no lambdas: spawned workers unpickle them
    auto_augment.LEVEL_TO_ARG[_name] = partial(at_least_one_bit, auto_augment.LEVEL_TO_ARG[_name])


def build_loaders(
        train, val, *, img_size, mean, std, device, seed=0, repeats=1, workers=2, crop_pct=0.875,
        auto_augment=None, random_erasing=0.0, skip_bad_images=False):
    """Loaders of the two data sets: `.load(batches, epoch)` with the batches of the functions above.

    Below 64 px: pad-crop and flip. From 64 px: timm's ImageNet pipeline, in `workers` processes for
    each of the two (0: in this process).
    """
    common = dict(mean=mean, std=std, device=device, seed=seed)
    if img_size < 64:
        return (
            TensorLoader(train, img_size, repeats, skip_bad_images, **common),
            TensorLoader(val, img_size, repeats, skip_bad_images, **common))
    make_transform = partial(
        create_transform, img_size, interpolation="bicubic", mean=mean, std=std,
        use_prefetcher=True)  # then the images are uint8, not yet normalised
    augment = make_transform(is_training=True, auto_augment=auto_augment, color_jitter=None)
    resize = make_transform(crop_pct=crop_pct)
    erasing = None
    if random_erasing:
        erasing = RandomErasing(random_erasing, mode="pixel", device=device)
    train_samples = Samples(train, augment, seed, skip_bad_images)
    val_samples = Samples(val, resize, seed, skip_bad_images)
    return (
        StreamLoader(train_samples, workers, erasing, **common),
        StreamLoader(val_samples, workers, **common))
