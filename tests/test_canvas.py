"""Laws of canvases: windows make every frame once, from frames that are there; what is given comes back; nothing leaks."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from einops import reduce, repeat
from PIL import Image

from sora_jax.generate import canvas, files, layouts, media
from sora_jax.generate.canvas import plan
from sora_jax.generate.layouts import Grid
from sora_jax.generate.requests import Order, RequestError, Size

GRID = Grid((4, 8, 8))
DEFAULTS = Size(16, 16, 17, 8.0)
NEW = 250  # what the stand-in of the model makes


def counting(num_frames, height=16, width=16, first=0):
    """Frame k is of the grey 10 + 5 (first + k), whose h264 is exact within 1."""
    grey = (10 + 5 * (first + np.arange(num_frames))).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (num_frames, height, width, 3)).copy()


@pytest.fixture
def clip(tmp_path):
    def write(num_frames, height=16, width=16, first=0, name="a.mp4", fps=8.0):
        files.write_video(tmp_path / name, counting(num_frames, height, width, first), fps)
        return str(tmp_path / name)

    return write


def known_latents(known, grid=GRID):
    """(t, h, w): where every pixel that a latent stands for is given."""
    st, sh, sw = grid.stride
    alone = repeat(known.given_THW[:1], "1 H W -> st H W", st=st - 1)
    every = np.concatenate([alone, known.given_THW])
    return reduce(every.astype(int), "(t st) (h sh) (w sw) -> t h w", "min", st=st, sh=sh, sw=sw).astype(bool)


def round_trip(frames_THWC):
    """A stand-in for the VAE's, never the frames themselves."""
    return frames_THWC ^ 1


def play(job, window=17, model=lambda step: np.full(step.known.frames_THWC.shape, NEW, np.uint8)):
    """The video of a job and its passes, each held against what the core can take."""
    seen = []

    def sample(steps):
        made = []
        for step in steps:
            seen.append(step)
            size = step.size
            layouts.check_size(size, GRID)
            if step.known is None:
                made.append(np.full((size.frames, size.height, size.width, 3), NEW, np.uint8))
                continue
            known = step.known
            assert known.frames_THWC.shape == (size.frames, size.height, size.width, 3)
            assert known.given_THW.shape == known.frames_THWC.shape[:3]
            assert known.given_THW.all() or size.frames <= window
            made.append(np.where(known.given_THW[..., None], round_trip(known.frames_THWC), model(step)))
        return made

    ((_, (video, draft)),) = canvas.run([job], sample)
    assert (draft is None) == (job.draft is None)
    assert video.shape == (job.size.frames, job.size.height, job.size.width, 3)
    return video, seen


def to_make(seen):
    return [step for step in seen if step.known is None or not step.known.given_THW.all()]


# Windows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "window", "stride"), [(17, 17, 4), (133, 17, 4), (9, 5, 4), (5, 5, 1), (1, 9, 4)])
def test_one_latent_frame_after_the_other(frames, window, stride):
    windows = canvas.one_by_one(0, frames, window=window, stride=stride)
    made = [np.arange(each.first, each.last) for each in windows]
    assert np.concatenate(made).tolist() == list(range(frames))
    assert len(made[0]) == 1 and all(len(part) == stride for part in made[1:])
    for each in windows:
        assert 0 <= each.start <= each.first and each.stop == each.last
        assert (each.stop - each.start - 1) % stride == 0 and each.stop - each.start <= window
        # As much is seen as fits.
        assert each.start == 0 or each.stop - each.start == window


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_windows_make_every_frame_once_from_frames_that_are_there(stride, backward):
    rng = np.random.default_rng(0)
    for _ in range(400):
        window = 1 + stride * int(rng.integers(2, 9))
        before, after = (int(rng.integers(0, 40)) * int(rng.integers(0, 2)) for _ in range(2))
        before = 0 if backward else before
        first, last = before, before + int(rng.integers(1, 120))
        windows = plan(first, last, window=window, stride=stride, before=before, after=after, backward=backward)
        there = set(range(first - before, first)) | set(range(last, last + after))
        made = []
        for w in windows:
            assert (w.stop - w.start - 1) % stride == 0 and w.stop - w.start <= window
            assert w.start <= w.first < w.last <= w.stop
            # Nothing is seen that is not there, but the end of a last group, which is held.
            assert w.start >= first - before or backward
            assert w.stop < last + after + stride or not backward
            given = set(range(w.start, w.stop)) & there
            context = range(w.last, w.stop) if backward else range(w.start, w.first)
            assert set(context) & set(range(first - before, last + after)) <= given
            if there:
                # Groups of given frames next to the new ones are whole, and there is one at least.
                if backward:
                    assert (w.stop - w.last) % stride == 0 and w.stop > w.last
                elif before or made:
                    assert (w.first - w.start - 1) % stride == 0 and w.first > w.start
            # Frames behind the end are of the last group, or given.
            surplus = max(0, first - w.start) if backward else max(0, w.stop - last - after)
            assert surplus < stride or (after and not backward)
            made += range(w.first, w.last)
            there |= set(range(w.first, w.last))
        assert sorted(made) == list(range(first, last))
        assert len(made) == len(set(made))


