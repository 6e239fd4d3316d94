"""Speed against other packages: `make bench` (see README). One process per program and repeat,
interleaved, each on one thread; medians and ratios go to figures/bench_training.csv and .md.
Peers are installed into .bench/, which the project does not need otherwise."""
import os, platform, subprocess, sys, tempfile, time
from functools import partial

import pandas as pd, torch
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset

from vae_robust.data import load, pixels
from vae_robust.settings import preset, save_table
from vae_robust.training import build, fit, keep_memory
from vae_robust.vae import elbo

BATCH, STEPS, WARM_UP, REPEATS = 64, 200, 30, 5
# Ten Gaussian latents and the thesis's networks, for everybody.
PRESET = preset('mnist.entangled', n_c=0, lr=1e-3)


def ours(precision, tuned=True):
    "Our `fit`."
    if tuned:
        keep_memory()
    model, x = build(PRESET), load('mnist').x
    go = lambda steps: fit(model, elbo, x, steps, BATCH, partial(Adam, lr=PRESET.lr, fused=True),
                           precision=precision, progress=False)
    return go


def compiled():
    "Our `fit` with the networks compiled."
    keep_memory()
    model, x = build(PRESET), load('mnist').x
    model.encoder.compile()
    model.decoder.compile()
    return lambda steps: fit(model, elbo, x, steps, BATCH, partial(Adam, lr=PRESET.lr, fused=True),
                             progress=False)


class Images(Dataset):
    """28 x 28 bytes through PIL: resized and turned into a tensor one by one, whenever they are
    asked for."""
    def __init__(self):
        from torchvision import transforms
        self.x = load('mnist', size=28).x[:, 0].numpy()
        self.transform = transforms.Compose([transforms.ToPILImage(), transforms.Resize((32, 32)),
                                             transforms.ToTensor()])
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.transform(self.x[i])


def loader(tuned=False):
    "The usual loop: a DataLoader that resizes each image with PIL, Adam as it comes."
    if tuned:
        keep_memory()
    model, data = build(PRESET), Images()
    optimiser = Adam(model.parameters(), PRESET.lr)
    def go(steps):
        for _, x in zip(range(steps), DataLoader(data, BATCH, shuffle=True, drop_last=True)):
            loss = elbo(model, x).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss.item()
    return go


def pythae(tuned=False):
    "pythae's VAE and BaseTrainer on the same networks, images in memory as floats."
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    if tuned:
        keep_memory()
    networks = build(PRESET)

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = networks.encoder
        def forward(self, x):
            return ModelOutput(**dict(zip(('embedding', 'log_covariance'),
                                          self.net(x).chunk(2, -1))))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = networks.decoder
        def forward(self, z): return ModelOutput(reconstruction=self.net(z).sigmoid())

    model = VAE(VAEConfig(input_dim=(1, 32, 32), latent_dim=10, reconstruction_loss='bce'),
                Encoder(), Decoder())
    x = pixels(load('mnist').x)
    def go(steps):
        data = x[:steps*BATCH]
        config = BaseTrainerConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH,
                                   num_epochs=1, learning_rate=PRESET.lr, no_cuda=True)
        trainer = BaseTrainer(model, BaseDataset(data, torch.zeros(len(data))),
                              training_config=config)
        trainer.prepare_training()
        trainer.train_step(1)
    return go


PROGRAMS = {
    'fit, float32': partial(ours, torch.float32),
    'fit, float32, compiled': compiled,
    'fit, bfloat16': partial(ours, torch.bfloat16),
    'fit, float32, allocator as it comes': partial(ours, torch.float32, False),
    'DataLoader + PIL': loader,
    'DataLoader + PIL, our allocator': partial(loader, True),
    'pythae': pythae,
    'pythae, our allocator': partial(pythae, True)}


def images_per_second(name):
    "Training images per second of a program, after a warm-up."
    torch.set_num_threads(1)
    go = PROGRAMS[name]()
    go(WARM_UP)
    began = time.perf_counter()
    go(STEPS)
    return STEPS*BATCH/(time.perf_counter() - began)


def waiting_share():
    "Share of a training step that is spent on getting the minibatch."
    from vae_robust.training import minibatches, take
    x, order = load('mnist').x, minibatches(60000, BATCH, 0)
    torch.set_num_threads(1)
    began = time.perf_counter()
    for _ in range(1000):
        take(x, next(order), 'cpu')
    return (time.perf_counter() - began)/1000


def machine(cores='one pinned core'):
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo')
                if l.startswith('model name')), platform.processor())
    return f'{cpu}, {cores} of {os.cpu_count()}, torch {torch.__version__}'


def in_a_process(*args, script=__file__, core=0):
    """The numbers in the last line that `script` prints for `args`, on one thread and one pinned
    core."""
    pin = ['taskset', '-c', str(core)] if platform.system() == 'Linux' else []
    run = subprocess.run([*pin, sys.executable, script, *map(str, args)], capture_output=True,
                         text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    if run.returncode: raise SystemExit(f'{args} failed:\n{run.stderr}')
    return [float(word) for word in run.stdout.splitlines()[-1].split()]


def main():
    speeds = pd.DataFrame([{name: in_a_process(name)[0] for name in PROGRAMS}
                           for _ in range(REPEATS)])
    table = pd.DataFrame({'program': speeds.columns, 'images/s': speeds.median().values,
                          'lowest': speeds.min().values, 'highest': speeds.max().values})
    table['ratio to DataLoader + PIL'] = (speeds.T/speeds['DataLoader + PIL']).T.median().values
    save_table(table, 'bench_training', batch=BATCH, steps=STEPS, repeats=REPEATS,
               machine=machine(), seconds_per_step_for_data=round(waiting_share(), 6))
    print(table.to_markdown(index=False, floatfmt='.2f'))


if __name__ == '__main__':
    if sys.argv[1:]:
        print(images_per_second(sys.argv[1]))
    else:
        main()
