//! The control socket: how a daemon steers a relay, and finds it again after a restart.
//!
//! JSON lines of at most 64 KiB. The relay sends its [`RelayStatus`] on connection and after each
//! change (levels, not edges: a status that is overtaken may be left out). The daemon sends
//! [`RelayCommand`]s; each is answered by `{"accepted":bool}`. Any number of daemons may attach.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};

use super::{RelayError, RelayStatus};

const MAX_LINE: u64 = 64 << 10;
/// How long a relay may take to answer a command.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A status is sent at most this often while only counts change.
const PROGRESS: Duration = Duration::from_millis(50);

/// What a daemon asks of a relay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "command")]
pub enum RelayCommand {
    /// Let what is under way arrive, then say `drained`; for a switch before the round is over.
    Drain,
    /// QEMU was told to switch: read on.
    Proceed {
        /// Pages of the machine's memory ([`godwit_qemu::RAM_BLOCK`]) that the destination's QEMU
        /// reads before the machine runs there; those that are missing there are sent right behind
        /// the device state.
        #[serde(default)]
        first: Vec<u64>,
    },
    /// End the migration; QEMU's sockets are closed, at both ends.
    Abort {
        /// Why, for people.
        why: String,
    },
    /// The machine shall come back: take the rest of QEMU's stream in place of the destination.
    /// Only when the destination is known to be dead before the commit point.
    Reclaim,
    /// The other relay listens there: dial it. Refused once there is a link.
    Dial {
        /// Its address.
        address: std::net::SocketAddr,
    },
    /// The final status was read; the process may end.
    Finish,
}

/// A command with the way to its answer.
pub(crate) type Asked = (RelayCommand, oneshot::Sender<bool>);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", untagged)]
enum Line {
    Answer { accepted: bool },
    Status(Box<RelayStatus>),
}

/// Serves `listener` until it is dropped.
pub(crate) async fn serve(
    listener: UnixListener,
    status: watch::Receiver<RelayStatus>,
    commands: mpsc::Sender<Asked>,
) {
    let mut sessions = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                if sessions.len() < 16 {
                    sessions.spawn(session(stream, status.clone(), commands.clone()));
                }
            }
            Some(_) = sessions.join_next() => {}
        }
    }
}

