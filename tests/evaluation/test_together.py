"""What a run and the classifiers beside it cost together: none of those that are known is left out, nor silently."""

import dataclasses

from mutants.second_release import document

from dp_peft_diffusion.evaluation.together import NO_LEDGER, price_together
from dp_peft_diffusion.privacy import accounting
from dp_peft_diffusion.privacy.promise import Promise, Release, composed_event
from tests.evaluation.test_private_classifier import PROMISE, make_stripes, private, trained

RUN = Promise(mechanism=dataclasses.replace(PROMISE.mechanism, max_grad_norm=1.0), epsilon=10.0, delta=1e-3)


def test_classifiers_of_the_same_images_and_unit_add_up_and_others_are_told():
    images = private(*make_stripes(40), digest=b"a data set of the test of what adds up")

    def together(promise=PROMISE, **told):
        return price_together(document(RUN), promise, images.source_digest, **told)

    first = together()
    assert (first.earlier_classifiers, first.not_counted) == (0, ())
    trained(images, recorded=True)
    second = together()
    release = Release(mechanism=PROMISE.mechanism, source="a classifier")
    price = accounting.epsilon(composed_event(RUN.mechanism, None, [release, release]), RUN.delta, "zero_out")
    assert second.earlier_classifiers == 1 and price <= second.epsilon <= price * 1.001
    assert first.epsilon < second.epsilon
    of_patients = together(group_column="patient")
    assert (of_patients.epsilon, of_patients.earlier_classifiers) == (first.epsilon, 0)
    assert "1 earlier classifier(s) of another" in of_patients.not_counted[0]
    unseen = together(recorded=False)
    assert (unseen.epsilon, unseen.not_counted) == (first.epsilon, (NO_LEDGER,))


def test_runs_that_the_certificate_is_not_for_are_told_again():
    unpaid = document(RUN) | {"tuning": {"runs": 7, "priced": "no"}}
    (sentence,) = price_together(unpaid, PROMISE, b"other images").not_counted
    assert "NOT counted: 7 earlier run(s)" in sentence
