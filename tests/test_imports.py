"The attacks are for other projects too: importing them is light."
import json, subprocess, sys

HEAVY = {'ipywidgets', 'matplotlib', 'pandas', 'sklearn'}
CODE = '''
import json, sys, time
times = [time.process_time()]
import torch
times.append(time.process_time())
import vae_robust.attacks
times.append(time.process_time())
print(json.dumps([times, sorted(sys.modules)]))
'''


def imported():
    "The share that the attacks add to the time for torch, and all modules that are there then."
    run = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True)
    (a, b, c), modules = json.loads(run.stdout)
    return (c - b)/(b - a), modules


def test_importing_the_attacks_is_light():
    runs = [imported()]
    assert not HEAVY & set(runs[0][1])
    # torch takes some three seconds: a ratio, since a busy machine slows both
    while min(share for share, _ in runs) > .12 and len(runs) < 5:
        runs.append(imported())
    assert min(share for share, _ in runs) <= .12
