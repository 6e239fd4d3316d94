"""The chapters as web pages, for those who only read: with mathematics, links between equations,
search, and the docstrings as a reference, and all of it without a network.

python tools/build_site.py [FOLDER] (`make site`; the folder is _site unless one is given)
In a workflow of GitHub, which names its repository, each chapter also says how to run it elsewhere.

Three libraries do most of it: nbconvert turns Markdown into HTML and leaves formulas alone,
Pygments colours code, and MathJax, fetched once by npm, draws formulas in the browser."""
import html, inspect, json, os, re, shutil, sys, tarfile, tempfile
from importlib import import_module
from pathlib import Path
from string import Template

import nbformat
from nbconvert.filters import ansi2html, markdown2html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from tqdm.auto import tqdm

from fold import is_folded
from vae_robust.data import call
from vae_robust.settings import root, write

TEMPLATES = Path(__file__).parent/'site'
FORMULA = r'(\$\$.*?\$\$|\$[^$\n]+\$|```.*?```|`[^`\n]+`|\[[^]]*\]\([^)]*\))'
TAG = r'\\tag\{(.+?)\}'
ID = r'id="([^"]+)"'
LEXER, FORMATTER = PythonLexer(), HtmlFormatter()
MATHJAX = '<script defer src="mathjax.js"></script>'


class SiteError(RuntimeError):
    "A site that cannot be built; the message says why."


def chapters():
    "The notebooks, in order; `SiteError` outside a checkout."
    found = sorted((root()/'nbs').glob('*.ipynb'))
    if found: return found
    raise SiteError('There are no notebooks here: a site is built from a checkout of the '
                    'repository, '
                    'in its top folder.')


def sources(nb):
    "The cells of a notebook, one text."
    return '\n'.join(c.source for c in nb.cells)


def module_of(nb):
    "The module that a notebook is exported to, None for a chapter without one."
    found = re.search(r'^#\| default_exp (\S+)', sources(nb), re.M)
    return found and found[1]


def number(file):
    "What a chapter is called by: '7' for 07_joint_vae.ipynb, 'A1' for an appendix."
    return file.stem.partition('_')[0].lstrip('0') or '0'


def title_of(file, nb):
    "The number of a chapter and its first heading."
    return f'{number(file)} {re.match("# (.+)", nb.cells[0].source)[1]}'


def cleaned(nb):
    "A notebook without hidden cells, and without directives in the others."
    nb.cells = [c for c in nb.cells if not re.match(r'#\| *(hide|default_exp)', c.source)]
    for c in nb.cells:
        c.source = re.sub(r'\A(#\|.*\n)+', '', c.source)
    return nb


# ------------------------------------------------------------------ links

def anchor(tag):
    "The name of the place before the equation with a tag, which its chapter gives it."
    return f'eq-{tag.replace(".", "-")}'


def linked(text, equations, pages):
    """Markdown whose mentions of `equations` (tag -> page) and chapters (number -> page,
    `pages`) are links, also in docstrings, which have none."""
    def equation(m):
        return f'[{m[0]}]({equations[m[1]]}#{anchor(m[1])})' if m[1] in equations else m[0]
    def chapter(m): return f'[{m[0]}]({pages[m[1]]})' if m[1] in pages else m[0]
    def prose(part):
        part = re.sub(r'\((\d+\.\d+[a-z]?)\)', equation, part)
        return re.sub(r'\b(?:chapter|appendix) (A?\d+)', chapter, part)
    parts = re.split(FORMULA, text, flags=re.S)
    parts[::2] = [prose(p) for p in parts[::2]]
    return ''.join(parts)


def settled(page, source, folder):
    """A page's HTML with its relative links made to hold in the site: notebooks are pages, other
    files come along into `folder`."""
    def target(m):
        file = (source/m[2]).resolve()
        if file.suffix == '.ipynb': return f'{m[1]}="{file.stem}.html'
        if not file.is_file() or not file.is_relative_to(root()): return m[0]
        name = file.relative_to(root())
        write(folder/name, file.read_bytes())
        return f'{m[1]}="{name.as_posix()}'
    return re.sub(r'(href|src)="(?!#|https?:|data:)([^"#]+)', target, page)


# ------------------------------------------------------------------ the reference

def signature(f):
    "The call of a function or class as text, '' for anything else."
    try:
        return re.sub(' at 0x[0-9a-f]+', '', str(inspect.signature(f)))
    except (TypeError, ValueError):
        return ''


