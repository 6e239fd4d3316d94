"""Folds the cells of a chapter that say nothing about its subject.

python tools/fold.py (`make export` does it)

Of a cell with `source_hidden` in its metadata JupyterLab shows the output, its code on a click."""
import ast, json, re
from pathlib import Path

NBS = Path(__file__).parent.parent/'nbs'
FOLDED = re.compile(r'(\d\d|A0)_.*')  # not the plumbing of the appendices
SETS_UP = (r'(torch\.(set_num_threads|set_default_dtype|manual_seed)|plt\.rcParams|'
           r'warnings\.simplefilter|keep_memory)\b')
DRAWS = r'\b(plt\.(subplots|subplot_mosaic|figure)|show_grid|save_figure)\('


def tree_of(source):
    "The statements of a cell, without magics."
    return ast.parse(re.sub('^%.*', '', source, flags=re.M)).body


def sets_up(node):
    "Whether a statement imports, seeds or sets a look."
    called = isinstance(node, ast.Expr) and re.match(SETS_UP, ast.unparse(node))
    return isinstance(node, (ast.Import, ast.ImportFrom)) or bool(called)


def names(tree):
    "The names that statements bind and those that they read, two sets."
    nodes = [n for statement in tree for n in ast.walk(statement)]
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return bound | {n.arg for n in nodes if isinstance(n, ast.arg)}, read


def only_draws(source, later):
    """Whether a cell makes a figure, and neither checks, defines nor prints anything, nor finds
    anything for the cells `later`, a list of sources."""
    tree = tree_of(source)
    says = (ast.Assert, ast.FunctionDef, ast.ClassDef)
    if any(isinstance(n, says) for statement in tree for n in ast.walk(statement)): return False
    if not re.search(DRAWS, source) or re.search(r'\bprint\(', source): return False
    needed = [read - bound for bound, read in map(names, map(tree_of, later))]
    return not names(tree)[0] & set().union(*needed)


def folds(source, later=()):
    "Whether a code cell only imports and seeds, or only draws; `later`: the sources after it."
    if all(map(sets_up, tree_of(source))): return True
    return not source.startswith('#| export') and only_draws(source, later)


def is_folded(cell):
    "Whether a cell of a notebook (a dict) is folded."
    return bool(cell['metadata'].get('jupyter', {}).get('source_hidden'))


def refolded(nb):
    "A notebook (a dict) with those code cells folded that should be, and no others."
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    sources = [''.join(c['source']) for c in code]
    for i, cell in enumerate(code):
        cell['metadata'].pop('jupyter', None)
        if folds(sources[i], sources[i + 1:]):
            cell['metadata']['jupyter'] = {'source_hidden': True}
    return nb


def chapters():
    "The notebooks that are folded, in order."
    return [f for f in sorted(NBS.glob('*.ipynb')) if FOLDED.fullmatch(f.name)]


if __name__ == '__main__':
    for file in chapters():
        text = file.read_text()
        new = json.dumps(refolded(json.loads(text)), indent=1, ensure_ascii=False) + '\n'
        if new != text:
            file.write_text(new)
