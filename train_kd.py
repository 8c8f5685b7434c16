"""Distil a vision transformer into a smaller one.

    torchrun train_kd.py --method spectral              # embedded data and teacher, any laptop
    python train_kd.py --method lift                    # another method; torchrun is not needed
    python train_kd.py --method none --variant widened  # a student without a teacher
    torchrun --nproc_per_node=4 train_kd.py --data /data/imagenet --first 1 --last 1
    python train_kd.py --recipe finetune --data DIR --teacher-weights runs/teacher
    python train_kd.py --eval --out runs/spectral       # accuracy of a run's student

A command with --help shows the flags of its method, and the defaults of its recipe. DD is the paper
Distillation Dynamics, EM is Encoding Mismatch (see README.md).
"""
import os

# OpenMP reads this when torch is imported: a waiting thread then frees its core after a short while.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.distributed as dist
from filelock import FileLock
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, distribute_bn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import losses
import models
from losses import METHODS

RANK = int(os.environ.get("RANK", 0))  # torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class UserError(ValueError):
    """A mistake of the user. main prints it as one line."""


# ---------- Settings. Each one is a flag. Where its value comes from, weakest first: its row in SETTINGS,
# the recipe, the method, the student's name or the teacher's run, the resumed run, the command line

RECIPES = {
    "imagenet": {},  # the rows' own defaults. DD C.3: DeiT's recipe, without mixup and without cutmix
    "toy": dict(  # for images below 64 px: the embedded shapes, CIFAR
        student="deit_toy_patch8_32",
        teacher="cait_toy_patch8_32",
        teacher_weights="weights/cait_toy_shapes.safetensors",
        epochs=30,
        batch_size=64,
        warmup_epochs=2.0,
        ema_decay=0.99,
        repeats=1,
        amp=False,
        snapshot_every=3),
    "finetune": dict(  # for a folder of photos: from pretrained weights
        student_weights="pretrained",
        epochs=30,
        batch_size=16,
        lr=5e-5,
        min_lr=1e-6,
        ema_decay=0.99,
        repeats=1),
}

# Groups of rows: name, default, help, choices. `check` refuses the flags of a group that has no effect:
# those of "everywhere" always have one, with --eval too. The flags of a method stand in losses.py.
SETTINGS = {"everywhere": [
    ("method", "spectral", "objective", METHODS),
    ("data", "shapes", "shapes, a folder with train/ and val/, torch/NAME, hfds/NAME"),
    ("skip_bad_images", False, "take the next image in place of an unreadable one"),
    ("device", "", "by default cuda, else mps, else cpu", ("cuda", "mps", "cpu")),
    ("amp", True, "bfloat16, on GPUs made for it"),
    ("out", "", "folder of the run; by default runs/METHOD"),
    ("eval", False, "print the accuracy of the run in --out"),
], "training": [
    ("recipe", "", "set of defaults; if not given: toy for shapes, else imagenet", RECIPES),
    ("img_size", 0, "image size in px; by default the student's, or that of the teacher's run"),
    ("repeats", 3, "copies of an image, one after the other (repeated augmentation)"),

    ("student", "deit_tiny_patch16_224", "timm model"),
    ("student_weights", "", "initial weights: pretrained (timm's), a file, a run's folder"),
    ("student_kwargs", {}, "KEY=VALUE ... for timm; EM's UniformWide: embed_dim=219 num_heads=3"),
    ("variant", "plain", "variant of the student", models.VARIANTS),

    ("epochs", 300, "epochs of training"),
    ("batch_size", 2048, "images of an update, over all processes"),
    ("accum", 1, "gradient accumulation: parts of a batch"),
    ("lr", 2e-3, "peak learning rate; scaled with --batch-size (finetune: with its square root)"),
    ("min_lr", 1e-5, "learning rate at the end, at most --lr"),
    ("warmup_epochs", 5.0, "linear warm-up from 1e-6; at most a fifth of the training"),
    ("weight_decay", 0.05, "weight decay of AdamW"),
    ("ema_decay", 0.99996, "decay of the running average of the student's weights (EMA)"),
    ("seed", 0, "random seed"),

    ("compile", False, "torch.compile both models"),
    ("snapshot_every", 30, "write epoch_NNNN.pt every N epochs"),
    ("resume", False, "go on with the run in --out, or start it"),
    ("dry_run", False, "build and print everything, train nothing"),
], "shapes": [
    ("train_size", 4000, "training images"),
    ("label_noise", 0.2, "share of the training labels that are random"),
], "training from 64 px": [
    ("auto_augment", "rand-m9-mstd0.5-inc1", "timm's RandAugment; '': none", ("rand-m9-mstd0.5-inc1", "")),
    ("random_erasing", 0.25, "probability of random erasing"),
], "from 64 px": [
    ("crop_pct", 0.875, "share of the image's side that evaluation sees"),
    ("workers", data.default_workers(), "processes that read images"),
], "teacher": [
    ("teacher_weights", "", "a file, a run's folder or random; else timm's pretrained"),
], "teacher model": [
    ("teacher", "cait_s24_224", "timm model"),
    ("teacher_head", "pretrained", "random: a new classifier, for other classes", ("pretrained", "random")),
], "first and last": [
    ("first", 0, "align the first X layers; if no layer is given: the method's own"),
    ("last", 0, "align the last Y layers"),
], "layers": [
    ("student_layers", [], "layers of the student, in timm's numbers, from 0, ascending"),
    ("teacher_layers", [], "as many layers of the teacher"),
    ("teacher_maps", "trained", "random: maps of an untrained copy", ("trained", "random")),
]}

