"""Does a chapter notice when one of its formulas is wrong? Sixty formulas are broken,
one at a time, in a copy of the notebook's cell; the chapter is then run, small,
until a cell fails or ten more code cells have passed.

python tests/break_formulas.py                  all of them (make break)
python tests/break_formulas.py --chapter 07     those of one chapter
python tests/break_formulas.py --sample 6 --seed 1"""
import argparse, contextlib, io, json, os, random, signal, sys, tempfile, time, traceback
from importlib import import_module
from pathlib import Path

from forks import OTHERS, SETTINGS

ROOT = Path(__file__).parent.parent
WITHIN = 10  # code cells after the broken one; seconds
PATIENCE = 120
QUIET = SETTINGS | {'MPLBACKEND': 'Agg'}

MUTATIONS = [  # chapter, what stands in one of its cells, what is put there
    ('01', "x.float().div_(255)", "x.float().div_(256)"),
    ('01', "np.linalg.solve(np.stack([np.roll(v, 1, 0), v], 1)",
     "np.linalg.solve(np.stack([np.roll(v, -1, 0), v], 1)"),
    ('01', "return (.5 - d).clamp(0, 1)", "return (1 - d).clamp(0, 1)"),
    ('01', "(u*u + v*v - 1)/(2*torch.hypot(u/a, v/b))", "(u*u + v*v - 1)/torch.hypot(u/a, v/b)"),
    ('02', ".log() + top.squeeze(dim)", ".log()"),
    ('02', "return log_joint(z) - q.log_prob(z)", "return log_joint(z)"),
    ('02', "torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])",
     "torch.logsumexp(log_w, dim)"),
    ('02', "q*(log_joint - log_q), 0.)", "q*(log_joint + log_q), 0.)"),
    ('02', "return pi.log() + MultivariateNormal(mu, cov)",
     "return pi + MultivariateNormal(mu, cov)"),
    ('02', "return mixture_log_joint(x, pi, mu, cov).softmax(-1)",
     "return mixture_log_joint(x, pi, mu, cov).softmax(0)"),
    ('02', "r, d, d) / n[:, None, None]", "r, d, d) / (n[:, None, None] - 1)"),
    ('02', "W, s2.expand(len(W)))", "W, s2.sqrt().expand(len(W)))"),
    ('02', "return x @ W @ M_inv, s2*M_inv", "return x @ W @ M_inv, M_inv"),
    ('02', "pow(2).sum(-1) + ((W @ C)*W).sum()", "pow(2).sum(-1)"),
    ('02', "C + m.T @ m / len(x)", "m.T @ m / len(x)"),
    ('03', "weight = f(z).detach() - baseline", "weight = (f(z).detach() - baseline)/2"),
    ('03', "2*mean*h + b**2 + 2*H**2 @ S", "2*mean*h + b**2 + H**2 @ S"),
    ('03', "return a + (h @ S)/2 + S*h", "return a + (h @ S)/2"),
    ('03', "return (f.sum(0) - f) / (len(f) - 1)", "return f.sum(0) / len(f)"),
    ('03', "torch.autograd.grad(f(q.rsample()).sum(), phi",
     "torch.autograd.grad(f(q.rsample()).sum()/2, phi"),
    ('03', "return H**2 @ sigma**2", "return H**2 @ sigma"),
    ('03', "weight = (f(z) - h(z)).detach()", "weight = f(z).detach()"),
    ('03', "return (log_lik.mean(0) - kl).mean()", "return (log_lik.sum(0) - kl).mean()"),
    ('03', "(N - M)/(N - 1)", "(N - M)/N"),
    ('03', "- (1 - 1/N)*V_noise/S, V_noise", ", V_noise"),
    ('04', "return (torch.expm1(d) - d +", "return (torch.expm1(d) + d +"),
    ('04', "((mu - mu_p)*torch.exp(-lv_p/2))**2", "((mu - mu_p)*torch.exp(lv_p/2))**2"),
    ('04', "q.c.probs*(logits + math.log", "q.c.probs*(logits - math.log"),
    ('04', "RelaxedOneHotCategorical(self.tau, logits=self.c.logits",
     "RelaxedOneHotCategorical(self.tau, logits=-self.c.logits"),
    ('04', "return torch.cat([d.mode.flatten(1) for d",
     "return torch.cat([d.sample().flatten(1) for d"),
    ('04', "torch.special.entr(x) + torch.special.entr(1 - x)", "torch.special.entr(x)"),
    ('04', "Normal(logits.sigmoid(), 1.,", "Normal(logits.sigmoid(), .5,"),
    ('04', "Normal(mu, (lv/2).exp(), validate_args=False), c, self.tau)",
     "Normal(mu, lv.exp(), validate_args=False), c, self.tau)"),
    ('04', "return Terms((rec + kl_z.sum(-1) + kl_c).mean(), rec, kl_z, kl_c)",
     "return Terms((rec + kl_z.mean(-1) + kl_c).mean(), rec, kl_z, kl_c)"),
    ('04', "(log_density(Normal(0., 1.), z) - log_density(q.z, z)).sum(-1)",
     "(log_density(Normal(0., 1.), z) + log_density(q.z, z)).sum(-1)"),
    ('04', "log_w - log_q.shape[-1]*math.log(c.shape[-1]) - log_q.sum(-1)",
     "log_w + log_q.shape[-1]*math.log(c.shape[-1]) + log_q.sum(-1)"),
    ('05', "return -E.clamp_min(torch.finfo(E.dtype).tiny).log()", "return -E.log()"),
    ('05', "F.one_hot((logits + gumbel(logits)).argmax(-1)",
     "F.one_hot((logits + torch.randn_like(logits)).argmax(-1)"),
    ('05', "((logits + gumbel(logits))/tau).log_softmax(-1)",
     "((logits + gumbel(logits))*tau).log_softmax(-1)"),
    ('05', "math.lgamma(K) + (K - 1)*math.log(tau)", "math.lgamma(K) + K*math.log(tau)"),
    ('05', "c + (z - z.detach())", "(c + z) - z.detach()"),
    ('05', "return math.log(logits.shape[-1]) + (log_q.exp()*log_q).sum(-1)",
     "return math.log(logits.shape[-1]) - (log_q.exp()*log_q).sum(-1)"),
    ('05', "- concrete_log_density(log_z, prior_logits, tau)\n    return",
     "+ concrete_log_density(log_z, prior_logits, tau)\n    return"),
    ('05', "K*h*integrand.sum(-1) - l.sum((-1, -2))", "h*integrand.sum(-1) - l.sum((-1, -2))"),
    ('06', "(rec + beta*(kl_z.sum(-1) + kl_c)).mean()", "(rec + beta*kl_z.sum(-1) + kl_c).mean()"),
    ('06', "(variances/level).clamp_min(1).log()/2,", "(variances/level).clamp_min(1).log(),"),
    ('06', "return C*at_most(1, step/steps)", "return C*step/steps"),
    ('06', "gamma*(kl_z.sum(-1).mean() + kl_c.mean() - ramp(C_z, step, C_steps)).abs()\n",
     "gamma*(kl_z.sum(-1) + kl_c - ramp(C_z, step, C_steps)).abs().mean()\n"),
    ('07', "kl_z.sum(-1).mean() - ramp(C_z, step, C_steps)\n    off_c = kl_c.mean() - at_most",
     "(kl_z.sum(-1) - ramp(C_z, step, C_steps)).abs().mean()\n    off_c = kl_c.mean() - at_most"),
    ('07', "at_most(most, ramp(C_c, step, C_steps))", "ramp(C_c, step, C_steps)"),
    ('07', "return n[linear_sum_assignment(n, maximize=True)].sum()/n.sum()",
     "return n.max(0).sum()/n.sum()"),
    ('08', "(log_diag - log_det)/2", "(log_det - log_diag)/2"),
    ('08', "return (log_w + pair.sum(-1)).logsumexp(1)",
     "return (log_w[..., None] + pair).sum(-1).logsumexp(1)"),
    ('08', "W[i, i] = 1/N", "W[:, 0] = 1/N"),
    ('08', "(rec + kl_z.sum(-1) + (beta - 1)*tc + kl_c).mean()",
     "(rec + kl_z.sum(-1) + beta*tc + kl_c).mean()"),
    ('08', "softplus(-d(z)).mean() + softplus(d(independent)).mean()",
     "softplus(d(z)).mean() + softplus(-d(independent)).mean()"),
    ('08', "z.gather(0, torch.rand_like(z).argsort(0))", "z[torch.randperm(len(z))]"),
    ('08', "fixed = {k: p.detach() for k, p in", "fixed = {k: p for k, p in"),
    ('08', "half, other = z.detach().chunk(2)", "half, other = z.chunk(2)"),
    ('12', "return kl_z.mean(0), kl_c.mean().item()", "return kl_z.sum(0), kl_c.mean().item()"),
]
EXCEPTIONS = {}  # right text -> why no cell can notice


