"""The interactive chapters in a real JupyterLab, and the site, in a real browser.
Screenshots and latencies are kept in runs/e2e."""
import json, os, shutil, socket, statistics, subprocess, sys, time, urllib.request
from pathlib import Path

import nbformat, pytest

from build_site import SiteError, mathjax

ROOT = Path(__file__).parent.parent
KEPT = ROOT/'runs'/'e2e'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']
pytestmark = [pytest.mark.e2e,
              pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine: '
                                 'the browser tests need one (Debian: apt-get install chromium)')]
sync_api = pytest.importorskip('playwright.sync_api',
                               reason='the browser tests need playwright: pip install playwright')


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


def small_notebook():
    "A notebook whose one output is three pictures behind a slider."
    code = """import matplotlib.pyplot as plt
from vae_robust.settings import moving
figures = {str(i): plt.figure(figsize=(i, 1)) for i in (1, 2, 3)}
plt.close('all')
moving(figures, 'width')"""
    cells = [nbformat.v4.new_markdown_cell('.') for _ in range(6)]  # READY waits for some
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    return nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(code)], metadata=kernel)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """The address of a JupyterLab of our own: private configuration, copies of the two notebooks,
    smoke mode, loopback only."""
    home = tmp_path_factory.mktemp('lab')
    for name in ('A5_explorer', 'A6_play'):
        shutil.copy(ROOT/'nbs'/f'{name}.ipynb', home)
    nbformat.write(small_notebook(), home/'moving.ipynb')
    settings = {'notebook-extension/tracker': {'windowingMode': 'none'},
                'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}
    for name, values in settings.items():
        (f := home/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings').parent.mkdir(
            parents=True, exist_ok=True)
        f.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'VAE_ROBUST_SMOKE': '1',
                        'JUPYTERLAB_SETTINGS_DIR': str(home/'settings'),
                        'JUPYTERLAB_WORKSPACES_DIR': str(home/'workspaces'),
                        'JUPYTER_CONFIG_DIR': str(home/'config'),
                        'JUPYTER_RUNTIME_DIR': str(home/'runtime')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
               f'--port={port}', '--ServerApp.port_retries=0',
               f'--ServerApp.root_dir={home}', '--IdentityProvider.token=',
               '--LabApp.expose_app_in_browser=True']
    with open(home/'log', 'w') as log:
        server = subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/api')
                break
            except OSError:
                time.sleep(.2)
        else:
            pytest.fail((home/'log').read_text())
        yield f'http://127.0.0.1:{port}/lab/workspaces'
    finally:
        server.terminate()
        server.wait(60)


READY = """() => {
    const widgets = [...(window.jupyterapp?.shell.widgets('main') ?? [])];
    const panel = window.panel = widgets.find(w => w.content?.widgets), s = panel?.sessionContext;
    return !!(s?.isReady && s.session?.kernel?.connectionStatus == 'connected' &&
              s.session.kernel.status == 'idle' && panel.content.widgets.length > 5) }"""
IDLE = "() => window.panel.sessionContext.session.kernel.status == 'idle'"
CODE = """() => [...window.panel.content.model.cells].filter(
    c => c.type == 'code' && c.sharedModel.source.trim())"""
FAILED = "c => c.outputs.toJSON().filter(o => o.output_type == 'error')"
DONE = f"""() => {{
    const cells = ({CODE})(), failed = cells.some(c => ({FAILED})(c).length);
    return failed || (cells.every(c => c.executionCount) && ({IDLE})()) }}"""
ERRORS = f"() => ({CODE})().flatMap(c => ({FAILED})(c).map(o => o.evalue))"
WATCH = """img => {
    window.key = window.press = 0; window.times = [];
    const begin = () => { window.begun = performance.now(); window.times = [] };
    for (const e of ['keydown', 'click']) document.addEventListener(e, begin, true);
    img.addEventListener('load', () => window.times.push(performance.now() - window.begun)) }"""
BYTES = "async img => [...new Uint8Array(await (await fetch(img.src)).arrayBuffer())].join()"


