"""Distil a vision transformer into a smaller one.

    torchrun train_kd.py --method spectral                         # embedded data and teacher, any laptop
    python train_kd.py --method lift                               # one process without torchrun, the same path
    python train_kd.py --method none --variant widened             # a student alone, no teacher
    torchrun --nproc_per_node=4 train_kd.py --method spectral --data /data/imagenet --first 1 --last 1
    python train_kd.py ... --dry-run                               # build everything, print it, train nothing

Defaults come from the recipe of the data set (RECIPES below); every entry has a flag. The run's folder receives
config.json, log.jsonl (a line an epoch), last.pt, best.pt, epoch_NNNN.pt, student.safetensors and curves.png.
"""
import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from losses import FEATURE_LOSSES, METHODS, Distiller
from models import VARIANTS, HookedModel, build_model, check_pretrained_classes, choose_layers, stages

AMP = ("off", "teacher", "student", "both")
HERE = Path(__file__).resolve().parent

# The learning rate belongs to the recipe's batch and scales linearly with another one.
COMMON = dict(method="spectral", alpha=0.9, beta=0.2, tau=1.0, label_smoothing=0.1, teacher_weights=None,
              teacher_head="pretrained", data="shapes", data_root="data", train_size=4000, label_noise=0.2, repeats=1,
              workers=2, accum=1, min_lr=1e-5, warmup_lr=1e-6, weight_decay=0.05, seed=0,
              crop_pct=0.875, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.25)   # from 64 px
TOY = dict(COMMON, img_size=32, student="deit_toy_patch8_32", teacher="cait_toy_patch8_32", epochs=30, batch_size=64,
           lr=2e-3, warmup_epochs=2, ema_decay=0.99)
RECIPES = {
    "shapes": dict(TOY, teacher_weights="weights/cait_toy_shapes.safetensors"),
    "small": TOY,
    # DD appendix C.3 and the released code: AdamW, 5e-4 x batch / 512, the DeiT augmentation without mixup and cutmix.
    "imagenet": dict(COMMON, img_size=224, student="deit_tiny_patch16_224", teacher="cait_s24_224", epochs=300,
                     batch_size=2048, lr=2e-3, warmup_epochs=5, ema_decay=0.99996, repeats=3),
}