# ---------- The loop


def train(run):
    """Train from where the run stands to its last epoch."""
    steps = run.steps
    for epoch in range(len(run.log), run.args.epochs):
        began = time.perf_counter()
        start = run.step - epoch * steps  # updates done already, if the run was stopped in this epoch
        stream = stream_of(run, epoch, start)
        run.distiller.train()
        # tqdm: True is no bar, None is a bar if there is a terminal.
        for _ in tqdm(
                range(start, steps), f"epoch {epoch + 1}", leave=False, disable=RANK > 0 or None):
            update(run, stream)
            stop_after_signal(run.signal, [run])
        end_epoch(run, steps - start, began)


def stream_of(run, epoch, start):
    """The images and labels of an epoch, from the update `start` on."""
    args, loader = run.args, run.train_loader
    batches = data.training_batches(
        loader.size, args.batch_size, seed=args.seed, epoch=epoch, start=start,
        repeats=args.repeats, accum=args.accum, rank=RANK, world=WORLD)
    return loader.load(batches, epoch)


def update(run, stream):
    """One optimizer step on the next global batch of the stream."""
    for part in range(run.args.accum):
        images, labels = next(stream)
        taught = None  # or the teacher's logits and maps
        if run.teacher:
            with torch.no_grad(), run.autocast:
                taught = run.teacher(images)
        learn(run, part, images, labels, taught)


def learn(run, part, images, labels, taught):
    """The gradients of one part of a batch; after the last part, the optimizer step."""
    accum = run.args.accum
    last = part == accum - 1
    torch.manual_seed(data.seed_of(run.args.seed, run.step, RANK, part))  # for drop-path
    run.ddp.require_backward_grad_sync = last  # DDP sends gradients once, after the last part
    run.distiller.method.progress = run.step / (run.steps * run.args.epochs)  # for methods of your own
    with run.autocast:
        logits, terms = run.ddp(images, labels, taught)
    loss = sum(terms.values()) / accum
    loss.backward()
    for name, value in terms.items():
        run.sums[name] = run.sums.get(name, 0) + value.detach() / accum
    if last:
        run.scheduler.step_update(run.step)  # timm's schedulers set the rate before the update
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.ema.update(run.student, step=run.step)
        run.step += 1


