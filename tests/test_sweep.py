import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from vae_robust.settings import DiskError
from vae_robust.sweep import (SweepError, answer, attempt, collected, keep, key, missing, path_of,
                              plan, sweep)

CELLS = [{'model': m, 'seed': s} for m in ('a', 'b') for s in range(4)]


def count(settings):
    "A cell that leaves a mark each time that it is computed."
    if settings['model'] == 'bad': raise ValueError('no such model')
    time.sleep(settings.get('nap', 0))
    if 'marks' in settings:
        Path(settings['marks'], f'{key(settings)}.{os.getpid()}.{time.time_ns()}').touch()
    return pd.DataFrame({'missed': [settings['seed'], 7]})


@pytest.fixture
def marked(tmp_path):
    """Cells that note their computations, a function that counts these per cell, and a folder
    for the answers."""
    marks = tmp_path/'marks'
    marks.mkdir()
    cells = [c | {'nap': .15, 'marks': str(marks)} for c in CELLS]
    return cells, lambda: pd.Series([f.name.split('.')[0]
                                     for f in marks.iterdir()]).value_counts(), tmp_path/'answers'


def started(cells, folder, **options):
    "A sweep in a process of its own."
    code = f'''
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sweep import *
sweep({cells!r}, count, {str(folder)!r}, progress=False, **{options!r})
'''
    return subprocess.Popen([sys.executable, '-c', code], start_new_session=True,
                            stdout=subprocess.PIPE, text=True)


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, 'nothing happened in a minute'
        time.sleep(.01)


def test_the_answers_with_their_settings(tmp_path):
    table = sweep(CELLS, count, tmp_path, progress=False, jobs=2)
    assert table[['model', 'seed',
                  'missed']].values.tolist() == [[c['model'], c['seed'], v] for c in CELLS
                                                 for v in (c['seed'], 7)]
    assert sweep(CELLS[::-1], None, tmp_path,
                 progress=False).equals(collected(CELLS[::-1], tmp_path))


def test_a_name_depends_on_every_setting_and_not_on_their_order():
    assert len({key(c) for c in CELLS}) == 8 and key({'x': 1, 'y': 2}) == key({'y': 2, 'x': 1})


def test_an_answer_to_another_question_is_not_taken(tmp_path):
    keep(CELLS[0], pd.DataFrame({'missed': [1]}), tmp_path)
    path_of(CELLS[0], tmp_path).rename(path_of(CELLS[1], tmp_path))
    assert answer(CELLS[1], tmp_path) is None and missing(CELLS[:2], tmp_path) == CELLS[:2]


@pytest.mark.parametrize('rest', [b'', b'\xff\xfe', b'"a\n1,2,3\n'])
def test_a_damaged_answer_is_no_answer(tmp_path, rest):
    keep(CELLS[0], count(CELLS[0]), tmp_path)
    path = path_of(CELLS[0], tmp_path)
    path.write_bytes(path.read_bytes().split(b'\n')[0] + b'\n' + rest)
    assert missing(CELLS[:1], tmp_path) == CELLS[:1]


def test_an_answer_cut_at_any_byte_is_computed_again(tmp_path):
    keep(CELLS[0], pd.DataFrame({'v': range(50)}), tmp_path)
    path = path_of(CELLS[0], tmp_path)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert answer(CELLS[0], tmp_path) is None


def test_a_torn_line_of_the_clock_is_passed_over(tmp_path):
    sweep(CELLS[:4], count, tmp_path, progress=False, jobs=1)
    with open(tmp_path/'seconds.jsonl', 'a') as f:
        f.write('{"cell": "0123", "sec')
    assert plan(CELLS[:5], tmp_path)['done'] == 4


ODD = b'{"cell": "0", "seconds": NaN, "settings": {}}\n7\n\n{"seconds": 1}\n[]\n\xff\n'

@pytest.mark.parametrize('torn', [lambda b: b[:-20], lambda b: b[:-1], lambda b: b + ODD,
                                  lambda b: bytes(len(b))])
def test_cells_are_timed_after_a_torn_line(tmp_path, torn):
    sweep(CELLS[:2], count, tmp_path, progress=False, jobs=1)
    clock = tmp_path/'seconds.jsonl'
    clock.write_bytes(torn(clock.read_bytes()))
    sweep(CELLS[:3], count, tmp_path, progress=False, jobs=1)
    assert json.loads(clock.read_bytes().splitlines()[-1])['settings'] == CELLS[2]
    assert plan(CELLS, tmp_path)['seconds'] >= 0


