"""python -m pytest -q test_smoke.py   (under 3 minutes on 2 cores, no network, no files from elsewhere)

A section a file, in that file's order, then the command lines; tests are called test_<function>_<property>.
"""
import copy
import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
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
CPU = torch.device("cpu")
TINY = ["--train-size", "64", "--batch-size", "16", "--student-kwargs", "depth=2", "embed_dim=24"]
TWO = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"  # processes

# ----------------------------------------------------------------------
# Helpers


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(data, "VAL_SIZE", 20)


def wave(*shape, a=0.7, b=0.31, c=0.05):
    """The input that the golden values belong to: sin(a n) + 0.5 cos(b n + 1) + sin(c n^2 mod 7)."""
    n = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy((np.sin(a * n) + 0.5 * np.cos(b * n + 1) + np.sin((c * n * n) % 7)).reshape(shape))


def settle(*flags):
    return train_kd.resolve(vars(train_kd.make_parser().parse_args([*TINY, *flags])), CPU)


def make(*flags):
    settings, images, _ = settle("--dry-run", *flags)
    return train_kd.build(settings, images.classes)


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


def assert_same(a, b):
    """Equal to the last bit, through nested dictionaries and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        [assert_same(a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        [assert_same(*pair) for pair in zip(a, b)]
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_students(*folders):
    for file in ("student", "student_ema"):
        assert_same(*(models.read_weights(folder / f"{file}.safetensors") for folder in folders))


def stop_before_save(monkeypatch, after):
    """Let a run end as if it were killed when `after` epochs are logged but the last is not saved."""
    monkeypatch.setattr(train_kd, "report", lambda run: len(run.log) == after and sys.exit("killed"))


def make_run(folder, method="soft", log=(), seed=0, **settings):
    """A run's folder as analyze.py reads it, around a student of two blocks that was not trained."""
    folder.mkdir(parents=True)
    settings = {"method": method, "student": "deit_toy_patch8_32", "variant": "plain", "img_size": 32, "data": "shapes",
                "student_kwargs": {"depth": 2, "embed_dim": 24}, "teacher": "cait_toy_patch8_32",
                "teacher_kwargs": None, "teacher_weights": "weights/cait_toy_shapes.safetensors", "epochs": len(log),
                "seed": seed, "out": str(folder), **settings}
    config = {"settings": settings, "images": {"classes": 20}, "class_names": None, "parameters": {"student": 7},
              "commit": "c", "versions": {"torch": "t"}, "command": "train_kd.py", "layers": {"student": settings.pop("layers", [])}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log), encoding="utf-8")
    student = models.build_model("deit_toy_patch8_32", num_classes=20, variant=settings["variant"], teacher_width=96,
                                 **settings["student_kwargs"])
    safetensors.torch.save_file(student.state_dict(), folder / "student.safetensors")
    for epoch in (1, 2):
        torch.save(student.state_dict(), folder / f"epoch_{epoch:04}.pt")
    return folder


