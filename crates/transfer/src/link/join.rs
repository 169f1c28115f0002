//! How a site without a certificate gets one.
//!
//! ```text
//!  site                                             center
//!   | TLS, no client certificate; the center is       |
//!   | known by the fingerprint in the token           |
//!   | JoinRequest{token id, secret, request} -------> | checks, marks the token used
//!   | <---------- Joined{certificate, authority} | Refused
//! ```

use std::sync::Arc;
use std::time::Duration;

use godwit_types::{Code, CodedError, Name};
use serde::{Deserialize, Serialize};

use super::endpoint::client_endpoint;
use super::error::Attempt;
use super::lane::Lane;
use super::{JoinError, LaneError, LinkError, from_connection};
use crate::keys::{
    Authority, Expected, Identity, JoinToken, JoinVerifier, PendingIdentity, unix_now,
};
use crate::wire::{ALPN_JOIN, LaneHeader, LaneKind, Priority, decode_open, encode};

/// What a site asks for.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Which token.
    pub token_id: String,
    /// Its secret.
    pub secret: [u8; 32],
    /// The certificate request (PKCS#10, DER).
    pub csr: Vec<u8>,
}

impl std::fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinRequest").field("token_id", &self.token_id).finish_non_exhaustive()
    }
}

/// Why the center does not let a site in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum JoinRefusal {
    /// The center does not keep such a token.
    #[error("the center does not know it; make a new one")]
    UnknownToken,
    /// The token exists, but the secret is another.
    #[error("its secret is wrong; copy the whole line again")]
    WrongSecret,
    /// Its time is over.
    #[error("it has expired; make a new one")]
    Expired,
    /// Another site has joined with it.
    #[error("it was used before; make a new one")]
    Used,
    /// An operator took it back.
    #[error("it was withdrawn; make a new one")]
    Withdrawn,
    /// The certificate request is malformed.
    #[error("the certificate request does not parse")]
    BadRequest,
    /// The center failed.
    #[error("the center failed to make a certificate; its log says why")]
    Internal,
}

impl CodedError for JoinRefusal {
    fn code(&self) -> Code {
        match self {
            Self::BadRequest => Code::Invalid,
            Self::Internal => Code::Internal,
            _ => Code::Unauthenticated,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum JoinReply {
    Joined { certificate: Vec<u8>, authority: Vec<u8> },
    Refused(JoinRefusal),
}

/// How long the whole exchange may take.
const JOIN_TIMEOUT: Duration = Duration::from_secs(20);

/// What a site has once it has joined.
#[derive(Debug, Clone)]
pub struct Joined {
    /// Its key and certificate.
    pub identity: Identity,
    /// Name of the center, as in its certificate: the only one that the site obeys.
    pub center: Name,
}

/// Joins the cloud that made `token`: makes a key, has the center certify it, and returns the
/// identity, which the caller saves.
///
/// # Errors
/// [`JoinError`]; [`JoinError::Refused`] says which way the token is not good.
pub async fn join(token: &JoinToken) -> Result<Joined, JoinError> {
    tokio::time::timeout(JOIN_TIMEOUT, exchange(token)).await.map_err(|_| JoinError::TimedOut)?
}

async fn exchange(token: &JoinToken) -> Result<Joined, JoinError> {
    let resolve = |source| JoinError::Resolve { address: token.center.clone(), source };
    let address = tokio::net::lookup_host(&token.center)
        .await
        .map_err(resolve)?
        .next()
        .ok_or_else(|| resolve(std::io::Error::from(std::io::ErrorKind::NotFound)))?;
    let failed = |source| match source {
        LinkError::Stranger | LinkError::WrongName { .. } | LinkError::NotTheCenter { .. } => {
            JoinError::OtherCenter { address: token.center.clone() }
        }
        source => JoinError::Link { address: token.center.clone(), source },
    };
    let verifier = Arc::new(JoinVerifier::new(token.authority));
    let (endpoint, config) =
        client_endpoint(address, verifier.clone(), ALPN_JOIN).map_err(failed)?;
    let connection = endpoint
        .connect_with(config, address, "site.godwit")
        .map_err(|e| failed(LinkError::Connect { address, why: e.to_string() }))?
        .await
        .map_err(|e| {
            let attempt = Attempt { expected: Expected::Center(None), found: None };
            failed(from_connection(e, Some(attempt)))
        })?;
    let (send, recv) = connection.open_bi().await.map_err(|e| failed(from_connection(e, None)))?;
    let mut lane = Lane::new(header(), send, recv);
    let pending = PendingIdentity::make(&token.site, token.kind)?;
    let request = JoinRequest {
        token_id: token.id.clone(),
        secret: token.secret.0,
        csr: pending.request().to_vec(),
    };
    let bytes = encode("join request", &request).map_err(LaneError::from)?;
    lane.send_bytes(bytes).await?;
    let reply = lane.recv().await?.ok_or(LaneError::Ended)?;
    let reply: JoinReply = decode_open("join reply", &reply).map_err(LaneError::from)?;
    connection.close(0u32.into(), b"done");
    endpoint.wait_idle().await;
    match reply {
        JoinReply::Joined { certificate, authority } => {
            if godwit_types::Hash::of(&authority) != token.authority {
                return Err(JoinError::OtherCenter { address: token.center.clone() });
            }
            let center = verifier.seen.lock().ok().and_then(|s| s.clone()).map(|p| p.name);
            let other = || JoinError::OtherCenter { address: token.center.clone() };
            let identity = pending.complete(&certificate, &authority)?;
            Ok(Joined { identity, center: center.ok_or_else(other)? })
        }
        JoinReply::Refused(why) => Err(JoinError::Refused(why)),
    }
}

/// The center's side, for one connection.
pub(crate) async fn answer(connection: quinn::Connection, authority: Arc<Authority>) {
    let work = async {
        let (send, recv) =
            connection.accept_bi().await.map_err(|e| LaneError::from(from_connection(e, None)))?;
        let mut lane = Lane::new(header(), send, recv);
        let bytes = lane.recv().await?.ok_or(LaneError::Ended)?;
        let request: JoinRequest = decode_open("join request", &bytes)?;
        let from = connection.remote_address();
        let token_id: String = request.token_id.escape_debug().take(40).collect();
        let redeemed = {
            let authority = Arc::clone(&authority);
            tokio::task::spawn_blocking(move || authority.redeem(&request, unix_now()))
                .await
                .unwrap_or(Err(JoinRefusal::Internal))
        };
        let reply = match redeemed {
            Ok(certificate) => {
                tracing::info!(%from, token = %token_id, "a site joined");
                JoinReply::Joined { certificate, authority: authority.certificate().to_vec() }
            }
            Err(why) => {
                tracing::warn!(%from, token = %token_id, reason = %why, "refused a site that wants to join");
                JoinReply::Refused(why)
            }
        };
        lane.send_bytes(encode("join reply", &reply)?).await?;
        lane.finish().await?;
        connection.closed().await;
        Ok::<_, LaneError>(())
    };
    match tokio::time::timeout(JOIN_TIMEOUT, work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a join broke off"),
        Err(_) => connection.close(0u32.into(), b"this took too long"),
    }
}

/// The join exchange has one stream, which needs no header on the wire.
fn header() -> LaneHeader {
    LaneHeader { kind: LaneKind::Steering, priority: Priority::Control, about: bytes::Bytes::new() }
}