@pytest.mark.parametrize("stride", [1, 4])
def test_the_last_window_of_a_bridge_sees_both_ends(stride):
    for window, length, before, after in [
        (9, 4, 30, 30),
        (17, 3, 1, 30),
        (17, 40, 30, 30),
        (17, 9, 5, 4),
        (33, 1, 1, 1),
    ]:
        window = 1 + (window - 1) // 4 * stride
        windows = plan(before, before + length, window=window, stride=stride, before=before, after=after)
        last = windows[-1]
        assert last.start < last.first and last.stop - last.last >= stride
        # What begins within a group of frames to be made does not count: a whole group of what comes after is there.
        partial = (last.last - last.start - 1) % stride
        assert last.stop - last.last - (stride - partial) % stride >= stride


def test_windows_keep_as_much_of_the_past_as_fits():
    assert plan(30, 38, window=17, stride=4, before=30) == (canvas.Window(21, 38, 30, 38),)
    assert plan(3, 7, window=17, stride=4, before=3) == (canvas.Window(2, 7, 3, 7),)
    assert plan(0, 17, window=17, stride=4) == (canvas.Window(0, 17, 0, 17),)
    assert plan(0, 33, window=17, stride=4)[1] == canvas.Window(8, 25, 17, 25)
    assert plan(30, 42, window=17, stride=4, before=30) == (canvas.Window(25, 42, 30, 42),)
    assert [(w.first, w.last) for w in plan(30, 43, window=17, stride=4, before=30)] == [(30, 38), (38, 43)]
    assert plan(0, 10, window=17, stride=4, after=30, backward=True) == (canvas.Window(-3, 14, 0, 10),)


def test_windows_that_are_too_small_are_refused():
    for settings in [{"window": 1, "before": 1}, {"window": 1}, {"window": 5, "before": 3, "after": 3}]:
        with pytest.raises(RequestError, match=r"too small .* raise it to at least [59]"):
            plan(3, 9, stride=4, **settings)
    assert plan(0, 1, window=1, stride=4) == (canvas.Window(0, 1, 0, 1),)


def test_plans_do_not_grow_with_what_is_given():
    """Memory is that of a window: however long the past is, as much of it is seen."""
    short, long = (plan(n, n + 400, window=17, stride=4, before=n) for n in (21, 4001))
    assert [w.stop - w.start for w in short] == [w.stop - w.start for w in long]


# Filling ------------------------------------------------------------------------------------------------------------


def test_fill_repeats_the_nearest_given(rng):
    frames = rng.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
    given = np.zeros((6, 5, 7), bool)
    given[1], given[4, 1:4, 2] = True, True
    filled = canvas.fill(frames, given)
    np.testing.assert_array_equal(filled[given], frames[given])
    for frame in (0, 2):
        np.testing.assert_array_equal(filled[frame], frames[1])
    for row, column in np.ndindex(5, 7):
        np.testing.assert_array_equal(filled[4, row, column], frames[4, min(max(row, 1), 3), 2])
    for frame in (3, 5):
        np.testing.assert_array_equal(filled[frame], filled[4])
    other = np.where(given[..., None], frames, 255 - frames)
    np.testing.assert_array_equal(canvas.fill(other, given), filled)
    assert (canvas.fill(frames, np.zeros_like(given)) == 128).all()


def test_stretch_keeps_frames_and_blends_between():
    frames = counting(4)
    for factor in (2, 3):
        longer = canvas.stretch(frames, factor)
        np.testing.assert_array_equal(longer[::factor], frames)
        np.testing.assert_allclose(longer.mean((1, 2, 3)), np.linspace(10, 25, len(longer)), atol=0.51)


# Modes --------------------------------------------------------------------------------------------------------------


def prepare(window=17, defaults=DEFAULTS, **order):
    return layouts.prepare(Order(**order), defaults, GRID, window)


def test_frames_of_which_nothing_is_given_take_no_memory():
    """So that as many orders as a file holds can wait their turn."""
    usual = Size(1024, 1024, 401, 8.0)
    before = memory_kib()
    jobs = [layouts.prepare(Order(prompt="a"), usual, GRID) for _ in range(10)]
    assert sum(job.timeline.frames_THWC.nbytes for job in jobs) > 10 * 2**30
    assert memory_kib() - before < 2**18


