from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from voxelscale.config import AugmentConfig, Config, DataConfig, load
from voxelscale.errors import VoxelscaleError
from voxelscale.randomness import generator
from voxelscale.samples import augment
from voxelscale.samples.augment import Augmentation, Transform, draw_augmentation
from voxelscale.samples.batch import Normalisation, make_batch
from voxelscale.samples.draws import Draws, Stream
from voxelscale.samples.patches import PatchSource, Sample, place_window, read_ahead, worker_indices
from voxelscale.samples.transforms.affine import by_planes, by_voxels, region_of, warp
from voxelscale.samples.transforms.blur import Blur
from voxelscale.samples.transforms.brightness import Brightness
from voxelscale.samples.transforms.gamma import Gamma
from voxelscale.samples.transforms.low_resolution import LowResolution
from voxelscale.samples.transforms.noise import Noise
from voxelscale.store import Reader, Store

CPU = torch.device("cpu")
NORMALISE = Normalisation(low=-1000, high=400, mean=-300, std=350)


def EACH(case: str) -> list[Normalisation]:
    return [NORMALISE]


PLAIN = AugmentConfig(enabled=False)
EVERYTHING = AugmentConfig(p_affine=1, p_noise=1, p_blur=1, p_gamma=1, p_brightness=1, p_low_resolution=1)
DATA = DataConfig(patch_size=(12, 16, 20))


def source(store: Store, augment: AugmentConfig = PLAIN, seed: int = 0, **data: float) -> PatchSource:
    return PatchSource(store, replace(DATA, **data), augment, seed)  # type: ignore[arg-type]


def test_a_sample_is_a_pure_function_of_seed_and_index(store: Store) -> None:
    one, two = source(store, EVERYTHING), source(store, EVERYTHING)
    forwards = [one[i] for i in range(12)]
    backwards = [two[i] for i in reversed(range(12))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert (a.case, a.start) == (b.case, b.start)
        assert np.array_equal(a.region, b.region)
    other = source(store, EVERYTHING, seed=1)
    assert any(other[i].start != forwards[i].start for i in range(12))


def test_the_region_is_the_stores(store: Store) -> None:
    patches = source(store)
    for i in range(10):
        sample = patches[i]
        assert sample.region.shape == (2, *DATA.patch_size)
        hu, _ = store.read(sample.case)
        z, y, x = sample.start
        inside = hu[max(z, 0) : z + 12, max(y, 0) : y + 16, max(x, 0) : x + 20]
        cut = sample.region[0][max(-z, 0) :, max(-y, 0) :, max(-x, 0) :]
        assert np.array_equal(cut[tuple(map(slice, inside.shape))], inside)


def test_foreground_share(store: Store) -> None:
    def share(foreground: float) -> float:
        patches = source(store, foreground=foreground)
        return float(np.mean([patches[i].region[1].any() for i in range(150)]))

    # The jitter of a third of a patch keeps the chosen voxel inside.
    assert share(1.0) == 1.0
    assert share(0.0) < 0.5
    assert 0.5 < share(0.5) < 0.95


def test_small_lesions_are_seen_as_often_as_large_ones(store: Store) -> None:
    case = max(store.split("train"), key=lambda c: len(c.lesion_volumes_mm3))
    assert len(case.lesion_volumes_mm3) >= 2
    patches = PatchSource(store, replace(DATA, foreground=1.0, patch_size=(2, 2, 2)), PLAIN, 0)
    _, mask = store.read(case.case)
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    seen = np.zeros(count + 1)
    for i in range(600):
        sample = patches[i]
        if sample.case == case.case:
            z, y, x = (s + 1 for s in sample.start)
            seen[labels[z, y, x]] += 1
    assert seen[1:].min() > 0.5 * seen[1:].max()


@given(
    st.integers(0, 50),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_workers_share_out_the_same_stream(step: int, ranks: int, virtual: int, batch: int) -> None:
    world = ranks * virtual
    dealt = [i for w in range(world) for i in worker_indices(step * world * batch, w, world, batch)]
    assert sorted(dealt) == list(range(step * world * batch, (step + 1) * world * batch))


@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 60))
def test_windows_lie_inside_where_they_can(centre: int, size: int, whole: int) -> None:
    (start,) = place_window([centre % whole], [size], [whole])
    if whole >= size:
        assert 0 <= start <= whole - size
    else:
        assert start <= 0
        assert start + size >= whole