def column(path, *names):
    """The distinct rows of some columns of a CSV, in its order."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(tuple(row[name] for name in names) for row in csv.DictReader(file)))


@pytest.fixture(scope="module")
def small_val():
    """20 validation images for the runs that fixtures make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VAL_SIZE", 20)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that anyone can tell apart, 40 images each to train on and 8 to validate: bright and dark noise."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 40), ("val", 8)):
        for label, base in (("bright", 150), ("dark", 0)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = base + np.random.default_rng([i, base, count]).integers(0, 100, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def tuned(photos, tmp_path_factory):
    """A run on the photos: the teacher-to-be."""
    out = tmp_path_factory.mktemp("tuned") / "teacher"
    return train(out, "--data", photos, "--method", "none", "--student", "deit_toy_patch8_32", "--student-kwargs",
                 "depth=3", "--epochs", "3")


# ----------------------------------------------------------------------
# losses.py


@pytest.mark.parametrize("options, golden", [
    ({}, 0.844308324), ({"label_smoothing": 0.1}, 0.838735681), ({"alpha": 0.5, "tau": 4.0}, 2.338509928)])
def test_soft_kd_loss_golden(options, golden):
    logits_s, logits_t, labels = wave(4, 10), 3 * wave(4, 10, a=0.2), torch.tensor([1, 7, 3, 3])
    assert losses.soft_kd_loss(logits_s, logits_t, labels, **options).item() == pytest.approx(golden, abs=1e-9)
    terms = losses.SoftKD(**{"label_smoothing": 0.0, **options})(labels, logits_s, logits_t=logits_t)
    assert sum(terms.values()).item() == pytest.approx(golden, abs=1e-9)


@pytest.mark.parametrize("shape_s, shape_t, golden", [
    ((2, 6, 4, 4), (2, 12, 4, 4), 1.049374114),
    ((2, 12, 7, 7), (2, 12, 7, 7), 0.706133630),
    ((2, 6, 14, 14), (2, 15, 14, 14), 0.563001475)])
def test_spectral_loss_golden(shape_s, shape_t, golden):
    map_s, map_t = wave(*shape_s), wave(*shape_t, a=0.4, b=0.9)
    assert losses.spectral_loss(map_s, map_t).item() == pytest.approx(golden, abs=1e-9)
    assert losses.spectral_loss(map_t, map_s).item() == pytest.approx(golden, abs=1e-9)  # pools the wider side
    with torch.autocast("cpu", torch.bfloat16):  # float32 whatever surrounds it
        assert losses.spectral_loss(map_s.float(), map_t.float()).item() == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize("h, w", [(4, 4), (7, 7), (14, 14), (5, 8)])
def test_spectral_loss_parseval(h, w):
    """The real FFT's columns 0..w/2 weigh 1, those that have a mirror image 2: half the spatial MSE."""
    map_s, map_t = wave(2, 6, h, w), wave(2, 6, h, w, a=0.4)
    energy = np.abs(np.fft.fft2((map_s - map_t).numpy(), norm="ortho")) ** 2
    mse = losses.feature_mse(map_s, map_t).item()
    assert energy.mean() == pytest.approx(mse, rel=1e-12)
    assert energy[..., :w // 2 + 1].mean() / 2 == pytest.approx(losses.spectral_loss(map_s, map_t).item(), rel=1e-12)


def test_spectral_loss_refuses_unequal_grids():
    for loss in (losses.spectral_loss, losses.feature_mse):
        with pytest.raises(ValueError, match="4 x 4 and the teacher's 7 x 7"):
            loss(wave(2, 6, 4, 4), wave(2, 6, 7, 7))


def test_feature_mse_pools_in_windows():
    """Channel windows floor(i C_in / C) .. ceil((i + 1) C_in / C), as the definition of the loss has them."""
    wide, C_in, C = wave(2, 15, 3, 3), 15, 6
    pooled = torch.stack([wide[:, i * C_in // C:-(-(i + 1) * C_in // C)].mean(1) for i in range(C)], dim=1)
    zeros = torch.zeros(2, C, 3, 3, dtype=torch.float64)
    assert losses.feature_mse(wide, zeros).item() == pytest.approx(pooled.square().mean().item(), rel=1e-12)


@pytest.mark.parametrize("width, channels", [(384, 219), (384, 192), (96, 48), (15, 6)])
def test_pooling_matrix_equals_adaptive_pooling(width, channels):
    """What stands in for adaptive pooling on MPS, which has it only for widths that divide."""
    tokens = torch.randn(2, 7, width)
    pooled = tokens @ losses._pooling_matrix(width, channels)
    torch.testing.assert_close(pooled, nn.functional.adaptive_avg_pool1d(tokens, channels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha, beta, expected", [
    (0.9, 0.2, {"ce", "kd", "spectral"}),
    (0.0, 0.2, {"ce", "spectral"}),
    (1.0, 0.2, {"kd", "spectral"}),
    (0.9, 0.0, {"ce", "kd"})])
def test_feature_kd_leaves_out_terms_of_weight_zero(alpha, beta, expected):
    method = losses.SpectralKD(alpha=alpha, beta=beta)
    terms = method(torch.tensor([0, 1]), wave(2, 5), [wave(2, 6, 4, 4)], wave(2, 5, a=0.2), [wave(2, 6, 4, 4, a=0.4)])
    assert set(terms) == expected


def test_feature_kd_names_unequal_widths():
    class Naive(losses.FeatureKD):
        name = term = "naive"

        def pair_loss(self, i, map_s, map_t):
            return (map_s - map_t).square().mean()

    with pytest.raises(ValueError, match="naive cannot compare a student's map of 6 x 4 x 4 with a teacher's of 12"):
        Naive()(torch.tensor([0, 1]), wave(2, 5), [wave(2, 6, 4, 4)], wave(2, 5), [wave(2, 12, 4, 4)])


def test_projector_kd_equals_batchnorm_and_linear():
    map_s, map_t, method = wave(2, 6, 4, 4), wave(2, 12, 4, 4, a=0.4), losses.ProjectorKD(channels=[(6, 12)]).double()
    projected = nn.functional.conv2d(map_s, method.projectors[0].weight[:, :, None, None])
    norm = nn.BatchNorm2d(12, affine=False).double()
    assert method.pair_loss(0, map_s, map_t).item() == pytest.approx(
        nn.functional.mse_loss(norm(projected), norm(map_t)).item(), rel=1e-12)
    method.norm = "none"
    assert method.pair_loss(0, map_s, map_t).item() == pytest.approx(
        nn.functional.mse_loss(projected, map_t).item(), rel=1e-12)


def leaves(loss):
    """Identities of all parameters in the graph of a loss."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node and node not in seen:
            seen.add(node)
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            todo += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("variant", models.VARIANTS)
@pytest.mark.parametrize("method", losses.METHODS)
def test_distiller_one_step_moves_all_that_learns(method, variant):
    teacher, distiller, _ = make("--method", method, "--variant", variant)
    optimizer = create_optimizer_v2(distiller, "adamw", lr=1e-2, weight_decay=0.05)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, held)} == {*map(id, distiller.parameters())} and len(held) == len({*map(id, held)})
    undecayed = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in distiller.named_parameters():
        assert (id(parameter) in undecayed) == (parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token"))), name

    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    taught_by = copy.deepcopy(teacher.state_dict()) if teacher else {}
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    distiller.train()
    _, terms = distiller(images, labels, teacher(images) if teacher else None)
    loss = sum(terms.values())
    assert leaves(loss) == {*map(id, held)}  # all that the loss depends on is trained
    loss.backward()
    optimizer.step()
    assert [name for name, p in distiller.named_parameters() if torch.equal(p, before[name])] == []
    if teacher:
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(value, taught_by[key]) for key, value in teacher.state_dict().items())


# ----------------------------------------------------------------------
# models.py


@pytest.mark.parametrize("name, size, layers", [
    ("vit_tiny_patch16_224", 64, [0, 5, 11]), ("deit_tiny_distilled_patch16_224", 64, [11]),
    ("cait_xxs24_224", 64, [0, 12, 23]), ("swin_tiny_patch4_window7_224", 224, [0, 3]), ("resnet18", 64, [0, 1, 4])])
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
    raw = torch.rand(2, 3, 64, 64)
    own = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
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
        (logits.sum() + sum(A.square().mean() for A in maps)).backward()
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
        with torch.no_grad():
            taught = teacher(images)
        return [logits, *maps, *gradients, taught[0], *taught[1]]

    expected = [run(images) for images in batches]
    for each in (model, teacher):
        each.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    found = [run(batches[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(run(batches[1]))
    for pair in zip(sum(found, []), sum(expected, [])):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_choose_layers_equals_the_released_lists():
    assert models.choose_layers(2, 6, 12) == [0, 1, 6, 7, 8, 9, 10, 11]  # SK's student list
    assert models.choose_layers(2, 6, 24) == [0, 1, 18, 19, 20, 21, 22, 23]  # and its teacher list
    assert models.choose_layers(8, 8, 12) == list(range(12))
    with pytest.raises(ValueError):
        models.choose_layers(0, 13, 12)


@pytest.mark.parametrize("variant, count", [("plain", 5_717_416), ("lifted", 5_983_528), ("widened", 7_313_896)])
def test_build_model_has_the_published_parameter_counts(variant, count):
    model = models.build_model("deit_tiny_patch16_224", num_classes=1000, variant=variant, teacher_width=384)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("variant, classes, new", [
    ("plain", 20, "nothing"),
    ("plain", 2, "classifier drawn afresh"),
    ("lifted", 20, "blocks.2"),
    ("widened", 20, "blocks.2")])
def test_start_from_weights(variant, classes, new, tmp_path):
    kwargs = dict(num_classes=classes, img_size=32, depth=3)
    source = models.build_model("deit_toy_patch8_32", **{**kwargs, "num_classes": 20})
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    student = models.build_model("deit_toy_patch8_32", variant=variant, teacher_width=96, **kwargs)
    said = models.start_from(student, "deit_toy_patch8_32", str(tmp_path / "weights.pth"), 32, variant)
    assert new in said.split("without a place")[0] and said.count("\n") == 0
    theirs, ours = source.state_dict(), student.state_dict()
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        assert torch.equal(ours[key], theirs[key])
    if variant == "lifted":
        assert torch.equal(ours["blocks.2.0.attn.qkv.weight"], theirs["blocks.2.attn.qkv.weight"])
    assert torch.equal(ours["head.weight"], theirs["head.weight"]) == (variant == "plain" and classes == 20)
    torch.save({key: value for key, value in theirs.items() if "head" not in key}, tmp_path / "headless.pth")
    said = models.start_from(student, "deit_toy_patch8_32", str(tmp_path / "headless.pth"), 32, variant)
    assert "classifier drawn afresh" in said
    shallow = models.build_model("deit_toy_patch8_32", **{**kwargs, "depth": 2})
    said = models.start_from(shallow, "deit_toy_patch8_32", str(tmp_path / "weights.pth"), 32)
    assert "without a place: blocks.2" in said and ("nothing" in said) == (classes == 20)
    other = models.build_model("deit_toy_patch8_32", **{**kwargs, "embed_dim": 24})
    with pytest.raises(ValueError, match="width 48, depth 3"):
        models.start_from(other, "deit_toy_patch8_32", str(tmp_path / "weights.pth"), 32)


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_load_student_of_every_variant(variant, tmp_path):
    """A run's student whole, ready for use, whatever its variant; from its snapshots as well."""
    train(tmp_path, *TINY, "--method", "none", "--variant", variant, "--epochs", "1")
    state = torch.load(tmp_path / "last.pt", weights_only=True)["distiller"]
    for file in ("student.safetensors", "best.pt"):
        student = models.load_student(tmp_path, file).eval()
        assert_same({f"student.model.{key}": value for key, value in student.state_dict().items()}, state)
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 20)
    with pytest.raises(ValueError, match="epoch_0099.pt"):
        models.load_student(tmp_path, "epoch_0099.pt")


def test_load_student_on_one_photo(tuned, photos):
    """The five lines of README's `Your own images`."""
    student = models.load_student(tuned).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    for number, name in enumerate(models.read_config(tuned)["class_names"]):
        image = Image.open(photos / "val" / name / "0.png").convert("RGB")
        with torch.no_grad():
            assert student(transform(image)[None]).softmax(-1)[0].argmax() == number


def test_load_student_crops_as_its_validation_did(tmp_path):
    large = models.load_student(make_run(tmp_path / "large", img_size=64, crop_pct=0.8), trained=False)
    small = models.load_student(make_run(tmp_path / "small", img_size=32, crop_pct=0.8))
    crops = [timm.data.resolve_model_data_config(student)["crop_pct"] for student in (large, small)]
    assert crops == [0.8, 1] and timm.get_pretrained_cfg("deit_toy_patch8_32").crop_pct == 1


class Mark:
    """A pickle that would leave a mark when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_read_weights_runs_no_code(tmp_path, world, capsys):
    torch.save({"model": Mark(tmp_path / "mark")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth"):
        models.build_model("deit_toy_patch8_32", num_classes=20, weights=tmp_path / "evil.pth")
    shutil.copytree(world / "run", tmp_path / "run")
    torch.save({"distiller": Mark(tmp_path / "mark")}, tmp_path / "run" / "last.pt")
    with pytest.raises(SystemExit):
        train_kd.main(["--resume", "--out", str(tmp_path / "run")])
    assert "last.pt is damaged" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


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
    monkeypatch.setattr(models, "cpu_info", {"flags": "sse avx512_bf16", "model name": "any"}.get)
    for native, expected in ((True, "both"), (False, "off")):  # a T4 or V100 only emulates it
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
        assert models.default_amp(torch.device("cuda"), 224) == expected
        assert models.default_amp(torch.device("cuda"), 32) == "off"
    for device, size, expected in (("cpu", 224, "both"), ("cpu", 32, "off"), ("mps", 224, "off")):
        assert models.default_amp(torch.device(device), size) == expected
    monkeypatch.setattr(models, "cpu_info", lambda key: "")
    assert models.default_amp(torch.device("cpu"), 224) == "off"


# ----------------------------------------------------------------------
# data.py


def test_draw_shapes_depends_on_seed_and_index_only():
    few, many = data.draw_shapes(30), data.draw_shapes(2100)
    assert torch.equal(few[0], many[0][:30]) and torch.equal(few[1], many[1][:30])
    assert many[1].bincount().tolist() == [105] * 20
    for other in (data.draw_shapes(30, "val"), data.draw_shapes(30, seed=1)):
        assert not torch.equal(few[0], other[0])


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
        seen = np.concatenate([keys[:, 0] for rank in range(world)
                               for keys in data.evaluation_batches(5, 2, rank=rank, world=world)])
        assert sorted(seen) == [0, 1, 2, 3, 4]


def test_pad_crop_flip_moves_and_mirrors():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    still, shifted, mirrored = data.pad_crop_flip(image.repeat(3, 1, 1, 1), torch.tensor(
        [[0.5, 0.5, 0.9], [0.0, 0.5, 0.9], [0.5, 0.5, 0.1]]), padding=2)
    assert torch.equal(still, image[0]) and torch.equal(mirrored, image[0].flip(-1))
    assert torch.equal(shifted[:, 2:], image[0, :, :3]) and not shifted[:, :2].any()


def test_samples_can_skip_bad_images(world):
    train = data.open_data(str(world / "corrupt")).train
    with pytest.raises(data.BadImage, match="0.png"):
        for i in range(len(train)):
            data.Samples(train, lambda image: image)[i, 0]
    skipping = data.Samples(train, lambda image: image, skip_bad=True)
    assert len([skipping[i, 0] for i in range(len(train))]) == 6


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
    train, val = data.Shapes(100, "train"), data.Shapes(2, "val")
    loader, _ = data.build_loaders(train, val, img_size=64, mean=(0.5,) * 3, std=(0.5,) * 3, device=CPU,
                                   workers=0, auto_augment=policy)
    batches = data.training_batches(100, 100, seed=0, epoch=0)
    assert [images.isfinite().all() for images, _ in loader.load(batches, 0)] == [True]


# ----------------------------------------------------------------------
# train_kd.py


def test_recipes_give_every_setting_its_type():
    options = {name for method in losses.METHODS.values() for name in method.options()}
    for recipe in train_kd.RECIPES.values():
        assert {name: type(value) for name, value in recipe.items()} == {
            name: type(value) for name, value in train_kd.IMAGENET.items()}
    assert not options & train_kd.IMAGENET.keys()
    settings, *_ = settle()
    assert not [name for name, value in vars(settings).items() if value is None]


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA tensors without a card: they know shape, dtype and device, refuse to mix devices, and have no values, so
    that nothing can wait for one. Autograd's engine wants a driver: gradients are put in place of its backward pass."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        pytest.skip("tried with PyTorch 2.15; 2.6 crashes on fake CUDA tensors where there is no driver")
    generator = torch.Generator
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())

    def on_cuda(tensor):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def update(*flags, plant=None):
        settings, images, _ = settle("--dry-run", *flags)
        teacher, distiller, _ = train_kd.build(settings, images.classes)
        twin = copy.deepcopy(distiller.student)  # the EMA's: fake tensors cannot be copied deep
        monkeypatch.setattr("timm.utils.model_ema.deepcopy", lambda model: twin)
        with FakeTensorMode():
            for module in (module for model in (teacher, distiller, twin) if model for module in model.modules()):
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: on_cuda(tensor) for name, tensor in tensors.items() if tensor is not None})
            loaders = SimpleNamespace(size=64), None
            run = train_kd.Run(settings, torch.device("cuda"), teacher, distiller, loaders)
            if plant:
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
    runs = [train(tmp_path / "default", *TINY, "--epochs", "1", "--method", "powered"),
            train(tmp_path / "given", *TINY, "--epochs", "1", "--method", "powered", "--power", "3", "--no-signed")]
    settings = [models.read_config(run)["settings"] for run in runs]
    assert [(each["power"], each["signed"]) for each in settings] == [(2, True), (3, False)]
    assert "powered" in log_of(runs[0])[0]["terms"] and log_of(runs[0]) != log_of(runs[1])
    for words in (["--method", "powered", "--power", "2.5"], ["--method", "soft", "--power", "3"]):
        with pytest.raises(SystemExit, match="2"):
            train_kd.main([*words, "--dry-run"])
        assert "--power" in capsys.readouterr().err


def test_resolve_fits_eighty_photos(tuned):
    config = models.read_config(tuned)
    assert config["settings"]["batch_size"] == 4 and config["images"]["train"] // 4 == 20
    assert config["settings"]["lr"] == pytest.approx(2e-3 * (4 / 64) ** 0.5) and config["class_names"] == ["bright", "dark"]
    assert log_of(tuned)[-1]["top1"] == 100


def test_show_teacher_warns_near_chance(photos, tmp_path, capsys):
    """Unless it was meant to know nothing."""
    teacher = models.build_model("deit_toy_patch8_32", num_classes=2, img_size=32)
    with torch.no_grad():
        teacher.head.bias.copy_(torch.tensor([9.0, 0.0]))  # everything is bright
    torch.save(teacher.state_dict(), tmp_path / "dull.pth")
    flags = ["--data", photos, "--method", "soft", "--teacher", "deit_toy_patch8_32", "--epochs", "1", "--student-kwargs",
             "depth=1", "--teacher-weights"]
    for weights, warned in ((tmp_path / "dull.pth", True), ("random", False)):
        train(tmp_path / str(warned), *flags, weights)
        assert ("near chance (50.00 %)" in capsys.readouterr().out) == warned


def test_show_accuracy_equals_the_log(tuned, photos, capsys):
    """On one process and two."""
    last, before = log_of(tuned)[-1], {path: path.read_bytes() for path in tuned.iterdir()}
    two = start(*TWO, "train_kd.py", "--eval", "--out", tuned, "--device", "cpu")
    train(tuned, "--eval")
    one = capsys.readouterr().out.splitlines()
    assert one == two.communicate(timeout=60)[0].splitlines() and len(one) == 2 and two.returncode == 0
    for line, name, prefix in zip(one, ("student", "its EMA"), ("", "ema_")):
        assert line.startswith(f"{name}: top-1 {last[prefix + 'top1']:.2f} %, top-5 {last[prefix + 'top5']:.2f} %")
        assert line.endswith("16 images")
    assert {path: path.read_bytes() for path in tuned.iterdir()} == before


# ----------------------------------------------------------------------
# analyze.py


def numpy_ranks(energies, levels=analyze.LEVELS):
    """Smallest k with a share >= level, the plain way. energies [images, C] -> [images, levels]."""
    shares = np.cumsum(energies, axis=1) / energies.sum(1, keepdims=True)
    return [[int(np.argmax(row >= level)) + 1 for level in levels] for row in shares]


def numpy_entropy(A, lo, hi):
    """DD Eq. 3 and 4 with numpy.histogram, token by token. [B, C, h, w] -> [B, h, w]."""
    B, C, h, w = A.shape
    result = np.zeros((B, h, w))
    for b, y, x in np.ndindex(B, h, w):
        p = np.histogram(A[b, :, y, x].numpy(), bins=100, range=(lo, hi))[0] / C
        result[b, y, x] = -(p[p > 0] * np.log2(p[p > 0])).sum()
    return result


def test_metrics_golden():
    A = wave(3, 2, 16, 3, 3)
    lo, hi = A.min().item(), A.max().item()
    near = dict(abs=1e-8)
    spectrum, entropies = analyze.channel_spectrum(A[0]), [analyze.entropy_map(layer, lo, hi).mean() for layer in A]
    magnitudes = [analyze.magnitude(layer).item() for layer in A]
    assert spectrum[:4].tolist() == pytest.approx([0.65610145, 0.14649592, 0.17439990, 0.17355775], **near)
    assert [float(each) for each in entropies] == pytest.approx([3.76296992, 3.76296992, 3.78812656], **near)
    assert magnitudes == pytest.approx([0.84923804, 0.85538544, 0.85123833], **near)
    X = wave(5, 20, 12)
    assert analyze.energy_ranks(X)[0].tolist() == [4, 6, 8, 10]
    assert analyze.pca_ranks(X, analyze.second_moment(X))[:2].tolist() == [[6, 8, 10, 11], [6, 8, 10, 12]]
    curve = analyze.sep_curve(X)
    assert curve[:4].tolist() == pytest.approx([7.46693440, 30.93371383, 39.51336532, 43.78376685], **near)
    assert analyze.sep_bandwidth(curve).tolist() == pytest.approx([0.5, 0.75, 11 / 12, 1, 1], **near)


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
    curve = analyze.sep_curve(torch.ones(1, 1, 8))  # all in frequency 0
    assert analyze.sep_bandwidth(curve).tolist() == [0.125] * 5


def test_sep_curve_is_flat_because_channels_have_no_order():
    """Not because spectra of real signals are symmetric: noise + 1 is as real and as symmetric."""
    noise = torch.randn(8, 196, 192)
    for X in (noise, torch.randn(8, 196, 1) * torch.randn(192)):
        flat = analyze.sep_bandwidth(analyze.sep_curve(X)).tolist()
        assert flat == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9], abs=0.05)
    shifted = analyze.sep_bandwidth(analyze.sep_curve(noise + 1)).tolist()
    assert shifted == pytest.approx([0.005, 0.20, 0.41, 0.60, 0.80], abs=0.01)


def test_published_numbers_are_of_trained_weights():
    args = analyze.make_parser().parse_args(["--models", "vit_base_patch16_224=random", "--no-controls", "--model-kwargs", "depth=1"])
    subject, = analyze.open_subjects(args, CPU)
    assert subject.kind == "untrained" and not analyze.published(subject, "minimum")
    subject.kind = "model"
    assert analyze.published(subject, "minimum") == "9"


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
    model = "deit_toy_patch8_32=random"
    flags = ["--models", model, "--images", "7", "--model-kwargs", "depth=2", "embed_dim=24", "--no-controls",
             "--entropy-range", "global", "layer"]
    for size in (2, 7):
        analyze.main([*flags, "--batch-size", str(size), "--out", str(tmp_path / str(size))])
        monkeypatch.setattr(analyze, "draw_all", lambda *args: None)  # once is enough
    names = {path.name for path in (tmp_path / "2").iterdir()}
    assert {f"{stem}.{end}" for stem in ("entropy", "magnitude", "intensity", "spectra", "svd_layers", "ranks", "sep")
            for end in ("png", "csv")} | {"summary.md"} <= names
    for name in ("entropy", "magnitude", "spectra", "sep"):
        tables = [[line.split(",") for line in (tmp_path / size / f"{name}.csv").read_text().splitlines()[1:]
                   if line.startswith(model)] for size in ("2", "7")]
        assert [float(row[-1]) for row in tables[0]] == pytest.approx([float(row[-1]) for row in tables[1]], rel=1e-4)
    args = analyze.make_parser().parse_args(flags)
    subject, load = analyze.open_subjects(args, CPU)[0], analyze.open_images("shapes", 7, 0)
    with torch.no_grad():
        maps = subject.maps(0, load)
    lo, hi = min(A.min() for A in maps).item(), max(A.max() for A in maps).item()
    rows = [line.split(",") for line in (tmp_path / "7" / "entropy.csv").read_text().splitlines()]
    ours = [float(row[-1]) for row in rows if row[0] == model and row[3] == "global"]
    assert ours == pytest.approx([analyze.entropy_map(A, lo, hi).mean().item() for A in maps], rel=1e-5)


def test_analyse_the_newest_run(tmp_path, monkeypatch, capsys):
    """From any folder: the embedded teacher (a run without one included), the student, the first one untrained."""
    monkeypatch.chdir(tmp_path)
    run = str(make_run(tmp_path / "runs" / "none-0", "none", epochs(1.0)).relative_to(tmp_path))
    flags = ["--images", "2", "--layers", "0", "1", "--no-layer-ranks", "--out", "out"]
    analyze.main([*flags, "--entropy-range", "layer"])
    said = capsys.readouterr().out
    labels = ["teacher cait_toy_patch8_32", run, "untrained cait_toy_patch8_32", "white noise", "rank 1"]
    assert f"on shapes: {', '.join(labels)}" in said
    assert column("out/entropy.csv", "model") == [(label,) for label in labels]
    assert column("out/entropy.csv", "layer", "module") == [("1", "blocks.0"), ("2", "blocks.1")]  # counted from 1
    assert sorted(said.splitlines()[-1].split("done: out: ")[1].split(", ")) == sorted(os.listdir("out"))
    assert "entropy_layer.png" in said and "entropy.png" not in said and "curves.png" in said and said.isascii()

    Path("out/notes.txt").touch()  # of another hand: stays
    analyze.main(flags)
    assert "entropy.png" in os.listdir("out") and "entropy_layer.png" not in os.listdir("out")
    named = capsys.readouterr().out.split("done: out: ")[1].strip().split(", ")
    assert {*os.listdir("out")} - {*named} == {"notes.txt"}


@pytest.mark.parametrize("weights, kind", [("random", "untrained"), ("", "teacher")])
def test_open_subjects_with_the_teacher_of_a_run(tmp_path, weights, kind):
    """A teacher may be random, or another run's student."""
    if not weights:
        weights = str(make_run(tmp_path / "teacher", "none", variant="lifted"))
    run = make_run(tmp_path / "run", teacher_weights=weights)
    args = analyze.make_parser().parse_args(["--layers", "0", "--no-controls"])
    teacher, student = analyze.open_subjects(args, CPU, str(run))
    assert (teacher.kind, student.kind, student.label) == (kind, "student", str(run))
    assert not analyze.published(teacher, "svd")


def test_open_subjects_has_the_untrained_twin_of_a_run(tmp_path):
    """It is built as the run was. The same model twice is a mistake."""
    run = str(make_run(tmp_path / "soft-0", variant="lifted"))
    subjects = analyze.open_subjects(analyze.make_parser().parse_args(["--models", run]), CPU)
    assert [s.label for s in subjects] == [run, "untrained lifted deit_toy_patch8_32", "white noise", "rank 1"]
    first, twin = subjects[0].model.state_dict(), subjects[1].model.state_dict()
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in twin.items()}
    with pytest.raises(ValueError, match="twice"):
        analyze.open_subjects(analyze.make_parser().parse_args(["--models", run, run]), CPU)


def test_evolution_of_two_runs(tmp_path):
    runs = [str(make_run(tmp_path / parent / "soft-0")) for parent in "ab"]
    analyze.main(["--evolution", *runs, "--images", "2", "--entropy-range", "global", "layer", "--out", str(tmp_path)])
    table = tmp_path / "evolution.csv"
    assert column(table, "run", "epoch") == [(run, epoch) for run in runs for epoch in "12"]
    assert column(table, "layer", "module") == [("1", "blocks.0"), ("2", "blocks.1")]  # counted from 1
    values = {row[:-1]: float(row[-1]) for row in column(table, "run", "layer", "epoch", "range", "entropy_bits")}
    assert values[runs[0], "1", "1", "global"] not in (values[runs[1], "1", "1", "global"], values[runs[0], "1", "1", "layer"])
    assert (tmp_path / "evolution.png").exists() and (tmp_path / "evolution_layer.png").exists()


# ----------------------------------------------------------------------
# results/*.py


def epochs(*top1, **terms):
    return [{"top1": each, "ema_top1": each, "seconds": 2.0, "terms": {"kd": 1.23456789, **terms}} for each in top1]


def test_study_is_kept_in_one_file(tmp_path, capsys):
    """study.jsonl yields table and figures again without the folders; newer folders replace and add lines."""
    runs, record = tmp_path / "runs", tmp_path / "out" / "study.jsonl"

    def gather(source):
        study.main([str(source), "--out", str(record.parent)])
        return capsys.readouterr().out

    for seed in (0, 1):
        make_run(runs / f"soft-{seed}", log=epochs(50, 80 + seed), seed=seed)
        for beta in (0.2, 5.0):
            make_run(runs / f"mse-beta{beta}-{seed}", "spectral", epochs(50, 80 + beta, mse=beta), seed, beta=beta,
                     layers=[1])
    make_run(runs / "unfinished-0", log=epochs(50), epochs=2)
    said = gather(runs)
    assert "| soft | 2 | 80.00 81.00 | 80.50 +- 0.71 |" in said and "unfinished" not in said and said.isascii()
    assert {*os.listdir(record.parent)} == {"study.jsonl", "study.png", "dose.png"}
    first, *lines = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    assert first["common"]["student"] == "deit_toy_patch8_32" and "beta" not in first["common"]
    assert lines[0]["settings"] == {"method": "spectral", "beta": 0.2} and lines[0]["top1"] == [50, 80.2]
    kept = record.read_bytes()
    shutil.rmtree(runs)
    assert gather(record.parent) == said and record.read_bytes() == kept

    make_run(runs / "soft-1", log=epochs(60, 90), seed=1)
    for seed in (0, 1):  # another setup: what do both have in common?
        make_run(runs / f"new-{seed}", log=epochs(1, 2), seed=seed, lr=3)
        make_run(runs / f"new-mse-{seed}", "spectral", epochs(1, 3, mse=1), seed, lr=3, beta=5.0, layers=[1])
    said = gather(runs)
    assert "| soft | 2 | 80.00 90.00 |" in said and "| mse-beta5.0 | 2 |" in said and (record.parent / "gains.png").exists()
    gains = study.gains_over_soft(study.by_setup([*study.read_study(record).values()]))
    assert [*gains] == [("mse, layer 2", 5)] and [*gains["mse, layer 2", 5].values()] == [(0, 5), (1, 0)]


def test_read_study_of_the_records():
    for path in (HERE / "results").glob("**/study.jsonl"):
        assert all(len(run["top1"]) == run["settings"]["epochs"] for run in study.read_study(path).values())


def test_speed_adds_up(tmp_path, capsys):
    speed.main([*TINY, "--method", "projector", "--updates", "2", "--accum", "2", "--amp", "--out", str(tmp_path / "none")])
    result = json.loads(capsys.readouterr().out)
    assert result["images_per_s_in_memory"] == pytest.approx(16000 / result["ms"]["step"], rel=0.01)
    assert result["step_to_floor"] == pytest.approx(result["ms"]["step"] / result["ms"]["floor"], rel=0.01)
    assert result["training_hours"] == pytest.approx(30 * 64 / result["images_per_s"] / 3600, rel=0.1)
    assert all(value > 0 for value in result["ms"].values()) and not (tmp_path / "none").exists()


# ----------------------------------------------------------------------
# Mistakes: one line on stderr, status 2


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_val):
    """Good and bad folders, files and runs for the tests below."""
    root = tmp_path_factory.mktemp("world")

    def images(folder, classes, broken=False):
        for name in classes:
            (root / folder / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{i}.png")
        if broken:
            (root / folder / name / "0.png").write_bytes((root / folder / name / "0.png").read_bytes()[:60])

    for split in ("train", "val"):
        images(f"good/{split}", "abc")
        images(f"bomb/{split}", "ab")
        images(f"corrupt/{split}", "abc", broken=split == "train")
        images(f"differ/{split}", "ab" if split == "train" else "ac")
        images(f"single/{split}", "a")
    images("no_train/val", "ab")
    for folder in ("empty", "norun"):
        (root / folder).mkdir(parents=True)
    images("flat", "a", broken=True)
    (root / "file").write_text("not a folder")
    (root / "cut.safetensors").write_bytes((HERE / "weights/cait_toy_shapes.safetensors").read_bytes()[:5000])
    torch.save({"a": torch.zeros(1)}, root / "other.pth")
    state = models.read_weights(HERE / "weights/cait_toy_shapes.safetensors")
    torch.save({key: value * float("nan") for key, value in state.items()}, root / "nan.pth")
    header = b"IHDR" + (40000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])  # 40,000 x 40,000 pixels in a few bytes
    for path in (root / "bomb").glob("*/*/0.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") +
                         bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))
    for epoch, name in ((1, "run"), (2, "two")):
        train(root / name, *TINY, "--method", "none", "--epochs", epoch)
    shutil.copytree(root / "run", root / "cutrun")
    (root / "cutrun" / "last.pt").write_bytes((root / "run" / "last.pt").read_bytes()[:-3000])
    return root


TRAIN_MISTAKES = [  # flags, and a word that the line must hold
    ("--method nope", "nope"),
    ("--student nope", "nope"),
    ("--nope 1", "--nope"),
    ("--data {0}/absent", "absent"),
    ("--data {0}/no_train", "train/"),
    ("--data {0}/differ --method none", "differ in classes"),
    ("--data {0}/corrupt --method none --batch-size 2", "0.png"),
    ("--data {0}/good --batch-size 2", "--teacher-weights"),
    ("--data {0}/good --teacher-weights weights/cait_toy_shapes.safetensors --batch-size 2", "20 classes"),
    ("--student-layers 0 12 --teacher-layers 0 1", "out of range"),
    ("--student-layers 1 1 --teacher-layers 0 1", "ascend"),
    ("--student-layers 1 --teacher-layers 1 --first 1", "--first"),
    ("--first 0 --last 0", "cannot be paired"),
    ("--teacher resnet18 --teacher-weights {0}/other.pth --dry-run", "same patch grid"),
    ("--alpha nan", "nan"),
    ("--lr inf", "inf"),
    ("--accum 3", "does not divide"),
    ("--epochs 1.5", "1.5"),
    ("--teacher-weights {0}/absent.pth", "absent.pth"),
    ("--teacher-weights {0}/cut.safetensors", "cut.safetensors"),
    ("--teacher-weights {0}/other.pth", "other.pth"),
    ("--method projector --feature-loss mse", "--feature-loss"),
    ("--color-jitter 0.1", "--color-jitter"),
    ("--student resnet18 --variant lifted --img-size 32", "resnet18"),
    ("--out {0}/run", "--resume"),
    ("--method none --out {0}/file", "file"),
    ("--resume --out {0}/norun", "norun"),
    ("--resume --out {0}/cutrun", "last.pt"),
    ("--resume --out {0}/run --method soft", "--method none"),
    ("--device cuda", "CUDA"),
    ("--data {0}/single --method none --batch-size 2", "one class"),
    ("--resume --out {0}/two --epochs 1", "beyond --epochs 1"),
    ("--student-kwargs depth=0", "no layers"),
    ("--student-kwargs embed_dim", "KEY=VALUE"),
    ("--epochs 5 --warmup-epochs 5", "--warmup-epochs"),
    ("--teacher deit_toy_patch8_32 --teacher-weights weights/cait_toy_shapes.safetensors", "width 96, depth 12, 32 px"),
    ("--img-size 48", "32 px"),
    ("--method none --student-weights pretrained", "pretrained weights of deit_toy"),
    ("--teacher-weights {0}/run --teacher cait_toy_patch8_32", "--teacher would"),
    ("--data {0}/good --teacher-weights {0}/run --batch-size 2", "20 classes"),
    ("--eval --out {0}/run --epochs 3", "--epochs"),
    ("--teacher-weights {0}/nan.pth", "NaN"),
    ("--data {0}/bomb --method none --batch-size 1", "exceeds limit"),
    ("--device mps", "MPS"),
    ("--resume --overwrite --out {0}/run", "give one of them"),
]
ANALYZE_MISTAKES = [
    ("--models nope", "nope"),
    ("--data {0}/absent", "absent"),
    ("--data {0}/empty", "no images"),
    ("--data {0}/flat", "0.png"),
    ("--layers 0 12", "out of range"),
    ("--models deit_toy_patch8_32=weights/cait_toy_shapes.safetensors", "deit_toy_patch8_32"),
    ("--models deit_toy_patch8_32=random deit_toy_patch8_32=random", "twice"),
    ("--evolution {0}/norun", "norun"),
    ("--entropy-range nope", "nope"),
    ("--out {0}/file", "file"),
    ("--data {0}/bomb", "exceeds limit"),
]
USUAL = {train_kd: [("--train-size", "64"), ("--batch-size", "16")], analyze: [("--models", "deit_toy_patch8_32=random")]}


@pytest.mark.parametrize("program, words, expected", [*((train_kd, *row) for row in TRAIN_MISTAKES),
                                                      *((analyze, *row) for row in ANALYZE_MISTAKES)])
def test_main_answers_a_mistake_in_one_line(program, words, expected, world, capsys, monkeypatch):
    words = words.format(world).split()
    alone = {"--resume", "--eval", "--evolution"} & {*words}
    for flag, value in [*(() if alone else USUAL[program]), ("--out", str(world / "never"))]:
        if flag not in words and not (flag == "--train-size" and "--data" in words):
            words += [flag, value]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = {path: path.read_bytes() for path in (world / "run").iterdir()}
    with pytest.raises(SystemExit) as end:
        program.main(words)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1 and expected in line, line
    assert "Traceback" not in line and not (world / "never" / "config.json").exists()
    assert {path: path.read_bytes() for path in (world / "run").iterdir()} == before


def test_write_leaves_the_former_checkpoint_on_a_full_disk(tmp_path, world, capsys):
    """No file may grow beyond 64 kB: the checkpoint cannot be written, and the run is none the worse for it."""
    resource = pytest.importorskip("resource")  # not on Windows
    out = tmp_path / "run"
    shutil.copytree(world / "run", out)
    former, resume = (out / "last.pt").read_bytes(), ["--resume", "--out", str(out), "--epochs", "2"]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, unlimited[1]))
    with pytest.raises(SystemExit, match="2"):
        train_kd.main(resume)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    line = capsys.readouterr().err
    assert line.startswith("error: cannot write") and line.count("\n") == 1
    assert (out / "last.pt").read_bytes() == former and not [*out.glob("*.part")]
    train_kd.main(resume)
    assert len(log_of(out)) == 2


