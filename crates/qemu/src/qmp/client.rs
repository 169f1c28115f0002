//! The async skin over [`super::proto`].

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_types::{Code, CodedError};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{debug, warn};

use super::events::{Event, EventCursor, EventLog, WaitError};
use super::proto::{Lines, Message, ProtoError, request};

/// Why a QMP exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be reached.
    #[error("connecting to QEMU's control socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The socket failed.
    #[error("talking to QEMU during '{command}'")]
    Io {
        /// The command under way.
        command: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU said something that is no QMP.
    #[error("reading what QEMU says")]
    Proto(#[from] ProtoError),
    /// QEMU refused or failed.
    #[error("QEMU refused '{command}': {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// QEMU is gone.
    #[error("QEMU closed its control socket during '{command}'")]
    Closed {
        /// The command under way.
        command: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer '{command}' within {within:?}")]
    TimedOut {
        /// The command.
        command: String,
        /// How long it had.
        within: Duration,
    },
    /// An event did not come.
    #[error("waiting for QEMU")]
    Wait(#[from] WaitError),
    /// An answer of another form than QMP's schema says.
    #[error("reading QEMU's answer to '{command}'")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

impl CodedError for QmpError {
    fn code(&self) -> Code {
        match self {
            Self::Connect { .. } | Self::Io { .. } | Self::Closed { .. } => Code::Unavailable,
            Self::Wait(WaitError::Closed(_)) => Code::Unavailable,
            Self::TimedOut { .. } | Self::Wait(WaitError::TimedOut(..)) => Code::TimedOut,
            Self::Refused { .. } => Code::Conflict,
            Self::Proto(_) | Self::Answer { .. } | Self::Wait(WaitError::Lagged(_)) => {
                Code::Internal
            }
        }
    }
}

/// How many commands QEMU's main loop has before it at most. QEMU reads no more once eight wait, not
/// even those out of band, which are to help just then.
const IN_BAND: usize = 4;

type Answer = Result<Value, (String, String)>;

#[derive(Debug, Default)]
struct Waiting {
    by_id: HashMap<u64, oneshot::Sender<Answer>>,
    /// The places of the commands that QEMU has before it, answers given up or not.
    in_band: HashMap<u64, OwnedSemaphorePermit>,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    events: Arc<EventLog>,
}

impl Shared {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, id: Option<u64>, answer: Answer) {
        let to = id.and_then(|id| {
            let mut waiting = self.waiting();
            waiting.in_band.remove(&id);
            waiting.by_id.remove(&id)
        });
        match to {
            // The caller may have given up; then nobody wants the answer.
            Some(to) => drop(to.send(answer)),
            None => debug!(?id, "an answer that nobody waits for"),
        }
    }
}

/// A connection to one QMP socket. Commands may be given from several tasks at once.
#[derive(Debug)]
pub struct Qmp {
    shared: Arc<Shared>,
    write: tokio::sync::Mutex<OwnedWriteHalf>,
    places: Arc<Semaphore>,
    next_id: AtomicU64,
    version: String,
    oob: bool,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
        self.shared.events.close();
    }
}

impl Qmp {
    /// How long a command may take when nothing else is said.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// Connects to the socket at `path` and negotiates capabilities.
    ///
    /// # Errors
    /// No such socket, or nobody who speaks QMP behind it within `within`.
    pub async fn connect(path: &Path, within: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        let greet = Self::greet(stream);
        let command = "qmp_capabilities".to_owned();
        match tokio::time::timeout(within, greet).await {
            Ok(done) => done,
            // A second speaker on the same socket waits in QEMU's listen queue for ever.
            Err(_) => Err(QmpError::TimedOut { command, within }),
        }
    }

    async fn greet(stream: UnixStream) -> Result<Self, QmpError> {
        let (mut read, write) = stream.into_split();
        let mut lines = Lines::default();
        let greeting = loop {
            if let Some(line) = lines.next_line()? {
                break Message::parse(&line)?;
            }
            read_some(&mut read, &mut lines, "greeting").await?;
        };
        let Message::Greeting { version, oob } = greeting else {
            return Err(ProtoError::Unknown.into());
        };
        let events = Arc::new(EventLog::new());
        let shared = Arc::new(Shared { waiting: Mutex::default(), events });
        let reader = tokio::spawn(read_all(read, lines, Arc::clone(&shared)));
        let qmp = Self {
            shared,
            write: tokio::sync::Mutex::new(write),
            places: Arc::new(Semaphore::new(IN_BAND)),
            next_id: AtomicU64::new(1),
            version,
            oob,
            reader,
        };
        let enable: &[&str] = if oob { &["oob"] } else { &[] };
        qmp.execute("qmp_capabilities", json!({ "enable": enable })).await?;
        Ok(qmp)
    }

    /// QEMU's version, `major.minor.micro`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// A cursor that sees every event from now on.
    #[must_use]
    pub fn events(&self) -> EventCursor {
        self.shared.events.cursor()
    }

    /// What `pick` gives for the newest event since the connection for which it gives something.
    pub(crate) fn newest_event<T>(&self, pick: impl FnMut(&Event) -> Option<T>) -> Option<T> {
        self.shared.events.newest(pick)
    }

    /// Whether QEMU has closed the socket.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.waiting().closed
    }

    /// Executes `command` with `arguments` (an object, or null for none).
    ///
    /// # Errors
    /// [`QmpError::Refused`] with QEMU's words, or a failed connection.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.exchange(command, arguments, false, Self::PATIENCE).await
    }

    /// As [`Qmp::execute`], answered within `within`.
    ///
    /// # Errors
    /// As [`Qmp::execute`], and [`QmpError::TimedOut`].
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        self.exchange(command, arguments, false, within).await
    }

    /// Hands QEMU a descriptor, which it keeps under `name` until a command takes it.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn hand(&self, name: &str, fd: &OwnedFd) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        self.exchange_with("getfd", arguments, (false, Some(fd)), Self::PATIENCE).await.map(drop)
    }

    /// Executes `command` out of band: it is done even while QEMU's main loop is busy.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_oob(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.exchange(command, arguments, self.oob, Self::PATIENCE).await
    }

    async fn exchange(
        &self,
        command: &str,
        arguments: Value,
        oob: bool,
        within: Duration,
    ) -> Result<Value, QmpError> {
        self.exchange_with(command, arguments, (oob, None), within).await
    }

    async fn exchange_with(
        &self,
        command: &str,
        arguments: Value,
        (oob, fd): (bool, Option<&OwnedFd>),
        within: Duration,
    ) -> Result<Value, QmpError> {
        let closed = || QmpError::Closed { command: command.to_owned() };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (to, answer) = oneshot::channel();
        {
            let mut waiting = self.shared.waiting();
            if waiting.closed {
                return Err(closed());
            }
            waiting.by_id.insert(id, to);
        }
        debug!(id, command, "qmp");
        let line = request(id, command, &arguments, oob);
        let exchange = async {
            let place = match oob {
                true => None,
                false => Some(self.places.clone().acquire_owned().await.map_err(|_| closed())?),
            };
            let mut write = self.write.lock().await;
            if let Some(place) = place {
                let mut waiting = self.shared.waiting();
                if waiting.closed {
                    return Err(closed());
                }
                waiting.in_band.insert(id, place);
            }
            let written = match fd {
                Some(fd) => write_with(&mut write, &line, fd).await,
                None => write.write_all(&line).await,
            };
            drop(write);
            if let Err(source) = written {
                return Err(QmpError::Io { command: command.to_owned(), source });
            }
            match answer.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err((class, desc))) => {
                    Err(QmpError::Refused { command: command.to_owned(), class, desc })
                }
                Err(_) => Err(closed()),
            }
        };
        match tokio::time::timeout(within, exchange).await {
            Ok(done) => done,
            Err(_) => {
                self.shared.waiting().by_id.remove(&id);
                Err(QmpError::TimedOut { command: command.to_owned(), within })
            }
        }
    }
}

