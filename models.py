"""Teachers and students: any timm model with hooks on its layers, the students of Encoding Mismatch (EM),
and a toy pair.

A *layer* is an entry of timm's `feature_info`: a block of a ViT or CaiT (a self-attention block),
a stage of a Swin or ResNet. Its feature map is the raw output, before the final norm, without class
or register tokens.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import (
    Cait, VisionTransformer, build_model_with_cfg, generate_default_cfgs, load_state_dict,
    register_model)
from torch import nn

HERE = Path(__file__).resolve().parent


class ModelError(ValueError):
    """A model, weights, a layer or a device that cannot be used."""


# ---------- Hooks


class HookedModel(nn.Module):
    """A timm model that also returns the feature maps of the chosen layers (of `feature_info`).

    forward: images [B, 3, H, W] -> logits [B, K] and a list of maps [B, C, h, w] in the order of
    `layers`, equal to timm's `forward_intermediates(norm=False)`. `mean`, `std`: what the images were
    normalised with, if not with the model's own. Raises ModelError for a layer that the model does not have.
    """

    def __init__(self, model, layers=(), mean=None, std=None):
        super().__init__()
        self.model = model
        self.layers = []
        self.channels = []
        self._maps = {}
        for layer in layers:
            self.hook(layer)

        if mean is None:
            self.scale = None
        else:
            # From (x - mean) / std to (x - own_mean) / own_std.
            own = statistics(model)
            own_mean, own_std = torch.tensor(own["mean"]), torch.tensor(own["std"])
            scale = torch.tensor(std) / own_std
            shift = (torch.tensor(mean) - own_mean) / own_std
            self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
            self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def hook(self, layer):
        """Keep the map of one more layer."""
        count = len(self.model.feature_info)
        if not 0 <= layer < count:
            raise ModelError(f"layer {layer} is out of range: the model has layers 0 to {count - 1}")
        info = self.model.feature_info[layer]
        module = dict(self.model.named_modules()).get(info["module"])
        if module is None:
            raise ModelError(f"timm does not tell where the model has layer {layer}")
        # A deep copy (the EMA) copies the object of a bound method, too: it then keeps its own maps.
        module.register_forward_hook(partial(self._keep, layer))
        self.layers.append(layer)
        self.channels.append(info["num_chs"])

    def _keep(self, layer, module, args, output):
        self._maps[layer] = output

    def forward(self, images):
        logits = self.model(self.renormalise(images))
        # pop: a map that was kept would keep its graph alive.
        maps = [self._as_map(layer, self._maps.pop(layer), images) for layer in self.layers]
        return logits, maps

    def renormalise(self, images):
        """Images as the model was trained to see them."""
        return images if self.scale is None else images * self.scale + self.shift

    def _as_map(self, layer, output, images):
        if output.ndim == 4:
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"  # Swin: [B, h, w, C]
            return output.permute(0, 3, 1, 2) if channels_last else output
        reduction = self.model.feature_info[layer]["reduction"]
        h, w = (math.ceil(size / reduction) for size in images.shape[-2:])
        tokens = output[:, output.shape[1] - h * w:]  # prefix tokens come first
        return tokens.transpose(1, 2).unflatten(2, (h, w))  # [B, N, C] -> [B, C, h, w]


class UntrainedMaps(HookedModel):
    """A control: logits from a trained teacher, maps from an untrained model of the same kind.

    self.model is the untrained one, self.of_logits the teacher.
    """

    def __init__(self, teacher, untrained_copy, layers, mean, std):
        super().__init__(untrained_copy, layers, mean, std)
        self.of_logits = HookedModel(teacher, (), mean, std)

    def forward(self, images):
        logits, _ = self.of_logits(images)
        _, maps = super().forward(images)
        return logits, maps


def statistics(model):
    """Mean and std that the model's images are normalised with."""
    config = model.pretrained_cfg
    return {"mean": config["mean"], "std": config["std"]}


def stages(model):
    """The layers that "First X, Last Y" counts: all of feature_info but the stem of a CNN."""
    # A ResNet has act1 (the stem), layer1, layer2, ...: without digits act, layer, layer, ... A ViT has
    # blocks., blocks., ...: no stem.
    words = [re.sub(r"\d", "", info["module"]) for info in model.feature_info]
    has_stem = len(words) > 1 and words[0] != words[1]
    return list(range(int(has_stem), len(words)))


