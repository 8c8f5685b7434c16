"""Train several students at once. The teacher sees each batch once; the weights are the same as alone.

    python results/side_by_side.py --seed 0 -- --method soft --out runs/soft-0 \\
                                            -- --method lift --beta 5 --out runs/lift-0
    torchrun --nproc_per_node=4 results/side_by_side.py --data /data/imagenet -- --first 1 -- --last 1

The flags are those of train_kd.py. Those before the first -- are common, each part behind a --
names a student, with a folder of its own. Students, methods, layers, variants and learning rates
may differ. --resume goes on with all of them: one that is behind catches up first.
"""
import contextlib
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import train_kd
from train_kd import UserError

MUST_BE_COMMON = (
    "data", "train_size", "label_noise", "skip_bad_images", "img_size", "repeats", "auto_augment",
    "random_erasing", "crop_pct", "teacher", "teacher_weights", "teacher_head", "epochs",
    "batch_size", "accum", "seed", "device", "amp", "compile")


def run_program(argv):
    common, *parts = split_at_dashes(argv)
    settled = [train_kd.read_settings([*common, *part]) for part in parts]
    check_common(settled)
    with contextlib.ExitStack() as stack:
        runs = []
        for part, (args, device, dataset, config) in zip(parts, settled):
            stack.enter_context(train_kd.claimed(args.out))
            # The command on record trains this student alone.
            sys.argv = ["train_kd.py", *common, *part]
            runs.append(train_kd.prepare(args, device, dataset, config))
        teacher = share(runs)
        stack.enter_context(train_kd.signals_remembered(runs[0]))
        train(runs, teacher)


def check_common(settled):
    train_kd.refuse(not settled, "give each student as a part: -- --method soft -- --method lift")
    first, *_ = settled[0]
    for args, *_ in settled:
        # An untrained copy is drawn after the student: unlike students have unlike ones.
        train_kd.refuse(args.eval or args.dry_run or args.teacher_maps == "random",
                        "side by side there is no --eval, --dry-run, --teacher-maps random")
        for name in MUST_BE_COMMON:
            mine, theirs = getattr(args, name), getattr(first, name)
            train_kd.refuse(mine != theirs, f"{train_kd.flag(name)} must be common: {mine}, {theirs}")


def split_at_dashes(words):
    parts = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def share(runs):
    """Give all runs the loaders of the first -> one teacher, which keeps the layers of all."""
    first = runs[0]
    teacher = None
    for run in runs:
        train_kd.refuse(
            models.statistics(run.student.model) != models.statistics(first.student.model),
            f"{run.args.student} and {first.args.student} want images normalised differently")
        run.train_loader = first.train_loader
        run.val_loader = first.val_loader
        run.layers = []  # of the teacher
        if run.teacher:
            run.layers = list(run.teacher.layers)
            teacher = teacher or run.teacher
            for layer in run.layers:
                if layer not in teacher.layers:
                    teacher.hook(layer)
    return teacher


def train(runs, teacher):
    """As train_kd.train. A run whose loss is NaN ends, and the others go on."""
    first = runs[0]
    steps = first.steps
    for epoch in range(min(len(run.log) for run in runs), first.args.epochs):
        began = time.perf_counter()
        start = max(0, min(run.step for run in runs) - epoch * steps)
        stream = train_kd.stream_of(first, epoch, start)
        for step in range(epoch * steps + start, (epoch + 1) * steps):
            active = [run for run in runs if run.step == step]  # without those that are ahead
            for part in range(first.args.accum):
                images, labels = next(stream)
                learn_all(active, part, images, labels, teacher, first.autocast)
            train_kd.stop_after_signal(first.signal, active)
            if step % 50 == 49:
                runs = sound_runs(runs)  # before a signal meets one with NaN
        runs = sound_runs(runs)
        for run in runs:
            if len(run.log) == epoch:
                evaluating = time.perf_counter()
                train_kd.end_epoch(run, steps - start, began)
                began += time.perf_counter() - evaluating  # not a part of the others' time


def learn_all(runs, part, images, labels, teacher, autocast):
    if teacher:
        with torch.no_grad(), autocast:
            logits, maps = teacher(images)
        maps = dict(zip(teacher.layers, maps))
    for run in runs:
        run.distiller.train()
        taught = None
        if run.teacher:
            taught = logits, [maps[layer] for layer in run.layers]
        train_kd.learn(run, part, images, labels, taught)


def sound_runs(runs):
    """Those whose loss is finite."""
    sound = []
    for run in runs:
        try:
            if run.sums:
                train_kd.checked_sums(run)
            sound.append(run)
        except UserError as error:
            train_kd.say(f"warning: ended, while the others go on: {error}")
    train_kd.refuse(not sound, "the loss of no student is finite")
    return sound


if __name__ == "__main__":
    train_kd.main(program=run_program)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
