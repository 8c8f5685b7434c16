"""Objectives of three papers (DD, SK, EM: see README): logits KD, and four kinds of feature KD.

The invariant: everything that learns is a submodule of one `Distiller`. DDP wraps it, the optimizer
takes its parameters, the checkpoint stores it. The teacher is an argument of its `forward`, never a
member: it stays frozen, in eval mode, outside DDP, optimizer and checkpoint. (The released code built
its projector at its first use, after the optimizer and outside DDP, and so never trained it.)

A new method is one class with a `@method("name")` line. Its class attributes say what it wants by
default. Its constructor's arguments are its command-line flags: name, type and default come from the
signature, the help from the line "name: ..." of the docstring. The dictionary that it returns is logged.

A batch is one process's share of the global batch. A method that relates the images of a batch to each
other has to gather them first, or it computes something else on two processes than on one.
"""
import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class LossError(ValueError):
    """Maps or settings that a method cannot work with."""


# ---------- Functions


def soft_kd_terms(logits_s, logits_t, labels, *, alpha=0.9, tau=1.0, label_smoothing=0.0):
    """The two terms of DD Eq. 10, weighted: ce = (1 - alpha) CE, kd = alpha tau^2 KL(f_t || f_s).

    Logits [B, K], labels [B]. Both terms are means over the batch. A term of weight 0 is left out.
    """
    terms = {}
    logits_s = at_least_float32(logits_s)
    if alpha < 1:
        ce = F.cross_entropy(logits_s, labels, label_smoothing=label_smoothing)
        terms["ce"] = (1 - alpha) * ce
    if alpha > 0:
        log_p_s = F.log_softmax(logits_s / tau, dim=-1)
        log_p_t = F.log_softmax(at_least_float32(logits_t) / tau, dim=-1)
        kl = F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")
        terms["kd"] = alpha * tau**2 * kl
    return terms


def soft_kd_loss(logits_s, logits_t, labels, *, alpha=0.9, tau=1.0, label_smoothing=0.0):
    """DD Eq. 10, a scalar: (1 - alpha) CE(f_s, y) + alpha tau^2 KL(softmax(f_t / tau) || softmax(f_s / tau))."""
    terms = soft_kd_terms(
        logits_s, logits_t, labels, alpha=alpha, tau=tau, label_smoothing=label_smoothing)
    return sum(terms.values())


def spectral_loss(map_s, map_t):
    """DD Eq. 7 and 9: MSE(F_stack(A_s), F_stack(A_t)). A scalar.

    F_stack is the orthonormal 2D real FFT over h x w, its real and imaginary parts stacked. Maps
    [B, C_s, h, w] and [B, C_t, h, w]; the wider one is pooled over its channels. With the full FFT
    this would be half the spatial MSE (Parseval; real and imaginary parts count as two numbers).
    The real FFT leaves out the mirror images of its inner columns. Raises LossError for unequal
    grids.
    """
    with _autocast_off(map_s):
        # The FFT is linear: one transform of the difference instead of two.
        spectrum = torch.fft.rfft2(_difference(map_s, map_t), norm="ortho")
        return torch.view_as_real(spectrum).square().mean()


def feature_mse(map_s, map_t):
    """EM: the spatial MSE of the maps. Channels are aligned and errors raised as in `spectral_loss`."""
    with _autocast_off(map_s):
        return _difference(map_s, map_t).square().mean()


FEATURE_LOSSES = {"spectral": spectral_loss, "mse": feature_mse}


def _difference(map_s, map_t):
    """A_s - A_t [B, min(C_s, C_t), h, w] in float32 or better, the wider map pooled (DD C.1)."""
    _check_grids(map_s, map_t)
    channels = min(map_s.shape[1], map_t.shape[1])
    pooled_s = _pool_channels(at_least_float32(map_s), channels)
    pooled_t = _pool_channels(at_least_float32(map_t), channels)
    return pooled_s - pooled_t


def _pool_channels(feature_map, channels):
    if feature_map.shape[1] == channels:
        return feature_map
    tokens = feature_map.flatten(2).transpose(1, 2)  # [B, N, C], the layout that ViTs keep anyway
    if tokens.device.type == "mps":  # MPS pools only to divisors of the width
        pooled = tokens @ _pooling_matrix(tokens.shape[2], channels).to(tokens)
    else:
        pooled = F.adaptive_avg_pool1d(tokens, channels)
    return pooled.transpose(1, 2).unflatten(2, feature_map.shape[2:])


