"Every result in the README is a row of figures/claims.csv, and every row what its table says."
import re
from pathlib import Path

import numpy as np, pandas as pd, pytest

from vae_robust.claims import KINDS, ask_table, claims, quote, recomputed, shown

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()

# Sentences of the README with the ids of their numbers: {id decimals}, {id.low decimals}.
SENTENCES = """
{thesis.disentangled 1} % of its reconstructions became another digit,
 against {thesis.entangled 1} %
raise the rates of disentangled models
 by {latent.rise.disentangled 0} to {damage.rise.disentangled 0}
 points and those of entangled ones by {damage.rise.entangled 0} to {latent.rise.entangled 0}
by {lambda_1.gap 0} points ({lambda_1.gap.low 0} to {lambda_1.gap.high 0})
do not differ ({udr.disentangled 2} and {udr.entangled 2})
at {speed.training 1} times the speed of a DataLoader
{speed.attack 1} of the time of the fastest of four other packages ({speed.attack_half 2} in half
in a {speed.strong 0}th of their time; `attack.fast`, in a {speed.fast -1}th
take {speed.metrics -1} seconds for 10,000 points""".strip().replace('\n ', ' ').split('\n')

ROWS = {'latent': 'latent', 'output': 'output', 'maximum damage': 'damage',
        'judge (scored by another)': 'judge'}
TABLE = [f'| {said} | {{{k}.blind.disentangled 1}} / {{{k}.blind.entangled 1}} '
         f'| {{{k}.knows.disentangled 1}} / {{{k}.knows.entangled 1}} '
         f'| {{{k}.knows.gap 1}} ({{{k}.knows.gap.low 1}} to {{{k}.knows.gap.high 1}}) |'
         for said, k in ROWS.items()]
TABLE += ['| | {any.disentangled 1} / {any.entangled 1} '
          '| {any.gap 1} ({any.gap.low 1} to {any.gap.high 1}) |']
PLACE = re.compile(r'\{([\w.]+?)(?:\.(low|high))? (-?\d)\}')

NOT_RESULTS = [  # what the setting is, and not what was found
    'In 2018', 'at most 0.1', r'$\lambda=1$', r'$\lambda=0$', 'its 52 models', '180 pairs', '95 %',
    'Python 3.11', '(1 to 2 minutes', 'about 10 minutes', '1,000 steps', 'all 86,908 pairs',
    'for 10,000 points', 'CC BY-SA 3.0', '16_attacks', 'Chapter 16', '26_verdict', 'chapter 26',
    'chapter 23', 'of chapter 11', 'Appendices A5 and A6', '2018']


def filled(sentence, table):
    "A sentence with its numbers as `table`, claims by id, has them; a gap in a table has its sign."
    def text(m):
        value = table.loc[m[1], m[2] or 'value']
        signed = sentence.startswith('|') and m[1].endswith('gap') and not m[2] and value > 0
        return '+'*bool(signed) + shown(value, int(m[3]))
    return PLACE.sub(text, sentence)


def missing(readme, table):
    "The sentences that are not in the README with the numbers of the claims."
    return [s for s in (filled(s, table) for s in SENTENCES + TABLE) if s not in readme]


def unclaimed(readme, table):
    "The numbers of the README's prose that are neither claimed nor settings."
    prose = re.sub(r'```.*?```|## The chapters.*?## Play|`[^`]*`', ' ', readme, flags=re.S)
    for s in [filled(s, table) for s in SENTENCES + TABLE]:
        prose = prose.replace(re.sub('`[^`]*`', ' ', s), ' ')
    for s in NOT_RESULTS:
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


def test_every_number_of_the_readme_is_claimed():
    assert unclaimed(README, claims()) == []


def test_every_claim_is_used():
    used = {m[1] for m in PLACE.finditer(' '.join(SENTENCES + TABLE))}
    extremes = {f'{goal}.rise.{m}' for goal in ROWS.values() for m in ('disentangled', 'entangled')}
    words = {'thesis.entangled_wd', 'lambda_0.gap', 'speed.minutes', 'speed.memory'}
    assert set(claims().index) == used | extremes | words


def test_what_the_readme_says_in_words():
    "The least and the largest rise; no gap of the thesis's sign; a minute; a gigabyte."
    c = claims().value
    for m, (least, most) in {'disentangled': ('latent', 'damage'),
                             'entangled': ('damage', 'latent')}.items():
        rises = {goal: c[f'{goal}.rise.{m}'] for goal in ROWS.values()}
        assert (min(rises, key=rises.get), max(rises, key=rises.get)) == (least, most)
    assert c['lambda_0.gap'] < 0 and quote('speed.minutes', 0) == '1' and c['speed.memory']/2 < 1000
    reach = pd.read_csv(ROOT/'figures'/'bench_reach.csv', comment='#')
    assert (reach['attack.strong'] < reach['attack.thesis_repaired']).all()
    assert (reach['attack.fast'] < reach['attack.thesis_repaired']).tolist().count(True) >= 1


@pytest.mark.parametrize('old, new', [('36.6 %', '36.7 %'), ('(-5.3 to 7.9)', '(-5.3 to 7.8)'),
                                      ('| +13.1', '| +13.2'), ('0.31 and', '0.32 and')])
def test_a_changed_readme_is_found(old, new):
    assert old in README and missing(README.replace(old, new), claims())


def test_a_number_too_many_is_found():
    assert unclaimed(README + '\nIt falls in 47.1 % of cases.', claims()) == ['47.1']


@pytest.mark.parametrize('column', ['value', 'low', 'high', 'n'])
def test_a_changed_claim_is_found(column):
    table = claims().astype({'n': float})
    table.loc['latent.knows.gap', column] += 1
    assert wrong(table) == ['latent.knows.gap']
    assert missing(README, table) or column == 'n'


def test_a_changed_table_is_found(tmp_path):
    text = (ROOT/'figures'/'bench_training.csv').read_text()
    (tmp_path/'bench_training.csv').write_text(text.replace('1.757084', '1.957084'))
    assert wrong(claims().loc[['speed.training']], tmp_path) == ['speed.training']


def test_a_query_by_hand(tmp_path):
    t = pd.DataFrame({'model': [*'aabb'], 'seed': [0, 1, 0, 1], 'attack': 'x', 'source': 0,
                      'kept': 10, 'missed': [5, 7, 1, 3]})
    t.to_csv(tmp_path/'toy.csv', index=False)
    assert ask_table('toy', "rate a where attack == 'x'", tmp_path)[0] == pytest.approx(60)
    assert ask_table('toy', 'rate_gap a b', tmp_path)[0] == pytest.approx(40)
    assert ask_table('toy', "total missed where model == 'b'", tmp_path) == (4, None, None, 2)
    assert set(KINDS) == {'rate', 'rate_gap', 'rise', 'cell', 'inverse', 'total', 'average'}