def memory_kib():
    """Of this process, in use."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def test_text_is_one_pass_of_which_nothing_is_known():
    job = prepare(prompt="a", frames=9, height=24, seed=5)
    video, seen = play(job)
    assert len(seen) == 1 and seen[0].known is None and seen[0].seed == 5
    assert seen[0].size == Size(24, 16, 9, 8.0) and (video == NEW).all() and not job.told


def test_an_image_alone_leaves_nothing_to_make(tmp_path):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    for length in ({"frames": 1}, {"seconds": 0.01}):
        with pytest.raises(RequestError, match="1 frame leaves none to make; give 5 or more"):
            prepare(image=str(tmp_path / "a.png"), **length)


def test_image_is_the_first_frame(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    video, seen = play(prepare(image=str(tmp_path / "a.png")))
    (step,) = to_make(seen)
    assert step.size.frames == 17
    np.testing.assert_array_equal(step.known.frames_THWC[0], image)
    assert known_latents(step.known)[0].all() and not known_latents(step.known)[1:].any()
    np.testing.assert_array_equal(video[0], round_trip(image))
    assert (video[1:] == NEW).all()


@pytest.mark.parametrize("length", [1, 2, 9, 12, 30])
@pytest.mark.parametrize("added", [1, 4, 7, 8, 40])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_extend_and_cut_is_the_original(clip, length, added, direction):
    path = clip(length)
    original = media.read(media.Path(path)).frames_THWC
    job = prepare(extend=path, direction=direction, frames=added)
    video, seen = play(job)
    assert len(video) == length + added
    given, new = (video[:length], video[length:]) if direction == "forward" else (video[added:], video[:added])
    np.testing.assert_array_equal(given, round_trip(original))
    assert (new == NEW).all()
    for number, step in enumerate(to_make(seen)):
        known = known_latents(step.known)
        # Frames that are given or were made before, next to the new ones, in whole groups.
        assert known[0 if direction == "forward" else -1].all()
        next_to = step.known.frames_THWC[0 if direction == "forward" else -1]
        if number == 0:
            assert any(np.array_equal(next_to, frame) for frame in original)
    first = to_make(seen)[0].known
    if direction == "forward":
        assert (first.frames_THWC == np.where(first.given_THW[..., None], first.frames_THWC, original[-1])).all()
    else:
        # The causal encoder sees a past in which the first given frame is held.
        held = first.frames_THWC[~first.given_THW]
        assert (held == original[0][0, 0]).all()


@pytest.mark.parametrize("added", [1, 2, 3, 4, 10, 30])
def test_connect_leads_from_one_to_the_other(clip, added):
    paths = clip(10, name="a.mp4"), clip(7, first=20, name="b.mp4")
    a, b = (media.read(media.Path(path)).frames_THWC for path in paths)
    video, seen = play(prepare(connect=paths, frames=added))
    np.testing.assert_array_equal(
        video, np.concatenate([round_trip(a), np.full_like(a[:1], NEW).repeat(added, 0), round_trip(b)])
    )
    last = to_make(seen)[-1].known
    assert known_latents(last)[0].all() and known_latents(last)[-1].all()
    # After the frames to be made come those of the second, in order, and its last one is held.
    after = last.frames_THWC[len(last.given_THW) - int(np.argmin(last.given_THW.all((1, 2))[::-1])) :]
    np.testing.assert_array_equal(after, b[np.minimum(np.arange(len(after)), len(b) - 1)])
    if added == 4:
        np.testing.assert_array_equal(last.frames_THWC[last.given_THW.all((1, 2))][:9], a[-9:])


@pytest.mark.parametrize("length", [1, 6, 13, 40])
@pytest.mark.parametrize("added", [3, 4, 20])
def test_loop_doubles_no_frame(clip, length, added):
    """Played round, the original comes once and then the bridge, which saw the end and then the beginning."""
    path = clip(length)
    original = media.read(media.Path(path)).frames_THWC
    video, seen = play(prepare(loop=path, frames=added))
    np.testing.assert_array_equal(video[:length], round_trip(original))
    assert len(video) == length + added and (video[length:] == NEW).all()
    last = to_make(seen)[-1].known
    given = last.given_THW.all((1, 2))
    after = last.frames_THWC[len(given) - int(np.argmin(given[::-1])) :]
    np.testing.assert_array_equal(after, original[np.minimum(np.arange(len(after)), length - 1)])
    assert known_latents(last)[-1].all()


@pytest.mark.parametrize("frames", [2, 5, 7, 8, 16, 17, 40])
def test_loop_of_a_prompt_is_made_and_then_led_back(frames):
    """The bridge sees the first pass's frames behind its end."""
    job = prepare(prompt="a", loop=True, frames=frames)
    video, seen = play(job)
    assert (not job.told) == (frames <= 17) and len(video) == frames
    bridge, joints = seen[len(job.timeline.windows) - 1], seen[len(job.timeline.windows) :]
    assert len(joints) == (0 if frames < 8 else 2) and to_make(seen) == seen and seen[0].known is None
    assert (bridge.known.frames_THWC[-1] == NEW).all() and known_latents(bridge.known)[[0, -1]].all()
    # Which says where the thing goes, not that it comes back.
    assert bridge.prompt == "" and seen[0].prompt == "a" and all(step.prompt == "a" for step in joints)
    with pytest.raises(RequestError, match="1 frame is too few for a loop; 2 is the least"):
        prepare(prompt="a", loop=True, frames=1)