def test_reading_ahead_keeps_the_order_and_stops_early(store: Store) -> None:
    patches = source(store)
    batches = [range(i, i + 3) for i in range(0, 30, 3)]
    stream = read_ahead(patches, batches, readers=3, prefetch=2)
    assert [s.index for s in next(stream)] == [0, 1, 2]
    rest = [[s.index for s in batch] for batch in stream]
    assert rest == [list(b) for b in batches[1:]]
    stream = read_ahead(patches, batches, readers=1, prefetch=1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def test_a_store_without_training_cases_is_refused(store: Store) -> None:
    empty = replace(store, cases=store.split("val"))
    with pytest.raises(VoxelscaleError, match="no training case"):
        source(empty)


# So many patches of each scan


def places(
    store: Store, first: int, count: int, seed: int = 0, **data: float
) -> list[tuple[str, tuple[int, int, int]]]:
    patches = source(store, PLAIN, seed, **data)
    return [(patches[i].case, patches[i].start) for i in range(first, first + count)]


def test_every_scan_gives_so_many_places_again_and_again(store: Store) -> None:
    scans = len(store.split("train"))
    once = places(store, 0, 5 * scans, patches_per_case=5)
    assert len(set(once)) == 5 * scans
    assert {case for case, _ in once} == {info.case for info in store.split("train")}
    assert all(sum(case == info.case for case, _ in once) == 5 for info in store.split("train"))
    again = places(store, 5 * scans, 5 * scans, patches_per_case=5)
    assert sorted(again) == sorted(once)
    assert again != once, "in another order"
    few = places(store, 0, 40, patches_per_case=5, cases=2)
    assert len(set(few)) == 10
    assert {case for case, _ in few} == {info.case for info in store.split("train")[:2]}
    # More patches of each scan are more of the same kind, and those of before among them.
    assert set(once) <= set(places(store, 0, 9 * scans, patches_per_case=9))
    assert set(once).isdisjoint(places(store, 0, 5 * scans, seed=1, patches_per_case=5))


def test_a_patch_that_comes_again_is_augmented_anew(store: Store) -> None:
    scans = len(store.split("train"))
    patches = source(store, replace(EVERYTHING, p_affine=0), patches_per_case=2)
    samples = sorted((patches[i] for i in range(4 * scans)), key=lambda s: (s.case, s.start, s.index))
    for one, two in zip(samples[::2], samples[1::2], strict=True):
        assert (one.case, one.start) == (two.case, two.start)
        assert np.array_equal(one.region, two.region)
        assert one.augmentation.intensity[0] != two.augmentation.intensity[0]
        images, _ = make_batch([one, two], DATA.patch_size, EACH, CPU)
        assert not torch.equal(images[0], images[1])


def test_limited_patches_are_a_pure_function_of_seed_and_index(store: Store) -> None:
    one, two = (source(store, EVERYTHING, patches_per_case=3) for _ in range(2))
    forwards = [one[i] for i in range(20)]
    backwards = [two[i] for i in reversed(range(20))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert (a.case, a.start) == (b.case, b.start)
        assert np.array_equal(a.region, b.region)


def test_limited_patches_keep_the_foreground_share(store: Store) -> None:
    scans = len(store.split("train"))
    patches = source(store, foreground=1.0, patches_per_case=20)
    assert all(patches[i].region[1].any() for i in range(20 * scans))
    healthy = replace(store, cases=tuple(replace(info, lesion_volumes_mm3=()) for info in store.cases))
    assert len(set(places(healthy, 0, 30, foreground=1.0, patches_per_case=4))) == 4 * scans


def test_without_a_limit_the_stream_is_as_it_ever_was(store: Store) -> None:
    """Each sample's place drawn here as it was before there was a limit."""
    cases = store.split("train")
    with_lesions = [info for info in cases if info.lesion_volumes_mm3]
    reader, patches = Reader(store.path), source(store, patches_per_case=0)
    for index in range(60):
        random = generator(0, index, 0)
        foreground = random.random() < DATA.foreground
        pick, lesion, voxel = random.random(3)
        if foreground:
            info = with_lesions[int(pick * len(with_lesions))]
            lesions = reader.lesions(info.case)
            voxels = lesions[int(lesion * len(lesions))]
            reach = np.asarray(DATA.patch_size) // 3
            jitter = random.integers(-reach, reach, endpoint=True)
            centre = voxels[int(voxel * len(voxels))] + jitter
        else:
            info = cases[int(pick * len(cases))]
            centre = random.integers(0, info.shape)
        sample = patches[index]
        assert sample.case == info.case
        assert list(sample.start) == place_window(centre, DATA.patch_size, info.shape)


@pytest.mark.parametrize("setting", ["data.patches_per_case=-1", "augment.strength=-0.5"])
def test_below_zero_is_refused(setting: str) -> None:
    with pytest.raises(VoxelscaleError, match=f"{setting.partition('=')[0]} is -") as caught:
        load(None, [setting])
    assert "at least 0" in caught.value.hint


# Augmentation


def test_a_sample_comes_out_the_same_in_any_batch(store: Store) -> None:
    patches = source(store, EVERYTHING)
    samples = [patches[i] for i in range(6)]
    together = make_batch(samples, DATA.patch_size, EACH, CPU)
    for i, sample in enumerate(samples):
        alone = make_batch([sample], DATA.patch_size, EACH, CPU)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])
    assert together[0].shape == together[1].shape == (6, 1, *DATA.patch_size)
    assert torch.isfinite(together[0]).all()
    assert set(together[1].ravel().tolist()) <= {0.0, 1.0}