def methods(thing):
    "The public methods of a class that have a docstring, name -> function."
    if not inspect.isclass(thing): return {}
    return {k: m for k, m in vars(thing).items() if inspect.isfunction(m) and m.__doc__
            and k[0] != '_'}


def is_call(thing):
    return inspect.isclass(thing) or inspect.isroutine(thing)


def entry(name, thing):
    "An exported name as Markdown: its signature, its docstring, and those of its methods."
    if isinstance(thing, dict):
        return f'### {name}\n\nA dict of ' + ', '.join(f'`{k}`' for k in thing) + '.'
    if not is_call(thing): return f'### {name}\n\nA {type(thing).__name__}.'
    lines = [f'### {name}', f'```python\n{name}{signature(thing)}\n```',
             inspect.getdoc(thing) or '']
    lines += [f'* `.{k}{signature(m)}` {inspect.getdoc(m)}' for k, m in methods(thing).items()]
    return '\n\n'.join(lines)


def reference(name):
    "The page of a module as Markdown: every exported name, functions and classes before constants."
    module = import_module(f'vae_robust.{name}')
    names = sorted(module.__all__, key=lambda k: not is_call(getattr(module, k)))
    entries = [entry(k, getattr(module, k)) for k in names]
    return '\n\n'.join([f'# vae_robust.{name}', inspect.getdoc(module) or '', *entries])


# ------------------------------------------------------------------ pages

FIRST_CELL = """!git clone -q https://github.com/{} here && pip install -q ./here
%cd here"""  # chapters read figures/, and weights that the wheel has not

def elsewhere(file, repository):
    """HTML that opens the chapter of a page `file` on Binder and Colab, from the main branch of
    a public `repository` on GitHub, 'owner/name'; '' for pages that are no chapters."""
    chapter = f'nbs/{Path(file).stem}.ipynb'
    if not repository or not (root()/chapter).is_file(): return ''
    binder = f'https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/{chapter}'
    colab = f'https://colab.research.google.com/github/{repository}/blob/main/{chapter}'
    cell = html.escape(FIRST_CELL.format(repository)).replace('\n', '<br>')
    return (f'<p class="way"><span>Run this chapter on <a href="{binder}">Binder</a> or on '
            f'<a href="{colab}">Colab</a>, there with the first cell '
            f'<code>{cell}</code></span></p>')


def plain(text):
    "The words of a piece of HTML."
    text = re.sub(r'<style.*?</style>|<[^>]+>', ' ', text, flags=re.S)
    return ' '.join(html.unescape(text).replace('¶', '').split())


def sections(file, page):
    """The sections of a page's HTML: [(address, heading, text), ...]; the first is the beginning
    of the page."""
    parts = ['', *re.split(r'(<h[123] id="[^"]+".*?</h[123]>)', page, flags=re.S)]
    def at(h): return f'{file}#{re.search(ID, h)[1]}' if h else file
    return [(at(h), plain(h), plain(h + text)) for h, text in zip(parts[::2], parts[1::2])]


def contents(here, titles, page):
    "The list of all pages (file -> title, `titles`) as HTML; under the page `here` its sections."
    inside = [(a, h) for a, h, _ in sections(here, page)
              if f'<h2 id="{a.partition("#")[2]}"' in page]
    inner = ''.join(f'<li><a href="{a}">{html.escape(h)}</a></li>' for a, h in inside)
    def item(file, title):
        current, below = (' aria-current=page', f'<ul>{inner}</ul>') if file == here else ('', '')
        return f'<li><a href="{file}"{current}>{html.escape(title)}</a>{below}</li>'
    return '<ul>' + ''.join(item(f, t) for f, t in titles.items()) + '</ul>'


def mathjax(folder, version='3.2.2'):
    "Put MathJax into `folder`, once; `SiteError` if npm is missing or cannot fetch it."
    if (folder/'mathjax.js').exists(): return
    if not shutil.which('npm'):
        raise SiteError('The site needs MathJax, which comes by npm, and there is no npm here: '
                        'install Node.js.')
    with tempfile.TemporaryDirectory() as t:
        try:
            call('npm', 'pack', f'mathjax@{version}', folder=Path(t))
        except OSError as e:
            raise SiteError(f'npm could not fetch MathJax: {e}') from e
        with tarfile.open(next(Path(t).glob('*.tgz'))) as tar:
            script = tar.extractfile('package/es5/tex-svg-full.js').read()
    write(folder/'mathjax.js', script)


