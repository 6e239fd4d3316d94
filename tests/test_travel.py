"""Models that travel: folders, cards, extended runs, and a Hub that is a server of this test."""
import base64, json, re
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest, torch
from safetensors.torch import save_file

from vae_robust import training
from vae_robust.data import images, load
from vae_robust.settings import preset
from vae_robust.training import TrainingError, pretrained, read_weights, shipped, train
from vae_robust.yours import ModelError, card, load_model, pull, push, save_model

P = preset('digits.disentangled', 'train.smoke', n_z=3, steps=6, batch=16)
bytes_in = lambda folder: (folder/'weights.safetensors').read_bytes()


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_what_train_leaves_is_loaded_without_its_preset(tmp_path):
    model = train(P, tmp_path, progress=False)
    for path in (tmp_path, tmp_path/'weights.safetensors'):
        assert same(load_model(path), model) and not load_model(path).training
    assert same(load_model(shipped('mnist/disentangled')), pretrained('mnist/disentangled'))


def test_a_factor_vae_travels_without_its_discriminator(tmp_path):
    p = P.model_copy(update={'objective': 'factor', 'n_c': 0})
    model, again = train(p, tmp_path, progress=False), load_model(tmp_path)
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(model(x), again(x))


def test_a_folder_says_what_it_is(tmp_path):
    x = images((torch.randint(256, (40, 1, 32, 32)).byte()))
    p = P.model_copy(update={'data': 'images:/a/secret/place/cats'})
    model = train(p, tmp_path/'run', data=x, progress=False)
    save_model(model, tmp_path/'mine', p, data=x, mig=.25, udr=1/3)
    assert same(load_model(tmp_path/'mine'), model)
    page, run = ((tmp_path/'mine'/f).read_text() for f in ('README.md', 'run.json'))
    run = json.loads(run)
    head = re.match(r'---\nlibrary_name: vae_robust\ntags: \[[\w, -]+\]\n---\n# mine\n', page)
    digest = sha256(bytes_in(tmp_path/'mine')).hexdigest()
    assert head and run['sha256'] == {'weights.safetensors': digest} and f'| {digest} |' in page
    assert run['metrics'] == {'mig': .25, 'udr': 1/3} and '| udr | 0.333333 |' in page
    assert f'| images | {training.digest(x.x)[:16]} |' in page and '| data | images:cats |' in page
    assert not [f for f in (tmp_path/'mine').iterdir() if b'secret' in f.read_bytes()]


@pytest.mark.parametrize('name, words', [
    ('fsq', '0 Gaussian latents and 4 scalars of 6 levels.'),
    ('three', '10 Gaussian latents and 3 categoricals of 10 classes.'),
    ('entangled', '10 Gaussian latents and a categorical of 10 classes.')])
def test_a_card_says_which_code_a_model_has(name, words):
    assert words in card('mine', preset(f'mnist.{name}'), {}, {}, {})


def test_damage_and_strangers_are_told(tmp_path):
    train(P, tmp_path, progress=False)
    good = bytes_in(tmp_path)
    flipped = bytearray(good)
    flipped[-9] ^= 1
    (tmp_path/'weights.safetensors').write_bytes(flipped)
    with pytest.raises(TrainingError, match='damaged'):
        load_model(tmp_path)
    save_file({'a': torch.zeros(2)}, tmp_path/'other.safetensors')
    with pytest.raises(TrainingError, match='no model of this package: adapt takes those'):
        load_model(tmp_path/'other.safetensors')
    save_file({'a': torch.zeros(2)}, tmp_path/'wrong.safetensors', {'settings': read_weights(
        shipped('mnist/entangled'))[1]})
    with pytest.raises(TrainingError, match='does not fit the networks'):
        load_model(tmp_path/'wrong.safetensors')
    with pytest.raises(TrainingError, match='There is no file of weights'):
        load_model(tmp_path/'nowhere')


def longer(steps): return P.model_copy(update={'steps': steps})


def extended(folder, every=1000):
    train(P, folder, progress=False)
    return train(longer(10), folder, progress=False, extend=True, every=every)


def test_a_finished_run_goes_on_and_says_so(tmp_path):
    model = extended(tmp_path/'a')
    assert json.loads(read_weights(tmp_path/'a'/'weights.safetensors')[1])['extended'] == [6]
    before = bytes_in(tmp_path/'a')
    assert same(train(longer(10), tmp_path/'a', progress=False, extend=True), model)
    assert bytes_in(tmp_path/'a') == before and not (tmp_path/'a'/'checkpoint.pt').exists()
    extended(tmp_path/'b')
    assert bytes_in(tmp_path/'b') == before
    train(longer(10), tmp_path/'straight', progress=False)
    assert bytes_in(tmp_path/'straight') != before
    train(longer(12), tmp_path/'a', progress=False, extend=True)
    assert json.loads(read_weights(tmp_path/'a'/'weights.safetensors')[1])['extended'] == [6, 10]


def test_the_first_step_of_an_extension_is_one_from_the_old_weights(tmp_path, monkeypatch):
    train(P, tmp_path, progress=False)
    old, seen = load_model(tmp_path).state_dict(), []
    def watch(model, objective, batch, step, *rest):
        seen.append((step, {k: v.clone() for k, v in model.state_dict().items()}))
        return advance(model, objective, batch, step, *rest)
    advance = training.advance
    monkeypatch.setattr(training, 'advance', watch)
    train(longer(10), tmp_path, progress=False, extend=True)
    assert [step for step, _ in seen] == [6, 7, 8, 9]
    assert all(torch.equal(v, old[k]) for k, v in seen[0][1].items())


