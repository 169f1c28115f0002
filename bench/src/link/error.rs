//! What can go wrong with a link.

use std::io;

use godwit_types::{Code, CodedError};

/// A link that could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A figure outside its range.
    #[error("the link's {what} is {value}; it must lie between {min} and {max}")]
    Spec {
        /// Which figure.
        what: &'static str,
        /// What it is.
        value: f64,
        /// The least.
        min: f64,
        /// The most.
        max: f64,
    },
    /// Another process keeps a link of this name up.
    #[error("a link named '{0}' is up already; end its emulator or choose another name")]
    Busy(String),
    /// A system call failed.
    #[error("could not {doing}")]
    System {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The `ip` tool refused.
    #[error("`ip {args}` failed: {stderr}")]
    Ip {
        /// Its arguments.
        args: String,
        /// What it said, cut to a few lines.
        stderr: String,
    },
}

impl LinkError {
    pub(super) fn system(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { doing: doing.into(), source: source.into() }
    }
}

impl CodedError for LinkError {
    fn code(&self) -> Code {
        match self {
            Self::Spec { .. } => Code::Invalid,
            Self::Busy(_) => Code::Conflict,
            Self::System { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Code::Unavailable
            }
            Self::System { .. } | Self::Ip { .. } => Code::Internal,
        }
    }
}
