//! A site's own key and certificate.

use std::path::Path;

use godwit_types::{Name, SiteKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{
    KeyError, Peer, make_key_dir, public_key_of, read_bounded, read_key, site_uri, write_private,
};

const KEY_FILE: &str = "site.key";
/// A key that waits for its certificate to be put in place.
const NEXT_KEY_FILE: &str = "next.key";
const CERT_FILE: &str = "site.der";
const CA_FILE: &str = "ca.der";

/// A key that waits for its certificate.
#[derive(Debug)]
pub struct PendingIdentity {
    key: rcgen::KeyPair,
    name: Name,
    kind: SiteKind,
    request: Vec<u8>,
}

impl PendingIdentity {
    /// Makes a key and the request for its certificate.
    ///
    /// # Errors
    /// [`KeyError::Make`].
    pub fn make(name: &Name, kind: SiteKind) -> Result<Self, KeyError> {
        let make = |doing| move |source| KeyError::Make { doing, source };
        let key = rcgen::KeyPair::generate().map_err(make("make a key"))?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name.as_str());
        let uri = site_uri(kind, name)
            .try_into()
            .map_err(|source| KeyError::Make { doing: "name a certificate request", source })?;
        params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        let request = params.serialize_request(&key).map_err(make("make a certificate request"))?;
        Ok(Self { key, name: name.clone(), kind, request: request.der().to_vec() })
    }

    /// The certificate request (PKCS#10, DER).
    #[must_use]
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    /// Completes the identity with what the center sent back.
    ///
    /// # Errors
    /// [`KeyError::ForeignCertificate`] when the certificate is for another key, name or kind;
    /// [`KeyError::NotASite`].
    pub fn complete(self, certificate: &[u8], authority: &[u8]) -> Result<Identity, KeyError> {
        use rcgen::PublicKeyData;
        let peer = Peer::of_certificate(certificate)?;
        let same_key =
            public_key_of(certificate).is_some_and(|key| key == self.key.subject_public_key_info());
        if !same_key || peer.name != self.name || peer.kind != self.kind {
            return Err(KeyError::ForeignCertificate);
        }
        Ok(Identity {
            me: peer,
            key_pem: self.key.serialize_pem(),
            key_der: self.key.serialize_der(),
            certificate: CertificateDer::from(certificate.to_vec()),
            authority: CertificateDer::from(authority.to_vec()),
        })
    }
}

/// A site's key, its certificate and the certificate of the authority. `Debug` leaves the key
/// out.
#[derive(Clone)]
pub struct Identity {
    me: Peer,
    key_pem: String,
    key_der: Vec<u8>,
    certificate: CertificateDer<'static>,
    authority: CertificateDer<'static>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("me", &self.me).finish_non_exhaustive()
    }
}

impl Identity {
    /// All of it, its key too, for another process of this site: never for a file.
    ///
    /// # Errors
    /// [`KeyError::Damaged`], which does not happen.
    pub fn to_bytes(&self) -> Result<Vec<u8>, KeyError> {
        let parts = (&self.key_pem, self.certificate.as_ref(), self.authority.as_ref());
        postcard::to_allocvec(&parts).map_err(handed)
    }

