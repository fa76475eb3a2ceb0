"""A third opinion on a price: the PRV accountant of Opacus (arXiv 2106.02848), in a process of its own.

Opacus imports torch, which this room does not. Its GDP accountant is no opinion: it is below the truth.
"""

import json
import subprocess
import sys

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.promise import Promise
from dp_peft_diffusion.privacy.ranges import round_up

EPSILON_ERROR = 0.01  # what PRV adds for its discretization
SECONDS = 300
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
from opacus.accountants import PRVAccountant
asked = json.load(sys.stdin)
accountant = PRVAccountant()
accountant.history = [tuple(part) for part in asked["history"]]
print(json.dumps(float(accountant.get_epsilon(delta=asked["delta"], eps_error=asked["epsilon_error"]))))
"""


def cross_check(promise: Promise) -> str:
    """Price a promise again by PRV, and compare; a sentence that says both. It takes seconds to minutes.

    Raises:
        UserError: PRV has no price for it, Opacus is not installed, or it gives up.
        PrivacyError: PRV finds it more expensive, or far cheaper, than PLD.
    """
    priced, by_prv = promise.priced, prv_epsilon(promise)
    if not by_prv - 2 * EPSILON_ERROR - 0.02 * priced <= priced <= by_prv * 1.001:
        raise PrivacyError(
            f"By the PRV accountant of Opacus it costs epsilon {by_prv:.4g}, by PLD {priced:.4g}: they disagree."
        )
    return f"By the PRV accountant of Opacus it costs epsilon {round_up(by_prv):g}, an error of up to 0.01 included."


def prv_epsilon(promise: Promise) -> float:
    """The price of everything that a promise covers, by PRV.

    Raises:
        UserError: PRV has no price for it, Opacus is not installed, or it gives up.
    """
    covered = [
        (promise.mechanism, promise.tuning_runs or 1),
        *((prior.mechanism, prior.runs) for prior in promise.prior),
    ]
    for mechanism, _ in covered:
        if (
            mechanism.neighboring_relation == "replace_one"
            or mechanism.max_examples_per_group > 1
            or mechanism.truncated_batch_size is not None
        ):
            raise UserError(
                "--cross_check: the PRV accountant of Opacus has no price for groups, truncated batches or replace_one."
            )
    history = [
        (mechanism.noise_multiplier, mechanism.sampling_prob, mechanism.steps * runs) for mechanism, runs in covered
    ]
    asked = {"history": history, "delta": promise.delta, "epsilon_error": EPSILON_ERROR}
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", SCRIPT],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"--cross_check: the PRV accountant of Opacus gave no price in {SECONDS} seconds.") from error
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
        raise UserError(f"--cross_check: the PRV accountant of Opacus failed: {reason}. Try: pip install opacus")
    return float(json.loads(answer.stdout.splitlines()[-1]))
