"A small sample of fuzz_files.py, which is run by hand at full size."
import pytest

from fuzz_files import fuzz

@pytest.mark.parametrize('seed', [0])
def test_a_damaged_file_is_refused_in_one_sentence_or_changes_nothing(seed):
    found = fuzz(17*3, seed)
    assert sum(found.values()) == 17*3 and len({k for k, _ in found}) == 17
    assert not {k: n for k, n in found.items() if k[1].isupper()}
