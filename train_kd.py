"""Distil a vision transformer into a smaller one.

    torchrun train_kd.py --method spectral                     # embedded data and teacher, any laptop
    python train_kd.py --method lift                           # one process without torchrun, the same path
    python train_kd.py --method none --variant widened         # a student alone, no teacher
    torchrun --nproc_per_node=4 train_kd.py --data /data/imagenet --first 1 --last 1
    python train_kd.py --data DIR --student NAME --student-weights pretrained --teacher-weights runs/teacher
    python train_kd.py --eval --out runs/spectral              # accuracy of a run's student
    python train_kd.py ... --dry-run                           # build everything, print it, train nothing

The run's folder receives config.json, log.jsonl (a line an epoch), last.pt, best.pt, epoch_NNNN.pt,
student.safetensors and student_ema.safetensors.
"""
import argparse
import contextlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import models
from losses import METHODS, Distiller

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

# ----------------------------------------------------------------------
# Hyperparameters: each is a flag and its comment the help. Those of an objective stand in its constructor (losses.py).

IMAGENET = dict(  # DD appendix C.3 and the released code: DeiT's recipe without mixup and cutmix
    student="deit_tiny_patch16_224",      # timm model that learns
    teacher="cait_s24_224",               # timm model that teaches
    teacher_weights="",                   # a file, a run's folder or random; else timm's pretrained
    img_size=224,                         # px; by default the student's own
    epochs=300,                           # passes over the training images
    batch_size=2048,                      # global; by default smaller for 20 updates an epoch of a small set
    accum=1,                              # gradient accumulation steps
    lr=2e-3,                              # peak; by default scales with the batch (from weights: its square root)
    min_lr=1e-5,                          # at the end of the cosine
    warmup_lr=1e-6,                       # at the start
    warmup_epochs=5.0,                    # of linear warm-up
    weight_decay=0.05,                    # AdamW's
    ema_decay=0.99996,                    # of the averaged student that is evaluated beside the student
    repeats=3,                            # repeated augmentation: times each image comes in its batch
    auto_augment="rand-m9-mstd0.5-inc1",  # timm's RandAugment; as the next three for images from 64 px
    color_jitter=0.4,                     # strength
    random_erasing=0.25,                  # probability
    crop_pct=0.875,                       # share of the image that evaluation looks at
    train_size=4000,                      # training images of shapes to draw
    label_noise=0.2,                      # share of the training labels of shapes that are drawn at random
    seed=0)                               # of all that is drawn
TOY = dict(IMAGENET, student="deit_toy_patch8_32", teacher="cait_toy_patch8_32", img_size=32, epochs=30, batch_size=64,
           warmup_epochs=2.0, ema_decay=0.99, repeats=1)
RECIPES = {"imagenet": IMAGENET, "small": TOY,  # small: images below 64 px
           "shapes": dict(TOY, teacher_weights="weights/cait_toy_shapes.safetensors")}

# ----------------------------------------------------------------------
# The loop


def update(run, stream):
    """One optimizer step on the next global batch of the stream. Its loss terms are added to run.sums."""
    accum = run.settings.accum
    for part in range(accum):
        images, labels = next(stream)
        torch.manual_seed(data.seed_of(run.settings.seed, run.step, RANK, part))  # of drop-path and the like
        with torch.no_grad(), run.autocast("teacher"):
            taught = run.teacher(images) if run.teacher else None
        last = part == accum - 1  # only then do the processes share their gradients
        with contextlib.nullcontext() if last or WORLD == 1 else run.ddp.no_sync():
            with run.autocast("student"):
                _, terms = run.ddp(images, labels, taught)  # the loop never asks which method runs
            (sum(terms.values()) / accum).backward()
        for name, value in terms.items():
            run.sums[name] = run.sums.get(name, 0) + value.detach() / accum
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(run.student, step=run.step)
    run.step += 1


