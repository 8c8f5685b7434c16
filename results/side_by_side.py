"""Train several students on one forward of the teacher: the same bytes as each alone.

    python results/side_by_side.py --seed 0 -- --method soft --out runs/soft-0 -- --method lift --beta 5 --out runs/lift-0

Flags before the first -- are common, each part after it names a student; --dry-run, --eval, --overwrite: not here.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import signal
import time

import train_kd
from train_kd import RANK
import torch
import torch.distributed as dist

import data
import models

COMMON = ("data", "train_size", "label_noise", "seed", "batch_size", "accum", "repeats", "epochs", "img_size", "amp",
          "teacher", "teacher_weights", "teacher_head", "teacher_maps", "auto_augment", "random_erasing", "crop_pct")


def open_runs(parts, common):
    """-> the runs, and a teacher that keeps all layers that any of them wants."""
    runs, teacher, loaders, first, keep = [], None, None, None, set()
    for part in parts:
        typed = vars(train_kd.make_parser().parse_args([*common, *part]))
        device = models.choose_device(typed.get("device"))
        args, dataset, config = train_kd.resolve(typed, device)
        first = first or args
        for name in COMMON:
            if getattr(args, name) != getattr(first, name):
                raise ValueError(f"{train_kd.flags([name])} must be common: {args.out} differs from {first.out}")
        torch.manual_seed(args.seed)
        own, distiller, statistics = train_kd.build(args, dataset.classes)
        record = train_kd.describe(args, own, distiller, dataset)
        record["command"] = " ".join(["train_kd.py", *common, *part])
        if own and not teacher:
            teacher = own.to(device)
        if own and models.digest(own) != models.digest(teacher):
            raise ValueError(f"{args.out} has another teacher")
        loaders = loaders or train_kd.make_loaders(args, dataset, statistics, device)
        run = train_kd.Run(args, device, own, distiller.to(device), loaders)
        keep |= {*own.layers} if own else set()
        run.layers = own.layers if own else []
        if args.resume:
            train_kd.load(run)
        if RANK == 0:
            train_kd.open_folder(args, config, record)
        runs.append(run)
    shared = models.HookedModel(teacher.model, sorted(keep), **statistics, twin=teacher.twin).eval() if teacher else None
    return runs, shared


def taught_for(run, taught):
    if not run.teacher:
        return None
    logits, maps = taught
    return logits, [maps[layer] for layer in run.layers]


def train(runs, teacher):
    args, steps, loader = runs[0].args, runs[0].steps, runs[0].train_loader
    ended = []
    for epoch in range(min(len(run.log) for run in runs), args.epochs):
        start = min(max(run.step - epoch * steps, 0) for run in runs)
        batches = data.training_batches(loader.size, args.batch_size, seed=args.seed, epoch=epoch, start=start,
                                        repeats=args.repeats, accum=args.accum, rank=RANK, world=train_kd.WORLD)
        stream, began = loader.load(batches, epoch), time.perf_counter()
        for i in range(start, steps):
            active = [run for run in runs if run.step == epoch * steps + i and run not in ended]
            for run in active:
                run.distiller.train()
                run.scheduler.step_update(run.step)
            for micro in range(args.accum):
                images, labels = next(stream)
                taught = None
                if teacher:
                    with torch.no_grad(), runs[0].autocast("teacher"):
                        logits, maps = teacher(images)
                    taught = logits, dict(zip(teacher.layers, maps))
                for run in active:
                    train_kd.backward(run, images, labels, taught_for(run, taught), micro)
            for run in active:
                train_kd.step(run)
            received = runs[0].stop.asked()
            if received:
                for run in active:
                    train_kd.save(run)
                train_kd.say(f"stopped by {signal.Signals(received).name}")
                sys.exit(128 + received)
            if i % 50 == 49:
                ended += [run for run in active if failed(run)]
        seconds = (time.perf_counter() - began) / len(runs)
        for run in runs:
            if len(run.log) == epoch and run not in ended:
                if failed(run):
                    ended.append(run)
                else:
                    train_kd.end_epoch(run, epoch, (steps - start) * args.batch_size, seconds)
    for run in runs:
        if RANK == 0 and run not in ended:
            train_kd.finish(run)


def failed(run):
    """NaN ends a run, the others go on."""
    if all(value.isfinite() for value in run.sums.values()):
        return False
    train_kd.say(f"warning: {run.out} ended at step {run.step}: its loss is not finite")
    return True


def main():
    words = sys.argv[1:]
    places = [i for i, word in enumerate(words) if word == "--"] + [len(words)]
    parts = [words[a + 1:b] for a, b in zip(places, places[1:])]
    common = words[:places[0]]
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    runs, teacher = open_runs(parts, common)
    with train_kd.Stop() as stop:
        for run in runs:
            run.stop = stop
        train(runs, teacher)


if __name__ == "__main__":
    main()
