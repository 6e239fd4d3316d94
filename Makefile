# make run    set up, then the main job: train or load the models, attack them, print the tables; what differs from figures/ goes to runs/
# make test   set up, then the tests           make lab     set up, then open the notebooks
# make test-all  the same with 1,000 draws of random attacks instead of 60 and the slow tests, then all broken formulas
# make export notebooks -> vae_robust/         make clean   remove what make made, except data and runs/
# make lint   export, then look for wide lines, unused names and other slips; `pre-commit install` does it at every commit
# make site   the notebooks as web pages, to be read without a network: _site/index.html
# make bench  speed against other packages, on an idle machine: tables in figures/
# make break  break sixty formulas, one at a time: does the chapter notice?
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready
JOB ?= job.main
# One thread for each process: two wait for each other where others hold a core (make bench).
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
PEERS = pythae==0.1.2 imageio==2.38.1 cloudpickle==3.1.2 \
	foolbox==3.3.4 eagerpy==0.30.0 GitPython==3.2.1 gitdb==4.0.12 smmap==5.0.3 \
	torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1 cleverhans==4.0.0

.PHONY: run test test-all lab export lint site bench break clean setup
.DEFAULT_GOAL := run

run: $(READY)
	$(BIN)/vae-robust reproduce --job $(JOB)

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-all: $(READY)
	VAE_ROBUST_DRAWS=1000 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
	$(BIN)/python tests/break_formulas.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

export: $(READY)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/fold.py
	@touch $(READY)  # nbdev writes pyproject.toml again, as it was: nothing is to be installed anew

lint: export
	$(BIN)/ruff check nbs tests tools

site: $(READY)
	$(BIN)/python tools/build_site.py

bench: .bench/.ready
	PYTHONPATH=.bench $(BIN)/python tests/bench.py
	PYTHONPATH=.bench $(BIN)/python tests/bench_attacks.py $(BENCH)
	$(BIN)/python tests/bench_metrics.py
	$(BIN)/python tests/bench_threads.py
	$(BIN)/python tests/bench_growth.py
	$(BIN)/python tests/bench_waits.py

break: $(READY)
	$(BIN)/python tests/break_formulas.py $(BREAK)

.bench/.ready: Makefile $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .bench $(PEERS)
	@touch $@

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "python3 -m venv failed: install your system's python3-venv package"; exit 1; }
	@if command -v uv >/dev/null && [ -z "$$NO_UV" ]; then uv pip install --python $(BIN)/python -c requirements.lock -e '.[dev]'; \
	else $(BIN)/python -m pip install --progress-bar off -c requirements.lock -e '.[dev]'; fi
	@touch $(READY)

clean:
	rm -rf .venv .bench _site build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
