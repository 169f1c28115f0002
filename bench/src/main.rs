//! `godwit-bench SUITE [--quick] --out DIR` measures; `godwit-bench link` runs the link emulator.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
