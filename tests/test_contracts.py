"""The shapes that functions promise. While tests run every call of an annotated function is checked
(conftest.py); here it is seen that a broken promise is found."""
import typing

import pytest, torch
from jaxtyping import TypeCheckError, jaxtyped
from torch import nn

from vae_robust.attacks import attack
from vae_robust.objectives import euclidean, norm
from vae_robust.robustness import Pairs
from vae_robust.settings import preset
from vae_robust.vae import elbo, kl


def test_what_a_function_is_given_is_checked(model):
    with pytest.raises(TypeCheckError, match='decode'):
        model.decode(torch.zeros(9))  # a code without an axis for the images
    with pytest.raises(TypeCheckError, match='norm'):
        norm(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(TypeCheckError, match='kl'):
        kl(torch.zeros(2, 5))


def test_one_letter_is_one_number_within_a_call(digits):
    euclidean(digits[:3], digits[3:6])
    with pytest.raises(TypeCheckError, match='euclidean'):
        euclidean(digits[:3], digits[:1])  # torch would broadcast


def test_what_a_function_gives_is_checked(model):
    model.decoder = nn.Linear(9, 7)
    with pytest.raises(TypeCheckError, match='decode'):
        model.decode(torch.zeros(2, 9))


def keeps_its_word(found):
    "Whether all fields of a NamedTuple are what their annotations say, with one number a letter."
    with jaxtyped('context'):
        return all(isinstance(getattr(found, name), kind)
                   for name, kind in typing.get_type_hints(type(found)).items())


def test_the_fields_of_results_are_what_they_say(model, digits):
    terms, p = elbo(model, digits), preset('attack.strong', steps=2)
    assert keeps_its_word(terms)
    assert not keeps_its_word(terms._replace(kl_c=terms.kl_z))
    assert not keeps_its_word(terms._replace(kl_c=terms.kl_c[:3]))
    found = attack(model, digits[:4], digits[4:8], p, progress=False, trace=True)
    index = torch.arange(8).view(4, 2)
    assert keeps_its_word(found) and keeps_its_word(Pairs(index, index, digits[:4], found))
    assert not keeps_its_word(found._replace(nans=found.nans[:, None]))
