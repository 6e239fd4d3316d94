"""Attacks against other packages: `make bench` (see README). Each program attacks the encoder of
the shipped 'mnist/entangled' on the same (source, target) pairs, in a process of its own on one
thread; first each program's best batch is sought, then all are timed in turn. Medians and ratios
go to figures/bench_attacks.csv and .md, what `attack.strong` needs and reaches to
figures/bench_limits and bench_reach. `--full`: attack all pairs. What the attackers who know the
code cost goes to figures/bench_codes (`--codes`: that alone)."""
import resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import numpy as np, pandas as pd, torch
from torch import nn
from torch.optim import Adam
from torch.utils.flop_counter import FlopCounterMode

from bench import in_a_process, machine
from vae_robust.attacks import attack, verify
from vae_robust.objectives import features, norm
from vae_robust.optimisers import project
from vae_robust.data import load, pixels
from vae_robust.judges import pretrained_judge
from vae_robust.robustness import PORTION, attacked, pairs
from vae_robust.settings import preset, save_table
from vae_robust.training import forward_dtype, keep_memory, pretrained

BATCHES, REPEATS = (32, 64, 128, 256, 512), 5
SUITE, CODES = 540, ('latent_code', 'output_code', 'damage_code', 'judge_untargeted_code')
# FEW: for attacks of 1000 steps, and for all distances; ALL: more than there are
PAIRS, FEW, ALL = 1024, 128, 10**6
STRONG, FAST, THESIS = (preset(f'attack.{name}') for name in ('strong', 'fast', 'thesis'))
# STEP: the peers' constant step; of eps/4, 6, 8, 10, 13, 16, 20 best or nearly so
EPS, STEP = STRONG.eps, STRONG.eps/10


def ours(name, model, x, x_t, steps, batch, **changes):
    "Our `attack` by a preset."
    return attack(model, x, x_t, preset(name, steps=steps, **changes), batch, progress=False).x


def thesis_loop(model, x, x_t, steps, batch):
    """The thesis's program as a plain loop: the decoder runs along although nobody looks at its
    images, and gradients pile up."""
    xs, phi = [], features(model, THESIS.features)
    for a, b in zip(x.split(batch), x_t.split(batch)):
        target, start = phi(b), a + THESIS.noise*torch.randn(a.shape)
        a_s = start.clamp(0, 1).requires_grad_()
        optimiser = Adam([a_s], THESIS.step*EPS)
        for _ in range(steps):
            mu, _, logits = model.encode(a_s)
            code = torch.cat([mu, logits], -1)
            model.decode(code)
            (norm(code - target) + THESIS.lam*norm(a_s - a)).sum().backward()
            optimiser.step()
            with torch.no_grad():
                a_s.copy_(project(a_s, a, EPS))
        xs.append(a_s.detach())
    return torch.cat(xs)


class Scores(nn.Module):
    """The latent distance d to `target` as a classifier: images to the scores (d, 0).
    Cross-entropy toward class 1 is log(1 + e^d) and has the signs of d's gradient: a library's
    PGD, aimed at class 1, minimises d, without a line of it being changed."""
    def __init__(self, model):
        super().__init__()
        self.model, self.phi = model, features(model, STRONG.features)
    def forward(self, x):
        d = norm(self.phi(x) - self.target)
        return torch.stack([d, 0*d], 1)


def peer(make, model, x, x_t, steps, batch):
    "The PGD of another library: `make`: (scores, steps) to a function (images, labels) to images."
    scores, xs = Scores(model).eval(), []
    run = make(scores, steps)
    for a, b in zip(x.split(batch), x_t.split(batch)):
        scores.target = scores.phi(b)
        xs.append(run(a, torch.ones(len(a), dtype=torch.long)))
    return torch.cat(xs)


def foolbox(scores, steps):
    import foolbox
    from foolbox.criteria import TargetedMisclassification
    model = foolbox.PyTorchModel(scores, (0, 1), 'cpu')
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps, random_start=False)
    return lambda x, y: pgd(model, x, TargetedMisclassification(y), epsilons=EPS)[1]


def torchattacks(scores, steps):
    from torchattacks import PGD
    pgd = PGD(scores, EPS, STEP, steps, random_start=False)
    pgd.set_mode_targeted_by_label(quiet=True)
    return pgd


def art(scores, steps):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch as PGD
    from art.estimators.classification import PyTorchClassifier
    model = PyTorchClassifier(scores, nn.CrossEntropyLoss(), (1, 32, 32), 2, clip_values=(0, 1),
                              device_type='cpu')
    pgd = PGD(model, eps=EPS, eps_step=STEP, max_iter=steps, targeted=True, verbose=False,
              batch_size=max(BATCHES))
    return lambda x, y: torch.from_numpy(pgd.generate(x.numpy(), y.numpy()))


