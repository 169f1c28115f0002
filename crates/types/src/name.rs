//! Names that people give to machines, substrates, images and sites.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A checked name: 1 to 40 characters, lower-case letters, digits and `-`, starting with a
/// letter or a digit. A `Name` is safe as one path component, as a host name and inside a QEMU
/// option, which is why nothing else may be used for those.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9-]{0,39}$")]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is not a [`Name`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{shown}' is not a valid name: use 1 to {max} characters of a-z, 0-9 and '-', starting with a letter or digit",
    max = Name::MAX_LEN
)]
pub struct NameError {
    shown: String,
}

impl Name {
    /// The longest name in characters.
    pub const MAX_LEN: usize = 40;

    /// Checks `text`.
    ///
    /// # Errors
    /// [`NameError`] when a character, the first character or the length is not allowed.
    pub fn new(text: &str) -> Result<Self, NameError> {
        let ok = (1..=Self::MAX_LEN).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !text.starts_with('-');
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError { shown: text.chars().take(60).flat_map(char::escape_debug).collect() })
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        Self::new(s)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(s: String) -> Result<Self, NameError> {
        Self::new(&s)
    }
}

impl From<Name> for String {
    fn from(n: Name) -> Self {
        n.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn path_tricks_are_refused() {
        for bad in ["", "..", "a/b", "../etc", "-rf", "A", "a b", "a,b=c", "a\0", "ü", "a\n"] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        assert!(Name::new(&"a".repeat(41)).is_err());
        for good in ["a", "report-2", "0day", &"a".repeat(40)] {
            assert_eq!(Name::new(good).expect("valid").as_str(), good);
        }
    }

    proptest! {
        #[test]
        fn a_name_is_always_one_plain_path_component(s in "\\PC{0,60}") {
            if let Ok(n) = Name::new(&s) {
                let mut parts = std::path::Path::new(n.as_str()).components();
                prop_assert!(matches!(parts.next(), Some(std::path::Component::Normal(_))));
                prop_assert!(parts.next().is_none());
            }
        }
    }
}
