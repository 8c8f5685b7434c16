"""python -m pytest -q test_smoke.py   (under 3 minutes on 2 cores, no network, no files from elsewhere)

A section a file, in that file's order, then the command lines; tests are called test_<function>_<property>.
"""
import contextlib
import copy
import csv
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import analyze
import data
import losses
import models
import train_kd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "results"))
import speed
import study

torch.set_num_threads(1)  # sums in the same order everywhere
data.VAL_SIZE = 20  # images, not 4000
CPU = torch.device("cpu")
TINY = ["--train-size", "64", "--batch-size", "16", "--student-kwargs", "depth=2", "embed_dim=24"]
unix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signals")
TWO = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"  # processes

# ---------- Helpers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wave(*shape, a=0.7, b=0.31):
    """The input that the golden values belong to: sin(a n) + 0.5 cos(b n + 1) + sin(0.05 n^2 mod 7)."""
    n = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy((np.sin(a * n) + 0.5 * np.cos(b * n + 1) + np.sin((0.05 * n * n) % 7)).reshape(shape))


def settle(*flags):
    """Flags -> settings, data set."""
    typed = train_kd.make_parser().parse_args([*map(str, flags), "--dry-run"])
    return train_kd.resolve(vars(typed), CPU)[:2]


def make(*flags):
    """Flags -> settings, teacher, distiller of a small run."""
    settings, images = settle(*TINY, *flags)
    return settings, *train_kd.build(settings, images.classes)[:2]


def train(out, *flags):
    """A run of the program -> its folder."""
    train_kd.main([*map(str, flags), "--device", "cpu", "--out", str(out)])
    return out


def start(*command):
    """Python with a command line, beside the test; pytest shows its stderr if the test fails."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def log_of(folder):
    """log.jsonl without what differs from run to run: times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in lines]


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)  # to the last bit, through dictionaries and lists


def assert_same_runs(*folders):
    """The same epochs, students and EMAs; the same to go on from."""
    assert_same(*map(log_of, folders))
    for file in ("student", "student_ema"):
        assert_same(*(models.read_weights(folder / f"{file}.safetensors") for folder in folders))
    assert_same(*({**torch.load(folder / "last.pt", weights_only=True), "log": None} for folder in folders))  # times


def epochs(*top1, **terms):
    return [{"top1": each, "ema_top1": each, "seconds": 2.0, "terms": {"kd": 1.23456789, **terms}} for each in top1]


def make_run(folder, method="soft", log=(), layers=(), **settings):
    """A run's folder as analyze.py reads it, around a student of two blocks that was not trained."""
    folder.mkdir(parents=True)
    settings = {**vars(settle(*TINY)[0]), "method": method, "epochs": len(log), "out": str(folder), **settings}
    config = {"settings": settings, "images": {"classes": 20}, "class_names": None, "parameters": {"student": 7},
              "commit": "c", "versions": {"torch": "t"}, "command": "train_kd.py", "layers": {"student": layers}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log), encoding="utf-8")
    student = models.build_model(settings["student"], num_classes=20, variant=settings["variant"], teacher_width=96,
                                 **settings["student_kwargs"])
    safetensors.torch.save_file(student.state_dict(), folder / "student.safetensors")
    for epoch in (1, 2):
        torch.save(student.state_dict(), folder / f"epoch_{epoch:04}.pt")
    return folder


def column(path, *names):
    """The distinct rows of some columns of a CSV, in its order."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(tuple(row[name] for name in names) for row in csv.DictReader(file)))


def draw_folders(root, classes, count=2):
    """A folder of noise for each class: of the first two anyone can tell which is which."""
    for name, base in zip(classes, (150, 0, 75)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = base + np.random.default_rng([i, base, count]).integers(0, 100, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Bright and dark ones in train/ and val/, and a run on them: the teacher-to-be."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 40), ("val", 8)):
        draw_folders(root / split, ["bright", "dark"], count)
    train(root / "run", "--data", root, "--method", "none", "--student", "deit_toy_patch8_32", "--student-kwargs",
          "depth=3", "--epochs", "3")
    return root


# ---------- losses.py


@pytest.mark.parametrize("options, golden", [
    ({}, 0.844308324), ({"label_smoothing": 0.1}, 0.838735681), ({"alpha": 0.5, "tau": 4.0}, 2.338509928)])
def test_soft_kd_loss_golden(options, golden):
    logits_s, logits_t, labels = wave(4, 10), 3 * wave(4, 10, a=0.2), torch.tensor([1, 7, 3, 3])
    assert losses.soft_kd_loss(logits_s, logits_t, labels, **options).item() == pytest.approx(golden, abs=1e-9)
    terms = losses.SoftKD(**{"label_smoothing": 0.0, **options})(labels, logits_s, logits_t=logits_t)
    assert sum(terms.values()).item() == pytest.approx(golden, abs=1e-9)


def pool(wide, channels):
    """Over channels floor(i C_in / C) .. ceil((i + 1) C_in / C), as the losses are defined."""
    ends = [(i * wide.shape[1] // channels, -(-(i + 1) * wide.shape[1] // channels)) for i in range(channels)]
    return torch.stack([wide[:, start:end].mean(1) for start, end in ends], dim=1)


@pytest.mark.parametrize("h, w", [(4, 4), (7, 7), (14, 14), (5, 8)])
def test_spectral_loss_parseval(h, w):
    """The real FFT's columns 0..w/2 weigh 1, those that have a mirror image 2: half the spatial MSE."""
    wide, narrow = wave(2, 15, h, w), wave(2, 6, h, w, a=0.4)
    energy = np.abs(np.fft.fft2((pool(wide, 6) - narrow).numpy(), norm="ortho")) ** 2
    assert losses.feature_mse(wide, narrow).item() == pytest.approx(energy.mean(), rel=1e-12)
    half = energy[..., :w // 2 + 1].mean() / 2
    for maps in ((wide, narrow), (narrow, wide)):
        assert losses.spectral_loss(*maps).item() == pytest.approx(half, rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):  # float32 whatever surrounds it
        assert losses.spectral_loss(wide.float(), narrow.float()).item() == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("width, channels", [(384, 219), (384, 192), (96, 48), (15, 6)])
def test_feature_mse_pools_in_windows(width, channels):
    wide = wave(2, width, 3, 3)
    pooled = pool(wide, channels)
    assert losses.feature_mse(wide, 0 * pooled).item() == pytest.approx(pooled.square().mean().item(), rel=1e-12)
    on_mps = analyze.tokens_of(wide) @ losses._pooling_matrix(width, channels).double()
    torch.testing.assert_close(on_mps, analyze.tokens_of(pooled), rtol=1e-5, atol=1e-6)


def test_check_grids_in_every_loss():
    for loss in (losses.spectral_loss, losses.feature_mse, partial(losses.ProjectorKD(channels=[(6, 6)]).pair_loss, 0)):
        with pytest.raises(ValueError, match="4 x 4 and the teacher's 7 x 7"):
            loss(wave(2, 6, 4, 4), wave(2, 6, 7, 7))
        with pytest.raises(ValueError, match=r"tokens.*\.mT\.unflatten\(2, \(h, w\)\)"):
            loss(wave(2, 16, 6), wave(2, 16, 6))


def test_feature_kd_leaves_out_terms_of_weight_zero_and_names_unequal_widths():
    def terms(method, map_t):
        return method(torch.tensor([0, 1]), wave(2, 5), [wave(2, 6, 4, 4)], wave(2, 5, a=0.2), [map_t])

    for alpha, beta, expected in ((0.9, 0.2, ["ce", "kd", "spectral"]), (0, 0.2, ["ce", "spectral"]),
                                  (1, 0.2, ["kd", "spectral"]), (0.9, 0, ["ce", "kd"])):
        assert [*terms(losses.SpectralKD(alpha=alpha, beta=beta), wave(2, 6, 4, 4, a=0.4))] == expected
    method = losses.SpectralKD()
    method.pair_loss = lambda i, map_s, map_t: (map_s - map_t).square().mean()
    with pytest.raises(ValueError, match="spectral cannot compare a student's map of 6 x 4 x 4 with a teacher's of 12"):
        terms(method, wave(2, 12, 4, 4))


def test_projector_kd_equals_batchnorm_and_linear():
    map_s, map_t, method = wave(2, 6, 4, 4), wave(2, 12, 4, 4, a=0.4), losses.ProjectorKD(channels=[(6, 12)]).double()
    projected = nn.functional.conv2d(map_s, method.projectors[0].weight[:, :, None, None])
    norm = nn.BatchNorm2d(12, affine=False).double()
    for method.norm, expected in (("batch", (norm(projected), norm(map_t))), ("none", (projected, map_t))):
        assert method.pair_loss(0, map_s, map_t).item() == pytest.approx(nn.MSELoss()(*expected).item(), rel=1e-12)


@cache
def leaves(node):
    """{identity: shape} of all parameters in the graph below a node of autograd."""
    own = {id(node.variable): node.variable.shape} if hasattr(node, "variable") else {}
    return dict(item for part in (own, *(leaves(to) for to, _ in node.next_functions if to)) for item in part.items())


@pytest.mark.parametrize("variant", models.VARIANTS)
@pytest.mark.parametrize("method", losses.METHODS)
def test_distiller_one_step_moves_all_that_learns(method, variant):
    _, teacher, distiller = make("--method", method, "--variant", variant)
    optimizer = create_optimizer_v2(distiller, "adamw", lr=1e-2, weight_decay=0.05)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, held)} == {*map(id, distiller.parameters())} and len(held) == len({*map(id, held)})
    undecayed = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in distiller.named_parameters():
        assert (id(parameter) in undecayed) == (parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token"))), name
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    taught_by = copy.deepcopy(teacher.state_dict()) if teacher else {}
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    loss = sum(distiller.train()(images, labels, teacher(images) if teacher else None)[1].values())
    assert leaves(loss.grad_fn) == {id(p): p.shape for p in held}  # all that the loss depends on is trained
    loss.backward()
    optimizer.step()
    assert [name for name, p in distiller.named_parameters() if torch.equal(p, before[name])] == []
    if teacher:
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(value, taught_by[key]) for key, value in teacher.state_dict().items())


