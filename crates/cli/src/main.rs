//! The `godwit` command: every role and every request of a mobile cloud.
//!
//! ```text
//! godwit up|down                       center and AP of this machine, in the background
//! godwit center|ap|relay               one role in the foreground, for service managers
//! godwit vm|image|substrate|...        requests to the center's API
//! godwit doctor|completion|man         this machine and this program
//! ```
//!
//! Data goes to stdout, messages and progress to stderr. Exit codes are those of
//! [`godwit_types::Code::exit_code`]; 3 says that nothing had to be done.

mod args;
mod client;
mod cmd;
mod failure;
mod interrupt;
mod out;
mod wait;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use godwit_types::Code;

use crate::args::Cli;
use crate::failure::{Failure, Outcome};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version.
        Err(e) if !e.use_stderr() => e.exit(),
        Err(e) => {
            out::notice(out::tame(&e.render().to_string()).trim_end());
            return ExitCode::from(Code::Invalid.exit_code());
        }
    };
    match run(cli) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Unchanged) => ExitCode::from(3),
        Ok(Outcome::Found) => ExitCode::FAILURE,
        Ok(Outcome::Exit(code)) => ExitCode::from(code),
        Err(failure) => {
            out::notice(&failure.words());
            ExitCode::from(failure.exit)
        }
    }
}

fn run(cli: Cli) -> Result<Outcome, Failure> {
    // Another provider can only be there already if this ran twice.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::internal(format!("starting the runtime: {e}")))?;
    let result = runtime.block_on(Box::pin(cmd::run(cli)));
    // A read of stdin that nobody waits for any more must not hold the program.
    runtime.shutdown_background();
    result
}