@torch.no_grad()
def check_maps(hooked, img_size):
    """Try a HookedModel on two random images -> its maps. Raises ModelError if it cannot be used.

    Its maps must be those of timm's own forward_intermediates, because models lay out their tokens in
    many ways.
    """
    name = type(hooked.model).__name__
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, img_size, img_size, generator=generator)
    hooked.eval()
    try:
        logits = hooked.model(hooked.renormalise(images))
    except Exception as error:  # whatever timm's models raise for images of another size
        raise ModelError(f"{name} fails on images of {img_size} px: {one_line(error)}") from error
    if not logits.isfinite().all():
        raise ModelError(f"{name} computes NaN or infinity: give other weights")
    if not hooked.layers:
        return []
    try:
        _, maps = hooked(images)
        expected = hooked.model.forward_intermediates(
            hooked.renormalise(images), indices=hooked.layers, norm=False, intermediates_only=True)
        torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)
        return maps
    except Exception as error:
        message = (
            f"the feature maps of {name} at {img_size} px cannot be read by hooks on its layers "
            f"{hooked.layers}")
        raise ModelError(message) from error


def choose_layers(first, last, depth):
    """First X, Last Y of `depth` layers (DD Table 1), ascending and without repeats."""
    if not (0 <= first <= depth and 0 <= last <= depth):
        raise ModelError(f"first {first} and last {last} must lie in 0..{depth}, the model's depth")
    return sorted({*range(first), *range(depth - last, depth)})


def pair_layers(student, teacher, settings):
    """-> the student's layers and the teacher's: those typed, or First X, Last Y of each model."""
    layers_s, layers_t = settings.student_layers, settings.teacher_layers
    if not layers_s and not layers_t:
        all_s, all_t = stages(student), stages(teacher)
        layers_s = [all_s[i] for i in choose_layers(settings.first, settings.last, len(all_s))]
        layers_t = [all_t[i] for i in choose_layers(settings.first, settings.last, len(all_t))]
    ascending = layers_s == sorted({*layers_s}) and layers_t == sorted({*layers_t})
    if not layers_s or len(layers_s) != len(layers_t) or not ascending:
        raise ModelError(
            f"student layers {layers_s} and teacher layers {layers_t} cannot be paired: give as "
            f"many of each, at least one, and let them ascend without repeats")
    return layers_s, layers_t


# ---------- Student variants (EM)


def plain(name, teacher_width=None, **kwargs):
    """Any timm model. (teacher_width is not used: all variants have one signature.)"""
    try:
        model = timm.create_model(name, **kwargs)
        if not model.feature_info:
            raise LookupError("it has no layers")
        return model
    except Exception as error:  # whatever a wrong argument makes timm stumble on
        raise ModelError(f"cannot build {name}: {one_line(error)}") from error


def _plain_vit(name, **kwargs):
    """A plain ViT or DeiT, from which the two variants below are made."""
    model = plain(name, **kwargs)
    usual = isinstance(model, VisionTransformer) and hasattr(model.blocks[-1], "attn")
    if not usual or model.attn_pool or model.pool_include_prefix:
        raise ModelError(
            f"lifted and widened students are made from plain ViT or DeiT models, "
            f"not from {type(model).__name__} {name}")
    return model


def lifted(name, teacher_width, **kwargs):
    """EM Lift adds Linear(C_s -> C_t, no bias) and LayerNorm after the last block.

    Their output is the feature map of the last layer. The lift is kept at inference: the classifier
    reads the mean over the lifted patch tokens.
    """
    model = _plain_vit(name, **kwargs)
    lift = _lift(model.embed_dim, teacher_width)
    model.blocks[-1] = nn.Sequential(model.blocks[-1], *lift)
    model.norm = model.fc_norm = nn.Identity()  # the lift has brought its own
    return _widen_head(model, teacher_width, "avg")


def widened(name, teacher_width, **kwargs):
    """EM WideLast: the last block is as wide as the teacher. Its attention heads keep their width.

    Linear(C_s -> C_t, no bias) and LayerNorm come before it. The final norm and the classifier are as
    wide as the block.
    """
    model = _plain_vit(name, **kwargs)
    head_width = model.embed_dim // model.blocks[-1].attn.num_heads
    if teacher_width % head_width:
        raise ModelError(
            f"a block of width {teacher_width} cannot have heads of {head_width} channels, like those of {name}")
    heads = teacher_width // head_width
    # A model of one block, as wide as the teacher, gives its block and its norms.
    wide = plain(name, **{**kwargs, "embed_dim": teacher_width, "num_heads": heads, "depth": 1})
    block = wide.blocks[0]
    for child, module in model.blocks[-1].named_children():
        if child.startswith("drop_path"):  # keep the last block's: the rate grows with depth
            setattr(block, child, module)
    lift = _lift(model.embed_dim, teacher_width)
    model.blocks[-1] = nn.Sequential(*lift, block)
    model.norm = wide.norm
    model.fc_norm = wide.fc_norm
    return _widen_head(model, teacher_width)