# ---------- models.py


@pytest.mark.parametrize("name, size, layers", [
    ("vit_tiny_patch16_224", 64, [0, 5, 11]), ("deit_tiny_distilled_patch16_224", 64, [11]),
    ("cait_xxs24_224", 64, [0, 12, 23]), ("swin_tiny_patch4_window7_224", 224, [0, 3]),
    ("resnet18", 64, [0, 1, 4]), ("levit_128s", 224, [0, 2])])
def test_hooked_model_equals_forward_intermediates(name, size, layers):
    model = models.build_model(name, num_classes=10, img_size=size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=layers, norm=False, intermediates_only=True)
        hooked = models.HookedModel(model, layers)
        duplicate = copy.deepcopy(hooked)
        for each in (hooked, duplicate):
            logits, maps = each(images)
            assert torch.equal(logits, model(images))
            assert all(map(torch.equal, maps, expected)) and len(maps) == len(expected)
        for parameter in duplicate.parameters():
            parameter.mul_(2)  # the copy's hooks must see the copy
        assert not torch.equal(duplicate(images)[1][0], hooked(images)[1][0])


def test_hooked_model_has_its_own_statistics():
    model = models.build_model("resnet18", num_classes=10).eval()  # ImageNet mean and std
    raw, own = torch.rand(2, 3, 64, 64), torch.tensor([0.485, 0.456, 0.406, 0.229, 0.224, 0.225]).view(2, 3, 1, 1)
    with torch.no_grad():
        expected = model((raw - own[0]) / own[1])
        logits, _ = models.HookedModel(model, [], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).eval()((raw - 0.5) / 0.5)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name, size, options", [
    ("deit_toy_patch8_32", 32, dict(depth=1)),
    ("cait_toy_patch8_32", 32, dict(depth=1, depth_token_only=1)),
    ("swin_tiny_patch4_window7_224", 56, dict(depths=(1, 1), num_heads=(2, 4), embed_dim=16, drop_path_rate=0))])