def test_a_killed_extension_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    extended(tmp_path/'whole')
    train(P, tmp_path/'killed', progress=False)
    advance = training.advance
    def dies(model, objective, batch, step, *rest):
        if step == 8: raise KeyboardInterrupt
        return advance(model, objective, batch, step, *rest)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training, 'advance', dies)
        train(longer(10), tmp_path/'killed', progress=False, extend=True, every=1)
    assert load_model(tmp_path/'killed')              # the old run is whole until the end
    train(longer(10), tmp_path/'killed', progress=False, extend=True)
    assert bytes_in(tmp_path/'killed') == bytes_in(tmp_path/'whole')


@pytest.mark.parametrize('change, words', [({'steps': 4}, 'to 4 steps: it has 6'),
                                           ({'steps': 10, 'lr': .5}, 'only steps can change')])
def test_what_cannot_be_extended_is_refused_and_kept(tmp_path, change, words):
    train(P, tmp_path, progress=False)
    before = bytes_in(tmp_path)
    with pytest.raises(TrainingError, match=words):
        train(P.model_copy(update=change), tmp_path, progress=False, extend=True)
    with pytest.raises(TrainingError, match='trained with other settings'):
        train(longer(10), tmp_path, progress=False)
    assert bytes_in(tmp_path) == before


def test_an_extension_on_other_images_is_refused(tmp_path):
    x = load('digits').x
    train(P, tmp_path, progress=False)
    with pytest.raises(TrainingError, match='only steps can change'):
        train(longer(10), tmp_path, data=x.flip(0), progress=False, extend=True)


# ---------------------------------------------------------------- a Hub of one repository

class Hub(BaseHTTPRequestHandler):
    "As much of the Hub's HTTP as it takes to make a repository, upload to it and download from it."
    files, made, sha = {}, [], 'a'*40

    def answer(self, body=b'', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        headers = {'Content-Length': len(body), 'X-Repo-Commit': self.sha} | headers
        for k, v in headers.items():
            self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_GET(self):
        name = self.path.split('?')[0].rpartition('/')[2]
        if '/resolve/' in self.path:
            data = self.files[name]
            return self.answer(data, ETag=f'"{sha256(data).hexdigest()}"')
        siblings = [{'rfilename': f} for f in self.files]
        entries = [{'type': 'file', 'path': f, 'size': len(d), 'oid': sha256(d).hexdigest()[:40]}
                   for f, d in self.files.items()]
        facts = {'id': 'me/mine', '_id': '1', 'sha': self.sha, 'siblings': siblings,
                 'private': False}
        self.answer(entries if '/tree/' in self.path else facts, Content_Type='application/json')
    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length'])).decode()
        if 'preupload' in self.path:
            files = [{'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                     for f in json.loads(body)['files']]
            return self.answer({'files': files})
        if 'commit' in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files.update({v['value']['path']: base64.b64decode(v['value']['content'])
                               for v in lines if v['key'] == 'file'})
        else:
            self.made.append(json.loads(body))
        url = f'http://{self.headers["Host"]}/me/mine'
        self.answer({'url': url, 'commitUrl': f'{url}/commit/{self.sha}', 'commitOid': self.sha,
                     'name': 'me/mine'})

    def log_message(self, *_): pass


@pytest.fixture
def hub(tmp_path, monkeypatch, library):
    library('huggingface_hub')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    Hub.files, Hub.made = {}, []
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def test_push_and_pull(hub, tmp_path):
    model = train(P, tmp_path/'run', progress=False)
    save_model(model, tmp_path/'mine', P, mig=.5)
    (tmp_path/'mine'/'notes.txt').write_text('mine')
    push(tmp_path/'mine', 'me/mine', token='hf_x', endpoint=hub)
    assert Hub.made[0]['name'] == 'mine' and 'private' in str(Hub.made[0])
    assert {*Hub.files} == {'weights.safetensors', 'run.json', 'README.md'}
    again = pull('me/mine', tmp_path/'there', endpoint=hub)
    assert same(again, model) and (tmp_path/'there'/'README.md').read_text().startswith('---')


def test_a_download_that_was_changed_on_the_way_is_refused(hub, tmp_path):
    save_model(train(P, tmp_path/'run', progress=False), tmp_path/'mine', P)
    push(tmp_path/'mine', 'me/mine', token='hf_x', endpoint=hub)
    flipped = bytearray(Hub.files['weights.safetensors'])
    flipped[-9] ^= 1
    Hub.files['weights.safetensors'] = bytes(flipped)
    with pytest.raises(TrainingError, match='damaged'):
        pull('me/mine', tmp_path/'there', endpoint=hub)


def test_nothing_is_pushed_that_is_no_model_or_says_where_its_images_lay(tmp_path):
    with pytest.raises(TrainingError, match='There is no file of weights'):
        push(tmp_path, 'me/mine')
    p, x = P.model_copy(update={'data': 'images:/mnt/cats'}), load('digits').x
    train(p, tmp_path, data=x, progress=False)
    with pytest.raises(TrainingError, match='say where their images lay'):
        push(tmp_path, 'me/mine')


def test_without_the_client_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'huggingface_hub', None)
    train(P, tmp_path, progress=False)
    for f in (lambda: push(tmp_path, 'me/mine'), lambda: pull('me/mine')):
        with pytest.raises(ModelError, match=r'pip install "vae_robust\[yours\]"'):
            f()
