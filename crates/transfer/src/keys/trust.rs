//! Whom a site believes: certificates of its authority that are not revoked.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use godwit_types::{Hash, Name, SiteKind};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::signed::{is_signed_by, statement};
use super::{KeyError, Peer, Serial, Warrant, read_bounded, write_private};

/// Certificates that are no longer good. The center keeps the list and sends it to the sites.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocations {
    /// Grows with each change, and is at least the second of it since 1970, so that a center
    /// restored from a copy goes on above what it has sent out since. A list with a lower number
    /// never replaces one with a higher.
    pub number: u64,
    /// The serial numbers.
    pub serials: BTreeSet<Serial>,
    /// By the authority, over number and serials: no site can make a list, whatever its number.
    #[serde(with = "hex::serde", default)]
    pub(super) signature: Vec<u8>,
}

impl Revocations {
    /// Which kind of statement it is.
    pub(super) const KIND: &'static str = "revocations";
    /// The version of its form: 1, the first.
    const FORM: u8 = 1;

    /// What is signed: form, 8 bytes of the number (big-endian), the serials, each led by its
    /// length (4 bytes).
    pub(super) fn body(&self) -> Vec<u8> {
        let mut body = vec![Self::FORM];
        body.extend_from_slice(&self.number.to_be_bytes());
        for serial in &self.serials {
            let text = serial.as_str().as_bytes();
            body.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
            body.extend_from_slice(text);
        }
        body
    }

    /// Reads the list that [`Revocations::save`] wrote; an empty one when there is none.
    ///
    /// # Errors
    /// [`KeyError::File`], [`KeyError::Damaged`].
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let bytes = match read_bounded(path) {
            Ok(bytes) => bytes,
            Err(KeyError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(e) => return Err(e),
        };
        serde_json::from_slice(&bytes)
            .map_err(|e| KeyError::Damaged { path: path.to_owned(), why: e.to_string() })
    }

    /// Writes the list, whole or not at all.
    ///
    /// # Errors
    /// [`KeyError::File`].
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| KeyError::Damaged { path: path.to_owned(), why: e.to_string() })?;
        write_private(path, &bytes)
    }
}

/// An authority's certificate with the list of what it revoked. Clones share the list.
#[derive(Debug, Clone)]
pub struct Trust {
    authority: CertificateDer<'static>,
    roots: Arc<RootCertStore>,
    revocations: Arc<watch::Sender<Arc<Revocations>>>,
}

impl Trust {
    /// Trust in `authority` (certificate, DER). What `revoked` names counts, whoever wrote it down;
    /// its number does only when the authority signed it.
    ///
    /// # Errors
    /// [`KeyError::Tls`] when the certificate does not parse.
    pub fn new(authority: &CertificateDer<'_>, mut revoked: Revocations) -> Result<Self, KeyError> {
        let authority = authority.clone().into_owned();
        if !is_list_of(&authority, &revoked) {
            revoked.number = 0;
        }
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone()).map_err(KeyError::Tls)?;
        let (revocations, _) = watch::channel(Arc::new(revoked));
        Ok(Self { authority, roots: Arc::new(roots), revocations: Arc::new(revocations) })
    }

    /// The fingerprint that join tokens carry.
    #[must_use]
    pub fn fingerprint(&self) -> Hash {
        Hash::of(&self.authority)
    }

    /// Takes a newer list; links of sites that are on it are closed. An older list is ignored
    /// (returns `false`).
    ///
    /// # Errors
    /// [`KeyError::Unsigned`] for a list that the authority did not sign.
    pub fn revoke(&self, newer: Revocations) -> Result<bool, KeyError> {
        if !is_list_of(&self.authority, &newer) {
            return Err(KeyError::Unsigned { what: "list of revoked certificates" });
        }
        Ok(self.revocations.send_if_modified(|now| {
            let take = newer.number > now.number;
            if take {
                *now = Arc::new(newer);
            }
            take
        }))
    }

    /// Checks that the authority has signed a warrant.
    ///
    /// # Errors
    /// [`KeyError::Unsigned`].
    pub fn check_warrant(&self, warrant: &Warrant) -> Result<(), KeyError> {
        let body = Warrant::body(warrant.vm, warrant.generation, &warrant.site);
        if is_signed_by(&self.authority, &statement(Warrant::KIND, &body), &warrant.signature) {
            Ok(())
        } else {
            Err(KeyError::Unsigned { what: "warrant" })
        }
    }

    /// The present list.
    #[must_use]
    pub fn revocations(&self) -> Arc<Revocations> {
        self.revocations.borrow().clone()
    }

    /// Whether a certificate is on the list.
    #[must_use]
    pub fn is_revoked(&self, serial: &Serial) -> bool {
        self.revocations.borrow().serials.contains(serial)
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Revocations>> {
        self.revocations.subscribe()
    }

    /// Checks a certificate of this site that its center has just sent: signature, dates,
    /// revocation and form.
    ///
    /// # Errors
    /// [`KeyError::Tls`].
    pub fn check_own(&self, certificate: &[u8], now: u64) -> Result<Peer, KeyError> {
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now));
        self.check(&CertificateDer::from(certificate), now).map_err(KeyError::Tls)
    }

    /// Checks signature, dates, revocation and form.
    fn check(&self, leaf: &CertificateDer<'_>, now: UnixTime) -> Result<Peer, Error> {
        check_signed(leaf, &self.roots, now)?;
        let peer = Peer::of_certificate(leaf)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.is_revoked(&peer.serial) {
            return Err(Error::InvalidCertificate(CertificateError::Revoked));
        }
        Ok(peer)
    }
}

