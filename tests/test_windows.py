"""The package on Windows. Elsewhere this is played: what Windows lacks is taken away, and what it
refuses is refused."""
import ast, os, subprocess, sys, traceback
from pathlib import Path

from vae_robust.settings import linked, settings_file

ROOT = Path(__file__).parent.parent

PLAYED = '''
import ctypes, fcntl, os, platform, signal, sys
import filelock, ipywidgets, joblib, matplotlib.pyplot, pandas, safetensors, scipy.stats
import sklearn.cluster, torch, torchvision, typer    # Windows has its own of these
from filelock import FileLock, Timeout

def opened(path, flags, *mode, do=os.open, **kw):
    if os.path.isdir(path): raise PermissionError(13, 'Permission denied', path)
    return do(path, flags, *mode, **kw)

def synced(fd, do=os.fsync):
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, 'Bad file descriptor')
    do(fd)

def killed(pid, number): raise SystemExit('CTRL_C_EVENT')
def library(name, do=ctypes.CDLL, **kw): return do(name.strip(), **kw)

class Kernel:  # all processes are at work but those with numbers over a million
    def OpenProcess(rights, inherit, pid): return 1 + (pid > 1_000_000)
    def WaitForSingleObject(process, milliseconds): return 0x102 if process == 1 else 0
    def CloseHandle(process): pass

os.open, os.fsync, os.kill, ctypes.CDLL = opened, synced, killed, library
platform.libc_ver = lambda: ('', '')
ctypes.WinDLL = lambda name, **kw: Kernel
for name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'): sys.modules[name] = None
for name in ('SIGALRM', 'SIGHUP', 'SIGKILL', 'SIGUSR1', 'alarm', 'setitimer'):
    vars(signal).pop(name, None)
for name in ('fork', 'getuid', 'killpg', 'posix_fallocate', 'sched_getaffinity', 'sysconf'):
    vars(os).pop(name, None)
sys.platform = 'win32'
'''

ASKED = '''
import importlib, pandas as pd, pkgutil, sys, vae_robust
from pathlib import Path
for m in pkgutil.walk_packages(vae_robust.__path__, 'vae_robust.'):
    importlib.import_module(m.name)
from vae_robust.cli import home_of
from vae_robust.settings import temporary, write
from vae_robust.sweep import sweep
from vae_robust.training import keep_memory

keep_memory()
folder = Path(sys.argv[1], home_of('mnist.entangled', ['lr=1/3'], None))
here = temporary(folder/'a')
gone = here.with_name(here.name.rpartition('.')[0] + '.99999999-1')
folder.mkdir()
gone.touch()
here.touch()
write(folder/'c', 'whole')
assert not gone.exists() and here.exists() and (folder/'c').read_text() == 'whole'
answer = lambda cell: pd.DataFrame({'m': [cell['n']]})
table = sweep([{'n': n} for n in range(2)], answer, folder, progress=False, jobs=1)
assert table.m.tolist() == [0, 1]
assert not set(':*?"<>|') & set(folder.name)
(folder.parent/'end').touch()
'''


def played(code, *words):
    """What a process that runs `code` says on its end: '' or a traceback. Where there is `fork`,
    it has the libraries already, but not this package."""
    if sys.platform == 'win32':
        return subprocess.run([sys.executable, '-c', code, *words], cwd=ROOT, capture_output=True,
                              text=True).stderr
    read, write = os.pipe()
    if not (child := os.fork()):
        for name in [n for n in sys.modules if n.split('.')[0] == 'vae_robust']:
            del sys.modules[name]
        sys.argv, sys.meta_path[:] = ['', *words], [f for f in sys.meta_path if not is_hook(f)]
        try:
            exec(compile(code, 'played', 'exec'), {})
        except BaseException:
            os.write(write, traceback.format_exc()[-2000:].encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as said:
        return said.read()


def is_hook(finder): return 'jaxtyping' in type(finder).__module__

def test_the_package_imports_writes_and_locks(tmp_path):
    code = (PLAYED if sys.platform != 'win32' else '') + ASKED
    assert played(code, str(tmp_path)) == '' and (tmp_path/'end').exists()


def says_no_encoding(call):
    "Whether a call reads or writes text in whatever encoding the system has."
    name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
    if 'encoding' in {k.arg for k in call.keywords}: return False
    if name in ('read_text', 'write_text'): return True
    modes = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
    return isinstance(call.func, ast.Name) and name == 'open' and not any('b' in m for m in modes)


def told(source): return [c for c in ast.walk(ast.parse(source))
                          if isinstance(c, ast.Call) and says_no_encoding(c)]


def test_text_is_utf_8_whatever_the_system_has():
    for f in (ROOT/'vae_robust').rglob('*.py'):
        assert [c.lineno for c in told(f.read_text(encoding='utf-8'))] == [], f.name
    wrong = "open(p)", "open(p, 'a')", "p.read_text()", "p.write_text(t)"
    right = "open(p, 'rb')", "p.read_text(encoding='utf-8')", "z.open('a')", "open(p, encoding='utf-8')"
    assert all(map(told, wrong)) and not any(map(told, right))


def test_a_link_that_git_wrote_as_text_is_followed(tmp_path):
    (tmp_path/'vae_robust').mkdir()
    (tmp_path/'vae_robust'/'settings.ini').write_text('../settings.ini')
    (tmp_path/'settings.ini').write_text('[a]\n')
    assert linked(tmp_path/'vae_robust'/'settings.ini').read_text() == '[a]\n'
    assert linked(settings_file()) == settings_file()