def cleverhans(scores, steps):
    from cleverhans.torch.attacks.projected_gradient_descent import (
        projected_gradient_descent as pgd)
    options = {'targeted': True, 'rand_init': False}
    return lambda x, y: pgd(scores, x, EPS, STEP, steps, np.inf, 0, 1, y, **options).detach()


PEERS = {f.__name__: partial(peer, f) for f in (foolbox, torchattacks, art, cleverhans)}
LONG = {  # attacks of THESIS.steps steps
    'attack.thesis': partial(ours, 'attack.thesis'),
    'attack.thesis_repaired': partial(ours, 'attack.thesis_repaired'),
    'attack.thesis_repaired, lam = 0': partial(ours, 'attack.thesis_repaired', lam=0),
    "the thesis's loop": thesis_loop}
PROGRAMS = {
    'attack.strong': partial(ours, 'attack.strong'),
    'attack.strong, bfloat16': partial(ours, 'attack.strong', precision='bfloat16'),
    'attack.fast': partial(ours, 'attack.fast')} | PEERS | LONG
STEPS = dict.fromkeys(PROGRAMS, STRONG.steps) | dict.fromkeys(LONG, THESIS.steps)
STEPS['attack.fast'] = FAST.steps


def prepare(name='mnist/entangled'):
    "A shipped model and the test images. Weights are frozen and memory is kept for everybody."
    torch.set_num_threads(1)
    keep_memory()
    return pretrained(name).requires_grad_(False), load('mnist', 'test')


def chosen(n):
    "The first `n` of all pairs in random order, (n, 2)."
    index = pairs(load('mnist', 'test').y, ALL)
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))][:n]


def sample(n, *name):
    "The model, and sources and targets of `chosen(n)`."
    model, test = prepare(*name)
    return model, *(pixels(test.x[i]) for i in chosen(n).T)


def distance(model, xs, x_t):
    "Mean latent distance of images to their targets."
    phi = features(model, STRONG.features)
    with torch.no_grad():
        return norm(phi(xs) - phi(x_t)).mean().item()


def measure(name, batch, n, steps):
    """Examples * steps per second of a program, after a warm-up, and the latent distance it
    reaches on the first `FEW` pairs."""
    (model, x, x_t), program = sample(n), PROGRAMS[name]
    program(model, x[:batch], x_t[:batch], 2, batch)
    began = time.perf_counter()
    xs = program(model, x, x_t, steps, batch)
    seconds = time.perf_counter() - began
    verify(xs, x, EPS)
    return n*steps/seconds, distance(model, xs[:FEW], x_t[:FEW])


def converge(n, steps):
    "The latent distance that `attack.strong` reaches in so many steps."
    model, x, x_t = sample(n)
    return [distance(model, ours('attack.strong', model, x, x_t, steps, 256), x_t)]


def reach(model, name):
    """The latent distance that a program reaches on the first `FEW` pairs of a shipped model,
    and the seconds it takes."""
    model, x, x_t = sample(FEW, f'mnist/{model}')
    began = time.perf_counter()
    xs = PROGRAMS[name](model, x, x_t, STEPS[name], FEW)
    return distance(model, xs, x_t), time.perf_counter() - began


def many(n, part, parts):
    """`attack.fast` on the pairs `chosen(n)[part::parts]`: their number, seconds, and the peak
    of this process's memory in MB."""
    (model, test), index = prepare(), chosen(n)[part::parts]
    began = time.perf_counter()
    for portion in index.split(PORTION):
        attacked(model, None, FAST, test, progress=False, index=portion)
    seconds, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return len(index), seconds, usage.ru_maxrss/2**10


def roof(n=2048, times=7):
    "GFLOP/s of the product of two float32 matrices (n, n): what this core can do."
    torch.set_num_threads(1)
    A, seconds = torch.rand(n, n), []
    for _ in range(times):
        began = time.perf_counter()
        A @ A
        seconds.append(time.perf_counter() - began)
    return [2*n**3/median(seconds)/1e9]


def work():
    """GFLOP of one step of `attack.strong` for one image: the encoder forwards and back to the
    image."""
    model, x, _ = sample(1)
    with FlopCounterMode(display=False) as counter:
        features(model, STRONG.features)(x.requires_grad_()).sum().backward()
    return [counter.get_total_flops()/1e9]


child = partial(in_a_process, script=__file__)