@pytest.mark.parametrize(("frames", "window"), [(8, 17), (13, 17), (16, 17), (17, 17), (40, 17), (17, 9), (40, 33)])
def test_what_is_around_a_loops_joints_is_made_once_more(frames, window):
    """From half of noise on what was made, between a frame and a group that stay; each joint, the closing last, is within."""
    made_by = iter(range(100, 200))

    def model(step):
        return np.full((*step.known.given_THW.shape, 3), next(made_by), np.uint8)

    job = prepare(prompt="a", loop=True, frames=frames, window=window)
    video, seen = play(job, window, model)
    windows, (begins, closes) = len(job.timeline.windows), job.timeline.joints
    so_far = np.empty(frames, int)
    for number, made in enumerate(job.timeline.windows):
        so_far[made.first : made.last] = NEW if number == 0 else 99 + number
    for number, (joint, step) in enumerate(zip((begins, closes), seen[windows:], strict=True)):
        shown = np.arange(joint.start, joint.stop) % frames
        stays = step.known.given_THW.all((1, 2))
        assert stays[0] and stays[-4:].all() and not stays[1:-4].any()
        # No more than is made at once without it, for which there is memory.
        assert len(stays) <= max(made.stop - made.start for made in job.timeline.windows) <= window
        assert step.known.strength == 0.5 and step.most_known_guidance == 1
        np.testing.assert_array_equal(step.known.frames_THWC[:, 0, 0, 0], so_far[shown])
        so_far[shown[~stays]] = 99 + windows + number
    np.testing.assert_array_equal(video[:, 0, 0, 0], so_far)
    assert begins.first < job.timeline.loop < begins.last and closes.first < frames < closes.last
    # A group's middle: what is decoded together joins.
    assert (frames - closes.first) % 4 == 2
    # Where the edges of the first are, no group of the second begins; with a group alone there is no room for that.
    assert len(stays) == 9 or (begins.first - closes.first) % 4 == 2


def test_edit_gives_nothing_but_the_frames_and_their_noise(clip):
    path = clip(11)
    original = media.read(media.Path(path)).frames_THWC
    job = prepare(edit=path, prompt="b", strength=0.3)
    video, (step,) = play(job)
    assert not step.known.given_THW.any() and step.known.strength == 0.3
    np.testing.assert_array_equal(step.known.frames_THWC, original[np.minimum(np.arange(13), 10)])
    assert len(video) == 11 and (video == NEW).all()
    job = prepare(edit=clip(30), prompt="b")
    _, steps = play(job)
    assert len(steps) > 1 and all(step.known.strength == canvas.STRENGTH for step in steps)
    assert [known_latents(step.known)[0].all() for step in steps] == [False] + [True] * (len(steps) - 1)
    assert len({step.seed for step in steps}) == len(steps)


def test_an_edit_with_a_mask_gives_what_is_black_and_begins_from_the_frames_where_it_is_white(clip, tmp_path):
    path = clip(9)
    white = np.zeros((16, 16), np.uint8)
    white[:8] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    job = prepare(edit=path, prompt="b", strength=0.3, mask=str(tmp_path / "mask.png"))
    video, (step,) = play(job)
    assert step.known.strength == 0.3 and not step.known.given_THW[:, :8].any() and step.known.given_THW[:, 8:].all()
    np.testing.assert_array_equal(step.known.frames_THWC, media.read(media.Path(path)).frames_THWC)
    assert (video[:, :8] == NEW).all() and (video[:, 8:] != NEW).all()


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_inpaint_hides_what_is_under_the_mask(tmp_path, rng, size):
    """Whatever was there: the canvas and the result are the same; all else comes back."""
    white = np.zeros((48, 80), np.uint8)
    white[10:30, 20:60] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    image = rng.integers(0, 256, (48, 80, 3), dtype=np.uint8)
    canvases = []
    for content in (image, np.where(white[..., None] > 0, 255 - image, image)):
        Image.fromarray(content).save(tmp_path / "a.png")
        job = prepare(inpaint=str(tmp_path / "a.png"), mask=str(tmp_path / "mask.png"), height=size[0], width=size[1])
        video, (step,) = play(job)
        canvases.append(step.known)
        given = step.known.given_THW
        assert given.any() and not given.all()
        np.testing.assert_array_equal(video[given], round_trip(step.known.frames_THWC)[given])
        assert (video[~given] == NEW).all()
    for name in ("frames_THWC", "given_THW"):
        np.testing.assert_array_equal(getattr(canvases[0], name), getattr(canvases[1], name))


