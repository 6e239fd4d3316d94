import json, math, os, shutil, signal, socket, subprocess, time
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import pandas as pd, pytest, torch, torch.distributed as dist
from torch import nn
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forks import server, started

from vae_robust import training
from vae_robust.data import load, pixels
from vae_robust.settings import SettingsError, preset, read_settings
from vae_robust.training import (LOSSES, TrainingError, alive, build, cosine, dead, fit,
                                 forward_dtype, identity, load_weights, minibatches, noted_signals,
                                 objective, save_weights, unchecked,
                                 hashes, learning_curve, pretrained, publish_curves, read_weights,
                                 ship, shipped, train, warm, WEIGHTS)
from vae_robust.vae import Terms, elbo, kl

SHORT = preset('digits.disentangled', steps=30, C_steps=20, lr='1e-3')
FILES = ('weights.safetensors', 'curves.csv')

def contents(folder):
    return [(Path(folder)/f).read_bytes() for f in FILES]


def stopping_at(stop):
    "`training.advance`, but for a Ctrl-C in one of its steps."
    honest = training.advance
    def advance(model, objective, batch, step, *rest):
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(model, objective, batch, step, *rest)
    return advance


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The files of an uninterrupted run."
    folder = tmp_path_factory.mktemp('straight')
    train(SHORT, folder, progress=False, every=4)
    return contents(folder)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(straight, tmp_path):
    train(SHORT, tmp_path/'again', progress=False, every=7)
    train(SHORT, tmp_path/'other', seed=1, progress=False)
    assert contents(tmp_path/'again') == straight
    assert contents(tmp_path/'other')[0] != straight[0]


def test_the_caller_s_random_numbers_and_threads_do_not_matter_and_stay(straight, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(123)
    expected = torch.Generator().manual_seed(123).get_state()
    train(SHORT, tmp_path, progress=False)
    assert contents(tmp_path) == straight and torch.equal(torch.get_rng_state(), expected)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


PROGRAM = '''
import sys
from vae_robust.settings import preset
from vae_robust.training import train
short = preset('digits.disentangled', steps=30, C_steps=20, lr='1e-3')
train(short, sys.argv[1], progress=False, every=1)
'''

def step_of(folder):
    try:
        return torch.load(folder/'checkpoint.pt', weights_only=True)['step']
    except (OSError, RuntimeError, EOFError):
        return 0

@pytest.mark.parametrize('number, at', [(signal.SIGKILL, 1), (signal.SIGKILL, 6),
                                        (signal.SIGKILL, 12), (signal.SIGKILL, 19),
                                        (signal.SIGKILL, 27), (signal.SIGTERM, 5),
                                        (signal.SIGINT, 9)])
def test_a_run_killed_anywhere_and_resumed_gives_the_same_bytes(straight, tmp_path, number, at):
    process = started(PROGRAM, tmp_path, said=tmp_path.with_suffix('.said'))
    while step_of(tmp_path) < at and process.is_alive():
        time.sleep(.002)
    os.kill(process.pid, number)
    process.join(60)
    words = tmp_path.with_suffix('.said').read_text()
    assert process.exitcode, 'it was too fast to be killed'
    assert not (tmp_path/'weights.safetensors').exists()
    assert at <= step_of(tmp_path) < 30
    if number != signal.SIGKILL:
        assert 'Stopped after step' in words and 'the same call goes on' in words
    train(SHORT, tmp_path, progress=False, every=4)
    assert contents(tmp_path) == straight
    assert not (tmp_path/'checkpoint.pt').exists()


def test_a_finished_run_is_loaded_not_trained(straight, tmp_path, monkeypatch):
    first = train(SHORT, tmp_path, progress=False)
    monkeypatch.setattr(training, 'fit', None)
    again = train(SHORT, tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not again.training


class Silence(TorchDispatchMode):
    "What is done to a device that has no numbers: an error if it is asked for one, or sent one."
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, there = op(*args, **kwargs
                        or {}), lambda tree, where: any(t.device.type == where
                                                        for t in tree_leaves(tree)
                                                        if isinstance(t, torch.Tensor))
        asked = there(args, 'meta') and any(word in op.name()
                                            for word in ('local_scalar', 'is_all_true', 'nonzero',
                                                         'masked_select'))
        sent = 'copy' in op.name() and there(args, 'cpu') and there(out, 'meta')
        if asked or sent: raise RuntimeError(f'{op.name()} needs the numbers')
        return out


@pytest.mark.parametrize('name', LOSSES)
def test_a_step_can_be_recorded_as_a_graph(name, monkeypatch):
    def tensor(*values, device='cpu', make=torch.tensor, **kw):
        assert str(device) == 'cpu', 'numbers are sent to the device'
        return make(*values, **kw)
    p = preset('digits.disentangled', objective=name, n_data=1500,
               n_c=0 if name in ('tc', 'factor') else 10)
    model, x, step = build(p).to('meta'), torch.rand(8, 1, 32, 32,
                                                     device='meta'), torch.zeros((), device='meta')
    with unchecked():
        objective(p)(model, x, step)  # a first time, for what is made once
    monkeypatch.setattr(torch, 'tensor', tensor)
    with unchecked(), Silence():
        torch.autograd.grad(objective(p)(model, x, step).loss, [*model.parameters()])
    for asking in (lambda: torch.distributions.Categorical(logits=model.encoder(x)),
                   lambda: step + torch.ones(()).to('meta'),
                   lambda: torch.distributions.Normal(step, 1.)):
        with pytest.raises((RuntimeError, AssertionError)), Silence():
            asking()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a graphics card')
@pytest.mark.parametrize('name', LOSSES)
def test_on_a_card_a_graph_gives_the_bytes_of_single_kernels(name, monkeypatch):
    p, x = preset('digits.disentangled', objective=name), load('digits').x.cuda()
    def trained():
        model = build(p).cuda()
        with torch.backends.cudnn.flags(True, deterministic=True, allow_tf32=False):
            fit(model, objective(p), x, 30, 16, partial(Adam, lr=1e-3, fused=True), progress=False)
        return torch.cat([w.flatten() for w in model.parameters()])
    first, again = trained(), trained()
    monkeypatch.setattr(training, 'captured', lambda model, objective, *_: objective)
    assert torch.equal(first, again) and torch.equal(first, trained())


def test_a_run_that_was_stopped_on_a_card_goes_on_without_one(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'advance', stopping_at(8))
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, tmp_path, progress=False)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match='CUDA'):
        torch.load(tmp_path/'checkpoint.pt', weights_only=True)
    train(SHORT, tmp_path, progress=False)
    assert contents(tmp_path) == straight


