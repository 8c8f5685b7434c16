"""Distil a vision transformer into a smaller one. (DD, EM: the papers, see README.md.)

    torchrun train_kd.py --method spectral              # embedded data and teacher, any laptop
    python train_kd.py --method lift                    # the same without torchrun: one process
    python train_kd.py --method none --variant widened  # a student alone
    torchrun --nproc_per_node=4 train_kd.py --data /data/imagenet --first 1 --last 1
    python train_kd.py --data DIR --student NAME --student-weights pretrained --teacher-weights runs/teacher
    python train_kd.py --eval --out runs/spectral       # accuracy of a run's student
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or threads spin while another one waits for their core

import argparse
import copy
import json
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

# ---------- Hyperparameters: a flag each, the comment is its help. Those of the objectives stand in losses.py

IMAGENET = dict(  # DD C.3, the released code: DeiT's recipe without mixup and cutmix
    student="deit_tiny_patch16_224",  # timm model
    teacher="cait_s24_224",  # timm model
    teacher_weights="",  # a file, a run's folder or random; else timm's pretrained
    img_size=224,  # px; by default the student's own
    epochs=300,  # of training
    batch_size=2048,  # global; by default lower for 20 updates an epoch of a small set
    accum=1,  # gradient accumulation steps
    lr=2e-3,  # peak; by default scales with a typed batch, with the root of a lowered one
    min_lr=1e-5,  # at the end
    warmup_lr=1e-6,  # at the start
    warmup_epochs=5.0,  # linear
    weight_decay=0.05,  # of AdamW
    ema_decay=0.99996,  # of the student's EMA
    repeats=3,  # of each image in a batch (repeated augmentation)
    auto_augment="rand-m9-mstd0.5-inc1",  # timm's RandAugment; this and the next three: from 64 px
    color_jitter=0.4,  # strength
    random_erasing=0.25,  # probability
    crop_pct=0.875,  # of the image in evaluation
    train_size=4000,  # training images of shapes
    label_noise=0.2,  # share of shapes' training labels that are random
    seed=0)  # of all that a run draws
TOY = dict(IMAGENET, student="deit_toy_patch8_32", teacher="cait_toy_patch8_32", img_size=32, epochs=30, batch_size=64,
           warmup_epochs=2.0, ema_decay=0.99, repeats=1)
RECIPES = {"imagenet": IMAGENET, "small": TOY,  # small: images below 64 px
           "shapes": dict(TOY, teacher_weights="weights/cait_toy_shapes.safetensors")}

# ---------- The loop


def update(run, stream):
    """One optimizer step on the next global batch of the stream. Adds its loss terms to run.sums."""
    for micro in range(run.args.accum):
        images, labels = next(stream)
        with torch.no_grad(), run.autocast("teacher"):
            taught = run.teacher(images) if run.teacher else None
        backward(run, images, labels, taught, micro)
    step(run)


def backward(run, images, labels, taught, micro):
    """The gradients of one micro-batch, which the teacher has seen already."""
    torch.manual_seed(data.seed_of(run.args.seed, run.step, RANK, micro))  # for drop-path, dropout
    run.ddp.require_backward_grad_sync = micro == run.args.accum - 1
    with run.autocast("student"):
        _, terms = run.ddp(images, labels, taught)  # the loop never asks which method runs
    (sum(terms.values()) / run.args.accum).backward()
    for name, value in terms.items():
        run.sums[name] = run.sums.get(name, 0) + value.detach() / run.args.accum


def step(run):
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(run.student, step=run.step)
    run.step += 1


def train(run):
    """Train from where the run stands to its last epoch."""
    args, steps = run.args, run.steps
    for epoch in range(len(run.log), args.epochs):
        began, start = time.perf_counter(), run.step - epoch * steps
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
                mean_sums(run)  # ends it at NaN

        end_epoch(run, epoch, (steps - start) * args.batch_size, time.perf_counter() - began)


def end_epoch(run, epoch, images, seconds):
    """Evaluate and record. `images` were trained on in `seconds`."""
    terms = {name: value / run.steps for name, value in mean_sums(run).items()}
    save(run)  # evaluation may be killed
    began = time.perf_counter()
    student, ema = evaluate([run.student, run.ema.module], run.val_loader, run.autocast("student"))
    run.log.append({"epoch": epoch, "step": run.step, "lr": run.optimizer.param_groups[0]["lr"],
                    "loss": sum(terms.values()), "terms": terms, "top1": student[0], "top5": student[1],
                    "ema_top1": ema[0], "ema_top5": ema[1], "images_per_s": images / max(seconds, 1e-9),
                    "seconds": seconds + time.perf_counter() - began})
    run.sums = {}
    if RANK == 0:
        report(run)
        write_epoch(run)
    save(run)


def mean_sums(run):
    """The sums of the epoch's loss terms, averaged over the processes. NaN or infinity ends the run."""
    sums = torch.stack([*run.sums.values()])
    if WORLD > 1:
        dist.all_reduce(sums)
        sums /= WORLD
    named = dict(zip(run.sums, sums.tolist()))
    if not sums.isfinite().all():
        fail(f"loss terms at step {run.step}: {named}: try a lower --lr or --beta, or --amp off")
    return named


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # graphs are for training's batches
def evaluate(students, loader, amp):
    """[[top-1 %, top-5 %, cross-entropy, top-1 % of each class ...]] of the models. The processes share the images."""
    classes = students[0].model.num_classes
    totals = torch.zeros(len(students) + 1, 3 + classes, device=loader.device)  # the last row counts the labels
    torch.nn.ModuleList(students).eval()
    batches = data.evaluation_batches(loader.size, loader.evaluation_batch, rank=RANK, world=WORLD)
    for images, labels in loader.load(batches):
        totals[-1, 3:] += labels.bincount(minlength=classes)
        for model, row in zip(students, totals):
            with amp:
                logits, _ = model(images)
            correct = logits.topk(min(5, classes)).indices == labels[:, None]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            row[:3] += torch.stack([100 * correct[:, 0].sum(), 100 * correct.sum(), loss])
            row[3:] += 100 * labels[correct[:, 0]].bincount(minlength=classes)
    if WORLD > 1:
        dist.all_reduce(totals)
    *rows, labels = totals.tolist()
    return [[part / n if n else 100 for part, n in zip(row, [loader.size] * 3 + labels[3:])] for row in rows]


