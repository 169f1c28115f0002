//! The center's certificate authority.
//!
//! ```text
//!            invite                 join, right secret              expiry
//!  (nothing) ------> token unused ----------------------> used     unused --> expired
//!                        |  withdraw                       |
//!                        v                                 v  issue   renew   revoke
//!                    withdrawn                        certificate ------> certificate --> revoked
//! ```
//! State is one JSON file beside the key, written whole before an answer goes out, so that a
//! crash can neither use a token twice nor forget a revocation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use godwit_types::{Generation, Hash, Name, SiteKind, VmId, seal, unseal};
use rcgen::PublicKeyData;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::signed::statement;
use super::token::valid_address;
use super::{
    Identity, JoinToken, KeyError, Peer, PendingIdentity, Renewal, Revocations, Secret, Serial,
    Trust, Warrant, make_key_dir, read_bounded, read_key, site_uri, unix_now, write_private,
};
use crate::link::{JoinRefusal, JoinRequest};

const KEY_FILE: &str = "authority.key";
const CERT_FILE: &str = "authority.der";
const STATE_FILE: &str = "authority.json";

/// How long a site's certificate lasts: 90 days, in seconds.
const SITE_SECONDS: u64 = 90 * 86_400;
/// How long the authority's own lasts: 20 years, in seconds.
const AUTHORITY_SECONDS: u64 = 20 * 365 * 86_400;
/// Certificates begin this many seconds in the past, because clocks differ; short ones a tenth of
/// their life.
const CLOCK_SLACK: u64 = 86_400;
/// Tokens are forgotten this many seconds after their end.
const KEEP_TOKENS: u64 = 30 * 86_400;
/// How many good certificates a site may have at once; renewed at a third of their life it has
/// three or four.
const MAX_RECENT: usize = 16;
/// The longest certificate request in bytes.
const MAX_REQUEST: usize = 8 << 10;

/// A certificate that the authority issued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// Its number.
    pub serial: Serial,
    /// For which site.
    pub name: Name,
    /// What the site is.
    pub kind: SiteKind,
    /// Its end, seconds since 1970.
    pub not_after: u64,
}

/// What became of a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenState {
    /// Nobody used it yet.
    Unused,
    /// A site joined with it. The same key may fetch its certificate again, as its answer may
    /// have been lost.
    Used {
        /// Hash of the public key that was certified.
        key: Hash,
    },
    /// An operator took it back.
    Withdrawn,
}

/// What the authority keeps of a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenInfo {
    /// Which token: 16 hex digits.
    pub id: String,
    /// The hash of its secret.
    pub secret: Hash,
    /// The name that the site gets.
    pub site: Name,
    /// What the site becomes.
    pub kind: SiteKind,
    /// Its end, seconds since 1970.
    pub expires: u64,
    /// What became of it.
    pub state: TokenState,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    issued: Vec<Issued>,
    revoked: Revocations,
    tokens: BTreeMap<String, TokenInfo>,
}

/// The certificate authority of a cloud; lives at the center.
pub struct Authority {
    dir: PathBuf,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    certificate: CertificateDer<'static>,
    trust: Trust,
    life: u64,
    state: Mutex<State>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("dir", &self.dir).finish_non_exhaustive()
    }
}

fn make(doing: &'static str) -> impl FnOnce(rcgen::Error) -> KeyError {
    move |source| KeyError::Make { doing, source }
}

fn date(unix: u64) -> OffsetDateTime {
    i64::try_from(unix)
        .ok()
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok())
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn draw_serial() -> rcgen::SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    rcgen::SerialNumber::from_slice(&bytes)
}