class Widget:
    "A widget on a page: what a reader can see of it and do with it."
    def __init__(self, page, box):
        self.page, self.box, self.image = page, box, box.locator('img.widget-image')
        self.box.scroll_into_view_if_needed()
        self.image.evaluate(WATCH)
    def slider(self, text):
        return self.box.locator('.widget-hslider',
                                has=self.page.locator('.widget-label', has_text=text))
    def handle(self, text): return self.slider(text).locator('.noUi-handle')
    def button(self, text): return self.box.get_by_role('button', name=text, exact=True)
    def bytes(self): return self.image.evaluate(BYTES)
    def changes(self, act):
        "Do something, and wait until the picture is another."
        before = self.bytes()
        act()
        self.until(lambda: self.bytes() != before, 'the picture did not change')
    def until(self, condition, otherwise, seconds=60):
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, f'{otherwise}: {self.box.inner_text()}'
            self.page.wait_for_timeout(20)
    def set(self, text, value):
        readout = self.slider(text).locator('.widget-readout')
        readout.fill(str(value))
        readout.press('Enter')
        self.settle()
    def settle(self):
        "Wait until nothing is left to draw."
        self.page.wait_for_timeout(300)  # a slider's message may wait, a button's does not
        self.page.wait_for_function(IDLE)
        self.page.wait_for_timeout(300)  # and the last picture has to arrive


def keep(page, name, **latencies):
    KEPT.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=KEPT/f'{name}.png')
    (KEPT/f'{name}.json').write_text(json.dumps(latencies, indent=1))