def end_epoch(run, updates, began):
    """Evaluate and record an epoch.

    `updates`: how many of them this program made (fewer after --resume). `began`: when it began.
    """
    images_per_s = updates * run.args.batch_size / (time.perf_counter() - began)
    sums = checked_sums(run)
    save(run, sums)  # so that nothing is lost if the program is killed during evaluation
    evaluated = [run.student, run.ema.module]
    if WORLD > 1:
        for model in evaluated:
            # The processes' BatchNorm statistics differ by the last update: average them.
            distribute_bn(model, WORLD, reduce=True)
    student, ema = evaluate(evaluated, run.val_loader, run.args.amp)
    terms = {name: value.item() / run.steps for name, value in sums.items()}
    run.log.append({
        "step": run.step,
        "lr": run.optimizer.param_groups[0]["lr"],
        "terms": terms,
        "top1": student[0],
        "top5": student[1],
        "ema_top1": ema[0],
        "ema_top5": ema[1],
        "device": f"{run.train_loader.device}, bfloat16 {'on' if run.args.amp else 'off'}",
        "images_per_s": images_per_s,
        "seconds": time.perf_counter() - began})
    run.sums = {}
    if RANK == 0:
        report(run)
        write_epoch(run)
    save(run, {})  # now with the epoch's log


def checked_sums(run):
    """{term: its sum over the epoch so far}, averaged over the processes. Refuses NaN and infinity."""
    sums = torch.stack(list(run.sums.values()))
    if WORLD > 1:
        dist.all_reduce(sums)
        sums /= WORLD
    refuse(not sums.isfinite().all(),
           f"{run.out}: at step {run.step} the sums of {[*run.sums]} are {sums.tolist()}: "
           f"lower --lr or --beta, or give --no-amp")
    return dict(zip(run.sums, sums))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # without torch.compile, whose graphs have fixed batches
def evaluate(evaluated, loader, amp):
    """[top-1 %, top-5 %] of each model. The processes share the images."""
    totals = torch.zeros(len(evaluated), 2, device=loader.device)
    for model in evaluated:
        model.eval()
    batches = data.evaluation_batches(
        loader.size, loader.evaluation_batch, rank=RANK, world=WORLD)
    for images, labels in loader.load(batches):
        for model, total in zip(evaluated, totals):
            with torch.autocast(loader.device.type, torch.bfloat16, enabled=amp):
                logits, _ = model(images)
            correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            total[0] += 100 * correct[:, 0].sum()
            total[1] += 100 * correct.sum()
    if WORLD > 1:
        dist.all_reduce(totals)
    return (totals.cpu().double() / loader.size).tolist()


@contextlib.contextmanager
def signals_remembered(run):
    """Remember Ctrl-C and signals to end; the loop stops after its update. (Ctrl-\\ ends at once.)"""
    def remember(number, frame):
        run.signal = number

    former = {}
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has only SIGINT and SIGTERM
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            former[number] = signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def stop_after_signal(number, runs):
    """If any process has received a signal, all save their runs and exit, after the same update.

    This program has one run, results/side_by_side.py has several.
    """
    received = torch.tensor(number)
    if WORLD > 1:
        dist.all_reduce(received, dist.ReduceOp.MAX)
    if received:
        for run in runs:
            save(run, checked_sums(run))
            say(f"stopped after step {run.step}: go on with --resume --out {run.out}")
        sys.exit(128 + received.item())  # as a shell reports a signal


# ---------- Building