def cells(chapter):
    "The sources of the code cells of a chapter, in order."
    nb = json.loads(next((ROOT/'nbs').glob(f'{chapter}_*.ipynb')).read_text())
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']


def where(chapter, right):
    "The index of the code cell in which `right` stands; ValueError unless it stands exactly once."
    found = [i for i, c in enumerate(cells(chapter)) for _ in range(c.count(right))]
    if len(found) != 1:
        raise ValueError(f'{right!r} stands {len(found)} times in chapter {chapter}')
    return found[0]


def perform(source, names):
    "Run a cell, without its output."
    import matplotlib.pyplot as plt
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(source, 'cell', 'exec'), names)
    plt.close('all')


def forked(f, *args):
    "What f(*args) returns (JSON), computed in a copy of this process; None if the copy dies."
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(r)
        try:
            os.write(w, json.dumps(f(*args)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(w)
    with os.fdopen(r) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def first_failure(sources, names):
    "Run cells until one fails: how many had passed, and the complaint; None if none does."
    def late(*_): raise TimeoutError('no end')
    signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    for i, source in enumerate(sources):
        try:
            perform(source, names)
        except Exception as e:
            return i, f'{type(e).__name__}: {" ".join(str(e).split())[:90]}'


def chapter(number, mutations):
    "Break the formulas of one chapter: a list of [right, wrong, [cells later, complaint] or None]."
    os.environ |= QUIET
    os.chdir(tempfile.mkdtemp())
    sys.path.insert(0, str(ROOT))
    sources, names, at, results = cells(number), {'__name__': '__main__'}, 0, []
    for right, wrong in sorted(mutations, key=lambda m: where(number, m[0])):
        i = where(number, right)
        for source in sources[at:i]:
            perform(source, names)
        at = i
        broken = [sources[i].replace(right, wrong), *sources[i + 1:i + 1 + WITHIN]]
        results.append([right, wrong, forked(first_failure, broken, names)])
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--chapter')
    p.add_argument('--sample', type=int)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    chosen = [m for m in MUTATIONS if args.chapter in (None, m[0])]
    if args.sample:
        chosen = random.Random(args.seed).sample(chosen, args.sample)
    noticed, start = 0, time.time()
    os.environ |= QUIET
    for name in OTHERS:  # once, for all chapters
        import_module(name)
    for number in sorted({c for c, *_ in chosen}):
        mine = [m[1:] for m in chosen if m[0] == number]
        results = forked(chapter, number, mine) or sys.exit(f'chapter {number} does not run')
        for right, wrong, failure in results:
            noticed += failure is not None
            what = (f'noticed {failure[0]:2} cells later  {failure[1]}'
                    if failure else 'NOT NOTICED  ' + EXCEPTIONS.get(right, ''))
            print(f'{number}  {right!r} -> {wrong!r}\n      {what}', flush=True)
    print(f'{noticed} of {len(chosen)} noticed within {WITHIN} cells, {time.time() - start:.0f} s')
    missed = len(chosen) - noticed
    sys.exit(missed > 3 if not args.sample else missed > 0)


if __name__ == '__main__':
    main()
