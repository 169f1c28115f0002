//! The kernel scheduler's own small program, for machines that have no `godwit`.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use godwit_sched_ext::cli::{self, Command};

/// Co-scheduling of sibling vCPUs as a sched_ext scheduler
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    match cli::run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(io::stderr(), "sched: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}
