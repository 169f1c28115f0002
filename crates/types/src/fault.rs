//! A failure as it crosses a process or a wire: class, words, and what to do.

use std::error::Error as StdError;

use crate::error::{Code, CodedError};
use serde::{Deserialize, Serialize};

/// A failure that has left the process it happened in. The chain of causes has become text,
/// the class stays a value. Body of every HTTP error and of every failed site request.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, thiserror::Error,
)]
#[error("{message}")]
pub struct Fault {
    /// The class.
    pub code: Code,
    /// What happened to what, with its causes.
    pub message: String,
    /// What to do about it, when that is known.
    pub hint: Option<String>,
}

impl Fault {
    /// A failure of class `code`.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// The same failure with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The request itself is wrong.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::Invalid, message)
    }

    /// There is no such object.
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// The state of the object forbids it.
    #[must_use]
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(Code::Conflict, message)
    }

    /// A site or tool could not be reached.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
    }

    /// A fault of ours.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// What the system said while something was done to a file: no room, or a fault of ours.
    #[must_use]
    pub fn io(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        let full = matches!(error.kind(), StorageFull | QuotaExceeded);
        let code = if full { Code::NoRoom } else { Code::Internal };
        Self::new(code, format!("{doing} {}: {error}", path.display()))
    }

    /// Stopped on request.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(Code::Cancelled, "stopped on request")
    }

    /// Any error as a failure of class `code`, its causes joined by `: `.
    #[must_use]
    pub fn from_error(code: Code, error: &dyn StdError) -> Self {
        Self::new(code, chain(error))
    }

    /// A coded error with its own class.
    #[must_use]
    pub fn of<E: CodedError>(error: &E) -> Self {
        Self::new(error.code(), chain(error))
    }
}

impl CodedError for Fault {
    fn code(&self) -> Code {
        self.code
    }
}

/// `error` and its sources, joined by `: `.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
