"""Distil a vision transformer into a smaller one.

    torchrun train_kd.py --method spectral                         # embedded data and teacher, any laptop
    python train_kd.py --method lift                               # one process without torchrun, the same path
    python train_kd.py --method none --variant widened             # a student alone, no teacher
    torchrun --nproc_per_node=4 train_kd.py --method spectral --data /data/imagenet --first 1 --last 1
    python train_kd.py --data DIR --student NAME --student-weights pretrained --teacher-weights runs/teacher
    python train_kd.py --eval --out runs/spectral                  # accuracy of a run's student
    python train_kd.py ... --dry-run                               # build everything, print it, train nothing

Defaults come from the recipe of the data set (RECIPES), from SETTINGS below and, for what belongs to an objective, from
losses.py; all have flags. The run's folder receives config.json, log.jsonl (a line an epoch), last.pt, best.pt,
epoch_NNNN.pt, student.safetensors, student_ema.safetensors and curves.png.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                        # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

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
from losses import METHODS, Distiller
from models import (VARIANTS, HookedModel, build_model, check_pretrained_classes, choose_layers, load_student,
                    read_config, stages, start_from)

HERE = Path(__file__).resolve().parent

# What differs by data set. The learning rate belongs to the batch beside it and scales linearly with another one.
TOY = dict(student="deit_toy_patch8_32", teacher="cait_toy_patch8_32", teacher_weights=None, img_size=32, repeats=1,
           epochs=30, batch_size=64, lr=2e-3, warmup_epochs=2, ema_decay=0.99)
RECIPES = {
    "shapes": dict(TOY, teacher_weights="weights/cait_toy_shapes.safetensors"),
    "small": TOY,                                                       # any other images below 64 px
    # DD appendix C.3 and the released code: AdamW, 5e-4 x batch / 512, the DeiT augmentation without mixup and cutmix.
    "imagenet": dict(student="deit_tiny_patch16_224", teacher="cait_s24_224", teacher_weights=None, img_size=224,
                     repeats=3, epochs=300, batch_size=2048, lr=2e-3, warmup_epochs=5, ema_decay=0.99996),
}

# ----------------------------------------------------------------------------------------------------
# The loop. `run` is what `prepare` makes: settings, teacher, distiller (and its student), ddp, optimizer, ema, ...


def update(run, stream, step):
    """One optimizer step on the stream's next global batch -> names and means of the loss terms, on the device."""
    means, accum = 0, run.settings.accum
    for micro in range(accum):
        images, labels = next(stream)
        torch.manual_seed(data.seed_of(run.settings.seed, step, run.rank, micro))       # of drop-path and the like
        with torch.no_grad(), run.teacher_autocast():
            taught = run.teacher(images) if run.teacher else None
        last = micro == accum - 1
        with contextlib.nullcontext() if last or run.world == 1 else run.ddp.no_sync():
            with run.student_autocast():
                _, terms = run.ddp(images, labels, taught)              # the loop never asks which method runs
            (sum(terms.values()) / accum).backward()
        means += torch.stack([*terms.values()]).detach() / accum
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(run.student, step=step)
    return [*terms], means


def train(run, loaders, sizes, state):
    """Train to the last epoch from `state`, what last.pt held, or from the start -> log, the teacher's top-1."""
    settings, (train_loader, val_loader), (train_size, val_size) = run.settings, loaders, sizes
    steps = train_size // settings.batch_size                           # updates in an epoch
    scheduler, _ = create_scheduler_v2(run.optimizer, "cosine", num_epochs=settings.epochs, min_lr=settings.min_lr,
                                       warmup_lr=settings.warmup_lr, warmup_epochs=settings.warmup_epochs,
                                       step_on_epochs=False, updates_per_epoch=steps)
    step, log, names, rows = 0, [], [], None                            # rows: the loss terms of the epoch's updates
    if state:
        run.optimizer.load_state_dict(state["optimizer"])
        run.ema.module.load_state_dict(state["ema"])
        step, log, names, rows = state["step"], state["log"], state["terms"], state["rows"].to(run.device)
    run.stop = Stop(run.world)
    if steps < 5 and run.rank == 0:
        warn(f"an epoch has only {steps} updates: lower --batch-size")
    if run.teacher:
        (taught, top5, _), = evaluate(run, [run.teacher], val_loader, val_size, run.teacher_autocast, step)
        if run.rank == 0:
            print(f"teacher {settings.teacher}: top-1 {taught:.2f} %, top-5 {top5:.2f} %", flush=True)
            warn_of_teacher(settings, taught, chance=100 / run.classes)

    for epoch in range(len(log), settings.epochs):
        start = looked = step - epoch * steps                           # = steps if only its evaluation is missing
        began = time.time()
        batches = data.training_batches(train_size, settings.batch_size, seed=settings.seed, epoch=epoch, start=start,
                                        repeats=settings.repeats, accum=settings.accum, rank=run.rank, world=run.world)
        stream = train_loader.load(batches, epoch)
        run.distiller.train()
        for i in tqdm(range(start, steps), desc=f"epoch {epoch + 1}", leave=False, disable=run.rank > 0 or None):
            scheduler.step_update(step)
            names, means = update(run, stream, step)
            rows = torch.zeros(steps, len(names), device=run.device) if rows is None else rows
            rows[i] = means
            step += 1
            stopped = run.stop.asked()
            if stopped or i + 1 - looked == 50 or i + 1 == steps:       # the only moment that waits for the device
                check_finite(rows[looked:i + 1], names, step - (i + 1 - looked), run.world)
                looked = i + 1
            if stopped and looked < steps:
                save(run, step, log, names, rows)
                leave(run, stopped, step)

        seconds, means = time.time() - began, rows.mean(0).tolist()
        save(run, step, log, names, rows)                               # a signal in the evaluation loses nothing
        (top1, top5, _), (ema_top1, ema_top5, _) = evaluate(run, [run.student, run.ema.module], val_loader, val_size,
                                                            run.student_autocast, step)
        log.append({"epoch": epoch, "step": step, "lr": run.optimizer.param_groups[0]["lr"], "loss": sum(means),
                    "terms": dict(zip(names, means)), "top1": top1, "top5": top5, "ema_top1": ema_top1,
                    "ema_top5": ema_top5, "images_per_s": (steps - start) * settings.batch_size / seconds,
                    "seconds": time.time() - began})
        if run.rank == 0:
            report(log, settings.epochs)
            write_epoch(run, log)
        save(run, step, log, names, rows)
    return log, taught if run.teacher else None