fn is_list_of(authority: &[u8], list: &Revocations) -> bool {
    is_signed_by(authority, &statement(Revocations::KIND, &list.body()), &list.signature)
}

/// Site certificates carry both key usages, so one check serves both directions.
fn check_signed(
    leaf: &CertificateDer<'_>,
    roots: &RootCertStore,
    now: UnixTime,
) -> Result<(), Error> {
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    let parsed = ParsedCertificate::try_from(leaf)?;
    rustls::client::verify_server_cert_signed_by_trust_anchor(
        &parsed,
        roots,
        &[],
        now,
        algorithms.all,
    )
}

/// The signature schemes that are accepted in handshakes.
fn schemes() -> Vec<SignatureScheme> {
    rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
}

fn check_handshake(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
}

fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not used between sites".into()))
}

/// Who may be at the other side of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// Any site of this cloud.
    AnySite,
    /// The site of that name.
    Site(Name),
    /// The center, whose name is known once the site has joined. The certificate of another site
    /// is not enough, whatever name is in it.
    Center(Option<Name>),
}

impl Expected {
    /// Whether a peer with such a certificate is the one.
    #[must_use]
    pub fn is(&self, peer: &Peer) -> bool {
        match self {
            Self::AnySite => true,
            Self::Site(name) => *name == peer.name,
            Self::Center(name) => {
                peer.kind == SiteKind::Center && name.as_ref().is_none_or(|n| *n == peer.name)
            }
        }
    }
}

/// Checks the other side of a link.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    pub(crate) trust: Trust,
    /// Who must be there.
    pub(crate) expected: Expected,
    /// What the certificate said, for the error's words.
    pub(crate) seen: std::sync::Mutex<Option<Peer>>,
}

impl PeerVerifier {
    pub(crate) fn new(trust: Trust, expected: Expected) -> Self {
        Self { trust, expected, seen: std::sync::Mutex::new(None) }
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let peer = self.trust.check(end_entity, now)?;
        let other = !self.expected.is(&peer);
        if let Ok(mut seen) = self.seen.lock() {
            *seen = Some(peer);
        }
        if other {
            return Err(Error::InvalidCertificate(CertificateError::NotValidForName));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_handshake(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    /// A site that joins has no certificate yet; who opens a link without one is turned away
    /// right after the handshake.
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.trust.check(end_entity, now).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_handshake(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

/// Checks the center by the fingerprint in a join token: some certificate that it shows has
/// that hash, and its own is signed by that one and says that it is a center.
#[derive(Debug)]
pub(crate) struct JoinVerifier {
    pub(crate) authority: Hash,
    /// What the center's certificate said.
    pub(crate) seen: std::sync::Mutex<Option<Peer>>,
}

impl JoinVerifier {
    pub(crate) fn new(authority: Hash) -> Self {
        Self { authority, seen: std::sync::Mutex::new(None) }
    }
}

impl ServerCertVerifier for JoinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates
            .iter()
            .find(|cert| Hash::of(cert) == self.authority)
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        check_signed(end_entity, &roots, now)?;
        match Peer::of_certificate(end_entity) {
            Ok(peer) if peer.kind == SiteKind::Center => {
                if let Ok(mut seen) = self.seen.lock() {
                    *seen = Some(peer);
                }
                Ok(ServerCertVerified::assertion())
            }
            _ => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_handshake(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}