def test_without_augmentation_the_patch_is_normalised_hu(store: Store) -> None:
    sample = source(store)[4]
    image, mask = make_batch([sample], DATA.patch_size, EACH, CPU)
    wanted = (np.clip(sample.region[0], -1000, 400) + 300.0) / 350
    assert np.allclose(image[0, 0].numpy(), wanted, atol=1e-6)
    assert np.array_equal(mask[0, 0].numpy(), sample.region[1])


def test_affine_is_scipys(store: Store) -> None:
    """The device's rotation and zoom against scipy's, about the patch's centre, also anisotropic."""
    patches = source(
        store,
        AugmentConfig(
            p_affine=1, flip=False, p_noise=0, p_blur=0, p_gamma=0, p_brightness=0, p_low_resolution=0
        ),
    )
    for index in range(4):
        sample = patches[index]
        image, _ = make_batch([sample], DATA.patch_size, EACH, CPU)
        region = (np.clip(sample.region[0], -1000, 400) + 300.0) / 350
        matrix = sample.augmentation.matrix
        assert matrix is not None
        offset = (np.asarray(region.shape) - 1) / 2 - matrix @ ((np.asarray(DATA.patch_size) - 1) / 2)
        theirs = ndimage.affine_transform(
            region, matrix, offset, output_shape=DATA.patch_size, order=1, mode="nearest"
        )
        assert np.abs(image[0, 0].numpy() - theirs).max() < 2e-3


def test_rotation_is_rigid_in_mm() -> None:
    config = AugmentConfig(p_affine=1, scale=(1.0, 1.0))
    spacing = np.array([5.0, 2.0, 1.0])
    for index in range(5):
        plan = draw_augmentation(config, Draws(0, index), (8, 8, 8), (5.0, 2.0, 1.0))
        assert plan.matrix is not None
        in_mm = plan.matrix * spacing[:, None] / spacing
        assert np.allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-9)