def train(run):
    """Train from where the run stands to its last epoch."""
    settings, steps, stop = run.settings, run.steps, Stop()
    for epoch in range(len(run.log), settings.epochs):
        start, began = run.step - epoch * steps, time.time()  # start = steps if only the evaluation is missing
        batches = data.training_batches(run.train_loader.size, settings.batch_size, seed=settings.seed, epoch=epoch,
                                        start=start, repeats=settings.repeats, accum=settings.accum, rank=RANK,
                                        world=WORLD)
        stream = run.train_loader.load(batches, epoch)
        run.distiller.train()
        for i in tqdm(range(start, steps), desc=f"epoch {epoch + 1}", leave=False, disable=RANK > 0 or None):
            run.scheduler.step_update(run.step)
            update(run, stream)
            received = stop.asked()
            if received and i + 1 < steps:
                save(run)
                say(f"stopped by {signal.Signals(received).name} after step {run.step}: go on with --resume --out "
                    f"{run.out}")
                sys.exit(128 + received)
            if i % 50 == 49:
                mean_sums(run)  # ends the run at NaN; nothing else waits for the device

        seconds = time.time() - began
        save(run)  # a signal in the evaluation loses nothing
        terms = {name: value / steps for name, value in mean_sums(run).items()}
        (top1, top5, _), (ema_top1, ema_top5, _) = evaluate([run.student, run.ema.module], run.val_loader,
                                                            run.autocast("student"))
        run.log.append({"epoch": epoch, "step": run.step, "lr": run.optimizer.param_groups[0]["lr"],
                        "loss": sum(terms.values()), "terms": terms, "top1": top1, "top5": top5, "ema_top1": ema_top1,
                        "ema_top5": ema_top5, "images_per_s": (steps - start) * settings.batch_size / seconds,
                        "seconds": time.time() - began})
        run.sums = {}
        if RANK == 0:
            report(run)
            write_epoch(run)
        save(run)


def mean_sums(run):
    """The sums of this epoch's loss terms, averaged over the processes. NaN or infinity ends all of them."""
    sums = torch.stack([*run.sums.values()])
    if WORLD > 1:
        dist.all_reduce(sums)
        sums /= WORLD
    sums = dict(zip(run.sums, sums.tolist()))
    for name, value in sums.items():
        if not math.isfinite(value):
            fail(f"loss term {name!r} is {value} by step {run.step}; the last checkpoint is unharmed: try a lower --lr, a "
                 f"lower --beta or --amp off")
    return sums


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # graphs are for training's mode and batch: here they would be made anew
def evaluate(hooked, loader, autocast):
    """[(top-1 %, top-5 %, cross-entropy)] of hooked models: one pass over all processes, every image once."""
    sums = torch.zeros(len(hooked), 3, device=loader.device)
    for model in hooked:
        model.eval()
    batches = data.evaluation_batches(loader.size, loader.evaluation_batch, rank=RANK, world=WORLD)
    for images, labels in loader.load(batches):
        for model, row in zip(hooked, sums):
            with autocast:
                logits, _ = model(images)
            found = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            row += torch.stack([found[:, 0].sum(), found.sum(), loss])
    if WORLD > 1:
        dist.all_reduce(sums)
    size = loader.size
    return [(100 * top1 / size, 100 * top5 / size, loss / size) for top1, top5, loss in sums.tolist()]


