//! Talking to an emulator that runs in another process: one JSON line each way on a unix socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit_types::{Code, CodedError, Name};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::{Counters, LaneSpec, LinkHandle, LinkSpec, Side};

/// No line is longer.
const MAX_LINE: u64 = 16 * 1024;
const DEADLINE: Duration = Duration::from_secs(5);

/// What one may ask of an emulator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the link is and what it carried.
    Status,
    /// Cut the link for some milliseconds, or until `Restore`.
    Cut {
        /// Length; none: until restored.
        for_ms: Option<u64>,
    },
    /// End a cut.
    Restore,
    /// Change one direction.
    Set {
        /// Where the direction starts.
        from: Side,
        /// What it shall be like.
        lane: LaneSpec,
    },
}

/// What an emulator answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The state after the request was carried out.
    State {
        /// The link as it was made.
        spec: Box<LinkSpec>,
        /// From A to B now.
        a_to_b: LaneSpec,
        /// From B to A now.
        b_to_a: LaneSpec,
        /// Whether it is cut.
        cut: bool,
        /// Since the start.
        counters: Counters,
    },
    /// The request was refused.
    Refused {
        /// Why.
        why: String,
    },
}

/// The control socket could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No emulator answers there.
    #[error("could not {doing} the emulator at {path}; is it up?")]
    Socket {
        /// What was being done.
        doing: &'static str,
        /// Path of the socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// What it answered is not an answer.
    #[error("the emulator's answer cannot be read")]
    Answer(#[source] serde_json::Error),
}

impl CodedError for ControlError {
    fn code(&self) -> Code {
        match self {
            Self::Socket { .. } => Code::Unavailable,
            Self::Answer(_) => Code::Damaged,
        }
    }
}

/// Where the emulator of the link `name` listens.
#[must_use]
pub fn control_path(name: &Name) -> PathBuf {
    PathBuf::from(format!("/run/godwit/link-{name}.sock"))
}

fn answer(link: &LinkHandle, line: &str) -> Reply {
    let request: Request = match serde_json::from_str(line) {
        Ok(r) => r,
        Err(e) => return Reply::Refused { why: format!("the request cannot be read: {e}") },
    };
    match request {
        Request::Status => {}
        Request::Cut { for_ms } => link.cut(for_ms.map(Duration::from_millis)),
        Request::Restore => link.restore(),
        Request::Set { from, lane } => {
            if let Err(e) = link.set(from, lane) {
                return Reply::Refused { why: e.to_string() };
            }
        }
    }
    Reply::State {
        spec: Box::new(link.spec().clone()),
        a_to_b: link.lane(Side::A),
        b_to_a: link.lane(Side::B),
        cut: link.is_cut(),
        counters: link.counters(),
    }
}

/// Answers requests at `path` until the future is dropped; an old socket there is replaced.
///
/// # Errors
/// [`ControlError::Socket`] when the socket cannot be made.
pub async fn serve(link: Arc<LinkHandle>, path: &Path) -> Result<(), ControlError> {
    let failed =
        |doing| move |source| ControlError::Socket { doing, path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("replace")(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("listen for"))?;
    loop {
        let (stream, _) = listener.accept().await.map_err(failed("accept for"))?;
        let link = Arc::clone(&link);
        tokio::spawn(async move {
            let (read, mut write) = stream.into_split();
            let mut lines = tokio::io::BufReader::new(read.take(MAX_LINE)).lines();
            let one = async {
                if let Ok(Some(line)) = lines.next_line().await
                    && let Ok(mut out) = serde_json::to_vec(&answer(&link, &line))
                {
                    out.push(b'\n');
                    // A peer that has gone needs no answer.
                    let _ = write.write_all(&out).await;
                }
            };
            let _ = tokio::time::timeout(DEADLINE, one).await;
        });
    }
}

/// Sends one request to the emulator at `path` and waits for its answer, 5 s at most.
///
/// # Errors
/// [`ControlError`] when nobody answers or the answer is none.
pub fn request(path: &Path, request: &Request) -> Result<Reply, ControlError> {
    let failed =
        |doing| move |source| ControlError::Socket { doing, path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(failed("reach"))?;
    stream.set_read_timeout(Some(DEADLINE)).map_err(failed("set up"))?;
    stream.set_write_timeout(Some(DEADLINE)).map_err(failed("set up"))?;
    let mut line = serde_json::to_vec(request).map_err(ControlError::Answer)?;
    line.push(b'\n');
    stream.write_all(&line).map_err(failed("ask"))?;
    let mut reply = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut reply).map_err(failed("hear"))?;
    serde_json::from_str(&reply).map_err(ControlError::Answer)
}
