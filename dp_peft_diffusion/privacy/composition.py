"""What was released before from the same records, read from certificates and priced again from their mechanisms."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dp_peft_diffusion.errors import PrivacyError, UserError
from dp_peft_diffusion.privacy.certificate_form import EARLIER_ATTEMPT, FILE_NAME, check_form
from dp_peft_diffusion.privacy.mechanism import DPMechanism
from dp_peft_diffusion.privacy.promise import Promise, Release, check_same_unit
from dp_peft_diffusion.privacy.untrusted import read_json, sha256_of


def read_prior(
    paths: Iterable[str | Path], mechanism: DPMechanism, group_column: str | None = None
) -> tuple[Release, ...]:
    """The releases that certificates speak of: their own runs, tuning included, and those they were composed with.

    What several certificates list is counted once, as often as the one that lists it most.

    Args:
        paths: privacy.json files, or folders that hold one.
        mechanism: of this run, with whose relation and unit they must agree.
        group_column: whose images the unit of this run is; None, in a plan, which has no columns, compares none.

    Raises:
        UserError: a file is missing or no certificate, its key was given, or its relation, unit or group column
            differs.
    """
    releases: Counter[Release] = Counter()
    for given in paths:
        path = Path(given) / FILE_NAME if Path(given).is_dir() else Path(given)
        try:
            document, sha256 = read_json(path), sha256_of(path)
            check_form(document)
        except PrivacyError as error:
            raise UserError(f"--prior_event {given}: {error} Give the privacy.json of an earlier release.") from error
        if document["key_source"] != "os":
            raise UserError(
                f"--prior_event {given}: the key of its noise was given by somebody, so it promises nothing that could "
                "be added up. Its records have no protection left to spend."
            )
        found = Counter(_releases(document, sha256))
        for release in found:
            check_same_unit(release.mechanism, mechanism, str(given))
        earlier = document["public_inputs"].get("group_column")
        if mechanism.max_examples_per_group > 1 and group_column is not None and group_column != earlier:
            raise UserError(
                f"--prior_event {given}: its groups are those of column {earlier!r}, those of this run of column "
                f"{group_column!r}: their prices do not add up. Give --group_column as before."
            )
        releases |= found
    return tuple(releases.elements())


def _releases(document: dict[str, Any], sha256: str) -> list[Release]:
    promise = promise_of(document)
    own = Release(mechanism=promise.mechanism, runs=promise.tuning_runs or 1, source=f"certificate {sha256}")
    listed = [
        dataclasses.replace(release, source=f"an earlier attempt of certificate {sha256}")
        if release.source == EARLIER_ATTEMPT
        else release
        for release in promise.prior
    ]
    return [own, *listed]


def promise_of(document: dict[str, Any]) -> Promise:
    """What a certificate in the strict form promises.

    Raises:
        UserError: its numbers do not fit together.
    """
    num_examples, relation = document["public_inputs"].get("num_examples"), document["neighboring_relation"]
    tuning = document["tuning"]
    priced = None if tuning == "undeclared" else tuning["priced"]
    return Promise(
        mechanism=_mechanism_of(document["mechanism"], num_examples, relation),
        epsilon=document["guarantee"]["epsilon"],
        delta=document["guarantee"]["delta"],
        tuning_runs=tuning["runs"] if priced == "composition" else None,
        unpaid_runs=tuning["runs"] if priced == "no" else None,
        prior=tuple(
            Release(
                mechanism=_mechanism_of(release["mechanism"], release["num_examples"], relation),
                runs=release["runs"],
                source=release["source"],
            )
            for release in document["other_releases"]
        ),
    )


def _mechanism_of(recorded: dict[str, Any], num_examples: int | None, relation: str) -> DPMechanism:
    return DPMechanism(
        sampling_prob=recorded["sampling_prob"],
        steps=recorded["count"],
        noise_multiplier=recorded["noise_multiplier"],
        max_grad_norm=recorded["max_grad_norm"],
        expected_batch_size=recorded["expected_batch_size"],
        num_examples=num_examples,
        neighboring_relation=relation,
        truncated_batch_size=recorded["truncated_batch_size"],
        max_examples_per_group=recorded["max_examples_per_group"],
    )