@pytest.mark.parametrize('device', ['abacus', 'meta'] + ['cuda']*(not torch.cuda.is_available()))
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path, device):
    with pytest.raises(TrainingError, match=f'No device {device!r} here .*leave it out'):
        train(SHORT, tmp_path/'run', progress=False, device=device)
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('unfinished', [True, False])
def test_a_folder_with_other_settings_is_refused(tmp_path, unfinished):
    if unfinished:
        training.save_checkpoint(tmp_path/'checkpoint.pt', settings=identity(SHORT, 0))
    else:
        save_weights(tmp_path/'weights.safetensors', build(SHORT), identity(SHORT, 0))
    with pytest.raises(TrainingError, match='other settings'):
        train(SHORT, tmp_path, seed=1, progress=False)


@pytest.mark.parametrize('damage', [lambda b: b[:-100], lambda b: b'',
                                    lambda b: b'not weights at all', lambda b: b'\xff'*16 + b])
@pytest.mark.parametrize('file', ['weights.safetensors', 'checkpoint.pt'])
def test_damaged_files_are_refused_with_what_to_do(tmp_path, damage, file):
    if file == 'checkpoint.pt':
        training.save_checkpoint(tmp_path/file, settings=identity(SHORT, 0), step=1)
    else:
        save_weights(tmp_path/file, build(SHORT), identity(SHORT, 0))
    (tmp_path/file).write_bytes(damage((tmp_path/file).read_bytes()))
    with pytest.raises(TrainingError, match=f'{file}.*delete it'):
        train(SHORT, tmp_path, progress=False)


def test_a_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    torch.save({'settings': Evil()}, tmp_path/'checkpoint.pt')
    with pytest.raises(TrainingError):
        train(SHORT, tmp_path, progress=False)
    assert not (tmp_path/'executed').exists()


@pytest.mark.parametrize('other', [nn.Linear(3, 4), nn.Linear(2, 2),
                                   nn.Sequential(nn.Linear(3, 2))])
def test_weights_of_another_model_are_refused(tmp_path, other):
    save_weights(tmp_path/'w', nn.Linear(3, 2), '')
    with pytest.raises(TrainingError, match='does not fit'):
        load_weights(tmp_path/'w', other)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'):
        train(SHORT, tmp_path, progress=False, every=1000)
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def poisoned(model, x, step):
    terms = elbo(model, x, step)
    return terms._replace(loss=terms.loss*float('nan')) if step == 13 else terms

def test_nan_stops_training_and_keeps_the_last_good_checkpoint(tmp_path):
    model = build(SHORT)
    with pytest.raises(TrainingError, match='nan at step 13.*smaller learning rate.*checkpoint.pt'):
        fit(model, poisoned, load('digits').x, 30, folder=tmp_path, every=5, progress=False)
    state = torch.load(tmp_path/'checkpoint.pt', weights_only=True)
    assert state['step'] == 10 and all(v.isfinite().all() for v in state['model'].values())
    assert all(p.isfinite().all() for p in model.parameters())


def test_minibatches_cover_every_epoch_once():
    it = minibatches(100, 10, seed=3)
    epochs = [torch.cat([next(it) for _ in range(10)]) for _ in range(3)]
    assert all(e.sort().values.equal(torch.arange(100)) for e in epochs)
    assert not epochs[0].equal(epochs[1])


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(TrainingError, match='200 does not fit into 100'):
        next(minibatches(100, 200, 0))