def test_two_dimensional_patches_stay_in_their_slice() -> None:
    config = AugmentConfig(p_affine=1)
    for index in range(5):
        plan = draw_augmentation(config, Draws(0, index), (1, 32, 32), (5.0, 1.0, 1.0), dims=2)
        assert plan.region[0] == 1
        assert plan.matrix is not None
        assert np.allclose(plan.matrix[0], [1, 0, 0])
        assert not plan.mirrored[0]


@given(st.integers(0, 2000))
def test_the_region_covers_what_is_turned_in(index: int) -> None:
    plan = draw_augmentation(AugmentConfig(p_affine=1), Draws(3, index), (9, 14, 20), (3.0, 1.0, 1.0))
    assert plan.matrix is not None
    assert plan.region == region_of(plan.matrix, (9, 14, 20))
    half = (np.asarray((9, 14, 20)) - 1) / 2
    corners = (np.indices((2, 2, 2)).reshape(3, -1).T * 2 - 1) * half
    reach = np.abs(corners @ plan.matrix.T).max(axis=0)
    assert (reach <= (np.asarray(plan.region) - 1) / 2).all()
    assert all((r - p) % 2 == 0 for r, p in zip(plan.region, (9, 14, 20), strict=True))


def test_changing_one_probability_leaves_the_others(tiny: Config) -> None:
    base = tiny.augment
    for index in range(20):
        a = draw_augmentation(base, Draws(0, index), (8, 8, 8), (1.0, 1.0, 1.0))
        b = draw_augmentation(replace(base, p_noise=1.0), Draws(0, index), (8, 8, 8), (1.0, 1.0, 1.0))
        assert of_kind(b, Noise)
        assert a.mirrored == b.mirrored
        assert [of_kind(a, k) for k in KINDS if k is not Noise] == [
            of_kind(b, k) for k in KINDS if k is not Noise
        ]
        assert (a.matrix is None) == (b.matrix is None)
        if a.matrix is not None and b.matrix is not None:
            assert np.array_equal(a.matrix, b.matrix)


KINDS = (Noise, Blur, Brightness, Gamma, LowResolution)


def of_kind(plan: Augmentation, kind: type) -> Any:
    """The sample's transform of a kind, None where it has none."""
    return next((transform for transform in plan.intensity if isinstance(transform, kind)), None)


def drawn(config: AugmentConfig, count: int) -> list[Augmentation]:
    size, spacing = (8, 8, 8), (1.0, 1.0, 1.0)
    return [draw_augmentation(config, Draws(0, index), size, spacing) for index in range(count)]


def used(plan: Augmentation) -> list[bool]:
    """Which transformations a sample gets."""
    return [plan.matrix is not None, *(of_kind(plan, kind) is not None for kind in KINDS)]


def test_no_strength_leaves_the_flips() -> None:
    none, plain = drawn(AugmentConfig(strength=0), 50), drawn(AugmentConfig(), 50)
    assert not any(any(used(plan)) for plan in none)
    assert [plan.mirrored for plan in none] == [plan.mirrored for plan in plain]
    assert all(plan.region == (8, 8, 8) for plan in none)


def test_only_some_axes_are_mirrored() -> None:
    plans = drawn(AugmentConfig(flip_axes="zx"), 50)
    whole = drawn(AugmentConfig(), 50)
    assert [plan.mirrored for plan in plans] == [(z, False, x) for z, _, x in (p.mirrored for p in whole)]
    assert not any(any(plan.mirrored) for plan in drawn(AugmentConfig(flip=False), 50))