# ----------------------------------------------------------------------------------------------------
# Settings


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def fail(message, status=2):
    """End the program as every bad input does: one line on stderr, once for all processes, and exit status 2."""
    if int(os.environ.get("RANK", 0)) > 0:                              # all processes see the same mistake: let the first
        time.sleep(5)                                                   # speak, whose end makes torchrun stop the others
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def number(kind, low, high, open_low=False):
    """An argparse type: an int or float in [low, high], or (low, high] with open_low."""
    def parse(text):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if open_low else '['}{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    count, positive, share = number(int, 1, 10 ** 9), number(float, 0, 1e9, open_low=True), number(float, 0, 1)
    weight = number(float, 0, 1e9)

    group = parser.add_argument_group("what is distilled into what")
    group.add_argument("--method", choices=METHODS, help="objective (default: spectral)")
    group.add_argument("--student", metavar="TIMM_MODEL")
    group.add_argument("--variant", choices=VARIANTS, help="student variant (default: the method's own)")
    group.add_argument("--student-kwargs", nargs="+", action=ParseKwargs, metavar="KEY=VALUE",
                       help="arguments for timm, e.g. embed_dim=219 num_heads=3 (EM's UniformWide control)")
    group.add_argument("--teacher", metavar="TIMM_MODEL")
    group.add_argument("--teacher-kwargs", nargs="+", action=ParseKwargs, metavar="KEY=VALUE")
    group.add_argument("--teacher-weights", metavar="FILE", help=".safetensors, .pt or .pth (default: timm's pretrained)")
    group.add_argument("--teacher-head", choices=("pretrained", "random"),
                       help="random: a teacher without a classifier for this data (DD Table 2)")
    group.add_argument("--first", type=number(int, 0, 10 ** 4), metavar="X", help="align the first X layers")
    group.add_argument("--last", type=number(int, 0, 10 ** 4), metavar="Y",
                       help="align the last Y layers (if only one of the two is given, the other is 0)")
    group.add_argument("--student-layers", type=int, nargs="+", metavar="L", help="explicit, ascending, counted from 0")
    group.add_argument("--teacher-layers", type=int, nargs="+", metavar="L", help="as many of the teacher's")

    # These reach the method by name: `build` gives its constructor those that METHODS[...].options() lists.
    group = parser.add_argument_group("objective (DD Eq. 10, 11, 14)")
    group.add_argument("--alpha", type=share, help="weight of logits KD; 0 leaves CE and the feature term")
    group.add_argument("--beta", type=weight, help="weight of the feature term; it is not computed at 0")
    group.add_argument("--tau", type=positive, help="temperature T")
    group.add_argument("--label-smoothing", type=share)
    group.add_argument("--feature-loss", choices=FEATURE_LOSSES, help="spectral, lift, widelast")
    group.add_argument("--projector-norm", choices=("batch", "none"), dest="norm",
                       help="projector: standardise both sides first (batch, as released; the default) or not")

    group = parser.add_argument_group("data")
    group.add_argument("--data", help="shapes (default), a folder with train/ and val/, torch/NAME, hfds/NAME")
    group.add_argument("--data-root", metavar="DIR", help="where torch/ and hfds/ sets are kept (default: data)")
    group.add_argument("--train-size", type=count, help="shapes: how many training images to draw")
    group.add_argument("--label-noise", type=share, help="shapes: share of the training labels that are drawn at random")
    group.add_argument("--img-size", type=count)
    group.add_argument("--repeats", type=count, help="repeated augmentation: times each image comes in its batch")
    group.add_argument("--auto-augment", metavar="POLICY", help="from 64 px: timm's RandAugment string, or none")
    group.add_argument("--color-jitter", type=weight, help="from 64 px")
    group.add_argument("--random-erasing", type=share, help="from 64 px: probability")
    group.add_argument("--crop-pct", type=number(float, 0, 1, open_low=True), help="from 64 px: evaluation crop")
    group.add_argument("--skip-bad-images", action="store_true",
                       help="let the next image stand in for one that cannot be read")
    group.add_argument("--workers", type=number(int, 0, 1024), help="from 64 px: data processes for each process")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=count)
    group.add_argument("--batch-size", type=count, help="global: over all processes and accumulation steps")
    group.add_argument("--accum", type=count, help="gradient accumulation steps")
    group.add_argument("--lr", type=positive, help="peak (default: the recipe's, scaled linearly with the batch)")
    group.add_argument("--min-lr", type=weight)
    group.add_argument("--warmup-lr", type=weight)
    group.add_argument("--warmup-epochs", type=weight)
    group.add_argument("--weight-decay", type=weight)
    group.add_argument("--ema-decay", type=share, help="of the averaged student that is evaluated beside the student")
    group.add_argument("--seed", type=number(int, 0, 2 ** 31))

    group = parser.add_argument_group("the run")
    group.add_argument("--out", metavar="DIR", help="default: runs/METHOD")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument("--snapshot-every", type=count, metavar="N", help="epochs between epoch_NNNN.pt (default: a tenth)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    group.add_argument("--amp", choices=AMP, nargs="?", const="both",
                       help="bfloat16 in student, teacher or both (default: both on CUDA and, from 64 px, on CPUs with "
                            "avx512_bf16 or amx_bf16; else off)")
    group.add_argument("--compile", action="store_true", help="torch.compile student and teacher, a graph each")
    group.add_argument("--dry-run", action="store_true", help="build everything with random weights, print it, end")
    group.add_argument("--bench", type=count, nargs="?", const=10, metavar="N",
                       help="time N updates (10) with random weights, print where the time goes, end")
    return parser.parse_args(argv)


