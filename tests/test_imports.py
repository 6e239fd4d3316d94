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


def test_importing_the_attacks_is_light():
    runs = [subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True)
            for _ in range(5)]
    found = [json.loads(run.stdout) for run in runs]
    assert not HEAVY & set(found[0][1])
    # torch takes some three seconds: a ratio, since a busy machine slows both
    assert min((c - b)/(b - a) for (a, b, c), _ in found) <= .12