async fn session(
    stream: UnixStream,
    mut status: watch::Receiver<RelayStatus>,
    commands: mpsc::Sender<Asked>,
) {
    let (read, mut write) = stream.into_split();
    let mut lines = LineReader::new(read);
    let mut now = status.borrow_and_update().clone();
    if send(&mut write, &Line::Status(Box::new(now.clone()))).await.is_err() {
        return;
    }
    let mut due = tokio::time::Instant::now();
    loop {
        tokio::select! {
            changed = status.changed() => {
                if changed.is_err() {
                    return;
                }
                let next = status.borrow_and_update().clone();
                let small = RelayStatus { counts: now.counts, rtt_us: now.rtt_us, ..next.clone() } == now;
                if small && tokio::time::Instant::now() < due {
                    continue;
                }
                due = tokio::time::Instant::now() + PROGRESS;
                now = next;
                if send(&mut write, &Line::Status(Box::new(now.clone()))).await.is_err() {
                    return;
                }
            }
            line = lines.next() => {
                let Ok(Some(line)) = line else { return };
                let accepted = match serde_json::from_slice::<RelayCommand>(&line) {
                    Ok(command) => {
                        let (tx, rx) = oneshot::channel();
                        commands.send((command, tx)).await.is_ok() && rx.await.unwrap_or(false)
                    }
                    Err(_) => false,
                };
                if send(&mut write, &Line::Answer { accepted }).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn send(write: &mut OwnedWriteHalf, line: &Line) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    write.write_all(&text).await
}

/// Reads bounded lines; safe to cancel.
struct LineReader {
    inner: BufReader<OwnedReadHalf>,
    partial: Vec<u8>,
}

impl LineReader {
    fn new(read: OwnedReadHalf) -> Self {
        Self { inner: BufReader::new(read), partial: Vec::new() }
    }

    async fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            let room = MAX_LINE.saturating_sub(self.partial.len() as u64);
            if room == 0 {
                return Err(std::io::Error::other("a line is longer than 64 KiB"));
            }
            let mut bounded = (&mut self.inner).take(room);
            let n = bounded.read_until(b'\n', &mut self.partial).await?;
            if self.partial.last() == Some(&b'\n') {
                self.partial.pop();
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
            if n == 0 {
                return Ok(None);
            }
        }
    }
}

/// A daemon's side of the control socket.
#[derive(Debug)]
pub struct RelayClient {
    path: PathBuf,
    status: watch::Receiver<RelayStatus>,
    write: tokio::sync::Mutex<(OwnedWriteHalf, mpsc::Receiver<bool>)>,
    reader: tokio::task::AbortHandle,
}

impl Drop for RelayClient {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl RelayClient {
    /// Attaches to the relay whose control socket is at `path`, and reads its status.
    ///
    /// # Errors
    /// [`RelayError::Socket`] when no relay is there.
    pub async fn attach(path: &Path) -> Result<Self, RelayError> {
        let fail = |source| RelayError::Socket {
            what: "attaching to the relay at",
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).await.map_err(fail)?;
        let (read, write) = stream.into_split();
        let mut lines = LineReader::new(read);
        let ended = || fail(std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
        let first = lines.next().await.map_err(fail)?.ok_or_else(ended)?;
        let Ok(Line::Status(first)) = serde_json::from_slice(&first) else {
            return Err(fail(std::io::Error::other("it does not speak as a relay does")));
        };
        let (tx, status) = watch::channel(*first);
        let (answer_tx, answers) = mpsc::channel(1);
        let reader = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next().await {
                match serde_json::from_slice(&line) {
                    Ok(Line::Status(s)) => {
                        tx.send_replace(*s);
                    }
                    Ok(Line::Answer { accepted }) => {
                        if answer_tx.send(accepted).await.is_err() {
                            return;
                        }
                    }
                    Err(_) => return,
                }
            }
        })
        .abort_handle();
        let write = tokio::sync::Mutex::new((write, answers));
        Ok(Self { path: path.to_owned(), status, write, reader })
    }

    /// As [`RelayClient::attach`], for a relay that is just starting.
    ///
    /// # Errors
    /// As there, after `within`.
    pub async fn attach_within(path: &Path, within: Duration) -> Result<Self, RelayError> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            match Self::attach(path).await {
                Ok(client) => return Ok(client),
                Err(e) if tokio::time::Instant::now() >= deadline => return Err(e),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// The status as last heard.
    #[must_use]
    pub fn status(&self) -> RelayStatus {
        self.status.borrow().clone()
    }

    /// A view of the status that tells of changes; closed when the relay is gone.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<RelayStatus> {
        self.status.clone()
    }

    /// Waits until `wanted` holds or the relay has ended; gives the status.
    ///
    /// # Errors
    /// [`RelayError::Socket`] when the relay is gone.
    pub async fn wait(
        &self,
        mut wanted: impl FnMut(&RelayStatus) -> bool,
    ) -> Result<RelayStatus, RelayError> {
        let mut status = self.status.clone();
        let found = status.wait_for(|s| s.end.is_some() || wanted(s)).await;
        found.map(|s| s.clone()).map_err(|_| self.gone())
    }

    /// Sends a command; tells whether the relay's state allows it.
    ///
    /// # Errors
    /// [`RelayError::Socket`] when the relay is gone.
    pub async fn command(&self, command: &RelayCommand) -> Result<bool, RelayError> {
        let fail = |source| RelayError::Socket {
            what: "commanding the relay at",
            path: self.path.clone(),
            source,
        };
        let mut text = serde_json::to_vec(command).map_err(|e| fail(e.into()))?;
        text.push(b'\n');
        let mut both = self.write.lock().await;
        both.0.write_all(&text).await.map_err(fail)?;
        match tokio::time::timeout(ANSWER_WITHIN, both.1.recv()).await {
            Ok(answer) => answer.ok_or_else(|| self.gone()),
            Err(_) => {
                // A late answer would be taken for that of the next command.
                self.reader.abort();
                both.1.close();
                Err(fail(std::io::ErrorKind::TimedOut.into()))
            }
        }
    }

    fn gone(&self) -> RelayError {
        RelayError::Socket {
            what: "hearing from the relay at",
            path: self.path.clone(),
            source: std::io::ErrorKind::UnexpectedEof.into(),
        }
    }
}