def resolve(args):
    """Command line -> settings: the data set's recipe, under a resumed run's settings, under the flags given.

    Also opens the data: returns settings (a Namespace) and (train, val, number of classes). Raises ValueError for
    flags that contradict each other or the run to resume, or that would have no effect.
    """
    given = {key: value for key, value in vars(args).items() if value is not None and value is not False}
    saved = read_run(given)["settings"] if args.resume else {}
    asked = {**COMMON, **saved, **given}
    train, val, classes = data.open_data(asked["data"], asked["data_root"], asked["train_size"], asked["label_noise"])
    student = asked.get("student", "")
    native = timm.get_pretrained_cfg(student).input_size[-1] if timm.is_model(student) else None
    if asked["data"] == "shapes":
        recipe = "shapes"
    else:                                                               # by size: asked for, the student's, the images'
        recipe = "small" if (asked.get("img_size") or native or min(train[0][0].size)) < 64 else "imagenet"
    defaults = {**RECIPES[recipe], "img_size": native or RECIPES[recipe]["img_size"]}
    settings = argparse.Namespace(**{**vars(args), **defaults, **saved, **given, "recipe": recipe})
    if "lr" not in {**saved, **given}:
        settings.lr = defaults["lr"] * settings.batch_size / defaults["batch_size"]
    if "first" in given or "last" in given:
        settings.first, settings.last = given.get("first", 0), given.get("last", 0)
    settings.out = settings.out or f"runs/{settings.method}"
    settings.variant = settings.variant or METHODS[settings.method].variant
    settings.snapshot_every = settings.snapshot_every or max(1, settings.epochs // 10)
    check(settings, given, saved)
    return settings, (train, val, classes)


LARGE = {"crop_pct", "auto_augment", "color_jitter", "random_erasing", "workers"}       # for images from 64 px
MAY_CHANGE = {"out", "data", "data_root", "epochs", "workers", "device", "amp", "compile",
              "snapshot_every"}                                         # between a run and its resumption


def check(settings, given, saved):
    """Raise ValueError for flags that contradict each other or the saved run, or that would have no effect."""
    method = METHODS[settings.method]
    idle = {option for other in METHODS.values() for option in other.options()} - method.options()
    if "beta" not in method.options():
        idle |= {"first", "last", "student_layers", "teacher_layers"}
    if not method.needs_teacher:
        idle |= {"teacher_weights", "teacher_head"}
        if settings.variant == "plain":
            idle |= {"teacher", "teacher_kwargs"}
    if settings.img_size < 64:
        idle |= LARGE
    if settings.data != "shapes":
        idle |= {"train_size", "label_noise"}
    if idle & {*given}:
        raise ValueError(f"{flags(idle & {*given})} would have no effect with --method {settings.method} --variant "
                         f"{settings.variant} on {settings.data} at {settings.img_size} px")
    if {"student_layers", "teacher_layers"} & {*given} and (
            {"first", "last"} & {*given} or None in (settings.student_layers, settings.teacher_layers)):
        raise ValueError("give --student-layers and --teacher-layers together, and without --first and --last")
    changed = {key for key in saved if key not in MAY_CHANGE and saved[key] != getattr(settings, key)}
    if changed:
        differences = (f"{flags([key])} {saved[key]}, not {getattr(settings, key)}" for key in sorted(changed))
        raise ValueError(f"the run in {settings.out} was made with {', '.join(differences)}: leave these as they were or "
                         f"choose another --out")
    writes = not (settings.dry_run or settings.bench)
    if writes and (Path(settings.out) / "config.json").exists() and not (settings.resume or settings.overwrite):
        raise ValueError(f"{settings.out} holds a run: go on with --resume, replace it with --overwrite, or choose "
                         f"another --out")


def flags(names):
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def read_run(given):
    out = Path(given.get("out") or f"runs/{given.get('method', COMMON['method'])}")
    # Without a log the run ended before its first checkpoint, and goes on from the start.
    if not (out / "config.json").exists() or (out / "log.jsonl").exists() and not (out / "last.pt").exists():
        raise ValueError(f"{out} holds no run to resume (config.json and last.pt): give its folder with --out")
    return json.loads((out / "config.json").read_text())


# ----------------------------------------------------------------------------------------------------
# Building


def build(settings, classes):
    """Settings -> HookedModel teacher (None if the method wants none), Distiller, and the mean and std of its images."""
    kind = METHODS[settings.method]
    options = {key: value for key, value in vars(settings).items() if key in kind.options() and value is not None}
    common = dict(num_classes=classes, img_size=settings.img_size)
    weights = settings.teacher_weights
    if weights == RECIPES["shapes"]["teacher_weights"]:                 # the embedded one, from any working folder
        weights = HERE / weights
    teacher = None
    if kind.needs_teacher and not weights:
        check_pretrained_classes(settings.teacher, classes, settings.teacher_head == "random")
    if kind.needs_teacher or settings.variant != "plain":
        known = kind.needs_teacher and not settings.dry_run and not settings.bench      # else only its width matters
        teacher = build_model(settings.teacher, **common, **settings.teacher_kwargs or {},
                              pretrained=known and not weights, weights=weights if known else None,
                              random_head=settings.teacher_head == "random")
    width = teacher and teacher.feature_info[stages(teacher)[-1]]["num_chs"]
    student = build_model(settings.student, **common, variant=settings.variant, teacher_width=width,
                          **settings.student_kwargs or {})

    layers_s = layers_t = []
    if options.get("beta"):
        layers_s, layers_t = settings.student_layers, settings.teacher_layers
        if layers_s is None:
            first, last = (getattr(kind, end) if getattr(settings, end) is None else getattr(settings, end)
                           for end in ("first", "last"))
            layers_s, layers_t = ([of[i] for i in choose_layers(first, last, len(of))]
                                  for of in map(stages, (student, teacher)))
        for layers in (layers_s, layers_t):
            if layers != sorted(set(layers)):
                raise ValueError(f"layers {layers} must ascend without repeats: they are paired in order")
        if len(layers_s) != len(layers_t) or not layers_s:
            raise ValueError(f"student layers {layers_s} and teacher layers {layers_t} cannot be paired: give as many of "
                             f"each, and at least one (or --beta 0)")

    statistics = resolve_data_config(pretrained_cfg=student.pretrained_cfg)
    statistics = dict(mean=statistics["mean"], std=statistics["std"])   # images arrive as the student wants them
    hooked_s, hooked_t = HookedModel(student, layers_s), None
    if kind.needs_teacher:
        hooked_t = HookedModel(teacher, layers_t, **statistics).eval().requires_grad_(False)
        options["channels"] = [(student.feature_info[s]["num_chs"], teacher.feature_info[t]["num_chs"])
                               for s, t in zip(layers_s, layers_t)]
    return hooked_t, Distiller(hooked_s, kind(**options)), statistics


@torch.no_grad()
def describe(settings, teacher, distiller, train, val, classes):
    """What --dry-run prints and config.json keeps. One forward pass of zeros finds grids that do not fit."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    images, labels = torch.zeros(2, 3, settings.img_size, settings.img_size), torch.zeros(2, dtype=torch.long)
    taught = teacher(images) if teacher else (None, ())
    logits, maps = distiller.eval().student(images)
    distiller.method(labels, logits, maps, *taught)
    return {
        "settings": {key: value for key, value in vars(settings).items()
                     if key not in ("resume", "overwrite", "dry_run", "bench")},
        "parameters": {"student": count(distiller.student), "method": count(distiller.method),
                       "teacher": count(teacher) if teacher else 0},
        "layers": {"student": distiller.student.layers, "teacher": teacher.layers if teacher else []},
        "maps": {"student": [list(A.shape[1:]) for A in maps], "teacher": [list(A.shape[1:]) for A in taught[1]]},
        "images": {"train": len(train), "val": len(val), "classes": classes},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "commit": _git_commit(),
        "command": " ".join(sys.argv),
    }


def summary(description):
    """The head of a run: what learns from what."""
    settings, layers = description["settings"], description["layers"]
    sizes = {who: f"{count / 1e6:.2f} M" for who, count in description["parameters"].items()}
    taught = f" <- {settings['teacher']} ({sizes['teacher']})" if description["parameters"]["teacher"] else ""
    return (f"{settings['method']}: {settings['variant']} {settings['student']} ({sizes['student']}){taught}, student "
            f"layers {layers['student']}, teacher layers {layers['teacher']}, {description['images']}, folder {settings['out']}")


def _git_commit():
    with contextlib.suppress(OSError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip() or None


# ----------------------------------------------------------------------------------------------------
# Evaluation and files


@torch.no_grad()
@torch.compiler.set_stance("force_eager")                               # its batches and mode would compile anew
def evaluate(model, loader, batches, autocast):
    """Top-1 and top-5 accuracy in %, over all processes, every validation image counted once."""
    model.eval()
    device = next(model.parameters()).device
    hits = torch.zeros(3, dtype=torch.int64, device=device)             # in the top 1, in the top 5, seen
    for images, labels in loader.load(batches):
        with autocast():
            logits, _ = model(images)
        found = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        hits += torch.stack([found[:, 0].sum(), found.sum(), torch.ones_like(labels).sum()])
    if dist.is_initialized():
        dist.all_reduce(hits)
    top1, top5, seen = hits.tolist()
    return 100 * top1 / seen, 100 * top5 / seen


def load_state(path, distiller):
    """Read last.pt, load the distiller from it, and return the rest for `train`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        distiller.load_state_dict(state["distiller"])
        return {key: state[key] for key in ("optimizer", "ema", "step", "log", "rows")}
    except Exception as error:                                          # cut short, foreign, or a pickle with code in it
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"cannot resume from {path}, which is damaged or not a checkpoint of this run ({reason}): restore "
                         f"it, or start again with --overwrite") from error


