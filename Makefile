# Everything a person needs: `make demo`, `make test`. Both do all set-up first; see README.md.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-engine lint bench soak docs deb fuzz fuzz-python lock clean

help:
	@echo "make demo       the whole life of a pool on this machine, in under a minute"
	@echo "make test       every check and test at a bounded size"
	@echo "make test-long  the tests at full size as well"
	@echo "make bench      our figures beside chronyd's and Knot's, and the registry with 100,000 servers"
	@echo "make soak       ten minutes of the engine in Rust at full load, with new keys and certificates all the time"
	@echo "make docs       the pages that are generated"
	@echo "make deb        dist/pool-agent_VERSION_ARCH.deb, the Debian package for members"
	@echo "make fuzz       every parser with hostile octets, ten minutes each (SECONDS=...)"
	@echo "make setup      system packages, $(VENV) and the engine in Rust only"

setup: $(VENV)/.installed $(VENV)/.engine .peers/.unpacked lab/oidc/node_modules/.installed

# engine/ in Rust is an extra: without a C compiler, or a cargo that is new enough, everything runs on Python packets.
CARGO := $(shell { sed -n 's/^rust-version = "\(.*\)"/\1/p' engine/Cargo.toml; cargo --version | cut -d ' ' -f 2; } \
  2>/dev/null | { read wanted && read found && printf '%s\n' "$$wanted" "$$found" | sort -VC && command -v cc >/dev/null \
  && command -v cargo; })
# One profile for all of it: the C and assembler of aws-lc is most of the work, and compiled once for each.
IN_ENGINE := cd engine && $(CARGO)
PYTHON_ONLY := pool-agent has Python packets only
# One that was built of another state is not to be taken for this one's.
WITHOUT_ENGINE := $(BIN)/pip uninstall --quiet --disable-pip-version-check --yes nts-engine 2>/dev/null

