"""Samplers: reference trajectories, exactness with an oracle, edits, replays."""

import inspect
import pathlib

import pytest
import torch
from closed_form import mixture, oracle
from safetensors.torch import load_file

from nanodiff import rng
from nanodiff.diffusion import Schedule, process, samplers
from nanodiff.diffusion.grid import Level

GOLDEN = load_file(pathlib.Path(__file__).parents[1] / "golden" / "samplers.safetensors")
NAMES = list(samplers.by_name)
KINDS = ("noise", "x0", "v")
SD = Schedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
SIGMA_SPACE = ("euler", "euler_a", "heun")
ENDS_EXACT = {"ddim": dict(final_alpha="one"), "pndm": dict(final_alpha="one")}  # the default leaves a trace of noise


def exact(name, kind="noise"):
    """Options with which the sampler follows an oracle exactly, also where the default keeps others' habits."""
    return ENDS_EXACT.get(name, {}) | (dict(average="noise") if name == "pndm" and kind == "v" else {})


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def record(states):
    return lambda i, t, x: states.append((i, t, x))


# --- against the reference -------------------------------------------------------------------------------------------

VARIANTS = {
    "ddim_eta_half": ("ddim", dict(eta=0.5)), "ddim_eta_one": ("ddim", dict(eta=1.0)),
    "ddim_alpha_one": ("ddim", dict(final_alpha="one", offset=0)),
    "ddim_zero_snr": ("ddim", dict(final_alpha="one", offset=0, spacing="trailing")),
    "ddim_clip": ("ddim", dict(clip=1.0, final_alpha="one", offset=0)), "ddpm_clip": ("ddpm", dict(clip=1.0, offset=0)),
    "ddpm_large": ("ddpm", dict(variance="large", offset=0)), "ddpm_trailing": ("ddpm", dict(spacing="trailing")),
    "pndm_alpha_one": ("pndm", dict(final_alpha="one", offset=0)),
    "euler_leading": ("euler", dict(spacing="leading", offset=1)),
    "euler_trailing": ("euler", dict(spacing="trailing")),
    "euler_karras": ("euler", dict(karras=True)), "euler_zero_snr": ("euler", dict(spacing="trailing")),
    "euler_a_leading": ("euler_a", dict(spacing="leading", offset=1)), "heun_karras": ("heun", dict(karras=True)),
    "dpm++2m_leading": ("dpm++2m", dict(spacing="leading", offset=1)),
    "dpm++2m_trailing": ("dpm++2m", dict(spacing="trailing")), "dpm++2m_ends_above_0": ("dpm++2m", {}),
    "unipc_leading": ("unipc", dict(spacing="leading", offset=1)), "unipc_karras": ("unipc", dict(karras=True)),
}
CASES = sorted({key.split("/")[0] for key in GOLDEN if "|" in key})


@pytest.mark.parametrize("dtype,bar", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_every_state_equals_the_reference(case, dtype, bar):
    variant, kind, steps = case.split("|")
    name, options = VARIANTS.get(variant, (variant, {}))
    schedule = Schedule.linear() if variant in ("ddim_clip", "ddpm_clip", "ddpm_large") else SD
    if "zero_snr" in variant:
        schedule = schedule.zero_terminal_snr()
    if "ends_above_0" in variant:
        options = dict(sigmas=GOLDEN[case + "/sigmas"])
    seen, states = [], []
    denoise = mixture(schedule, GOLDEN["means"], GOLDEN["stds"], GOLDEN["weights"], kind, seen)
    samplers.sample(name, denoise, GOLDEN["x"].to(dtype), schedule, int(steps), kind=kind,
                    noises=GOLDEN["noises"].to(dtype), on_step=record(states), **options)
    expected = GOLDEN[case + "/states"]
    if name in SIGMA_SPACE:  # the reference's states are x0 + sigma * noise there
        grid, _ = samplers.grid_for(name, schedule, int(steps), **options)
        after = [level.signal for level in grid.levels[1:] for _ in range(2 if name == "heun" else 1)]
        expected = expected * torch.tensor(after, dtype=torch.float64)[: len(expected), None, None]
    assert [i for i, _, _ in states] == list(range(len(expected)))
    assert all(x.dtype == dtype for _, _, x in states)
    got = torch.stack([x for _, _, x in states]).double()
    assert float((got - expected).abs().max()) <= bar
    t = torch.stack([t[0].double() for t, _ in seen])
    assert float((t - GOLDEN[case + "/t"]).abs().max()) <= (1e-9 if dtype == torch.float64 else 1e-4)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (a, _), (_, b, _) in zip(seen, states, strict=True))