def test_inpaint_in_time(clip, tmp_path):
    """A mask that is a video: frames 6 to 9 are made anew, from whole groups on both sides."""
    path = clip(17)
    mask = np.zeros((17, 16, 16, 3), np.uint8)
    mask[6:10] = 255
    files.write_video(tmp_path / "mask.mp4", mask, 8)
    video, seen = play(prepare(inpaint=path, mask=str(tmp_path / "mask.mp4")))
    (step,) = to_make(seen)
    np.testing.assert_array_equal(step.known.given_THW.all((1, 2)), [not 6 <= k < 10 for k in range(17)])
    np.testing.assert_array_equal(known_latents(step.known).all((1, 2)), [True, True, False, False, True])
    # What is given on either side comes back as its own round trip, not as that of a video with a gap.
    assert [step.size.frames for step in seen] == [17, 9, 9] and (video[6:10] == NEW).all()
    original = media.read(media.Path(path)).frames_THWC
    np.testing.assert_array_equal(video[:6], round_trip(original[:6]))
    np.testing.assert_array_equal(video[10:], round_trip(original[10:]))


def test_masks_that_do_not_fit_are_refused(clip, tmp_path):
    path = clip(9)
    cases = [
        (np.full((16, 40), 255, np.uint8), "mask is 16x40, but what it is for is 16x16"),
        (np.zeros((16, 16), np.uint8), "mask has no white;"),
    ]
    for mask, match in cases:
        Image.fromarray(mask).save(tmp_path / "mask.png")
        with pytest.raises(RequestError, match=match):
            prepare(inpaint=path, mask=str(tmp_path / "mask.png"))
    edge = np.zeros((16, 32), np.uint8)
    edge[:, :4] = 255
    Image.fromarray(edge).save(tmp_path / "mask.png")
    wide = {"inpaint": clip(9, width=32, name="wide.mp4"), "mask": str(tmp_path / "mask.png")}
    with pytest.raises(
        RequestError, match="no white in the part that is kept of 16x32; use fit letterbox, or make white"
    ):
        prepare(**wide)
    assert prepare(**wide, fit="letterbox").timeline.given_THW.any()
    files.write_video(tmp_path / "mask.mp4", np.full((5, 16, 16, 3), 255, np.uint8), 8)
    with pytest.raises(RequestError, match="mask has 5 frames at 8 fps, but what it is for 9"):
        prepare(inpaint=path, mask=str(tmp_path / "mask.mp4"))


def test_outpaint_surrounds_what_is_given(clip):
    path = clip(5)
    job = prepare(outpaint=path, left=8, top=16, bottom=8)
    assert (job.size.height, job.size.width) == (40, 24)
    video, (step,) = play(job)
    expected = np.zeros((5, 40, 24), bool)
    expected[:, 16:32, 8:] = True
    np.testing.assert_array_equal(step.known.given_THW, expected)
    np.testing.assert_array_equal(video[expected], round_trip(step.known.frames_THWC)[expected])
    assert (video[~expected] == NEW).all()
    with pytest.raises(
        RequestError, match=r"^with left, right, top and bottom width 21 is not a multiple of 8; 16 and 24 are"
    ):
        prepare(outpaint=path, left=5)
    with pytest.raises(RequestError, match="leave no room in 16x16"):
        prepare(outpaint=path, left=16, width=16)