VARIANTS = {"plain": plain, "lifted": lifted, "widened": widened}


def _lift(width, teacher_width):
    return nn.Linear(width, teacher_width, bias=False), nn.LayerNorm(teacher_width, eps=1e-6)


def _widen_head(model, width, pool=None):
    model.embed_dim = model.num_features = model.head_hidden_size = width  # timm reads all three
    model.feature_info[-1]["num_chs"] = width
    model.reset_classifier(model.num_classes, pool)
    return model


# ---------- Building


def build_model(
        name, *, num_classes, img_size=None, variant="plain", teacher_width=None, pretrained=False,
        weights=None, random_head=False, **timm_kwargs):
    """Build a timm model, or a student variant of it, with weights from the hub or from a file.

    `teacher_width`: C_t, for the variants. `weights`: a `.safetensors`, `.pt` or `.pth` file. Its number
    of classes must fit, unless `random_head` asks for a new classifier (DD Table 2). Raises ModelError.
    """
    config = pretrained_config(name)
    overlay = {}
    if img_size:
        overlay["input_size"] = (3, img_size, img_size)  # for timm's transforms
        if config.fixed_input_size:  # as a ViT has; a CNN takes no img_size
            timm_kwargs["img_size"] = img_size
    build = VARIANTS[variant]
    kwargs = dict(teacher_width=teacher_width, num_classes=num_classes, **timm_kwargs)
    if weights:
        return _from_file(build, name, weights, random_head, overlay, kwargs)
    if pretrained:
        if random_head:
            overlay["num_classes"] = 0  # timm then leaves out the weights' classifier
        elif config.num_classes != num_classes:
            raise ModelError(wrong_classes_message(name, "pretrained", config.num_classes, num_classes))
        return _from_hub(build, name, overlay, kwargs)
    return build(name, pretrained_cfg_overlay=overlay, **kwargs)


def wrong_classes_message(name, source, found, wanted):
    return (
        f"{name}'s weights ({source}) have {found} classes and the data {wanted}: fine-tune them, with "
        f"--method none --student {name} --student-weights {source}, and take that run as the teacher")


def pretrained_config(name):
    """What timm knows of a model's pretrained weights. Raises ModelError for an unknown name."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ModelError(f"timm has no model {name!r}: see timm.list_models('*part_of_name*')")
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        raise ModelError(f"timm has no weights {name!r}, only {', '.join(known) or architecture}")
    return timm.get_pretrained_cfg(name)


def _from_file(build, name, path, random_head, overlay, kwargs):
    state = read_weights(path)
    classifiers = _classifiers(name)
    if random_head:
        fresh = build(name, pretrained_cfg_overlay=overlay, **kwargs).state_dict()
        for key in fresh:
            if key.startswith(classifiers):
                state[key] = fresh[key]
    classes = _count_classes(name, state)
    if classes not in (None, kwargs["num_classes"]):
        raise ModelError(wrong_classes_message(name, path, classes, kwargs["num_classes"]))
    try:
        if build is plain:
            # timm's loader adapts published formats and position embeddings. As it gets the
            # state_dict, it downloads nothing.
            overlay = dict(overlay, state_dict=state, num_classes=kwargs["num_classes"])
            return build(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        model = build(name, pretrained_cfg_overlay=overlay, **kwargs)
        model.load_state_dict(state)
        return model
    except Exception as error:  # whatever a foreign file makes timm stumble on
        hint = "it has no classifier (--teacher-head random?); " if classes is None else ""
        message = f"{path} does not hold weights of {name}: {hint}{one_line(error)}"
        raise ModelError(message) from error


def _from_hub(build, name, overlay, kwargs):
    try:
        return build(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as error:  # hub, network and cache errors of many kinds
        message = f"cannot fetch the pretrained weights of {name}, give a file: {one_line(error)}"
        raise ModelError(message) from error


def _classifiers(name):
    """The prefixes of the classifiers' tensors, "head." of most models."""
    names = timm.get_pretrained_cfg(name).classifier
    if isinstance(names, str):
        names = [names]
    return tuple(f"{each}." for each in names)


