# `make demo` and `make test` do all the set-up themselves; afterwards plain `cargo build` and `cargo test` work too.
.PHONY: setup build wheel wheel-runtime demo docs test test-converters test-web check-small fuzz bench lint clean

setup:
	@scripts/setup

build: setup
	cargo build --release

# dist/disback-*.whl: the program and its Python package, for pip. docs/python.md
wheel: build
	.venv/bin/python scripts/wheel

# dist/disback_runtime-*.whl: the program of a host that only runs students, without libtorch. It is built in a folder of its own.
wheel-runtime: setup
	cargo build --release --target-dir target/runtime --no-default-features --features ort,tract,serve,report,formats
	.venv/bin/python scripts/wheel --runtime --binary target/runtime/release/disback

# Distils the digits teacher into a one-step student and opens nothing: the run lies in runs/digits.
demo: build
	cargo run --release --quiet --example digits

# The documentation as a site, in target/site. A broken link, also one into the repository, fails.
docs:
	[ -x .venv-docs/bin/mkdocs ] || { python3 -m venv .venv-docs && .venv-docs/bin/pip install --quiet --disable-pip-version-check -r converters/requirements/docs.txt; }
	.venv-docs/bin/mkdocs build --strict --quiet

# One thread a test: the test runners themselves run several at a time.
test: setup
	OMP_NUM_THREADS=1 cargo test --release --workspace
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 converters/tests tests/python --ignore=converters/tests/frameworks

# The frameworks that disagree about versions, each in an environment of its own: trained networks converted live, imported,
# distilled.
test-converters: build
	converters/test-frameworks

# examples/web in headless Chromium, the JavaScript consumer in Node. About a minute the first time (Chromium, npm).
test-web: setup
	scripts/test-web

# The builds for production hosts, without libtorch: do they compile, the one that only samples and the one that serves. Checked
# without code generation, since their features make other builds of some dependencies than the whole has.
check-small:
	for features in ort ort,tract,serve,report; do \
		cargo check --release --no-default-features --features $$features --lib || exit 1; \
	done

# A smoke of every fuzz target, five minutes each: fuzz/README.md.
FUZZ_SECONDS ?= 300
fuzz: setup
	for target in loader plan card npz images run body; do fuzz/run $$target $(FUZZ_SECONDS) || exit 1; done

# Step times and peak memory beside native PyTorch, alternating in one run.
bench: setup
	cargo bench --bench step

lint: setup
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings

clean:
	cargo clean
	rm -rf runs
