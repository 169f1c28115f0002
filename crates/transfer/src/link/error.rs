//! What can go wrong on a link, in words for both ends.

use std::net::SocketAddr;

use godwit_types::{Code, CodedError, Name, SiteKind};

use super::JoinRefusal;
use crate::keys::{Expected, KeyError, Peer};
use crate::wire::WireError;

/// Close codes of a connection.
pub(crate) const CLOSE_DONE: u32 = 0;
pub(crate) const CLOSE_REVOKED: u32 = 1;
pub(crate) const CLOSE_NO_CERTIFICATE: u32 = 2;
pub(crate) const CLOSE_REFUSED: u32 = 3;
pub(crate) const CLOSE_ENDED: u32 = 4;
/// Stop codes of a stream.
pub(crate) const STOP_BUSY: u32 = 1;
pub(crate) const STOP_UNKNOWN: u32 = 2;
pub(crate) const STOP_PROTOCOL: u32 = 3;

/// Why there is no link, or no longer one.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The local socket could not be bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::sync::Arc<std::io::Error>,
    },
    /// TLS could not be set up with the keys at hand.
    #[error("cannot set up TLS with this site's keys")]
    Keys(#[source] std::sync::Arc<KeyError>),
    /// A connection could not even be begun.
    #[error("cannot connect to {address}: {why}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why not.
        why: String,
    },
    /// Nothing answered, or nothing has been heard for 30 s.
    #[error("no answer from the peer: it is down or the link is cut")]
    Silent,
    /// The peer's certificate is from another authority.
    #[error("the peer is a stranger: its certificate was not signed by this cloud's authority")]
    Stranger,
    /// The peer says that ours is.
    #[error(
        "the peer does not know this site: its cloud has another authority; join it with a token"
    )]
    WeAreStrange,
    /// The peer's certificate is revoked.
    #[error("the peer's certificate is revoked")]
    Revoked,
    /// Ours is.
    #[error("this site's certificate is revoked; join again with a new token")]
    WeAreRevoked,
    /// The peer's certificate is out of its dates.
    #[error("the peer's certificate has expired or is not valid yet (are the clocks right?)")]
    Expired,
    /// Ours is.
    #[error("this site's certificate has expired or is not valid yet (are the clocks right?)")]
    WeAreExpired,
    /// Another site answers at that address.
    #[error("the site at that address is {}, not '{expected}'", .found.as_ref().map_or_else(|| "another one".to_owned(), |f| format!("'{f}'")))]
    WrongName {
        /// Who should answer.
        expected: Name,
        /// Who does.
        found: Option<Name>,
    },
    /// A site answers where the center should.
    #[error("{} answers where the center should: it is believed nothing", found_words(.expected.as_ref(), .found.as_ref()))]
    NotTheCenter {
        /// The center's name, where it is known.
        expected: Option<Name>,
        /// Who answers.
        found: Option<Peer>,
    },
    /// The peer found another site than it looked for.
    #[error("the peer looked for another site at this address")]
    WeAreNotWanted,
    /// The peer has no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// Both speak QUIC, but not this protocol.
    #[error("the peer does not speak a version of the Godwit protocol that this site knows")]
    OtherProtocol,
    /// The peer declined, in its words.
    #[error("the peer refused the link: {0}")]
    Refused(String),
    /// The greeting was not what it should be.
    #[error("the greeting failed")]
    Greeting(#[source] WireError),
    /// The peer closed the link in good order.
    #[error("the peer closed the link: {0}")]
    Closed(String),
    /// This side closed the link.
    #[error("the link was closed here")]
    ClosedHere,
    /// QUIC failed.
    #[error("the link failed: {0}")]
    Transport(String),
}

impl CodedError for LinkError {
    fn code(&self) -> Code {
        match self {
            Self::Bind { .. } | Self::Keys(_) => Code::Internal,
            Self::Stranger
            | Self::WeAreStrange
            | Self::Revoked
            | Self::WeAreRevoked
            | Self::Expired
            | Self::WeAreExpired
            | Self::NotTheCenter { .. }
            | Self::NoCertificate => Code::Unauthenticated,
            Self::WrongName { .. } | Self::WeAreNotWanted | Self::OtherProtocol => Code::Conflict,
            Self::Refused(_) => Code::Conflict,
            Self::Greeting(e) => e.code(),
            Self::ClosedHere => Code::Cancelled,
            Self::Connect { .. } | Self::Silent | Self::Closed(_) | Self::Transport(_) => {
                Code::Unavailable
            }
        }
    }
}

/// What is known about an attempt when it fails.
pub(crate) struct Attempt {
    pub(crate) expected: Expected,
    pub(crate) found: Option<Peer>,
}

fn found_words(expected: Option<&Name>, found: Option<&Peer>) -> String {
    match (found, expected) {
        (Some(peer), Some(name)) if peer.kind == SiteKind::Center => {
            format!("center '{}', not '{name}',", peer.name)
        }
        (Some(peer), _) => format!("{} '{}'", peer.kind, peer.name),
        (None, _) => "another site".into(),
    }
}