def compare():
    "The table of all programs."
    n = {name: FEW if name in LONG else PAIRS for name in PROGRAMS}
    speed = lambda name, batch: child('measure', name, batch, n[name], 20)[0]
    best = {name: max((b for b in BATCHES if b <= n[name]), key=partial(speed, name))
            for name in PROGRAMS}
    runs = [{name: child('measure', name, best[name], n[name], STEPS[name]) for name in PROGRAMS}
            for _ in range(REPEATS)]
    speeds, ends = pd.DataFrame(runs).map(lambda r: r[0]), pd.Series(runs[0]).map(lambda r: r[1])
    peers, seconds = [*PEERS], 1000*pd.Series(STEPS)/speeds
    # all of them attack
    assert ends[peers].max() < 1.01*ends[peers].min(), ends
    assert ends['attack.strong'] <= ends[peers].min(), ends
    fastest = speeds[peers].median().idxmax()
    gain = 1/seconds.div(seconds['attack.thesis_repaired'], axis=0)
    columns = {'best batch': pd.Series(best), 'steps': pd.Series(STEPS),
               'examples*steps/s': speeds.median(), 'lowest': speeds.min(), 'highest': speeds.max(),
               f'ratio to {fastest}': speeds.div(speeds[fastest], axis=0).median(),
               'mean latent distance': ends, 's for 1,000 pairs': seconds.median(),
               'times faster than attack.thesis_repaired': gain.median()}
    return pd.DataFrame(columns).rename_axis('program').reset_index()


def reached():
    """Of three models the latent distances that short attacks reach, and the thesis's 1000
    steps, repaired, with its weight and without."""
    names = ['attack.strong', 'attack.fast', 'attack.thesis_repaired',
             'attack.thesis_repaired, lam = 0']
    rows = []
    for m in ('disentangled', 'entangled', 'entangled_wd'):
        ends, seconds = zip(*(child('reach', m, name) for name in names))
        times_faster = {'attack.fast, times faster': seconds[2]/seconds[1]}
        rows.append({'model': m} | dict(zip(names, ends)) | times_faster)
    return pd.DataFrame(rows)


def limits(full):
    "What `attack.strong` reaches in how many steps, and what many pairs cost `attack.fast`."
    rows = {f'attack.strong, mean latent distance after {s} steps': child('converge', PAIRS, s)[0]
            for s in (5, 10, 20, 40, 80)}
    (_, _, low), (n, seconds, high) = child('many', 1000, 0, 1), child('many', 20_000, 0, 1)
    everything = len(chosen(ALL))
    minutes = f'attack.fast, minutes for {everything:,} pairs on two cores, extrapolated'
    rows |= {'attack.fast, peak memory in MB, 1,000 pairs': low, 'the same, 20,000 pairs': high,
             minutes: everything/n*seconds/2/60}
    if full:
        with ThreadPoolExecutor(2) as two:
            halves = [*two.map(lambda i: child('many', ALL, i, 2, core=i), range(2))]
        rows |= {'the same, measured': max(h[1] for h in halves)/60,
                 'the same, peak memory in MB of both processes': sum(h[2] for h in halves)}
    rows |= {'MFLOP of a step of attack.strong for one image': 1000*child('work')[0],
             'GFLOP/s of a product of float32 matrices on one core': child('roof')[0]}
    return pd.DataFrame(rows.items(), columns=['quantity', 'value'])


def cost(model, name, n):
    """Seconds of the processor that an attack on `n` pairs takes, and the passes per image, in
    the mean and at most."""
    net, x, x_t = sample(n, f'mnist/{model}')
    judge, p = pretrained_judge('judge/residual'), preset(f'attack.{name}')
    start = time.process_time()
    found = attack(net, x, None if p.goal == 'away' else x_t, p, judge=judge, progress=False)
    seconds, passes = time.process_time() - start, found.evaluations
    return seconds, passes.double().mean().item(), passes.max().item()


def codes():
    """What the attackers who know the code cost on `SUITE` pairs of one model, once each, beside
    the passes of `attack.strong`."""
    rows = [(m, f'attack.{a}', *child('cost', m, a, SUITE))
            for m in ('disentangled', 'entangled') for a in CODES]
    columns = ['model', 'attack', 'core-seconds', 'passes per image', 'at most']
    table = pd.DataFrame(rows, columns=columns)
    sums = table.groupby('model')['core-seconds'].sum()
    whole = pd.DataFrame({'model': sums.index, 'attack': 'all of them',
                          'core-seconds': sums.values})
    table = pd.concat([table, whole])
    return table.assign(**{'at most, of attack.strong': table['at most']/(STRONG.steps + 1)})


def main():
    tables = {'bench_codes': ('.1f', codes)}
    if '--codes' not in sys.argv:
        tables |= {'bench_attacks': ('.2f', compare),
                   'bench_limits': ('.3f', lambda: limits('--full' in sys.argv)),
                   'bench_reach': ('.2f', reached)}
    for name, (floatfmt, make) in tables.items():
        table = make()
        save_table(table, name, floatfmt=floatfmt, eps=EPS, pairs=PAIRS, few=FEW, repeats=REPEATS,
                   bfloat16_is=str(forward_dtype('bfloat16')), machine=machine())
        print(table.to_markdown(index=False, floatfmt=floatfmt), '\n')


if __name__ == '__main__':
    if sys.argv[1:] in ([], ['--full'], ['--codes']):
        main()
    else:
        print(*globals()[sys.argv[1]](*(int(a) if a.isdigit() else a for a in sys.argv[2:])))
