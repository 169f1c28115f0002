//! How a command ends.

use godwit_types::Code;
use godwit_types::Fault;

/// A command that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was done: exit code 0.
    Done,
    /// Nothing had to be done: exit code 3.
    Unchanged,
    /// The answer that was printed is bad news: exit code 1.
    Found,
    /// A guest's program ended with this exit code.
    Exit(u8),
}

/// What every command returns.
pub(crate) type Result<T = Outcome, E = Failure> = std::result::Result<T, E>;

/// A command that failed: what happened, what to do about it, and the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit code of the program.
    pub(crate) exit: u8,
    /// The center was not reached, or went away: it may be back soon.
    pub(crate) away: bool,
    /// Nobody listens at its address.
    pub(crate) refused: bool,
    message: String,
    hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            exit: code.exit_code(),
            away: false,
            refused: false,
            message: message.into(),
            hint: None,
        }
    }

    /// A failure whose exit code is known already.
    pub(crate) fn of_exit(exit: u8, message: impl Into<String>) -> Self {
        Self { exit, away: false, refused: false, message: message.into(), hint: None }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Code::Invalid, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
    }

    /// No answer came from the center.
    pub(crate) fn away(message: impl Into<String>) -> Self {
        Self { away: true, ..Self::unavailable(message) }
    }

    /// Nobody listens where the center should be.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self { refused: true, ..Self::away(message) }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// For stderr; control characters of foreign text are made visible, endless words are cut.
    pub(crate) fn words(&self) -> String {
        let message = crate::out::tame(&self.message);
        match &self.hint {
            Some(h) => format!("error: {message}\nhint: {}", crate::out::tame(h)),
            None => format!("error: {message}"),
        }
    }
}

impl From<Fault> for Failure {
    fn from(f: Fault) -> Self {
        Self {
            exit: f.code.exit_code(),
            away: false,
            refused: false,
            message: f.message,
            hint: f.hint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_class_of_the_failure() {
        for (code, exit) in [
            (Code::Invalid, 2),
            (Code::NotFound, 4),
            (Code::Conflict, 5),
            (Code::Exists, 5),
            (Code::NoRoom, 5),
            (Code::TimedOut, 124),
            (Code::Unavailable, 1),
            (Code::Unauthenticated, 1),
        ] {
            assert_eq!(Failure::from(Fault::new(code, "x")).exit, exit, "{code:?}");
        }
    }

    #[test]
    fn words_say_what_happened_and_what_to_do() {
        let f = Failure::from(Fault::not_found("no site 'x\x1b[2J'").hint("godwit site list"));
        assert_eq!(f.words(), "error: no site 'x\\u{1b}[2J'\nhint: godwit site list");
        assert_eq!(Failure::usage("no").words(), "error: no");
    }
}