def test_double_strength_doubles_frequencies() -> None:
    count = 2000
    config = AugmentConfig(p_brightness=0.6)
    chances = np.array([0.3, 0.15, 0.1, 0.6, 0.2, 0.1])
    for strength in (1.0, 2.0):
        found = np.mean([used(p) for p in drawn(replace(config, strength=strength), count)], axis=0)
        wanted = np.minimum(1, strength * chances)
        assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / count)).all(), strength


def test_unit_strength_leaves_every_draw() -> None:
    """A coin falls as it did when it was held against the probability itself."""
    config = AugmentConfig()
    chances = (config.p_affine, config.p_noise, config.p_blur)
    for index, plan in enumerate(drawn(config, 300)):
        coins, amounts = (draws := generator(0, index, 1)).random(6), draws.random(12)
        assert used(plan)[:3] == [coin < chance for coin, chance in zip(coins, chances, strict=False)]
        noise, brightness = of_kind(plan, Noise), of_kind(plan, Brightness)
        assert noise is None or noise.std == config.noise_std * amounts[6]
        assert brightness is None or brightness.shift == 0.4 * amounts[9] - 0.2
        assert bool(of_kind(plan, Gamma)) == (coins[3] < config.p_gamma)
        assert bool(brightness) == (coins[4] < config.p_brightness)
        assert bool(of_kind(plan, LowResolution)) == (coins[5] < config.p_low_resolution)


class Inverted:
    """A transform that is added: it inverts the intensity of some samples."""

    @classmethod
    def draw(cls, config: AugmentConfig, draws: Draws) -> Transform | None:
        share = draws.stream(max(Stream) + 1).random()
        return cls() if share < 0.5 else None

    def __call__(self, image: Tensor, channel: int = 0) -> Tensor:
        return image.neg_()


@pytest.mark.parametrize("place", [0, 2, len(augment.INTENSITY)])
def test_a_transform_that_is_added_leaves_the_draws_of_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    config = AugmentConfig(strength=3)
    before: list[Sample] = [source(store, config)[index] for index in range(30)]
    monkeypatch.setattr(
        augment, "INTENSITY", [*augment.INTENSITY[:place], Inverted.draw, *augment.INTENSITY[place:]]
    )
    after = [source(store, config)[index] for index in range(30)]
    added = 0
    for one, two in zip(before, after, strict=True):
        assert (one.case, one.start) == (two.case, two.start)
        assert np.array_equal(one.region, two.region)
        assert one.augmentation.mirrored == two.augmentation.mirrored
        others = [t for t in two.augmentation.intensity if not isinstance(t, Inverted)]
        assert others == list(one.augmentation.intensity)
        added += len(two.augmentation.intensity) - len(others)
        if others == list(two.augmentation.intensity):
            ours, theirs = (make_batch([s], DATA.patch_size, EACH, CPU) for s in (one, two))
            assert torch.equal(ours[0], theirs[0])
    assert 0 < added < 30


def test_blur_is_scipys(store: Store) -> None:
    config = AugmentConfig(
        p_affine=0, flip=False, p_noise=0, p_blur=1, p_gamma=0, p_brightness=0, p_low_resolution=0
    )
    sample = source(store, config)[0]
    image, _ = make_batch([sample], DATA.patch_size, EACH, CPU)
    plain = (np.clip(sample.region[0], -1000, 400) + 300.0) / 350
    blur = of_kind(sample.augmentation, Blur)
    theirs = ndimage.gaussian_filter(plain, blur.sigma, mode="nearest", truncate=3.0)
    assert np.abs(image[0, 0].numpy() - theirs).max() < 0.05


TURNED = AugmentConfig(p_affine=1, p_noise=0, p_blur=0, p_gamma=0, p_brightness=0, p_low_resolution=0)