def write(path, save):
    """Write beside and rename: a crash or a full disk leaves the former file whole. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                            # torch.save has the latter for a full disk
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({' '.join(str(error).split())[:120]}); what stood there before is unharmed: "
                      f"make room, then --resume") from error


def write_log(out, log):
    write(out / "log.jsonl", lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in log)))


def write_weights(out, model, log, snapshot_every):
    """best.pt if the last epoch beats all former ones, epoch_NNNN.pt after every `snapshot_every` epochs."""
    *former, last = log
    weights = {"model": model.state_dict(), "epoch": last["epoch"], "top1": last["top1"]}
    if last["top1"] > max((line["top1"] for line in former), default=-1):
        write(out / "best.pt", partial(torch.save, weights))
    if len(log) % snapshot_every == 0:
        write(out / f"epoch_{len(log):04d}.pt", partial(torch.save, weights))


def draw_curves(log, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    epochs = [record["epoch"] + 1 for record in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for term, style in zip(log[0]["terms"], ("-", "--", ":")):
        left.plot(epochs, [record["terms"][term] for record in log], style, label=term)
    right.plot(epochs, [record["top1"] for record in log], "-", label="student")
    right.plot(epochs, [record["ema_top1"] for record in log], "--", label="its EMA")
    left.set(xlabel="epoch", ylabel="weighted loss term", yscale="log")
    right.set(xlabel="epoch", ylabel="validation top-1 (%)")
    left.legend(), right.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def report(log, epochs):
    """One line an epoch, with the time that the rest will take."""
    record = log[-1]
    left = np.mean([line["seconds"] for line in log[-5:]]) * (epochs - len(log)) / 60
    terms = " + ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
    print(f"epoch {len(log):3d}/{epochs}  loss {record['loss']:.4f} = {terms}  top-1 {record['top1']:.2f} %  EMA "
          f"{record['ema_top1']:.2f} %  {record['images_per_s']:.0f} images/s  {left:.1f} min left", flush=True)


# ----------------------------------------------------------------------------------------------------
# The loop


def prepare(settings, teacher, distiller, world):
    """-> update(stream), which trains on the stream's next global batch; optimizer; EMA; the autocasts of both models."""
    student, device = distiller.student, next(distiller.parameters()).device
    teacher_autocast, student_autocast = autocasts = [
        partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.amp in (who, "both"))
        for who in ("teacher", "student")]
    optimizer = create_optimizer_v2(distiller, "adamw", lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    ema = ModelEmaV3(student, decay=settings.ema_decay)
    for model in filter(None, (teacher, student) if settings.compile else ()):
        model.compile(fullgraph=True, dynamic=False)                    # in place, after the EMA's copy
    ddp = DistributedDataParallel(distiller, gradient_as_bucket_view=True) if world > 1 else distiller

    def update(stream):
        """One optimizer step -> the names of the loss terms and their means [terms], still on the device."""
        means = 0
        for micro in range(settings.accum):
            images, labels = next(stream)
            with torch.no_grad(), teacher_autocast():
                taught = teacher(images) if teacher else None
            last = micro == settings.accum - 1
            with contextlib.nullcontext() if last or world == 1 else ddp.no_sync():
                with student_autocast():
                    _, terms = ddp(images, labels, taught)              # the loop never asks which method runs
                (sum(terms.values()) / settings.accum).backward()
            means += torch.stack([*terms.values()]).detach() / settings.accum
        optimizer.step()
        optimizer.zero_grad()
        ema.update(student)
        return [*terms], means

    return update, optimizer, ema, autocasts


def train(settings, teacher, distiller, state, loaders, sizes, rank, world):
    (train_loader, val_loader), (train_size, val_size) = loaders, sizes
    student, device, out = distiller.student, next(distiller.parameters()).device, Path(settings.out)
    steps = train_size // settings.batch_size                           # updates in an epoch
    val_batches = data.evaluation_batches(val_size, 250, rank=rank, world=world)

    update, optimizer, ema, (teacher_autocast, student_autocast) = prepare(settings, teacher, distiller, world)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=settings.epochs, min_lr=settings.min_lr,
                                       warmup_lr=settings.warmup_lr, warmup_epochs=settings.warmup_epochs,
                                       step_on_epochs=False, updates_per_epoch=steps)
    step, log, rows = 0, [], None                                       # rows: the loss terms of the epoch's updates
    if state:
        optimizer.load_state_dict(state["optimizer"])
        ema.module.load_state_dict(state["ema"])
        step, log, rows = state["step"], state["log"], state["rows"].to(device)
    stop = Stop(world)

    def save():                                                         # what last.pt does not hold is made again
        state = {"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.module.state_dict(),
                 "step": step, "log": log, "rows": rows}
        write(out / "last.pt", partial(torch.save, state))
        write_log(out, log)

    if teacher:
        top1, top5 = evaluate(teacher, val_loader, val_batches, teacher_autocast)
        if rank == 0:
            print(f"teacher {settings.teacher}: top-1 {top1:.2f} %, top-5 {top5:.2f} %", flush=True)

    for epoch in range(step // steps, settings.epochs):
        start, looked, began = step % steps, step % steps, time.time()
        batches = data.training_batches(train_size, settings.batch_size, seed=settings.seed, epoch=epoch, start=start,
                                        repeats=settings.repeats, accum=settings.accum, rank=rank, world=world)
        stream = train_loader.load(batches, epoch)
        distiller.train()
        for i in tqdm(range(start, steps), desc=f"epoch {epoch + 1}", leave=False, disable=rank > 0 or None):
            scheduler.step_update(step)
            torch.manual_seed(data.seed_of(settings.seed, step, rank))  # of drop-path and the like: differs by rank
            names, means = update(stream)
            rows = torch.zeros(steps, len(names), device=device) if rows is None else rows
            rows[i] = means
            step += 1
            stopped = stop.asked()
            if stopped or i + 1 - looked == 50 or i + 1 == steps:       # the only moment that waits for the device
                check_finite(rows[looked:i + 1], names, step - (i + 1 - looked), world)
                looked = i + 1
            if stopped and looked < steps:
                if rank == 0:
                    save()
                    print(f"stopped by {signal.Signals(stopped).name} after step {step}: saved {out / 'last.pt'}; go on "
                          f"with --resume --out {out}", flush=True)
                sys.exit(128 + stopped)

        seconds, means = time.time() - began, rows.mean(0).tolist()
        top1, top5 = evaluate(student, val_loader, val_batches, student_autocast)
        ema_top1, ema_top5 = evaluate(ema.module, val_loader, val_batches, student_autocast)
        log.append({"epoch": epoch, "step": step, "lr": optimizer.param_groups[0]["lr"], "loss": sum(means),
                    "terms": dict(zip(names, means)), "top1": top1, "top5": top5, "ema_top1": ema_top1,
                    "ema_top5": ema_top5, "images_per_s": (steps - start) * settings.batch_size / seconds,
                    "seconds": time.time() - began})
        if rank == 0:
            report(log, settings.epochs)
            write_weights(out, student.model, log, settings.snapshot_every)
            save()
    if rank == 0:
        write_log(out, log)                                             # had a run been killed within its last `save`
        weights = {key: value.contiguous() for key, value in student.model.state_dict().items()}
        write(out / "student.safetensors", lambda path: path.write_bytes(safetensors.torch.save(weights)))
        write(out / "curves.png", partial(draw_curves, log))
        print(f"done: {out}: top-1 {log[-1]['top1']:.2f} %, EMA {log[-1]['ema_top1']:.2f} %", flush=True)


class Stop:
    """Remembers SIGTERM and Ctrl-C, and lets all processes agree on the step after which to stop."""

    def __init__(self, world):
        self.received, self.world = 0, world
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.received = number

    def asked(self):
        """The number of the signal that any process has received, or 0."""
        received = torch.tensor(self.received)                          # on the CPU: no wait for a GPU
        if self.world > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)
        return received.item()