/// Turns QUIC's words into ours. TLS alerts arrive as the codes 0x100 + alert.
pub(crate) fn from_connection(
    error: quinn::ConnectionError,
    attempt: Option<Attempt>,
) -> LinkError {
    use quinn::ConnectionError as E;
    let alert = |code: quinn::TransportErrorCode| {
        let code = u64::from(code);
        (0x100..0x200).contains(&code).then(|| (code - 0x100) as u8)
    };
    match error {
        E::TimedOut | E::Reset => LinkError::Silent,
        E::LocallyClosed => LinkError::ClosedHere,
        E::VersionMismatch => LinkError::OtherProtocol,
        E::TransportError(e) => match alert(e.code) {
            Some(48) => LinkError::Stranger,
            Some(44) => LinkError::Revoked,
            Some(45) => LinkError::Expired,
            Some(42) => match attempt {
                Some(Attempt { expected: Expected::Site(expected), found }) => {
                    LinkError::WrongName { expected, found: found.map(|p| p.name) }
                }
                Some(Attempt { expected: Expected::Center(expected), found }) => {
                    LinkError::NotTheCenter { expected, found }
                }
                _ => LinkError::NoCertificate,
            },
            Some(120) => LinkError::OtherProtocol,
            _ => LinkError::Transport(e.to_string()),
        },
        E::ConnectionClosed(e) => match alert(e.error_code) {
            Some(48) => LinkError::WeAreStrange,
            Some(44) => LinkError::WeAreRevoked,
            Some(45) => LinkError::WeAreExpired,
            Some(42) => LinkError::WeAreNotWanted,
            Some(120) => LinkError::OtherProtocol,
            _ => LinkError::Transport(e.to_string()),
        },
        E::ApplicationClosed(e) => {
            let words: String =
                String::from_utf8_lossy(&e.reason).escape_debug().take(400).collect();
            match u32::try_from(u64::from(e.error_code)) {
                Ok(CLOSE_REVOKED) => LinkError::WeAreRevoked,
                Ok(CLOSE_ENDED) => LinkError::WeAreExpired,
                Ok(CLOSE_NO_CERTIFICATE | CLOSE_REFUSED) => LinkError::Refused(words),
                _ => LinkError::Closed(words),
            }
        }
        E::CidsExhausted => LinkError::Transport("connection ids are used up".into()),
    }
}

/// What can go wrong on one lane.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LaneError {
    /// The link under it is gone.
    #[error("the link was lost")]
    Link(#[from] LinkError),
    /// The peer sent what the protocol forbids, or a frame was too long to send.
    #[error("the lane broke the protocol")]
    Wire(#[from] WireError),
    /// The peer takes no more on this lane.
    #[error("the peer stopped the lane: {}", stop_words(*.0))]
    Stopped(u32),
    /// The lane has ended where a frame was wanted.
    #[error("the peer ended the lane")]
    Ended,
}

fn stop_words(code: u32) -> String {
    match code {
        0 => "it needs no more".into(),
        STOP_BUSY => "too many lanes wait there".into(),
        STOP_UNKNOWN => "it does not know the kind of lane".into(),
        STOP_PROTOCOL => "it was sent what the protocol forbids".into(),
        n => format!("code {n}"),
    }
}

impl CodedError for LaneError {
    fn code(&self) -> Code {
        match self {
            Self::Link(e) => e.code(),
            Self::Wire(e) => e.code(),
            Self::Stopped(STOP_BUSY) => Code::Unavailable,
            Self::Stopped(STOP_PROTOCOL) => Code::Damaged,
            Self::Stopped(STOP_UNKNOWN) => Code::Invalid,
            Self::Stopped(_) => Code::Cancelled,
            Self::Ended => Code::Unavailable,
        }
    }
}

/// Why a site could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The center could not be found by its name.
    #[error("cannot resolve the center's address '{address}'")]
    Resolve {
        /// The address in the token.
        address: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The center could not be reached, or is another one.
    #[error("cannot reach the center at {address}")]
    Link {
        /// The address in the token.
        address: String,
        /// Why not.
        #[source]
        source: LinkError,
    },
    /// What answers at that address is not the center that made the token.
    #[error("the center at {address} is not the one that made this token (its authority differs)")]
    OtherCenter {
        /// The address in the token.
        address: String,
    },
    /// The exchange broke off.
    #[error("the exchange with the center broke off")]
    Lane(#[from] LaneError),
    /// The center declined.
    #[error("the center refused the token: {0}")]
    Refused(JoinRefusal),
    /// A key could not be made, or the certificate is not for it.
    #[error("cannot make an identity")]
    Keys(#[from] KeyError),
    /// The center took too long.
    #[error("the center took longer than 20 s")]
    TimedOut,
}

impl CodedError for JoinError {
    fn code(&self) -> Code {
        match self {
            Self::Resolve { .. } => Code::Unavailable,
            Self::Link { source, .. } => source.code(),
            Self::OtherCenter { .. } => Code::Unauthenticated,
            Self::Lane(e) => e.code(),
            Self::Refused(r) => r.code(),
            Self::Keys(e) => e.code(),
            Self::TimedOut => Code::TimedOut,
        }
    }
}
