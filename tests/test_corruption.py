"""Every kind of file that the package reads, damaged at random by fuzz_files.py: bits flipped, cut,
emptied, zeroed, beheaded, lengthened, doubled in part, replaced.
VAE_ROBUST_DRAWS says how often: a quarter of it for each kind (make test-all: 250)."""
import os

import pytest

from vae_robust import settings, training

from fuzz_files import fuzz

DRAWS = int(os.environ.get('VAE_ROBUST_DRAWS', 24))//4
KINDS = 23


def test_a_damaged_file_is_refused_in_one_sentence_or_changes_nothing():
    found = fuzz(DRAWS)
    assert len(found) == KINDS and {sum(said.values()) for said in found.values()} == {DRAWS}
    assert not {kind: said for kind, said in found.items() if any(word.isupper() for word in said)}
    assert not [kind for kind, said in found.items() if said == {'same': DRAWS}
                and kind not in ('cache', 'note of a cache', 'clock')]  # they are made again


@pytest.mark.parametrize('kind, module, name, blind', [
    ('weights', training, 'checked', lambda path: path),
    ('table', settings, 'proof', lambda *_: ''),
    ('checkpoint', training, 'sound', lambda path: True)])
def test_a_package_that_believes_its_files_is_found_out(monkeypatch, kind, module, name, blind):
    monkeypatch.setattr(module, name, blind)
    assert any(word.isupper() for word in fuzz(40, only=[kind])[kind])
