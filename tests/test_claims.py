"Every result in the README is a row of figures/claims.csv, and every row what its table says."
import re
from pathlib import Path

import numpy as np, pandas as pd, pytest

from vae_robust.claims import AGGREGATES, ask_table, claims, recomputed, shown
from vae_robust.settings import TableError, read_table

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()
KNOWING = (ROOT/'figures'/'knowing.md').read_text()

# Sentences of the README with the ids of their numbers: {id decimals}, {id.low decimals}; a plus
# before the decimals: with its sign.
SENTENCES = """
{thesis.disentangled 1} % of its reconstructions became another digit,
 against {thesis.entangled 1} %
is {q1.rate 1} points ({q1.rate.low 1} to {q1.rate.high 1})
is {q1.radius 2} times as large ({q1.radius.low 2} to {q1.radius.high 2};
with {q1.any.a 1} % of disentangled and {q1.any.b 1} % of entangled digits
by {q2.terse.rate 1} points ({q2.terse.rate.low 1} to {q2.terse.rate.high 1})
and {q2.talkative.rate 1} ({q2.talkative.rate.low 1} to {q2.talkative.rate.high 1})
succeeds {q1.damage 1} points more often ({q1.damage.low 1} to {q1.damage.high 1})
sign, {story.thesis 1} points ({story.thesis.low 1} to {story.thesis.high 1})
changes {flips.a.code 1} % of disentangled digits and its means alone {flips.a.means 1} %;
 of entangled digits {flips.b.code 1} and {flips.b.means 1} %.
UDR {udr.a 2} against {udr.b 2}
raise the rates of disentangled models
 by {latent.rise.disentangled 0} to {damage.rise.disentangled 0}
 points and those of entangled ones by {damage.rise.entangled 0} to {latent.rise.entangled 0}
at {speed.training 1} times the speed of a DataLoader
takes {speed.attack 1} of the time of the fastest of four other packages
""".strip().replace('\n ', ' ').split('\n')

ROWS = {'latent': 'latent', 'output': 'output', 'maximum damage': 'damage', 'judge': 'judge'}
PLACE = re.compile(r'\{([\w.]+?)(?:\.(low|high))? (\+?)(-?\d)\}')

NOT_RESULTS = [  # what the setting is, and not what was found
    '(0 to 1)', 'at most 0.1', 'In 2018', '95 %', 'Python 3.11',
    '6.5 GB',
    'CC BY-SA 3.0', '2018']


def table_rows():
    "The rows of figures/knowing.md, which the README links to, with the ids of their numbers."
    for said, k in ROWS.items():
        blind, knows = (f'{{{k}.{how}.disentangled 1}} | {{{k}.{how}.entangled 1}} |'
                        for how in ('blind', 'knows'))
        yield f'| {said} | blind | {blind}'
        yield f'| {said} | knows the code | {knows} ' + gap(f'{k}.knows')
    yield '| any attack | union | {any.disentangled 1} | {any.entangled 1} | ' + gap('any')


def gap(k): return f'{{{k}.gap +1}} ({{{k}.gap.low 1}} to {{{k}.gap.high 1}}) |'


def filled(sentence, table):
    "A sentence with its numbers as `table`, claims by id, has them."
    def text(m):
        value = table.loc[m[1], m[2] or 'value']
        return '+'*bool(m[3] and value > 0) + shown(value, int(m[4]))
    return PLACE.sub(text, sentence)


WORDS = 'none one two three four five six seven eight nine ten'.split()


def in_words():
    "Parts of the README whose numbers are words, with those of figures/confirm_tests.csv."
    tests = read_table(ROOT/'figures'/'confirm_tests.csv')
    alike = WORDS[(tests.word == tests.word[0]).sum()]
    return [f'of {WORDS[tests.n.min()]} training seeds of each kind',
            f'all {alike} of its tests say *{tests.word[0]}*']


@pytest.mark.parametrize('part', in_words())
def test_numbers_in_words_are_those_of_the_table(part):
    assert part in README


def missing(readme, table, sentences=SENTENCES):
    "The `sentences` that are not in the README with the numbers of the claims."
    return [s for s in (filled(s, table) for s in sentences) if s not in readme]


def unclaimed(readme, table):
    "The numbers of the README's prose that are neither claimed nor settings."
    prose = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)', ' ', readme, flags=re.S)
    for s in [filled(s, table) for s in SENTENCES] + NOT_RESULTS:
        prose = prose.replace(s, ' ')
    return re.findall(r'(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?', prose)


def wrong(table, folder=None):
    "The ids of claims that differ from what their tables say."
    columns = ['value', 'low', 'high', 'n']
    new, old = recomputed(table, folder)[columns], table[columns]
    same = np.isclose(new.astype(float), old.astype(float), atol=1e-3, equal_nan=True)
    return table.index[~same.all(1)].tolist()


