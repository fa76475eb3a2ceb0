import pytest
import torch
from diffusers import DDPMScheduler

from dp_peft_diffusion.diffusion.objectives import denoising_losses, denoising_target
from dp_peft_diffusion.errors import UserError


def draws(b=3, k=4):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(b, 1, 4, 4, generator=generator)
    return clean, torch.randn(b, k, 1, 4, 4, generator=generator), torch.randint(1000, (b, k), generator=generator)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    clean, noise, timesteps = draws()
    rows = clean.repeat_interleave(4, 0)
    target = denoising_target(scheduler, rows, noise.flatten(0, 1), timesteps.flatten())
    losses = denoising_losses(lambda noisy, t: target, scheduler, clean, noise, timesteps)
    assert losses.shape == (3,)
    assert torch.equal(losses, torch.zeros(3))


def test_v_target_follows_the_formula_of_salimans_and_ho():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    clean, noise, timesteps = draws(k=1)
    abar = scheduler.alphas_cumprod[timesteps[:, 0]].view(-1, 1, 1, 1)
    expected = abar.sqrt() * noise[:, 0] - (1 - abar).sqrt() * clean
    assert torch.allclose(denoising_target(scheduler, clean, noise[:, 0], timesteps[:, 0]), expected, atol=1e-6)


def test_the_loss_of_an_example_is_the_mean_over_its_own_draws():
    scheduler = DDPMScheduler()
    clean, noise, timesteps = draws()

    def denoise(noisy, t):
        return noisy * t.view(-1, 1, 1, 1) / 1000

    together = denoising_losses(denoise, scheduler, clean, noise, timesteps)
    for i in range(3):
        alone = [
            denoising_losses(
                denoise, scheduler, clean[i : i + 1], noise[i : i + 1, j : j + 1], timesteps[i : i + 1, j : j + 1]
            )
            for j in range(4)
        ]
        assert torch.allclose(together[i], torch.cat(alone).mean(), rtol=1e-6)


def test_a_base_that_predicts_something_else_is_refused():
    with pytest.raises(UserError, match="sample"):
        denoising_losses(lambda x, t: x, DDPMScheduler(prediction_type="sample"), *draws())