def test_analysis_in_an_ascii_locale(tmp_path):
    """Where text is ASCII by default: files are UTF-8, and what is printed is ASCII."""
    make_run(tmp_path / "runs" / "soft-0", log=epochs(1))
    environment = {**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    code = """import analyze, data
data.VAL_SIZE = 20
analyze.main(["--images", "2", "--layers", "0", "--no-controls"])
analyze.main(["--help"])"""
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.isascii(), done.stderr
    assert done.stdout.count(b"done: ") == 1 and b"--entropy-range" in done.stdout


# ----------------------------------------------------------------------
# Whole runs, workers, processes, signals


def test_train_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "VAL_SIZE", 200)
    flags = [*TINY, "--method", "projector", "--epochs", "2"]
    train(tmp_path / "whole", *flags)
    assert "teacher cait_toy_patch8_32: top-1 9" in capsys.readouterr().out and len(log_of(tmp_path / "whole")) == 2
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        "config.json", "log.jsonl", "last.pt", "best.pt", "epoch_0001.pt", "epoch_0002.pt", "student.safetensors",
        "student_ema.safetensors"}

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        stop_before_save(patch, after=2)
        train(tmp_path / "parts", *flags)
    assert len(log_of(tmp_path / "parts")) == 1
    train(tmp_path / "parts", "--resume")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    ends = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")]
    [end.pop("log") for end in ends]
    assert_same(*ends)

    weights = tmp_path / "whole" / "student.safetensors"  # loads into timm without this repository's help
    student = timm.create_model("deit_toy_patch8_32", num_classes=20, depth=2, embed_dim=24, checkpoint_path=weights)
    _, distiller, _ = make("--method", "projector")
    distiller.load_state_dict(ends[0]["distiller"])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(student.eval()(images), distiller.student.eval()(images)[0])