    /// What [`Identity::to_bytes`] gave.
    ///
    /// # Errors
    /// [`KeyError::Damaged`], [`KeyError::NotASite`], [`KeyError::ForeignCertificate`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        use rcgen::PublicKeyData;
        let (pem, certificate, authority): (String, Vec<u8>, Vec<u8>) =
            postcard::from_bytes(bytes).map_err(handed)?;
        let me = Peer::of_certificate(&certificate)?;
        let key = rcgen::KeyPair::from_pem(&pem).map_err(handed)?;
        if public_key_of(&certificate).as_ref() != Some(&key.subject_public_key_info()) {
            return Err(KeyError::ForeignCertificate);
        }
        Ok(Self {
            me,
            key_pem: pem,
            key_der: key.serialize_der(),
            certificate: certificate.into(),
            authority: authority.into(),
        })
    }

    /// Loads the identity that [`Identity::save`] wrote into `dir`.
    ///
    /// # Errors
    /// [`KeyError::File`] (code `not-found` when the site has none yet), [`KeyError::OpenKey`],
    /// [`KeyError::Damaged`], [`KeyError::ForeignCertificate`] when key and certificate do not
    /// belong together.
    pub fn load(dir: &Path) -> Result<Self, KeyError> {
        use rcgen::PublicKeyData;
        let certificate = read_bounded(&dir.join(CERT_FILE))?;
        let authority = read_bounded(&dir.join(CA_FILE))?;
        let me = Peer::of_certificate(&certificate)
            .map_err(|e| KeyError::Damaged { path: dir.join(CERT_FILE), why: e.to_string() })?;
        let public = public_key_of(&certificate);
        let fits = |key: &rcgen::KeyPair| public.as_ref() == Some(&key.subject_public_key_info());
        let key = match read_key(&dir.join(KEY_FILE)) {
            Ok(key) if fits(&key) => key,
            // A renewal was cut off between its two steps, or is between them.
            other => match read_key(&dir.join(NEXT_KEY_FILE)) {
                Ok(next) if fits(&next) => next,
                _ => return other.and(Err(KeyError::ForeignCertificate)),
            },
        };
        Ok(Self {
            me,
            key_pem: key.serialize_pem(),
            key_der: key.serialize_der(),
            certificate: certificate.into(),
            authority: authority.into(),
        })
    }

    /// Writes the identity into `dir` (made when absent, mode 0700), the files with mode 0600.
    /// Whenever this is cut off, the earlier identity or this one loads.
    ///
    /// # Errors
    /// [`KeyError::File`].
    pub fn save(&self, dir: &Path) -> Result<(), KeyError> {
        make_key_dir(dir)?;
        write_private(&dir.join(CA_FILE), &self.authority)?;
        write_private(&dir.join(NEXT_KEY_FILE), self.key_pem.as_bytes())?;
        write_private(&dir.join(CERT_FILE), &self.certificate)?;
        let (next, key) = (dir.join(NEXT_KEY_FILE), dir.join(KEY_FILE));
        std::fs::rename(&next, &key)
            .and_then(|()| std::fs::File::open(dir)?.sync_all())
            .map_err(|source| KeyError::File { doing: "put in place", path: key, source })
    }

    /// What the certificate says.
    #[must_use]
    pub fn me(&self) -> &Peer {
        &self.me
    }

    /// The site's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.me.name
    }

    /// The certificate of the authority (DER).
    #[must_use]
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// The chain that is shown to peers: the certificate and the authority's.
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone(), self.authority.clone()]
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key_der.clone()).into()
    }
}

fn handed(e: impl std::fmt::Display) -> KeyError {
    KeyError::Damaged { path: "an identity as it was handed over".into(), why: e.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::{Authority, Trust};
    use super::*;

    #[test]
    fn a_renewal_that_is_cut_off_leaves_one_of_the_two_identities() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(&dir.path().join("authority")).expect("authority");
        let name = Name::new("cafe").expect("name");
        let identity = || {
            let pending = PendingIdentity::make(&name, SiteKind::Ap).expect("key");
            let der = authority.issue(pending.request(), &name, SiteKind::Ap).expect("issue");
            pending.complete(&der, authority.certificate()).expect("identity")
        };
        let (first, second) = (identity(), identity());
        let at = dir.path().join("cafe");
        first.save(&at).expect("save");
        let loads = |as_it: &Identity| {
            let found = Identity::load(&at).expect("loads");
            assert_eq!(found.me(), as_it.me());
        };
        // Each step of the second one's save.
        write_private(&at.join(NEXT_KEY_FILE), second.key_pem.as_bytes()).expect("key");
        loads(&first);
        write_private(&at.join(CERT_FILE), &second.certificate).expect("certificate");
        loads(&second);
        second.save(&at).expect("again, whole");
        loads(&second);
        assert!(!at.join(NEXT_KEY_FILE).exists());
        let mut bytes = second.to_bytes().expect("bytes");
        assert_eq!(Identity::from_bytes(&bytes).expect("the same").me(), second.me());
        let mixed = Identity { key_pem: first.key_pem.clone(), ..second.clone() };
        Identity::from_bytes(&mixed.to_bytes().expect("bytes")).expect_err("another's key");
        bytes.truncate(100);
        Identity::from_bytes(&bytes).expect_err("cut");
        Trust::new(second.authority(), Default::default()).expect("trust");
    }
}