def _count_classes(name, state):
    """The number of classes of a file's classifier, or None if it has none."""
    for classifier in _classifiers(name):
        if f"{classifier}weight" in state:
            return len(state[f"{classifier}weight"])


# Leaves the random state alone: a resumed run skips this, and has to draw the same numbers later.
@torch.random.fork_rng(devices=[])
def start_from(model, name, source, img_size, variant="plain"):
    """Copy what fits of some weights, by name and shape, into a student -> one line on the result.

    source: "pretrained" (timm's), a file, or a run's folder. Raises ModelError if less than half
    of the smaller one fits.
    """
    own = model.state_dict()
    state = _starting_weights(name, source, img_size, own)
    last_block = f"blocks.{len(getattr(model, 'blocks', ())) - 1}."
    fitting = {}
    for key, value in own.items():
        origin = key
        if variant == "lifted" and key not in state:
            # The student's blocks.11.0.x is called blocks.11.x in the weights of a plain model.
            origin = key.replace(f"{last_block}0.", last_block)
        found = state.get(origin)
        if found is not None and found.shape == value.shape:
            fitting[key] = found
    counts = f"{len(fitting)} of {len(own)} tensors"
    if len(fitting) < min(len(own), len(state)) / 2:
        raise ModelError(f"{source} does not hold weights of {name} ({variant}): {counts} fit")
    model.load_state_dict(fitting, strict=False)
    new = [key for key in own if key not in fitting]
    return f"{name} starts from {source}: {counts}; new: {', '.join(new[:9]) or 'nothing'}"


def _starting_weights(name, source, img_size, own):
    if source == "pretrained":
        classes = pretrained_config(name).num_classes
        return build_model(name, num_classes=classes, img_size=img_size, pretrained=True).state_dict()
    path = Path(source)
    if path.is_dir():
        path = path / "student.safetensors"
    state = read_weights(path)
    try:  # timm adapts published formats
        classes = _count_classes(name, state) or 0  # 0: without a classifier
        return build_model(name, num_classes=classes, img_size=img_size, weights=path).state_dict()
    except ModelError:  # of another depth, lifted, widened: the tensors as they are
        if "pos_embed" in state and "pos_embed" in own:
            count = own["pos_embed"].shape[1]
            grid = math.isqrt(count)  # 197 = 14 x 14 + a class token
            with contextlib.suppress(RuntimeError):  # of another model: start_from will refuse it
                state["pos_embed"] = resample_abs_pos_embed(
                    state["pos_embed"], [grid, grid], num_prefix_tokens=count - grid**2)
        return state


def build_teacher(args, classes, untrained=False):
    """The teacher of a run's settings, with the weights that they name, or with random ones."""
    source = args.teacher_weights
    untrained = untrained or source == "random"
    if is_run(source):
        return load_student(source, trained=not untrained)
    return build_model(
        args.teacher, num_classes=classes, img_size=args.img_size,
        random_head=args.teacher_head == "random", pretrained=not untrained and not source,
        weights=None if untrained else source)


# ---------- Folders of runs, files of weights


def load_student(run, file="student.safetensors", trained=True):
    """The student of a run's folder, plain, lifted or widened, with the weights of one of its files.

    `file`: student.safetensors, student_ema.safetensors, best.pt, epoch_0030.pt, ... Without `trained`
    the weights are random. Raises ModelError for what is not there.
    """
    path = Path(run) / file
    config = read_config(run)
    settings = config["settings"]
    width = None
    if settings["variant"] != "plain":
        width = read_weights(path)["head.weight"].shape[1]  # C_t
    model = build_model(
        settings["student"], num_classes=config["images"]["classes"], img_size=settings["img_size"],
        variant=settings["variant"], teacher_width=width, weights=path if trained else None,
        **settings["student_kwargs"])
    small = settings["img_size"] < 64
    model.pretrained_cfg["crop_pct"] = 1.0 if small else settings["crop_pct"]  # as in validation
    return model


def is_run(path):
    """Whether a path is the folder of a run."""
    return bool(path) and (Path(path) / "config.json").is_file()


def has_weights(run):
    """Whether a run has got as far as a checkpoint."""
    return any((Path(run) / name).exists() for name in ("last.pt", "student.safetensors"))