@torch.no_grad()
@torch.compiler.set_stance("force_eager")                               # its batches and mode would compile anew
def evaluate(run, models, loader, size, autocast, step=0):
    """[(top-1 %, top-5 %, cross-entropy)] of each model: one pass over all processes, each of `size` images once."""
    exact = torch.float32 if run.device.type == "mps" else torch.float64
    sums = torch.zeros(len(models), 3, dtype=exact, device=run.device)
    rounds = len(data.evaluation_batches(size, loader.evaluates, world=run.world))      # the first process has the most
    stream = loader.load(data.evaluation_batches(size, loader.evaluates, rank=run.rank, world=run.world))
    for model in models:
        model.eval()
    for _ in range(rounds):
        if run.stop and (stopped := run.stop.asked()):
            leave(run, stopped, step)
        for images, labels in itertools.islice(stream, 1):
            for model, row in zip(models, sums):
                with autocast():
                    logits, _ = model(images)
                found = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                loss = F.cross_entropy(logits.float(), labels, reduction="sum")
                row += torch.stack([found[:, 0].sum(), found.sum(), loss])
    if run.world > 1:
        dist.all_reduce(sums)
    return [(100 * top1 / size, 100 * top5 / size, loss / size) for top1, top5, loss in sums.tolist()]


class Stop:
    """Remembers SIGTERM and Ctrl-C, and lets all processes agree on the moment to stop."""

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


def leave(run, number, step):
    """End all processes after a signal; what the run needs to go on has been saved."""
    if run.rank == 0:
        print(f"stopped by {signal.Signals(number).name} after step {step}: go on with --resume --out "
              f"{run.settings.out}", flush=True)
    sys.exit(128 + number)


def check_finite(rows, names, since, world):
    """Average the loss terms of the last updates over all processes, in place; stop all of them at NaN or infinity."""
    if world > 1:
        dist.all_reduce(rows)
        rows /= world
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        number, term = bad[0].tolist()
        fail(f"loss term {names[term]!r} is {rows[number, term].item()} at step {since + number}; the checkpoint of "
             f"the last epoch is unharmed; try a lower --lr, a lower --beta or --amp off", status=1)


# ----------------------------------------------------------------------------------------------------
# Building


def build(settings, classes):
    """Settings -> HookedModel teacher (or None), Distiller, mean and std that its images are normalised with."""
    kind = METHODS[settings.method]
    options = {name: getattr(settings, name) for name in kind.options()}
    common = dict(num_classes=classes, img_size=settings.img_size)
    teacher = build_teacher(settings, classes) if kind.needs_teacher or settings.variant != "plain" else None
    width = teacher and teacher.feature_info[stages(teacher)[-1]]["num_chs"]
    student = build_model(settings.student, **common, variant=settings.variant, teacher_width=width,
                          **settings.student_kwargs or {})
    resumed = settings.resume and (Path(settings.out) / "last.pt").exists()
    if settings.student_weights and not (settings.dry_run or settings.bench or resumed):
        said = start_from(student, settings.student, settings.student_weights, settings.img_size, settings.variant)
        if int(os.environ.get("RANK", 0)) == 0:
            print(said, flush=True)

    layers_s, layers_t = pair_layers(settings, student, teacher) if options.get("beta") else ([], [])
    statistics = resolve_data_config(pretrained_cfg=student.pretrained_cfg)
    statistics = dict(mean=statistics["mean"], std=statistics["std"])   # images arrive as the student wants them
    hooked_s, hooked_t = HookedModel(student, layers_s), None
    if kind.needs_teacher:
        hooked_t = HookedModel(teacher, layers_t, **statistics).eval().requires_grad_(False)
        options["channels"] = [(student.feature_info[s]["num_chs"], teacher.feature_info[t]["num_chs"])
                               for s, t in zip(layers_s, layers_t)]
    return hooked_t, Distiller(hooked_s, kind(**options)), statistics


def build_teacher(settings, classes):
    """The teacher with the weights of a file, of a run, of timm, or none where only its shape matters."""
    source, random_head = settings.teacher_weights, settings.teacher_head == "random"
    embedded = source == RECIPES["shapes"]["teacher_weights"]
    needed = METHODS[settings.method].needs_teacher and source != "random"
    blank = not needed or not embedded and bool(settings.dry_run or settings.bench)
    if source and Path(source).is_dir():
        return load_student(source, trained=not blank)
    if not source and METHODS[settings.method].needs_teacher:
        check_pretrained_classes(settings.teacher, classes, random_head)
    weights = HERE / source if embedded else source                     # the embedded one from any working folder
    return build_model(settings.teacher, num_classes=classes, img_size=settings.img_size, random_head=random_head,
                       pretrained=not blank and not source, weights=None if blank else weights,
                       **settings.teacher_kwargs or {})