def _pooling_matrix(width, channels):
    """Adaptive average pooling as a matrix [width, channels]: the identity, pooled."""
    return F.adaptive_avg_pool1d(torch.eye(width), channels)


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def _check_grids(map_s, map_t):
    if not map_s.ndim == map_t.ndim == 4:
        raise LossError(
            f"maps are [B, C, h, w], not {list(map_s.shape)} and {list(map_t.shape)}: "
            f"of tokens [B, N, C] take tokens.mT.unflatten(2, (h, w))")
    if map_s.shape[2:] != map_t.shape[2:]:
        grid_s = "{} x {}".format(*map_s.shape[2:])
        grid_t = "{} x {}".format(*map_t.shape[2:])
        raise LossError(
            f"the student's feature map is {grid_s} and the teacher's {grid_t}: "
            f"choose models with the same patch grid, or other layers")


def _autocast_off(x):
    return torch.autocast(x.device.type, enabled=False)


# ---------- Methods

METHODS = {}


def method(name):
    def register(cls):
        cls.name = name
        METHODS[name] = cls
        return cls

    return register


def _refuse(condition, message):
    if condition:
        raise LossError(message)


@method("none")
class NoKD(nn.Module):
    """Plain training, the standalone student: CE(f_s, y). The base of all methods.

    label_smoothing: share of each label that is spread over all classes
    """

    # What a method wants by default.
    needs_teacher = False
    variant = "plain"  # of the student
    variants = "plain", "lifted", "widened"  # all that it can work with
    first, last = 0, 0  # layers to align; with both 0 no maps are kept

    progress = 0.0  # of the training, from 0 to 1: the loop sets it before each update

    def __init__(self, channels=(), label_smoothing=0.1):
        """`channels`: (C_s, C_t) of each aligned layer pair. The other arguments are flags."""
        super().__init__()
        within = 0 <= label_smoothing <= 1
        _refuse(not within, f"label_smoothing {label_smoothing} is not in [0, 1]")
        self.channels = channels
        self.label_smoothing = label_smoothing

    @classmethod
    def options(cls):
        """{name: (default, help)} of the constructor's arguments and those of its parents: the flags."""
        options, helps = {}, {}
        for parent in reversed(cls.__mro__):
            for line in (parent.__doc__ or "").splitlines():
                name, colon, text = line.strip().partition(": ")
                if colon:
                    helps[name] = text
            for parameter in inspect.signature(parent.__init__).parameters.values():
                own = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
                if own and parameter.name not in ("self", "channels"):
                    options[parameter.name] = parameter.default
        return {name: (default, helps.get(name, "")) for name, default in options.items()}

    def forward(self, labels, logits_s, maps_s=(), logits_t=None, maps_t=()):
        """Labels [B], logits [B, K], a map [B, C, h, w] for each layer -> {term: weighted scalar}."""
        return soft_kd_terms(logits_s, None, labels, alpha=0, label_smoothing=self.label_smoothing)


@method("soft")
class SoftKD(NoKD):
    """Logits KD, DD Eq. 10: L_KD = (1 - alpha) CE + alpha tau^2 KL.

    alpha: weight of logits KD; 0 leaves CE and the feature term
    tau: temperature
    """

    needs_teacher = True

    def __init__(self, alpha=0.9, tau=1.0, **common):
        super().__init__(**common)
        _refuse(not 0 <= alpha <= 1, f"alpha {alpha} is not in [0, 1]")
        # At higher tau, tau^2 KL in float32 is rounding noise, and may be negative.
        _refuse(not 0 < tau <= 100, f"tau {tau} is not in (0, 100]")
        self.alpha = alpha
        self.tau = tau

    def forward(self, labels, logits_s, maps_s=(), logits_t=None, maps_t=()):
        return soft_kd_terms(
            logits_s, logits_t, labels,
            alpha=self.alpha, tau=self.tau, label_smoothing=self.label_smoothing)


class FeatureKD(SoftKD):
    """DD Eq. 11 and 14: L_KD + beta L_feature, the base of all methods that compare feature maps.

    L_feature is the mean over the layer pairs of `pair_loss(i, map_s, map_t)`, a scalar, which a
    subclass defines. Its `term` is the name in the log.

    beta: weight of the feature term, which is not computed at 0
    """

    first, last = 1, 1  # DD Table 1's best at 300 epochs

    def __init__(self, beta=0.2, **soft):
        super().__init__(**soft)
        _refuse(not 0 <= beta < math.inf, f"beta {beta} is not in [0, inf)")
        self.beta = beta

    def forward(self, labels, logits_s, maps_s=(), logits_t=None, maps_t=()):
        terms = super().forward(labels, logits_s, maps_s, logits_t, maps_t)
        if self.beta:
            losses = []
            for i, (map_s, map_t) in enumerate(zip(maps_s, maps_t, strict=True)):
                losses.append(self.pair_loss(i, map_s, map_t))
            terms[self.term] = self.beta * torch.stack(losses).mean()
        return terms


