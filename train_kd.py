"""Distil a vision transformer into a smaller one. (DD, EM: the papers, see README.md.)

    torchrun train_kd.py --method spectral              # embedded data and teacher, any laptop
    python train_kd.py --method lift                    # the same without torchrun: one process
    python train_kd.py --method none --variant widened  # a student alone, no teacher
    torchrun --nproc_per_node=4 train_kd.py --data /data/imagenet --first 1 --last 1
    python train_kd.py --data DIR --student NAME --student-weights pretrained --teacher-weights runs/teacher
    python train_kd.py --eval --out runs/spectral       # accuracy of a run's student
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or threads spin while another one waits for their core

import argparse
import copy
import json
import math
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import models
from losses import METHODS, Distiller

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun

# ---------- Hyperparameters: a flag each, whose help is the comment. Those of an objective stand in losses.py

IMAGENET = dict(  # DD appendix C.3 and the released code: DeiT's recipe without mixup and cutmix
    student="deit_tiny_patch16_224",  # timm model that learns
    teacher="cait_s24_224",  # timm model that teaches
    teacher_weights="",  # a file, a run's folder or random; else timm's pretrained
    img_size=224,  # px; by default the student's own
    epochs=300,  # of training
    batch_size=2048,  # global; by default lower for a small set, to have 20 updates an epoch
    accum=1,  # gradient accumulation steps
    lr=2e-3,  # peak; by default scales with a typed batch, or the square root of a lowered one
    min_lr=1e-5,  # at the end of the cosine
    warmup_lr=1e-6,  # at the start of the warm-up
    warmup_epochs=5.0,  # length of the warm-up
    weight_decay=0.05,  # of AdamW
    ema_decay=0.99996,  # decay of the averaged student (EMA)
    repeats=3,  # copies of each image in a batch (repeated augmentation)
    auto_augment="rand-m9-mstd0.5-inc1",  # timm's RandAugment; this and the next three: from 64 px
    color_jitter=0.4,  # strength
    random_erasing=0.25,  # probability
    crop_pct=0.875,  # share of the image that evaluation looks at
    train_size=4000,  # training images of shapes to draw
    label_noise=0.2,  # share of the training labels of shapes that are random
    seed=0)  # of everything random
TOY = dict(IMAGENET, student="deit_toy_patch8_32", teacher="cait_toy_patch8_32", img_size=32, epochs=30, batch_size=64,
           warmup_epochs=2.0, ema_decay=0.99, repeats=1)
RECIPES = {"imagenet": IMAGENET, "small": TOY,  # small: images below 64 px
           "shapes": dict(TOY, teacher_weights="weights/cait_toy_shapes.safetensors")}

# ---------- The loop


def update(run, stream):
    """One optimizer step on the next global batch of the stream. Adds its loss terms to run.sums."""
    accum = run.args.accum
    for micro in range(accum):
        images, labels = next(stream)
        torch.manual_seed(data.seed_of(run.args.seed, run.step, RANK, micro))  # for drop-path and dropout
        with torch.no_grad(), run.autocast("teacher"):
            taught = run.teacher(images) if run.teacher else None
        run.ddp.require_backward_grad_sync = micro == accum - 1  # as no_sync() does: average gradients once
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
    args, steps = run.args, run.steps
    for epoch in range(len(run.log), args.epochs):  # a record for each epoch that is finished
        began, start = time.perf_counter(), run.step - epoch * steps  # after a resume: within the epoch
        batches = data.training_batches(
            run.train_loader.size, args.batch_size, seed=args.seed, epoch=epoch, start=start,
            repeats=args.repeats, accum=args.accum, rank=RANK, world=WORLD)
        stream = run.train_loader.load(batches, epoch)
        run.distiller.train()
        for i in tqdm(range(start, steps), desc=f"epoch {epoch + 1}", leave=False, disable=RANK > 0 or None):
            run.scheduler.step_update(run.step)
            update(run, stream)
            received = run.stop.asked()
            if received and i + 1 < steps:
                save(run)
                say(f"stopped by {signal.Signals(received).name} after step {run.step}: --resume --out {run.out}")
                sys.exit(128 + received)
            if i % 50 == 49:
                mean_sums(run)  # ends the run at NaN, but waits for the device

        terms = {name: value / steps for name, value in mean_sums(run).items()}
        training_seconds = max(time.perf_counter() - began, 1e-9)
        save(run)  # an evaluation may be killed
        student, ema = evaluate([run.student, run.ema.module], run.val_loader, run.autocast("student"))
        run.log.append({"epoch": epoch, "step": run.step, "lr": run.optimizer.param_groups[0]["lr"],
                        "loss": sum(terms.values()), "terms": terms, "top1": student[0], "top5": student[1],
                        "ema_top1": ema[0], "ema_top5": ema[1],
                        "images_per_s": (steps - start) * args.batch_size / training_seconds,
                        "seconds": time.perf_counter() - began})
        run.sums = {}
        if RANK == 0:
            report(run)
            write_epoch(run)
        save(run)


def mean_sums(run):
    """The sums of this epoch's loss terms, averaged over the processes. NaN or infinity ends the run."""
    sums = torch.stack([*run.sums.values()])
    if WORLD > 1:
        dist.all_reduce(sums)
        sums /= WORLD
    sums = dict(zip(run.sums, sums.tolist()))
    for name, value in sums.items():
        if not math.isfinite(value):
            fail(f"loss term {name!r} is {value} at step {run.step}: try a lower --lr or --beta, or --amp off")
    return sums


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiled graphs fit training's batches only
def evaluate(students, loader, precision):
    """[(top-1 %, top-5 %, cross-entropy)] of hooked models. The processes share the images."""
    totals = torch.zeros(len(students), 3, device=loader.device)
    for model in students:
        model.eval()
    batches = data.evaluation_batches(loader.size, loader.evaluation_batch, rank=RANK, world=WORLD)
    for images, labels in loader.load(batches):
        for model, row in zip(students, totals):  # a row of totals, not a copy
            with precision:
                logits, _ = model(images)
            correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            row += torch.stack([correct[:, 0].sum(), correct.sum(), loss])
    if WORLD > 1:
        dist.all_reduce(totals)
    return [(100 * top1 / loader.size, 100 * top5 / loader.size, loss / loader.size)
            for top1, top5, loss in totals.tolist()]


