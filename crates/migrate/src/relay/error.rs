use std::path::PathBuf;

use godwit_disk::LiveError;
use godwit_qemu::stream::StreamError;
use godwit_transfer::{KeyError, LaneError, LinkError};
use godwit_types::{Code, CodedError};

use super::frame::FrameError;
use super::known::ReferError;

/// Why a relay could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The configuration file cannot be read.
    #[error("reading the relay configuration {}", path.display())]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration file does not say what a relay needs.
    #[error("understanding the relay configuration {}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The configuration contradicts itself.
    #[error("a relay configuration contradicts itself: {0}")]
    Contradiction(&'static str),
    /// A unix socket cannot be used.
    #[error("{what} {}", path.display())]
    Socket {
        /// What was being done.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The site's identity cannot be used.
    #[error("loading the identity of this site for a relay")]
    Keys(#[source] KeyError),
    /// The link to the other relay.
    #[error("joining the relay of site '{peer}'")]
    Link {
        /// The other site.
        peer: String,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// Another site than the expected one.
    #[error("site '{found}' joined a migration that is meant for site '{expected}'")]
    WrongPeer {
        /// Who came.
        found: String,
        /// Who was to come.
        expected: String,
    },
    /// A lane to the other relay.
    #[error("{what}")]
    Lane {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: LaneError,
    },
    /// QEMU's migration socket.
    #[error("{what}")]
    Qemu {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU closed its side before it was done.
    #[error("{0} closed its migration stream before the end")]
    QemuClosed(&'static str),
    /// The disk.
    #[error("{what}")]
    Disk {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: LiveError,
    },
    /// The stream is none that can be relayed.
    #[error("relaying the migration stream")]
    Stream(#[source] StreamError),
    /// The memory of the machine that moves cannot be read from outside its QEMU.
    #[error("reading the memory of the machine that moves")]
    GuestMemory(#[source] std::io::Error),
    /// A frame that does not unpack.
    #[error("reading a frame of the other relay: {0}")]
    Frame(String),
    /// A message out of place.
    #[error("the other relay does not keep to the protocol: {0}")]
    Protocol(&'static str),
    /// The destination's QEMU leaves unread what it was given beside its main channel.
    #[error("the destination's QEMU does not read the pages that it was given")]
    NotTaken,
    /// Memory ends at the source, but pages that it is still to send do not come.
    #[error("memory ends, but {missing} of its pages do not come")]
    Incomplete {
        /// How many.
        missing: u64,
    },
    /// The daemon of the destination has ended while it started the machine's QEMU.
    #[error("site '{site}' did not start the machine's QEMU: nobody there says that it listens")]
    NoQemu {
        /// The destination.
        site: String,
    },
    /// The other relay, which has to dial, did not come.
    #[error("the relay of site '{peer}' did not come to {address}, where this one listens")]
    NobodyCame {
        /// Its site.
        peer: String,
        /// Where it was awaited.
        address: std::net::SocketAddr,
    },
    /// What the other relay says is older than anything that is still understood.
    #[error("the other relay speaks version {theirs}, and {oldest} is the oldest here; update it")]
    TooOld {
        /// Its version.
        theirs: u16,
        /// The oldest that is spoken here.
        oldest: u16,
    },
    /// What both sites hold cannot be opened.
    #[error("opening what both sites hold, {path}", path = .path.display())]
    Held {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A frame refers to memory that is not here, or is other than at the source.
    #[error("taking pages from what both sites hold")]
    Refer(#[source] ReferError),
    /// The commit point cannot be written down.
    #[error("writing down that the machine runs here")]
    NotWritten(#[source] std::io::Error),
    /// The other relay gave up.
    #[error("the other relay gave up: {0}")]
    PeerAborted(String),
    /// The daemon asked to stop.
    #[error("stopped on request: {0}")]
    Aborted(String),
}

impl From<StreamError> for RelayError {
    fn from(e: StreamError) -> Self {
        Self::Stream(e)
    }
}

impl From<FrameError> for RelayError {
    fn from(e: FrameError) -> Self {
        Self::Frame(match e {
            FrameError::Codec(e) => e.to_string(),
            e => e.to_string(),
        })
    }
}

impl From<ReferError> for RelayError {
    fn from(e: ReferError) -> Self {
        Self::Refer(e)
    }
}

impl CodedError for RelayError {
    fn code(&self) -> Code {
        match self {
            Self::ReadConfig { .. } | Self::Config { .. } | Self::Contradiction(_) => Code::Invalid,
            Self::Keys(e) => e.code(),
            Self::Link { source, .. } => source.code(),
            Self::Lane { source, .. } => source.code(),
            Self::Disk { source, .. } => source.code(),
            Self::WrongPeer { .. } => Code::Unauthenticated,
            Self::TooOld { .. } => Code::Conflict,
            Self::NobodyCame { .. } => Code::Unavailable,
            Self::Refer(ReferError::Fill { source, .. })
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                Code::NoRoom
            }
            Self::Refer(ReferError::Fill { .. }) => Code::Internal,
            Self::Stream(_) | Self::Frame(_) | Self::Protocol(_) | Self::Refer(_) => Code::Damaged,
            Self::Held { .. } | Self::GuestMemory(_) => Code::Internal,
            Self::Aborted(_) => Code::Cancelled,
            Self::NotWritten(e) if e.kind() == std::io::ErrorKind::StorageFull => Code::NoRoom,
            Self::NotWritten(_) => Code::Internal,
            Self::Socket { .. }
            | Self::Qemu { .. }
            | Self::QemuClosed(_)
            | Self::NoQemu { .. }
            | Self::NotTaken
            | Self::Incomplete { .. }
            | Self::PeerAborted(_) => Code::Unavailable,
        }
    }
}

impl RelayError {
    /// The error and its causes in one line.
    #[must_use]
    pub fn in_full(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(e) = cause {
            text.push_str(": ");
            text.push_str(&e.to_string());
            cause = e.source();
        }
        text
    }
}
