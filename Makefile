# Godwit. Two commands do everything on a fresh Debian 12 machine (as root, with a Rust toolchain):
#   make demo    installs what it needs, builds, and runs the main scenario   (GUEST=tiny for the short one)
#   make test    installs what it needs, builds, and runs every test
GUEST ?= abiword
RATE ?= 100
DELAY ?= 17.5
OUT ?= target/demo
DEMO_FLAGS ?=
FUZZ_SECONDS ?= 60

.PHONY: setup build demo test test-unit lint bench bench-sched figures fuzz

setup:
	@scripts/setup

build: setup
	cargo build --locked --release -p godwit -p godwit-bench

demo: build
	target/release/godwit image build $(GUEST) --local
	target/release/godwit-bench demo --guest $(GUEST) --rate $(RATE) --delay $(DELAY) --out $(OUT) $(DEMO_FLAGS)

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

# The guests that system tests share are built once, by content, before the tests start; so are the
# kernel fetched that schedulers are tested on and the QEMU whose states must fit ours.
test: setup
	cargo build --locked --workspace --all-targets
	scripts/kernel
	scripts/qemu trixie
	target/debug/godwit image build tiny --local
	cargo nextest run --locked --workspace --no-fail-fast

# Only what needs no machine: seconds, no root.
test-unit:
	cargo nextest run --locked --workspace --lib --bins

bench: build
	target/release/godwit image build $(GUEST) --local
	target/release/godwit-bench mainjob --guest $(GUEST) --out target/bench

# The figures of SPECIFICATION.md: measured, kept in docs/figures.json, written as tables.
figures: build
	target/release/godwit image build $(GUEST) --local
	target/release/godwit image build tiny --local
	target/release/godwit-bench demo --guest $(GUEST) --out target/figures/demo $(DEMO_FLAGS)
	test ! -e target/figures/demo/move.svg || cp target/figures/demo/move.svg docs/demo.svg
	target/release/godwit-bench mainjob --guest tiny --out target/figures/mainjob
	target/release/godwit-bench mainjob --guest $(GUEST) --rounds 1 --stock-downtime-ms 2000 --out target/figures/desktop
	target/release/godwit-bench burst --out target/figures/burst
	target/release/godwit-bench spec docs/figures.json --take target/figures --out SPECIFICATION.md

# Co-scheduling: the simulator, a guest's kernel and this host's, with the stand-ins. About an hour.
bench-sched: build
	cargo build --locked --release -p godwit-standin -p godwit-sched-ext -p godwit-sched-host
	target/release/godwit-bench sched --real kernel,host --out target/bench-sched

# The parsers of what comes from outside, under libFuzzer; needs cargo-fuzz.
fuzz:
	@scripts/fuzz $(FUZZ_SECONDS)