class Stop:
    """Remembers SIGTERM, SIGUSR1 (job schedulers' choice) or Ctrl-C. All processes stop after the same update."""

    def __enter__(self):
        self.received, self.former = 0, {}
        if threading.current_thread() is threading.main_thread():  # no other can handle signals
            for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & {*dir(signal)}:  # Windows has no SIGUSR1
                number = getattr(signal, name)
                self.former[number] = signal.signal(number, self.remember)
            self.written, self.read = socket.socketpair()
            self.written.setblocking(False)
            self.former_fd = signal.set_wakeup_fd(self.written.fileno())
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler)
        if self.former:
            signal.set_wakeup_fd(self.former_fd)
            self.written.close()

    def remember(self, number, frame):
        self.received = number

    def watch(self):
        """The second Ctrl-C ends even a program that hangs. (torchrun may deliver the first one twice at once.)"""
        first = None
        while number := self.read.recv(1):
            if number[0] == signal.SIGINT:
                first = first or time.monotonic()
                if time.monotonic() > first + 1:
                    os._exit(130)

    def asked(self):
        """The number of the signal that any process has received, or 0."""
        received = torch.tensor(self.received)
        if WORLD > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)
        return received.item()


# ---------- Building


def build(args, classes):
    """-> the teacher (HookedModel or None), the Distiller, mean and std of the images."""
    method = METHODS[args.method]
    options = {name: getattr(args, name) for name in method.options()}
    common, teacher, width = dict(num_classes=classes, img_size=args.img_size), None, None
    if method.needs_teacher or args.variant != "plain":
        teacher = models.build_teacher(
            args.teacher, args.teacher_weights, **common, random_head=args.teacher_head == "random",
            needed=method.needs_teacher, blank=args.dry_run, **args.teacher_kwargs)
        width = teacher.feature_info[-1]["num_chs"]
    student = models.build_model(
        args.student, **common, variant=args.variant, teacher_width=width, **args.student_kwargs)
    resumed = args.resume and (Path(args.out) / "last.pt").exists()
    if args.student_weights and not args.dry_run and not resumed:
        say(models.start_from(student, args.student, args.student_weights, args.img_size, args.variant))
    layers_s, layers_t = [], []
    if options.get("beta"):
        layers_s, layers_t = models.pair_layers(student, teacher, args)
    statistics = models.statistics(student)
    hooked_s, hooked_t = models.HookedModel(student, layers_s), None
    if method.needs_teacher:
        hooked_t = models.HookedModel(teacher, layers_t, **statistics).eval().requires_grad_(False)
        options["channels"] = list(zip(hooked_s.channels, hooked_t.channels))
    return hooked_t, Distiller(hooked_s, method(**options)), statistics