def test_what_the_model_does_not_see_of_what_is_given_is_told(clip, tmp_path):
    """A latent of which a part is made is made as a whole: of 16x24, 8 of 16 columns lie in such cells."""

    def told(**order):
        return [line for line in prepare(**order).told if "not seen by the model" in line]

    assert told(outpaint=clip(5), left=8) == []
    (line,) = told(outpaint=clip(5), left=5, right=3)
    assert line.startswith(
        "50 % of what is given is not seen by the model, as it lies in cells of 8x8 pixels (and 4 frames"
    )
    for left, lines in ((8, 0), (12, 1)):
        white = np.broadcast_to(np.arange(16) >= left, (16, 16))
        Image.fromarray(np.where(white, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
        assert len(told(inpaint=clip(5), mask=str(tmp_path / "mask.png"))) == lines
        assert told(edit=clip(5), mask=str(tmp_path / "mask.png")) == []  # which begins from all that was there
        assert len(told(edit=clip(5), mask=str(tmp_path / "mask.png"), strength=1)) == lines
    # Of a frame in a letterbox what shares a cell with the rest.
    wide = clip(5, height=16, width=64, name="wide.mp4")
    assert told(extend=wide, frames=4, height=16, width=64) == []
    for fitted in (told(extend=wide, frames=4, fit="letterbox"), told(loop=wide, frames=4, fit="letterbox")):
        assert fitted and fitted[0].startswith("100 %")
    assert told(interpolate=clip(5)) == [] and told(interpolate=clip(5), strength=1)


def test_what_is_made_at_once_is_a_window(clip):
    assert prepare(extend=clip(9), frames=40).most_frames == 17
    assert prepare(prompt="a", frames=9).most_frames == 9


def test_interpolate_keeps_frames_and_duration(clip):
    path = clip(5)
    original = media.read(media.Path(path)).frames_THWC
    for order, fps in (({}, 16.0), ({"fps": 16}, 16.0), ({"factor": 3}, 24.0)):
        factor = order.get("factor", 2)
        job = prepare(interpolate=path, **order)
        assert job.size.fps == fps and job.size.frames == 4 * factor + 1
        video, (step,) = play(job)
        np.testing.assert_array_equal(video[::factor], round_trip(original))
        assert (np.delete(video, np.s_[::factor], 0) == NEW).all()
        assert step.known.strength == 0.6
        np.testing.assert_array_equal(step.known.frames_THWC[: job.size.frames], canvas.stretch(original, factor))
    with pytest.raises(RequestError, match="has one frame"):
        prepare(interpolate=clip(1))


def test_draft_is_enlarged_under_what_is_given_and_has_its_seed(tmp_path):
    image = np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    job = prepare(image=str(tmp_path / "a.png"), height=32, width=32, draft=0.5, strength=0.4, seed=3)
    video, seen = play(job)
    small, full = to_make(seen)
    assert (small.size.height, full.size.height) == (16, 32) and small.known.strength == 1
    assert full.known.strength == 0.4 and small.seed == full.seed == 3
    np.testing.assert_array_equal(full.known.frames_THWC[0], image)
    assert (full.known.frames_THWC[1:] == NEW).all()
    np.testing.assert_array_equal(video[0], round_trip(image))
    with pytest.raises(RequestError, match=r"draft 0\.9 of 16x16 is no smaller size in steps of 8x8"):
        prepare(prompt="a", draft=0.9)


@pytest.mark.parametrize(
    ("size", "share", "small"),
    [((48, 32), 0.6, (24, 16)), ((48, 32), 0.5, (24, 16)), ((32, 64), 0.3, (8, 16)), ((64, 64), 0.66, (40, 40))],
)
def test_a_draft_has_the_aspect_of_the_whole_where_it_can(size, share, small):
    job = prepare(prompt="a", height=size[0], width=size[1], draft=share)
    assert job.draft.frames_THWC.shape[1:3] == small
    assert f"a draft of {small[0]}x{small[1]} is made first" in job.told


def test_a_draft_that_is_stretched_says_so():
    (line,) = [line for line in prepare(prompt="a", height=40, width=24, draft=0.5).told if "draft" in line]
    assert line == "a draft of 24x16 is made first and stretched by 11% to 40x24"


def test_what_says_nothing_of_what_is_asked_for_is_refused(tmp_path):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match=r"start and end are for videos, but .* is an image; leave them out"):
        prepare(edit=str(tmp_path / "a.png"), prompt="b", end=1.0)
    of_two = GRID._replace(patch=(2, 1, 1))
    with pytest.raises(RequestError, match="so all frames are made at once; leave window out"):
        layouts.prepare(Order(prompt="a", frames=13, window=9), DEFAULTS, of_two)


def test_a_model_of_one_frame_after_the_other_is_asked_so(clip):
    grid = GRID._replace(one_by_one=True)

    def prepare_for_it(**order):
        return layouts.prepare(Order(**({"prompt": "a"} | order)), DEFAULTS, grid)

    for order, first in (({"frames": 41}, 0), ({"extend": clip(7), "frames": 12}, 7)):
        video, seen = play(prepare_for_it(**order))
        made = to_make(seen)
        for number, step in enumerate(made):
            known_thw = known_latents(step.known).all((1, 2)) if step.known else np.zeros(1, bool)
            # All but the last latent is given, as much of it as a window holds.
            assert list(known_thw) == [True] * (len(known_thw) - 1) + [False]
            assert len(known_thw) == min(5, number + (2 + (first - 1) // 4 if first else 1))
        assert (video[first:] == NEW).all() and len(made) == math.ceil((len(video) - max(first, 1)) / 4) + (first == 0)
    for order in ({"extend": clip(7), "direction": "backward"}, {"loop": True}, {"edit": clip(7)}):
        with pytest.raises(RequestError, match=r"one after the other; it is prompted by text, an image"):
            prepare_for_it(**order)


def test_letterbox_leaves_the_rest_to_the_model(clip):
    path = clip(5, height=16, width=32)
    for order in ({"extend": path}, {"extend": path, "direction": "backward"}, {"loop": path}):
        job = prepare(**order, fit="letterbox", frames=4)
        video, _ = play(job)
        assert len(video) == 9
        at = slice(4, None) if order.get("direction") else slice(0, 5)
        # Not in the middle, where it would fill no cell of the model, which then would see nothing of it.
        assert (video[at, 8:] == NEW).all()
        assert (np.abs(video[at, :8].astype(int) - counting(5, 8)) <= 3).all()
        assert ((video[:4] if order.get("direction") else video[5:]) == NEW).all()
        assert any("16x32 is scaled to 8x16 within 16x16; the model paints what is left over" in s for s in job.told)


@pytest.mark.parametrize("length", [5, 9, 17, 40])
@pytest.mark.parametrize("added", [4, 8, 16])
def test_a_bridge_between_letterboxed_clips_sees_where_it_leads(clip, length, added):
    path = clip(length, height=16, width=32)
    job = prepare(connect=(path, path), fit="letterbox", frames=added)
    _, seen = play(job)
    bridge = next(
        step
        for step, window in zip(to_make(seen), job.timeline.windows, strict=True)
        if window.first < length + added and window.last == length + added
    )
    known = known_latents(bridge.known)
    assert known[0].any() and known[-1].any() and not known.all()


def test_parts_of_a_video(clip):
    path = clip(16)
    job = prepare(extend=path, frames=4, start=0.5, end=1.0)
    video, _ = play(job)
    np.testing.assert_array_equal(video[:4], round_trip(media.read(media.Path(path)).frames_THWC[4:8]))


def test_long_videos_are_made_in_windows_and_told():
    job = prepare(prompt="a", frames=101)
    video, seen = play(job)
    assert len(video) == 101 and len(seen) > 1 and max(step.size.frames for step in seen) == 17
    assert job.told == (
        f"more than 17 frames are not made at once: 101 are made in {len(seen)} windows, each from what is before it",
    )
    _, wide = play(prepare(prompt="a", frames=101, window=101), window=101)
    assert len(wide) == 1
    assert [step.seed for step in seen] == [canvas.pass_seed(0, n) for n in range(len(seen))]


def test_windows_go_on_from_what_was_made(clip):
    """A model that counts on from the last given frame makes one long count, over any number of windows."""

    def model(step):
        known = step.known.given_THW.all((1, 2))
        last = np.flatnonzero(known).max()
        grey = step.known.frames_THWC[last, 0, 0, 0].astype(int) + np.arange(len(known)) - last
        return np.broadcast_to(grey[:, None, None, None], step.known.frames_THWC.shape).astype(np.uint8)

    path = clip(6)
    newest = int(media.read(media.Path(path)).frames_THWC[-1, 0, 0, 0])
    video, _ = play(prepare(extend=path, frames=50), model=model)
    np.testing.assert_array_equal(video[6:, 0, 0, 0], newest + 1 + np.arange(50))


def test_a_window_insists_on_the_users_frames_and_where_it_has_to_meet_something(clip):
    """inf is as the checkpoint is used to; an order that says how much is obeyed in every pass."""

    def insistences(**order):
        steps = to_make(play(prepare(prompt="a", **order))[1])
        return [step.most_known_guidance if step.known_guidance is None else step.known_guidance for step in steps]

    long = insistences(frames=61)
    assert len(long) > 3 and set(long[1:]) == {1.0}
    for direction in ("forward", "backward"):
        # The second still sees the user's frame beside its own first group.
        first, *rest = insistences(extend=clip(9, name=f"{direction}.mp4"), direction=direction, frames=60)
        assert first == math.inf and len(rest) > 3 and set(rest[1:]) == {1.0}
    *_, last, begins, closes = insistences(loop=True, frames=40)
    assert last == 1.5 and begins == closes == 1
    for order in ({"loop": clip(9)}, {"connect": (clip(9, name="a.mp4"), clip(9, name="b.mp4"))}):
        *_, last = insistences(**order, frames=60)
        assert last == math.inf
    assert set(insistences(extend=clip(9), frames=60, known_guidance=3.0)) == {3.0}


def test_of_files_all_windows_have_the_prompt(clip):
    """Bridges too: what is asked for is what is to happen in them."""
    pair = clip(9, name="a.mp4"), clip(9, name="b.mp4")
    for order in (
        {"loop": pair[0]},
        {"connect": pair},
        {"extend": pair[0]},
        {"extend": pair[0], "direction": "backward"},
    ):
        made = to_make(play(prepare(prompt="a", frames=60, **order))[1])
        assert len(made) > 3 and {step.prompt for step in made} == {"a"}


def test_jobs_are_sampled_together_and_each_as_if_alone(clip):
    jobs = [
        prepare(prompt="a"),
        prepare(extend=clip(9, name="x.mp4"), frames=30),
        prepare(edit=clip(5, name="y.mp4"), seed=4),
    ]
    rounds = []

    def sample(steps):
        rounds.append(len(steps))
        made = []
        for step in steps:
            shape = (step.size.frames, step.size.height, step.size.width, 3)
            frames = np.full(shape, step.seed % 251, np.uint8)
            if step.known is not None:
                frames = np.where(step.known.given_THW[..., None], round_trip(step.known.frames_THWC), frames)
            made.append(frames)
        return made

    together = list(canvas.run(jobs, sample))
    assert rounds[0] == 3 and rounds[1] == 1
    # Each as soon as it is there: those of one pass before the others.
    assert sorted(number for number, _ in together) == [0, 1, 2] != [number for number, _ in together]
    for number, (video, _) in together:
        ((_, (alone, _)),) = canvas.run([jobs[number]], sample)
        np.testing.assert_array_equal(alone, video)
    assert list(canvas.run([], sample)) == []


def test_pass_seeds_differ_and_are_seeds():
    found = {canvas.pass_seed(seed, number) for seed in range(50) for number in range(20)}
    assert len(found) == 1000 and min(found) >= 0 and max(found) < 2**31
    assert canvas.pass_seed(7, 0) == 7


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "match"),
    [
        ({"height": 50}, "^height 50 is not a multiple of 8; 48 and 56 are the nearest that work$"),
        ({"width": 5}, "^width 5 is not a multiple of 8; 8 is the nearest that works$"),
        (
            {"height": 50, "width": 20},
            "^height 50 is .* nearest that work; and width 20 is not a multiple of 8; 16 and 24 are the nearest that work$",
        ),
        ({"frames": 10}, "^10 frames are not 1 \\+ 4k; 9 and 13 are the nearest that work$"),
        ({"window": 16}, "^window 16 is not 1 \\+ 4k; 13 and 17 are the nearest that work$"),
    ],
)
def test_sizes_that_do_not_work_come_with_those_that_do(order, match):
    with pytest.raises(RequestError, match=match):
        prepare(prompt="a", **order)


def test_tokens_of_several_latents():
    grid = Grid((4, 8, 8), (2, 2, 2))
    job = layouts.prepare(Order(prompt="a", frames=29, height=32), DEFAULTS, grid)
    assert job.size.frames == 29 and len(job.timeline.windows) == 1
    with pytest.raises(RequestError, match=r"17 frames are not 5 \+ 8k; 13 and 21"):
        layouts.prepare(Order(prompt="a"), DEFAULTS, grid)
    with pytest.raises(RequestError, match="height 24 is not a multiple of 16; 16 and 32"):
        layouts.prepare(Order(prompt="a", height=24, frames=21), DEFAULTS, grid)
    with pytest.raises(RequestError, match="prompted by text alone"):
        layouts.prepare(Order(image="a.png"), DEFAULTS, grid)


def test_seconds_are_the_nearest_frames_that_work():
    for seconds, frames in ((0.1, 1), (1, 9), (2, 17), (5, 41)):
        job = prepare(prompt="a", seconds=seconds, window=41)
        assert job.size.frames == frames
        assert job.told == (f"{seconds} seconds at 8 fps are made as {frames} frames",)
    job = layouts.prepare(Order(prompt="a", seconds=5), dataclasses.replace(DEFAULTS, fps=5), GRID, 41)
    assert job.size.frames == 25 and not job.told


def test_another_rate_is_told(clip):
    job = prepare(edit=clip(8, fps=16.0))
    assert job.size.frames == 4 and job.told == ("a.mp4 has 16 frames a second and is taken at 8",)


@pytest.mark.parametrize(
    "order", [{"interpolate": "", "factor": 16}, {"outpaint": "", "left": 1600}, {"extend": "", "frames": 1000}]
)
def test_results_that_are_too_large_are_refused_before_they_are_there(clip, order):
    order = {name: value or clip(9) for name, value in order.items()}
    with pytest.raises(RequestError, match=r"frames of .* are more than fits in memory; make less at once"):
        layouts.prepare(Order(**order), DEFAULTS, GRID, limits=media.Limits(kept_pixels=9 * 16 * 16))
