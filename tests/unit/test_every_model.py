"""What holds for every model that can be cached, and what guidance stacked in a batch adds."""

import json
import math

import pytest
import torch
from every_model import EVERY_MODEL, STACKED, blocks_of, build, call, hint_blocks_of, in_double

import cineray
from cineray.caching.profile import DiCacheProfile, generic_profile
from cineray.pipeline.adapters import MODELS

pytestmark = pytest.mark.slow

ALWAYS = cineray.DiCacheConfig(threshold=1e6)


def looking_at_each_step(threshold, **changes):
    """DiCache that probes at each step, one decision for both branches."""
    return cineray.DiCacheConfig(threshold=threshold, **{"branches": "joint", "max_skips": 3, **changes})


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_an_interval_of_one_never_skips_and_equals_the_plain_pipeline_bit_for_bit(name):
    pipe = build(name)
    plain = call(pipe)
    with cineray.enable_cache(pipe, "interval(interval=1)") as handle:
        assert torch.equal(call(pipe), plain)
    summary = handle.trace.summary()
    assert (summary["steps"], summary["skipped_steps"], summary["cost"]) == (12, 0, 1.0)
    with cineray.enable_cache(pipe, "interval(interval=2)") as handle:
        assert not torch.equal(call(pipe), plain)
    assert handle.trace.summary()["skipped_steps"] == 5  # every second one, not the last


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_deep_blocks_run_only_when_computed(name):
    """A deep block of Open-Sora is a spatial and a temporal one: both probe blocks run at each step."""
    pipe = build(name)
    layout = MODELS[type(pipe.transformer).__name__].layout
    blocks = [*blocks_of(pipe.transformer), *hint_blocks_of(pipe.transformer)]
    counts = dict.fromkeys(blocks, 0)
    for block in blocks:
        block.register_forward_hook(lambda block, *_: counts.__setitem__(block, counts[block] + 1))
    with cineray.enable_cache(pipe, "interval(interval=3,probe_depth=1,last_step_full=false)") as handle:
        call(pipe)
    num_calls = 24 if name in ("wan", "wan_i2v", "hunyuan15", "vace") else 12
    per_list = len(getattr(pipe.transformer, layout.lists[0]))
    for number, block in enumerate(blocks):
        is_probe = number % per_list == 0 if layout.interleaved else number == 0
        assert counts[block] == (num_calls if is_probe else num_calls / 3)
    assert handle.trace.summary()["cost"] == pytest.approx(sum(counts.values()) / num_calls / len(blocks), abs=1e-6)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_blocks_that_work_in_place_do_not_fool_it(name):
    """A block that writes into its input would turn what was kept for comparison into the present."""
    text_first = name == "flux"

    def writing_into_its_input(original):
        def forward(*args, **kwargs):
            blocks_input = args[0] if args else kwargs["hidden_states"]
            out = original(*args, **kwargs)
            blocks_output = out[-1 if text_first else 0] if isinstance(out, tuple) else out
            blocks_output = blocks_input.copy_(blocks_output)
            if not isinstance(out, tuple):
                return blocks_output
            return (out[0], blocks_output) if text_first else (blocks_output, out[1])

        return forward

    def run(in_place):
        pipe = build(name)
        for block in blocks_of(pipe.transformer) if in_place else ():
            block.forward = writing_into_its_input(block.forward)
        with cineray.enable_cache(pipe, "dicache(threshold=0.5)") as handle:
            return call(pipe), handle.trace.entries

    (plain, entries), (in_place, their_entries) = run(False), run(True)
    assert entries == their_entries
    assert any(not entry.compute for entry in entries)
    assert torch.equal(plain, in_place)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_nan_in_a_probe_computes(name):
    """In both branches' rows if the batch has both."""
    pipe = build(name)
    calls = []
    calls_per_step = 2 if name in ("wan", "wan_i2v", "hunyuan15", "vace") else 1

    def spoil(_module, _arguments, output):
        calls.append(1)
        if len(calls) != 7 * calls_per_step + calls_per_step:  # step 7; of two calls, the unconditional branch's
            return output
        return tuple(o * math.nan for o in output) if isinstance(output, tuple) else output * math.nan

    blocks_of(pipe.transformer)[0].register_forward_hook(spoil)
    with cineray.enable_cache(pipe, ALWAYS) as handle:
        call(pipe)
    reasons = {(e.step, e.branch): e.reason for e in handle.trace.entries}
    branches = {e.branch for e in handle.trace.entries}
    spoiled = {"uncond"} if calls_per_step == 2 else branches
    for branch in branches:
        assert reasons[(6, branch)] == "skip"
        assert reasons[(7, branch)] == ("unknown" if branch in spoiled else "skip")
        assert reasons[(8, branch)] == "unknown"  # the computed step gave NaN latents