class Run:
    """What the loop works with, and how far it is: `step` updates, `log` of epochs, `sums` of the epoch's terms."""

    def __init__(self, args, device, teacher, distiller, loaders):
        self.args, self.out, self.device = args, Path(args.out), device
        self.teacher, self.distiller, self.student = teacher, distiller, distiller.student
        self.train_loader, self.val_loader = loaders
        self.step, self.log, self.sums = 0, [], {}
        self.steps = self.train_loader.size // args.batch_size  # updates in an epoch
        self.optimizer = create_optimizer_v2(
            distiller, "adamw", lr=args.lr, weight_decay=args.weight_decay, fused=device.type != "mps")
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=args.epochs, min_lr=args.min_lr, warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs, step_on_epochs=False, updates_per_epoch=self.steps)
        self.ema = ModelEmaV3(self.student, decay=args.ema_decay, use_warmup=True)  # or initial weights would dominate
        for model in (teacher, self.student):
            if args.compile and model:
                model.compile(fullgraph=True, dynamic=False)  # in place, after the EMA's copy
        self.ddp = DistributedDataParallel(distiller, gradient_as_bucket_view=True) if WORLD > 1 else distiller

    def autocast(self, who):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp in (who, "both"))


@torch.no_grad()
def describe(args, teacher, distiller, dataset):
    """What --dry-run prints and config.json keeps. Random images try everything first."""
    hooked = {"student": distiller.student, "teacher": teacher} if teacher else {"student": distiller.student}
    maps = {who: models.check_maps(model, args.img_size) for who, model in hooked.items()}
    images = torch.randn(min(2, args.batch_size // WORLD // args.accum), 3, args.img_size, args.img_size)
    try:
        copy.deepcopy(distiller).train()(images, torch.zeros(len(images)).long(), teacher(images) if teacher else None)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{args.method} with {args.student}: {models.one_line(error)}") from error
    counts = {who: sum(p.numel() for p in part.parameters())
              for who, part in {"method": distiller.method, **hooked}.items()}
    status, commit = subprocess.getstatusoutput(
        f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40')
    return {"settings": {name: value for name, value in vars(args).items() if name not in OF_THIS_CALL},
            "parameters": counts, "commit": None if status else commit,
            "layers": {"teacher": [], **{who: model.layers for who, model in hooked.items()}},
            "maps": {who: [[*A.shape[1:]] for A in found] for who, found in maps.items()},
            "images": dataset.counts(), "class_names": dataset.names,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__},
            "teacher_digest": models.digest(teacher) if teacher else "", "command": shlex.join(sys.argv)}


# ---------- Files


def write(path, save_to):
    """Write beside and rename: a crash or a full disk leaves the former file whole. Raises OSError."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_to(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
        if temporary.exists():
            temporary.unlink()
        raise OSError(f"cannot write {path} ({models.one_line(error)}): make room, end another run that writes there, "
                      f"or choose another --out") from error


def write_text(path, text):
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save(run):
    """The first process writes last.pt. All else follows from args."""
    sums = mean_sums(run) if run.sums else {}
    if RANK == 0:
        state = {"distiller": run.distiller.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "ema": run.ema.module.state_dict(), "step": run.step, "log": run.log, "sums": sums}
        write(run.out / "last.pt", partial(torch.save, state))


def load(run):
    """Go on from last.pt, or from the start if the run ended before its first checkpoint and log.jsonl."""
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
        raise ValueError(f"{path} is damaged or foreign ({models.one_line(error)}): --overwrite it") from error
    refuse(run.step > run.args.epochs * run.steps, f"the run is beyond --epochs {run.args.epochs} already")


def run_files(out):
    """What a run has written in the folder `out`, and nothing else that may lie there."""
    names = "config.json log.jsonl last.pt best.pt epoch_[0-9]*.pt student.safetensors student_ema.safetensors"
    return [path for name in names.split() for path in Path(out).glob(name)]


def open_folder(args, config, description):
    """Remove a run that --overwrite replaces, write config.json."""
    for path in run_files(args.out) if args.overwrite else ():
        path.unlink()
    if config:  # the command that makes the run from nothing
        more = f" --epochs {args.epochs}" if args.epochs != config["settings"]["epochs"] else ""
        description["command"] = config["command"] + more
    write_text(Path(args.out) / "config.json", json.dumps(description, indent=1))


def write_epoch(run):
    """log.jsonl, best.pt if the epoch beats all former ones, epoch_NNNN.pt every `snapshot_every` epochs."""
    record, done = run.log[-1], len(run.log)
    weights = {"model": run.student.model.state_dict(), "epoch": record["epoch"], "top1": record["top1"]}
    if all(record["top1"] > each["top1"] for each in run.log[:-1]):
        write(run.out / "best.pt", partial(torch.save, weights))
    if done % run.args.snapshot_every == 0:
        write(run.out / f"epoch_{done:04d}.pt", partial(torch.save, weights))
    write_text(run.out / "log.jsonl", "".join(json.dumps(each) + "\n" for each in run.log))


def report(run):
    """One line an epoch, with the time that the rest will take."""
    record, epochs = run.log[-1], run.args.epochs
    terms = " + ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
    say(f"epoch {len(run.log):3d}/{epochs}  loss {record['loss']:.4f} = {terms}  top-1 {record['top1']:.2f} %  EMA "
        f"{record['ema_top1']:.2f} %  {record['images_per_s']:.0f} images/s  "
        f"{record['seconds'] * (epochs - len(run.log)) / 60:.1f} min left")


def finish(run):
    """The weights of the student and of its EMA."""
    for name, student in (("student", run.student), ("student_ema", run.ema.module)):
        weights = {key: value.contiguous() for key, value in student.model.state_dict().items()}
        write(run.out / f"{name}.safetensors", partial(save_file, weights))
    say(f"done: {run.out}: top-1 {run.log[-1]['top1']:.2f} %, EMA {run.log[-1]['ema_top1']:.2f} %; curves and layers: "
        f"python analyze.py --models {run.out}")


# ---------- Settings: OTHERS < recipe < method < saved run < what was typed

OTHERS = dict(  # flags that no recipe decides
    method="spectral",  # objective
    variant="",  # of the student; by default the method's
    student_weights="",  # its start: pretrained (timm's), a file, a run's folder
    student_kwargs={},  # for timm; EM's UniformWide: embed_dim=219 num_heads=3
    teacher_kwargs={},  # for timm
    teacher_head="pretrained",  # random: it has none for this data (DD Table 2)
    first=0,  # align the first X layers; by default the method's choice
    last=0,  # align the last Y; one alone makes the other 0
    student_layers=[],  # explicit, ascending, timm's indices from 0
    teacher_layers=[],  # the teacher's, as many
    data="shapes",  # shapes, a folder with train/ and val/, torch/NAME, hfds/NAME
    skip_bad_images=False,  # replace an unreadable image by the next
    workers=-1,  # data processes; by default one a core
    device="",  # by default cuda, else mps, else cpu
    amp="",  # bfloat16; by default both from 64 px if the device computes in it
    compile=False,  # torch.compile both models
    out="",  # folder of the run; by default runs/METHOD
    snapshot_every=0,  # epochs between epoch_NNNN.pt; by default a tenth
    resume=False,  # go on with the run in --out
    overwrite=False,  # replace the run in --out
    dry_run=False,  # build and print everything
    eval=False)  # accuracy of the run in --out
CHOICES = dict(method=METHODS, variant=models.VARIANTS, teacher_head=("pretrained", "random"),
               device=("cpu", "cuda", "mps"), amp=("off", "teacher", "student", "both"))
OF_THIS_CALL = {"resume", "overwrite", "dry_run", "eval"}
FREE = {"data", "teacher_weights", "epochs", "out", "snapshot_every", "workers", "device", "amp", "compile"}  # --resume
OF_EVAL = {"eval", "out", "method", "data", "crop_pct", "skip_bad_images", "workers", "device", "amp"}
FROM_64_PX = {"auto_augment", "color_jitter", "random_erasing", "crop_pct", "workers"}
LAYERS = {"first", "last", "student_layers", "teacher_layers"}
SHARES = {"ema_decay", "random_erasing", "crop_pct", "label_noise"}  # at most 1
ABOVE_0 = {"img_size", "epochs", "batch_size", "accum", "lr", "repeats", "crop_pct", "train_size", "snapshot_every"}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)  # so that parsing yields what was typed, and no more
    parser.error = fail
    helps = dict(re.findall(r"^    (\w+)=.*# (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))  # the comments
    for name, value in {**IMAGENET, **OTHERS}.items():
        kind = dict(choices=CHOICES[name]) if name in CHOICES else dict(type=type(value), metavar="X")
        if type(value) is bool:
            kind = dict(action="store_true")
        elif type(value) is dict:
            kind = dict(nargs="+", type=models.key_value, action=ParseKwargs, metavar="KEY=VALUE")
        elif type(value) is list:
            kind = dict(nargs="+", type=int, metavar="L")
        elif name == "amp":
            kind.update(nargs="?", const="both")
        values = ", ".join({str(recipe.get(name, "")): 0 for recipe in RECIPES.values()})
        parser.add_argument(flags([name]), help=f"{helps[name]} ({values})".removesuffix(" ()"), **kind)
    options = {name: (default, text, method) for method in METHODS.values()
               for name, (default, text) in method.options().items()}
    for name, (default, text, method) in sorted(options.items()):
        if default is None or name in {**IMAGENET, **OTHERS}:
            fail(f"losses.{method.__name__}: its argument {name!r} is a setting's name, or wants a default")
        values = [f"{key} {each.options()[name][0]}" for key, each in METHODS.items() if name in each.options()]
        kind = dict(action=argparse.BooleanOptionalAction) if type(default) is bool else dict(type=type(default))
        parser.add_argument(flags([name]), help=f"{text} ({', '.join(values)})".replace("%", "%%"), **kind)
    return parser


def flags(names):
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def resolve(typed, device):
    """What was typed -> args, data.Images, config.json of the run to go on with. Raises ValueError."""
    check_ranges(typed)
    known = {**OTHERS, **typed}
    out = known["out"] or f"runs/{known['method']}"
    config = models.read_config(out) if known["resume"] or known["eval"] else {}
    saved = {**config.get("settings", {}), "out": out}
    given = {**saved, **typed}
    known = {**OTHERS, **RECIPES["shapes"], **given}
    dataset = data.open_data(known["data"], known["train_size"], known["label_noise"], only_val=known["eval"])
    of_models = models.settings_of(given.get("student"), given.get("teacher_weights"))
    pixels = {**of_models, **given}.get("img_size") or min(dataset.train[0][0].size)
    recipe, method = RECIPES["small" if pixels < 64 else "imagenet"], METHODS[known["method"]]
    if known["data"] == "shapes":
        recipe = RECIPES["shapes"]
    options = {name: default for name, (default, _) in method.options().items()}
    options.update(variant=method.variant, workers=data.default_workers())
    args = argparse.Namespace(**{**OTHERS, **recipe, **of_models, **options, **saved, **typed})

    args.amp = args.amp or models.default_amp(device, args.img_size)
    args.snapshot_every = args.snapshot_every or max(1, args.epochs // 10)
    if not LAYERS & given.keys():
        args.first, args.last = method.first, method.last
    fitting = 2 ** max(0, (len(dataset.train) // 20).bit_length() - 1)  # for 20 updates an epoch
    if "batch_size" not in given:
        unit = WORLD * args.accum
        args.batch_size = max(unit, min(args.batch_size, fitting) // unit * unit)
    if "lr" not in given and args.student_weights:
        args.lr = 1e-4 * (args.batch_size / 64) ** 0.5  # fine-tuning
    elif "lr" not in given:
        args.lr *= (args.batch_size / recipe["batch_size"]) ** (1 if "batch_size" in given else 0.5)
    for name in {"min_lr", "warmup_lr"} - given.keys():
        setattr(args, name, min(recipe[name], args.lr / 10))
    if "warmup_epochs" not in given and args.warmup_epochs >= args.epochs:
        args.warmup_epochs *= args.epochs / recipe["epochs"]
    if "repeats" not in given and (args.student_weights or fitting < recipe["batch_size"]):
        args.repeats = 1
    check(args, typed, config, dataset, device)
    return args, dataset, config


def refuse(condition, message):
    if condition:
        raise ValueError(message)


def check_ranges(typed):
    """Every number is finite and at least 0; in ABOVE_0 it is not 0, in SHARES at most 1."""
    for name, value in typed.items():
        if type(value) in (int, float):
            top = 1 if name in SHARES else 2 ** 31
            refuse(not 0 <= value <= top, f"{flags([name])} {value} is not in 0 .. {top}")
            refuse(value == 0 and name in ABOVE_0, f"{flags([name])} 0 is not above 0")


def check(args, typed, config, dataset, device):
    """Refuse flags without an effect, and those that contradict the data, the run or each other."""
    method, saved, source = METHODS[args.method], config.get("settings", {}), args.teacher_weights
    idle = {name for each in METHODS.values() for name in each.options()} - method.options().keys()
    for useless, names in ((not method.needs_teacher, ("teacher_weights", "teacher_head")),
                           (not method.needs_teacher and args.variant == "plain", ("teacher", "teacher_kwargs")),
                           (models.is_run(source), ("teacher", "teacher_kwargs", "teacher_head")),
                           (args.data != "shapes", ("train_size", "label_noise")),
                           ("beta" not in method.options(), LAYERS), (args.student_layers, ("first", "last")),
                           (args.img_size < 64, FROM_64_PX), (args.eval, typed.keys() - OF_EVAL)):
        idle.update(names if useless else ())
    idle &= typed.keys()
    refuse(idle, f"{flags(idle)} would have no effect ({method.name}, {args.variant}, {args.data}, "
                 f"{args.img_size} px): leave it out")
    refuse(args.amp != "off" and device.type == "mps", "mps cannot have bfloat16: --amp off")
    for run in [run for run in (args.out if config else "", source) if models.is_run(run)]:
        known = models.read_config(run)
        count, names = known["images"]["classes"], known["class_names"] or dataset.names
        refuse(count != dataset.classes or dataset.names not in (None, names),
               f"{run} knows {count} classes, {args.data} has {dataset.classes}, or their names differ")
    if args.eval:
        return
    names = {*args.student_kwargs, *args.teacher_kwargs} & {"num_classes", "img_size", "pretrained", "weights"}
    refuse(names, f"{names}: no KEY=VALUE but other flags decide")
    refuse(len(OF_THIS_CALL & typed.keys()) > 1, f"{flags(OF_THIS_CALL & typed.keys())}: give one of them")
    refuse("warmup_epochs" in typed and args.warmup_epochs >= args.epochs or args.lr < args.min_lr,
           f"--warmup-epochs {args.warmup_epochs} must be below --epochs, --lr {args.lr} above --min-lr")
    changed = sorted(name for name in saved.keys() & typed.keys() - FREE if saved[name] != typed[name])
    refuse(changed, f"the run in {args.out} has " + ", ".join(f"{flags([name])} {saved[name]}" for name in changed)
           + ": keep it or choose another --out")
    counts, former = dataset.counts(), config.get("images")
    refuse(args.resume and former != counts, f"the run in {args.out} had {former}, {args.data} has {counts}")
    refuse(len(dataset.train) < args.batch_size and not args.dry_run,
           f"{len(dataset.train)} training images do not fill a batch of {args.batch_size}: lower --batch-size")
    refuse(args.batch_size % (WORLD * args.accum),
           f"--batch-size {args.batch_size} does not divide by {WORLD} processes x --accum {args.accum}")
    refuse(run_files(args.out) and not (args.dry_run or args.resume or args.overwrite),
           f"{args.out} holds a run: --resume or --overwrite it, or choose another --out")


def fail(message):
    """One line on stderr and exit status 2."""
    if RANK > 0:  # the first process speaks, and its end makes torchrun stop all
        time.sleep(10)
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(text):
    if RANK == 0:
        print(text, flush=True)


# ---------- The program


def main(argv=None):
    typed = vars(make_parser().parse_args(argv))
    try:
        device = models.choose_device(typed.get("device"))  # of this call, not of the saved run
        if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
            nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        args, dataset, config = resolve(typed, device)
        if args.eval:
            return show_accuracy(args, dataset, device)
        torch.manual_seed(args.seed)
        teacher, distiller, statistics = build(args, dataset.classes)
        description = describe(args, teacher, distiller, dataset)
        if args.dry_run:
            return say(json.dumps(description, indent=1))
        refuse(config and config["teacher_digest"] != description["teacher_digest"],
               f"{args.teacher_weights} is not the teacher that the run learned from")
        say(f"{args.method}, {args.variant} {args.student}, parameters {description['parameters']}, layers "
            f"{description['layers']}, {dataset.counts()}, an epoch of {len(dataset.train) // args.repeats} in batches of "
            f"{args.batch_size}, learning rate {args.lr:.3g}")
        # DDP waits for all processes: none still checks the folder when the first one writes to it.
        run = Run(args, device, teacher and teacher.to(device), distiller.to(device),
                  make_loaders(args, dataset, statistics, device))
        if args.resume:
            load(run)
            if args.epochs != config["settings"]["epochs"]:
                say(f"warning: a new cosine over {args.epochs} epochs: the learning rate jumps")
        if RANK == 0:
            open_folder(args, config, description)
        if teacher:
            show_teacher(run, 100 / dataset.classes)
        with Stop() as run.stop:
            train(run)
        run.train_loader = run.val_loader = None  # ends the data workers: at exit each would take 5 s
        if RANK == 0:
            finish(run)
    except data.BadImage as error:  # from a data worker with its traceback in front
        fail(str(error).splitlines()[-1].removeprefix("data.BadImage: "))
    except (ValueError, OSError, dist.DistError) as error:
        fail(error)


def make_loaders(args, dataset, statistics, device):
    chosen = {name: getattr(args, name) for name in (*FROM_64_PX, "img_size", "seed", "repeats", "skip_bad_images")}
    return data.build_loaders(dataset.train, dataset.val, device=device, **statistics, **chosen)


def show_teacher(run, chance):
    """The teacher's accuracy, and a warning if it is near chance by mistake."""
    (top1, top5, _), = evaluate([run.teacher], run.val_loader, run.autocast("teacher"))
    say(f"teacher {run.args.teacher}: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    meant = "random" in (run.args.teacher_head, run.args.teacher_weights)
    if top1 < chance + (100 - chance) / 10 and not meant:  # a tenth of the way from chance to 100 %
        say(f"warning: the teacher is near chance ({chance:.2f} %): train it longer or from pretrained weights")


def show_accuracy(args, dataset, device):
    """--eval: top-1, top-5 and loss of a run's student and its EMA."""
    files = {"student": "student.safetensors", "its EMA": "student_ema.safetensors"}
    students = [models.HookedModel(models.load_student(args.out, file)).to(device) for file in files.values()]
    _, loader = make_loaders(args, dataset, models.statistics(students[0].model), device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=args.amp in ("student", "both"))
    for name, (top1, top5, loss) in zip(files, evaluate(students, loader, precision)):
        say(f"{name}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}, {loader.size} images")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
