//! What can go wrong with a machine of the lab.

use std::io;
use std::path::PathBuf;

/// A failure of the lab.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no kernel and none could be fetched; the script's last line says why.
    #[error("no kernel with sched_ext: {0}")]
    Kernel(String),
    /// Something of the host could not be used.
    #[error("{doing}")]
    Io {
        /// What was being done to what.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program cannot be put into an initramfs.
    #[error("{program} cannot be put into a guest: {reason}")]
    Program {
        /// The program on the host.
        program: PathBuf,
        /// What stands in the way.
        reason: String,
    },
    /// A wait was over before what was waited for.
    #[error(
        "machine {machine}: {what} did not come within {seconds:.0} s; its console ends with:\n{tail}"
    )]
    Late {
        /// The machine's name.
        machine: String,
        /// What was waited for.
        what: String,
        /// How long.
        seconds: f64,
        /// The console's last lines.
        tail: String,
    },
    /// QEMU ended.
    #[error("machine {machine} ended while {what} was waited for; its console ends with:\n{tail}")]
    Ended {
        /// The machine's name.
        machine: String,
        /// What was waited for.
        what: String,
        /// The console's last lines.
        tail: String,
    },
    /// A command ended with something other than 0.
    #[error("machine {machine}: `{command}` ended with {status}:\n{output}")]
    Status {
        /// The machine's name.
        machine: String,
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it wrote.
        output: String,
    },
    /// The machine or its caller did not keep to the order of commands and answers.
    #[error("machine {machine}: {what}")]
    Protocol {
        /// The machine's name.
        machine: String,
        /// What happened.
        what: String,
    },
}

impl Error {
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}
