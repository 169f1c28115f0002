//! `godwit sched`: co-scheduling of sibling vCPUs on this host.

use clap::{Args, Subcommand};
use godwit_sched_ext::cli as kernel;
use godwit_sched_host::cli as user;

use crate::failure::{Failure, Outcome, Result};

/// `godwit sched`.
#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Keep siblings apart and close from user space, until told to end
    Run(user::RunArgs),
    /// Measure how vCPUs are scheduled, and change nothing
    Observe(user::ObserveArgs),
    #[command(flatten)]
    Kernel(kernel::Command),
}

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        // These work with blocking calls of the kernel, for as long as they are let.
        tokio::task::spawn_blocking(move || match self.verb {
            Verb::Run(args) => args.run().map_err(|e| from_user(&e)),
            Verb::Observe(args) => args.run().map_err(|e| from_user(&e)),
            Verb::Kernel(command) => {
                kernel::run(command).map_err(|e| Failure::of_exit(e.exit_code(), e.to_string()))
            }
        })
        .await
        .map_err(|e| Failure::internal(format!("the scheduler's thread: {e}")))?
        .map(|()| Outcome::Done)
    }
}

fn from_user(error: &user::CliError) -> Failure {
    let mut words = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(s) = source {
        words += &format!(": {s}");
        source = s.source();
    }
    Failure::of_exit(error.exit_code(), words)
}