@method("spectral")
class SpectralKD(FeatureKD):
    """DD Eq. 11: L_KD + beta L_Freq. With feature_loss="mse": the naive feature KD of EM.

    feature_loss: spectral or mse
    """

    def __init__(self, feature_loss="spectral", **feature):
        super().__init__(**feature)
        known = feature_loss in FEATURE_LOSSES
        _refuse(not known, f"feature_loss {feature_loss} is neither spectral nor mse")
        self.term = feature_loss  # the name in the log
        self.compare = FEATURE_LOSSES[feature_loss]

    def pair_loss(self, i, map_s, map_t):
        return self.compare(map_s, map_t)


@method("projector")
class ProjectorKD(FeatureKD):
    """DD Eq. 14: L_KD + beta MSE(P(A_s), A_t), P a learnable linear map C_s -> C_t at every position.

    The released code standardises the channels of both sides first, which is not in the paper. Our
    default does so too.

    norm: batch standardises both sides over the batch (as released), none does not (as printed)
    """

    term = "projector"

    def __init__(self, norm="batch", **feature):
        super().__init__(**feature)
        _refuse(norm not in ("batch", "none"), f"norm {norm} is neither batch nor none")
        self.norm = norm
        # No bias: P is linear as printed, and with norm="batch" the standardisation would cancel it.
        self.projectors = nn.ModuleList()
        if self.beta:
            for c_s, c_t in self.channels:
                self.projectors.append(nn.Linear(c_s, c_t, bias=False))

    def pair_loss(self, i, map_s, map_t):
        _check_grids(map_s, map_t)
        projected = self.projectors[i](map_s.movedim(1, -1)).movedim(-1, 1)
        with _autocast_off(map_s):
            projected = at_least_float32(projected)
            map_t = at_least_float32(map_t)
            if self.norm == "batch":
                projected = _standardise(projected)
                map_t = _standardise(map_t)
            return F.mse_loss(projected, map_t)


def _standardise(feature_map, eps=1e-5):
    """BatchNorm2d in training mode without affine parameters, over the batches of all processes."""
    centred = feature_map - _global_mean(feature_map)
    variance = _global_mean(centred.square())
    return centred * (variance + eps).rsqrt()


def _global_mean(feature_map):
    mean = feature_map.mean(dim=(0, 2, 3), keepdim=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        mean = _MeanOfProcesses.apply(mean)
    return mean


class _MeanOfProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes, through which gradients flow back to each of them."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    # Every process's loss depends on every process's x, through the mean. DDP averages the losses.
    # So the gradient of x is the mean over the processes of the gradients that arrive, and the
    # backward pass computes what the forward pass does.
    backward = forward


@method("lift")
class LiftKD(SpectralKD):
    """EM Lift: feature KD on the lifted last layer; the lift stays at inference (models.lifted)."""

    variant = "lifted"
    first, last = 0, 1

    def __init__(self, feature_loss="mse", **feature):
        super().__init__(feature_loss, **feature)


@method("widelast")
class WideLastKD(LiftKD):
    """EM WideLast: the same, on a student with a last block of the teacher's width (models.widened)."""

    variant = "widened"


class Distiller(nn.Module):
    """Everything that learns: the student (a models.HookedModel) and what its method learns.

    forward: images [B, 3, H, W], labels [B], and the teacher's output, (logits_t, maps_t) or None
    -> the student's logits [B, K] and {term: weighted scalar}, whose sum is the loss.
    """

    def __init__(self, student, method):
        super().__init__()
        self.student = student
        self.method = method

    def forward(self, images, labels, taught=None):
        logits, maps = self.student(images)
        return logits, self.method(labels, logits, maps, *(taught or ()))

    def no_weight_decay(self):
        """Full names of the parameters that timm exempts from weight decay (class tokens, ...)."""
        names = set()
        for path, module in self.named_modules():
            if path and hasattr(module, "no_weight_decay"):
                for name in module.no_weight_decay():
                    names.add(f"{path}.{name}")
        return names
