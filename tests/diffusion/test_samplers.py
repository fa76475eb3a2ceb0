"""Sampling against diffusers' own pipelines and against closed forms."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, EDMEulerScheduler, LDMPipeline
from diffusers import StableDiffusionPipeline as Sd
from diffusers import StableDiffusionXLPipeline as Sdxl
from tiny_bases import BASES

from dp_peft_diffusion.diffusion import samplers
from dp_peft_diffusion.diffusion.base_model import load_base
from dp_peft_diffusion.diffusion.grids import image_grid
from dp_peft_diffusion.diffusion.samplers import EDM_SCHEDULERS, SCHEDULERS, denoise, make_sampler, sample_images
from dp_peft_diffusion.errors import UserError

STEPS = 4
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name -> (base, its folder), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = BASES[name](tmp_path_factory.mktemp("bases") / name)
            made[name] = load_base(str(folder)), folder
        return made[name]

    return get


def seeded(n):
    return [torch.Generator().manual_seed(samplers.SEEDS_APART + i) for i in range(n)]  # of seed 1


def as_bytes(images):
    """What a pipeline gives, in [0, 1], as ours are."""
    return np.rint(np.asarray(images) * 255).transpose(0, 3, 1, 2).astype(int)


def largest_gap(ours, theirs):
    assert np.ptp(theirs) > 20, "a picture with nothing in it shows nothing"
    return np.abs(ours.numpy().astype(int) - theirs).max()


@pytest.mark.parametrize("name", ["utility", "fidelity", "ddpm"])
def test_pixels_are_those_of_the_pipelines_of_diffusers(bases, name):
    base, _ = bases("pixel")
    ours = sample_images(base, num_images=2, seed=1, scheduler=name, num_inference_steps=STEPS)
    if name == "ddpm":
        theirs = DDPMPipeline(base.unet, base.scheduler)
        settings = {}
    else:
        theirs = DDIMPipeline(base.unet, DDIMScheduler.from_config(base.scheduler.config))
        settings = {"eta": float(name == "fidelity")}
    theirs.set_progress_bar_config(disable=True)
    settings |= {"num_inference_steps": STEPS, "output_type": "np", "generator": seeded(2)}
    assert largest_gap(ours, as_bytes(theirs(2, **settings).images)) <= 1


def test_latents_of_a_vq_base_are_decoded_as_diffusers_does(bases):
    base, folder = bases("latent_vq")
    ours = sample_images(base, num_images=2, seed=1, scheduler="utility", num_inference_steps=STEPS)
    pipeline = LDMPipeline(base.vae, base.unet, DDIMScheduler.from_config(base.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, seeded(2), num_inference_steps=STEPS, output_type="np").images
    assert largest_gap(ours, as_bytes(theirs)) <= 1


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
@pytest.mark.parametrize(
    ("name", "eta"), [("stable_diffusion_1", 1.0), ("stable_diffusion_2", 0.0), ("stable_diffusion_xl", 0.0)]
)
def test_prompts_with_guidance_give_the_images_of_stable_diffusion(bases, name, eta):
    base, folder = bases(name)
    kind, extra = (Sdxl, {}) if name.endswith("xl") else (Sd, {"safety_checker": None})
    pipeline = kind.from_pretrained(folder, **extra)
    pipeline.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    theirs = pipeline(PROMPTS, eta=eta, generator=seeded(2), output_type="np", **settings).images
    scheduler = "fidelity" if eta else "utility"
    ours = sample_images(base, base.text.encode(PROMPTS), num_images=2, seed=1, scheduler=scheduler, **settings)
    assert largest_gap(ours, as_bytes(theirs)) <= 1


def with_net(base, forward):
    """The base with a function (x, time, class_labels) -> prediction in place of its network."""

    class Net(torch.nn.Module):
        config, device, dtype = base.unet.config, torch.device("cpu"), torch.float32

        def forward(self, x, t, class_labels=None):
            return type("Output", (), {"sample": forward(x, t, class_labels)})()

    return dataclasses.replace(base, unet=Net())


def knows_a_gaussian(base, mean, spread):
    """The EDM base whose data are N(mean, spread^2): its denoiser has a closed form (Karras et al. 2022, eq. 7, 8)."""
    known = base.scheduler.config.sigma_data

    def forward(scaled, c_noise, _):
        sigma = torch.exp(4 * torch.as_tensor(c_noise)).double()
        x = scaled.double() * (sigma**2 + known**2).sqrt()
        denoised = (spread**2 * x + sigma**2 * mean) / (spread**2 + sigma**2)
        c_skip, c_out = known**2 / (sigma**2 + known**2), sigma * known / (sigma**2 + known**2).sqrt()
        return ((denoised - c_skip * x) / c_out).float()

    return with_net(base, forward)


@pytest.mark.parametrize("name", ["utility", "fidelity", "dpmsolver++"])
def test_of_data_that_are_one_point_every_edm_sample_is_that_point(bases, name):
    base = knows_a_gaussian(bases("edm")[0], mean=0.25, spread=0.0)
    images = sample_images(base, num_images=2, seed=0, scheduler=name, num_inference_steps=10)
    assert (images.int() - round(1.25 * 127.5)).abs().max() <= 1


@pytest.mark.parametrize(("name", "correlation"), [("utility", 1.0), ("fidelity", 0.0)])
def test_edm_samples_of_a_gaussian_have_its_spread_and_churn_forgets_the_first_noise(bases, name, correlation):
    spread, n = 0.2, 64
    base = knows_a_gaussian(bases("edm")[0], mean=0.0, spread=spread)
    noise = torch.randn(n, *base.input_shape, generator=torch.Generator().manual_seed(0))
    x = denoise(base, make_sampler(base, name, 100), noise, {}, 1.0, seeded(n))
    # 49,152 pixels: the variance is known to 0.64 %, so 3.2 % is five standard deviations. Euler steps add 6.4 %.
    assert x.var().item() == pytest.approx(spread**2, rel=0.035 if name == "fidelity" else 0.1)
    assert torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1].item() == pytest.approx(
        correlation, abs=0.03
    )


@pytest.mark.parametrize(("steps", "excess"), [(25, 0.16), (50, 0.062), (100, 0.023)])
def test_few_steps_of_churn_leave_as_much_variance_as_the_page_says(bases, steps, excess):
    """docs/how-to/sample-images.md. The network of such data answers 0: its denoiser is c_skip x."""
    base = knows_a_gaussian(bases("edm")[0], mean=0.0, spread=0.5)
    noise = torch.randn(128, *base.input_shape, generator=torch.Generator().manual_seed(0))
    x = denoise(base, make_sampler(base, "fidelity", steps), noise, {}, 1.0, seeded(128))
    # 98,304 numbers: the variance is known to 0.45 %.
    assert x.var().item() / 0.25 - 1 == pytest.approx(excess, abs=0.023)


@pytest.mark.parametrize("name", ["utility", "fidelity", "ddpm", "euler_a", "dpmsolver++", "heun"])
def test_all_noise_of_an_image_comes_from_its_seed_and_number(bases, name):
    base = with_net(bases("pixel_classes")[0], lambda x, t, _: torch.tanh(x))  # a net that rounds alike in any batch
    settings = {"seed": 3, "scheduler": name, "num_inference_steps": STEPS}
    together = sample_images(base, num_images=5, **settings)
    assert torch.equal(together, sample_images(base, num_images=5, batch_size=2, **settings))
    for i in range(5):
        assert torch.equal(together[i : i + 1], sample_images(base, num_images=1, first_image=i, **settings))
    assert len({image.numpy().tobytes() for image in together}) == 5
    assert not torch.equal(together, sample_images(base, num_images=5, **(settings | {"seed": 4})))


def test_churn_is_of_the_images_own_seed_too(bases):
    base = with_net(bases("edm")[0], lambda x, t, _: torch.tanh(x))
    together = sample_images(base, num_images=3, seed=3, scheduler="fidelity", num_inference_steps=STEPS)
    alone = sample_images(base, num_images=1, first_image=2, seed=3, scheduler="fidelity", num_inference_steps=STEPS)
    assert torch.equal(together[2:], alone)
    steady = sample_images(base, num_images=3, seed=3, scheduler="utility", num_inference_steps=STEPS)
    assert not torch.equal(together, steady)


@pytest.mark.parametrize("name", ["utility", "fidelity"])
def test_a_real_network_rounds_by_one_level_at_most_between_batches(bases, name):
    base, _ = bases("pixel_classes")
    told, settings = {"class_labels": torch.arange(5)}, {"seed": 3, "scheduler": name, "num_inference_steps": STEPS}
    together = sample_images(base, told, num_images=5, **settings)
    in_parts = sample_images(base, told, num_images=5, batch_size=2, **settings)
    assert together.shape == (5, 1, 16, 16) and together.dtype == torch.uint8
    assert (together.int() - in_parts.int()).abs().max() <= 1


def test_utility_is_what_ddim_has_always_been(bases):
    base, _ = bases("pixel_classes")
    told, settings = {"class_labels": torch.arange(3)}, {"num_images": 3, "seed": 0, "num_inference_steps": STEPS}
    utility, ddim = (sample_images(base, told, scheduler=name, **settings) for name in ("utility", "ddim"))
    assert torch.equal(utility, ddim)


@pytest.mark.parametrize(("base_name", "name"), [("pixel_classes", "fidelity"), ("edm", "utility")])
def test_no_scheduler_is_the_one_that_the_ablations_chose_where_they_measured(bases, base_name, name):
    base, _ = bases(base_name)
    told, settings = {"class_labels": torch.arange(3)}, {"num_images": 3, "seed": 0, "num_inference_steps": STEPS}
    left, named = (sample_images(base, told, scheduler=each, **settings) for each in (None, name))
    assert torch.equal(left, named)


@pytest.mark.parametrize(("base_name", "names"), [("pixel_classes", SCHEDULERS), ("edm", EDM_SCHEDULERS)])
def test_every_name_that_is_offered_samples(bases, base_name, names):
    base, _ = bases(base_name)
    for name in names:
        told = {"class_labels": torch.tensor([1])}
        images = sample_images(base, told, num_images=1, seed=0, scheduler=name, num_inference_steps=STEPS)
        assert images.float().std() > 1


@pytest.mark.parametrize("name", ["fastest", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "UNet2DModel"])
def test_a_scheduler_for_other_bases_is_refused_with_names_that_fit(bases, name):
    with pytest.raises(UserError, match=f"--scheduler '{name}'.*discrete timesteps.*utility, fidelity, ddim, ddpm"):
        make_sampler(bases("pixel_classes")[0], name, STEPS)


@pytest.mark.parametrize("name", ["ddim", "heun", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_a_scheduler_of_timesteps_is_refused_on_an_edm_base(bases, name):
    with pytest.raises(UserError, match="EDM.*Try utility, fidelity, euler, dpmsolver"):
        make_sampler(bases("edm")[0], name, STEPS)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 1001), ("pndm", 1)])
def test_a_number_of_steps_that_does_not_fit_is_refused(bases, name, steps):
    told = {"class_labels": torch.tensor([1])}
    with pytest.raises(UserError, match="another --num_inference_steps"):
        sample_images(bases("pixel_classes")[0], told, num_images=1, seed=0, scheduler=name, num_inference_steps=steps)


def test_a_scheduler_whose_noise_no_seed_sets_is_refused(bases, monkeypatch):
    def step(self, prediction, t, x):
        output = DDIMScheduler.step(self, prediction, t, x)
        output.prev_sample += torch.randn(x.shape)
        return output

    monkeypatch.setattr(diffusers, "DDIMScheduler", type("DDIMScheduler", (DDIMScheduler,), {"step": step}))
    with pytest.raises(UserError, match="--seed does not set"):
        sample_images(bases("pixel")[0], num_images=1, seed=0, scheduler="ddim", num_inference_steps=STEPS)


def test_guidance_one_is_no_guidance_and_guidance_follows_the_formula(bases, monkeypatch):
    base, seen = bases("pixel_classes")[0], []
    base = with_net(base, lambda x, t, labels: labels.view(-1, 1, 1, 1).float().expand_as(x))  # predicts its label
    stock = DDIMScheduler.step

    def spy(self, prediction, *args, **settings):
        seen.append(prediction.unique().tolist())
        return stock(self, prediction, *args, **settings)

    monkeypatch.setattr(DDIMScheduler, "step", spy)
    told = {"class_labels": torch.tensor([4])}
    for scale in (1.0, 3.0, 0.0):
        settings = {"guidance_scale": scale, "scheduler": "utility", "num_inference_steps": 1}
        sample_images(base, told, num_images=1, seed=0, **settings)
    null = base.layout.null_class
    assert seen == [[4.0], [null + 3.0 * (4 - null)], [null]]


def test_guidance_needs_something_to_guide_away_from(bases):
    settings = {"num_images": 1, "seed": 0, "guidance_scale": 2.0}
    with pytest.raises(UserError, match="null class"):
        sample_images(bases("pixel")[0], **settings)
    base, _ = bases("pixel_classes")
    without = dataclasses.replace(base, layout=dataclasses.replace(base.layout, null_class=None))
    with pytest.raises(UserError, match="null class"):
        sample_images(without, {"class_labels": torch.tensor([1])}, **settings)


def test_in_bfloat16_the_network_rounds_and_the_steps_and_the_autoencoder_do_not(bases):
    base, _ = bases("latent")
    seen = []
    hooks = [
        base.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(("unet", output.dtype))),
        base.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(("input", args[0].dtype))),
        base.vae.decoder.conv_out.register_forward_hook(
            lambda module, args, output: seen.append(("vae", output.dtype))
        ),
    ]
    told, settings = {"class_labels": torch.tensor([1])}, {"num_images": 1, "seed": 0, "num_inference_steps": STEPS}
    rounded = sample_images(base, told, dtype=torch.bfloat16, **settings)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {("unet", torch.bfloat16), ("input", torch.float32), ("vae", torch.float32)}
    sharp = sample_images(base, told, **settings)
    assert 0 < (rounded.float() - sharp.float()).abs().mean() < 8


def test_a_device_that_is_too_small_is_told_with_what_to_type(bases):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(UserError, match="smaller --batch_size"):
        sample_images(with_net(bases("pixel")[0], full), num_images=3, seed=0)


def test_no_images_are_an_empty_array_of_their_shape(bases):
    assert sample_images(bases("latent")[0], {}, num_images=0, seed=0).shape == (0, 3, 16, 16)


def test_a_grid_holds_every_image_once():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2) * 50
    grid = np.array(image_grid(images, columns=3, zoom=1))
    assert grid.shape == (7, 10)
    assert [grid[1, 1], grid[1, 4], grid[1, 7], grid[4, 1], grid[4, 4]] == [0, 50, 100, 150, 200]


def test_the_churn_of_the_schedulers_own_step_stays_in_the_image():
    """diffusers 0.42.1, on data that are one point, 0: a network that knows it ends at 0 without churn, not with."""
    ends = []
    for s_churn in (0.0, 1.0):
        scheduler, draw = EDMEulerScheduler(sigma_data=0.5), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(4)
        x = torch.randn(1, 1, 64, 64, generator=draw) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            sigma = scheduler.sigmas[scheduler.step_index or 0]
            seen = scheduler.scale_model_input(x, t) * (sigma**2 + 0.25) ** 0.5  # the network's own estimate of x
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
            x = scheduler.step(-c_skip * seen / c_out, t, x, s_churn=s_churn, generator=draw).prev_sample
        ends.append(x.abs().max().item())
    assert ends[0] < 1e-4 and ends[1] > 0.01