@pytest.mark.parametrize("name,calls", [(n, {"pndm": 11, "heun": 19}.get(n, 10)) for n in NAMES])
def test_model_calls_are_n_and_n_plus_1_for_pndm_and_2n_minus_1_for_heun(name, calls):
    seen = []
    samplers.sample(name, oracle(SD, 0.5, "noise", seen), draw(0, 2, 3), SD, 10)
    assert len(seen) == calls


# --- an oracle that knows the picture --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_ends_on_its_picture_for_1_to_30_steps_and_the_whole_chain(name):
    # 30 steps cover odd and even ends of the multistep samplers: the step to sigma = 0 must be first order
    x0, x = draw(1, 2, 3), draw(2, 2, 3)
    for steps in (*range(1, 31), 999, 1000):
        end = samplers.sample(name, oracle(SD, x0, "noise"), x, SD, steps, generator=torch.Generator(), **exact(name))
        assert float((end - x0).abs().max()) < 1e-5, steps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_ends_on_its_picture_with_every_spacing(name, spacing):
    x0, x = draw(3, 2, 3), draw(4, 2, 3)
    for steps in (2, 7, 25):
        end = samplers.sample(name, oracle(SD, x0, "noise"), x, SD, steps, spacing=spacing,
                              generator=torch.Generator(), **exact(name))
        assert float((end - x0).abs().max()) < 1e-5