def pair_layers(settings, student, teacher):
    """The layers to align, student's and teacher's, as timm's feature_info counts them (from 0)."""
    layers_s, layers_t = settings.student_layers, settings.teacher_layers
    if layers_s is None:
        kind = METHODS[settings.method]
        first = kind.first if settings.first is None else settings.first
        last = kind.last if settings.last is None else settings.last
        layers_s, layers_t = ([layers[i] for i in choose_layers(first, last, len(layers))]
                              for layers in map(stages, (student, teacher)))
    for layers in (layers_s, layers_t):
        if layers != sorted(set(layers)):
            raise ValueError(f"layers {layers} must ascend without repeats: they are paired in order")
    if len(layers_s) != len(layers_t) or not layers_s:
        raise ValueError(f"student layers {layers_s} and teacher layers {layers_t} cannot be paired: give as many of "
                         f"each, and at least one (or --beta 0)")
    return layers_s, layers_t


def prepare(settings, teacher, distiller, classes=0, rank=0, world=1):
    """All that an update needs, under the names that the loop uses."""
    student, device = distiller.student, next(distiller.parameters()).device
    teacher_autocast, student_autocast = (
        partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.amp in (who, "both"))
        for who in ("teacher", "student"))
    fused = device.type in ("cpu", "cuda")
    optimizer = create_optimizer_v2(distiller, "adamw", lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
    ema = ModelEmaV3(student, decay=settings.ema_decay, use_warmup=True)       # else the start weighs for long
    for model in filter(None, (teacher, student) if settings.compile else ()):
        model.compile(fullgraph=True, dynamic=False)                    # in place, after the EMA's copy
    ddp = DistributedDataParallel(distiller, gradient_as_bucket_view=True) if world > 1 else distiller
    return SimpleNamespace(settings=settings, teacher=teacher, distiller=distiller, student=student, ddp=ddp, ema=ema,
                           optimizer=optimizer, teacher_autocast=teacher_autocast, student_autocast=student_autocast,
                           device=device, classes=classes, rank=rank, world=world, stop=None)


@torch.no_grad()
def describe(settings, teacher, distiller, train, val, classes):
    """What --dry-run prints and config.json keeps. One forward pass of zeros finds grids that do not fit."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    images, labels = torch.zeros(2, 3, settings.img_size, settings.img_size), torch.zeros(2, dtype=torch.long)
    taught = teacher(images) if teacher else (None, ())
    logits, maps = distiller.eval().student(images)
    distiller.method(labels, logits, maps, *taught)
    return {
        "settings": {key: value for key, value in vars(settings).items() if key not in ACTIONS},
        "parameters": {"student": count(distiller.student), "method": count(distiller.method),
                       "teacher": count(teacher) if teacher else 0},
        "layers": {"student": distiller.student.layers, "teacher": teacher.layers if teacher else []},
        "maps": {"student": [list(A.shape[1:]) for A in maps], "teacher": [list(A.shape[1:]) for A in taught[1]]},
        "images": count_images(train, val, classes),
        "class_names": data.class_names(val),
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
            f"layers {layers['student']}, teacher layers {layers['teacher']}, {description['images']}, batches of "
            f"{settings['batch_size']}, learning rate {settings['lr']:.3g}, folder {settings['out']}")


def _git_commit():
    with contextlib.suppress(OSError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip() or None


# ----------------------------------------------------------------------------------------------------
# Files


def write(path, save):
    """Write beside and rename: a crash or a full disk leaves the former file whole. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                            # torch.save has the latter for a full disk
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({' '.join(str(error).split())[:120]}); what stood there before is "
                      f"unharmed: make room, then --resume") from error


def write_text(path, text):
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def save(run, step, log, names, rows):
    """last.pt, by the first process. What it does not hold is made again from the settings."""
    if run.rank == 0:
        state = {"distiller": run.distiller.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "ema": run.ema.module.state_dict(), "step": step, "log": log, "terms": names, "rows": rows}
        write(Path(run.settings.out) / "last.pt", partial(torch.save, state))