def test_the_claims_are_what_the_tables_say():
    assert claims().index.is_unique and wrong(claims()) == []


def test_the_readme_says_what_the_claims_say():
    assert missing(README, claims()) == []


def test_the_readme_s_table_says_what_the_claims_say():
    table = re.sub(' +', ' ', KNOWING)
    assert missing(table, claims(), [*table_rows()]) == []
    assert missing(table.replace('+1.3 (', '+1.4 ('), claims(), [*table_rows()])


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_every_number_of_the_readme_is_claimed():
    assert unclaimed(README, claims()) == []


def test_every_claim_is_used():
    used = {m[1] for m in PLACE.finditer(' '.join([*SENTENCES, *table_rows()]))}
    extremes = {f'{goal}.rise.{m}' for goal in ROWS.values() for m in ('disentangled', 'entangled')}
    words = {'thesis.entangled_wd', 'lambda_0.gap', 'lambda_1.gap', 'q2.terse.radius',
             'q2.talkative.radius', 'story.blind', 'story.knows'}
    assert set(claims().index) == used | extremes | words


def test_what_the_readme_says_in_words():
    "The least and the largest rise and gap; without the weight no gap of the thesis's sign."
    c = claims().value
    for m, (least, most) in {'disentangled': ('latent', 'damage'),
                             'entangled': ('damage', 'latent')}.items():
        rises = {goal: c[f'{goal}.rise.{m}'] for goal in ROWS.values()}
        assert (min(rises, key=rises.get), max(rises, key=rises.get)) == (least, most)
    gaps = {goal: c[f'{goal}.knows.gap'] for goal in ROWS.values()}
    assert (min(gaps, key=gaps.get), max(gaps, key=gaps.get)) == ('output', 'damage')
    assert c['lambda_0.gap'] < 0 < c['lambda_1.gap']
    assert c['story.blind'] < c['story.knows'] < 0 < c['story.thesis'] and c['q1.rate'] < 0
    assert max(c['q2.terse.radius'], c['q2.talkative.radius']) < 1 < c['q1.radius']
    assert c['udr.a'] < c['udr.b']


@pytest.mark.parametrize('old, new', [('36.6 %', '36.7 %'), ('(-18.1 to -8.5)', '(-18.1 to -8.4)'),
                                      ('is 1.78 times', 'is 1.72 times'), ('0.18 against', '0.14 against')])
def test_a_changed_readme_is_found(old, new):
    assert old in README and missing(README.replace(old, new), claims())


def test_a_number_too_many_is_found():
    assert unclaimed(README + '\nIt falls in 47.1 % of cases.', claims()) == ['47.1']


@pytest.mark.parametrize('column', ['value', 'low', 'high', 'n'])
def test_a_changed_claim_is_found(column):
    table = claims().astype({'n': float})
    table.loc['q1.radius', column] += 1
    assert wrong(table) == ['q1.radius']
    assert missing(README, table) or column == 'n'


def test_a_changed_table_is_found(tmp_path):
    "Its checksum refuses it; without one, its claim is wrong."
    changed = (ROOT/'figures'/'bench_training.csv').read_text().replace('1.757084', '1.957084')
    (tmp_path/'bench_training.csv').write_text(changed)
    with pytest.raises(TableError, match='damaged'):
        wrong(claims().loc[['speed.training']], tmp_path)
    (tmp_path/'bench_training.csv').write_text(changed.partition('\n')[2])
    assert wrong(claims().loc[['speed.training']], tmp_path) == ['speed.training']


def test_a_query_by_hand(tmp_path):
    t = pd.DataFrame({'model': [*'aabb'], 'seed': [0, 1, 0, 1], 'attack': 'x', 'source': 0,
                      'kept': 10, 'missed': [5, 7, 1, 3]})
    t.to_csv(tmp_path/'toy.csv', index=False)
    assert ask_table('toy', "rate a where attack == 'x'", tmp_path)[0] == pytest.approx(60)
    assert ask_table('toy', 'rate_gap a b', tmp_path)[0] == pytest.approx(40)
    assert ask_table('toy', "total missed where model == 'b'", tmp_path) == (4, None, None, 2)
    made = pd.DataFrame({'goal': [*'ab'], 'gap': [1., 2.], 'low': [0., 1.], 'high': [3., 4.]})
    made.to_csv(tmp_path/'made.csv', index=False)
    assert ask_table('made', "estimate gap where goal == 'b'", tmp_path) == (2, 1, 4, 1)
    made.assign(n=5).to_csv(tmp_path/'made.csv', index=False)
    assert ask_table('made', "estimate gap where goal == 'a'", tmp_path) == (1, 0, 3, 5)
    assert set(AGGREGATES) == {'rate', 'rate_gap', 'rise', 'cell', 'inverse', 'estimate', 'total',
                          'average'}