def test_a_sweep_that_was_killed_goes_on_and_does_nothing_twice(marked):
    cells, marks, folder = marked
    process = started(cells, folder, jobs=2)
    wait_for(lambda: len(list(folder.glob('*.csv'))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {f.name: f.read_bytes() for f in folder.glob('*.csv')}
    assert 3 <= len(done) < 8
    sweep(cells, count, folder, progress=False, jobs=2)
    assert len(marks()) == 8 and all(marks()[f.removesuffix('.csv')] == 1 for f in done)
    assert all((folder/f).read_bytes() == b for f, b in done.items())
    assert {f.suffix for f in folder.iterdir()} <= {'.csv', '.jsonl', ''}  # nothing half-written


def test_two_sweeps_on_one_folder_do_nothing_twice(marked):
    cells, marks, folder = marked
    processes = [started(cells, folder, jobs=1) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0] and sorted(map(bool, said)) == [False, True]
    assert (marks() == 1).all() and missing(cells, folder) == []


def test_a_bad_cell_does_not_sink_the_others(tmp_path):
    bad = {'model': 'bad', 'seed': 0}
    with pytest.raises(SweepError) as e:
        sweep([bad, *CELLS], count, tmp_path, progress=False, jobs=2)
    assert str(e.value).startswith('1 of 9 cells failed') and '"model": "bad"' in str(e.value)
    assert 'ValueError: no such model' in str(e.value)
    assert missing([bad, *CELLS], tmp_path) == [bad]


def doomed(settings):
    "A cell that may die in one of several ways."
    how = settings.get('how')
    if how == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    if how == 'exit':
        os._exit(0)
    if how == 'leaves':
        sys.exit(3)
    if how == 'memory': raise MemoryError
    if how == 'no table': return [1]
    if how == 'unsendable': return pd.DataFrame({'a': [lambda: 0]})
    return pd.DataFrame({'threads': [torch.get_num_threads()],
                         'omp': [int(os.environ['OMP_NUM_THREADS'])], 'pid': [os.getpid()]})

WAYS = ('killed', 'exit', 'leaves', 'memory', 'no table')

@pytest.mark.parametrize('jobs', [2])
def test_a_cell_that_takes_its_process_along_takes_nobody_else(tmp_path, jobs):
    bad = [{'n': 9, 'how': h} for h in WAYS]
    cells = [{'n': n} for n in range(4)] + bad + [{'n': n} for n in range(10, 14)]
    for _ in range(2):  # and does not come back as another trouble
        with pytest.raises(SweepError) as e:
            sweep(cells, doomed, tmp_path, progress=False, jobs=jobs)
        assert str(e.value).startswith('5 of 13 cells failed')
        assert all(f'"how": "{h}"' in str(e.value) for h in WAYS) and 'SIGKILL' in str(e.value)
        assert [c.get('how') for c in missing(cells, tmp_path)] == [*WAYS]


def test_in_this_process_a_cell_that_leaves_is_a_trouble_too():
    for how in ('leaves', 'memory', 'no table'):
        assert attempt(doomed, {'how': how})[1] is None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            attempt(lambda c: signal.raise_signal(signal.SIGINT), {})
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_worker_computes_on_one_thread_and_stays_for_the_next_sweep(tmp_path):
    pids = []
    for turn in (1, 2):
        table = sweep([{'n': n, 'turn': turn} for n in range(4)], doomed, tmp_path, progress=False,
                      jobs=2)
        assert (table.threads == 1).all() and (table.omp == 1).all()
        assert os.getpid() not in {*table.pid}
        pids.append({*table.pid})
    assert pids[1] <= pids[0] and len(pids[0]) <= 2


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return open(f'/proc/{pid}/stat').read().split()[2] != 'Z'

def test_workers_end_with_their_parent(tmp_path, marked):
    cells, _, folder = marked
    process = started([c | {'nap': 60} for c in cells], folder, jobs=2)
    family = lambda: [int(p) for p in subprocess.run(['ps', '-o', 'pid=,args=', '--ppid',
                                                      str(process.pid)], capture_output=True,
                                                     text=True).stdout.splitlines()
                      for p in p.split()[:1] if 'resource_tracker' not in p]
    workers = []
    def up():
        workers[:] = family()
        return len(workers) >= 2
    wait_for(up)
    time.sleep(3)  # they have begun
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, workers)))