class Stop:
    """Remembers SIGTERM and Ctrl-C, and lets all processes agree on the moment to stop."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.received = number

    def asked(self):
        """The number of the signal that any process has received, or 0."""
        received = torch.tensor(self.received)
        if WORLD > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)
        return received.item()


# ----------------------------------------------------------------------
# Building


def build(settings, classes):
    """-> HookedModel teacher or None, Distiller, the mean and std that images are normalised with."""
    method = METHODS[settings.method]
    options = {name: getattr(settings, name) for name in method.options()}
    common, teacher, width = dict(num_classes=classes, img_size=settings.img_size), None, None
    if method.needs_teacher or settings.variant != "plain":
        teacher = models.build_teacher(
            settings.teacher, settings.teacher_weights, **common, random_head=settings.teacher_head == "random",
            needed=method.needs_teacher, blank=settings.dry_run, **settings.teacher_kwargs)
        width = models.layer_widths(teacher)[-1]
    student = models.build_model(settings.student, **common, variant=settings.variant, teacher_width=width,
                                 **settings.student_kwargs)
    resumed = settings.resume and (Path(settings.out) / "last.pt").exists()
    if settings.student_weights and not settings.dry_run and not resumed:
        say(models.start_from(student, settings.student, settings.student_weights, settings.img_size, settings.variant))
    layers_s, layers_t = models.pair_layers(student, teacher, settings) if options.get("beta") else ([], [])
    statistics, hooked_s, hooked_t = models.statistics(student), models.HookedModel(student, layers_s), None
    if method.needs_teacher:
        hooked_t = models.HookedModel(teacher, layers_t, **statistics).eval().requires_grad_(False)
        options["channels"] = [*zip(hooked_s.channels, hooked_t.channels)]
    return hooked_t, Distiller(hooked_s, method(**options)), statistics


class Run:
    """What the loop works with, and how far it has come: `step` updates, a `log` with a record for each epoch, and the
    running `sums` of this epoch's loss terms."""

    def __init__(self, settings, device, teacher, distiller, loaders):
        self.settings, self.device, self.teacher, self.distiller = settings, device, teacher, distiller
        self.student, self.out, (self.train_loader, self.val_loader) = distiller.student, Path(settings.out), loaders
        self.step, self.log, self.sums = 0, [], {}
        self.steps = self.train_loader.size // settings.batch_size  # updates in an epoch
        self.optimizer = create_optimizer_v2(distiller, "adamw", lr=settings.lr, weight_decay=settings.weight_decay,
                                             fused=device.type in ("cpu", "cuda"))
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=settings.epochs, min_lr=settings.min_lr, warmup_lr=settings.warmup_lr,
            warmup_epochs=settings.warmup_epochs, step_on_epochs=False, updates_per_epoch=self.steps)
        # Without its warm-up the random initial weights would dominate the average for thousands of updates.
        self.ema = ModelEmaV3(self.student, decay=settings.ema_decay, use_warmup=True)
        for model in filter(None, (teacher, self.student) if settings.compile else ()):
            model.compile(fullgraph=True, dynamic=False)  # in place, after the EMA's copy
        self.ddp = DistributedDataParallel(distiller, gradient_as_bucket_view=True) if WORLD > 1 else distiller

    def autocast(self, who):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp in (who, "both"))