class Stop:
    """Remembers SIGTERM, SIGUSR1 or Ctrl-C. All stop after the same update."""

    def __enter__(self):
        self.received, self.former = 0, {}
        if threading.current_thread() is threading.main_thread():
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
        """The second Ctrl-C ends even a program that hangs. (The first one may come twice at once.)"""
        first = None
        while number := self.read.recv(1):
            if number[0] == signal.SIGINT:
                first = first or time.monotonic()
                if time.monotonic() > first + 1:
                    os._exit(130)

    def asked(self):
        """The signal that any process has received, or 0."""
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
    build_teacher = partial(
        models.build_teacher, args.teacher, args.teacher_weights, **common, needed=method.needs_teacher,
        random_head=args.teacher_head == "random", **args.teacher_kwargs)
    if method.needs_teacher or args.variant != "plain":
        teacher = build_teacher(blank=args.dry_run and not args.teacher_weights)  # a file is tried
        width = teacher.feature_info[-1]["num_chs"]
    student = models.build_model(
        args.student, **common, variant=args.variant, teacher_width=width, **args.student_kwargs)
    if args.student_weights and not args.dry_run and not (args.resume and (Path(args.out) / "last.pt").exists()):
        say(models.start_from(student, args.student, args.student_weights, args.img_size, args.variant))
    layers_s, layers_t = [], []
    if options.get("beta"):
        layers_s, layers_t = models.pair_layers(student, teacher, args)
    statistics = models.statistics(student)
    hooked_s, hooked_t = models.HookedModel(student, layers_s), None
    if method.needs_teacher:
        twin = build_teacher(blank=True) if args.teacher_maps == "random" else None
        hooked_t = models.HookedModel(teacher, layers_t, **statistics, twin=twin).eval().requires_grad_(False)
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
        self.ema = ModelEmaV3(self.student, decay=args.ema_decay, use_warmup=True)  # or its start would dominate
        for model in (teacher, self.student):
            if args.compile and model:
                model.compile(fullgraph=True, dynamic=False)  # in place, after the EMA's copy
        self.ddp = DistributedDataParallel(distiller, gradient_as_bucket_view=True) if WORLD > 1 else distiller

    def autocast(self, who):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp in (who, "both"))