def test_stable_diffusions_final_alpha_leaves_exactly_the_noise_of_the_first_step():
    x0, x = draw(5, 2, 3), draw(6, 2, 3)
    seen = []
    end = samplers.sample("ddim", oracle(SD, x0, "noise", seen), x, SD, 10)
    noise = (seen[0][1] - SD.alpha_bar[901].sqrt() * x0) / (1 - SD.alpha_bar[901]).sqrt()
    first = SD.alpha_bar[0]
    torch.testing.assert_close(end, first.sqrt() * x0 + (1 - first).sqrt() * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spacing,offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_the_ddim_path_has_one_noise_at_every_visited_step(spacing, offset):
    x0, x = draw(7, 2, 3), draw(8, 2, 3)
    for steps in (3, 7, 10, 50):
        seen = []
        samplers.sample("ddim", oracle(SD, x0, "noise", seen), x, SD, steps, spacing=spacing, offset=offset)
        alpha_bar = SD.alpha_bar[torch.stack([t[0] for t, _ in seen])][:, None, None]
        path = torch.stack([x for _, x in seen])
        noise = (path - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        assert float((noise - noise[0]).abs().max()) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_noise_x0_and_v_oracles_give_the_same_path(name):
    x0, x, noises = draw(9, 2, 3), draw(10, 2, 3), draw(11, 10, 2, 3)
    paths, options = [], {}
    if name == "dpm++2m_karras":  # everybody rounds its t, so the model answers for a level a little off: leave t alone
        options = dict(sigmas=[level.sigma for level in samplers.grid_for(name, SD, 10)[0].levels])
    for kind in KINDS:
        states = []
        denoise = oracle(SD, x0, kind, log="sigmas" in options)
        samplers.sample(name, denoise, x, SD, 10, kind=kind, noises=noises, on_step=record(states),
                        **options, **exact(name, kind))
        paths.append(torch.stack([x for _, _, x in states]))
    assert float((paths[1] - paths[0]).abs().max()) < 1e-5
    assert float((paths[2] - paths[0]).abs().max()) < 1e-5


def test_averaging_v_itself_in_pndm_is_another_method():
    # why average="noise" exists: v turns along the path even when x0 and noise stay, so its average is off
    x0, x = draw(12, 2, 3), draw(13, 2, 3)
    v = samplers.sample("pndm", oracle(SD, x0, "v"), x, SD, 10, kind="v", final_alpha="one")
    assert float((v - x0).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_of_4_survives_unclipped_and_clip_cuts_it_when_asked(name):
    x0 = torch.full((1, 2), 4.0, dtype=torch.float64)
    for bound, expected in ((None, 4.0), (1.0, 1.0)):
        end = samplers.sample(name, oracle(SD, x0, "x0"), draw(14, 1, 2), SD, 10, kind="x0", clip=bound,
                              generator=torch.Generator(), **exact(name))
        assert float((end - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_x0_and_the_noise_derived_from_it_give_back_x_t(kind):
    x, prediction = draw(15, 5, 3), 3 * draw(16, 5, 3)
    x0, noise = samplers.Denoiser(lambda x, level: prediction, kind, clip=1.0)(x, Level(7, signal=0.6, noise=0.8))
    assert float(x0.abs().max()) == 1.0
    torch.testing.assert_close(0.6 * x0 + 0.8 * noise, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_function_as_clip_changes_x0_as_the_bound_does_and_the_noise_follows_from_it(name, kind):
    x, noises = draw(36, 2, 3), draw(37, 11, 2, 3)
    def run(clip):
        states = []
        samplers.sample(name, lambda x, t: 1.5 * torch.tanh(x), x, SD, 10, kind=kind, clip=clip, noises=noises,
                        on_step=record(states))
        return torch.stack([x for _, _, x in states])
    bound = run(0.7)
    assert torch.equal(run(lambda x0: x0.clamp(-0.7, 0.7)), bound)
    assert not torch.equal(run(None), bound) and torch.equal(run(lambda x0: x0), run(100.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_function_as_clip_can_put_the_known_part_of_a_picture_in(name):
    known, keep = draw(38, 2, 3), torch.tensor([[1.0, 0.0, 1.0]])  # inpainting
    end = samplers.sample(name, oracle(SD, 0.3, "x0"), draw(39, 2, 3), SD, 10, kind="x0", noises=draw(40, 11, 2, 3),
                          clip=lambda x0: keep * known + (1 - keep) * x0, **exact(name, "v"))
    torch.testing.assert_close(end, keep * known + (1 - keep) * 0.3, rtol=0, atol=1e-5)


# --- samplers that are one method ------------------------------------------------------------------------------------

def run_on(name, grid, dtype=torch.float64, **own):
    """The states of a sampler on a given grid, for one network, first state and list of noises."""
    network = samplers.Denoiser(lambda x, level: torch.tanh(x) * level.noise, clip=2.0)
    draws = samplers.step_noise(noises=draw(44, 10, 2, 3))
    return torch.stack([x for _, x in samplers.by_name[name](network, draw(43, 2, 3), grid, draws, **own)])


def any_grids():
    """Grids of ten steps of every family."""
    for name in NAMES:
        for options in ({}, dict(spacing="trailing"), dict(sigmas=torch.linspace(9, 0.5, 11))):
            yield samplers.grid_for(name, SD, 10, **options)[0]


def test_euler_is_ddim_and_ancestral_euler_is_ddim_with_eta_1_on_every_grid():
    for grid in any_grids():
        assert torch.equal(run_on("euler", grid), run_on("ddim", grid))
        assert torch.equal(run_on("euler_a", grid), run_on("ddim", grid, eta=1.0))
        assert not torch.equal(run_on("ddim", grid), run_on("ddim", grid, eta=0.5))


def test_ddpm_is_ddim_with_eta_1():
    for grid in any_grids():
        torch.testing.assert_close(run_on("ddpm", grid), run_on("ddim", grid, eta=1.0), rtol=0, atol=1e-10)


def test_karras_only_names_a_grid():
    for grid in any_grids():
        assert torch.equal(run_on("dpm++2m_karras", grid), run_on("dpm++2m", grid))
    assert samplers.grid_for("dpm++2m_karras", SD, 7) == samplers.grid_for("dpm++2m", SD, 7, karras=True)


@pytest.mark.parametrize("name", ["dpm++2m", "dpm++2m_karras", "unipc"])
def test_the_first_and_the_last_step_are_first_order(name):
    # a first order step to sigma = 0 is x0 itself, whatever x0 was before: nothing is extrapolated
    for steps in range(1, 31):
        said = []

        def denoise(x, t):
            said.append(draw(len(said), 1, 2))
            return said[-1]

        states = []
        samplers.sample(name, denoise, draw(99, 1, 2), SD, steps, kind="x0", on_step=record(states))
        torch.testing.assert_close(states[-1][2], said[-1], rtol=0, atol=1e-12)
        assert all(torch.isfinite(x).all() for _, _, x in states)


# --- zero terminal SNR -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_works_with_v_and_x0_and_refuses_noise(name):
    schedule, x0, x = ZERO_SNR, draw(25, 2, 3), draw(26, 2, 3)
    for dtype in (torch.float64, torch.float32):
        for kind in ("v", "x0"):
            seen, states = [], []

            def denoise(x, t):
                seen.append(int(t[0]))
                alpha_bar = schedule.alpha_bar[t[0]]
                noise = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
                return (x0 if kind == "x0" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0).to(x.dtype)

            end = samplers.sample(name, denoise, x.to(dtype), schedule, 10, kind=kind, on_step=record(states),
                                  generator=torch.Generator(), spacing="trailing", **ENDS_EXACT.get(name, {}))
            assert seen[0] == 999 or name == "dpm++2m_karras"
            assert all(torch.isfinite(x).all() for _, _, x in states)
            if not (name == "pndm" and kind == "v"):  # see the test on averaging v
                assert float((end - x0).abs().max()) < (5e-3 if dtype == torch.float32 else 1e-3)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        samplers.sample(name, oracle(schedule, x0, "x0"), x, schedule, 10)


# --- replays, batches, inputs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_one_generator_an_image_makes_an_image_independent_of_its_batch(name):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]

    batch_generators = generators()
    start = process.randn_like(torch.empty(4, 3), batch_generators)
    x0 = draw(27, 1, 3, dtype=torch.float32)
    means = torch.cat([x0.double(), -x0.double()])
    denoise = mixture(SD, means, torch.tensor([0.3, 0.2]).double(), torch.tensor([0.5, 0.5]).double(), "noise")
    batch = samplers.sample(name, denoise, start, SD, 10, generator=batch_generators)
    for i, generator in enumerate(generators()):
        alone = process.randn_like(torch.empty(1, 3), generator)
        assert torch.equal(alone, start[i : i + 1])
        image = samplers.sample(name, denoise, alone, SD, 10, generator=generator)
        assert float((image - batch[i : i + 1]).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["ddpm", "euler_a", "ddim"])
def test_a_run_is_replayed_by_its_noises_and_by_its_seed(name):
    options = dict(eta=1.0) if name == "ddim" else {}
    x, shape = draw(28, 2, 3), (2, 3)
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(10)]
    def run(**how):
        return samplers.sample(name, oracle(SD, 0.3, "noise"), x, SD, 10, **options, **how)
    seeded = run(generator=torch.Generator().manual_seed(1))
    assert torch.equal(seeded, run(noises=noises)) and torch.equal(seeded, run(noises=torch.stack(noises)))


def test_step_noises_follow_from_seed_step_and_picture_whatever_the_batch():
    noises = rng.StepNoises(3, torch.tensor([4, 9, 2]), (2, 5))
    assert noises[0].shape == (3, 2, 5) and noises[0].dtype == torch.float32
    assert torch.equal(noises[7], noises[7]) and not torch.equal(noises[7], noises[8])
    assert torch.equal(rng.StepNoises(3, torch.tensor([9]), (2, 5))[7], noises[7][1:2])
    assert not torch.equal(rng.StepNoises(4, torch.tensor([9]), (2, 5))[7], noises[7][1:2])
    many = rng.StepNoises(0, torch.arange(2000), (10,))[0]
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_samplers_leave_their_inputs_bit_identical(name):
    x, image, noises = draw(29, 2, 1, 2, 2), draw(30, 2, 1, 2, 2), draw(31, 10, 2, 1, 2, 2)
    answer = draw(32, 2, 1, 2, 2)  # the network's output is its own too
    sigmas, copies = torch.linspace(10, 0, 11), [v.clone() for v in (x, image, noises, answer, SD.alpha_bar)]
    states = []

    def denoise(x, t):
        return answer

    for options in ({}, dict(image=image, strength=0.5), dict(clip=1.0), dict(sigmas=sigmas)):
        samplers.sample(name, denoise, x, SD, 10, noises=noises, on_step=lambda i, t, x: states.append((x, x.clone())),
                        **options)
    for now, then in zip((x, image, noises, answer, SD.alpha_bar), copies):
        assert torch.equal(now, then)
    assert torch.equal(sigmas, torch.linspace(10, 0, 11))
    assert all(torch.equal(kept, then) for kept, then in states)  # a state once shown is not changed later


@pytest.mark.parametrize("name", NAMES)
def test_t_is_a_whole_number_where_all_steps_are_and_never_half_precision(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        seen = []
        end = samplers.sample(name, lambda x, t: seen.append(t) or 0 * x, draw(33, 3, 2).to(dtype), SD, 25)
        assert end.dtype == dtype
        whole = name not in SIGMA_SPACE
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(t.shape == (3,) and t.dtype == (torch.int64 if whole else wide) for t in seen)


def test_by_name_holds_the_nine_samplers_with_one_way_to_call_them():
    assert NAMES == "ddpm ddim pndm euler euler_a heun dpm++2m dpm++2m_karras unipc".split()
    for name, sampler in samplers.by_name.items():
        parameters = list(inspect.signature(sampler).parameters.values())
        assert [p.name for p in parameters[:4]] == ["denoise", "x", "grid", "draw"]
        assert all(p.kind == p.KEYWORD_ONLY and p.name in samplers.options_of(name) for p in parameters[4:])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_raise_before_the_model_is_called(name):
    def never(x, t):
        raise AssertionError("the model was called")

    for wrong in (dict(kind="eps"), dict(spacing="trialing"), dict(steps=0), dict(steps=1001)):
        with pytest.raises(ValueError):
            samplers.sample(name, never, draw(0, 1, 1), SD, wrong.pop("steps", 10), **wrong)


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_goes_down_the_table_for_every_n(name):
    schedule = Schedule.linear(20)
    for n in range(1, 21):
        seen = []

        def denoise(x, t):
            seen.append(float(t[0]))
            return x

        samplers.sample(name, denoise, torch.zeros(1, 1), schedule, n)
        t = list(dict.fromkeys(seen))  # heun and pndm ask twice at some
        assert all(a > b for a, b in zip(t, t[1:])) and t[-1] >= 0 and t[0] <= 19
        assert len(t) == n or name == "dpm++2m_karras"  # rounds its t