@pytest.mark.parametrize('name, n', [('every', 0), ('log', 0), ('batch', None), ('batch', 2.5),
                                     ('steps', 1.5), ('steps', -1), ('every', True)])
def test_numbers_that_are_no_integers_are_named(name, n):
    with pytest.raises(TrainingError, match=f'^{name} = {n}: it should be an integer of'):
        fit(build(SHORT), elbo, load('digits').x[:64], **{'steps': 2, 'batch': 16, name: n})


def test_curves_are_means_over_the_steps_between(tmp_path):
    seen = []
    def watched(model, x, step):
        seen.append(elbo(model, x, step))
        return seen[-1]
    curves = fit(build(SHORT), watched, load('digits').x, 10, log=5, progress=False)
    assert curves.step.tolist() == [5, 10]
    torch.testing.assert_close(curves.loss[1], sum(t.loss.item() for t in seen[5:])/5)
    torch.testing.assert_close(curves.kl_z3[0], sum(t.kl_z[:, 3].mean().item() for t in seen[:5])/5)


def test_the_step_reaches_the_objective_and_the_schedule():
    steps, model = [], nn.Linear(1, 1)
    def watched(m, x, step):
        steps.append(step)
        loss = m(x).pow(2).mean()
        return Terms(loss, loss, loss[None, None], loss)
    optimisers = []
    def optimiser(p):
        optimisers.append(torch.optim.SGD(p, lr=.5))
        return optimisers[0]
    fit(model, watched, torch.rand(10, 1), 4, 5, optimiser, schedule=cosine, progress=False)
    assert steps == [0, 1, 2, 3]
    assert abs(optimisers[0].param_groups[0]['lr'] - cosine(.5, 3, 4)) < 1e-12
    assert cosine(.5, 0, 4) == .5 and cosine(.5, 4, 4) < 1e-12


def test_weight_decay_is_adam_s(tmp_path):
    decayed = train(preset('digits.entangled', steps=3, weight_decay=10, lr='1e-3'), tmp_path/'a',
                    progress=False)
    plain = train(preset('digits.entangled', steps=3, lr='1e-3'), tmp_path/'b', progress=False)
    assert sum(p.pow(2).sum()
               for p in decayed.parameters()) < sum(p.pow(2).sum() for p in plain.parameters())


@pytest.mark.parametrize('name, keys', [('mnist.disentangled', {'gamma', 'C_z', 'C_c', 'C_steps'}),
                                        ('mnist.entangled', set())])
def test_an_objective_gets_the_constants_it_asks_for(name, keys):
    assert set(objective(preset(name)).keywords) == keys


def test_identity_ignores_keys_at_their_defaults():
    assert 'beta' not in json.loads(identity(preset('mnist.entangled'), 0))
    assert json.loads(identity(preset('mnist.entangled', beta=2), 3))['seed'] == 3


def test_signals_are_noted_and_handlers_restored():
    before = signal.getsignal(signal.SIGINT)
    with noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(.01)
    assert noted == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is before


def still(model, x, step):
    "The bound at the most likely code: no noise, so that one process and two compute the same."
    if dist.is_initialized():
        assert len(x) == 8                                        # half of the batch
    q = model.posterior(x)
    rec, (kl_z, kl_c) = -model.log_likelihood(x, q.mode), kl(q)
    return Terms((rec + kl_z.sum(-1) + kl_c).mean(), rec, kl_z, kl_c)


def one_of_two(rank, port, runs, noise):
    """A process of `runs`, (folder, steps) each, that two share; `noise`: the usual objective, which
    draws codes."""
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    for n, (folder, steps) in enumerate(runs):
        torch.manual_seed(100*n + rank)                           # as different as new processes
        model = build(preset('digits.entangled', n_z=3, n_c=0))
        curves = fit(model, elbo if noise else still, load('digits').x, steps, 16, folder=folder,
                     every=4, log=2, progress=False)
        save_weights(folder/f'{rank}.safetensors', model, '')
        curves.to_csv(folder/f'{rank}.csv', index=False)
    dist.destroy_process_group()


def two(runs, noise=False):
    "What two processes leave in the folder of the last of `runs` that they share."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server()
    torch.multiprocessing.start_processes(one_of_two, (port, runs, noise), 2, start_method='forkserver')
    return results(runs[-1][0])


def results(folder):
    return [[(folder/f'{rank}.{kind}').read_bytes() for kind in ('safetensors', 'csv')]
            for rank in (0, 1)]


def test_two_processes_take_the_steps_of_one(tmp_path):
    first, second = two([(tmp_path, 8)])
    assert first == second
    alone = build(preset('digits.entangled', n_z=3, n_c=0))
    curves = fit(alone, still, load('digits').x, 8, 16, log=2, progress=False)
    shared, _ = read_weights(tmp_path/'0.safetensors')
    torch.testing.assert_close(shared, dict(alone.state_dict()), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(pd.read_csv(tmp_path/'0.csv').values),
                               torch.tensor(curves.values), rtol=1e-5, atol=1e-5)


