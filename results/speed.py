"""Where the time of a training goes, and how long it would take.

    python results/speed.py --method projector --updates 30 >> results/speed.jsonl      # any flags of train_kd.py

Times an update and its parts on images in memory, then with the real loader. The *floor* is what no KD training can do
without: the teacher's forward, the student's forward and backward pass, one optimizer step.
"""
import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import models
import train_kd
from train_kd import RANK, WORLD


def time_parts(run, classes, updates):
    """Median ms of an update and its parts on images in memory."""
    args, accum = run.args, run.args.accum
    size = args.batch_size // WORLD // accum
    images = torch.randn(size, 3, args.img_size, args.img_size, device=run.device)
    labels = torch.randint(classes, (size,), device=run.device)
    in_memory = itertools.repeat((images, labels))

    @torch.no_grad()
    def teach():
        with run.autocast("teacher"):
            return run.teacher(images) if run.teacher else ()

    def study():
        with run.autocast("student"):
            logits, maps = run.student(images)
        F.cross_entropy(logits, labels).backward()
        return logits, maps

    taught, (logits, maps) = teach(), study()
    logits, maps = logits.detach().requires_grad_(), [A.detach().requires_grad_() for A in maps]

    def compare():
        with run.autocast("student"):
            terms = run.distiller.method(labels, logits, maps, *taught)
        sum(terms.values()).backward()

    def floor():
        for _ in range(accum):
            teach()
            study()
        run.optimizer.step()
        run.optimizer.zero_grad()

    parts = {"step": (lambda: train_kd.update(run, in_memory), 1), "floor": (floor, 1), "teacher": (teach, accum),
             "student": (study, accum), "losses": (compare, accum)}
    rounds = [{part: timed(run.device, *work) for part, work in parts.items()}  # in turn: a drift meets all of them
              for _ in range(updates + 1)][1:]  # the first warms up
    return {part: float(np.median([each[part] for each in rounds])) for part in parts}


def time_loader(run, updates):
    """Mean ms that an update waits for the real loader, and mean ms of the update itself."""
    args, loader = run.args, run.train_loader
    keys = data.training_batches(loader.size, args.batch_size, seed=0, epoch=0, repeats=args.repeats, accum=args.accum,
                                 rank=RANK, world=WORLD)
    stream = itertools.chain.from_iterable(loader.load(keys, epoch) for epoch in itertools.count())
    waits, steps = [], []
    for _ in range(updates + 1):
        fetched = []
        waits.append(timed(run.device, lambda: fetched.append(next(stream)), args.accum))
        steps.append(timed(run.device, lambda: train_kd.update(run, iter(fetched))))
    return np.mean(waits[1:]), np.mean(steps[1:])  # the first starts the workers


def timed(device, work, times=1):
    began = time.perf_counter()
    for _ in range(times):
        work()
    getattr(torch, device.type).synchronize()
    return 1000 * (time.perf_counter() - began)


def peak_memory(device):
    """GB: of the device if it keeps count, else of the process; None where neither is known (Windows)."""
    with contextlib.suppress(ImportError):
        if device.type == "cuda":
            return round(torch.cuda.max_memory_allocated() / 1e9, 2)
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def main(argv=None):
    parser = train_kd.make_parser()
    parser.add_argument("--updates", type=int, default=10, help="to time")
    typed = vars(parser.parse_args(argv))
    try:
        device = models.choose_device(typed.get("device"))
        args, dataset, _ = train_kd.resolve({**typed, "overwrite": True}, device)
        args.dry_run = True  # random weights
        teacher, distiller, statistics = train_kd.build(args, dataset.classes)
        loaders = train_kd.make_loaders(args, dataset, statistics, device)
        run = train_kd.Run(args, device, teacher and teacher.to(device), distiller.to(device), loaders)
        ms = time_parts(run, dataset.classes, args.updates)
        ms["loader"], step = time_loader(run, args.updates)
    except (ValueError, OSError) as error:
        train_kd.fail(error)
    loop, in_memory = ms["loader"] + step, 1000 * args.batch_size / ms["step"]
    hours = loop / 3.6e6 * run.steps * args.epochs
    result = {"command": " ".join(sys.argv), "ms": {part: round(value, 2) for part, value in ms.items()},
              "step_to_floor": round(ms["step"] / ms["floor"], 3), "images_per_s_in_memory": round(in_memory, 1),
              "images_per_s": round(1000 * args.batch_size / loop, 1), "peak_memory_gb": peak_memory(device),
              "training_hours": round(hours, 5), "spincount": os.environ["GOMP_SPINCOUNT"],
              **{key: getattr(args, key) for key in ("updates", "batch_size", "img_size", "amp", "compile")},
              "processes": WORLD, "threads": torch.get_num_threads(), "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if device.type == "cuda" else models.cpu_info("model name")}
    if RANK == 0:
        shares = ", ".join(f"{part} {value:.1f} ms ({value / ms['step']:.1%})" for part, value in ms.items())
        print(f"{shares}; step / floor {result['step_to_floor']}; all epochs: {hours:.2f} hours here", file=sys.stderr)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