impl Authority {
    /// Makes a new authority in `dir` (made when absent, mode 0700).
    ///
    /// # Errors
    /// [`KeyError::Exists`], [`KeyError::File`], [`KeyError::Make`].
    pub fn create(dir: &Path) -> Result<Self, KeyError> {
        make_key_dir(dir)?;
        let cert_file = dir.join(CERT_FILE);
        if cert_file.exists() {
            return Err(KeyError::Exists { path: cert_file });
        }
        let key = rcgen::KeyPair::generate().map_err(make("make the authority's key"))?;
        let now = unix_now();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let name = format!("Godwit authority {}", hex::encode(rand::random::<[u8; 4]>()));
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages =
            vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::DigitalSignature];
        params.serial_number = Some(draw_serial());
        params.not_before = date(now.saturating_sub(CLOCK_SLACK));
        params.not_after = date(now + AUTHORITY_SECONDS);
        let certificate =
            params.self_signed(&key).map_err(make("sign the authority's certificate"))?;
        write_private(&dir.join(KEY_FILE), key.serialize_pem().as_bytes())?;
        write_private(
            &dir.join(STATE_FILE),
            b"{\"issued\":[],\"revoked\":{\"number\":0,\"serials\":[]},\"tokens\":{}}",
        )?;
        write_private(&cert_file, certificate.der())?;
        Self::open(dir)
    }

    /// Opens the authority in `dir`.
    ///
    /// # Errors
    /// [`KeyError::File`], [`KeyError::OpenKey`], [`KeyError::Damaged`].
    pub fn open(dir: &Path) -> Result<Self, KeyError> {
        let certificate = CertificateDer::from(read_bounded(&dir.join(CERT_FILE))?);
        let key = read_key(&dir.join(KEY_FILE))?;
        let state_file = dir.join(STATE_FILE);
        let file = read_bounded(&state_file)?;
        // What is revoked, and which tokens are good: one bit must not change that unseen.
        let mut state: State = unseal(&file)
            .map_err(|e| e.to_string())
            .and_then(|text| serde_json::from_slice(text).map_err(|e| e.to_string()))
            .map_err(|why| KeyError::Damaged { path: state_file, why })?;
        let damaged = |why: &str| KeyError::Damaged { path: dir.join(CERT_FILE), why: why.into() };
        if super::public_key_of(&certificate).is_none_or(|k| k != key.subject_public_key_info()) {
            return Err(damaged("it does not belong to the authority's key"));
        }
        let issuer = rcgen::Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|_| damaged("it is not a certificate"))?;
        let sign = |body: &[u8]| sign_with(issuer.key(), Revocations::KIND, body);
        if state.revoked.signature.is_empty() {
            // Kept by a version that did not sign it.
            state.revoked.signature = sign(&state.revoked.body())?;
        }
        let trust = Trust::new(&certificate, state.revoked.clone())?;
        let life = SITE_SECONDS;
        let state = Mutex::new(state);
        Ok(Self { dir: dir.to_owned(), issuer, certificate, trust, life, state })
    }

    /// Opens the authority in `dir`, or makes it when there is none.
    ///
    /// # Errors
    /// As [`Authority::open`] and [`Authority::create`].
    pub fn open_or_create(dir: &Path) -> Result<Self, KeyError> {
        if dir.join(CERT_FILE).exists() { Self::open(dir) } else { Self::create(dir) }
    }

    /// Issues certificates for `seconds` instead of 90 days.
    #[must_use]
    pub const fn with_life(mut self, seconds: u64) -> Self {
        self.life = seconds;
        self
    }

    /// The trust that the center's own endpoint uses; a revocation here takes effect on it at
    /// once.
    #[must_use]
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, state: &State) -> Result<(), KeyError> {
        let path = self.dir.join(STATE_FILE);
        let bytes = serde_json::to_vec_pretty(state)
            .map_err(|e| KeyError::Damaged { path: path.clone(), why: e.to_string() })?;
        write_private(&path, &seal(bytes))
    }

    /// Makes a join token for one site; `center` is the `host:port` at which the site reaches
    /// this center, `lifetime` is in seconds.
    ///
    /// # Errors
    /// [`KeyError::BadRequest`] for an address that is none; [`KeyError::File`].
    pub fn invite(
        &self,
        site: &Name,
        kind: SiteKind,
        center: &str,
        lifetime: u64,
    ) -> Result<JoinToken, KeyError> {
        if !valid_address(center) {
            return Err(KeyError::BadRequest { why: "the center's address is not host:port" });
        }
        if kind == SiteKind::Center {
            return Err(KeyError::BadRequest { why: "nobody joins as a center" });
        }
        let now = unix_now();
        let token = JoinToken {
            center: center.to_owned(),
            site: site.clone(),
            kind,
            authority: self.trust.fingerprint(),
            id: hex::encode(rand::random::<[u8; 8]>()),
            secret: Secret::draw(),
            expires: now.saturating_add(lifetime),
        };
        let mut state = self.lock();
        if state.issued.iter().any(|i| i.kind == SiteKind::Center && i.name == *site) {
            return Err(KeyError::BadRequest { why: "it is the name of the center's own site" });
        }
        state.tokens.retain(|_, t| t.expires.saturating_add(KEEP_TOKENS) > now);
        state.tokens.insert(
            token.id.clone(),
            TokenInfo {
                id: token.id.clone(),
                secret: token.secret.hash(),
                site: site.clone(),
                kind,
                expires: token.expires,
                state: TokenState::Unused,
            },
        );
        self.save(&state)?;
        Ok(token)
    }

    /// Takes a token back that nobody has used. One that was taken back before stays so.
    ///
    /// # Errors
    /// [`KeyError::NoSuchToken`], [`KeyError::TokenUsed`]; [`KeyError::File`], and then it is as
    /// it was.
    pub fn withdraw(&self, token_id: &str) -> Result<(), KeyError> {
        let mut state = self.lock();
        let token = state
            .tokens
            .get_mut(token_id)
            .ok_or_else(|| KeyError::NoSuchToken(token_id.escape_debug().take(40).collect()))?;
        match token.state {
            TokenState::Unused => token.state = TokenState::Withdrawn,
            TokenState::Withdrawn => return Ok(()),
            TokenState::Used { .. } => return Err(KeyError::TokenUsed(token.id.clone())),
        }
        let saved = self.save(&state);
        if saved.is_err()
            && let Some(token) = state.tokens.get_mut(token_id)
        {
            token.state = TokenState::Unused;
        }
        saved
    }

    /// The tokens that are kept.
    #[must_use]
    pub fn tokens(&self) -> Vec<TokenInfo> {
        self.lock().tokens.values().cloned().collect()
    }

    /// The certificates that were issued and have not ended.
    #[must_use]
    pub fn issued(&self) -> Vec<Issued> {
        self.lock().issued.clone()
    }

    /// Answers a site that wants to join at `now` (seconds since 1970). The token counts as used
    /// once this returns a certificate, and only the same key can fetch it again.
    ///
    /// # Errors
    /// [`JoinRefusal`], which goes to the site as it is.
    pub fn redeem(&self, request: &JoinRequest, now: u64) -> Result<Vec<u8>, JoinRefusal> {
        let (public_key, key) = parse_request(&request.csr).map_err(|_| JoinRefusal::BadRequest)?;
        let internal = |error: KeyError| {
            tracing::error!(error = %error, "cannot answer a site that joins");
            JoinRefusal::Internal
        };
        let mut state = self.lock();
        let token = state.tokens.get(&request.token_id).ok_or(JoinRefusal::UnknownToken)?;
        // Hashes are compared, so the time it takes tells nothing about the secret.
        if Hash::of(&request.secret) != token.secret {
            return Err(JoinRefusal::WrongSecret);
        }
        match &token.state {
            TokenState::Withdrawn => return Err(JoinRefusal::Withdrawn),
            TokenState::Used { key: used } if *used != key => return Err(JoinRefusal::Used),
            _ => {}
        }
        if now >= token.expires {
            return Err(JoinRefusal::Expired);
        }
        let (name, kind) = (token.site.clone(), token.kind);
        let (der, issued) = self.sign(&public_key, &name, kind, self.life).map_err(internal)?;
        // What cannot be written down has not happened: the token stays good.
        let mut next = state.clone();
        next.issued.retain(|i| i.not_after.saturating_add(CLOCK_SLACK) > unix_now());
        next.issued.push(issued);
        if let Some(token) = next.tokens.get_mut(&request.token_id) {
            token.state = TokenState::Used { key };
        }
        self.save(&next).map_err(internal)?;
        *state = next;
        Ok(der)
    }

    /// Issues a certificate for a key that the caller vouches for.
    ///
    /// # Errors
    /// [`KeyError::BadRequest`], [`KeyError::Make`], [`KeyError::File`].
    pub fn issue(&self, csr: &[u8], name: &Name, kind: SiteKind) -> Result<Vec<u8>, KeyError> {
        self.issue_for(csr, name, kind, self.life)
    }

    /// As [`Authority::issue`], with a lifetime in seconds.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn issue_for(
        &self,
        csr: &[u8],
        name: &Name,
        kind: SiteKind,
        lifetime: u64,
    ) -> Result<Vec<u8>, KeyError> {
        let (public_key, _) = parse_request(csr)?;
        self.issue_recorded(&mut self.lock(), &public_key, name, kind, lifetime)
    }

    fn issue_recorded(
        &self,
        state: &mut State,
        public_key: &rcgen::PublicKey,
        name: &Name,
        kind: SiteKind,
        lifetime: u64,
    ) -> Result<Vec<u8>, KeyError> {
        let (der, issued) = self.sign(public_key, name, kind, lifetime)?;
        state.issued.retain(|i| i.not_after.saturating_add(CLOCK_SLACK) > unix_now());
        state.issued.push(issued);
        self.save(state)?;
        Ok(der)
    }

    /// A new certificate for a site that still has a good one: same name, same kind. The old
    /// one stays good until its end.
    ///
    /// # Errors
    /// As [`Authority::issue`]; a site that was given [`MAX_RECENT`] within a day has to wait.
    pub fn renew(&self, peer: &Peer, csr: &[u8]) -> Result<Vec<u8>, KeyError> {
        let (public_key, _) = parse_request(csr)?;
        let now = unix_now();
        // Under the lock, so that a revocation comes before or sees the new one.
        let mut state = self.lock();
        if state.revoked.serials.contains(&peer.serial) {
            return Err(KeyError::BadRequest { why: "the present certificate is revoked" });
        }
        if now >= peer.not_after {
            return Err(KeyError::BadRequest { why: "the present certificate has ended" });
        }
        // Its rate is bounded, not how many are good: one that cannot keep what it was given must
        // not be locked out by its own tries.
        let since = now.saturating_add(self.life).saturating_sub(86_400.min(self.life / 4));
        let recent = state.issued.iter().filter(|i| i.name == peer.name && i.not_after > since);
        if recent.count() >= MAX_RECENT {
            return Err(KeyError::BadRequest { why: "the site was given too many recently" });
        }
        self.issue_recorded(&mut state, &public_key, &peer.name, peer.kind, self.life)
    }

    /// Whether the authority knows that it made the certificate with this number.
    #[must_use]
    pub fn knows(&self, serial: &Serial) -> bool {
        self.lock().issued.iter().any(|i| i.serial == *serial)
    }

    /// Enters the certificate that a peer has shown, so that a revocation of its site covers it:
    /// an authority that was restored from a copy does not know what it made since.
    ///
    /// # Errors
    /// [`KeyError::File`].
    pub fn enter(&self, peer: &Peer) -> Result<(), KeyError> {
        let mut state = self.lock();
        if state.issued.iter().any(|i| i.serial == peer.serial) {
            return Ok(());
        }
        state.issued.push(Issued {
            serial: peer.serial.clone(),
            name: peer.name.clone(),
            kind: peer.kind,
            not_after: peer.not_after,
        });
        self.save(&state)
    }

    /// The identity of the center itself: loaded from `dir`, or made there, or renewed when it is
    /// due ([`Renewal`]).
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn own_identity(&self, dir: &Path, name: &Name) -> Result<Identity, KeyError> {
        match Identity::load(dir) {
            Ok(identity)
                if identity.name() == name
                    && identity.authority() == &self.certificate
                    && !self.trust.is_revoked(&identity.me().serial)
                    && !Renewal::of(identity.me()).is_due(unix_now()) =>
            {
                return Ok(identity);
            }
            Ok(_) => {}
            Err(KeyError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            }
            Err(other) => return Err(other),
        }
        let pending = PendingIdentity::make(name, SiteKind::Center)?;
        let certificate = self.issue(pending.request(), name, SiteKind::Center)?;
        let identity = pending.complete(&certificate, &self.certificate)?;
        identity.save(dir)?;
        Ok(identity)
    }

    /// Revokes every certificate of a site and takes back every token that was made for it, used
    /// or not: with a used one its holder could fetch another certificate. Its links to this
    /// center are closed. Returns the new list, for the other sites.
    ///
    /// # Errors
    /// [`KeyError::File`]; then nothing is revoked.
    pub fn revoke_site(&self, name: &Name) -> Result<Revocations, KeyError> {
        let mut state = self.lock();
        let now = unix_now();
        state.issued.retain(|i| i.not_after.saturating_add(CLOCK_SLACK) > now);
        let mut revoked = state.revoked.clone();
        // A certificate that has ended needs no place on the list; one that may be good keeps it.
        revoked.serials.retain(|s| state.issued.iter().any(|i| i.serial == *s));
        let of_site = state.issued.iter().filter(|i| i.name == *name);
        revoked.serials.extend(of_site.map(|i| i.serial.clone()));
        revoked.number = revoked.number.saturating_add(1).max(now);
        revoked.signature = self.sign_statement(Revocations::KIND, &revoked.body())?;
        let tokens = state.tokens.clone();
        for token in state.tokens.values_mut().filter(|t| t.site == *name) {
            token.state = TokenState::Withdrawn;
        }
        let before = std::mem::replace(&mut state.revoked, revoked.clone());
        if let Err(error) = self.save(&state) {
            state.revoked = before;
            state.tokens = tokens;
            return Err(error);
        }
        self.trust.revoke(revoked.clone())?;
        Ok(revoked)
    }

    /// The authority's certificate (DER).
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The word of this authority that `site` may run `vm` under `generation`.
    ///
    /// # Errors
    /// [`KeyError::Make`].
    pub fn warrant(
        &self,
        vm: VmId,
        generation: Generation,
        site: &Name,
    ) -> Result<Warrant, KeyError> {
        let body = Warrant::body(vm, generation, site);
        let signature = self.sign_statement(Warrant::KIND, &body)?;
        Ok(Warrant { vm, generation, site: site.clone(), signature })
    }

    fn sign_statement(&self, kind: &str, body: &[u8]) -> Result<Vec<u8>, KeyError> {
        sign_with(self.issuer.key(), kind, body)
    }

    fn sign(
        &self,
        public_key: &rcgen::PublicKey,
        name: &Name,
        kind: SiteKind,
        lifetime: u64,
    ) -> Result<(Vec<u8>, Issued), KeyError> {
        let now = unix_now();
        let not_after = now.saturating_add(lifetime);
        // Nothing is taken from the request but its public key.
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name.as_str());
        let uri = site_uri(kind, name).try_into().map_err(make("name a certificate"))?;
        params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            rcgen::ExtendedKeyUsagePurpose::ServerAuth,
            rcgen::ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let serial = draw_serial();
        let issued = Issued {
            serial: Serial::from_bytes(serial.as_ref()),
            name: name.clone(),
            kind,
            not_after,
        };
        params.serial_number = Some(serial);
        params.not_before = date(now.saturating_sub(CLOCK_SLACK.min(lifetime / 10)));
        params.not_after = date(not_after);
        let signed =
            params.signed_by(public_key, &self.issuer).map_err(make("sign a certificate"))?;
        Ok((signed.der().to_vec(), issued))
    }
}