@pytest.mark.parametrize("name", ["dit", "stable_audio", "open_sora"])
def test_the_paper_has_no_preset_for_it_but_ours_has_a_neutral_one(name):
    pipe = build(name)
    with pytest.raises(ValueError, match=r"dicache-paper has no preset for .*; it has: wan, .*hunyuan-video, .*flux"):
        cineray.enable_cache(pipe, "dicache-paper")
    with cineray.enable_cache(pipe, "dicache") as handle:
        generic = generic_profile(DiCacheProfile)
        assert f"threshold={generic.threshold}," in handle.policy
        assert f"profile={generic.digest}" in handle.policy
        assert "branches=joint" in handle.policy


def decisions(handle, branch, sample=0):
    return [(e.step, e.compute) for e in handle.trace.entries if (e.branch, e.sample) == (branch, sample)]


def two_clips(name):
    """Arguments for a batch of two, and for each alone; the second begins from other noise, and where the pipeline
    takes noise, from a stronger one: another pace of change."""
    asked = {"dit": [7, 800], "stable_audio": ["a red circle", "white square black"], "open_sora": [1, 2]}[name]
    key = "class_labels" if name == "dit" else "prompt"

    def noise(sample):
        generator = torch.Generator().manual_seed(sample)
        shape = (1, 4, 16) if name == "stable_audio" else (1, 4, 2, 4, 4)
        return generator if name == "dit" else torch.randn(shape, generator=generator) * (1 + 2 * sample)

    def arguments(*samples):
        drawn = [noise(s) for s in samples]
        start = {"generator": drawn} if name == "dit" else {"latents": torch.cat(drawn).double()}
        return start | {key: [asked[s] for s in samples]}

    return arguments(0, 1), arguments(0), arguments(1)


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("restless", ["cond", "uncond"])
def test_stacked_branches_decide_jointly_or_for_themselves(name, restless):
    """The probe of one branch's row is made to move much more than the other's."""

    def both(branches):
        pipe = build(name)
        row, calls = MODELS[type(pipe.transformer).__name__].branches.index(restless), []

        def stir(_module, _arguments, output):
            calls.append(1)
            output = output.clone()
            output[row] *= 1 + 3 * (len(calls) % 2)  # a change of 3, then of 0.75
            return output

        blocks_of(pipe.transformer)[0].register_forward_hook(stir)
        with cineray.enable_cache(pipe, looking_at_each_step(0.4, branches=branches)) as handle:
            call(pipe, steps=20)
        return decisions(handle, "cond"), decisions(handle, "uncond")

    cond, uncond = both("separate")
    assert len(cond) == len(uncond) == 20
    assert sum(c for _, c in cond) != sum(c for _, c in uncond)
    joint_cond, joint_uncond = both("joint")
    assert joint_cond == joint_uncond
    assert (sum(c for _, c in joint_cond) < 20) == (restless == "uncond")  # the conditional row decides for both


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("spoiled", ["cond", "uncond"])
def test_doubt_in_one_row_computes_that_row_and_those_that_follow_it(name, spoiled):
    """Which also shows that the rows bear the right names: the spoiled row is found by the text that it was given."""
    pipe = build(name)
    model = MODELS[type(pipe.transformer).__name__]
    row, calls = model.branches.index(spoiled), []

    def spoil(_module, _arguments, output):
        calls.append(1)
        if len(calls) == 8:
            output = output.clone()
            output[row] = math.nan
        return output

    blocks_of(pipe.transformer)[0].register_forward_hook(spoil)
    with cineray.enable_cache(pipe, looking_at_each_step(1e6, max_skips=0)) as handle:
        call(pipe)
    reasons = {(e.step, e.branch): (e.compute, e.reason) for e in handle.trace.entries}
    assert reasons[(7, spoiled)] == (True, "unknown")
    other = "uncond" if spoiled == "cond" else "cond"
    assert reasons[(7, other)] == ((True, "unknown") if spoiled == "cond" else (False, "skip"))