def test_two_processes_draw_different_noise_and_resume_to_the_same_bytes(tmp_path):
    runs = [(tmp_path/'straight', 8), (tmp_path/'stopped', 4), (tmp_path/'stopped', 8)]
    assert two(runs, noise=True) == results(tmp_path/'straight')
    state = torch.load(tmp_path/'stopped'/'checkpoint.pt', weights_only=True)
    first, second = (s['random']['cpu'] for s in state['each'])
    assert not torch.equal(first, second)
    with pytest.raises(TrainingError, match='left by 2 processes, this run has 1'):
        fit(build(preset('digits.entangled', n_z=3, n_c=0)), elbo, load('digits').x, 9, 16,
            folder=tmp_path/'stopped', progress=False)


@pytest.fixture
def shelf(tmp_path):
    "A shelf of shipped weights with one model on it."
    save_weights(tmp_path/'run'/'weights.safetensors', build(SHIPPED, seed=2), identity(SHIPPED, 2))
    ship(tmp_path/'run', 'digits/entangled', 2, tmp_path/'shelf')
    return tmp_path/'shelf'

SHIPPED = preset('digits.entangled')


def test_shipped_weights_come_back_as_they_went(shelf):
    model = pretrained('digits/entangled', 2, shelf)
    torch.testing.assert_close(dict(model.state_dict()), dict(build(SHIPPED, seed=2).state_dict()),
                               rtol=0, atol=0)
    assert not model.training
    subprocess.run(['sha256sum', '--check', '--quiet', 'SHA256SUMS'], cwd=shelf, check=True)


@pytest.mark.parametrize('spoil, words', [
    (lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])),
     'missing or damaged'),
    (lambda f: f.unlink(), 'missing or damaged'),
    (lambda f: (f.parents[2]/'SHA256SUMS').unlink(), 'No weights are shipped'),
    (lambda f: (save_weights(f.parent/'weights.safetensors', build(SHIPPED), identity(SHIPPED, 0)),
                ship(f.parent, 'digits/entangled', 2, f.parents[2])), 'other settings'),
])
def test_wrong_weights_are_refused(shelf, spoil, words):
    spoil(shelf/'digits'/'entangled'/'seed2.safetensors')
    with pytest.raises(TrainingError, match=words):
        pretrained('digits/entangled', 2, shelf)


def test_every_shipped_file_has_its_hash_and_nothing_else_is_shipped():
    files = {str(f.relative_to(WEIGHTS)) for f in WEIGHTS.rglob('*.safetensors')}
    assert files == set(hashes())
    assert sum((WEIGHTS/f).stat().st_size for f in files
               if f.startswith(('mnist/disentangled/', 'mnist/entangled/',
                                'mnist/entangled_wd/'))) <= 24e6
    assert sum((WEIGHTS/f).stat().st_size for f in files) <= 68e6
    assert all((WEIGHTS/f).stat().st_size <= 2e6 for f in files if f.startswith('dsprites'))
    for f in files:
        name, seed = f.removesuffix('.safetensors').rsplit('/seed', 1)
        shipped(name, int(seed))


@pytest.mark.parametrize('kind, constants', [('beta', {'beta': 4}),
                                             ('capacity', {'gamma': 10, 'C_z': 5}),
                                             ('tc', {'beta': 6, 'n_data': 1500}),
                                             ('factor', {'gamma': 6})])
def test_every_objective_trains_and_comes_back(tmp_path, kind, constants):
    p = preset('digits.entangled', objective=kind, steps=4, batch=16, **constants)
    model = train(p, tmp_path, progress=False)
    untrained = build(p)
    assert not torch.equal(model.encoder[0].weight, untrained.encoder[0].weight)
    if kind == 'factor':
        assert not torch.equal(*(next(m.discriminator.parameters()) for m in (model, untrained)))
    torch.testing.assert_close(dict(train(p, tmp_path).state_dict()), dict(model.state_dict()),
                               rtol=0, atol=0)


EXPLORED = preset('study.explored_codes').models

@pytest.mark.parametrize('name', EXPLORED)
def test_every_explored_code_trains_and_comes_back(tmp_path, name):
    p = preset(name, data='digits', steps=4, C_steps=2, batch=16)
    model, x = train(p, tmp_path, progress=False), pixels(load('digits').x[:20])
    untrained, G = build(p), p.categoricals
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), untrained.parameters()))
    again = train(p, tmp_path)
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    kl_z, kl_c = kl(model.posterior(x))
    assert kl_z.shape == (20, p.n_z) and (kl_c <= G*math.log(p.n_c) + 1e-4).all()
    assert torch.equal(again(x), model.decode(model.posterior(x).mode))
    curves = training.averages(objective(p)(model, x, 2))
    assert sum(name.startswith('kl_z') for name in curves) == p.n_z


