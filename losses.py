"""Objectives of three papers (DD, SK, EM: see README): logits, spectral, projector, lifted and widened feature KD.

The invariant: everything that learns is a submodule of one `Distiller`. DDP wraps it, the optimizer takes its
parameters, the checkpoint stores it. The teacher is an argument of its `forward`, never a member: it stays frozen,
in eval mode, outside DDP, optimizer and checkpoint. (Released code: built its projector on first use, after the
optimizer, outside DDP and checkpoint, and so never trained it.)

A new method is one class with a `@method("name")` line. Its class attributes say what it wants by default, its
constructor's arguments are its command-line flags (name, type and default from the signature, help from the line
"name: ..." of the docstring), and the dictionary it returns is what is logged.
"""
import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---------- Functions


def soft_kd_terms(logits_s, logits_t, labels, *, alpha=0.9, tau=1.0, label_smoothing=0.0):
    """The two terms of DD Eq. 10, weighted: ce = (1 - alpha) CE and kd = alpha tau^2 KL(teacher || student).

    Logits [B, K], labels [B]; a term of weight 0 is left out. Both are means over the batch.
    """
    terms = {}
    if alpha < 1:
        terms["ce"] = (1 - alpha) * F.cross_entropy(at_least_float32(logits_s), labels, label_smoothing=label_smoothing)
    if alpha > 0:
        log_p_s = F.log_softmax(at_least_float32(logits_s) / tau, dim=-1)
        log_p_t = F.log_softmax(at_least_float32(logits_t) / tau, dim=-1)
        terms["kd"] = alpha * tau ** 2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")
    return terms


def soft_kd_loss(logits_s, logits_t, labels, *, alpha=0.9, tau=1.0, label_smoothing=0.0):
    """DD Eq. 10: (1 - alpha) CE(f_s, y) + alpha tau^2 KL(softmax(f_t / tau) || softmax(f_s / tau)). A scalar."""
    terms = soft_kd_terms(logits_s, logits_t, labels, alpha=alpha, tau=tau, label_smoothing=label_smoothing)
    return sum(terms.values())


def spectral_loss(map_s, map_t):
    """DD Eq. 7 and 9: MSE(F_stack(A_s), F_stack(A_t)), F_stack being the orthonormal 2D real FFT over h x w, real and
    imaginary parts stacked. Maps [B, C_s, h, w] and [B, C_t, h, w]; the wider one is pooled over channels.

    Raises ValueError when the grids differ. With the full FFT this would be half the spatial MSE (Parseval; the mean
    runs over twice as many numbers). The real FFT leaves out the mirror images of the inner columns.
    """
    with _autocast_off(map_s):
        # The FFT is linear: one transform of the difference instead of two.
        spectrum = torch.fft.rfft2(_difference(map_s, map_t), norm="ortho")
        return torch.view_as_real(spectrum).square().mean()


def feature_mse(map_s, map_t):
    """EM: the spatial MSE of the maps, channels aligned as in `spectral_loss`. Raises ValueError for unequal grids."""
    with _autocast_off(map_s):
        return _difference(map_s, map_t).square().mean()


FEATURE_LOSSES = {"spectral": spectral_loss, "mse": feature_mse}


def _difference(map_s, map_t):
    """A_s - A_t [B, min(C_s, C_t), h, w] in float32 or better, the wider map pooled over its channels (DD C.1)."""
    _check_grids(map_s, map_t)
    channels = min(map_s.shape[1], map_t.shape[1])
    return _pool_channels(at_least_float32(map_s), channels) - _pool_channels(at_least_float32(map_t), channels)


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
        raise ValueError(f"maps are [B, C, h, w], not {[*map_s.shape]} and {[*map_t.shape]}: of tokens [B, N, C] take "
                         f"tokens.mT.unflatten(2, (h, w))")
    if map_s.shape[2:] != map_t.shape[2:]:
        raise ValueError("the student's feature map is {} x {} and the teacher's {} x {}: choose models with the same "
                         "patch grid, or other layers".format(*map_s.shape[2:], *map_t.shape[2:]))


def _autocast_off(x):
    return torch.autocast(x.device.type, enabled=False)


# ---------- Methods

METHODS = {}


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def method(name):
    def register(cls):
        cls.name = name
        METHODS[name] = cls
        return cls
    return register


@method("none")
class NoKD(nn.Module):
    """Plain training, the standalone student: CE(f_s, y).

    label_smoothing: share of each label that is spread over all classes
    """

    needs_teacher, variant, first, last = False, "plain", 0, 0  # what a method wants by default

    def __init__(self, channels=(), label_smoothing=0.1):
        """`channels`: (C_s, C_t) of each aligned layer pair. The other arguments are the method's flags."""
        super().__init__()
        _require(0 <= label_smoothing <= 1, f"label_smoothing {label_smoothing} is not in [0, 1]")
        self.channels, self.label_smoothing = channels, label_smoothing

    @classmethod
    def options(cls):
        """The constructor's arguments, those of its parents included: {name: (default, help)}. Each is a flag."""
        options, helps = {}, {}
        for parent in reversed(cls.__mro__):
            helps.update(line.strip().split(": ", 1) for line in (parent.__doc__ or "").splitlines() if ": " in line)
            options.update({p.name: None if p.default is p.empty else p.default
                            for p in inspect.signature(parent.__init__).parameters.values()
                            if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "channels")})
        return {name: (default, helps.get(name, "")) for name, default in options.items()}

    def forward(self, labels, logits_s, maps_s=(), logits_t=None, maps_t=()):
        """Labels [B], logits [B, K], maps: lists of [B, C, h, w], layer by layer -> {term: weighted scalar}."""
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
        _require(0 <= alpha <= 1, f"alpha {alpha} is not in [0, 1]")
        _require(0 < tau < math.inf, f"tau {tau} is not positive and finite")
        self.alpha, self.tau = alpha, tau

    def forward(self, labels, logits_s, maps_s=(), logits_t=None, maps_t=()):
        return soft_kd_terms(logits_s, logits_t, labels, alpha=self.alpha, tau=self.tau,
                             label_smoothing=self.label_smoothing)