def build(args, classes):
    """-> the teacher (or None) and the Distiller."""
    method = METHODS[args.method]
    refuse(args.variant not in method.variants,
           f"--method {args.method} has no use for --variant {args.variant}")
    torch.manual_seed(args.seed)
    teacher, width = None, None
    if method.needs_teacher or args.variant != "plain":
        # A method without a teacher needs only its width. A dry run downloads no weights.
        untrained = not method.needs_teacher or (args.dry_run and not args.teacher_weights)
        teacher = models.build_teacher(args, classes, untrained)
        width = teacher.feature_info[-1]["num_chs"]
    student = models.build_model(
        args.student, num_classes=classes, img_size=args.img_size, variant=args.variant,
        teacher_width=width, **args.student_kwargs)
    refuse(hasattr(student, "head_dist"),
           f"{args.student} has two classifiers: take the model without 'distilled' in its name")
    if args.student_weights and not args.dry_run and not models.has_weights(args.out):
        # (With a checkpoint, `load` will replace them.)
        say(models.start_from(
            student, args.student, args.student_weights, args.img_size, args.variant))

    layers_s, layers_t = [], []
    if method.first or method.last:  # it compares feature maps
        layers_s, layers_t = models.pair_layers(student, teacher, args)
    hooked_s = models.HookedModel(student, layers_s)
    models.check_maps(hooked_s, args.img_size)
    hooked_t = None
    options = {name: getattr(args, name) for name in method.options()}
    if method.needs_teacher:
        # The loaders normalise the images for the student, so the teacher has to do it anew.
        normalisation = models.statistics(student)
        if args.teacher_maps == "random":
            copy = models.build_teacher(args, classes, untrained=True)
            hooked_t = models.UntrainedMaps(teacher, copy, layers_t, **normalisation)
        else:
            hooked_t = models.HookedModel(teacher, layers_t, **normalisation)
        models.check_maps(hooked_t, args.img_size)
        hooked_t.eval().requires_grad_(False)
        options["channels"] = list(zip(hooked_s.channels, hooked_t.channels))
    return hooked_t, losses.Distiller(hooked_s, method(**options))


class Run:
    """What the loop works with, and how far it is."""

    def __init__(self, args, device, dataset, teacher, distiller):
        self.args = args
        self.out = Path(args.out)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
        self.distiller = distiller.to(device)
        self.student = distiller.student
        self.teacher = teacher
        if teacher:
            teacher.to(device)
        self.train_loader, self.val_loader = make_loaders(args, device, dataset, self.student)
        self.steps = self.train_loader.size // args.batch_size  # updates in an epoch
        self.step = 0  # updates so far
        self.log = []  # a record for each epoch
        self.sums = {}  # {term: its sum over the epoch}
        self.signal = 0  # the last signal received
        self.optimizer = create_optimizer_v2(
            distiller, "adamw", lr=args.lr, weight_decay=args.weight_decay, fused=True)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=args.epochs, min_lr=min(args.min_lr, args.lr),
            warmup_lr=1e-6, warmup_epochs=min(args.warmup_epochs, args.epochs / 5),
            step_on_epochs=False, updates_per_epoch=self.steps)
        # Without use_warmup the student's random first weights would dominate the average.
        self.ema = ModelEmaV3(self.student, decay=args.ema_decay, use_warmup=True)
        if args.compile:  # in place, and after the EMA has copied the student
            self.student.compile(fullgraph=True, dynamic=False)
            if teacher:
                teacher.compile(fullgraph=True, dynamic=False)
        self.ddp = distiller  # wrapped, if there are several processes
        if WORLD > 1:
            self.ddp = DistributedDataParallel(distiller)


def make_loaders(args, device, dataset, student):
    return data.build_loaders(
        dataset.train, dataset.val, **models.statistics(student.model), device=device,
        img_size=args.img_size, seed=args.seed, repeats=args.repeats, workers=args.workers,
        crop_pct=args.crop_pct, auto_augment=args.auto_augment,
        random_erasing=args.random_erasing, skip_bad_images=args.skip_bad_images)


