"""Where the time of a training goes, and how long it would take.

    python results/speed.py --method projector --updates 30 >> results/speed.jsonl
    python results/speed.py --students 5 >> results/speed.jsonl     # side by side on one teacher

Any flags of train_kd.py may stand beside. An update and its parts are timed on images in memory,
then with the real loader. The *floor* is what no KD training can do without: the teacher's forward
pass, the student's forward and backward pass, one optimizer step. All weights are random.
"""
import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_kd
from train_kd import WORLD


def time_parts(runs, classes, updates):
    """Median ms of an update of all runs, and of its parts, on images in memory."""
    run, *others = runs
    args, accum, device = run.args, run.args.accum, run.train_loader.device
    size = args.batch_size // WORLD // accum
    images = torch.randn(size, 3, args.img_size, args.img_size, device=device)
    labels = torch.randint(classes, (size,), device=device)
    in_memory = itertools.repeat((images, labels))

    @torch.no_grad()
    def teach():
        with run.autocast:
            return run.teacher(images) if run.teacher else None

    def study():
        with run.autocast:
            logits, _ = run.student(images)
        F.cross_entropy(logits, labels).backward()

    def update():
        train_kd.update(run, in_memory)

    taught = teach()

    def update_all():
        update()
        for other in others:
            for part in range(accum):
                train_kd.learn(other, part, images, labels, taught)

    def floor():
        for _ in range(accum):
            teach()
            study()
        run.optimizer.step()
        run.optimizer.zero_grad()

    parts = dict(step=update, floor=floor, teacher=teach, student=study, all=update_all)
    times = {part: [] for part in parts}
    for _ in range(updates + 1):  # in turn, so that a drift of the machine meets all of them
        for part, work in parts.items():
            times[part].append(milliseconds(work, device))
    medians = {part: float(np.median(each[1:])) for part, each in times.items()}  # the first warms up
    for part in ("teacher", "student"):
        medians[part] *= accum
    return medians


def time_loader(run, updates):
    """Mean ms that an update waits for the real loader, and mean ms of the update itself."""
    device = run.train_loader.device
    epochs = (train_kd.stream_of(run, epoch, start=0) for epoch in itertools.count())
    stream = itertools.chain.from_iterable(epochs)
    waits, steps = [], []
    for _ in range(updates + 1):
        began = time.perf_counter()
        fetched = [next(stream) for _ in range(run.args.accum)]
        waits.append(1000 * (time.perf_counter() - began))
        steps.append(milliseconds(lambda: train_kd.update(run, iter(fetched)), device))
    return float(np.mean(waits[1:])), float(np.mean(steps[1:]))  # the first starts the workers


def milliseconds(work, device):
    began = time.perf_counter()
    work()
    getattr(torch, device.type).synchronize()
    return 1000 * (time.perf_counter() - began)


def measure(argv):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--students", type=int, default=1)
    own, others = parser.parse_known_args(argv)
    # A dry run has random weights, and its folder need not be free.
    args, device, dataset, _ = train_kd.read_settings([*others, "--dry-run"])
    classes = len(dataset.classes)
    runs = []
    for _ in range(own.students):
        teacher, distiller = train_kd.build(args, classes)
        runs.append(train_kd.Run(args, device, dataset, teacher, distiller))
    run = runs[0]
    ms = time_parts(runs, classes, own.updates)
    ms["loader"], step = time_loader(run, own.updates)
    loop = ms["loader"] + step
    name = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    hours = loop / 3.6e6 * run.steps * args.epochs
    result = {
        "command": " ".join(["speed.py", *argv]),
        "ms": {part: round(value, 2) for part, value in ms.items()},
        "step_to_floor": round(ms["step"] / ms["floor"], 3),
        "per_student_to_alone": round(ms["all"] / own.students / ms["step"], 3),
        "images_per_s": round(1000 * args.batch_size / loop, 1),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,  # 0 without a GPU
        "training_hours": round(hours, 5),
        "batch_size": args.batch_size,
        "amp": args.amp,
        "processes": WORLD,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": name}
    train_kd.say(json.dumps(result))


if __name__ == "__main__":
    train_kd.main(program=measure)
    if dist.is_initialized():
        dist.destroy_process_group()
