//! The text of tokens of this API: what begins it, and the check at its end.

/// What begins a token of a user.
pub(crate) const USER_TOKEN: &str = "gwu-";

/// A token with its check.
pub(crate) fn checked(text: &str) -> String {
    let check = check_of(text);
    format!("{text}-{check}")
}

/// The check of a token without it.
pub(crate) fn check_of(text: &str) -> String {
    hex::encode(&blake3::hash(text.as_bytes()).as_bytes()[..4])
}
