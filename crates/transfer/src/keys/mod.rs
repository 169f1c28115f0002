//! Who is who: the center's authority, join tokens, and the identities of sites.
//!
//! A site makes its key itself and never gives it away; the center signs a certificate whose one
//! subject alternative name is the URI `godwit://<kind>/<name>`.

mod authority;
mod identity;
mod renewal;
mod signed;
mod token;
mod trust;

use std::path::{Path, PathBuf};

use godwit_types::{Code, CodedError, Name, SiteKind};
use serde::{Deserialize, Serialize};

pub use authority::{Authority, Issued, TokenInfo, TokenState};
pub use identity::{Identity, PendingIdentity};
pub use renewal::Renewal;
pub use signed::Warrant;
pub use token::{JoinToken, Secret, TokenError};
pub use trust::{Expected, Revocations, Trust};
pub(crate) use trust::{JoinVerifier, PeerVerifier};

/// Seconds since 1970 on the system's clock. Used for certificates and tokens only.
#[must_use]
pub fn unix_now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// What could not be done with keys or certificates.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file could not be read or written.
    #[error("cannot {doing} {path}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The directory holds an authority or identity already.
    #[error("{path} exists already; it is not overwritten")]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// A private key can be read by others.
    #[error("{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")]
    OpenKey {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A key or a certificate could not be made.
    #[error("cannot {doing}")]
    Make {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// A certificate is not one of a Godwit site.
    #[error("not a certificate of a Godwit site: {why}")]
    NotASite {
        /// What is wrong.
        why: &'static str,
    },
    /// A certificate does not belong to the key that waits for it.
    #[error("the certificate received is for another key or another site than was asked for")]
    ForeignCertificate,
    /// The operation names a token that is not kept.
    #[error("there is no join token {0}")]
    NoSuchToken(String),
    /// A site has joined with the token, so that taking it back changes nothing.
    #[error("a site has joined with join token {0} already")]
    TokenUsed(String),
    /// The request for a certificate is not acceptable.
    #[error("the certificate request is not acceptable: {why}")]
    BadRequest {
        /// Why.
        why: &'static str,
    },
    /// Somebody handed over a statement that the authority never made.
    #[error("this cloud's authority has not signed this {what}")]
    Unsigned {
        /// Which statement.
        what: &'static str,
    },
    /// TLS could not be set up with these keys.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
}

impl CodedError for KeyError {
    fn code(&self) -> Code {
        match self {
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Code::NotFound
            }
            Self::File { .. } | Self::Make { .. } | Self::Tls(_) => Code::Internal,
            Self::Damaged { .. } => Code::Damaged,
            Self::Exists { .. } => Code::Exists,
            Self::OpenKey { .. } | Self::TokenUsed(_) => Code::Conflict,
            Self::NotASite { .. } | Self::ForeignCertificate | Self::Unsigned { .. } => {
                Code::Unauthenticated
            }
            Self::NoSuchToken(_) => Code::NotFound,
            Self::BadRequest { .. } => Code::Invalid,
        }
    }
}

/// A certificate's serial number: lower-case hex without leading zeros.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Serial(String);

impl Serial {
    /// From the number's big-endian bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let text = hex::encode(bytes);
        let text = text.trim_start_matches('0');
        Self(if text.is_empty() { "0".to_owned() } else { text.to_owned() })
    }

    /// The hex digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a certificate says about its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The site's name.
    pub name: Name,
    /// What the site is.
    pub kind: SiteKind,
    /// The serial number of its certificate.
    pub serial: Serial,
    /// When the certificate begins, seconds since 1970.
    pub not_before: u64,
    /// When the certificate ends, seconds since 1970.
    pub not_after: u64,
}