fn sign_with(key: &rcgen::KeyPair, kind: &str, body: &[u8]) -> Result<Vec<u8>, KeyError> {
    use rcgen::SigningKey;
    key.sign(&statement(kind, body)).map_err(make("sign a statement"))
}

/// Checks a request's own signature and gives its public key and that key's hash.
fn parse_request(csr: &[u8]) -> Result<(rcgen::PublicKey, Hash), KeyError> {
    if csr.len() > MAX_REQUEST {
        return Err(KeyError::BadRequest { why: "it is over 8 KiB long" });
    }
    let der = CertificateSigningRequestDer::from(csr);
    let parsed = rcgen::CertificateSigningRequestParams::from_der(&der).map_err(|_| {
        KeyError::BadRequest { why: "it does not parse, or its signature is wrong" }
    })?;
    let hash = Hash::of(&parsed.public_key.subject_public_key_info());
    Ok((parsed.public_key, hash))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    #[test]
    fn keys_are_closed_to_others_and_an_open_one_is_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(dir.path()).expect("create");
        assert!(matches!(Authority::create(dir.path()), Err(KeyError::Exists { .. })));
        let key = dir.path().join(KEY_FILE);
        let mode = |m| std::fs::set_permissions(&key, std::fs::Permissions::from_mode(m));
        let now = std::fs::metadata(&key).expect("key").permissions().mode() & 0o777;
        assert_eq!(now, 0o600);
        mode(0o644).expect("chmod");
        assert!(matches!(Authority::open(dir.path()), Err(KeyError::OpenKey { mode: 0o644, .. })));
        mode(0o600).expect("chmod");
        let again = Authority::open(dir.path()).expect("open");
        assert_eq!(again.trust().fingerprint(), authority.trust().fingerprint());
    }

    #[test]
    fn only_the_hash_of_a_secret_is_kept_and_a_lost_answer_can_be_fetched_again() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(dir.path()).expect("create");
        let token =
            authority.invite(&name("cafe"), SiteKind::Ap, "127.0.0.1:7701", 60).expect("invite");
        let state = std::fs::read_to_string(dir.path().join(STATE_FILE)).expect("state");
        assert!(!state.contains(&hex::encode(token.secret.0)));
        assert!(state.contains(&token.secret.hash().to_string()));
        // Another process of the center answers: the token outlives a restart.
        let authority = Authority::open(dir.path()).expect("open");
        let pending = PendingIdentity::make(&name("cafe"), SiteKind::Ap).expect("key");
        let request = JoinRequest {
            token_id: token.id.clone(),
            secret: token.secret.0,
            csr: pending.request().to_vec(),
        };
        authority.redeem(&request, token.expires - 1).expect("the first answer, lost");
        let certificate = authority.redeem(&request, token.expires - 1).expect("the second");
        pending.complete(&certificate, authority.certificate()).expect("it fits the key");
        let other = PendingIdentity::make(&name("cafe"), SiteKind::Ap).expect("key");
        let theft = JoinRequest { csr: other.request().to_vec(), ..request };
        assert_eq!(authority.redeem(&theft, token.expires - 1), Err(JoinRefusal::Used));
        assert!(matches!(
            other.complete(&certificate, authority.certificate()),
            Err(KeyError::ForeignCertificate)
        ));
    }

    #[test]
    fn a_token_is_not_used_up_by_an_answer_that_could_not_be_written_down() {
        let dir = tempfile::tempdir().expect("dir");
        let home = dir.path().join("authority");
        let authority = Authority::create(&home).expect("create");
        let token =
            authority.invite(&name("cafe"), SiteKind::Ap, "127.0.0.1:7701", 60).expect("invite");
        let request = || {
            let pending = PendingIdentity::make(&name("cafe"), SiteKind::Ap).expect("key");
            let csr = pending.request().to_vec();
            JoinRequest { token_id: token.id.clone(), secret: token.secret.0, csr }
        };
        let away = dir.path().join("away");
        std::fs::rename(&home, &away).expect("nothing can be written");
        assert_eq!(authority.redeem(&request(), token.expires - 1), Err(JoinRefusal::Internal));
        std::fs::rename(&away, &home).expect("back");
        // Whoever tries again makes another key.
        authority.redeem(&request(), token.expires - 1).expect("the token is good");
        let other = authority.redeem(&request(), token.expires - 1);
        assert_eq!(other, Err(JoinRefusal::Used));
    }

    #[test]
    fn a_renewed_certificate_is_for_the_same_site_until_it_is_revoked() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(dir.path()).expect("create");
        let issue = || {
            let pending = PendingIdentity::make(&name("cafe"), SiteKind::Ap).expect("key");
            authority.issue(pending.request(), &name("cafe"), SiteKind::Ap)
        };
        let peer = Peer::of_certificate(&issue().expect("issue")).expect("a site");
        let csr = PendingIdentity::make(&name("evil"), SiteKind::Center).expect("key");
        let renewed = authority.renew(&peer, csr.request()).expect("renew");
        let renewed = Peer::of_certificate(&renewed).expect("a site");
        assert_eq!((&renewed.name, renewed.kind), (&peer.name, SiteKind::Ap));
        assert_ne!(renewed.serial, peer.serial);
        let list = authority.revoke_site(&name("cafe")).expect("revoke");
        assert_eq!(list.serials.len(), 2);
        assert!(authority.renew(&renewed, csr.request()).is_err());
    }

    #[test]
    fn a_revoked_site_cannot_come_back_with_the_tokens_it_was_given() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(dir.path()).expect("create");
        let invite = |site: &str| {
            authority.invite(&name(site), SiteKind::Ap, "127.0.0.1:7701", 60).expect("invite")
        };
        let ask = |token: &JoinToken, key: &PendingIdentity| {
            let request = JoinRequest {
                token_id: token.id.clone(),
                secret: token.secret.0,
                csr: key.request().to_vec(),
            };
            authority.redeem(&request, token.expires - 1)
        };
        let key = PendingIdentity::make(&name("cafe"), SiteKind::Ap).expect("key");
        let (used, unused, other) = (invite("cafe"), invite("cafe"), invite("bar"));
        ask(&used, &key).expect("joins");
        assert!(matches!(authority.withdraw(&used.id), Err(KeyError::TokenUsed(_))));
        authority.revoke_site(&name("cafe")).expect("revoke");
        for token in [&used, &unused] {
            assert_eq!(ask(token, &key), Err(JoinRefusal::Withdrawn));
        }
        let bar = PendingIdentity::make(&name("bar"), SiteKind::Ap).expect("key");
        ask(&other, &bar).expect("another site's token is as good as before");
        // A new token is the operator's word that the site may come back.
        ask(&invite("cafe"), &key).expect("joins anew");
        authority.withdraw(&invite("cafe").id).expect("unused");
    }
}
