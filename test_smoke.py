"""python -m pytest -q test_smoke.py   (under 3 minutes on 2 cores, without network)

A section a file, in that file's order, then the command lines. A test is called
test_<function>_<property>.
"""
import contextlib
import copy
import csv
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.layers import DropPath, resample_abs_pos_embed
from timm.optim import create_optimizer_v2
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.functional import normalize

import analyze
import data
import losses
import models
import train_kd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "results"))
import side_by_side
import speed
import study

torch.set_num_threads(1)  # sums in the same order everywhere
data.VAL_SIZE = 20  # images, not 4000
CPU = torch.device("cpu")
TINY = "--train-size 64 --batch-size 16 --student-kwargs depth=2 embed_dim=24".split()
DEEP = "--student-kwargs depth=8"  # enough layers for methods that align many
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TOY = "deit_toy_patch8_32"
TEACHER = HERE / "weights/cait_toy_shapes.safetensors"
unix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signals")
TWO = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"  # processes

# ---------- Helpers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wave(*shape, a=0.7, b=0.31):
    """What the golden values belong to: sin(a n) + 0.5 cos(b n + 1) + sin(0.05 n^2 mod 7)."""
    n = np.arange(np.prod(shape), dtype=np.float64)
    values = np.sin(a * n) + 0.5 * np.cos(b * n + 1) + np.sin((0.05 * n * n) % 7)
    return torch.from_numpy(values.reshape(shape))


def words_of(flags):
    """Flags, one or several in a text, as a command line has them."""
    return " ".join(map(str, flags)).split()


def settle(*flags):
    """Flags -> settings, data set."""
    args, _, dataset, _ = train_kd.read_settings([*words_of(flags), "--dry-run"])
    return args, dataset


def make(*flags):
    """Flags -> settings, teacher, distiller of a small run."""
    args, dataset = settle(*TINY, *flags)
    teacher, distiller = train_kd.build(args, len(dataset.classes))
    return args, teacher, distiller


def train(out, *flags):
    """A run of the program -> its folder."""
    train_kd.main([*words_of(flags), "--device", "cpu", "--out", str(out)])
    return out


def start(*command):
    """Python with a command line, beside the test; pytest shows its stderr if the test fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, text=True, env=env)


def refusal(capsys, call, *arguments):
    """The line with which a program refuses."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def log_of(folder):
    """log.jsonl without what differs from run to run, and without words."""
    lines = []
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        del line["seconds"], line["images_per_s"], line["device"]
        lines.append(line)
    return lines


# To the last bit, through dictionaries and lists.
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def assert_same_runs(*folders):
    """The same epochs, students and EMAs; the same to go on from."""
    assert_same(*map(log_of, folders))
    for file in ("student.safetensors", "student_ema.safetensors"):
        assert_same(*[models.read_weights(folder / file) for folder in folders])
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in folders]
    for state in states:
        del state["log"]  # it holds times
    assert_same(*states)


def epochs(*top1, **terms):
    """Lines of a log."""
    line = {"seconds": 2.0, "terms": {"kd": 1.23456789, **terms}}
    return [{"top1": each, "ema_top1": each, **line} for each in top1]


