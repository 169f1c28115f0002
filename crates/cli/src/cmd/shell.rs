//! Completion and manual pages.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::args::Cli;
use crate::failure::{Failure, Outcome, Result};
use crate::out;

/// `godwit completion`.
#[derive(Debug, Args)]
pub(crate) struct Completion {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completion {
    pub(crate) fn run(self) -> Result {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "godwit", &mut text);
        out::bytes(&text)?;
        Ok(Outcome::Done)
    }
}

/// `godwit man`.
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// Write one page for each command into DIR instead of printing the first
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(self) -> Result {
        match self.dir {
            Some(dir) => {
                let failed = |e: std::io::Error| {
                    Failure::internal(format!("writing manual pages to {}: {e}", dir.display()))
                };
                std::fs::create_dir_all(&dir).map_err(failed)?;
                clap_mangen::generate_to(Cli::command(), &dir).map_err(failed)?;
            }
            None => {
                let mut text = Vec::new();
                clap_mangen::Man::new(Cli::command())
                    .render(&mut text)
                    .map_err(|e| Failure::internal(format!("rendering the manual page: {e}")))?;
                out::bytes(&text)?;
            }
        }
        Ok(Outcome::Done)
    }
}
