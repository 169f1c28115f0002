//! The host's co-scheduling service as a program of its own, for hosts without Godwit's daemon.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use godwit_sched_host::cli::{ObserveArgs, RunArgs};

/// Keep sibling vCPUs of this host's machines together.
#[derive(Debug, Parser)]
#[command(name = "godwit-sched-host", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(RunArgs),
    Observe(ObserveArgs),
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Run(args) => args.run(),
        Command::Observe(args) => args.run(),
    };
    let Err(e) = done else { return ExitCode::SUCCESS };
    let mut chain = e.to_string();
    let mut source = std::error::Error::source(&e);
    while let Some(s) = source {
        chain += &format!(": {s}");
        source = s.source();
    }
    let _ = writeln!(std::io::stderr(), "godwit-sched-host: {chain}");
    ExitCode::from(e.exit_code())
}