def make_run(folder, method="soft", log=(), layers=(), **settings):
    """A run's folder, around a student of two blocks that was not trained."""
    folder.mkdir(parents=True)
    args, dataset = settle(*TINY)
    known = {"method": method, "epochs": len(log), "out": str(folder)}
    settings = {**vars(args), **known, **settings}
    config = {
        "settings": settings,
        "images": {"train": 64, "classes": 20},
        "class_names": dataset.classes,
        "command": "train_kd.py",
        "layers": {"student": layers}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = [f"{json.dumps(line)}\n" for line in log]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    student = models.build_model(
        TOY, num_classes=20, variant=settings["variant"], teacher_width=96,
        **settings["student_kwargs"])
    train_kd.write_weights(folder / "student.safetensors", student)
    for epoch in (1, 2):
        torch.save(student.state_dict(), folder / f"epoch_{epoch:04}.pt")
    return folder


def column(path, *names):
    """The distinct rows of some columns of a CSV, in its order."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [tuple(row[name] for name in names) for row in csv.DictReader(file)]
    return list(dict.fromkeys(rows))


def draw_folders(root, classes, count=2):
    """A folder of noise for each class: of the first two anyone can tell which is which."""
    for name, base in zip(classes, (150, 0, 75)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            generator = np.random.default_rng([i, base, count])
            pixels = base + generator.integers(0, 100, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


PHOTOS = f"--recipe toy --batch-size 4 --lr 5e-4 --student {TOY}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Bright and dark ones in train/ and val/, and a run on them: the teacher-to-be."""
    root = tmp_path_factory.mktemp("photos")
    draw_folders(root / "train", ["bright", "dark"], 40)
    draw_folders(root / "val", ["bright", "dark"], 8)
    own = "--method none --student-kwargs depth=3 --epochs 3"
    train(root / "run", PHOTOS, "--data", root, own)
    return root


# ---------- losses.py


@pytest.mark.parametrize("options, golden", [
    ({}, 0.844308324),
    ({"label_smoothing": 0.1}, 0.838735681),
    ({"alpha": 0.5, "tau": 4.0}, 2.338509928)])
def test_soft_kd_loss_golden(options, golden):
    labels = torch.tensor([1, 7, 3, 3])
    logits_s = wave(4, 10)
    logits_t = 3 * wave(4, 10, a=0.2)
    terms = losses.SoftKD(**{"label_smoothing": 0.0, **options})(labels, logits_s, (), logits_t)
    for loss in (losses.soft_kd_loss(logits_s, logits_t, labels, **options), sum(terms.values())):
        assert loss.item() == pytest.approx(golden, abs=1e-9)


def pool(wide, channels):
    """Over channels floor(i C_in / C) .. ceil((i + 1) C_in / C), as the losses are defined."""
    width = wide.shape[1]
    pooled = []
    for i in range(channels):
        end = -(-(i + 1) * width // channels)
        pooled.append(wide[:, i * width // channels:end].mean(1))
    return torch.stack(pooled, dim=1)


@pytest.mark.parametrize("h, w", [(4, 4), (7, 7), (14, 14), (5, 8)])
def test_spectral_loss_parseval(h, w):
    """The real FFT's columns 0..w/2 weigh 1, those that have a mirror image 2: half the MSE."""
    wide = wave(2, 15, h, w)
    narrow = wave(2, 6, h, w, a=0.4)
    difference = (pool(wide, 6) - narrow).numpy()
    energy = np.abs(np.fft.fft2(difference, norm="ortho")) ** 2
    mse = losses.feature_mse(wide, narrow).item()
    assert mse == pytest.approx(energy.mean(), rel=1e-12)
    half = energy[..., :w // 2 + 1].mean() / 2
    for maps in ((wide, narrow), (narrow, wide)):
        loss = losses.spectral_loss(*maps).item()
        assert loss == pytest.approx(half, rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):  # float32 whatever surrounds it
        loss = losses.spectral_loss(wide.float(), narrow.float())
    assert loss.item() == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("width, channels", [(384, 219), (384, 192), (96, 48), (15, 6)])
def test_feature_mse_pools_in_windows(width, channels):
    wide = wave(2, width, 3, 3)
    pooled = pool(wide, channels)
    mse = losses.feature_mse(wide, 0 * pooled).item()
    assert mse == pytest.approx(pooled.square().mean().item(), rel=1e-12)
    on_mps = wide.flatten(2).mT @ losses._pooling_matrix(width, channels).double()
    torch.testing.assert_close(on_mps, pooled.flatten(2).mT, rtol=1e-5, atol=1e-6)


GRID_LOSSES = {
    "spectral": losses.spectral_loss,
    "mse": losses.feature_mse,
    "projector": partial(losses.ProjectorKD(channels=[(6, 6)]).pair_loss, 0)}


@pytest.mark.parametrize("name", GRID_LOSSES)
def test_check_grids_in_every_loss(name):
    loss = GRID_LOSSES[name]
    with pytest.raises(losses.LossError, match="4 x 4 and the teacher's 7 x 7"):
        loss(wave(2, 6, 4, 4), wave(2, 6, 7, 7))
    with pytest.raises(losses.LossError, match=r"tokens.*\.mT\.unflatten\(2, \(h, w\)\)"):
        loss(wave(2, 16, 6), wave(2, 16, 6))


@pytest.mark.parametrize("alpha, beta, expected", [
    (0.9, 0.2, ["ce", "kd", "spectral"]),
    (0, 0.2, ["ce", "spectral"]),
    (1, 0.2, ["kd", "spectral"]),
    (0.9, 0, ["ce", "kd"])])
def test_feature_kd_leaves_out_terms_of_weight_zero(alpha, beta, expected):
    method = losses.SpectralKD(alpha=alpha, beta=beta)
    logits = wave(2, 5)
    maps = [wave(2, 6, 4, 4)]
    terms = method(torch.tensor([0, 1]), logits, maps, logits, maps)
    assert [*terms] == expected


def test_projector_kd_equals_batchnorm_and_linear():
    map_s = wave(2, 6, 4, 4)
    map_t = wave(2, 12, 4, 4, a=0.4)
    method = losses.ProjectorKD(channels=[(6, 12)]).double()
    weight = method.projectors[0].weight
    projected = nn.functional.conv2d(map_s, weight[:, :, None, None])
    norm = nn.BatchNorm2d(12, affine=False).double()
    expected = {"none": (projected, map_t), "batch": (norm(projected), norm(map_t))}
    for method.norm, maps in expected.items():
        both = method.pair_loss(0, map_s, map_t), nn.functional.mse_loss(*maps)
        torch.testing.assert_close(*both)
        torch.testing.assert_close(
            *[torch.autograd.grad(each, weight, retain_graph=True) for each in both])


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_distiller_exempts_from_weight_decay_what_timm_does(variant):
    _, _, distiller = make("--method", "projector", "--variant", variant)
    undecayed = set()
    for group in create_optimizer_v2(distiller, "adamw", weight_decay=0.05).param_groups:
        if not group["weight_decay"]:
            undecayed.update(map(id, group["params"]))
    for name, parameter in distiller.named_parameters():
        exempt = parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token"))
        assert (id(parameter) in undecayed) == exempt, name


@cache
def leaves(node):
    """{identity: shape} of all parameters in the graph below a node of autograd."""
    found = {}
    if hasattr(node, "variable"):
        found[id(node.variable)] = node.variable.shape
    for below, _ in node.next_functions:
        if below:
            found |= leaves(below)
    return found


SERVED = []  # each method with each student variant that it can work with
for _method, _class in losses.METHODS.items():
    SERVED += [(_method, _variant) for _variant in _class.variants]


@pytest.mark.parametrize("method, variant", SERVED)
def test_distiller_one_step_moves_all_that_learns(method, variant):
    _, teacher, distiller = make("--method", method, "--variant", variant, DEEP)
    optimizer = create_optimizer_v2(distiller, "adamw", lr=1e-2, weight_decay=0.05)
    learning = {id(p) for p in distiller.parameters() if p.requires_grad}  # a method may freeze some
    held = []
    for group in optimizer.param_groups:
        held += map(id, group["params"])
    assert sorted(held) == sorted(learning)
    before = copy.deepcopy(dict(distiller.named_parameters()))
    teacher_before = copy.deepcopy(teacher.state_dict()) if teacher else None

    images = torch.randn(8, 3, 32, 32)
    taught = teacher(images) if teacher else None
    _, terms = distiller.train()(images, torch.arange(8), taught)
    loss = sum(terms.values())
    used = leaves(loss.grad_fn)
    assert [shape for key, shape in used.items() if key not in learning] == []  # all is trained
    assert used.keys() == learning
    loss.backward()
    optimizer.step()
    for name, parameter in distiller.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    if teacher:
        assert not teacher.training
        assert_same(teacher.state_dict(), teacher_before)


# ---------- models.py


@pytest.mark.parametrize("name, size, layers", [
    ("vit_tiny_patch16_224", 64, [0, 5, 11]),
    ("deit_tiny_distilled_patch16_224", 64, [11]),
    ("cait_xxs24_224", 64, [0, 12, 23]),
    ("swin_tiny_patch4_window7_224", 224, [0, 3]),
    ("resnet18", 64, [0, 1, 4]),
    ("levit_128s", 224, [0, 2])])
@torch.no_grad()
def test_hooked_model_equals_forward_intermediates(name, size, layers):
    model = models.build_model(name, num_classes=10, img_size=size).eval()
    images = torch.randn(2, 3, size, size)
    expected = model.forward_intermediates(
        images, indices=layers, norm=False, intermediates_only=True)
    hooked = models.HookedModel(model, layers)
    duplicate = copy.deepcopy(hooked)
    for each in (hooked, duplicate):
        assert_same(each(images), (model(images), expected))
    for parameter in duplicate.parameters():
        parameter.mul_(2)  # the copy's hooks must see the copy
    _, doubled = duplicate(images)
    assert not torch.equal(doubled[0], expected[0])


@torch.no_grad()
def test_hooked_model_has_its_own_statistics():
    model = models.build_model("resnet18", num_classes=10).eval()
    raw = torch.rand(2, 3, 64, 64)
    hooked = models.HookedModel(model, [], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    logits, _ = hooked((raw - 0.5) / 0.5)
    torch.testing.assert_close(logits, model(normalize(raw, **IMAGENET)))


@pytest.mark.parametrize("name, size, options", [
    (TOY, 32, dict(depth=1)),
    ("cait_toy_patch8_32", 32, dict(depth=1, depth_token_only=1)),
    ("swin_tiny_patch4_window7_224", 56, dict(
        depths=(1, 1), num_heads=(2, 4), embed_dim=16, drop_path_rate=0))])
def test_hooked_model_compiles_to_one_graph(name, size, options):
    """Hooks included: no graph break, no second compilation, the same maps and gradients."""
    model = timm.create_model(name, num_classes=5, img_size=size, **options)
    model = models.HookedModel(model, range(options.get("depth", 2)))
    first, second = torch.randn(2, 2, 3, size, size)

    def run(images):
        with torch.no_grad():
            taught = model(images)
        logits, maps = model(images)
        loss = logits.sum()
        for feature_map in maps:
            loss = loss + feature_map.square().mean()
        return taught, logits, maps, torch.autograd.grad(loss, [*model.parameters()])

    expected = [run(first), run(second)]
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    found = [run(first)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(run(second))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_untrained_maps_beside_trained_logits():
    _, teacher, _ = make("--teacher-maps", "random")
    _, trained, _ = make()
    images = torch.randn(2, 3, 32, 32)
    logits, maps = teacher(images)
    expected_logits, trained_maps = trained(images)
    assert_same(logits, expected_logits)
    for found, other in zip(maps, trained_maps, strict=True):
        assert found.shape == other.shape and not torch.allclose(found, other)


@pytest.mark.parametrize("first, last, depth, layers", [
    (2, 6, 12, [0, 1, 6, 7, 8, 9, 10, 11]),  # SK's student list
    (2, 6, 24, [0, 1, 18, 19, 20, 21, 22, 23]),  # and its teacher list
    (8, 8, 12, [*range(12)])])
def test_choose_layers_of_the_papers(first, last, depth, layers):
    assert models.choose_layers(first, last, depth) == layers


def test_learn_adds_up_the_parts_of_a_batch(tmp_path, monkeypatch):
    """And tells the method how far the training is."""
    seen = []
    progress = property(lambda self: 0, lambda self, value: seen.append(value))
    monkeypatch.setattr(losses.NoKD, "progress", progress)
    for accum in "12":
        train(tmp_path / accum, *TINY, "--method none --epochs 1 --accum", accum)
    (one,), (two,) = log_of(tmp_path / "1"), log_of(tmp_path / "2")
    assert two["terms"] == pytest.approx(one["terms"], rel=1e-4)
    assert seen[:4] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("variant, count", [
    ("plain", 5_717_416),
    ("lifted", 5_983_528),
    ("widened", 7_313_896)])
def test_build_model_has_the_published_size_and_all_of_the_drop_path(variant, count):
    model = models.build_model(
        "deit_tiny_patch16_224", num_classes=1000, variant=variant, teacher_width=384,
        drop_path_rate=0.2)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates[-2:] == pytest.approx([0.2, 0.2])


def save_student(path, **options):
    """A toy student's weights in a file -> themselves."""
    state = models.build_model(TOY, **{"num_classes": 20, "depth": 3, **options}).state_dict()
    torch.save(state, path)
    return state


@pytest.mark.parametrize("variant, classes, new", [
    ("plain", 20, "new: nothing"),
    ("plain", 2, "new: head.weight, head.bias"),
    ("lifted", 20, "new: blocks.2.1.weight, blocks.2.2.weight, blocks.2.2.bias, head.weight"),
    ("widened", 20, "new: blocks.2.0.weight, blocks.2.1.weight, ")])
def test_start_from_weights(variant, classes, new, tmp_path):
    theirs = save_student(tmp_path / "weights.pth")
    student = models.build_model(
        TOY, num_classes=classes, depth=3, variant=variant, teacher_width=96)
    said = models.start_from(student, TOY, tmp_path / "weights.pth", 32, variant)
    assert new in said and "\n" not in said
    ours = student.state_dict()
    if variant == "lifted":
        assert_same(ours["blocks.2.0.attn.qkv.weight"], theirs["blocks.2.attn.qkv.weight"])
    for name in ("cls_token", "pos_embed", "blocks.0.attn.qkv.weight"):
        assert_same(ours[name], theirs[name])


@pytest.mark.parametrize("offered, wanted, new", [
    (dict(), dict(depth=2), "new: nothing"),  # cut
    (dict(num_classes=0), dict(), "new: head.weight, head.bias"),  # headless
    (dict(), dict(embed_dim=24), "does not hold weights of")])
def test_start_from_weights_of_another_model(offered, wanted, new, tmp_path):
    save_student(tmp_path / "weights.pth", **offered)
    student = models.build_model(TOY, **{"num_classes": 20, "depth": 3, **wanted})
    try:
        said = models.start_from(student, TOY, tmp_path / "weights.pth", 32)
    except models.ModelError as error:
        said = str(error)
    assert new in said


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_start_from_a_cut_student_resizes_its_position_embeddings(variant, tmp_path):
    options = dict(depth=2, variant=variant, teacher_width=96)
    theirs = save_student(tmp_path / "cut.pth", **options)["pos_embed"]
    student = models.build_model(TOY, num_classes=20, img_size=64, **options)
    models.start_from(student, TOY, tmp_path / "cut.pth", 64, variant)
    resized = resample_abs_pos_embed(theirs, [8, 8], num_prefix_tokens=1)
    assert_same(student.state_dict()["pos_embed"], resized)


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_load_student_of_every_variant(variant, tmp_path):
    """A run's student whole, ready for use, whatever its variant; from its snapshots as well."""
    train(tmp_path, *TINY, "--method none --epochs 1 --variant", variant)
    state = torch.load(tmp_path / "last.pt", weights_only=True)["distiller"]
    for file in ("student.safetensors", "best.pt"):
        student = models.load_student(tmp_path, file).eval()
        found = {f"student.model.{key}": value for key, value in student.state_dict().items()}
        assert_same(found, state)
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 20)
    if variant == "plain":  # loads into timm without this repository's help
        path = tmp_path / "student.safetensors"
        alone = timm.create_model(TOY, num_classes=20, depth=2, embed_dim=24, checkpoint_path=path)
        assert_same(alone.state_dict(), student.state_dict())


def test_readme_predicts_photos(photos, tmp_path, monkeypatch):
    page = (HERE / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(import csv.*?)```", page, re.DOTALL)[1]
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(photos / "run", tmp_path / "runs/student")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    with open("predictions.csv", encoding="utf-8") as file:
        answers = list(csv.reader(file))
    assert len(answers) == 16
    for path, name, probability in answers:
        assert Path(path).parent.name == name and float(probability) > 0.5


@pytest.mark.parametrize("size, expected", [(64, 0.8), (32, 1)])
def test_load_student_crops_as_in_validation(size, expected, tmp_path):
    run = make_run(tmp_path / "run", img_size=size, crop_pct=0.8)
    student = models.load_student(run, trained=False)
    assert timm.data.resolve_model_data_config(student)["crop_pct"] == expected
    assert timm.get_pretrained_cfg(TOY).crop_pct == 1


class Mark(SimpleNamespace):
    """A pickle that would leave a file when read."""

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("found, expected", [
    ({"teacher": {}, "student": {}}, r"more than weights: save model.state_dict\(\) alone"),
    ({"model": {}, "top1": np.float64(1)}, r"save model.state_dict\(\) alone"),
    ({"model": Mark(path=Path("mark"))}, "some.pth")])
def test_read_weights_runs_no_code(found, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(found, "some.pth")
    with pytest.raises(models.ModelError, match=expected) as error:
        models.read_weights("some.pth")
    assert "\n" not in str(error.value)
    assert os.listdir() == ["some.pth"]


def test_choose_device_by_default(monkeypatch):
    there = {"cuda": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert models.choose_device().type == "cpu"
    for device in ("mps", "cuda"):
        with pytest.raises(models.ModelError, match=f"{device.upper()} device each and there are 0"):
            models.choose_device(device)
        there[device] = True
        assert models.choose_device().type == device
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(models.ModelError, match="2 processes want a CUDA device each"):
        models.choose_device()


# ---------- data.py


def test_draw_shapes_depends_on_seed_and_index_only():
    few, _ = data.draw_shapes(30)
    many, labels = data.draw_shapes(2100)
    assert torch.equal(few, many[:30])
    assert labels.bincount().tolist() == [105] * 20
    for options in ({"split": "val"}, {"seed": 1}):
        other, _ = data.draw_shapes(30, **options)
        assert not torch.equal(few, other)


def test_open_data_finds_images_alone(photos, tmp_path):
    """.jfif among them, classes by symbolic links; nothing hidden, no other files."""
    for split in ("train", "val"):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "bright").symlink_to(photos / split / "bright")
        one = photos / split / "dark/0.png"
        for name in (".ipynb_checkpoints/0.png", "@eaDir/0.png", "dark/__MACOSX/0.png", "dark/0.jfif"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(one, folder / name)
        (folder / "dark/notes.txt").touch()
    images = data.open_data(str(tmp_path))
    assert images.classes == ["bright", "dark"]
    assert (len(images.train), len(images.val)) == (41, 9)
    assert len(analyze.open_images(str(tmp_path), 99, seed=0)) == 9


@pytest.mark.parametrize("pixels, expected", [
    (np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
    (np.zeros((1, 3), np.int32), "pixels of mode I have no known range"),
    (np.zeros((1, 3), np.float32), "pixels of mode F have no known range")])
def test_load_image_of_more_than_8_bits(pixels, expected, tmp_path):
    path = tmp_path / "deep.tiff"
    Image.fromarray(pixels).save(path)
    try:
        found = np.asarray(data.load_image(path))[0, :, 0].tolist()
    except data.DataError as error:
        found = re.search(r"deep.tiff \((.*):", str(error))[1]
    assert found == expected


@pytest.mark.parametrize("repeats", [1, 3])
def test_training_batches_do_not_depend_on_processes(repeats):
    batches_of = partial(data.training_batches, 100, 24, seed=3, repeats=repeats)
    whole = batches_of(epoch=2)
    parts = [batches_of(epoch=2, accum=2, rank=rank, world=3) for rank in range(3)]
    for update, batch in enumerate(whole):
        shares = [np.concatenate(part[2 * update:2 * update + 2]) for part in parts]
        assert sorted(map(tuple, np.concatenate(shares))) == sorted(map(tuple, batch))
    assert len({*map(tuple, np.concatenate(whole))}) == 96  # no (image, repeat) twice
    assert np.array_equal(whole[2:], batches_of(epoch=2, start=2))
    assert not np.array_equal(whole, batches_of(epoch=3))


def test_pad_crop_flip_moves_and_mirrors():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    draws = torch.tensor([
        [0.5, 0.5, 0.9],
        [0.0, 0.5, 0.9],
        [0.5, 0.5, 0.1]])
    still, shifted, mirrored = data.pad_crop_flip(image.expand(3, 1, 5, 5), draws, padding=2)
    assert torch.equal(still, image)
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(shifted[:, 2:], image[:, :3])
    assert not shifted[:, :2].any()


def loaders_at_64(dataset, **options):
    return data.build_loaders(
        dataset, dataset, img_size=64, device=CPU, workers=0, **IMAGENET, **options)


def test_stream_loader_sends_bytes():
    """A quarter of float32; normalised on the device to what timm's own transform gives."""
    dataset = data.Shapes(8, "train")
    _, loader = loaders_at_64(dataset)
    found, _ = next(loader.load(data.evaluation_batches(8, 8)))
    transform = data.create_transform(64, interpolation="bicubic", crop_pct=0.875, **IMAGENET)
    expected = torch.stack([transform(image) for image, _ in dataset])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    sent, *_ = next(iter(loader.loader))
    assert (sent.dtype, sent.shape) == (torch.uint8, (8, 3, 64, 64))


def test_stream_loader_erases_by_image():
    dataset = data.Shapes(8, "train")
    keys = data.evaluation_batches(8, 8)
    loader, _ = loaders_at_64(dataset, random_erasing=1.0)
    plain, _ = loaders_at_64(dataset)
    erased, _ = next(loader.load(keys, 3))
    whole, _ = next(plain.load(keys, 3))
    alone, _ = next(loader.load([keys[0][5:6]], 3))
    assert torch.equal(alone[0], erased[5])  # whatever the batch around it
    share = (erased != whole).float().mean((1, 2, 3))
    assert 0 < share.min() < share.max() < 0.5


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0"])
def test_build_loaders_augments_at_the_limits(policy):
    """Every operation at its ends: timm's posterize asks for 0 bits there: Pillow may refuse."""
    loader, _ = loaders_at_64(data.Shapes(100, "train"), auto_augment=policy)
    batches = data.training_batches(100, 100, seed=0, epoch=0)
    images, _ = next(loader.load(batches, 0))
    assert images.isfinite().all()


def test_samples_skip_a_bad_image_but_not_a_bad_transform(tmp_path):
    draw_folders(tmp_path, "ab")
    (tmp_path / "a/0.png").write_bytes(b"no image")
    dataset = data.Folder(tmp_path)
    image, *_ = data.Samples(dataset, np.asarray, 0, skip_bad=True)[0, 0, 0]
    assert np.array_equal(image, dataset[1][0])
    with pytest.raises(ValueError, match="invalid literal"):
        data.Samples(dataset, lambda image: int("x"), 0, skip_bad=True)[0, 1, 0]


# ---------- train_kd.py


def to_fake_cuda(model, device=None):
    """As model.to("cuda"): tensors without values in place of the model's."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    tensors[name] = fake
    return model


@pytest.fixture
def fake_cuda(monkeypatch):
    """An update on CUDA tensors without a card: they know shape, dtype and device, refuse to mix
    devices, and have no values, so that nothing can wait for one. Autograd's engine wants a driver:
    gradients are put in place of its backward pass."""
    pytest.importorskip("torch", "2.15", reason="2.6 crashes on fake CUDA tensors without a driver")
    on_cpu = torch.Generator
    loader = SimpleNamespace(size=64)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(models, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "Generator", lambda device=None: on_cpu())
    monkeypatch.setattr(train_kd, "make_loaders", lambda *arguments: (loader, None))
    monkeypatch.setattr(nn.Module, "to", to_fake_cuda)

    def update(*flags, plant):
        args, teacher, distiller = make(*flags)
        average = copy.deepcopy(distiller.student)  # fake tensors cannot be copied deep
        monkeypatch.setattr("timm.utils.model_ema.deepcopy", lambda model: to_fake_cuda(average))

        def backward(loss):
            assert loss.device.type == "cuda" and loss.requires_grad
            for parameter in distiller.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        with FakeTensorMode():
            run = train_kd.Run(args, torch.device("cuda"), None, teacher, distiller)
            plant(run)
            images = torch.empty(8, 3, 32, 32, device="cuda")
            labels = torch.empty(8, dtype=torch.long, device="cuda")
            train_kd.update(run, iter([(images, labels)] * args.accum))
            return run.sums

    return update


@pytest.mark.parametrize("amp, dtype", [("--no-amp", torch.float32), ("--amp", torch.bfloat16)])
@pytest.mark.parametrize("method", losses.METHODS)
def test_update_stays_on_the_device(method, amp, dtype, fake_cuda):
    """Forward passes, losses, fused AdamW and EMA mix no devices and never wait for one."""
    dtypes = set()

    def plant(run):
        for model in filter(None, (run.teacher, run.student)):
            model.register_forward_hook(lambda model, images, output: dtypes.add(output[0].dtype))

    sums = fake_cuda("--accum 2 --method", method, amp, DEEP, plant=plant)
    assert dtypes == {dtype}
    assert {each.device.type for each in sums.values()} == {"cuda"}


class Powered(losses.FeatureKD):
    """power: the exponent of the difference"""

    name = term = "powered"

    def __init__(self, power=2, signed=True, beta=1, **feature):
        super().__init__(beta, **feature)
        self.power = power

    def pair_loss(self, i, map_s, map_t):
        difference = map_s.mean((1, 2, 3)) - map_t.mean((1, 2, 3))
        return difference.abs().pow(self.power).mean()


@pytest.fixture
def powered(monkeypatch):
    monkeypatch.setitem(losses.METHODS, "powered", Powered)


def test_parse_knows_a_new_method(powered, capsys):
    """Nothing outside losses.py names `power`, nor says which values it takes."""
    args, _, distiller = make("--method powered --power -3 --no-signed")
    assert (args.power, args.signed, distiller.method.power) == (-3, False, -3)
    line = refusal(capsys, make, "--method powered --power 2.5")
    assert "--power: invalid int value: '2.5'" in line
    _, _, distiller = make("--method spectral --beta 0.5")  # the new class has an int of that name
    assert distiller.method.beta == 0.5


def test_parse_helps_with_a_new_method(powered, capsys):
    with pytest.raises(SystemExit, match="0"):
        train_kd.parse(["--method", "powered", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--power POWER the exponent of the difference (2)" in shown
    assert "--feature-loss" not in shown


def test_build_gives_maps_to_any_method_that_wants_layers(monkeypatch):
    class Own(losses.SoftKD):
        first, last = 1, 1
        variants = ("plain",)

    monkeypatch.setitem(losses.METHODS, "own", Own)
    _, teacher, distiller = make("--method own")
    assert (distiller.student.layers, teacher.layers) == ([0, 1], [0, 11])
    with pytest.raises(train_kd.UserError, match="no use for --variant lifted"):
        make("--method own --variant lifted")


def test_main_keeps_the_traceback_of_a_programming_error(tmp_path, monkeypatch):
    class Own(losses.FeatureKD):
        term = "own"

        def pair_loss(self, i, map_s, map_t):
            a, b = map_s.shape

    monkeypatch.setitem(losses.METHODS, "own", Own)
    with pytest.raises(ValueError, match="too many values to unpack"):
        train(tmp_path, *TINY, "--epochs 1 --method own")


RECIPES = [  # flags, what follows from them
    ("--data any", dict(recipe="imagenet", epochs=300, batch_size=2048, lr=2e-3, repeats=3)),
    ("--data any --batch-size 512", dict(lr=5e-4, min_lr=1e-5)),
    ("", dict(recipe="toy", epochs=30, batch_size=64, lr=2e-3, repeats=1, img_size=32)),
    ("--recipe imagenet", dict(epochs=300, student="deit_tiny_patch16_224", img_size=224)),
    ("--recipe finetune --data any --batch-size 64", dict(lr=1e-4, student_weights="pretrained")),
    ("--recipe finetune --data any --batch-size 64 --lr 3e-5", dict(lr=3e-5)),
    ("--method soft", dict(first=0, last=0, variant="plain")),
    ("--method lift", dict(first=0, last=1, variant="lifted")),
    ("--method lift --variant plain --first 2", dict(first=2, last=0, variant="plain"))]


@pytest.mark.parametrize("flags, expected", RECIPES)
def test_parse_follows_the_recipe(flags, expected):
    args, _ = train_kd.parse(flags.split())
    for name, value in expected.items():
        assert getattr(args, name) == pytest.approx(value), name


def test_parse_takes_the_strongest_layer(tmp_path, monkeypatch):
    """Row < recipe < method < resumed run < command line: each adds one thing to the former."""
    def chosen(flags=""):
        args, _ = train_kd.parse(f"--method widelast {flags}".split())
        return args.seed, args.epochs, args.variant

    assert chosen() == (0, 30, "widened")
    monkeypatch.setitem(train_kd.RECIPES["toy"], "seed", 1)
    assert chosen() == (1, 30, "widened")
    run = make_run(tmp_path / "run", "widelast", epochs(1.0, 2.0), seed=2, variant="plain")
    assert chosen(f"--resume --out {run}") == (2, 2, "plain")
    assert chosen(f"--resume --out {run} --epochs 5 --seed 0") == (0, 5, "plain")


@pytest.mark.parametrize("count, warm_up", [(1, 0.2), (5, 1), (10, 2), (30, 2)])
def test_run_warms_up_for_a_fifth_at_most(count, warm_up):
    """In epochs of four updates; the toy recipe's own is 2 epochs."""
    args, _, distiller = make("--method none --epochs", count)
    _, dataset = settle(*TINY)
    run = train_kd.Run(args, CPU, dataset, None, distiller)
    rates = []
    for step in range(4 * count):
        run.scheduler.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert np.argmax(rates) == np.ceil(4 * warm_up)


def test_write_leaves_the_former_file_on_a_full_disk(tmp_path, monkeypatch):
    def fill_disk(path, content):
        path.write_text("half of it")
        raise OSError("No space left on device")

    path = tmp_path / "last.pt"
    path.write_text("former")
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        models.write(path, b"new content")
    assert path.read_text() == "former"


def test_write_weights_of_tied_tensors(tmp_path):
    linear = nn.Linear(3, 3)
    tied = nn.Sequential(linear, linear)
    train_kd.write_weights(tmp_path / "tied.safetensors", tied)
    assert_same(models.read_weights(tmp_path / "tied.safetensors"), dict(tied.state_dict()))


def test_prepare_keeps_the_command(tmp_path, monkeypatch):
    (tmp_path / "holiday.png").touch()  # is no run
    monkeypatch.setattr(sys, "argv", ["train_kd.py", "--out", "a run"])
    train(tmp_path, *TINY, "--method none --epochs 1")
    monkeypatch.setattr(sys, "argv", ["train_kd.py", "--resume"])
    train(tmp_path, "--resume --epochs 2")
    assert models.read_config(tmp_path)["command"] == "train_kd.py --out 'a run'"


@pytest.mark.parametrize("flags, top1", [
    ("", 100),
    ("--alpha 0", 100),
    ("", 50),
    ("--alpha 0", 50)])
def test_show_teacher_warns_near_chance(flags, top1, photos, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(photos / "run", teacher)
    if top1 == 50:  # everything is bright
        weights = models.read_weights(teacher / "student.safetensors")
        weights["head.bias"] = torch.tensor([99.0, 0.0])
        safetensors.torch.save_file(weights, teacher / "student.safetensors")
    own = "--student-kwargs depth=2 --epochs 1 --teacher-weights"
    train(tmp_path / "out", PHOTOS, "--data", photos, flags, own, teacher)
    said = capsys.readouterr().out
    assert f"teacher {TOY}: top-1 {top1}.00 %" in said
    assert ("near chance (50.00 %)" in said) == (top1 == 50)


def test_show_accuracy_equals_the_log_on_one_process_and_two(photos, capsys):
    run = photos / "run"
    two = start(*TWO, "train_kd.py", "--eval", "--out", run, "--device", "cpu")
    train(run, "--eval")
    one = capsys.readouterr().out
    *_, last = log = log_of(run)
    best = max(line["top1"] for line in log)
    accuracies = last["top1"], last["ema_top1"], best
    files = "student.safetensors", "student_ema.safetensors", "best.pt"
    for line, file, top1 in zip(one.splitlines(), files, accuracies, strict=True):
        assert line.startswith(f"{file}: top-1 {top1:.2f} %, ") and "16 images" in line
    said, _ = two.communicate(timeout=60)
    assert two.returncode == 0 and said == one


def test_show_accuracy_needs_no_training_images(photos, capsys):
    train(photos / "run", "--eval", "--data", photos / "val")
    assert capsys.readouterr().out.count("16 images") == 3


# ---------- analyze.py

EMBEDDED = "cait_toy_patch8_32=weights/cait_toy_shapes.safetensors"


def numpy_ranks(energies, levels=analyze.LEVELS):
    """Smallest k with a share >= level, the plain way. energies [images, C] -> [images, levels]."""
    shares = np.cumsum(energies, axis=1) / energies.sum(1, keepdims=True)
    return [[int(np.argmax(row >= level)) + 1 for level in levels] for row in shares]


def numpy_entropy(A, lo, hi):
    """DD Eq. 3 and 4 with numpy.histogram, token by token. [B, C, h, w] -> [B, h, w]."""

    def count(token):
        return np.histogram(token, bins=100, range=(lo, hi))[0]

    p = np.apply_along_axis(count, 1, A.numpy()) / A.shape[1]
    return -(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(1)


@pytest.mark.parametrize("C_s, C_t, size, golden", [
    (6, 12, 4, 1.049374114),
    (12, 12, 7, 0.706133631),
    (6, 15, 14, 0.563001475)])
def test_spectral_loss_golden(C_s, C_t, size, golden):
    map_s = wave(2, C_s, size, size)
    map_t = wave(2, C_t, size, size, a=0.4, b=0.9)
    assert losses.spectral_loss(map_s, map_t).item() == pytest.approx(golden, abs=1e-9)


def test_metrics_golden():
    near = partial(pytest.approx, abs=1e-8)
    A = wave(3, 2, 16, 3, 3)
    X = wave(5, 20, 12)
    assert analyze.channel_spectrum(A[0])[:2].tolist() == near([0.65610145, 0.14649592])
    for layer, golden in zip(A, [3.76296992, 3.76296992, 3.78812656]):
        assert analyze.entropy_map(layer, A.min(), A.max()).mean().item() == near(golden)
    assert analyze.sep_curve(X)[:2].tolist() == near([7.46693440, 30.93371383])
    assert analyze.energy_ranks(X)[0].tolist() == [4, 6, 8, 10]
    assert analyze.pca_ranks(X, analyze.second_moment(X))[0].tolist() == [6, 8, 10, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C, h, w", [
    (16, 3, 3),
    (15, 2, 4),
    (192, 5, 5),
    (7, 1, 1)])
def test_metrics_equal_numpy(C, h, w, dtype):
    A = torch.randn(3, C, h, w, dtype=dtype) * 3 + 1
    X = A.flatten(2).mT
    near = partial(pytest.approx, rel=1e-5 if dtype is torch.float32 else 1e-12)
    tokens = X.numpy().astype(np.float64)
    fourier = np.abs(np.fft.fft(tokens))
    spectrum = analyze.channel_spectrum(A)
    assert spectrum.dtype == dtype
    assert spectrum.numpy() == near(fourier.mean((0, 1)) / C)
    assert analyze.magnitude(A).item() == near(np.abs(tokens).mean())
    lo, hi = A.min().item(), A.max().item()
    assert analyze.entropy_map(A, lo, hi).numpy() == near(numpy_entropy(A, lo, hi))
    singular = np.linalg.svd(tokens, compute_uv=False)
    assert analyze.energy_ranks(X).tolist() == numpy_ranks(singular**2)
    moment = np.einsum("bnc,bnd->cd", tokens, tokens) / (3 * h * w)
    assert analyze.second_moment(X).numpy() == pytest.approx(moment, rel=1e-6, abs=1e-6)
    basis = np.linalg.eigh(moment)[1][:, ::-1]
    energies = ((tokens @ basis) ** 2).sum(1)
    assert analyze.pca_ranks(X, torch.from_numpy(moment)).tolist() == numpy_ranks(energies)
    shares = fourier**2 / (fourier**2).sum(-1, keepdims=True)
    curve = 100 * np.cumsum(shares, axis=-1).mean((0, 1))
    assert analyze.sep_curve(X).numpy() == near(curve)
    bands = [(np.argmax(curve >= level) + 1) / C for level in analyze.BANDS]
    assert analyze.sep_bandwidth(torch.from_numpy(curve)).tolist() == near(bands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lo, hi", [(-1.0, 1.0), (0.1, 0.7), (-3.3, 12.7)])
def test_entropy_map_on_bin_edges(dtype, lo, hi):
    """Every edge, and the numbers just below and above it, fall where numpy.histogram puts them."""
    edges = torch.from_numpy(np.linspace(lo, hi, 101)).to(dtype)
    far = torch.full_like(edges, 9e9)
    lo, hi = edges[0].item(), edges[-1].item()
    around = torch.cat([edges, edges.nextafter(far), edges.nextafter(-far)]).clamp(lo, hi)
    A = torch.stack([around.roll(i)[:40] for i in range(len(around))]).view(-1, 40, 1, 1)
    expected = pytest.approx(numpy_entropy(A, lo, hi), abs=1e-6)
    assert analyze.entropy_map(A, lo, hi).numpy() == expected


def test_metrics_of_degenerate_input():
    constant = torch.full((1, 8, 2, 2), 3.0)
    zeros = torch.zeros(1, 4, 8)
    assert not analyze.entropy_map(constant, 3.0, 3.0).any()
    for X in (zeros, constant.flatten(2).mT):
        assert analyze.energy_ranks(X).tolist() == [[1, 1, 1, 1]]
    assert analyze.pca_ranks(zeros, torch.eye(8)).tolist() == [[1, 1, 1, 1]]
    assert not analyze.sep_curve(zeros).any()
    X = torch.randn(1, 4, 8)
    with_zeros = torch.cat([X, zeros], dim=1)  # tokens of zeros have no pattern
    assert torch.equal(analyze.sep_curve(with_zeros), analyze.sep_curve(X))
    ones = analyze.sep_curve(torch.ones(1, 1, 8))  # all in frequency 0
    assert analyze.sep_bandwidth(ones).tolist() == [1 / 8] * 5


def subjects_of(*flags):
    args = analyze.make_parser().parse_args(["--models", *map(str, flags)])
    return analyze.open_subjects(args, CPU)


def analyse(out, *flags):
    """The program -> the rows of summary.md, each a list of cells."""
    usual = ["--images", "2", "--no-layer-ranks", "--out", str(out)]
    analyze.main([*map(str, flags), *usual])
    text = (Path(out) / "summary.md").read_text(encoding="utf-8")
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]


def test_measure_streams(tmp_path, monkeypatch):
    """What main writes does not depend on the batches, and equals the metrics of all images."""
    flags = ["--models", "deit_toy_patch8_32=random", "--images", "7"]
    for size in ("2", "7"):
        analyze.main([*flags, "--batch-size", size, "--out", str(tmp_path / size)])
        monkeypatch.setattr(analyze, "draw_all", lambda *args: None)  # once is enough
    assert len(os.listdir(tmp_path / "2")) == 15

    def values(size, name):
        lines = (tmp_path / size / f"{name}.csv").read_text().splitlines()[1:]
        return [float(line.rpartition(",")[2]) for line in lines]

    for name in ("entropy", "magnitude", "spectra", "sep"):  # of the controls as well
        assert values("2", name) == pytest.approx(values("7", name), rel=1e-4)
    subject, *_ = subjects_of(*flags[1:])
    with torch.no_grad():
        maps = torch.stack(subject.maps(0, analyze.open_images("shapes", 7, 0)))
    ours = [analyze.entropy_map(A, maps.min(), maps.max()).mean().item() for A in maps]
    assert values("7", "entropy")[:12] == pytest.approx(ours, rel=1e-5)


def test_analyse_the_newest_run(tmp_path, monkeypatch, capsys):
    """From any folder and where text is ASCII: the teacher, the student, null controls."""
    monkeypatch.chdir(tmp_path)
    run = str(make_run(Path("runs/soft-0"), log=epochs(1.0)))
    flags = "--images 2 --layers 1 0 --no-layer-ranks --out out".split()
    command = [sys.executable, "-X", "utf8=0", HERE / "analyze.py", *flags]
    ascii_only = {**os.environ, "LC_ALL": "C"}
    said = subprocess.check_output([*command, "--entropy-range", "layer"], env=ascii_only).decode()
    labels = [f"{run}=teacher", run, "untrained cait_toy_patch8_32", "white noise", "rank 1"]
    assert f"on shapes: {', '.join(labels)}" in said
    assert column("out/entropy.csv", "model") == [(label,) for label in labels]
    assert Path("out/entropy_layer.png").exists()
    Path("out/notes.txt").touch()  # of another hand: stays
    analyze.main(flags)
    named = capsys.readouterr().out.strip().split("done: out: ")[1].split(", ")
    assert "entropy.png" in named and "entropy_layer.png" not in named
    kept = [*named, "notes.txt"]
    assert sorted(os.listdir("out")) == sorted(kept)


@pytest.mark.parametrize("teacher, kind, depth", [
    ("random", "untrained", 12),
    (str(TEACHER), "model", 12),
    ("lifted", "model", 2)])
def test_open_subjects_of_a_run(teacher, kind, depth, tmp_path, monkeypatch):
    """Its teacher may be random or a run; its untrained twin is built as it was."""
    monkeypatch.chdir(tmp_path)
    make_run(Path("lifted"), variant="lifted")
    run = str(make_run(Path("runs/rate=1"), teacher_weights=teacher, variant="lifted"))
    assert analyze.newest_run() == [f"{run}=teacher", run]
    teacher, *_ = subjects_of(f"{run}=teacher")
    assert (teacher.kind, teacher.depth) == (kind, depth)
    student, twin, *_ = subjects_of(run)
    assert (student.kind, twin.label) == ("student", "untrained lifted deit_toy_patch8_32")
    for key, tensor in student.model.state_dict().items():
        assert twin.model.state_dict()[key].shape == tensor.shape


@pytest.mark.parametrize("name, svd, minimum", [
    ("vit_base_patch16_224", "-", "9"),
    ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "-", "9"),
    ("vit_base_patch16_224.augreg_in1k", "-", "-"),
    ("cait_s24_224.fb_dist_in1k", "14/34/61/121", "8-9"),
    ("vit_tiny_patch16_224", "-", "-"),
    ("vit_tiny_patch16_224.augreg_in21k", "1/2/7/52", "-")])
def test_published_numbers_belong_to_weights(name, svd, minimum):
    for kind in ("model", "student", "untrained"):  # only trained weights of timm have them
        ranks, *_, found = analyze.published(SimpleNamespace(name=name, kind=kind))
        assert (ranks, found) == ((svd, minimum) if kind == "model" else ("-", "-"))


def test_control_does_not_depend_on_the_batch():
    *_, noise, pattern = subjects_of("cait_toy_patch8_32=random", "--layers", 0, 11)
    for control in (noise, pattern):
        together = control.maps(0, [None] * 4)
        apart = control.maps(3, [None])
        assert_same([A[3:] for A in together], apart)
    X = analyze.tokens_of(together[0])
    assert analyze.energy_ranks(X).unique().tolist() == [1]
    assert not X[0].equal(X[1])  # a pattern an image


@pytest.fixture
def patched_layer(monkeypatch):
    """patched_layer(index, change): every model's map of that layer is changed after the check."""
    def patch(index, change):
        forward = models.HookedModel.forward

        def changed(self, images):
            logits, maps = forward(self, images)
            maps[index] = change(maps[index])
            return logits, maps

        monkeypatch.setattr(models.HookedModel, "forward", changed)
        monkeypatch.setattr(
            analyze, "check_maps", lambda hooked, size: hooked(torch.zeros(1, 3, size, size))[1])

    return patch


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("index, layers", [(-1, 12), (5, 12), (0, 1)])
def test_analyse_a_dead_layer(index, layers, tmp_path, patched_layer):
    """Its cells are "-" in summary.md, and all the rest is measured."""
    patched_layer(index, torch.zeros_like)
    names = ["cait_toy_patch8_32=random", "deit_toy_patch8_32=random"]
    flags = ["--models", *names, "--no-controls", "--layers", *range(layers)]
    *_, sep, _, _, intensity = [row for row in analyse(tmp_path, *flags) if row[0] != "model"]
    assert intensity[-1] == "-"
    assert sep[1:] == ["-"] * 4 or index == 5
    assert len(os.listdir(tmp_path)) == 13


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e20])
def test_analyse_refuses_values_that_cannot_be_measured(factor, tmp_path, patched_layer, capsys):
    patched_layer(5, lambda A: A * factor)
    flags = "--models", "deit_toy_patch8_32=random"
    line = refusal(capsys, analyse, tmp_path, *flags)
    assert "deit_toy_patch8_32=random yields values" in line
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("fault, status", [(OSError("disk"), 2), (KeyboardInterrupt(), 130)])
def test_files_appear_together_or_not_at_all(fault, status, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise fault

    monkeypatch.setattr(analyze, "draw_sep", fail)
    with pytest.raises(SystemExit) as end:
        analyse(tmp_path, "--models", "deit_toy_patch8_32=random", "--no-controls")
    assert end.value.code == status and capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_programming_error_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "draw_all", lambda *args: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        analyse(tmp_path, "--models", "deit_toy_patch8_32=random", "--no-controls")


@pytest.mark.parametrize("labels, expected", [
    (["/a/long/path/seed0/soft", "/a/long/path/seed1/soft"], ["seed0/soft", "seed1/soft"]),
    (["cait=weights/cait.pt", "runs/soft"], ["cait=cait.pt", "soft"]),
    (["_runs/_soft", "a$b$"], [" _soft", r"a\$b\$"]),  # not hidden, not read as mathematics
    (["x" * 60], [f"{'x' * 50}\n{'x' * 10}"]),
    (["\udce4\udcb8\udcad"], ["\u4e2d"])])  # as an ASCII locale hands it over
def test_short_labels(labels, expected):
    assert analyze.short_labels(labels) == expected


def test_lines_of_many_models_differ():
    looks = [analyze.line_look(i) for i in range(56)]
    for mark in ("color", "marker"):
        assert len({(look[mark], str(look["linestyle"])) for look in looks}) == 56


def test_analyse_strange_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = str(make_run(Path("_a|b $x$ \u4e2d"), log=epochs(1.0)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    rows = analyse("out", "--models", run, "--no-controls")
    assert [row[0] for row in rows].count("_a\\|b $x$ \u4e2d") == 3
    assert column("out/entropy.csv", "model") == [(run,)]


@unix
def test_analyse_with_closed_streams(tmp_path):
    flags = "--models deit_toy_patch8_32=random --images 1 --layers 0 --no-controls --out"
    command = f"{sys.executable} analyze.py {flags} {tmp_path} >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=HERE).returncode == 0
    assert (tmp_path / "sep.png").exists()


def test_profiles_are_compared_by_relative_depth():
    """Layers 1, 2, 3 of 5 lie where 1 and 2 of 3 do: the second half of the depth is left out."""
    def subject(depth, *profile):
        numbers = range(1, 1 + len(profile))
        return SimpleNamespace(depth=depth, numbers=numbers, by_layer={"intensity": profile})

    short = subject(3, 1.0, 2.0, 4.0)
    for other in (subject(5, 1.0, 1.5, 2.0, 3.0, 4.0), subject(5, 1.0, 1.5, 2.0)):
        assert analyze.closeness(other, short) == pytest.approx((1, 0))
    assert not np.isfinite(analyze.closeness(subject(5, 1.0), short)).any()


def test_evolution_of_two_runs(tmp_path, monkeypatch):
    """Panels have different titles. The last snapshot is black, also when it is the only one."""
    runs = [str(make_run(tmp_path / parent / "soft-0")) for parent in "ab"]
    (tmp_path / "b/soft-0/epoch_0002.pt").unlink()
    figures = {}
    monkeypatch.setattr(analyze, "save", lambda figure, path: figures.update({path.name: figure}))
    ranges = "--entropy-range global layer --images 2 --out".split()
    analyze.main(["--evolution", *runs, *ranges, str(tmp_path)])
    table = tmp_path / "evolution.csv"
    expected = [(runs[0], "1"), (runs[0], "2"), (runs[1], "1")]
    assert column(table, "run", "epoch") == expected
    assert column(table, "layer", "module") == [("1", "blocks.0"), ("2", "blocks.1")]
    assert column(table, "range") == [("global",), ("layer",)]
    left, right = figures["evolution.png"].axes
    assert [left.get_title(), right.get_title()] == ["a/soft-0", "b/soft-0"]
    for axes in (left, right):
        assert axes.get_lines()[-1].get_color() == "0.0"


# ---------- results/*.py


def test_study_is_kept_in_one_file(tmp_path, capsys):
    """study.jsonl yields the table again without the folders; newer folders replace and add lines."""
    runs, record = tmp_path / "runs", tmp_path / "study.jsonl"

    def gather(source):
        study.run_program([str(source), "--out", str(tmp_path)])
        return capsys.readouterr().out

    for seed in (0, 1):
        make_run(runs / f"soft-{seed}", log=epochs(50, 80 + seed), seed=seed)
    log = epochs(50, 85, mse=1, attention=2)  # a method of one's own
    make_run(runs / "own-1", "own", log, [1], seed=1, beta=5.0)
    make_run(runs / "unfinished-0", log=epochs(50), epochs=2)
    said = gather(runs)
    assert "| soft | 2 | 80.00 81.00 | 80.50 +- 0.71 |" in said
    assert "unfinished" not in said and said.isascii()
    own = study.read_study(record)["own", 1]
    assert study.run_of(own).label == "own, MSE, attention"
    assert own["terms"]["kd"] == [1.2346, 1.2346]
    kept = record.read_bytes()
    shutil.rmtree(runs)
    assert gather(tmp_path) == said
    assert record.read_bytes() == kept
    make_run(runs / "soft-1", log=epochs(60, 90), seed=1)
    assert "| soft | 2 | 80.00 90.00 |" in gather(runs)


@pytest.mark.parametrize("name", ["study.jsonl", "own_images/study.jsonl"])
def test_study_keeps_the_bytes_of_its_records(name, tmp_path):
    recorded = HERE / "results" / name
    record = tmp_path / "study.jsonl"
    shutil.copy(recorded, record)
    study.run_program([str(tmp_path)])
    assert record.read_bytes() == recorded.read_bytes()


def test_study_differences(tmp_path, capsys):
    """By hand. Paired: 3 and 5, so 4 +- sqrt(2 / 2). Unpaired: 85 - 82 +- sqrt(8 / 2 + 4 / 3)."""
    ends = {"soft": (80, 82, 84), "last": (83, 87)}
    for name, tops in ends.items():
        for seed, top1 in enumerate(tops):
            log = epochs(*[50] * 9, top1)
            make_run(tmp_path / f"{name}-{seed}", log=log, seed=seed)
    make_run(tmp_path / "unlike-5", log=epochs(30, 40), seed=5)
    study.run_program([str(tmp_path), "--less", "soft"])
    table = capsys.readouterr().out
    gain = "+3.00 +- 2.31 (2, 3) | +4.00 +- 1.00 (2) | +0.40 +- 0.10 (2)"
    assert f"| last | 2 | 83.00 87.00 | 85.00 +- 2.83 | {gain} |" in table
    assert "unlike" not in table  # of another setup: only if asked for
    study.run_program([str(tmp_path), "--less", "soft", "unlike"])
    assert "| unlike | 1 | 40.00 | 40.00 +- nan | -42.00 +- nan (1, 3) |" in capsys.readouterr().out


OWN_IMAGES = HERE / "results/own_images/study.jsonl"


@pytest.mark.parametrize("flags, text, expected", [
    ([], None, "no finished runs"),
    ([], "{", "JSON lines"),
    ([], "{}", "no record of a study"),
    (["--less", "nope"], OWN_IMAGES.read_text(), "nope")])
def test_study_answers_a_mistake_in_one_line(flags, text, expected, tmp_path, capsys):
    if text:
        (tmp_path / "study.jsonl").write_text(text)
    assert expected in refusal(capsys, train_kd.main, [str(tmp_path), *flags], study.run_program)


def test_speed_adds_up(tmp_path, capsys):
    flags = "--method projector --accum 2 --updates 2 --students 2 --device cpu --out"
    train_kd.main([*TINY, *flags.split(), str(tmp_path)], speed.measure)
    result = json.loads(capsys.readouterr().out)
    assert all(value > 0 for value in result["ms"].values())
    hours = 30 * 64 / result["images_per_s"] / 3600
    assert result["training_hours"] == pytest.approx(hours, rel=0.1)
    assert not os.listdir(tmp_path)


STUDENTS = {  # side by side they differ in all that may differ
    "none": "--method none --student-kwargs depth=2 drop_path_rate=0.5",
    "first": "--first 1 --last 0 --lr 4e-3",
    "last": "--feature-loss mse --last 1 --beta 5 --student-kwargs depth=3 embed_dim=24",
    "lift": "--method lift"}


def beside(common, students, root):
    """Students side by side, each in a folder of its name."""
    words = common.split()
    for name, flags in students.items():
        words += ["--", *flags.split(), "--out", str(root / name)]
    train_kd.main(words, side_by_side.run_program)


def test_side_by_side_equals_alone(tmp_path, monkeypatch):
    """The same bytes, after a stop of all in the second epoch, too."""
    common = "--train-size 64 --batch-size 16 --accum 2 --epochs 2 --device cpu"
    for name, flags in STUDENTS.items():
        train(tmp_path / "alone" / name, common, flags)
    learn = train_kd.learn

    def learn_or_signal(run, part, *batch):
        if (run.step, part) == (5, 1):
            run.signal = signal.SIGTERM
        learn(run, part, *batch)

    monkeypatch.setattr(sys, "argv", [""])  # what each student's command becomes
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train_kd, "learn", learn_or_signal)
        beside(common, STUDENTS, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    beside(f"--resume {common}", STUDENTS, tmp_path)
    for name, flags in STUDENTS.items():
        assert_same_runs(tmp_path / "alone" / name, tmp_path / name)
        command = models.read_config(tmp_path / name)["command"]
        assert command == f"train_kd.py {common} {flags} --out {tmp_path / name}"


@pytest.mark.parametrize("common, students, expected", [
    ("", {}, "give each student as a part"),
    ("", {"a": "", "b": "--seed 1"}, "--seed must be common"),
    ("--dry-run", {"a": ""}, "--dry-run")])
def test_side_by_side_refuses(common, students, expected, tmp_path, capsys):
    assert expected in refusal(capsys, beside, common, students, tmp_path)


def test_side_by_side_goes_on_without_a_student_whose_loss_is_nan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [""])
    common = "--train-size 64 --batch-size 16 --epochs 1 --device cpu"
    beside(common, {"bad": "--beta 1e39", "good": "--method none"}, tmp_path)
    assert "bad: at step" in capsys.readouterr().out
    assert len(log_of(tmp_path / "good")) == 1
    assert not (tmp_path / "bad" / "log.jsonl").exists()


def test_course_prints_what_it_promises(monkeypatch):
    """Its Python blocks in order, as in the notebook: words alike, numbers to their last digit."""
    monkeypatch.chdir(HERE)
    page = (HERE / "course" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") == 9
    known = {"__name__": "exercise"}
    for code, promised in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, known)
        found = re.split(r"[\s,\[\]]+", printed.getvalue())
        expected = re.split(r"[\s,\[\]]+", promised)
        for ours, theirs in zip(found, expected, strict=True):
            if not re.fullmatch(r"[~+-]?\d+(\.\d+)?", theirs):
                assert ours == theirs, code
                continue
            _, _, decimals = theirs.partition(".")
            last = 1.1 * 10.0 ** -len(decimals)
            if "~" in theirs:  # depends on the seed
                last = 0.04
            assert float(ours) == pytest.approx(float(theirs.strip("~")), abs=last), code


def test_course_has_its_exercises_and_tags():
    page = (HERE / "course" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+)\.", page, re.MULTILINE) == [*map(str, range(1, 16))]
    kinds = {*re.findall("^```(.+)$", page, re.MULTILINE)}
    assert kinds == {"python", "text", "bash", 'bash tags=["skip-execution"]'}


# ---------- Mistakes: one line on stderr, status 2

WORLD = {  # folders of a class each, in train/ and in val/
    "good": ("abc", "abc"),
    "corrupt": ("abc", "abc"),
    "renamed": ("abd", "abd"),
    "differ": ("ab", "ac"),
    "bomb": ("ab", "ab"),
    "one": ("a", "a"),
    "heic": ("abc", "abc")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Good and bad folders, files and runs for the tests below."""
    root = tmp_path_factory.mktemp("world")
    for folder, classes in WORLD.items():
        for split, names in zip(("train", "val"), classes):
            draw_folders(root / folder / split, names)
    draw_folders(root / "flat", "a")
    (root / "bomb/train/a/0.png").write_bytes(b"P6 40000 40000 255 ")  # pixels
    for cut in (root / "corrupt/train/c/0.png", root / "flat/a/0.png"):
        cut.write_bytes(cut.read_bytes()[:60])
    for image in (root / "heic/train/b").iterdir():
        image.rename(image.with_suffix(".heic"))
    (root / "empty").mkdir()
    (make_run(root / "young") / "student.safetensors").unlink()
    (root / "young/log.jsonl").unlink()
    (root / "file").write_text("not a folder")

    (root / "cut.safetensors").write_bytes(TEACHER.read_bytes()[:5000])
    torch.save({"a": torch.zeros(1)}, root / "other.pth")
    state = models.read_weights(TEACHER)
    torch.save({key: value for key, value in state.items() if "head" not in key}, root / "headless.pth")
    torch.save({key: value * math.nan for key, value in state.items()}, root / "nan.pth")

    train(root / "run", *TINY, "--method none --epochs 2")
    flags = "--recipe toy --batch-size 2 --method none --epochs 1 --skip-bad-images --data"
    train(root / "abc", flags, root / "corrupt")
    shutil.copytree(root / "run", root / "unbegun")
    (root / "unbegun" / "student.safetensors").unlink()
    return root


NOT_FROM_VIT = "lifted and widened students are made from plain ViT or DeiT models, not from "
SWIN = "--student swin_tiny_patch4_window7_224 --teacher-weights random"
TRAIN_MISTAKES = [  # flags, and a word that the line must hold
    ("--student deit_tiny_patch16_224.in1k", "only deit_tiny_patch16_224.fb_in1k"),
    ("--data {0}/absent", "absent/train"),
    ("--data {0}/one --method none", "two or more"),
    ("--data {0}/differ --method none", "not in both: ['b', 'c']"),
    ("--data {0}/corrupt --method none", "0.png"),
    ("--data {0}/heic --method none", "heic/train/b holds no .jpg, .png, ..., only ['"),
    ("--data {0}/bomb --method none", "exceeds limit"),
    ("--data {0}/good", "have 20 classes and the data 3: fine-tune them, with --method none"),
    ("--data {0}/good --method none --batch-size 64", "6 images do not fill a batch of 64"),
    ("--student-layers 0 12 --teacher-layers 0 1", "out of range"),
    ("--student-layers 1 --teacher-layers 1 --first 1", "--first"),
    ("--first 0 --last 0", "cannot be paired"),
    ("--student deit_tiny_distilled_patch16_224 --method none --dry-run", "two classifiers"),
    ("--teacher resnet18 --teacher-weights random --dry-run", "same patch grid"),
    ("--tau 1e6", "tau 1000000.0 is not in (0, 100]"),
    ("--accum 3", "does not divide"),
    ("--teacher-weights {0}/cut.safetensors", "cut.safetensors"),
    ("--teacher-weights {0}/other.pth", "other.pth"),
    ("--teacher-weights {0}/nan.pth", "NaN"),
    ("--teacher-weights {0}/headless.pth", "it has no classifier (--teacher-head random?)"),
    ("--method projector --feature-loss mse", "--feature-loss"),
    ("--method soft --beta 1", "unrecognized arguments: --beta 1"),
    (f"--method lift {SWIN}", NOT_FROM_VIT + "SwinTransformer swin_tiny"),
    ("--method lift --student eva02_tiny_patch14_224 --teacher-weights random", NOT_FROM_VIT),
    ("--method none --variant widened --student vit_pwee_patch16_reg1_gap_256", NOT_FROM_VIT),
    ("--out {0}/run", "--resume"),
    ("--resume --out {0}/run --method soft", "--method none"),
    ("--resume --out {0}/run --lr 0.1", "--lr 0.0005"),
    ("--resume --out {0}/abc --data {0}/renamed", "differ in their classes"),
    ("--resume --out {0}/abc --data {0}/good --train-size 3", "--train-size has no effect here"),
    ("--eval --out {0}/abc --data {0}/renamed", "differ in their classes"),
    ("--eval --out {0}/run --epochs 3", "--epochs has no effect here"),
    ("--eval --out {0}/empty", "empty is not the folder of a run"),
    ("--eval --out {0}/unbegun", "student.safetensors is neither a file"),
    ("--device cuda", "CUDA"),
    ("--student-kwargs embed_dim", "KEY=VALUE"),
    (f"--teacher {TOY} --teacher-weights {TEACHER}", f"does not hold weights of {TOY}"),
    ("--img-size 48", "does not hold weights of cait_toy_patch8_32"),
    ("--method none --student-weights pretrained", "pretrained weights of deit_toy"),
    ("--data {0}/good --method none --img-size 64 --auto-augment nope", "invalid choice: 'nope'"),
    ("--method none --student-weights {0}/absent.pth", "absent.pth is neither a file nor"),
    ("--method none --first 1", "--first has no effect here"),
    ("--workers 2", "--workers has no effect here"),
    ("--teacher-weights {0}/run --teacher cait_toy_patch8_32", "--teacher has no effect here"),
    ("--data {0}/good --teacher-weights {0}/run", "differ in their classes"),
]
ANALYZE_MISTAKES = [
    ("--models nope", "nope"),
    ("--models hiera_tiny_224=random --layers 0", "cannot be read by hooks on its layers [0]"),
    ("--data {0}/absent", "absent"),
    ("--data {0}/empty", "no images"),
    ("--models deit_tiny_patch16_224.in1k=random", "only deit_tiny_patch16_224.fb_in1k"),
    ("--models {0}/young", "{0}/young/student.safetensors is neither a file"),
    ("--models {0}/run=teacher", "run was trained without a teacher"),
    ("--seed -1", "not at least 0"),
    ("--data {0}/flat", "0.png"),
    ("--layers 0 12", "out of range"),
    ("--models deit_toy_patch8_32=weights/cait_toy_shapes.safetensors", "deit_toy_patch8_32"),
    ("--evolution {0}/empty", "empty"),
    ("--out {0}/file", "file"),
]
USUAL = {
    train_kd: {"--recipe": "toy", "--train-size": "64", "--batch-size": "16"},
    analyze: {"--models": EMBEDDED}}
PHOTO_FOLDER = {"--recipe": "toy", "--batch-size": "2"}
MISTAKES = [(train_kd, *row) for row in TRAIN_MISTAKES]
MISTAKES += [(analyze, *row) for row in ANALYZE_MISTAKES]


@pytest.mark.parametrize("program, words, expected", MISTAKES)
def test_main_answers_a_mistake_in_one_line(
        program, words, expected, world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "never"
    words = words.format(world).split()
    usual = USUAL[program]
    if program is train_kd and "--data" in words:
        usual = PHOTO_FOLDER
    if {"--resume", "--eval", "--evolution"} & {*words}:
        usual = {}
    for flag, value in {**usual, "--out": str(out)}.items():
        if flag not in words:
            words += [flag, value]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = {path: path.read_bytes() for path in (world / "run").iterdir()}
    line = refusal(capsys, program.main, words)
    assert expected.format(world) in line
    if program is analyze:  # a message names only flags that the program has
        flags = analyze.make_parser().format_help()
        assert all(flag in flags for flag in re.findall("--[a-z-]+", line))
    assert not models.is_run(out)
    assert {path: path.read_bytes() for path in (world / "run").iterdir()} == before


# ---------- Whole runs, workers, processes, signals


def signal_at(step, number, monkeypatch):
    """Let the program receive a signal just before an update."""
    update = train_kd.update

    def update_or_signal(run, stream):
        if run.step == step:
            signal.raise_signal(number)
        update(run, stream)

    monkeypatch.setattr(train_kd, "update", update_or_signal)


FILES_OF_A_RUN = """config.json log.jsonl in-use-0.lock last.pt best.pt student.safetensors
student_ema.safetensors epoch_0001.pt epoch_0002.pt epoch_0003.pt"""
KILLED_AT_THE_SECOND_EPOCH = """import data, os, train_kd
data.VAL_SIZE = 20
train_kd.report = lambda run: len(run.log) == 2 and os.kill(os.getpid(), 9)
train_kd.main()"""


@unix
def test_train_ends_the_same_when_stopped_twice(tmp_path, monkeypatch, capsys):
    """By kill -9 before the second epoch is recorded, by SIGUSR1 within the third."""
    flags = [*TINY, *"--method projector --epochs 3 --snapshot-every 1".split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    handlers = [*map(signal.getsignal, signal.valid_signals())]
    killed = start("-c", KILLED_AT_THE_SECOND_EPOCH, *flags, "--device", "cpu", "--out", parts)
    train(whole, *flags)
    assert {*os.listdir(whole)} == {*FILES_OF_A_RUN.split()}
    assert killed.wait(60) == -signal.SIGKILL and len(log_of(parts)) == 1
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(9, signal.SIGUSR1, patch)
        train(parts, "--resume")
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert "stopped after step 10" in capsys.readouterr().out
    assert [*map(signal.getsignal, signal.valid_signals())] == handlers
    train(parts, "--resume")
    assert_same_runs(whole, parts)


@unix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_train_stops_in_an_epoch_of_one_update(name, tmp_path, monkeypatch):
    """And the same command line starts the run and goes on with it."""
    flags = [*TINY, "--train-size 16 --method none --epochs 3"]
    number = getattr(signal, name)
    train(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        signal_at(1, number, patch)
        train(tmp_path / "parts", *flags, "--resume")
    assert stopped.value.code == 128 + number
    train(tmp_path / "parts", *flags, "--resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@unix
def test_signals_remembered_leave_an_ignored_one_ignored(monkeypatch):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    run = SimpleNamespace(signal=0)
    try:
        with train_kd.signals_remembered(run):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)
    assert run.signal == signal.SIGTERM


@pytest.mark.parametrize("again", ["", "--resume"])
def test_claimed_refuses_a_second_start(again, tmp_path, monkeypatch, capsys):
    """While the first one trains, and before the second has written anything."""
    def start_again(run, stream):
        before = (tmp_path / "config.json").read_bytes()
        assert f"{tmp_path}/in-use-0.lock" in refusal(capsys, train, tmp_path, *TINY, again)
        assert (tmp_path / "config.json").read_bytes() == before
        sys.exit("done")

    monkeypatch.setattr(train_kd, "update", start_again)
    with pytest.raises(SystemExit, match="done"):
        train(tmp_path, *TINY)


@pytest.fixture
def stained(photos, tmp_path):
    """Photos at 64 px, which are read during training, and one that cannot be."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/train/dark/39.png").write_bytes(b"no image")
    own = "--img-size 64 --workers 0 --method none --student-kwargs depth=1 --data"
    return f"{PHOTOS} {own} {tmp_path}/photos"


@pytest.mark.parametrize("again", ["", "--resume"])
def test_train_may_start_again_after_a_failure_in_the_first_epoch(
        again, stained, tmp_path, capsys):
    """The same command, or --resume alone, and the bad photo was removed."""
    again = again or f"{stained} --epochs 1"
    out = tmp_path / "out"
    assert "39.png" in refusal(capsys, train, out, stained, "--epochs 1")
    (tmp_path / "photos/train/dark/39.png").unlink()
    train(out, again)
    assert len(log_of(out)) == 1
    assert models.read_config(out)["settings"]["method"] == "none"


def test_train_resumes_with_bad_images_skipped(stained, tmp_path, photos, capsys):
    out, bad = tmp_path / "out", tmp_path / "photos/train/dark/39.png"
    shutil.copy(photos / "train/dark/39.png", bad)
    train(out, stained, "--epochs 1")
    bad.write_bytes(b"no image")
    (tmp_path / "photos/val/dark/0.png").unlink()  # validation may change
    assert "--skip-bad-images" in refusal(capsys, train, out, "--resume --epochs 2")
    train(out, "--resume --epochs 2 --skip-bad-images")
    assert "skipped: image" in capsys.readouterr().out
    assert "cpu, bfloat16 off" in (out / "log.jsonl").read_text()
    bad.unlink()
    line = refusal(capsys, train, out, "--resume --epochs 3")
    assert "the run had 80 training images" in line


def test_train_resumes_without_the_weights_it_started_from(photos, tmp_path, monkeypatch, capsys):
    """With a checkpoint they are not needed any more."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begin = tmp_path / "start.safetensors"
    shutil.copy(photos / "run/student.safetensors", begin)
    flags = f"""{PHOTOS} --data {photos} --method soft --teacher-weights {photos}/run
        --student-kwargs depth=2 --student-weights {begin} --epochs 2"""
    train(whole, flags)
    assert "starts from" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_kd, "report", lambda run: len(run.log) == 2 and sys.exit("killed"))
        train(parts, flags)
    begin.unlink()
    train(parts, "--resume")
    assert_same_runs(whole, parts)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_stream_loader_starts_everywhere(method, tmp_path, monkeypatch):
    """Linux forks, macOS and Windows spawn, Python 3.14 has a fork server: the same bits."""
    flags = [*TINY, "drop_path_rate=0.5 --img-size 64 --method none --epochs 1"]
    train(tmp_path / "none", *flags, "--workers 0")
    loader = partial(data.DataLoader, multiprocessing_context=method)
    monkeypatch.setattr(data, "DataLoader", loader)
    several = 2 if method == "fork" else 1  # each of the others takes seconds to start
    train(tmp_path / "some", *flags, "--workers", several)
    assert_same_runs(tmp_path / "none", tmp_path / "some")


@unix
def test_stop_reaches_all_processes(tmp_path, monkeypatch):
    """SIGTERM to torchrun: both finish the step, the first saves, none is left; one goes on."""
    monkeypatch.setattr(data, "VAL_SIZE", 4000)
    flags = [*TINY, *"--train-size 640 --method none --epochs 500 --device cpu".split()]
    process = start(*TWO, "train_kd.py", *flags, "--out", tmp_path)
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)  # ends when nobody holds the pipe any more
    step, = map(int, re.findall(r"stopped after step (\d+)", said))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step
    epoch = step // 40 + 1
    train(tmp_path, "--resume --epochs", epoch)
    assert len(log_of(tmp_path)) == epoch


BATCHNORM = """--student test_resnet --method none --img-size 32 --train-size 320 --batch-size 8
    --lr 1e-3 --epochs 1"""


def small_runs(out):
    """Four epochs of one update with every method; a student with BatchNorm."""
    flags = f"--train-size 16 --batch-size 16 --epochs 4 --warmup-epochs 0 {DEEP}"
    for name in losses.METHODS:
        train(f"{out}/{name}", flags, "--method", name)
    data.VAL_SIZE = 1000
    train(f"{out}/batchnorm", BATCHNORM)
    data.VAL_SIZE = 20


@pytest.fixture(scope="module")
def run_twice(tmp_path_factory):
    """The runs above on one process in one/, and on two in two/."""
    root = tmp_path_factory.mktemp("processes")
    process = start(*TWO, "test_smoke.py", root / "two")
    small_runs(root / "one")
    process.communicate(timeout=120)
    assert process.returncode == 0
    return root


@pytest.mark.parametrize("method", losses.METHODS)
def test_update_on_two_processes_equals_one(method, run_twice):
    """The first four losses, float32, of the same global batches."""
    one, two = log_of(run_twice / "one" / method), log_of(run_twice / "two" / method)
    assert len(one) == len(two) == 4
    for ours, theirs in zip(one, two):
        assert theirs["terms"] == pytest.approx(ours["terms"], rel=1e-5)


def test_evaluate_brings_batchnorm_of_two_processes_together(run_twice, capsys, monkeypatch):
    monkeypatch.setattr(data, "VAL_SIZE", 1000)
    run = run_twice / "two" / "batchnorm"
    line, = log_of(run)
    train(run, "--eval")
    student, average, _ = capsys.readouterr().out.splitlines()
    assert f"top-1 {line['top1']:.2f} %, top-5 {line['top5']:.2f} %" in student
    assert f"top-1 {line['ema_top1']:.2f} %, top-5 {line['ema_top5']:.2f} %" in average


if __name__ == "__main__":
    small_runs(sys.argv[1])