def load_state(path, distiller):
    """Read last.pt, load the distiller from it, and return the rest for `train`; None if there is no last.pt yet."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        distiller.load_state_dict(state["distiller"])
        return {key: state[key] for key in ("optimizer", "ema", "step", "log", "rows")} | {"terms": state.get("terms")}
    except Exception as error:                                          # cut short, foreign, or a pickle with code
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"cannot resume from {path}, which is damaged or not a checkpoint of this run ({reason}): "
                         f"restore it, or start again with --overwrite") from error


def write_epoch(run, log):
    """log.jsonl, best.pt if the epoch beats all former ones, epoch_NNNN.pt every `snapshot_every` epochs."""
    out, (*former, last) = Path(run.settings.out), log
    weights = {"model": run.student.model.state_dict(), "epoch": last["epoch"], "top1": last["top1"]}
    if last["top1"] > max((line["top1"] for line in former), default=-1):
        write(out / "best.pt", partial(torch.save, weights))
    if len(log) % run.settings.snapshot_every == 0:
        write(out / f"epoch_{len(log):04d}.pt", partial(torch.save, weights))
    write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))


def report(log, epochs):
    """One line an epoch, with the time that the rest will take."""
    record = log[-1]
    left = np.mean([line["seconds"] for line in log[-5:]]) * (epochs - len(log)) / 60
    terms = " + ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
    print(f"epoch {len(log):3d}/{epochs}  loss {record['loss']:.4f} = {terms}  top-1 {record['top1']:.2f} %  EMA "
          f"{record['ema_top1']:.2f} %  {record['images_per_s']:.0f} images/s  {left:.1f} min left", flush=True)


def finish(run, log, taught):
    """What a run leaves at its end: the student as timm loads it, the curves."""
    out = Path(run.settings.out)
    for name, student in (("student", run.student), ("student_ema", run.ema.module)):
        weights = {key: value.contiguous() for key, value in student.model.state_dict().items()}
        write(out / f"{name}.safetensors", lambda path: path.write_bytes(safetensors.torch.save(weights)))
    write(out / "curves.png", partial(draw_curves, log))
    print(f"done: {out}: top-1 {log[-1]['top1']:.2f} %, EMA {log[-1]['ema_top1']:.2f} %", flush=True)
    if run.teacher and taught < log[-1]["top1"] and run.settings.teacher_weights != "random":
        warn(f"the student ends above its teacher ({taught:.2f} %), which had little to tell: train a better one")


def draw_curves(log, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator
    epochs = [record["epoch"] + 1 for record in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for term, style in zip(log[0]["terms"], itertools.cycle(("-", "--", ":", "-."))):
        left.plot(epochs, [record["terms"][term] for record in log], style, label=term)
    right.plot(epochs, [record["top1"] for record in log], "-", label="student")
    right.plot(epochs, [record["ema_top1"] for record in log], "--", label="its EMA")
    left.set(ylabel="weighted loss term", yscale="log")
    right.set(ylabel="validation top-1 (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------
# The bench


def bench(run, loaders, sizes, classes):
    """Median ms of an update and its parts on images in memory, then of what it waits for the real loader.

    The floor is what no KD training can do without: the teacher's forward, the student's forward and backward pass,
    one optimizer step.
    """
    settings, device, accum = run.settings, run.device, run.settings.accum
    size = settings.batch_size // run.world // accum
    images = torch.randn(size, 3, settings.img_size, settings.img_size, device=device)
    labels = torch.randint(classes, (size,), device=device)
    memory = itertools.repeat((images, labels))

    @torch.no_grad()
    def teach():
        with run.teacher_autocast():
            return run.teacher(images) if run.teacher else ()

    def study():
        with run.student_autocast():
            logits, maps = run.student(images)
        F.cross_entropy(logits, labels).backward()
        return logits, maps

    taught, (logits, maps) = teach(), study()
    logits, maps = logits.detach().requires_grad_(), [A.detach().requires_grad_() for A in maps]

    def compare():
        with run.student_autocast():
            terms = run.distiller.method(labels, logits, maps, *taught)
        sum(terms.values()).backward()

    def floor():
        for _ in range(accum):
            teach()
            study()
        run.optimizer.step()
        run.optimizer.zero_grad()

    def timed(work, times=1):
        began = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    parts = {"step": (lambda: update(run, memory, 0), 1), "floor": (floor, 1), "teacher": (teach, accum),
             "student": (study, accum), "losses": (compare, accum)}
    times = [{part: timed(*work) for part, work in parts.items()}       # in turn: a drift of the machine meets all
             for _ in range(settings.bench + 1)][1:]                    # the first warms up
    ms = {part: float(np.median([time[part] for time in times])) for part in parts}
    keys = data.training_batches(sizes[0], settings.batch_size, seed=0, epoch=0, repeats=settings.repeats, accum=accum,
                                 rank=run.rank, world=run.world)
    real = itertools.chain.from_iterable(loaders[0].load(keys, epoch) for epoch in itertools.count())
    waits, updates = [], []
    for _ in range(settings.bench + 1):
        fetched = []
        waits.append(timed(lambda: fetched.append(next(real)), accum))
        updates.append(timed(lambda: update(run, iter(fetched), 0)))
    ms["loader"] = float(np.mean(waits[1:]))                            # the first starts the workers
    decode = None                                                       # images/s that one core decodes and augments
    if isinstance(loaders[0], data.StreamLoader):
        images = [(0, 0, *key) for key in np.concatenate(keys)[:64].tolist()]
        decode = 1000 * len(images) / timed(lambda: [loaders[0].pool.loader.dataset[key] for key in images])
    if run.rank == 0:
        report_bench(run, ms, ms["loader"] + np.mean(updates[1:]), sizes[0], decode)


def report_bench(run, ms, loop, train_size, decode):
    """Three lines for people, one of JSON for results/speed.jsonl. `loop`: ms of an update with the real loader;
    `decode`: images/s of the loader on one core, or None where the images are in memory."""
    settings, in_memory = run.settings, 1000 * run.settings.batch_size / ms["step"]
    hours = loop / 3.6e6 * (train_size // settings.batch_size) * settings.epochs
    result = {"command": " ".join(sys.argv), "ms": {part: round(value, 2) for part, value in ms.items()},
              "step_to_floor": round(ms["step"] / ms["floor"], 3), "images_per_s_in_memory": round(in_memory, 1),
              "images_per_s": round(1000 * settings.batch_size / loop, 1), "peak_memory_gb": peak_memory(run.device),
              "training_hours": round(hours, 5), "loader_images_per_s_a_core": decode and round(decode, 1),
              "cores_for_the_step": decode and round(in_memory / decode, 2),
              **{key: getattr(settings, key) for key in ("bench", "batch_size", "img_size", "amp", "compile")},
              "processes": run.world, "threads": torch.get_num_threads(), "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if run.device.type == "cuda" else cpu("model name")}
    print(", ".join(f"{part} {value:.1f} ms ({value / ms['step']:.1%})" for part, value in ms.items()))
    print(", ".join(f"{key} {result[key]}" for key in ("step_to_floor", "images_per_s", "loader_images_per_s_a_core",
                                                       "cores_for_the_step", "peak_memory_gb")))
    print(f"{settings.epochs} epochs of {train_size:,} images: {hours:.2f} hours here, without validation")
    print(json.dumps(result), flush=True)


def peak_memory(device):
    """GB: of the device if it keeps count, else of the process; None where neither is known (Windows)."""
    with contextlib.suppress(ImportError):
        if device.type == "cuda":
            return round(torch.cuda.max_memory_allocated() / 1e9, 2)
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


# ----------------------------------------------------------------------------------------------------
# Settings and flags: each in one row; those of the objectives are the constructors' arguments in losses.py


def number(kind, low, high):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


COUNT, LAYERS, NUMBER = number(int, 1, 10 ** 9), number(int, 0, 10 ** 4), number(int, 0, 2 ** 31)
SHARE, WEIGHT, POSITIVE = number(float, 0, 1), number(float, 0, 1e9), number(float, 1e-12, 1e9)
RECIPE = object()                                                       # the default: that of RECIPES


class KeyValues(ParseKwargs):
    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
        except ValueError:
            parser.error(f"{option_string} {' '.join(values)}: want KEY=VALUE")


class Setting(NamedTuple):
    name: str
    kind: object                # a type, choices, bool for a switch, KeyValues, or [type] for a list
    default: object
    help: str
    when: str = ""              # it has an effect: "with a teacher", "with features", "from 64 px", "with shapes"
    free: bool = False          # --resume may change it
    const: object = None        # the value of the bare flag


SETTINGS = {
    "what is distilled into what": [
        Setting("method", METHODS, "spectral", "objective"),
        Setting("student", str, RECIPE, "timm model"),
        Setting("student_weights", str, None, "what it starts from: pretrained (timm's), a file, or a run's folder"),
        Setting("variant", VARIANTS, None, "of the student (default: the method's own)"),
        Setting("student_kwargs", KeyValues, None, "for timm: embed_dim=219 num_heads=3 is EM's UniformWide control"),
        Setting("teacher", str, RECIPE, "timm model", "with a teacher or its width"),
        Setting("teacher_kwargs", KeyValues, None, "for timm", "with a teacher or its width"),
        Setting("teacher_weights", str, RECIPE, "a file (.safetensors, .pt, .pth), a run's folder (which names the "
                "teacher) or random; else timm's pretrained", "with a teacher"),
        Setting("teacher_head", ("pretrained", "random"), "pretrained",
                "random: a teacher without a classifier for this data (DD Table 2)", "with a teacher"),
        Setting("first", LAYERS, None, "align the first X layers (default: the method's own)", "with features"),
        Setting("last", LAYERS, None, "align the last Y; if only one of both is given the other is 0", "with features"),
        Setting("student_layers", [int], None, "explicit, ascending, timm's indices from 0", "with features"),
        Setting("teacher_layers", [int], None, "as many of the teacher's", "with features")],
    "data": [
        Setting("data", str, "shapes", "shapes, a folder with train/ and val/, torch/NAME, hfds/NAME", free=True),
        Setting("data_root", str, "data", "where torch/ and hfds/ sets are kept", free=True),
        Setting("train_size", COUNT, 4000, "training images to draw", "with shapes"),
        Setting("label_noise", SHARE, 0.2, "share of the training labels that are drawn at random", "with shapes"),
        Setting("img_size", COUNT, RECIPE, "px; else the student's own"),
        Setting("repeats", COUNT, RECIPE, "repeated augmentation: times each image comes in its batch"),
        Setting("auto_augment", str, "rand-m9-mstd0.5-inc1", "timm's RandAugment, or none", "from 64 px"),
        Setting("color_jitter", WEIGHT, 0.4, "strength", "from 64 px"),
        Setting("random_erasing", SHARE, 0.25, "probability", "from 64 px"),
        Setting("crop_pct", number(float, 0.01, 1), 0.875, "evaluation crop", "from 64 px"),
        Setting("skip_bad_images", bool, False, "let the next image stand in for one that cannot be read"),
        Setting("workers", NUMBER, None, "data processes of each process (default: the cores that the node has for it)",
                "from 64 px", free=True)],
    "training": [
        Setting("epochs", COUNT, RECIPE, "whole", free=True),
        Setting("batch_size", COUNT, RECIPE, "global; the default shrinks for 20 updates an epoch of a small set"),
        Setting("accum", COUNT, 1, "gradient accumulation steps"),
        Setting("lr", POSITIVE, RECIPE, "peak; the default scales linearly with the batch; from --student-weights it "
                "is 1e-4 at a batch of 64 and scales with its square root"),
        Setting("min_lr", WEIGHT, 1e-5, "at the end of the cosine"),
        Setting("warmup_lr", WEIGHT, 1e-6, "at the start"),
        Setting("warmup_epochs", WEIGHT, RECIPE, "of linear warm-up"),
        Setting("weight_decay", WEIGHT, 0.05, "AdamW's"),
        Setting("ema_decay", SHARE, RECIPE, "of the averaged student that is evaluated beside the student"),
        Setting("seed", NUMBER, 0, "of all that is drawn")],
    "the run": [
        Setting("out", str, None, "folder (default: runs/METHOD)", free=True),
        Setting("resume", bool, False, "go on with the run in --out, with its settings"),
        Setting("overwrite", bool, False, "replace the run in --out"),
        Setting("snapshot_every", COUNT, None, "epochs between epoch_NNNN.pt (default: a tenth)", free=True),
        Setting("device", ("cpu", "cuda", "mps"), None, "default: cuda, else mps (Apple), else cpu", free=True),
        Setting("amp", ("off", "teacher", "student", "both"), None, "bfloat16 in one or both (default: both from 64 px "
                "where the GPU or CPU computes in it; else off)", free=True, const="both"),
        Setting("compile", bool, False, "torch.compile student and teacher, a graph each", free=True),
        Setting("dry_run", bool, False, "build everything with random weights, print it, end"),
        Setting("eval", bool, False, "accuracy of the run in --out, or of --student with --student-weights, and end"),
        Setting("bench", COUNT, None, "time N updates (10) with random weights and end", const=10)],
}
ROWS = {row.name: row for rows in SETTINGS.values() for row in rows}
LARGE = {name for name, row in ROWS.items() if row.when == "from 64 px"}
FREE = {name for name, row in ROWS.items() if row.free}
SWITCHES = {name for name, row in ROWS.items() if row.kind is bool}
ACTIONS = {"resume", "overwrite", "dry_run", "eval", "bench"}                   # of this call, not of the run


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def fail(message, status=2):
    """End the program as every bad input does: one line on stderr, once for all processes, and exit status 2."""
    if int(os.environ.get("RANK", 0)) > 0:                              # all see the same mistake: let the first
        time.sleep(10)                                                  # speak, whose end makes torchrun stop all
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def warn(message):
    print(f"warning: {message}", flush=True)                            # stderr is for what ends a run


def parse_args(argv=None):
    """-> Namespace with None, or False for a switch, for every flag that is not given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for title, rows in SETTINGS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            group.add_argument(f"--{row.name.replace('_', '-')}", **as_argument(row))
    group = parser.add_argument_group("objective (DD Eq. 10, 11, 14)")
    for name in sorted({name for kind in METHODS.values() for name in kind.options()}):
        takers = {method: kind.options()[name] for method, kind in METHODS.items() if name in kind.options()}
        default, text = next(iter(takers.values()))
        takes = argparse.BooleanOptionalAction if isinstance(default, bool) else None
        text += f" ({', '.join(f'{method} {default}' for method, (default, _) in takers.items())})"
        group.add_argument(f"--{name.replace('_', '-')}", help=text.replace("%", "%%"),
                           **dict(action=takes, default=None) if takes else dict(type=type(default), metavar="VALUE"))
    return parser.parse_args(argv)


