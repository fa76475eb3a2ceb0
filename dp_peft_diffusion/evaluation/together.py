"""What a run and the classifiers trained directly beside it cost together, as far as anybody here can know."""

from dataclasses import dataclass
from typing import Any

from dp_peft_diffusion.evaluation.private_classifier import LEDGER_PREFIX, joint_epsilon
from dp_peft_diffusion.privacy import spending
from dp_peft_diffusion.privacy.composition import promise_of
from dp_peft_diffusion.privacy.promise import Promise, Release, not_counted

NO_LEDGER = (
    "NOT counted: earlier classifiers trained on the same images, if there were any: this run leaves the data set's "
    "ledger alone (record_spending: false)."
)


@dataclass(frozen=True)
class Together:
    """One price for a run, a new classifier and the earlier ones on the same images.

    Attributes:
        epsilon: at the run's delta, rounded up; None above what can be promised.
        earlier_classifiers: how many earlier ones it is for, those in this user's ledger on this machine.
        not_counted: sentences on what it is known not to be for.
    """

    epsilon: float | None
    earlier_classifiers: int
    not_counted: tuple[str, ...]


def price_together(
    document: dict[str, Any],
    classifier: Promise,
    source_digest: bytes,
    *,
    group_column: str | None = None,
    recorded: bool = True,
) -> Together:
    """The price of a run and of all classifiers beside it, the next one included. Before that one is in the ledger.

    Args:
        document: privacy.json of the run, in its strict form.
        classifier: the next one, from `promise_beside`.
        source_digest: of the images that it will be trained on.
        group_column: whose images the unit is, if not one image.
        recorded: whether the run is in the ledger; otherwise the ledger is left alone.

    Raises:
        UserError: as of `joint_epsilon`.
        RunError: the ledger cannot be read.
    """
    earlier, others = _earlier(classifier, source_digest, group_column) if recorded else ([], 0)
    sentences = [not_counted(promise_of(document)), "" if recorded else NO_LEDGER]
    if others:
        sentences.append(
            f"NOT counted: {others} earlier classifier(s) of another relation or unit, whose prices do not "
            "add up with this one."
        )
    epsilon = joint_epsilon(document, classifier, earlier)
    return Together(epsilon, len(earlier), tuple(filter(None, sentences)))


def _earlier(classifier: Promise, source_digest: bytes, group_column: str | None) -> tuple[list[Release], int]:
    """The classifiers in the ledger of these images: those of the same relation and unit, and the number of others."""
    entries = spending.spendings(spending.data_set_id(source_digest))
    mechanisms = [(e.mechanism, e.group_column) for e in entries if e.name.startswith(LEDGER_PREFIX)]
    own = classifier.mechanism
    same = [
        Release(mechanism=mechanism, source="a classifier trained directly, in the ledger")
        for mechanism, column in mechanisms
        if (mechanism.neighboring_relation, mechanism.max_examples_per_group, column)
        == (own.neighboring_relation, own.max_examples_per_group, group_column)
    ]
    return same, len(mechanisms) - len(same)
