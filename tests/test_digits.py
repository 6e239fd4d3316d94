import json, math, shutil

import numpy as np, pandas as pd, pytest, torch
from torch.distributions import Normal, OneHotCategorical

from vae_robust import studies
from vae_robust.data import ImageData
from vae_robust.vae import Posterior
from vae_robust.experiments.digits import (beside, matrix, mean_of, portrait, report, results,
                                           publish_tables, summary, thesis)
from vae_robust.settings import preset, read_table


def test_the_thesis_s_numbers():
    means = thesis().groupby(['run', 'model'])[['as_ignore', 'as_target']].mean().round(2)
    names = 'disentangled', 'entangled', 'entangled_wd'
    said = dict(zip(names, ([36.59, 12.50], [29.70, 9.18], [27.03, 7.98])))
    again = dict(zip(names, ([36.86, 12.54], [29.83, 9.49], [26.88, 7.85])))
    assert means.loc['text'].T.to_dict('list') == said
    assert means.loc['second'].T.to_dict('list') == again
    text = thesis().query("run == 'text' and model == 'entangled'")
    row = text.query('source == 4 and target == 3').iloc[0]
    assert (row.as_ignore, row.as_target) == (89.19, 10.26)  # Table 6.2
    assert (thesis().source != thesis().target).all()
    assert (thesis().groupby(['run', 'model']).size() == 90).all()


@pytest.fixture(scope='module')
def job(tmp_path_factory, smoke_job):
    "A copy of the smoke job: (preset, runs folder, figures folder, results, summary)."
    home, p = tmp_path_factory.mktemp('job'), preset('job.smoke')
    shutil.copytree(smoke_job, home, dirs_exist_ok=True)
    return p, home/'runs', home/'figures', *report(p, home/'runs', home/'figures')


def test_the_job_leaves_every_table_and_figure_with_its_provenance(job):
    p, runs, figures, table, _ = job
    want = {f'{name}.{kind}' for name in ('means', 'pairs', 'models') for kind in ('csv', 'md')}
    want |= {'traversals.png', 'adversarial.png'}
    want |= {f'matrix_{a.split(".")[1]}.png' for a in p.attacks}
    assert {f.name for f in figures.iterdir()} == want
    for name in ('means.csv', 'pairs.csv'):
        facts = json.loads((figures/name).read_text().splitlines()[0][2:])
        assert facts['train'] == p.train and facts['seeds'] == [0] and 'commit' in facts
        assert facts['attacks'] == p.budget
    assert len(read_table(figures/'pairs.csv')) == len(table) == 3*2*90


def test_done_cells_are_not_done_again(job, monkeypatch):
    p, runs, _, table, _ = job
    monkeypatch.setattr(studies, 'trial', None)
    pd.testing.assert_frame_equal(results(p, runs, jobs=1), table)


def test_a_lost_cell_is_done_again_with_the_same_result(job):
    p, runs, _, table, _ = job
    lost = next(f for f in (runs/'cells').glob('*.csv') if b'rmsprop' in f.read_bytes())
    before = lost.read_bytes()
    lost.unlink()
    pd.testing.assert_frame_equal(results(p, runs), table)
    assert lost.read_bytes() == before


def test_matrix_by_hand():
    t = pd.DataFrame({'source': [3, 4], 'target': [8, 9], 'kept': [4, 0], 'missed': [3, 0],
                      'hit': [1, 0]})
    a = matrix(t)
    assert a[3, 8] == 75 and np.isnan(a).sum() == 99 and matrix(t, 'hit')[3, 8] == 25


def test_a_model_that_the_thesis_has_not_gets_a_row_without_it():
    row = dict(attack='thesis', model='mine', seed=0, source=0, target=1, kept=4, missed=1, hit=0)
    assert summary(pd.DataFrame([row])).as_ignore_thesis.isna().all()


def test_summary_sets_the_thesis_beside_its_own_attack_only():
    rows = [dict(model=m, seed=0, attack=a, source=1, target=2, kept=10, missed=5, hit=2)
            for m in ('disentangled', 'entangled') for a in ('thesis', 'none')]
    s = summary(pd.DataFrame(rows)).set_index(['attack', 'model'])
    none = s.loc['none', 'entangled']
    assert s.loc[('thesis', 'disentangled'), 'as_ignore_thesis'] == '36.6 / 36.9'
    assert pd.isna(none.as_ignore_thesis) and none.as_ignore == 50 and none.as_target == 20


def test_a_portrait_of_a_model_known_by_hand():
    "A posterior N(x_0, 1) and the class written in the code; the decoder gives every pixel 1/2."
    class Toy(torch.nn.Module):
        n_c = 10

        def posterior(self, x):
            return Posterior(Normal(x[:, 0, 0, :1].expand(-1, 2), 1.),
                             OneHotCategorical(logits=50*x[:, 0, 1, :10]))

        def decode(self, code): return torch.full((len(code), 1, 32, 32), .5)
        def log_likelihood(self, x, code): return torch.full((len(x),), -1024*math.log(2))
        def forward(self, x): return self.decode(self.posterior(x).mode)

    x, y = torch.zeros(40, 1, 32, 32, dtype=torch.uint8), torch.arange(40) % 10
    x[:, 0, 0, 0] = 255*(torch.arange(40) % 2)
    x[torch.arange(40), 0, 1, (y + 3) % 10] = 255
    judge = lambda a: torch.nn.functional.one_hot(torch.zeros(len(a), dtype=torch.long), 10)
    judge.train = judge.eval = lambda *_: None
    p = portrait(Toy(), judge, ImageData(x, y), n=5, K=20)
    want = {'rec': 1024*math.log(2), 'kl_z': 2*.5*.5, 'kl_c': math.log(10),
            'active': 2, 'accuracy': 100, 'recognised': 10}
    for k, v in want.items():
        assert abs(p[k] - v) < 1e-2, k
    assert p['kl_per_latent'] == '0.25 0.25' and p['log_p'] < -1024*math.log(2) + 5


def test_the_unit_of_replication_is_the_seed():
    "Two seeds with 20 and 40 %: the images do not narrow the interval; of one seed they do."
    cells = pd.DataFrame([dict(seed=s, source=1, target=t, kept=1000, missed=m, hit=0)
                          for s, m in ((0, 200), (1, 400)) for t in (2, 3)])
    mean, low, high = mean_of(cells, 'missed')
    assert (mean, low) == (30, 0) and high == 100  # t with one degree of freedom: 12.7
    mean, low, high = mean_of(cells[cells.seed == 0], 'missed')
    assert mean == 20 and 17 < low < 19 and 21 < high < 23


def test_tables_are_the_job_s_results_and_stand_beside_the_thesis_s(job, tmp_path):
    p, runs, _, table, _ = job
    assert len(publish_tables(p, runs, tmp_path)) == len(read_table(tmp_path/'tables.csv')) == len(table)
    b = beside(table, attack='strong')
    pair = 'entangled', 4, 3
    assert len(b) == 3*90 and b.loc[pair, 'text'] == 89.19
    assert beside(table, 'strong', 'hit').loc[pair, 'text'] == 10.26
    k = table.query("model == 'entangled' and attack == 'strong' and source == 4 and target == 3")
    assert k.kept.sum() == 0 or b.loc[pair, 'ours'] == 100*k.missed.sum()/k.kept.sum()
