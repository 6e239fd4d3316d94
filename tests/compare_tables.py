"""What became of the tables of an earlier version: python tests/compare_tables.py COMMIT

The data rows of each table in figures/ at that commit (the lines without a #), against those of the
last one: equal, in another order, only more of them, or others, and then the commits that changed
them."""
import subprocess, sys
from collections import Counter


def git(*words):
    return subprocess.run(['git', *words], capture_output=True, text=True, check=True).stdout


def tables(commit):
    "The tables in figures/ at a commit: a set of paths."
    files = git('ls-tree', '--name-only', commit, 'figures/').split()
    return {f for f in files if f.endswith('.csv')}


def rows(commit, file):
    "The header and the data rows of a table at a commit."
    lines = git('show', f'{commit}:{file}').split('\n')
    return [line for line in lines if line.strip() and not line.startswith('#')]


def fate(before, after):
    "What became of the rows `before`: a few words."
    if before == after: return 'equal'
    gone, more = (Counter(before) - Counter(after), Counter(after) - Counter(before))
    if not gone: return f'{more.total()} rows more' if more else 'in another order'
    return f'{gone.total()} of {len(before)} rows gone or changed, {more.total()} new'


def main(commit):
    there, fates = tables('HEAD'), []
    for file in sorted(tables(commit)):
        fates.append(fate(rows(commit, file), rows('HEAD', file)) if file in there else 'gone')
        print(f'{file:34} {fates[-1]}')
        if fates[-1] != 'equal':
            print(git('log', '--format=    %h %s', f'{commit}..HEAD', '--', file).rstrip())
    print(f'{fates.count("equal")} of {len(fates)} tables are equal')


if __name__ == '__main__':
    main(sys.argv[1])
