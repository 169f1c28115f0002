//! What the authority signs apart from certificates: statements that anybody who trusts it can
//! check, whoever hands them over.
//!
//! ```text
//!  signed bytes = "godwit statement", 0, kind of statement, 0, body
//! ```
//! They can be mistaken neither for a certificate (whose signed part is DER and begins with 0x30)
//! nor for a statement of another kind. Each body begins with the version of its form.

use godwit_types::{Generation, Name, VmId};
use rustls::SignatureScheme;
use serde::{Deserialize, Serialize};

/// The longest signature in bytes; one by ECDSA with P-256 has at most 72.
const MAX_SIGNATURE: usize = 128;

/// The bytes that are signed.
pub(super) fn statement(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut all = b"godwit statement\0".to_vec();
    all.extend_from_slice(kind.as_bytes());
    all.push(0);
    all.extend_from_slice(body);
    all
}

/// Whether `signature` over `statement` is by the key of this certificate (DER).
pub(super) fn is_signed_by(certificate: &[u8], statement: &[u8], signature: &[u8]) -> bool {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return false };
    let key = &certificate.public_key().subject_public_key.data;
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    signature.len() <= MAX_SIGNATURE
        && algorithms
            .mapping
            .iter()
            .filter(|(scheme, _)| *scheme == SignatureScheme::ECDSA_NISTP256_SHA256)
            .flat_map(|(_, all)| all.iter())
            .any(|a| a.verify_signature(key, statement, signature).is_ok())
}

/// The center's word that a site may run a machine under a generation. Without it no site's claim
/// to a machine is believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warrant {
    /// The machine.
    pub vm: VmId,
    /// The generation.
    pub generation: Generation,
    /// The site.
    pub site: Name,
    /// By the authority, over all of the above.
    #[serde(with = "hex::serde")]
    pub(super) signature: Vec<u8>,
}

impl Warrant {
    /// Which kind of statement it is.
    pub(super) const KIND: &'static str = "warrant";
    /// The version of its form: 1, the first.
    const FORM: u8 = 1;

    /// What is signed: form, 16 bytes of the machine's id, 8 of the generation (big-endian), the
    /// site's name.
    pub(super) fn body(vm: VmId, generation: Generation, site: &Name) -> Vec<u8> {
        let mut body = vec![Self::FORM];
        body.extend_from_slice(vm.0.as_bytes());
        body.extend_from_slice(&generation.0.to_be_bytes());
        body.extend_from_slice(site.as_str().as_bytes());
        body
    }

    /// Whether it is for this machine, generation and site. Says nothing about who signed it.
    #[must_use]
    pub fn is_for(&self, vm: VmId, generation: Generation, site: &Name) -> bool {
        self.vm == vm && self.generation == generation && self.site == *site
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::{Authority, KeyError, PendingIdentity, Revocations, Serial, Trust};
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    #[test]
    fn a_warrant_holds_for_one_machine_generation_and_site() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(&dir.path().join("a")).expect("authority");
        let other = Authority::create(&dir.path().join("b")).expect("authority");
        let (vm, site) = (VmId::new(), name("cafe"));
        let good = authority.warrant(vm, Generation(7), &site).expect("signed");
        let check = |w: &Warrant| authority.trust().check_warrant(w);
        check(&good).expect("good");
        assert!(good.is_for(vm, Generation(7), &site));
        assert!(!good.is_for(vm, Generation(8), &site));
        let text = serde_json::to_string(&good).expect("json");
        check(&serde_json::from_str(&text).expect("parses")).expect("good");
        let forged = [
            Warrant { generation: Generation(8), ..good.clone() },
            Warrant { site: name("bar"), ..good.clone() },
            Warrant { vm: VmId::new(), ..good.clone() },
            Warrant { signature: vec![], ..good.clone() },
            other.warrant(vm, Generation(7), &site).expect("signed by another"),
        ];
        for w in &forged {
            assert!(matches!(check(w), Err(KeyError::Unsigned { .. })), "{w:?}");
        }
        // A list of revoked certificates is no warrant, whatever its bytes are.
        let body = Warrant::body(vm, Generation(7), &site);
        assert_ne!(statement(Warrant::KIND, &body), statement(Revocations::KIND, &body));
    }

    #[test]
    fn no_peer_can_close_the_list_of_revoked_certificates() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(&dir.path().join("a")).expect("authority");
        let pending = PendingIdentity::make(&name("cafe"), godwit_types::SiteKind::Ap);
        let pending = pending.expect("key");
        authority
            .issue(pending.request(), &name("cafe"), godwit_types::SiteKind::Ap)
            .expect("issue");
        let site = Trust::new(authority.certificate(), Revocations::default()).expect("trust");
        // The number is the highest there is; a site that took it would take no other ever.
        let jump = Revocations { number: u64::MAX, ..Revocations::default() };
        assert!(matches!(site.revoke(jump.clone()), Err(KeyError::Unsigned { .. })));
        let list = authority.revoke_site(&name("cafe")).expect("revoked");
        let raised = Revocations { number: u64::MAX, ..list.clone() };
        assert!(site.revoke(raised).is_err());
        let emptied = Revocations { serials: BTreeSet::<Serial>::new(), ..list.clone() };
        assert!(site.revoke(emptied).is_err());
        assert!(site.revoke(list.clone()).expect("signed"));
        assert!(!site.revoke(list.clone()).expect("the same again"));
        assert_eq!(site.revocations().serials.len(), 1);
        // What an earlier version kept of such a jump does not count either.
        let kept = Trust::new(authority.certificate(), jump).expect("trust");
        assert!(kept.revoke(list).expect("signed"));
    }

    #[test]
    fn a_restored_center_is_obeyed_above_what_it_sent_before() {
        let dir = tempfile::tempdir().expect("dir");
        let at = dir.path().join("a");
        let authority = Authority::create(&at).expect("authority");
        let copy = std::fs::read(at.join("authority.json")).expect("state");
        let first = authority.revoke_site(&name("cafe")).expect("revoked");
        let second = authority.revoke_site(&name("cafe")).expect("revoked");
        assert!(second.number > first.number);
        std::fs::write(at.join("authority.json"), copy).expect("restored");
        let restored = Authority::open(&at).expect("opens");
        let now = super::super::unix_now();
        assert!(restored.revoke_site(&name("bar")).expect("revoked").number >= now);
    }
}
