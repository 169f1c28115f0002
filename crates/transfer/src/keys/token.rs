//! Join tokens: what an operator carries from the center to a new site.
//!
//! ```text
//! gwj1/<host:port>/<site name>/<kind>/<authority fingerprint>/<token id>/<secret>/<expiry>
//! ```
//! The fingerprint is the BLAKE3 hash of the authority's certificate (64 hex digits); by it the
//! site knows the center before it has a certificate of its own. The secret has 32 random bytes
//! (64 hex digits); the center keeps its hash only. The expiry is in seconds since 1970.

use std::fmt;
use std::str::FromStr;

use godwit_types::{Code, CodedError, Hash, Name, SiteKind};

/// 32 secret bytes. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(crate) [u8; 32]);

impl Secret {
    /// Draws a new one.
    #[must_use]
    pub fn draw() -> Self {
        Self(rand::random())
    }

    /// What the center keeps of it.
    #[must_use]
    pub fn hash(&self) -> Hash {
        Hash::of(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A join token. `Display` gives the text form, secret included; `Debug` leaves the secret out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Where the center listens: `host:port`.
    pub center: String,
    /// The name that the site gets.
    pub site: Name,
    /// What the site becomes.
    pub kind: SiteKind,
    /// The hash of the authority's certificate.
    pub authority: Hash,
    /// Which token it is: 16 hex digits.
    pub id: String,
    /// What proves that the holder was given it.
    pub secret: Secret,
    /// When it ends, seconds since 1970.
    pub expires: u64,
}

/// Why a text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as one, or is too long.
    #[error("this is not a join token (it begins with 'gwj1/'); copy the whole line")]
    NotAToken,
    /// A later version.
    #[error("the join token has the version '{0}'; this site knows 'gwj1'")]
    UnknownVersion(String),
    /// A part is missing or wrong.
    #[error("the join token's {0} is missing or damaged; copy the whole line again")]
    Part(&'static str),
}

impl CodedError for TokenError {
    fn code(&self) -> Code {
        Code::Invalid
    }
}

/// The longest text form in bytes.
const MAX_TEXT: usize = 600;

/// Whether a text can stand for `host:port`.
pub(super) fn valid_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_ok = match bare {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            (1..=253).contains(&host.len())
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
        }
    };
    host_ok && port.parse::<u16>().is_ok_and(|p| p != 0)
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { center, site, kind, authority, id, secret, expires } = self;
        let secret = hex::encode(secret.0);
        write!(f, "gwj1/{center}/{site}/{kind}/{authority}/{id}/{secret}/{expires}")
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > MAX_TEXT || !text.starts_with("gwj") {
            return Err(TokenError::NotAToken);
        }
        let mut parts = text.split('/');
        let version = parts.next().unwrap_or_default();
        if version != "gwj1" {
            return Err(TokenError::UnknownVersion(version.escape_debug().take(20).collect()));
        }
        let mut part = |what| parts.next().ok_or(TokenError::Part(what));
        let center = part("center address")?;
        if !valid_address(center) {
            return Err(TokenError::Part("center address"));
        }
        let site = Name::new(part("site name")?).map_err(|_| TokenError::Part("site name"))?;
        let kind =
            super::kind_from_text(part("kind of site")?).ok_or(TokenError::Part("kind of site"))?;
        let authority =
            part("fingerprint")?.parse().map_err(|_| TokenError::Part("fingerprint"))?;
        let id = part("id")?;
        if id.len() != 16 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(TokenError::Part("id"));
        }
        let mut secret = [0; 32];
        hex::decode_to_slice(part("secret")?, &mut secret)
            .map_err(|_| TokenError::Part("secret"))?;
        let expires = part("expiry")?.parse().map_err(|_| TokenError::Part("expiry"))?;
        if parts.next().is_some() {
            return Err(TokenError::Part("end"));
        }
        Ok(Self {
            center: center.to_owned(),
            site,
            kind,
            authority,
            id: id.to_owned(),
            secret: Secret(secret),
            expires,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> JoinToken {
        JoinToken {
            center: "[2001:db8::1]:7701".into(),
            site: Name::new("cafe").expect("name"),
            kind: SiteKind::Ap,
            authority: Hash::of(b"ca"),
            id: "0123456789abcdef".into(),
            secret: Secret([0xab; 32]),
            expires: 1_800_000_000,
        }
    }

    #[test]
    fn the_text_form_round_trips_and_debug_hides_the_secret() {
        let t = token();
        assert_eq!(t.to_string().parse(), Ok(t.clone()));
        assert!(!format!("{t:?}").contains("abab"));
    }

    #[test]
    fn each_damaged_part_is_named() {
        let text = token().to_string();
        assert_eq!("hello".parse::<JoinToken>(), Err(TokenError::NotAToken));
        assert_eq!(
            text.replacen("gwj1", "gwj2", 1).parse::<JoinToken>(),
            Err(TokenError::UnknownVersion("gwj2".into()))
        );
        let cut = text.rsplit_once('/').expect("parts").0;
        assert_eq!(cut.parse::<JoinToken>(), Err(TokenError::Part("expiry")));
        assert_eq!(
            text.replace("cafe", "../x").parse::<JoinToken>(),
            Err(TokenError::Part("site name"))
        );
        assert_eq!(format!("{text}/x").parse::<JoinToken>(), Err(TokenError::Part("end")));
    }

    proptest! {
        #[test]
        fn no_text_panics(s in "\\PC{0,80}", cut in 0usize..300) {
            let _ = s.parse::<JoinToken>();
            let t = token().to_string();
            let _ = t[..cut.min(t.len())].parse::<JoinToken>();
        }
    }
}
