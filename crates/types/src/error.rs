//! What an error means to whoever has to act on it.

use serde::{Deserialize, Serialize};

/// The class of a failure. It decides the HTTP status, the exit code, and whether trying again
/// makes sense. The words for people are the error's own `Display`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request itself is wrong; the same request can never succeed.
    Invalid,
    /// The request is longer than what is taken.
    TooLarge,
    /// No, expired or revoked credentials.
    Unauthenticated,
    /// No such object.
    NotFound,
    /// The object exists already.
    Exists,
    /// The object's present state forbids the action; it may be possible later.
    Conflict,
    /// An older generation tried to act. Never possible again for the caller.
    Fenced,
    /// Memory, disk, pool or quota is full.
    NoRoom,
    /// A site, a machine or a tool could not be reached; trying again may help.
    Unavailable,
    /// Stored or received data does not match its hash or format.
    Damaged,
    /// Stopped on request.
    Cancelled,
    /// It took longer than allowed.
    TimedOut,
    /// A fault of ours or of a tool below us.
    Internal,
    /// Whoever asked may not do that.
    Forbidden,
}

impl Code {
    /// HTTP status for the API.
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::TooLarge => 413,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Exists | Self::Conflict | Self::Fenced | Self::Cancelled => 409,
            Self::Damaged => 422,
            Self::NoRoom => 507,
            Self::Unavailable => 503,
            Self::TimedOut => 504,
            Self::Internal => 500,
        }
    }

    /// Exit code of the command line: 0 done, 1 failed, 2 usage, 3 unchanged, 4 not found,
    /// 5 refused by state, 124 timed out.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Invalid | Self::TooLarge => 2,
            Self::NotFound => 4,
            Self::Exists | Self::Conflict | Self::Fenced | Self::NoRoom => 5,
            Self::TimedOut => 124,
            Self::Unauthenticated
            | Self::Forbidden
            | Self::Unavailable
            | Self::Damaged
            | Self::Cancelled
            | Self::Internal => 1,
        }
    }
}

/// An error that knows its class.
pub trait CodedError: std::error::Error {
    /// The class.
    fn code(&self) -> Code;
}