@torch.no_grad()
def describe(args, teacher, distiller, dataset):
    """Try everything on random images -> what --dry-run prints and config.json keeps."""
    hooked = {"student": distiller.student, "teacher": teacher} if teacher else {"student": distiller.student}
    for model in hooked.values():
        models.check_maps(model, args.img_size)
    images = torch.randn(min(2, args.batch_size // WORLD // args.accum), 3, args.img_size, args.img_size)
    try:
        copy.deepcopy(distiller).train()(images, torch.zeros(len(images)).long(), teacher(images) if teacher else None)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{args.method} with {args.student}: {models.one_line(error)}") from error
    status, commit = subprocess.getstatusoutput(f'git -C "{models.HERE}" describe --always --dirty --abbrev=40')
    return {"settings": {name: value for name, value in vars(args).items() if name not in OF_THIS_CALL},
            "parameters": {who: sum(p.numel() for p in part.parameters())
                           for who, part in {"method": distiller.method, **hooked}.items()},
            "commit": None if status else commit,
            "layers": {"teacher": [], **{who: model.layers for who, model in hooked.items()}},
            "images": dataset.counts(), "class_names": dataset.names,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__,
                         "cpu": torch.backends.cpu.get_cpu_capability()},
            "teacher_digest": models.digest(teacher) if teacher else "", "command": shlex.join(sys.argv)}


# ---------- Files


def write(path, save_to):
    """Write beside and rename: a crash leaves the former file whole. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_to(part)
        os.replace(part, path)
    except Exception as error:  # a full disk has many names
        if part.exists():
            part.unlink()
        raise OSError(f"cannot write {path} ({models.one_line(error)}): make room, end another run there, or choose "
                      f"another --out") from error


def save(run):
    """The first process writes last.pt. All else follows from args."""
    sums = mean_sums(run) if run.sums else {}
    if RANK == 0:
        state = {"distiller": run.distiller.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "ema": run.ema.module.state_dict(), "step": run.step, "log": run.log, "sums": sums}
        write(run.out / "last.pt", partial(torch.save, state))


def load(run):
    """Go on from last.pt, or from the start if the run ended before it had one."""
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
    """What a run has written in the folder `out`."""
    names = "config.json log.jsonl last.pt best.pt epoch_[0-9]*.pt student.safetensors student_ema.safetensors"
    return [path for name in names.split() for path in Path(out).glob(name)]


def open_folder(args, config, record):
    """Remove a run that --overwrite replaces, write config.json."""
    for path in run_files(args.out) if args.overwrite else ():
        path.unlink()
    if config:  # the command that makes the run from nothing
        record["command"] = config["command"]
        if args.epochs != config["settings"]["epochs"]:
            record["command"] += f" --epochs {args.epochs}"
            say("warning: a new cosine: the learning rate jumps")
    write(Path(args.out) / "config.json", lambda part: part.write_text(json.dumps(record, indent=1), "utf-8"))


def write_epoch(run):
    """log.jsonl, best.pt if the epoch beats all former ones, epoch_NNNN.pt every `snapshot_every` epochs."""
    *former, line = run.log
    weights = {"model": run.student.model.state_dict(), "epoch": line["epoch"], "top1": line["top1"]}
    if all(line["top1"] > each["top1"] for each in former):
        write(run.out / "best.pt", partial(torch.save, weights))
    if len(run.log) % run.args.snapshot_every == 0:
        write(run.out / f"epoch_{len(run.log):04d}.pt", partial(torch.save, weights))
    text = "".join(json.dumps(each) + "\n" for each in run.log)
    write(run.out / "log.jsonl", lambda part: part.write_text(text, "utf-8"))


def report(run):
    line, done, epochs = run.log[-1], len(run.log), run.args.epochs
    left = line["seconds"] * (epochs - done) / 60
    terms = " + ".join(f"{name} {value:.4f}" for name, value in line["terms"].items())
    say(f"epoch {done:3d}/{epochs}  loss {line['loss']:.4f} = {terms}  top-1 {line['top1']:.2f} %  EMA "
        f"{line['ema_top1']:.2f} %  {line['images_per_s']:.0f} images/s  {left:.1f} min left")


def finish(run):
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
    student_kwargs={},  # EM's UniformWide: embed_dim=219 num_heads=3
    teacher_kwargs={},  # for timm
    teacher_head="pretrained",  # random: it has none for this data (DD Table 2)
    teacher_maps="trained",  # random: those of its untrained twin
    first=0,  # align the first X layers; by default the method's
    last=0,  # align the last Y; one alone makes the other 0
    student_layers=[],  # explicit, ascending, timm's indices from 0
    teacher_layers=[],  # the teacher's, as many
    data="shapes",  # shapes, a folder with train/ and val/, torch/NAME, hfds/NAME
    skip_bad_images=False,  # replace an unreadable image by the next
    workers=-1,  # by default one per core
    device="",  # by default cuda, else mps, else cpu
    amp="",  # bfloat16; by default both from 64 px if the device has it
    compile=False,  # torch.compile both models
    out="",  # folder of the run; by default runs/METHOD
    snapshot_every=0,  # epochs between epoch_NNNN.pt; by default a tenth
    resume=False,  # the run in --out
    overwrite=False,  # the run in --out
    dry_run=False,  # build and print everything
    eval=False)  # accuracy of the run in --out
CHOICES = dict(
    method=METHODS, variant=models.VARIANTS, teacher_head=("pretrained", "random"), teacher_maps=("trained", "random"),
    device=("cpu", "cuda", "mps"), amp=("off", "teacher", "student", "both"))
OF_THIS_CALL = {"resume", "overwrite", "dry_run", "eval"}
FREE = {"data", "teacher_weights", "epochs", "out", "snapshot_every", "workers", "device", "amp", "compile"}  # --resume
OF_EVAL = {"eval", "out", "method", "data", "crop_pct", "skip_bad_images", "workers", "device", "amp"}
LARGE = {"auto_augment", "color_jitter", "random_erasing", "crop_pct", "workers"}  # from 64 px
LAYERS = {"first", "last", "student_layers", "teacher_layers"}
SHARES = {"ema_decay", "random_erasing", "crop_pct", "label_noise"}  # at most 1
ABOVE_0 = {"img_size", "epochs", "batch_size", "accum", "lr", "repeats", "crop_pct", "train_size", "snapshot_every"}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)  # parsing yields what was typed
    parser.error = fail
    helps = dict(re.findall(r"^    (\w+)=.*# (.+)$", Path(__file__).read_text("utf-8"), re.M))  # the comments
    kinds = {bool: dict(action="store_true"), list: dict(nargs="+", type=int),
             dict: dict(nargs="+", type=models.key_value, action=ParseKwargs, metavar="KEY=VALUE")}
    for name, value in {**IMAGENET, **OTHERS}.items():
        kind = dict(choices=CHOICES[name]) if name in CHOICES else kinds.get(type(value), dict(type=type(value)))
        if name == "amp":
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
    """What was typed -> args, data.Images, config.json of a run to go on with. Raises ValueError."""
    check_ranges(typed)
    out = typed.get("out") or f"runs/{typed.get('method', OTHERS['method'])}"
    config = models.read_config(out) if {"resume", "eval"} & typed.keys() else {}
    saved = {**config.get("settings", {}), "out": out}
    given = {**saved, **typed}
    known = {**OTHERS, **RECIPES["shapes"], **given}
    refuse(known["method"] not in METHODS, f"losses.py has no method {known['method']}")
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
    """Every number is finite and at least 0, in ABOVE_0 more, in SHARES at most 1."""
    for name, value in typed.items():
        if type(value) in (int, float):
            within = 0 <= value <= (1 if name in SHARES else 2 ** 31)
            refuse(not within or value == 0 and name in ABOVE_0, f"{flags([name])} {value} is out of range")


def check(args, typed, config, dataset, device):
    """Refuse flags without an effect, or that contradict the data, the run or each other."""
    method, saved, source = METHODS[args.method], config.get("settings", {}), args.teacher_weights
    untaught, from_run = not method.needs_teacher, models.is_run(source)
    idle = {name for each in METHODS.values() for name in each.options()} - method.options().keys()
    for useless, names in (
            (untaught, ("teacher_weights", "teacher_head")), (from_run, ("teacher", "teacher_kwargs", "teacher_head")),
            (untaught and args.variant == "plain", ("teacher", "teacher_kwargs")),
            ("beta" not in method.options(), (*LAYERS, "teacher_maps")), (args.student_layers, ("first", "last")),
            (args.data != "shapes", ("train_size", "label_noise")), (args.img_size < 64, LARGE),
            (args.eval, typed.keys() - OF_EVAL)):
        idle.update(names if useless else ())
    idle &= typed.keys()
    refuse(idle, f"{flags(idle)} would have no effect ({method.name}, {args.variant}, {args.data}, {args.img_size} px)")
    refuse(args.amp != "off" and device.type == "mps", "mps has no bfloat16: --amp off")
    for who in [args.out] * bool(config) + [source] * from_run:
        count, names = (models.read_config(who)[key] for key in ("images", "class_names"))
        refuse(count["classes"] != dataset.classes or names and dataset.names not in (None, names),
               f"{who} knows {count['classes']} classes, {args.data} {dataset.classes}, or their names differ")
    if args.eval:
        return
    refuse(len(OF_THIS_CALL & typed.keys()) > 1, f"{flags(OF_THIS_CALL & typed.keys())}: give one of them")
    refuse("warmup_epochs" in typed and args.warmup_epochs >= args.epochs or args.lr < max(args.min_lr, args.warmup_lr),
           "--warmup-epochs must be below --epochs, --min-lr and --warmup-lr below --lr")
    sources = [Path(each).resolve() for each in (source, args.student_weights) if each]
    refuse(args.overwrite and any(Path(args.out).resolve() in (path, path.parent) for path in sources),
           f"the run learns from {args.out}: choose another --out")
    changed = sorted(name for name in saved.keys() & typed.keys() - FREE if saved[name] != typed[name])
    refuse(changed, "the run has " + ", ".join(f"{flags([name])} {saved[name]}" for name in changed) + ": keep that")
    counts, former = dataset.counts(), config.get("images")
    refuse(args.resume and former != counts, f"the run had {former}, {args.data} has {counts}")
    refuse(len(dataset.train) < args.batch_size and not args.dry_run,
           f"{len(dataset.train)} images do not fill a batch of {args.batch_size}: lower --batch-size")
    refuse(args.batch_size % (WORLD * args.accum),
           f"--batch-size {args.batch_size} does not divide by {WORLD} processes x --accum {args.accum}")
    refuse(run_files(args.out) and not (args.dry_run or args.resume or args.overwrite),
           f"{args.out} holds a run: --resume, --overwrite, or choose another --out")


def fail(message):
    """One line on stderr and exit status 2."""
    if RANK > 0:  # the first process speaks, and torchrun then stops all
        time.sleep(10)
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(text):
    if RANK == 0:
        code = sys.stdout.encoding or "utf-8"
        print(text.encode(code, "replace").decode(code), flush=True)


# ---------- The program


def main(argv=None):
    typed = vars(make_parser().parse_args(argv))
    try:
        device = models.choose_device(typed.get("device"))
        if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
            nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        args, dataset, config = resolve(typed, device)
        if args.eval:
            return show_accuracy(args, dataset, device)
        torch.manual_seed(args.seed)
        teacher, distiller, statistics = build(args, dataset.classes)
        record = describe(args, teacher, distiller, dataset)
        if args.dry_run:
            return say(json.dumps(record, indent=1))
        refuse(config and config["teacher_digest"] != record["teacher_digest"],
               f"{args.teacher_weights} is not the teacher of the run")
        say(f"{args.method}, {args.variant} {args.student}, layers {record['layers']}, {dataset.counts()}: epochs of "
            f"{len(dataset.train) // args.repeats} images, batches of {args.batch_size}, learning rate {args.lr:.3g}")
        # DDP waits for all: none still checks the folder when the first one writes there.
        run = Run(args, device, teacher and teacher.to(device), distiller.to(device),
                  make_loaders(args, dataset, statistics, device))
        if args.resume:
            load(run)
        if RANK == 0:
            open_folder(args, config, record)
        with Stop() as run.stop:
            if teacher:
                show_teacher(run, 100 / dataset.classes)
            train(run)
        run.train_loader = run.val_loader = None  # ends the workers, which at exit would take 5 s each
        if RANK == 0:
            finish(run)
    except data.BadImage as error:  # from a data worker with its traceback in front
        fail(str(error).splitlines()[-1].removeprefix("data.BadImage: "))
    except (ValueError, OSError, AssertionError, dist.DistError) as error:
        fail(error)


def make_loaders(args, dataset, statistics, device):
    chosen = {name: getattr(args, name) for name in (*LARGE, "img_size", "seed", "repeats", "skip_bad_images")}
    return data.build_loaders(dataset.train, dataset.val, device=device, **statistics, **chosen)


def show_teacher(run, chance):
    """The teacher's accuracy, and a warning if it is near chance (a tenth of the way to 100 %) by mistake."""
    top1, top5, *_ = evaluate([run.teacher], run.val_loader, run.autocast("teacher"))[0]
    say(f"teacher {run.args.teacher}: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    if top1 < chance + (100 - chance) / 10 and "random" not in (run.args.teacher_head, run.args.teacher_weights):
        say(f"warning: the teacher is near chance ({chance:.2f} %): train it longer or from pretrained weights")


def show_accuracy(args, dataset, device):
    """--eval: top-1, top-5 and loss of a run's student and its EMA."""
    files = {"student": "student.safetensors", "its EMA": "student_ema.safetensors"}
    students = [models.HookedModel(models.load_student(args.out, file)).to(device) for file in files.values()]
    _, loader = make_loaders(args, dataset, models.statistics(students[0].model), device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.amp in ("student", "both"))
    for name, (top1, top5, loss, *by_class) in zip(files, evaluate(students, loader, amp)):
        lowest = sorted(zip(by_class, dataset.names or range(dataset.classes)))[:3]
        say(f"{name}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}, {loader.size} images; lowest: "
            + ", ".join(f"{who} {accuracy:.0f} %" for accuracy, who in lowest))


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()  # gloo may hang if the other end is gone
        dist.destroy_process_group()
