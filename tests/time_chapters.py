"""How long the chapters take: runs all of them in full from a fresh clone of the last commit, each
in a kernel of its own, on one thread and one pinned core, and looks whether they left a trace.
figures/chapters.csv and .md have a line for each chapter and for each of its cells over 5 seconds,
and whether that cell showed a progress bar. Data sets that are in the data folder stay there.

python tests/time_chapters.py              all of them: writes the table
python tests/time_chapters.py 08 10        some: prints theirs, writes nothing"""
import os, re, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat, pandas as pd, psutil
from nbclient import NotebookClient

from bench import machine
from vae_robust.settings import save_table

ROOT, CORE = Path(__file__).parent.parent, 1
CHAPTERS = sorted(f.name.split('_')[0] for f in (ROOT/'nbs').glob('*.ipynb'))
SLOW = 5  # seconds after which a cell owes its reader a bar
BAR = re.compile(r'\d+%\||\d+it ')


def clone(top):
    "A fresh clone of the last commit in the folder `top`."
    subprocess.run(['git', 'clone', '--quiet', '--shared', ROOT, top], check=True)
    return Path(top)


def trace(top):
    "What the chapters have left in a clone, as git sees it: ''."
    status = ['git', 'status', '--porcelain']
    return subprocess.run(status, cwd=top, check=True, capture_output=True, text=True).stdout


def shows_bar(outputs):
    "Whether a cell showed a progress bar, as a widget or as text."
    texts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in outputs]
    return any(BAR.search(''.join(t)) for t in texts)


def used(pid):
    "Seconds of CPU that a process has used so far."
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def timed(file, slow=SLOW):
    """Run a notebook in full: a row for itself, which counts the start of its kernel, and one for
    each of its cells over `slow` seconds."""
    nb, rows, began = nbformat.read(file, 4), [], {}
    client = NotebookClient(nb, timeout=3600, resources={'metadata': {'path': str(file.parent)}})
    def clocks(): return time.perf_counter(), used(client.km.provisioner.pid)
    def begin(cell, cell_index): began[cell_index] = clocks()
    def end(cell, cell_index, execute_reply):
        if cell.cell_type != 'code': return
        wall, cpu = (b - a for a, b in zip(began[cell_index], clocks()))
        bar, began['all'] = shows_bar(cell.outputs), clocks()
        rows.append([cell.id, cell.source.split('\n')[0][:50], wall, cpu, 'yes' if bar else 'no'])
    client.on_cell_start, client.on_cell_executed = begin, end
    start = time.perf_counter()
    client.execute(env={k: v for k, v in os.environ.items() if k != 'VAE_ROBUST_SMOKE'})
    rows = [['-', 'all', began['all'][0] - start, began['all'][1], '-']] + rows
    table = pd.DataFrame(rows, columns=['id', 'cell', 'seconds', 'CPU', 'bar'])
    table.insert(0, 'chapter', file.stem)
    return table[(table.id == '-') | (table.seconds > slow)]


def main(chapters):
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {CORE % os.cpu_count()})
    os.environ['OMP_NUM_THREADS'] = '1'
    with tempfile.TemporaryDirectory() as folder:
        os.environ['PYTHONPATH'] = str(top := clone(folder))
        tables = []
        for chapter in chapters or CHAPTERS:
            tables.append(timed(next((top/'nbs').glob(f'{chapter}_*.ipynb'))))
            print(tables[-1].to_string(index=False, header=False, float_format='%.1f'), flush=True)
            left = trace(top)
            assert not left, f'Chapter {chapter} has left a trace:\n{left}'
    table = pd.concat(tables).round(1)
    each = table[table.cell == 'all']
    print(f'{each.seconds.sum():.0f} s, of which {each.CPU.sum():.0f} of CPU')
    if not chapters:
        save_table(table, 'chapters', ROOT/'figures', '.1f', machine=machine(), smallest=SLOW)


if __name__ == '__main__':
    main(sys.argv[1:])