def write(path, content):
    """Write NAME.part, then rename it: a crash leaves the former file whole."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def read_config(run):
    """config.json of a run's folder. Raises ModelError if there is none."""
    try:
        config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        if "settings" not in config:
            raise ValueError("config.json is another program's")
        return config
    except (OSError, ValueError) as error:
        raise ModelError(f"{run} is not the folder of a run: {one_line(error)}") from error


def implied_settings(student, teacher_weights):
    """{"img_size": ...} from the student's name; with a teacher's run, its image size and its model."""
    if is_run(teacher_weights):
        of_run = read_config(teacher_weights)["settings"]
        return {"teacher": of_run["student"], "img_size": of_run["img_size"]}
    return {"img_size": pretrained_config(student).input_size[-1]}


def read_weights(path):
    """A checkpoint file -> {name: tensor}, without unpickling code. Raises ModelError for other files.

    A relative path is tried in the working folder, then in this repository (weights/).
    """
    file = Path(path) if Path(path).exists() else HERE / path
    if not file.is_file():
        raise ModelError(f"{path} is neither a file nor the folder of a run")
    try:
        state = load_state_dict(file, use_ema=False, weights_only=True)
    except Exception as error:  # cut short, foreign, or a pickle that could hold code
        raise ModelError(
            f"cannot read {path} as weights (save model.state_dict() alone): "
            f"{one_line(error)}") from error
    if not all(map(torch.is_tensor, state.values())):
        raise ModelError(f"{path} holds more than weights: save model.state_dict() alone")
    return state


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def prepare_console():
    """A console that lacks a character, or that is closed (>&-), must not stop a program."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def key_value(text):
    """Check a KEY=VALUE, which timm's ParseKwargs then splits. (An argparse type.)"""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


# ---------- Devices


def choose_device(name=None):
    """This process's device: the one asked for, else cuda, else mps, else cpu. Raises ModelError."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": processes}  # as many as are wanted
    if not name:
        name = "cpu"
        if available["cuda"]:
            name = "cuda"
        elif available["mps"] and processes == 1:
            name = "mps"
    if processes > available[name]:
        raise ModelError(
            f"{processes} processes want a {name.upper()} device each and there are "
            f"{available[name]}: lower --nproc_per_node, leave --device out, or --device cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    return torch.device(name)


def has_bfloat16(device):
    """Whether a device is a GPU that computes in bfloat16 itself (T4 and V100 only emulate it)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# ---------- The toy pair: 12 layers each, 4 x 4 patches of 8 px; the teacher is twice as wide

_toy_config = dict(
    num_classes=20, input_size=(3, 32, 32), fixed_input_size=True, crop_pct=1.0,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic",
    first_conv="patch_embed.proj", classifier="head")
# timm's register_model looks this name up.
default_cfgs = generate_default_cfgs({
    "cait_toy_patch8_32": _toy_config,
    "deit_toy_patch8_32": _toy_config})


def _toy(model_class, name, pretrained, **kwargs):
    model = build_model_with_cfg(
        model_class, name, pretrained, feature_cfg=dict(feature_cls="getter"), **kwargs)
    if not pretrained:
        # timm's first weights are made for hundreds of channels. With 48 to 96 of them the signal
        # would all but vanish in the blocks.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.trunc_normal_(model.pos_embed, std=0.2)
        nn.init.trunc_normal_(model.cls_token, std=0.2)
    return model


@register_model
def cait_toy_patch8_32(pretrained=False, **kwargs):
    """A CaiT of 12 self-attention blocks and one of class attention, 96 channels wide: 1.5 M parameters."""
    sizes = dict(
        img_size=32, patch_size=8, embed_dim=96, depth=12, num_heads=4, depth_token_only=1,
        init_values=0.1)
    return _toy(Cait, "cait_toy_patch8_32", pretrained, **{**sizes, **kwargs})


@register_model
def deit_toy_patch8_32(pretrained=False, **kwargs):
    """A DeiT of 12 blocks, 48 channels wide: 0.35 M parameters.

    With LayerScale and qk_norm its accuracy depends less on the seed.
    """
    sizes = dict(
        img_size=32, patch_size=8, embed_dim=48, depth=12, num_heads=3, init_values=0.1,
        qk_norm=True)
    return _toy(VisionTransformer, "deit_toy_patch8_32", pretrained, **{**sizes, **kwargs})
