"The site: every chapter, every exported name, every link."
import json, re, subprocess, sys
from html.parser import HTMLParser
from importlib import import_module
from urllib.parse import unquote

import nbformat, pytest

import build_site
from build_site import SiteError, build, chapters, cleaned, module_of, plain
from fold import is_folded

MODULES = [m for f in chapters() if (m := module_of(nbformat.read(f, 4)))]


class Page(HTMLParser):
    "The ids and the links of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.way = set(), [], {}
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a:
            self.ids.add(a['id'])
        self.links += [a[k] for k in ('href', 'src') if k in a and not a[k].startswith('data:')]
        if 'rel' in a and tag == 'a':
            self.way[a['rel']] = a['href']


@pytest.fixture(scope='module')
def site(site_without_mathjax): return site_without_mathjax

@pytest.fixture(scope='module')
def pages(site):
    return {f.name: Page(f.read_text()) for f in site.glob('*.html')}


def test_chapters_and_modules_have_pages(pages):
    assert set(pages) == {'index.html'} | {f'{f.stem}.html'
                                           for f in chapters()} | {f'api_{m}.html' for m in MODULES}


def broken(pages, site):
    "Links that lead nowhere: (page, link)."
    for name, page in pages.items():
        for link in page.links:
            if link.startswith('https://'): continue
            file, _, anchor = unquote(link).partition('#')
            there = pages.get(file or name)
            if (anchor and (not there
                            or anchor not in there.ids)) or not (site/(file or name)).is_file():
                yield name, link

def test_links_lead_somewhere(pages, site):
    assert list(broken(pages, site)) == []
    assert sum(len(p.links) for p in pages.values()) > 2000

def test_the_check_of_links_can_fail(pages, site):
    wrong = Page('<a href="nowhere.html"></a><a href="02_elbo.html#nowhere"></a><a '
                 'href="#nowhere"></a><a href="02_elbo.html#eq-2-1">')
    assert len([page for page, _ in broken(pages | {'wrong.html': wrong}, site)
                if page == 'wrong.html']) == 3


def test_the_way_leads_through_all_pages_and_back(pages):
    seen = ['index.html']
    while 'next' in pages[seen[-1]].way:
        seen.append(pages[seen[-1]].way['next'])
        assert pages[seen[-1]].way['prev'] == seen[-2]
    assert sorted(seen) == sorted(pages)


def test_equations_can_be_reached_by_their_numbers(pages):
    anchors = [i for p in pages.values() for i in p.ids if i.startswith('eq-')]
    assert len(anchors) > 150 and len(anchors) == len(set(anchors))
    links = pages['26_verdict.html'].links + pages['16_attacks.html'].links
    assert '13_objectives.html#eq-13-5' in links


@pytest.mark.parametrize('name', MODULES)
def test_the_reference_has_every_exported_name_and_its_docstring(site, name):
    text, m = (site/f'api_{name}.html').read_text(), import_module(f'vae_robust.{name}')
    for k in m.__all__:
        assert f'<h3 id="{k}">' in text, k
    assert not re.search(r'0x[0-9a-f]{6}', text)


def test_hidden_cells_and_directives_stay_hidden(site):
    for f in chapters():
        text = re.sub('<[^>]+>', '', (site/f'{f.stem}.html').read_text())
        assert not re.search(r'^#\| ?(export|hide|default_exp)\b', text, re.M), f.name


def test_cells_that_only_draw_or_set_up_are_closed(site):
    for f in chapters():
        shown = cleaned(nbformat.read(f, 4)).cells
        folded = [c.source for c in shown if c.cell_type == 'code' and is_folded(c)]
        page = (site/f'{f.stem}.html').read_text()
        closed = re.findall(r'<details class="code"><summary>code</summary>(.*?)</details>', page, re.S)
        words = lambda text: ''.join(text.split())
        assert [words(plain(text)) for text in closed] == [*map(words, folded)], f.name
    assert sum('<details class="code">' in p.read_text() for p in site.glob('*.html')) >= 20


def test_no_link_is_left_in_markdown(site):
    for f in site.glob('*.html'):
        text = re.sub(r'(?s)<(pre|code).*?</\1>|<div class="output">.*?</div>', '', f.read_text())
        assert not re.search(r'\[[^]<]*(<a [^>]*>[^<]*</a>)?[^]<]*\]\((nbs|https?:|[A\d]\d_)',
                             text), f.name


def test_search_finds_words_where_they_are(site):
    sections = json.loads((site/'sections.js').read_text().removeprefix('const SECTIONS = '))
    of = lambda *words: {address.partition('#')[0] for address, _,
                         text in sections if all(w in text for w in words)}
    assert '05_concrete.html' in of('gumbel') and 'api_attacks.html' in of('smallest_radius')
    assert 'A1_settings.html' not in of('gumbel', 'capacity', 'dsprites')


def test_in_a_public_repository_each_chapter_says_how_to_run_it_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv('GITHUB_REPOSITORY', 'someone/vae_robust')
    build_site.write(tmp_path/'mathjax.js', '')
    build(tmp_path, chapters()[:1])
    found = Page((tmp_path/'00_tour.html').read_text()).links
    links = [link for link in found if 'someone' in link]
    assert len(links) == 2 and all('someone/vae_robust' in link for link in links)
    assert all((build_site.root()/link[link.index('nbs/'):]).is_file() for link in links)
    assert 'someone' not in (tmp_path/'index.html').read_text()


def test_the_first_cell_for_elsewhere_gives_a_folder_in_which_chapters_find_all(tmp_path):
    repository = 'file://' + str(build_site.root())
    cell = build_site.FIRST_CELL.replace('https://github.com/{}', repository).splitlines()
    clone, install = cell[0].removeprefix('!').split(' && ')
    assert (install, *cell[1:]) == ('pip install -q ./here', '%cd here')  # the wheel has its tests
    if not (build_site.root()/'.git').exists():
        pytest.skip('not a git checkout')
    subprocess.run([*clone.split(), '--depth=1'], cwd=tmp_path, check=True)
    code = '''import vae_robust.settings as s
assert s.root().samefile('.') and (s.root()/'vae_robust'/'weights'/'dsprites').is_dir()
assert len(s.read_table(s.root()/'figures'/'means.csv'))'''
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path/'here', check=True)


def test_without_npm_it_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(build_site.shutil, 'which', lambda name: None)
    with pytest.raises(SiteError, match='install Node.js'):
        build(tmp_path/'site')
    assert not (tmp_path/'site').exists()
    def offline(*command, folder): raise OSError('no network')
    monkeypatch.setattr(build_site.shutil, 'which', lambda name: name)
    monkeypatch.setattr(build_site, 'call', offline)
    with pytest.raises(SiteError, match='npm could not fetch MathJax: no network'):
        build(tmp_path/'site')
    assert not (tmp_path/'site').exists()


def test_outside_a_checkout_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(build_site, 'root', lambda: tmp_path)
    with pytest.raises(SiteError, match='checkout'):
        build()