def check_finite(rows, names, since, world):
    """Average the loss terms of the last updates over all processes, in place; stop all of them at NaN or infinity."""
    if world > 1:
        dist.all_reduce(rows)
        rows /= world
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        update, term = bad[0].tolist()
        fail(f"loss term {names[term]!r} is {rows[update, term].item()} at step {since + update}; the checkpoint of the "
             f"last epoch is unharmed; try a lower --lr, a lower --beta or --amp off", status=1)


# ----------------------------------------------------------------------------------------------------
# The bench


def bench(settings, teacher, distiller, classes, loaders, sizes, rank, world):
    """Where an update's time goes: median ms of the step and its parts on images in memory, then the real loader."""
    device = next(distiller.parameters()).device

    def timed(work, times=1):
        began = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    update, parts, peak = bench_parts(settings, teacher, distiller, classes, world)
    times = [{part: timed(work) for part, work in parts.items()}        # in turn: a drift of the machine meets all
             for _ in range(settings.bench + 1)][1:]                    # the first warms up
    ms = {part: float(np.median([time[part] for time in times])) for part in parts}

    real = (batch for epoch in itertools.count() for batch in loaders[0].load(data.training_batches(
        sizes[0], settings.batch_size, seed=settings.seed, epoch=epoch, accum=settings.accum, repeats=settings.repeats,
        rank=rank, world=world), epoch))
    waits = []

    def watched():
        while True:
            began = time.perf_counter()
            batch = next(real)
            waits.append(1000 * (time.perf_counter() - began))
            yield batch

    stream = watched()
    update(stream), waits.clear()                                       # the first starts the workers
    loop = timed(lambda: update(stream), settings.bench) / settings.bench
    ms["data"] = sum(waits) / settings.bench
    if rank == 0:
        report_bench(settings, ms, loop, peak, sizes[0], world, device)