@torch.no_grad()
def describe(args, dataset, teacher, distiller):
    """Try both models on random images -> what --dry-run prints and config.json holds."""
    images = torch.randn(2, 3, args.img_size, args.img_size)
    taught = teacher(images) if teacher else None
    distiller(images, torch.tensor([0, 1]), taught)
    return {
        "settings": vars(args),
        "parameters": {name: models.count_parameters(part) for name, part in distiller.named_children()},
        "layers": {
            "student": distiller.student.layers,
            "teacher": teacher.layers if teacher else []},
        "images": {
            "train": len(dataset.train),
            "val": len(dataset.val),
            "classes": len(dataset.classes)},
        "class_names": dataset.classes,
        "commit": subprocess.getoutput(
            f'git -C "{models.HERE}" describe --always --dirty --abbrev=40'),
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability()},
        "command": shlex.join(sys.argv)}


# ---------- Files


def claimed(out):
    """A lock that makes a run's folder, and keeps other programs from training in it.

    Each process has its own, so that a second start is refused in all of them.
    """
    return FileLock(f"{out}/in-use-{RANK}.lock", timeout=0)


def write_torch(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    models.write(path, buffer.getbuffer())


def write_weights(path, model):
    # Cloned: safetensors refuses tensors that share memory.
    weights = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    models.write(path, safetensors.torch.save(weights))


def save(run, sums):
    """The first process writes last.pt, the others wait. `sums`: run.sums, averaged over the processes.

    There is no random state to save, because each update seeds itself.
    """
    if RANK == 0:
        write_torch(run.out / "last.pt", {
            "distiller": run.distiller.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "ema": run.ema.module.state_dict(),
            "step": run.step,
            "log": run.log,
            "sums": sums})
    if WORLD > 1:
        dist.barrier()


def load(run):
    """Go on from last.pt."""
    state = torch.load(
        run.out / "last.pt", map_location=run.train_loader.device, weights_only=True)
    run.distiller.load_state_dict(state["distiller"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.ema.module.load_state_dict(state["ema"])
    run.step = state["step"]
    run.log = state["log"]
    run.sums = state["sums"]


def write_epoch(run):
    """The log, and the student's weights: the last, the best, every `snapshot_every`-th epoch's."""
    *former, last = run.log
    state = run.student.model.state_dict()
    if all(last["top1"] > each["top1"] for each in former):
        write_torch(run.out / "best.pt", state)
    if len(run.log) % run.args.snapshot_every == 0:
        write_torch(run.out / f"epoch_{len(run.log):04d}.pt", state)
    write_weights(run.out / "student.safetensors", run.student.model)
    write_weights(run.out / "student_ema.safetensors", run.ema.module.model)
    lines = [json.dumps(each) + "\n" for each in run.log]
    models.write(run.out / "log.jsonl", "".join(lines).encode())


def report(run):
    line = run.log[-1]
    done, epochs = len(run.log), run.args.epochs
    terms = " + ".join(f"{name} {value:.4f}" for name, value in line["terms"].items())
    minutes = line["seconds"] * (epochs - done) / 60
    say(f"epoch {done:3d}/{epochs}  loss {sum(line['terms'].values()):.4f} = {terms}  "
        f"top-1 {line['top1']:.2f} %  EMA {line['ema_top1']:.2f} %  "
        f"{line['images_per_s']:.0f} images/s  {minutes:.1f} min left")


# ---------- The command line

MAY_CHANGE = {  # from a run to its continuation with --resume
    "resume", "eval", "dry_run", "data", "skip_bad_images", "epochs", "out", "snapshot_every",
    "workers", "device", "amp", "compile"}
FRACTIONS = {"label_noise", "random_erasing", "crop_pct", "ema_decay"}  # at most 1
ABOVE_0 = {"repeats", "crop_pct", "epochs", "batch_size", "accum", "snapshot_every"}


def parse(argv):
    """-> the settings, and config.json of the run that is resumed or evaluated, or {}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, add_help=False)
    parser.error = fail
    for group in SETTINGS.values():
        for row in group:
            add_flag(parser, *row)
    early, _ = parser.parse_known_args(argv)  # 1: the few settings that decide the defaults
    out = early.out or f"runs/{early.method}"
    config = {}
    if early.eval or (early.resume and models.is_run(out)):
        config = models.read_config(out)
    saved = {**config.get("settings", {}), "out": out}
    method = METHODS[saved.get("method", early.method)]
    if not early.eval:
        for name, (default, text) in method.options().items():
            add_flag(parser, name, default, text)
    parser.add_argument("-h", "--help", action="help")

    recipe = early.recipe or ("toy" if early.data == "shapes" else "imagenet")
    parser.set_defaults(**RECIPES[recipe], recipe=recipe, variant=method.variant)
    if not (early.first or early.last or early.student_layers):
        parser.set_defaults(first=method.first, last=method.last)
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)  # 2: batch, student and teacher; rate and image size follow
    factor = args.batch_size / parser.get_default("batch_size")  # 1 if it was not typed
    power = 0.5 if recipe == "finetune" else 1  # square root, or linear
    parser.set_defaults(lr=parser.get_default("lr") * factor**power)
    parser.set_defaults(**models.implied_settings(args.student, args.teacher_weights))
    parser.set_defaults(**saved)  # again: what was saved is stronger than what follows
    return parser.parse_args(argv), config  # 3: all settings


def add_flag(parser, name, default, text, choices=None):
    """The type of the default decides the kind of the flag."""
    kind = dict(type=type(default), choices=choices)
    if isinstance(default, bool):
        kind = dict(action=argparse.BooleanOptionalAction)
    elif isinstance(default, list):
        kind = dict(nargs="+", type=int)
    elif isinstance(default, dict):
        kind = dict(nargs="+", type=models.key_value, action=ParseKwargs)
    parser.add_argument(flag(name), default=default, help=f"{text} (%(default)s)", **kind)


def flag(name):
    return "--" + name.replace("_", "-")


def refuse(condition, message):
    if condition:
        raise UserError(message)


def check(args, argv, config, dataset):
    """Refuse what has no effect, is out of range, or does not fit the data, a run, or other settings."""
    method = METHODS[args.method]
    needs_teacher = method.needs_teacher or args.variant != "plain"
    needs_layers = method.first or method.last
    typed = {word.partition("=")[0] for word in argv}
    has_effect = {
        "training": True,
        "shapes": args.data == "shapes",
        "training from 64 px": args.img_size >= 64,
        "teacher": method.needs_teacher,
        "teacher model": needs_teacher and not models.is_run(args.teacher_weights),
        "layers": needs_layers,
        "first and last": needs_layers and not args.student_layers}
    if args.eval:
        has_effect = dict.fromkeys(has_effect, False)
    has_effect["from 64 px"] = args.img_size >= 64  # with --eval, too
    for group, effect in has_effect.items():
        given = typed & {flag(name) for name, *_ in SETTINGS[group]}
        refuse(given and not effect, f"{', '.join(sorted(given))} has no effect here: leave it out")
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in method.options():  # a method checks its own
            most = 1 if name in FRACTIONS else 2**31
            within = 0 <= value <= most and (value or name not in ABOVE_0)
            refuse(not within, f"{flag(name)} {value} is out of range")
    for folder in (args.out if config else "", args.teacher_weights):
        if models.is_run(folder):
            known = models.read_config(folder)
            refuse(known.get("class_names") != dataset.classes,
                   f"{folder} and {args.data} differ in their classes or the order of them")
    if args.eval:
        return
    images = len(dataset.train)
    if config:
        for name, value in config["settings"].items():
            # As in the file, where tuples are lists. A setting that is gone has not changed.
            now = json.dumps(getattr(args, name, value))
            changed = name not in MAY_CHANGE and now != json.dumps(value)
            refuse(changed, f"the run has {flag(name)} {value}: keep that, or start another --out "
                            f"with --student-weights {args.out}")
        refuse(models.has_weights(args.out) and config["images"]["train"] != images,
               f"the run had {config['images']['train']} training images, {args.data} has {images}")
    else:
        refuse(models.has_weights(args.out) and not args.dry_run,
               f"{args.out} holds a run: remove it, --resume it, or give another --out")
    refuse(args.batch_size > images,
           f"{images} images do not fill a batch of {args.batch_size}: take --recipe finetune, "
           f"or lower --batch-size")
    refuse(args.batch_size % (WORLD * args.accum),
           f"--batch-size {args.batch_size} does not divide by {WORLD} processes x --accum")


def fail(message):
    """One line on stderr and exit status 2."""
    if RANK > 0:
        time.sleep(10)  # the first process speaks, and torchrun then stops all
    # An error of a data worker arrives as a traceback, which ends with the message.
    *_, text = str(message).rpartition("data.DataError: ")
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(text):
    if RANK == 0:
        print(text, flush=True)


# ---------- The program


def read_settings(argv):
    """-> the settings, the device, the data set, and config.json as from `parse`, all checked."""
    args, config = parse(argv)
    device = models.choose_device(args.device)
    args.amp = args.amp and models.has_bfloat16(device)
    if WORLD > 1 and not dist.is_initialized():
        nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has no NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    dataset = data.open_data(args.data, args.train_size, args.label_noise, only_val=args.eval)
    check(args, argv, config, dataset)
    return args, device, dataset, config


def run_program(argv):
    args, device, dataset, config = read_settings(argv)
    if args.eval:
        show_accuracy(args, device, dataset)
    elif args.dry_run:
        teacher, distiller = build(args, len(dataset.classes))
        say(json.dumps(describe(args, dataset, teacher, distiller), indent=1))
    else:
        with claimed(args.out):
            run = prepare(args, device, dataset, config)
            with signals_remembered(run):
                if run.teacher:
                    show_teacher(run, len(dataset.classes))
                train(run)
            say(f"done: {run.out}; curves and layers: python analyze.py --models {run.out}")


def prepare(args, device, dataset, config):
    """-> the Run, ready to train."""
    teacher, distiller = build(args, len(dataset.classes))
    record = describe(args, dataset, teacher, distiller)
    run = Run(args, device, dataset, teacher, distiller)
    if config:
        record["command"] = config["command"]
    if models.has_weights(args.out):
        load(run)
    if RANK == 0:
        models.write(run.out / "config.json", json.dumps(record, indent=1).encode())
    say(f"{args.method}, {args.variant} {args.student}, layers {record['layers']}, "
        f"{record['images']}: {args.epochs} epochs of {run.steps} updates, batches of "
        f"{args.batch_size}, learning rate {args.lr:.3g}, {device}, "
        f"bfloat16 {'on' if args.amp else 'off'}")
    return run


def show_teacher(run, classes):
    """Print the teacher's accuracy, and warn if it is near chance."""
    top1, top5 = evaluate([run.teacher], run.val_loader, run.args.amp)[0]
    say(f"teacher {run.args.teacher}: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    chance = 100 / classes
    # Less than a tenth of the way from chance to 100 %.
    if top1 < chance + (100 - chance) / 10:
        say(f"warning: the teacher is near chance ({chance:.2f} %): is it untrained, or are its classes "
            f"in another order? Its logits teach nothing")


def show_accuracy(args, device, dataset):
    """--eval: the accuracy of all that a run has saved."""
    files = ["student.safetensors", "student_ema.safetensors", "best.pt"]
    students = []
    for file in files:
        student = models.load_student(args.out, file)
        students.append(models.HookedModel(student).to(device))
    _, loader = make_loaders(args, device, dataset, students[0])
    for file, (top1, top5) in zip(files, evaluate(students, loader, args.amp)):
        say(f"{file}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, {loader.size} images, "
            f"bfloat16 {'on' if args.amp else 'off'}")


def main(argv=sys.argv[1:], program=run_program):
    """Run a program, this one or one of results/, and answer a mistake in one line."""
    models.prepare_console()
    try:
        program(argv)
    except (data.DataError, models.ModelError, losses.LossError, UserError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()  # wait for all: gloo may hang if another process has left
        dist.destroy_process_group()
