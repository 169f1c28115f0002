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

use super::{KeyError, Peer, Serial, read_bounded, write_private};

/// Certificates that are no longer good. The center keeps the list and sends it to the sites.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocations {
    /// Grows with each change; a list with a lower number never replaces one with a higher.
    pub number: u64,
    /// The serial numbers.
    pub serials: BTreeSet<Serial>,
}

impl Revocations {
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
    /// Trust in `authority` (certificate, DER).
    ///
    /// # Errors
    /// [`KeyError::Tls`] when the certificate does not parse.
    pub fn new(authority: &CertificateDer<'_>, revoked: Revocations) -> Result<Self, KeyError> {
        let authority = authority.clone().into_owned();
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
    pub fn revoke(&self, newer: Revocations) -> bool {
        self.revocations.send_if_modified(|now| {
            let take = newer.number > now.number;
            if take {
                *now = Arc::new(newer);
            }
            take
        })
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

/// Checks the other side of a link.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    pub(crate) trust: Trust,
    /// Who must answer, where the caller knows.
    pub(crate) expected: Option<Name>,
    /// What the certificate said, for the error's words.
    pub(crate) seen: std::sync::Mutex<Option<Peer>>,
}

impl PeerVerifier {
    pub(crate) fn new(trust: Trust, expected: Option<Name>) -> Self {
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
        let other = self.expected.as_ref().is_some_and(|name| *name != peer.name);
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
            Ok(peer) if peer.kind == SiteKind::Center => Ok(ServerCertVerified::assertion()),
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