def bench_parts(settings, teacher, distiller, classes, world):
    """-> update(stream), {part: function that does it once, for a whole batch in memory}, peak memory in bytes.

    The floor is what no KD training can do without: the teacher's forward, the student's forward and backward pass
    (both without hooks), one optimizer step. With --amp or --compile, `plain` is the step without either.
    """
    device = next(distiller.parameters()).device
    update, optimizer, ema, (teacher_autocast, student_autocast) = prepare(settings, teacher, distiller, world)
    size = settings.batch_size // world // settings.accum
    images = torch.randn(size, 3, settings.img_size, settings.img_size, device=device)
    labels = torch.randint(classes, (size,), device=device)
    memory = itertools.repeat((images, labels))
    for _ in range(3):                                                  # before the floor's models add to the memory
        update(memory)
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    bare = argparse.Namespace(**{**vars(settings), "method": "soft" if teacher else "none"})
    bare_teacher, bare_distiller, _ = build(bare, classes)
    bare_teacher = bare_teacher and bare_teacher.to(device)
    _, bare_optimizer, _, _ = prepare(bare, bare_teacher, bare_distiller.to(device), 1)

    @torch.no_grad()
    def teach(model):
        with teacher_autocast():
            return model(images) if model else ()

    def study(model):
        with student_autocast():
            logits, maps = model(images)
        F.cross_entropy(logits, labels).backward()
        return logits, maps

    def step(optimizer):
        optimizer.step()
        optimizer.zero_grad()

    taught, (logits, maps) = teach(teacher), study(distiller.student)
    logits, maps = logits.detach().requires_grad_(), [A.detach().requires_grad_() for A in maps]

    def compare():
        with student_autocast():
            terms = distiller.method(labels, logits, maps, *taught)
        sum(terms.values()).backward()

    def micro(work):                                                    # as often as an update has micro-batches
        for _ in range(settings.accum):
            work()

    parts = {"step": lambda: update(memory),
             "floor": lambda: (micro(lambda: (teach(bare_teacher), study(bare_distiller.student))), step(bare_optimizer)),
             "teacher": lambda: micro(lambda: teach(teacher)),
             "student": lambda: micro(lambda: study(distiller.student)),
             "losses": lambda: micro(compare),
             "optimizer": lambda: (step(optimizer), ema.update(distiller.student))}
    if settings.amp != "off" or settings.compile:
        plain = argparse.Namespace(**{**vars(settings), "amp": "off", "compile": False})
        plain_update = torch.compiler.set_stance("force_eager")(prepare(plain, teacher, distiller, world)[0])
        parts["plain"] = lambda: plain_update(memory)
    return update, parts, peak