def as_argument(row):
    """A row of the table -> the arguments of argparse's add_argument."""
    default = row.default
    if default is RECIPE:
        values = [recipe[row.name] for recipe in RECIPES.values() if recipe[row.name] is not None]
        default = f"by recipe: {', '.join(map(str, dict.fromkeys(values)))}"
    notes = [] if default is None or default is False else [f"default: {default}"]
    notes += [row.when] if row.when else []
    notes += ["free to change with --resume"] if row.free else []
    text = dict(help=(row.help + (f" [{'; '.join(notes)}]" if notes else "")).replace("%", "%%"))
    if row.kind is bool:
        return dict(text, action="store_true")
    if row.kind is KeyValues:
        return dict(text, nargs="+", action=KeyValues, metavar="KEY=VALUE")
    if isinstance(row.kind, list):
        return dict(text, nargs="+", type=row.kind[0], metavar="L")
    takes = dict(type=row.kind, metavar=row.kind.__name__.upper()) if callable(row.kind) else dict(choices=row.kind)
    return dict(text, **takes, **dict(nargs="?", const=row.const) if row.const else {})


def resolve(args):
    """Command line -> settings: the flags given, over a resumed run's settings, the recipe and the table's defaults.

    Also opens the data: returns settings (a Namespace) and (train, val, number of classes). Raises ValueError for
    flags that contradict each other or the run to resume, or that would have no effect.
    """
    given = {key: value for key, value in vars(args).items() if value is not None and (value or key not in SWITCHES)}
    of_run = args.resume or args.eval and "student" not in given
    former = from_first(partial(read_run, given)) if of_run else None
    saved = former["settings"] if former else {}
    fixed = {name: None if row.default is RECIPE else row.default for name, row in ROWS.items()}
    asked = {**fixed, **saved, **given}
    taught = teacher_run(asked, given)
    asked.update({key: value for key, value in taught.items() if asked[key] is None})
    train, val, classes = open_data(asked)
    native = timm.get_pretrained_cfg(asked["student"]).input_size[-1] if timm.is_model(asked["student"] or "") else None
    if asked["data"] == "shapes":
        recipe = "shapes"
    else:                                                               # by size: asked for, the student's, the images'
        size = asked["img_size"] or native or data.first_size(train, asked["skip_bad_images"])
        recipe = "small" if size < 64 else "imagenet"
    defaults = {**fixed, **RECIPES[recipe], "img_size": native or RECIPES[recipe]["img_size"], **taught}
    settings = argparse.Namespace(**{**defaults, **saved, **given, "recipe": recipe})
    chosen = {**saved, **given}
    if "batch_size" not in chosen:
        settings.batch_size = fitting_batch(len(train), settings)
    if "lr" not in chosen:
        settings.lr = (1e-4 * (settings.batch_size / 64) ** 0.5 if settings.student_weights else
                       defaults["lr"] * settings.batch_size / defaults["batch_size"])
    if "warmup_epochs" not in chosen and settings.warmup_epochs >= settings.epochs:
        settings.warmup_epochs *= settings.epochs / defaults["epochs"]
    if ("first" in given or "last" in given) and not saved:
        settings.first, settings.last = given.get("first", 0), given.get("last", 0)
    settings.out = settings.out or f"runs/{settings.method}"
    settings.variant = settings.variant or METHODS[settings.method].variant
    settings.snapshot_every = settings.snapshot_every or max(1, settings.epochs // 10)
    if settings.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        settings.workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    from_first(partial(check, settings, given, saved))
    if args.resume and former["images"] != count_images(train, val, classes):
        raise ValueError(f"{settings.data} is not the data of the run in {settings.out}: it has "
                         f"{count_images(train, val, classes)}, the run had {former['images']}")
    if taught:
        teacher, names = read_config(settings.teacher_weights), data.class_names(val)
        if teacher["images"]["classes"] != classes or (teacher.get("class_names") or names) != names:
            raise ValueError(f"the teacher in {settings.teacher_weights} knows {teacher['images']['classes']} classes "
                             f"and {settings.data} has {classes}, or others: train one on this data")
    return with_options(settings), (train, val, classes)


def teacher_run(asked, given):
    """If the teacher's weights are a run's folder: what its config.json says of the teacher, else nothing."""
    folder = asked["teacher_weights"]
    if not folder or not Path(folder).is_dir():
        return {}
    student = read_config(folder)["settings"]
    if given.get("teacher", student["student"]) != student["student"]:
        raise ValueError(f"{folder} holds {student['student']}, not {given['teacher']}: leave --teacher out")
    return {"teacher": student["student"], "teacher_kwargs": student["student_kwargs"], "img_size": student["img_size"]}


def fitting_batch(train_size, settings):
    """The recipe's batch, or for a small set the largest power of 2 that leaves 20 updates an epoch."""
    unit = int(os.environ.get("WORLD_SIZE", 1)) * settings.accum
    fit = 2 ** max(0, (train_size // 20).bit_length() - 1)
    return settings.batch_size if settings.batch_size <= fit else max(unit, fit // unit * unit)


def count_images(train, val, classes):
    return {"train": len(train), "val": len(val), "classes": classes}


def open_data(asked):
    """data.open_data, whose downloads the first process of each node does while the others wait."""
    look = partial(data.open_data, *(asked[key] for key in ("data", "data_root", "train_size", "label_noise", "eval")))
    if not (dist.is_initialized() and asked["data"].startswith(("torch/", "hfds/"))):
        return look()
    opened, mistakes = None, [None] * dist.get_world_size()
    try:
        opened = look() if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None
        dist.all_gather_object(mistakes, None)
    except ValueError as error:
        dist.all_gather_object(mistakes, str(error))
    if any(mistakes):
        raise ValueError(next(filter(None, mistakes)))
    return opened or look()


def from_first(look):
    """What look() returns or raises in the first process, for all: other nodes need not see the run's folder."""
    answer = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = [look()]
        except (ValueError, OSError) as error:
            answer = [ValueError(str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    return answer[0]


def with_options(settings):
    """Give the method's own settings that are missing: the recipe's default if it has one, else the constructor's."""
    for name, (default, _) in METHODS[settings.method].options().items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, RECIPES[settings.recipe].get(name, default))
    return settings


def check(settings, given, saved):
    """Raise ValueError for flags that contradict each other or the saved run, or that would have no effect."""
    method = METHODS[settings.method]
    effective = {"": True, "with a teacher": method.needs_teacher, "with features": "beta" in method.options(),
                 "with a teacher or its width": method.needs_teacher or settings.variant != "plain",
                 "from 64 px": settings.img_size >= 64, "with shapes": settings.data == "shapes"}
    idle = {name for name in given if not (effective[ROWS[name].when] if name in ROWS else name in method.options())}
    if idle:
        raise ValueError(f"{flags(idle)} would have no effect with --method {settings.method} --variant "
                         f"{settings.variant} on {settings.data} at {settings.img_size} px")
    if {"student_layers", "teacher_layers"} & {*given} and (
            {"first", "last"} & {*given} or None in (settings.student_layers, settings.teacher_layers)):
        raise ValueError("give --student-layers and --teacher-layers together, and without --first and --last")
    if "warmup_epochs" in given and settings.warmup_epochs >= settings.epochs:
        raise ValueError(f"--warmup-epochs {settings.warmup_epochs} is not below --epochs {settings.epochs}: the "
                         f"learning rate would never be reached")
    if settings.resume and settings.overwrite:
        raise ValueError("--resume goes on with the run in --out and --overwrite replaces it: give one of them")
    changed = {name for name in {*saved} & {*given} if saved[name] != given[name] and name not in FREE}
    if changed:
        differences = (f"{flags([name])} {saved[name]}, not {given[name]}" for name in sorted(changed))
        raise ValueError(f"the run in {settings.out} was made with {', '.join(differences)}: leave these as they were "
                         f"or choose another --out")
    if settings.eval:
        useful = {"eval", "out", "data", "data_root", "student", "student_weights", "student_kwargs", "img_size",
                  "crop_pct", "skip_bad_images", "workers", "device", "amp"}
        if {*given} - useful:
            raise ValueError(f"{flags({*given} - useful)} would have no effect with --eval")
        if "student" in given and not settings.student_weights:
            raise ValueError("--eval --student wants --student-weights: pretrained, a file, or a run's folder")
    writes = not (settings.dry_run or settings.bench or settings.eval)
    if writes and (Path(settings.out) / "config.json").exists() and not (settings.resume or settings.overwrite):
        raise ValueError(f"{settings.out} holds a run: go on with --resume, replace it with --overwrite, or choose "
                         f"another --out")


def flags(names):
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def read_run(given):
    out = Path(given.get("out") or f"runs/{given.get('method', ROWS['method'].default)}")
    # Without a log the run ended before its first checkpoint, and goes on from the start.
    lost = "resume" in given and (out / "log.jsonl").exists() and not (out / "last.pt").exists()
    if not (out / "config.json").exists() or lost:
        raise ValueError(f"{out} holds no run to resume (config.json and last.pt): give its folder with --out")
    return read_config(out)


# ----------------------------------------------------------------------------------------------------
# The program


def main(argv=None):
    args = parse_args(argv)
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        device = choose_device(args.device, local)
        if "RANK" in os.environ and not dist.is_initialized():          # started by torchrun
            nccl = device.type == "cuda" and dist.is_nccl_available()   # Windows has none
            connect("cpu:gloo,cuda:nccl" if nccl else "gloo")
        settings, (train_set, val_set, classes) = resolve(args)
        settings.amp = settings.amp or default_amp(device, settings.img_size)
        if settings.amp != "off" and device.type == "mps":
            raise ValueError("--amp does not work on mps: leave it out")
        if settings.eval:
            show_accuracy(settings, args, val_set, classes, device, rank, world)
            return
        torch.manual_seed(settings.seed)
        teacher, distiller, statistics = build(settings, classes)
        check_batch(settings, len(train_set), world)
        description = describe(settings, teacher, distiller, train_set, val_set, classes)
        if rank == 0:
            print(json.dumps(description, indent=1) if settings.dry_run else summary(description), flush=True)
        if settings.dry_run:
            return
        last = Path(settings.out) / "last.pt"
        state = from_first(partial(load_state, last, distiller)) if settings.resume else None       # DDP shares weights
        if state and state["step"] > settings.epochs * (len(train_set) // settings.batch_size):
            raise ValueError(f"the run in {settings.out} is beyond --epochs {settings.epochs} already")
        pipeline = {key: getattr(settings, key) for key in LARGE if settings.img_size >= 64}
        sizes = len(train_set), len(val_set)
        loaders = data.build_loaders(train_set, val_set, img_size=settings.img_size, **statistics, **pipeline,
                                     device=device, seed=settings.seed, repeats=settings.repeats,
                                     skip_bad_images=settings.skip_bad_images)
        run = prepare(settings, teacher and teacher.to(device), distiller.to(device), classes, rank, world)
        if settings.bench:
            bench(run, loaders, sizes, classes)
            return
        from_first(partial(open_folder, settings, description))
    except (ValueError, OSError) as error:
        fail(error)
    try:
        log, taught = train(run, loaders, sizes, state)
        loaders = None      # ends the workers; the garbage collector would take 5 s for each
        if rank == 0:
            finish(run, log, taught)
    except data.BadImage as error:                                      # from a data worker with its traceback in front
        fail(str(error).splitlines()[-1].removeprefix("data.BadImage: "))
    except OSError as error:
        fail(error, status=1)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("shared memory", "Bus error", "No space left on device")):
            raise
        fail("the data workers ran out of shared memory (/dev/shm): start the container with --ipc=host or a larger "
             "--shm-size, or lower --batch-size or --workers (0 needs none)", status=1)


def show_accuracy(settings, args, val_set, classes, device, rank, world):
    """--eval: top-1, top-5 and loss of a run's student and its EMA, or of any timm model with weights."""
    if args.student:
        file = None if settings.student_weights == "pretrained" else settings.student_weights
        students = {args.student: build_model(args.student, num_classes=classes, img_size=args.img_size, weights=file,
                                              pretrained=not file, **settings.student_kwargs or {})}
        settings.crop_pct = args.crop_pct or timm.get_pretrained_cfg(args.student).crop_pct
    else:
        files = {"student": "student.safetensors", "its EMA": "student_ema.safetensors"}
        students = {name: load_student(settings.out, file) for name, file in files.items()
                    if name == "student" or (Path(settings.out) / file).exists()}
    some = next(iter(students.values()))
    if some.num_classes != classes:
        raise ValueError(f"the student knows {some.num_classes} classes and {settings.data} has {classes}")
    config = resolve_data_config(pretrained_cfg=some.pretrained_cfg)
    pipeline = {key: getattr(settings, key) for key in LARGE if settings.img_size >= 64}
    _, loader = data.build_loaders(val_set, val_set, img_size=settings.img_size, mean=config["mean"], std=config["std"],
                                   device=device, skip_bad_images=settings.skip_bad_images, **pipeline)
    run = SimpleNamespace(device=device, rank=rank, world=world, stop=None)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.amp in ("student", "both"))
    hooked = [HookedModel(student).to(device) for student in students.values()]
    for name, (top1, top5, loss) in zip(students, evaluate(run, hooked, loader, len(val_set), autocast)):
        if rank == 0:
            print(f"{name}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}, {len(val_set)} images", flush=True)


def warn_of_teacher(settings, top1, chance):
    meant = settings.teacher_head == "random" or settings.teacher_weights == "random"
    if top1 < chance + (100 - chance) / 10 and not meant:
        warn(f"the teacher's {top1:.2f} % is near chance ({chance:.2f} %): it has nothing to teach; train it longer, "
             f"from --student-weights pretrained, or choose another")


def connect(backend):
    """Join the processes that torchrun started."""
    try:
        dist.init_process_group(backend)
    except RuntimeError as error:
        raise ValueError(f"the processes cannot reach each other ({str(error)[:120]}): where host names resolve to the "
                         f"loopback address, set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the card that the "
                         f"nodes share") from error


def check_batch(settings, train_size, world):
    if train_size < settings.batch_size and not settings.dry_run:
        raise ValueError(f"{train_size} training images do not fill a batch of {settings.batch_size}: lower "
                         f"--batch-size")
    if settings.batch_size % (world * settings.accum):
        raise ValueError(f"a global batch of {settings.batch_size} does not divide by {world} processes x "
                         f"{settings.accum} accumulation steps: change --batch-size or --accum")


def open_folder(settings, description):
    """Make the run's folder, clear it of a run that --overwrite replaces, write config.json."""
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{out} is a file, not a folder: choose another --out") from None
    except OSError as error:
        raise ValueError(f"cannot make the folder {out} ({error}): choose another --out") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} is not writable: choose another --out")
    for old in [] if settings.resume else out.glob("*.*"):
        if old.suffix in (".pt", ".part", ".jsonl", ".safetensors", ".png"):
            old.unlink()
    if settings.resume:                                                 # the command that makes the run from nothing
        description = {**description, "command": read_config(out)["command"]}
    write_text(out / "config.json", json.dumps(description, indent=1))


def cpu(key):
    """A line of Linux's /proc/cpuinfo, or "" elsewhere."""
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").split(f"\n{key}")[1].split("\n")[0].strip("\t: ")
    return ""


def default_amp(device, img_size):
    """bfloat16 from 64 px where the device computes in it (T4 and V100 only emulate it); below it slows the student."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & {*cpu("flags").split()}
    return "both" if native and img_size >= 64 else "off"


def choose_device(asked, local):
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind = asked or ("cuda" if cuda else "mps" if mps and wanted == 1 else "cpu")
    there = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps), "cpu": wanted}[kind]
    if not there:
        raise ValueError(f"there is no {kind.upper()} device: leave --device out, or --device cpu")
    if wanted > there:
        raise ValueError(f"{wanted} processes want a {kind.upper()} device each and there are {there}: lower "
                         f"--nproc_per_node, or --device cpu")
    if kind == "cuda":
        torch.cuda.set_device(local)
    return torch.device(kind, local) if kind == "cuda" else torch.device(kind)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