@pytest.fixture
def opened(browser, lab):
    """Opens a notebook, runs all of it, checks that neither a cell nor a formula failed,
    and gives its first widget."""
    page = browser.new_page(viewport={'width': 1500, 'height': 1000})
    page.set_default_timeout(120_000)
    def open_notebook(name):
        page.goto(f'{lab}/{name}/tree/{name}.ipynb')
        page.wait_for_function(READY, polling=200)
        page.evaluate("() => { window.jupyterapp.shell.activateById(window.panel.id); "
                      "window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_function(DONE, polling=200, timeout=300_000)
        assert page.evaluate(ERRORS) == []
        page.wait_for_function("document.querySelectorAll('mjx-container').length > 5", polling=200)
        assert page.locator('[data-mjx-error]').count() == 0
        return Widget(page, page.locator('.jp-OutputArea-output .widget-vbox',
                                         has=page.locator('img.widget-image')).first)
    yield open_notebook
    page.close()


def test_pictures_move_in_jupyterlab(browser, lab):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(f'{lab}/moving/tree/moving.ipynb')
    page.wait_for_function(READY, polling=200)
    page.evaluate("() => { window.jupyterapp.shell.activateById(window.panel.id); "
                  "window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(DONE, polling=200)
    slider, picture = (page.locator(f'.jp-OutputArea-output figure {tag}') for tag in ('input', 'img'))
    before = picture.get_attribute('src')
    slider.fill('2')
    assert picture.get_attribute('src') != before
    assert page.locator('.jp-OutputArea-output figure output').inner_text() == '3'
    page.close()


def test_latent_explorer(opened):
    explorer = opened('A5_explorer')
    page = explorer.page
    top = explorer.box.locator('.widget-hslider').nth(1)
    label, handle = top.locator('.widget-label').inner_text(), top.locator('.noUi-handle')
    waits = []
    for key in 12*['ArrowRight', 'ArrowLeft', 'ArrowRight']:
        explorer.changes(lambda: handle.press(key))
        waits.append(page.evaluate('window.times[0]'))
    keep(page, 'explorer', key_to_picture_ms=statistics.median(waits), each=waits)
    explorer.settle()  # all keys are drawn
    explorer.changes(lambda: explorer.button('reset').click())
    explorer.settle()
    rest, where = explorer.bytes(), handle.bounding_box()
    def drag():
        page.mouse.move(where['x'] + where['width']/2, where['y'] + where['height']/2)
        page.mouse.down()
        page.mouse.move(where['x'] + 60, where['y'] + 5, steps=5)
        page.mouse.up()
    explorer.changes(drag)
    explorer.settle()  # what the drag still sends must not come after the reset
    explorer.button('reset').click()
    explorer.until(lambda: explorer.bytes() == rest, 'reset does not lead back')
    explorer.changes(lambda: explorer.button('4').click())
    explorer.until(lambda: 'c = 0 to 9' in explorer.box.inner_text(),
                   'the strip is not said to show the categories')
    explorer.changes(lambda: explorer.button('entangled').click())
    explorer.until(lambda: top.locator('.widget-label').inner_text() != label,
                   'the sliders are not renamed')
    page.wait_for_function(IDLE)  # what is drawn after a model is chosen says so in the same line
    explorer.button('save PNG').click()
    explorer.until(lambda: 'Saved as' in explorer.box.inner_text(), 'nothing was saved')


def test_attack_playground(opened):
    play = opened('A6_play')
    page, run, stop = play.page, play.button('attack'), play.button('stop')
    play.set('steps', 40)
    play.set('λ', 1)
    play.changes(lambda: play.set('which one', 5))
    run.click()
    play.until(lambda: page.evaluate('window.times.length') > 0 and run.is_enabled(),
               'the attack does not end')
    times = page.evaluate('window.times')
    keep(page, 'playground', first_picture_ms=times[0], finished_ms=times[-1], pictures=len(times))
    play.until(lambda: 'the judge saw' in play.box.inner_text(), 'the judge is not heard')
    play.set('steps', 1000)
    play.box.locator('.widget-dropdown',
                     has_text='objective').locator('select').select_option('output')
    done = play.box.locator('.progress-bar')
    share = lambda: float(done.evaluate('bar => parseFloat(bar.style.width)'))
    play.changes(run.click)
    play.until(lambda: 0 < share() < 100 and stop.is_enabled(), 'no progress is shown')
    stop.click()
    play.until(run.is_enabled, 'the attack is not stopped')
    play.until(stop.is_disabled, 'there is nothing to stop, and the button says there is')
    assert share() < 100


@pytest.fixture(scope='module')
def site(tmp_path_factory, site_without_mathjax):
    "The site with MathJax."
    folder = tmp_path_factory.mktemp('site')
    try:
        mathjax(folder)
    except SiteError as e:
        pytest.skip(str(e))
    shutil.copytree(site_without_mathjax, folder, dirs_exist_ok=True,
                    ignore=lambda *_: ['mathjax.js'])
    return folder/'index.html'


BEYOND = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'
SEEN = f"""async () => {{
    await window.MathJax?.startup?.promise;
    const count = what => document.querySelectorAll(what).length, left = [];
    const texts = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) if (!texts.currentNode.parentElement.closest('pre, code'))
        left.push(...(texts.currentNode.data.match(/[$][^$]+[$]/g) ?? []));
    return {{formulas: count('mjx-container'), failed: count('[data-mjx-error]'), left,
             beyond: {BEYOND},
             shown: [...document.images].every(i => i.complete && i.naturalWidth)}} }}"""
WIDTHS = {'phone': {'width': 390, 'height': 900}, 'desk': {'width': 1280, 'height': 900}}


def test_every_page_of_the_site(browser, site):
    "The width changes once on each page, so that both are seen with one new layout."
    page, asked, errors, now, other = browser.new_page(), [], [], 'phone', 'desk'
    page.set_viewport_size(WIDTHS[now])
    page.set_default_timeout(120_000)
    page.on('request', lambda r: asked.append(r.url))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    for f in sorted(site.parent.glob('*.html')):
        page.goto(f.as_uri())
        seen = page.evaluate(SEEN)
        enough = seen['formulas'] >= f.read_text().count('<a id="eq-')
        assert enough and not errors, (f.name, seen, errors)
        assert not seen['failed'] and not seen['left'], (f.name, seen)
        assert seen['shown'], f.name
        assert seen['beyond'] <= 1, f'{f.name} scrolls sideways on a {now}'
        now, other = other, now
        page.set_viewport_size(WIDTHS[now])
        assert page.evaluate(BEYOND) <= 1, f'{f.name} scrolls sideways on a {now}'
    assert [u for u in asked if not u.startswith(('file:', 'data:'))] == []
    page.goto((site.parent/'13_objectives.html').as_uri() + '#eq-13.5')
    page.get_by_role('searchbox').fill('radius norm')
    page.locator('#found a', has_text='Smallest').first.wait_for()
    keep(page, 'site')
    page.locator('#found a').first.click()
    page.wait_for_function("location.hash && "
                           "document.getElementById(decodeURIComponent(location.hash.slice(1)))")


MOVING = ['02_elbo', '05_concrete', '06_beta_vae']  # chapters in which something moves


def moving_outputs(name):
    "The outputs of a chapter that have a slider of their own, as they are committed."
    nb = json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())
    pages = [''.join(o.get('data', {}).get('text/html', '')) for c in nb['cells']
             for o in c.get('outputs', ())]
    return [p for p in pages if 'type="range"' in p]


@pytest.mark.parametrize('name', MOVING)
def test_pictures_move_without_a_kernel(browser, name, tmp_path):
    (html,) = moving_outputs(name)
    (tmp_path/'page.html').write_text(f'<!doctype html><meta charset="utf-8">{html}')
    page = browser.new_page()
    page.goto((tmp_path/'page.html').as_uri())
    slider, picture, label = (page.locator(tag) for tag in ('input', 'img', 'output'))
    seen = []
    slider.focus()
    slider.press('Home')
    for _ in range(int(slider.get_attribute('max')) + 1):
        seen.append((label.inner_text(), picture.get_attribute('src')))
        slider.press('ArrowRight')
    assert len(seen) >= 10 and len({*seen}) == len(seen)
    assert len({src for _, src in seen}) == len(seen)
    assert picture.evaluate('i => i.complete && i.naturalWidth > 200')