def report_bench(settings, ms, loop, peak, train_size, world, device):
    hours = loop / 3.6e6 * (train_size // settings.batch_size) * settings.epochs
    duration = lambda hours: (f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.1f} hours" if hours > 2 else
                              f"{60 * hours:.1f} minutes")
    result = {"command": " ".join(sys.argv), "ms": {part: round(value, 2) for part, value in ms.items()},
              "step_to_floor": round(ms["step"] / ms["floor"], 3),
              "plain_to_step": round(ms.get("plain", ms["step"]) / ms["step"], 3),
              "images_per_s_in_memory": round(1000 * settings.batch_size / ms["step"], 1),
              "images_per_s": round(1000 * settings.batch_size / loop, 1), "peak_memory_gb": round(peak / 1e9, 2),
              "training_hours": round(hours, 5), "updates": settings.bench, "batch_size": settings.batch_size,
              "img_size": settings.img_size, "amp": settings.amp, "compile": settings.compile, "processes": world,
              "threads": torch.get_num_threads(), "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu("model name")}
    print(f"{'':10s}{'ms':>10s}   of the step")
    for part, value in ms.items():
        print(f"{part:10s}{value:10.2f}{value / ms['step']:10.1%}")
    print(f"step / floor {result['step_to_floor']}; {result['images_per_s_in_memory']} images/s in memory, "
          f"{result['images_per_s']} with the loader; peak memory {result['peak_memory_gb']} GB\n{settings.epochs} epochs of "
          f"{train_size:,} images: {duration(hours)} on this machine, {duration(hours / 8)} on 8 like it, without validation")
    print(json.dumps(result), flush=True)


# ----------------------------------------------------------------------------------------------------
# The program


def main(argv=None):
    args = parse_args(argv)
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        device = choose_device(args.device, local)
        if "RANK" in os.environ and not dist.is_initialized():          # started by torchrun
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        settings, (train_set, val_set, classes) = resolve(args)
        settings.amp = settings.amp or default_amp(device, settings.img_size)
        torch.manual_seed(settings.seed)
        teacher, distiller, statistics = build(settings, classes)
        if len(train_set) < settings.batch_size and not settings.dry_run:
            raise ValueError(f"{len(train_set)} training images do not fill a batch of {settings.batch_size}: lower "
                             f"--batch-size")
        if settings.batch_size % (world * settings.accum):
            raise ValueError(f"a global batch of {settings.batch_size} does not divide by {world} processes x "
                             f"{settings.accum} accumulation steps: change --batch-size or --accum")
        description = describe(settings, teacher, distiller, train_set, val_set, classes)
        if rank == 0:
            print(json.dumps(description, indent=1) if settings.dry_run else summary(description), flush=True)
        if settings.dry_run:
            return
        former = read_run(vars(settings))["images"] if settings.resume else description["images"]
        if description["images"] != former:
            raise ValueError(f"{settings.data} is not the data of the run in {settings.out}: it has "
                             f"{description['images']}, the run had {former}")
        last = Path(settings.out) / "last.pt"
        state = load_state(last, distiller) if settings.resume and last.exists() else None
        pipeline = {key: getattr(settings, key) for key in LARGE if settings.img_size >= 64}
        sizes = len(train_set), len(val_set)
        loaders = data.build_loaders(train_set, val_set, img_size=settings.img_size, **statistics, **pipeline,
                                     device=device, seed=settings.seed, repeats=settings.repeats,
                                     skip_bad_images=settings.skip_bad_images)
        teacher, distiller = teacher and teacher.to(device), distiller.to(device)
        if settings.bench:
            return bench(settings, teacher, distiller, classes, loaders, sizes, rank, world)
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        if not os.access(settings.out, os.W_OK):
            raise ValueError(f"{settings.out} is not writable: choose another --out")
        if world > 1:
            dist.barrier()                                              # all have looked before the first writes
        if rank == 0:
            for old in [] if settings.resume else Path(settings.out).glob("*.*"):
                if old.suffix in (".pt", ".part", ".jsonl", ".safetensors", ".png"):
                    old.unlink()                                        # of the run that --overwrite replaces
            write(Path(settings.out) / "config.json", lambda path: path.write_text(json.dumps(description, indent=1)))
    except FileExistsError:
        fail(f"{settings.out} is a file, not a folder: choose another --out")
    except (ValueError, OSError) as error:
        fail(error)
    try:
        train(settings, teacher, distiller, state, loaders, sizes, rank, world)
    except data.BadImage as error:                                      # from a data worker with its traceback in front
        fail(str(error).splitlines()[-1].removeprefix("data.BadImage: "))
    except OSError as error:
        fail(error, status=1)


def cpu(key):
    """A line of Linux's /proc/cpuinfo, or "" elsewhere."""
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().split(f"\n{key}")[1].split("\n")[0].strip("\t: ")
    return ""


def default_amp(device, img_size):
    """bfloat16 where it was measured to help: on GPUs, and from 64 px on CPUs that compute in it."""
    native = device.type == "cuda" or {"avx512_bf16", "amx_bf16"} & {*cpu("flags").split()} and img_size >= 64
    return "both" if native else "off"


def choose_device(asked, local):
    if asked == "cpu" or asked is None and not torch.cuda.is_available():
        return torch.device("cpu")
    there, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted > there:
        raise ValueError(f"{wanted} processes want a CUDA device each and there are {there}: lower --nproc_per_node, or "
                         f"--device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