def test_a_worker_that_died_while_it_was_idle_is_replaced(tmp_path):
    first = sweep([{'n': n} for n in range(2)], doomed, tmp_path, progress=False, jobs=2)
    for pid in {*first.pid}:
        os.kill(pid, signal.SIGKILL)
    time.sleep(.5)
    assert len(sweep([{'n': n} for n in range(2, 6)], doomed, tmp_path, progress=False,
                     jobs=2)) == 4


def test_settings_of_other_kinds_get_a_sentence_or_a_number(tmp_path):
    one = lambda c: pd.DataFrame({'u': [1.]})
    assert sweep([{'a': np.int64(1), 'b': (1, 2)}], one, tmp_path, progress=False,
                 jobs=1).iloc[0].tolist() == [1., 1, '[1, 2]']
    assert key({'a': np.int64(1)}) == key({'a': 1})
    assert len(sweep([], one, tmp_path, progress=False)) == 0
    with pytest.raises(SweepError, match='cannot be written down: .*object'):
        sweep([{'a': object()}], one, tmp_path, progress=False)
    with pytest.raises(SweepError, match="no backend 'dask'; there are local, ray"):
        sweep([{'a': 1, 'c': 0}], one, tmp_path, 'dask', progress=False)
    with pytest.raises(SweepError, match='at least one process'):
        sweep([{'a': 1, 'c': 0}], one, tmp_path, progress=False, jobs=0)
    assert len(sweep([{'a': float('nan')}], one, tmp_path, progress=False, jobs=1)) == 1
    assert missing([{'a': float('nan')}], tmp_path) == []


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(DiskError, match='file/x/.lock cannot be written'):
        sweep([{'a': 1}], doomed, tmp_path/'file'/'x', progress=False)


def test_the_plan_knows_what_is_done_and_how_long_the_rest_takes(tmp_path):
    slow, quick = ([{'model': m, 'seed': s, 'nap': nap} for s in range(3)] for m,
                   nap in (('slow', .4), ('quick', .1)))
    sweep([slow[0], quick[0]], count, tmp_path, progress=False, jobs=1)
    p = plan(slow + quick, tmp_path, jobs=2)
    assert (p['cells'], p['done']) == (6, 2)
    assert p['seconds'] == pytest.approx((2*.4 + 2*.1)/2, abs=.1)


def two_nodes(tries=3):
    "A cluster of two one-core nodes and the second one; a busy machine may need a second try."
    from ray.cluster_utils import Cluster
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1)
        return cluster, cluster.add_node(num_cpus=1)
    except Exception as e:  # Ray has no other class for a node that is not there after 30 s
        cluster.shutdown()
        if tries == 1 or 'timed out' not in str(e): raise
        return two_nodes(tries - 1)


@pytest.fixture
def ray():
    "A cluster of two one-core nodes on this machine; the second can be taken away."
    ray = pytest.importorskip('ray',
                              reason="ray is not installed: pip install 'vae_robust[cluster]'")
    cluster, second = two_nodes()
    ray.init(address=cluster.address, log_to_driver=False,
             runtime_env={'env_vars': {'PYTHONPATH': str(Path(__file__).parent)}})
    yield ray, cluster, second
    ray.shutdown()
    cluster.shutdown()


def test_a_ray_cluster_loses_a_node_and_no_cell(ray, tmp_path, monkeypatch):
    _, cluster, second = ray
    cells, gone = [c | {'nap': .5} for c in CELLS], []
    keep_ = keep
    def keep_and_pull_the_plug(*args):
        keep_(*args)
        if not gone:
            gone.append(cluster.remove_node(second, allow_graceful=False))
    monkeypatch.setattr('vae_robust.sweep.keep', keep_and_pull_the_plug)
    table = sweep(cells, count, tmp_path, 'ray', progress=False)
    assert gone and len(table) == 16 and missing(cells, tmp_path) == []
    assert table.drop(columns='nap').equals(sweep(CELLS, count, tmp_path/'local', progress=False,
                                                  jobs=1))
