"The attacks are for other projects too: importing them is light."
import json, subprocess, sys

HEAVY = {'ipywidgets', 'matplotlib', 'pandas', 'sklearn'}
CODE = '''
import json, sys, time, torch
began = time.process_time()
import vae_robust.attacks
print(json.dumps([time.process_time() - began, sorted(sys.modules)]))
'''


def test_importing_the_attacks_is_light():
    runs = [subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True)
            for _ in range(3)]
    found = [json.loads(run.stdout) for run in runs]
    assert not HEAVY & set(found[0][1])
    assert min(seconds for seconds, _ in found) <= .3