/// Writes `line`, the descriptor beside its first byte.
async fn write_with(write: &mut OwnedWriteHalf, line: &[u8], fd: &OwnedFd) -> std::io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let sent = loop {
        let stream: &UnixStream = write.as_ref();
        stream.writable().await?;
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !beside.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(std::io::Error::other("no space for a descriptor"));
        }
        let line = [std::io::IoSlice::new(line)];
        let sent = stream.try_io(Interest::WRITABLE, || {
            Ok(sendmsg(stream, &line, &mut beside, SendFlags::NOSIGNAL)?)
        });
        match sent {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            sent => break sent?,
        }
    };
    write.write_all(&line[sent..]).await
}

async fn read_some(
    read: &mut OwnedReadHalf,
    lines: &mut Lines,
    command: &str,
) -> Result<(), QmpError> {
    match read.read_buf(lines.room()).await {
        Ok(0) => Err(QmpError::Closed { command: command.to_owned() }),
        Ok(_) => Ok(()),
        Err(source) => Err(QmpError::Io { command: command.to_owned(), source }),
    }
}

async fn read_all(mut read: OwnedReadHalf, mut lines: Lines, shared: Arc<Shared>) {
    loop {
        let line = match lines.next_line() {
            Ok(Some(line)) => line,
            Ok(None) => match read_some(&mut read, &mut lines, "events").await {
                Ok(()) => continue,
                Err(_) => break,
            },
            Err(e) => {
                warn!(error = %e, "QEMU's control socket is given up");
                break;
            }
        };
        match Message::parse(&line) {
            Ok(Message::Return { id, value }) => shared.answer(id, Ok(value)),
            Ok(Message::Error { id, class, desc }) => shared.answer(id, Err((class, desc))),
            Ok(Message::Event { name, data, at }) => {
                debug!(%name, %data, "qemu event");
                shared.events.push(Event { name, data, at });
            }
            Ok(Message::Greeting { .. }) => {}
            Err(e) => {
                warn!(error = %e, "QEMU's control socket is given up");
                break;
            }
        }
    }
    let mut waiting = shared.waiting();
    waiting.closed = true;
    waiting.by_id.clear();
    waiting.in_band.clear();
    drop(waiting);
    shared.events.close();
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    const GREETING: &str = "{\"QMP\":{\"version\":{\"qemu\":{\"major\":10,\"minor\":0,\"micro\":2}},\"capabilities\":[\"oob\"]}}\r\n";

    /// A QEMU that answers each line with what `script` says.
    async fn fake(
        path: PathBuf,
        script: impl Fn(&Value) -> Option<String> + Send + 'static,
    ) -> tokio::task::JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            write.write_all(GREETING.as_bytes()).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let ask: Value = serde_json::from_str(&line).unwrap();
                match script(&ask) {
                    Some(reply) => write.write_all(reply.as_bytes()).await.unwrap(),
                    None => return,
                }
            }
        })
    }

    #[tokio::test]
    async fn answers_find_their_caller_and_events_their_cursor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q");
        let _fake = fake(path.clone(), |ask| {
            let id = &ask["id"];
            Some(match ask["execute"].as_str() {
                Some("stop") => format!(
                    "{{\"event\":\"STOP\",\"timestamp\":{{\"seconds\":1,\"microseconds\":2}}}}\n{{\"return\":{{}},\"id\":{id}}}\n"
                ),
                Some("bad") => {
                    format!("{{\"error\":{{\"class\":\"G\",\"desc\":\"no\"}},\"id\":{id}}}\n")
                }
                Some("silent") => String::new(),
                _ => format!("{{\"return\":{{}},\"id\":{id}}}\n"),
            })
        })
        .await;
        let qmp = Qmp::connect(&path, Duration::from_secs(10)).await.unwrap();
        assert_eq!(qmp.version(), "10.0.2");
        let mut events = qmp.events();
        qmp.execute("stop", Value::Null).await.unwrap();
        let stop = events.wait_named("STOP", Duration::from_secs(10)).await.unwrap();
        assert_eq!(stop.at, Duration::from_micros(1_000_002));
        let err = qmp.execute("bad", Value::Null).await.expect_err("refused");
        assert_eq!(err.to_string(), "QEMU refused 'bad': no");
        let short = Duration::from_millis(50);
        let err = qmp.execute_within("silent", Value::Null, short).await.expect_err("late");
        assert_eq!(err.code(), Code::TimedOut);
    }

    #[tokio::test]
    async fn a_qemu_that_dies_ends_every_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q");
        let _fake = fake(path.clone(), |ask| {
            (ask["execute"] == "qmp_capabilities")
                .then(|| format!("{{\"return\":{{}},\"id\":{}}}\n", ask["id"]))
        })
        .await;
        let qmp = Qmp::connect(&path, Duration::from_secs(10)).await.unwrap();
        let mut events = qmp.events();
        let err = qmp.execute("quit", Value::Null).await.expect_err("gone");
        assert!(matches!(err, QmpError::Closed { .. } | QmpError::Io { .. }), "{err:?}");
        assert_eq!(events.next().await, None);
        assert!(qmp.is_closed());
    }
}