@pytest.mark.parametrize(("patch", "dims"), [((12, 16, 20), 3), ((1, 24, 20), 2), ((5, 9, 31), 3)])
def test_planes_and_voxels_are_sampled_alike(patch: tuple[int, int, int], dims: int) -> None:
    """The CPU's look-up in a tall image against the library's 3-D sampling, which GPUs use."""
    for index in range(6):
        plan = draw_augmentation(TURNED, Draws(1, index), patch, (2.0, 1.0, 1.0), dims)
        assert plan.matrix is not None
        region = torch.randn(plan.region, generator=torch.Generator().manual_seed(index))
        lines = [torch.arange(n) - (n - 1) / 2 for n in patch]
        planes = by_planes(region, lines, plan.matrix)
        voxels = by_voxels(region, lines, plan.matrix)
        assert planes.shape == patch
        assert float((planes - voxels).abs().max()) < 1e-3


def test_a_turned_mask_is_the_whole_regions(store: Store) -> None:
    """Only the box that the lesion reaches is computed; nothing of it is lost."""
    patches = source(store, TURNED, foreground=1.0)
    for index in range(12):
        sample = patches[index]
        matrix = sample.augmentation.matrix
        assert matrix is not None
        _, mask = make_batch([sample], DATA.patch_size, EACH, CPU)
        whole = warp(torch.from_numpy(sample.region[1]).float(), matrix, DATA.patch_size)
        flips = [axis for axis, flip in enumerate(sample.augmentation.mirrored) if flip]
        wanted = (whole.flip(flips) >= 0.5).float()
        # A voxel within rounding of one half may fall to either side.
        near_half = (whole.flip(flips) - 0.5).abs() < 1e-3
        assert torch.equal(mask[0, 0][~near_half], wanted[~near_half])


@pytest.mark.parametrize("p_affine", [0.0, 1.0])
def test_mirroring_is_a_flip(store: Store, p_affine: float) -> None:
    mirrored = source(store, replace(TURNED, p_affine=p_affine), foreground=1.0)
    plain = source(store, replace(TURNED, p_affine=p_affine, flip=False), foreground=1.0)
    seen = set()
    for index in range(8):
        flips = mirrored[index].augmentation.mirrored
        axes = [axis + 2 for axis, flip in enumerate(flips) if flip]
        ours = make_batch([mirrored[index]], DATA.patch_size, EACH, CPU)
        theirs = make_batch([plain[index]], DATA.patch_size, EACH, CPU)
        assert torch.allclose(ours[0], theirs[0].flip(axes), atol=1e-3)
        assert float((ours[1] != theirs[1].flip(axes)).float().mean()) < 1e-3
        seen.add(flips)
    assert len(seen) > 2


@pytest.mark.parametrize("resolution", [0.5, 0.63, 0.9])
def test_low_resolution_is_the_librarys(resolution: float) -> None:
    volume = torch.randn(12, 16, 20, generator=torch.Generator().manual_seed(0))
    ours = LowResolution(resolution=resolution)(volume)
    size = [round(n * resolution) for n in volume.shape]
    coarse = F.interpolate(volume[None, None], size=size, mode="nearest-exact")
    theirs = F.interpolate(coarse, size=volume.shape, mode="trilinear", align_corners=False)[0, 0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_low_resolution_does_not_move_the_image() -> None:
    """Over all resolutions a ramp keeps its place; its label stays where it is, too."""
    ramp = torch.arange(48.0).expand(48, 48, 48)
    shares = np.linspace(0.5, 0.99, 50).tolist()
    moved = [LowResolution(resolution=share)(ramp)[24, 24, 8:40] - ramp[24, 24, 8:40] for share in shares]
    assert abs(float(torch.stack(moved).mean())) < 0.1


def test_what_was_read_is_not_changed(store: Store) -> None:
    sample = source(store, EVERYTHING)[0]
    before = sample.region.copy()
    make_batch([sample, source(store)[1]], DATA.patch_size, EACH, CPU)
    assert np.array_equal(sample.region, before)
    hu = torch.tensor([-2000.0, 50.0])
    NORMALISE(hu)
    assert hu.tolist() == [-2000.0, 50.0]