$(VENV)/.engine: engine/Cargo.toml engine/Cargo.lock engine/pyproject.toml lab/crates.py $(wildcard engine/src/*.rs) | $(VENV)/.installed
ifdef CARGO
	rm -rf engine/target/wheels
	@$(BIN)/python -m lab.crates engine/target/CRATES.txt \
	  && $(BIN)/maturin build --quiet --release --locked --interpreter $(BIN)/python --manifest-path engine/Cargo.toml \
	  && $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall engine/target/wheels/*.whl \
	  && touch $@ || { $(WITHOUT_ENGINE); echo "engine/ could not be built, see above: $(PYTHON_ONLY)"; test -z "$$CI"; }
else
	@$(WITHOUT_ENGINE)
	@echo "no C compiler, or no cargo that engine/Cargo.toml can use: $(PYTHON_ONLY)"
endif

.peers/.unpacked: lab/system-packages lab/newer_peers.py lab/newer-peers.toml
	@sh lab/system-packages
	@touch $@

lab/oidc/node_modules/.installed: lab/oidc/package-lock.json | .peers/.unpacked
	@if command -v node >/dev/null && command -v npm >/dev/null; then cd lab/oidc && npm ci --silent && touch node_modules/.installed; \
	  else echo "node or npm is missing: no test with an OpenID provider"; fi

$(VENV)/.installed: requirements.lock pyproject.toml | .peers/.unpacked
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; give another with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# JSON=1 prints the result as JSON; KEEP=1 leaves the pool running.
demo: setup
	@$(BIN)/python -m lab.demo $(if $(JSON),--json) $(if $(KEEP),--keep)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
ifdef CARGO
	$(IN_ENGINE) fmt --check
	$(IN_ENGINE) clippy --quiet --release --locked --all-targets -- -D warnings
endif

# Nearly every test makes a database: where there is room for them in memory, that takes half of the time.
IN_MEMORY := $(shell test "$$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 2>/dev/null \
  && echo TMPDIR=/dev/shm)
PYTEST := $(IN_MEMORY) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint test-engine
	$(PYTEST) -m "not long"

test-long: lint test-engine
	$(PYTEST)

test-engine: setup
ifdef CARGO
	$(IN_ENGINE) test --quiet --release --locked --no-default-features --lib --tests
endif

bench: setup
	$(BIN)/python -m bench.ntp
	$(BIN)/python -m bench.ke
	$(if $(CARGO),$(BIN)/python -m bench.quality)
	$(if $(CARGO),$(BIN)/python -m bench.flood)
	$(BIN)/python -m bench.workers
	$(BIN)/python -m bench.idle
	$(BIN)/python -m bench.dns
	$(BIN)/python -m bench.drawing
	$(BIN)/python -m bench.sets
	$(BIN)/python -m bench.client
	$(BIN)/python -m bench.probes
	$(BIN)/python -m bench.issue
	$(BIN)/python -m bench.registry --zone-servers 2000
	$(BIN)/python -m bench.zone
	$(BIN)/python -m bench.scoring

# Ten minutes at full load.
soak: setup
	$(BIN)/python -m bench.soak

docs: setup
	$(BIN)/python -m lab.conformance
	$(BIN)/python -m lab.interop
	$(BIN)/python -m lab.manuals
	$(BIN)/python -m lab.scoring_page --docs

# For the Debian release, and so the Python, of this machine.
deb: setup
	@sh packaging/build-deb $(BIN)/pip dist
	@ls dist/*.deb

# TARGET=ntp-server fuzzes only that one; TARGET=engine-packet one of those in Rust.
SECONDS ?= 600
FUZZED_ENGINE := engine-packet engine-cookies engine-ke engine-ratelimit
fuzz: setup $(if $(TARGET),$(filter $(TARGET),$(FUZZED_ENGINE)),cargo-fuzz fuzz-python $(FUZZED_ENGINE))
	$(if $(filter-out $(FUZZED_ENGINE),$(TARGET)),$(BIN)/python -m fuzz $(TARGET) --seconds $(SECONDS))

fuzz-python: setup
	$(BIN)/python -m fuzz --all --seconds $(SECONDS)

# They begin with the corpus of the Python targets; what they learn is in .fuzz as well.
SEEDS_engine-packet := ntp-server ntp-server-sealed ntp-packet
SEEDS_engine-cookies := cookie cookie-raw
SEEDS_engine-ke := ke-server ke-records ke-client
.PHONY: $(FUZZED_ENGINE) cargo-fuzz
cargo-fuzz: setup
ifdef CARGO
	@$(CARGO) fuzz --version >/dev/null 2>&1 \
	  || { echo "error: engine/fuzz is run by cargo-fuzz: cargo install cargo-fuzz" >&2; exit 1; }
endif
$(FUZZED_ENGINE): cargo-fuzz
ifdef CARGO
	@mkdir -p .fuzz/corpus/$@ .fuzz/faults
	$(IN_ENGINE) fuzz run --sanitizer none $(@:engine-%=%) $(CURDIR)/.fuzz/corpus/$@ \
	  $(addprefix $(CURDIR)/fuzz/corpus/,$(SEEDS_$@)) -- -max_total_time=$(SECONDS) -max_len=2100 -timeout=20 \
	  -artifact_prefix=$(CURDIR)/.fuzz/faults/$@- -print_final_stats=1
else
	@echo "no cargo: $@ is not fuzzed"
endif

# Only this writes the locks; they hold hashes and no index address. That of the agent is a part of the other. pip-compile
# loses the markers of extras, so the one requirement that has some (there is no wheel for every platform) is given to it
# once more.
COMPILE := CUSTOM_COMPILE_COMMAND="make lock" .lock/bin/pip-compile --quiet --generate-hashes --strip-extras \
  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --allow-unsafe
lock: setup
	@test -x .lock/bin/pip-compile || { $(PYTHON) -m venv .lock && .lock/bin/pip install --quiet pip-tools; }
	grep -o 'atheris>=[^"]*' pyproject.toml | $(COMPILE) --all-extras -o requirements.lock pyproject.toml -
	$(COMPILE) --constraint requirements.lock -o requirements-agent.lock pyproject.toml

clean:
	rm -rf $(VENV) engine/target engine/fuzz/target .lock .peers lab/oidc/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz dist