impl Peer {
    /// Reads a certificate (DER). Says nothing about who signed it.
    ///
    /// # Errors
    /// [`KeyError::NotASite`].
    pub fn of_certificate(der: &[u8]) -> Result<Self, KeyError> {
        use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
        let not = |why| KeyError::NotASite { why };
        let (_, cert) =
            X509Certificate::from_der(der).map_err(|_| not("it does not parse as X.509"))?;
        let san = cert
            .subject_alternative_name()
            .map_err(|_| not("its alternative names do not parse"))?
            .ok_or_else(|| not("it has no alternative name"))?;
        let [GeneralName::URI(uri)] = &san.value.general_names[..] else {
            return Err(not("it has other alternative names than one URI"));
        };
        let (kind, name) = uri
            .strip_prefix("godwit://")
            .and_then(|rest| rest.split_once('/'))
            .ok_or_else(|| not("its alternative name is not godwit://<kind>/<name>"))?;
        let kind = kind_from_text(kind).ok_or_else(|| not("its kind of site is unknown"))?;
        let name = Name::new(name).map_err(|_| not("its site name is not valid"))?;
        let unix = |t: x509_parser::time::ASN1Time| u64::try_from(t.timestamp()).unwrap_or(0);
        let (not_before, not_after) =
            (unix(cert.validity().not_before), unix(cert.validity().not_after));
        let serial = Serial::from_bytes(cert.raw_serial());
        Ok(Self { name, kind, serial, not_before, not_after })
    }
}

/// The text of the alternative name for a site.
pub(crate) fn site_uri(kind: SiteKind, name: &Name) -> String {
    format!("godwit://{kind}/{name}")
}

/// The kind that a text names.
pub(crate) fn kind_from_text(text: &str) -> Option<SiteKind> {
    [SiteKind::Center, SiteKind::Ap, SiteKind::Device].into_iter().find(|k| k.to_string() == text)
}

/// The public key (SubjectPublicKeyInfo, DER) in a certificate.
pub(crate) fn public_key_of(der: &[u8]) -> Option<Vec<u8>> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    X509Certificate::from_der(der).ok().map(|(_, c)| c.public_key().raw.to_vec())
}

/// Writes a file whole or not at all, readable by its owner only.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), KeyError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let file_error = |doing| move |source| KeyError::File { doing, path: path.to_owned(), source };
    let temporary = path.with_extension("new");
    match std::fs::remove_file(&temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(file_error("replace")(e));
        }
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(file_error("create"))?;
    file.write_all(bytes).map_err(file_error("write"))?;
    file.sync_all().map_err(file_error("sync"))?;
    std::fs::rename(&temporary, path).map_err(file_error("put in place"))?;
    if let Some(dir) = path.parent() {
        std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(file_error("sync"))?;
    }
    Ok(())
}

/// The longest file of keys or certificates that is read, in bytes: 16 MiB.
const MAX_FILE: u64 = 16 << 20;

/// Reads a file of at most 16 MiB.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>, KeyError> {
    use std::io::Read;
    let file_error = |source| KeyError::File { doing: "read", path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(file_error)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(file_error)?;
    if bytes.len() as u64 > MAX_FILE {
        // Never cut: what is left out may be what was revoked.
        return Err(file_error(std::io::Error::other("it is longer than 16 MiB")));
    }
    Ok(bytes)
}

/// Reads a private key (PEM), refusing one that others can read.
pub(crate) fn read_key(path: &Path) -> Result<rcgen::KeyPair, KeyError> {
    use std::os::unix::fs::PermissionsExt;
    let meta = std::fs::metadata(path).map_err(|source| KeyError::File {
        doing: "read",
        path: path.to_owned(),
        source,
    })?;
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyError::OpenKey { path: path.to_owned(), mode });
    }
    let damaged = |why: &str| KeyError::Damaged { path: path.to_owned(), why: why.to_owned() };
    let text = String::from_utf8(read_bounded(path)?).map_err(|_| damaged("it is not text"))?;
    rcgen::KeyPair::from_pem(&text).map_err(|_| damaged("it holds no private key in PEM form"))
}

/// Makes a directory for keys, closed to others.
pub(crate) fn make_key_dir(dir: &Path) -> Result<(), KeyError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| KeyError::File { doing: "create", path: dir.to_owned(), source })
}