def test_the_explored_codes_carry_about_as_many_nats():
    for p in map(preset, EXPLORED):
        most = p.categoricals*math.log(p.n_c)
        assert 7.1 < most + (p.C_z if p.code == 'concrete' else 0) < 7.35


def test_the_codes_of_other_presets_are_no_part_of_their_identity():
    for name in (n for n in read_settings() if n.startswith(('mnist.', 'dsprites.', 'faces.'))):
        keys = {'categoricals', 'code'} & {*json.loads(identity(preset(name), 0))}
        assert bool(keys) == (name in ('mnist.three', 'mnist.fsq'))


@pytest.mark.parametrize('capability, half',
                         [('avx512_bf16', torch.bfloat16), ('amx_bf16', torch.bfloat16),
                          ('avx512_f', torch.float32), ('avx2', torch.float32)])
def test_half_the_bits_only_where_the_processor_has_them(tmp_path, monkeypatch, capability, half):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {capability: True})
    assert (forward_dtype('float32'), forward_dtype('bfloat16'),
            forward_dtype('bfloat16', 'cuda')) == (torch.float32, half, torch.bfloat16)
    p = preset('digits.entangled', steps=3, batch=16)
    weights = [[*train(p.model_copy(update={'precision': k}), tmp_path/k,
                       progress=False).parameters()] for k in ('float32', 'bfloat16')]
    assert all(map(torch.equal, *weights)) == (half == torch.float32)
    record = json.loads((tmp_path/'bfloat16'/'run.json').read_text())
    assert record['precision'] == str(half).removeprefix('torch.')


@pytest.mark.parametrize('context', [nullcontext, partial(torch.autocast, 'cpu', torch.bfloat16),
                                     partial(torch.autocast, 'cpu', enabled=False)])
def test_half_the_bits_are_those_of_the_weights_of_the_step(context):
    """torch keeps halved weights until the outermost autocast ends: a training within one
    does not go on with those of its first step."""
    x = torch.rand(64, 6)
    def squares(model, batch, step):
        loss = (model(batch) - 1).float().square().sum(1)
        return Terms(loss.mean(), loss, loss[:, None], loss)
    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    ours, by_hand = fresh(), fresh()
    with context():
        fit(ours, squares, x, 20, 16, partial(SGD, lr=.01), precision=torch.bfloat16, progress=False)
    opt = SGD(by_hand.parameters(), lr=.01)
    for i in islice(minibatches(64, 16, 0), 20):
        with torch.autocast('cpu', torch.bfloat16):
            loss = squares(by_hand, x[i], 0).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert all(map(torch.equal, ours.parameters(), by_hand.parameters()))


def test_a_dead_layer_is_seen():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*4, 2), nn.ReLU())
    x = torch.rand(10, 1, 4, 4)
    assert min(alive(net, x)) > 0 and len(alive(net, x)) == 2
    with torch.no_grad():
        net[0].bias.fill_(-100)
    assert alive(net, x)[0] == 0


@pytest.mark.parametrize('quiet, silent, is_dead',
                         [(False, False, False), (True, False, True), (False, True, True)])
def test_a_training_is_dead_if_a_layer_is_or_if_its_code_is_silent(quiet, silent, is_dead):
    """`quiet`: the second layer never fires, though the code, from a bias, is far from the
    prior. `silent`: the code is the prior's."""
    m, x = build(preset('digits.entangled')), torch.rand(8, 1, 32, 32)
    last, second = m.encoder[-1], [k for k in m.encoder if isinstance(k, nn.Conv2d)][1]
    last.bias.data[0] = 2.
    if quiet:
        second.weight.data.zero_()
        second.bias.data.fill_(-1)
    if silent:
        last.weight.data.zero_()
        last.bias.data.zero_()
    assert dead(m, x) == is_dead


def test_a_rounded_code_that_is_the_same_for_all_images_is_dead(digits):
    model = build(preset('mnist.fsq'))
    model.encoder[-1].norm.running_mean.copy_(model.encoder[:-1](digits).mean(0).detach())
    assert not dead(model, digits)
    model.encoder[-1].norm.running_mean.fill_(9)
    assert dead(model, digits) and kl(model.posterior(digits))[1].min() > 7


def test_every_shipped_encoder_is_alive():
    x = torch.rand(20, 1, 32, 32)
    names = [f.split('/') for f in hashes() if f.startswith('mnist/')]
    assert len([f for _, *f in names if not f[0].startswith('arm_')]) == 15
    for kind, name, file in names:
        seed = int(file.removesuffix('.safetensors').removeprefix('seed'))
        assert min(alive(pretrained(f'{kind}/{name}', seed).encoder, x)) > 0, (name, file)


def test_a_slow_start_ends_after_a_twentieth_and_is_cosine_from_there():
    rates = [warm(1., i, 1000) for i in range(1000)]
    assert rates[0] == 1/50 and rates[24] < .5 + 1e-9
    assert all(r == cosine(1., i, 1000) for i, r in enumerate(rates) if i >= 49)
    assert max(rates) > .99