def test_train_resumes_without_the_weights_it_started_from(tuned, photos, tmp_path, monkeypatch, capsys):
    """A teacher and a start from a run's folder; once there is a checkpoint the weights are not needed any more."""
    shutil.copy(tuned / "student.safetensors", tmp_path / "start.safetensors")
    flags = ["--data", str(photos), "--method", "soft", "--teacher-weights", str(tuned), "--student",
             "deit_toy_patch8_32", "--student-kwargs", "depth=2", "--student-weights",
             str(tmp_path / "start.safetensors"), "--epochs", "2"]
    train(tmp_path / "whole", *flags)
    said = capsys.readouterr().out
    settings = models.read_config(tmp_path / "whole")["settings"]
    assert "starts from" in said and "teacher deit_toy_patch8_32: top-1 100.00 %" in said
    assert settings["lr"] == pytest.approx(1e-4 * (4 / 64) ** 0.5) and settings["teacher_kwargs"] == {"depth": 3}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_before_save(patch, after=2)
        train(tmp_path / "parts", *flags)
    (tmp_path / "start.safetensors").unlink()
    train(tmp_path / "parts", "--resume")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert_same_students(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pool_starts_everywhere(method, tmp_path, monkeypatch):
    """Linux forks, macOS and Windows spawn, Python 3.14 has a fork server: the same to the last bit as no workers."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no {method}")
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: method)
    for workers in ("0", "2"):
        train(tmp_path / workers, *TINY, "drop_path_rate=0.5", "--img-size", "64", "--method", "none", "--epochs", "1",
              "--workers", workers)
    assert log_of(tmp_path / "0") == log_of(tmp_path / "2")
    assert_same_students(tmp_path / "0", tmp_path / "2")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signals")
def test_train_ends_the_same_when_killed_twice(tmp_path, monkeypatch, capsys):
    """kill -9 in the first run, SIGTERM in the second (after a step, within an epoch), the third reaches the end."""
    flags = [*TINY, "--method", "none", "--epochs", "3", "--device", "cpu", "--train-size", "640"]
    whole = start("train_kd.py", *flags, "--out", tmp_path / "whole")
    out, update = tmp_path / "parts", train_kd.update
    process = start("train_kd.py", *flags, "--out", out)
    while not (out / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.kill()
    process.wait()

    def update_or_signal(run, stream):
        if run.step == 57:
            signal.raise_signal(signal.SIGTERM)
        update(run, stream)

    resume = ["--resume", "--out", str(out)]
    monkeypatch.setattr(data, "VAL_SIZE", 4000)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train_kd, "update", update_or_signal)
        train_kd.main(resume)
    assert stopped.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM after step 58" in capsys.readouterr().out
    assert not (out / "student.safetensors").exists()
    train_kd.main(resume)
    said, _ = whole.communicate(timeout=60)
    assert whole.returncode == 0 and f"done: {tmp_path / 'whole'}: top-1 " in said
    assert log_of(out) == log_of(tmp_path / "whole") and len(log_of(out)) == 3
    assert models.read_config(out)["command"].startswith("train_kd.py --train-size")  # not the resumption's
    ends = [torch.load(folder / "last.pt", weights_only=True) for folder in (out, tmp_path / "whole")]
    [end.pop("log") for end in ends]
    assert_same(*ends)


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
    train_kd.main(["--resume", "--out", str(tmp_path), "--epochs", str(step // 40 + 1)])
    assert len(log_of(tmp_path)) == step // 40 + 1


def ten_updates(out):
    flags = ("--train-size 16 --batch-size 16 --epochs 10 --student-kwargs depth=2 --warmup-epochs 0 "
             "--snapshot-every 10").split()  # ten epochs of one update
    for name in losses.METHODS:
        train(f"{out}/{name}", *flags, "--method", name)


def test_update_on_two_processes_equals_one(tmp_path, monkeypatch):
    """The first ten losses of every method, float32, same global batch."""
    monkeypatch.setattr(data, "VAL_SIZE", 40)
    two = start(*TWO, "test_smoke.py", tmp_path / "two")
    ten_updates(tmp_path / "one")
    two.communicate(timeout=120)
    assert two.returncode == 0
    for method in losses.METHODS:
        one, two = log_of(tmp_path / "one" / method), log_of(tmp_path / "two" / method)
        assert len(one) == 10
        for a, b in zip(one, two):
            assert b["terms"] == pytest.approx(a["terms"], rel=1e-5), (method, a["epoch"])


if __name__ == "__main__":
    data.VAL_SIZE = 40
    ten_updates(sys.argv[1])
