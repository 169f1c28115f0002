//! What a relay is given open, because it may open none of it by itself.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use godwit_transfer::Identity;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::net::unix::pipe::Receiver;

use super::RelayError;

/// The most bytes of an identity.
const MAX_IDENTITY: u64 = 64 << 10;

/// Numbers of the descriptors that a relay inherits; each once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    /// Listens at [`super::RelayConfig::control`].
    pub control: i32,
    /// Holds [`Identity::to_bytes`].
    pub identity: i32,
    /// Listens for QEMU at [`super::RelayConfig::qemu`]; at the source.
    #[serde(default)]
    pub qemu: Option<i32>,
    /// Listens for QEMU where the disk is offered; at the destination.
    #[serde(default)]
    pub nbd: Option<i32>,
    /// The layers of the disk, lowest first, for reading; at the source.
    #[serde(default)]
    pub layers: Vec<i32>,
    /// Where it is written down that the machine runs here, before the source is told; made by the
    /// daemon with [`super::NOT_COMMITTED`] in it. At the destination; a relay without it tells at
    /// once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<i32>,
    /// The memory that both sites hold, for reading ([`super::RelayConfig::held`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<i32>,
    /// What belongs to an earlier visit ([`super::RelayConfig::visit`]), for reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visit: Option<i32>,
    /// Where the marks of the machine's pages are written as they come, of the length of the whole
    /// list ([`super::marks_bytes`]); at the destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived: Option<i32>,
    /// At the destination the file that is the machine's memory, for writing; at the source the memory of
    /// its QEMU's process ([`super::RelayConfig::own`]), for reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<i32>,
    /// At the source, which pages that process has written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pagemap: Option<i32>,
    /// The sealed memory that the machine has a private copy of, for reading; at the destination the one
    /// that what it left there was a copy of ([`Given::visit`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<i32>,
    /// At the destination, the end of a pipe from which a byte comes once its QEMU listens; closed
    /// without one it never will. A relay without it finds QEMU listening.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listens: Option<i32>,
}

/// The same, taken.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) control: UnixListener,
    pub(super) identity: Identity,
    pub(super) qemu: Option<UnixListener>,
    pub(super) nbd: Option<UnixListener>,
    pub(super) layers: Vec<File>,
    pub(super) commit: Option<File>,
    pub(super) held: Option<File>,
    pub(super) visit: Option<File>,
    pub(super) arrived: Option<File>,
    pub(super) memory: Option<File>,
    pub(super) pagemap: Option<File>,
    pub(super) sealed: Option<File>,
    pub(super) listens: Option<Receiver>,
}

fn contradiction<E>(why: &'static str) -> impl Fn(E) -> RelayError {
    move |_| RelayError::Contradiction(why)
}

impl Given {
    /// Whether the numbers can be those of descriptors that are this program's alone.
    fn check(&self) -> Result<(), RelayError> {
        let mut all: Vec<i32> = [self.control, self.identity].into();
        let single = [
            [self.qemu, self.nbd, self.commit, self.held, self.visit],
            [self.arrived, self.memory, self.pagemap, self.sealed, self.listens],
        ];
        all.extend(single.as_flattened().iter().flatten().chain(&self.layers));
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        let open = |fd: &i32| *fd > 2 && Path::new(&format!("/proc/self/fd/{fd}")).exists();
        match all.len() == n && all.iter().all(open) {
            true => Ok(()),
            false => Err(RelayError::Contradiction("what it was given is not open")),
        }
    }

    /// Takes what was given to this process at its start; only once.
    pub(super) fn take(&self) -> Result<Taken, RelayError> {
        self.check()?;
        let take = |fd: i32| {
            // SAFETY: `check` found it open and named once, and it is above the standard ones:
            // whoever started this process opened it for it, and nothing else here owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // The programs that a relay starts are not to have it.
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
                .map_err(contradiction("what it was given cannot be kept"))?;
            Ok::<_, RelayError>(fd)
        };
        let listener = |fd: i32| {
            let listener = std::os::unix::net::UnixListener::from(take(fd)?);
            listener
                .set_nonblocking(true)
                .and_then(|()| UnixListener::from_std(listener))
                .map_err(contradiction("what it was given does not listen"))
        };
        let pipe = |fd: i32| {
            Receiver::from_owned_fd(take(fd)?)
                .map_err(contradiction("what it was given is no pipe"))
        };
        let mut identity = File::from(take(self.identity)?);
        let mut bytes = Vec::new();
        identity
            .rewind()
            .and_then(|()| identity.take(MAX_IDENTITY).read_to_end(&mut bytes))
            .map_err(contradiction("the identity that it was given cannot be read"))?;
        Ok(Taken {
            control: listener(self.control)?,
            identity: Identity::from_bytes(&bytes).map_err(RelayError::Keys)?,
            qemu: self.qemu.map(listener).transpose()?,
            nbd: self.nbd.map(listener).transpose()?,
            layers: self
                .layers
                .iter()
                .map(|fd| take(*fd).map(File::from))
                .collect::<Result<_, _>>()?,
            commit: self.commit.map(|fd| take(fd).map(File::from)).transpose()?,
            held: self.held.map(|fd| take(fd).map(File::from)).transpose()?,
            visit: self.visit.map(|fd| take(fd).map(File::from)).transpose()?,
            arrived: self.arrived.map(|fd| take(fd).map(File::from)).transpose()?,
            memory: self.memory.map(|fd| take(fd).map(File::from)).transpose()?,
            pagemap: self.pagemap.map(|fd| take(fd).map(File::from)).transpose()?,
            sealed: self.sealed.map(|fd| take(fd).map(File::from)).transpose()?,
            listens: self.listens.map(pipe).transpose()?,
        })
    }

    /// Opens the identity for a relay that is to start: in memory alone.
    ///
    /// # Errors
    /// When the system has no room for it, or it cannot be put into bytes.
    pub fn identity(identity: &Identity) -> std::io::Result<OwnedFd> {
        let bytes = identity.to_bytes().map_err(std::io::Error::other)?;
        let fd = rustix::fs::memfd_create(c"identity", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut file = File::from(fd);
        std::io::Write::write_all(&mut file, &bytes)?;
        Ok(file.into())
    }

    /// The number that a relay is told of `fd`, which it inherits under the same one.
    #[must_use]
    pub fn number(fd: &impl AsRawFd) -> i32 {
        fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_open_or_named_twice_is_refused() {
        let (a, b) = (File::open("/dev/null").expect("a"), File::open("/dev/null").expect("b"));
        let given = Given { control: a.as_raw_fd(), identity: b.as_raw_fd(), ..Given::default() };
        given.check().expect("two that are open");
        let twice = Given { qemu: Some(given.control), ..given.clone() };
        twice.check().expect_err("twice");
        let standard = Given { nbd: Some(1), ..given.clone() };
        standard.check().expect_err("standard output");
        let taken = Given { commit: Some(given.control), ..given.clone() };
        taken.check().expect_err("twice");
        let closed = Given { layers: vec![1_000_000], ..given };
        closed.check().expect_err("not open");
    }

    #[test]
    fn what_a_daemon_of_the_release_before_gives_is_taken() {
        let text = r#"{"control":5,"identity":6,"qemu":null,"nbd":7,"layers":[]}"#;
        let given: Given = serde_json::from_str(text).expect("understood");
        assert_eq!((given.nbd, given.commit), (Some(7), None));
    }
}