def test_a_learning_curve_says_whether_its_weights_are_the_shipped_bytes(tmp_path):
    run = tmp_path/'train.full'/'mnist.entangled'/'seed0'
    run.mkdir(parents=True)
    shutil.copy(shipped('mnist/entangled', 0), run/'weights.safetensors')
    pd.DataFrame({'step': [100, 500, 600], 'rec': [4., 2, 9], 'kl_z0': [1., 1, 0],
                  'kl_z1': [0., 2, 5], 'kl_c': [0., 1, 2]}).to_csv(run/'curves.csv')
    table = publish_curves(tmp_path, ('mnist.entangled',), folder=tmp_path)
    assert table[['step', 'rec', 'kl_z', 'kl_c',
                  'seed']].values.tolist() == [[500, 3, 2, .5, 0], [1000, 9, 5, 2, 0]]
    assert '"shipped_bytes": {"mnist.entangled": true}' in (tmp_path/'curves.csv').read_text()
    save_weights(run/'weights.safetensors', pretrained('mnist/entangled', 1),
                 identity(preset('mnist.entangled'), 0))
    assert learning_curve('mnist.entangled', 0, tmp_path)[1] is False


# ------------------------------------------------------------------ divergence
def endless(model, x, step):
    terms = elbo(model, x, step)
    return terms._replace(loss=terms.loss*float('inf')) if step == 3 else terms

def test_an_infinite_loss_stops_training_before_anything_is_changed():
    one, two = build(SHORT), build(SHORT)
    with pytest.raises(TrainingError, match='The loss is inf at step 3: training diverged'):
        fit(one, endless, load('digits').x, 9, progress=False)
    fit(two, elbo, load('digits').x, 3, progress=False)
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize('n_c, lr', [(0, '1e30'), (10, '1e10'), (10, '1e20')])
def test_every_divergence_is_a_training_error_that_names_no_absent_file(tmp_path, n_c, lr):
    with pytest.raises(TrainingError, match='diverged. Try a smaller learning rate.$'):
        train(preset('digits.entangled', steps=20, batch=16, n_c=n_c, lr=lr), tmp_path/'run',
              progress=False)
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('steps, every, found', [(1, 9, []), (8, 4, ['checkpoint.pt'])])
def test_weights_that_are_no_numbers_are_not_kept(tmp_path, monkeypatch, steps, every, found):
    class Broken(Adam):
        def step(self, closure=None):
            self.taken = getattr(self, 'taken', 0) + 1
            if self.taken == steps:
                self.param_groups[0]['params'][0].data.view(-1)[0] = float('nan')
            else:
                super().step(closure)
    monkeypatch.setattr(training, 'Adam', lambda parameters, fused, **kw: Broken(parameters, **kw))
    p = preset('digits.entangled', steps=steps, batch=16)
    with pytest.raises(TrainingError,
                       match=f'The weights are not finite at step {steps - 1}: training diverged'):
        train(p, tmp_path/'run', progress=False, every=every)
    assert [f.name for f in (tmp_path/'run').glob('*')] == found
    if found:
        assert torch.load(tmp_path/'run'/'checkpoint.pt', weights_only=True)['step'] == 4


def test_a_value_error_of_an_objective_is_its_own(tmp_path):
    def objective(model, x, step): raise ValueError('mine')
    with pytest.raises(ValueError, match='mine'):
        fit(build(SHORT), objective, load('digits').x, 3, progress=False)


# ------------------------------------------------------------------ order, curves, data
def test_epochs_are_different_permutations_and_no_seed_has_those_of_another_shifted():
    orders = [[next(minibatches(50, 50, seed, epoch)).tolist() for epoch in range(6)]
              for seed in range(3)]
    assert all(len({*map(tuple, o)}) == 6 and sorted(o[0]) == [*range(50)] for o in orders)
    assert orders[0][1] != orders[1][0] and orders[0][2:] != orders[1][1:5]
    # torch looks at 32 bits of a seed; the bytes of the shipped models depend on it
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize('stop', [0, 1, 3, 4, 6])
def test_no_row_of_the_curves_is_lost_on_resume(tmp_path, monkeypatch, stop):
    x, whole = load('digits').x, dict(log=4, progress=False, batch=16)
    want = fit(build(SHORT), elbo, x, 12, **whole)
    with monkeypatch.context() as m:
        m.setattr(training, 'advance', stopping_at(stop))
        with pytest.raises(KeyboardInterrupt):
            fit(build(SHORT), elbo, x, 12, folder=tmp_path, **whole)
    pd.testing.assert_frame_equal(fit(build(SHORT), elbo, x, 12, folder=tmp_path, **whole), want,
                                  check_exact=True)


TINY = preset('digits.entangled', steps=4, batch=16)

