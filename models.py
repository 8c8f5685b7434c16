"""Teachers and students: any timm model with hooks on its layers, the lifted and widened students, a toy pair.

A *layer* is an entry of timm's `feature_info`: a block of a ViT or CaiT (the self-attention blocks), a stage of
a Swin or ResNet. Its feature map is the raw output, before the final norm, without class or register tokens.
"""
import argparse
import contextlib
import hashlib
import inspect
import json
import logging
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from timm.models import (Cait, VisionTransformer, build_model_with_cfg, generate_default_cfgs, load_state_dict,
                         register_model)
from torch import nn

HERE = Path(__file__).resolve().parent

# ---------- Hooks


class HookedModel(nn.Module):
    """A timm model that also returns the feature maps of the chosen layers (indices into `feature_info`).

    forward: images [B, 3, H, W] -> logits [B, K], maps: list of [B, C, h, w] in the order of `layers`; equal to timm's
    `forward_intermediates(norm=False)`. `mean`, `std`: what the images were normalised with; a model trained with
    others gets them renormalised. `twin`: another model of its kind, whose maps are returned in place of its own.
    Raises ValueError for a layer that the model does not have."""

    def __init__(self, model, layers=(), mean=None, std=None, twin=None):
        super().__init__()
        self.model, self.twin, self.layers, self._maps = model, twin, list(layers), {}
        for layer in self.layers:
            if not 0 <= layer < len(model.feature_info):
                raise ValueError(f"layer {layer} is out of range: {type(model).__name__} has layers 0 to "
                                 f"{len(model.feature_info) - 1}")
            module = dict((twin or model).named_modules()).get(model.feature_info[layer]["module"])
            if not module:
                raise ValueError(f"timm does not tell where {type(model).__name__} has its layers")
            # A bound method, not a closure: a deep copy (the EMA) then hooks itself and not the original.
            module.register_forward_hook(partial(self._keep, layer))
        self.channels = [model.feature_info[layer]["num_chs"] for layer in self.layers]
        own = statistics(model)
        if mean is None or dict(mean=tuple(mean), std=tuple(std)) == own:
            self.scale = None
        else:
            mean, std, own_mean, own_std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std, own["mean"], own["std"]))
            self.register_buffer("scale", std / own_std, persistent=False)
            self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def _keep(self, layer, module, args, output):
        self._maps[layer] = output

    def forward(self, images):
        logits = self.model(self.renormalise(images))
        if self.twin:
            self.twin(self.renormalise(images))
        return logits, [self._as_map(layer, self._maps.pop(layer), images) for layer in self.layers]

    def renormalise(self, images):
        """Images as the model was trained to see them."""
        return images if self.scale is None else images * self.scale + self.shift

    def _as_map(self, layer, output, images):
        if output.ndim == 4:  # Swin keeps channels last
            return output.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else output
        reduction = self.model.feature_info[layer]["reduction"]
        h, w = (-(-size // reduction) for size in images.shape[-2:])  # rounded up, as convolutions do
        tokens = output[:, output.shape[1] - h * w:]  # prefix tokens come first
        return tokens.transpose(1, 2).unflatten(2, (h, w))  # [B, N, C] -> [B, C, h, w]


def statistics(model):
    """Mean and std that the model's images are normalised with."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    return {"mean": tuple(config["mean"]), "std": tuple(config["std"])}


def stages(model):
    """The layers that "First X, Last Y" counts: all of feature_info, less the stem that a CNN begins with."""
    kinds = [re.sub(r"\d", "", info["module"]) for info in model.feature_info]
    stem = len(kinds) > 1 and kinds[0] != kinds[1]  # resnet: act1, layer1, layer2, ...
    return list(range(int(stem), len(kinds)))


@torch.no_grad()
def check_maps(hooked, img_size):
    """Try a HookedModel on two random images -> its maps. Raises ValueError if it fails, or differs from timm's own
    forward_intermediates: hooks cannot know how every family of models lays out its tokens."""
    name = hooked.model.pretrained_cfg.get("architecture") or type(hooked.model).__name__
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    try:
        maps, expected = hooked.eval()(images)[1], []
        if maps:
            expected = (hooked.twin or hooked.model).forward_intermediates(
                hooked.renormalise(images), indices=hooked.layers, norm=False, intermediates_only=True)
    except Exception as error:  # whatever a family of models raises on images or layers that it was not made for
        raise ValueError(f"{name} fails on images of {img_size} px: {one_line(error)}") from error
    if not all(A.shape == B.shape and A.allclose(B) for A, B in zip(maps, expected, strict=True)):
        raise ValueError(f"the feature maps of {name} cannot be read by hooks on its layers {hooked.layers}")
    return maps


def choose_layers(first, last, depth):
    """First X, Last Y of `depth` layers (DD Table 1), ascending and without repeats."""
    if not (0 <= first <= depth and 0 <= last <= depth):
        raise ValueError(f"first {first} and last {last} must lie in 0..{depth}, the depth of the model")
    return sorted({*range(first), *range(depth - last, depth)})


def pair_layers(student, teacher, settings):
    """The layers to align, student's and teacher's: lists typed by hand, or First X, Last Y of either's stages."""
    layers_s, layers_t = settings.student_layers, settings.teacher_layers
    if not layers_s and not layers_t:
        layers_s, layers_t = ([layers[i] for i in choose_layers(settings.first, settings.last, len(layers))]
                              for layers in map(stages, (student, teacher)))
    if len(layers_s) != len(layers_t) or not layers_s or any(each != sorted({*each}) for each in (layers_s, layers_t)):
        raise ValueError(f"student layers {layers_s} and teacher layers {layers_t} cannot be paired: give as many of "
                         f"each, at least one (or --beta 0), and let them ascend without repeats")
    return layers_s, layers_t


# ---------- Student variants (EM)


def plain(name, teacher_width=None, **kwargs):
    """Any timm model."""
    try:
        model = timm.create_model(name, **kwargs)
        if model.feature_info:
            return model
        raise LookupError("it has no layers")
    except (RuntimeError, TypeError, AssertionError, ArithmeticError, LookupError) as error:
        raise ValueError(f"cannot build {name}: {one_line(error)}") from error


def _vit(name, **kwargs):
    model = plain(name, **kwargs)
    if not isinstance(model, VisionTransformer) or hasattr(model, "head_dist"):
        raise ValueError(f"lifted and widened students are made from plain ViT or DeiT models, not from {name}")
    return model


def lifted(name, teacher_width, **kwargs):
    """EM Lift: the last block's tokens go through Linear(C_s -> C_t, no bias) and LayerNorm. The lifted map is
    the last layer's feature map and stays at inference: the classifier reads the mean over its patch tokens."""
    model = _vit(name, **{**kwargs, "global_pool": "avg", "fc_norm": False})
    lift = nn.Linear(model.embed_dim, teacher_width, bias=False), nn.LayerNorm(teacher_width, eps=1e-6)
    model.blocks[-1] = nn.Sequential(model.blocks[-1], *lift)
    model.norm = nn.Identity()  # the lift has brought its own
    return _widen_head(model, teacher_width)


def widened(name, teacher_width, **kwargs):
    """EM WideLast: the last block is as wide as the teacher, entered through Linear(C_s -> C_t, no bias) and
    LayerNorm, with heads of the same size; the final norm and the classifier are as wide."""
    model = _vit(name, **kwargs)
    head_width = model.embed_dim // model.blocks[-1].attn.num_heads
    if teacher_width % head_width:
        raise ValueError(f"a block of width {teacher_width} cannot have heads of {head_width} channels as {name} has")
    wide = _vit(name, **{**kwargs, "embed_dim": teacher_width, "num_heads": teacher_width // head_width, "depth": 1})
    for name, module in model.blocks[-1].named_children():
        if name.startswith("drop_path"):  # of the last block's rate; alone, a block would have that of the first
            setattr(wide.blocks[0], name, module)
    lift = nn.Linear(model.embed_dim, teacher_width, bias=False), nn.LayerNorm(teacher_width, eps=1e-6)
    model.blocks[-1] = nn.Sequential(*lift, wide.blocks[0])
    model.norm, model.fc_norm = wide.norm, wide.fc_norm
    return _widen_head(model, teacher_width)


VARIANTS = {"plain": plain, "lifted": lifted, "widened": widened}


def _widen_head(model, width):
    model.embed_dim = model.num_features = model.head_hidden_size = model.feature_info[-1]["num_chs"] = width
    model.reset_classifier(model.num_classes)
    return model


# ---------- Building


def build_model(name, *, num_classes, img_size=None, variant="plain", teacher_width=None, pretrained=False,
                weights=None, random_head=False, **timm_kwargs):
    """Build a timm model, or a student variant of it, with weights from the hub or from a local file.

    `teacher_width`: C_t, for the variants. `weights`: a `.safetensors`, `.pt` or `.pth` file. A checkpoint for another
    number of classes is an error, unless `random_head` asks for a fresh classifier (DD Table 2). Raises ValueError.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models('*part_of_name*') lists what it has")
    size = dict(input_size=(3, img_size, img_size)) if img_size else {}  # for timm's transforms
    if img_size and timm.get_pretrained_cfg(name).fixed_input_size:  # CNNs take any size and have no such argument
        timm_kwargs["img_size"] = img_size
    create = partial(VARIANTS[variant], name, teacher_width=teacher_width, num_classes=num_classes,
                     pretrained_cfg_overlay=size, **timm_kwargs)
    if weights:
        state, classifiers = read_weights(weights), _classifiers(name)
        if random_head:
            fresh = create().state_dict()
            state.update({key: value for key, value in fresh.items() if key.startswith(classifiers)})
        found = [len(state[f"{c}weight"]) for c in classifiers if f"{c}weight" in state]
        try:
            if variant != "plain":
                model = create()
                model.load_state_dict(state)
            else:
                # By way of timm's own loader, which adapts published formats and position embeddings.
                overlay = dict(state_dict=state, num_classes=found[0] if found else num_classes, **size)
                model = create(pretrained=True, num_classes=overlay["num_classes"], pretrained_cfg_overlay=overlay)
        except Exception as error:  # whatever a foreign file makes timm stumble on
            headless = "; it has no classifier: --teacher-head random" if classifiers and not found else ""
            raise ValueError(f"{weights} does not hold weights of {name} ({variant}){_hint(state)}{headless}: "
                             f"{one_line(error)}") from error
        if found and found[0] != num_classes:
            raise ValueError(f"{weights} has {found[0]} classes, data {num_classes}: consider --teacher-head random")
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError(f"{weights} holds NaN or infinity: it cannot be used")
        return model
    if pretrained:
        check_pretrained_classes(name, num_classes, random_head)
        headless = dict(pretrained_cfg_overlay=dict(size, num_classes=0))  # timm drops classifiers of another size
        return _from_hub(name, partial(create, **headless) if random_head else create)
    model = create()
    patch = np.max(getattr(getattr(model, "patch_embed", None), "patch_size", 1))  # an int or a pair
    if img_size and img_size % patch:
        raise ValueError(f"{name} cannot cut an image of {img_size} px into patches of {patch}: choose a multiple")
    return model


def _classifiers(name):
    """The prefixes of the classifiers' tensors, "head." of most models."""
    classifier = timm.get_pretrained_cfg(name).classifier
    return tuple(f"{each}." for each in ([classifier] if isinstance(classifier, str) else classifier))


def _from_hub(name, create):
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours instead of its many
    try:
        return create(pretrained=True)
    except Exception as error:  # hub, network and cache errors of many kinds
        raise ValueError(f"cannot fetch the pretrained weights of {name}, give a file: {one_line(error)}") from error


def _hint(state):
    """What a file says of itself, for the message that it does not fit."""
    if not {"pos_embed", "patch_embed.proj.weight"} <= state.keys() or state["pos_embed"].ndim != 3:
        return ""
    positions, width = state["pos_embed"].shape[1:]
    size = int(positions ** 0.5) * state["patch_embed.proj.weight"].shape[-1]  # less a class token, if there is one
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return f" but a model of {len(state.get('head.weight', ()))} classes, width {width}, depth {depth}, {size} px"


@torch.random.fork_rng(devices=[])  # a resumed run, which skips it, draws the same afterwards
def start_from(model, name, source, img_size, variant="plain"):
    """Copy into a student what fits, by name and shape, of pretrained weights -> one line on what is new or left over.
    source: "pretrained" (timm's), a file, or a run's folder. Raises ValueError if less than half fits."""
    if source == "pretrained":
        size = dict(img_size=img_size) if timm.get_pretrained_cfg(name).fixed_input_size else {}
        state = _from_hub(name, partial(plain, name, **size)).state_dict()
    else:
        file = Path(source) / "student.safetensors" if Path(source).is_dir() else Path(source)
        state = read_weights(file)
        classes = [len(state[f"{c}weight"]) for c in _classifiers(name) if f"{c}weight" in state]
        with contextlib.suppress(ValueError):  # else as it is: cut, grown, or without a head
            state = build_model(name, num_classes=(classes or [0])[0], img_size=img_size, weights=file).state_dict()
    own, origins = model.state_dict(), {}
    last = f"blocks.{len(getattr(model, 'blocks', ())) - 1}."
    for key, value in own.items():
        # A lifted student's last block is the first part of a sequence.
        origin = key.replace(f"{last}0.", last) if variant == "lifted" and key not in state else key
        if origin in state and state[origin].shape == value.shape and state[origin].isfinite().all():
            origins[key] = origin
    fitting = {key: state[origin] for key, origin in origins.items()}
    new, left = [key for key in own if key not in origins], [key for key in state if key not in origins.values()]
    copied, total, offered = (sum(value.numel() for value in each.values()) for each in (fitting, own, state))
    if copied < min(total, offered) / 2:
        raise ValueError(f"{source} does not hold weights of {name} ({variant}){_hint(state)}")
    model.load_state_dict(fitting, strict=False)
    head = " (classifier drawn afresh)" if any(key.startswith(_classifiers(name)) for key in new) else ""
    return (f"{name} starts from {source}: {copied:,} of {total:,} values; new{head}: {_names(new)}; without a place: "
            f"{_names(left)}")


def _names(keys):
    modules = [*dict.fromkeys(re.match(r"blocks\.\d+(\.\d+)?|[^.]+", key)[0] for key in keys)]
    return ", ".join(modules[:6]) + (f" and {len(modules) - 6} more" if len(modules) > 6 else "") or "nothing"


def load_student(run, file="student.safetensors", trained=True):
    """The student of a run's folder, plain, lifted or widened, with the weights of a `file` of it (student.safetensors,
    best.pt, epoch_0030.pt, ...), or its untrained twin. Raises ValueError if it is not there."""
    path, config = Path(run) / file, read_config(run)
    settings, width = config["settings"], None
    if not path.is_file():
        raise ValueError(f"{run} has no {file}: the run has not got there yet")
    if settings["variant"] != "plain":
        width = read_weights(path)["head.weight"].shape[1]  # C_t
    model = build_model(
        settings["student"], num_classes=config["images"]["classes"], img_size=settings["img_size"],
        variant=settings["variant"], teacher_width=width, weights=path if trained else None,
        **(settings["student_kwargs"] or {}))
    model.pretrained_cfg["crop_pct"] = settings["crop_pct"] if settings["img_size"] >= 64 else 1.0  # as in validation
    return model


def is_run(path):
    """Whether a path is the folder of a run."""
    return bool(path) and (Path(path) / "config.json").is_file()


def read_config(run):
    """config.json of a run's folder. Raises ValueError if there is none."""
    try:
        config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        return {"class_names": None, **config, "settings": config["settings"], "images": config["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:  # others have files of that name, too
        raise ValueError(f"{run} is not the folder of a run: {one_line(error)}") from error


def check_pretrained_classes(name, num_classes, random_head=False):
    """Raise ValueError if timm's pretrained classifier is not one of `num_classes` and none was asked for."""
    trained = timm.get_pretrained_cfg(name).num_classes if timm.is_model(name) else num_classes
    if trained != num_classes and not random_head:
        raise ValueError(f"the pretrained {name} has {trained} classes and the data {num_classes}: give other "
                         f"--teacher-weights, or --teacher-head random")


def read_weights(path):
    """A checkpoint file -> {name: tensor}, without unpickling code. Raises ValueError if it is not one. A relative path
    may start from the working folder or from this file's, where the embedded teacher lies."""
    file = Path(path) if Path(path).exists() else HERE / path
    try:
        file.stat()  # timm would print a line of its own
        state = load_state_dict(file, use_ema=False, weights_only=True)
    except Exception as error:  # cut short, foreign, or a pickle that could hold code
        advice = "; save model.state_dict() alone" if "weights_only" in str(error) else ""
        raise ValueError(f"cannot read {path} as weights (.safetensors, .pt){advice}: {one_line(error)}") from error
    states = [each for each in (state, *state.values())
              if isinstance(each, dict) and all(map(torch.is_tensor, each.values()))]
    if len(states) != 1:
        raise ValueError(f"{path} holds {', '.join(map(str, state))}: save the state_dict that is meant alone")
    return states[0]


def digest(model):
    """A fingerprint of a model's weights."""
    values = [tensor.cpu().flatten().view(torch.uint8).numpy() for tensor in model.state_dict().values()]
    return hashlib.blake2b(b"".join(values), digest_size=8).hexdigest()


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def key_value(text):
    """The argparse type of what timm's ParseKwargs takes apart."""
    own = {*inspect.signature(build_model).parameters, *inspect.signature(build_teacher).parameters}
    if "=" not in text or text.partition("=")[0] in own | {"pretrained_cfg_overlay", "features_only"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, or a key that other flags decide")
    return text


def build_teacher(name, source, *, num_classes, img_size, random_head=False, needed=True, blank=False, **timm_kwargs):
    """The teacher with the weights of a file, of a run's folder or of timm; with random ones if `source` says so, if
    its output is not `needed`, or for a `blank` trial."""
    blank = blank or not needed or source == "random"
    if is_run(source):
        return load_student(source, trained=not blank)
    if needed and not source:
        check_pretrained_classes(name, num_classes, random_head)
    return build_model(name, num_classes=num_classes, img_size=img_size, random_head=random_head, **timm_kwargs,
                       pretrained=not blank and not source, weights=None if blank else source)


def settings_of(student, teacher_weights):
    """The settings that follow from a student's name (its image size) and from a teacher's run, if it has one."""
    settings = {}
    if student and timm.is_model(student):
        settings["img_size"] = timm.get_pretrained_cfg(student).input_size[-1]
    if is_run(teacher_weights):
        of_run = read_config(teacher_weights)["settings"]
        settings.update(teacher=of_run["student"], teacher_kwargs=of_run["student_kwargs"] or {},
                        img_size=of_run["img_size"])
    return settings


# ---------- Devices


def choose_device(name=None):
    """This process's device: the one asked for, else cuda, else mps, else cpu. Raises ValueError if there is none."""
    processes, cuda = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.is_available()
    mps = int(torch.backends.mps.is_available())
    name = name or ("cuda" if cuda else "mps" if mps and processes == 1 else "cpu")
    count = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": mps, "cpu": processes}[name]
    if processes > count:
        raise ValueError(f"{processes} processes want a {name.upper()} device each and there are {count}: "
                         f"lower --nproc_per_node, leave --device out, or --device cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    return torch.device(name)


def default_amp(device, img_size):
    """Both models in bfloat16 from 64 px where the device computes in it (T4 and V100 only emulate it), else off."""
    native = device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & {*cpu_info("flags").split()}
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "both" if native and img_size >= 64 else "off"


def cpu_info(key):
    """A line of Linux's /proc/cpuinfo, or "" elsewhere."""
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").split(f"\n{key}")[1].split("\n")[0].strip("\t: ")
    return ""


# ---------- The toy pair: 12 layers each, 32 x 32 pixels in 4 x 4 patches; the teacher is twice as wide

_toy_cfg = dict(num_classes=20, input_size=(3, 32, 32), fixed_input_size=True, crop_pct=1.0, mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5), interpolation="bicubic", first_conv="patch_embed.proj", classifier="head")
default_cfgs = generate_default_cfgs({"cait_toy_patch8_32": _toy_cfg, "deit_toy_patch8_32": _toy_cfg})


def _toy(model_class, name, pretrained, **kwargs):
    model = build_model_with_cfg(model_class, name, pretrained, feature_cfg=dict(feature_cls="getter"), **kwargs)
    if not pretrained:
        # timm draws weights for hundreds of channels; at 48 to 96 the signal would all but vanish in the blocks.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.trunc_normal_(model.pos_embed, std=0.2)
        nn.init.trunc_normal_(model.cls_token, std=0.2)
    return model


@register_model
def cait_toy_patch8_32(pretrained=False, **kwargs):
    """A CaiT of 12 self-attention blocks and one of class attention, 96 channels wide: 1.5 M parameters."""
    args = dict(img_size=32, patch_size=8, embed_dim=96, depth=12, num_heads=4, depth_token_only=1, init_values=0.1)
    return _toy(Cait, "cait_toy_patch8_32", pretrained, **{**args, **kwargs})


@register_model
def deit_toy_patch8_32(pretrained=False, **kwargs):
    """A DeiT of 12 blocks, 48 channels wide: 0.35 M parameters. LayerScale and qk_norm bring its seeds together."""
    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=12, num_heads=3, init_values=0.1, qk_norm=True)
    return _toy(VisionTransformer, "deit_toy_patch8_32", pretrained, **{**args, **kwargs})