@pytest.mark.parametrize("name", STACKED)
def test_the_conditional_rows_are_where_the_pipeline_puts_them(name):
    """Another text changes what enters the cond row's blocks and not the uncond row's."""
    pipe = build(name)
    seen = []
    block = blocks_of(pipe.transformer)[0]
    block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    for asked in (7, 8):
        text = {"class_labels": [asked]} if name == "dit" else {"prompt": asked}
        call(pipe, steps=1, **(text if name != "stable_audio" else {"prompt": ["a red circle", "white"][asked - 7]}))
    changed = [not torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert changed == [branch == "cond" for branch in MODELS[type(pipe.transformer).__name__].branches]


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("branches", ["joint", "separate"])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_each_sample_of_a_stacked_batch_has_its_own_schedule(name, branches, guidance_scale):
    pipe = in_double(build(name))
    threshold = (0.5 if guidance_scale > 1 else 0.38) if name == "dit" else 0.05  # the two clips' schedules differ
    policy = looking_at_each_step(threshold, warmup=0.1, max_skips=0, branches=branches)
    together, *alone = two_clips(name)
    expected, images = [], []
    for number, arguments in enumerate(alone):
        with cineray.enable_cache(pipe, policy) as handle:
            images.append(call(pipe, steps=24, guidance_scale=guidance_scale, **arguments))
        expected.append([(e.step, e.branch, number, e.compute) for e in handle.trace.entries])
    with cineray.enable_cache(pipe, policy) as handle:
        batch = call(pipe, steps=24, guidance_scale=guidance_scale, **together)
    entries = handle.trace.entries
    assert {e.branch for e in entries} == ({"cond", "uncond"} if guidance_scale > 1 else {"cond"})
    assert {e.sample for e in entries} == {0, 1}
    assert len(entries) == 24 * 2 * (2 if guidance_scale > 1 else 1)
    assert 0 < sum(e.compute for e in entries) < len(entries)
    for number, (schedule, image) in enumerate(zip(expected, images, strict=True)):
        ours = [(e.step, e.branch, e.sample, e.compute) for e in entries if e.sample == number]
        assert ours == schedule
        torch.testing.assert_close(batch[number], image[0], atol=2e-4, rtol=1e-3)
    assert [e[3] for e in expected[0]] != [e[3] for e in expected[1]]


@pytest.mark.parametrize("name", STACKED)
def test_rows_follow_a_conditional_row_that_cannot_be_aligned(name):
    """Its probe adds nothing, so the line between two past residuals has no length and gamma is unknown."""
    pipe = build(name)
    row = MODELS[type(pipe.transformer).__name__].branches.index("cond")

    def stand_still(_module, arguments, named, output):
        output = output.clone()
        output[row] = (arguments[0] if arguments else named["hidden_states"])[row]
        return output

    for blocks in MODELS[type(pipe.transformer).__name__].layout.lists:  # a probe of Open-Sora is of both lists
        getattr(pipe.transformer, blocks)[0].register_forward_hook(stand_still, with_kwargs=True)
    with cineray.enable_cache(pipe, looking_at_each_step(1e6, warmup=0.3)) as handle:
        call(pipe)
    assert decisions(handle, "cond") == decisions(handle, "uncond") == [(step, True) for step in range(12)]
    assert {e.reason for e in handle.trace.entries if e.step > 3} == {"unknown"}


# at 13 steps of 20 % warm-up the unconditional branch leaves the warm-up a step before the conditional one
@pytest.mark.parametrize(("threshold", "steps"), [(0.06, 24), (1.0, 13)])
@pytest.mark.parametrize("branches", ["joint", "separate"])
@pytest.mark.parametrize("look", ["step", "run"])
def test_stacked_and_called_one_after_the_other_decide_alike(look, branches, threshold, steps, tmp_path):
    loop = in_double(build("open_sora"))
    policy = looking_at_each_step(threshold, branches=branches, look=look)
    traces, clips = [], []
    for stacked in (True, False):
        with cineray.enable_cache(loop, policy, num_branches=2) as handle:
            clips.append(call(loop, steps=steps, stacked=stacked))
        traces.append({(e.step, e.branch): e.compute for e in handle.trace.entries})
    assert traces[0] == traces[1]
    assert 0 < sum(traces[0].values()) < 2 * steps
    torch.testing.assert_close(clips[0], clips[1], atol=2e-4, rtol=1e-3)
    (tmp_path / "trace.json").write_text(json.dumps(handle.trace.to_dict()))  # of two calls, replayed in one
    with cineray.enable_cache(loop, f"replay:{tmp_path / 'trace.json'}") as handle:
        replayed = call(loop, steps=steps)
    assert {(e.step, e.branch): e.compute for e in handle.trace.entries} == traces[1]
    torch.testing.assert_close(replayed, clips[1], atol=2e-4, rtol=1e-3)


def test_an_argument_of_one_row_serves_every_row_of_the_batch():
    """DiT's timestep may be one for all rows, also where only some of the rows are computed."""
    pipe = in_double(build("dit"))

    def restless(_module, _arguments, output):
        return torch.cat([output[:1], output[1:] * torch.randn(1, generator=noise)])

    blocks_of(pipe.transformer)[0].register_forward_hook(restless)
    clips = []
    for rows in (1, 2):
        noise = torch.Generator().manual_seed(0)
        with (
            cineray.enable_cache(
                pipe.transformer, looking_at_each_step(0.1, branches="separate"), scheduler=pipe.scheduler
            ) as handle,
            torch.no_grad(),
        ):
            x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
            pipe.scheduler.set_timesteps(50)
            for t in pipe.scheduler.timesteps:
                out = pipe.transformer(x.repeat(2, 1, 1, 1), t[None].expand(rows), torch.tensor([7, 1000])).sample
                x = pipe.scheduler.step(out[:1, :4], t, x).prev_sample
        clips.append(x)
        assert any(c != u for c, u in zip(decisions(handle, "cond"), decisions(handle, "uncond"), strict=True))
    torch.testing.assert_close(clips[0], clips[1], atol=1e-6, rtol=1e-5)


def test_two_samples_of_the_same_noise_without_guidance_are_not_taken_for_branches():
    """Or only at their first step, which is computed, where nobody says that nothing is stacked."""
    loop = build("open_sora")
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1, 1)
    clips, traces = [], []
    for num_branches in (1, None):
        with cineray.enable_cache(loop, "dicache(threshold=0.1)", num_branches=num_branches) as handle:
            clips.append(call(loop, prompt=[1, 2], guidance_scale=1.0, latents=noise))
        traces.append([(e.step, e.branch, e.sample, e.compute) for e in handle.trace.entries])
    assert torch.equal(*clips)
    assert traces[0][2:] == traces[1][2:]
    assert {(branch, sample) for _, branch, sample, _ in traces[0]} == {("cond", 0), ("cond", 1)}
    assert {(step, compute) for step, _, _, compute in traces[1][:2]} == {(0, True)}