def test_a_model_of_other_images_is_not_returned(tmp_path):
    x = load('digits').x
    for data in (x[:200], None):
        train(TINY, tmp_path/str(data is None), data=data, progress=False)
    for folder, others in (('False', (255 - x[:200], x[:199], x[:200].flip(0), x, None)),
                           ('True', (x[:200], 255 - x))):
        for other in others:
            with pytest.raises(TrainingError, match='other settings or images.*delete it'):
                train(TINY, tmp_path/folder, data=other, progress=False)
    assert torch.equal(*(train(TINY, tmp_path/'False', data=d, progress=False).encoder[0].weight
                         for d in (x[:200], x[:200].clone())))


def test_a_run_on_other_images_is_not_continued(tmp_path, monkeypatch):
    x = load('digits').x
    def stopped(data):
        with monkeypatch.context() as m:
            m.setattr(training, 'advance', stopping_at(2))
            fit(build(TINY), elbo, data, 9, folder=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        stopped(x)
    for other in (255 - x, x[:200]):
        with pytest.raises(TrainingError, match='unfinished run on other data'):
            fit(build(TINY), elbo, other, 9, folder=tmp_path, progress=False)
    assert len(fit(build(TINY), elbo, x.clone(), 9, folder=tmp_path, log=9, progress=False)) == 1


def test_a_set_s_own_images_need_no_mention(tmp_path):
    train(TINY, tmp_path/'a', progress=False)
    train(TINY, tmp_path/'b', data=load('digits').x, progress=False)
    train(TINY, tmp_path/'c', data=load('digits').x.numpy(), progress=False)
    assert contents(tmp_path/'a') == contents(tmp_path/'b') == contents(tmp_path/'c')
    assert read_weights(tmp_path/'a'/'weights.safetensors')[1] == identity(TINY, 0)
    train(TINY, tmp_path/'a', data=load('digits').x, progress=False)


def test_other_pictures_in_a_folder_are_other_data(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setenv('VAE_ROBUST_DATA', str(tmp_path/'store'))
    (tmp_path/'own').mkdir()
    def paint(shade):
        [Image.new('RGB', (64, 64), (shade, 9*i, 7)).save(tmp_path/'own'/f'{i:02}.png')
         for i in range(12)]
    p = preset('faces.entangled', data=f'faces:{tmp_path/"own"}', steps=2, batch=4)
    paint(10)
    train(p, tmp_path/'run', progress=False)
    train(p, tmp_path/'run', progress=False)
    paint(90)
    with pytest.raises(TrainingError, match='other settings or images'):
        train(p, tmp_path/'run', progress=False)


# ------------------------------------------------------------------ bytes are not believed
def flipped(data, i): return data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1:]

@pytest.fixture(scope='module')
def left(tmp_path_factory):
    """A folder with a finished run of TINY and one with a run that was stopped, and the finished
    files."""
    top, honest = tmp_path_factory.mktemp('left'), training.advance
    train(TINY, top/'done', progress=False)
    training.advance = stopping_at(2)
    try:
        train(TINY, top/'begun', progress=False)
    except KeyboardInterrupt:
        pass
    finally:
        training.advance = honest
    return top, contents(top/'done')

@pytest.mark.parametrize('folder, file', [('done', 'weights.safetensors'),
                                          ('begun', 'checkpoint.pt')])
def test_a_flipped_bit_is_noticed_or_harmless(left, tmp_path, folder, file):
    top, want = left
    whole = (top/folder/file).read_bytes()
    for i in range(7, len(whole), len(whole)//25):
        shutil.rmtree(tmp_path/'run', ignore_errors=True)
        shutil.copytree(top/folder, tmp_path/'run')
        (tmp_path/'run'/file).write_bytes(flipped(whole, i))
        try:
            train(TINY, tmp_path/'run', progress=False)
        except TrainingError as e:
            assert file in str(e) and 'elete' in str(e)
            continue
        assert contents(tmp_path/'run') == want


def test_a_record_that_is_damaged_says_nothing_of_the_weights(left, tmp_path):
    shutil.copytree(left[0]/'done', tmp_path/'run')
    for text in ('', '{', '[]', '{"sha256": 3}', '{"sha256": {}}'):
        (tmp_path/'run'/'run.json').write_text(text)
        train(TINY, tmp_path/'run', progress=False)
    (tmp_path/'run'/'run.json').unlink()
    train(TINY, tmp_path/'run', progress=False)


@pytest.mark.parametrize('state', [{}, {'step': 1}, [1], 3])
def test_a_file_of_somebody_else_is_no_checkpoint(tmp_path, state):
    torch.save(state, tmp_path/'checkpoint.pt')
    with pytest.raises(TrainingError, match='damaged: delete it'):
        train(TINY, tmp_path, progress=False)


def test_lines_of_the_sums_that_say_nothing_are_passed_over(shelf):
    sums, whole = shelf/'SHA256SUMS', hashes(shelf)
    text = sums.read_bytes()
    for odd in (b'\n' + text, text + b'\n\n', text + b'abc',
                b'# a comment of several words\n' + text, text + b'\xff\xff  x\n',
                text.replace(b'\n', b'\r\n')):
        sums.write_bytes(odd)
        assert hashes(shelf) == whole and pretrained('digits/entangled', 2, shelf)


def test_curves_that_are_damaged_are_named(tmp_path):
    run = tmp_path/'train.full'/'digits.entangled'/'seed0'
    run.mkdir(parents=True)
    save_weights(run/'weights.safetensors', build(SHIPPED), identity(SHIPPED, 0))
    for text in (None, '', 'step,rec\n1,2,3\n'):
        if text is not None:
            (run/'curves.csv').write_text(text)
        with pytest.raises(TrainingError, match='curves.csv is missing or damaged: delete'):
            learning_curve('digits.entangled', 0, tmp_path)


KILLED = '''
import os, pathlib, sys
from vae_robust.settings import preset
from vae_robust.training import train
write, unlink = pathlib.Path.write_bytes, pathlib.Path.unlink
'''
DEATHS = {'write': '''
def half(self, data):
    if 'checkpoint' not in self.name: return write(self, data)
    write(self, data[:99])
    os.kill(os.getpid(), 9)
pathlib.Path.write_bytes = half
''', 'unlink': '''
def before(self, **k):
    if self.name == 'checkpoint.pt': os.kill(os.getpid(), 9)
    return unlink(self, **k)
pathlib.Path.unlink = before
'''}
TRAINING = '''
tiny = preset('digits.entangled', steps=4, batch=16)
train(tiny, sys.argv[1], progress=False, every=3)
'''

@pytest.mark.parametrize('where', DEATHS)
def test_a_killed_run_leaves_nothing_for_ever(tmp_path, where):
    process = started(KILLED + DEATHS[where] + TRAINING, tmp_path)
    process.join()
    assert process.exitcode == -9
    assert len([*tmp_path.iterdir()]) in (1, 4)
    train(TINY, tmp_path, progress=False, every=3)
    assert {f.name for f in tmp_path.iterdir()} == {'weights.safetensors', 'curves.csv', 'run.json'}


# ------------------------------------------------------------------ presets that no model can have
@pytest.mark.parametrize('name, change, words', [
    ('digits.entangled', {'size': 48}, 'no such network: size must be a power of two'),
    ('digits.entangled', {'size': 33}, 'power of two'),
    ('digits.entangled', {'network': 'large', 'size': 128}, 'no such network'),
    ('digits.entangled', {'channels': 3},
     'images of data = digits have channels = 1, not 3'),
    ('digits.disentangled', {'n_c': 0}, 'joint needs a categorical'),
    ('mnist.tc', {'data': 'digits'},
     'n_data = 60000, but there are 1500 images in data = digits: set n_data = 1500'),
    ('mnist.tc', {'data': 'digits', 'batch': 1}, 'tc compares codes of one batch'),
    ('mnist.tc', {'data': 'digits', 'n_data': 10}, 'at most n_data'),
    ('mnist.factor', {'data': 'digits', 'batch': 3}, 'factor permutes'),
    ('digits.entangled', {'batch': 2000}, 'does not fit into 1500 images')])
def test_presets_that_cannot_work_are_refused_before_a_file_is_written(tmp_path, name, change, words):
    with pytest.raises((SettingsError, TrainingError), match=words) as e:
        train(preset(name, **{'steps': 2} | change), tmp_path/'run', progress=False)
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()


def test_networks_that_no_memory_holds(monkeypatch):
    def full(*_):
        raise RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory\nand a trace')
    monkeypatch.setattr(training, 'VAE', full)
    with pytest.raises(SettingsError,
                       match='do not fit into memory, with n_z = 10.*not enough memory.*$'):
        build(TINY)


@pytest.mark.parametrize('seed', [-1, 2**32, 10**14])
def test_seeds_that_torch_does_not_take(tmp_path, seed):
    with pytest.raises(SettingsError, match=f'seed = {seed}: it should be'):
        train(TINY, tmp_path/'run', seed, progress=False)


@pytest.mark.parametrize('change, words', [(lambda x: x/127.5 - 1, 'from -1 to 1'),
                                           (lambda x: (x - 33)/78, 'numbers from'),
                                           (lambda x: x, 'from 0 to 255'),
                                           (lambda x: (x > 127).byte(), 'all but black'),
                                           (lambda x: x/x, 'not finite'),
                                           (lambda x: x[0, 0], 'shape'),
                                           (lambda x: 'digits', 'not a str')])
def test_images_that_no_vae_can_learn_are_refused_at_every_door(tmp_path, change, words):
    x = change(load('digits').x[:200].float())
    with pytest.raises(TrainingError, match=words):
        train(TINY, tmp_path/'run', data=x, progress=False)
    with pytest.raises(TrainingError, match=words):
        fit(build(TINY), elbo, x, 2, 16, progress=False)


def test_images_of_another_kind_are_trained_on_as_what_they_are():
    x = load('digits').x[:200]
    def trained(data):
        fit(m := build(TINY), elbo, data, 2, 16, progress=False)
        return m.encoder[0].weight
    for same in (x.long(), x.numpy(), x[:, 0], x.float()/255, (x.float()/255).double()):
        assert torch.equal(trained(same), trained(x))