def texts(notebooks):
    """All pages, (file, title, Markdown text or notebook, the folder that its links start from),
    in order."""
    read = {f: nbformat.read(f, 4) for f in notebooks}
    modules = {f: module_of(nb) for f, nb in read.items()}
    yield 'index.html', 'Start', (root()/'README.md').read_text(), root()
    for f, nb in read.items():
        yield f'{f.stem}.html', title_of(f, nb), cleaned(nb), f.parent
    for f, m in modules.items():
        if m:
            yield f'api_{m}.html', f'vae_robust.{m}', reference(m), f.parent


def html_of(output):
    "An output of a code cell as HTML: the richest form of it that a page can show."
    data = output.get('data', {'text/plain': output.get('text', '')})
    if 'text/html' in data: return f'<div class="output">{data["text/html"]}</div>'
    if 'image/png' in data:
        return ('<img alt="what the code above draws" '
                f'src="data:image/png;base64,{data["image/png"].strip()}">')
    if 'text/markdown' in data: return markdown2html(data['text/markdown'])
    return f'<pre class="output">{ansi2html(data["text/plain"])}</pre>'


def converted(text, equations, pages):
    "Markdown or a notebook as HTML, with links."
    def prose(source): return markdown2html(linked(source, equations, pages))
    def code(c):
        shown = highlight(c.source, LEXER, FORMATTER)
        if is_folded(c):
            shown = f'<details class="code"><summary>code</summary>{shown}</details>'
        return shown + ''.join(map(html_of, c.outputs))
    if isinstance(text, str): return prose(text)
    return '\n'.join(prose(c.source) if c.cell_type == 'markdown' else code(c) for c in text.cells)


def equations_of(notebooks):
    "The page of every equation: tag -> file."
    prose = {f: [c.source for c in nbformat.read(f, 4).cells if c.cell_type == 'markdown']
             for f in notebooks}
    return {t: f'{f.stem}.html' for f, cells in prose.items()
            for t in re.findall(TAG, '\n'.join(cells))}


def index(found):
    """What search looks in: a script with the sections of all pages [(file, title, body), ...]
    in lower case."""
    rows = [(a, f'{title}: {h}' if h else title, text.lower())
            for file, title, body in found for a, h, text in sections(file, body)]
    return 'const SECTIONS = ' + json.dumps(rows)


def has_formulas(body):
    "Whether a page's HTML has a dollar outside of code: only then it loads MathJax, which is large."
    return '$' in plain(re.sub(r'(?s)<(pre|code)\b.*?</\1>', '', body))


def bound(found):
    "Pages [(file, title, body), ...] with contents, and the way on and back: (file, HTML)."
    page = Template((TEMPLATES/'page.html').read_text())
    titles = {file: title for file, title, _ in found}
    def way(i, mark): return f'<a rel="{mark}" href="{found[i][0]}">{html.escape(found[i][1])}</a>'
    for i, (file, title, body) in enumerate(found):
        before = way(i - 1, 'prev') if i else ''
        after = way(i + 1, 'next') if i + 1 < len(found) else ''
        run = elsewhere(file, os.environ.get('GITHUB_REPOSITORY'))
        yield file, page.substitute(title=html.escape(title), run=run, body=body,
                                    before=before, after=after,
                                    contents=contents(file, titles, body),
                                    mathjax=MATHJAX if has_formulas(body) else '')


def build(folder=None, notebooks=None):
    """Write the site of the `notebooks` (all) to `folder` (_site in the checkout), and return
    the path of its front page; `SiteError` where that is not possible, with nothing written."""
    folder, notebooks = Path(folder or root()/'_site'), notebooks or chapters()
    mathjax(folder)
    equations, pages = equations_of(notebooks), {number(f): f'{f.stem}.html' for f in notebooks}
    bar = tqdm([*texts(notebooks)], 'site', mininterval=1)
    found = [(file, title, settled(converted(text, equations, pages), source, folder))
             for file, title, text, source in bar]
    style = (TEMPLATES/'style.css').read_text() + FORMATTER.get_style_defs('.highlight')
    search = (TEMPLATES/'search.js').read_text()
    files = [*bound(found), ('style.css', style), ('search.js', search),
             ('sections.js', index(found))]
    for name, text in files:
        write(folder/name, text)
    return folder/'index.html'


if __name__ == '__main__':
    try:
        print(f'Open {build(*sys.argv[1:2])} in a browser.')
    except SiteError as e:
        sys.exit(str(e))