@torch.no_grad()
def describe(settings, teacher, distiller, images):
    """What --dry-run prints and config.json keeps. One forward pass of zeros finds grids that do not fit."""
    zeros, labels = torch.zeros(2, 3, settings.img_size, settings.img_size), torch.zeros(2, dtype=torch.long)
    taught = teacher(zeros) if teacher else (None, ())
    logits, maps = distiller.eval().student(zeros)
    distiller.method(labels, logits, maps, *taught)
    parts = {"student": distiller.student, "method": distiller.method, **({"teacher": teacher} if teacher else {})}
    return {"settings": {name: value for name, value in vars(settings).items() if name not in OF_THIS_CALL},
            "parameters": {who: sum(p.numel() for p in part.parameters()) for who, part in parts.items()},
            "layers": {"student": distiller.student.layers, "teacher": teacher.layers if teacher else []},
            "maps": {"student": [list(A.shape[1:]) for A in maps], "teacher": [list(A.shape[1:]) for A in taught[1]]},
            "images": images.counts(), "class_names": images.names, "commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            "command": " ".join(sys.argv)}


def git_commit():
    with contextlib.suppress(OSError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None


# ----------------------------------------------------------------------
# Files


def write(path, save_to):
    """Write beside and rename: a crash or a full disk leaves the former file whole. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_to(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path} ({models.one_line(error)}), former files are unharmed: make room and "
                      f"--resume, or choose another --out") from error


def write_text(path, text):
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def save(run):
    """last.pt, by the first process. What it does not hold is made again from the settings."""
    sums = mean_sums(run) if run.sums else {}
    if RANK == 0:
        state = {"distiller": run.distiller.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "ema": run.ema.module.state_dict(), "step": run.step, "log": run.log, "sums": sums}
        write(run.out / "last.pt", partial(torch.save, state))


def load(run):
    """Go on from last.pt; from the start if the run has not come to write one."""
    path = run.out / "last.pt"
    if not path.exists() and not path.with_name("log.jsonl").exists():
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run.distiller.load_state_dict(state["distiller"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.ema.module.load_state_dict(state["ema"])
        run.step, run.log = state["step"], state["log"]
        run.sums = {name: torch.tensor(value, device=run.device) for name, value in state["sums"].items()}
    except Exception as error:  # cut short, foreign, or a pickle with code
        raise ValueError(f"cannot resume from {path}, which is damaged or not of this run: restore it, or start again "
                         f"with --overwrite ({models.one_line(error)})") from error
    refuse(run.step > run.settings.epochs * run.steps, f"the run is beyond --epochs {run.settings.epochs} already")


def open_folder(settings, description):
    """Clear the run's folder of a run that --overwrite replaces, write config.json."""
    out = Path(settings.out)
    for old in [] if settings.resume else out.glob("*.*"):
        if old.suffix in (".pt", ".part", ".jsonl", ".safetensors", ".png"):
            old.unlink()
    if settings.resume:  # the command that makes the run from nothing
        description["command"] = models.read_config(out)["command"]
    write_text(out / "config.json", json.dumps(description, indent=1))


def write_epoch(run):
    """log.jsonl, best.pt if the epoch beats all former ones, epoch_NNNN.pt every `snapshot_every` epochs."""
    out, (*former, record) = run.out, run.log
    weights = {"model": run.student.model.state_dict(), "epoch": record["epoch"], "top1": record["top1"]}
    if record["top1"] > max((each["top1"] for each in former), default=-1):
        write(out / "best.pt", partial(torch.save, weights))
    if len(run.log) % run.settings.snapshot_every == 0:
        write(out / f"epoch_{len(run.log):04d}.pt", partial(torch.save, weights))
    write_text(out / "log.jsonl", "".join(json.dumps(each) + "\n" for each in run.log))


def report(run):
    """One line an epoch, with the time that the rest will take."""
    record, epochs = run.log[-1], run.settings.epochs
    terms = " + ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
    say(f"epoch {len(run.log):3d}/{epochs}  loss {record['loss']:.4f} = {terms}  top-1 {record['top1']:.2f} %  EMA "
        f"{record['ema_top1']:.2f} %  {record['images_per_s']:.0f} images/s  "
        f"{record['seconds'] * (epochs - len(run.log)) / 60:.1f} min left")


def finish(run):
    """The student and its EMA, as timm loads them."""
    for name, student in (("student", run.student), ("student_ema", run.ema.module)):
        weights = {key: value.contiguous() for key, value in student.model.state_dict().items()}
        write(run.out / f"{name}.safetensors", lambda part: part.write_bytes(safetensors.torch.save(weights)))
    say(f"done: {run.out}: top-1 {run.log[-1]['top1']:.2f} %, EMA {run.log[-1]['ema_top1']:.2f} %; curves and layers: "
        f"python analyze.py --models {run.out}")


# ----------------------------------------------------------------------
# Settings: defaults < recipe < method < saved run < what was typed

OF_THIS_CALL = {"resume", "overwrite", "dry_run", "eval"}
FREE = {"data", "epochs", "out", "snapshot_every", "workers", "device", "amp", "compile"}  # may change with --resume
OF_EVAL = {"eval", "out", "data", "crop_pct", "skip_bad_images", "workers", "device", "amp"}
LARGE = {"auto_augment", "color_jitter", "random_erasing", "crop_pct", "workers"}  # have an effect from 64 px on
SHARES = {"ema_decay", "random_erasing", "crop_pct", "label_noise"}
ABOVE_0 = {"img_size", "epochs", "batch_size", "accum", "lr", "repeats", "crop_pct", "train_size", "snapshot_every"}
LAYERS = {"first", "last", "student_layers", "teacher_layers"}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument_group(f"hyperparameters, by recipe: {', '.join(RECIPES)}").add_argument
    helps = dict(re.findall(r"^    (\w+)=.*# (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))
    for name, value in IMAGENET.items():
        values = ", ".join(dict.fromkeys(str(recipe[name]) for recipe in RECIPES.values()))
        add(flags([name]), type=type(value), default=value, metavar="X", help=f"{helps[name]} ({values})")
    add = parser.add_argument_group("objective (DD Eq. 10, 11, 14), by method").add_argument
    for name in sorted({name for method in METHODS.values() for name in method.options()}):
        takers = {key: method.options()[name] for key, method in METHODS.items() if name in method.options()}
        value, text = next(iter(takers.values()))
        text += f" ({', '.join(f'{key} {default}' for key, (default, _) in takers.items())})"
        kind = dict(action=argparse.BooleanOptionalAction) if type(value) is bool else dict(type=type(value))
        add(flags([name]), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)
    add = parser.add_argument_group(f"the rest; --resume may change {flags(FREE)}").add_argument
    pairs = dict(nargs="+", type=models.key_value, action=ParseKwargs, default={}, metavar="KEY=VALUE")
    layers = dict(nargs="+", type=int, default=[], metavar="L")
    add("--method", choices=METHODS, default="spectral")
    add("--variant", choices=models.VARIANTS, default="", help="of the student (default: the method's own)")
    add("--student-kwargs", **pairs, help="for timm: embed_dim=219 num_heads=3 is EM's UniformWide")
    add("--student-weights", default="", help="where it starts: pretrained (timm's), a file, a run's folder")
    add("--teacher-kwargs", **pairs)
    add("--teacher-head", choices=("pretrained", "random"), default="pretrained",
        help="random: it has no classifier for this data (DD Table 2)")
    add("--first", type=int, default=0, help="align the first X layers (default: the method's own)")
    add("--last", type=int, default=0, help="align the last Y; with one of both the other is 0")
    add("--student-layers", **layers, help="explicit, ascending, timm's indices from 0")
    add("--teacher-layers", **layers, help="as many of the teacher's")
    add("--data", default="shapes", help="shapes, a folder with train/ and val/, torch/NAME, hfds/NAME")
    add("--skip-bad-images", action="store_true", help="take the next image for one that cannot be read")
    add("--out", default="", help="folder of the run (default: runs/METHOD)")
    add("--snapshot-every", type=int, default=0, help="epochs between epoch_NNNN.pt (default: a tenth)")
    add("--workers", type=int, default=-1, help="data processes (default: this process's share of the cores)")
    add("--device", choices=("cpu", "cuda", "mps"), default="", help="default: cuda, else mps (Apple), else cpu")
    add("--amp", nargs="?", choices=("off", "teacher", "student", "both"), const="both", default="",
        help="bfloat16 (default: both from 64 px where the device computes in it, else off)")
    add("--compile", action="store_true", help="a graph each for student and teacher")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--dry-run", action="store_true", help="build everything untrained, print it, end")
    add("--eval", action="store_true", help="accuracy of the run in --out, then end")
    return parser


def flags(names):
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def read_flags(parser, argv=None):
    """-> the defaults of all flags, and what was typed: None stands for what was not, while argparse reads."""
    defaults = vars(parser.parse_args([]))
    found = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    return defaults, {name: value for name, value in found.items() if value is not None}


def resolve(defaults, typed, device):
    """-> settings (a Namespace) and data.Images. Raises ValueError for what does not fit together."""
    check_ranges(typed)
    former = {}
    if "resume" in typed or "eval" in typed:
        former = models.read_config(typed.get("out") or f"runs/{typed.get('method', 'spectral')}")
    saved = former.get("settings", {})
    chosen = {**saved, **typed}
    known = {**defaults, **chosen}
    images = data.open_data(known["data"], known["train_size"], known["label_noise"], only_val=known["eval"])
    fitting = {**models.native_size(chosen.get("student")), **models.taught_by(chosen.get("teacher_weights"))}
    size = {**fitting, **chosen}.get("img_size") or data.first_size(images.train, known["skip_bad_images"])
    name = "shapes" if known["data"] == "shapes" else "small" if size < 64 else "imagenet"
    recipe, method = {**RECIPES[name], "recipe": name}, METHODS[known["method"]]
    options = {name: default for name, (default, _) in method.options().items()}
    settings = argparse.Namespace(**{**defaults, **recipe, **fitting, **options, **saved, **typed})

    settings.variant = settings.variant or method.variant
    settings.out = settings.out or f"runs/{method.name}"
    settings.workers = data.default_workers() if settings.workers < 0 else settings.workers
    settings.amp = settings.amp or models.default_amp(device, settings.img_size)
    settings.snapshot_every = settings.snapshot_every or max(1, settings.epochs // 10)
    if not LAYERS & chosen.keys():
        settings.first, settings.last = method.first, method.last
    if "batch_size" not in chosen:
        settings.batch_size = fitting_batch(len(images.train), settings)
    if "lr" not in chosen:
        settings.lr = (1e-4 * (settings.batch_size / 64) ** 0.5 if settings.student_weights else
                       recipe["lr"] * settings.batch_size / recipe["batch_size"])
    if "warmup_epochs" not in chosen and settings.warmup_epochs >= settings.epochs:
        settings.warmup_epochs *= settings.epochs / recipe["epochs"]
    check(settings, typed, former, images, device)
    return settings, images


def fitting_batch(train_size, settings):
    """The recipe's, or for a small set the largest power of 2 that leaves 20 updates an epoch."""
    unit = WORLD * settings.accum
    fit = 2 ** max(0, (train_size // 20).bit_length() - 1)
    return settings.batch_size if settings.batch_size <= fit else max(unit, fit // unit * unit)


def refuse(condition, message):
    if condition:
        raise ValueError(message)


def check_ranges(typed):
    """All numbers are finite and not negative; those in ABOVE_0 are not 0, SHARES not above 1."""
    for name in typed.keys() & {*IMAGENET, "snapshot_every", "workers"}:
        value = typed[name]
        if type(value) in (int, float):
            top = 1 if name in SHARES else 2 ** 31
            refuse(not 0 <= value <= top or value == 0 and name in ABOVE_0,
                   f"{flags([name])} {value} is not {'above 0' if value == 0 else f'in 0 .. {top}'}")


def check(settings, typed, former, images, device):
    """Refuse flags without an effect, and settings that contradict each other, the data or the run to go on with."""
    method, saved, out = METHODS[settings.method], former.get("settings", {}), settings.out
    source = settings.teacher_weights
    from_run = Path(source or "random").is_dir()
    shaped_by = not from_run and (method.needs_teacher or settings.variant != "plain")
    useful = {**{name: name in method.options() for each in METHODS.values() for name in each.options()},
              **dict.fromkeys(("teacher_weights", "teacher_head"), method.needs_teacher),
              **dict.fromkeys(("teacher", "teacher_kwargs"), shaped_by),
              **dict.fromkeys(("train_size", "label_noise"), settings.data == "shapes"),
              **dict.fromkeys(LAYERS, "beta" in method.options()), **dict.fromkeys(LARGE, settings.img_size >= 64)}
    useful["first"] = useful["last"] = useful["first"] and not settings.student_layers
    idle = {name for name in typed if not useful.get(name, True) or settings.eval and name not in OF_EVAL}
    changed = sorted(name for name in saved.keys() & typed.keys() - FREE if saved[name] != typed[name])
    refuse(idle, f"{flags(idle)} would have no effect with these: method {method.name}, variant {settings.variant}, data "
                 f"{settings.data}, {settings.img_size} px{', --eval' * settings.eval}{', a run as teacher' * from_run}")
    refuse(settings.amp != "off" and device.type == "mps", "--amp does not work on mps: leave it out")
    refuse("warmup_epochs" in typed and settings.warmup_epochs >= settings.epochs,
           f"--warmup-epochs {settings.warmup_epochs} is not below --epochs {settings.epochs}")
    refuse(changed, f"the run in {out} has " + ", ".join(f"{flags([name])} {saved[name]}" for name in changed)
           + ": leave these as they were or choose another --out")
    refuse(settings.resume and former["images"] != images.counts(),
           f"the run in {out} had {former.get('images')} and {settings.data} has {images.counts()}")
    for config, who in ((former, out), (models.read_config(source) if from_run else {}, source)):
        classes = config.get("images", {}).get("classes", images.classes)
        refuse(classes != images.classes or config.get("class_names") not in (None, images.names),
               f"the model in {who} knows {classes} classes and {settings.data} has {images.classes}, or others")
    if settings.eval:
        return
    refuse(len(images.train) < settings.batch_size and not settings.dry_run,
           f"{len(images.train)} training images do not fill a batch of {settings.batch_size}: lower --batch-size")
    refuse(settings.batch_size % (WORLD * settings.accum), f"--batch-size {settings.batch_size} does not divide by "
           f"{WORLD} processes x {settings.accum} accumulation steps (--accum)")
    refuse((Path(out) / "config.json").exists() and not (settings.dry_run or settings.resume or settings.overwrite),
           f"{out} holds a run: go on with --resume, replace it with --overwrite, or choose another --out")


def fail(message):
    """One line on stderr and exit status 2."""
    if RANK > 0:  # all processes see the same mistake: the first one speaks, and its end makes torchrun stop all
        time.sleep(10)
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(text):
    if RANK == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------
# The program


def main(argv=None):
    defaults, typed = read_flags(make_parser(), argv)
    try:
        device = models.choose_device(typed.get("device"))  # of this call, not of the saved run
        connect(device)
        settings, images = resolve(defaults, typed, device)
        if settings.eval:
            return show_accuracy(settings, images, device)
        torch.manual_seed(settings.seed)
        teacher, distiller, statistics = build(settings, images.classes)
        description = describe(settings, teacher, distiller, images)
        if settings.dry_run:
            return say(json.dumps(description, indent=1))
        say(f"{settings.method}, {settings.variant} {settings.student}: {description['parameters']} parameters, layers "
            f"{description['layers']}, {description['images']}, batches of {settings.batch_size}, lr {settings.lr:.3g}")
        loaders = make_loaders(settings, images, statistics, device)
        # DDP's constructor waits for all processes: none still checks the folder when the first one writes to it.
        run = Run(settings, device, teacher and teacher.to(device), distiller.to(device), loaders)
        if settings.resume:
            load(run)
        if RANK == 0:
            open_folder(settings, description)
        if teacher:
            show_teacher(run, 100 / images.classes)
        train(run)
        loaders = run.train_loader = run.val_loader = None  # ends the workers: the garbage collector takes 5 s for each
        if RANK == 0:
            finish(run)
    except data.BadImage as error:  # from a data worker with its traceback in front
        fail(str(error).splitlines()[-1].removeprefix("data.BadImage: "))
    except (ValueError, OSError) as error:
        fail(error)


def connect(device):
    """Join the processes that torchrun started."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    try:
        nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    except RuntimeError as error:
        raise ValueError(f"the processes cannot reach each other: {models.one_line(error)}") from error


def make_loaders(settings, images, statistics, device):
    pipeline = {name: getattr(settings, name) for name in LARGE if settings.img_size >= 64}
    return data.build_loaders(images.train, images.val, img_size=settings.img_size, **statistics, **pipeline,
                              device=device, seed=settings.seed, repeats=settings.repeats,
                              skip_bad_images=settings.skip_bad_images)


def show_teacher(run, chance):
    """The teacher's accuracy, and a warning where it has nothing to teach but was not meant to be so."""
    (top1, top5, _), = evaluate([run.teacher], run.val_loader, run.autocast("teacher"))
    say(f"teacher {run.settings.teacher}: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    meant = "random" in (run.settings.teacher_head, run.settings.teacher_weights)
    if top1 < chance + (100 - chance) / 10 and not meant:
        say(f"warning: the teacher is near chance ({chance:.2f} %): train it longer, or from pretrained weights")


def show_accuracy(settings, images, device):
    """--eval: top-1, top-5 and loss of a run's student and its EMA."""
    files = {"student": "student.safetensors", "its EMA": "student_ema.safetensors"}
    students = [models.HookedModel(models.load_student(settings.out, file)).to(device) for file in files.values()]
    _, loader = make_loaders(settings, images, models.statistics(students[0].model), device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.amp in ("student", "both"))
    for name, (top1, top5, loss) in zip(files, evaluate(students, loader, autocast)):
        say(f"{name}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}, {loader.size} images")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