def test_hooked_model_compiles_to_one_graph(name, size, options):
    """Student and teacher, hooks included: no graph break, no second compilation, the same maps and gradients."""
    model = timm.create_model(name, num_classes=5, img_size=size, **options)
    model = models.HookedModel(model, range(options.get("depth", 2)))
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    batches = torch.randn(2, 2, 3, size, size)

    def run(images):
        logits, maps = model(images)
        loss = logits.sum() + sum(A.square().mean() for A in maps)
        with torch.no_grad():
            taught = teacher(images)
        return logits, maps, torch.autograd.grad(loss, [*model.parameters()]), taught

    expected = [run(images) for images in batches]
    for each in (model, teacher):
        each.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    found = [run(batches[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(run(batches[1]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_stages_and_choose_layers():
    for name, layers in (("regnetx_002", range(1, 5)), ("resnet18", range(1, 5)), ("mobilevit_xxs", range(5)),
                         ("vit_tiny_patch16_224", range(12))):
        assert models.stages(timm.create_model(name)) == [*layers]  # all but a stem
    assert models.choose_layers(2, 6, 12) == [0, 1, 6, 7, 8, 9, 10, 11]  # SK's student list
    assert models.choose_layers(2, 6, 24) == [0, 1, 18, 19, 20, 21, 22, 23]  # and its teacher list
    assert models.choose_layers(8, 8, 12) == list(range(12))
    with pytest.raises(ValueError):
        models.choose_layers(0, 13, 12)


@pytest.mark.parametrize("variant, count", [("plain", 5_717_416), ("lifted", 5_983_528), ("widened", 7_313_896)])
def test_build_model_has_the_published_parameter_counts_and_all_of_the_drop_path(variant, count):
    model = models.build_model("deit_tiny_patch16_224", num_classes=1000, variant=variant, teacher_width=384,
                               drop_path_rate=0.2)
    assert sum(p.numel() for p in model.parameters()) == count
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates[-2:] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("variant, classes, new", [
    ("plain", 20, "nothing"), ("plain", 2, "(classifier drawn afresh)"), ("lifted", 20, "blocks.2"),
    ("widened", 20, "blocks.2")])
def test_start_from_weights(variant, classes, new, tmp_path):
    def begin(model, variant="plain"):
        return models.start_from(model, "deit_toy_patch8_32", str(tmp_path / "weights.pth"), 32, variant)

    build = partial(models.build_model, "deit_toy_patch8_32", num_classes=classes, depth=3)
    theirs, student = build(num_classes=20).state_dict(), build(variant=variant, teacher_width=96)
    torch.save(theirs, tmp_path / "weights.pth")
    said, ours = begin(student, variant), student.state_dict()
    assert new in said.split("without a place")[0] and said.count("\n") == 0
    same = "cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"
    assert_same({key: ours[key] for key in same}, {key: theirs[key] for key in same})
    if variant == "lifted":
        assert torch.equal(ours["blocks.2.0.attn.qkv.weight"], theirs["blocks.2.attn.qkv.weight"])
    assert torch.equal(ours["head.weight"], theirs["head.weight"]) == (variant == "plain" and classes == 20)
    said = begin(build(depth=2))
    assert "without a place: blocks.2" in said and ("nothing" in said) == (classes == 20)
    with pytest.raises(ValueError, match="width 48, depth 3"):
        begin(build(embed_dim=24))
    torch.save({key: value for key, value in theirs.items() if "head" not in key}, tmp_path / "weights.pth")
    assert "classifier drawn afresh" in begin(student, variant)


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_load_student_of_every_variant(variant, tmp_path):
    """A run's student whole, ready for use, whatever its variant; from its snapshots as well."""
    train(tmp_path, *TINY, "--method", "none", "--variant", variant, "--epochs", "1")
    state = torch.load(tmp_path / "last.pt", weights_only=True)["distiller"]
    for file in ("student.safetensors", "best.pt"):
        student = models.load_student(tmp_path, file).eval()
        assert_same({f"student.model.{key}": value for key, value in student.state_dict().items()}, state)
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 20)
    if variant == "plain":  # loads into timm without this repository's help
        alone = timm.create_model("deit_toy_patch8_32", num_classes=20, depth=2, embed_dim=24,
                                  checkpoint_path=tmp_path / "student.safetensors")
        assert_same(alone.state_dict(), student.state_dict())
    with pytest.raises(ValueError, match="epoch_0099.pt"):
        models.load_student(tmp_path, "epoch_0099.pt")


def test_load_student_on_one_photo(photos, tmp_path):
    """The five lines of README's `Your own images`. From 64 px images are cropped as in the run's validation."""
    student = models.load_student(photos / "run").eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    for number, name in enumerate(models.read_config(photos / "run")["class_names"]):
        image = Image.open(photos / "val" / name / "0.png").convert("RGB")
        with torch.no_grad():
            assert student(transform(image)[None]).softmax(-1)[0].argmax() == number
    for size, expected in ((64, 0.8), (32, 1)):
        student = models.load_student(make_run(tmp_path / str(size), img_size=size, crop_pct=0.8), trained=False)
        assert timm.data.resolve_model_data_config(student)["crop_pct"] == expected
    assert timm.get_pretrained_cfg("deit_toy_patch8_32").crop_pct == 1


class Mark(SimpleNamespace):
    """A pickle that would leave a file when read."""

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_read_weights_takes_tensors_and_runs_no_code(tmp_path):
    path, state = tmp_path / "some.pth", {"a": torch.ones(1)}
    torch.save({"state_dict_ema": state, "epoch": 3}, path)
    assert_same(models.read_weights(path), state)
    for found, expected in (({"teacher": state, "student": state}, "holds teacher, student: save the state_dict that"),
                            ({"model": state, "top1": np.float64(1)}, r"save model.state_dict\(\) alone"),
                            ({"model": Mark(path=tmp_path / "mark")}, "some.pth")):
        torch.save(found, path)
        with pytest.raises(ValueError, match=expected) as error:
            models.read_weights(path)
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["some.pth"]


def test_choose_device_by_default(monkeypatch):
    there = {"cuda": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert models.choose_device().type == "cpu"
    with pytest.raises(ValueError, match="MPS device each and there are 0"):
        models.choose_device("mps")
    for device in ("mps", "cuda"):
        there[device] = True
        assert models.choose_device().type == device and models.choose_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes want a CUDA device each and there are 1"):
        models.choose_device()


def test_default_amp_is_on_where_it_helps(monkeypatch):
    for device, native, size, expected in (
            ("cuda", True, 224, "both"), ("cuda", True, 32, "off"), ("cuda", False, 224, "off"),  # T4, V100: emulated
            ("cpu", True, 224, "both"), ("cpu", True, 32, "off"), ("cpu", False, 224, "off"), ("mps", True, 64, "off")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
        monkeypatch.setattr(models, "cpu_info", {"flags": "sse avx512_bf16" if native else "", "model name": "any"}.get)
        assert models.default_amp(torch.device(device), size) == expected


# ---------- data.py


def test_draw_shapes_depends_on_seed_and_index_only():
    few, many = data.draw_shapes(30), data.draw_shapes(2100)
    assert torch.equal(few[0], many[0][:30]) and torch.equal(few[1], many[1][:30])
    assert many[1].bincount().tolist() == [105] * 20
    for other in (data.draw_shapes(30, "val"), data.draw_shapes(30, seed=1)):
        assert not torch.equal(few[0], other[0])


def test_folder_holds_images_alone(photos, tmp_path, capsys):
    """.jfif among them, classes by symbolic links; no hidden folders, and other files are counted."""
    for split in ("train", "val"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir(parents=True)
        (tmp_path / split / "bright").symlink_to(photos / split / "bright")
        (tmp_path / split / "dark").mkdir()
        for name in ("dark/0.jfif", ".ipynb_checkpoints/0.png"):
            shutil.copy(photos / split / "dark/0.png", tmp_path / split / name)
        (tmp_path / split / "dark/notes.txt").touch()
    images = data.open_data(str(tmp_path))
    assert images.names == ["bright", "dark"] and images.counts() == {"train": 41, "val": 9, "classes": 2}
    assert capsys.readouterr().out.count("warning: 1 files in ") == 2  # one a split
    assert len(analyze.open_images(str(tmp_path), 99, seed=0)) == 9


def test_load_image_of_more_than_8_bits(tmp_path):
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "16.png")
    assert np.asarray(data.load_image(tmp_path / "16.png"))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]
    for mode in "IF":
        Image.new(mode, (3, 3)).save(tmp_path / f"{mode}.tiff")
        with pytest.raises(data.BadImage, match=f"image .*{mode}.tiff .pixels of mode {mode} have no known range"):
            data.load_image(tmp_path / f"{mode}.tiff")


@pytest.mark.parametrize("repeats", [1, 3])
def test_training_batches_do_not_depend_on_processes(repeats):
    args = dict(seed=3, epoch=2, repeats=repeats)
    whole = data.training_batches(100, 24, **args)
    parts = [data.training_batches(100, 24, **args, accum=2, rank=rank, world=3) for rank in range(3)]
    for update, batch in enumerate(whole):
        together = np.concatenate([part[2 * update + micro] for part in parts for micro in range(2)])
        assert sorted(map(tuple, together)) == sorted(map(tuple, batch))
    assert len(set(map(tuple, np.concatenate(whole)))) == 96  # no (image, repeat) twice
    assert all(np.array_equal(a, b) for a, b in zip(whole[2:], data.training_batches(100, 24, **args, start=2)))
    assert not np.array_equal(whole[0], data.training_batches(100, 24, seed=3, epoch=3, repeats=repeats)[0])


def test_evaluation_batches_hold_every_image_once():
    for world in (1, 2, 3, 7):
        parts = [keys for rank in range(world) for keys in data.evaluation_batches(5, 2, rank=rank, world=world)]
        assert sorted(np.concatenate(parts)[:, 0]) == [0, 1, 2, 3, 4]


def test_pad_crop_flip_moves_and_mirrors():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    still, shifted, mirrored = data.pad_crop_flip(image.repeat(3, 1, 1, 1), torch.tensor(
        [[0.5, 0.5, 0.9], [0.0, 0.5, 0.9], [0.5, 0.5, 0.1]]), padding=2)
    assert torch.equal(still, image[0]) and torch.equal(mirrored, image[0].flip(-1))
    assert torch.equal(shifted[:, 2:], image[0, :, :3]) and not shifted[:, :2].any()


def test_build_loaders_sends_bytes():
    """A quarter of float32; normalised on the device to what timm's own transform gives; erased there by image."""
    dataset = data.Shapes(8, "train")
    statistics = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    args = dict(img_size=64, device=CPU, workers=0, **statistics)
    loader, val_loader = data.build_loaders(dataset, dataset, random_erasing=1.0, **args)
    keys = data.evaluation_batches(8, 8)
    images, labels, _ = next(val_loader.pool.load(1, keys, 0))
    assert images.dtype == torch.uint8 and images.nbytes == 8 * 3 * 64 * 64
    transform = data.create_transform(64, interpolation="bicubic", crop_pct=0.875, **statistics)
    expected = torch.stack([transform(dataset[i][0]) for i in range(8)])
    torch.testing.assert_close(next(val_loader.load(keys))[0], expected, rtol=1e-5, atol=1e-6)
    plain, _ = data.build_loaders(dataset, dataset, **args)
    erased, whole = (next(each.load(keys, 3))[0] for each in (loader, plain))
    alone = next(loader.load([keys[0][5:6]], 3))[0]
    assert torch.equal(alone[0], erased[5])  # whatever the batch around it
    changed = (erased != whole).any(1).flatten(1).float().mean(1)
    assert (changed > 0).all() and (changed < 0.5).all() and len({*changed.tolist()}) > 1


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0"])
def test_build_loaders_augments_at_the_limits(policy):
    """Every operation at its ends: timm's posterize asks for 0 bits there, which Pillow may refuse."""
    loader, _ = data.build_loaders(*[data.Shapes(100, "train")] * 2, img_size=64, mean=(0.5,) * 3, std=(0.5,) * 3,
                                   device=CPU, workers=0, auto_augment=policy)
    assert next(loader.load(data.training_batches(100, 100, seed=0, epoch=0), 0))[0].isfinite().all()


# ---------- train_kd.py


@pytest.mark.parametrize("program", [train_kd, analyze])
def test_main_lets_no_thread_spin(program, monkeypatch):
    begin = Path(program.__file__).read_text(encoding="utf-8").split("import argparse")[0]  # before PyTorch
    monkeypatch.delenv("GOMP_SPINCOUNT")
    for expected in ("10000", "7"):
        exec(begin)
        assert os.environ["GOMP_SPINCOUNT"] == expected
        os.environ["GOMP_SPINCOUNT"] = "7"


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA tensors without a card: they know shape, dtype and device, refuse to mix devices, and have no values, so
    that nothing can wait for one. Autograd's engine wants a driver: gradients are put in place of its backward pass."""
    pytest.importorskip("torch", "2.15", reason="2.6 crashes on fake CUDA tensors where there is no driver")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "Generator", lambda device=None, on_cpu=torch.Generator: on_cpu())

    def on_cuda(tensor):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def update(*flags, plant):
        settings, teacher, distiller = make(*flags)
        twin = copy.deepcopy(distiller.student)  # the EMA's: fake tensors cannot be copied deep
        monkeypatch.setattr("timm.utils.model_ema.deepcopy", lambda model: twin)
        with FakeTensorMode():
            for module in (module for model in (teacher, distiller, twin) if model for module in model.modules()):
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: on_cuda(tensor) for name, tensor in tensors.items() if tensor is not None})
            run = train_kd.Run(settings, torch.device("cuda"), teacher, distiller, (SimpleNamespace(size=64), None))
            plant(run)
            images, labels = torch.empty(8, 3, 32, 32, device="cuda"), torch.empty(8, dtype=torch.long, device="cuda")

            def backward(loss):
                assert loss.device.type == "cuda" and loss.requires_grad
                for parameter in distiller.parameters():
                    parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
            train_kd.update(run, iter([(images, labels)] * settings.accum))
            return run.sums

    return update


@pytest.mark.parametrize("amp", ("off", "teacher", "student", "both"))
@pytest.mark.parametrize("method", losses.METHODS)
def test_update_stays_on_the_device(method, amp, fake_cuda):
    """Forward passes, losses, fused AdamW and EMA mix no devices and never wait for one, in every --amp mode."""
    dtypes = set()
    shallow = () if method == "none" else ("--teacher-weights", "random", "--teacher-kwargs", "depth=2")
    sums = fake_cuda("--method", method, "--amp", amp, "--accum", "2", *shallow, plant=lambda run: [
        getattr(run, who).register_forward_hook(lambda model, args, said, who=who: dtypes.add((who, said[0].dtype)))
        for who in ("teacher", "student") if getattr(run, who)])
    half = {who for who, dtype in dtypes if dtype == torch.bfloat16}
    assert half == {who for who, _ in dtypes if amp in (who, "both")}
    assert sums and all(each.device.type == "cuda" and each.shape == () for each in sums.values())


def test_update_on_fake_cuda_finds_what_it_should(fake_cuda):
    for planted, word in ((lambda module, args, output: output[0] + torch.zeros(8, 20), "cpu"),
                          (lambda module, args, output: output[0].sum().item(), "_local_scalar_dense")):
        with pytest.raises(Exception, match=word):
            fake_cuda("--method", "spectral", plant=lambda run: run.distiller.register_forward_hook(planted))


def test_make_parser_knows_a_new_method(tmp_path, monkeypatch, capsys):
    """Flag, help, and place in config.json follow from the constructor: nothing outside losses.py names `power`."""
    class Powered(losses.FeatureKD):
        """power: the exponent of the difference"""
        name, term = "powered", "powered"

        def __init__(self, power=2, signed=True, **feature):
            super().__init__(**feature)
            self.power = power

        def pair_loss(self, i, map_s, map_t):
            return (map_s.mean((1, 2, 3)) - map_t.mean((1, 2, 3))).abs().pow(self.power).mean()

    monkeypatch.setitem(losses.METHODS, "powered", Powered)
    shown = " ".join(train_kd.make_parser().format_help().split())
    assert "--power" in shown and "the exponent of the difference (powered 2)" in shown
    args, _, distiller = make("--method", "powered", "--power", "3", "--no-signed")
    assert (args.power, args.signed, distiller.method.power) == (3, False, 3)
    train(tmp_path, *TINY, "--epochs", "1", "--method", "powered")
    settings = models.read_config(tmp_path)["settings"]
    assert (settings["power"], settings["signed"]) == (2, True) and "powered" in log_of(tmp_path)[0]["terms"]
    with pytest.raises(SystemExit, match="2"):
        make("--method", "powered", "--power", "2.5")
    assert "--power: invalid int value: '2.5'" in capsys.readouterr().err
    for name, default in (("power", None), ("epochs", 3)):
        monkeypatch.setattr(Powered, "options", lambda: {name: (default, "")})
        with pytest.raises(SystemExit, match="2"):
            train_kd.make_parser()
        assert f"error: losses.Powered: its argument '{name}' is" in capsys.readouterr().err


@pytest.mark.parametrize("count, flags, expected", [
    (1_281_167, "", (2048, 3, 2e-3, 1e-5)),
    (1_281_167, "--batch-size 512", (512, 3, 5e-4, 1e-5)),
    (1_281_167, "--student-weights pretrained", (2048, 1, 1e-4 * 32 ** 0.5, 1e-5)),
    (1000, "", (32, 1, 2e-3 / 8, 1e-5)),
    (80, "--student deit_toy_patch8_32", (4, 1, 2e-3 / 4, 1e-5)),
    (4000, "--student deit_toy_patch8_32 --batch-size 32", (32, 1, 1e-3, 1e-5)),
    (4000, "--student deit_toy_patch8_32 --lr 5e-6", (64, 1, 5e-6, 5e-7))])
def test_resolve_fits_the_recipe_to_the_data(count, flags, expected, monkeypatch):
    """The rate by the square root for a batch that fits the data, linearly for a typed one; the last is a tenth."""
    images = data.Images([(Image.new("RGB", (500, 375)), 0)] * count, [], 1000, None)
    monkeypatch.setattr(data, "open_data", lambda *args, **options: images)
    args, _ = settle("--data", "any", *flags.split())
    assert (args.batch_size, args.repeats, args.lr, args.min_lr) == pytest.approx(expected)
    types = [{name: type(value) for name, value in recipe.items()} for recipe in train_kd.RECIPES.values()]
    assert types[0] == types[1] == types[2] and None not in vars(args).values()


def test_write_leaves_the_former_file_on_a_full_disk(tmp_path):
    def half(path):
        path.write_text("fo")
        raise RuntimeError("no\nspace")  # as torch.save has it; others raise OSError

    (tmp_path / "last.pt").write_text("former")
    with pytest.raises(OSError, match=r"cannot write .*last.pt \(no space\): make room"):
        train_kd.write(tmp_path / "last.pt", half)
    assert os.listdir(tmp_path) == ["last.pt"] and (tmp_path / "last.pt").read_text() == "former"


def test_open_folder_keeps_the_command_and_what_is_not_the_run(tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "a run", [*TINY, "--method", "none", "--epochs"]
    out.mkdir()
    (out / "holiday.png").touch()
    (out / "notes.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["train_kd.py", *flags, "1", "--out", str(out)])
    train(out, *flags, "1")
    train(out, "--resume", "--epochs", "2")
    assert capsys.readouterr().out.count("new cosine") == 1
    assert shlex.split(models.read_config(out)["command"]) == [*sys.argv, "--epochs", "2"]
    (out / "epoch_0099.pt").touch()
    train(out, *flags, "1", "--overwrite")
    assert {*out.iterdir()} - {*train_kd.run_files(out)} == {out / "holiday.png", out / "notes.jsonl"}
    assert not (out / "epoch_0099.pt").exists() and len(log_of(out)) == 1


def test_show_teacher_warns_near_chance_unless_it_is_meant(photos, tmp_path, capsys):
    state = models.read_weights(photos / "run/student.safetensors")
    torch.save({**state, "head.bias": torch.tensor([99.0, 0.0])}, tmp_path / "dull.pth")  # everything is bright
    flags = "--teacher deit_toy_patch8_32 --teacher-kwargs depth=3 --student-kwargs depth=1 --epochs 1".split()
    for weights, warned in ((tmp_path / "dull.pth", True), ("random", False)):
        train(tmp_path / str(warned), "--method", "soft", "--data", photos, "--teacher-weights", weights, *flags)
        assert ("near chance (50.00 %)" in capsys.readouterr().out) == warned


def test_show_accuracy_equals_the_log_on_one_process_and_two(photos, capsys):
    run = photos / "run"
    last, before = log_of(run)[-1], {path: path.read_bytes() for path in run.iterdir()}
    two = start(*TWO, "train_kd.py", "--eval", "--out", run, "--device", "cpu")
    train(run, "--eval")
    one = capsys.readouterr().out.splitlines()
    assert one == two.communicate(timeout=60)[0].splitlines() and len(one) == 2 and two.returncode == 0
    for line, name, prefix in zip(one, ("student", "its EMA"), ("", "ema_")):
        assert line.startswith(f"{name}: top-1 {last[prefix + 'top1']:.2f} %, top-5 {last[prefix + 'top5']:.2f} %")
        assert line.endswith("16 images; lowest: bright 100 %, dark 100 %")
    assert {path: path.read_bytes() for path in run.iterdir()} == before


# ---------- analyze.py


def numpy_ranks(energies, levels=analyze.LEVELS):
    """Smallest k with a share >= level, the plain way. energies [images, C] -> [images, levels]."""
    shares = np.cumsum(energies, axis=1) / energies.sum(1, keepdims=True)
    return [[int(np.argmax(row >= level)) + 1 for level in levels] for row in shares]


def numpy_entropy(A, lo, hi):
    """DD Eq. 3 and 4 with numpy.histogram, token by token. [B, C, h, w] -> [B, h, w]."""
    counts = np.apply_along_axis(lambda token: np.histogram(token, bins=100, range=(lo, hi))[0], 1, A.numpy())
    p = counts / A.shape[1]
    return -(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(1)


def test_spectral_loss_and_metrics_golden():
    for C_s, C_t, size, golden in ((6, 12, 4, 1.049374114), (12, 12, 7, 0.706133631), (6, 15, 14, 0.563001475)):
        map_s, map_t = wave(2, C_s, size, size), wave(2, C_t, size, size, a=0.4, b=0.9)
        assert losses.spectral_loss(map_s, map_t).item() == pytest.approx(golden, abs=1e-9)
    A, X = wave(3, 2, 16, 3, 3), wave(5, 20, 12)
    entropies = [analyze.entropy_map(layer, A.min(), A.max()).mean().item() for layer in A]
    found = [*analyze.channel_spectrum(A[0])[:2].tolist(), *entropies, *analyze.sep_curve(X)[:2].tolist()]
    assert found == pytest.approx(
        [0.65610145, 0.14649592, 3.76296992, 3.76296992, 3.78812656, 7.46693440, 30.93371383], abs=1e-8)
    assert [analyze.energy_ranks(X)[0].tolist(), analyze.pca_ranks(X, analyze.second_moment(X))[0].tolist()] == [
        [4, 6, 8, 10], [6, 8, 10, 11]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C, h, w", [(16, 3, 3), (15, 2, 4), (192, 5, 5), (7, 1, 1)])
def test_metrics_equal_numpy(C, h, w, dtype):
    A = torch.randn(3, C, h, w, dtype=dtype) * 3 + 1
    X, tolerance = A.flatten(2).mT, dict(rel=1e-5 if dtype is torch.float32 else 1e-12)
    tokens = X.numpy().astype(np.float64)
    assert analyze.channel_spectrum(A).dtype == dtype
    spectrum = np.abs(np.fft.fft(tokens) / C).mean((0, 1))
    assert analyze.channel_spectrum(A).numpy() == pytest.approx(spectrum, **tolerance)
    assert analyze.magnitude(A).item() == pytest.approx(np.abs(tokens).mean(), **tolerance)
    lo, hi = A.min().item(), A.max().item()
    assert analyze.entropy_map(A, lo, hi).numpy() == pytest.approx(numpy_entropy(A, lo, hi), **tolerance)
    singular = np.linalg.svd(tokens, compute_uv=False)
    assert analyze.energy_ranks(X).tolist() == numpy_ranks(singular ** 2)
    moment = np.einsum("bnc,bnd->cd", tokens, tokens) / (3 * h * w)
    assert analyze.second_moment(X).numpy() == pytest.approx(moment, rel=1e-6, abs=1e-6)
    basis = np.linalg.eigh(moment)[1][:, ::-1]
    assert analyze.pca_ranks(X, torch.from_numpy(moment)).tolist() == numpy_ranks(((tokens @ basis) ** 2).sum(1))
    energy = np.abs(np.fft.fft(tokens)) ** 2
    curve = 100 * np.cumsum(energy / energy.sum(-1, keepdims=True), axis=-1).mean((0, 1))
    assert analyze.sep_curve(X).numpy() == pytest.approx(curve, **tolerance)
    bands = [(np.argmax(curve >= level) + 1) / C for level in analyze.BANDS]
    assert analyze.sep_bandwidth(torch.from_numpy(curve)).tolist() == pytest.approx(bands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_map_on_bin_edges(dtype):
    """Every edge, and the numbers just below and above it, fall where numpy.histogram puts them."""
    for lo, hi in ((-1.0, 1.0), (0.1, 0.7), (-3.3, 12.7)):
        edges = torch.from_numpy(np.linspace(lo, hi, 101)).to(dtype)
        above, below = (edges.nextafter(torch.tensor(end).to(dtype)) for end in (9e9, -9e9))
        around = torch.cat([edges, above, below])
        lo, hi = edges[0].item(), edges[-1].item()
        around = around[(around >= lo) & (around <= hi)]
        A = torch.stack([around.roll(i)[:40] for i in range(len(around))]).view(-1, 40, 1, 1)
        assert analyze.entropy_map(A, lo, hi).numpy() == pytest.approx(numpy_entropy(A, lo, hi), abs=1e-6)


def test_metrics_of_degenerate_input():
    constant, zeros = torch.full((1, 8, 2, 2), 3.0), torch.zeros(1, 4, 8)
    assert analyze.entropy_map(constant, 3.0, 3.0).tolist() == [[[0, 0], [0, 0]]]
    assert analyze.channel_spectrum(constant).tolist() == pytest.approx([3] + [0] * 7, abs=1e-6)
    assert analyze.energy_ranks(constant.flatten(2).mT).tolist() == [[1, 1, 1, 1]]
    assert analyze.energy_ranks(zeros).tolist() == analyze.pca_ranks(zeros, torch.eye(8)).tolist() == [[1, 1, 1, 1]]
    X = torch.randn(1, 4, 8)
    with_zero = torch.cat([X, torch.zeros(1, 1, 8)], dim=1)  # a token of zeros has no pattern
    assert torch.equal(analyze.sep_curve(with_zero), analyze.sep_curve(X)) and not analyze.sep_curve(zeros).any()
    assert analyze.sep_bandwidth(analyze.sep_curve(torch.ones(1, 1, 8))).tolist() == [1 / 8] * 5  # all in frequency 0


def test_sep_curve_is_flat_because_channels_have_no_order():
    """Not because spectra of real signals are symmetric: noise + 1 is as real and as symmetric."""
    noise, flat = torch.randn(8, 196, 192), pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9], abs=0.05)
    shifted = pytest.approx([0.005, 0.20, 0.41, 0.60, 0.80], abs=0.01)
    for X, expected in ((noise, flat), (torch.randn(8, 196, 1) * torch.randn(192), flat), (noise + 1, shifted)):
        assert analyze.sep_bandwidth(analyze.sep_curve(X)).tolist() == expected


def test_maps_leave_mps():
    """MPS has neither float64 nor eigvalsh: the model runs there (here: in name only), and the CPU measures."""
    args = analyze.make_parser().parse_args(["--models", "cait_toy_patch8_32=random"])
    subject, noise, pattern = analyze.open_subjects(args, CPU)
    with FakeTensorMode():
        subject.transform = lambda image: torch.empty(3, 32, 32)
        subject.model = lambda images: (None, [torch.empty(len(images), 96, 4, 4, device="mps") for _ in range(12)])
        for each in (subject, noise, pattern):
            maps = each.maps(0, [lambda: None] * 2)
            assert [(A.device.type, A.shape) for A in maps] == [("cpu", (2, 96, 4, 4))] * 12


def test_measure_streams(tmp_path, monkeypatch):
    """What main writes does not depend on the batches, and equals the metrics of all images at once."""
    flags = ["--models", "deit_toy_patch8_32=random", "--images", "7", "--model-kwargs", "depth=2", "embed_dim=24",
             "--no-controls", "--entropy-range", "global", "layer"]
    for size in ("2", "7"):
        analyze.main([*flags, "--batch-size", size, "--out", str(tmp_path / size)])
        monkeypatch.setattr(analyze, "draw_all", lambda *args: None)  # once is enough
    expected = {name for name in analyze.FILES if not name.startswith(("evolution", "curves"))} - {"entropy_layer.csv"}
    assert {*os.listdir(tmp_path / "2")} == expected and len(expected) == 16

    def values(size, name):
        lines = (tmp_path / size / f"{name}.csv").read_text().splitlines()[1:]
        return [float(line.rpartition(",")[2]) for line in lines]

    for name in ("entropy", "magnitude", "spectra", "sep"):
        assert values("2", name) == pytest.approx(values("7", name), rel=1e-4)
    subject, = analyze.open_subjects(analyze.make_parser().parse_args(flags), CPU)
    with torch.no_grad():
        maps = subject.maps(0, analyze.open_images("shapes", 7, 0))
    lo, hi = min(A.min() for A in maps).item(), max(A.max() for A in maps).item()
    ours = [analyze.entropy_map(A, lo, hi).mean().item() for A in maps]
    assert values("7", "entropy")[:2] == pytest.approx(ours, rel=1e-5)  # the rest is of the other range


def test_analyse_the_newest_run(tmp_path, monkeypatch, capsys):
    """From any folder and where text is ASCII: the embedded teacher (of `none` as well), the student, one untrained."""
    monkeypatch.chdir(tmp_path)
    run = str(make_run(Path("runs/none-0"), "none", epochs(1.0)))
    flags = ["--images", "2", "--layers", "0", "1", "--no-layer-ranks", "--out", "out"]
    command = [sys.executable, "-X", "utf8=0", HERE / "analyze.py", *flags, "--entropy-range", "layer"]
    done = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, check=True)
    said = done.stdout.decode("ascii")
    labels = ["teacher cait_toy_patch8_32", run, "untrained cait_toy_patch8_32", "white noise", "rank 1"]
    assert f"on shapes: {', '.join(labels)}" in said and analyze.make_parser().format_help().isascii()
    assert column("out/entropy.csv", "model") == [(label,) for label in labels]
    assert column("out/entropy.csv", "layer", "module") == [("1", "blocks.0"), ("2", "blocks.1")]  # counted from 1
    assert sorted(said.splitlines()[-1].split("done: out: ")[1].split(", ")) == sorted(os.listdir("out"))
    assert "entropy_layer.png" in said and "entropy.png" not in said and "curves.png" in said
    Path("out/notes.txt").touch()  # of another hand: stays
    analyze.main(flags)
    named = capsys.readouterr().out.split("done: out: ")[1].strip().split(", ")
    assert {*os.listdir("out")} - {*named} == {"notes.txt"}
    assert "entropy.png" in named and "entropy_layer.png" not in named


def test_analyse_a_run_on_its_own_images(photos, tmp_path, monkeypatch, capsys):
    """Labelled as it was typed. In a folder without an earlier analysis nothing is removed."""
    monkeypatch.chdir(photos)
    (tmp_path / "evolution.png").touch()
    analyze.main(["--models", "run", "--images", "2", "--layers", "0", "--no-controls", "--out", str(tmp_path)])
    assert f"on {photos}: run\n" in capsys.readouterr().out
    assert {"evolution.png", "curves.png"} < {*os.listdir(tmp_path)}


def test_open_subjects_of_a_run(tmp_path):
    """Its teacher may be random, or another run's student; its untrained twin is built as it was."""
    lifted = str(make_run(tmp_path / "lifted", variant="lifted"))
    args = analyze.make_parser().parse_args(["--layers", "0", "--no-controls"])
    for weights, kind in (("random", "untrained"), (lifted, "teacher")):
        run = str(make_run(tmp_path / kind, teacher_weights=weights))
        teacher, student = analyze.open_subjects(args, CPU, run)
        assert (teacher.kind, student.kind, student.label) == (kind, "student", run)
    args = analyze.make_parser().parse_args(["--models", lifted, analyze.EMBEDDED])
    student, model, twin, *_ = subjects = analyze.open_subjects(args, CPU)
    labels = [lifted, analyze.EMBEDDED, "untrained lifted deit_toy_patch8_32", "white noise", "rank 1"]
    assert [subject.label for subject in subjects] == labels
    first, second = ({key: A.shape for key, A in each.model.state_dict().items()} for each in (student, twin))
    assert first == second
    for subject in (teacher, *subjects):
        subject.name = "vit_base_patch16_224"  # published numbers are of trained weights
        assert analyze.published(subject, "minimum") == ("9" if subject in (teacher, model) else ())


def test_evolution_of_two_runs(tmp_path):
    runs = [str(make_run(tmp_path / parent / "soft-0")) for parent in "ab"]
    analyze.main(["--evolution", *runs, "--images", "2", "--entropy-range", "global", "layer", "--out", str(tmp_path)])
    table = tmp_path / "evolution.csv"
    assert column(table, "run", "epoch") == [(run, epoch) for run in runs for epoch in "12"]
    assert column(table, "layer", "module") == [("1", "blocks.0"), ("2", "blocks.1")]  # counted from 1
    bits = {row[:3]: row[3] for row in column(table, "run", "epoch", "range", "entropy_bits")}
    assert len({bits[runs[0], "1", "global"], bits[runs[1], "1", "global"], bits[runs[0], "1", "layer"]}) == 3
    assert (tmp_path / "evolution.png").exists() and (tmp_path / "evolution_layer.png").exists()


# ---------- results/*.py


def test_study_is_kept_in_one_file(tmp_path, capsys):
    """study.jsonl yields table and figures again without the folders; newer folders replace and add lines."""
    runs, record = tmp_path / "runs", tmp_path / "out" / "study.jsonl"

    def gather(source):
        study.main([str(source), "--out", str(record.parent)])
        return capsys.readouterr().out

    for seed in (0, 1):
        make_run(runs / f"soft-{seed}", log=epochs(50, 80 + seed), seed=seed)
        for beta in (0.2, 5.0):
            log = epochs(50, 80 + beta, mse=beta)
            make_run(runs / f"mse-beta{beta}-{seed}", "spectral", log, [1], seed=seed, beta=beta)
    make_run(runs / "unfinished-0", log=epochs(50), epochs=2)
    said = gather(runs)
    assert "| soft | 2 | 80.00 81.00 | 80.50 +- 0.71 |" in said and "unfinished" not in said and said.isascii()
    assert {*os.listdir(record.parent)} == {"study.jsonl", "dose.png"}
    first, *lines = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    assert first["common"]["student"] == "deit_toy_patch8_32" and "beta" not in first["common"]
    assert lines[0]["settings"] == {"method": "spectral", "beta": 0.2} and lines[0]["top1"] == [50, 80.2]
    kept = record.read_bytes()
    shutil.rmtree(runs)
    assert gather(record.parent) == said and record.read_bytes() == kept
    make_run(runs / "soft-1", log=epochs(60, 90), seed=1)
    assert "| soft | 2 | 80.00 90.00 |" in gather(runs) and len(study.read_study(record)) == 6


def test_study_of_a_new_method_and_an_old_run(tmp_path, capsys):
    run = make_run(tmp_path / "two-0", "two", epochs(50, mse=1, attention=2), layers=[1])
    config = models.read_config(run)
    for name in ("layers", "versions", "commit", "command", "parameters"):
        del config[name]
    for name in ("alpha", "teacher_maps", "lr"):
        del config["settings"][name]
    (make_run(tmp_path / "old-0", log=epochs(40)) / "config.json").write_text(json.dumps(config))
    study.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "| two | 1 | 50.00 |" in said and "| old | 1 | 40.00 |" in said
    _, found = study.read_study(tmp_path / "study.jsonl").values()
    assert {"two", "attention", "MSE"} <= {*study.label_of(found).split(", ")}
    for path in (HERE / "results").glob("**/study.jsonl"):
        assert all(len(run["top1"]) == run["settings"]["epochs"] for run in study.read_study(path).values())


def test_speed_adds_up(tmp_path, capsys):
    speed.main([*TINY, *"--method projector --updates 2 --accum 2 --amp --out".split(), str(tmp_path / "none")])
    result = json.loads(capsys.readouterr().out)
    assert result["images_per_s_in_memory"] == pytest.approx(16000 / result["ms"]["step"], rel=0.01)
    assert result["step_to_floor"] == pytest.approx(result["ms"]["step"] / result["ms"]["floor"], rel=0.01)
    assert result["training_hours"] == pytest.approx(30 * 64 / result["images_per_s"] / 3600, rel=0.1)
    assert all(value > 0 for value in result["ms"].values()) and not (tmp_path / "none").exists()


def test_course_prints_what_it_promises(monkeypatch):
    """The Python blocks of course/README.md, each in a fresh namespace: words alike, numbers to their last digit."""
    monkeypatch.chdir(HERE)
    page = (HERE / "course" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") == 8
    for code, promised in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "exercise"})
        printed, promised = (re.split(r"[\s,\[\]]+", text) for text in (printed.getvalue(), promised))
        for ours, theirs in zip(printed, promised, strict=True):
            if re.fullmatch(r"[~+-]?\d+(\.\d+)?", theirs):  # ~: depends on the seed
                last = 0.04 if "~" in theirs else 1.1 * 10.0 ** -len(theirs.partition(".")[2])
                assert float(ours) == pytest.approx(float(theirs.strip("~")), abs=last), code
            else:
                assert ours == theirs, code


# ---------- Mistakes: one line on stderr, status 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Good and bad folders, files and runs for the tests below."""
    root = tmp_path_factory.mktemp("world")
    for split in ("train", "val"):
        for folder, classes in (("good", "abc"), ("corrupt", "abc"), ("renamed", "abd"), ("bomb", "ab"), ("one", "a"),
                                ("differ", "ab" if split == "train" else "ac")):
            draw_folders(root / folder / split, classes)
        (root / "bomb" / split / "a/0.png").write_bytes(b"P6 40000 40000 255 ")  # pixels
    draw_folders(root / "flat", "a")
    for cut in (root / "corrupt/train/c/0.png", root / "flat/a/0.png"):
        cut.write_bytes(cut.read_bytes()[:60])
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    teacher = HERE / "weights/cait_toy_shapes.safetensors"
    (root / "cut.safetensors").write_bytes(teacher.read_bytes()[:5000])
    state = models.read_weights(teacher)
    torch.save({"a": torch.zeros(1)}, root / "other.pth")
    torch.save({key: value * float("nan") for key, value in state.items()}, root / "nan.pth")
    torch.save({key: value for key, value in state.items() if "head" not in key}, root / "headless.pth")
    train(root / "run", *TINY, "--method", "none", "--epochs", "2")
    train(root / "abc", "--data", root / "corrupt", "--skip-bad-images", "--method", "none", "--epochs", "1")
    for name in ("cutrun", "evil"):
        shutil.copytree(root / "run", root / name)
    (root / "cutrun" / "last.pt").write_bytes((root / "run" / "last.pt").read_bytes()[:-3000])
    torch.save({"distiller": Mark(path=root / "mark")}, root / "evil" / "last.pt")
    return root


TRAIN_MISTAKES = [  # flags, and a word that the line must hold
    ("--method nope", "nope"),
    ("--student nope", "nope"),
    ("--nope 1", "--nope"),
    ("--data {0}/absent", "absent/train holds no images"),
    ("--data {0}/differ --method none", "differ in classes"),
    ("--data {0}/corrupt --method none --batch-size 2", "0.png"),
    ("--data {0}/good --batch-size 2", "--teacher-weights"),
    ("--data {0}/good --teacher-weights weights/cait_toy_shapes.safetensors --batch-size 2", "20 classes"),
    ("--student-layers 0 12 --teacher-layers 0 1", "out of range"),
    ("--student-layers 1 1 --teacher-layers 0 1", "ascend"),
    ("--student-layers 1 --teacher-layers 1 --first 1", "--first"),
    ("--first 0 --last 0", "cannot be paired"),
    ("--teacher resnet18 --teacher-weights random --dry-run", "same patch grid"),
    ("--alpha nan", "nan"),
    ("--accum 3", "does not divide"),
    ("--epochs 1.5", "1.5"),
    ("--teacher-weights {0}/absent.pth --dry-run", "absent.pth"),
    ("--teacher-weights {0}/cut.safetensors", "cut.safetensors"),
    ("--teacher-weights {0}/other.pth", "other.pth"),
    ("--teacher-weights {0}/nan.pth", "NaN"),
    ("--teacher-weights {0}/headless.pth", "it has no classifier: --teacher-head random"),
    ("--method projector --feature-loss mse", "--feature-loss"),
    ("--color-jitter 0.1", "--color-jitter"),
    ("--student resnet18 --variant lifted --img-size 32", "resnet18"),
    ("--student resnet18 --method none --img-size 32 --batch-size 1", "none with resnet18: Expected more than 1"),
    ("--out {0}/run", "--resume"),
    ("--method none --out {0}/file", "file"),
    ("--resume --out {0}/empty", "empty"),
    ("--resume --out {0}/cutrun", "last.pt"),
    ("--resume --out {0}/evil", "last.pt is damaged"),
    ("--resume --out {0}/run --method soft", "--method none"),
    ("--resume --out {0}/run --epochs 1", "beyond --epochs 1"),
    ("--resume --out {0}/abc --data {0}/renamed", "names differ"),
    ("--eval --out {0}/abc --data {0}/renamed", "names differ"),
    ("--eval --out {0}/run --epochs 3", "--epochs"),
    ("--resume --overwrite --out {0}/run", "give one of them"),
    ("--device cuda", "CUDA"),
    ("--data {0}/one --method none --batch-size 2", "one class"),
    ("--data {0}/bomb --method none --batch-size 1", "exceeds limit"),
    ("--student-kwargs depth=0", "no layers"),
    ("--student-kwargs embed_dim", "KEY=VALUE"),
    ("--student-kwargs num_classes=3", "num_classes"),
    ("--student-kwargs in_chans=1", "to have 1 channels, but got 3"),
    ("--epochs 5 --warmup-epochs 5", "--warmup-epochs"),
    ("--teacher deit_toy_patch8_32 --teacher-weights weights/cait_toy_shapes.safetensors", "width 96, depth 12, 32 px"),
    ("--img-size 48", "32 px"),
    ("--method none --student-weights pretrained", "pretrained weights of deit_toy"),
    ("--teacher-weights {0}/run --teacher cait_toy_patch8_32", "--teacher would"),
    ("--teacher-weights {0}/run --teacher-head random --teacher-kwargs depth=3", "teacher-head, --teacher-kwargs w"),
    ("--data {0}/good --teacher-weights {0}/run --batch-size 2", "20 classes"),
]
ANALYZE_MISTAKES = [
    ("--models nope", "nope"),
    ("--models hiera_tiny_224=random --layers 0", "cannot be read by hooks on its layers [0]"),
    ("--data {0}/absent", "absent"),
    ("--data {0}/empty", "no images"),
    ("--data {0}/flat", "0.png"),
    ("--layers 0 12", "out of range"),
    ("--models deit_toy_patch8_32=weights/cait_toy_shapes.safetensors", "deit_toy_patch8_32"),
    ("--models deit_toy_patch8_32=random deit_toy_patch8_32=random", "twice"),
    ("--evolution {0}/empty", "empty"),
    ("--entropy-range nope", "nope"),
    ("--out {0}/file", "file"),
]
USUAL = {train_kd: [("--train-size", "64"), ("--batch-size", "16")], analyze: [("--models", analyze.EMBEDDED)]}


@pytest.mark.parametrize("program, words, expected", [*((train_kd, *row) for row in TRAIN_MISTAKES),
                                                      *((analyze, *row) for row in ANALYZE_MISTAKES)])
def test_main_answers_a_mistake_in_one_line(program, words, expected, world, capsys, monkeypatch):
    words = words.format(world).split()
    alone = {"--resume", "--eval", "--evolution"} & {*words}
    for flag, value in [*(() if alone else USUAL[program]), ("--out", str(world / "never"))]:
        if flag not in words and not (flag == "--train-size" and "--data" in words):
            words += [flag, value]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = {path: path.read_bytes() for path in (world / "run").iterdir()}
    with pytest.raises(SystemExit) as end:
        program.main(words)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1 and expected in line, line
    assert not (world / "never" / "config.json").exists() and not (world / "mark").exists()
    assert {path: path.read_bytes() for path in (world / "run").iterdir()} == before


# ---------- Whole runs, workers, processes, signals


@unix
def test_train_ends_the_same_when_killed_twice(tmp_path, monkeypatch, capsys):
    """kill -9 before the second epoch is recorded, SIGUSR1 within the third, after which the former handlers are back;
    the rest in a thread, which can handle no signals."""
    monkeypatch.setattr(data, "VAL_SIZE", 200)
    flags = [*TINY, "--method", "projector", "--epochs", "3"]
    whole, parts, update = tmp_path / "whole", tmp_path / "parts", train_kd.update
    handlers = [*map(signal.getsignal, signal.valid_signals())]
    code = """import data, os, train_kd
data.VAL_SIZE = 200
train_kd.report = lambda run: len(run.log) == 2 and os.kill(os.getpid(), 9)
train_kd.main()"""
    killed = start("-c", code, *flags, "--device", "cpu", "--out", parts)
    train(whole, *flags)
    said = capsys.readouterr().out
    assert "teacher cait_toy_patch8_32: top-1 9" in said and f"done: {whole}: top-1 " in said
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "log.jsonl", "last.pt", "best.pt", "student.safetensors", "student_ema.safetensors",
        *(f"epoch_000{number}.pt" for number in (1, 2, 3))}
    assert killed.wait(60) == -signal.SIGKILL and [len(log_of(out)) for out in (whole, parts)] == [3, 1]

    def update_or_signal(run, stream):
        if run.step == 9:
            signal.raise_signal(signal.SIGUSR1)
        update(run, stream)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train_kd, "update", update_or_signal)
        train(parts, "--resume")
    assert stopped.value.code == 128 + signal.SIGUSR1 and "stopped by SIGUSR1 after step 10" in capsys.readouterr().out
    assert [*map(signal.getsignal, signal.valid_signals())] == handlers and not (parts / "student.safetensors").exists()
    with ThreadPoolExecutor() as pool:
        pool.submit(train, parts, "--resume").result()
    assert_same_runs(whole, parts)


def test_train_resumes_without_the_weights_it_started_from(photos, tmp_path, monkeypatch, capsys):
    """With a checkpoint the start from a run's folder is not needed any more, and the teacher may lie elsewhere."""
    whole, parts, teacher, moved = (tmp_path / name for name in ("whole", "parts", "teacher", "moved"))
    shutil.copytree(photos / "run", teacher)
    shutil.copy(teacher / "student.safetensors", tmp_path / "start.safetensors")
    flags = ["--data", photos, "--method", "soft", "--teacher-weights", teacher, "--student", "deit_toy_patch8_32",
             "--student-kwargs", "depth=2", "--student-weights", tmp_path / "start.safetensors", "--epochs", "2"]
    train(whole, *flags)
    said, settings = capsys.readouterr().out, models.read_config(whole)["settings"]
    assert "starts from" in said and "teacher deit_toy_patch8_32: top-1 100.00 %" in said
    assert settings["lr"] == pytest.approx(1e-4 * (4 / 64) ** 0.5) and settings["teacher_kwargs"] == {"depth": 3}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_kd, "report", lambda run: len(run.log) == 2 and sys.exit("killed"))
        train(parts, *flags)
    (tmp_path / "start.safetensors").unlink()
    teacher.rename(moved)
    with pytest.raises(SystemExit, match="2"):
        train(parts, "--resume", "--teacher-weights", whole)
    assert "is not the teacher" in capsys.readouterr().err
    train(parts, "--resume", "--teacher-weights", moved)
    assert_same_runs(whole, parts)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_pool_starts_everywhere(method, tmp_path, monkeypatch):
    """Linux forks, macOS and Windows spawn, Python 3.14 has a fork server: the same to the last bit as no workers."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: method)
    for workers in ("0", "2"):
        train(tmp_path / workers, *TINY, "drop_path_rate=0.5", "--img-size", "64", "--method", "none", "--epochs", "1",
              "--workers", workers)
    assert_same_runs(tmp_path / "0", tmp_path / "2")


@unix
def test_stop_reaches_all_processes(tmp_path, monkeypatch):
    """SIGTERM to torchrun: both processes finish the step, the first saves, none is left; one process goes on."""
    monkeypatch.setattr(data, "VAL_SIZE", 4000)
    flags = [*TINY, "--method", "none", "--epochs", "500", "--device", "cpu", "--train-size", "640"]
    process = start(*TWO, "train_kd.py", *flags, "--out", tmp_path)
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)  # ends when nobody holds the pipe any more
    assert process.returncode and said.count("stopped by SIGTERM after step") == 1
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert f"after step {step}:" in said and not (tmp_path / "student.safetensors").exists()
    train(tmp_path, "--resume", "--epochs", step // 40 + 1)
    assert len(log_of(tmp_path)) == step // 40 + 1


@unix
def test_stop_ends_a_program_that_hangs():
    """At a Ctrl-C more than a second after the first one, which torchrun may deliver twice at once."""
    def hang():
        with train_kd.Stop():
            ready.set()
            hashlib.pbkdf2_hmac("sha1", b"", b"", 10 ** 9)  # minutes in C, where Python's handlers do not run

    context, ended = multiprocessing.get_context("fork"), []
    ready, process = context.Event(), context.Process(target=hang)
    process.start()
    ready.wait()
    for seconds in (0.1, 1.6, 9):
        os.kill(process.pid, signal.SIGINT)
        process.join(seconds)
        ended.append(process.exitcode)
    process.kill()
    assert ended == [None, None, 130]


def ten_updates(out):
    flags = "--train-size 16 --batch-size 16 --epochs 10 --student-kwargs depth=2 --warmup-epochs 0".split()
    for name in losses.METHODS:
        train(f"{out}/{name}", *flags, "--method", name)


def test_update_on_two_processes_equals_one(tmp_path):
    """The first ten losses of every method (in ten epochs of one update), float32, same global batch."""
    two = start(*TWO, "test_smoke.py", tmp_path / "two")
    ten_updates(tmp_path / "one")
    two.communicate(timeout=120)
    assert two.returncode == 0
    for method in losses.METHODS:
        one, two = ([line["terms"] for line in log_of(tmp_path / count / method)] for count in ("one", "two"))
        assert len(one) == 10 and two == [pytest.approx(terms, rel=1e-5) for terms in one], method


if __name__ == "__main__":
    ten_updates(sys.argv[1])