class FeatureKD(SoftKD):
    """DD Eq. 11 and 14: L_KD + beta L_feature, the mean over the layer pairs of what `pair_loss` returns.

    beta: weight of the feature term, which is not computed at 0
    """

    first, last = 1, 1  # DD Table 1's best at 300 epochs

    def __init__(self, beta=0.2, **soft):
        super().__init__(**soft)
        _require(0 <= beta < math.inf, f"beta {beta} is not in [0, inf)")
        self.beta = beta

    def forward(self, labels, logits_s, maps_s=(), logits_t=None, maps_t=()):
        terms = super().forward(labels, logits_s, maps_s, logits_t, maps_t)
        if self.beta:
            losses = [self._compare(i, *pair) for i, pair in enumerate(zip(maps_s, maps_t, strict=True))]
            terms[self.term] = self.beta * torch.stack(losses).mean()
        return terms

    def _compare(self, i, map_s, map_t):
        try:
            return self.pair_loss(i, map_s, map_t)
        except RuntimeError as error:
            if map_s.shape == map_t.shape or isinstance(error, torch.OutOfMemoryError):
                raise
            sizes = [" x ".join(map(str, A.shape[1:])) for A in (map_s, map_t)]
            raise ValueError(f"{self.name} cannot compare a student's map of {sizes[0]} with a teacher's of {sizes[1]} "
                             f"({error}): pool or project one of them") from error


@method("spectral")
class SpectralKD(FeatureKD):
    """DD Eq. 11: L_KD + beta L_Freq. feature_loss="mse" is the naive feature KD that EM starts from.

    feature_loss: spectral or mse
    """

    def __init__(self, feature_loss="spectral", **feature):
        super().__init__(**feature)
        _require(feature_loss in FEATURE_LOSSES, f"feature_loss {feature_loss} is neither spectral nor mse")
        self.term = feature_loss

    def pair_loss(self, i, map_s, map_t):
        return FEATURE_LOSSES[self.term](map_s, map_t)


@method("projector")
class ProjectorKD(FeatureKD):
    """DD Eq. 14: L_KD + beta MSE(P(A_s), A_t), P a learnable linear map C_s -> C_t at every position.

    Released code: standardises the channels of both sides first, which is not in the paper; our default does so too.

    norm: standardise both sides over the batch first (batch, as released) or compare them as printed (none)
    """

    term = "projector"

    def __init__(self, norm="batch", **feature):
        super().__init__(**feature)
        _require(norm in ("batch", "none"), f"norm {norm} is neither batch nor none")
        self.norm = norm
        # No bias: P is linear as printed, and with norm="batch" the standardisation would cancel a bias.
        self.projectors = nn.ModuleList(nn.Linear(c_s, c_t, bias=False) for c_s, c_t in self.channels if self.beta)

    def pair_loss(self, i, map_s, map_t):
        _check_grids(map_s, map_t)
        projected = self.projectors[i](map_s.movedim(1, -1)).movedim(-1, 1)
        with _autocast_off(map_s):
            projected, map_t = at_least_float32(projected), at_least_float32(map_t)
            if self.norm == "batch":
                projected, map_t = _standardise(projected), _standardise(map_t)
            return F.mse_loss(projected, map_t)


def _standardise(feature_map, eps=1e-5):
    """What BatchNorm2d computes in training mode, without affine parameters, over the batches of all processes."""
    centred = feature_map - _global_mean(feature_map)
    return centred * (_global_mean(centred.square()) + eps).rsqrt()


def _global_mean(feature_map):
    mean = feature_map.mean(dim=(0, 2, 3), keepdim=True)
    return _MeanOfProcesses.apply(mean) if dist.is_initialized() and dist.get_world_size() > 1 else mean


class _MeanOfProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes, through which gradients flow back to each of them."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    # Every process's loss depends on every process's x, through the mean. So the gradient of x is the mean over the
    # processes of the gradients that arrive: the same computation.
    backward = forward


@method("lift")
class LiftKD(SpectralKD):
    """EM Lift: feature KD on the lifted last layer, whose projector stays at inference (models.lifted)."""

    variant, first, last = "lifted", 0, 1

    def __init__(self, feature_loss="mse", **feature):
        super().__init__(feature_loss, **feature)


@method("widelast")
class WideLastKD(LiftKD):
    """EM WideLast: the same on a student whose last block is as wide as the teacher (models.widened)."""

    variant = "widened"


class Distiller(nn.Module):
    """Everything that learns: the student and what its method learns.

    `student`: a models.HookedModel. forward: images [B, 3, H, W], labels [B], and the teacher's output, (logits_t,
    maps_t) or None -> the student's logits [B, K] and {term: weighted scalar}, whose sum is the loss.
    """

    def __init__(self, student, method):
        super().__init__()
        self.student, self.method = student, method

    def forward(self, images, labels, taught=None):
        logits, maps = self.student(images)
        return logits, self.method(labels, logits, maps, *(taught or ()))

    def no_weight_decay(self):
        """Full names of the parameters that timm exempts from weight decay (class tokens, ...)."""
        return {f"{path}.{name}" for path, module in self.named_modules() if path
                for name in getattr(module, "no_weight_decay", set)()}
